"""Data-flow graphs: of what they are made, and what is known of their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcq_ray.partition.graphs import (
    LAYER_KEY,
    TRACED_BATCH_SIZE,
    data_flow,
    function_name,
    functional_weight,
)

IMAGES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.relu(self.one(x)), self.two.weight, self.two.bias)


def test_a_graph_is_of_the_networks_own_modules_and_marks_functional_layers() -> None:
    module = Net().eval()
    flow = data_flow(module, IMAGES)
    assert flow.front_end == "torch.fx"
    nodes = {node.name: node for node in flow.graph_module.graph.nodes}
    assert flow.graph_module.get_submodule("one") is module.one
    assert nodes["linear"].meta[LAYER_KEY] == "two"
    assert functional_weight(nodes["linear"]) is nodes["two_weight"]
    assert functional_weight(nodes["relu"]) is None
    assert [function_name(nodes[name]) for name in ("relu", "linear")] == ["relu", "linear"]


def test_values_are_those_of_the_traced_batch_without_their_content() -> None:
    flow = data_flow(Net().eval(), IMAGES)
    shapes = {node.name: value for node, value in flow.values.items()}
    assert shapes["one"].shape == (TRACED_BATCH_SIZE, 5)
    assert shapes["one"].device.type == "meta"
    assert {node.name for node in flow.batched} == {"x", "one", "relu", "linear", "output"}
