"""A run as its driver sees it: what is opened, what is done, what is to do, and what is kept beside the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dcq_ray.digests import json_sha256
from dcq_ray.phases.context import Emit
from dcq_ray.phases.dump import DumpedSlice, dump_missing
from dcq_ray.phases.prepare import Prepared
from dcq_ray.phases.reduce import test_key
from dcq_ray.phases.train import section_boundaries
from dcq_ray.phases.views import all_boundaries
from dcq_ray.records import (
    BaselineReport,
    Boundary,
    RunContext,
    RunReport,
    SectionResult,
    SectionTask,
    from_json,
    to_json,
)
from dcq_ray.storage import Store

REPORT_FILE = "report.json"
DUMP_FILE = "dump.json"
BASELINE_FILE = "baseline.json"


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
        """The sections still to be trained.

        Streamed inputs come from the training of the sections before, so those are trained again with any after them; they
        give what they gave.
        """
        absent = [task for task in self.tasks if task.index not in self.results]
        if self.streams and absent:
            return self.tasks[: absent[-1].index + 1]
        return tuple(absent)

    @property
    def reused(self) -> dict[int, SectionResult]:
        """The results of an earlier run that this one takes over."""
        again = {task.index for task in self.pending}
        return {index: result for index, result in self.results.items() if index not in again}

    @property
    def streams(self) -> bool:
        """Whether sections train on what the sections before them give."""
        return self.context.job.train.inputs == "student"

    def dump(self, run_slices: Callable[[Sequence[Boundary]], Iterable[DumpedSlice]]) -> None:
        """Dump the boundaries on which pending sections train, where the cache lacks them, and keep what that cost."""
        needed = {boundary.digest for task in self.pending for boundary in section_boundaries(self.context, task.index)}
        wanted = [boundary for boundary in all_boundaries(self.context) if boundary.digest in needed]
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


def run_digest(context: RunContext, prepared: Prepared, tasks: Sequence[SectionTask]) -> str:
    return json_sha256(
        {
            "tasks": [task.digest for task in tasks],
            "scores": test_key(context, prepared.splits),
            "held_out": prepared.splits.held_out.sha256,
            "reduce": context.job.reduce.model_dump(mode="json", exclude={"max_drop"}),
            "metric": context.job.data.metric,
        }
    )


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
