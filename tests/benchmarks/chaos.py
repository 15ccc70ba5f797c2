"""Runs on Ray nodes whose workers, nodes and drivers are killed at random moments: do they end, and with the same student?

    DCQ_DATA=… python tests/benchmarks/chaos.py [--kills 50] [--seed 0] [--kills-per-run 3] [--job FILE] [--only KIND…] [--apart]

An undisturbed run first, and another one at the end; between them runs with kills of one kind each, and some of all kinds:

task     kill -9 of a worker process that dumps, measures or stitches
actor    kill -9 of the process of a section's or the reducer's actor
raylet   kill -9 of a node's raylet, whose workers end with it; a new node takes its place
cut      a node is without network for 2 to 20 s, while its workers go on, and write, with --apart (root on Linux: every node has
         a network namespace of its own); without it SIGSTOP of its raylet stands for that. Ray here takes a node for dead that
         does not answer for about ten seconds
driver   kill -9 of `dcq-ray run`, then the same command again

Every run has folders of its own, so it begins with the dump. Seconds lost are by the clock, over the undisturbed runs, for each
kill of a run with kills of one kind. Exits with 1 where a run did not end well or its student is another one; then the folders of
such runs and of the first are kept. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from safetensors.torch import load_file

from dcq_ray.digests import tensors_sha256

if __package__:
    from .chaos_cluster import KINDS, Kill, Kind, Nodes, nodes
else:
    from chaos_cluster import KINDS, Kill, Kind, Nodes, nodes

MIXED = "mixed"
NUM_NODES = 4
SECONDS_BETWEEN_LOOKS = 0.2
MIN_RUN_LIMIT_SECONDS, TIMES_UNDISTURBED = 300.0, 10.0
DEFAULT_JOB = Path(__file__).with_name("chaos.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run gave."""

    kind: str
    """Of its kills; empty where it was left alone."""
    seconds: float
    killed: tuple[Kind, ...] = ()
    """The kills that were made; each hit a process or a node that worked for the run."""
    digest: str | None = None
    """Of the student's tensors; None where the run did not end well."""
    section_digests: tuple[str, ...] = ()
    """Of the tensors of each section as it was trained."""
    restarts: int = 0
    failure: str = ""
    seen: Mapping[Kind, tuple[float, ...]] = field(default_factory=dict)
    """When there was something to kill of each kind, in seconds after the start; of an undisturbed run."""


def draw_kills(kind: str, number: int, undisturbed: Run, generator: random.Random) -> tuple[Kill, ...]:
    """So many kills of a kind (or of all kinds), at moments at which the undisturbed run had something to kill, in order."""
    kinds = [generator.choice(KINDS) if kind == MIXED else cast("Kind", kind) for _ in range(number)]
    kills = [Kill(kind=drawn, seconds=generator.choice(undisturbed.seen[drawn])) for drawn in kinds]
    return tuple(sorted(kills, key=lambda kill: kill.seconds))


