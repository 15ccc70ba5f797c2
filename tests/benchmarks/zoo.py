"""torchvision's whole zoo through the real path: cut, dump, trained one step per section, stitched, evaluated.

    python tests/benchmarks/zoo.py                          # all classifiers, and the models that must be refused
    python tests/benchmarks/zoo.py resnet18 fcn_resnet50    # these
    python tests/benchmarks/zoo.py --output zoo.jsonl       # keep rows as they come; names that are there are skipped

Every classifier runs twice: in 2 sections with 2-bit weights, and in 5 sections with 4-bit activations too. Weights are random,
images are few and small. Each name has a process of its own, so that memory goes back and a crash is one row; Markdown tables go
to standard output.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from dcq_ray.data import load_splits, ordered_batches
from dcq_ray.errors import DcqError
from dcq_ray.jobfile import resolve_job
from dcq_ray.partition import trace_teacher
from dcq_ray.phases import run_local
from dcq_ray.quantizers import put_input_quantizers
from dcq_ray.records import PartitionPlan, Progress, RunReport, from_json
from dcq_ray.spec import Job
from dcq_ray.teacher import build_network, load_teacher, read_state
from dcq_ray.validate import compare, predict, top_k

FOLDER = Path(__file__).parent
SECTION_COUNTS = (2, 5)
NUM_CLASSES = 10
NUM_IMAGES = 4
CPU = torch.device("cpu")

# Networks that insist on a size, and arguments that let others do with a small one.
IMAGE_SIZE = 64
IMAGE_SIZES = {"inception_v3": 75, "maxvit_t": 224, "vit_h_14": 56}
ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": IMAGE_SIZE},
    "vit_b_32": {"image_size": IMAGE_SIZE},
    "vit_l_16": {"image_size": IMAGE_SIZE},
    "vit_l_32": {"image_size": IMAGE_SIZE},
    "vit_h_14": {"image_size": IMAGE_SIZES["vit_h_14"]},
}
REFUSED_KINDS = ("detection", "segmentation", "optical_flow", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooRow:
    """What became of one classifier."""

    name: str
    legal_cuts: int = 0
    sections: tuple[int, ...] = ()
    front_end: str = ""
    num_parameters: int = 0
    unquantized_share: float = 0.0
    seconds: float = 0.0
    peak_gib: float = 0.0
    reason: str | None = None
    """Why it failed; None where it passed."""


def classifiers() -> list[str]:
    """The names of torchvision's image classifiers."""
    return list(torchvision.models.list_models(module=torchvision.models))


def others() -> dict[str, str]:
    """Names of the models that are no image classifiers -> their kind."""
    return {
        name: kind
        for kind in REFUSED_KINDS
        for name in torchvision.models.list_models(module=getattr(torchvision.models, kind))
    }


