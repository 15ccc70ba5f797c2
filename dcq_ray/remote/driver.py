"""`run_remote`: the phases as a cluster's work, composed by the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch

from dcq_ray.errors import ClusterError
from dcq_ray.phases import (
    DumpedSlice,
    Emit,
    Finished,
    RunSession,
    TestScores,
    num_slices,
    open_run,
    report_failure,
    report_success,
)
from dcq_ray.records import (
    Boundary,
    Progress,
    RunContext,
    RunReport,
    SectionFailure,
    SectionMeasurement,
    SectionResult,
)
from dcq_ray.remote.attempts import Attempts, plain_interrupts, saved_when_interrupted
from dcq_ray.remote.autoscaling import asked_for
from dcq_ray.remote.cluster import Share, connected, larger_share, node_resources
from dcq_ray.remote.gpu_needs import Shares, card_of, gpu_needs, shares_of
from dcq_ray.remote.metrics import counted, metered
from dcq_ray.remote.nodes import check_shared
from dcq_ray.remote.sections import train_alone
from dcq_ray.remote.stream import train_streamed
from dcq_ray.remote.workers import ReducerActor, dump_task, shown_name, unwrapped
from dcq_ray.spec import Job
from dcq_ray.storage import open_store

POLL_SECONDS = 0.5
Train = Callable[[RunSession, Share, Callable[[SectionResult], None]], tuple[list[SectionResult], list[SectionFailure]]]


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
        StorageError: the run or cache directory's address names no place for files, or holds credentials.
        SectionTrainingError: sections failed; the report names them, the others' results stay.
    """
    folders = (job.storage.run_dir, job.storage.cache_dir)
    for folder in folders:
        # A wrong address is told before a Ray is started for it.
        open_store(folder)
    with (
        connected(address, environment=environment, log_to_driver=log_to_driver) as phrase,
        asked_for(job, say=say) as shared_by,
    ):
        # One place is enough to find out what there is to do.
        share = shared_by(job.sections.count or 1, 1)
        check_shared(folders)
        card = card_of(share)
        device = torch.device("cpu" if card is None else "cuda")
        say(f"running on {phrase}: {share.places} sections at once on {device.type}")
        opened = open_run(job, job_folder, device=device, emit=metered(emit, job.name), owner=owner, fresh=fresh)
        with opened as session, plain_interrupts():
            if session.finished_report is not None:
                return session.finished_report
            needs = gpu_needs(session, card, node_resources(), say=say)
            share = shared_by(len(session.tasks), len(session.pending), needs.section)
            shares = shares_of(share, session, needs, node_resources())
            if job.resources.wait_seconds:
                # Of nodes that came meanwhile.
                check_shared(folders)
            session.dump(lambda missing: counted(_dumped(session.context, missing, shares.dump), missing, job.name))
            started = time.monotonic()
            reducer = _reducer(session, shares, session.reused.values())
            results, failures = trained(session, share, reducer.take.remote, say)
            train_seconds = time.monotonic() - started
            if failures:
                raise report_failure(session, results, failures)
            session.remove_checkpoints()
            measurements, scores, finished = _reduced(session, shares, reducer, results)
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


