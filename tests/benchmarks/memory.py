"""The most memory that a worker takes, beside the bound of `phases/footprint.py`: trainings of sections, and dumps.

    DCQ_DATA=… python tests/benchmarks/memory.py

Every training and every dump is a process of its own, without Ray. What is compared is anonymous memory, looked at every few
milliseconds; the greatest resident memory that the system tells (VmHWM), mapped libraries and shards included, stands beside it.
The dump is then made of 8 times as many images, which are mapped from a file, so that they are no memory of a process. Results go
to results.json; exits with 1 where a bound does not hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import (
    Footprint,
    dump_footprint,
    dump_slices,
    ignore_progress,
    num_slices,
    open_network,
    open_run,
    open_splits,
    section_footprint,
    train_section,
    try_sections,
)
from dcq_ray.records import RunContext, SectionTask

if __package__:
    from . import harness
else:
    import harness

SECONDS_BETWEEN_LOOKS = 0.002
MEMORY_BYTES = 2**26
"""Of activations that a section may keep."""
TIMES_IMAGES = 8
# Of the dump's peak; what differs are the allocator's pieces.
MAX_GROWTH = 1.1
HELD_OUT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One of the measured jobs."""

    name: str
    model: str
    num_samples: int
    batch_size: int
    num_sections: int = 3


SIZES = (
    Size(name="ResNet-20, batches of 128", model="resnet20", num_samples=1024, batch_size=128),
    Size(name="ResNet-20, batches of 512", model="resnet20", num_samples=1024, batch_size=512),
    Size(name="VGG-11, batches of 128", model="vgg11_cifar", num_samples=256, batch_size=128),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most memory of a process, in bytes."""

    anonymous: int
    resident: int


def images(path: str, num_samples: int) -> dict[str, Any]:
    """Noise that lies in a file, and is mapped."""
    shape = (num_samples, 32, 32, 3)
    file = Path(f"{path}-{num_samples}")
    if not file.exists():
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).tobytes())
        part.replace(file)
    return {"train": (np.memmap(file, np.uint8, "r", shape=shape), np.arange(num_samples) % 10)}


def document_of(size: Size, folder: str) -> dict[str, Any]:
    """The job of a size."""
    module = Path(__file__).stem
    return {
        "name": "memory",
        "teacher": {"model": f"dcq_ray:{size.model}", "min_top1": 0},
        "data": {
            "dataset": f"{module}:images",
            "args": {"path": f"{folder}/images", "num_samples": size.num_samples + HELD_OUT},
            "image_size": [32, 32],
            "train_samples": size.num_samples,
            "held_out_samples": HELD_OUT,
            "batch_size": size.batch_size,
        },
        "sections": {"count": size.num_sections},
        "train": {"epochs": 1, "batch_size": size.batch_size},
        "resources": {"gpus_per_section": 0},
        "storage": {"run_dir": f"{folder}/run", "cache_dir": f"{folder}/cache", "checkpoint_seconds": 0.1},
    }


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """A list that holds, after the block, the most anonymous memory that this process had in it."""
    found, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            found[0] = max(found[0], status_bytes("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def status_bytes(name: str) -> int:
    """A field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def work(pickled: Path) -> Peak:
    """Train a section, or dump all slices, as the file says, in this process."""
    context, task, missing = pickle.loads(pickled.read_bytes())
    with watched() as found:
        network = open_network(context)
        if task is None:
            for _ in dump_slices(context, network, open_splits(context), range(num_slices(context)), missing):
                pass
        else:
            train_section(context, task, network, None, emit=ignore_progress, memory_bytes=MEMORY_BYTES)
    return Peak(anonymous=found[0], resident=status_bytes("VmHWM"))


def measured(folder: Path, context: RunContext, task: SectionTask | None, missing: Sequence[Any] = ()) -> Peak:
    """The peak of that work in a process of its own; raises RuntimeError where it fails."""
    file = folder / "work.pickle"
    file.write_bytes(pickle.dumps((context, task, tuple(missing))))
    done = subprocess.run(
        [sys.executable, __file__, "--work", str(file)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{task or 'the dump'} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def compared(size: Size, *, sections: bool = True) -> list[tuple[str, Footprint, Peak]]:
    """What is measured of a size: its name, its bound, its peak; the dump comes first."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        job = resolve_job(document_of(size, place), source="memory.py")
        device, folder = torch.device("cpu"), str(Path(__file__).parent)
        with open_run(job, folder, device=device, emit=ignore_progress, owner="memory.py") as session:
            plan, prepared = session.context.plan, session.prepared
            costs = try_sections(job, prepared.teacher, plan, prepared.splits.train, device)

            def dumped(missing: Sequence[Any]) -> list[Any]:
                peak = measured(Path(place), session.context, None, missing)
                found.append((f"{size.name}, dump", dump_footprint(plan, job, costs), peak))
                return []

            session.dump(dumped)
            for task in session.tasks if sections else ():
                bound = section_footprint(plan, job, task.index, costs, MEMORY_BYTES)
                started = time.monotonic()
                peak = measured(Path(place), session.context, task)
                found.append((f"{size.name}, section {task.index}", bound, peak))
                print(f"{found[-1]}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def figures(found: Sequence[tuple[str, Footprint, Peak]]) -> list[harness.Figure]:
    """Bound, peaks and their ratio, each."""
    rows = []
    for name, bound, peak in found:
        rows.append(harness.Figure(name=f"{name}: bound", value=bound.num_bytes / 2**20, unit="MiB"))
        rows.append(harness.Figure(name=f"{name}: anonymous", value=peak.anonymous / 2**20, unit="MiB"))
        rows.append(harness.Figure(name=f"{name}: resident, mapped files too", value=peak.resident / 2**20, unit="MiB"))
        ratio = peak.anonymous / bound.num_bytes
        rows.append(harness.Figure(name=f"{name}: anonymous / bound", value=ratio, unit="ratio", bar=1.0))
    return rows


def growth(few: Peak, many: Peak) -> harness.Figure:
    """How much more a dump of more images takes."""
    return harness.Figure(
        name=f"dump of {TIMES_IMAGES} times as many images / of as many",
        value=many.anonymous / few.anonymous,
        unit="ratio",
        bar=MAX_GROWTH,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 1 where a bar is missed."""
    parser = harness.arguments_parser(__doc__)
    parser.add_argument("--work", type=Path, metavar="FILE", help="do what the file says, in this process; prints JSON")
    options = parser.parse_args(arguments)
    if options.work is not None:
        peak = work(options.work)
        print(json.dumps({"anonymous": peak.anonymous, "resident": peak.resident}))
        return 0
    begun = harness.begin(__file__, arguments)
    found = [row for size in SIZES for row in compared(size)]
    few = SIZES[0]
    times = Size(
        name=f"{few.name}, {TIMES_IMAGES} times the images",
        model=few.model,
        num_samples=TIMES_IMAGES * few.num_samples,
        batch_size=few.batch_size,
    )
    many = compared(times, sections=False)
    rows = [*figures([*found, *many]), growth(found[0][2], many[0][2])]
    return harness.conclude(
        begun,
        "memory",
        f"The most memory of a worker in a process of its own, at most {MEMORY_BYTES // 2**20} MiB of activations kept in memory, "
        "one epoch.",
        rows,
        kept=not options.no_keep,
    )


if __name__ == "__main__":
    sys.exit(main())
