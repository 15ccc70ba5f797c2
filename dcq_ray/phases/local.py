"""`run_local`: the phases one after the other in this process, without Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch

from dcq_ray.errors import RunInterrupted, StaleRunError
from dcq_ray.phases.committed import section_failure
from dcq_ray.phases.context import Emit, Network, choose_device, num_at_once, open_network
from dcq_ray.phases.dump import DumpedSlice, dump_slices, num_slices
from dcq_ray.phases.opening import open_run
from dcq_ray.phases.prepare import Prepared
from dcq_ray.phases.reduce import finish, measure_sections, measure_untrained, measured_section
from dcq_ray.phases.reporting import report_failure, report_success
from dcq_ray.phases.saving import SaveRequest, StopRequest
from dcq_ray.phases.session import RunSession
from dcq_ray.phases.stream import train_stream
from dcq_ray.phases.stream_saving import restart_tick
from dcq_ray.phases.train import activation_memory_bytes, train_section
from dcq_ray.records import Boundary, Progress, RunReport, SectionFailure, SectionResult, SectionTask
from dcq_ray.spec import Job

# Each has a copy of the student, and the memory of a batch.
MAX_SCORED_AT_ONCE = 4


def run_local(
    job: Job,
    job_folder: str,
    *,
    emit: Emit,
    owner: str,
    fresh: bool = False,
    stop: StopRequest | None = None,
    prepared: Prepared | None = None,
) -> RunReport:
    """Run a job from end to end in this process; resumes what an earlier run of its run directory finished.

    Args:
        stop: a training asks it at every step whether the run is to end, and saves itself first.
        prepared: of this very job, where the caller has it already.

    Raises:
        SectionTrainingError: sections failed; the report names them, the others' results stay.
    """
    device = torch.device("cpu") if job.resources.gpus_per_section == 0 else choose_device("auto")
    with open_run(job, job_folder, device=device, emit=emit, owner=owner, fresh=fresh, prepared=prepared) as session:
        if session.finished_report is not None:
            return session.finished_report
        context, splits = session.context, session.prepared.splits
        network = open_network(context)

        def dump_all(missing: Sequence[Boundary]) -> Iterator[DumpedSlice]:
            return dump_slices(context, network, splits, range(num_slices(context)), missing)

        session.dump(dump_all)
        started = time.monotonic()
        results, failures = dict(session.reused), []
        stop = StopRequest(_never) if stop is None else stop
        with stop.training():
            outcomes = (streamed if session.streams else each_alone)(session, network, stop)
            for outcome in outcomes:
                if isinstance(outcome, SectionFailure):
                    failures.append(outcome)
                else:
                    results[outcome.index] = outcome
        train_seconds = time.monotonic() - started
        ordered = [results[index] for index in sorted(results)]
        if failures:
            raise report_failure(session, ordered, failures)
        session.remove_checkpoints()
        known = [found for result in ordered if (found := measured_section(context, result)) is not None]
        indices = {found.index for found in known}
        unknown = [result for result in ordered if result.index not in indices]
        measured = measure_sections(context, unknown, network, splits) if unknown else ()
        measurements = sorted([*known, *measured], key=lambda measurement: measurement.index)
        scores = measure_untrained(context, network, splits)
        # A polish saves itself before it ends, as a training does; all else of this phase is done again.
        with stop.training() if context.job.reduce.polish_epochs else contextlib.nullcontext():
            finished = finish(
                context,
                ordered,
                network,
                splits,
                emit=session.emit,
                request=stop,
                # This process has all cores to itself now.
                num_at_once=min(MAX_SCORED_AT_ONCE, num_at_once(job, device)),
            )
        report = report_success(
            session, ordered, measurements, scores, finished, num_workers=1, train_seconds=train_seconds
        )
        session.emit(Progress(phase="reduce", state="done"))
        return report


def _never() -> NoReturn:
    raise AssertionError("nobody asked this run to stop")


def each_alone(session: RunSession, network: Network, request: SaveRequest) -> Iterator[SectionResult | SectionFailure]:
    """Train the pending sections one by one on the teacher's activations."""
    for task in session.pending:
        yield attempt(session, task, network, request)


def streamed(session: RunSession, network: Network, request: SaveRequest) -> Iterator[SectionResult | SectionFailure]:
    """Train the pending sections in step, from where an earlier run saved them; the first that fails ends it."""
    context, tasks = session.context, session.pending
    device = choose_device(context.device)
    if not tasks:
        return
    for outcome in train_stream(
        context,
        tasks,
        network,
        session.prepared.splits,
        emit=session.emit,
        memory_bytes=activation_memory_bytes(context.job, device, num_at_once=1),
        start_tick=restart_tick(context, tasks, emit=session.emit),
        request=request,
    ):
        session.emit(section_failed(outcome) if isinstance(outcome, SectionFailure) else section_done(outcome))
        yield outcome


def attempt(
    session: RunSession, task: SectionTask, network: Network, request: SaveRequest
) -> SectionResult | SectionFailure:
    """Train a section, or say why it failed, so that one bad section never discards the others."""
    context = session.context
    device = choose_device(context.device)
    try:
        result = train_section(
            context,
            task,
            network,
            session.prepared.splits,
            emit=session.emit,
            memory_bytes=activation_memory_bytes(context.job, device, num_at_once=1),
            request=request,
        )
    except (RunInterrupted, StaleRunError):
        raise
    except Exception as error:
        failure = section_failure(task, error)
        session.emit(section_failed(failure))
        return failure
    session.emit(section_done(result))
    return result


def section_done(result: SectionResult) -> Progress:
    """The line of a section that was trained to the end."""
    return Progress(
        phase="train",
        index=result.index,
        state="done",
        done=result.num_steps,
        total=result.num_steps,
        unit="steps",
        loss=result.final_loss,
        per_second=result.num_sample_passes / result.seconds if result.seconds else None,
    )


def section_failed(failure: SectionFailure) -> Progress:
    """The line of a section that failed."""
    return Progress(phase="train", index=failure.index, state="failed", detail=failure.message)
