"""The harness of the benchmarks: what is kept is read again, replaces its own only, and is compared figure by figure."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import harness
from benchmarks.harness import Begun, Figure, Result, compare, keep, page, read, told

AT = datetime.datetime(2026, 11, 26, 12, 0, tzinfo=datetime.UTC)
FIGURES = (
    Figure(name="wall", value=12.34, unit="s", bar=15.0),
    Figure(name="images", value=1234.5, unit="images/s", bar=2000.0, higher_is_better=True),
    Figure(name="share", value=0.5, unit="ratio"),
)


def _result(name: str, figures: tuple[Figure, ...] = FIGURES) -> Result:
    begun = Begun(command=f"python {name}.py", load=1.26, at=AT)
    return harness.result(begun, name, f"What {name} measures.", figures)


def test_a_result_says_where_and_when_it_was_measured() -> None:
    found = _result("one")
    assert found.measured_on == "2026-11-26"
    assert found.load == 1.3
    assert "torch" in found.versions
    assert "cores" in found.machine
    assert found.commit


def test_figures_of_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="of the same name"):
        _result("one", (FIGURES[0], FIGURES[0]))


def test_what_is_kept_is_read_again_and_replaces_its_own_only(tmp_path: Path) -> None:
    results_file, page_file = tmp_path / "results.json", tmp_path / "RESULTS.md"
    first, second = _result("two"), _result("one")
    again = replace(first, figures=FIGURES[:1])
    for found in (first, second, again):
        keep(found, results_file=results_file, page_file=page_file)
    assert read(results_file) == {"one": second, "two": again}
    assert page_file.read_text() == page({"one": second, "two": again})


def test_the_page_shows_bars_and_whether_they_are_met() -> None:
    lines = page({"one": _result("one")}).splitlines()
    assert "| wall | 12.3 s | ≤ 15 | met |" in lines
    assert "| images | 1,234 images/s | ≥ 2000 | missed |" in lines
    assert "| share | 0.50 |  |  |" in lines


def test_a_script_says_how_it_was_run_and_ends_with_1_where_a_bar_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[Result] = []
    monkeypatch.setattr(harness, "keep", kept.append)
    begun = harness.begin("/some/where/one.py", ["--set", "a.b=c d"])
    assert begun.command == "python tests/benchmarks/one.py --set 'a.b=c d'"
    assert harness.conclude(begun, "one", "What.", (FIGURES[0], FIGURES[2]), kept=True) == 0
    assert harness.conclude(begun, "one", "What.", FIGURES, kept=False) == 1
    assert [found.figures for found in kept] == [(FIGURES[0], FIGURES[2])]
    assert capsys.readouterr().out.count("## one") == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.1234, "0.12 s"), (9.99, "9.99 s"), (12.34, "12.3 s"), (99.5, "99.5 s"), (1234.4, "1,234 s")],
)
def test_values_are_told_in_three_or_four_digits(value: float, expected: str) -> None:
    assert told(Figure(name="x", value=value, unit="s")) == expected


def test_two_files_are_compared_figure_by_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster = tuple(replace(figure, value=figure.value / 2) for figure in FIGURES[:2])
    for name, results in (("A", [_result("one"), _result("gone")]), ("B", [_result("one", faster)])):
        for found in results:
            keep(found, results_file=tmp_path / f"{name}.json", page_file=tmp_path / f"{name}.md")
    assert harness.main(["compare", str(tmp_path / "A.json"), str(tmp_path / "B.json")]) == 0
    printed = capsys.readouterr().out
    assert "| one | wall | 12.3 s | 6.17 s | 0.50 |" in printed
    assert "In one of them only: gone: wall, gone: images, gone: share, one: share." in printed
    # Nothing to compare with nothing.
    assert compare({}, {}).count("\n") == 1


def test_the_page_in_the_repository_is_that_of_its_results() -> None:
    assert harness.PAGE_FILE.read_text() == page(read(harness.RESULTS_FILE))
