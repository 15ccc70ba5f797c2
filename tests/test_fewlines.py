"""`dcq_ray.quantize`: the same run as the command line's, from objects or names."""

from __future__ import annotations

import copy
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dcq_ray
from dcq_ray.errors import JobError, UsageError
from dcq_ray.report import report_html
from dcq_ray.report.words import verdict

README = Path(__file__).parents[1] / "README.md"
SMALL: dict[str, Any] = {"train.batch_size": 32, "teacher.min_top1": 0}


def blobs(num: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images of three classes that a small network tells apart: one third of each is bright."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    images = generator.uniform(0, 0.3, (num, 1, 9, 9)).astype(np.float32)
    for index, label in enumerate(labels):
        images[index, :, 3 * label : 3 * label + 3] += 0.6
    return images, labels


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)
    )
    images, labels = (torch.from_numpy(value) for value in blobs(120))
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    return module


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_module_and_arrays_give_a_student_and_its_report(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    num_threads = torch.get_num_threads()
    done = dcq_ray.quantize(model, blobs(120), test=blobs(30, seed=1), bits=2, sections=2, settings=SMALL)
    assert done.report.status == "succeeded"
    assert len(done.report.sections) == 2
    images, labels = (torch.from_numpy(value) for value in blobs(30, seed=1))
    assert done.report.student is not None
    assert done.report.student.top1 == pytest.approx((done.student(images).argmax(1) == labels).double().mean().item())
    assert not done.student.training
    assert done.run_dir == "runs/Sequential"
    assert (tmp_path / "runs" / "Sequential" / "report.html").exists()
    # The second layer's weights have the levels of two bits, and the caller's own module is as it was.
    assert len(done.student.state_dict()["2.weight"].unique()) <= 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == num_threads
    assert "section 0 done" in capsys.readouterr().out
    # What a notebook shows: one line where it shows text, else the page, escaped once.
    assert repr(done) == f"Quantized(run_dir='runs/Sequential'): {verdict(done.report)}"
    shown = re.fullmatch(
        r'<iframe title="Report of Sequential" style="[^"]*" srcdoc="([^"]*)"></iframe>', done._repr_html_()
    )
    assert shown is not None
    assert html.unescape(shown[1]) == report_html(done.report)


def test_called_again_it_returns_what_is_finished_and_exports_it(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"sections": 2, "name": "again", "settings": SMALL}
    first = dcq_ray.quantize(model, blobs(120), progress=False, **arguments)
    assert capsys.readouterr().out == ""
    second = dcq_ray.quantize(model, blobs(120), **arguments)
    assert second.report == first.report
    assert "section 0 running" not in capsys.readouterr().out
    done = second.export("student.dcq")
    assert done.num_bytes == (tmp_path / "student.dcq").stat().st_size
    images = torch.from_numpy(blobs(9)[0])
    loaded = dcq_ray.load("student.dcq", network=model_like(model))
    assert torch.equal(loaded(images), second.student(images))


def model_like(model: nn.Module) -> nn.Module:
    """The same layers with other weights."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for value in fresh.parameters():
            value.zero_()
    return fresh


def test_another_model_of_the_same_name_is_trained_anew(model: nn.Module) -> None:
    first = dcq_ray.quantize(model, blobs(120), sections=2, name="same", settings=SMALL, progress=False)
    with torch.no_grad():
        model_2 = model_like(model)
        model_2.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    second = dcq_ray.quantize(model_2, blobs(120), sections=2, name="same", settings=SMALL, progress=False)
    assert first.report.teacher.sha256 != second.report.teacher.sha256
    assert first.report.student != second.report.student


def test_a_dataset_gives_what_its_arrays_give(model: nn.Module) -> None:
    images, labels = (torch.from_numpy(value) for value in blobs(120))
    students = [
        dcq_ray.quantize(model, data, bits=1, sections=2, run_dir=name, settings=SMALL, progress=False)
        for name, data in (("a", (images, labels)), ("b", TensorDataset(images, labels)))
    ]
    states: list[dict[str, Tensor]] = [done.student.state_dict() for done in students]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_it_gives_the_same_student(job_document: dict[str, Any]) -> None:
    names = ("train_samples", "held_out_samples", "test_samples", "metric")
    settings = {
        "teacher.fit": job_document["teacher"]["fit"],
        "train.batch_size": 32,
        **{f"data.{name}": job_document["data"][name] for name in names},
    }
    here, there = (
        dcq_ray.quantize(
            job_document["teacher"]["model"],
            "digits",
            sections=3,
            run_dir=run_dir,
            address=address,
            # A cache of its own, so that Ray's tasks dump the activations too.
            settings={**settings, "storage.cache_dir": f"cache-{run_dir}"},
            progress=False,
        )
        for run_dir, address in (("here", None), ("there", "local"))
    )
    assert there.report.student == here.report.student
    assert there.report.validation == here.report.validation
    states = here.student.state_dict(), there.student.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_the_readmes_example_runs(model: nn.Module) -> None:
    blocks = re.findall(r"```python\n(import dcq_ray\n.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    images, labels = blobs(300)
    found: dict[str, Any] = {"model": model, "images": images, "labels": labels}
    exec(compile(blocks[0], "README.md", "exec"), found)
    assert found["done"].report.status == "succeeded"
    assert Path("student.dcq").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"dataset": blobs(9), "address": "local"}, UsageError, "model that is an object"),
        ({"model": "dcq_ray:lenet", "dataset": blobs(9), "address": "local"}, UsageError, "dataset that is an object"),
        ({"model": 3}, UsageError, "got a int, expected a torch.nn.Module"),
        ({"dataset": "digits", "test": blobs(9)}, UsageError, "beside the data set 'digits'"),
        ({"settings": {"train.lr": torch.zeros(1)}}, UsageError, r"settings\['train.lr'\]: got a Tensor"),
        ({"settings": {"train.speed": 1}}, JobError, "train.speed"),
        ({"bits": 9}, JobError, "quantize.weights.bits"),
        ({"scheme": "xnor", "bits": 2}, JobError, "xnor"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    model: nn.Module, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], told: str
) -> None:
    given: dict[str, Any] = {"model": model, "dataset": blobs(120), **arguments}
    with pytest.raises(error, match=told):
        dcq_ray.quantize(given.pop("model"), given.pop("dataset"), **given)
    assert list(tmp_path.iterdir()) == []


def test_texts_in_settings_are_no_variables(model: nn.Module) -> None:
    settings = {**SMALL, "storage.cache_dir": "cache-${HOME}"}
    done = dcq_ray.quantize(model, blobs(120), sections=2, settings=settings, progress=False)
    assert done.job.storage.cache_dir == "cache-${HOME}"
    assert Path("cache-${HOME}").is_dir()
