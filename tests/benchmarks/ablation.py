"""What each switch of a section's training is worth: runs of one job with and without it, over seeds, as a page.

    python tests/benchmarks/ablation.py --job jobs/paper/resnet20-cifar10-w1.yaml     # again to resume
    python -m tests.benchmarks.ablation --page-only                                   # what is finished, as a page

Scored on held-out images, which is where recipes are chosen: test images are not looked at. Runs lie in
ROOT/<job>/<cut>-<switches>/seed-<seed>/. Of the variant with all switches but streaming, cut finely, the one-after-the-other rival
is trained as well (`dcq-ray baseline --method sequential`): it shows what drift costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcq_ray.errors import JobError

if __package__:
    from .paper_page import table
    from .paper_results import NETWORKS, Run, read_runs, standard_error, switches
    from .paper_table import FOLDER, Batch, Cell, Step, is_done, run_step
else:
    from paper_page import table
    from paper_results import NETWORKS, Run, read_runs, standard_error, switches
    from paper_table import FOLDER, Batch, Cell, Step, is_done, run_step

START, AHEAD, STREAM = "train.start=fitted", "train.look_ahead=1", "train.inputs=student"
PLAIN = ("train.start=nearest", "train.look_ahead=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": PLAIN,
    "ahead": (PLAIN[0], AHEAD),
    "start": (START, PLAIN[1]),
    "start-ahead": (START, AHEAD),
    "ahead-stream": (PLAIN[0], AHEAD, STREAM),
    "start-ahead-stream": (START, AHEAD, STREAM),
}
CUTS = {"job": (), "fine": ("sections={every: block}",)}
# Short, so that a run takes about a minute on one core.
BUDGET = ("data.train_samples=2000", "train.batch_size=32", "data.held_out_samples=2000", "data.test_samples=100")
SEQUENTIAL = ("fine", "start-ahead")
COLUMNS = (
    *("network", "weights", "sections", "images x epochs", "trained", "n", "held-out top-1", "beside plain"),
    *("paired standard error", "training, processor s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One way to train, over seeds."""

    group: tuple[str, str, int, str]
    """Network, weights, number of sections, budget."""
    name: str
    scores: dict[int, float]
    """Held-out top-1 in percent, by seed."""
    cpu_seconds: tuple[float, ...]


def runs_to_do(job_file: Path, root: Path, seeds: Sequence[int], cuts: Sequence[str]) -> list[tuple[Cell, Step]]:
    """All runs in order: every variant of a seed before the next seed."""
    found = []
    for seed in seeds:
        for cut in cuts:
            for name, settings in VARIANTS.items():
                folder = root / job_file.stem / f"{cut}-{name}" / f"seed-{seed}"
                own = (*BUDGET, *CUTS[cut], *settings, f"seed={seed}")
                cache = f"storage.cache_dir={root / 'cache'}"
                all_settings = (*own, cache, f"storage.run_dir={folder}")
                cell = Cell(job_file=job_file, seed=seed, folder=folder, settings=own)
                found.append((cell, Step(command="run", run_dir=folder, settings=all_settings)))
                if (cut, name) == SEQUENTIAL:
                    rival = Step(
                        command="baseline",
                        run_dir=folder,
                        settings=all_settings,
                        method="sequential",
                        budget="passes",
                    )
                    found.append((cell, rival))
    return found


