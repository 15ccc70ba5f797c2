"""What pieces cost, and how sections share it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcq_ray.partition import CutCosts, cut, measure_costs, section_costs, trace_teacher
from dcq_ray.partition.costs import MULTIPLY_ACCUMULATES_PER_FLOAT, candidate_cuts

IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_candidates_lie_behind_norm_activation_and_pooling(tiny_teacher: nn.Module) -> None:
    names = [point.name for point in candidate_cuts(trace_teacher(tiny_teacher, IMAGES))]
    # before conv2 the join's relu; before fc1 the flattened pool; between the Linear layers the last of equals
    assert names == ["relu", "relu_2", "flatten", "dropout"]


def test_work_by_hand() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval().requires_grad_(False)
    costs = measure_costs(trace_teacher(module, torch.zeros(2, 6)), torch.zeros(2, 6), repeats=1)
    assert costs.candidates == ("1",)
    # 6 x 5 products and 5 floats that cross the cut; 5 x 3 products and none
    assert costs.work == (30 + 5 * MULTIPLY_ACCUMULATES_PER_FLOAT, 15)
    assert len(costs.forward_seconds) == len(costs.step_seconds) == 2
    assert min(*costs.forward_seconds, *costs.step_seconds) > 0


def test_measuring_leaves_the_teacher_as_it_is(tiny_teacher: nn.Module) -> None:
    kept = torch.ones_like(tiny_teacher.fc2.bias)
    tiny_teacher.fc2.bias.requires_grad_(True)
    tiny_teacher.fc2.bias.grad = kept
    before = {name: value.clone() for name, value in tiny_teacher.state_dict().items()}
    measure_costs(trace_teacher(tiny_teacher, IMAGES), IMAGES, repeats=2)
    assert all(torch.equal(before[name], value) for name, value in tiny_teacher.state_dict().items())
    assert [name for name, value in tiny_teacher.named_parameters() if value.requires_grad] == ["fc2.bias"]
    assert tiny_teacher.fc2.bias.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert tiny_teacher.conv1.weight.grad is None


def test_sections_cost_what_their_pieces_cost() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 8), nn.Flatten()).eval()
    traced = trace_teacher(module.requires_grad_(False), torch.zeros(2, 4))
    costs = CutCosts(
        candidates=("0", "2"), forward_seconds=(1.0, 2.0, 3.0), step_seconds=(2.0, 4.0, 6.0), work=(1, 1, 1)
    )
    assert section_costs(traced, costs, ("0", "2")) == ((1.0, 2.0), (2.0, 4.0), (3.0, 6.0))
    assert section_costs(traced, costs, ("2",)) == ((3.0, 6.0), (3.0, 6.0))
    assert section_costs(traced, costs, ()) == ((6.0, 12.0),)
    # "1" is no candidate, but all of the second piece's products are before it
    assert section_costs(traced, costs, ("1",)) == ((3.0, 6.0), (3.0, 6.0))


def test_pieces_that_are_not_copied_are_the_teachers_own(tiny_teacher: nn.Module) -> None:
    traced = trace_teacher(tiny_teacher, IMAGES)
    shared, copied = cut(traced, ["relu"], copied=False), cut(traced, ["relu"])
    assert shared[0].get_submodule("conv1") is tiny_teacher.conv1
    assert copied[0].get_submodule("conv1") is not tiny_teacher.conv1
    assert torch.equal(copied[0](IMAGES), shared[0](IMAGES))
    with pytest.raises(AttributeError):
        shared[1].get_submodule("conv1")
