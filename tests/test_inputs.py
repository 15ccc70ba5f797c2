"""A run whose inputs are unchanged is known without torch; whatever changed, or is in doubt, is not taken for the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dcq_ray import inputs as module
from dcq_ray.inputs import Inputs, look_at_inputs
from dcq_ray.jobfile import resolve_job
from dcq_ray.spec import Job
from dcq_ray.storage import hold_run, open_store

HOUR_NS = 3600 * 10**9
# Fails where torch or Ray are asked for.
BLOCKER = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray", "torchvision"):
            raise AssertionError(f"{name} was imported")


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """On files of its own: a teacher, an npz, a module."""
    (tmp_path / "own_nets.py").write_text("def net(): ...\n")
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    np.savez(tmp_path / "train.npz", images=np.zeros((4, 2, 2, 1), np.uint8))
    document = {
        "name": "x",
        "teacher": {"model": "own_nets:net", "weights": str(tmp_path / "teacher.safetensors")},
        "data": {"dataset": "npz", "root": str(tmp_path), "train": "train.npz"},
    }
    found: Job = resolve_job(document, source="test")
    old = time.time() - 100
    for path in tmp_path.iterdir():
        os.utime(path, (old, old))
    return found


def look(job: Job, folder: Path, earlier: Inputs | None = None, *, now_ns: int | None = None) -> Inputs:
    found = look_at_inputs(job, str(folder), now_ns=time.time_ns() if now_ns is None else now_ns, earlier=earlier)
    assert found is not None
    return found


def contents(found: Inputs) -> tuple[Any, ...]:
    return found.job_sha256, found.surroundings, [(file.path, file.sha256) for file in found.files]


def test_every_file_of_the_job_is_looked_at(job: Job, tmp_path: Path) -> None:
    found = look(job, tmp_path)
    assert [Path(file.path).name for file in found.files] == ["own_nets.py", "teacher.safetensors", "train.npz"]
    assert contents(look(job, tmp_path, found)) == contents(found)


@pytest.mark.parametrize("name", ["own_nets.py", "teacher.safetensors", "train.npz"])
def test_another_content_of_the_same_size_and_time_is_noticed_where_it_is_recent(
    job: Job, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    now = time.time()
    os.utime(path, (now, now))
    before = look(job, tmp_path)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, (now, now))
    assert contents(look(job, tmp_path, before)) != contents(before)


def test_an_old_file_of_the_same_size_and_time_is_not_read_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = look(job, tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(module.hashlib, "file_digest", refuse)
    assert contents(look(job, tmp_path, before)) == contents(before)
    path = tmp_path / "train.npz"
    os.utime(path, (time.time(), time.time()))
    with pytest.raises(AssertionError, match="a file was read"):
        look(job, tmp_path, before)


def test_what_changes_no_result_is_the_same_and_what_does_is_not(job: Job, tmp_path: Path) -> None:
    before = look(job, tmp_path).job_sha256

    def with_(section: str, **values: Any) -> str:
        changed = getattr(job, section).model_copy(update=values)
        return look(job.model_copy(update={section: changed}), tmp_path).job_sha256

    assert look(job.model_copy(update={"name": "y"}), tmp_path).job_sha256 == before
    assert with_("resources", cpus_per_section=2.0) == before
    assert with_("storage", run_dir="/elsewhere", checkpoint_seconds=1.0) == before
    assert with_("reduce", max_drop=1.0) == before
    assert with_("storage", dtype="float32") != before
    assert with_("train", lr=0.5) != before
    assert look(job.model_copy(update={"seed": 1}), tmp_path).job_sha256 != before


@pytest.mark.parametrize(
    "change",
    [
        lambda job: {"teacher": job.teacher.model_copy(update={"weights": "s3://bucket/teacher"})},
        lambda job: {"teacher": job.teacher.model_copy(update={"weights": "/nowhere.pt"})},
        lambda job: {"teacher": job.teacher.model_copy(update={"model": "elsewhere.nets:net"})},
        lambda job: {"data": job.data.model_copy(update={"dataset": "own_nets:data", "root": None})},
        lambda job: {"data": job.data.model_copy(update={"dataset": "mnist"})},
        lambda job: {"data": job.data.model_copy(update={"train": "gone.npz"})},
    ],
)
def test_what_is_in_doubt_is_not_known(job: Job, tmp_path: Path, change: Callable[[Job], dict[str, Any]]) -> None:
    assert look_at_inputs(job.model_copy(update=change(job)), str(tmp_path), now_ns=time.time_ns()) is None


def dcq(*arguments: str, blocked: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if blocked is not None:
        environment["PYTHONPATH"] = str(blocked)
    command = [sys.executable, "-m", "dcq_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.slow
def test_a_run_with_nothing_to_do_needs_neither_torch_nor_ray(job_document: dict[str, Any], tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCKER)
    folder = tmp_path / "job"
    folder.mkdir()
    (tmp_path / "user_nets.py").rename(folder / "user_nets.py")
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_document))
    shop = tmp_path / "shop"
    arguments = ("run", str(path), "--address", "none", "--publish", str(shop))
    first = dcq(*arguments)
    assert first.returncode == 0, first.stderr
    report = (tmp_path / "run" / "report.json").read_bytes()
    again = dcq(*arguments, blocked=blocked)
    assert again.returncode == 0, again.stderr
    assert "nothing has changed" in again.stderr
    assert "stitched student" in again.stdout
    assert (tmp_path / "run" / "report.json").read_bytes() == report
    # The gate counts every time, and another name or place is no change.
    other = ("--max-drop", "0", "--set", "name=other", "--log-format", "json")
    missed = dcq("run", str(path), "--address", "none", *other, blocked=blocked)
    assert missed.returncode in (0, 3), missed.stderr
    assert json.loads(missed.stdout)["exit_code"] == missed.returncode
    drop = json.loads(report)["teacher"]["top1"] - json.loads(report)["student"]["top1"]
    assert missed.returncode == (3 if drop > 0 else 0)
    # A live run holds the directory.
    with hold_run(open_store(str(tmp_path / "run")), owner="the test"):
        busy = dcq(*arguments, blocked=blocked)
    assert busy.returncode == 75
    assert "the test" in busy.stderr
    # A changed key, module or student is no longer nothing.
    for changed in ("key", "module", "student"):
        extra = ("--set", "train.lr=0.002") if changed == "key" else ()
        if changed == "module":
            with open(folder / "user_nets.py", "a", encoding="utf-8") as file:
                file.write("\n# edited\n")
        if changed == "student":
            assert dcq(*arguments).returncode == 0
            (tmp_path / "run" / "student.safetensors").write_bytes(b"damaged")
        needed = dcq(*arguments, *extra, blocked=blocked)
        assert "was imported" in needed.stderr, changed
    whole = dcq(*arguments)
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "run" / "student.safetensors").read_bytes() != b"damaged"


@pytest.mark.slow
def test_inputs_that_change_during_a_run_are_not_taken_for_what_it_was_made_from(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = look(job, tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"others!")
    after = look(job, tmp_path, before)
    store = open_store(str(tmp_path / "run"))
    store.write_bytes("inputs.json", b"old")
    report: Any = type("Report", (), {"student": object()})()
    module.keep_inputs(store, before, after, report)
    assert not store.exists("inputs.json")
