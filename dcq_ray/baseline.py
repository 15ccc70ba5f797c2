"""The rivals: what a user would do instead, from the same teacher, data, quantizer and number of sample passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dcq_ray.data import augmented_batches
from dcq_ray.errors import DataError
from dcq_ray.losses import cross_entropy
from dcq_ray.phases import Network, RunSession, choose_device, open_network, part_top1
from dcq_ray.phases.reduce import adapt_batchnorm, untrained_student
from dcq_ray.records import BaselineReport, Progress
from dcq_ray.section import train_module

# Around the job's own rate: half a decade down and up.
RATE_FACTORS = (0.3, 1.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One learning rate's best epoch by held-out accuracy."""

    lr: float
    held_out_top1: float
    state: dict[str, Tensor]
    num_sample_passes: int
    cpu_seconds: float


def train_dorefa(session: RunSession) -> BaselineReport:
    """End-to-end DoReFa-Net training (arXiv 1606.06160) with cross-entropy, the best of three learning rates.

    As many sample passes as one section has (every image goes through the whole network once an epoch), the job's
    optimizer, schedule, batch size and seed. Rate and epoch are chosen on held-out images; the test part is touched once.
    `cpu_seconds` is what the chosen rate took alone.

    Raises:
        DataError: the images have no labels.
    """
    started = time.monotonic()
    context, splits = session.context, session.prepared.splits
    if splits.train.labels is None or splits.held_out.labels is None:
        raise DataError("baseline dorefa learns from labels, but the train images have none; give labels in data.train")
    torch.set_num_threads(context.job.train.num_threads)
    device = choose_device(context.device)
    network = open_network(context)
    rates = tuple(factor * context.job.train.lr for factor in RATE_FACTORS)
    trials = [_train_at(session, network, rate, device, number, len(rates)) for number, rate in enumerate(rates)]
    best = max(trials, key=lambda trial: trial.held_out_top1)
    student = untrained_student(context, network, splits.train, device)
    student.load_state_dict(best.state)
    student.to(device)
    top1 = None if splits.test is None else part_top1(student, splits.test, context.job.data.batch_size, device)
    session.emit(Progress(phase="baseline", state="done", detail=f"best at lr {best.lr:g}"))
    return BaselineReport(
        method="dorefa",
        top1=top1,
        cpu_seconds=best.cpu_seconds,
        lr=best.lr,
        held_out_top1=best.held_out_top1,
        tried_lrs=rates,
        num_sample_passes=best.num_sample_passes,
        seconds=time.monotonic() - started,
    )


def _train_at(
    session: RunSession, network: Network, lr: float, device: torch.device, number: int, num_rates: int
) -> _Trial:
    context, splits = session.context, session.prepared.splits
    job = context.job
    start_cpu_seconds = time.process_time()
    student = untrained_student(context, network, splits.train, device).to(device)
    batch_size = min(job.train.batch_size, len(splits.train))
    steps_per_epoch = len(splits.train) // batch_size
    total = num_rates * job.train.epochs * steps_per_epoch
    best: tuple[float, dict[str, Tensor]] | None = None

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(
            splits.train, batch_size=batch_size, flip=False, crop_padding=0, seed=job.seed, epoch=epoch
        )

    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0:
            done = number * job.train.epochs * steps_per_epoch + step
            session.emit(
                Progress(phase="baseline", done=done, total=total, unit="steps", loss=loss, detail=f"lr {lr:g}")
            )

    def score() -> float:
        top1 = part_top1(student, splits.held_out, job.data.batch_size, device)
        assert top1 is not None
        return top1

    def after_epoch(_: int) -> None:
        nonlocal best
        top1 = score()
        if best is None or top1 >= best[0]:
            best = (top1, {name: value.detach().cpu().clone() for name, value in student.state_dict().items()})

    result = train_module(
        student,
        batches,
        settings=job.train.model_copy(update={"lr": lr}),
        steps_per_epoch=steps_per_epoch,
        loss=cross_entropy,
        device=device,
        what=f"baseline dorefa at lr {lr:g}",
        on_step=on_step,
        after_epoch=after_epoch,
    )
    if best is not None:
        student.load_state_dict(best[1])
    # The rival gets what the student gets.
    adapt_batchnorm(context, student, splits.train, device)
    return _Trial(
        lr=lr,
        held_out_top1=score(),
        state={name: value.detach().cpu().clone() for name, value in student.state_dict().items()},
        num_sample_passes=result.num_sample_passes,
        cpu_seconds=time.process_time() - start_cpu_seconds,
    )
