"""The figures of the paper's table: `report.json` files of a batch -> rows by network, data, bits and budget, and comparisons.

Reads nothing but `report.json` and the `job.yaml` beside it, of every finished run below a folder; `paper_table.py` makes them
and `paper_page.py` shows them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dcq_ray.spec import TrainSpec

Variant = Literal["stitched", "recipe"]
VARIANTS: tuple[Variant, ...] = ("stitched", "recipe")
# What the paper took, by the name of the network's function.
NETWORKS = {
    "alexnet_bn": ("AlexNet", "ImageNet"),
    "alexnet_bn_48": ("AlexNet", "ImageNet"),
    "resnet18": ("ResNet-18", "ImageNet"),
    "lenet": ("LeNet", "MNIST"),
    "resnet20": ("ResNet-20", "CIFAR-10"),
    "vgg11_cifar": ("VGG-11", "CIFAR-10"),
    "svhn": ("SVHN net", "SVHN"),
}
DATA_SETS = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "svhn": "SVHN",
    "imagefolder": "ImageNet",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}
# From here on the rival leaves something to win; below it DCQ must not be worse.
LOSS_TO_WIN_POINTS = 2.0
# (variant, budget) -> the share of the rival's loss that may be left.
BARS: dict[tuple[Variant, str], float] = {("stitched", "passes"): 0.15, ("recipe", "cpu-seconds"): 0.05}
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run: where it lies, its job as resolved, and its report."""

    path: str
    job: dict[str, Any]
    report: dict[str, Any]

    @property
    def variant(self) -> Variant:
        """Whether the student was trained end to end after stitching."""
        return "recipe" if self.job["reduce"]["polish_epochs"] > 0 else "stitched"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A student, DCQ's or a rival's, with the learning rate that held-out images chose."""

    top1: float
    lr: float
    tried_lrs: tuple[float, ...]
    cpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResult:
    """All that one seed gave; accuracies are fractions."""

    seed: int
    teacher: float
    untrained: float
    students: dict[Variant, Network]
    rivals: dict[tuple[Variant, str, str], Network]
    """(the variant whose budget it had, method, budget); a rival of as many passes stands beside both variants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One network, data set, bit width and budget over its seeds."""

    network: str
    data: str
    weights: str
    passes: str
    num_sections: int
    switches: dict[Variant, str]
    seeds: tuple[SeedResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """DCQ against a rival over the seeds that have both; losses and the difference in percentage points."""

    num_seeds: int
    student_loss: float
    rival_loss: float
    difference: float
    """Mean of student - rival."""
    standard_error: float | None
    """Of that mean, from the differences within seeds; None with one seed."""
    reached: bool | None
    """Whether the bar is; None where there is none, or one seed only."""

    @property
    def is_none(self) -> bool:
        """Whether the difference is inside its spread."""
        return self.standard_error is not None and abs(self.difference) <= STANDARD_ERRORS * self.standard_error

    @property
    def share_left(self) -> float | None:
        """(teacher - student) / (teacher - rival); None where the rival loses nothing."""
        return self.student_loss / self.rival_loss if self.rival_loss > 0 else None


# -- reports -> rows ---------------------------------------------------------------------------------------------------


def read_runs(root: Path) -> list[Run]:
    """Every finished run below a folder, in the order of its path."""
    runs = []
    for path in sorted(root.rglob("report.json")):
        report = json.loads(path.read_text())
        if report["status"] == "succeeded":
            job = yaml.safe_load(path.with_name("job.yaml").read_text())
            runs.append(Run(path=str(path.parent), job=job, report=report))
    return runs


def table_rows(runs: Iterable[Run]) -> list[Row]:
    """Rows by network, data, bits and budget.

    Raises ValueError: two runs of the same seed, variant and learning rate, of which nobody can say which one counts.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(row_key(run.job), []).append(run)
    rows = [_row(group) for group in groups.values()]
    return sorted(rows, key=lambda row: (row.network, row.data, row.weights, row.passes))


def row_key(job: dict[str, Any]) -> str:
    """All that rivals depend on, but for seed and learning rate: switches of DCQ's own do not make another row."""
    kept = {name: job[name] for name in ("quantize", "sections")}
    data = {name: value for name, value in job["data"].items() if name not in ("root", "batch_size", "download")}
    teacher = {name: value for name, value in job["teacher"].items() if name != "weights"}
    train = {name: job["train"][name] for name in ("epochs", "batch_size", "optimizer", "schedule")}
    places = [Path(place or "").name for place in (job["data"].get("root"), job["teacher"].get("weights"))]
    return json.dumps([kept, data, teacher, train, places], sort_keys=True)


