"""Fixtures that several test modules share."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from s3_server import FaultyNetwork, s3_server
from torch import Tensor, nn

# The job states how many threads a worker has, and sums depend on it; tests state one.
torch.set_num_threads(1)


# Before xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes run the tests (`pytest -n 2 --dist loadgroup`), one of them runs all that start a Ray."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


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
def s3_port() -> Iterator[int]:
    """The port of an S3-compatible server on loopback, with credentials that are good for nothing else; skips without moto."""
    if find_spec("moto") is None or find_spec("flask") is None:
        pytest.skip("no S3-compatible server: moto[server] is not installed (pip install dcq-ray[test])")
    with pytest.MonkeyPatch.context() as patch, s3_server() as port:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield port


@pytest.fixture(scope="session")
def new_bucket(s3_port: int) -> Callable[[], str]:
    """Makes an empty bucket and gives its name."""
    system = fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{s3_port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    numbers = itertools.count()

    def make() -> str:
        name = f"bucket-{next(numbers)}"
        system.create_dir(name)
        return name

    return make


@pytest.fixture
def s3_uri(s3_port: int, new_bucket: Callable[[], str]) -> str:
    """A folder in a bucket of its own."""
    return f"s3://{new_bucket()}/runs?{s3_options(s3_port)}"


@pytest.fixture
def faulty_network(s3_port: int) -> Iterator[FaultyNetwork]:
    """A network to the same server, which fails where it is told."""
    network = FaultyNetwork(s3_port)
    try:
        yield network
    finally:
        network.close()


def s3_options(port: int) -> str:
    """The options of a URI that lead to a server on this machine."""
    return f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@pytest.fixture(scope="session", autouse=True)
def _own_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Local copies of remote files go where the tests' other files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCQ_LOCAL_CACHE", str(tmp_path_factory.mktemp("copies")))
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own; skips where this user may not mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets and teachers that DCQ_DATA names; skips where it is missing."""
    default = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("DCQ_DATA") or default)
    if not (root / "teachers").is_dir():
        pytest.skip(f"real data sets and teachers not found: {root} (name their folder in DCQ_DATA)")
    return root


USER_MODULE = '''
import torch
from torch import nn


class UserNet(nn.Module):
    """A user's own class: convolutions with BatchNorm, a residual, a head."""

    def __init__(self, width=8, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width * 16, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.pool(torch.relu(x + self.bn2(self.conv2(x))))
        return self.head(torch.flatten(x, 1))


def user_net(width=8):
    return UserNet(width)


def count_right(logits, labels):
    return (logits.argmax(1) == labels).sum().item()


def fragile(images):
    return images * float("nan")
'''


@pytest.fixture(scope="session")
def lenet_document() -> Callable[..., dict[str, Any]]:
    """Makes a job of an untrained LeNet on images that need no download: 2 sections, batches of 32, and what is given beside."""

    def made(*, data: dict[str, Any], train: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        return {
            "name": "small",
            "teacher": {"model": "dcq_ray:lenet", "args": {"image_size": 16, "final_relu": False}, "min_top1": 0},
            "data": {"dataset": "digits", "image_size": [16, 16], "batch_size": 32, **data},
            "sections": {"count": 2},
            "train": {"batch_size": 32, **(train or {})},
            **more,
        }

    return made


@pytest.fixture
def job_document(tmp_path: Path) -> dict[str, Any]:
    """A small job on real digits with a user's own network, quick enough for every test; its folder is `tmp_path`."""
    (tmp_path / "user_nets.py").write_text(USER_MODULE)
    return {
        "name": "small",
        "teacher": {"model": "user_nets:user_net", "fit": {"epochs": 4, "lr": 0.01, "batch_size": 32}},
        "data": {
            "dataset": "digits",
            "train_samples": 320,
            "held_out_samples": 100,
            "test_samples": 100,
            "batch_size": 32,
            "metric": "user_nets:count_right",
        },
        "sections": {"every": "layer"},
        "quantize": {"first_last_bits": None},
        "train": {"epochs": 3, "batch_size": 32},
        "storage": {"run_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")},
    }
