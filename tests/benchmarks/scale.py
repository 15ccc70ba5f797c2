"""How far the driver scales: a simulated cluster of up to 64 workers, whose trainings are waits of their measured length.

    python tests/benchmarks/scale.py [--seconds 15] [--workers N]…

One Ray on this machine has as many fake CPUs as there are workers. Plan, tasks, lease, driver, results and checkpoints are those of
a run; the actors (`waiting.py`) import no torch and wait, for each section, a fixed multiple of what its steps take by the plan's
measurement. The clock starts when all actors are ready, and stops when the driver has all results. Efficiency is the bound, the
greater of the work shared evenly and the longest section, over that time. Then 1,000 sections, and two runs whose numbers of images
differ 10 times. Every run is a process of its own. Results go to results.json; exits with 1 where a bar is missed.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from torch import nn

from dcq_ray.errors import SectionTrainingError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import RunSession, ignore_progress, open_run
from dcq_ray.phases.predict import makespan
from dcq_ray.remote.cluster import node_resources, section_share
from dcq_ray.remote.sections import train_alone
from dcq_ray.spec import Job

if __package__:
    from . import harness, waiting
else:
    import harness
    import waiting

NUM_WORKERS = (1, 2, 4, 8, 16, 64)
SECTIONS_PER_WORKER = 4
MANY_SECTIONS, MANY_WORKERS, MANY_SECONDS = 1000, 16, 1.0
NUM_SAMPLES, TIMES_SAMPLES = 10_000, 10
MIN_EFFICIENCY: Mapping[int, float] = {16: 0.95, 64: 0.9}
# Of the driver's memory and processor seconds with 10 times the images: no more than two equal runs differ.
MAX_GROWTH = 1.15
IMAGE_SIZE, NUM_CLASSES = 8, 10
WIDTHS = (64, 512, 128, 256)
CHECKPOINT_SECONDS = 5.0
OBJECT_STORE_BYTES = 2**27


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One simulated run."""

    num_workers: int
    num_sections: int
    mean_seconds: float
    """Of a section's wait."""
    num_samples: int = NUM_SAMPLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated run gave."""

    seconds: float
    """From when all actors are ready to the last result in the driver."""
    bound_seconds: float
    scheduled_seconds: float
    """What longest first gives without anything between the sections."""
    times_measured: float
    """How long the waits are, as a multiple of the measured trainings."""
    opening_cpu_seconds: float
    """Of the driver: images, teacher, plan, tasks."""
    driver_cpu_seconds: float
    """From the first actor's start to the last result."""
    driver_peak_bytes: int
    """The greatest resident memory in that time."""

    @property
    def efficiency(self) -> float:
        """Bound over time."""
        return self.bound_seconds / self.seconds