def _row(runs: Sequence[Run]) -> Row:
    seen: dict[tuple[int, str, float], str] = {}
    for run in runs:
        place = (run.job["seed"], run.variant, run.job["train"]["lr"])
        if place in seen:
            raise ValueError(
                f"{run.path} and {seen[place]}: two {run.variant} runs of seed {place[0]} at learning rate {place[2]:g}, and one "
                "was expected; keep other settings in another folder"
            )
        seen[place] = run.path
    job = runs[0].job
    model = job["teacher"]["model"].rpartition(":")[2]
    network, papers_data = NETWORKS.get(model, (model, ""))
    data = _data_name(job["data"])
    weights = job["quantize"]["weights"]
    levels = "three levels" if weights["scheme"] in ("twn", "ttq") else f"{weights['bits']} bit"
    variants: dict[Variant, list[Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    return Row(
        network=network,
        data=data if not papers_data or data.startswith(papers_data) else f"{data}, stand-in for {papers_data}",
        weights=f"{levels} ({weights['scheme']}){_ends(job['quantize']['first_last_bits'])}",
        passes=_passes(job),
        num_sections=len(runs[0].report["sections"]),
        switches={variant: switches(found[0].job) for variant, found in variants.items()},
        seeds=tuple(
            _seed_result(seed, [run for run in runs if run.job["seed"] == seed])
            for seed in sorted({run.job["seed"] for run in runs})
        ),
    )


def _data_name(data: dict[str, Any]) -> str:
    name: str = data["dataset"]
    if name == "npz":
        name = Path(data["root"] or "").name
    return DATA_SETS.get(name, name)


def _passes(job: dict[str, Any]) -> str:
    images = job["data"]["train_samples"]
    return f"{'all' if images is None else format(images, ',')} x {job['train']['epochs']}"


def _ends(bits: int | None) -> str:
    return {None: "", 32: "; first and last layer fp32"}.get(bits, f"; first and last layer {bits} bits")


def switches(job: dict[str, Any]) -> str:
    """What a run's training and merge have switched on, beside a plain training of sections on the teacher's activations."""
    plain = TrainSpec(start="nearest", look_ahead=0).model_dump(mode="json")
    budget = ("epochs", "lr", "batch_size", "optimizer", "schedule")
    train = {name: value for name, value in job["train"].items() if value != plain.get(name) and name not in budget}
    merge = {
        name: job["reduce"][name]
        for name, without in (("rounds", 1), ("polish_epochs", 0))
        if job["reduce"][name] != without
    }
    # Jobs of before there was a choice have the plain one.
    if job["reduce"].get("refit"):
        merge["refit"] = job["reduce"].get("refit_metric", "outputs")
    told = [f"{name} {json.dumps(value)}" for name, value in {**train, **merge}.items()]
    return ", ".join(told) or "plain"


def _seed_result(seed: int, runs: Sequence[Run]) -> SeedResult:
    students: dict[Variant, Network] = {}
    rivals: dict[tuple[Variant, str, str], Network] = {}
    # One run of a cell dumped, the others found the boundaries: whichever is chosen is charged for them.
    dump_seconds = max(run.report["timings"]["cpu_seconds"]["dump"] for run in runs)
    for variant in VARIANTS:
        own = sorted((run for run in runs if run.variant == variant), key=lambda run: run.job["train"]["lr"])
        if own:
            chosen = max(own, key=lambda run: run.report["validation"]["top1"])
            cpu_seconds = chosen.report["timings"]["cpu_seconds"]
            students[variant] = Network(
                top1=chosen.report["student"]["top1"],
                lr=chosen.job["train"]["lr"],
                tried_lrs=tuple(run.job["train"]["lr"] for run in own),
                cpu_seconds=dump_seconds + sum(value for phase, value in cpu_seconds.items() if phase != "dump"),
            )
        for run in own:
            for baseline in _baselines(run.report):
                found = Network(
                    top1=baseline["top1"],
                    lr=baseline["lr"],
                    tried_lrs=tuple(baseline["tried_lrs"]),
                    cpu_seconds=baseline["cpu_seconds"],
                )
                method, budget = baseline["method"], baseline["budget"]
                for beside in VARIANTS if budget == "passes" else (variant,):
                    rivals.setdefault((beside, method, budget), found)
    return SeedResult(
        seed=seed,
        teacher=runs[0].report["teacher"]["top1"],
        untrained=runs[0].report["untrained_top1"],
        students=students,
        rivals=rivals,
    )


def _baselines(report: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = report.get("baselines") or []
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def compare(row: Row, variant: Variant, method: str, budget: str) -> Comparison | None:
    """DCQ's variant against a rival, or None where no seed has both."""
    pairs = [
        (result.teacher, result.students[variant].top1, result.rivals[variant, method, budget].top1)
        for result in row.seeds
        if variant in result.students and (variant, method, budget) in result.rivals
    ]
    if not pairs:
        return None
    differences = [100 * (student - rival) for _, student, rival in pairs]
    difference, error = statistics.fmean(differences), standard_error(differences)
    student_losses = [100 * (teacher - student) for teacher, student, _ in pairs]
    rival_losses = [100 * (teacher - rival) for teacher, _, rival in pairs]
    reached = None
    if error is not None and method == "dorefa":
        share = BARS.get((variant, budget))
        if statistics.fmean(rival_losses) < LOSS_TO_WIN_POINTS:
            reached = difference + STANDARD_ERRORS * error >= 0
        elif share is not None:
            spare = [share * rival - student for rival, student in zip(rival_losses, student_losses, strict=True)]
            spread = standard_error(spare)
            assert spread is not None
            reached = statistics.fmean(spare) - STANDARD_ERRORS * spread >= 0
    return Comparison(
        num_seeds=len(pairs),
        student_loss=statistics.fmean(student_losses),
        rival_loss=statistics.fmean(rival_losses),
        difference=difference,
        standard_error=error,
        reached=reached,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values: their standard deviation (n - 1) over the root of n; None with fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
