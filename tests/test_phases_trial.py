"""Trials of sections: every cost is measured, and the teacher is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcq_ray.data import load_splits
from dcq_ray.digests import tensors_sha256
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import plan_job, planning_teacher, trial, try_sections
from dcq_ray.quantizers.fitted import LayerFit
from dcq_ray.storage import open_store


def test_a_start_costs_more_by_what_a_fit_sees_of_more_images(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}
    job = resolve_job({**document, "train": {**document["train"], "start_samples": 48}}, source="test")
    device = torch.device("cpu")
    splits = load_splits(job.data, seed=job.seed, job_folder=str(tmp_path))
    cache = open_store(job.storage.cache_dir)
    teacher = planning_teacher(job, str(tmp_path), splits, cache, device)
    plan = plan_job(job, teacher, splits, device=device, cache=cache)
    fit = LayerFit(module="fc", error_before=1.0, error_after=1.0, seconds_seeing=100.0)
    monkeypatch.setattr(trial, "fit_weights", lambda *_, **__: (fit, fit))
    # Tried on 32 images, made on 48; the seconds by the clock are next to none.
    for cost in try_sections(job, teacher, plan, splits.train, device):
        assert cost.start_seconds == pytest.approx(16 / 32 * 200.0, abs=5.0)


@pytest.mark.parametrize("start", ["fitted", "nearest"])
def test_every_section_is_tried_and_the_teacher_stays_as_it_is(
    start: str, job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}
    job = resolve_job({**document, "train": {**document["train"], "start": start}}, source="test")
    device = torch.device("cpu")
    splits = load_splits(job.data, seed=job.seed, job_folder=str(tmp_path))
    cache = open_store(job.storage.cache_dir)
    teacher = planning_teacher(job, str(tmp_path), splits, cache, device)
    plan = plan_job(job, teacher, splits, device=device, cache=cache)
    before = tensors_sha256(teacher.module.state_dict())
    costs = try_sections(job, teacher, plan, splits.train, device)
    assert len(costs) == len(plan.sections) == 3
    for cost in costs:
        assert min(cost.forward_seconds, cost.store_seconds, cost.step_seconds) > 0
        assert (cost.start_seconds > 0) == (start == "fitted")
    assert tensors_sha256(teacher.module.state_dict()) == before
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not (tmp_path / "cache").exists()
