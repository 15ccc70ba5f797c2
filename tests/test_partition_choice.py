"""Choosing cuts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcq_ray.errors import PartitionError
from dcq_ray.partition import (
    TracedTeacher,
    assert_composition,
    choose_cuts,
    cut,
    describe_section,
    measure_costs,
    quantizable_layers,
    section_costs,
    section_multiply_accumulates,
    trace_teacher,
)
from dcq_ray.partition.choice import balanced_cuts
from dcq_ray.spec import SectionsSpec


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traced(tiny_teacher: nn.Module, images: Tensor) -> TracedTeacher:
    return trace_teacher(tiny_teacher, images)


@pytest.mark.parametrize("spec", [{"count": 1}, {"count": 2}, {"count": 5}, {"every": "layer"}])
def test_choices_give_a_layer_to_every_section(
    tiny_teacher: nn.Module, traced: TracedTeacher, images: Tensor, spec: dict[str, object]
) -> None:
    costs = measure_costs(traced, images, repeats=1)
    cuts = choose_cuts(traced, SectionsSpec.model_validate(spec), costs)
    sections = cut(traced, cuts)
    assert len(sections) == spec.get("count", len(sections))
    assert all(quantizable_layers(section) for section in sections)
    assert_composition(tiny_teacher, sections, images)
    assert len(section_costs(traced, costs, cuts)) == len(sections)
    assert sum(section_multiply_accumulates(traced, cuts)) == traced.total_multiply_accumulates
    assert sum(describe_section(section)[1] for section in sections) == sum(
        p.numel() for p in tiny_teacher.parameters()
    )


def test_too_many_sections_name_the_greatest_number(traced: TracedTeacher, images: Tensor) -> None:
    costs = measure_costs(traced, images, repeats=1)
    with pytest.raises(PartitionError, match="got 40, but the teacher can be cut into at most 5"):
        choose_cuts(traced, SectionsSpec(count=40), costs)


def test_blocks_of_a_resnet() -> None:
    traced = trace_teacher(torchvision.models.resnet18().eval(), torch.zeros(2, 3, 32, 32))
    costs = measure_costs(traced, torch.zeros(2, 3, 32, 32), repeats=1)
    cuts = choose_cuts(traced, SectionsSpec(every="block"), costs)
    assert cuts == ("layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4")


def test_no_blocks_is_an_error(traced: TracedTeacher, images: Tensor) -> None:
    with pytest.raises(PartitionError, match="finds no block"):
        choose_cuts(traced, SectionsSpec(every="block"), measure_costs(traced, images, repeats=1))


@settings(deadline=None, max_examples=60)
@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=8), count=st.integers(1, 8))
def test_balanced_cuts_against_brute_force(costs: list[int], count: int) -> None:
    count = min(count, len(costs))

    def largest(cuts: tuple[int, ...]) -> int:
        edges = [0, *(cut + 1 for cut in cuts), len(costs)]
        return max(sum(costs[low:high]) for low, high in itertools.pairwise(edges))

    every = list(itertools.combinations(range(len(costs) - 1), count - 1))
    chosen = balanced_cuts(costs, count)
    assert chosen in every
    assert largest(chosen) == min(map(largest, every))


def test_measured_seconds_do_not_change_the_cuts(traced: TracedTeacher, images: Tensor) -> None:
    costs = measure_costs(traced, images, repeats=1)
    other = replace(costs, step_seconds=tuple(reversed(costs.step_seconds)), forward_seconds=costs.step_seconds)
    assert choose_cuts(traced, SectionsSpec(count=3), costs) == choose_cuts(traced, SectionsSpec(count=3), other)
