"""Stream: sections trained at once, each on what the sections before it give while they train.

Sections that only ever saw the teacher's activations meet others in the stitched student: errors drift. One after the other,
each on its trained predecessors' outputs, is better, and not parallel. Here all sections take the same batch at the same
*tick*: what a section gave in its own step on the batch is its successor's input of that tick, so nothing is computed twice and
the only wait is for the pipeline to fill. Two things make it as good as one after the other:

- the inputs turn from the teacher's into the student's over the first part of a section's training (annealed teacher forcing, as
  in MREM-P, Bai et al. 2022, arXiv 2109.15082, section 3.3);
- sections start one after the other, the last one `stagger` of a training late, so that the rates of a section's predecessors
  have fallen further than its own, and it ends on inputs that no longer change.

With `stagger` s the chain of dependent work is (1 + s) trainings of one section: 1 / (1 + s) of the ideal speed-up. A section
that has ended only passes activations on. Whoever trains which run of neighbouring sections, the result is the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from dcq_ray.data import Splits
from dcq_ray.errors import SectionTrainingError
from dcq_ray.phases.context import Emit, Network, choose_device
from dcq_ray.phases.objective import objective_loss
from dcq_ray.phases.sources import Source, with_noise
from dcq_ray.phases.train import (
    SHARDS_PER_WINDOW,
    commit_section,
    noise_seed,
    open_views,
    section_failure,
    step_reporter,
    student_section,
)
from dcq_ray.records import RunContext, SectionFailure, SectionResult, SectionTask
from dcq_ray.section import Training
from dcq_ray.shards import sample_order, samples_per_shard

# All sections see the same batches: their order is drawn as that of a section which no plan has.
STREAM_SECTION = 2**31 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamClock:
    """When which section trains, in ticks; every section takes one step a tick for `num_steps` ticks."""

    batch_size: int
    steps_per_epoch: int
    num_steps: int
    starts: tuple[int, ...]
    """The first tick of each section."""

    @property
    def num_ticks(self) -> int:
        return self.starts[-1] + self.num_steps

    def student_share(self, section: int, tick: int, anneal: float) -> float:
        """The share of the student in a section's inputs at a tick: from 0 to 1 in equal steps over `anneal` of its training."""
        done = (tick - self.starts[section]) / self.num_steps
        return 1.0 if done >= anneal else done / anneal


def stream_clock(context: RunContext) -> StreamClock:
    """The clock of a job."""
    train, num_samples = context.job.train, context.plan.boundaries[0].num_samples
    batch_size = min(train.batch_size, num_samples)
    steps_per_epoch = num_samples // batch_size
    num_steps = train.epochs * steps_per_epoch
    latest, last = train.stagger * num_steps, max(1, len(context.plan.sections) - 1)
    starts = tuple(round(latest * index / last) for index in range(len(context.plan.sections)))
    return StreamClock(batch_size=batch_size, steps_per_epoch=steps_per_epoch, num_steps=num_steps, starts=starts)


