"""`dcq-ray run` beside the least that its work can take: bare loops of the same work, shared evenly over the workers.

    DCQ_DATA=… python tests/benchmarks/limit.py [--workers 2] [--repeats 2] [--set a.b=c]…

The bound: as many processes at once as there are workers each do all of the job's work as bare loops (`bare.py`), one thread
each; it is the greater of their mean processor seconds over the workers, and of the longest chain: the teacher's passes shared
evenly, the longest section, the student's own passes. Beside it stands the run by the outer clock, from the command's start to its
end, in fresh folders, with a Ray that was started before; then a small job with such a Ray and with one of its own. Bound and runs
take turns; of each the least counts. Results go to results.json; exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__:
    from . import bare, harness
else:
    import bare
    import harness

DEFAULT_JOB = Path(__file__).with_name("speed.yaml")
MAX_RATIO = 1.15
MAX_COLD_START_SECONDS = 6.0
# What a cold start adds does not depend on the job: so a small one shows it.
SMALL = ("data.train_samples=128", "train.epochs=1", "data.held_out_samples=32", "data.test_samples=32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One `dcq-ray run`, by the outer clock."""

    seconds: float
    timings: dict[str, Any]
    sha256: str


def bound(pieces: Mapping[str, float], num_workers: int) -> float:
    """The least seconds in which so many workers can do these pieces of `bare.whole_run`."""
    sections = [seconds for name, seconds in pieces.items() if name.startswith("section ")]
    chain = pieces["teacher"] / num_workers + max(sections) + pieces["student"]
    return max(sum(pieces.values()) / num_workers, chain)


def bare_pieces(job: str, settings: Sequence[str], num_workers: int) -> dict[str, float]:
    """Mean processor seconds of the pieces, in so many processes at once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, job, "--bare", f"{folder}/cache", *_set(settings)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(num_workers)]
        found: list[dict[str, float]] = []
        for process in running:
            printed, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            found.append(json.loads(printed.splitlines()[-1]))
    return {name: sum(pieces[name] for pieces in found) / num_workers for name in found[0]}


def run(job: str, settings: Sequence[str], address: str) -> Run:
    """A run from empty folders; raises RuntimeError with what it said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dcq_ray", "run", job, "--run-dir", f"{folder}/run", "--address", address]
        started = time.monotonic()
        command += _set([f"storage.cache_dir={folder}/cache", *settings])
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        seconds = time.monotonic() - started
        report = json.loads(Path(folder, "run", "report.json").read_text())
    return Run(seconds=seconds, timings=report["timings"], sha256=report["student"]["sha256"])


def figures(
    pieces: Mapping[str, float], num_workers: int, warm: Run, cold_start_seconds: float | None
) -> list[harness.Figure]:
    """The table of the benchmark."""
    least, timings = bound(pieces, num_workers), warm.timings
    told_phases = ("dump", "train", "reduce")
    phases = {name: float(timings[f"{name}_seconds"]) for name in told_phases}
    before = timings["total_seconds"] - sum(phases.values())
    values = [
        ("bare loops of everything, one process", sum(pieces.values()), "processor s"),
        (f"bound on {num_workers} workers", least, "s"),
        ("dcq-ray run, Ray warm, outer clock", warm.seconds, "s"),
        ("starting the command, joining Ray, the tables at the end", warm.seconds - timings["total_seconds"], "s"),
        ("preparing: images, teacher, plan", before, "s"),
        *((name, seconds, "s") for name, seconds in phases.items()),
        ("processor seconds that the report tells", sum(timings["cpu_seconds"].values()), "processor s"),
        ("the report's own bound", timings["makespan_lower_bound_seconds"], "s"),
    ]
    found = [harness.Figure(name=name, value=value, unit=unit) for name, value, unit in values]
    found.append(harness.Figure(name="run / bound", value=warm.seconds / least, unit="ratio", bar=MAX_RATIO))
    # Without starts of processes and waiting, and little changed by what else the machine does.
    phases_cpu = sum(seconds for name, seconds in timings["cpu_seconds"].items() if name != "teacher")
    found.append(
        harness.Figure(
            name="processor seconds of dump, train and reduce / bare",
            value=phases_cpu / sum(pieces.values()),
            unit="ratio",
        )
    )
    if cold_start_seconds is not None:
        found.append(
            harness.Figure(
                name="what starting a Ray of its own adds",
                value=cold_start_seconds,
                unit="s",
                bar=MAX_COLD_START_SECONDS,
            )
        )
    return found


def measured_bare(job_file: str, settings: Sequence[str], cache: str) -> dict[str, float]:
    """Processor seconds of a job's pieces as bare loops in this process, once everything is loaded."""
    from dcq_ray.jobfile import load_job

    job = load_job(job_file, overrides=[*settings, f"storage.cache_dir={cache}"], environment=os.environ)
    opened = bare.opened(job, str(Path(job_file).resolve().parent))
    watch = bare.Stopwatch()
    bare.whole_run(opened, watch)
    return watch.seconds


def _set(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 1 where the bar is missed."""
    parser = harness.arguments_parser(__doc__, job=DEFAULT_JOB)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-cold", action="store_true", help="leave out the start of a Ray")
    parser.add_argument("--bare", metavar="CACHE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bare:
        print(json.dumps(measured_bare(options.job, options.settings, options.bare)))
        return 0
    import ray

    begun = harness.begin(__file__, arguments)
    ray.init(address="local", num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        address = ray.get_runtime_context().gcs_address
        # Files are in the page cache, and Ray's first workers there, before anything is measured.
        run(options.job, [*SMALL, *options.settings], address)
        bares, warm = [], []
        for _ in range(options.repeats):
            bares.append(bare_pieces(options.job, options.settings, options.workers))
            warm.append(run(options.job, options.settings, address))
            print(
                f"bound {bound(bares[-1], options.workers):.1f} s, run {warm[-1].seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        small = [] if options.no_cold else [run(options.job, SMALL, address).seconds for _ in range(2)]
    finally:
        ray.shutdown()
    cold = [run(options.job, SMALL, "local").seconds for _ in small]
    cold_start = min(cold) - min(small) if small else None
    if len({found.sha256 for found in warm}) > 1:
        raise RuntimeError("the runs gave different students")
    pieces = min(bares, key=lambda found: bound(found, options.workers))
    best = min(warm, key=lambda found: found.seconds)
    for name, seconds in pieces.items():
        print(f"{name:12} {seconds:6.1f} processor s")
    table = figures(pieces, options.workers, best, cold_start)
    return harness.conclude(
        begun,
        "limit",
        f"`dcq-ray run` of {Path(options.job).name} on {options.workers} workers beside bare loops of the same work. "
        f"Student {best.sha256[:12]}.",
        table,
        kept=not options.no_keep,
    )


if __name__ == "__main__":
    sys.exit(main())