def run_once(
    job: Path, folder: Path, cluster: Nodes, *, kind: str, kills: Sequence[Kill], limit_seconds: float, seed: int
) -> Run:
    """Run a job in a new folder as a process of its own, and make the kills; a killed driver is started again at once."""
    generator = random.Random(seed)
    folder.mkdir()
    command = [sys.executable, "-m", "dcq_ray", "run", str(job), "--address", cluster.address, "--log-format", "json"]
    command += ["--run-dir", str(folder / "run"), "--set", f"storage.cache_dir={folder / 'cache'}"]
    pending = list(kills)
    killed: list[Kind] = []
    seen: dict[Kind, list[float]] = {name: [] for name in KINDS}
    cluster.settle()
    started = time.monotonic()
    with (folder / "log.txt").open("ab") as log:

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, stdout=log, stderr=log)

        driver = start()
        try:
            while driver.poll() is None:
                elapsed = time.monotonic() - started
                if elapsed > limit_seconds:
                    return Run(
                        kind=kind, seconds=elapsed, killed=tuple(killed), failure=f"no end after {elapsed:.0f} s"
                    )
                cluster.mend()
                if not kills:
                    seen["driver"].append(elapsed)
                    for name, victims in cluster.victims().items():
                        if victims:
                            seen[name].append(elapsed)
                if pending and elapsed >= pending[0].seconds:
                    if pending[0].kind == "driver":
                        driver.kill()
                        driver.wait()
                        hit: str | None = "dcq-ray run"
                        driver = start()
                    else:
                        hit = cluster.strike(pending[0].kind, generator)
                    if hit is not None:
                        killed.append(pending.pop(0).kind)
                        print(f"    {elapsed:5.1f} s: {killed[-1]}: {hit}", flush=True)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            driver.kill()
            driver.wait()
    seconds = time.monotonic() - started
    if driver.returncode != 0:
        told = f"exit code {driver.returncode}: " + "; ".join((folder / "log.txt").read_text().splitlines()[-3:])
        return Run(kind=kind, seconds=seconds, killed=tuple(killed), failure=told)
    report = json.loads((folder / "run" / "report.json").read_text())
    return Run(
        kind=kind,
        seconds=seconds,
        killed=tuple(killed),
        digest=student_digest(folder / "run" / "student.safetensors"),
        section_digests=tuple(
            json.loads(path.read_text())["weights_sha256"]
            for path in sorted((folder / "run" / "sections").glob("*/result.json"))
        ),
        restarts=sum(section["restarts"] for section in report["sections"]),
        seen={name: tuple(moments) for name, moments in seen.items()},
    )


def student_digest(path: Path) -> str:
    """The digest of a student's tensors, from its file."""
    return tensors_sha256(load_file(path))


