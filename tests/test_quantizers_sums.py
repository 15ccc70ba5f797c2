"""Sums: which layers are summands, and what their outputs are to have more so that the sum is the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from dcq_ray.quantizers import fit_weights, fitted, put_quantizers
from dcq_ray.quantizers.moments import moments_of
from dcq_ray.quantizers.sums import Summand, summands
from dcq_ray.records import LayerPlan


class Block(nn.Module):
    """A residual block whose sum is made in some way."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], *, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.body, self.last = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.add = add

    def forward(self, images: Tensor) -> Tensor:
        skip = self.relu(self.first(images))
        value = self.last(self.relu(self.body(skip)))
        if isinstance(self.norm, nn.BatchNorm2d):
            value = self.norm(value)
        return self.add(value, skip)


def in_place(value: Tensor, other: Tensor) -> Tensor:
    value += other
    return value


def traced(add: Callable[[Tensor, Tensor], Tensor], *, norm: bool = True) -> GraphModule:
    torch.manual_seed(0)
    block = Block(add, norm=norm)
    if norm:
        nn.init.uniform_(block.norm.weight, 0.2, 2.0)  # type: ignore[arg-type]
        for number in range(20):
            block.train()(images(100 + number, 16))
    return symbolic_trace(block.eval().requires_grad_(False))


def images(seed: int, count: int = 64) -> Tensor:
    noise = torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return 3 * nn.functional.avg_pool2d(noise, 3, stride=1)


@pytest.mark.parametrize(
    "add",
    [
        lambda value, other: value + other,
        lambda value, other: other + value,
        in_place,
        torch.add,
        lambda value, other: value.add(other),
        lambda value, other: value.add_(other),
    ],
)
@pytest.mark.parametrize("norm", [True, False])
def test_the_last_layer_of_a_residual_block_is_a_summand(add: Callable[[Tensor, Tensor], Tensor], norm: bool) -> None:
    block = traced(add, norm=norm)
    found = summands(block)
    assert {name: summand.other for name, summand in found.items()} == {"last": "relu"}
    assert found["last"].norm is (block.get_submodule("norm") if norm else None)


@pytest.mark.parametrize(
    "add",
    [
        lambda value, other: value * other,
        lambda value, other: torch.add(value, other, alpha=2),
        lambda value, other: value + 1,
        lambda value, other: value + value,
        lambda value, other: (value + other) * value,
    ],
)
def test_what_is_no_sum_of_two_or_is_needed_elsewhere_is_none(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert summands(traced(add)) == {}


def test_of_two_summands_the_later_one_makes_good_what_the_earlier_lacks_and_one_called_twice_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.twice = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, value: Tensor) -> Tensor:
            total: Tensor = self.early(value) + self.late(value)
            return self.twice(self.twice(total)) + total

    assert {name: summand.other for name, summand in summands(symbolic_trace(Two())).items()} == {"late": "early"}


@pytest.mark.parametrize("norm", [True, False])
def test_with_the_shift_the_sum_is_the_teachers(norm: bool) -> None:
    block = traced(torch.add, norm=norm)
    summand = summands(block)["last"]
    output, ours, theirs = (torch.randn(40, 6) for _ in range(3))

    def normed(value: Tensor) -> Tensor:
        return block.get_submodule("norm")(value[:, :, None, None])[:, :, 0, 0] if norm else value  # type: ignore[no-any-return]

    shifted = output + summand.shift(ours, theirs)
    assert torch.allclose(normed(shifted) + ours, normed(output) + theirs, atol=1e-5)


def test_a_channel_that_the_batchnorm_hides_is_not_shifted() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.weight.data.copy_(torch.tensor([1.0, 0.0, 1e-9]))
    shift = Summand(other="skip", norm=norm).shift(torch.zeros(2, 3), torch.ones(2, 3))
    assert shift.tolist() == [[pytest.approx((1 + norm.eps) ** 0.5), 0, 0]] * 2


@pytest.mark.parametrize("norm", [True, False])
def test_a_fit_that_knows_the_sum_comes_nearer_to_the_teachers(monkeypatch: pytest.MonkeyPatch, norm: bool) -> None:
    teacher, batch = traced(torch.add, norm=norm), images(1, 256)
    layers = [
        LayerPlan(module=name, kind="Conv2d", num_weights=1, scheme="twn", bits=2) for name in ("first", "body", "last")
    ]

    def error() -> float:
        student = copy.deepcopy(teacher)
        put_quantizers(student, layers)
        fit_weights(student, teacher, [(batch, batch)], seed=0)
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        with torch.no_grad():
            return float((student(batch) - teacher(batch)).square().mean())

    with_sums = error()
    monkeypatch.setattr(fitted, "summands", lambda _: {})
    assert with_sums < error()


def test_a_share_of_what_a_sum_lacks_is_a_share_of_the_way() -> None:
    block = traced(torch.add, norm=False)
    summand, layer = summands(block)["last"], block.get_submodule("last")
    value, ours, theirs = (torch.randn(5, 6, 4, 4) for _ in range(3))

    def wanted(share: float) -> Tensor:
        found = moments_of(layer, layer, [((value, ours), (value, theirs))], summand, 0, share)
        assert found is not None
        return found.wanted

    assert torch.allclose(wanted(0.25), wanted(0.0) + 0.25 * (wanted(1.0) - wanted(0.0)), atol=1e-6)
    assert not torch.allclose(wanted(1.0), wanted(0.0), atol=1e-3)
