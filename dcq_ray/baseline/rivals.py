"""Train a rival within a budget: the best of three learning rates, by held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dcq_ray.baseline.methods import METHODS, Lesson
from dcq_ray.errors import DataError, SectionTrainingError, UsageError
from dcq_ray.phases import Network, RunSession, choose_device, open_network, part_top1
from dcq_ray.phases.polish import Judge, attempt_step, judge_of
from dcq_ray.phases.reduce import adapt_batchnorm
from dcq_ray.records import BaselineReport, Progress
from dcq_ray.section import load_optimizers
from dcq_ray.stitch import has_batchnorm

# Around the job's own rate: half a decade down and up.
RATE_FACTORS = (0.3, 1.0, 3.0)
# A short training of at least so many steps tells what a step costs, and what all the rest does.
MEASURED_STEPS = 20
Budget = Literal["passes", "cpu-seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One learning rate's student."""

    lr: float
    score: float
    student: nn.Module
    cpu_seconds: float


def train_rival(session: RunSession, method: str, budget: Budget) -> BaselineReport:
    """Train a rival by that method, with the job's quantizer, data, optimizer, schedule, batch size and seed.

    `passes`: as many sample passes as a section has. `cpu-seconds`: as many steps as fit into the processor seconds that the
    finished run of the session took (a fit of the teacher is nobody's): what a step costs is measured beforehand, which is not
    charged, as the measured costs of cuts are not to a run that finds them in the cache. The report's `cpu_seconds` is what
    the chosen rate took alone, held-out scores included. A rate at which training diverges is a bad one.

    Raises:
        DataError: the images have no labels, and the method learns from labels.
        SectionTrainingError: training diverges at every rate.
        UsageError: the run is not finished, so its seconds are not known.
    """
    started = time.monotonic()
    context, splits = session.context, session.prepared.splits
    if method == "dorefa" and (splits.train.labels is None or splits.held_out.labels is None):
        raise DataError(
            "baseline dorefa learns from labels, but the train images have none; give labels in data.train, or use "
            "--method distill"
        )
    budget_seconds = _run_cpu_seconds(session) if budget == "cpu-seconds" else None
    torch.set_num_threads(context.job.train.num_threads)
    device = choose_device(context.device)
    network = open_network(context)
    judge = judge_of(context, network, splits.held_out, device)
    rates = tuple(factor * context.job.train.lr for factor in RATE_FACTORS)
    batch_size = min(context.job.train.batch_size, len(splits.train))
    num_steps = context.job.train.epochs * (len(splits.train) // batch_size)
    load_optimizers()
    if budget_seconds is not None:
        num_steps = _affordable_steps(session, network, judge, method, rates[0], budget_seconds)
    best = _best_trial(session, network, judge, method, rates, num_steps)
    top1 = None if splits.test is None else part_top1(best.student, splits.test, context.job.data.batch_size, device)
    session.emit(Progress(phase="baseline", state="done", detail=f"{method}: best at lr {best.lr:g}"))
    return BaselineReport(
        method=method,
        budget=budget,
        budget_cpu_seconds=budget_seconds,
        top1=top1,
        cpu_seconds=best.cpu_seconds,
        lr=best.lr,
        held_out_top1=None if splits.held_out.labels is None else best.score,
        tried_lrs=rates,
        num_sample_passes=num_steps * batch_size,
        seed=context.job.seed,
        seconds=time.monotonic() - started,
    )


def _best_trial(
    session: RunSession, network: Network, judge: Judge, method: str, rates: Sequence[float], num_steps: int
) -> _Trial:
    best: _Trial | None = None
    for number, lr in enumerate(rates):
        try:
            trial = _trial(session, network, judge, method, lr, num_steps)
        except SectionTrainingError as error:
            session.emit(Progress(phase="baseline", detail=f"{method}: lr {lr:g} does not do: {error}"))
            if best is None and number == len(rates) - 1:
                raise
            continue
        # Of equals the first, the lowest rate.
        if best is None or trial.score > best.score:
            best = trial
    assert best is not None
    return best


def _trial(
    session: RunSession,
    network: Network,
    judge: Judge,
    method: str,
    lr: float,
    num_steps: int,
    *,
    score: Callable[[nn.Module], float] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> _Trial:
    context = session.context
    start_cpu_seconds = time.process_time()

    def report(step: int, loss: float) -> None:
        if on_step is not None:
            on_step(step)
        elif step % 10 == 0:
            session.emit(
                Progress(
                    phase="baseline",
                    done=step,
                    total=num_steps,
                    unit="steps",
                    loss=loss,
                    detail=f"{method} at lr {lr:g}",
                )
            )

    lesson = Lesson(
        session=session,
        network=network,
        device=judge.device,
        judge=score or judge,
        lr=lr,
        num_steps=num_steps,
        report=report,
    )
    student = METHODS[method](lesson)
    # The rival gets what the student gets.
    if context.job.reduce.reestimate_batchnorm and has_batchnorm(student):
        attempt_step(
            "BatchNorm re-estimated",
            student,
            lambda: adapt_batchnorm(context, student, session.prepared.splits.train, judge.device),
            judge,
            roll_back=context.job.reduce.roll_back,
        )
    return _Trial(lr=lr, score=judge(student), student=student, cpu_seconds=time.process_time() - start_cpu_seconds)


def _affordable_steps(
    session: RunSession, network: Network, judge: Judge, method: str, lr: float, budget_seconds: float
) -> int:
    """How many steps, in whole epochs, fit into so many processor seconds, scores included.

    A short training is timed: its steps, and as the rest all else that a longer one does likewise, scores after as many epochs
    among it.
    """
    session.emit(Progress(phase="baseline", detail=f"{method}: measuring what a step costs"))
    epochs = max(1, session.context.job.train.epochs)
    # Twice, since half of them may be trained in epochs.
    num_steps = -(-max(MEASURED_STEPS, 2 * epochs) // (2 * epochs)) * 2 * epochs
    judged_seconds, times = 0.0, list[tuple[int, float]]()

    def timed_score(module: nn.Module) -> float:
        nonlocal judged_seconds
        began = time.process_time()
        found = judge(module)
        judged_seconds += time.process_time() - began
        return found

    def on_step(step: int) -> None:
        times.append((step, time.process_time() - judged_seconds))

    trial = _trial(session, network, judge, method, lr, num_steps, score=timed_score, on_step=on_step)
    return affordable_steps(budget_seconds, trial.cpu_seconds, num_steps, seconds_of_steps(times), epochs)


def seconds_of_steps(times: Sequence[tuple[int, float]]) -> float:
    """What all steps took, from each one's number within its stage and the time at its end.

    The first of a stage counts as much as the mean of its others: with it comes what is made once.
    """
    stages: list[list[float]] = []
    for step, ended in times:
        if step == 1:
            stages.append([])
        stages[-1].append(ended)
    return sum(len(ends) * (ends[-1] - ends[0]) / (len(ends) - 1) for ends in stages if len(ends) > 1)


def affordable_steps(
    budget_seconds: float, measured_seconds: float, num_measured: int, steps_seconds: float, epochs: int
) -> int:
    """How many steps fit, in so many epochs, if a training of `num_measured` took so long, of which its steps so much.

    Raises:
        UsageError: not even a step for each epoch fits.
    """
    rest_seconds = max(0.0, measured_seconds - steps_seconds)
    affordable = int((budget_seconds - rest_seconds) / (steps_seconds / num_measured))
    if affordable < epochs:
        raise UsageError(
            f"baseline --budget cpu-seconds: the run took {budget_seconds:.2f} processor seconds, but what a rival does beside "
            f"its steps takes {rest_seconds:.2f} s, and a step {steps_seconds / num_measured:.3g} s; use --budget passes, a "
            "longer run, or fewer data.held_out_samples"
        )
    return affordable // epochs * epochs


def _run_cpu_seconds(session: RunSession) -> float:
    report = session.finished_report
    if report is None:
        raise UsageError(
            f"baseline --budget cpu-seconds: the run in {session.context.run_dir} is not finished, so its processor seconds "
            "are not known; run the job first, or use --budget passes"
        )
    spent = report.timings.cpu_seconds
    # With a fit the teacher's seconds are mostly that; without, they are the run's own preparation.
    teacher = spent.teacher if session.context.job.teacher.fit is None else 0.0
    return teacher + spent.dump + spent.train + spent.reduce
