"""Workers that die, and runs that are ended by a signal: how often is tried, and what is saved."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_remote_stream import ray_workers

from dcq_ray.errors import RunTerminated, SectionTrainingError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local
from dcq_ray.records import Progress, RunReport
from dcq_ray.remote import attempts as attempts_module
from dcq_ray.remote import run_remote, sections
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


# -- processes that end in the midst of their work -----------------------------------------------------------------------

DEADLY = """
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.fx import wrap

FOLDER = Path(__file__).parent


def perhaps(value):
    title = Path("/proc/self/cmdline").read_bytes().split(b"\\0")[0].decode()
    # What a section's worker was asked last is what its title says.
    title = title.replace("ray::dcq:small:section-", "ray::SectionWorker")
    # To open the network runs it, too; only what trains has gradients here.
    trains = value.requires_grad
    if trains and title.startswith("ray::Stitcher"):
        with open(FOLDER / "polished", "a") as log:
            log.write("a step\\n")
        # A first checkpoint is saved after a second.
        time.sleep(0.1)
    now = {"plain": not trains, "training": trains, "saved": trains and any(FOLDER.glob("run/polish/*/*.json"))}
    for file in FOLDER.glob("kill-*"):
        _, name, moment, times = file.name.split("-")
        if title.startswith("ray::" + name) and now[moment]:
            with open(FOLDER / "killed", "a") as log:
                log.write(name + "\\n")
            if times == "once":
                file.unlink()
            os.kill(os.getpid(), 9)
    return value


wrap("perhaps")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 10)

    def forward(self, images):
        value = torch.relu(self.first(images))
        value = torch.relu(perhaps(self.second(value)))
        return self.last(value.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()
"""


def on_ray(document: dict[str, Any], folder: Path, emit: Callable[[Progress], None] = lambda _: None) -> RunReport:
    return run_remote(
        resolve_job(document, source="test"),
        str(folder),
        address="local",
        environment={},
        emit=emit,
        say=lambda _: None,
        owner="test",
    )


@pytest.fixture
def deadly_document(job_document: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A job whose network kills the process in which it runs, where a file `kill-<name>-<moment>-<times>` asks for it."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    document = copy.deepcopy(job_document)
    document["teacher"] = {"model": "deadly:net", "fit": None, "min_top1": 0}
    del document["data"]["metric"]
    return document


def undisturbed_student(document: dict[str, Any], folder: Path) -> Any:
    document = copy.deepcopy(document)
    document["storage"].update(run_dir=str(folder / "whole"), cache_dir=str(folder / "whole-cache"))
    return run_local(resolve_job(document, source="test"), str(folder), emit=lambda _: None, owner="test").student


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_die_in_the_dump_the_measuring_the_stitching_and_the_polish_are_replaced(
    deadly_document: dict[str, Any], tmp_path: Path
) -> None:
    deadly_document["storage"]["checkpoint_seconds"] = 1e-9
    deadly_document["reduce"] = {"polish_epochs": 3}
    wanted = undisturbed_student(deadly_document, tmp_path)
    names = ("Stitcher", "dcq:small:measure", "dcq:small:untrained", "dcq:small:dump")
    for name in names:
        (tmp_path / f"kill-{name}-plain-once").touch()
    (tmp_path / "kill-Stitcher-saved-once").touch()
    assert on_ray(deadly_document, tmp_path).student == wanted
    assert sorted((tmp_path / "killed").read_text().split()) == sorted([*names, "Stitcher"])
    # The polish, of three epochs of ten steps, went on where it was saved: the step in which it died was begun twice.
    assert len((tmp_path / "polished").read_text().splitlines()) == 31
    assert not (tmp_path / "run" / "polish").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_terminated_in_its_polish_saves_it_and_goes_on_there(
    deadly_document: dict[str, Any], tmp_path: Path
) -> None:
    deadly_document["storage"]["checkpoint_seconds"] = 3600
    deadly_document["reduce"] = {"polish_epochs": 3}
    wanted = undisturbed_student(deadly_document, tmp_path)

    def terminate(progress: Progress) -> None:
        if progress.detail == "polish":
            raise RunTerminated("terminated")

    with pytest.raises(RunTerminated):
        on_ray(deadly_document, tmp_path, terminate)
    steps = [int(file.name.partition("-")[0]) for file in (tmp_path / "run" / "polish").glob("*/*.json")]
    assert steps
    log = tmp_path / "polished"
    num_steps = len(log.read_text().splitlines())
    assert on_ray(deadly_document, tmp_path).student == wanted
    assert len(log.read_text().splitlines()) == num_steps + 30 - max(steps)


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_reducer_is_replaced(deadly_document: dict[str, Any], tmp_path: Path) -> None:
    wanted = undisturbed_student(deadly_document, tmp_path)
    lines: list[Progress] = []

    def watch(progress: Progress) -> None:
        if progress.phase == "reduce" and not any(line.phase == "reduce" for line in lines):
            for pid in ray_workers("Reducer"):
                os.kill(pid, signal.SIGKILL)
        lines.append(progress)

    assert on_ray(deadly_document, tmp_path, watch).student == wanted
    assert [line.detail for line in lines if line.phase == "reduce" and line.state == "waiting"] == [
        "the reducer died; starting another"
    ]


@pytest.mark.slow
@pytest.mark.ray
def test_a_section_whose_workers_keep_dying_ends_alone_and_is_trained_alone_afterwards(
    deadly_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "MAX_DEATHS", 2)
    monkeypatch.setattr(sections, "PAUSE_SECONDS", 0.1)
    wanted = undisturbed_student(deadly_document, tmp_path)
    (tmp_path / "kill-SectionWorker-training-always").touch()
    with pytest.raises(SectionTrainingError, match=r"section \d: its worker died or failed 2 times in a row") as raised:
        on_ray(deadly_document, tmp_path)
    failed = str(raised.value).partition("section ")[2][0]
    assert (tmp_path / "killed").read_text().split() == ["SectionWorker"] * 2
    results = {path.parent.name for path in (tmp_path / "run" / "sections").glob("*/result.json")}
    assert results == {"00", "01", "02"} - {f"0{failed}"}
    (tmp_path / "kill-SectionWorker-training-always").unlink()
    lines: list[Progress] = []
    assert on_ray(deadly_document, tmp_path, lines.append).student == wanted
    assert {line.index for line in lines if line.phase == "train" and line.state == "running"} <= {int(failed)}
    assert sum(line.phase == "train" and line.state == "reused" for line in lines) == 2
