"""Streamed sections on Ray: a worker that dies takes the others along, and all give what they would have given."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local
from dcq_ray.records import Progress
from dcq_ray.remote import run_remote
from dcq_ray.remote.stream import StreamWorker


def ancestors(pid: int) -> list[int]:
    """A process's parents, nearest first."""
    found = []
    while pid > 1:
        # The second field is a name in brackets and may hold spaces.
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def ray_workers(name: str) -> list[int]:
    """The processes of this process's Ray with such a title: an actor's class, or the name of what it does."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().split(b"\0")[0]
                if title.startswith(f"ray::{name}".encode()) and os.getpid() in ancestors(int(folder.name)):
                    found.append(int(folder.name))
            except OSError:
                # It has ended since.
                continue
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_the_student_is_the_undisturbed_one(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {**job_document, "train": {"epochs": 40, "batch_size": 32, "inputs": "student"}}

    def job(run_dir: str) -> Any:
        storage = {**job_document["storage"], "run_dir": str(tmp_path / run_dir)}
        return resolve_job({**document, "storage": storage}, source="test")

    undisturbed = run_local(job("local"), str(tmp_path), emit=lambda _: None, owner="test")
    killed: list[int] = []
    lines: list[Progress] = []
    names: set[str] = set()

    def watch(progress: Progress) -> None:
        lines.append(progress)
        if progress.phase == "train" and progress.state == "running":
            names.update(ray.util.list_named_actors())
        if progress.phase == "train" and progress.state == "running" and progress.index == 1 and not killed:
            killed.extend(ray_workers("StreamWorker")[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    report = run_remote(
        job("ray"), str(tmp_path), address="local", environment={}, emit=watch, say=lambda _: None, owner="test"
    )
    assert len(killed) == 1
    assert [line.index for line in lines if line.detail == "a worker died; starting again"] == [0, 1, 2]
    assert report.student == undisturbed.student
    assert {section.restarts for section in report.sections} == {1}
    # Ray's dashboard shows them by name; how many there are is a matter of this machine's cores.
    streams = {name for name in names if ":sections-" in name}
    assert {name.rpartition("-")[2] for name in streams} == {"1", "2"}
    assert all(re.fullmatch(r"dcq:small:sections-0\d-to-0\d:try-[12]", name) for name in streams)
    assert names - streams == {"dcq:small:reducer:try-1"}


def test_what_is_fed_out_of_order_is_had_in_order() -> None:
    worker = StreamWorker(context=None)  # type: ignore[arg-type]
    for tick in (2, 1, 3):
        worker.feed(tick, torch.full((2, 1), float(tick)).numpy(), tick == 2)
    received = [worker._receive(tick) for tick in (1, 2, 3)]
    assert [(float(streamed.activations[0]), streamed.save) for streamed in received] == [
        (1, False),
        (2, True),
        (3, False),
    ]
