"""The rivals: what each trains on, equal budgets, the best rate by held-out images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcq_ray.baseline import METHODS, RATE_FACTORS, methods, train_rival
from dcq_ray.baseline.methods import Lesson, epochs_of, student_sections
from dcq_ray.errors import DataError, UsageError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import RunSession, keep_baseline, kept_baseline, open_network, open_run, run_local
from dcq_ray.phases.polish import judge_of
from dcq_ray.records import Progress
from dcq_ray.spec import Job

CPU = torch.device("cpu")


@contextlib.contextmanager
def opened(
    document: dict[str, Any], folder: Path, events: list[Progress] | None = None, *, reporting: bool = True
) -> Iterator[RunSession]:
    job = resolve_job(document, source="test")
    emit = [].append if events is None else events.append
    with open_run(job, str(folder), device=CPU, emit=emit, owner="test", reporting=reporting) as session:
        yield session


def lesson_of(session: RunSession, num_steps: int, lr: float = 1e-3) -> Lesson:
    network = open_network(session.context)
    judge = judge_of(session.context, network, session.prepared.splits.held_out, CPU)
    return Lesson(
        session=session,
        network=network,
        device=CPU,
        judge=judge,
        lr=lr,
        num_steps=num_steps,
        report=lambda _step, _loss: None,
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_rival_has_equal_sample_passes_and_its_best_of_three_rates(
    job_document: dict[str, Any], tmp_path: Path, method: str
) -> None:
    events: list[Progress] = []
    with opened(job_document, tmp_path, events) as session:
        rival = train_rival(session, method, "passes")
        again = train_rival(session, method, "passes")
    job = resolve_job(job_document, source="test")
    assert (rival.method, rival.budget, rival.budget_cpu_seconds) == (method, "passes", None)
    assert rival.num_sample_passes == job.train.epochs * 320
    assert rival.tried_lrs == tuple(factor * job.train.lr for factor in RATE_FACTORS)
    assert rival.lr in rival.tried_lrs
    assert rival.top1 is not None
    assert rival.top1 > 0.3
    assert (again.lr, again.top1, again.held_out_top1) == (rival.lr, rival.top1, rival.held_out_top1)
    assert [event.detail for event in events if event.phase == "baseline" and event.state == "done"] == [
        f"{method}: best at lr {rival.lr:g}"
    ] * 2


@pytest.mark.slow
def test_hints_end_where_the_middle_is_and_leave_the_rest_alone(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(job_document, tmp_path) as session:
        lesson = lesson_of(session, num_steps=10)
        seen: list[tuple[int, dict[str, Tensor]]] = []
        train = methods._train

        def watched(lesson_: Lesson, module: Any, num_steps: int, *rest: Any, **named: Any) -> None:
            seen.append((num_steps, weights(module)))
            train(lesson_, module, num_steps, *rest, **named)

        monkeypatch.setattr(methods, "_train", watched)
        untrained = [weights(section) for section in student_sections(lesson)]
        methods.hints(lesson)
        # Two of three sections, and half of the steps each.
        (first_steps, first), (second_steps, second) = seen
        assert (first_steps, second_steps) == (5, 5)
        assert {name.split(".")[0] for name in first} == {"0", "1"}
        last = {name.removeprefix("2."): value for name, value in second.items() if name.startswith("2.")}
        assert all(torch.equal(value, untrained[2][name]) for name, value in last.items())
        assert not all(torch.equal(value, first[name]) for name, value in second.items() if name in first)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_a_sequential_section_trains_on_what_the_ones_before_it_give(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    with opened(job_document, tmp_path) as session:
        lesson = lesson_of(session, num_steps=6)
        monkeypatch.setattr(methods, "activation_memory_bytes", lambda *_, **__: 2**40 if kept else 0)
        pairs: list[tuple[Tensor, Any]] = []
        trained: list[nn.Module] = []
        train = methods.train_module

        def watched(module: Any, batches: Any, **named: Any) -> Any:
            pairs.append(next(iter(batches(0))))
            result = train(module, batches, **named)
            trained.append(module)
            return result

        monkeypatch.setattr(methods, "train_module", watched)
        methods.sequential(lesson)
        images, _ = next(methods._image_batches(lesson, 6, 0))
        with torch.no_grad():
            ours, theirs = images, images
            for index, section in enumerate(trained):
                inputs, targets = pairs[index]
                theirs = lesson.network.sections[index](theirs.clone())
                assert torch.allclose(inputs, ours, atol=1e-5)
                assert torch.allclose(targets[0], theirs, atol=1e-5)
                ours = section(ours.clone())


def test_epochs_may_end_within_a_pass(job_document: dict[str, Any], tmp_path: Path) -> None:
    with opened(job_document, tmp_path) as session:
        # 320 images in batches of 32: ten steps a pass, three epochs of seven.
        lesson = lesson_of(session, num_steps=21)
        assert epochs_of(lesson, 21) == (3, 7)
        positions = [p for epoch in range(3) for _, p in methods._image_batches(lesson, 21, epoch)]
        assert len(positions) == 21
        assert sorted(np.concatenate(positions[:10])) == list(range(320))
        assert sorted(np.concatenate(positions[10:20])) == list(range(320))
        assert epochs_of(lesson, 2) == (2, 1)


@pytest.mark.slow
def test_a_budget_of_seconds_is_that_of_the_run(job_document: dict[str, Any], tmp_path: Path) -> None:
    with opened(job_document, tmp_path, reporting=False) as session, pytest.raises(UsageError, match="is not finished"):
        train_rival(session, "dorefa", "cpu-seconds")
    job: Job = resolve_job(job_document, source="test")
    report = run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
    spent = report.timings.cpu_seconds
    with opened(job_document, tmp_path, reporting=False) as session:
        rival = train_rival(session, "dorefa", "cpu-seconds")
        assert rival.budget_cpu_seconds == pytest.approx(spent.dump + spent.train + spent.reduce)
        assert rival.num_sample_passes % 32 == 0
        assert rival.num_sample_passes > 0
        kept = keep_baseline(session, rival)
        assert kept is not None
        # There is no dorefa at equal passes, so this one stands in the contract's place.
        assert kept.baseline == rival
        passes = train_rival(session, "dorefa", "passes")
        kept = keep_baseline(session, passes)
        assert kept is not None
        assert kept.baseline == passes
        assert set(kept.baselines) == {rival, passes}
        assert kept_baseline(session, "dorefa", "cpu-seconds") == rival
        assert kept_baseline(session, "distill", "passes") is None


@pytest.mark.slow
def test_without_labels_only_dorefa_is_refused(job_document: dict[str, Any], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "plain.npz", images=generator.integers(0, 255, (400, 8, 8, 1), dtype=np.uint8))
    document = {
        **job_document,
        "teacher": {"model": "user_nets:user_net"},
        "data": {"dataset": "npz", "root": str(tmp_path / "images"), "train": "plain.npz", "held_out_samples": 50},
    }
    with opened(document, tmp_path) as session:
        with pytest.raises(DataError, match="learns from labels"):
            train_rival(session, "dorefa", "passes")
        for method in ("distill", "hints", "sequential"):
            rival = train_rival(session, method, "passes")
            assert (rival.top1, rival.held_out_top1) == (None, None)
