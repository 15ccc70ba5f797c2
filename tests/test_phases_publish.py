"""Publishing: whole and no worse, or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcq_ray.digests import tensors_sha256
from dcq_ray.errors import QualityGateMissed, StorageError, UsageError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import publish as module
from dcq_ray.phases import run_local
from dcq_ray.phases.publish import FILES, publish, read_current
from dcq_ray.phases.session import read_report
from dcq_ray.records import RunReport, seal_json
from dcq_ray.storage import Store, open_store
from dcq_ray.teacher import state_bytes

NETWORK = """
from torch import nn


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8, 10))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    folder = tmp_path_factory.mktemp("publish")
    (folder / "published_nets.py").write_text(NETWORK)
    document = {
        "name": "small",
        "teacher": {"model": "published_nets:network", "min_top1": 0},
        "data": {
            "dataset": "digits",
            "train_samples": 32,
            "held_out_samples": 50,
            "test_samples": 50,
            "batch_size": 32,
        },
        "sections": {"every": "layer"},
        "train": {"epochs": 1, "batch_size": 32},
        "storage": {"run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
    }
    return run_local(resolve_job(document, source="test"), str(folder), emit=lambda _: None, owner="test")


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "shop"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that pass from one publication to the next."""
    from datetime import UTC, datetime, timedelta

    now = datetime(2026, 11, 26, 2, 0, 0, tzinfo=UTC)

    class Clock:
        @staticmethod
        def now(_: Any) -> datetime:
            nonlocal now
            now += timedelta(seconds=1)
            return now

    monkeypatch.setattr(module, "datetime", Clock)


def run_with(report: RunReport, folder: Path, *, score: float, value: float, **changes: Any) -> Store:
    """A run directory whose student has one tensor, and such a score."""
    store = open_store(str(folder))
    state = {"weight": torch.full((3,), value)}
    assert report.student is not None
    assert report.validation is not None
    made = replace(
        report,
        student=replace(report.student, sha256=tensors_sha256(state)),
        validation=replace(report.validation, top1=score),
        **changes,
    )
    for name in FILES:
        store.write_bytes(name, f"{name} {value}".encode())
    store.write_bytes("student.safetensors", state_bytes(state, {}))
    store.write_bytes("report.json", seal_json(made))
    return store


def versions(target: Store) -> list[str]:
    return [name for name in target.list_names() if name[0].isdigit()]


def test_a_student_is_put_into_place_with_its_report(finished: RunReport, target: Store, tmp_path: Path) -> None:
    run = run_with(finished, tmp_path / "run", score=0.5, value=1.0)
    current = publish(run, target, keep=5)
    assert read_current(target) == current
    assert versions(target) == [current.version]
    version = target.child(current.version)
    assert {name: version.read_bytes(name) for name in FILES} == {name: run.read_bytes(name) for name in FILES}
    link = tmp_path / "shop" / "current"
    assert os.readlink(link) == current.version
    assert read_report(open_store(str(link))) == read_report(run)
    # The same again does nothing.
    assert publish(run, target, keep=5) == current
    assert versions(target) == [current.version]


def test_a_worse_one_does_not_replace_a_better_one(
    finished: RunReport, target: Store, tmp_path: Path, clock: None
) -> None:
    good = publish(run_with(finished, tmp_path / "good", score=0.90, value=1.0), target, keep=5)
    worse = run_with(finished, tmp_path / "worse", score=0.89, value=2.0)
    with pytest.raises(QualityGateMissed, match=r"scores 89\.00 % on held-out images, the published one .* 90\.00 %"):
        publish(worse, target, keep=5)
    assert read_current(target) == good
    assert versions(target) == [good.version]
    # Within a tolerance, as good, better, or of another teacher, it does.
    assert publish(worse, target, keep=5, tolerance=0.011).score == 0.89
    assert publish(run_with(finished, tmp_path / "equal", score=0.89, value=3.0), target, keep=5).score == 0.89
    other = replace(finished.teacher, sha256="0" * 64)
    found = publish(run_with(finished, tmp_path / "other", score=0.1, value=4.0, teacher=other), target, keep=5)
    assert read_current(target) == found
    assert (tmp_path / "shop" / "current").resolve().name == found.version


def test_old_versions_go_and_the_current_one_stays(
    finished: RunReport, target: Store, tmp_path: Path, clock: None
) -> None:
    found = [
        publish(run_with(finished, tmp_path / str(number), score=0.5, value=float(number)), target, keep=3).version
        for number in range(5)
    ]
    assert versions(target) == found[2:]
    last = publish(run_with(finished, tmp_path / "last", score=0.5, value=9.0), target, keep=1).version
    assert versions(target) == [last]


def test_what_is_cut_short_is_never_current(
    finished: RunReport, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: None
) -> None:
    before = publish(run_with(finished, tmp_path / "before", score=0.5, value=1.0), target, keep=5)
    run = run_with(finished, tmp_path / "run", score=0.6, value=2.0)
    write = Store.write_bytes
    for failing in (*FILES, "current.json"):

        def fail(store: Store, name: str, content: bytes, failing: str = failing) -> None:
            if name == failing and "shop" in store.uri:
                raise StorageError("the disk is full")
            write(store, name, content)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write_bytes", fail)
            with pytest.raises(StorageError, match="the disk is full"):
                publish(run, target, keep=5)
        assert read_current(target) == before
        assert (tmp_path / "shop" / "current").resolve().name == before.version
    after = publish(run, target, keep=5)
    assert read_current(target) == after


def test_a_student_that_is_not_the_reports_is_not_published(finished: RunReport, target: Store, tmp_path: Path) -> None:
    run = run_with(finished, tmp_path / "run", score=0.5, value=1.0)
    run.write_bytes("student.safetensors", state_bytes({"weight": torch.zeros(3)}, {}))
    with pytest.raises(StorageError, match="it is not made current"):
        publish(run, target, keep=5)
    run.write_bytes("student.safetensors", b"no tensors")
    with pytest.raises(StorageError, match="it is not made current"):
        publish(run, target, keep=5)
    assert read_current(target) is None


def test_an_unfinished_run_and_the_runs_own_place_are_wrong_usage(
    finished: RunReport, target: Store, tmp_path: Path
) -> None:
    run = run_with(finished, tmp_path / "run", score=0.5, value=1.0, status="running")
    with pytest.raises(UsageError, match="no finished student"):
        publish(run, target, keep=5)
    with pytest.raises(UsageError, match="the run directory itself"):
        publish(run, run, keep=5)


def test_a_damaged_note_of_what_is_current_is_replaced(finished: RunReport, target: Store, tmp_path: Path) -> None:
    target.write_bytes("current.json", b'{"version": "x"}')
    found = publish(run_with(finished, tmp_path / "run", score=0.5, value=1.0), target, keep=5)
    assert read_current(target) == found
