"""The benchmark of writing and reading activations: all its parts run on a small job, and its bars are where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks import dump_speed


def test_every_part_measures_a_small_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lenet_document: Callable[..., dict[str, Any]]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(lenet_document(data={"train_samples": 64})))
    # 1 where a bar is missed, as on an image this small it may be.
    assert dump_speed.main([str(path), "--repeats", "1", "--no-keep"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "small.yaml (64 images)" in printed
    assert printed.count("\n| ") == 2 + 7


def test_bars_are_of_the_ratios() -> None:
    found = dump_speed.figures((100.0, 80.0, 0.8), (8e9, 6e9, 0.75), [0.01, 0.06, 0.02])
    assert [figure.met for figure in found if figure.bar is not None] == [False, True, False]
    assert [figure.value for figure in found[3:5]] == [8.0, 6.0]
    assert found[-1].value == 0.06
