"""What a search found, as a table, a plot and JSON."""

from __future__ import annotations

import io
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from dcq_ray.records import from_json, to_json
from dcq_ray.report.front import FRONT_COLUMNS, front_caption, front_rows, print_front, searched_plot
from dcq_ray.search import Candidate, Searched


def candidate(num_bytes: int, score: float, *options: str) -> Candidate:
    return Candidate(options=options, num_bytes=num_bytes, predicted_divergence=0.5, score=score)


@pytest.fixture
def searched() -> Searched:
    return Searched(
        budget_bytes=2500,
        max_drop=None,
        chosen=candidate(2000, 0.75, "dorefa-1", "dorefa-2"),
        choices=(0, 1),
        uniform=(candidate(1000, 0.5, "dorefa-1", "dorefa-1"), candidate(3000, 0.875, "dorefa-2", "dorefa-2")),
        front=(candidate(1000, 0.5, "dorefa-1", "dorefa-1"), candidate(2000, 0.75, "dorefa-1", "dorefa-2")),
        num_on_front=1234,
        rank_correlation=None,
    )


def test_rows_end_with_the_chosen_one(searched: Searched) -> None:
    rows = front_rows(searched)
    assert [row[0] for row in rows] == ["uniform", "uniform", "front", "front", "chosen"]
    assert rows[-1] == ("chosen", "2,000", "0.5000", "75.00 %", "dorefa-1 dorefa-2")
    assert {len(row) for row in rows} == {len(FRONT_COLUMNS)}


def test_the_caption_says_what_was_asked_for(searched: Searched) -> None:
    assert front_caption(searched) == (
        "The last search, for a network within 2,500 bytes: 1234 combinations on the front"
    )
    assert front_caption(replace(searched, num_looked_at=9)).endswith(
        "on the front; chosen among 9 by their held-out score, which flatters the best of them"
    )
    drop = replace(searched, budget_bytes=None, max_drop=0.015, rank_correlation=0.875)
    assert "that loses at most 1.5 points" in front_caption(drop)
    assert front_caption(drop).endswith("those shown: 0.88")


def test_the_plot_names_its_series(searched: Searched) -> None:
    texts = {text.strip() for text in ElementTree.fromstring(searched_plot(searched)).itertext() if text.strip()}
    assert {"uniform", "front", "chosen", "KiB, packed"} <= texts


def test_a_terminal_shows_all_rows(searched: Searched) -> None:
    stream = io.StringIO()
    print_front(searched, Console(file=stream, width=120))
    assert stream.getvalue().count("dorefa") == 10


def test_json_goes_both_ways(searched: Searched) -> None:
    assert from_json(Searched, to_json(searched)) == searched
