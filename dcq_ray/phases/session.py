"""A run as its driver sees it: the lock on the run directory, what is done, what is to do, and the report.

`run_local` and `run_remote` open a session, do what it lists, and close it with the report.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dcq_ray.digests import json_sha256, library_versions
from dcq_ray.errors import DcqError, RunInterrupted, SectionTrainingError
from dcq_ray.jobfile import job_yaml
from dcq_ray.phases.context import Emit
from dcq_ray.phases.dump import DumpedSlice, dump_missing, lease_boundaries, release_boundaries
from dcq_ray.phases.predict import makespan_lower_bound
from dcq_ray.phases.prepare import Prepared, prepare, prepared_progress
from dcq_ray.phases.reduce import STUDENT_FILE, Finished, TestScores, test_key
from dcq_ray.phases.status import StatusFile
from dcq_ray.phases.train import finished_section, section_tasks
from dcq_ray.records import (
    BaselineReport,
    Boundary,
    PartitionPlan,
    PhaseCpuSeconds,
    Progress,
    RunContext,
    RunReport,
    RunStatus,
    SectionFailure,
    SectionMeasurement,
    SectionPlan,
    SectionReport,
    SectionResult,
    SectionTask,
    StudentReport,
    TeacherReport,
    Timings,
    from_json,
    to_json,
)
from dcq_ray.spec import Job
from dcq_ray.storage import Store, hold_run, open_store

REPORT_FILE = "report.json"
PLAN_FILE = "plan.json"
JOB_FILE = "job.yaml"
DUMP_FILE = "dump.json"
BASELINE_FILE = "baseline.json"
# What a fresh start keeps: the lock's own files, whose epoch must go on rising.
LOCK_FILES = ("lease.json", "lease.lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpCost:
    """What the dump cost when it was made for this run; zero where another run had made it."""

    plan_key: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBaseline:
    """A rival, and the digest of what it was trained for."""

    key: str
    baseline: BaselineReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSession:
    """An opened run: everything a composition of phases needs, and nothing that changes."""

    context: RunContext
    prepared: Prepared
    tasks: tuple[SectionTask, ...]
    results: dict[int, SectionResult]
    """Sections that an earlier run finished."""
    finished_report: RunReport | None
    """The report of an earlier run that had nothing left to do."""
    store: Store
    emit: Emit
    started: float
    started_at: str

    @property
    def pending(self) -> tuple[SectionTask, ...]:
        """The sections still to be trained."""
        return tuple(task for task in self.tasks if task.index not in self.results)

    def dump(self, run_slices: Callable[[Sequence[Boundary]], Iterable[DumpedSlice]]) -> None:
        """Dump the boundaries on which pending sections train, where the cache lacks them, and keep what that cost."""
        indices = {index for task in self.pending for index in (task.index, task.index + 1)}
        wanted = [boundary for boundary in self.context.plan.boundaries if boundary.index in indices]
        started = time.monotonic()
        cpu_seconds = dump_missing(self.context, wanted, run_slices, self.emit)
        if cpu_seconds:
            seconds = time.monotonic() - started
            cost = DumpCost(plan_key=self.context.plan.key, seconds=seconds, cpu_seconds=cpu_seconds)
            self.store.write_bytes(DUMP_FILE, to_json(cost))

    def dump_cost(self) -> DumpCost:
        """What the dump of this plan cost."""
        content = self.store.read_bytes_or_none(DUMP_FILE)
        if content is not None:
            with contextlib.suppress(ValueError):
                found = from_json(DumpCost, content)
                if found.plan_key == self.context.plan.key:
                    return found
        return DumpCost(plan_key=self.context.plan.key, seconds=0.0, cpu_seconds=0.0)


@contextlib.contextmanager
def open_run(
    job: Job,
    job_folder: str,
    *,
    device: torch.device,
    emit: Emit,
    owner: str,
    fresh: bool = False,
    reporting: bool = True,
) -> Iterator[RunSession]:
    """Hold a run directory, prepare its job, and find what an earlier run finished.

    Args:
        owner: who holds it, as another driver is told.
        fresh: start over: forget what an earlier run of this directory finished (the cache stays).
        reporting: False for a rival, which only adds its row to the report that is there.

    Raises:
        RunBusyError: another live driver holds the directory.
    """
    started = time.monotonic()
    store = open_store(job.storage.run_dir)
    with hold_run(store, owner=owner) as epoch:
        if fresh:
            clear_run(store)
        status = StatusFile(store, job.name)

        def tell(progress: Progress) -> None:
            status.update(progress)
            emit(progress)

        try:
            prepared = prepare(job, job_folder, device=device, emit=tell, earlier=_earlier_plan(store))
            context = RunContext(
                job=job,
                job_folder=job_folder,
                run_dir=store.uri,
                cache_dir=open_store(job.storage.cache_dir).uri,
                plan=prepared.plan,
                epoch=epoch,
                device=device.type,
            )
            tasks = section_tasks(context)
            found = {task.index: finished_section(context, task) for task in tasks}
            session = RunSession(
                context=context,
                prepared=prepared,
                tasks=tasks,
                results={index: result for index, result in found.items() if result is not None},
                finished_report=_finished_report(context, prepared, tasks, store),
                store=store,
                emit=tell,
                started=started,
                started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            )
            store.write_bytes(JOB_FILE, job_yaml(job).encode())
            store.write_bytes(PLAN_FILE, to_json(prepared.plan))
            tell(prepared_progress(prepared))
            for index in session.results:
                tell(Progress(phase="train", index=index, state="reused", detail="trained by an earlier run"))
            if reporting and session.finished_report is None:
                lease_boundaries(context)
                write_report(session, _report(session, status="running"))
            yield session
            release_boundaries(context)
            status.close("succeeded")
        except (KeyboardInterrupt, RunInterrupted):
            status.close("interrupted", "run the same command again to resume")
            _mark(store, "interrupted")
            raise
        except DcqError as error:
            status.close("failed", str(error))
            _mark(store, "failed")
            raise


def clear_run(store: Store) -> None:
    """Remove what earlier runs left in a run directory, and nothing else."""
    for name in (
        REPORT_FILE,
        "report.html",
        PLAN_FILE,
        JOB_FILE,
        DUMP_FILE,
        STUDENT_FILE,
        "status.json",
        "test-scores.json",
    ):
        if store.exists(name):
            store.delete(name)
    store.child("sections").delete_tree()


def write_report(session: RunSession, report: RunReport) -> None:
    """Commit a report to the run directory."""
    session.store.write_bytes(REPORT_FILE, to_json(report))


def read_report(store: Store) -> RunReport | None:
    """The report of a run directory, or None where there is none that can be read."""
    content = store.read_bytes_or_none(REPORT_FILE)
    if content is None:
        return None
    try:
        return from_json(RunReport, content)
    except ValueError:
        return None


def report_success(
    session: RunSession,
    results: Sequence[SectionResult],
    measurements: Sequence[SectionMeasurement],
    scores: TestScores,
    finished: Finished,
    *,
    num_workers: int,
    train_seconds: float,
) -> RunReport:
    """Write and return the report of a finished run."""
    plan = session.context.plan
    quantized = [layer for layer in plan.layers if layer.bits < 32]
    num_weights = sum(layer.num_weights for layer in quantized)
    student = StudentReport(
        top1=finished.test_top1,
        sha256=finished.student_sha256,
        num_bytes_packed=finished.student_num_bytes_packed,
        bits=sum(layer.num_weights * layer.bits for layer in quantized) / num_weights if num_weights else 32.0,
    )
    cost = session.dump_cost()
    bound = (
        makespan_lower_bound([result.cpu_seconds for result in results], num_workers) + cost.cpu_seconds / num_workers
    )
    baseline = kept_baseline(session)
    timings = Timings(
        dump_seconds=cost.seconds,
        train_seconds=train_seconds,
        reduce_seconds=finished.seconds,
        total_seconds=time.monotonic() - session.started,
        makespan_lower_bound_seconds=bound,
        cpu_seconds=PhaseCpuSeconds(
            teacher=session.prepared.teacher_cpu_seconds,
            dump=cost.cpu_seconds,
            train=sum(result.cpu_seconds for result in results),
            reduce=finished.cpu_seconds,
        ),
    )
    report = replace(
        _report(session, status="succeeded", results=results, measurements=measurements),
        teacher=_teacher_report(session, scores.teacher_top1),
        student=student,
        untrained_top1=scores.untrained_top1,
        validation=finished.validation,
        timings=timings,
    )
    report = with_baseline(report, baseline)
    write_report(session, report)
    return report


def report_failure(
    session: RunSession, results: Sequence[SectionResult], failures: Sequence[SectionFailure]
) -> SectionTrainingError:
    """Write the report of a run in which sections failed, and return the error to raise, which names them all."""
    report = replace(_report(session, status="failed", results=results), failures=tuple(failures))
    write_report(session, report)
    told = "; ".join(failure.message for failure in failures)
    kept = f"; the other {len(results)} sections are kept" if results else ""
    return SectionTrainingError(
        f"{len(failures)} of {len(session.tasks)} sections failed: {told}{kept}; run the same command again to train only "
        "what is missing"
    )


def with_baseline(report: RunReport, baseline: BaselineReport | None) -> RunReport:
    """The report with a rival's row beside the run's, and the share of the gap that DCQ closed (paper, section 1).

    gap_closed = (top1_dcq - top1_dorefa) / (top1_teacher - top1_dorefa), where the teacher is the better one.
    """
    gap_closed = None
    teacher, student = report.teacher.top1, None if report.student is None else report.student.top1
    if baseline is not None and baseline.top1 is not None and teacher is not None and student is not None:
        gap = teacher - baseline.top1
        gap_closed = (student - baseline.top1) / gap if gap > 0 else None
    return replace(report, baseline=baseline, gap_closed=gap_closed)


def _report(
    session: RunSession,
    *,
    status: RunStatus,
    results: Sequence[SectionResult] = (),
    measurements: Sequence[SectionMeasurement] = (),
) -> RunReport:
    by_index = {result.index: result for result in results}
    measured = {measurement.index: measurement for measurement in measurements}
    plan, splits = session.context.plan, session.prepared.splits
    return RunReport(
        name=session.context.job.name,
        status=status,
        run_digest=_run_digest(session.context, session.prepared, session.tasks),
        teacher=_teacher_report(session, None),
        student=None,
        untrained_top1=None,
        baseline=None,
        gap_closed=None,
        sections=tuple(
            _section_report(section, by_index[section.index], measured.get(section.index))
            for section in plan.sections
            if section.index in by_index
        ),
        failures=(),
        validation=None,
        timings=Timings(
            dump_seconds=0.0,
            train_seconds=0.0,
            reduce_seconds=0.0,
            total_seconds=time.monotonic() - session.started,
            makespan_lower_bound_seconds=0.0,
            cpu_seconds=PhaseCpuSeconds(),
        ),
        notes=_notes(session),
        versions=library_versions(),
        started_at=session.started_at,
        num_test_samples=0 if splits.test is None else len(splits.test),
        max_drop=session.context.job.reduce.max_drop,
    )


def _teacher_report(session: RunSession, top1: float | None) -> TeacherReport:
    teacher = session.prepared.teacher
    return TeacherReport(model=teacher.model, top1=top1, sha256=teacher.sha256, num_bytes=teacher.num_bytes)


def _section_report(
    section: SectionPlan, result: SectionResult, measurement: SectionMeasurement | None
) -> SectionReport:
    return SectionReport(
        index=section.index,
        modules=section.modules,
        num_parameters=section.num_parameters,
        bits=section.bits,
        initial_loss=result.initial_loss,
        final_loss=result.final_loss,
        relative_error=None if measurement is None else measurement.relative_error,
        top1_alone=None if measurement is None else measurement.top1_alone,
        agreement_alone=None if measurement is None else measurement.agreement_alone,
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
        device=result.device,
        restarts=result.restarts,
        loss_curve=result.loss_curve,
        num_bytes_packed=_packed_bytes(section),
    )


def _packed_bytes(section: SectionPlan) -> int:
    quantized = [layer for layer in section.layers if layer.bits < 32]
    packed = sum(-(-layer.num_weights * layer.bits // 8) + 4 for layer in quantized)
    return packed + 4 * (section.num_parameters - sum(layer.num_weights for layer in quantized))


def _notes(session: RunSession) -> tuple[str, ...]:
    plan, splits = session.context.plan, session.prepared.splits
    notes = []
    if splits.held_out.labels is None:
        notes.append("The held-out images have no labels: agreement with the teacher stands in for accuracy.")
    if splits.test is None:
        notes.append("There is no test set: accuracy on test images is not given.")
    elif splits.test.labels is None:
        notes.append("The test images have no labels: accuracy on test images is not given.")
    if plan.unquantized_parameters:
        names = ", ".join(plan.unquantized_parameters[:5])
        notes.append(f"Not quantized, since not the weight of a Conv or Linear layer: {names}.")
    return tuple(notes)


def _run_digest(context: RunContext, prepared: Prepared, tasks: Sequence[SectionTask]) -> str:
    return json_sha256(
        {
            "tasks": [task.digest for task in tasks],
            "scores": test_key(context, prepared.splits),
            "held_out": prepared.splits.held_out.sha256,
            "reduce": context.job.reduce.model_dump(mode="json", exclude={"max_drop"}),
            "metric": context.job.data.metric,
        }
    )


def _finished_report(
    context: RunContext, prepared: Prepared, tasks: Sequence[SectionTask], store: Store
) -> RunReport | None:
    report = read_report(store)
    if report is None or report.status != "succeeded" or not store.exists(STUDENT_FILE):
        return None
    if report.run_digest != _run_digest(context, prepared, tasks):
        return None
    return replace(report, max_drop=context.job.reduce.max_drop)


def _earlier_plan(store: Store) -> PartitionPlan | None:
    content = store.read_bytes_or_none(PLAN_FILE)
    if content is None:
        return None
    try:
        return from_json(PartitionPlan, content)
    except ValueError:
        return None


def baseline_key(session: RunSession) -> str:
    """Digest of all that a rival's accuracy depends on."""
    return json_sha256(
        {
            "scores": test_key(session.context, session.prepared.splits),
            "train": session.context.job.train.model_dump(mode="json"),
            "seed": session.context.job.seed,
            "held_out": session.prepared.splits.held_out.sha256,
        }
    )


def kept_baseline(session: RunSession) -> BaselineReport | None:
    """The rival that was trained for this very job, or None."""
    content = session.store.read_bytes_or_none(BASELINE_FILE)
    if content is not None:
        with contextlib.suppress(ValueError):
            kept = from_json(KeptBaseline, content)
            if kept.key == baseline_key(session):
                return kept.baseline
    return None


def keep_baseline(session: RunSession, baseline: BaselineReport) -> RunReport | None:
    """Keep a rival beside the run, and give the run's report with its row where the run is finished."""
    session.store.write_bytes(BASELINE_FILE, to_json(KeptBaseline(key=baseline_key(session), baseline=baseline)))
    if session.finished_report is None:
        return None
    report = with_baseline(session.finished_report, baseline)
    write_report(session, report)
    return report


def _mark(store: Store, status: RunStatus) -> None:
    """Say in the report that the run ended; a report that sections failed, or of a finished run, stays."""
    with contextlib.suppress(DcqError):
        report = read_report(store)
        if report is not None and report.status == "running":
            store.write_bytes(REPORT_FILE, to_json(replace(report, status=status)))
