"""What every node of a cluster must have: the driver's versions, and its folders."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import ray

from dcq_ray.errors import ClusterError, StorageError
from dcq_ray.storage import open_store
from dcq_ray.version import __version__

# A node may have to start a worker process first, and load this package there.
NODE_ANSWER_SECONDS = 120.0


def check_shared(folders: Sequence[str]) -> None:
    """Refuse nodes of other versions, and folders, or URIs, that some node of the cluster does not see as this process does.

    A token is written into each folder and read by a short task on every node that has CPUs. Where there is no node but this
    machine's, nothing is asked.

    Raises:
        ClusterError: it names the nodes and the versions or folders; a node that dies meanwhile is not one of them.
        StorageError: a folder cannot be written from here.
    """
    nodes = {n["NodeID"]: f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})" for n in ray.nodes() if _works(n)}
    if set(nodes) <= {_own_node()}:
        return
    # First, because an older version may not know what it is asked next.
    refuse_other_versions(ask_nodes(nodes, versions, late=lambda _: {}, broken=lambda why: {"dcq-ray": why}))
    stores = [open_store(folder) for folder in dict.fromkeys(folders)]
    uris = tuple(store.uri for store in stores)
    name = f".seen-{secrets.token_hex(8)}"

    def all_unseen(why: str) -> dict[str, str]:
        return dict.fromkeys(uris, why)

    with contextlib.ExitStack() as stack:
        for store in stores:
            store.write_bytes(name, name.encode())
            stack.callback(store.delete, name)
        refuse_unseen(ask_nodes(nodes, unseen, uris, name, late=all_unseen, broken=all_unseen))


def ask_nodes(
    nodes: Mapping[str, str],
    question: Callable[..., dict[str, str]],
    *arguments: Any,
    late: Callable[[str], dict[str, str]],
    broken: Callable[[str], dict[str, str]],
) -> dict[str, dict[str, str]]:
    """What each node (its id -> how a user knows it) answers to a question that is a function of a module.

    Args:
        late, broken: what stands, given the reason, for the answer of a node that gives none in time, or an error.
    """
    waiting = {
        ray.remote(question)
        .options(
            name=f"dcq:ask-node:{question.__name__}",
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(*arguments): told
        for node, told in nodes.items()
    }
    answers = {}
    ready, slow = ray.wait(list(waiting), num_returns=len(waiting), timeout=NODE_ANSWER_SECONDS)
    for reference in ready:
        # A node that died is no place where work goes to.
        with contextlib.suppress(ray.exceptions.RayError):
            try:
                answers[waiting[reference]] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                answers[waiting[reference]] = broken(str(error.cause or error).strip().splitlines()[-1])
    for reference in slow:
        ray.cancel(reference)
        answers[waiting[reference]] = late(f"no answer within {NODE_ANSWER_SECONDS:g} s")
    return answers


def versions() -> dict[str, str]:
    """What makes students differ, as installed here: versions of this package, of torch less its build, and of Python."""
    return {
        "dcq-ray": __version__,
        "torch": version("torch").partition("+")[0],
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def refuse_other_versions(answers: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ClusterError where a node (how a user knows it -> package -> version) has not the driver's versions."""
    own = versions()
    other = {
        node: ", ".join(f"{name} {found[name]} (driver: {own[name]})" for name in found if found[name] != own[name])
        for node, found in answers.items()
    }
    told = "; ".join(f"node {node}: {why}" for node, why in other.items() if why)
    if told:
        raise ClusterError(
            f"{sum(map(bool, other.values()))} of the cluster's {len(answers)} nodes have other versions than the driver: {told}; "
            "install the same on all nodes, since the student depends on them"
        )


def unseen(uris: tuple[str, ...], name: str) -> dict[str, str]:
    """Which of these folders do not hold the token of that name here, and why."""
    found = {}
    for uri in uris:
        try:
            if open_store(uri).read_bytes_or_none(name) != name.encode():
                found[uri] = "what the driver writes there is not seen"
        except StorageError as error:
            found[uri] = str(error)
    return found


def refuse_unseen(answers: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ClusterError where a node (how a user knows it -> folder -> why) does not see a folder."""
    blind = {node: why for node, why in answers.items() if why}
    if not blind:
        return
    told = "; ".join(
        f"node {node}: " + ", ".join(f"{uri} ({why})" for uri, why in found.items()) for node, found in blind.items()
    )
    raise ClusterError(
        f"{len(blind)} of the cluster's {len(answers)} nodes do not see storage.run_dir or storage.cache_dir as the driver does: "
        f"{told}; name a URI that all nodes reach (such as s3://bucket/runs), or a folder that is mounted on all of them"
    )


def _works(node: Mapping[str, Any]) -> bool:
    return bool(node["Alive"] and node["Resources"].get("CPU", 0.0) > 0)


def _own_node() -> str | None:
    """The node that runs on this machine, None where this process is a client of a cluster elsewhere."""
    return None if ray.util.client.ray.is_connected() else ray.get_runtime_context().get_node_id()
