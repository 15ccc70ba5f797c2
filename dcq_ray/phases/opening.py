"""Opening a run: the lock on its directory, the preparation, and what an earlier run of the directory finished."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from dcq_ray.digests import library_versions, tensors_sha256
from dcq_ray.errors import DcqError, RunInterrupted
from dcq_ray.inputs import INPUTS_FILE
from dcq_ray.jobfile import job_yaml
from dcq_ray.phases.changes import JOB_FILE, PLAN_FILE, Earlier, changes, changes_note, consequence, earlier_run
from dcq_ray.phases.committed import RESULT_FILE, finished_section, section_tasks
from dcq_ray.phases.context import Emit
from dcq_ray.phases.dump import lease_boundaries, release_boundaries
from dcq_ray.phases.gpu_trial import GPU_MEMORY_FILE
from dcq_ray.phases.kept_merge import MERGED_FILE, MERGED_TENSORS_FILE
from dcq_ray.phases.polish import POLISH_FOLDER
from dcq_ray.phases.prepare import Prepared, prepare, prepared_progress
from dcq_ray.phases.reduce import SCORES_FILE, STUDENT_FILE
from dcq_ray.phases.reporting import draft_report
from dcq_ray.phases.session import (
    BASELINES_FOLDER,
    DUMP_FILE,
    REPORT_FILE,
    RunSession,
    read_report,
    run_digest,
    write_report,
)
from dcq_ray.phases.status import STATUS_FILE, StatusFile
from dcq_ray.records import (
    PartitionPlan,
    Progress,
    RunContext,
    RunReport,
    RunStatus,
    SectionTask,
    seal_json,
)
from dcq_ray.spec import Job
from dcq_ray.storage import Store, add_use, hold_run, open_store
from dcq_ray.teacher import state_from_bytes


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
    prepared: Prepared | None = None,
) -> Iterator[RunSession]:
    """Hold a run directory, prepare its job, and find what an earlier run finished.

    Args:
        owner: who holds it, as another driver is told.
        fresh: start over: forget what an earlier run of this directory finished (the cache stays).
        reporting: False for a rival, which only adds its row to the report that is there.
        prepared: of this very job, where the caller has it already.

    Raises:
        RunBusyError: another live driver holds the directory.
    """
    started = time.monotonic()
    store = open_store(job.storage.run_dir)
    with hold_run(store, owner=owner) as epoch:
        if fresh:
            clear_run(store)
        # Before it looks for a teacher there: gc leaves teachers to runs that it knows of.
        add_use(open_store(job.storage.cache_dir), store.uri)
        report = read_report(store)
        earlier = earlier_run(store, report)
        status = StatusFile(store, job.name)

        def tell(progress: Progress) -> None:
            status.update(progress)
            emit(progress)

        try:
            if prepared is None:
                prepared = prepare(job, job_folder, device=device, emit=tell, earlier=earlier.plan)
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
            results = {index: result for index, result in found.items() if result is not None}
            changed = changes(earlier, job, prepared.plan, library_versions())
            what_follows = _what_follows(store, earlier, prepared.plan, num_kept=len(results))
            session = RunSession(
                context=context,
                prepared=prepared,
                tasks=tasks,
                results=results,
                finished_report=_finished_report(context, prepared, tasks, store),
                store=store,
                emit=tell,
                started=started,
                started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                changes_note=changes_note(changed, what_follows, report),
            )
            store.write_bytes(JOB_FILE, job_yaml(job).encode())
            store.write_bytes(PLAN_FILE, seal_json(prepared.plan))
            tell(prepared_progress(prepared))
            for number, detail in enumerate((*changed, f"so {what_follows}") if changed else ()):
                tell(Progress(phase="changed", index=number, state="done", detail=detail))
            for index in session.reused:
                tell(Progress(phase="train", index=index, state="reused", detail="trained by an earlier run"))
            if reporting and session.finished_report is None:
                lease_boundaries(context)
                write_report(session, draft_report(session, status="running"))
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
        SCORES_FILE,
        MERGED_FILE,
        MERGED_TENSORS_FILE,
        STATUS_FILE,
        INPUTS_FILE,
        GPU_MEMORY_FILE,
    ):
        if store.exists(name):
            store.delete(name)
    for folder in ("sections", BASELINES_FOLDER, POLISH_FOLDER):
        store.child(folder).delete_tree()


def _finished_report(
    context: RunContext, prepared: Prepared, tasks: Sequence[SectionTask], store: Store
) -> RunReport | None:
    report = read_report(store)
    if report is None or report.status != "succeeded" or report.student is None:
        return None
    if report.run_digest != run_digest(context, prepared, tasks) or not _is_whole(store, report.student.sha256):
        return None
    return replace(report, max_drop=context.job.reduce.max_drop)


def _is_whole(store: Store, student_sha256: str) -> bool:
    """Whether the student's file holds what the report says; a damaged one is stitched again."""
    content = store.read_bytes_or_none(STUDENT_FILE)
    if content is None:
        return False
    with contextlib.suppress(DcqError):
        return tensors_sha256(state_from_bytes(content, source=store.location(STUDENT_FILE))) == student_sha256
    return False


def _what_follows(store: Store, earlier: Earlier, plan: PartitionPlan, *, num_kept: int) -> str:
    """What the changes since the last run mean for what it left."""
    num_trained = sum(store.exists(f"sections/{name}/{RESULT_FILE}") for name in store.child("sections").list_names())
    before = set() if earlier.plan is None else {boundary.digest for boundary in earlier.plan.boundaries}
    same = sum(boundary.digest in before for boundary in plan.boundaries)
    again = max(0, num_trained - num_kept)
    return consequence(trained=num_trained, again=again, boundaries_kept=same, boundaries=len(plan.boundaries))


def _mark(store: Store, status: RunStatus) -> None:
    """Say in the report that the run ended; a report that sections failed, or of a finished run, stays."""
    with contextlib.suppress(DcqError):
        report = read_report(store)
        if report is not None and report.status == "running":
            store.write_bytes(REPORT_FILE, seal_json(replace(report, status=status)))
