"""Runs on Ray: the same student as in-process, placement, addresses."""

from __future__ import annotations

import copy
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dcq_ray.errors import ClusterError, StorageError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, run_local
from dcq_ray.records import Progress
from dcq_ray.remote import answers, run_remote, section_share
from dcq_ray.spec import Job


def job_of(document: dict[str, Any], **storage: str) -> Job:
    document = copy.deepcopy(document)
    document["storage"].update(storage)
    return resolve_job(document, source="test")


@pytest.mark.slow
@pytest.mark.ray
def test_ray_and_in_process_give_the_same_student(job_document: dict[str, Any], tmp_path: Path) -> None:
    job_document["quantize"] |= {"activations": {"scheme": "lsq", "bits": 4}, "weights": {"scheme": "ttq", "bits": 2}}
    local = run_local(job_of(job_document), str(tmp_path), emit=ignore_progress, owner="test")
    events: list[Progress] = []
    said: list[str] = []
    # A cache of its own: the activations are dumped by Ray tasks too.
    job = job_of(job_document, run_dir=str(tmp_path / "ray-run"), cache_dir=str(tmp_path / "ray-cache"))
    remote = run_remote(
        job,
        str(tmp_path),
        address="local",
        environment=os.environ,
        emit=events.append,
        say=said.append,
        owner="test",
    )
    assert remote.student == local.student
    assert remote.teacher == local.teacher
    assert remote.untrained_top1 == local.untrained_top1
    assert remote.validation == local.validation
    assert [section.top1_alone for section in remote.sections] == [section.top1_alone for section in local.sections]
    assert {event.index for event in events if event.phase == "train" and event.state == "done"} == {0, 1, 2}
    assert "a local Ray" in said[0]


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_with_fewer_places_than_sections_and_gpus_that_cuda_lacks(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    memory = 2**28
    job_document["resources"] = {"gpus_per_section": 1, "accelerator": "A100", "memory_per_section": memory}
    local = run_local(job_of(job_document), str(tmp_path), emit=ignore_progress, owner="test")
    # Ray schedules the GPUs that a node declares, there or not: placement is tested without one.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    try:
        cluster.add_node(num_cpus=2, num_gpus=2, memory=2 * memory, resources={"accelerator_type:A100": 1.0})
        # Cards of another type, and of that type without the memory.
        cluster.add_node(num_cpus=2, num_gpus=2, memory=2 * memory, resources={"accelerator_type:L4": 1.0})
        cluster.add_node(num_cpus=2, num_gpus=2, memory=memory // 2, resources={"accelerator_type:A100": 1.0})
        said: list[str] = []
        address = cluster.address
        remote = run_remote(
            job_of(job_document, run_dir=str(tmp_path / "ray-run")),
            str(tmp_path),
            address=address,
            environment={},
            emit=ignore_progress,
            say=said.append,
            owner="test",
        )
    finally:
        cluster.shutdown()
    assert said == [f"running on the Ray cluster at {address}: 2 sections at once on cpu"]
    assert remote.student == local.student


def job_with(document: dict[str, Any], gpus: float | str, cpus: float = 1) -> Job:
    document = copy.deepcopy(document)
    document["resources"] = {"gpus_per_section": gpus, "cpus_per_section": cpus}
    return resolve_job(document, source="test")


@pytest.mark.parametrize(
    ("gpus", "num_sections", "nodes", "expected"),
    [
        ("auto", 4, [{"CPU": 8}], (0.0, 8)),
        ("auto", 4, [{"CPU": 8, "GPU": 4}], (1.0, 4)),
        ("auto", 4, [{"CPU": 8, "GPU": 8}], (1.0, 8)),
        ("auto", 4, [{"CPU": 8, "GPU": 1}], (0.25, 4)),
        ("auto", 3, [{"CPU": 8, "GPU": 1}], (1 / 3, 3)),
        ("auto", 5, [{"CPU": 8, "GPU": 2}], (1 / 3, 6)),
        (0.5, 4, [{"CPU": 1, "GPU": 1}, {"CPU": 8, "GPU": 1}], (0.5, 3)),
        (0, 4, [{"CPU": 2, "GPU": 1}], (0.0, 2)),
    ],
)
def test_share_of_a_section(
    job_document: dict[str, Any],
    gpus: float | str,
    num_sections: int,
    nodes: list[dict[str, float]],
    expected: tuple[float, int],
) -> None:
    share = section_share(job_with(job_document, gpus), num_sections, nodes)
    assert (share.num_gpus, share.places) == (pytest.approx(expected[0]), expected[1])


A100, L4 = ({"CPU": 8.0, "GPU": 2.0, "memory": 40e9, f"accelerator_type:{name}": 1.0} for name in ("A100", "L4"))
CPUS = {"CPU": 8.0, "memory": 40e9}


@pytest.mark.parametrize(
    ("resources", "num_gpus", "places", "options"),
    [
        # Of a mixed cluster only the cards of the type count, and two sections share each.
        ({"accelerator": "A100"}, 0.5, 4, {"resources": {"accelerator_type:A100": 0.001}}),
        ({"accelerator": "L4", "gpus_per_section": 1}, 1, 2, {"resources": {"accelerator_type:L4": 0.001}}),
        ({"accelerator": "A100", "gpus_per_section": 0}, 0, 24, {}),
        # Memory is used up as processors are.
        ({"gpus_per_section": 0, "memory_per_section": 15_000_000_000}, 0, 6, {"memory": 15_000_000_000}),
        ({"gpus_per_section": 1, "memory_per_section": 30_000_000_000}, 1, 2, {"memory": 30_000_000_000}),
    ],
)
def test_types_of_gpus_and_memory_are_asked_for(
    job_document: dict[str, Any],
    resources: dict[str, Any],
    num_gpus: float,
    places: int,
    options: dict[str, Any],
) -> None:
    job = resolve_job({**job_document, "resources": resources}, source="test")
    share = section_share(job, 4, [A100, L4, CPUS])
    assert (share.num_gpus, share.places) == (num_gpus, places)
    assert share.options == {"num_cpus": 1.0, "num_gpus": num_gpus, **options}
    # An autoscaler is asked for the same.
    told = {"CPU": 1.0, **({"GPU": num_gpus} if num_gpus else {}), **options.get("resources", {})}
    assert share.bundle == told | ({"memory": options["memory"]} if "memory" in options else {})


def test_a_type_of_gpu_that_no_node_has_is_refused_and_told_with_what_there_is(job_document: dict[str, Any]) -> None:
    job = resolve_job({**job_document, "resources": {"accelerator": "H100"}}, source="test")
    with pytest.raises(ClusterError, match=r"1 GPUs of type H100, but .*8 CPUs and 2 GPUs \(A100\).*8 CPUs and 0 GPUs"):
        section_share(job, 4, [A100, CPUS])


def test_resources_that_no_node_has_are_refused(job_document: dict[str, Any]) -> None:
    with pytest.raises(ClusterError, match="asks for 16 CPUs and 0 GPUs, but no node of the cluster has them"):
        section_share(job_with(job_document, "auto", cpus=16), 2, [{"CPU": 8}, {"CPU": 8}])


def test_dead_addresses_do_not_hang() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        mute = f"127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        assert not answers(mute, 0.5)
        assert not answers(f"ray://{mute[:-1]}x", 0.5)
        assert time.monotonic() - started < 5
    assert not answers(mute, 0.5)
    assert not answers("nonsense", 0.5)


def test_what_speaks_grpc_answers_and_what_says_something_else_does_not() -> None:
    def served(words: bytes) -> bool:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            speaker = threading.Thread(target=lambda: listener.accept()[0].sendall(words))
            speaker.start()
            heard = answers(f"127.0.0.1:{listener.getsockname()[1]}", 5)
            speaker.join()
        return heard

    # A server's preface is a SETTINGS frame: 0 bytes long, type 4, no flags, stream 0.
    assert served(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    assert not served(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert not served(b"SSH")


def test_a_wrong_place_for_files_is_told_before_ray_is_asked_for(job_document: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(job_document, run_dir="s3://key:word@bucket/run")
    with pytest.raises(StorageError, match="credentials stand in the address"):
        run_remote(
            job,
            str(tmp_path),
            address="127.0.0.1:1",
            environment={},
            emit=ignore_progress,
            say=lambda _: None,
            owner="test",
        )


def test_an_explicit_address_that_is_dead_is_an_error(job_document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no Ray answers there"):
        run_remote(
            job_of(job_document),
            str(tmp_path),
            address="127.0.0.1:1",
            environment={},
            emit=ignore_progress,
            say=lambda _: None,
            owner="test",
        )