def difference(first: Run, run: Run) -> str:
    """Whether a run's student is the first one's, in words."""
    if run.digest == first.digest:
        return "the same student"
    if len(first.section_digests) != len(run.section_digests):
        return f"ANOTHER STUDENT, of {len(run.section_digests)} sections"
    pairs = zip(first.section_digests, run.section_digests, strict=True)
    differing = [str(index) for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    return f"ANOTHER STUDENT, sections that differ: {', '.join(differing) or 'none'}"


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs gave, all together and by the kind of their kills; the first one was left alone."""
    alone = [run for run in runs if not run.kind]
    undisturbed_seconds = statistics.mean(run.seconds for run in alone)
    rows: dict[str, dict[str, Any]] = {}
    kinds = [kind for kind in (*KINDS, MIXED) if any(run.kind == kind for run in runs)]
    for kind in kinds:
        of_kind = [run for run in runs if run.kind == kind]
        lost = [(run.seconds - undisturbed_seconds) / len(run.killed) for run in of_kind if run.killed and run.digest]
        rows[kind] = {
            "runs": len(of_kind),
            "kills": sum(len(run.killed) for run in of_kind),
            "restarts": sum(run.restarts for run in of_kind),
            "seconds_lost_per_kill_median": round(statistics.median(lost), 1) if lost else None,
            "seconds_lost_per_kill_most": round(max(lost), 1) if lost else None,
            "failed": sum(run.digest is None for run in of_kind),
            "differing": sum(run.digest not in (None, runs[0].digest) for run in of_kind),
        }
    return {
        "kills": sum(len(run.killed) for run in runs),
        "kills_by_kind": {kind: sum(run.killed.count(kind) for run in runs) for kind in KINDS},
        "runs": len(runs),
        "undisturbed_seconds": [round(run.seconds, 1) for run in alone],
        "failed": sum(run.digest is None for run in runs),
        "differing": sum(run.digest not in (None, runs[0].digest) for run in runs),
        "kinds": rows,
    }


def table(found: Mapping[str, Any]) -> str:
    """The rows of a summary in Markdown."""
    lines = ["| kills of | runs | kills | restarts of sections | s lost a kill, median (most) | same student |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for kind, row in found["kinds"].items():
        same = row["runs"] - row["failed"] - row["differing"]
        lost = f"{row['seconds_lost_per_kill_median']} ({row['seconds_lost_per_kill_most']})"
        lines.append(
            f"| {kind} | {row['runs']} | {row['kills']} | {row['restarts']} | {lost} | {same} of {row['runs']} |"
        )
    return "\n".join(lines)


def disturb(root: Path, cluster: Nodes, options: argparse.Namespace, runs: list[Run]) -> None:
    """Add all runs: one left alone, those with kills until there were enough of them, and another one left alone."""

    def one(kind: str, kills: Sequence[Kill]) -> Run:
        number = len(runs)
        print(f"run {number}: {f'{len(kills)} kills: {kind}' if kills else 'left alone'}", flush=True)
        limit = max(MIN_RUN_LIMIT_SECONDS, TIMES_UNDISTURBED * (runs[0].seconds if runs else 0.0))
        folder = root / f"run-{number}"
        seed = options.seed * 1000 + number
        run = run_once(options.job, folder, cluster, kind=kind, kills=kills, limit_seconds=limit, seed=seed)
        runs.append(run)
        outcome = run.failure or difference(runs[0], run)
        print(f"run {number}: {run.seconds:.1f} s, {run.restarts} restarts of sections, {outcome}", flush=True)
        if number and run.digest is not None and run.digest == runs[0].digest:
            shutil.rmtree(folder)
        return run

    generator = random.Random(options.seed)
    undisturbed = one("", ())
    if undisturbed.digest is None:
        return
    kinds = [*options.only] or [*KINDS, MIXED]
    num_left = options.kills
    while num_left > 0:
        kind = kinds[(len(runs) - 1) % len(kinds)]
        kills = draw_kills(kind, min(options.kills_per_run, num_left), undisturbed, generator)
        run = one(kind, kills)
        # A run that ended before its last kill counts for those that were made; one that made none counts for one.
        num_left -= max(1, len(run.killed))
    one("", ())


def stopped(_signal: int, _frame: object) -> NoReturn:
    """SIGTERM's handler: ends as Ctrl-C does, so that all processes are ended first."""
    raise KeyboardInterrupt


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="draws kinds, moments and victims")
    parser.add_argument("--kills-per-run", type=int, default=3, choices=[1, 2, 3], help="Ray tries a task four times")
    parser.add_argument("--job", type=Path, default=DEFAULT_JOB, help="default: ResNet-20 on 1,024 images, 4 sections")
    parser.add_argument("--only", nargs="+", choices=[*KINDS, MIXED], default=[], help="kinds of kills; default: all")
    parser.add_argument("--apart", action="store_true", help="nodes in network namespaces of their own; needs root")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run and print."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, stopped)
    started = time.monotonic()
    # Ray's sockets have paths of at most 107 characters.
    root = Path(tempfile.mkdtemp(prefix="dcq-chaos-", dir="/tmp"))
    runs: list[Run] = []
    interrupted = False
    try:
        with nodes(root, NUM_NODES, apart=options.apart) as cluster:
            disturb(root, cluster, options, runs)
    except KeyboardInterrupt:
        # What was finished until then is told.
        interrupted = True
    finally:
        went_wrong = any(run.digest is None or run.digest != runs[0].digest for run in runs)
        if not went_wrong:
            shutil.rmtree(root, ignore_errors=True)
    if not runs:
        return 130
    found = summary(runs)
    if went_wrong:
        print(f"kept: {root}", file=sys.stderr)
    print(
        f"\n{os.cpu_count()} cores, {NUM_NODES} nodes; undisturbed: {found['undisturbed_seconds']} s\n\n{table(found)}\n"
    )
    print(json.dumps({**found, "seed": options.seed, "seconds": round(time.monotonic() - started)}))
    if went_wrong:
        return 1
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
