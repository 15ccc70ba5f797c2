"""Saving: where a section's training in progress is kept, when it is saved, and by whom.

Checkpoints lie in `sections/NN/checkpoints/<task digest>/`, so another job's are never taken. Of two workers on one section the
one whose driver was replaced writes and deletes nothing; where it does in the moment between its check and its write, what
it leaves is still a state of the very same training, since that depends on the task alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NoReturn

from dcq_ray.errors import StorageError
from dcq_ray.phases.checkpoints import Checkpoint, Effort, checkpoint_at, newest_checkpoint, save_checkpoint
from dcq_ray.phases.context import Emit, refuse_stale, section_store
from dcq_ray.records import Progress, RunContext, SectionTask
from dcq_ray.section import TrainingState
from dcq_ray.storage import Store

CHECKPOINTS_FOLDER = "checkpoints"
# Between two checkpoints lies so many times what the last one took: saving then costs 2.4 % of the time at most.
TIMES_ITS_COST = 40.0
# What the first one is taken to cost.
FIRST_COST_SECONDS = 0.025


def checkpoint_store(context: RunContext, task: SectionTask) -> Store:
    """The folder of a task's checkpoints."""
    return section_store(context, task.index).child(CHECKPOINTS_FOLDER, task.digest)


def remove_checkpoints(context: RunContext, index: int) -> None:
    """Remove the checkpoints of a section, whose result counts now; what cannot be removed harms nobody."""
    with contextlib.suppress(StorageError):
        section_store(context, index).child(CHECKPOINTS_FOLDER).delete_tree()


class Pace:
    """When a checkpoint is due: after `interval_seconds`, and at the end of an epoch.

    In both cases not before `TIMES_ITS_COST` times what the last checkpoint took has passed since, so that large states, slow
    storage and short epochs cost training little.
    """

    def __init__(self, interval_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_seconds, self._clock = interval_seconds, clock
        self._cost_seconds = FIRST_COST_SECONDS
        self._saved_at = clock()

    @property
    def due(self) -> bool:
        """Whether one is due within an epoch."""
        return self._age_seconds >= max(self._interval_seconds, TIMES_ITS_COST * self._cost_seconds)

    @property
    def due_after_epoch(self) -> bool:
        """Whether one is due at the end of an epoch."""
        return self._age_seconds >= TIMES_ITS_COST * self._cost_seconds

    @contextlib.contextmanager
    def saving(self, *, share: float = 1.0) -> Iterator[None]:
        """Time a save, which is done in the block; `share`: of what it costs at that moment all who save."""
        started = self._clock()
        yield
        self._saved_at = self._clock()
        self._cost_seconds = (self._saved_at - started) / share

    @property
    def _age_seconds(self) -> float:
        return self._clock() - self._saved_at


class SaveRequest:
    """A wish that a training save itself at its next step; one thread may make it, and another one answer it."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether somebody waits for a checkpoint."""
        self._answered = threading.Event()

    def make(self) -> None:
        """Wish for a checkpoint."""
        self._answered.clear()
        self.wanted = True

    def answer(self) -> None:
        """Say that one was committed."""
        self._answered.set()
        self.wanted = False

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the answer, and say whether it came."""
        return self._answered.wait(timeout_seconds)


class StopRequest(SaveRequest):
    """A wish that a run in this process end, as SIGTERM's handler makes it: a training saves itself first."""

    def __init__(self, stop: Callable[[], NoReturn]) -> None:
        """`stop`: raises what ends the run."""
        super().__init__()
        self._stop, self._training = stop, False

    def make(self) -> None:
        """End the run: a training at its next step, where it is not asked for the second time, and all else at once."""
        if not self._training or self.wanted:
            self._stop()
        super().make()

    def answer(self) -> None:
        """Say that a checkpoint was committed, and end the run."""
        super().answer()
        self._stop()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Let the trainings of the block save themselves before they end; a wish that found no step ends the run after it."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self.wanted:
            self._stop()


class SectionSaver:
    """The checkpoints of one section as the process sees them that trains it: what it begins with, and what it saves.

    Raises StaleRunError, here and in `save`, where another driver holds the run directory now.
    """

    def __init__(
        self, context: RunContext, task: SectionTask, *, restarts: int, emit: Emit, position: int | None = None
    ) -> None:
        """`restarts`: workers on this task that died under this driver. `position`: begin there, not with the newest."""
        self._context, self._store = context, checkpoint_store(context, task)
        refuse_stale(context)

        def on_damage(told: str) -> None:
            emit(Progress(phase="train", index=task.index, detail=told))

        if position is None:
            begun, self._name = newest_checkpoint(self._store, on_damage=on_damage)
        else:
            begun, self._name = checkpoint_at(self._store, position, on_damage=on_damage)
        self.start: TrainingState | None = None if begun is None else begun.training
        self.before = Effort() if begun is None else begun.effort
        """What was spent before this process."""
        earlier = self.before.earlier_restarts
        if begun is not None and self.before.epoch != context.epoch:
            # The driver of that checkpoint has ended, and with it a worker.
            earlier += self.before.restarts + 1
        self._effort = Effort(epoch=context.epoch, restarts=restarts, earlier_restarts=earlier)

    @property
    def restarts(self) -> int:
        """How often the task began anew, under earlier drivers too where they left a checkpoint."""
        return self._effort.restarts + self._effort.earlier_restarts

    def save(self, training: TrainingState, *, seconds: float, cpu_seconds: float, position: int | None = None) -> None:
        """Commit a checkpoint; the one before it is kept, too, older ones are deleted.

        Args:
            seconds, cpu_seconds: spent so far, by those before this process too.
            position: as of `save_checkpoint`.
        """
        effort = replace(self._effort, seconds=seconds, cpu_seconds=cpu_seconds)
        self._name = save_checkpoint(
            self._store,
            Checkpoint(training=training, effort=effort),
            beside=self._name,
            position=position,
            check=lambda: refuse_stale(self._context),
        )
