"""Progress in lines, as JSON, and live."""

from __future__ import annotations

import io
import json

from rich.console import Console

from dcq_ray.progress import open_monitor, progress_table, status_table
from dcq_ray.records import Progress, StatusReport


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def running(done: int, index: int = 0) -> Progress:
    return Progress(phase="train", index=index, done=done, total=100, unit="steps", loss=0.5)


def test_plain_lines_come_on_changes_and_every_five_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    with open_monitor(style="plain", stream=stream, name="job", clock=clock) as monitor:
        monitor.update(Progress(phase="train", index=0, state="waiting"))
        for step in range(1, 12):
            clock.now = float(step)
            monitor.update(running(step))
        monitor.update(Progress(phase="train", index=0, state="done", loss=0.1))
        monitor.message("a sentence")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "1970-01-01T00:00:00Z section 0 waiting"
    assert lines[1] == "1970-01-01T00:00:01Z section 0 running 1/100 steps loss 0.5"
    assert lines[2] == "1970-01-01T00:00:06Z section 0 running 6/100 steps loss 0.5 1:34 left"
    assert [line.split()[0][-4:-1] for line in lines[3:]] == [":11", ":11", ":11"]
    assert lines[4].endswith("section 0 done loss 0.1")
    assert lines[5].endswith("a sentence")


def test_json_lines_are_json() -> None:
    stream = io.StringIO()
    with open_monitor(style="json", stream=stream, name="job", clock=Clock()) as monitor:
        monitor.update(running(3))
        monitor.message("hello")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["phase"], first["index"], first["state"], first["done"], first["loss"]) == (
        "train",
        0,
        "running",
        3,
        0.5,
    )
    assert second == {"time": "1970-01-01T00:00:00Z", "message": "hello"}


def test_lines_are_the_latest_in_the_order_of_phases() -> None:
    with open_monitor(style="plain", stream=io.StringIO(), name="job") as monitor:
        monitor.update(Progress(phase="reduce"))
        monitor.update(running(1, index=1))
        monitor.update(running(1, index=0))
        monitor.update(Progress(phase="dump", state="done"))
        monitor.update(running(7, index=1))
        assert [(line.phase, line.index, line.done) for line in monitor.lines()] == [
            ("dump", None, 0),
            ("train", 0, 1),
            ("train", 1, 7),
            ("reduce", None, 0),
        ]


def shown(renderable: object, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


def test_many_sections_are_summed_up() -> None:
    lines = [Progress(phase="train", index=index, state="waiting") for index in range(50)]
    lines[3] = running(5, index=3)
    lines[4] = Progress(phase="train", index=4, state="done")
    text = shown(progress_table(tuple(lines), max_rows=5))
    assert len(text.splitlines()) == 2
    assert "48 waiting, 1 done" in text
    assert "5/100" in text


def test_the_live_view_ends_with_the_last_state() -> None:
    stream = io.StringIO()
    with open_monitor(style="live", stream=stream, name="job") as monitor:
        monitor.update(running(50))
        monitor.update(Progress(phase="train", index=0, state="done", loss=0.25))
    assert "done" in stream.getvalue()
    assert "loss 0.25" in stream.getvalue()


def test_status_tells_who_and_what() -> None:
    report = StatusReport(
        name="[job]", status="running", updated_at="now", host="here", pid=7, lines=(running(5),), message="a message"
    )
    text = shown(status_table(report))
    assert "[job]: running, now, process 7 on here" in text
    assert "section 0" in text
    assert "a message" in text


def test_one_line_rewrites_itself_and_stays_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with open_monitor(style="line", stream=stream, name="job", clock=clock) as monitor:
        for index in (0, 1):
            monitor.update(Progress(phase="train", index=index, state="waiting"))
        clock.now = 1.0
        monitor.update(running(10))
        clock.now = 1.1
        monitor.update(running(11))  # too soon after the one before
        monitor.update(Progress(phase="train", index=0, state="done", loss=0.1))
        monitor.update(Progress(phase="reduce", state="done"))
    shown = stream.getvalue().split("\r")[1:]
    assert [text.rstrip() for text in shown[2:]] == [
        "job: 0 sections trained; section 0 running 10/100 steps loss 0.5",
        "job: 1 section trained; section 0 done loss 0.1",
        "job: reduce done",
    ]
    # What was longer is covered.
    assert len(shown[3]) == len(shown[2])
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\n") == 1


def test_a_sentence_ends_the_line_that_rewrites_itself() -> None:
    stream = io.StringIO()
    with open_monitor(style="line", stream=stream, name="job", clock=Clock()) as monitor:
        monitor.message("a sentence")
        monitor.update(Progress(phase="plan", state="done"))
    assert stream.getvalue() == "\ra sentence\n\rjob: plan done\n"