def chain(num_layers: int) -> nn.Module:
    """A network of so many Linear layers of different costs."""
    widths = [IMAGE_SIZE**2, *(WIDTHS[index % len(WIDTHS)] for index in range(num_layers - 1)), NUM_CLASSES]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def images(num_samples: int) -> dict[str, Any]:
    """A data set of noise."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (num_samples, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    return {"train": (pixels, np.arange(num_samples) % NUM_CLASSES)}


def job_of(setting: Setting, folder: str) -> Job:
    """The job whose trainings are waited for."""
    module = Path(__file__).stem
    held_out = 64
    document = {
        "name": "scale",
        "teacher": {"model": f"{module}:chain", "args": {"num_layers": setting.num_sections}, "min_top1": 0},
        "data": {
            "dataset": f"{module}:images",
            "args": {"num_samples": setting.num_samples + held_out},
            "channels": 1,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "train_samples": setting.num_samples,
            "held_out_samples": held_out,
        },
        "sections": {"every": "layer"},
        "resources": {"gpus_per_section": 0},
        "storage": {
            "run_dir": f"{folder}/run",
            "cache_dir": f"{folder}/cache",
            "checkpoint_seconds": CHECKPOINT_SECONDS,
        },
    }
    return resolve_job(document, source="scale.py")


def waits_of(step_seconds: Sequence[float], mean_seconds: float) -> tuple[list[float], float]:
    """Waits in proportion to measured seconds, with that mean; and of which multiple they are."""
    times = mean_seconds / statistics.fmean(step_seconds)
    return [times * seconds for seconds in step_seconds], times


def bound(seconds: Sequence[float], num_workers: int) -> float:
    """No schedule is shorter: all work shared evenly, or the longest section."""
    return max(sum(seconds) / num_workers, max(seconds))


def simulate(setting: Setting) -> Simulated:
    """Run a simulated cluster in this process; raises SectionTrainingError where a section was not finished."""
    # The actors' class travels as it is, wherever this script was started.
    cloudpickle.register_pickle_by_value(waiting)
    with tempfile.TemporaryDirectory() as folder:
        job, start_cpu_seconds = job_of(setting, folder), time.process_time()
        ray.init(
            num_cpus=setting.num_workers,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level="ERROR",
            log_to_driver=False,
        )
        try:
            opened = open_run(
                job, str(Path(__file__).parent), device=torch.device("cpu"), emit=ignore_progress, owner="scale.py"
            )
            with opened as session:
                return _simulated(setting, session, Path(folder, "ready"), time.process_time() - start_cpu_seconds)
        finally:
            ray.shutdown()


def _simulated(setting: Setting, session: RunSession, ready: Path, opening_cpu_seconds: float) -> Simulated:
    job = session.context.job
    measured = [section.step_seconds for section in session.context.plan.sections]
    steps = job.train.epochs * (setting.num_samples // job.train.batch_size)
    seconds, times = waits_of(measured, setting.mean_seconds)
    ready.mkdir()
    waits = waiting.Waits(
        seconds=dict(enumerate(seconds)),
        num_steps=steps,
        num_workers=min(setting.num_workers, len(seconds)),
        ready_folder=str(ready),
    )
    actor = ray.remote(type("Waiting", (waiting.WaitingWorker,), {"waits": waits, "__module__": waiting.__name__}))
    share = section_share(job, len(seconds), node_resources())
    forget_peak()
    start_cpu_seconds = time.process_time()
    results, failures = train_alone(session, share, lambda _: None, actor=actor)
    ended, cpu_seconds = time.time(), time.process_time() - start_cpu_seconds
    if failures or len(results) != len(seconds):
        told = failures[0].message if failures else ""
        raise SectionTrainingError(f"{len(results)} of {len(seconds)} sections finished; {told}")
    # Later ones are of workers that took others' places.
    ready_at = sorted(file.stat().st_mtime for file in ready.iterdir())[waits.num_workers - 1]
    return Simulated(
        seconds=ended - ready_at,
        bound_seconds=bound(seconds, setting.num_workers),
        scheduled_seconds=makespan(seconds, setting.num_workers),
        times_measured=times / steps,
        opening_cpu_seconds=opening_cpu_seconds,
        driver_cpu_seconds=cpu_seconds,
        driver_peak_bytes=peak_bytes(),
    )


def forget_peak() -> None:
    """Have the greatest resident memory of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The greatest resident memory of this process since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def simulated(setting: Setting) -> Simulated:
    """The same in a process of its own; raises RuntimeError where it fails."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(setting))]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{setting} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found = Simulated(**json.loads(done.stdout.splitlines()[-1]))
    print(f"{setting}: {found}, efficiency {found.efficiency:.3f}", file=sys.stderr, flush=True)
    return found


def efficiency_figures(num_workers: int, found: Simulated) -> list[harness.Figure]:
    """The rows of one number of workers."""
    workers = f"{num_workers} workers"
    return [
        harness.Figure(
            name=f"{workers}: bound / time",
            value=found.efficiency,
            unit="ratio",
            bar=MIN_EFFICIENCY.get(num_workers),
            higher_is_better=True,
        ),
        harness.Figure(name=f"{workers}: time, all ready to last result", value=found.seconds, unit="s"),
        harness.Figure(
            name=f"{workers}: bound / longest first without anything between",
            value=found.bound_seconds / found.scheduled_seconds,
            unit="ratio",
        ),
        harness.Figure(name=f"{workers}: driver", value=found.driver_cpu_seconds, unit="processor s"),
        harness.Figure(name=f"{workers}: driver's peak memory", value=found.driver_peak_bytes / 2**20, unit="MiB"),
        harness.Figure(
            name=f"{workers}: a wait is so many times the measured training", value=found.times_measured, unit="ratio"
        ),
    ]


def many_figures(found: Simulated) -> list[harness.Figure]:
    """The rows of many sections."""
    what = f"{MANY_SECTIONS:,} sections on {MANY_WORKERS} workers"
    return [
        harness.Figure(name=f"{what}: time, all ready to last result", value=found.seconds, unit="s"),
        harness.Figure(name=f"{what}: bound", value=found.bound_seconds, unit="s"),
        harness.Figure(
            name=f"{what}: driver, images, teacher, plan", value=found.opening_cpu_seconds, unit="processor s"
        ),
        harness.Figure(name=f"{what}: driver, training", value=found.driver_cpu_seconds, unit="processor s"),
        harness.Figure(name=f"{what}: driver's peak memory", value=found.driver_peak_bytes / 2**20, unit="MiB"),
    ]


def samples_figures(few: Simulated, more: Simulated) -> list[harness.Figure]:
    """The rows of runs that differ in their number of images alone."""
    counts = f"{TIMES_SAMPLES * NUM_SAMPLES:,} images / {NUM_SAMPLES:,}"
    pairs = [
        ("driver's peak memory while sections train", more.driver_peak_bytes, few.driver_peak_bytes),
        ("driver's processor seconds while sections train", more.driver_cpu_seconds, few.driver_cpu_seconds),
    ]
    return [
        harness.Figure(name=f"{name}, {counts}", value=above / below, unit="ratio", bar=MAX_GROWTH)
        for name, above, below in pairs
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 1 where a bar is missed."""
    parser = harness.arguments_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="mean wait of a section")
    parser.add_argument("--workers", type=int, action="append", help="may be given again; default: all")
    parser.add_argument("--only-workers", action="store_true", help="neither many sections nor many images")
    parser.add_argument("--one", metavar="JSON", help="a single setting, in this process; prints JSON")
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(asdict(simulate(Setting(**json.loads(options.one))))))
        return 0
    begun = harness.begin(__file__, arguments)
    rows: list[harness.Figure] = []
    for num_workers in options.workers or NUM_WORKERS:
        num_sections = SECTIONS_PER_WORKER * num_workers
        setting = Setting(num_workers=num_workers, num_sections=num_sections, mean_seconds=options.seconds)
        rows += efficiency_figures(num_workers, simulated(setting))
    if not options.only_workers:
        setting = Setting(num_workers=MANY_WORKERS, num_sections=MANY_SECTIONS, mean_seconds=MANY_SECONDS)
        rows += many_figures(simulated(setting))
        few = Setting(num_workers=4, num_sections=4 * SECTIONS_PER_WORKER, mean_seconds=options.seconds)
        rows += samples_figures(simulated(few), simulated(replace(few, num_samples=TIMES_SAMPLES * few.num_samples)))
    return harness.conclude(
        begun,
        "scale",
        f"{SECTIONS_PER_WORKER} sections for each worker of a simulated cluster on this machine; trainings are waits of "
        f"{options.seconds:g} s in the mean ({MANY_SECONDS:g} s with {MANY_SECTIONS:,} sections), in proportion to their "
        "measured length.",
        rows,
        kept=not options.no_keep,
    )


if __name__ == "__main__":
    sys.exit(main())
