"""The report in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcq_ray.records import BitsWork, Diagnosis, LayerPlan, RunReport, SectionReport
from dcq_ray.report.advice import advice
from dcq_ray.report.deploy import print_deploy
from dcq_ray.report.words import (
    LAYER_COLUMNS,
    STATE_COLUMNS,
    TIME_COLUMNS,
    WORK_COLUMNS,
    curve,
    histogram,
    layer_rows,
    merge_lines,
    modules,
    networks,
    number,
    own_errors,
    percent,
    rival_name,
    seconds,
    state_rows,
    time_rows,
    verdict,
    waterfall_rows,
    work_rows,
)

LEFT = (
    *("network", "section", "run", "status", "layer", "kind", "the student's sections", "device"),
    *("loss in training, logarithmic, from its least to its greatest", STATE_COLUMNS[1]),
)
CURVE_WIDTH = 60
# More shares than these are drawn alone.
MAX_TOLD_SHARES = 4


def print_report(report: RunReport, console: Console) -> None:
    """Print the final tables: networks, sections, validation, seconds, notes."""
    console.print(f"[bold]{escape(report.name)}[/]: {report.status}")
    console.print(escape(verdict(report)))
    table = _table("network", "top-1", "size", "bits")
    for row in networks(report):
        table.add_row(*row)
    console.print(table)
    if report.gap_closed is not None and report.baseline is not None:
        rival = rival_name(report.baseline)
        console.print(f"share of the gap between {rival} and the teacher that DCQ closed: {percent(report.gap_closed)}")
    if report.sections:
        labelled = any(section.top1_alone is not None for section in report.sections)
        errors = own_errors(report)
        table = _table("#", "section", "bits", "loss", "error", "drifted", "alone")
        for section in report.sections:
            table.add_row(*_row(section, labelled, errors.get(section.index)))
        console.print(table)
        measure = "top-1" if labelled else "agreement with the teacher"
        console.print(
            "error: relative, on the teacher's inputs; drifted: on the student's own; alone: "
            f"{measure} of the teacher with only this section replaced, on held-out images",
            style="dim",
        )
        console.print(_curves(report.sections))
    if report.diagnosis is not None:
        console.print(waterfall_table(report.diagnosis))
    if report.layers:
        console.print(layers_table(report.layers))
        console.print(work_table(report.multiply_accumulates_by_bits))
    if report.diagnosis is not None and report.diagnosis.layers:
        console.print(_states(report.diagnosis))
    validation = report.validation
    if validation is not None:
        console.print(
            f"on {validation.num_samples} held-out images: top-1 {percent(validation.top1)} (teacher "
            f"{percent(validation.teacher_top1)}), top-5 {percent(validation.top5)}, agreement with the teacher "
            f"{percent(validation.agreement_with_teacher)}"
        )
        if validation.metric is not None:
            console.print(f"metric: {number(validation.metric)} (teacher {number(validation.teacher_metric)})")
    for line in merge_lines(report):
        console.print(line)
    if report.deploy is not None:
        print_deploy(report.deploy, console)
    console.print(seconds(report))
    if report.sections:
        table = _table("#", *TIME_COLUMNS[1:])
        for split in time_rows(report.sections):
            table.add_row(*split)
        console.print(table)
    for sentence in advice(report):
        console.print(f"[bold]→[/] {escape(sentence)}")
    for failure in report.failures:
        console.print(f"[bold red]section {failure.index} failed[/]: {escape(failure.message)}")
    for note in report.notes:
        console.print(escape(note), style="dim")


def layers_table(layers: Sequence[LayerPlan]) -> Table:
    """Every layer: bits and schemes of its weights and its input, bytes, multiply-accumulates."""
    table = _table(*LAYER_COLUMNS)
    # Names may be long: they alone are folded.
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in layer_rows(layers):
        table.add_row(*map(escape, row))
    return table


def waterfall_table(diagnosis: Diagnosis) -> Table:
    """Where the score is lost between the teacher and the student."""
    table = _table("the student's sections", f"score on {diagnosis.num_samples:,} held-out images", "points")
    for row in waterfall_rows(diagnosis):
        table.add_row(*row)
    return table


def work_table(works: Sequence[BitsWork]) -> Table:
    """Multiply-accumulates by the bits of weights and inputs."""
    table = _table(*WORK_COLUMNS)
    for row in work_rows(works):
        table.add_row(*row)
    return table


def _row(section: SectionReport, labelled: bool, own_error: float | None) -> tuple[str, ...]:
    return (
        str(section.index),
        escape(modules(section.modules)),
        f"{section.bits:.2f}",
        f"{number(section.initial_loss)} → {number(section.final_loss)}",
        number(section.relative_error),
        number(own_error),
        percent(section.top1_alone if labelled else section.agreement_alone),
    )


def _curves(sections: Sequence[SectionReport]) -> Table:
    """The loss of every section, drawn over its steps."""
    table = _table("#", "loss in training, logarithmic, from its least to its greatest")
    for section in sections:
        table.add_row(str(section.index), curve(section, CURVE_WIDTH))
    return table


def _states(diagnosis: Diagnosis) -> Table:
    """The weights of every layer over their levels, and its outputs that say nothing."""
    table = _table(*STATE_COLUMNS)
    for layer, row in zip(diagnosis.layers, state_rows(diagnosis), strict=True):
        shares = row[1] if len(layer.level_shares) <= MAX_TOLD_SHARES else ""
        table.add_row(row[0], f"{histogram(layer.level_shares)} {shares}".strip(), row[2])
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    return table
