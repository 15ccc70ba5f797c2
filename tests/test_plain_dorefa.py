"""The plain DoReFa loop that the rival is held against: its quantizer is ours, though nothing of ours is in it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks import plain_dorefa
from benchmarks.plain_dorefa import batchnorm_alone_trains, quantize, quantized_weight, reestimate, schedule_of
from torch import nn

from dcq_ray.data import load_splits
from dcq_ray.jobfile import resolve_job
from dcq_ray.quantizers.weights import dorefa_weight, twn_weight
from dcq_ray.section import rate_factor
from dcq_ray.spec import Job
from dcq_ray.stitch import reestimate_batchnorm

# Mean of the magnitudes: (1 + 0.5 + 0.25 + 0 + 2) / 5 = 0.75.
VALUES = [1.0, -0.5, 0.25, 0.0, -2.0]


def _job(tmp_path: Path, **quantizer: Any) -> Job:
    return resolve_job(
        {
            "name": "small",
            "teacher": {"model": "dcq_ray:lenet", "args": {"image_size": 16, "final_relu": False}, "min_top1": 0},
            "data": {"dataset": "digits", "image_size": [16, 16], "train_samples": 200, "held_out_samples": 100},
            "quantize": {"first_last_bits": None, **quantizer},
            "train": {"epochs": 8, "batch_size": 20, "lr": 3e-3},
            "storage": {"run_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")},
        },
        source="a test",
    )


def test_it_uses_neither_our_quantizers_nor_our_training_loop() -> None:
    tree = ast.parse(Path(plain_dorefa.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {f"dcq_ray.{name}" for name in ("data", "jobfile", "phases", "spec", "storage")}
    assert {name for name in imported if name is not None and name.startswith("dcq_ray")} == ours


@pytest.mark.parametrize(
    ("scheme", "bits", "expected"),
    [
        ("dorefa", 1, [0.75, -0.75, 0.75, 0.75, -0.75]),
        # Above 0.75 x 0.75 = 0.5625 lie 1 and 2, of mean 1.5.
        ("twn", 2, [1.5, 0.0, 0.0, 0.0, -1.5]),
        # tanh / (2 x 0.9640) + 1/2 = 0.895, 0.260, 0.627, 0.5, 0; times 3: 2.685, 0.781, 1.881, 1.5, 0.
        ("dorefa", 2, [1.0, -1 / 3, 1 / 3, 1 / 3, -1.0]),
    ],
)
def test_levels_are_those_computed_by_hand(scheme: str, bits: int, expected: list[float]) -> None:
    found = quantized_weight(torch.tensor(VALUES), scheme, bits)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("scheme", "bits"), [("dorefa", 1), ("dorefa", 2), ("dorefa", 4), ("twn", 2)])
def test_levels_and_gradients_are_ours(scheme: str, bits: int) -> None:
    weights = [torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1 for _ in range(2)]
    for weight in weights:
        weight.requires_grad_(True)
    theirs = quantized_weight(weights[0], scheme, bits)
    ours = twn_weight(weights[1]) if scheme == "twn" else dorefa_weight(weights[1], bits)
    torch.testing.assert_close(theirs, ours)
    slope = torch.linspace(-1, 1, theirs.numel()).reshape(theirs.shape)
    (theirs * slope).sum().backward()
    (ours * slope).sum().backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_more_bits_start_at_the_least_squares_scale(tmp_path: Path) -> None:
    job = _job(tmp_path, weights={"scheme": "dorefa", "bits": 2})
    layer = nn.Linear(5, 1)
    layer.weight.data = torch.tensor([VALUES])
    # <w, q> / <q, q> = (1 + 1/6 + 1/12 + 0 + 2) / (1 + 1/9 + 1/9 + 1/9 + 1) = 3.25 / 2.3333.
    scale = 3.25 / (7 / 3)
    found = quantize(nn.Sequential(layer), job)[0].weight  # type: ignore[index]
    torch.testing.assert_close(found, scale * torch.tensor([[1.0, -1 / 3, 1 / 3, 1 / 3, -1.0]]))


@pytest.mark.parametrize(
    ("first_last_bits", "num_levels"),
    [(None, [3, 3, 3]), (32, [36, 3, 20]), (1, [2, 3, 2])],
    ids=["all", "alone", "1 bit"],
)
def test_first_and_last_layer_are_what_the_job_says(
    first_last_bits: int | None, num_levels: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    job = _job(tmp_path, weights={"scheme": "twn", "bits": 2}, first_last_bits=first_last_bits)
    student = quantize(network, job)
    layers = [layer for layer in student if not isinstance(layer, nn.Flatten)]  # type: ignore[attr-defined]
    assert [len(layer.weight.unique()) for layer in layers] == num_levels
    # The network itself is as it was.
    assert not hasattr(network[0], "parametrizations")


def test_a_job_with_more_than_weights_is_refused(tmp_path: Path) -> None:
    for more in (
        {"activations": {"bits": 4}},
        {"weights": {"scheme": "ttq", "bits": 2}},
        {"overrides": {"fc1": {"bits": 2}}},
    ):
        with pytest.raises(ValueError, match="expected dorefa or twn weights alone"):
            quantize(nn.Sequential(), _job(tmp_path, **more))


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedules_are_ours(schedule: str, tmp_path: Path) -> None:
    job = _job(tmp_path)
    factor = schedule_of(job.model_copy(update={"train": job.train.model_copy(update={"schedule": schedule})}))
    assert [factor(step / 40) for step in range(40)] == pytest.approx(
        [rate_factor(schedule, step, 40) for step in range(40)]
    )


def test_batchnorm_is_reestimated_as_ours(tmp_path: Path) -> None:
    job = _job(tmp_path)
    splits = load_splits(job.data, seed=0, job_folder=str(tmp_path))
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    reestimate(networks[0], splits.train, 64)
    images = [splits.train.images(torch.arange(start, min(start + 64, 200)).numpy()) for start in range(0, 200, 64)]
    reestimate_batchnorm(networks[1], images, torch.device("cpu"))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(networks[0][1], name), getattr(networks[1][1], name))
    batchnorm_alone_trains(networks[0])
    assert [part.training for part in networks[0]] == [False, True, False]


def test_it_prints_its_accuracy_beside_the_rivals_and_judges_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = _job(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    rival = {"method": "dorefa", "budget": "passes", "lr": 1e-3, "held_out_top1": 1.0, "top1": 1.0}
    codes, printed = [], []
    for top1 in (1.0, 0.0):
        document = {"baselines": [{**rival, "budget": "cpu-seconds"}, {**rival, "top1": top1}]}
        (tmp_path / "report.json").write_text(json.dumps(document))
        codes.append(plain_dorefa.main([str(path), "--run-dir", str(tmp_path)]))
        printed.append(capsys.readouterr().out)
    assert codes == [0, 1]
    assert "| dcq-ray baseline | 0.001 | 100.00 | 0.00 |" in printed[1]
    (row,) = (line for line in printed[0].splitlines() if line.startswith("| plain PyTorch |"))
    held_out, test = (float(cell) for cell in row.split("|")[3:5])
    # Far above chance: it learns.
    assert held_out > 50
    assert f"{100 - test:.2f} points better" in printed[0]
    assert f"{test:.2f} points worse" in printed[1]
    (tmp_path / "report.json").write_text('{"baseline": null}')
    with pytest.raises(ValueError, match="no rival dorefa at equal passes"):
        plain_dorefa.main([str(path), "--run-dir", str(tmp_path)])
