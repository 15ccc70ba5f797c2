"""Checkpoints of a stream: all sections save at the same ticks, and a restart begins at one that all of them have whole.

Before a tick, what a section is about to get from the one before it is made of that one's state; so the states of all sections
before one tick are all there is to a stream, and nothing on its way between workers need be kept. Who trains the first section
says when, and the word travels down with the activations: every worker saves after the very same tick, on its own. Files are
per section, so that sections may be dealt otherwise after a restart. At the tick at which a restart begins a section

- has not begun: it begins as ever, later;
- is in training: it has a checkpoint of that tick;
- has ended: its result is there, and it only passes activations on.

The checkpoint before the newest is kept until every section has the newest: the next tick to save at is named only then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcq_ray.errors import StorageError
from dcq_ray.phases.checkpoints import checkpoint_at, checkpoint_positions
from dcq_ray.phases.committed import finished_section
from dcq_ray.phases.context import Emit
from dcq_ray.phases.saving import Pace, SaveRequest, checkpoint_store
from dcq_ray.records import Progress, RunContext, SectionTask


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

    def steps_before(self, section: int, tick: int) -> int:
        """How many of its steps a section has taken when a tick begins, 0 … num_steps."""
        return min(self.num_steps, max(0, tick - self.starts[section]))


def stream_clock(context: RunContext) -> StreamClock:
    """The clock of a job."""
    train, num_samples = context.job.train, context.plan.boundaries[0].num_samples
    batch_size = min(train.batch_size, num_samples)
    steps_per_epoch = num_samples // batch_size
    num_steps = train.epochs * steps_per_epoch
    latest, last = train.stagger * num_steps, max(1, len(context.plan.sections) - 1)
    starts = tuple(round(latest * index / last) for index in range(len(context.plan.sections)))
    return StreamClock(batch_size=batch_size, steps_per_epoch=steps_per_epoch, num_steps=num_steps, starts=starts)


def restart_tick(context: RunContext, tasks: Sequence[SectionTask], *, emit: Emit) -> int:
    """The newest tick at which every section of a stream is whole, by its tensors' digests; 0 is its start.

    `emit` is told of damaged checkpoints, which are passed over.
    """

    def whole(task: SectionTask, tick: int) -> bool:
        def on_damage(told: str) -> None:
            emit(Progress(phase="train", index=task.index, detail=told))

        return checkpoint_at(checkpoint_store(context, task), tick, on_damage=on_damage)[0] is not None

    return _newest_tick(context, tasks, whole)


def saved_tick(context: RunContext, tasks: Sequence[SectionTask]) -> int:
    """As `restart_tick`, by the checkpoints' marks alone: how far a stream is sure to have come."""
    return _newest_tick(
        context, tasks, lambda task, tick: tick in checkpoint_positions(checkpoint_store(context, task))
    )


def _newest_tick(context: RunContext, tasks: Sequence[SectionTask], whole: Callable[[SectionTask, int], bool]) -> int:
    clock = stream_clock(context)
    ticks: set[int] = set()
    for task in tasks:
        ticks |= checkpoint_positions(checkpoint_store(context, task))
    for tick in sorted(ticks, reverse=True):
        if all(_has(context, clock, task, tick, whole) for task in tasks):
            return tick
    return 0


def _has(
    context: RunContext,
    clock: StreamClock,
    task: SectionTask,
    tick: int,
    whole: Callable[[SectionTask, int], bool],
) -> bool:
    """Whether a section can go on at a tick."""
    steps = clock.steps_before(task.index, tick)
    if steps == 0:
        return True
    if steps == clock.num_steps:
        return finished_section(context, task) is not None
    return whole(task, tick)


class SavingTicks:
    """Says to whoever trains the first section after which ticks all sections save."""

    def __init__(
        self, context: RunContext, stream: Sequence[SectionTask], start_tick: int, request: SaveRequest, pace: Pace
    ) -> None:
        """`stream`: all sections of it, whoever trains them."""
        self._context, self._stream, self._request, self._pace = context, stream, request, pace
        self._clock = stream_clock(context)
        self._latest = start_tick

    def due(self, tick: int) -> bool:
        """Whether the state after this tick is to be saved; where it is, all who train save it."""
        after = tick + 1
        ended = after % self._clock.steps_per_epoch == 0
        if not (self._request.wanted or self._pace.due or (ended and self._pace.due_after_epoch)):
            return False
        # After the last tick the results are there.
        if after == self._clock.num_ticks or not self._all_have_latest():
            return False
        self._latest = after
        return True

    def _all_have_latest(self) -> bool:
        def marked(task: SectionTask, tick: int) -> bool:
            return tick in checkpoint_positions(checkpoint_store(self._context, task))

        try:
            return self._latest == 0 or all(
                _has(self._context, self._clock, task, self._latest, marked) for task in self._stream
            )
        except StorageError:
            # It is asked again after the next tick.
            return False
