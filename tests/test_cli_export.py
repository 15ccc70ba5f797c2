"""`dcq-ray export` on a finished run: what it writes is the student, and what is not is not written."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner, Result
from torch import nn

import dcq_ray
from dcq_ray.cli import cli
from dcq_ray.data import load_splits, ordered_batches
from dcq_ray.errors import ExportError, UsageError
from dcq_ray.export import Student, export_student, finished_report, open_student
from dcq_ray.export import writing as export_writing
from dcq_ray.export.packed import open_packed
from dcq_ray.jobfile import load_job
from dcq_ray.networks import lenet
from dcq_ray.phases import ignore_progress, run_local
from dcq_ray.records import seal_json
from dcq_ray.storage import open_store
from dcq_ray.validate import predict, top_k

NETWORK = {"image_size": 16, "final_relu": False}


def job_of(folder: Path, **changes: object) -> str:
    job = {
        "name": "small",
        "teacher": {"model": "dcq_ray:lenet", "args": NETWORK, "fit": {"epochs": 3, "lr": 0.005, "batch_size": 32}},
        "data": {
            "dataset": "digits",
            "image_size": [16, 16],
            "train_samples": 320,
            "held_out_samples": 100,
            "test_samples": 100,
            "batch_size": 32,
        },
        "sections": {"count": 2},
        "quantize": {"weights": {"scheme": "dorefa", "bits": 1}},
        "train": {"epochs": 1, "batch_size": 32, "start": "nearest"},
        "storage": {"run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return str(path)


def finished_run(folder: Path, **changes: object) -> str:
    path = job_of(folder, **changes)
    run_local(load_job(path, overrides=(), environment={}), job_folder=str(folder), emit=ignore_progress, owner="test")
    return str(folder / "run")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of 1-bit weights, 8 in the first and the last layer."""
    return finished_run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def run_with_inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run with quantized inputs."""
    quantize = {"weights": {"scheme": "lsq", "bits": 2}, "activations": {"scheme": "lsq", "bits": 4}}
    return finished_run(tmp_path_factory.mktemp("inputs"), quantize=quantize)


@pytest.fixture
def student(run_dir: str) -> Student:
    store = open_store(run_dir)
    job = load_job(f"{run_dir}/job.yaml", overrides=(), environment={})
    return open_student(store, finished_report(store), job, job_folder=".")


def export(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["export", *arguments], catch_exceptions=False)


def held_out_top1(network: nn.Module, run: str) -> float:
    job = load_job(f"{run}/job.yaml", overrides=(), environment={})
    part = load_splits(job.data, seed=job.seed, job_folder=".").held_out
    logits = predict(network, (images for images, _ in ordered_batches(part, 32)), torch.device("cpu"))
    assert part.labels is not None
    return top_k(logits, torch.from_numpy(part.labels), 1)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["run_dir", "run_with_inputs"])
def test_a_packed_file_is_the_student_with_its_accuracy(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(fixture)
    path = tmp_path / "made" / "student.dcq"
    done = export(run, "--format", "packed", "-o", str(path))
    assert done.exit_code == 0
    assert f"wrote {path}: {path.stat().st_size:,} bytes, 1/" in done.stdout
    assert "run on 100 held-out images: the student's top-1 of " in done.stdout
    report = finished_report(open_store(run))
    assert report.student is not None
    assert report.validation is not None
    assert held_out_top1(dcq_ray.load(str(path)), run) == report.validation.top1
    found = open_packed(path.read_bytes(), source="").metadata
    assert found["run"] == "small"
    assert found["run_digest"] == report.run_digest
    assert found["teacher_sha256"] == report.teacher.sha256
    assert float(found["held_out_top1"]) == report.validation.top1
    assert float(found["test_top1"]) == report.student.top1
    assert found["dcq_ray"] == dcq_ray.__version__
    assert os.listdir(path.parent) == ["student.dcq"]


@pytest.mark.slow
def test_safetensors_fit_the_teachers_own_class(run_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    assert export(run_dir, "--format", "safetensors", "-o", str(path)).exit_code == 0
    network = lenet(**NETWORK)
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    report = finished_report(open_store(run_dir))
    assert report.validation is not None
    assert held_out_top1(network, run_dir) == report.validation.top1
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["run_digest"] == report.run_digest
    assert float(metadata["held_out_top1"]) == report.validation.top1


@pytest.mark.slow
def test_safetensors_name_the_quantizers_of_inputs(run_with_inputs: str, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    assert export(run_with_inputs, "--format", "safetensors", "-o", str(path)).exit_code == 0
    names = set(safetensors.torch.load_file(path))
    extra = {name for name in names if name.startswith("dcq.")}
    assert {name.rpartition(".")[2] for name in extra} == {"input_bits", "input_signed", "input_step"}
    assert names - extra == set(lenet(**NETWORK).state_dict())


@pytest.mark.slow
def test_a_file_that_gives_other_results_is_refused_and_the_older_one_stays(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student.dcq"
    export_student(student, "packed", str(path))
    older = path.read_bytes()
    wrong = replace(student, logits=student.logits + 1e-3 * student.logits.abs().max())
    with pytest.raises(ExportError, match=r"student\.dcq \(packed\): its logits differ from the student's by 1\.0e-03"):
        export_student(wrong, "packed", str(path))
    assert path.read_bytes() == older

    # And a writer that errs.
    def flawed(*arguments: object, **named: object) -> bytes:
        return b"dcq-pack" + bytes(100)

    monkeypatch.setattr(export_writing, "pack", flawed)
    with pytest.raises(ExportError, match="version 0"):
        export_student(student, "packed", str(path))
    assert path.read_bytes() == older
    assert os.listdir(tmp_path) == ["student.dcq"]


@pytest.mark.slow
def test_without_labels_the_students_predictions_count(student: Student, tmp_path: Path) -> None:
    unlabelled = replace(student, held_out=replace(student.held_out, labels=None))
    path = tmp_path / "student.dcq"
    done = export_student(unlabelled, "packed", str(path))
    assert (done.num_samples, done.num_bytes) == (100, path.stat().st_size)
    swapped = replace(unlabelled, logits=student.logits.flip(1))
    with pytest.raises(ExportError, match="got agreement with the student"):
        export_student(swapped, "packed", str(path))


@pytest.mark.slow
def test_a_students_file_that_was_changed_is_not_exported(run_dir: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    state = safetensors.torch.load_file(run / "student.safetensors")
    state["conv1.bias"] += 1
    safetensors.torch.save_file(state, run / "student.safetensors")
    with pytest.raises(ExportError, match=r"student\.safetensors: got tensors of SHA-256 \w+, expected"):
        export(str(run), "--format", "packed", "-o", str(tmp_path / "s.dcq"))
    assert not (tmp_path / "s.dcq").exists()


@pytest.mark.slow
def test_ones_own_network_is_given_not_imported(student: Student, tmp_path: Path) -> None:
    path = tmp_path / "student.dcq"
    teacher = student.job.teacher.model_copy(update={"model": "dcq_ray.networks:lenet"})
    own = replace(student, job=student.job.model_copy(update={"teacher": teacher}))
    export_student(own, "packed", str(path))
    with pytest.raises(ExportError, match=r"dcq_ray\.load\(path, network=…\)"):
        dcq_ray.load(str(path))
    loaded = dcq_ray.load(str(path), network=lenet(**NETWORK))
    assert all(torch.equal(value, own.network.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ExportError, match=r"fc1\.weight has the shape .*, its network has the shape"):
        dcq_ray.load(str(path), network=lenet())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--format", "packed", "-o", "s.dcq"], r"nowhere: no report\.json"),
        (["nowhere", "--format", "packed", "-o", "s.dcq", "--opset", "21"], "only --format onnx has an opset"),
        (["nowhere", "--format", "packed", "-o", "."], "is a folder, expected a file"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=told):
        export(*arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("status", ["failed", "running", "interrupted"])
def test_a_run_that_has_not_finished_is_wrong_usage(status: str, run_dir: str) -> None:
    report = replace(finished_report(open_store(run_dir)), status=status)
    folder = Path(run_dir).parent / status
    open_store(str(folder)).write_bytes("report.json", seal_json(report))
    with pytest.raises(UsageError, match=re.escape(f"got the status {status}, expected succeeded")):
        export(str(folder), "--format", "packed", "-o", str(folder / "s.dcq"))


@pytest.mark.slow
def test_the_latency_of_an_onnx_file_is_kept_and_shown(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    from dcq_ray.export import latency

    monkeypatch.setattr(latency, "SECONDS_PER_BATCH_SIZE", 0.1)
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "student.onnx"
    done = export(str(tmp_path / "run"), "--format", "onnx", "-o", str(path), "--latency")
    assert done.exit_code == 0
    assert "times smaller than the teacher's. On this processor it is" in " ".join(done.stdout.split())
    kept = json.loads((tmp_path / "run" / "deploy.json").read_text())
    assert kept["student_num_bytes"] == path.stat().st_size
    shown = CliRunner().invoke(cli, ["report", str(tmp_path / "run")], catch_exceptions=False)
    assert "batch of 32" in shown.stdout
    page = tmp_path / "page.html"
    CliRunner().invoke(cli, ["report", str(tmp_path / "run"), "--html", str(page)], catch_exceptions=False)
    assert "<h2>Deployment</h2>" in page.read_text()
    # Of another student it says nothing.
    (tmp_path / "run" / "deploy.json").write_text(json.dumps({**kept, "student_sha256": "0" * 64}))
    shown = CliRunner().invoke(cli, ["report", str(tmp_path / "run")], catch_exceptions=False)
    assert "batch of 32" not in shown.stdout


def test_only_an_onnx_file_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only --format onnx is measured; got --format packed"):
        export("no-run", "--format", "packed", "-o", str(tmp_path / "x"), "--latency")
