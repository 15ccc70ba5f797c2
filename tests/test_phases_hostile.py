"""Damaged, swapped and planted files: noticed and made again, or refused by name; never trained on, never run."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcq_ray.digests import tensors_sha256
from dcq_ray.errors import DcqError, StorageError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local
from dcq_ray.phases.committed import RESULT_FILE
from dcq_ray.records import RunReport, SectionResult, ShardManifest, seal_json, unseal_json
from dcq_ray.spec import Job
from dcq_ray.storage import open_store
from dcq_ray.teacher import state_from_bytes

# Read again by a run that trains its second section; of everything else a finished run reads its results alone.
NUM_DAMAGES_PER_FILE = 3

NETWORK = """
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )
"""


class Undisturbed:
    """A finished run, kept aside, and a copy of it to damage."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.report = self.run()
        self._aside = folder / "aside"
        for name in ("run", "cache"):
            shutil.copytree(folder / name, self._aside / name)

    def run(self) -> RunReport:
        return run_local(self.job, str(self.folder), emit=lambda _: None, owner="test")

    def restore(self) -> None:
        for name in ("run", "cache"):
            shutil.rmtree(self.folder / name)
            shutil.copytree(self._aside / name, self.folder / name)

    def forget_second_section(self) -> None:
        """What is left of a run that was killed in its second section."""
        (self.folder / "run" / "sections" / "01" / RESULT_FILE).unlink(missing_ok=True)
        (self.folder / "run" / "report.json").unlink(missing_ok=True)

    def files(self) -> list[Path]:
        found = [path for name in ("run", "cache") for path in sorted((self.folder / name).rglob("*"))]
        return [path for path in found if path.is_file() and path.stat().st_size]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_nets.py").write_text(NETWORK)
    document = {
        "name": "small",
        "teacher": {"model": "hostile_nets:network", "fit": {"epochs": 1, "lr": 0.01, "batch_size": 32}, "min_top1": 0},
        "data": {
            "dataset": "digits",
            "train_samples": 96,
            "held_out_samples": 50,
            "test_samples": 50,
            "batch_size": 32,
        },
        "sections": {"every": "layer"},
        "train": {"epochs": 1, "batch_size": 32},
        "storage": {"run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
    }
    return Undisturbed(resolve_job(document, source="test"), folder)


@pytest.fixture
def restored(undisturbed: Undisturbed) -> Undisturbed:
    undisturbed.restore()
    return undisturbed


def check_same_or_refused(runs: Undisturbed, damaged: Path, what: str) -> bool:
    """Run again; whether it ended well, with the undisturbed student. A refusal names the file, or its folder."""
    try:
        report = runs.run()
    except DcqError as error:
        told = str(error)
        assert damaged.name in told or damaged.parent.name in told, f"{what}: {told}"
        # What was refused is struck off: the next run makes it again.
        report = runs.run()
        refused = True
    else:
        refused = False
    assert report.student == runs.report.student, what
    assert report.validation == runs.report.validation, what
    assert report.teacher == runs.report.teacher, what
    assert [section.relative_error for section in report.sections] == [
        section.relative_error for section in runs.report.sections
    ], what
    path = runs.folder / "run" / "student.safetensors"
    assert runs.report.student is not None
    assert tensors_sha256(state_from_bytes(path.read_bytes(), source=str(path))) == runs.report.student.sha256, what
    return not refused


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed in the second section"])
def test_flipped_bytes_and_truncated_files_are_noticed(undisturbed: Undisturbed, finished: bool) -> None:
    undisturbed.restore()
    draw = random.Random(0)
    for relative in [path.relative_to(undisturbed.folder) for path in undisturbed.files()]:
        for number in range(NUM_DAMAGES_PER_FILE if finished else 1):
            undisturbed.restore()
            if not finished:
                undisturbed.forget_second_section()
            path = undisturbed.folder / relative
            if not path.exists():
                continue
            content = bytearray(path.read_bytes())
            if number == NUM_DAMAGES_PER_FILE - 1:
                del content[draw.randrange(len(content)) :]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            check_same_or_refused(undisturbed, path, f"{relative}, damage {number}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("cache/{1}/shard-00000.arrow", "cache/{2}/shard-00000.arrow"),
        ("cache/{1}/manifest.json", "cache/{2}/manifest.json"),
        ("run/sections/01/{attempt 1}/weights.safetensors", "run/sections/02/{attempt 2}/weights.safetensors"),
        ("run/sections/01/result.json", "run/sections/02/result.json"),
        ("run/plan.json", "run/report.json"),
        ("run/student.safetensors", "run/sections/01/{attempt 1}/weights.safetensors"),
    ],
)
def test_a_file_swapped_for_another_of_its_kind_is_noticed(restored: Undisturbed, target: str, source: str) -> None:
    names = {}
    plan = json.loads((restored.folder / "run" / "plan.json").read_text())
    for index in (1, 2):
        names[f"{{{index}}}"] = plan["boundaries"][index]["digest"]
        result = json.loads((restored.folder / "run" / "sections" / f"0{index}" / RESULT_FILE).read_text())
        names[f"{{attempt {index}}}"] = result["attempt"]
    for placeholder, name in names.items():
        target, source = target.replace(placeholder, name), source.replace(placeholder, name)
    content = (restored.folder / source).read_bytes()
    if target.startswith("cache"):
        restored.forget_second_section()
    (restored.folder / target).write_bytes(content)
    check_same_or_refused(restored, restored.folder / target, f"{target} from {source}")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.witness), "w")


