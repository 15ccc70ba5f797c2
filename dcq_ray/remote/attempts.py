"""When workers die: how often their work is begun anew, and what is saved before a run ends by a signal."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from dcq_ray.errors import RunInterrupted
from dcq_ray.records import SectionFailure, SectionTask

# So many workers in a row may die on the same work without a checkpoint more than the one before.
MAX_DEATHS = 5
# Whoever stops a run kills it after a while; Kubernetes grants 30 s, and 10 are promised.
SAVE_SECONDS = 7.0
SECONDS_BETWEEN_LOOKS = 0.1


class Attempts:
    """How often a piece of work was begun anew, and whether it is once more.

    A worker that came further than the one before did not die of its work: only deaths in a row at the same place count.
    """

    def __init__(self, position: int) -> None:
        """`position`: how far the work is sure to have come, in steps or ticks."""
        self.num_restarts = 0
        self._position, self._num_in_a_row = position, 0

    def another(self, position: int) -> bool:
        """Whether the work is begun once more after a death, now that it is sure to have come so far."""
        self._num_in_a_row = self._num_in_a_row + 1 if position <= self._position else 1
        self._position = max(position, self._position)
        if self._num_in_a_row >= MAX_DEATHS:
            return False
        self.num_restarts += 1
        return True

    def __str__(self) -> str:
        return f"{self._num_in_a_row} times in a row without getting further than step {self._position}"


def attempts_failure(task: SectionTask, error: BaseException, attempts: Attempts) -> SectionFailure:
    """What the report says of a section whose workers died too often; call it while the last error is handled."""
    return SectionFailure(
        index=task.index,
        error_type=type(error).__name__,
        message=f"section {task.index}: its worker died or failed {attempts}; the last time: {error}",
        traceback=traceback.format_exc(),
    )


@contextlib.contextmanager
def plain_interrupts() -> Iterator[None]:
    """Raise what a signal's handler raised, where Ray's compiled calls make a SystemError of it."""
    try:
        yield
    except SystemError as error:
        for raised in (error.__cause__, error.__context__):
            if isinstance(raised, KeyboardInterrupt | RunInterrupted):
                raise raised from None
        raise


@contextlib.contextmanager
def saved_when_interrupted(
    workers: Callable[[], Sequence[Any]], saved: Callable[[], int] | None = None
) -> Iterator[None]:
    """Have workers save what they train where the block is ended by a signal, and wait a few seconds for that.

    Args:
        workers: those that train by then.
        saved: how far the newest checkpoint is, where more workers than those that are asked take part in one.
    """
    try:
        with plain_interrupts():
            yield
    except (KeyboardInterrupt, RunInterrupted):
        # A worker that is dead, or has not yet begun, has nothing to save.
        with contextlib.suppress(ray.exceptions.RayError):
            deadline = time.monotonic() + SAVE_SECONDS
            before = 0 if saved is None else saved()
            asked = [worker.save.remote(SAVE_SECONDS) for worker in workers()]
            if asked:
                ray.wait(asked, num_returns=len(asked), timeout=SAVE_SECONDS)
            while saved is not None and saved() == before and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        raise
