"""The batch behind the paper's table: every job and seed, DCQ at three learning rates and its rivals, to be interrupted at will.

    python tests/benchmarks/paper_table.py                                   # all jobs whose data is at hand, into runs/paper
    python tests/benchmarks/paper_table.py --jobs 'lenet-*' --seeds 0 1 2 --set train.epochs=1 --workers 2
    python -m tests.benchmarks.paper_page runs/paper                         # what is finished, as a page

A cell is a job, a seed and the overrides. Its runs lie in ROOT/<job>/seed-<seed>/: `stitched-x0.3`, `-x1`, `-x3` (the factor of
the job's learning rate), and `recipe-…` with the recipe's settings. Rivals train in the x1 runs, since they take the same three
factors of the job's rate themselves. Run it again to resume: a finished run is skipped, an interrupted one goes on where it was.
A run that fails leaves its message in <run>.failed, the batch goes on, and ends with exit code 1.

Each cell has a cache of its own, which its x1 run fills, so that every cell pays for its dump; it is removed when all is done.
A teacher is fitted before, once for the cells that share it, and no cell pays for it.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dcq_ray.digests import json_sha256
from dcq_ray.errors import JobError
from dcq_ray.jobfile import load_job, parse_job
from dcq_ray.spec import Job

FOLDER = Path(__file__).parents[2] / "jobs" / "paper"
AT_HAND = ("*-mnist-*", "*-cifar10-*")
# The job's own rate first: it pays for the dump, and rivals stand beside it.
FACTORS = (1.0, 0.3, 3.0)
SEVERAL_SEEDS = (0, 1, 2)
NETWORKS_OF_SEVERAL_SEEDS = ("lenet", "resnet20")
RECIPE = ("reduce.polish_epochs=1",)
NOT_POLISHED = ("reduce.polish_epochs=0",)
BUDGETS = ("passes", "cpu-seconds")
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
MISSED_GATE = 3
MAX_MESSAGE_CHARACTERS = 4000
# What a run leaves that its polished sister goes on from.
SHARED_WITH_RECIPE = ("sections", "dump.json", "test-scores.json")

Settings = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for in every cell."""

    root: Path
    settings: Settings = ()
    recipe: Settings = RECIPE
    """Empty: no runs with the recipe."""
    methods: tuple[str, ...] = ("dorefa",)
    budgets: tuple[str, ...] = BUDGETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A job file at one seed."""

    job_file: Path
    seed: int
    folder: Path
    settings: Settings

    def settings_with_cache(self, cache: Path | None = None) -> Settings:
        """The overrides of its commands; its own cache where none is given."""
        return (*self.settings, f"storage.cache_dir={_quoted(cache or self.folder / 'cache')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of a cell."""

    command: Literal["run", "baseline"]
    run_dir: Path
    settings: Settings
    goes_on_from: Path | None = None
    """A run whose sections are taken over, where its directory is there and this one's is not."""
    method: str = ""
    budget: str = ""

    @property
    def name(self) -> str:
        """What the log and the file of a failure call it."""
        return "-".join(part for part in (self.run_dir.name, self.method, self.budget) if part)


