"""The paper's table as a Markdown page: finished runs, and those kept before -> `jobs/paper/README.md` and `results.json`.

python -m tests.benchmarks.paper_page runs/paper [--output jobs/paper/README.md] [--kept jobs/paper/results.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .paper_kept import merged, read_kept, write_kept
from .paper_results import VARIANTS, Network, Row, Run, Variant, compare, read_runs, table_rows

TITLES: dict[Variant, str] = {"stitched": "stitched", "recipe": "default recipe"}
BUDGETS = {"passes": "equal passes", "cpu-seconds": "equal seconds"}
METHODS = {
    "dorefa": "DoReFa",
    "distill": "end-to-end distillation",
    "hints": "hints, then distillation",
    "sequential": "sequential",
}
ABSENT = "-"
ROW_COLUMNS = ("network", "data", "weights", "images x epochs")
ACCURACY_COLUMNS = (
    *(*ROW_COLUMNS, "sections", "n", "teacher", "untrained", "DoReFa, equal passes", "DoReFa, equal seconds"),
    *("DCQ stitched", "DCQ default recipe", "gap closed"),
)
COMPARISON_COLUMNS = (
    *(*ROW_COLUMNS, "DCQ", "rival", "n", "rival loses", "DCQ loses", "share left", "difference"),
    *("paired standard error", "bar"),
)
COST_COLUMNS = (*ROW_COLUMNS, "trained", "switches", "learning rate, by seed", "tried", "processor s")
LITERATURE = (
    ("ResNet-20", "CIFAR-10", "W1A32", "90.8", "IR-Net, teacher 92.1"),
    ("ResNet-20", "CIFAR-10", "W2A2", "90.96", "APoT, teacher 92.96"),
    ("ResNet-18", "ImageNet", "W2A32", "68.0", "LQ-Nets"),
    ("ResNet-18", "ImageNet", "W2A2", "69.4", "N2UQ"),
    ("ResNet-18", "ImageNet", "W4A4", "72.9", "N2UQ"),
)


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    rows = table_rows(runs)
    days = sorted({run.report["started_at"][:10] for run in runs})
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.report["versions"].items():
            versions.setdefault(name, set()).add(version)
    told = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    parts = [
        "# The paper's networks, measured",
        "Written by `tests/benchmarks/paper_page.py` from the runs' `report.json` files, of which `results.json` keeps what is "
        "shown; `tests/benchmarks/paper_table.py` makes the runs. Do not edit.",
        f"Runs of {' to '.join(dict.fromkeys((days[0], days[-1])))}; {told}.",
        "Top-1 on test images in percent, mean ± standard deviation over n seeds. Learning rates of both sides are the best of the "
        "same three factors of the job's own rate, and epochs of rivals the best, on held-out images; test images are touched "
        "once a run. Images x epochs: what every section trains on, and every rival of equal passes.",
        "## Accuracy",
        table(
            ACCURACY_COLUMNS,
            map(_accuracy, rows),
        ),
        "DoReFa at equal seconds has the processor seconds of the stitched run. Gap closed: of stitched against DoReFa at equal "
        "passes, (stitched - DoReFa) / (teacher - DoReFa) of the means.",
        "## DCQ against its rivals",
        table(
            COMPARISON_COLUMNS,
            (line for row in rows for line in _comparisons(row)),
        ),
        "Points. Share left: (teacher - DCQ) / (teacher - rival). A difference within two paired standard errors is none; one seed "
        "has no spread, and nothing is claimed of it. Bar: where DoReFa loses 2 points or more, a share left of at most 0.15 "
        "stitched at equal passes, and of 0.05 with the default recipe at equal seconds, beyond two paired standard errors; "
        "where it loses less, DCQ is not worse beyond two.",
        "## Costs",
        table(
            COST_COLUMNS,
            (line for row in rows for line in _costs(row)),
        ),
        "Processor seconds of one training at the chosen rate, mean over seeds: DCQ's with its dump, validation and every other "
        "phase; the fit of a teacher is no one's.",
        "## From the literature",
        table(
            ("network", "data", "bits", "top-1", "source"),
            ((name, data, bits, top1, f"literature: {who}") for name, data, bits, top1, who in LITERATURE),
        ),
        "Others' numbers, on the original data, from other teachers and with other budgets: to stand beside, not to compare.",
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def mean_and_spread(fractions: Sequence[float]) -> str:
    """Percent as `mean ± standard deviation` over seeds; without the latter for one seed, a dash for none."""
    if not fractions:
        return ABSENT
    percents = [100 * fraction for fraction in fractions]
    spread = f" ± {statistics.stdev(percents):.2f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):.2f}{spread}"


def _accuracy(row: Row) -> tuple[str, ...]:
    comparison = compare(row, "stitched", "dorefa", "passes")
    share = None if comparison is None else comparison.share_left
    return (
        *_names(row),
        str(row.num_sections),
        str(len(row.seeds)),
        mean_and_spread([result.teacher for result in row.seeds]),
        mean_and_spread([result.untrained for result in row.seeds]),
        *(
            mean_and_spread([found.top1 for found in _rivals(row, "stitched", "dorefa", budget)])
            for budget in ("passes", "cpu-seconds")
        ),
        *(mean_and_spread([found.top1 for found in _students(row, variant)]) for variant in VARIANTS),
        ABSENT if share is None else f"{100 * (1 - share):.0f} %",
    )


def _comparisons(row: Row) -> Iterator[tuple[str, ...]]:
    for variant, title in TITLES.items():
        for method, budget in _rival_kinds(row):
            found = compare(row, variant, method, budget)
            if found is not None:
                yield (
                    *_names(row),
                    title,
                    _rival_name(method, budget),
                    str(found.num_seeds),
                    f"{found.rival_loss:.2f}",
                    f"{found.student_loss:.2f}",
                    ABSENT if found.share_left is None else f"{found.share_left:.2f}",
                    "none" if found.is_none else f"{found.difference:+.2f}",
                    ABSENT if found.standard_error is None else f"{found.standard_error:.2f}",
                    {None: ABSENT, True: "reached", False: "missed"}[found.reached],
                )


def _costs(row: Row) -> Iterator[tuple[str, ...]]:
    for variant, title in TITLES.items():
        if found := _students(row, variant):
            yield (*_names(row), f"DCQ {title}", row.switches[variant], *_cost(found))
    for method, budget in _rival_kinds(row):
        for variant, title in TITLES.items():
            found = _rivals(row, variant, method, budget)
            if found and (budget != "passes" or variant == "stitched"):
                beside = "" if budget == "passes" else f" of {title}"
                yield (*_names(row), f"{_rival_name(method, budget)}{beside}", "", *_cost(found))


def _cost(found: Sequence[Network]) -> tuple[str, str, str]:
    tried = sorted({rate for network in found for rate in network.tried_lrs})
    return (
        ", ".join(f"{network.lr:g}" for network in found),
        ", ".join(f"{rate:g}" for rate in tried),
        f"{statistics.fmean(network.cpu_seconds for network in found):.0f}",
    )


def _names(row: Row) -> tuple[str, str, str, str]:
    return (row.network, row.data, row.weights, row.passes)


def _students(row: Row, variant: Variant) -> list[Network]:
    return [result.students[variant] for result in row.seeds if variant in result.students]


def _rivals(row: Row, variant: Variant, method: str, budget: str) -> list[Network]:
    return [
        result.rivals[variant, method, budget] for result in row.seeds if (variant, method, budget) in result.rivals
    ]


def _rival_kinds(row: Row) -> list[tuple[str, str]]:
    """(method, budget) of every rival of a row, DoReFa first."""
    found = {(method, budget) for result in row.seeds for _, method, budget in result.rivals}
    return sorted(found, key=lambda kind: (list(METHODS).index(kind[0]), list(BUDGETS).index(kind[1])))


def _rival_name(method: str, budget: str) -> str:
    return f"{METHODS[method]}, {BUDGETS[budget]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; 1 where there is no run."""
    parser = argparse.ArgumentParser(description="Write the page of the paper's networks from finished runs.")
    parser.add_argument("root", type=Path, help="the batch's folder")
    parser.add_argument("--output", type=Path, default=Path("jobs/paper/README.md"))
    parser.add_argument(
        "--kept", type=Path, default=Path("jobs/paper/results.json"), help="the runs of earlier batches"
    )
    options = parser.parse_args(arguments)
    runs = read_runs(options.root)
    if not runs:
        print(
            f"{options.root}: no finished run below it; make some with tests/benchmarks/paper_table.py", file=sys.stderr
        )
        return 1
    runs = merged(read_kept(options.kept), runs)
    write_kept(options.kept, runs)
    options.output.write_text(page(runs))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
