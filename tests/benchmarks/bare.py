"""A job's work as bare loops in one process: images and activations in memory, no files, no Ray, nothing kept for a resume.

What a user would write who knows the recipe, and has no other wish than to see it done. Quantizers, their fitted starts and the
losses are dcq-ray's own, since they are the recipe; loops are written here anew.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcq_ray.data import Part, Splits, load_splits
from dcq_ray.losses import LossFunction, loss_function
from dcq_ray.partition import cut, trace_teacher
from dcq_ray.phases import ignore_progress, obtain_teacher, plan_job
from dcq_ray.quantizers import activation_starts, fit_weights, put_quantizers
from dcq_ray.records import PartitionPlan
from dcq_ray.spec import Job
from dcq_ray.storage import open_store

T = TypeVar("T")
NUM_CALIBRATION, NUM_COMPARED, NUM_BATCHNORM, NUM_ALONE = 512, 256, 5120, 1000
"""Images on which a run calibrates, compares a training's ends, re-estimates BatchNorm, and measures sections alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """A job with its teacher in pieces, and its images."""

    job: Job
    teacher: nn.Module
    sections: tuple[GraphModule, ...]
    plan: PartitionPlan
    splits: Splits


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """Processor seconds of named pieces of work."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], T]) -> T:
        """What the work gives; its seconds are added to those under its name."""
        started = time.process_time()
        value = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return value


def opened(job: Job, folder: str) -> Bare:
    """A job's teacher, cut as it says, and its images; only its cache is written to."""
    torch.set_num_threads(job.train.num_threads)
    splits = load_splits(job.data, seed=job.seed, job_folder=folder)
    cache = open_store(job.storage.cache_dir)
    Path(job.storage.cache_dir).mkdir(parents=True, exist_ok=True)
    teacher = obtain_teacher(job, folder, splits, cache, device=torch.device("cpu"), emit=ignore_progress)
    plan = plan_job(job, teacher, splits, device=torch.device("cpu"), cache=cache)
    traced = trace_teacher(teacher.module, torch.zeros(2, *plan.input_shape))
    return Bare(
        job=job,
        teacher=teacher.module,
        sections=cut(traced, plan.cuts, copied=False),
        plan=plan,
        splits=splits,
    )


def all_images(part: Part) -> Tensor:
    """All images of a part, float32 [N, C, H, W]."""
    return part.images(torch.arange(len(part)).numpy())


@torch.no_grad()
def through(modules: Sequence[nn.Module], values: Tensor, batch_size: int) -> Tensor:
    """What modules, one after the other, give for rows [N, ...]."""
    outputs = []
    for batch in values.split(batch_size):
        batch = batch.clone()
        for module in modules:
            batch = module(batch)
        outputs.append(batch)
    return torch.cat(outputs)


@torch.no_grad()
def boundaries(bare: Bare, images: Tensor) -> list[Tensor]:
    """The teacher's activations at every boundary, the images first, from one pass."""
    batch_size = bare.job.data.batch_size
    found: list[list[Tensor]] = [[] for _ in bare.sections]
    for batch in images.split(batch_size):
        value = batch
        for index, section in enumerate(bare.sections):
            # A clone: sections may work in place on their input, which the boundary before keeps.
            value = section(value.clone())
            found[index].append(value)
    return [images, *(torch.cat(parts) for parts in found)]


def started(bare: Bare, index: int, inputs: Tensor, *, fitted: bool) -> GraphModule:
    """A student section with its quantizers where they start."""
    module: GraphModule = copy.deepcopy(bare.sections[index])
    layers, batch_size = bare.plan.sections[index].layers, bare.job.data.batch_size
    put_quantizers(module, layers, activation_starts(module, layers, inputs[:NUM_CALIBRATION].split(batch_size)))
    if fitted:
        rows = inputs[: bare.job.train.start_samples].split(batch_size)
        fit_weights(module, bare.sections[index], ((row.clone(), row.clone()) for row in rows), seed=bare.job.seed)
    return module


class Stepper:
    """Steps of one module by the job's optimizer and rate; BatchNorm on batch statistics, everything else in eval mode."""

    def __init__(self, bare: Bare, module: nn.Module, num_steps: int) -> None:
        train = bare.job.train
        module.eval().requires_grad_(True)
        batchnorm_trains(module)
        parameters = list(module.parameters())
        self.optimizer = torch.optim.Adam(parameters, lr=train.lr, foreach=True) if parameters else None
        self._schedule = None
        if self.optimizer is not None:
            self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def step(self, loss: Tensor) -> None:
        """One update from a loss."""
        if self.optimizer is None or self._schedule is None:
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._schedule.step()


