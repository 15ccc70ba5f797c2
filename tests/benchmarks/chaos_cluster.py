"""Ray nodes as processes of this machine, what runs on them, and how it is killed.

Every node is a raylet of its own beside a head that takes no sections; all of them share this machine's folders. What is killed is
found in /proc: a raylet's workers are its children, and Ray writes into their titles what they run. Where nodes have network
namespaces of their own, one that is cut off loses its network; else its raylet is stopped.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__:
    from .chaos_network import BRIDGE_ADDRESS, Namespace, namespaces
else:
    from chaos_network import BRIDGE_ADDRESS, Namespace, namespaces

Kind = Literal["task", "actor", "raylet", "cut", "driver"]
KINDS: tuple[Kind, ...] = ("task", "actor", "raylet", "cut", "driver")
MARKER = "DCQ_CHAOS"
# What else bears such titles: a node's idle workers, and Ray's own helpers.
NO_WORK = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")
ACTORS = re.compile("SectionWorker|StreamWorker|Stitcher|Reducer|dcq:[^:]*:section-")
# A node that does not answer for about ten seconds is dead; Ray's own settings wait for about a minute.
SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
# Some cuts end before Ray takes the node for dead, and some after.
MIN_CUT_SECONDS, MAX_CUT_SECONDS = 2.0, 20.0
SETTLE_SECONDS = 180.0
OBJECT_STORE_BYTES = 100 * 2**20
# Ray takes 127.0.0.1 for the address of this machine in its network, and where nodes are told to be there, nothing listens on that.
HEAD_ADDRESS = "127.0.0.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A living process."""

    pid: int
    parent: int
    title: str

    @property
    def is_busy(self) -> bool:
        """Whether it is a worker that runs a task or holds an actor."""
        name = self.title.removeprefix("ray::")
        return name != self.title and not name.startswith(NO_WORK)

    @property
    def is_actor(self) -> bool:
        """Whether it holds one of the actors of a run."""
        return ACTORS.match(self.title.removeprefix("ray::")) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What is killed, and when: at `seconds` after a run's start, or as soon after it as there is one."""

    kind: Kind
    seconds: float


