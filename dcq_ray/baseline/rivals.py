"""Train a rival within a budget: the best of three learning rates, by held-out images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dcq_ray.baseline.methods import METHODS, Lesson
from dcq_ray.errors import DataError, UsageError
from dcq_ray.phases import Network, RunSession, choose_device, open_network, part_top1
from dcq_ray.phases.polish import Judge, attempt_step, judge_of
from dcq_ray.phases.reduce import adapt_batchnorm
from dcq_ray.records import BaselineReport, Progress
from dcq_ray.stitch import has_batchnorm

# Around the job's own rate: half a decade down and up.
RATE_FACTORS = (0.3, 1.0, 3.0)
# Two short trainings tell what a step costs and what the rest does.
MEASURED_STEPS = (4, 20)
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
    finished run of the session took, dump, training and reduction (a fit of the teacher is nobody's): what a step costs is
    measured beforehand. The report's `cpu_seconds` is what the chosen rate took alone, held-out scores included.

    Raises:
        DataError: the images have no labels, and the method learns from labels.
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
    if budget_seconds is not None:
        num_steps = _affordable_steps(session, network, judge, method, rates[0], budget_seconds)
    trials = [_trial(session, network, judge, method, rate, num_steps) for rate in rates]
    # Of equals the first, the lowest rate.
    best = max(trials, key=lambda trial: trial.score)
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


def _trial(
    session: RunSession, network: Network, judge: Judge, method: str, lr: float, num_steps: int, *, told: bool = True
) -> _Trial:
    context = session.context
    start_cpu_seconds = time.process_time()

    def report(step: int, loss: float) -> None:
        if told and step % 10 == 0:
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
        judge=judge,
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
    score = judge(student)
    return _Trial(lr=lr, score=score, student=student, cpu_seconds=time.process_time() - start_cpu_seconds)


def _affordable_steps(
    session: RunSession, network: Network, judge: Judge, method: str, lr: float, budget_seconds: float
) -> int:
    """How many steps fit into so many processor seconds, scores included; at least one."""
    session.emit(Progress(phase="baseline", detail=f"{method}: measuring what a step costs"))
    few, many = (
        _trial(session, network, judge, method, lr, number, told=False).cpu_seconds for number in MEASURED_STEPS
    )
    step_seconds = max((many - few) / (MEASURED_STEPS[1] - MEASURED_STEPS[0]), 1e-6)
    rest_seconds = max(0.0, few - MEASURED_STEPS[0] * step_seconds)
    return max(1, int((budget_seconds - rest_seconds) / step_seconds))


def _run_cpu_seconds(session: RunSession) -> float:
    report = session.finished_report
    if report is None:
        raise UsageError(
            f"baseline --budget cpu-seconds: the run in {session.context.run_dir} is not finished, so its processor seconds "
            "are not known; run the job first, or use --budget passes"
        )
    spent = report.timings.cpu_seconds
    return spent.dump + spent.train + spent.reduce
