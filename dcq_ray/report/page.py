"""The report as one self-contained HTML page: works offline, light and dark, on a phone and for screen readers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dcq_ray.records import Diagnosis, RunReport
from dcq_ray.report.advice import advice
from dcq_ray.report.deploy import DEPLOY_COLUMNS, deploy_caption, deploy_rows, deploy_verdict
from dcq_ray.report.front import FRONT_COLUMNS, front_caption, front_rows, searched_plot
from dcq_ray.report.plots import MAX_LEVEL_ROWS, error_plot, level_plot, loss_plot, size_plot, waterfall_plot
from dcq_ray.report.style import STYLE, themed
from dcq_ray.report.words import (
    LAYER_COLUMNS,
    STATE_COLUMNS,
    TIME_COLUMNS,
    WORK_COLUMNS,
    layer_rows,
    merge_lines,
    modules,
    networks,
    number,
    own_errors,
    percent,
    rival_name,
    seconds,
    size,
    state_rows,
    time_rows,
    verdict,
    waterfall_rows,
    work_rows,
)

if TYPE_CHECKING:
    # Not at run time: it loads torch, which a run with nothing to do is to be told without.
    from dcq_ray.search import Searched


def report_html(report: RunReport, searched: Searched | None = None) -> str:
    """The page, with what a search found for the run; every text that a user chose is escaped."""
    parts = [
        f"<header><h1>{escape(report.name)}</h1>",
        f'<p class="status">dcq-ray run, {report.status}, started {escape(report.started_at)}</p></header><main>',
        f'<p class="verdict{" failed" if report.status == "failed" else ""}">{escape(verdict(report))}</p>',
    ]
    parts += [f'<p role="alert">Section {f.index}: {escape(f.message)}</p>' for f in report.failures]
    parts += [
        "<section><h2>Networks</h2>",
        _table(
            "Accuracy on test images, and size with weights packed in bits",
            ("network", "top-1", "size", "bits"),
            networks(report),
        ),
    ]
    if report.gap_closed is not None and report.baseline is not None:
        parts.append(
            f"<p>Share of the gap between {escape(rival_name(report.baseline))} (learning rate {report.baseline.lr:g}, "
            f"the best of {len(report.baseline.tried_lrs)}) and the teacher that DCQ closed: {percent(report.gap_closed)}.</p>"
        )
    parts.append("</section>")
    sentences = advice(report)
    if sentences:
        lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<section><h2>What to do next</h2><ul>{lines}</ul></section>")
    if report.diagnosis is not None:
        parts.append(_waterfall(report, report.diagnosis))
    if report.sections:
        parts.append(_sections(report))
    if report.layers:
        parts.append(_layers(report))
    parts.append(_validation(report))
    if report.merge_steps:
        lines = "".join(f"<li>{escape(line)}</li>" for line in merge_lines(report))
        parts.append(f"<section><h2>After stitching</h2><ul>{lines}</ul></section>")
    if searched is not None:
        parts.append(_search(searched))
    if report.deploy is not None:
        table = _table(deploy_caption(report.deploy), DEPLOY_COLUMNS, deploy_rows(report.deploy))
        told = escape(deploy_verdict(report.deploy))
        parts.append(f"<section><h2>Deployment</h2><p>{told}</p>{table}</section>")
    parts.append(f"<section><h2>Time</h2><p>{escape(seconds(report))}.</p>{_times(report)}</section>")
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        parts.append(f"<section><h2>Notes</h2><ul>{notes}</ul></section>")
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in report.versions.items())
    student = "" if report.student is None else f"<br>student sha256 <code>{escape(report.student.sha256)}</code>"
    parts.append(
        f"</main><footer><h2>Provenance</h2><p>teacher {escape(report.teacher.model)} sha256 "
        f"<code>{escape(report.teacher.sha256)}</code>{student}<br>{versions}</p></footer>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}, dcq-ray</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _sections(report: RunReport) -> str:
    labelled = any(section.top1_alone is not None for section in report.sections)
    errors = own_errors(report)
    columns = (
        "section",
        "modules",
        "parameters",
        "bits",
        "packed",
        "first loss",
        "last loss",
        "error",
        "drifted",
        "top-1 alone" if labelled else "agreement alone",
    )
    rows = [
        (
            str(section.index),
            modules(section.modules),
            f"{section.num_parameters:,}",
            f"{section.bits:.2f}",
            size(section.num_bytes_packed),
            number(section.initial_loss),
            number(section.final_loss),
            number(section.relative_error),
            number(errors.get(section.index)),
            percent(section.top1_alone if labelled else section.agreement_alone),
        )
        for section in report.sections
    ]
    caption = (
        "Each section: alone, the teacher with only this section replaced, on held-out images; error, relative, on the teacher's "
        "inputs; drifted, on the student's own"
    )
    worst = max(report.sections, key=lambda section: section.relative_error or 0.0)
    return "\n".join(
        [
            "<section><h2>Sections</h2>",
            _table(caption, columns, rows),
            _plot(
                "Loss",
                loss_plot(report),
                f"Loss curves of {len(report.sections)} sections, logarithmic; the table above has the first and last losses.",
            ),
            _plot(
                "Error",
                error_plot(report),
                f"Relative error per section; the greatest alone is {number(worst.relative_error)} in section {worst.index}.",
            ),
            _plot("Size", size_plot(report), "Kibibytes per section in full precision and packed."),
            "</section>",
        ]
    )


def _times(report: RunReport) -> str:
    if not report.sections:
        return ""
    caption = (
        "Of each section's seconds, the shares of its start, of reading its boundaries, of waiting for batches, and of the "
        "rest, which is computing"
    )
    return _table(caption, TIME_COLUMNS, time_rows(report.sections))


def _waterfall(report: RunReport, diagnosis: Diagnosis) -> str:
    caption = f"The score on {diagnosis.num_samples:,} held-out images as sections are replaced, from the first on"
    total = 100 * (diagnosis.teacher_score - diagnosis.scores[-1])
    description = f"The score falls by {total:.1f} points from the teacher to the student; the table has the steps."
    return "\n".join(
        [
            "<section><h2>Where accuracy is lost</h2>",
            _table(caption, ("student's sections", "score", "points"), waterfall_rows(diagnosis)),
            _plot("From the teacher to the student", waterfall_plot(report), description),
            "</section>",
        ]
    )


def _search(searched: Searched) -> str:
    chosen = f"Scores on held-out images over size; chosen: {searched.chosen.num_bytes:,} bytes, {percent(searched.chosen.score)}."
    return "\n".join(
        [
            "<section><h2>Search</h2>",
            _table(front_caption(searched), FRONT_COLUMNS, front_rows(searched)),
            _plot("Pareto front", searched_plot(searched), chosen),
            "</section>",
        ]
    )


def _layers(report: RunReport) -> str:
    caption = "Weights and inputs of every Conv and Linear layer: scheme and bits, bytes packed, multiply-accumulates per sample"
    state = "Weights at each level that occurs, and outputs that are the same on all images diagnosed"
    work = "Multiply-accumulates per sample, by the bits of weights and inputs"
    return "\n".join(
        [
            "<section><h2>Layers</h2>",
            _table(caption, LAYER_COLUMNS, layer_rows(report.layers)),
            _table(work, WORK_COLUMNS, work_rows(report.multiply_accumulates_by_bits)),
            "" if report.diagnosis is None else _table(state, STATE_COLUMNS, state_rows(report.diagnosis)),
            "" if report.diagnosis is None else _levels(report, report.diagnosis),
            "</section>",
        ]
    )


def _levels(report: RunReport, diagnosis: Diagnosis) -> str:
    told = sum(bool(layer.level_shares) for layer in diagnosis.layers)
    if not told:
        return ""
    drawn = f"the first {MAX_LEVEL_ROWS} of {told} layers" if told > MAX_LEVEL_ROWS else f"{told} layers"
    description = f"Histograms of the weights of {drawn} over their levels; the table above has the shares."
    return _plot("Weights over their levels", level_plot(report), description)


def _validation(report: RunReport) -> str:
    validation = report.validation
    if validation is None:
        return ""
    rows = [
        ("top-1", percent(validation.top1), percent(validation.teacher_top1)),
        ("top-5", percent(validation.top5), ""),
        ("agreement with the teacher", percent(validation.agreement_with_teacher), ""),
    ]
    if validation.metric is not None:
        rows.append(("metric", number(validation.metric), number(validation.teacher_metric)))
    caption = f"The stitched student on {validation.num_samples:,} held-out images"
    return f"<section><h2>Validation</h2>{_table(caption, ('measure', 'student', 'teacher'), rows)}</section>"


def _plot(title: str, svg: str, description: str) -> str:
    labelled = themed(svg).replace("<svg", f'<svg role="img" aria-label="{escape(description, quote=True)}"', 1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{labelled}</figure>"


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = {
        index
        for index, name in enumerate(columns)
        if name
        in (
            "network",
            "modules",
            "measure",
            "device",
            "layer",
            "kind",
            "student's sections",
            "sections",
            STATE_COLUMNS[1],
        )
    }
    kind = [' class="text"' if index in text else "" for index in range(len(columns))]
    head = "".join(f'<th scope="col"{kind[index]}>{escape(name)}</th>' for index, name in enumerate(columns))
    # What a row is about heads it, for readers that hear one cell at a time.
    body = "".join(
        f'<tr><th scope="row"{kind[0]}>{escape(row[0])}</th>'
        + "".join(f"<td{kind[index]}>{escape(cell)}</td>" for index, cell in enumerate(row) if index)
        + "</tr>"
        for row in rows
    )
    name = f"caption-{zlib.crc32(caption.encode()):08x}"
    told = f'<caption id="{name}"><span>{escape(caption)}</span></caption>'
    table = f"<table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    # A table that is wider than a phone scrolls by itself, with the keyboard too.
    return f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">{table}</div>'
