"""The plots of a report as inline SVG, the same bytes for the same report."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dcq_ray.records import RunReport
from dcq_ray.report.style import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = tuple(SERIES)
# Stands for the page's text colour, which the page's style puts in its place.
INK = "#010203"
MAX_LEVEL_ROWS = 40


def loss_plot(report: RunReport) -> str:
    """Loss curves of all sections over the share of their steps."""
    figure, axes = _figure()
    for section in report.sections:
        points = [point for point in section.loss_curve if point.loss > 0]
        if points:
            last = points[-1].step
            color = COLORS[section.index % len(COLORS)]
            style = ("-", "--", ":", "-.")[section.index // len(COLORS) % 4]
            axes.plot(
                [p.step / last for p in points], [p.loss for p in points], style, color=color, label=str(section.index)
            )
    axes.set_yscale("log")
    axes.set_xlabel("share of the steps")
    axes.set_ylabel("loss")
    if report.sections:
        legend = axes.legend(
            title="section", frameon=False, ncols=max(1, len(report.sections) // 8 + 1), labelcolor=INK
        )
        legend.get_title().set_color(INK)
    return _svg(figure)


def error_plot(report: RunReport) -> str:
    """Relative error of every section alone, and of the stitched student at every boundary."""
    figure, axes = _figure()
    numbers = [section.index for section in report.sections]
    axes.bar(
        [n - 0.2 for n in numbers],
        [s.relative_error or 0.0 for s in report.sections],
        0.38,
        color=COLORS[0],
        label="on the teacher's inputs",
    )
    if report.validation is not None:
        errors = report.validation.boundary_errors
        axes.bar(
            [n + 0.2 for n in range(len(errors))],
            errors,
            0.38,
            color=COLORS[1],
            label="on the student's own",
        )
    axes.set_xticks(numbers)
    axes.set_xlabel("section")
    axes.set_ylabel("relative error")
    axes.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _svg(figure)


def waterfall_plot(report: RunReport) -> str:
    """The score from the teacher to the student, one step for each section (or group of them) that is replaced."""
    figure, axes = _figure()
    diagnosis = report.diagnosis
    assert diagnosis is not None
    scores = [100 * score for score in (diagnosis.teacher_score, *diagnosis.scores)]
    axes.bar(0, scores[0], 0.7, color=COLORS[6])
    for number, (before, after) in enumerate(pairwise(scores), 1):
        axes.bar(number, after - before, 0.7, bottom=before, color=COLORS[3] if after < before else COLORS[2])
        axes.plot([number - 1.35, number + 0.35], [before, before], color=INK, linewidth=0.8)
        axes.annotate(
            # Without the sign of a zero.
            f"{round(after - before, 1) + 0.0:+.1f}",
            (number, max(before, after)),
            ha="center",
            va="bottom",
            color=INK,
            fontsize=8,
        )
    axes.bar(len(scores), scores[-1], 0.7, color=COLORS[0])
    axes.set_xticks(range(len(scores) + 1), ["teacher", *map(str, diagnosis.after), "student"])
    # What is lost is seen only near the top.
    spread = max(max(scores) - min(scores), 0.5)
    axes.set_ylim(max(0.0, min(scores) - 0.35 * spread), max(scores) + 0.2 * spread)
    axes.set_xlabel("sections up to this one are the student's")
    axes.set_ylabel("held-out score, %")
    return _svg(figure)


def level_plot(report: RunReport) -> str:
    """Histograms of quantized weights over their levels, a row for each layer that has them, of the first 40."""
    assert report.diagnosis is not None
    layers = [layer for layer in report.diagnosis.layers if layer.level_shares][:MAX_LEVEL_ROWS]
    figure, axes = _figure(0.9 + 0.3 * len(layers))
    for row, layer in enumerate(layers):
        shares = layer.level_shares
        width = 1 / len(shares)
        axes.bar(
            [(index + 0.5) * width for index in range(len(shares))],
            [-0.8 * share / max(shares) for share in shares],
            0.9 * width,
            bottom=row + 0.4,
            color=COLORS[0],
        )
    axes.set_yticks(range(len(layers)), [layer.module for layer in layers])
    axes.set_ylim(max(0, len(layers) - 1) + 0.6, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.set_xlabel("levels, from the least to the greatest; height: share of the weights")
    return _svg(figure)


def size_plot(report: RunReport) -> str:
    """Bytes of every section, in full precision and packed."""
    figure, axes = _figure()
    numbers = [section.index for section in report.sections]
    axes.bar(
        [n - 0.2 for n in numbers],
        [4 * s.num_parameters / 1024 for s in report.sections],
        0.38,
        color=COLORS[6],
        label="full precision",
    )
    axes.bar(
        [n + 0.2 for n in numbers],
        [s.num_bytes_packed / 1024 for s in report.sections],
        0.38,
        color=COLORS[2],
        label="packed",
    )
    axes.set_yscale("log")
    axes.set_xticks(numbers)
    axes.set_xlabel("section")
    axes.set_ylabel("KiB")
    axes.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _svg(figure)


def front_plot(points: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Scores in [0, 1] over bytes of several networks, as named series."""
    figure, axes = _figure()
    styles = ("o", "-s", "*")
    for number, (name, series) in enumerate(points.items()):
        ordered = sorted(series)
        axes.plot(
            [size / 1024 for size, _ in ordered],
            [100 * score for _, score in ordered],
            styles[number % len(styles)],
            color=COLORS[number % len(COLORS)],
            markersize=(6, 4, 11)[number % 3],
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("KiB, packed")
    axes.set_ylabel("held-out score, %")
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure)


def _figure(height: float = 3.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Figure) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Text as text, for readers and screen readers; a fixed salt and no date, so that the page does not vary.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dcq-ray", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    content = buffer.getvalue()
    content = content[content.index("<svg") :].replace(INK, "currentColor")
    # The size comes from the page; the names of other people's servers in namespaces load nothing, but the metadata goes.
    content = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", content, count=1)
    content = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", content, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
