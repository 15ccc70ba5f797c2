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
that has ended only passes activations on. Whoever trains which run of neighbouring sections, and at whichever saved tick a
restart begins (`stream_saving`), the result is the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dcq_ray.data import Splits
from dcq_ray.errors import SectionTrainingError, StorageError
from dcq_ray.phases.committed import commit_section, finished_section, section_failure, trained_section
from dcq_ray.phases.context import Emit, Network, choose_device, section_store
from dcq_ray.phases.objective import objective_loss
from dcq_ray.phases.reading import open_views
from dcq_ray.phases.saving import Pace, SaveRequest, SectionSaver
from dcq_ray.phases.sources import Source, with_noise
from dcq_ray.phases.starting import student_section
from dcq_ray.phases.stream_saving import SavingTicks, StreamClock, stream_clock
from dcq_ray.phases.train import SHARDS_PER_WINDOW, noise_seed, step_reporter
from dcq_ray.records import RunContext, SectionFailure, SectionResult, SectionTask
from dcq_ray.section import Training, load_optimizers
from dcq_ray.shards import sample_order, samples_per_shard

# All sections see the same batches: their order is drawn as that of a section which no plan has.
STREAM_SECTION = 2**31 + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streamed:
    """What a section gives the next one at a tick."""

    activations: Tensor
    """[B, ...]"""
    save: bool
    """Whether all sections save their state after this tick."""