def batchnorm_trains(module: nn.Module) -> None:
    """Batch statistics for BatchNorm; the rest stays as it is."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()


def orders(bare: Bare) -> Iterator[Tensor]:
    """Positions [B] of the batches of all epochs, shuffled; an epoch's last, smaller batch is dropped."""
    num_samples, batch_size = len(bare.splits.train), min(bare.job.train.batch_size, len(bare.splits.train))
    generator = torch.Generator().manual_seed(bare.job.seed)
    for _ in range(bare.job.train.epochs):
        order = torch.randperm(num_samples, generator=generator)
        yield from (part for part in order.split(batch_size) if len(part) == batch_size)


def num_steps(bare: Bare) -> int:
    """Of a section's training."""
    num_samples = len(bare.splits.train)
    return bare.job.train.epochs * (num_samples // min(bare.job.train.batch_size, num_samples))


def loss_of(bare: Bare) -> LossFunction:
    """Of a section's output and its target."""
    return loss_function(bare.job.train.loss, temperature=bare.job.train.temperature)


def train(bare: Bare, module: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Train a module, in place, on rows that lie in memory."""
    stepper, loss = Stepper(bare, module, num_steps(bare)), loss_of(bare)
    for positions in orders(bare):
        stepper.step(loss(module(inputs[positions]), targets[positions]))
    module.eval().requires_grad_(False)


@torch.no_grad()
def reestimate(module: nn.Module, inputs: Tensor, batch_size: int) -> None:
    """BatchNorm's statistics as averages over these rows."""
    module.eval()
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in inputs.split(batch_size):
        module(batch.clone())
    module.eval()


def whole_run(bare: Bare, watch: Stopwatch) -> nn.Module:
    """All the work that a run's student and report need, each piece once and timed; gives the student.

    The pieces: `teacher` (its passes over train, held-out and test images), `section K` (start, steps, the choice between the
    two, BatchNorm), `untrained` (BatchNorm and test images), `alone` (every section alone on held-out images), `student`
    (BatchNorm, held-out images before and after it, section by section, and test images).
    """
    job, splits = bare.job, bare.splits
    batch_size = job.data.batch_size
    assert splits.test is not None
    images, held_out, test = (all_images(part) for part in (splits.train, splits.held_out, splits.test))
    fitted = job.train.start == "fitted"
    cached = watch.time("teacher", lambda: boundaries(bare, images))
    held_cached = watch.time("teacher", lambda: boundaries(bare, held_out))
    watch.time("teacher", lambda: through(bare.sections, test, batch_size))
    first_images = images[:NUM_BATCHNORM]

    def section(index: int) -> GraphModule:
        inputs, targets = cached[index], cached[index + 1]
        module = started(bare, index, inputs, fitted=fitted)
        train(bare, module, inputs, targets)
        if fitted:
            for _ in ("the start", "the end"):
                through([module], inputs[:NUM_COMPARED], batch_size)
        reestimate(module, inputs[:NUM_CALIBRATION], batch_size)
        return module

    def untrained() -> None:
        modules = nn.Sequential(
            *(started(bare, index, cached[index], fitted=False) for index in range(len(cached) - 1))
        )
        reestimate(modules, first_images, batch_size)
        through(modules, test, batch_size)

    students = [watch.time(f"section {index}", lambda index=index: section(index)) for index in range(len(cached) - 1)]

    def alone() -> None:
        for index, student in enumerate(students):
            through([student, *bare.sections[index + 1 :]], held_cached[index][:NUM_ALONE], batch_size)

    def waterfall(values: Tensor) -> None:
        for index, student in enumerate(students):
            values = through([student], values, batch_size)
            through(bare.sections[index + 1 :], values[:NUM_ALONE], batch_size)

    def finish() -> None:
        through(students, held_out, batch_size)
        reestimate(nn.Sequential(*students), first_images, batch_size)
        waterfall(held_out)
        through(students, test, batch_size)

    watch.time("untrained", untrained)
    watch.time("alone", alone)
    watch.time("student", finish)
    return nn.Sequential(*students)
