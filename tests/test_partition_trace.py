"""Legal cuts: what they are called, and why other places are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcq_ray.errors import PartitionError
from dcq_ray.partition import cut, section_multiply_accumulates, trace_teacher

IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_legal_cuts_of_a_residual_network(tiny_teacher: nn.Module) -> None:
    names = [point.name for point in trace_teacher(tiny_teacher, IMAGES).cut_points]
    # Nothing inside the residual; its join and what follows, yes.
    assert names[:3] == ["conv1", "bn1", "relu"]
    assert names[3:5] == ["add", "relu_2"]
    assert names[5:7] == ["conv2", "bn2"]
    assert not {"block.conv1", "block.bn1", "block.conv2"} & set(names)


class Wiring(nn.Module):
    """Values made from one or two earlier ones, all joined into the logits where nothing else uses them."""

    def __init__(self, sources: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sources = sources
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in sources)

    def forward(self, x: Tensor) -> Tensor:
        values, used = [x], set()
        for layer, (one, other) in zip(self.layers, self.sources, strict=True):
            one, other = one % len(values), other % len(values)
            used |= {one, other}
            values.append(layer(values[one]) if one == other else layer(values[one]) * values[other])
        for index in range(1, len(values) - 1):
            if index not in used:
                values[-1] = values[-1] + values[index]
        return values[-1]


@settings(deadline=None, max_examples=30)
@given(sources=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=7))
def test_cuts_are_where_one_value_is_alive_by_the_definition(sources: list[tuple[int, int]]) -> None:
    traced = trace_teacher(Wiring(sources).eval().requires_grad_(False), torch.randn(2, 4))
    nodes = list(traced.graph_module.graph.nodes)
    legal = {point.node_index for point in traced.cut_points}
    for index, node in enumerate(nodes[:-1]):
        later = set(nodes[index + 1 :])
        alive = [earlier for earlier in nodes[: index + 1] if later & set(earlier.users)]
        is_output = all(user.op == "output" for user in node.users)
        assert (index in legal) == (alive == [node] and node.op != "placeholder" and not is_output)


def test_enclosing_modules_name_the_cut_at_their_end() -> None:
    traced = trace_teacher(torchvision.models.resnet18().eval(), torch.zeros(2, 3, 32, 32))
    by_name = {point.name: point for point in traced.cut_points}
    assert "layer1" in by_name
    # the block's relu is called twice: its last call ends all three
    assert by_name["layer1"].aliases == ("layer1", "layer1.1", "layer1.1.relu")
    assert "layer1.0" in by_name


class Recalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.two(self.relu(self.one(x)))))


def test_a_module_that_is_called_again_ends_at_its_last_call() -> None:
    module = Recalled().eval().requires_grad_(False)
    traced = trace_teacher(module, torch.zeros(2, 4))
    assert [point.aliases for point in traced.cut_points] == [
        ("one",),
        ("relu@0",),
        ("two",),
        ("relu",),
    ]
    assert sorted(cut(traced, ["relu"])[1].state_dict()) == ["head.bias", "head.weight"]


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class BakedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1)


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1) + torch.rand_like(torch.flatten(x, 1))


class Control(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            Control(),
            r"the teacher Control has no fixed graph to cut \(torch.fx: symbolically traced .*; torch.export: .*data",
        ),
        (TwoInputs(), r"takes 2 inputs \(x, y\)"),
        (Dictionary(), r"returns a dict \(out\)"),
        (BakedBatch(), r"returns a tensor of shape \(4, 192\)"),
        (Random(), "its forward depends on the size of the batch, or on chance"),
        (nn.Conv2d(1, 3, 3), r"returns a tensor of shape \(3, 3, 14, 14\) .* expected one tensor of logits"),
        (nn.Conv2d(5, 3, 3), r"does not run on images of shape \(1, 16, 16\)"),
    ],
)
def test_what_cannot_be_cut_says_why(module: nn.Module, reason: str) -> None:
    with pytest.raises(PartitionError, match=reason):
        trace_teacher(module.eval(), IMAGES)


def test_multiply_accumulates_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    traced = trace_teacher(module, torch.zeros(3, 2, 8, 8))
    # 4 channels of 6x6, each from one channel of 3x3; then 144 x 5
    assert section_multiply_accumulates(traced, ["1"]) == (4 * 36 * 9, 144 * 5)
    assert traced.layer_multiply_accumulates == {"0": 1296, "3": 720}
    assert [point.multiply_accumulates_before for point in traced.cut_points] == [1296, 1296, 1296]
    assert [point.num_elements for point in traced.cut_points] == [144, 144, 144]


class Chain(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.first, self.last = length, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for _ in range(self.length):
            x = x + 1
        return self.last(x)


def test_a_chain_of_two_thousand_operations_has_a_cut_behind_each() -> None:
    traced = trace_teacher(Chain(2000).eval().requires_grad_(False), torch.zeros(2, 4))
    assert len(traced.cut_points) == 2001
