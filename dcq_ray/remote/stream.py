"""Streamed sections on a cluster: one actor for each run of neighbouring sections, activations handed on tick by tick.

An actor sends the output of its last section straight to the next actor, at most a few ticks ahead of what that one has taken,
so the object store holds a handful of batches however long the training is. With the activations travels the word to save, so
that all sections have checkpoints of the same ticks. When a worker dies, all are started again at the newest tick that all have.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch

from dcq_ray.callables import importable_from
from dcq_ray.partition import balanced_cuts
from dcq_ray.phases import (
    Emit,
    RunSession,
    SaveRequest,
    Streamed,
    needs_images,
    open_network,
    open_splits,
    restart_tick,
    saved_tick,
    section_done,
    section_failed,
    train_stream,
)
from dcq_ray.records import Progress, RunContext, SectionFailure, SectionResult, SectionTask
from dcq_ray.remote.attempts import Attempts, attempts_failure, saved_when_interrupted
from dcq_ray.remote.cluster import Share
from dcq_ray.remote.gpu_memory import activation_bytes, cap_gpu_memory
from dcq_ray.remote.workers import out_of_memory, shown_name, unwrapped

# So many ticks a section may be ahead of its successor.
MAX_TICKS_AHEAD = 4
POLL_SECONDS = 0.5


class StreamWorker:
    """Trains neighbouring sections in step, on what the worker before it feeds."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._lines: dict[int, Progress] = {}
        self._fed: dict[int, tuple[np.ndarray, bool]] = {}
        self._request = SaveRequest()
        self._outcomes: list[SectionResult | SectionFailure] = []
        self._changed = threading.Condition()

    def train(
        self,
        tasks: Sequence[SectionTask],
        stream: Sequence[SectionTask],
        follower: Any,
        num_at_once: int,
        restarts: int,
        start_tick: int,
    ) -> None:
        """Train the tasks, of those of the stream, to the end; what they gave is had from `news` as it is committed."""
        context = self._context
        cap_gpu_memory()
        importable_from(context.job_folder)
        reads_images = any(needs_images(context, task.index) for task in tasks)
        try:
            for outcome in train_stream(
                context,
                tasks,
                open_network(context),
                open_splits(context) if reads_images else None,
                emit=self._take_line,
                memory_bytes=activation_bytes(context, [task.index for task in tasks], num_at_once=num_at_once),
                receive=self._receive if tasks[0].index else None,
                send=None if follower is None else _sender(follower),
                stream=stream,
                restarts=restarts,
                start_tick=start_tick,
                request=self._request,
            ):
                with self._changed:
                    self._outcomes.append(outcome)
                    # Its outcome is its last line.
                    self._lines.pop(outcome.index, None)
        except torch.OutOfMemoryError as error:
            # Which of its sections it was does not matter: together they are too large.
            with self._changed:
                self._outcomes.append(out_of_memory(tasks[0], error))

    def save(self, timeout_seconds: float) -> bool:
        """Have all sections of the stream saved, if this is the first worker; whether its own are by then."""
        self._request.make()
        return self._request.wait(timeout_seconds)

    def feed(self, tick: int, activations: np.ndarray, save: bool) -> None:
        """Take the input of a tick, and whether to save after it; returns when there is room for another."""
        with self._changed:
            self._fed[tick] = activations, save
            self._changed.notify_all()
            # Its own tick may be the one that is waited for, so it is kept first, and only then is room waited for.
            self._changed.wait_for(lambda: len(self._fed) <= MAX_TICKS_AHEAD)

    def news(self) -> tuple[list[Progress], list[SectionResult | SectionFailure]]:
        """The latest line of every section, and what was committed or failed since the last call."""
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
        return list(self._lines.values()), outcomes

    def _receive(self, tick: int) -> Streamed:
        with self._changed:
            self._changed.wait_for(lambda: tick in self._fed)
            activations, save = self._fed.pop(tick)
            self._changed.notify_all()
        # A copy: what came out of the object store cannot be written to.
        return Streamed(activations=torch.from_numpy(activations.copy()), save=save)

    def _take_line(self, progress: Progress) -> None:
        assert progress.index is not None
        self._lines[progress.index] = progress


