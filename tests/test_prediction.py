"""Predictions beside runs: a small job is predicted and run, and the bars are where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks import prediction
from benchmarks.prediction import Compared, compared, figures, off

from dcq_ray.phases import Prediction

PREDICTED = Prediction(
    num_workers=1,
    dump_seconds=1.0,
    section_seconds=(4.0, 5.0),
    train_seconds=9.0,
    reduce_seconds=2.0,
    makespan_seconds=12.0,
)


def test_bars_are_of_the_worst_section_and_of_the_whole() -> None:
    found = figures("net", Compared(predicted=PREDICTED, section_seconds=(4.0, 6.25), seconds=12.5))
    assert off(4.0, 5.0) == off(6.0, 5.0) == pytest.approx(0.2)
    assert [(figure.name, figure.value, figure.met) for figure in found if figure.bar is not None] == [
        ("net, worst section off by", pytest.approx(0.2), False),
        ("net, all of it off by", pytest.approx(0.04), True),
    ]


def test_a_small_job_is_predicted_and_run(job_document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}))
    found = compared(path, ("train.epochs=1",))
    assert len(found.section_seconds) == len(found.predicted.section_seconds) == 3
    assert found.seconds > sum(found.section_seconds) > 0
    assert found.predicted.makespan_seconds > 0


def test_its_networks_are_jobs_of_this_repository() -> None:
    assert [path for path, _ in prediction.NETWORKS.values() if not path.exists()] == []
