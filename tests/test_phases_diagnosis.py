"""Where accuracy is lost, and what layers look like, by hand and on a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, local, num_at_once, run_local
from dcq_ray.phases.diagnosis import MAX_WATERFALL_STEPS, _ranges, level_shares, waterfall_steps
from dcq_ray.records import LayerPlan


@given(st.integers(1, 2000))
def test_the_steps_end_with_the_last_section_and_are_spread_evenly(num_sections: int) -> None:
    steps = waterfall_steps(num_sections)
    assert steps[-1] == num_sections - 1
    assert len(steps) == min(num_sections, MAX_WATERFALL_STEPS)
    gaps = {after - before for before, after in zip((-1, *steps), steps, strict=False)}
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def plan(scheme: str, bits: int, kind: str = "Conv2d") -> LayerPlan:
    return LayerPlan(module="layer", kind=kind, num_weights=8, scheme=scheme, bits=bits)


def test_shares_of_levels_by_hand() -> None:
    ternary = torch.tensor([[0.5, 0.0, -0.5, 0.5], [0.5, 0.5, 0.0, 0.5]])
    assert level_shares(ternary, torch.tensor(0.5), plan("twn", 2)) == (1 / 8, 2 / 8, 5 / 8)
    two_sided = torch.where(ternary < 0, 3.0, 1.0) * ternary
    assert level_shares(two_sided, torch.tensor([0.5, 1.5]), plan("ttq", 2)) == (1 / 8, 2 / 8, 5 / 8)
    per_channel = torch.tensor([[2.0, -2.0, 2.0, 2.0], [-3.0, -3.0, -3.0, 3.0]])
    assert level_shares(per_channel, torch.tensor([2.0, 3.0]), plan("xnor", 1)) == (0.5, 0.5)
    assert level_shares(per_channel.t(), torch.tensor([2.0, 3.0]), plan("xnor", 1, "ConvTranspose2d")) == (0.5, 0.5)
    assert level_shares(torch.zeros(2, 4), torch.tensor(0.0), plan("twn", 2)) == (1.0,)


def test_ranges_of_channels_are_over_all_batches_and_places() -> None:
    layer = nn.Conv2d(1, 3, 1, bias=False)
    layer.weight.data = torch.tensor([1.0, 0.0, -2.0]).reshape(3, 1, 1, 1)
    network = nn.Sequential()
    network.add_module("layer", layer)
    with _ranges([network], [plan("twn", 2)]) as ranges, torch.no_grad():
        network(torch.tensor([[1.0, 2.0]]).reshape(1, 1, 1, 2))
        network(torch.tensor([[-1.0, 0.0]]).reshape(1, 1, 1, 2))
    least, largest = ranges["layer"]
    assert least.tolist() == [-1.0, 0.0, -4.0]
    assert largest.tolist() == [2.0, 0.0, 2.0]
    network(torch.ones(1, 1, 1, 1) * 9)
    assert largest.tolist() == [2.0, 0.0, 2.0]


@pytest.mark.slow
def test_a_run_tells_where_it_lost_what(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve_job(job_document, source="test")
    report = run_local(job, str(tmp_path), emit=ignore_progress, owner="test")
    found, validation = report.diagnosis, report.validation
    assert found is not None
    assert validation is not None
    # All held-out images are few enough, so that both ends are those of the validation.
    assert found.num_samples == validation.num_samples == 100
    assert found.teacher_score == validation.teacher_top1
    assert found.after == tuple(range(len(report.sections)))
    assert found.scores[-1] == validation.top1
    # The first section stands on the teacher's own inputs, as it does when it is measured alone.
    assert found.scores[0] == report.sections[0].top1_alone
    assert math.fsum(found.losses) == pytest.approx(found.teacher_score - found.scores[-1])
    assert [layer.module for layer in found.layers] == [layer.module for layer in report.layers]
    for layer, told in zip(report.layers, found.layers, strict=True):
        assert len(told.level_shares) <= 2**layer.bits
        assert math.fsum(told.level_shares) == pytest.approx(1.0)
        assert 0 <= told.num_constant_channels <= told.num_channels
    # Batches beside each other, as many as this machine has cores for, tell what they tell one after the other.
    monkeypatch.setattr(local, "num_at_once", lambda *_: 1 if num_at_once(job, torch.device("cpu")) > 1 else 3)
    (tmp_path / "run" / "report.json").unlink()
    again = run_local(job, str(tmp_path), emit=ignore_progress, owner="test")
    assert (again.diagnosis, again.validation) == (found, validation)
