"""Where a section begins, and which end of its training is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, open_run, run_local, starting
from dcq_ray.phases.committed import section_weights
from dcq_ray.phases.starting import better_of, num_start_samples
from dcq_ray.records import RunReport


class Rows:
    """A source in memory."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.num_samples = rows, len(rows)
        self.read_rows: list[int] = []

    def read(self, positions: np.ndarray) -> Tensor:
        self.read_rows += positions.tolist()
        return self.rows[torch.from_numpy(positions)].clone()


def times(factor: float) -> GraphModule:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    network[1].weight.data = factor * torch.eye(2)
    return symbolic_trace(network.eval())


def squares(output: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    return (output - targets[0]).square().mean()


def test_the_end_with_the_lower_loss_is_kept_and_neither_is_changed() -> None:
    inputs = Rows(5 + 3 * torch.randn(600, 2, generator=torch.Generator().manual_seed(0)))
    # On batch statistics the inputs become of mean 0 and variance 1: twice that is wanted.
    targets = Rows(2 * (inputs.rows - inputs.rows.mean(0)) / inputs.rows.std(0))
    modules = {factor: times(factor) for factor in (1.0, 2.0, 3.5)}
    before = {factor: copy.deepcopy(module.state_dict()) for factor, module in modules.items()}

    def kept(start: float, trained: float) -> GraphModule:
        return better_of(modules[start], modules[trained], [inputs, targets], squares, batch_size=100)

    assert kept(1.0, 2.0) is modules[2.0]
    assert kept(2.0, 1.0) is modules[2.0]
    assert kept(1.0, 3.5) is modules[1.0]
    same = times(2.0)
    assert better_of(same, modules[2.0], [inputs, targets], squares, batch_size=100) is modules[2.0]
    # The last 256 of them are looked at.
    assert set(inputs.read_rows) == set(range(344, 600))
    for factor, module in modules.items():
        assert all(value.equal(before[factor][name]) for name, value in module.state_dict().items())


def test_a_start_is_fitted_on_as_many_images_as_fit_into_memory(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve_job(job_document, source="test")
    with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=ignore_progress, owner="test") as session:
        assert num_start_samples(session.context, 0) == 1000
        # The images are 8 x 8 float32.
        monkeypatch.setattr(starting, "MAX_START_INPUT_BYTES", 10 * 64 * 4 + 3)
        assert num_start_samples(session.context, 0) == 10
        monkeypatch.setattr(starting, "MAX_START_INPUT_BYTES", 1)
        assert num_start_samples(session.context, 0) == 1


def run(document: dict[str, Any], folder: Path, name: str, **train: Any) -> tuple[RunReport, list[dict[str, Tensor]]]:
    document = copy.deepcopy(document)
    document["train"] = {"epochs": 1, "batch_size": 32, **train}
    document["storage"]["run_dir"] = str(folder / name)
    job = resolve_job(document, source="test")
    report = run_local(job, str(folder), emit=ignore_progress, owner="test")
    with open_run(job, str(folder), device=torch.device("cpu"), emit=ignore_progress, owner="test") as session:
        results = [session.results[index] for index in sorted(session.results)]
        return report, [section_weights(session.context, result) for result in results]


@pytest.mark.slow
def test_a_training_that_spoils_a_fitted_section_is_undone(job_document: dict[str, Any], tmp_path: Path) -> None:
    wild, weights = run(job_document, tmp_path, "wild", lr=3.0)
    # No step of this one moves a weight to another level.
    _, starts = run(job_document, tmp_path, "still", lr=1e-12)
    assert all(section.kept_start for section in wild.sections)
    for ours, theirs in zip(weights, starts, strict=True):
        names = [name for name in ours if name.endswith("original")]
        assert names
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in names)
    # From the nearest levels there is nothing to go back to.
    nearest, _ = run(job_document, tmp_path, "nearest", lr=3.0, start="nearest")
    assert not any(section.kept_start for section in nearest.sections)
