"""Workers that die, and runs that are ended by a signal: how often is tried, and what is saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_remote_stream import ray_workers

from dcq_ray.errors import RunTerminated
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local
from dcq_ray.records import Progress
from dcq_ray.remote import run_remote
from dcq_ray.remote.attempts import MAX_DEATHS, Attempts


def test_deaths_in_a_row_at_the_same_place_end_it_and_progress_does_not() -> None:
    attempts = Attempts(0)
    assert [attempts.another(position) for position in range(1, 20)] == [True] * 19
    assert attempts.num_restarts == 19
    attempts = Attempts(7)
    assert [attempts.another(7) for _ in range(MAX_DEATHS)] == [True] * (MAX_DEATHS - 1) + [False]
    assert attempts.num_restarts == MAX_DEATHS - 1
    assert str(attempts) == f"{MAX_DEATHS} times in a row without getting further than step 7"


def job_of(document: dict[str, Any], folder: Path, **train: Any) -> Any:
    storage = {**document["storage"], "run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")}
    training = {"epochs": 60, "batch_size": 16, **train}
    return resolve_job({**document, "train": training, "storage": storage}, source="test")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_terminated_run_saves_its_sections_and_goes_on_to_the_undisturbed_student(
    job_document: dict[str, Any], tmp_path: Path, inputs: str
) -> None:
    undisturbed = run_local(
        job_of(job_document, tmp_path / "whole", inputs=inputs), str(tmp_path), emit=lambda _: None, owner="test"
    )
    job = job_of(job_document, tmp_path / "broken", inputs=inputs)

    def terminate(progress: Progress) -> None:
        if progress.phase == "train" and progress.state == "running" and progress.done:
            raise RunTerminated("terminated")

    with pytest.raises(RunTerminated):
        run_remote(
            job, str(tmp_path), address="local", environment={}, emit=terminate, say=lambda _: None, owner="test"
        )
    sections = tmp_path / "broken" / "run" / "sections"
    saved = {path.parts[-4] for path in sections.glob("*/checkpoints/*/*.json")}
    assert saved
    lines: list[Progress] = []
    report = run_local(job, str(tmp_path), emit=lines.append, owner="test")
    assert report.student == undisturbed.student
    resumed = {f"{line.index:02d}" for line in lines if line.detail.startswith("resumed after step")}
    assert resumed == saved
    assert {f"{section.index:02d}" for section in report.sections if section.restarts == 1} == saved
    assert not list(sections.glob("*/checkpoints"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_section_gives_what_it_would_have_given(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = run_local(job_of(job_document, tmp_path / "whole"), str(tmp_path), emit=lambda _: None, owner="test")
    killed: list[int] = []
    lines: list[Progress] = []

    def watch(progress: Progress) -> None:
        lines.append(progress)
        if progress.phase == "train" and progress.state == "running" and progress.done and not killed:
            killed.extend(ray_workers("SectionWorker")[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    report = run_remote(
        job_of(job_document, tmp_path / "ray"),
        str(tmp_path),
        address="local",
        environment={},
        emit=watch,
        say=lambda _: None,
        owner="test",
    )
    assert len(killed) == 1
    assert report.student == undisturbed.student
    assert sorted(section.restarts for section in report.sections) == [0, 0, 1]
    assert [line.detail for line in lines if line.state == "waiting" and line.detail] == ["its worker died"]
