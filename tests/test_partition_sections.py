"""Sections: what is in them, that they compose, and what a boundary's digest covers."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

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
    cut,
    prefix_digests,
    trace_teacher,
)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traced(tiny_teacher: nn.Module, images: Tensor) -> TracedTeacher:
    return trace_teacher(tiny_teacher, images)


@functools.cache
def mobilenet() -> tuple[nn.Module, Tensor, TracedTeacher]:
    torch.manual_seed(0)
    module = torchvision.models.mobilenet_v3_small(num_classes=7).eval().requires_grad_(False)
    example = torch.randn(2, 3, 32, 32)
    return module, example, trace_teacher(module, example)


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_legal_cuts_compose_bit_for_bit(data: st.DataObject) -> None:
    module, example, traced = mobilenet()
    names = [point.name for point in traced.cut_points]
    cuts = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=6))
    sections = cut(traced, cuts)
    assert len(sections) == len(cuts) + 1
    assert_composition(module, sections, example)
    keys = [key for section in sections for key in section.state_dict()]
    assert sorted(keys) == sorted(module.state_dict())


def test_sections_are_copies_and_the_teacher_stays_as_it_is(tiny_teacher: nn.Module, traced: TracedTeacher) -> None:
    before = {name: value.clone() for name, value in tiny_teacher.state_dict().items()}
    for section in cut(traced, ["relu_2"]):
        section.train()
        for parameter in section.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in tiny_teacher.state_dict().items())
    assert not tiny_teacher.training


def test_a_cut_inside_the_residual_says_why_and_what_is_near(traced: TracedTeacher) -> None:
    with pytest.raises(
        PartitionError, match=r"block\.bn1 is no legal cut, because 2 values are live there: .* near it: .*relu"
    ):
        cut(traced, ["block.bn1"])


def test_an_unknown_cut_names_like_ones_and_twins_are_refused(traced: TracedTeacher) -> None:
    with pytest.raises(PartitionError, match=r"conv22 is not the name .* conv2"):
        cut(traced, ["conv22"])
    with pytest.raises(PartitionError, match="named twice"):
        cut(traced, ["bn2", "bn2"])


def test_a_boundarys_digest_does_not_depend_on_other_cuts_but_on_what_comes_before(
    tiny_teacher: nn.Module, images: Tensor
) -> None:
    traced = trace_teacher(tiny_teacher, images)
    alone = prefix_digests(traced, ["bn2"])
    assert prefix_digests(traced, ["relu", "relu_2", "bn2"])[3] == alone[1]
    assert prefix_digests(traced, ["relu"])[-1] == alone[-1]
    assert len(set(alone)) == 3
    tiny_teacher.fc2.bias.add_(1)
    later = prefix_digests(trace_teacher(tiny_teacher, images), ["bn2"])
    assert later[:2] == alone[:2]
    assert later[2] != alone[2]
    tiny_teacher.conv1.weight.mul_(2)
    assert prefix_digests(trace_teacher(tiny_teacher, images), ["bn2"])[1] != alone[1]


def test_sections_that_do_not_compose_are_an_error_with_the_number_of_outputs(
    tiny_teacher: nn.Module, traced: TracedTeacher, images: Tensor
) -> None:
    sections = cut(traced, ["relu_2"])
    sections[1].get_submodule("fc2").bias.add_(1)
    with pytest.raises(PartitionError, match="the 2 sections do not compose to the teacher: 4 of 4 outputs differ"):
        assert_composition(tiny_teacher, sections, images)


def test_a_boundarys_digest_covers_code_options_and_constants(images: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self, slope: float, shift: float, kernel: int) -> None:
            super().__init__()
            self.slope, self.shift = slope, torch.tensor([shift])
            self.pool, self.head = nn.MaxPool2d(kernel, 2, ceil_mode=True), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.nn.functional.leaky_relu(self.pool(x), self.slope) + self.shift
            return self.head(torch.flatten(x, 1))

    def digests(*options: float) -> tuple[str, ...]:
        torch.manual_seed(0)
        return prefix_digests(trace_teacher(Net(*options).eval(), images), ["pool", "leaky_relu", "add"])  # type: ignore[arg-type]

    def same(one: tuple[str, ...], other: tuple[str, ...]) -> list[bool]:
        return [a == b for a, b in zip(one, other, strict=True)]

    reference = digests(0.1, 1.0, 2)
    assert len(set(reference)) == 5
    assert digests(0.1, 1.0, 2) == reference
    assert same(reference, digests(0.1, 2.0, 2)) == [True, True, True, False, False]
    assert same(reference, digests(0.2, 1.0, 2)) == [True, True, False, False, False]
    assert same(reference, digests(0.1, 1.0, 1)) == [True, False, False, False, False]


def test_memory_of_a_section_goes_back_without_a_collection(traced: TracedTeacher) -> None:
    gc.disable()
    try:
        section = cut(traced, ["relu_2"])[0]
        again = copy.deepcopy(section)
        watched = [weakref.ref(section), weakref.ref(again)]
        del section, again
        assert [watch() for watch in watched] == [None, None]
    finally:
        gc.enable()
