"""Whole runs on an object store, behind a network that fails, and on a disk that fills."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import s3_options
from s3_server import FaultyNetwork
from test_remote_stream import ray_workers

from dcq_ray.errors import DcqError, RunBusyError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, run_local, saving
from dcq_ray.records import Progress, RunReport
from dcq_ray.remote import run_remote
from dcq_ray.spec import Job
from dcq_ray.storage import leases, open_store, retries


def job_in(document: dict[str, Any], place: str, cache: str | None = None, **storage: Any) -> Job:
    """The small job in two sections, all its files below a folder or a URI."""
    document = copy.deepcopy(document)
    document["sections"] = {"count": 2}
    address, mark, options = place.partition("?")
    where = {"run_dir": f"{address}/run{mark}{options}", "cache_dir": cache or f"{address}/cache{mark}{options}"}
    document["storage"].update(where | storage)
    return resolve_job(document, source="test")


def run(job: Job, folder: Path, emit: Any = ignore_progress) -> RunReport:
    return run_local(job, str(folder), emit=emit, owner="test")


@pytest.mark.slow
def test_a_run_on_an_object_store_gives_the_student_of_one_on_a_disk(
    job_document: dict[str, Any], tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    there = job_in(job_document, s3_uri)
    report = run(there, tmp_path)
    assert report.student == run(job_in(job_document, str(tmp_path / "here")), tmp_path).student
    before = {file.name: file.modified_at for file in open_store(there.storage.run_dir).tree()}
    events: list[Progress] = []
    assert run(there, tmp_path, events.append).student == report.student
    assert {event.phase for event in events if event.state == "running"} <= {"teacher", "plan"}
    after = {file.name: file.modified_at for file in open_store(there.storage.run_dir).tree()}
    assert {name for name in after if name.startswith(("sections", "student")) and after[name] != before[name]} == set()


@pytest.mark.slow
@pytest.mark.ray
def test_ray_runs_on_an_object_store_too(
    job_document: dict[str, Any], tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    report = run_remote(
        job_in(job_document, s3_uri),
        str(tmp_path),
        address="local",
        environment=os.environ,
        emit=ignore_progress,
        say=lambda sentence: None,
        owner="test",
    )
    assert report.student == run(job_in(job_document, str(tmp_path / "here")), tmp_path).student


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("renewal_seconds", [0.2, 60.0], ids=["the renewal notices it", "a worker notices it"])
def test_a_driver_whose_lease_was_taken_over_ends_with_its_workers_and_commits_nothing(
    job_document: dict[str, Any],
    tmp_path: Path,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    renewal_seconds: float,
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", renewal_seconds)
    epochs = 1000 if renewal_seconds < 1 else 20
    job = job_in({**job_document, "train": {"epochs": epochs, "batch_size": 32}}, s3_uri)
    store = open_store(job.storage.run_dir)
    taken: list[bytes] = []

    def take_over(progress: Progress) -> None:
        if progress.phase == "train" and not taken:
            lease = json.loads(store.read_bytes("lease.json"))
            lease.update(epoch=lease["epoch"] + 1, owner="the next one", token="other", expires_at=time.time() + 600)
            taken.append(json.dumps(lease).encode())
            store.write_bytes("lease.json", taken[0])

    with pytest.raises(RunBusyError, match="taken over by the next one") as raised:
        run_remote(
            job,
            str(tmp_path),
            address="local",
            environment=os.environ,
            emit=take_over,
            say=lambda sentence: None,
            owner="test",
        )
    assert raised.value.exit_code == 75
    assert store.read_bytes("lease.json") == taken[0]
    assert not [file.name for file in store.tree() if file.name.endswith(("result.json", "student.safetensors"))]
    deadline = time.monotonic() + 60
    while ray_workers("SectionWorker"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_behind_a_network_that_fails_now_and_then_gives_the_same_student(
    job_document: dict[str, Any],
    tmp_path: Path,
    s3_uri: str,
    faulty_network: FaultyNetwork,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retries, "MAX_TRIES", 6)
    draw = random.Random(1)
    faults = ["refuse", "drop", "cut-request"]
    faulty_network.decide = lambda number, method, path: draw.choice(faults) if draw.random() < 0.05 else None
    place = f"{s3_uri.partition('?')[0]}?{s3_options(faulty_network.port)}"
    report = run(job_in(job_document, place), tmp_path)
    assert report.student == run(job_in(job_document, str(tmp_path / "here")), tmp_path).student


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["dump", "train", "reduce"])
def test_a_disk_that_fills_is_told_with_numbers_and_the_run_ends_once_there_is_space(
    job_document: dict[str, Any], tmp_path: Path, small_disk: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkpoint after every step.
    monkeypatch.setattr(saving, "TIMES_ITS_COST", 0.0)
    filler = small_disk / "filler"
    job = job_in(job_document, str(small_disk), checkpoint_seconds=1e-9)

    def fill(progress: Progress) -> None:
        if progress.phase == phase and progress.state == "running" and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    with pytest.raises(DcqError) as caught:
        run(job, tmp_path, fill)
    message = str(caught.value)
    assert "cannot write: No space left on device" in message
    assert "bytes are needed" in message
    assert f"are free in {small_disk}" in message
    filler.unlink()
    events: list[Progress] = []
    report = run(job, tmp_path, events.append)
    assert report.student == run(job_in(job_document, str(tmp_path / "here")), tmp_path).student
    if phase != "dump":
        assert any(event.phase == "dump" and event.state == "reused" for event in events)
