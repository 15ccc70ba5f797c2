"""The page's colours: readable on both papers, and the same in every plot."""

from __future__ import annotations

import re
from itertools import chain

import pytest

from dcq_ray.report.plots import front_plot
from dcq_ray.report.style import DARK, LIGHT, SERIES, STYLE, themed


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    lower, higher = sorted((luminance(a), luminance(b)))
    return (higher + 0.05) / (lower + 0.05)


def test_contrast_by_hand() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(("colors", "which"), [(LIGHT, 0), (DARK, 1)], ids=["light", "dark"])
def test_text_and_drawings_stand_out_from_the_paper(colors: dict[str, str], which: int) -> None:
    for name in ("ink", "soft"):
        assert contrast(colors[name], colors["paper"]) >= 4.5, name
    for color in (colors["accent"], *(pair[which] for pair in SERIES.values())):
        assert contrast(color, colors["paper"]) >= 3, color


def test_plots_take_the_pages_colours() -> None:
    alone = front_plot({"a": [(1024, 0.5), (2048, 0.7)], "b": [(1024, 0.4)]})
    assert "var(" not in alone
    svg = themed(alone)
    for number, color in enumerate(list(SERIES)[:2]):
        assert f"var(--series-{number}, {color})" in svg
        assert len(re.findall(color, svg)) == svg.count(f"var(--series-{number}, {color})")
        assert STYLE.count(f"--series-{number}:") == 2
    assert all(color in STYLE for color in chain(LIGHT.values(), DARK.values()))
    assert themed("nothing") == "nothing"