def train_streamed(
    session: RunSession, share: Share, took: Callable[[SectionResult], None]
) -> tuple[list[SectionResult], list[SectionFailure]]:
    """Train the pending sections in step on as many workers as there are places.

    Args:
        took: called with every result as it is committed.
    """
    results: dict[int, SectionResult] = dict(session.reused)
    context, tasks = session.context, session.pending
    attempts = Attempts(saved_tick(context, tasks))
    while True:
        start_tick = restart_tick(context, tasks, emit=session.emit)
        try:
            failures = _train_once(session, share, results, took, attempts.num_restarts, start_tick)
        except ray.exceptions.RayActorError as error:
            if attempts.another(saved_tick(context, tasks)):
                for task in tasks:
                    session.emit(
                        Progress(
                            phase="train", index=task.index, state="waiting", detail="a worker died; starting again"
                        )
                    )
                continue
            failures = [attempts_failure(task, error, attempts) for task in tasks if task.index not in results]
        break
    return [results[index] for index in sorted(results)], failures


def _train_once(
    session: RunSession,
    share: Share,
    results: dict[int, SectionResult],
    took: Callable[[SectionResult], None],
    restarts: int,
    start_tick: int,
) -> list[SectionFailure]:
    groups = _groups(session, share.places)
    if not groups:
        return []
    context_ref = ray.put(session.context)
    failures: list[SectionFailure] = []
    names = [
        shown_name(session.context, f"sections-{group[0].index:02d}-to-{group[-1].index:02d}:try-{restarts + 1}")
        for group in groups
    ]
    stream = session.pending

    def saved() -> int:
        return saved_tick(session.context, stream)

    # The first worker has all save.
    with _workers(share, context_ref, names) as workers, saved_when_interrupted(lambda: workers[:1], saved):
        running = {
            worker.train.remote(group, stream, follower, len(groups), restarts, start_tick): worker
            for worker, group, follower in zip(workers, groups, [*workers[1:], None], strict=True)
        }
        while running and not failures:
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for outcome in _tell(workers, session.emit):
                if isinstance(outcome, SectionFailure):
                    failures.append(outcome)
                    session.emit(section_failed(outcome))
                else:
                    results[outcome.index] = outcome
                    took(outcome)
                    session.emit(section_done(outcome))
            for reference in done:
                running.pop(reference)
                unwrapped(reference)
        for outcome in _tell(workers, session.emit):
            if isinstance(outcome, SectionResult):
                results[outcome.index] = outcome
                took(outcome)
                session.emit(section_done(outcome))
    return failures


def _groups(session: RunSession, places: int) -> list[tuple[SectionTask, ...]]:
    """The pending sections in runs of neighbours, the slowest run as fast as possible."""
    tasks = session.pending
    sections = session.context.plan.sections
    costs = [sections[task.index].step_seconds for task in tasks]
    if not tasks:
        return []
    ends = [
        *(piece + 1 for piece in balanced_cuts(costs, min(places, len(tasks)))),
        len(tasks),
    ]
    return [tuple(tasks[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@contextlib.contextmanager
def _workers(share: Share, context_ref: Any, names: Sequence[str]) -> Iterator[list[Any]]:
    options = {"max_concurrency": 2 * MAX_TICKS_AHEAD + 2, **share.options}
    workers = [StreamActor.options(name=name, **options).remote(context_ref) for name in names]
    try:
        yield workers
    finally:
        for worker in workers:
            # A handle that is kept keeps the place taken.
            ray.kill(worker)


def _tell(workers: Sequence[Any], emit: Emit) -> list[SectionResult | SectionFailure]:
    """Pass on how far the workers are, and give what they committed."""
    outcomes: list[SectionResult | SectionFailure] = []
    for reference in [worker.news.remote() for worker in workers]:
        # A worker that just died is dealt with where its result is awaited.
        with contextlib.suppress(ray.exceptions.RayError):
            lines, found = ray.get(reference)
            for line in lines:
                emit(line)
            outcomes.extend(found)
    return outcomes


def _sender(follower: Any) -> Callable[[int, Streamed], None]:
    """What feeds the following worker, and waits where it is too far ahead."""
    sent: list[Any] = []

    def send(tick: int, output: Streamed) -> None:
        sent.append(follower.feed.remote(tick, output.activations.cpu().numpy(), output.save))
        if len(sent) > MAX_TICKS_AHEAD:
            ray.get(sent.pop(0))

    return send


StreamActor = ray.remote(StreamWorker)
