"""Network namespaces of this machine, a bridge between them, and cables that can be pulled; needs root and iproute2.

Each node of a cluster has a namespace with an address of its own, so that a cut is one: packets are lost in both directions, while
what runs on the node goes on and still reaches this machine's folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Addresses of documentation (RFC 5737): no real network has them.
PREFIX = "198.51.100"
BRIDGE = "dcq-chaos"
BRIDGE_ADDRESS = f"{PREFIX}.1"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A network namespace at the end of a cable to the bridge."""

    number: int

    @property
    def name(self) -> str:
        return f"dcq-chaos-{self.number}"

    @property
    def cable(self) -> str:
        """The bridge's end; at most 15 characters."""
        return f"dcqchaos{self.number}"

    @property
    def address(self) -> str:
        return f"{PREFIX}.{10 + self.number}"

    def plug(self, connected: bool) -> None:
        """Pull the cable, or plug it in."""
        _ip("link", "set", self.cable, "up" if connected else "down")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread starts in the block runs in the namespace."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with Path(f"/var/run/netns/{self.name}").open("rb") as other:
                _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own)
        finally:
            os.close(own)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[tuple[Namespace, ...]]:
    """So many namespaces on one bridge, whose own end has `BRIDGE_ADDRESS`; all are removed in the end."""
    made = tuple(Namespace(number=number) for number in range(count))
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{BRIDGE_ADDRESS}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for namespace in made:
            _ip("netns", "add", namespace.name)
            _ip("link", "add", namespace.cable, "type", "veth", "peer", "name", "eth0", "netns", namespace.name)
            _ip("link", "set", namespace.cable, "master", BRIDGE, "up")
            _ip("-n", namespace.name, "addr", "add", f"{namespace.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace.name, "link", "set", device, "up")
        yield made
    finally:
        for namespace in made:
            _ip("netns", "delete", namespace.name, check=False)
        _ip("link", "delete", BRIDGE, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; it needs root and iproute2")


def _enter(descriptor: int) -> None:
    # os.setns is Python 3.12's.
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
