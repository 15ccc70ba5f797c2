"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

# The job states how many threads a worker has, and sums depend on it; tests state one.
torch.set_num_threads(1)


class TinyResidualNet(nn.Module):
    """A user's network in small: BatchNorm, a residual join, a functional call, dropout, a Linear head."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(8, 8, 3, padding=1, bias=False),
                "bn1": nn.BatchNorm2d(8),
                "conv2": nn.Conv2d(8, 8, 3, padding=1, bias=False),
                "bn2": nn.BatchNorm2d(8),
            }
        )
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(16, 16)
        self.fc2 = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.block["bn1"](self.block["conv1"](x)))
        x = torch.relu(x + self.block["bn2"](self.block["conv2"](y)))
        x = torch.relu_(self.bn2(self.conv2(x)))
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        x = self.dropout(torch.relu(self.fc1(x)))
        result: Tensor = self.fc2(x)
        return result


@pytest.fixture
def tiny_teacher() -> TinyResidualNet:
    """A TinyResidualNet in eval mode with fixed weights and BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(0)
    network = TinyResidualNet()
    with torch.no_grad():
        network.train()
        for _ in range(3):
            network(torch.randn(32, 1, 16, 16))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets and teachers that DCQ_DATA names; skips where it is missing."""
    default = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("DCQ_DATA") or default)
    if not (root / "teachers").is_dir():
        pytest.skip(f"real data sets and teachers not found: {root} (name their folder in DCQ_DATA)")
    return root
