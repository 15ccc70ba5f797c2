"""The rivals: what each trains on, equal budgets, the best rate by held-out images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcq_ray.baseline import METHODS, RATE_FACTORS, methods, rivals, train_rival
from dcq_ray.baseline.methods import Lesson, epochs_of, student_sections
from dcq_ray.baseline.rivals import affordable_steps, seconds_of_steps
from dcq_ray.errors import DataError, SectionTrainingError, UsageError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import RunSession, keep_baseline, kept_baseline, open_network, open_run, run_local
from dcq_ray.phases.polish import Judge, judge_of
from dcq_ray.records import PhaseCpuSeconds, Progress
from dcq_ray.spec import Job
from dcq_ray.stitch import reestimate_batchnorm

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
        # Thirteen steps in three epochs: the second stage takes two an epoch, the first one what is left.
        lesson = lesson_of(session, num_steps=13)
        seen: list[tuple[tuple[int, int], dict[str, Tensor]]] = []
        train = methods._train

        def watched(lesson_: Lesson, module: Any, epochs: tuple[int, int], *rest: Any, **named: Any) -> None:
            seen.append((epochs, weights(module)))
            train(lesson_, module, epochs, *rest, **named)

        monkeypatch.setattr(methods, "_train", watched)
        untrained = [weights(section) for section in student_sections(lesson)]
        methods.hints(lesson)
        # Two of three sections, and about half of the steps each.
        (first_steps, first), (second_steps, second) = seen
        assert (first_steps, second_steps) == ((1, 7), (3, 2))
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
        images, _ = next(methods._image_batches(lesson, 2, 0))
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
        positions = [p for epoch in range(3) for _, p in methods._image_batches(lesson, 7, epoch)]
        assert len(positions) == 21
        assert sorted(np.concatenate(positions[:10])) == list(range(320))
        assert sorted(np.concatenate(positions[10:20])) == list(range(320))
        assert epochs_of(lesson, 2) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_a_sequential_section_estimates_batchnorm_on_what_the_ones_before_it_give(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    with opened(job_document, tmp_path) as session:
        lesson = lesson_of(session, num_steps=6)
        monkeypatch.setattr(methods, "activation_memory_bytes", lambda *_, **__: 2**40 if kept else 0)
        seen: list[Tensor] = []
        sections: list[nn.Module] = []

        def watched(section: nn.Module, batches: Any, device: torch.device) -> None:
            given = list(batches)
            seen.append(torch.cat(given))
            reestimate_batchnorm(section, given, device)
            sections.append(section)

        monkeypatch.setattr(methods, "reestimate_batchnorm", watched)
        methods.sequential(lesson)
        value = session.prepared.splits.train.images(np.arange(320))
        with torch.no_grad():
            for inputs, section in zip(seen, sections, strict=True):
                assert torch.allclose(inputs, value, atol=1e-5)
                value = section(value.clone())
        # The second convolution's BatchNorm: variance of what it gets, over batches of 32, as a plain average.
        images = seen[1].split(32)
        conv, norm = sections[1].get_submodule("conv2"), sections[1].get_submodule("bn2")
        with torch.no_grad():
            means = torch.stack([conv(batch).mean((0, 2, 3)) for batch in images]).mean(0)
        assert torch.allclose(norm.running_mean, means, atol=1e-5)


@pytest.mark.slow
def test_eight_bits_in_sequence_are_the_teacher_with_batchnorm_estimated_in_sequence(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {**job_document, "quantize": {"weights": {"bits": 8}, "first_last_bits": None}}
    with opened(document, tmp_path) as session:
        lesson = lesson_of(session, num_steps=6, lr=1e-6)
        student = methods.sequential(lesson)
        value = session.prepared.splits.train.images(np.arange(320))
        with torch.no_grad():
            ours = student(value)
            for section in copy.deepcopy(lesson.network.sections):
                reestimate_batchnorm(section, value.split(32), CPU)
                value = section(value.clone())
        # Measured: 0.009; with 1 bit 0.63.
        assert (ours - value).norm() < 0.03 * value.norm()


@pytest.mark.slow
def test_logits_kept_or_made_in_every_step_give_the_same_student(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    with opened(job_document, tmp_path) as session:
        for memory_bytes in (2**40, 0):
            monkeypatch.setattr(methods, "activation_memory_bytes", lambda *_, n=memory_bytes, **__: n)
            lesson = lesson_of(session, num_steps=6)
            assert (methods._teacher_logits(lesson) is None) == (memory_bytes == 0)
            students.append(weights(methods.distill(lesson)))
    for name, value in students[0].items():
        assert torch.allclose(value, students[1][name], atol=1e-4), name


@pytest.mark.slow
def test_a_rate_that_diverges_is_passed_over_and_three_of_them_are_an_error(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lrs = [0.3e-3, 1e-3, 3e-3]
    with opened(job_document, tmp_path) as session:
        for diverging, chosen in ((lrs[1:], lrs[0]), (lrs[:2], lrs[2])):
            monkeypatch.setitem(METHODS, "dorefa", _diverging(methods.dorefa, diverging))
            assert train_rival(session, "dorefa", "passes").lr == pytest.approx(chosen)
        monkeypatch.setitem(METHODS, "dorefa", _diverging(methods.dorefa, lrs))
        with pytest.raises(SectionTrainingError, match="lower the learning rate"):
            train_rival(session, "dorefa", "passes")


def _diverging(method: Callable[[Lesson], nn.Module], lrs: list[float]) -> Callable[[Lesson], nn.Module]:
    def train(lesson: Lesson) -> nn.Module:
        if any(lesson.lr == pytest.approx(lr) for lr in lrs):
            raise SectionTrainingError("the loss is nan; lower the learning rate")
        return method(lesson)

    return train


def test_seconds_of_steps_by_hand() -> None:
    # Two stages: steps of 2 s after a first one of 9 s, and of 1 s after a first one of 4 s: 3 x 2 + 2 x 1.
    times = [(1, 9.0), (2, 11.0), (3, 13.0), (1, 17.0), (2, 18.0)]
    assert seconds_of_steps(times) == pytest.approx(8)


def test_affordable_steps_by_hand() -> None:
    # 24 steps took 12 s of 15 s: half a second each, and 3 s of the rest. 100 - 3 s hold 194 steps: 64 in each of 3 epochs.
    assert affordable_steps(100, 15, 24, 12, epochs=3) == 192
    assert affordable_steps(100, 15, 24, 12, epochs=1) == 194
    # 1.5 s after the rest are three steps, 1.4 s only two.
    assert affordable_steps(4.5, 15, 24, 12, epochs=3) == 3
    with pytest.raises(UsageError, match=r"takes 3\.00 s, and a step 0\.5 s"):
        affordable_steps(4.4, 15, 24, 12, epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_measured_training_tells_steps_from_scores(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # A clock that only steps and scores move: 1 s a step, 10 s a score, as many scores as a training of any length has.
    clock = 0.0
    train_module, judge = methods.train_module, Judge.__call__

    def ticking(*arguments: Any, on_step: Any, **named: Any) -> Any:
        def step_taken(step: int, loss: float) -> None:
            nonlocal clock
            clock += 1
            on_step(step, loss)

        return train_module(*arguments, on_step=step_taken, **named)

    def judged(self: Judge, module: nn.Module) -> float:
        nonlocal clock
        clock += 10
        return judge(self, module)

    monkeypatch.setattr(methods, "train_module", ticking)
    monkeypatch.setattr(Judge, "__call__", judged)
    monkeypatch.setattr(rivals.time, "process_time", lambda: clock)
    with opened(job_document, tmp_path) as session:
        network = open_network(session.context)
        scorer = judge_of(session.context, network, session.prepared.splits.held_out, CPU)
        budget_seconds = 200.0
        num_steps = rivals._affordable_steps(session, network, scorer, method, 1e-3, budget_seconds)
        trial = rivals._trial(session, network, scorer, method, 1e-3, num_steps)
    # Steps of every section; and what does not divide into three epochs is left.
    most = 3 * (3 if method == "sequential" else 1)
    assert budget_seconds - most < trial.cpu_seconds <= budget_seconds


@pytest.mark.slow
def test_a_loaded_teacher_is_part_of_a_budget_and_a_fitted_one_is_not(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    job = resolve_job(job_document, source="test")
    report = run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
    cpu_seconds = PhaseCpuSeconds(teacher=64.0, dump=1.0, train=2.0, reduce=4.0)
    with opened(job_document, tmp_path, reporting=False) as session:
        found = replace(report, timings=replace(report.timings, cpu_seconds=cpu_seconds))
        fitted = replace(session, finished_report=found)
        loaded_job = job.model_copy(update={"teacher": job.teacher.model_copy(update={"fit": None})})
        loaded = replace(fitted, context=replace(session.context, job=loaded_job))
        assert rivals._run_cpu_seconds(fitted) == 7
        assert rivals._run_cpu_seconds(loaded) == 71


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
        # Whole epochs of the job's number.
        assert rival.num_sample_passes % (3 * 32) == 0
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