def _dumped(context: RunContext, missing: Sequence[Boundary], share: Share) -> Iterator[DumpedSlice]:
    """Deal the slices over as many tasks as fit, and yield each slice as it is written.

    Ray begins a task anew whose worker or node died; one that Ray gives up is dealt again here. What was yielded before is not
    yielded twice, and slices whose shards are there are not written again.
    """
    total = num_slices(context)
    num_tasks = min(share.places, total)
    context_ref = ray.put(context)
    parts = [tuple(range(first, total, num_tasks)) for first in range(num_tasks)]
    attempts = [Attempts(0) for _ in parts]
    num_yielded, num_seen = [0] * num_tasks, [0] * num_tasks

    def begin(part: int) -> Any:
        name = shown_name(context, f"dump-{part + 1}-of-{num_tasks}")
        task = dump_task.options(num_returns="streaming", name=name, **share.options)
        return task.remote(context_ref, parts[part], tuple(missing))

    waiting = {part: begin(part) for part in range(num_tasks)}
    while waiting:
        ready, _ = ray.wait(list(waiting.values()), num_returns=1)
        part = next(part for part, generator in waiting.items() if generator is ready[0])
        try:
            dumped = unwrapped(next(ready[0]))
        except StopIteration:
            waiting.pop(part)
        except ray.exceptions.RayError as error:
            if not attempts[part].another(num_yielded[part]):
                raise ClusterError(
                    f"the dump: a worker that dumps {len(parts[part])} slices from {parts[part][0]} on died "
                    f"{attempts[part]}; the last time: {error}; run again to dump what is missing"
                ) from error
            num_seen[part] = 0
            waiting[part] = begin(part)
        else:
            num_seen[part] += 1
            if num_seen[part] > num_yielded[part]:
                num_yielded[part] += 1
                yield dumped


def trained(
    session: RunSession,
    share: Share,
    took: Callable[[SectionResult], None],
    say: Callable[[str], None],
    *,
    train: Train = train_alone,
) -> tuple[list[SectionResult], list[SectionFailure]]:
    """Train the pending sections; those that find their part of a card too small are tried again with more of one.

    Sections in step are not: half as many workers would each have twice as many sections.
    """
    if session.streams:
        return train_streamed(session, share, took)
    while True:
        results, failures = train(session, share, took)
        larger = larger_share(share)
        short = [failure.index for failure in failures if failure.error_type == torch.OutOfMemoryError.__name__]
        if larger is None or not short or len(short) < len(failures):
            return results, failures
        say(f"sections {short} take more than {share.num_gpus:.2g} of a card: trying them with {larger.num_gpus:.2g}")
        session, share = replace(session, results={result.index: result for result in results}), larger


def _reducer(session: RunSession, shares: Shares, results: Iterable[SectionResult], num_restarts: int = 0) -> Any:
    """A reducer that begins to measure these results."""
    name = shown_name(session.context, f"reducer:try-{num_restarts + 1}")
    return ReducerActor.options(name=name, num_cpus=0, max_concurrency=3).remote(
        session.context, shares.score, shares.stitch, tuple(results)
    )


def _reduced(
    session: RunSession, shares: Shares, reducer: Any, results: Sequence[SectionResult]
) -> tuple[Sequence[SectionMeasurement], TestScores, Finished]:
    """What the reducer finds; one that dies is replaced by another, which takes over what was measured."""
    attempts = Attempts(0)
    while True:
        try:
            return _found(session, reducer, results)
        except ray.exceptions.RayActorError as error:
            if not attempts.another(0):
                raise ClusterError(
                    f"the reducer died {attempts.num_restarts + 1} times; the last time: {error}"
                ) from error
            session.emit(Progress(phase="reduce", state="waiting", detail="the reducer died; starting another"))
            reducer = _reducer(session, shares, results, attempts.num_restarts)


def _found(
    session: RunSession, reducer: Any, results: Sequence[SectionResult]
) -> tuple[Sequence[SectionMeasurement], TestScores, Finished]:
    polishes = session.context.job.reduce.polish_epochs > 0
    reference = reducer.reduce.remote(results)
    with saved_when_interrupted(lambda: [reducer] if polishes else []):
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            done, line = unwrapped(reducer.num_measured.remote()), unwrapped(reducer.progress.remote())
            if done < len(results) or line is None:
                detail = "measuring sections alone" if done < len(results) else "stitching and validating"
                line = Progress(phase="reduce", done=done, total=len(results) + 1, unit="steps", detail=detail)
            session.emit(line)
    measurements, scores, finished = unwrapped(reference)
    return sorted(measurements, key=lambda measurement: measurement.index), scores, finished
