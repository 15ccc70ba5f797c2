"""Merge steps: kept where held-out images agree, undone where not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from killing import Killed, killed
from torch import nn

from dcq_ray.data import load_splits
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local, saving
from dcq_ray.phases.polish import Judge, attempt_step
from dcq_ray.phases.saving import StopRequest
from dcq_ray.records import Progress, RunReport


def judge_on(document: dict[str, Any], folder: Path, reference: torch.Tensor | None = None) -> Judge:
    splits = load_splits(resolve_job(document, source="test").data, seed=0, job_folder=str(folder))
    return Judge(held_out=splits.held_out, batch_size=32, device=torch.device("cpu"), reference=reference)


def always(label: int) -> nn.Module:
    """A network that says the same class to every image."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(network[1].weight)
    network[1].bias.data = torch.eye(10)[label].clone()
    return network.eval()


def test_a_step_that_makes_it_worse_is_undone(job_document: dict[str, Any], tmp_path: Path) -> None:
    # Class 0 is right for a quarter of the images, class 7 for none.
    judge = judge_on(job_document, tmp_path, torch.eye(10)[torch.arange(100) % 4])
    student = always(0)
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def spoil() -> None:
        student.load_state_dict(always(7).state_dict())

    step = attempt_step("spoil", student, spoil, judge, roll_back=True)
    assert not step.accepted
    assert (step.score_before, step.score_after) == (0.25, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert attempt_step("spoil", student, spoil, judge, roll_back=False).accepted
    assert judge(student) == 0.0


def test_without_labels_the_teacher_judges(job_document: dict[str, Any], tmp_path: Path) -> None:
    reference = torch.eye(10)[torch.arange(100) % 4]
    judge = judge_on(job_document, tmp_path, reference)
    assert judge(always(0)) == 0.25
    # With labels, which are balanced, any one class is right for a tenth.
    assert judge_on(job_document, tmp_path)(always(0)) == 0.1


def finished(document: dict[str, Any], folder: Path, **reduce: Any) -> RunReport:
    job = resolve_job({**document, "reduce": reduce}, source="test")
    return run_local(job, str(folder), emit=lambda _: None, owner="test")


@pytest.mark.slow
def test_the_polish_helps_a_hardly_trained_student_and_is_reported(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {**job_document, "train": {"epochs": 1, "batch_size": 32, "lr": 1e-5, "start": "nearest"}}
    plain = finished(document, tmp_path)
    polished = finished(document, tmp_path, polish_epochs=3, polish_lr=3e-3)
    assert [step.name for step in plain.merge_steps] == ["BatchNorm re-estimated"]
    names = [step.name for step in polished.merge_steps]
    assert names == ["BatchNorm re-estimated", "polish", "BatchNorm re-estimated after the polish"]
    assert plain.validation is not None
    assert plain.validation.top1 is not None
    assert polished.validation is not None
    assert polished.validation.top1 is not None
    assert polished.validation.top1 > plain.validation.top1
    assert polished.validation.top1 == max(step.score_after for step in polished.merge_steps if step.accepted)


@pytest.mark.slow
def test_a_polish_that_hurts_is_undone(job_document: dict[str, Any], tmp_path: Path) -> None:
    plain = finished(job_document, tmp_path)
    wild = finished(job_document, tmp_path, polish_epochs=1, polish_lr=3.0)
    assert [step.accepted for step in wild.merge_steps if step.name == "polish"] == [False]
    assert plain.student is not None
    assert wild.student is not None
    assert wild.student.sha256 == plain.student.sha256


# -- killed ------------------------------------------------------------------------------------------------------------

POLISH = {"polish_epochs": 3, "polish_lr": 3e-3}


def polished(
    document: dict[str, Any], folder: Path, name: str, events: list[Progress], stop: StopRequest | None = None
) -> RunReport:
    document = copy.deepcopy(document)
    document["storage"].update(run_dir=str(folder / name), checkpoint_seconds=1e-9)
    document.update(reduce=POLISH, train={"epochs": 1, "batch_size": 32, "lr": 1e-5, "start": "nearest"})
    job = resolve_job(document, source="test")
    return run_local(job, str(folder), emit=events.append, owner="test", stop=stop)


@pytest.mark.slow
def test_a_polish_killed_anywhere_goes_on_to_the_very_same_student(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "TIMES_ITS_COST", 0.0)
    whole = polished(job_document, tmp_path, "whole", [])
    # Three epochs of ten steps, saved after each, and at an epoch's end: in the first, at its end, and after the last.
    for at_write, resumed_after in ((7, 3), (21, 10), (59, 29)):
        with killed(at_write, inside="/polish/"), pytest.raises(Killed):
            polished(job_document, tmp_path, f"broken-{at_write}", [])
        events: list[Progress] = []
        report = polished(job_document, tmp_path, f"broken-{at_write}", events)
        assert report.student == whole.student
        assert report.merge_steps == whole.merge_steps
        told = [event.detail for event in events if "polish, resumed" in event.detail]
        assert told == [f"polish, resumed after step {resumed_after}"]
        assert not (tmp_path / f"broken-{at_write}" / "polish").exists()


@pytest.mark.slow
def test_a_polish_that_is_stopped_saves_itself_first(job_document: dict[str, Any], tmp_path: Path) -> None:
    whole = polished(job_document, tmp_path, "whole", [])

    class Stopped(Exception):
        pass

    def raise_stopped() -> NoReturn:
        raise Stopped

    stop = StopRequest(raise_stopped)

    class StopsInPolish(list[Progress]):
        def append(self, event: Progress) -> None:
            if event.detail == "polish" and event.done == 10:
                stop.make()

    with pytest.raises(Stopped):
        polished(job_document, tmp_path, "stopped", StopsInPolish(), stop)
    saved = sorted(
        int(path.stem.partition("-")[0]) for path in (tmp_path / "stopped" / "polish").rglob("*.safetensors")
    )
    # One of the end of an epoch may be there, too.
    assert saved[-1] in (10, 11)
    assert polished(job_document, tmp_path, "stopped", []).student == whole.student