def processes() -> list[Process]:
    """The living processes of this machine, zombies left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            # It may have ended since, or be another user's.
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                if state != "Z":
                    found.append(Process(pid=int(folder.name), parent=int(parent), title=title))
    return found


def marked(value: str) -> list[int]:
    """The processes, but this one, that were started with MARKER=value in their environment."""
    found = []
    for process in processes():
        with contextlib.suppress(OSError):
            entries = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if process.pid != os.getpid() and f"{MARKER}={value}".encode() in entries:
                found.append(process.pid)
    return found


def send(pid: int, signal_number: signal.Signals) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return False
    return True


class Nodes:
    """A cluster's worker nodes; those that die are replaced by `mend`, and those that were cut off come back there."""

    def __init__(self, cluster: Any, num_nodes: int, places: Sequence[Namespace] = ()) -> None:
        """`places`: a namespace for every node; empty where all are in this one."""
        self._cluster, self._num_nodes = cluster, num_nodes
        self._places = places
        self._cut_until: dict[int, float] = {}
        self.address: str = cluster.address

    def mend(self) -> None:
        """Let what was cut off long enough go on, and put a new node in the place of each one that is dead."""
        for pid, until in list(self._cut_until.items()):
            if time.monotonic() >= until:
                del self._cut_until[pid]
                self._connect(pid, True)
        for node in list(self._cluster.worker_nodes):
            if _raylet(node).poll() is not None:
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < self._num_nodes:
            taken = {node.node_ip_address for node in self._cluster.worker_nodes}
            place = next((place for place in self._places if place.address not in taken), None)
            if place is not None:
                # Who was there may have died while it was cut off.
                place.plug(True)
            with contextlib.nullcontext() if place is None else place.inside():
                self._cluster.add_node(
                    wait=False,
                    num_cpus=1,
                    node_ip_address=HEAD_ADDRESS if place is None else place.address,
                    object_store_memory=OBJECT_STORE_BYTES,
                )

    def settle(self) -> None:
        """Let all go on that was cut off, and wait until Ray counts as many living nodes as there are."""
        self._cut_until = dict.fromkeys(self._cut_until, 0.0)
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            self.mend()
            try:
                self._cluster.wait_for_nodes(timeout=1.0)
                return
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def workers(self) -> list[Process]:
        """What works on these nodes for a run, in a fixed order."""
        raylets = {_raylet(node).pid for node in self._cluster.list_all_nodes()}
        busy = (process for process in processes() if process.parent in raylets and process.is_busy)
        return sorted(busy, key=lambda process: process.pid)

    def victims(self) -> dict[Kind, list[Process]]:
        """What a kill of each kind may hit now: workers, or raylets of nodes that have some. Drivers are not known here."""
        workers = self.workers()
        working = {worker.parent for worker in workers}
        raylets = sorted(_raylet(node).pid for node in self._cluster.worker_nodes if _raylet(node).poll() is None)
        # Who is cut off already, is not cut off again.
        pids = [pid for pid in raylets if pid in working and pid not in self._cut_until]
        nodes = [Process(pid=pid, parent=os.getpid(), title="a node") for pid in pids]
        actors = [worker for worker in workers if worker.is_actor]
        tasks = [worker for worker in workers if not worker.is_actor]
        return {"task": tasks, "actor": actors, "raylet": nodes, "cut": nodes}

    def strike(self, kind: Kind, generator: random.Random) -> str | None:
        """Kill one victim of a kind, or cut it off for some seconds, and say what it was; None where there is none now."""
        victims = self.victims()[kind]
        if not victims:
            return None
        victim = generator.choice(victims)
        if kind != "cut":
            return victim.title if send(victim.pid, signal.SIGKILL) else None
        seconds = generator.uniform(MIN_CUT_SECONDS, MAX_CUT_SECONDS)
        self._cut_until[victim.pid] = time.monotonic() + seconds
        return f"{victim.title} for {seconds:.1f} s" if self._connect(victim.pid, False) else None

    def _connect(self, pid: int, connected: bool) -> bool:
        """Cut the node with a raylet off, or let it go on; whether it was there."""
        addresses = [node.node_ip_address for node in self._cluster.worker_nodes if _raylet(node).pid == pid]
        place = next((place for place in self._places if place.address in addresses), None)
        if not self._places:
            return send(pid, signal.SIGSTOP if not connected else signal.SIGCONT)
        if place is not None:
            place.plug(connected)
        return place is not None

    def stop(self) -> None:
        """End all nodes, the head last."""
        for pid in self._cut_until:
            self._connect(pid, True)
        self._cut_until.clear()
        for node in self._cluster.list_all_nodes()[::-1]:
            self._cluster.remove_node(node, allow_graceful=False)


def _raylet(node: Any) -> Any:
    """The process of a node's raylet, as Ray started it."""
    return node.all_processes["raylet"][0].process


@contextlib.contextmanager
def nodes(root: Path, num_nodes: int, *, apart: bool = False) -> Iterator[Nodes]:
    """A head and so many nodes with one CPU each, on loopback, with a token of their own; what they started ends with the block.

    Args:
        root: where Ray keeps its sockets and logs; a short path. Sets RAY_TMPDIR, the token and the marker of this process.
        apart: every node in a network namespace of its own; needs root.
    """
    with (
        namespaces(num_nodes) if apart else contextlib.nullcontext(()) as places,
        _nodes(root, num_nodes, places) as started,
    ):
        yield started


@contextlib.contextmanager
def _nodes(root: Path, num_nodes: int, places: Sequence[Namespace]) -> Iterator[Nodes]:
    os.environ.update(
        {
            MARKER: str(root),
            "RAY_TMPDIR": str(root),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
    )
    # Ray reads the token when it is imported.
    from ray.cluster_utils import Cluster

    try:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "node_ip_address": BRIDGE_ADDRESS if places else HEAD_ADDRESS,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_system_config": SYSTEM_CONFIG,
            },
            shutdown_at_exit=False,
        )
        started = Nodes(cluster, num_nodes, places)
        try:
            started.settle()
            yield started
        finally:
            started.stop()
    finally:
        # Workers whose raylet was killed end by themselves, but not at once.
        for pid in marked(str(root)):
            send(pid, signal.SIGKILL)
