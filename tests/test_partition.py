"""Cuts, sections, costs and choices."""

from __future__ import annotations

import itertools
import random

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
    prefix_digests,
    quantizable_layers,
    section_costs,
    section_multiply_accumulates,
    trace_teacher,
)
from dcq_ray.partition.choice import TOLERANCE, balanced_cuts
from dcq_ray.spec import SectionsSpec


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traced(tiny_teacher: nn.Module, images: Tensor) -> TracedTeacher:
    return trace_teacher(tiny_teacher, images)


def test_legal_cuts_of_a_residual_network(traced: TracedTeacher) -> None:
    names = [point.name for point in traced.cut_points]
    # Nothing inside the residual; its join and what follows, yes.
    assert names[:3] == ["conv1", "bn1", "relu"]
    assert names[3:5] == ["add", "relu_2"]
    assert names[5:7] == ["conv2", "bn2"]
    assert not {"block.conv1", "block.bn1", "block.conv2"} & set(names)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_legal_cuts_compose_bit_for_bit(data: st.DataObject) -> None:
    torch.manual_seed(0)
    module = torchvision.models.mobilenet_v3_small(num_classes=7).eval()
    example = torch.randn(2, 3, 32, 32)
    traced = trace_teacher(module, example)
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


def test_enclosing_modules_name_the_cut_at_their_end() -> None:
    traced = trace_teacher(torchvision.models.resnet18().eval(), torch.zeros(2, 3, 32, 32))
    by_name = {point.name: point for point in traced.cut_points}
    assert "layer1" in by_name
    assert "layer1.1" in by_name["layer1"].aliases
    assert "layer1.0" in by_name


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
@given(seconds=st.lists(st.floats(0.01, 10), min_size=1, max_size=8), count=st.integers(1, 8))
def test_balanced_cuts_against_brute_force(seconds: list[float], count: int) -> None:
    count = min(count, len(seconds))
    work = [random.Random(index).randrange(1, 100) for index in range(len(seconds))]

    def largest(values: list[float], cuts: tuple[int, ...]) -> float:
        edges = [0, *(cut + 1 for cut in cuts), len(values)]
        return max(sum(values[low:high]) for low, high in itertools.pairwise(edges))

    every = list(itertools.combinations(range(len(seconds) - 1), count - 1))
    optimum = min(largest(seconds, cuts) for cuts in every)
    chosen = balanced_cuts(seconds, work, count)
    assert largest(seconds, chosen) <= optimum * TOLERANCE + 1e-9
    near = [cuts for cuts in every if largest(seconds, cuts) <= optimum * TOLERANCE - 1e-9]
    assert all(largest(list(map(float, work)), chosen) <= largest(list(map(float, work)), cuts) for cuts in near)


def test_multiply_accumulates_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    traced = trace_teacher(module, torch.zeros(3, 2, 8, 8))
    # 4 channels of 6x6, each from one channel of 3x3; then 144 x 5
    assert section_multiply_accumulates(traced, ["1"]) == (4 * 36 * 9, 144 * 5)


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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.shared(torch.relu(self.shared(self.first(x))))))


def test_a_module_used_twice_stays_in_one_section() -> None:
    traced = trace_teacher(Twice().eval(), torch.zeros(2, 4))
    assert [point.name for point in traced.cut_points] == ["first", "shared", "relu_1"]
    with pytest.raises(PartitionError, match=r"shared\.weight is used on both sides"):
        cut(traced, ["relu"])


def test_tied_parameters_stay_in_one_section() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    module[2].weight = module[0].weight
    traced = trace_teacher(module.eval(), torch.zeros(2, 4))
    assert [point.name for point in traced.cut_points] == ["2"]


class Control(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


class BakedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1) + torch.rand_like(torch.flatten(x, 1))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Control(), "cannot be traced"),
        (TwoInputs(), "takes 2 inputs"),
        (Dictionary(), "returns a dict"),
        (BakedBatch(), "size of the batch"),
        (Random(), "size of the batch|not a pure function"),
        (nn.Conv2d(1, 3, 3), "expected one tensor of logits"),
        (nn.Conv2d(5, 3, 3), r"does not run on images of shape \(1, 16, 16\)"),
    ],
)
def test_what_cannot_be_cut_says_why(module: nn.Module, reason: str, images: Tensor) -> None:
    with pytest.raises(PartitionError, match=reason):
        trace_teacher(module.eval(), images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "vit_b_16", "googlenet", "efficientnet_b0", "shufflenet_v2_x0_5"]
)
def test_torchvision_networks_compose(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    size = 224 if name == "vit_b_16" else 64
    module = torchvision.models.get_model(name, weights=None, **options).eval()
    example = torch.randn(2, 3, size, size)
    traced = trace_teacher(module, example)
    costs = measure_costs(traced, example, repeats=1)
    for count in (2, 5):
        sections = cut(traced, choose_cuts(traced, SectionsSpec(count=count), costs))
        assert len(sections) == count
        assert_composition(module, sections, example)
