"""Sections on a cluster, longest first, over workers that each train one after another; one that dies is replaced, and its section
goes on where it was saved.

The driver replaces workers, rather than Ray: an actor of which Ray only says that it is unavailable may be back, may come back,
or may not, and the retries that Ray counts for it are gone before a node's death is noticed. A new actor waits for a place
on any node however long that takes, while the others train what waits; whoever gets the section finds its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray

from dcq_ray.errors import DcqError, StorageError
from dcq_ray.phases import (
    RunSession,
    checkpoint_positions,
    checkpoint_store,
    longest_first,
    section_done,
    section_failed,
)
from dcq_ray.records import Progress, RunContext, SectionFailure, SectionResult, SectionTask
from dcq_ray.remote.attempts import Attempts, attempts_failure, saved_when_interrupted
from dcq_ray.remote.cluster import Share
from dcq_ray.remote.pool import Place, Pool
from dcq_ray.remote.workers import SectionActor, shown_name

POLL_SECONDS = 0.5
# Before a section is tried again whose worker died: what kills at once kills the next one, too.
PAUSE_SECONDS = 2.0


def train_alone(
    session: RunSession, share: Share, took: Callable[[SectionResult], None], *, actor: Any = SectionActor
) -> tuple[list[SectionResult], list[SectionFailure]]:
    """Train the pending sections; those that run save themselves before an interrupted driver ends.

    Args:
        took: called with every result as it is committed.
        actor: what trains sections, where they are not trained in earnest.

    Raises:
        ClusterError: no worker could be started any more.
    """
    context = session.context
    results: dict[int, SectionResult] = dict(session.reused)
    failures: list[SectionFailure] = []
    tasks = {task.index: task for task in session.pending}
    queue = [tasks[section.index] for section in longest_first(context.plan.sections) if section.index in tasks]
    attempts = {index: Attempts(0) for index in tasks}
    not_before = dict.fromkeys(tasks, 0.0)
    num_places, at_once = min(share.places, len(tasks)), min(share.places, len(session.tasks))
    context_ref = ray.put(context)
    for task in queue:
        session.emit(Progress(phase="train", index=task.index, state="waiting"))

    def start(place: int, start: int) -> Any:
        name = shown_name(context, f"worker-{place}:try-{start}")
        return actor.options(name=name, max_concurrency=3, **share.options).remote(context_ref)

    def deal(pool: Pool) -> None:
        """Give the tasks that may be tried now to the workers that have none."""
        ready = [task for task in queue if not_before[task.index] <= time.monotonic()]
        for place, task in zip(pool.idle, ready, strict=False):
            queue.remove(task)
            num_restarts = attempts[task.index].num_restarts
            name = shown_name(context, f"section-{task.index:02d}:try-{num_restarts + 1}")
            pool.give(place, task, place.worker.train.options(name=name).remote(task, at_once, num_restarts))
        pool.fit(len(queue))

    def settle(pool: Pool, place: Place, task: SectionTask, reference: Any) -> SectionResult | SectionFailure | None:
        """The outcome of a task; None where it is to be tried again."""
        try:
            outcome: SectionResult | SectionFailure = ray.get(reference)
            return outcome
        except ray.exceptions.RayError as error:
            # Also one that only failed: what is wrong may be of its process.
            pool.lose(place)
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
            if isinstance(cause, DcqError) and not isinstance(cause, StorageError):
                raise cause from error
            if not attempts[task.index].another(_reached(context, task)):
                return attempts_failure(task, cause or error, attempts[task.index])
            told = "its worker died" if cause is None else f"{type(cause).__name__}: {cause}"
            session.emit(Progress(phase="train", index=task.index, state="waiting", detail=told))
            not_before[task.index] = time.monotonic() + PAUSE_SECONDS
            queue.insert(0, task)
            return None

    with Pool(start, num_places) as pool, saved_when_interrupted(lambda: pool.busy):
        deal(pool)
        while queue or pool.busy:
            outcomes = [settle(pool, *arrival) for arrival in pool.arrived(POLL_SECONDS)]
            # What is told of them does not keep the workers waiting.
            deal(pool)
            for outcome in outcomes:
                if isinstance(outcome, SectionFailure):
                    failures.append(outcome)
                    session.emit(section_failed(outcome))
                elif outcome is not None:
                    results[outcome.index] = outcome
                    took(outcome)
                    session.emit(section_done(outcome))
            for line in pool.news():
                session.emit(line)
    return [results[index] for index in sorted(results)], failures


def _reached(context: RunContext, task: SectionTask) -> int:
    """How far the newest checkpoint of a task is, in steps."""
    # Where that cannot be told, the try counts as one in vain.
    with contextlib.suppress(StorageError):
        return max(checkpoint_positions(checkpoint_store(context, task)), default=0)
    return 0
