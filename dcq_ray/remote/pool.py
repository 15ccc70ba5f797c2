"""A pool of workers on a cluster's places: each lives over many tasks, and is replaced only where it was lost.

A worker gets its first task once it has answered, so none waits for a place that its node took with it. A place whose workers
die again and again before they answer is given up; the others go on without it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import ray

from dcq_ray.errors import ClusterError
from dcq_ray.records import Progress, SectionTask
from dcq_ray.remote.attempts import Attempts

# Before a worker takes the place of one that died as it started: what kills at once kills the next one, too.
PAUSE_SECONDS = 2.0
# A worker is asked how far it is no more often than this.
SECONDS_BETWEEN_QUESTIONS = 0.5


@dataclass(slots=True, eq=False)
class Place:
    """Where a worker lives: itself, and what is awaited of it."""

    number: int
    """From 1 on."""
    worker: Any = None
    awaited: Any = None
    """The reference of its first answer, and then of what its task gives; None while it has nothing to do."""
    task: SectionTask | None = None
    asked: Any = None
    """The reference of an answer that says how far it is."""
    asked_at: float = float("-inf")
    num_started: int = 0
    starts: Attempts = field(default_factory=lambda: Attempts(0))
    not_before: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether its worker is there and has no task."""
        return self.worker is not None and self.awaited is None


class Pool:
    """As many workers as there are places, or tasks that wait for one."""

    def __init__(self, start: Callable[[int, int], Any], num_places: int) -> None:
        """`start`: makes an actor, for the place of a number, and for the how-manieth time there, both from 1 on."""
        self._start = start
        self._places = [Place(number=number) for number in range(1, num_places + 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places:
            self.lose(place)

    @property
    def busy(self) -> list[Any]:
        """The workers that have a task."""
        return [place.worker for place in self._places if place.task is not None]

    @property
    def idle(self) -> list[Place]:
        """The places whose workers are there and have no task."""
        return [place for place in self._places if place.is_idle]

    def give(self, place: Place, task: SectionTask, reference: Any) -> None:
        """Note what an idle place's worker does now, and by which reference its outcome is had."""
        place.task, place.awaited = task, reference

    def fit(self, num_waiting: int) -> None:
        """Have one free worker for each of so many tasks, as far as there are places; surplus ones end at once."""
        free = [place for place in self._places if place.worker is not None and place.task is None]
        # Those that are there are of more use than those that start.
        free.sort(key=lambda place: not place.is_idle)
        for place in free[num_waiting:]:
            self.lose(place)
        empty = [place for place in self._places if place.worker is None and place.not_before <= time.monotonic()]
        for place in empty[: max(0, num_waiting - len(free))]:
            place.num_started += 1
            place.worker = self._start(place.number, place.num_started)
            place.awaited = place.worker.progress.remote()

    def arrived(self, timeout_seconds: float) -> list[tuple[Place, SectionTask, Any]]:
        """Wait for outcomes, and free the workers that have them; each with its place, its task, and the reference that has it.

        Raises:
            ClusterError: no place is left at which a worker starts.
        """
        awaited = {place.awaited: place for place in self._places if place.awaited is not None}
        if not awaited:
            time.sleep(timeout_seconds)
            return []
        if not ray.wait(list(awaited), num_returns=1, timeout=timeout_seconds)[0]:
            return []
        found: list[tuple[Place, SectionTask, Any]] = []
        for reference in ray.wait(list(awaited), num_returns=len(awaited), timeout=0)[0]:
            place = awaited[reference]
            task, place.task, place.awaited = place.task, None, None
            if task is not None:
                found.append((place, task, reference))
            else:
                self._started(place, reference)
        return found

    def lose(self, place: Place) -> None:
        """End a worker, dead or not; another one takes its place where tasks wait."""
        if place.worker is not None:
            # A handle that is kept keeps the place taken, and one that is only unavailable must not go on beside another.
            ray.kill(place.worker)
        place.worker = place.awaited = place.task = place.asked = None

    def news(self) -> Iterator[Progress]:
        """How far those workers are that have answered; they are asked again. Never waits for one."""
        asked = {place.asked: place for place in self._places if place.asked is not None}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else []
        for reference in answered:
            place = asked[reference]
            place.asked = None
            # A worker that just died is dealt with where its outcome is awaited.
            with contextlib.suppress(ray.exceptions.RayError):
                line: Progress | None = ray.get(reference)
                # It may be of what the worker did before.
                if line is not None and place.task is not None and line.index == place.task.index:
                    yield line
        now = time.monotonic()
        for place in self._places:
            if place.task is not None and place.asked is None and now >= place.asked_at + SECONDS_BETWEEN_QUESTIONS:
                place.asked, place.asked_at = place.worker.progress.remote(), now

    def _started(self, place: Place, reference: Any) -> None:
        try:
            ray.get(reference)
            place.starts = Attempts(0)
        except ray.exceptions.RayError as error:
            self.lose(place)
            place.not_before = time.monotonic() + PAUSE_SECONDS
            if place.starts.another(0):
                return
            self._places.remove(place)
            if not self._places:
                raise ClusterError(
                    f"no worker starts: at the last of the places it died {place.starts.num_restarts + 1} times in a row before "
                    f"it answered; the last time: {error}; see Ray's logs on the nodes, then run again to go on"
                ) from error
