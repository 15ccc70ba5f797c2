"""The main job, measured: the quick start by the outer clock, and LeNet on MNIST at 1 bit beside its rival.

    python tests/benchmarks/main_job.py            # MNIST needs the data folder that DCQ_DATA names

Every run starts from an empty run directory and an empty cache; a Markdown table goes to standard output.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_job(job: str, *options: str) -> tuple[dict[str, Any], float]:
    """The report of a fresh run of a job, and its seconds by the outer clock."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dcq_ray", "run", job, "--run-dir", f"{folder}/run", "--address", "local"]
        started = time.monotonic()
        subprocess.run(
            [*command, "--set", f"storage.cache_dir={folder}/cache", *options],
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - started
        report: dict[str, Any] = json.loads(Path(folder, "run", "report.json").read_text())
    return report, seconds


def percent(fraction: float) -> str:
    """A fraction as percent."""
    return f"{100 * fraction:.2f} %"


def main() -> None:
    """Run both jobs and print their tables."""
    quick, seconds = run_job("jobs/quickstart.yaml")
    versions = ", ".join(f"{name} {version}" for name, version in quick["versions"].items())
    print(f"{os.cpu_count()} cores, {platform.machine()}; {versions}\n")
    print("| quick start | |\n| --- | --- |")
    print(f"| wall time, Ray's start included | {seconds:.0f} s |")
    print(f"| teacher | {percent(quick['teacher']['top1'])} |")
    print(f"| untrained student | {percent(quick['untrained_top1'])} |")
    print(
        f"| stitched student, {len(quick['sections'])} sections | {percent(quick['student']['top1'])} |\n", flush=True
    )

    mnist, seconds = run_job("jobs/mnist-lenet-w1.yaml", "--baseline")
    rival = mnist["baseline"]
    closed = mnist["gap_closed"]
    print("| MNIST, LeNet, 1 bit | top-1, 10,000 test images | processor s |\n| --- | --- | --- |")
    print(f"| teacher | {percent(mnist['teacher']['top1'])} | |")
    print(f"| untrained student | {percent(mnist['untrained_top1'])} | |")
    rates = ", ".join(f"{rate:g}" for rate in rival["tried_lrs"])
    print(
        f"| end-to-end DoReFa, best of lr {rates}: {rival['lr']:g} | {percent(rival['top1'])} | {rival['cpu_seconds']:.0f} |"
    )
    cpu = mnist["timings"]["cpu_seconds"]
    dcq_seconds = cpu["dump"] + cpu["train"] + cpu["reduce"]
    print(
        f"| DCQ stitched, {len(mnist['sections'])} sections | {percent(mnist['student']['top1'])} | {dcq_seconds:.0f} |"
    )
    print(f"| share of the gap closed | {'none to close' if closed is None else percent(closed)} | |")
    print(f"\nsample passes of each: {rival['num_sample_passes']:,}; all of it took {seconds:.0f} s")


if __name__ == "__main__":
    main()
