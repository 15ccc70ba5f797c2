"""What no run uses is removed; what a live, unfinished or unseen run leases stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import Collected, Rules, collect, ignore_progress, run_local
from dcq_ray.records import ShardManifest
from dcq_ray.shards import commit_manifest, load_manifest, write_shard
from dcq_ray.storage import Store, add_use, hold_boundary, hold_run, open_store, read_uses

DIGEST = "d" * 64
DAY = 86400.0
KEYS = ("1" * 64, "2" * 64, "3" * 64)


@pytest.fixture(params=["local", "s3"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A cache with one boundary, on a disk and on an object store."""
    store = open_store(str(tmp_path / "cache") if request.param == "local" else request.getfixturevalue("s3_uri"))
    add_boundary(store)
    return store


def add_boundary(cache: Store, digest: str = DIGEST) -> None:
    store = cache.child(digest)
    array = np.ones((3, 2), np.float32)
    shard = write_shard(store, index=0, array=array, dtype="float32", compression="none", digest=digest)
    manifest = ShardManifest(
        digest=digest,
        cut="conv1",
        shape=(2,),
        dtype="float32",
        compression="none",
        num_samples=3,
        samples_per_shard=3,
        shards=(shard,),
    )
    commit_manifest(store, manifest)


def is_whole(cache: Store) -> bool:
    return load_manifest(cache.child(DIGEST), digest=DIGEST) is not None


def use_of(cache: Store, run: str, *, host: str | None = None, days: float = 0.0) -> None:
    """A use as a driver on that machine left it so many days ago."""
    add_use(cache.child(DIGEST), run)
    folder = cache.child(DIGEST).child("uses")
    for name in folder.list_names():
        content = json.loads(folder.read_bytes(name))
        if content["run"] == open_store(run).uri:
            at = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - days * DAY))
            content |= {"at": at} | ({} if host is None else {"host": host})
            folder.write_bytes(name, json.dumps(content).encode())


def collected(cache: Store, **rules: Any) -> list[Collected]:
    return [one for one in collect(cache, Rules(**rules)) if one.kind == "boundary"]


def test_a_boundary_that_no_run_uses_is_removed_whole(cache: Store) -> None:
    num_bytes = sum(file.num_bytes for file in cache.tree())
    (told,) = collected(cache, dry_run=True)
    assert is_whole(cache)
    (done,) = collected(cache)
    assert told == done
    assert (done.removed, done.num_bytes, done.reason) == (True, num_bytes, "no run uses it")
    assert cache.tree() == ()
    assert collected(cache) == []


def test_what_a_live_run_leases_stays_whatever_its_report_says(cache: Store, tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "run"))
    use_of(cache, run.uri, days=400)
    with hold_run(run, owner="driver"):
        (one,) = collected(cache)
        assert (one.removed, one.reason) == (False, f"{run.uri} is live")
        assert is_whole(cache)


def test_an_unfinished_run_counts_and_one_that_is_gone_or_forgotten_does_not(cache: Store, tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "run"))
    run.write_bytes("job.yaml", b"name: x")
    use_of(cache, run.uri, days=400)
    (one,) = collected(cache)
    assert (one.removed, one.reason) == (False, f"{run.uri} has not finished")
    (one,) = collected(cache, forgotten=frozenset([run.uri]), dry_run=True)
    assert one.removed
    run.delete_tree()
    (one,) = collected(cache)
    assert (one.removed, one.reason) == (True, "its run is gone")


def test_a_use_said_just_now_counts_before_its_run_has_written_anything(cache: Store, tmp_path: Path) -> None:
    use_of(cache, str(tmp_path / "run"))
    (one,) = collected(cache)
    assert not one.removed
    use_of(cache, str(tmp_path / "run"), days=0.1)
    (one,) = collected(cache)
    assert one.removed


@pytest.mark.parametrize("cache", ["local"], indirect=True)
@pytest.mark.parametrize("host", ["another-machine", ""])
def test_a_run_in_a_folder_of_another_machine_counts_until_it_is_old(cache: Store, host: str) -> None:
    use_of(cache, "/nowhere/runs/x", host=host, days=29)
    (one,) = collected(cache)
    assert not one.removed
    assert "/nowhere/runs/x is a folder of another machine" in one.reason
    assert is_whole(cache)
    (one,) = collected(cache, unseen_days=28.0)
    assert one.removed
    assert "29 days ago" in one.reason


