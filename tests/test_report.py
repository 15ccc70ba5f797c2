"""Reports in words, tables and as a page."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from dcq_ray.records import (
    BaselineReport,
    BitsWork,
    Diagnosis,
    LayerDiagnosis,
    LayerPlan,
    LossPoint,
    MergeStep,
    PhaseCpuSeconds,
    RunReport,
    SectionFailure,
    SectionReport,
    StudentReport,
    TeacherReport,
    Timings,
    ValidationReport,
    from_json,
)
from dcq_ray.report import compare_reports, print_report, report_html, report_json
from dcq_ray.report.advice import advice
from dcq_ray.report.comparison import comparison_rows
from dcq_ray.report.words import count, curve, histogram, layer_rows, networks, size, time_rows, verdict, work_rows


def section(index: int, **values: object) -> SectionReport:
    curve = tuple(LossPoint(step=step, loss=1 / step) for step in (1, 10, 100))
    fields: dict[str, object] = {
        "index": index,
        "modules": (f"conv{index}", f"relu{index}"),
        "num_parameters": 1000 * (index + 1),
        "bits": 1.0,
        "initial_loss": 1.0,
        "final_loss": 0.01,
        "relative_error": 0.1,
        "top1_alone": 0.97,
        "agreement_alone": 0.98,
        "seconds": 3.0,
        "cpu_seconds": 2.9,
        "device": "cpu",
        "restarts": 0,
        "loss_curve": curve,
        "num_bytes_packed": 200,
    }
    return SectionReport(**{**fields, **values})  # type: ignore[arg-type]


@pytest.fixture
def report() -> RunReport:
    return RunReport(
        name="<script>alert(1)</script>",
        status="succeeded",
        run_digest="0" * 64,
        teacher=TeacherReport(model="dcq_ray:lenet", top1=0.98, sha256="1" * 64, num_bytes=29_000),
        student=StudentReport(top1=0.96, sha256="2" * 64, num_bytes_packed=1000, bits=1.0),
        untrained_top1=0.4,
        baseline=BaselineReport(
            method="dorefa",
            top1=0.92,
            cpu_seconds=5.0,
            lr=0.001,
            held_out_top1=0.9,
            tried_lrs=(0.001, 0.01),
            num_sample_passes=100,
            seconds=9.0,
        ),
        gap_closed=0.6667,
        sections=tuple(section(index) for index in range(3)),
        layers=(
            LayerPlan(
                module="layer1.0.conv1",
                kind="Conv2d",
                num_weights=36_864,
                scheme="dorefa",
                bits=2,
                activation_scheme="pact",
                activation_bits=4,
                multiply_accumulates=2_359_296,
                num_bytes=9220,
            ),
            LayerPlan(
                module="fc",
                kind="Linear",
                num_weights=640,
                scheme="dorefa",
                bits=32,
                multiply_accumulates=640,
                num_bytes=2560,
            ),
        ),
        multiply_accumulates_by_bits=(
            BitsWork(bits=2, activation_bits=4, multiply_accumulates=2_359_296),
            BitsWork(bits=32, activation_bits=32, multiply_accumulates=640),
        ),
        failures=(),
        validation=ValidationReport(
            num_samples=200,
            top1=0.95,
            top5=1.0,
            agreement_with_teacher=0.96,
            boundary_errors=(0.1, 0.2, 0.3),
            teacher_top1=0.97,
            metric=None,
            teacher_metric=None,
        ),
        timings=Timings(
            dump_seconds=1.0,
            train_seconds=2.0,
            reduce_seconds=3.0,
            total_seconds=6.5,
            makespan_lower_bound_seconds=1.5,
            cpu_seconds=PhaseCpuSeconds(teacher=1.0, dump=1.0, train=2.0, reduce=0.5),
        ),
        notes=("A note & more.",),
        versions={"torch": "2.15"},
        started_at="2026-01-01T00:00:00+00:00",
        num_test_samples=360,
        max_drop=None,
    )


def unlabelled(report: RunReport) -> RunReport:
    assert report.student is not None
    assert report.validation is not None
    return dataclasses.replace(
        report,
        teacher=dataclasses.replace(report.teacher, top1=None),
        student=dataclasses.replace(report.student, top1=None),
        untrained_top1=None,
        baseline=None,
        gap_closed=None,
        sections=tuple(section(index, top1_alone=None) for index in range(3)),
        validation=dataclasses.replace(report.validation, top1=None, top5=None, teacher_top1=None),
    )


def failed(report: RunReport) -> RunReport:
    failure = SectionFailure(index=2, error_type="E", message="section 2: the loss is nan", traceback="")
    return dataclasses.replace(
        report,
        status="failed",
        student=None,
        validation=None,
        gap_closed=None,
        sections=report.sections[:2],
        failures=(failure,),
    )


def printed(report: RunReport, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


def test_verdict_by_hand(report: RunReport) -> None:
    expected = (
        "The student scores 96.0 % top-1 on 360 test images, the teacher 98.0 % (-2.0 points), in 1/29 of the bytes"
    )
    assert verdict(report) == f"{expected} (1000 B packed)."
    assert "agrees with the teacher on 96.0 % of 200 held-out images" in verdict(unlabelled(report))
    assert verdict(failed(report)) == "The run failed in section 2; what was finished is kept."


def test_sizes_by_hand() -> None:
    assert [size(value) for value in (1, 1023, 1024, 1536, 3 * 2**20)] == [
        "1 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "3.0 MiB",
    ]


def test_layers_and_work_by_hand(report: RunReport) -> None:
    assert layer_rows(report.layers) == [
        ("layer1.0.conv1", "Conv2d", "36,864", "dorefa 2", "pact 4", "9.0 KiB", "2.36 M"),
        ("fc", "Linear", "640", "fp32", "fp32", "2.5 KiB", "640"),
    ]
    assert work_rows(report.multiply_accumulates_by_bits) == [
        ("2", "4", "2,359,296", "100.0 %"),
        ("fp32", "fp32", "640", "0.0 %"),
    ]
    assert work_rows(()) == []
    assert [count(value) for value in (0, 999, 1000, 1_814_073_344)] == ["0", "999", "1 k", "1.81 G"]


def test_every_form_of_the_report_shows_the_merge_and_the_rivals(report: RunReport) -> None:
    assert report.baseline is not None
    kept = MergeStep(name="BatchNorm re-estimated", score_before=0.5, score_after=0.75, accepted=True)
    undone = MergeStep(name="polish", score_before=0.75, score_after=0.6, accepted=False)
    slow = dataclasses.replace(report.baseline, method="sequential", budget="cpu-seconds", top1=0.123)
    report = dataclasses.replace(report, merge_steps=(kept, undone), baselines=(report.baseline, slow))
    text, page = printed(report, 140), report_html(report)
    for part in (
        "BatchNorm re-estimated: 50.0 % → 75.0 % on held-out images",
        "polish: 75.0 % → 60.0 % on held-out images, undone",
        "section by section, equal processor s",
        "12.3 %",
    ):
        assert part in text
        assert part in page


def test_every_form_of_the_report_has_a_row_for_each_rival(report: RunReport) -> None:
    first = report.baseline
    assert first is not None
    rivals = (
        first,
        dataclasses.replace(first, method="hints", top1=0.931),
        dataclasses.replace(first, method="sequential", budget="cpu-seconds", budget_cpu_seconds=7.0, top1=None),
    )
    several = dataclasses.replace(report, baselines=rivals)
    expected = [
        ("end-to-end dorefa", "92.0 %"),
        ("hints, then distillation", "93.1 %"),
        ("section by section, equal processor s", "-"),
    ]
    assert [row[:2] for row in networks(several)[2:-1]] == expected
    text, page = printed(several, 120), report_html(several)
    for name, top1 in expected:
        assert re.search(rf"{name} +{top1} +1000 B", text)
        assert re.search(rf"{name}</th><td>{top1}</td>", page)
    kept = json.loads(report_json(several))["baselines"]
    assert [(rival["method"], rival["budget"], rival["budget_cpu_seconds"]) for rival in kept] == [
        ("dorefa", "passes", None),
        ("hints", "passes", None),
        ("sequential", "cpu-seconds", 7.0),
    ]


def test_every_form_of_the_report_shows_the_bits_of_every_layer(report: RunReport) -> None:
    text, page = printed(report), report_html(report)
    for part in ("layer1.0.conv1", "dorefa 2", "pact 4", "9.0 KiB", "2,359,296"):
        assert part in text
        assert part in page
    layer = json.loads(report_json(report))["layers"][0]
    assert (layer["bits"], layer["activation_bits"], layer["num_bytes"]) == (2, 4, 9220)


@pytest.mark.parametrize("width", [70, 80, 140])
def test_tables_fit_and_say_what_matters(report: RunReport, width: int) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("98.0 %", "40.0 %", "92.0 %", "66.7 %", "conv1 … relu1"):
        assert part in text.replace("\n", " ")
    assert "\x1b" not in text
    assert "section 2: the loss is nan" in " ".join(printed(failed(report), 140).split())


@pytest.mark.parametrize("change", [lambda report: report, unlabelled, failed])
def test_nothing_absent_is_printed_as_none(report: RunReport, change: object) -> None:
    changed = change(report)  # type: ignore[operator]
    assert "None" not in printed(changed)
    assert "None" not in report_html(changed)


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img", "use", "path"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.addresses.append(value)
            if name == "aria-label" and value:
                self.labels.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()


@pytest.mark.parametrize("change", [lambda report: report, unlabelled, failed])
def test_the_page_stands_alone_and_escapes_what_users_wrote(report: RunReport, change: object) -> None:
    content = report_html(change(report))  # type: ignore[operator]
    page = Page()
    page.feed(content)
    assert page.addresses == []
    assert page.open == []
    assert "script" not in page.tags
    assert {"main", "header", "h1", "table", "caption"} <= set(page.tags)
    assert page.tags.count("svg") == len(page.labels) == 3
    assert not re.search(r"url\((?!#|&quot;#)", content)
    assert "prefers-color-scheme: dark" in content


def test_the_page_is_the_same_for_the_same_report(report: RunReport) -> None:
    assert report_html(report) == report_html(report)


def test_json_comes_back(report: RunReport) -> None:
    document = json.loads(report_json(diagnosed(report)))
    assert document.pop("advice") == advice(diagnosed(report))
    assert from_json(RunReport, json.dumps(document).encode()) == diagnosed(report)
    assert document["gap_closed"] == 0.6667


def test_several_runs_side_by_side(report: RunReport) -> None:
    stream = io.StringIO()
    compare_reports([report, failed(report), unlabelled(report)], ["a", "[b]", "c"], Console(file=stream, width=80))
    assert stream.getvalue().count("alert(1)") == 3
    assert "failed" in stream.getvalue()
    assert "[b]" in stream.getvalue()


def test_runs_cut_alike_are_compared_section_by_section(report: RunReport) -> None:
    runs = [diagnosed(report), diagnosed(report, (0.96, 0.96, 0.965)), report]
    rows = {row[0]: row[1:] for row in comparison_rows(runs)}
    assert rows["weights"][:2] == ("twn 2", "twn 2")
    assert rows["lost up to section 0"] == ("2.0", "1.0", "-")
    assert rows["lost up to section 1"] == ("2.0", "0.0", "-")
    assert rows["lost up to section 2"] == ("1.0", "-0.5", "-")
    other = dataclasses.replace(runs[0], sections=runs[0].sections[:2])
    assert "lost up to section 0" not in {row[0] for row in comparison_rows([other, runs[1]])}


def test_figures_that_no_run_has_are_left_out(report: RunReport) -> None:
    names = [row[0] for row in comparison_rows([failed(report), failed(report)])]
    assert "agreement" not in names
    assert "status" in names
    assert "agreement" in [row[0] for row in comparison_rows([failed(report), report])]


# -- where accuracy is lost, and what to do about it -------------------------------------------------------------------


def diagnosed(report: RunReport, scores: tuple[float, ...] = (0.95, 0.93, 0.92), **values: object) -> RunReport:
    layer = LayerDiagnosis(module="conv2", level_shares=(0.25, 0.5, 0.25), num_channels=64, num_constant_channels=0)
    fields: dict[str, object] = {"num_samples": 200, "teacher_score": 0.97, "after": (0, 1, 2), "layers": (layer,)}
    diagnosis = Diagnosis(**{**fields, "scores": scores, **values})  # type: ignore[arg-type]
    layers = tuple(
        LayerPlan(module=f"conv{index}", kind="Conv2d", num_weights=8192, scheme="twn", bits=2, num_bytes=1643)
        for index in range(3)
    )
    return dataclasses.replace(report, diagnosis=diagnosis, layers=layers)


def test_every_form_of_the_report_shows_where_accuracy_is_lost(report: RunReport) -> None:
    changed = diagnosed(report)
    text, page = printed(changed, 120), report_html(changed)
    for row in (("none", "97.0 %", ""), ("up to 0", "95.0 %", "-2.0"), ("up to 2", "92.0 %", "-1.0")):
        assert re.search(r" +".join(map(re.escape, filter(None, row))), text)
        assert f"{row[0]}</th><td>{'</td><td>'.join(row[1:])}</td>" in page
    for form in (text, page):
        assert "25 % 50 % 25 %" in form.replace("\N{NO-BREAK SPACE}", " ")
        assert "0 of 64" in form
    assert "▅█▅" in text
    assert "The score falls by 5.0 points from the teacher to the student" in page
    reader = Page()
    reader.feed(page)
    assert reader.tags.count("svg") == len(reader.labels) == 5
    assert "Histograms of the weights of 1 layers over their levels" in page
    assert json.loads(report_json(changed))["diagnosis"]["scores"] == [0.95, 0.93, 0.92]


def test_advice_by_hand(report: RunReport) -> None:
    # Two of five points in section 0. Five of its 8,192 weights of three levels lie in a byte: 1,639 and a scale; at 4 bits, which
    # need another scheme, 4,096 and a scale.
    costly, drift = advice(diagnosed(report))
    assert costly == (
        "Section 0 costs 2.0 of the 5.0 points (on 200 held-out images); 4 bits there would take 2.4 KiB more: "
        'quantize.overrides "section:0": {scheme: lsq, bits: 4}.'
    )
    assert "relative error is 0.3 on the student's own inputs, and 0.1 on the teacher's" in drift
    # Steps that take several sections say so, and make no offer.
    grouped = advice(diagnosed(report, (0.97, 0.92), after=(0, 2)))[0]
    assert grouped == "Sections 1 to 2 cost 5.0 of the 5.0 points (on 200 held-out images)."
    spread = advice(diagnosed(report, (0.955, 0.935, 0.925), teacher_score=0.968))
    assert [sentence for sentence in spread if "cost" in sentence] == [
        "Section 1 costs 2.0 of the 4.3 points (on 200 held-out images); 4 bits there would take 2.4 KiB more: "
        'quantize.overrides "section:1": {scheme: lsq, bits: 4}.'
    ]
    # Three images of 200 may turn by chance.
    assert not [sentence for sentence in advice(diagnosed(report, (0.97, 0.955, 0.955))) if "cost" in sentence]
    dead = LayerDiagnosis(module="conv1", level_shares=(), num_channels=64, num_constant_channels=12)
    assert advice(diagnosed(report, layers=(dead,)))[-1].startswith("12 of 64 outputs of conv1 are the same on all 200")
    kept = (section(0, kept_start=True), section(1), section(2, kept_start=True))
    assert advice(dataclasses.replace(diagnosed(report), sections=kept))[0].startswith(
        "Sections 0, 2 were better at the fitted start than after training"
    )
    slow = dataclasses.replace(diagnosed(report), sections=(section(0, input_wait_seconds=1.5), section(1), section(2)))
    assert advice(slow)[-1].startswith("Section 0 spent 50.0 % of its training waiting for batches")


def test_where_nothing_is_lost_the_advice_says_so(report: RunReport) -> None:
    assert advice(diagnosed(report, (0.97, 0.97, 0.968))) == [
        "Nothing stands out: no section costs much, no layer is dead, and none waited for its inputs."
    ]
    assert advice(report) == []
    assert advice(failed(report)) == []


def test_every_form_of_the_report_tells_what_a_section_spent_its_seconds_on(report: RunReport) -> None:
    split = section(0, seconds=8.0, read_seconds=1.0, start_seconds=5.0, input_wait_seconds=0.5)
    row = ("0", "8.0", "62.5 %", "12.5 %", "6.2 %", "18.8 %", "cpu", "0")
    assert time_rows([split, section(1, seconds=0.0)]) == [row, ("1", "0.0", *["-"] * 4, "cpu", "0")]
    changed = dataclasses.replace(report, sections=(split,))
    page = report_html(changed)
    columns = re.findall(r"<th scope=.col.[^>]*>(.*?)</th>", page)
    assert columns[-8:] == ["section", "seconds", "starting", "reading", "waiting", "computing", "device", "restarts"]
    assert all(f">{cell}</" in page for cell in row)
    assert re.search(" +".join(map(re.escape, row)), printed(changed))


def test_curves_and_histograms_by_hand() -> None:
    assert histogram([0.25, 0.5, 0.25]) == "▅█▅"
    assert histogram([0.0, 1.0]) == "▁█"
    assert histogram([]) == ""
    # Losses 1, 0.1 and 0.01: evenly apart as logarithms.
    assert curve(section(0), 60) == "█▅▁"
    assert curve(section(0), 2) == "█▁"
    flat = section(0, loss_curve=(LossPoint(step=1, loss=2.0), LossPoint(step=2, loss=2.0)))
    assert curve(flat, 60) == "▁▁"
    assert curve(section(0, loss_curve=()), 60) == "-"


def test_rows_are_headed_and_tables_named_for_those_who_hear_them(report: RunReport) -> None:
    page = report_html(diagnosed(report))
    captions = re.findall(r'<caption id="([^"]+)">', page)
    assert len(captions) == len(set(captions)) == page.count("<table>")
    assert re.findall(r'role="region" aria-labelledby="([^"]+)" tabindex="0"', page) == captions
    assert page.count('<th scope="row"') == page.count("<tr>") - len(captions)
    # Headings go down one level at a time.
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What a browser found, as JSON in the page's title.
PROBE = """<script>addEventListener("load", () => {
  const colours = (selector) => getComputedStyle(document.querySelector(selector));
  document.title = JSON.stringify({
    resources: performance.getEntriesByType("resource").length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    unnamed: [...document.querySelectorAll("svg[role=img], [role=region]")].filter((one) =>
      !(one.ariaLabel || document.getElementById(one.getAttribute("aria-labelledby"))?.textContent)).length,
    paper: colours("body").backgroundColor,
    bar: colours("figure svg [style*='series-0']").fill,
  });
})</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_whole_page_from_its_bytes_alone(width: int, report: RunReport, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(report_html(diagnosed(report)).replace("</body>", f"{PROBE}</body>"))
    command = [
        *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(shown.partition("<title>")[2].partition("</title>")[0])
    assert (found["resources"], found["unnamed"]) == (0, 0)
    # Tables scroll by themselves: the page is no wider than the window.
    assert found["overflow"] <= 0
    # Plots take the colours of the paper that they are on.
    assert (found["paper"], found["bar"]) in (
        ("rgb(252, 252, 251)", "rgb(0, 114, 178)"),
        ("rgb(21, 24, 27)", "rgb(42, 155, 224)"),
    )