class Batch:
    """The processes that run now, so that an interruption ends them all."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def run(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        """The exit code and the two outputs of a `dcq-ray` command; raises KeyboardInterrupt where it was interrupted."""
        command = [sys.executable, "-m", "dcq_ray", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._lock:
            if self.stopping.is_set():
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            self._running.add(process)
        try:
            output, errors = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode in INTERRUPTED:
            raise KeyboardInterrupt
        return process.returncode, output, errors

    def stop(self) -> None:
        """Ask every running command to keep what it has and end."""
        self.stopping.set()
        with self._lock:
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()


# -- what there is to do -----------------------------------------------------------------------------------------------


def cells(job_files: Sequence[Path], seeds: Sequence[int] | None, plan: Plan) -> list[Cell]:
    """A cell per job file and seed; the networks of several seeds have three, the others one, unless `seeds` are given."""
    suffix = "+".join(("", *(re.sub(r"[^\w.=-]+", "_", setting) for setting in plan.settings)))
    found = []
    for job_file in job_files:
        several = job_file.stem.split("-")[0] in NETWORKS_OF_SEVERAL_SEEDS
        for seed in seeds or (SEVERAL_SEEDS if several else SEVERAL_SEEDS[:1]):
            folder = plan.root / f"{job_file.stem}{suffix}" / f"seed-{seed}"
            found.append(Cell(job_file=job_file, seed=seed, folder=folder, settings=(*plan.settings, f"seed={seed}")))
    return found


def steps(cell: Cell, plan: Plan) -> Iterator[Step]:
    """The commands of a cell in order."""
    lr = load_job(str(cell.job_file), overrides=cell.settings, environment=os.environ).train.lr
    rivals = [(method, budget) for method in plan.methods for budget in plan.budgets]
    for variant, own in (("stitched", NOT_POLISHED), ("recipe", plan.recipe)):
        if not own:
            continue
        for factor in FACTORS:
            name = f"x{factor:g}"
            run_dir = cell.folder / f"{variant}-{name}"
            settings = (
                *cell.settings_with_cache(),
                *own,
                f"train.lr={factor * lr!r}",
                f"storage.run_dir={_quoted(run_dir)}",
            )
            origin = None if variant == "stitched" else cell.folder / f"stitched-{name}"
            yield Step(command="run", run_dir=run_dir, settings=settings, goes_on_from=origin)
            if factor == 1:
                for method, budget in rivals:
                    # Passes are the same whatever is done after stitching; seconds are not.
                    if variant == "stitched" or budget == "cpu-seconds":
                        yield Step(command="baseline", run_dir=run_dir, settings=settings, method=method, budget=budget)


def is_done(step: Step, cell: Cell) -> bool:
    """Whether the run directory holds what the step makes, made for this very job."""
    try:
        report = json.loads((step.run_dir / "report.json").read_text())
        kept = parse_job((step.run_dir / "job.yaml").read_bytes(), source=str(step.run_dir))
    except (OSError, ValueError, JobError):
        return False
    if report.get("status") != "succeeded" or kept != _job(step, cell):
        return False
    rivals = {(found["method"], found["budget"]) for found in report.get("baselines", ())}
    return step.command == "run" or (step.method, step.budget) in rivals


def _job(step: Step, cell: Cell) -> Job:
    return load_job(str(cell.job_file), overrides=step.settings, environment=os.environ)


def _quoted(path: Path) -> str:
    return json.dumps(str(path)).replace("${", "$${")


# -- doing it ----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, plan: Plan, batch: Batch) -> int:
    """Do what is missing in a cell; the number of steps that failed."""
    try:
        missing = [step for step in steps(cell, plan) if not is_done(step, cell)]
    except JobError as error:
        return _failed(cell, "job", str(error))
    num_failed = 0
    if missing:
        message = prepare_cache(cell, plan, batch)
        if message is not None:
            return _failed(cell, "teacher", message)
        (cell.folder / "teacher.failed").unlink(missing_ok=True)
        for step in missing:
            message = run_step(step, cell, batch)
            if message is None:
                (cell.folder / f"{step.name}.failed").unlink(missing_ok=True)
            else:
                num_failed += _failed(cell, step.name, message)
    if not num_failed:
        # What failed may need its boundaries again, and must not pay for another dump.
        shutil.rmtree(cell.folder / "cache", ignore_errors=True)
    return num_failed


def run_step(step: Step, cell: Cell, batch: Batch) -> str | None:
    """Do a step; the message where it failed."""
    started = time.monotonic()
    if step.goes_on_from is not None and step.goes_on_from.is_dir() and not step.run_dir.exists():
        take_over(step.goes_on_from, step.run_dir)
    own = ("--address", "none") if step.command == "run" else ("--method", step.method, "--budget", step.budget)
    overrides = [part for setting in step.settings for part in ("--set", setting)]
    code, _, errors = batch.run([step.command, str(cell.job_file), *own, "--log-format", "json", *overrides])
    if code not in (0, MISSED_GATE):
        return told(errors)
    _say(f"{_title(cell)} {step.name}: {time.monotonic() - started:.0f} s{_score(step)}")
    return None


def take_over(origin: Path, run_dir: Path) -> None:
    """Begin a run directory with the sections of another run: those whose task is the same are not trained again."""
    partial = run_dir.with_name(f"{run_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in SHARED_WITH_RECIPE:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, partial / name)
        elif (origin / name).exists():
            shutil.copy2(origin / name, partial / name)
    partial.rename(run_dir)


def prepare_cache(cell: Cell, plan: Plan, batch: Batch) -> str | None:
    """Fit the job's teacher, where it asks for that, and bring it into the cell's cache; the message where it failed."""
    job = load_job(str(cell.job_file), overrides=cell.settings, environment=os.environ)
    if job.teacher.fit is None:
        return None
    identity = [job.teacher.model_dump(mode="json"), job.data.model_dump(mode="json"), job.seed, job.train.num_threads]
    fitted = plan.root / "teachers" / json_sha256(identity)[:16]
    with batch.locks[fitted.name]:
        marker = fitted / "done"
        if not marker.exists():
            started = time.monotonic()
            overrides = [part for setting in cell.settings_with_cache(fitted / "cache") for part in ("--set", setting)]
            code, output, errors = batch.run(["teacher", str(cell.job_file), "--log-format", "json", *overrides])
            if code:
                return told(errors)
            marker.write_text(output)
            scored = json.loads(output.splitlines()[-1])["held_out_top1"]
            _say(f"{_title(cell)} teacher: {time.monotonic() - started:.0f} s, held-out {100 * scored:.2f} %")
        shutil.copytree(fitted / "cache", cell.folder / "cache", dirs_exist_ok=True)
    return None


def told(errors: str) -> str:
    """The error's paragraph out of what a command wrote to standard error, where progress is lines of JSON."""
    lines = [line for line in errors.splitlines() if not line.startswith("{")]
    start = next((index for index in range(len(lines) - 1, -1, -1) if lines[index].startswith("dcq-ray: ")), 0)
    return "\n".join(lines[start:])[-MAX_MESSAGE_CHARACTERS:] or "it ended without a word"


