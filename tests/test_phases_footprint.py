"""The memory of workers: every part of the bound by hand, and what a step keeps as autograd has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import Footprint, SectionCosts, dump_footprint, section_footprint
from dcq_ray.phases.footprint import BASE_BYTES
from dcq_ray.phases.trial import kept_by
from dcq_ray.quantizers import fit_num_bytes, put_quantizers
from dcq_ray.records import Boundary, LayerPlan, PartitionPlan, SectionPlan
from dcq_ray.spec import Job

COST = SectionCosts(forward_seconds=1.0, store_seconds=1.0, step_seconds=1.0, start_seconds=1.0)
COSTS = (replace(COST, kept_bytes=1000, moments_bytes=77), replace(COST, kept_bytes=600))


def _job(job_document: dict[str, Any], **train: Any) -> Job:
    document = {**job_document, "train": {"epochs": 1, "batch_size": 10, "look_ahead": 0, **train}}
    return resolve_job({**document, "data": {**job_document["data"], "batch_size": 20}}, source="test")


def make_plan() -> PartitionPlan:
    """Two sections between boundaries of 6, 5 and 2 numbers a sample, 3,000 samples."""
    shapes = ((3, 2), (5,), (2,))
    boundaries = tuple(
        Boundary(index=index, cut=f"c{index}", shape=shape, num_samples=3000, dtype="float16", digest=f"d{index}")
        for index, shape in enumerate(shapes)
    )
    sections = tuple(
        SectionPlan(
            index=index,
            modules=(),
            layers=(),
            num_parameters=100 * (index + 1),
            forward_seconds=1.0,
            step_seconds=1.0,
            multiply_accumulates=1,
        )
        for index in range(2)
    )
    return PartitionPlan(
        key="k",
        teacher_sha256="t",
        teacher_num_bytes=1200,
        input_shape=(3, 2),
        boundaries=boundaries,
        sections=sections,
        unquantized_parameters=(),
        num_parameters=300,
        num_unquantized=0,
        num_bytes_packed=1,
        total_multiply_accumulates=2,
    )


@pytest.fixture
def plan() -> PartitionPlan:
    return make_plan()


def test_the_parts_of_a_section_are_those_of_the_formula(job_document: dict[str, Any], plan: PartitionPlan) -> None:
    found = section_footprint(plan, _job(job_document, start="nearest"), 0, COSTS)
    # 100 bytes are kept of a sample, and batches have 20; 6 numbers come in, and 5 are wanted.
    assert found == Footprint(
        base_bytes=BASE_BYTES,
        teacher_bytes=1200,
        section_bytes=44 * 100,
        resident_bytes=3000 * (12 + 10),
        step_bytes=2 * 100 * 20 + 12 * 20 * 11,
    )
    assert found.num_bytes == BASE_BYTES + 1200 + 4400 + 66000 + 4000 + 2640


def test_boundaries_that_do_not_fit_stay_in_their_files(job_document: dict[str, Any], plan: PartitionPlan) -> None:
    job = _job(job_document, start="nearest")
    # Half of it for each of the two: 36,000 bytes are too many, 30,000 are not.
    assert section_footprint(plan, job, 0, COSTS, 2 * 30_000).resident_bytes == 30_000
    assert section_footprint(plan, job, 0, COSTS, 0).resident_bytes == 0


def test_look_ahead_keeps_what_the_sections_after_it_keep(job_document: dict[str, Any], plan: PartitionPlan) -> None:
    job = _job(job_document, start="nearest", look_ahead=1)
    assert section_footprint(plan, job, 0, COSTS).step_bytes == 2 * 160 * 20 + 12 * 20 * 11
    assert section_footprint(plan, job, 1, COSTS).step_bytes == 2 * 60 * 20 + 12 * 20 * 7


def test_a_fitted_start_holds_its_images(job_document: dict[str, Any], plan: PartitionPlan) -> None:
    job = _job(job_document, start="fitted", start_samples=50)
    found = section_footprint(plan, job, 0, COSTS)
    assert found.start_bytes == 50 * 8 * 6 + 2 * 50 * 100 + 77 + 100 * 20


def test_opening_a_large_teacher_may_be_the_most(job_document: dict[str, Any], plan: PartitionPlan) -> None:
    large = replace(plan, teacher_num_bytes=10**9)
    found = section_footprint(large, _job(job_document, start="nearest"), 0, COSTS)
    assert found.num_bytes == BASE_BYTES + 3 * 10**9


def test_a_dump_holds_a_slice_whatever_the_number_of_images(job_document: dict[str, Any], plan: PartitionPlan) -> None:
    job = _job(job_document)
    # 51 batches of 20 are the most within 1,024 samples; 12, 10 and 4 bytes a sample, and a shard of 12.
    found = dump_footprint(plan, job, COSTS)
    assert found.resident_bytes == 1020 * (26 + 12)
    assert found.step_bytes == 2 * 100 * 20
    boundaries = tuple(replace(boundary, num_samples=8 * boundary.num_samples) for boundary in plan.boundaries)
    assert dump_footprint(replace(plan, boundaries=boundaries), job, COSTS) == found


def test_what_a_step_keeps_is_counted_once_and_without_parameters() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    inputs = torch.randn(4, 6)

    def step() -> None:
        module(inputs).sum().backward()

    # The first layer's input, and what the ReLU gives, which both the ReLU and the second layer keep.
    assert kept_by(step, module) == 4 * 4 * (6 + 5)


def test_a_fits_memory_is_that_of_its_largest_layer() -> None:
    network = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2)))
    names = {"0": "conv", "2": "linear"}
    layers = [LayerPlan(module=name, kind=kind, num_weights=1, scheme="dorefa", bits=2) for name, kind in names.items()]
    put_quantizers(network, layers, {})
    # Two groups of 18 inputs, 6 rows: five float64 copies; windows of 16 places in 8 images, four times in float32.
    assert fit_num_bytes(network, 8) == 5 * 8 * 18 * (2 * 18 + 6) + 4 * 4 * 8 * 16 * 2 * 18
