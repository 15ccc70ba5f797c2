"""The paper's networks as job files: binary and ternary, on the paper's data and on what stands in for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dcq_ray.jobfile import load_job
from dcq_ray.partition import cut, quantizable_layers, trace_teacher
from dcq_ray.phases import ignore_progress, run_local
from dcq_ray.records import RunReport
from dcq_ray.spec import Job
from dcq_ray.teacher import build_network

FOLDER = Path(__file__).parents[1] / "jobs" / "paper"
JOBS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BINARY = [name for name in JOBS if name.endswith("-w1")]
STAND_INS = ("alexnet-cifar10", "resnet18-cifar10", "svhn-cifar10")
REAL = {"alexnet-imagenet": "imagefolder", "resnet18-imagenet": "imagefolder", "svhn-svhn": "svhn"}
IMAGE_SHAPES = {"lenet-mnist": (1, 28, 28), "svhn-svhn": (3, 40, 40)}
TINY = ("data.train_samples=16", "data.held_out_samples=8", "data.batch_size=8", "train.epochs=1", "train.batch_size=8")
TINY_FIT = ("teacher.fit.epochs=1", "teacher.fit.warmup_epochs=0", "teacher.fit.batch_size=8")


def _load(name: str, *overrides: str, **environment: str) -> Job:
    known = {"DCQ_DATA": "/data", "ALEXNET_BN_WEIGHTS": "/weights.safetensors", **environment}
    return load_job(str(FOLDER / f"{name}.yaml"), overrides=overrides, environment=known)


def _without(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("name", "storage")} | {
        "quantize": {**document["quantize"], "weights": None}
    }


def test_every_network_is_there_binary_and_ternary() -> None:
    networks = {"lenet-mnist", "resnet20-cifar10", "vgg11-cifar10", *STAND_INS, *REAL}
    expected = {f"{network}-{bits}" for network in networks for bits in ("w1", "ternary")}
    assert set(JOBS) == expected


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_valid_and_has_its_file_and_its_levels_in_its_name(name: str) -> None:
    job = _load(name)
    weights = job.quantize.weights
    assert job.name == name
    assert job.storage.run_dir == f"runs/{name}"
    assert (weights.scheme, weights.bits) == (("dorefa", 1) if name.endswith("-w1") else ("twn", 2))


@pytest.mark.parametrize("name", BINARY)
def test_binary_and_ternary_differ_in_nothing_else(name: str) -> None:
    binary, ternary = (_load(file).model_dump() for file in (name, name.replace("-w1", "-ternary")))
    assert _without(binary) == _without(ternary)


@pytest.mark.parametrize("name", JOBS)
def test_a_stand_in_says_so_and_names_the_real_job(name: str) -> None:
    network, _, bits = name.rpartition("-")
    comment = (FOLDER / f"{name}.yaml").read_text().partition("\nname:")[0]
    assert comment.startswith("# Stand-in:") == (network in STAND_INS)
    if network in STAND_INS:
        (real,) = (job for job in REAL if job.split("-")[0] == network.split("-")[0])
        assert f"{real}-{bits}.yaml" in comment


@pytest.mark.parametrize("name", BINARY)
def test_cuts_are_legal_and_every_section_has_something_to_quantize(name: str) -> None:
    job = _load(name, "teacher.weights=null")
    side = job.data.image_size or (32, 32)
    shape = IMAGE_SHAPES.get(name.removesuffix("-w1"), (3, *side))
    network = build_network(job.teacher, job_folder=str(FOLDER)).eval()
    traced = trace_teacher(network, torch.zeros(2, *shape))
    assert job.sections.cuts is not None
    sections = cut(traced, job.sections.cuts, copied=False)
    layers = [[layer for layer, _ in quantizable_layers(section)] for section in sections]
    if job.quantize.first_last_bits == 32:
        layers[0], layers[-1] = layers[0][1:], layers[-1][:-1]
    assert all(layers)
    assert len(layers) >= 3


def test_a_missing_variable_is_named() -> None:
    text = (FOLDER / "alexnet-imagenet-w1.yaml").read_text()
    assert yaml.safe_load(text)["teacher"]["weights"] == "${ALEXNET_BN_WEIGHTS}"
    with pytest.raises(Exception, match="ALEXNET_BN_WEIGHTS"):
        load_job(str(FOLDER / "alexnet-imagenet-w1.yaml"), environment={})


# -- a few images of each ----------------------------------------------------------------------------------------------


def _run(name: str, tmp_path: Path, *overrides: str, **environment: str) -> RunReport:
    places = (f"storage.run_dir={tmp_path / 'run'}", f"storage.cache_dir={tmp_path / 'cache'}")
    job = _load(name, *TINY, *places, "teacher.min_top1=0", *overrides, **environment)
    return run_local(job, str(FOLDER), emit=ignore_progress, owner="a test")


def _check(report: RunReport, num_sections: int) -> None:
    assert report.status == "succeeded"
    assert report.student is not None
    assert report.validation is not None
    assert len(report.sections) == num_sections


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "num_sections"),
    [
        ("lenet-mnist-w1", 3),
        ("resnet20-cifar10-ternary", 3),
        ("vgg11-cifar10-w1", 4),
        ("svhn-cifar10-ternary", 4),
        ("alexnet-cifar10-w1", 4),
        ("resnet18-cifar10-ternary", 8),
    ],
)
def test_a_job_on_data_at_hand_runs_on_a_few_images(
    name: str, num_sections: int, tmp_path: Path, data_root: Path
) -> None:
    fit = TINY_FIT if _load(name).teacher.fit else ()
    _check(_run(name, tmp_path, "data.test_samples=16", *fit, DCQ_DATA=str(data_root)), num_sections)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Noise in ImageNet's layout: a folder a class, of several sizes, one of them grey."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for number, wnid in enumerate(("n01440764", "n01443537")):
            folder = tmp_path / "imagenet" / part / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                shape = (240 + 16 * index, 300) if index == 1 else (240, 256 + 16 * number, 3)
                pixels = draw.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{index}.JPEG")
    return tmp_path / "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_sections"), [("alexnet-imagenet-w1", 4), ("resnet18-imagenet-ternary", 8)])
def test_a_job_on_imagenet_runs_on_a_few_images_of_its_layout(
    name: str, num_sections: int, tmp_path: Path, imagenet: Path
) -> None:
    report = _run(name, tmp_path, "teacher.weights=null", "data.train_samples=8", IMAGENET=str(imagenet))
    _check(report, num_sections)
    assert report.num_test_samples == 8


@pytest.mark.slow
def test_the_job_on_svhn_runs_on_a_few_images_as_torchvision_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        def __init__(self, root: str, *, split: str, download: bool) -> None:
            assert (root, download) == ("/svhn", False)
            count = 40 if split == "train" else 10
            self.data = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
            self.labels = np.arange(count) % 10

    monkeypatch.setattr("torchvision.datasets.SVHN", Fake)
    report = _run("svhn-svhn-ternary", tmp_path, *TINY_FIT, SVHN="/svhn")
    _check(report, 4)
    assert report.num_test_samples == 10
