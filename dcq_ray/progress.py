"""Show progress: live on a terminal, in one line that rewrites itself, in lines or as JSON; and a run's status as a table."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dcq_ray.records import Progress, StatusReport, to_jsonable

Style = Literal["live", "line", "plain", "json"]
SECONDS_BETWEEN_PLAIN_LINES = 5.0
SECONDS_BETWEEN_REWRITES = 0.2
PHASES = ("teacher", "plan", "changed", "dump", "train", "reduce", "baseline")
STATE_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "reused": "green", "failed": "bold red"}
# Rows that the terminal's own lines, the summary and a message need beside the sections.
SPARE_ROWS = 8
BAR_WIDTH = 12


class Monitor:
    """Takes progress from any thread, keeps the latest line of every piece of work, and shows it."""

    def __init__(self, style: Style, stream: TextIO, name: str, clock: Callable[[], float]) -> None:
        self._style, self._stream, self._name, self._clock = style, stream, name, clock
        self._lines: dict[tuple[str, int | None], Progress] = {}
        self._shown: dict[tuple[str, int | None], tuple[str, float]] = {}
        self._started: dict[tuple[str, int | None], tuple[float, int]] = {}
        self._lock = threading.Lock()
        self.console = Console(file=stream, highlight=False)
        self.live: Live | None = None
        self._rewritten = float("-inf")
        self._width = 0

    def update(self, progress: Progress) -> None:
        """Take the latest state of one piece of work."""
        key = (progress.phase, progress.index)
        with self._lock:
            now = self._clock()
            progress = self._with_rate(key, progress, now)
            self._lines[key] = progress
            if self._style == "live":
                if self.live is not None:
                    self.live.update(self.render())
            elif self._style == "line":
                if progress.state != "running" or now - self._rewritten >= SECONDS_BETWEEN_REWRITES:
                    self._rewritten = now
                    self._rewrite(self._in_one_line(progress))
            elif self._is_due(key, progress, now):
                self._shown[key] = (progress.state, now)
                self._print(self._as_json(progress, now) if self._style == "json" else self._as_text(progress, now))

    def message(self, text: str) -> None:
        """Tell a sentence between the lines."""
        with self._lock:
            now = self._clock()
            if self._style == "live":
                self.console.print(escape(text), style="dim")
            elif self._style == "json":
                self._print(json.dumps({"time": _time(now), "message": text}))
            elif self._style == "line":
                self._rewrite(text)
                self.end_line()
            else:
                self._print(f"{_time(now)} {text}")

    def lines(self) -> tuple[Progress, ...]:
        """The latest line of every piece of work, in the order of the phases."""
        return _in_order(tuple(self._lines.values()))

    def render(self) -> RenderableType:
        """What a terminal shows now."""
        return progress_table(self.lines(), max_rows=max(4, self.console.height - SPARE_ROWS))

    def end_line(self) -> None:
        """Leave the line that rewrites itself as it stands."""
        if self._width:
            self._width = 0
            self._print("")

    def _rewrite(self, text: str) -> None:
        """Write over the line before; spaces cover what was longer, since notebooks know no other way."""
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def _in_one_line(self, progress: Progress) -> str:
        """What is done now, and how many sections are finished."""
        told = self._told(progress)
        # Not of how many: without Ray a section is first heard of as it begins.
        states = [line.state for line in self._lines.values() if line.phase == "train"]
        if progress.phase != "train":
            return f"{self._name}: {told}"
        num_trained = sum(state in ("done", "reused") for state in states)
        return f"{self._name}: {num_trained} section{'' if num_trained == 1 else 's'} trained; {told}"

    def _with_rate(self, key: tuple[str, int | None], progress: Progress, now: float) -> Progress:
        """Fill in images per second and the time left from our own clock, where they are not given."""
        if progress.state != "running" or progress.per_second is not None or not progress.total:
            return progress
        start, first = self._started.setdefault(key, (now, progress.done))
        if now <= start or progress.done <= first:
            return progress
        rate = (progress.done - first) / (now - start)
        shown_rate = rate if progress.unit == "images" else None
        return replace(progress, per_second=shown_rate, seconds_left=(progress.total - progress.done) / rate)

    def _is_due(self, key: tuple[str, int | None], progress: Progress, now: float) -> bool:
        state, when = self._shown.get(key, ("", float("-inf")))
        return progress.state != state or (progress.state == "running" and now - when >= SECONDS_BETWEEN_PLAIN_LINES)

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _as_text(self, progress: Progress, now: float) -> str:
        return f"{_time(now)} {self._told(progress)}"

    def _told(self, progress: Progress) -> str:
        parts = [_label(progress), progress.state]
        if progress.total and progress.state == "running":
            parts.append(f"{progress.done}/{progress.total} {progress.unit}")
        parts += [part for part in (_loss(progress), _rate(progress), _left(progress), progress.detail) if part]
        return " ".join(parts)

    def _as_json(self, progress: Progress, now: float) -> str:
        return json.dumps({"time": _time(now), **to_jsonable(progress)})


@contextlib.contextmanager
def open_monitor(
    *, style: Style, stream: TextIO, name: str, clock: Callable[[], float] = time.time
) -> Iterator[Monitor]:
    """Show progress on a stream until the block ends; a terminal's last state stays on the screen."""
    monitor = Monitor(style, stream, name, clock)
    if style != "live":
        try:
            yield monitor
        finally:
            monitor.end_line()
        return
    with Live(console=monitor.console, refresh_per_second=8, transient=False) as live:
        monitor.live = live
        yield monitor


