"""Sections on a cluster, each in an actor of its own, longest first; one that dies is replaced and goes on where it was saved.

The driver replaces workers, rather than Ray: an actor of which Ray only says that it is unavailable may be back, may come back,
or may not, and the retries that Ray counts for it are gone before a node's death is noticed. A new actor waits for a place
on any node however long that takes, and finds the newest checkpoint by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from dcq_ray.errors import DcqError, StorageError
from dcq_ray.phases import (
    Emit,
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
from dcq_ray.remote.workers import SectionActor, shown_name

POLL_SECONDS = 0.5
# Before a worker takes the place of one that died: what kills at once kills the next one, too.
PAUSE_SECONDS = 2.0


def train_alone(
    session: RunSession, share: Share, took: Callable[[SectionResult], None], *, actor: Any = SectionActor
) -> tuple[list[SectionResult], list[SectionFailure]]:
    """Train the pending sections; those that run save themselves before an interrupted driver ends.

    Args:
        took: called with every result as it is committed.
        actor: what trains a section, where it is not trained in earnest.
    """
    results: dict[int, SectionResult] = dict(session.reused)
    failures: list[SectionFailure] = []
    tasks = {task.index: task for task in session.pending}
    queue = [tasks[section.index] for section in longest_first(session.context.plan.sections) if section.index in tasks]
    attempts = {index: Attempts(_reached(session.context, task)) for index, task in tasks.items()}
    not_before = dict.fromkeys(tasks, 0.0)
    running: dict[Any, tuple[Any, SectionTask]] = {}
    context_ref = ray.put(session.context)
    for task in queue:
        session.emit(Progress(phase="train", index=task.index, state="waiting"))

    def settle(task: SectionTask, reference: Any) -> SectionResult | SectionFailure | None:
        """The outcome of a task; None where it is to be tried again."""
        try:
            outcome: SectionResult | SectionFailure = ray.get(reference)
            return outcome
        except ray.exceptions.RayError as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
            if isinstance(cause, DcqError) and not isinstance(cause, StorageError):
                raise cause from error
            if not attempts[task.index].another(_reached(session.context, task)):
                return attempts_failure(task, cause or error, attempts[task.index])
            told = "its worker died" if cause is None else f"{type(cause).__name__}: {cause}"
            session.emit(Progress(phase="train", index=task.index, state="waiting", detail=told))
            return None

    with saved_when_interrupted(lambda: [worker for worker, _ in running.values()]):
        while queue or running:
            ready = [task for task in queue if not_before[task.index] <= time.monotonic()]
            for task in ready[: share.places - len(running)]:
                queue.remove(task)
                num_restarts = attempts[task.index].num_restarts
                name = shown_name(session.context, f"section-{task.index:02d}:try-{num_restarts + 1}")
                worker = actor.options(name=name, max_concurrency=3, **share.options).remote(context_ref)
                at_once = min(share.places, len(session.tasks))
                running[worker.train.remote(task, at_once, num_restarts)] = (worker, task)
            if not running:
                time.sleep(POLL_SECONDS)
                continue
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                worker, task = running.pop(reference)
                outcome = settle(task, reference)
                # A handle that is kept keeps the place taken, and one that is only unavailable must not go on beside another.
                ray.kill(worker)
                if outcome is None:
                    not_before[task.index] = time.monotonic() + PAUSE_SECONDS
                    queue.insert(0, task)
                elif isinstance(outcome, SectionFailure):
                    failures.append(outcome)
                    session.emit(section_failed(outcome))
                else:
                    results[task.index] = outcome
                    took(outcome)
                    session.emit(section_done(outcome))
            _poll([worker for worker, _ in running.values()], session.emit)
    return [results[index] for index in sorted(results)], failures


def _reached(context: RunContext, task: SectionTask) -> int:
    """How far the newest checkpoint of a task is, in steps."""
    # Where that cannot be told, the try counts as one in vain.
    with contextlib.suppress(StorageError):
        return max(checkpoint_positions(checkpoint_store(context, task)), default=0)
    return 0


def _poll(workers: Sequence[Any], emit: Emit) -> None:
    """Ask those workers that answer at once how far they are."""
    asked = [worker.progress.remote() for worker in workers]
    if not asked:
        return
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)
    for reference in answered:
        # A worker that just died is dealt with where its result is awaited.
        with contextlib.suppress(ray.exceptions.RayError):
            progress = ray.get(reference)
            if progress is not None:
                emit(progress)
