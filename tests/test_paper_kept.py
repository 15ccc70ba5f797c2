"""What is kept of the runs of the paper's table, and what a new batch takes the place of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.paper_kept import merged, read_kept, write_kept
from benchmarks.paper_page import main, page
from benchmarks.paper_results import Run

from dcq_ray.jobfile import job_yaml, resolve_job


def _run(top1: float, *, seed: int = 0, refit: bool = False, epochs: int = 1, lr: float = 1e-3) -> Run:
    document: dict[str, Any] = {
        "name": "lenet-mnist-w1",
        "teacher": {"model": "dcq_ray:lenet", "weights": "/data/teachers/lenet.safetensors"},
        "data": {"dataset": "mnist", "root": "/data/mnist", "train_samples": 1000},
        "quantize": {"weights": {"scheme": "dorefa", "bits": 1}},
        "train": {"epochs": epochs, "lr": lr},
        "reduce": {"refit": refit},
        "seed": seed,
    }
    rival = {"method": "dorefa", "budget": "passes", "top1": 0.8, "lr": lr, "tried_lrs": [lr], "cpu_seconds": 7.0}
    report = {
        "status": "succeeded",
        "started_at": "2026-11-25T05:00:00+00:00",
        "versions": {"torch": "2.14"},
        "untrained_top1": 0.3,
        "teacher": {"top1": 0.9, "correct": 9},
        "student": {"top1": top1, "correct": 8},
        "validation": {"top1": top1, "num": 10},
        "sections": [{"index": 0}, {"index": 1}],
        "timings": {"cpu_seconds": {"dump": 1.0, "train": 2.0}, "wall_seconds": 5.0},
        "baselines": [{**rival, "loss": 0.5}],
    }
    job = resolve_job(document, source="a test").model_dump(mode="json")
    return Run(path=f"/runs/{seed}-{top1}", job=job, report=report)


def _scores(runs: list[Run]) -> list[float]:
    return sorted(run.report["student"]["top1"] for run in runs)


def test_what_is_kept_makes_the_same_page_and_names_no_folder(tmp_path: Path) -> None:
    runs = [_run(0.85), _run(0.86, seed=1)]
    write_kept(tmp_path / "results.json", runs)
    text = (tmp_path / "results.json").read_text()
    assert "/data" not in text
    assert "/runs" not in text
    again = read_kept(tmp_path / "results.json")
    assert page(again) == page(runs)
    write_kept(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_text() == text


def test_nothing_is_kept_where_there_is_no_file(tmp_path: Path) -> None:
    assert read_kept(tmp_path / "results.json") == []


def test_new_runs_replace_those_of_their_seed_and_of_other_switches(tmp_path: Path) -> None:
    kept = [_run(0.80, lr=1e-3), _run(0.81, lr=3e-3), _run(0.82, seed=1), _run(0.83, epochs=2)]
    # Of the same seed both rates go; another seed of the same switches and another row stay.
    assert _scores(merged(kept, [_run(0.9)])) == [0.82, 0.83, 0.9]
    # With a switch changed no seed of that row is comparable.
    assert _scores(merged(kept, [_run(0.9, refit=True)])) == [0.83, 0.9]


def test_the_page_adds_a_batch_to_what_is_kept(tmp_path: Path) -> None:
    kept, output = tmp_path / "results.json", tmp_path / "README.md"
    write_kept(kept, [_run(0.82, seed=1)])
    run, folder = _run(0.9), tmp_path / "batch" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(run.report))
    (folder / "job.yaml").write_text(job_yaml(resolve_job(run.job, source="a test")))
    assert main([str(tmp_path / "batch"), "--output", str(output), "--kept", str(kept)]) == 0
    assert _scores(read_kept(kept)) == [0.82, 0.9]
    assert "86.00 ± 5.66" in output.read_text()


def test_the_committed_page_is_of_the_committed_runs() -> None:
    folder = Path(__file__).parents[1] / "jobs" / "paper"
    runs = read_kept(folder / "results.json")
    assert runs
    assert page(runs) == (folder / "README.md").read_text()
