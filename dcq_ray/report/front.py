"""What a search found, as a table and a plot: the uniform networks, the Pareto front, and the chosen combination."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dcq_ray.report.plots import front_plot

if TYPE_CHECKING:
    # Not at run time: it loads torch, which a run with nothing to do is to be told without.
    from dcq_ray.search import Candidate, Searched

FRONT_COLUMNS = ("network", "bytes", "divergence, predicted", "held-out score", "sections")


def front_rows(searched: Searched) -> list[tuple[str, ...]]:
    """Rows of FRONT_COLUMNS; the chosen one comes last."""
    found = [("uniform", one) for one in searched.uniform] + [("front", one) for one in searched.front]
    return [_row(name, one) for name, one in (*found, ("chosen", searched.chosen))]


def front_caption(searched: Searched) -> str:
    """What was asked for, and how far predictions hold."""
    if searched.budget_bytes is not None:
        asked = f"within {searched.budget_bytes:,} bytes"
    else:
        asked = f"that loses at most {100 * (searched.max_drop or 0.0):g} points"
    told = f"The last search, for a network {asked}: {searched.num_on_front} combinations on the front"
    if searched.num_looked_at is not None:
        told += f"; chosen among {searched.num_looked_at} by their held-out score, which flatters the best of them"
    if searched.rank_correlation is None:
        return told
    return f"{told}; rank correlation of the predicted and the measured order of those shown: {searched.rank_correlation:.2f}"


def searched_plot(searched: Searched) -> str:
    """Held-out scores over bytes, as inline SVG."""
    series = {"uniform": searched.uniform, "front": searched.front, "chosen": (searched.chosen,)}
    return front_plot({name: [(one.num_bytes, one.score) for one in found] for name, found in series.items()})


def print_front(searched: Searched, console: Console) -> None:
    """Print the table, and how far predictions hold."""
    table = Table(*FRONT_COLUMNS, box=None, pad_edge=False)
    for row in front_rows(searched):
        table.add_row(*row, style="bold" if row[0] == "chosen" else "")
    console.print(table)
    console.print(front_caption(searched), style="dim")


def _row(name: str, found: Candidate) -> tuple[str, ...]:
    cells = (f"{found.num_bytes:,}", f"{found.predicted_divergence:.4f}", f"{100 * found.score:.2f} %")
    return (name, *cells, " ".join(found.options))