def progress_table(lines: tuple[Progress, ...], *, max_rows: int) -> Table:
    """One line per piece of work; where there are too many sections, those that run and a count of the others."""
    sections = [line for line in lines if line.phase == "train"]
    hidden: list[Progress] = []
    if len(sections) > max_rows:
        shown = [line for line in sections if line.state in ("running", "failed")][:max_rows]
        hidden = [line for line in sections if line not in shown]
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, min_width=10)
    table.add_column(no_wrap=True, min_width=7)
    # The only column that may wrap is the one that rich shrinks; its texts are cut rather than wrapped.
    table.add_column(overflow="ellipsis")
    shown = [line for line in lines if line not in hidden]
    figures = [_figures(line) for line in shown]
    widths = [max(map(len, column)) for column in zip(*figures, strict=True)]
    for line, texts in zip(shown, figures, strict=True):
        state = Text(line.state, style=STATE_STYLES[line.state])
        table.add_row(_label(line), state, _told(line, texts, widths))
    if hidden:
        counts = {state: sum(line.state == state for line in hidden) for state in STATE_STYLES}
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        table.add_row(Text("sections", style="dim"), "", Text(told, style="dim", no_wrap=True, overflow="ellipsis"))
    return table


def status_table(report: StatusReport) -> RenderableType:
    """What a run is doing, as `dcq-ray status` shows it."""
    table = progress_table(_in_order(report.lines), max_rows=1000)
    head = f"{escape(report.name)}: {report.status}, {report.updated_at}, process {report.pid} on {escape(report.host)}"
    outer = Table.grid()
    outer.add_row(Text.from_markup(head, style="bold"))
    outer.add_row(table)
    if report.message:
        outer.add_row(Text(report.message))
    return outer


def _told(line: Progress, figures: tuple[str, ...], widths: list[int]) -> Text:
    """A bar and the figures of work that is counted, aligned over the rows; then the detail."""
    told = Text(no_wrap=True, overflow="ellipsis")
    if _is_counted(line):
        filled = round(BAR_WIDTH * min(1.0, line.done / line.total))
        told.append("━" * filled, style="cyan").append("╌" * (BAR_WIDTH - filled), style="dim")
        told.append("".join(f" {text:>{width}}" for text, width in zip(figures, widths, strict=True) if width))
        return told.append(f" {line.detail}", style="dim")
    return told.append(" ".join(filter(None, (_loss(line), _rate(line), line.detail))), style="dim")


def _figures(line: Progress) -> tuple[str, ...]:
    if not _is_counted(line):
        return "", "", "", ""
    return f"{line.done}/{line.total}", _loss(line), _rate(line), _left(line)


def _is_counted(line: Progress) -> bool:
    return line.state == "running" and line.total > 0


def _in_order(lines: tuple[Progress, ...]) -> tuple[Progress, ...]:
    return tuple(sorted(lines, key=lambda line: (PHASES.index(line.phase), -1 if line.index is None else line.index)))


def _label(line: Progress) -> str:
    return f"section {line.index}" if line.phase == "train" else line.phase


def _loss(line: Progress) -> str:
    return "" if line.loss is None else f"loss {line.loss:.3g}"


def _rate(line: Progress) -> str:
    return "" if line.per_second is None else f"{line.per_second:,.0f} img/s"


def _left(line: Progress) -> str:
    if line.state != "running" or line.seconds_left is None:
        return ""
    seconds = round(line.seconds_left)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"


def _time(now: float) -> str:
    return datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
