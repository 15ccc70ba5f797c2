"""torch.export's graphs brought back to layers and to any size of the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dcq_ray.partition.exported import export_twice, exported_graph, module_stack

BATCHES = (torch.randn(3, 4, 6), torch.randn(5, 4, 6))


def childless(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def build(function: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return function().eval().requires_grad_(False)


class Length(nn.Module):
    """Numbers that torch.export refuses where sizes vary."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(int(x.shape[0]), 24)) / len(x)


def test_lengths_and_int_of_sizes_stay_free() -> None:
    module = build(Length)
    graph_module = exported_graph(module, export_twice(module, BATCHES), childless)
    for size in (1, 2, 7):
        images = torch.randn(size, 4, 6)
        assert torch.equal(graph_module(images), module(images))


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.flatten() for row in x])


class PlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * (len(x) + 1)


def test_another_dependence_on_the_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="its operations are others on a batch of 3 and on a batch of 5"):
        export_twice(Loop(), BATCHES)
    with pytest.raises(ValueError, match="mul takes 4 on a batch of 3, 6 on a batch of 5"):
        exported_graph(PlusOne(), export_twice(PlusOne(), BATCHES), childless)


class Calls(nn.Module):
    """Layers with hooks of their own, called twice, with options, and with a pair for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 4, 2, stride=2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.norm(self.conv(x))))
        x = self.up(x, output_size=[12])
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.flatten(1))


def test_layers_are_called_again_as_they_were_called() -> None:
    module = build(Calls)
    graph_module = exported_graph(module, export_twice(module, BATCHES), lambda part: part is not module)
    called = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    assert [node.target for node in called] == ["conv", "norm", "conv", "norm", "up", "attention", "head"]
    assert called[4].kwargs == {"output_size": [12]}
    assert called[5].kwargs == {"need_weights": False}
    assert called[5].args == (called[4],) * 3
    assert graph_module.get_submodule("conv") is module.conv
    assert [path for _, path in module_stack(called[0])] == ["conv"]
    keys = [key for node in called[:4] for key, _ in module_stack(node)]
    assert len(set(keys)) == 4
    for size in (1, 2, 7):
        images = torch.randn(size, 4, 6)
        assert torch.equal(graph_module(images), module(images))


def test_without_leaves_there_are_operations_alone() -> None:
    module = build(Calls)
    graph_module = exported_graph(module, export_twice(module, BATCHES), lambda _: False)
    assert not [node for node in graph_module.graph.nodes if node.op == "call_module"]
    names = {name for name, _ in graph_module.named_parameters()}
    assert {"conv.weight", "head.bias", "attention.in_proj_weight"} <= names
    assert dict(graph_module.named_parameters())["head.bias"] is module.head.bias


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_an_export_that_fails_prints_nothing_and_leaves_no_hook(capfd: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.ReLU(), Fails())
    with pytest.raises(Exception, match="data-dependent"):
        export_twice(module, BATCHES)
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("torch").disabled
    assert not any(part._forward_hooks for part in module.modules())
