"""The ablation's page, from reports made by hand, and what the batch asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.ablation import lines, page, runs_to_do
from benchmarks.paper_results import Run
from benchmarks.paper_table import FOLDER

from dcq_ray.jobfile import load_job, resolve_job

PLAIN = {"start": "nearest", "look_ahead": 0}


def run(score: float, seed: int, *rivals: dict[str, Any], **train: Any) -> Run:
    document = {
        "name": "a",
        "teacher": {"model": "dcq_ray:resnet20"},
        "data": {"dataset": "cifar10", "root": "/data", "train_samples": 2000},
        "train": {"epochs": 2, **PLAIN, **train},
        "seed": seed,
    }
    report = {
        "validation": {"top1": score},
        "timings": {"cpu_seconds": {"train": 30.0}},
        "sections": [{}, {}, {}],
        "baselines": list(rivals),
        "started_at": "2026-11-25T10:00:00+00:00",
    }
    return Run(
        path=f"{train}-{seed}", job=resolve_job(document, source="a test").model_dump(mode="json"), report=report
    )


def test_means_spreads_and_paired_differences_by_hand() -> None:
    rival = {"method": "sequential", "held_out_top1": 0.9, "cpu_seconds": 99.0}
    found = [
        run(0.80, 0),
        run(0.82, 1),
        run(0.83, 0, rival, start="fitted"),
        run(0.87, 1, start="fitted"),
        run(0.85, 0, start="fitted", look_ahead=1),
    ]
    text = page(found)
    # Differences 3 and 5: mean 4, standard deviation sqrt 2, of the mean 1; the scores' own spread is 2 sqrt 2.
    start = "| ResNet-20 | dorefa, 1 bit | 3 | 2,000 x 2 |"
    assert f"{start} plain | 2 | 81.00 ± 1.41 | - | - | 30 |" in text
    assert f'{start} start "fitted" | 2 | 85.00 ± 2.83 | +4.00 | 1.00 | 30 |' in text
    assert f'{start} start "fitted", look_ahead 1 | 1 | 85.00 | +5.00 | - | 30 |' in text
    assert f'{start} one section after the other (start "fitted") | 1 | 90.00 | +10.00 | - | 99 |' in text


def test_a_seed_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 1 of `plain` is there twice"):
        lines([run(0.8, 1), run(0.9, 1)])


def test_every_run_is_a_job_of_its_own_and_the_rival_stands_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCQ_DATA", str(tmp_path))
    steps = [step for _, step in runs_to_do(FOLDER / "resnet20-cifar10-w1.yaml", tmp_path, [0, 1], ["job", "fine"])]
    jobs = [
        load_job(str(FOLDER / "resnet20-cifar10-w1.yaml"), overrides=step.settings, environment={"DCQ_DATA": "/d"})
        for step in steps
        if step.command == "run"
    ]
    assert len({job.model_dump_json(exclude={"storage"}) for job in jobs}) == len(jobs) == 2 * 2 * 6
    assert len({job.storage.run_dir for job in jobs}) == len(jobs)
    rivals = [step for step in steps if step.command == "baseline"]
    assert [step.method for step in rivals] == ["sequential", "sequential"]
    assert {"fine-start-ahead"} == {step.run_dir.parent.name for step in rivals}
