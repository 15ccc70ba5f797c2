"""The runs of the paper's table that are kept beside its page, so that batches on other days and machines add to one table.

`jobs/paper/results.json` has of every run what the page needs: the settings that make its row, and its figures; no folders. A
batch's runs take the place of kept ones for the same row, seed and variant, and of those of other switches in the same row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .paper_results import Run, row_key, switches

JOB_PARTS = ("seed", "teacher", "data", "sections", "quantize", "train", "reduce")
FIGURES = ("started_at", "status", "untrained_top1", "versions")
BASELINE_FIGURES = ("method", "budget", "top1", "lr", "tried_lrs", "cpu_seconds")


def read_kept(path: Path) -> list[Run]:
    """The runs in a file that `write_kept` wrote; none where there is no such file."""
    if not path.exists():
        return []
    return [Run(path=path.name, **kept) for kept in json.loads(path.read_text())]


def write_kept(path: Path, runs: Sequence[Run]) -> None:
    """Write the runs in an order of their own, so that a batch changes only its own lines."""
    kept = sorted((_kept(run) for run in runs), key=lambda found: json.dumps(found, sort_keys=True))
    lines = ",\n".join(json.dumps(found, sort_keys=True) for found in kept)
    path.write_text(f"[\n{lines}\n]\n")


def merged(kept: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs, and of the kept ones those that none of them replaces."""
    places = {(row_key(run.job), run.variant, run.job["seed"]) for run in new}
    told = {(row_key(run.job), run.variant): switches(run.job) for run in new}
    return [*(run for run in kept if not _replaced(run, places, told)), *new]


def _replaced(run: Run, places: set[tuple[str, str, int]], told: dict[tuple[str, str], str]) -> bool:
    row = (row_key(run.job), run.variant)
    return (*row, run.job["seed"]) in places or told.get(row, switches(run.job)) != switches(run.job)


def _kept(run: Run) -> dict[str, Any]:
    job = {name: run.job[name] for name in JOB_PARTS}
    # Of folders only the last part tells data and teachers apart.
    for part, name in (("data", "root"), ("teacher", "weights")):
        job[part] = {**job[part], name: Path(job[part].get(name) or "").name}
    report = {name: run.report[name] for name in FIGURES}
    for name in ("teacher", "student", "validation"):
        report[name] = {"top1": run.report[name]["top1"]}
    report["sections"] = [{} for _ in run.report["sections"]]
    report["timings"] = {"cpu_seconds": run.report["timings"]["cpu_seconds"]}
    report["baselines"] = [
        {name: baseline[name] for name in BASELINE_FIGURES} for baseline in run.report.get("baselines") or ()
    ]
    return {"job": job, "report": report}
