"""Sizes taken where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from dcq_ray.partition.sizes import size_locally


def traced(function: Callable[[Tensor], Tensor]) -> tuple[GraphModule, tuple[dict[Node, Any], dict[Node, Any]]]:
    """A function's graph, and all its values on 3 and on 1 rows of 4 x 6."""
    graph_module = fx.symbolic_trace(function)
    runs = []
    for size in (3, 1):
        values: dict[Node, Any] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, node: Node) -> Any:
                value = super().run_node(node)
                values[node] = value  # noqa: B023 (used before the loop goes on)
                return value

        Recorder(graph_module).run(torch.randn(size, 4, 6))
        runs.append(values)
    return graph_module, (runs[0], runs[1])


def at_the_end(x: Tensor) -> Tensor:
    b, t, c = x.shape
    return torch.relu(x * 2).view(b, t * c)


def through_windows(x: Tensor) -> Tensor:
    b = x.size(0)
    return torch.relu(x.view(b * 2, 2, 6)).view(b, -1)


def batch_second(x: Tensor) -> Tensor:
    shape = x.shape
    return torch.relu(x.transpose(0, 1).contiguous()).transpose(0, 1).reshape(shape[0], -1)


def as_a_shape(x: Tensor) -> Tensor:
    shape = x.shape
    return torch.relu(x.flatten(1)).view(shape).flatten(1)


class Token(nn.Module):
    """What needs the size of the batch has no batch of its own: it is taken from what is alive beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        y = torch.relu(x * 3)
        return torch.cat([self.token.expand(b, -1, -1), y], dim=1).flatten(1)


@pytest.mark.parametrize("function", [at_the_end, through_windows, batch_second, as_a_shape, Token()])
def test_the_images_are_not_alive_behind_their_first_use(function: Callable[[Tensor], Tensor]) -> None:
    graph_module, runs = traced(function)
    assert size_locally(graph_module, runs)
    placeholder = next(iter(graph_module.graph.nodes))
    users = [node for node in placeholder.users if node.target not in ("size", getattr)]
    assert len(placeholder.users) - len(users) <= 1
    nodes = list(graph_module.graph.nodes)
    assert max(nodes.index(user) for user in placeholder.users) < nodes.index(
        next(node for node in nodes if getattr(node.target, "__name__", "") == "relu")
    )
    for size in (1, 2, 3, 7):
        images = torch.randn(size, 4, 6)
        assert torch.equal(graph_module(images), function(images))


def test_a_graph_without_sizes_stays_as_it_is() -> None:
    graph_module, runs = traced(lambda x: torch.relu(x).flatten(1))
    before = graph_module.code
    assert not size_locally(graph_module, runs)
    assert graph_module.code == before


def test_numbers_that_go_with_the_batch_in_another_way_stay_where_they_are() -> None:
    def plus_one(x: Tensor) -> Tensor:
        return torch.cat([x, x[:1]]).view(x.shape[0] + 1, -1)[: x.shape[0]]

    graph_module, runs = traced(plus_one)
    size_locally(graph_module, runs)
    for size in (1, 2, 5):
        images = torch.randn(size, 4, 6)
        assert torch.equal(graph_module(images), plus_one(images))


class Unpacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x)
        return y.flatten(1)


def test_parts_of_a_tuple_that_nobody_uses_go() -> None:
    graph_module, runs = traced(Unpacks())  # type: ignore[arg-type]
    assert size_locally(graph_module, runs)
    assert [node.name for node in graph_module.graph.nodes] == ["x", "gru", "getitem", "flatten", "output"]


def test_a_number_made_of_data_is_no_constant() -> None:
    def scaled(x: Tensor) -> Tensor:
        width = x.shape[-1] ** -0.5
        return torch.relu(x).flatten(1) * (x > 2).sum().item() * width

    graph_module = fx.symbolic_trace(scaled)
    runs = []
    for size in (3, 1):
        values: dict[Node, Any] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, node: Node) -> Any:
                values[node] = super().run_node(node)  # noqa: B023 (used before the loop goes on)
                return values[node]  # noqa: B023

        # on zeros, the number is 0 whatever the size
        Recorder(graph_module).run(torch.zeros(size, 4, 6))
        runs.append(values)
    assert size_locally(graph_module, (runs[0], runs[1]))
    assert "shape" not in graph_module.code
    images = 3 * torch.ones(2, 4, 6)
    # 48 values above 2, over the root of 6
    assert torch.equal(graph_module(images), scaled(images))
    assert graph_module(images)[0, 0] == pytest.approx(3 * 48 / 6**0.5)
