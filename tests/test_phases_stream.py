"""Streamed sections: the clock by hand, and that neither grouping, Ray nor resuming changes the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcq_ray.errors import SectionTrainingError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import (
    RunSession,
    Streamed,
    dump_slices,
    num_slices,
    open_network,
    open_run,
    run_local,
    train_stream,
)
from dcq_ray.phases.committed import section_weights
from dcq_ray.phases.stream_saving import StreamClock
from dcq_ray.records import Progress, SectionResult
from dcq_ray.remote import run_remote


def streaming(document: dict[str, Any], folder: Path, **train: Any) -> dict[str, Any]:
    return {
        **document,
        "train": {**document["train"], "inputs": "student", **train},
        "storage": {"run_dir": str(folder / "run"), "cache_dir": document["storage"]["cache_dir"]},
    }


def test_the_clock_by_hand() -> None:
    clock = StreamClock(batch_size=32, steps_per_epoch=10, num_steps=20, starts=(0, 4, 8))
    assert clock.num_ticks == 28
    # Half of 20 steps: a tenth of the student a tick, from the section's own start.
    assert clock.student_share(1, 4, 0.5) == 0.0
    assert clock.student_share(1, 9, 0.5) == pytest.approx(0.5)
    assert clock.student_share(1, 14, 0.5) == 1.0
    assert clock.student_share(1, 23, 0.5) == 1.0
    # Without annealing a section never sees the teacher's inputs.
    assert clock.student_share(2, 8, 0.0) == 1.0


def trained(session: RunSession, runs: list[list[int]]) -> dict[str, Tensor]:
    """The weights of all sections, trained in these runs of neighbours one after the other, what is streamed kept between."""
    context, splits = session.context, session.prepared.splits
    network = open_network(context)
    session.dump(lambda missing: dump_slices(context, network, splits, range(num_slices(context)), missing))
    streams: list[dict[int, Streamed]] = [{} for _ in runs]
    results: list[SectionResult] = []
    for number, indices in enumerate(runs):
        fed = streams[number - 1] if number else {}
        last = number + 1 == len(runs)
        for outcome in train_stream(
            context,
            [session.tasks[index] for index in indices],
            network,
            splits,
            emit=lambda _: None,
            memory_bytes=2**28,
            receive=fed.__getitem__ if number else None,
            send=None if last else streams[number].__setitem__,
        ):
            assert isinstance(outcome, SectionResult), outcome
            results.append(outcome)
    return {name: value for result in results for name, value in section_weights(context, result).items()}


@pytest.mark.slow
def test_who_trains_which_sections_does_not_change_them(job_document: dict[str, Any], tmp_path: Path) -> None:
    states = []
    for runs in ([[0, 1, 2]], [[0], [1], [2]], [[0, 1], [2]]):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        job = resolve_job(streaming(job_document, tmp_path), source="test")
        with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=lambda _: None, owner="test") as session:
            states.append(trained(session, runs))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_run_and_ray_give_the_undisturbed_student(job_document: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str) -> str:
        job = resolve_job(streaming(job_document, tmp_path / name), source="test")
        report = run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
        assert report.student is not None
        return report.student.sha256

    undisturbed = run("whole")
    assert run("broken") == undisturbed
    (tmp_path / "broken" / "run" / "sections" / "01" / "result.json").unlink()
    (tmp_path / "broken" / "run" / "report.json").unlink()
    events: list[Progress] = []
    job = resolve_job(streaming(job_document, tmp_path / "broken"), source="test")
    report = run_local(job, str(tmp_path), emit=events.append, owner="test")
    assert report.student is not None
    assert report.student.sha256 == undisturbed
    # Section 1 needs what section 0 gives while it trains; section 2 is kept.
    done = [event.index for event in events if event.phase == "train" and event.state == "done"]
    assert done == [0, 1]
    assert [event.index for event in events if event.phase == "train" and event.state == "reused"] == [2]

    job = resolve_job(streaming(job_document, tmp_path / "ray"), source="test")
    remote = run_remote(
        job, str(tmp_path), address="local", environment={}, emit=lambda _: None, say=lambda _: None, owner="test"
    )
    assert remote.student is not None
    assert remote.student.sha256 == undisturbed
    assert len(remote.sections) == 3


@pytest.mark.slow
def test_noise_is_on_streamed_inputs_too(job_document: dict[str, Any], tmp_path: Path) -> None:
    def student(folder: str, noise: float) -> str:
        job = resolve_job(streaming(job_document, tmp_path / folder, input_noise=noise), source="test")
        report = run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
        assert report.student is not None
        return report.student.sha256

    noisy = student("a", 0.3)
    assert student("b", 0.3) == noisy
    assert student("c", 0.0) != noisy


@pytest.mark.slow
def test_the_first_section_is_that_of_no_stream_and_the_last_is_not(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    def weights(document: dict[str, Any]) -> list[dict[str, Tensor]]:
        job = resolve_job(document, source="test")
        run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
        with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=lambda _: None, owner="test") as session:
            return [section_weights(session.context, session.results[index]) for index in range(3)]

    # Annealed over the whole training and no section ahead: shares stay below 1, but for a section's last step.
    slow = weights(streaming(job_document, tmp_path / "a", anneal=1.0, stagger=0.0))
    ahead = weights(streaming(job_document, tmp_path / "b", anneal=1.0, stagger=0.5))
    assert all(torch.equal(value, ahead[0][name]) for name, value in slow[0].items())
    assert not all(torch.equal(value, ahead[2][name]) for name, value in slow[2].items())


@pytest.mark.slow
def test_a_section_that_diverges_is_named_and_those_before_it_are_kept(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcq_ray.phases import stream

    whole = stream.objective_loss

    def broken(context: Any, index: int, *rest: Any) -> Any:
        loss = whole(context, index, *rest)
        return (lambda output, targets: loss(output, targets) * float("nan")) if index == 1 else loss

    monkeypatch.setattr(stream, "objective_loss", broken)
    job = resolve_job(streaming(job_document, tmp_path, stagger=1.0), source="test")
    with pytest.raises(SectionTrainingError, match="section 1: the loss is nan"):
        run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