@pytest.mark.parametrize("cache", ["local"], indirect=True)
def test_a_run_whose_storage_does_not_answer_counts_until_it_is_old(
    cache: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcq_ray.storage.retries.MAX_TRIES", 1)
    monkeypatch.setattr("dcq_ray.storage.file_systems.MAX_REQUEST_ATTEMPTS", 1)
    use_of(cache, "s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1", days=1)
    (one,) = collected(cache)
    assert not one.removed
    assert "cannot be asked" in one.reason
    (one,) = collected(cache, unseen_days=0.5)
    assert one.removed


def test_a_damaged_use_counts(cache: Store) -> None:
    cache.child(DIGEST).child("uses").write_bytes("x.json", b"{")
    (one,) = collected(cache)
    assert not one.removed
    assert is_whole(cache)


def test_a_boundary_that_is_being_written_stays(cache: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcq_ray.storage.leases.SETTLE_SECONDS", 0.05)
    with hold_boundary(cache.child(DIGEST), owner="a dumper"):
        (one,) = collected(cache)
    assert not one.removed
    assert "waiting for a dumper" in one.reason
    assert is_whole(cache)


def test_a_run_that_begins_meanwhile_keeps_its_boundary(
    cache: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.delete

    def delete(self: Store, name: str) -> None:
        real(self, name)
        if name == "manifest.json":
            # The run said its use after gc had looked for uses, and before it looked again.
            use_of(cache, str(tmp_path / "run"))

    monkeypatch.setattr(Store, "delete", delete)
    (one,) = collected(cache)
    assert not one.removed
    assert is_whole(cache)
    assert len(read_uses(cache.child(DIGEST))) == 1


def test_what_is_young_stays_where_an_age_is_given(cache: Store) -> None:
    (one,) = collected(cache, unused_days=1.0)
    assert not one.removed
    if (path := cache.local_path(DIGEST)) is not None:
        for file in path.rglob("*"):
            os.utime(file, (time.time() - 2 * DAY,) * 2)
        (one,) = collected(cache, unused_days=1.0)
        assert one.removed


def test_half_written_files_go_once_their_writers_must_be_dead(tmp_path: Path) -> None:
    cache = open_store(str(tmp_path / "cache"))
    for name in ("teachers/x/.tmp-1-0123456789abcdef", ".tmp-2-0123456789abcdef", "costs/kept.json"):
        cache.write_bytes(name, b"1")
        if name.startswith("teachers"):
            os.utime(tmp_path / "cache" / name, (time.time() - 2 * DAY,) * 2)
    found = [one for one in collect(cache, Rules()) if one.kind == "leftover"]
    assert [one.name for one in found] == ["teachers/x/.tmp-1-0123456789abcdef"]
    assert [file.name for file in cache.tree()] == [".tmp-2-0123456789abcdef", "costs/kept.json"]


def test_a_folder_that_is_no_cache_keeps_its_files(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    names = ["fits/mine.json", "fits/mine/x", "teachers/mine.safetensors", "teachers/mine/x", ".tmp-mine", "uses/x.txt"]
    for name in names:
        store.write_bytes(name, b"1")
        os.utime(tmp_path / name, (time.time() - 400 * DAY,) * 2)
    assert list(collect(store, Rules(fit_days=0.0, unseen_days=0.0))) == []
    assert [file.name for file in store.tree()] == sorted(names)


def add_fit(cache: Store, key: str, teacher: str) -> None:
    cache.write_bytes(f"teachers/{teacher}/weights.safetensors", b"weights")
    cache.write_bytes(f"fits/{key}.json", json.dumps({"teacher_sha256": teacher}).encode())


def test_teachers_stay_for_their_age_for_unfinished_plans_and_for_whoever_cannot_be_asked(tmp_path: Path) -> None:
    cache = open_store(str(tmp_path / "cache"))
    add_fit(cache, KEYS[0], "a" * 64)
    add_fit(cache, KEYS[1], "b" * 64)
    cache.write_bytes(f"fits/{KEYS[2]}/0000000001-x.safetensors", b"checkpoint")

    def removed(**rules: Any) -> set[str]:
        return {one.name for one in collect(cache, Rules(dry_run=True, **rules)) if one.removed}

    everything = {
        f"fits/{KEYS[0]}.json",
        f"fits/{KEYS[1]}.json",
        f"fits/{KEYS[2]}",
        f"teachers/{'a' * 64}",
        f"teachers/{'b' * 64}",
    }
    assert removed() == set()
    assert removed(fit_days=0.0) == everything
    run = open_store(str(tmp_path / "run"))
    add_use(cache, run.uri)
    # A run that has no plan yet may want any of them.
    run.write_bytes("job.yaml", b"x")
    assert removed(fit_days=0.0) == set()
    run.write_bytes("plan.json", json.dumps({"teacher_sha256": "a" * 64}).encode())
    assert removed(fit_days=0.0) == {f"fits/{KEYS[1]}.json", f"teachers/{'b' * 64}"}
    with hold_run(run, owner="driver"):
        assert removed(fit_days=0.0) == set()
    assert removed(fit_days=0.0, forgotten=frozenset([run.uri])) == everything
    assert {
        one.name for one in collect(cache, Rules(fit_days=0.0, forgotten=frozenset([run.uri]))) if one.removed
    } == everything
    assert [file for file in cache.tree() if not file.name.startswith("uses/")] == []


@pytest.mark.slow
def test_after_gc_a_finished_run_stays_finished_and_another_dumps_anew(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    job = resolve_job(job_document, source="test")
    first = run_local(job, str(tmp_path), emit=ignore_progress, owner="test")
    cache = open_store(job.storage.cache_dir)
    assert read_uses(cache) == ()
    names = {one.name for one in collect(cache, Rules()) if one.removed}
    assert len(names) == len(first.sections) + 1
    assert {name for name in cache.list_names() if len(name) == 64} == set()
    assert run_local(job, str(tmp_path), emit=ignore_progress, owner="test").student == first.student
    job_document["storage"]["run_dir"] = str(tmp_path / "other")
    other = run_local(resolve_job(job_document, source="test"), str(tmp_path), emit=ignore_progress, owner="test")
    assert other.student == first.student
