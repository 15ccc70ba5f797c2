"""What `dcq-ray plan` predicts beside what a run takes, for three networks, in processor seconds of one worker.

    DCQ_DATA=… python tests/benchmarks/prediction.py [--only NAME…]

Each network is tried as the plan command tries it, then run in this process, without Ray. Results go to results.json; exits with 1
where a prediction is off by more than its bar.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dcq_ray.data import load_splits
from dcq_ray.jobfile import load_job
from dcq_ray.phases import (
    Prediction,
    ignore_progress,
    plan_job,
    planning_teacher,
    predict,
    run_local,
    sample_counts,
    try_sections,
)
from dcq_ray.records import RunReport
from dcq_ray.storage import open_store

if __package__:
    from . import harness
else:
    import harness

JOBS = Path(__file__).parents[2] / "jobs" / "paper"
SMALL = ("data.train_samples=1000", "data.held_out_samples=250", "data.test_samples=250", "train.epochs=1")
NETWORKS: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    "LeNet": (JOBS / "lenet-mnist-w1.yaml", ("data.train_samples=2000", *SMALL[1:])),
    "ResNet-20": (JOBS / "resnet20-cifar10-w1.yaml", SMALL),
    # Its teacher has less than a run asks for on so few images.
    "VGG-11": (JOBS / "vgg11-cifar10-w1.yaml", ("data.train_samples=500", "teacher.min_top1=0", *SMALL[1:])),
}
MAX_OFF = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A prediction and what it was of."""

    predicted: Prediction
    section_seconds: tuple[float, ...]
    seconds: float
    """Of dump, training and merge."""


def compared(job_file: Path, settings: Sequence[str]) -> Compared:
    """Predict a job and run it, in an empty folder."""
    folder = str(job_file.resolve().parent)
    with tempfile.TemporaryDirectory() as place:
        folders = [f"storage.run_dir={place}/run", f"storage.cache_dir={place}/cache"]
        job = load_job(str(job_file), overrides=[*settings, *folders], environment=os.environ)
        device = torch.device("cpu")
        splits = load_splits(job.data, seed=job.seed, job_folder=folder)
        cache = open_store(job.storage.cache_dir)
        teacher = planning_teacher(job, folder, splits, cache, device)
        plan = plan_job(job, teacher, splits, device=device, cache=cache)
        costs = try_sections(job, teacher, plan, splits.train, device)
        predicted = predict(costs, job, sample_counts(splits), 1)
        report = run_local(job, folder, emit=ignore_progress, owner="prediction.py")
    return of_report(predicted, report)


def of_report(predicted: Prediction, report: RunReport) -> Compared:
    """A prediction beside a report's processor seconds."""
    cpu = report.timings.cpu_seconds
    return Compared(
        predicted=predicted,
        section_seconds=tuple(section.cpu_seconds for section in report.sections),
        seconds=cpu.dump + cpu.train + cpu.reduce,
    )


def off(predicted: float, measured: float) -> float:
    """How far a prediction is off, as a share of what was measured."""
    return abs(predicted / measured - 1)


def figures(name: str, found: Compared) -> list[harness.Figure]:
    """The rows of a network."""
    pairs = list(zip(found.predicted.section_seconds, found.section_seconds, strict=True))
    rows = []
    for index, (predicted, measured) in enumerate(pairs):
        rows.append(harness.Figure(name=f"{name}, section {index}, predicted", value=predicted, unit="s"))
        rows.append(harness.Figure(name=f"{name}, section {index}", value=measured, unit="processor s"))
    rows.append(harness.Figure(name=f"{name}, all of it, predicted", value=found.predicted.makespan_seconds, unit="s"))
    rows.append(harness.Figure(name=f"{name}, all of it", value=found.seconds, unit="processor s"))
    worst = max(off(*pair) for pair in pairs)
    whole = off(found.predicted.makespan_seconds, found.seconds)
    rows.append(harness.Figure(name=f"{name}, worst section off by", value=worst, unit="ratio", bar=MAX_OFF))
    rows.append(harness.Figure(name=f"{name}, all of it off by", value=whole, unit="ratio", bar=MAX_OFF))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 1 where a bar is missed."""
    parser = harness.arguments_parser(__doc__)
    parser.add_argument("--only", action="append", choices=list(NETWORKS), help="this network; may be given again")
    options = parser.parse_args(arguments)
    begun = harness.begin(__file__, arguments)
    rows = [row for name in options.only or NETWORKS for row in figures(name, compared(*NETWORKS[name]))]
    return harness.conclude(
        begun,
        "prediction",
        "What `dcq-ray plan` predicts, beside a run in one process; few images, one epoch.",
        rows,
        kept=not options.no_keep,
    )


if __name__ == "__main__":
    sys.exit(main())
