"""The profile of a step: its parts add up, and it trains what it times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks import step_profile
from benchmarks.step_profile import PARTS, figures


def test_parts_are_shares_of_the_step() -> None:
    found = {figure.name: figure.value for figure in figures([([0.001, 0.004, 0.001, 0.003, 0.001], 0.008)])}
    assert found["section 0, a step"] == pytest.approx(10.0)
    assert [found[f"section 0, {name}"] for name in PARTS] == pytest.approx([10.0, 40.0, 10.0, 30.0, 10.0])
    assert found["section 0, with / without quantizers"] == pytest.approx(1.25)


def test_every_section_of_a_small_job_is_profiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lenet_document: Callable[..., dict[str, Any]]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(lenet_document(data={})))
    assert step_profile.main([str(path), "--steps", "2", "--no-keep", "--set", "data.train_samples=64"]) == 0
    printed = capsys.readouterr().out
    for index in range(2):
        for name in ("a step", *PARTS, "with / without quantizers"):
            assert f"| section {index}, {name} |" in printed
