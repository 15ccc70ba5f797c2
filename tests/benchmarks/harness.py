"""Keeps what benchmarks measure: one JSON file, the page made from it, and the comparison of two such files.

    python -m tests.benchmarks.harness                    # writes tests/benchmarks/RESULTS.md from results.json
    python -m tests.benchmarks.harness compare A.json B.json

A benchmark calls `begin`, measures, and calls `conclude` with its figures, each with its unit and, where it has one, its bar. A
result says on which machine, with which versions, at which commit and under what load it was measured, so that it is not taken
for another's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcq_ray.digests import library_versions

FOLDER = Path(__file__).parent
RESULTS_FILE = FOLDER / "results.json"
PAGE_FILE = FOLDER / "RESULTS.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    """Such as `s`, `processor s`, `ratio`, `%`."""
    bar: float | None = None
    higher_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it is on the good side of its bar; None without one."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.higher_is_better else self.value <= self.bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one benchmark measured, and where."""

    benchmark: str
    title: str
    """What was measured on what, in one sentence."""
    command: str
    figures: tuple[Figure, ...]
    machine: str
    versions: dict[str, str]
    commit: str
    measured_on: str
    load: float
    """Processes that ran or waited to run, the mean of the minute before the measurement began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """How, when and under what load a script began to measure."""

    command: str
    at: datetime.datetime
    load: float


def arguments_parser(description: str | None, *, job: Path | None = None) -> argparse.ArgumentParser:
    """What all scripts take: whether to keep what they find, and where they measure a job, which, and its keys."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    if job is not None:
        parser.add_argument("job", nargs="?", default=str(job))
        parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=c")
    return parser


def begin(script: str, arguments: Sequence[str] | None) -> Begun:
    """Note what a result is to say of its beginning; `arguments` None: those of this process."""
    own = sys.argv[1:] if arguments is None else arguments
    return Begun(
        command=shlex.join(["python", f"tests/benchmarks/{Path(script).name}", *own]),
        at=datetime.datetime.now(datetime.UTC),
        load=os.getloadavg()[0],
    )


def conclude(begun: Begun, benchmark: str, title: str, figures: Sequence[Figure], *, kept: bool) -> int:
    """Print what was measured, keep it where it is to be kept, and give the exit code: 1 where a bar is missed."""
    found = result(begun, benchmark, title, figures)
    print(section(found), flush=True)
    if kept:
        keep(found)
    return int(any(figure.met is False for figure in figures))


def result(begun: Begun, benchmark: str, title: str, figures: Sequence[Figure]) -> Result:
    """The figures of a benchmark with where and when they were measured; raises ValueError where a name comes twice."""
    names = [figure.name for figure in figures]
    if len(set(names)) != len(names):
        raise ValueError(f"{benchmark}: figures of the same name: {sorted(names)}")
    return Result(
        benchmark=benchmark,
        title=title,
        command=begun.command,
        figures=tuple(figures),
        machine=machine(),
        versions=library_versions(),
        commit=commit(),
        measured_on=begun.at.date().isoformat(),
        load=round(begun.load, 1),
    )


def keep(found: Result, *, results_file: Path = RESULTS_FILE, page_file: Path = PAGE_FILE) -> None:
    """Put a result in the place of the benchmark's earlier one, and write the page anew."""
    results = read(results_file) if results_file.exists() else {}
    results[found.benchmark] = found
    document = {name: asdict(results[name]) for name in sorted(results)}
    results_file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    page_file.write_text(page(results))


def read(results_file: Path) -> dict[str, Result]:
    """The results of a file by benchmark."""
    document: dict[str, dict[str, Any]] = json.loads(results_file.read_text())
    return {
        name: Result(**{**content, "figures": tuple(Figure(**figure) for figure in content["figures"])})
        for name, content in document.items()
    }


def page(results: dict[str, Result]) -> str:
    """All results as Markdown."""
    parts = [
        "# Measured\n\n`results.json` beside this page holds the same figures; every script named here writes its own anew, and "
        "then this page.\n`python -m tests.benchmarks.harness compare A.json B.json` sets two such files side by side.\n"
    ]
    for name in sorted(results):
        parts.append(section(results[name]))
    return "\n".join(parts)


def section(found: Result) -> str:
    """One benchmark's heading, circumstances and table."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    lines = [
        f"## {found.benchmark}\n",
        f"{found.title}\n",
        f"`{found.command}`, {found.measured_on}, commit {found.commit}, {found.machine}, load {found.load:g} when it began; "
        f"{versions}\n",
        "| | | bar | |",
        "| --- | ---: | ---: | --- |",
        *(_row(figure) for figure in found.figures),
        "",
    ]
    return "\n".join(lines)


def compare(first: dict[str, Result], second: dict[str, Result]) -> str:
    """Every figure that both files have, with the second's ratio to the first's; then what only one of them has."""
    lines = ["| benchmark | figure | first | second | second / first |", "| --- | --- | ---: | ---: | ---: |"]
    alone = []
    for name in sorted(first.keys() | second.keys()):
        sides = [
            {} if name not in results else {figure.name: figure for figure in results[name].figures}
            for results in (first, second)
        ]
        for figure_name in dict.fromkeys([*sides[0], *sides[1]]):
            if figure_name not in sides[0] or figure_name not in sides[1]:
                alone.append(f"{name}: {figure_name}")
                continue
            old, new = sides[0][figure_name], sides[1][figure_name]
            ratio = f"{new.value / old.value:.2f}" if old.value else "-"
            lines.append(f"| {name} | {figure_name} | {told(old)} | {told(new)} | {ratio} |")
    if alone:
        lines.extend(["", f"In one of them only: {', '.join(alone)}."])
    return "\n".join(lines)


def told(figure: Figure) -> str:
    """A value with its unit, in three or four digits."""
    value = figure.value
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return digits if figure.unit == "ratio" else f"{digits} {figure.unit}"


def machine() -> str:
    """Cores that this process may use, architecture and processor."""
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    model = f", {names[0]}" if names else ""
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}{model}"


def commit() -> str:
    """The commit of the working tree; with a plus where the package's own files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=FOLDER,
        check=False,
    )
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", ":/dcq_ray"], capture_output=True, cwd=FOLDER, check=False
    )
    return done.stdout.strip() + ("+" if changed.returncode == 1 else "") if done.returncode == 0 else "unknown"


def _row(figure: Figure) -> str:
    bar, verdict = "", ""
    if figure.bar is not None:
        bar = f"{'≥' if figure.higher_is_better else '≤'} {figure.bar:g}"
        verdict = "met" if figure.met else "missed"
    return f"| {figure.name} | {told(figure)} | {bar} | {verdict} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page anew, or print the comparison of two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    comparing = commands.add_parser("compare", help="two files of results side by side")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        print(compare(read(options.first), read(options.second)))
    else:
        PAGE_FILE.write_text(page(read(RESULTS_FILE)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