def _failed(cell: Cell, name: str, message: str) -> int:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / f"{name}.failed").write_text(f"{message}\n")
    _say(f"{_title(cell)} {name} FAILED: {message}")
    return 1


def _score(step: Step) -> str:
    report: dict[str, Any] = json.loads((step.run_dir / "report.json").read_text())
    kinds = {(found["method"], found["budget"]): found for found in report.get("baselines", ())}
    found = report["validation"]["top1"] if step.command == "run" else None
    if step.command == "baseline" and (step.method, step.budget) in kinds:
        found = kinds[step.method, step.budget]["held_out_top1"]
    return "" if found is None else f", held-out {100 * found:.2f} %"


def _title(cell: Cell) -> str:
    return f"{cell.job_file.stem} seed {cell.seed}"


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batch: 0 done, 1 something failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Run the paper's jobs beside their rivals; again to resume.")
    parser.add_argument(
        "--jobs", nargs="+", default=AT_HAND, metavar="PATTERN", help="of the names in jobs/paper, or files"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2 for LeNet and ResNet-20, 0 for the others")
    parser.add_argument("--root", type=Path, default=Path("runs/paper"))
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=c", help="for every run")
    parser.add_argument(
        "--recipe", action="append", metavar="a.b=c", help=f"of the second DCQ; default: {' '.join(RECIPE)}"
    )
    parser.add_argument("--no-recipe", action="store_true", help="leave the second DCQ out")
    parser.add_argument("--methods", nargs="*", default=["dorefa"], metavar="METHOD", help="rivals; default: dorefa")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, choices=BUDGETS)
    parser.add_argument("--workers", type=int, default=1, help="cells at once, each on one core")
    options = parser.parse_args(arguments)
    named = [
        *(
            path
            for path in sorted(FOLDER.glob("*.yaml"))
            if any(fnmatch.fnmatch(path.stem, name) for name in options.jobs)
        ),
        *(Path(name) for name in options.jobs if name.endswith(".yaml")),
    ]
    if not named:
        parser.error(f"no job of {FOLDER} fits {' '.join(options.jobs)}")
    plan = Plan(
        root=options.root.resolve(),
        settings=tuple(options.settings),
        recipe=() if options.no_recipe else tuple(options.recipe or RECIPE),
        methods=tuple(options.methods),
        budgets=tuple(options.budgets),
    )
    return run_batch(cells(named, options.seeds, plan), plan, Batch(), num_workers=options.workers)


def run_batch(work: Sequence[Cell], plan: Plan, batch: Batch, *, num_workers: int = 1) -> int:
    """Run cells, so many at once; see `main`."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(run_cell, cell, plan, batch) for cell in work]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                num_failed = sum(future.result() for future in futures if future.done())
            except KeyboardInterrupt:
                batch.stop()
                pool.shutdown(cancel_futures=True)
                _say("interrupted; the same command again goes on from here")
                return INTERRUPTED[0]
    finally:
        signal.signal(signal.SIGTERM, earlier)
    _say(f"{len(work)} cells, {num_failed} failures")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
