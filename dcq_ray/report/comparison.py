"""Several runs side by side: a column for each, a row for each figure, and where each one loses its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcq_ray.records import RunReport, ValidationReport
from dcq_ray.report.words import ABSENT, number, percent, quantizer, size

MAX_SECTION_ROWS = 20


def comparison_rows(reports: Sequence[RunReport]) -> list[tuple[str, ...]]:
    """Rows of a figure's name and its value in every run; figures that no run has are left out."""
    figures: list[tuple[str, Callable[[RunReport], str]]] = [
        ("job", lambda report: report.name),
        ("status", lambda report: report.status),
        ("sections", lambda report: str(len(report.sections))),
        ("weights", _weights),
        ("inputs", _inputs),
        ("size, packed", lambda report: ABSENT if report.student is None else size(report.student.num_bytes_packed)),
        ("teacher", lambda report: percent(report.teacher.top1)),
        ("untrained student", lambda report: percent(report.untrained_top1)),
        ("student", lambda report: ABSENT if report.student is None else percent(report.student.top1)),
        ("points lost", _points_lost),
        ("held-out, student", _validated(lambda found: percent(found.top1))),
        ("agreement", _validated(lambda found: percent(found.agreement_with_teacher))),
        (
            "error at the end",
            _validated(lambda found: number(found.boundary_errors[-1] if found.boundary_errors else None)),
        ),
        ("train, s", lambda report: f"{report.timings.train_seconds:.0f}"),
        ("total, s", lambda report: f"{report.timings.total_seconds:.0f}"),
    ]
    rows = [(name, *map(told, reports)) for name, told in figures]
    lost = [_lost(report) for report in reports]
    ends = sorted({index for losses in lost for index in losses})
    # Where runs are cut differently, the same number is another section: their losses say nothing side by side.
    if len({tuple(section.modules for section in report.sections) for report in reports}) == 1:
        rows += [
            (f"lost up to section {index}", *(losses.get(index, ABSENT) for losses in lost))
            for index in ends[:MAX_SECTION_ROWS]
        ]
    return [row for row in rows if any(cell != ABSENT for cell in row[1:])]


def compare_reports(reports: Sequence[RunReport], names: Sequence[str], console: Console) -> None:
    """Print runs side by side, under the names by which they were asked for."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    for row in comparison_rows(reports):
        table.add_row(*map(escape, row))
    console.print(table)


def _weights(report: RunReport) -> str:
    told = {(layer.bits, layer.scheme): quantizer(layer.scheme, layer.bits) for layer in report.layers}
    return ", ".join(told[key] for key in sorted(told)) or ABSENT


def _inputs(report: RunReport) -> str:
    told = {quantizer(layer.activation_scheme, layer.activation_bits): layer.activation_bits for layer in report.layers}
    return ", ".join(sorted(told, key=lambda text: (told[text], text))) or ABSENT


def _points_lost(report: RunReport) -> str:
    if report.student is None or report.student.top1 is None or report.teacher.top1 is None:
        return ABSENT
    return f"{round(100 * (report.teacher.top1 - report.student.top1), 2) + 0.0:.2f}"


def _validated(told: Callable[[ValidationReport], str]) -> Callable[[RunReport], str]:
    return lambda report: ABSENT if report.validation is None else told(report.validation)


def _lost(report: RunReport) -> dict[int, str]:
    """Section -> points lost with it, since the section told before."""
    diagnosis = report.diagnosis
    if diagnosis is None:
        return {}
    return {
        index: f"{round(100 * loss, 1) + 0.0:.1f}"
        for index, loss in zip(diagnosis.after, diagnosis.losses, strict=True)
    }