def lines(runs: Iterable[Run]) -> list[Line]:
    """Runs by what was trained and how; raises ValueError where a seed is there twice."""
    scores: dict[tuple[tuple[str, str, int, str], str], dict[int, float]] = {}
    costs: dict[tuple[tuple[str, str, int, str], str], list[float]] = {}

    def add(
        group: tuple[str, str, int, str], name: str, seed: int, score: float, cpu_seconds: float, path: str
    ) -> None:
        if seed in scores.setdefault((group, name), {}):
            raise ValueError(f"{path}: seed {seed} of `{name}` is there twice; keep other settings in another folder")
        scores[group, name][seed] = 100 * score
        costs.setdefault((group, name), []).append(cpu_seconds)

    for run in runs:
        job, report = run.job, run.report
        model = job["teacher"]["model"].rpartition(":")[2]
        weights = job["quantize"]["weights"]
        budget = f"{job['data']['train_samples']:,} x {job['train']['epochs']}"
        group = (
            NETWORKS.get(model, (model, ""))[0],
            f"{weights['scheme']}, {weights['bits']} bit",
            len(report["sections"]),
            budget,
        )
        top1, seed = report["validation"]["top1"], job["seed"]
        add(group, switches(job), seed, top1, report["timings"]["cpu_seconds"]["train"], run.path)
        for rival in report["baselines"]:
            if rival["method"] == "sequential":
                name = f"one section after the other ({switches(job)})"
                add(group, name, seed, rival["held_out_top1"], rival["cpu_seconds"], run.path)
    return [
        Line(group=group, name=name, scores=found, cpu_seconds=tuple(costs[group, name]))
        for (group, name), found in sorted(scores.items())
    ]


def page(runs: Sequence[Run]) -> str:
    """The page; differences are paired by seed."""
    found = lines(runs)
    plain = {line.group: line for line in found if line.name == "plain"}
    days = sorted({run.report["started_at"][:10] for run in runs})
    parts = [
        "# What each switch is worth",
        "Written by `tests/benchmarks/ablation.py` from the runs' `report.json` files. Do not edit.",
        f"Runs of {' to '.join(dict.fromkeys((days[0], days[-1])))}. Top-1 on held-out images in percent, mean ± standard "
        "deviation over n seeds; the teacher has seen most of these images in its training, so it scores more on them than on test "
        "images.",
        table(COLUMNS, (_cells(line, plain.get(line.group)) for line in found)),
        "Beside plain: the mean difference within seeds to sections trained alone, from the nearest levels, on the teacher's "
        "activations; a difference within two paired standard errors is none. One section after the other: each on the outputs of "
        "the trained sections before it, the best of three learning rates; it cannot be parallel.",
    ]
    return "\n\n".join(parts) + "\n"


def _cells(line: Line, plain: Line | None) -> tuple[str, ...]:
    network, weights, num_sections, budget = line.group
    scores = list(line.scores.values())
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    seeds = [] if plain is None or plain is line else sorted(line.scores.keys() & plain.scores.keys())
    differences = [line.scores[seed] - plain.scores[seed] for seed in seeds] if plain is not None else []
    error = standard_error(differences)
    return (
        *(network, weights, str(num_sections), budget, line.name, str(len(scores))),
        f"{statistics.fmean(scores):.2f}{spread}",
        f"{statistics.fmean(differences):+.2f}" if differences else "-",
        "-" if error is None else f"{error:.2f}",
        f"{statistics.fmean(line.cpu_seconds):.0f}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing, and write the page: 0 done, 1 something failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Measure what each switch of a section's training is worth.")
    parser.add_argument("--job", type=Path, default=FOLDER / "resnet20-cifar10-w1.yaml")
    parser.add_argument("--root", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cuts", nargs="+", choices=list(CUTS), default=list(CUTS))
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER / "ablation.md")
    options = parser.parse_args(arguments)
    num_failed = 0
    if not options.page_only:
        batch = Batch()
        try:
            for cell, step in runs_to_do(options.job, options.root.resolve(), options.seeds, options.cuts):
                if not is_done(step, cell):
                    message = run_step(step, cell, batch)
                    if message is not None:
                        num_failed += 1
                        print(f"{step.run_dir} FAILED: {message}", file=sys.stderr)
        except KeyboardInterrupt:
            return 130
        except JobError as error:
            print(error, file=sys.stderr)
            return 1
    runs = read_runs(options.root)
    if not runs:
        print(f"{options.root}: no finished run below it", file=sys.stderr)
        return 1
    options.output.write_text(page(runs))
    print(options.output)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
