"""What a driver reports of its run: success with all figures, or the sections that failed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from dcq_ray.data import Splits
from dcq_ray.digests import library_versions
from dcq_ray.errors import SectionTrainingError
from dcq_ray.phases.predict import recomputed_passes, run_lower_bound
from dcq_ray.phases.reduce import Finished, TestScores
from dcq_ray.phases.session import RunSession, kept_baselines, run_digest, with_baselines, write_report
from dcq_ray.phases.views import recomputes
from dcq_ray.records import (
    PartitionPlan,
    PhaseCpuSeconds,
    RunReport,
    RunStatus,
    SectionFailure,
    SectionMeasurement,
    SectionPlan,
    SectionReport,
    SectionResult,
    StudentReport,
    TeacherReport,
    Timings,
)
from dcq_ray.spec import Job

MAX_NAMED = 4


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
    section_cpu_seconds = [result.cpu_seconds for result in results]
    measuring_cpu_seconds = scores.cpu_seconds + sum(measurement.cpu_seconds for measurement in measurements)
    timings = Timings(
        dump_seconds=cost.seconds,
        train_seconds=train_seconds,
        reduce_seconds=finished.seconds,
        total_seconds=time.monotonic() - session.started,
        makespan_lower_bound_seconds=run_lower_bound(
            dump=cost.cpu_seconds,
            sections=section_cpu_seconds,
            measuring=measuring_cpu_seconds,
            finish=finished.cpu_seconds,
            num_workers=num_workers,
        ),
        cpu_seconds=PhaseCpuSeconds(
            teacher=session.prepared.teacher_cpu_seconds,
            dump=cost.cpu_seconds,
            train=sum(section_cpu_seconds),
            reduce=finished.cpu_seconds + measuring_cpu_seconds,
        ),
    )
    report = replace(
        draft_report(session, status="succeeded", results=results, measurements=measurements),
        teacher=_teacher_report(session, scores.teacher_top1),
        student=student,
        untrained_top1=scores.untrained_top1,
        validation=finished.validation,
        diagnosis=finished.diagnosis,
        merge_steps=finished.merge_steps,
        timings=timings,
    )
    report = with_baselines(report, kept_baselines(session))
    write_report(session, report)
    return report


def report_failure(
    session: RunSession, results: Sequence[SectionResult], failures: Sequence[SectionFailure]
) -> SectionTrainingError:
    """Write the report of a run in which sections failed, and return the error to raise, which names them all."""
    report = replace(draft_report(session, status="failed", results=results), failures=tuple(failures))
    write_report(session, report)
    told = "; ".join(failure.message for failure in failures)
    kept = f"; the other {len(results)} sections are kept" if results else ""
    return SectionTrainingError(
        f"{len(failures)} of {len(session.tasks)} sections failed: {told}{kept}; run the same command again to train only "
        "what is missing"
    )


def draft_report(
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
        run_digest=run_digest(session.context, session.prepared, session.tasks),
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
        layers=plan.layers,
        multiply_accumulates_by_bits=plan.multiply_accumulates_by_bits,
        unquantized_share=plan.unquantized_share,
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
        num_skipped_images=len(_skipped(splits)),
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
        input_wait_seconds=result.input_wait_seconds,
        read_seconds=result.read_seconds,
        start_seconds=result.start_seconds,
        kept_start=result.kept_start,
    )


def _packed_bytes(section: SectionPlan) -> int:
    quantized = [layer for layer in section.layers if layer.bits < 32]
    packed = sum(layer.num_bytes for layer in quantized)
    return packed + 4 * (section.num_parameters - sum(layer.num_weights for layer in quantized))


def _notes(session: RunSession) -> tuple[str, ...]:
    plan, splits = session.context.plan, session.prepared.splits
    notes = [] if session.changes_note is None else [session.changes_note]
    skipped = _skipped(splits)
    if skipped:
        notes.append(f"Left out, since they cannot be used: {len(skipped)} images; the first: {skipped[0]}.")
    if splits.held_out.labels is None:
        notes.append("The held-out images have no labels: agreement with the teacher stands in for accuracy.")
    if splits.test is None:
        notes.append("There is no test set: accuracy on test images is not given.")
    elif splits.test.labels is None:
        notes.append("The test images have no labels: accuracy on test images is not given.")
    return (*notes, *plan_notes(plan, session.context.job))


def _skipped(splits: Splits) -> list[str]:
    """What is wrong with each image that was left out."""
    parts = (part for part in (splits.train, splits.held_out, splits.test) if part is not None)
    return [f"{part.name}: {reason}" for part in parts for reason in part.skipped]


def plan_notes(plan: PartitionPlan, job: Job) -> tuple[str, ...]:
    """What a plan leaves in full precision although the job asks for bits, and what it recomputes, in sentences."""
    notes = []
    if recomputes(job):
        notes.append(
            "Activations are recomputed, none are stored: for every image of an epoch all sections together run "
            f"{recomputed_passes(plan, job):.1f} passes of the teacher, by multiply-accumulates; a dump would take one for "
            "each view of the images."
        )
    if plan.unquantized_parameters:
        notes.append(
            f"Not quantized, since not the weight of a Conv or Linear layer: {_some(plan.unquantized_parameters)}: "
            f"{plan.num_unquantized:,} numbers, {100 * plan.unquantized_share:.1f} % of the parameters."
        )
    if plan.unused_parameters:
        notes.append(
            f"Left as they are, since the network does not use them in eval mode: {_some(plan.unused_parameters)}."
        )
    if job.quantize.activations is not None and plan.uncalled_layers:
        notes.append(
            "Inputs not quantized, since the network uses the weight without calling the layer: "
            f"{_some(plan.uncalled_layers)}."
        )
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    if len(names) <= MAX_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"
