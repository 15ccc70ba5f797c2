"""`run_remote`: the phases as a cluster's work, composed by the driver."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch

from dcq_ray.phases import (
    DumpedSlice,
    Emit,
    Finished,
    RunSession,
    TestScores,
    longest_first,
    num_slices,
    open_run,
    report_failure,
    report_success,
    section_done,
)
from dcq_ray.records import (
    Boundary,
    Progress,
    RunContext,
    RunReport,
    SectionFailure,
    SectionMeasurement,
    SectionResult,
    SectionTask,
)
from dcq_ray.remote.cluster import Share, connected, node_resources, section_share
from dcq_ray.remote.stream import train_streamed
from dcq_ray.remote.workers import ReducerActor, SectionActor, cuda_task, dump_task, unwrapped
from dcq_ray.spec import Job

POLL_SECONDS = 0.5
MAX_RESTARTS = 2


def run_remote(
    job: Job,
    job_folder: str,
    *,
    address: str,
    environment: Mapping[str, str],
    emit: Emit,
    say: Callable[[str], None],
    owner: str,
    fresh: bool = False,
    log_to_driver: bool = False,
) -> RunReport:
    """Run a job from end to end on Ray; the same phases as `run_local`, and on CPUs the same student.

    Raises:
        ClusterError: no such cluster, or none of its nodes has what a section asks for.
        SectionTrainingError: sections failed; the report names them, the others' results stay.
    """
    with connected(address, environment=environment, log_to_driver=log_to_driver) as phrase:
        share = section_share(job, job.sections.count or 1, node_resources())
        device = _cluster_device(share)
        say(f"running on {phrase}: {share.places} sections at once on {device.type}")
        with open_run(job, job_folder, device=device, emit=emit, owner=owner, fresh=fresh) as session:
            if session.finished_report is not None:
                return session.finished_report
            share = section_share(job, len(session.tasks), node_resources())
            session.dump(lambda missing: _dumped(session.context, missing, share))
            started = time.monotonic()
            reducer = ReducerActor.options(num_cpus=0, max_concurrency=2).remote(session.context, share)
            for result in session.reused.values():
                reducer.take.remote(result)
            if session.streams:
                results, failures = train_streamed(session, share, reducer.take.remote)
            else:
                results, failures = _train_all(session, share, reducer)
            train_seconds = time.monotonic() - started
            if failures:
                raise report_failure(session, results, failures)
            measurements, scores, finished = _reduced(session, reducer, results)
            report = report_success(
                session,
                results,
                measurements,
                scores,
                finished,
                num_workers=share.places,
                train_seconds=train_seconds,
            )
            session.emit(Progress(phase="reduce", state="done"))
            return report


def _cluster_device(share: Share) -> torch.device:
    """cuda where a worker that holds a GPU can use it; Ray also schedules GPUs that are only declared."""
    if not share.num_gpus:
        return torch.device("cpu")
    return torch.device("cuda" if ray.get(cuda_task.options(**share.options).remote()) else "cpu")


def _dumped(context: RunContext, missing: Sequence[Boundary], share: Share) -> Iterator[DumpedSlice]:
    """Deal the slices over as many tasks as fit, and yield each slice as it is written."""
    total = num_slices(context)
    num_tasks = min(share.places, total)
    task = dump_task.options(num_returns="streaming", **share.options)
    context_ref = ray.put(context)
    waiting = [
        task.remote(context_ref, tuple(range(first, total, num_tasks)), tuple(missing)) for first in range(num_tasks)
    ]
    while waiting:
        ready, _ = ray.wait(waiting, num_returns=1)
        try:
            yield unwrapped(next(ready[0]))
        except StopIteration:
            waiting.remove(ready[0])


def _train_all(session: RunSession, share: Share, reducer: Any) -> tuple[list[SectionResult], list[SectionFailure]]:
    """Train the pending sections, each in its own actor, longest first; a worker that dies is replaced twice."""
    results, failures = dict(session.reused), []
    tasks = {task.index: task for task in session.pending}
    queue = [tasks[section.index] for section in longest_first(session.context.plan.sections) if section.index in tasks]
    restarts = dict.fromkeys(tasks, 0)
    running: dict[Any, tuple[Any, SectionTask]] = {}
    context_ref = ray.put(session.context)
    actor = SectionActor.options(max_concurrency=2, **share.options)
    for task in queue:
        session.emit(Progress(phase="train", index=task.index, state="waiting"))
    while queue or running:
        while queue and len(running) < share.places:
            task = queue.pop(0)
            worker = actor.remote(context_ref)
            reference = worker.train.remote(task, min(share.places, len(session.tasks)), restarts[task.index])
            running[reference] = (worker, task)
        done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            worker, task = running.pop(reference)
            try:
                outcome = unwrapped(reference)
            except ray.exceptions.RayActorError as error:
                restarts[task.index] += 1
                if restarts[task.index] <= MAX_RESTARTS:
                    session.emit(Progress(phase="train", index=task.index, state="waiting", detail="its worker died"))
                    queue.insert(0, task)
                    continue
                outcome = SectionFailure(
                    index=task.index,
                    error_type=type(error).__name__,
                    message=f"section {task.index}: its worker died {restarts[task.index]} times; the last time: {error}",
                    traceback="",
                )
            # A handle that is kept keeps the place taken.
            ray.kill(worker)
            if isinstance(outcome, SectionFailure):
                failures.append(outcome)
                session.emit(Progress(phase="train", index=task.index, state="failed", detail=outcome.message))
            else:
                results[task.index] = outcome
                reducer.take.remote(outcome)
                session.emit(section_done(outcome))
        _poll([worker for worker, _ in running.values()], session.emit)
    return [results[index] for index in sorted(results)], failures


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


def _reduced(
    session: RunSession, reducer: Any, results: Sequence[SectionResult]
) -> tuple[Sequence[SectionMeasurement], TestScores, Finished]:
    total = len(results) + 1
    reference = reducer.reduce.remote(results)
    while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
        done = unwrapped(reducer.num_measured.remote())
        detail = "measuring sections alone" if done < len(results) else "stitching and validating"
        session.emit(Progress(phase="reduce", done=done, total=total, unit="steps", detail=detail))
    measurements, scores, finished = unwrapped(reference)
    return sorted(measurements, key=lambda measurement: measurement.index), scores, finished
