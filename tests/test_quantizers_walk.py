"""The walk: every layer gets what it gets in a whole run, whatever is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from dcq_ray.quantizers.walk import Walk


class Residual(nn.Module):
    """In-place modules, a value that is used later, a layer that is called twice, a keyword argument, and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu, self.norm = nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, value: Tensor) -> Tensor:
        value = self.relu(self.first(value))
        other = self.norm(self.again(value))
        other += value
        value = self.again(input=self.relu(other))
        result: Tensor = self.last(value.flatten(2).mean(2).view(value.size(0), -1))
        return result


def network() -> GraphModule:
    torch.manual_seed(0)
    return symbolic_trace(Residual().eval().requires_grad_(False))


def seen_in_whole_runs(module: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        this: dict[str, Tensor] = {}
        handles = []
        for name, layer in module.named_children():

            def hook(
                _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name, this: Any = this
            ) -> None:
                this.setdefault(name, (inputs[0] if inputs else named["input"]).clone())

            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        module(batch.clone())
        for handle in handles:
            handle.remove()
        for name, value in this.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("max_kept_bytes", [0, 20_000, 2**30])
def test_every_layer_gets_what_it_gets_in_a_whole_run(max_kept_bytes: int) -> None:
    module = network()
    batches = [torch.randn(count, 3, 6, 6) for count in (4, 4, 3)]
    before = [batch.clone() for batch in batches]
    wanted = seen_in_whole_runs(module, batches)
    walk = Walk(module, batches, max_kept_bytes=max_kept_bytes)
    calls = walk.first_calls()
    assert list(calls) == ["first", "relu", "again", "norm", "last"]
    for name, node in calls.items():
        found = [value for value, _ in walk.inputs_of(node)]
        assert len(found) == len(batches)
        assert all(one.equal(other) for one, other in zip(found, wanted[name], strict=True)), name
    assert all(one.equal(other) for one, other in zip(batches, before, strict=True))


def test_what_is_kept_is_not_computed_again_and_what_does_not_fit_is() -> None:
    module = network()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    for max_kept_bytes, wanted in ((2**30, 2), (0, 6)):
        walk = Walk(module, batches, max_kept_bytes=max_kept_bytes)
        ran: list[int] = []
        handle = module.first.register_forward_hook(lambda *_, ran=ran: ran.append(1))  # type: ignore[union-attr, operator]
        for name in ("first", "again", "norm", "last"):
            list(walk.inputs_of(walk.first_calls()[name]))
        handle.remove()
        assert len(ran) == wanted


def test_a_layer_that_changes_on_the_way_changes_what_comes_after_it() -> None:
    module = network()
    batch = torch.randn(4, 3, 6, 6)
    walk = Walk(module, [batch], max_kept_bytes=2**30)
    calls = walk.first_calls()
    list(walk.inputs_of(calls["first"]))
    module.first.bias.add_(1.0)  # type: ignore[operator, union-attr]
    assert next(iter(walk.inputs_of(calls["again"])))[0].equal(torch.relu(module.first(batch)))  # type: ignore[operator]


def test_a_layers_own_hooks_have_done_their_work() -> None:
    module = network()
    module.again.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))  # type: ignore[union-attr, operator]
    batch = torch.randn(4, 3, 6, 6)
    walk = Walk(module, [batch], max_kept_bytes=2**30)
    wanted = 2 * torch.relu(module.first(batch))  # type: ignore[operator]
    assert next(iter(walk.inputs_of(walk.first_calls()["again"])))[0].equal(wanted)