def random_images(size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A data set: train (half of it is held out) and test images of random bytes, labelled 0 … in turn."""
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        return images, np.arange(count) % NUM_IMAGES

    return {"train": part(2 * NUM_IMAGES), "test": part(NUM_IMAGES)}


def zoo_job(name: str, num_sections: int, folder: Path) -> Job:
    """The job of one classifier; an odd number of sections has 4-bit activations too."""
    size = IMAGE_SIZES.get(name, IMAGE_SIZE)
    args = {"num_classes": NUM_CLASSES} if name in classifiers() else {"weights_backbone": None}
    if others().get(name) in ("optical_flow", "video"):
        args = {}
    activations = {"scheme": "lsq", "bits": 4} if num_sections % 2 else None
    return resolve_job(
        {
            "name": name,
            "teacher": {
                "model": f"torchvision:{name}",
                "args": {**args, **ARGS.get(name, {})},
                "weights": None,
                "min_top1": 0,
            },
            "data": {
                "dataset": "zoo:random_images",
                "args": {"size": size},
                "train_samples": NUM_IMAGES,
                "held_out_samples": NUM_IMAGES,
                "batch_size": NUM_IMAGES,
                "normalize": {"mean": [0.5], "std": [0.25]},
            },
            "sections": {"count": num_sections},
            "quantize": {"weights": {"scheme": "dorefa", "bits": 2}, "activations": activations},
            # Least squares over large layers would take longer than all else.
            "train": {"epochs": 1, "lr": 1e-4, "batch_size": NUM_IMAGES, "start": "nearest"},
            "resources": {"gpus_per_section": 0},
            "storage": {
                "run_dir": str(folder / f"run-{num_sections}"),
                "cache_dir": str(folder / "cache"),
                "dtype": "float32",
            },
        },
        source=f"{name} in {num_sections} sections",
    )


def run_and_check(name: str, num_sections: int, folder: Path) -> PartitionPlan:
    """Run a classifier in so many sections from end to end and check what it leaves; the plan.

    Raises:
        DcqError: the run failed, or the model was refused.
        AssertionError: the run says it succeeded, but what it left says otherwise.
    """
    job = zoo_job(name, num_sections, folder)
    steps: dict[int, int] = {}

    def watch(progress: Progress) -> None:
        if progress.phase == "train" and progress.index is not None and progress.state == "done":
            steps[progress.index] = progress.done or 0

    report = run_local(job, str(FOLDER), emit=watch, owner="zoo")
    # Graphs are cycles, and hold copies of the network until they are collected.
    gc.collect()
    plan = from_json(PartitionPlan, Path(job.storage.run_dir, "plan.json").read_bytes())
    assert report.status == "succeeded", report.status
    assert len(plan.sections) == len(report.sections) == num_sections, f"{len(report.sections)} sections"
    assert steps == dict.fromkeys(range(num_sections), 1), f"steps taken by section: {steps}"
    _check_student(job, plan, report)
    return plan


def _check_student(job: Job, plan: PartitionPlan, report: RunReport) -> None:
    """The student's file, loaded into the user's own class, must be what the report speaks of."""
    state = read_state(f"{job.storage.run_dir}/student.safetensors")
    student = build_network(job.teacher, job_folder=str(FOLDER))
    own = {key: value for key, value in state.items() if not key.startswith("dcq.")}
    expected = student.state_dict()
    assert own.keys() == expected.keys(), f"other names: {sorted(own.keys() ^ expected.keys())}"
    # In the network's own dictionary, whose metadata (versions of its classes) MNASNet insists on.
    expected.update(own)
    student.load_state_dict(expected, strict=True)
    put_input_quantizers(student, state)
    student.eval()
    splits = load_splits(job.data, seed=job.seed, job_folder=str(FOLDER))
    assert splits.test is not None
    assert report.student is not None
    assert report.validation is not None
    logits = predict(student, (images for images, _ in ordered_batches(splits.test, NUM_IMAGES)), CPU)
    assert torch.isfinite(logits).all(), "the student's logits are not finite"
    assert top_k(logits, torch.from_numpy(splits.test.labels), 1) == report.student.top1, "top-1 is not the report's"
    _check_weights(student, plan)
    # The error at the last boundary is that of the logits: equal errors mean equal logits.
    torch.manual_seed(job.seed)
    teacher = load_teacher(job.teacher, job_folder=str(FOLDER))
    assert teacher.sha256 == plan.teacher_sha256, "the teacher cannot be built again"
    held_out = (images for images, _ in ordered_batches(splits.held_out, NUM_IMAGES))
    (error,) = compare([teacher.module], [student], held_out, CPU).boundary_errors
    told = report.validation.boundary_errors[-1]
    assert math.isclose(error, told, rel_tol=1e-6), f"the logits' error is {error}, the report says {told}"


def _check_weights(student: nn.Module, plan: PartitionPlan) -> None:
    for layer in plan.layers:
        weight = student.get_submodule(layer.module).weight
        assert isinstance(weight, torch.Tensor)
        # A sample: to sort a hundred million weights takes longer than to train on them.
        levels = len(weight.flatten()[:: 1 + weight.numel() // 2**18].unique())
        assert levels <= 2**layer.bits, f"{layer.module} has {levels} levels at {layer.bits} bits"


def zoo_row(name: str, section_counts: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Run a classifier in so many sections, one after the other, in an empty folder; the row says what became of it."""
    started = time.monotonic()
    row = ZooRow(name=name)
    try:
        for count in section_counts:
            plan = run_and_check(name, count, folder)
            row = replace(
                row,
                sections=(*row.sections, count),
                num_parameters=plan.num_parameters,
                unquantized_share=plan.unquantized_share,
            )
        teacher = load_teacher(zoo_job(name, 2, folder).teacher, job_folder=str(FOLDER)).module
        traced = trace_teacher(teacher, torch.zeros(2, *plan.input_shape))
        row = replace(row, legal_cuts=len(traced.cut_points), front_end=traced.front_end)
    except Exception as error:
        # Whatever goes wrong is this row's reason, not the table's end.
        row = replace(row, reason=f"{type(error).__name__}: {error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return asdict(replace(row, seconds=time.monotonic() - started, peak_gib=peak))


def told_of(name: str) -> str:
    """The message that a model which is no image classifier gets; raises AssertionError where it gets none."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        try:
            run_and_check(name, 2, Path(folder))
        except DcqError as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{name} is no image classifier, but was cut, trained and evaluated")


def one_process(name: str, max_gib: float, max_seconds: float) -> dict[str, Any]:
    """The row of a name, made by a process of its own that may use so much memory and time."""
    command = [sys.executable, __file__, name, "--one", "--max-gib", str(max_gib)]
    started = time.monotonic()
    row: dict[str, Any] = {"name": name}
    try:
        # Weights' memory then goes back to the system when it is freed (glibc else keeps up to 32 MiB a piece).
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=max_seconds, env=environment)
    except subprocess.TimeoutExpired:
        return row | {"reason": f"not done after {max_seconds:.0f} s", "seconds": time.monotonic() - started}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        return row | {"reason": f"exit code {done.returncode}: {last}", "seconds": time.monotonic() - started}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the classifiers' rows, and how many passed."""
    lines = [
        "| name | legal cuts | sections made | front end | parameters | not quantized | seconds | peak GiB | reason |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for values in rows:
        row = ZooRow(**values)
        lines.append(
            f"| {row.name} | {row.legal_cuts or ''} | {', '.join(map(str, row.sections))} | {row.front_end} | "
            f"{row.num_parameters:,} | {100 * row.unquantized_share:.1f} % | {row.seconds:.0f} | {row.peak_gib:.1f} | "
            f"{row.reason or ''} |"
        )
    passed = sum(row["reason"] is None for row in rows)
    lines += ["", f"passed {passed} of {len(rows)} in {sum(row['seconds'] for row in rows):.0f} s"]
    return "\n".join(lines)


def refusal_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the messages that other models get."""
    kinds = others()
    return "\n".join(
        [
            "| name | kind | message |",
            "| --- | --- | --- |",
            *(f"| {row['name']} | {kinds[row['name']]} | {row.get('message', row.get('reason'))} |" for row in rows),
        ]
    )


def main() -> None:
    """Run what is asked for and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all where none is named")
    parser.add_argument("--output", type=Path, help="JSON lines, one a name; names that are there are skipped")
    parser.add_argument("--max-gib", type=float, default=22.0, help="memory that one name may use (22)")
    parser.add_argument("--max-seconds", type=float, default=1800.0, help="time that one name may take (1800)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = [*classifiers(), *others()]
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"torchvision has no model {', '.join(unknown)}")
    if options.one:
        (name,) = options.names
        limit = int(options.max_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        torch.set_num_threads(1)
        if name in others():
            print(json.dumps({"name": name, "message": told_of(name)}))
        else:
            with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
                print(json.dumps(zoo_row(name, SECTION_COUNTS, Path(folder))))
        return
    rows: dict[str, dict[str, Any]] = {}
    if options.output is not None and options.output.exists():
        kept = map(json.loads, options.output.read_text().splitlines())
        rows = {row["name"]: row for row in kept}
    names = options.names or known
    for number, name in enumerate(names, 1):
        if name not in rows:
            rows[name] = one_process(name, options.max_gib, options.max_seconds)
            if options.output is not None:
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        row = rows[name]
        told = row.get("reason") or row.get("message") or "passed"
        print(f"{number}/{len(names)} {name}: {told}", file=sys.stderr, flush=True)
    if cut_ones := [rows[name] for name in names if name not in others()]:
        print(table(cut_ones))
    if refused := [rows[name] for name in names if name in others()]:
        print(f"\n{refusal_table(refused)}")


if __name__ == "__main__":
    main()