@pytest.mark.slow
def test_a_pickle_in_the_place_of_any_file_is_never_loaded(undisturbed: Undisturbed) -> None:
    witness = undisturbed.folder / "witness"
    # It works where something unpickles it.
    pickle.loads(pickle.dumps(Payload(witness))).close()
    assert witness.exists()
    witness.unlink()
    undisturbed.restore()
    for relative in [path.relative_to(undisturbed.folder) for path in undisturbed.files()]:
        undisturbed.restore()
        undisturbed.forget_second_section()
        path = undisturbed.folder / relative
        if path.exists():
            path.write_bytes(pickle.dumps(Payload(witness)))
            check_same_or_refused(undisturbed, path, str(relative))
    assert not witness.exists()


def test_a_teacher_that_is_a_pickle_is_refused(restored: Undisturbed, tmp_path: Path) -> None:
    witness, weights = tmp_path / "witness", tmp_path / "teacher.pth"
    weights.write_bytes(pickle.dumps(Payload(witness), protocol=2))
    teacher = restored.job.teacher.model_copy(update={"weights": str(weights), "fit": None})
    job = restored.job.model_copy(update={"teacher": teacher})
    with pytest.raises(DcqError, match=r"teacher\.pth"):
        run_local(job, str(restored.folder), emit=lambda _: None, owner="test")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc", "..", "a/../../../outside"])
def test_a_result_that_names_a_folder_outside_is_not_followed(restored: Undisturbed, name: str) -> None:
    section = restored.folder / "run" / "sections" / "01"
    result = unseal_json(SectionResult, (section / RESULT_FILE).read_bytes())
    outside = restored.folder / "run" / "outside"
    shutil.copytree(section / result.attempt, outside)
    # With a seal of its own: by who can write there and knows the format.
    (section / RESULT_FILE).write_bytes(seal_json(replace(result, attempt=name)))
    (restored.folder / "run" / "report.json").unlink()
    report = restored.run()
    assert report.student == restored.report.student
    again = unseal_json(SectionResult, (section / RESULT_FILE).read_bytes())
    assert again.attempt not in (name, result.attempt)


def test_a_manifest_that_names_a_file_outside_is_refused(restored: Undisturbed) -> None:
    plan = json.loads((restored.folder / "run" / "plan.json").read_text())
    folder = restored.folder / "cache" / plan["boundaries"][1]["digest"]
    manifest = unseal_json(ShardManifest, (folder / "manifest.json").read_bytes())
    outside = restored.folder / "stolen.arrow"
    shutil.copy(folder / manifest.shards[0].file_name, outside)
    shard = replace(manifest.shards[0], file_name="../../stolen.arrow")
    (folder / "manifest.json").write_bytes(seal_json(replace(manifest, shards=(shard, *manifest.shards[1:]))))
    restored.forget_second_section()
    check_same_or_refused(restored, folder / "manifest.json", "a manifest that names a file outside")
    outside.unlink()


def test_credentials_in_a_place_are_refused_and_not_repeated() -> None:
    for uri in ("s3://KEY:hunter2@bucket/run", "s3://bucket/run?secret_key=hunter2"):
        with pytest.raises(StorageError) as caught:
            open_store(uri)
        assert "hunter2" not in str(caught.value)