def train_stream(
    context: RunContext,
    tasks: Sequence[SectionTask],
    network: Network,
    splits: Splits | None,
    *,
    emit: Emit,
    memory_bytes: int,
    receive: Callable[[int], Tensor] | None = None,
    send: Callable[[int, Tensor], None] | None = None,
    restarts: int = 0,
) -> Iterator[SectionResult | SectionFailure]:
    """Train a run of neighbouring sections in step, and yield each result as it is committed.

    A section that fails is yielded as a failure, and ends it: those after it have no inputs any more.

    Args:
        receive: tick -> the input [B, ...] of the first of them from the section before; None where that is the images.
        send: takes the output of the last of them at every tick at which the section after it trains; None for the last one.

    Raises:
        ShardError: a boundary's shards are missing or damaged; they are struck off, and the next run dumps them again.
        StaleRunError: another driver holds the run directory now.
    """
    job = context.job
    torch.set_num_threads(job.train.num_threads)
    device = choose_device(context.device)
    clock = stream_clock(context)
    first, after = tasks[0].index, tasks[-1].index + 1
    order = np.empty(0, np.int64)
    with contextlib.ExitStack() as stack:
        trainees = [
            _Trainee(context, task, network, splits, device, memory_bytes // len(tasks), stack, emit, clock)
            for task in tasks
        ]
        for tick in range(clock.starts[first], clock.num_ticks):
            epoch, step = divmod(tick, clock.steps_per_epoch)
            if step == 0 or not len(order):
                order = _order(context, epoch)
            positions = order[step * clock.batch_size : (step + 1) * clock.batch_size]
            value = trainees[0].read_input(epoch, positions) if receive is None else receive(tick).to(device)
            for trainee in trainees:
                if tick < clock.starts[trainee.task.index]:
                    break
                share = clock.student_share(trainee.task.index, tick, job.train.anneal)
                try:
                    value = trainee.take(value, share if trainee.task.index else 1.0, epoch, positions)
                    result = trainee.commit(context, restarts) if trainee.due else None
                except SectionTrainingError as error:
                    yield section_failure(trainee.task, error)
                    return
                if result is not None:
                    yield result
            if send is not None and tick >= clock.starts[after]:
                send(tick, value)


class _Trainee:
    """One section of a stream: its module, its training, and what it reads."""

    def __init__(
        self,
        context: RunContext,
        task: SectionTask,
        network: Network,
        splits: Splits | None,
        device: torch.device,
        memory_bytes: int,
        stack: contextlib.ExitStack,
        emit: Emit,
        clock: StreamClock,
    ) -> None:
        started, start_cpu_seconds = time.monotonic(), time.process_time()
        job = context.job
        self.task = task
        self._seed, self._input_noise = job.seed, job.train.input_noise
        self._views: list[list[Source]] = open_views(context, task.index, splits, device, memory_bytes, stack)
        self._module: GraphModule = student_section(context, task.index, network, self._views[0][0], device)
        self._training = Training(
            self._module,
            settings=job.train,
            num_steps=clock.num_steps,
            loss=objective_loss(context, task.index, network, device),
            device=device,
            what=f"section {task.index}",
        )
        self._training.train()
        self._steps_per_epoch, self._steps_left, self._committed = clock.steps_per_epoch, clock.num_steps, False
        self._report = step_reporter(emit, task.index, clock.num_steps, clock.batch_size)
        self._seconds = time.monotonic() - started
        self._cpu_seconds = time.process_time() - start_cpu_seconds

    @property
    def due(self) -> bool:
        """Whether it is trained to the end, and not yet committed."""
        return self._steps_left == 0 and not self._committed

    def read_input(self, epoch: int, positions: np.ndarray) -> Tensor:
        """The teacher's activations at its start."""
        return self._views[epoch % len(self._views)][0].read(positions)

    def take(self, streamed: Tensor, share: float, epoch: int, positions: np.ndarray) -> Tensor:
        """Take a step on inputs of which `share` is the student's, where steps are left, and return the output."""
        started, start_cpu_seconds = time.monotonic(), time.process_time()
        # Clones, since a section may work in place on its input, and this one may be another's output.
        if self._steps_left == 0 or self._training.total == 0:
            with torch.no_grad():
                output: Tensor = self._module(streamed.clone())
        else:
            inputs = streamed.clone()
            if share < 1.0:
                inputs = torch.lerp(self.read_input(epoch, positions), inputs, share)
            generator = torch.Generator().manual_seed(noise_seed(self._seed, self.task.index, self._training.num_steps))
            inputs = with_noise(inputs, self._input_noise, generator)
            targets = tuple(source.read(positions) for source in self._views[epoch % len(self._views)][1:])
            output = self._training.step(inputs, targets)
            self._report(self._training.num_steps, self._training.latest_loss)
        self._steps_left = max(0, self._steps_left - 1)
        self._seconds += time.monotonic() - started
        self._cpu_seconds += time.process_time() - start_cpu_seconds
        return output

    def commit(self, context: RunContext, restarts: int) -> SectionResult:
        """Write the trained section; from here on it is in eval mode and only passes activations on."""
        started, start_cpu_seconds = time.monotonic(), time.process_time()
        result = self._training.finish(self._steps_per_epoch)
        self._committed = True
        return commit_section(
            context,
            self.task,
            self._module,
            result,
            seconds=self._seconds + time.monotonic() - started,
            cpu_seconds=self._cpu_seconds + time.process_time() - start_cpu_seconds,
            restarts=restarts,
        )


def _order(context: RunContext, epoch: int) -> np.ndarray:
    job, num_samples = context.job, context.plan.boundaries[0].num_samples
    window = SHARDS_PER_WINDOW * samples_per_shard(job.data.batch_size)
    return sample_order(num_samples, window=window, seed=job.seed, section=STREAM_SECTION, epoch=epoch)