def train_stream(
    context: RunContext,
    tasks: Sequence[SectionTask],
    network: Network,
    splits: Splits | None,
    *,
    emit: Emit,
    memory_bytes: int,
    stream: Sequence[SectionTask] | None = None,
    receive: Callable[[int], Streamed] | None = None,
    send: Callable[[int, Streamed], None] | None = None,
    restarts: int = 0,
    start_tick: int = 0,
    request: SaveRequest | None = None,
) -> Iterator[SectionResult | SectionFailure]:
    """Train a run of neighbouring sections in step, and yield each result as it is committed.

    Those that ended before `start_tick` are yielded at once. A section that fails is yielded as a failure, and ends it: those
    after it have no inputs any more.

    Args:
        stream: all sections of the stream, where others train some of them.
        receive: tick -> the input of the first of them from the section before; None where that is the images.
        send: takes the output of the last of them at every tick at which the section after it trains; None for the last one.
        restarts: how often workers of the stream died under this driver.
        start_tick: go on there; all sections are whole at it, as `restart_tick` found.
        request: asked at every tick by who trains the first section whether somebody wants a checkpoint at once.

    Raises:
        ShardError: a boundary's shards are missing or damaged; they are struck off, and the next run dumps them again.
        StaleRunError: another driver holds the run directory now.
    """
    job = context.job
    torch.set_num_threads(job.train.num_threads)
    load_optimizers()
    device = choose_device(context.device)
    clock = stream_clock(context)
    first, after = tasks[0].index, tasks[-1].index + 1
    order = np.empty(0, np.int64)
    request, pace = SaveRequest() if request is None else request, Pace(job.storage.checkpoint_seconds)
    saving_ticks = SavingTicks(context, tasks if stream is None else stream, start_tick, request, pace)
    # What all sections take to save is judged by the time that ours take.
    share = _share_of_parameters(context, tasks)
    with contextlib.ExitStack() as stack:
        trainees: list[_Trainee] = []
        for task in tasks:
            result = _ended_before(context, task, clock, start_tick)
            if result is not None:
                yield result
            saver = SectionSaver(context, task, restarts=restarts, emit=emit, position=start_tick)
            memory_share = memory_bytes // len(tasks)
            trainees.append(
                _Trainee(
                    context, task, network, splits, device, memory_share, stack, emit, clock, start_tick, saver, result
                )
            )
        for tick in range(max(start_tick, clock.starts[first]), clock.num_ticks):
            epoch, step = divmod(tick, clock.steps_per_epoch)
            if step == 0 or not len(order):
                order = _order(context, epoch)
            positions = order[step * clock.batch_size : (step + 1) * clock.batch_size]
            if receive is None:
                value, save = trainees[0].read_input(epoch, positions), saving_ticks.due(tick)
            else:
                streamed = receive(tick)
                value, save = streamed.activations.to(device), streamed.save
            started = [trainee for trainee in trainees if tick >= clock.starts[trainee.task.index]]
            for trainee in started:
                student_share = clock.student_share(trainee.task.index, tick, job.train.anneal)
                try:
                    value = trainee.take(value, student_share if trainee.task.index else 1.0, epoch, positions)
                    result = trainee.commit(context) if trainee.due else None
                except SectionTrainingError as error:
                    yield section_failure(trainee.task, error)
                    return
                if result is not None:
                    yield result
            if send is not None and tick >= clock.starts[after]:
                send(tick, Streamed(activations=value, save=save))
            if save:
                with pace.saving(share=share):
                    for trainee in started:
                        trainee.save(tick + 1)
                if request.wanted:
                    request.answer()


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
        start_tick: int,
        saver: SectionSaver,
        result: SectionResult | None,
    ) -> None:
        """`result`: where the section ended before `start_tick`."""
        started, start_cpu_seconds = time.monotonic(), time.process_time()
        job = context.job
        self.task, self._saver = task, saver
        self._seed, self._input_noise = job.seed, job.train.input_noise
        self._steps_per_epoch, self._committed = clock.steps_per_epoch, result is not None
        self._steps_left = clock.num_steps - clock.steps_before(task.index, start_tick)
        self._views: list[list[Source]] = []
        if result is None or task.index == 0:
            self._views = open_views(context, task.index, splits, device, memory_bytes, stack, network)
        self._training: Training | None = None
        if result is not None:
            self._module: nn.Module = trained_section(context, result, network).to(device)
            return
        resumed = saver.start is not None
        self._module = student_section(context, task.index, network, self._views[0][0], device, resumed=resumed)
        self._training = Training(
            self._module,
            settings=job.train,
            num_steps=clock.num_steps,
            loss=objective_loss(context, task.index, network, device),
            device=device,
            what=f"section {task.index}",
            start=saver.start,
        )
        self._training.train()
        self._report = step_reporter(
            emit, task.index, clock.num_steps, clock.batch_size, first_step=self._training.num_steps
        )
        self._seconds = saver.before.seconds + time.monotonic() - started
        self._cpu_seconds = saver.before.cpu_seconds + time.process_time() - start_cpu_seconds

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
        training = self._training
        # Clones, since a section may work in place on its input, and this one may be another's output.
        if training is None or self._steps_left == 0 or training.total == 0:
            with torch.no_grad():
                output: Tensor = self._module(streamed.clone())
        else:
            inputs = streamed.clone()
            if share < 1.0:
                inputs = torch.lerp(self.read_input(epoch, positions), inputs, share)
            generator = torch.Generator().manual_seed(noise_seed(self._seed, self.task.index, training.num_steps))
            inputs = with_noise(inputs, self._input_noise, generator)
            targets = tuple(source.read(positions) for source in self._views[epoch % len(self._views)][1:])
            output = training.step(inputs, targets)
            self._report(training.num_steps, training.latest_loss)
        self._steps_left = max(0, self._steps_left - 1)
        if training is not None:
            self._seconds += time.monotonic() - started
            self._cpu_seconds += time.process_time() - start_cpu_seconds
        return output

    def save(self, tick: int) -> None:
        """Save the state before a tick, unless it is trained to the end."""
        if self._training is not None and not self._committed:
            self._saver.save(
                self._training.state(), seconds=self._seconds, cpu_seconds=self._cpu_seconds, position=tick
            )

    def commit(self, context: RunContext) -> SectionResult:
        """Write the trained section; from here on it is in eval mode and only passes activations on."""
        assert self._training is not None
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
            restarts=self._saver.restarts,
        )


def _ended_before(context: RunContext, task: SectionTask, clock: StreamClock, tick: int) -> SectionResult | None:
    """The result of a section that took its last step before a tick, None where it did not.

    Raises:
        StorageError: it did, but its result is not there any more.
    """
    if clock.steps_before(task.index, tick) < clock.num_steps:
        return None
    result = finished_section(context, task)
    if result is None:
        raise StorageError(
            f"{section_store(context, task.index).uri}: the result of section {task.index}, which others train on, is gone "
            "or damaged; run again to train it"
        )
    return result


def _share_of_parameters(context: RunContext, tasks: Sequence[SectionTask]) -> float:
    counts = [section.num_parameters for section in context.plan.sections]
    ours = sum(counts[task.index] for task in tasks)
    return max(1, ours) / max(1, sum(counts))


def _order(context: RunContext, epoch: int) -> np.ndarray:
    job, num_samples = context.job, context.plan.boundaries[0].num_samples
    window = SHARDS_PER_WINDOW * samples_per_shard(job.data.batch_size)
    return sample_order(num_samples, window=window, seed=job.seed, section=STREAM_SECTION, epoch=epoch)
