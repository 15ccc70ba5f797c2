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
from dcq_ray.phases.reading import section_boundaries
from dcq_ray.phases.reduce import test_key
from dcq_ray.phases.saving import remove_checkpoints
from dcq_ray.phases.views import all_boundaries, recomputes
from dcq_ray.records import (
    BaselineReport,
    Boundary,
    Progress,
    RunContext,
    RunReport,
    SectionResult,
    SectionTask,
    seal_json,
    unseal_json,
)
from dcq_ray.storage import Store

REPORT_FILE = "report.json"
DUMP_FILE = "dump.json"
BASELINES_FOLDER = "baselines"


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
    changes_note: str | None = None
    """What changed since the run before, and what is done again therefore."""

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

    def remove_checkpoints(self) -> None:
        """Remove all sections' checkpoints, once all have results."""
        for task in self.tasks:
            remove_checkpoints(self.context, task.index)

    def dump(self, run_slices: Callable[[Sequence[Boundary]], Iterable[DumpedSlice]]) -> None:
        """Dump the boundaries on which pending sections train, where the cache lacks them, and keep what that cost.

        Where sections recompute them there is nothing to dump.
        """
        if recomputes(self.context.job):
            self.emit(Progress(phase="dump", state="done", detail="nothing is stored: sections recompute activations"))
            return
        needed = {boundary.digest for task in self.pending for boundary in section_boundaries(self.context, task.index)}
        wanted = [boundary for boundary in all_boundaries(self.context) if boundary.digest in needed]
        started = time.monotonic()
        cpu_seconds = dump_missing(self.context, wanted, run_slices, self.emit)
        if cpu_seconds:
            seconds = time.monotonic() - started
            cost = DumpCost(plan_key=self.context.plan.key, seconds=seconds, cpu_seconds=cpu_seconds)
            self.store.write_bytes(DUMP_FILE, seal_json(cost))

    def dump_cost(self) -> DumpCost:
        """What the dump of this plan cost."""
        content = None if recomputes(self.context.job) else self.store.read_bytes_or_none(DUMP_FILE)
        if content is not None:
            with contextlib.suppress(ValueError):
                found = unseal_json(DumpCost, content)
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
    session.store.write_bytes(REPORT_FILE, seal_json(report))


def read_report(store: Store) -> RunReport | None:
    """The report of a run directory, or None where there is none that can be read."""
    content = store.read_bytes_or_none(REPORT_FILE)
    if content is None:
        return None
    try:
        return unseal_json(RunReport, content)
    except ValueError:
        return None


def with_baselines(report: RunReport, baselines: Sequence[BaselineReport]) -> RunReport:
    """The report with rivals' rows beside the run's, and the share of the gap that DCQ closed (paper, section 1).

    gap_closed = (top1_dcq - top1_rival) / (top1_teacher - top1_rival), where the teacher is the better one; the rival is
    dorefa at equal sample passes where it was trained, else the first one.
    """
    main = [rival for rival in baselines if (rival.method, rival.budget) == ("dorefa", "passes")]
    baseline = next(iter([*main, *baselines]), None)
    gap_closed = None
    teacher, student = report.teacher.top1, None if report.student is None else report.student.top1
    if baseline is not None and baseline.top1 is not None and teacher is not None and student is not None:
        gap = teacher - baseline.top1
        gap_closed = (student - baseline.top1) / gap if gap > 0 else None
    return replace(report, baseline=baseline, baselines=tuple(baselines), gap_closed=gap_closed)


def baseline_key(session: RunSession, method: str, budget: str) -> str:
    """Digest of all that a rival depends on."""
    finished = session.finished_report
    return json_sha256(
        {
            "method": method,
            "budget": budget,
            # Seconds are a measurement of one run: another run's are another budget.
            "run": None if budget == "passes" or finished is None else finished.started_at,
            "scores": test_key(session.context, session.prepared.splits),
            "train": session.context.job.train.model_dump(mode="json"),
            "cuts": session.context.plan.cuts if method in ("hints", "sequential") else None,
            "roll_back": session.context.job.reduce.roll_back,
            "seed": session.context.job.seed,
            "held_out": session.prepared.splits.held_out.sha256,
        }
    )


def kept_baseline(session: RunSession, method: str, budget: str) -> BaselineReport | None:
    """The rival that was trained for this very job, or None."""
    content = session.store.read_bytes_or_none(_baseline_file(method, budget))
    if content is not None:
        with contextlib.suppress(ValueError):
            kept = unseal_json(KeptBaseline, content)
            if kept.key == baseline_key(session, method, budget):
                return kept.baseline
    return None


def kept_baselines(session: RunSession) -> tuple[BaselineReport, ...]:
    """All rivals that were trained for this very job, in the order of their files' names."""
    found = []
    for name in sorted(session.store.child(BASELINES_FOLDER).list_names()):
        method, _, budget = name.removesuffix(".json").partition("-")
        kept = kept_baseline(session, method, budget)
        if kept is not None:
            found.append(kept)
    return tuple(found)


def keep_baseline(session: RunSession, baseline: BaselineReport) -> RunReport | None:
    """Keep a rival beside the run, and give the run's report with its row where the run is finished."""
    key = baseline_key(session, baseline.method, baseline.budget)
    file = _baseline_file(baseline.method, baseline.budget)
    session.store.write_bytes(file, seal_json(KeptBaseline(key=key, baseline=baseline)))
    if session.finished_report is None:
        return None
    report = with_baselines(session.finished_report, kept_baselines(session))
    write_report(session, report)
    return report


def _baseline_file(method: str, budget: str) -> str:
    return f"{BASELINES_FOLDER}/{method}-{budget}.json"
