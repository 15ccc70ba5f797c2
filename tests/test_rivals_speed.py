"""The rivals that dcq-ray's speed is measured against: they train what dcq-ray trains, and the table says who is ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks import bare, rivals_speed
from benchmarks.rivals_speed import AUTHOR, OURS, SEQUENTIAL, Reached, accuracy_figures, step_figures, whole_networks

from dcq_ray.jobfile import load_job


@pytest.fixture
def job_file(tmp_path: Path, lenet_document: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    def written(**train: Any) -> str:
        path = tmp_path / "small.yaml"
        document = lenet_document(
            data={"train_samples": 120, "held_out_samples": 40, "test_samples": 40, "batch_size": 40},
            train={"epochs": 2, "batch_size": 20, **train},
            quantize={"first_last_bits": None},
            storage={"cache_dir": str(tmp_path / "cache")},
        )
        path.write_text(yaml.safe_dump(document))
        return str(path)

    return written


def test_whole_networks_train_a_section_as_cached_activations_do(tmp_path: Path, job_file: Callable[..., str]) -> None:
    opened = bare.opened(load_job(job_file(), environment={}), str(tmp_path))
    images = bare.all_images(opened.splits.train)
    inputs, targets = bare.boundaries(opened, images)[:2]
    cached = bare.started(opened, 0, inputs, fitted=False)
    bare.train(opened, cached, inputs, targets)
    # The first section gets the images in both; only the batches in which its targets were made differ.
    found = whole_networks(opened, 0, images)
    for name, value in cached.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_three_ways_to_the_same_steps_are_timed(job_file: Callable[..., str]) -> None:
    seconds = rivals_speed.steps(job_file(epochs=1), ())
    assert set(seconds) == {OURS, AUTHOR, SEQUENTIAL}
    assert min(seconds.values()) > 0


def test_bars_of_the_steps() -> None:
    found = step_figures({OURS: 10.0, SEQUENTIAL: 8.0, AUTHOR: 35.0})
    assert [(figure.value, figure.met) for figure in found] == [
        (10.0, None),
        (8.0, None),
        (35.0, None),
        (3.5, True),
        (1.25, False),
    ]


def test_a_run_as_good_as_dorefa_in_a_third_of_its_seconds_meets_both_bars() -> None:
    rival = Reached(cpu_seconds=90.0, top1=0.80, told="rival")
    for top1, seconds, expected in (
        (0.81, 29.0, [True, True]),
        (0.79, 29.0, [False, True]),
        (0.81, 31.0, [True, False]),
    ):
        found = accuracy_figures(rival, Reached(cpu_seconds=seconds, top1=top1, told="ours"))
        assert [figure.met for figure in found if figure.bar is not None] == expected


def test_a_run_and_dorefa_are_scored_on_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_file: Callable[..., str]
) -> None:
    monkeypatch.setattr(rivals_speed, "DOREFA_FACTORS", (1.0,))
    job = load_job(job_file(), environment={})
    rival = rivals_speed.dorefa(job, str(tmp_path))
    ours = rivals_speed.run_of(job_file(), (), 60)
    assert rival.told == "120 images x 2, rate 0.001"
    assert ours.told == "60 images x 1"
    for found in (rival, ours):
        assert found.cpu_seconds > 0
        assert 40 * found.top1 == pytest.approx(round(40 * found.top1))
