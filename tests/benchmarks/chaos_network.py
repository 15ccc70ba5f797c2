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
OTHER_PREFIX = "203.0.113"
BRIDGE = "dcq-chaos"
BRIDGE_ADDRESS = f"{PREFIX}.1"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A network namespace at the end of a cable to the bridge."""

    number: int
    bridge: str = BRIDGE
    prefix: str = PREFIX

    @property
    def name(self) -> str:
        return f"{self.bridge}-{self.number}"

    @property
    def cable(self) -> str:
        """The bridge's end; at most 15 characters."""
        return f"{self.bridge.replace('-', '')}{self.number}"

    @property
    def address(self) -> str:
        return f"{self.prefix}.{10 + self.number}"

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
def namespaces(count: int, *, bridge: str = BRIDGE, prefix: str = PREFIX) -> Iterator[tuple[Namespace, ...]]:
    """So many namespaces on one bridge, whose own end has address 1 (`BRIDGE_ADDRESS`); all are removed in the end."""
    made = tuple(Namespace(number=number, bridge=bridge, prefix=prefix) for number in range(count))
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{prefix}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for namespace in made:
            _ip("netns", "add", namespace.name)
            _ip("link", "add", namespace.cable, "type", "veth", "peer", "name", "eth0", "netns", namespace.name)
            _ip("link", "set", namespace.cable, "master", bridge, "up")
            _ip("-n", namespace.name, "addr", "add", f"{namespace.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace.name, "link", "set", device, "up")
            # Programs find their own address by asking which one leads anywhere.
            _ip("-n", namespace.name, "route", "add", "default", "via", f"{prefix}.1")
        yield made
    finally:
        for namespace in made:
            _ip("netns", "delete", namespace.name, check=False)
        _ip("link", "delete", bridge, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; it needs root and iproute2")


def _enter(descriptor: int) -> None:
    # os.setns is Python 3.12's.
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
