"""Joining or starting a Ray, and what each section gets of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from dcq_ray.errors import ClusterError
from dcq_ray.spec import Job

PROBE_SECONDS = 2.0
ACCELERATOR_PREFIX = "accelerator_type:"
# Ray's own `accelerator_type=` asks for so much of the 1.0 that a node has, so that any number of workers fits.
ACCELERATOR_AMOUNT = 0.001
# What is used up; a type of GPU is only had or not.
_COUNTED = ("CPU", "GPU", "memory")
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP2_SETTINGS_TYPE = 4
# A frame's header: length in three bytes, type, flags, stream in four.
HTTP2_EMPTY_SETTINGS = bytes([0, 0, 0, HTTP2_SETTINGS_TYPE, 0, 0, 0, 0, 0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What Ray reserves for one section, one dump task or one measurement, and how many fit at once."""

    num_cpus: float
    num_gpus: float
    places: int
    memory_bytes: int = 0
    """0: no memory is reserved."""
    accelerator: str | None = None
    """The only type of GPU that will do; None: any."""

    @property
    def options(self) -> dict[str, Any]:
        """As Ray's `.options` takes it."""
        asked: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.memory_bytes:
            asked["memory"] = self.memory_bytes
        if self.accelerator is not None:
            asked["resources"] = {accelerator_resource(self.accelerator): ACCELERATOR_AMOUNT}
        return asked

    @property
    def bundle(self) -> dict[str, float]:
        """As an autoscaler is asked for it."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory_bytes}
        return {name: amount for name, amount in {**named, **self.options.get("resources", {})}.items() if amount}


@contextlib.contextmanager
def connected(address: str, *, environment: Mapping[str, str], log_to_driver: bool = False) -> Iterator[str]:
    """Join or start a Ray, and leave it at the end; yields a phrase that says which.

    Args:
        address: `auto` joins the cluster that RAY_ADDRESS or this machine's running Ray names if it answers within two
            seconds, else starts a local one; `local` always starts one; anything else is a cluster's address.

    Raises:
        ClusterError: the address that was asked for does not answer.
    """
    target = None if address == "local" else _find_cluster(address, environment)
    # Ray warns of many things that are no concern of who quantizes a network; errors still reach the driver as exceptions.
    quiet = {"logging_level": "ERROR", "log_to_driver": log_to_driver}
    try:
        with _own_sigterm():
            if target is None:
                ray.init(address="local", include_dashboard=False, **quiet)
                phrase = "a local Ray"
            else:
                ray.init(address=target, **quiet)
                phrase = f"the Ray cluster at {target}"
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise ClusterError(
            f"Ray could not be {'started here' if target is None else f'joined at {target}'}: {error}; "
            "run with --address none to do without Ray"
        ) from error
    try:
        yield phrase
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which ray.init replaces by one that exits with 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        # Ray's own handler had its way in between.
        if error.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _find_cluster(address: str, environment: Mapping[str, str]) -> str | None:
    """The address of a cluster that answers, or None where `auto` finds none."""
    if address != "auto":
        if not answers(address, PROBE_SECONDS):
            raise ClusterError(
                f"--address {address}: no Ray answers there within {PROBE_SECONDS:g} s; is the cluster up, is the port the "
                "GCS port (6379 unless told), or ray://HOST:10001 for the client port? Use --address local to start one here"
            )
        return address
    candidates = [environment.get("RAY_ADDRESS"), address_file(environment)]
    for candidate in candidates:
        # A Ray job's own address may be "auto": the file below then says what it means.
        if candidate and candidate not in ("auto", "local") and answers(candidate, PROBE_SECONDS):
            return candidate
    return None


def address_file(environment: Mapping[str, str]) -> str | None:
    """The GCS address of this machine's own Ray, as Ray notes it; what it names may be gone."""
    path = os.path.join(environment.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip() or None
    except OSError:
        return None


def answers(address: str, timeout_seconds: float) -> bool:
    """Whether what listens at HOST:PORT or ray://HOST:PORT speaks gRPC, as Ray does; never waits longer than asked.

    Only the first words of the protocol are exchanged (RFC 9113, section 3.4). Ray's own client would do, but it cannot be
    told to give up, and a thread that is left waiting in it may crash the process at its end.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return False
    deadline = time.monotonic() + timeout_seconds
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds) as connection:
            # Behind TLS nothing is said to who does not begin with its own handshake.
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return True
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.sendall(HTTP2_PREFACE + HTTP2_EMPTY_SETTINGS)
            header = connection.recv(9, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(header) == 9 and header[3] == HTTP2_SETTINGS_TYPE


def section_share(job: Job, num_sections: int, nodes: Sequence[Mapping[str, float]], least_gpus: float = 0.0) -> Share:
    """What each section gets on nodes with these resources, as Ray names them; raises ClusterError where none fits.

    With `gpus_per_section: auto` the GPUs are dealt over the sections: one each at most, and below that a unit fraction, so
    that a whole number of sections shares a card.

    Args:
        least_gpus: the part of a card below which `auto` does not go, in (0, 1]; 0: any part will do.
    """
    share = wanted_share(job, num_sections, nodes, least_gpus)
    amounts = share.bundle
    # The small number forgives sums such as 3 * (1 / 3).
    places = sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in amounts.items() if name in _COUNTED)
        for node in nodes
        if all(name in node for name in amounts)
    )
    if places == 0:
        have = "; ".join(_told(node, memory=share.memory_bytes > 0) for node in nodes) or "no node"
        remedies = ["lower resources.cpus_per_section"]
        if share.num_gpus:
            remedies.append("lower resources.gpus_per_section")
        if share.memory_bytes:
            remedies.append("lower resources.memory_per_section")
        if share.accelerator:
            remedies.append("name another resources.accelerator")
        if not job.resources.wait_seconds:
            remedies.append("let the run wait for an autoscaler's nodes by resources.wait_seconds")
        needed = f" and {share.memory_bytes:,} bytes of memory" if share.memory_bytes else ""
        raise ClusterError(
            f"resources: a section asks for {share.num_cpus:g} CPUs and {share.num_gpus:g} GPUs"
            f"{f' of type {share.accelerator}' if share.accelerator else ''}{needed}, but no node of the cluster has them "
            f"({have}); {', or '.join(remedies)}"
        )
    return replace(share, places=places)


def larger_share(share: Share) -> Share | None:
    """With half as many on a card; None where a section has a whole one, or none."""
    if not 0 < share.num_gpus < 1:
        return None
    on_card = round(1 / share.num_gpus)
    return replace(share, num_gpus=1 / (on_card // 2), places=max(1, share.places // on_card * (on_card // 2)))


def wanted_share(job: Job, num_sections: int, nodes: Sequence[Mapping[str, float]], least_gpus: float = 0.0) -> Share:
    """What each of so many sections asks for, whether there is a place for it or not; `least_gpus`: as of `section_share`."""
    asked, accelerator = job.resources, job.resources.accelerator
    if asked.gpus_per_section != "auto":
        num_gpus = asked.gpus_per_section
    else:
        num_cards = count_cards(job, nodes)
        # With a type in mind, and none of it there, a section is not to end on a CPU.
        num_gpus = 1.0 / on_a_card(num_sections, num_cards, least_gpus) if num_cards else float(accelerator is not None)
    return Share(
        num_cpus=asked.cpus_per_section,
        num_gpus=num_gpus,
        places=0,
        memory_bytes=0 if asked.memory_per_section == "auto" else asked.memory_per_section,
        accelerator=accelerator if num_gpus else None,
    )


def count_cards(job: Job, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many GPUs nodes have that a job may use."""
    accelerator = job.resources.accelerator
    return int(
        sum(node.get("GPU", 0.0) for node in nodes if accelerator is None or accelerator_resource(accelerator) in node)
    )


def on_a_card(num_sections: int, num_cards: int, least_gpus: float) -> int:
    """How many sections share a card: as many as it takes to place all at once, but no more than fit into it."""
    dealt = max(1, -(-num_sections // num_cards))
    # The small number forgives quotients such as 1 / 0.02.
    return min(dealt, max(1, int(1 / least_gpus + 1e-9))) if least_gpus else dealt


def accelerator_resource(accelerator: str) -> str:
    """The resource by which Ray marks the nodes that have a type of GPU."""
    return f"{ACCELERATOR_PREFIX}{accelerator}"


def _told(node: Mapping[str, float], *, memory: bool) -> str:
    types = [name.removeprefix(ACCELERATOR_PREFIX) for name in node if name.startswith(ACCELERATOR_PREFIX)]
    free = f", {node.get('memory', 0):,.0f} bytes of memory" if memory else ""
    named = f" ({', '.join(types)})" if types else ""
    return f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs{named}{free}"


def node_resources() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
