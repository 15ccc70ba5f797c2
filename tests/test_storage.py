"""Files appear whole or not at all, locks end with their holders, and every failure says where and why."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from dcq_ray.errors import RunBusyError, StorageError
from dcq_ray.storage import (
    Store,
    add_use,
    current_epoch,
    hold_boundary,
    hold_run,
    leases,
    object_files,
    open_store,
    read_uses,
    remove_use,
    run_is_held,
)
from dcq_ray.storage.object_files import ObjectFiles

HOLD = """
import sys, time
from dcq_ray.storage import hold_boundary, hold_run, open_store
store = open_store(sys.argv[2])
with hold_run(store, owner="the other") if sys.argv[1] == "run" else hold_boundary(store):
    print("held", flush=True)
    time.sleep(300)
"""

WRITE_HALF = """
import sys, time
from dcq_ray.storage import open_store
with open_store(sys.argv[1]).open_output("weights.bin") as output:
    output.write(b"half of it")
    output.flush()
    print("half", flush=True)
    time.sleep(300)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that has come to where it prints its first line."""
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "folder"))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store without locks and without a rename, such as S3."""
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    root = tmp_path / "bucket" / "runs"
    root.mkdir(parents=True)
    return Store(uri="s3://bucket/runs", files=ObjectFiles(fs.LocalFileSystem(), str(root)))


@pytest.fixture
def s3(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    return open_store(s3_uri)


@pytest.fixture(params=["local", "remote", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of storage that a run may lie on."""
    found: Store = request.getfixturevalue(request.param)
    return found


def test_what_is_written_is_read_listed_and_deleted(store: Store) -> None:
    child = store.child("a", "b")
    assert child.read_bytes_or_none("x.bin") is None
    assert child.list_names() == []
    child.write_bytes("x.bin", b"one")
    child.write_bytes("x.bin", b"three")
    child.write_bytes(".hidden", b"")
    assert child.read_bytes("x.bin") == b"three"
    assert child.size("x.bin") == 5
    assert child.list_names() == ["x.bin"]
    assert store.child("a").list_names() == ["b"]
    assert store.exists("a/b/x.bin")
    child.delete("x.bin")
    child.delete("x.bin")
    assert not store.exists("a/b/x.bin")
    store.child("a").delete_tree()
    store.child("a").delete_tree()
    assert not store.exists("a")


@pytest.mark.parametrize("later_size", [0, 7, 12 * 1024**2])
def test_a_failed_write_leaves_the_older_file(store: Store, later_size: int) -> None:
    store.write_bytes("a/f", b"content")
    with contextlib.suppress(KeyboardInterrupt), store.open_output("a/f") as output:
        output.write(b"later" * (later_size // 5))
        raise KeyboardInterrupt
    assert store.read_bytes("a/f") == b"content"
    assert store.child("a").list_names() == ["f"]


def test_large_and_oddly_named_files_come_back_as_they_were(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "MAX_BYTES_IN_MEMORY", 1024**2)
    content = os.urandom(11 * 1024**2)
    for name in ("large.bin", "archive.gz", "a b+c%20&d=é.json"):
        with store.open_output(name) as output:
            output.write(content[:77])
            output.write(content[77:])
        assert store.read_bytes(name) == content
        assert store.size(name) == len(content)
    assert len(store.list_names()) == 3


@given(content=st.binary(max_size=200), later=st.binary(max_size=200), at=st.integers(0, 200))
def test_a_failed_write_leaves_no_other_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, later: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = open_store(str(folder))
    store.write_bytes("f", content)
    with contextlib.suppress(KeyboardInterrupt), store.open_output("f") as output:
        output.write(later[:at])
        raise KeyboardInterrupt
    assert store.read_bytes("f") == content
    assert os.listdir(folder) == ["f"]


def test_a_writer_that_is_killed_leaves_nothing_that_is_trusted(local: Store) -> None:
    kill(start(WRITE_HALF, local.uri))
    assert local.list_names() == []
    assert local.read_bytes_or_none("weights.bin") is None
    assert len(os.listdir(local.uri)) == 1
    local.delete_leftovers()
    assert os.listdir(local.uri) == []


@pytest.mark.parametrize("name", ["", "../x", "a//b", "/etc/passwd", "a/./b", "a\0b"])
def test_names_do_not_lead_out_of_the_folder(store: Store, name: str) -> None:
    with pytest.raises(StorageError, match="cannot be a name"):
        store.child(name)
    if name:
        for use in (
            store.read_bytes,
            store.read_bytes_or_none,
            store.size,
            store.exists,
            store.delete,
            store.local_path,
        ):
            with pytest.raises(StorageError, match="cannot be a name"):
                use(name)
        with pytest.raises(StorageError, match="cannot be a name"):
            store.write_bytes(name, b"")


def test_a_missing_file_is_named(store: Store) -> None:
    with pytest.raises(StorageError, match=r"(folder|runs)/plan\.json.*: there is no such file"):
        store.read_bytes("plan.json")


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, r"No space left on device \(7 bytes are needed, [\d,]+ are free in .*folder\); free some"),
        (errno.EROFS, "Read-only file system; expected a place where this user may write"),
        (errno.EACCES, "Permission denied; expected a place where this user may write"),
    ],
)
def test_a_disk_that_refuses_is_explained(
    local: Store, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=f"folder/f: cannot write: {told}"):
        local.write_bytes("f", b"content")
    assert os.listdir(local.uri) == []


def test_a_file_where_a_folder_is_expected_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is expected"):
        open_store(str(tmp_path / "file")).write_bytes("x", b"")


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("", "names no place"),
        ("nosuch://place/x", "a URI that pyarrow knows"),
        ("s3://id:secret@bucket/runs", "credentials"),
        ("s3://bucket/runs?secret_key=abc", "credentials"),
    ],
)
def test_addresses_that_are_no_store(uri: str, told: str) -> None:
    with pytest.raises(StorageError, match=told) as caught:
        open_store(uri)
    assert "secret@" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_an_address_means_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("runs/x")
    assert store.uri == str(tmp_path / "runs" / "x")
    assert open_store(f"file://{tmp_path}/runs/x").uri == store.uri


def test_a_run_has_one_live_driver_and_its_epochs_grow(local: Store) -> None:
    assert current_epoch(local) == 0
    with hold_run(local, owner="first") as first:
        assert current_epoch(local) == first == 1
        with (
            pytest.raises(RunBusyError, match=rf"first \(host .*, process {os.getpid()}, since"),
            hold_run(local, owner="second"),
        ):
            pass
    with hold_run(local, owner="second") as second:
        assert second == 2


def test_a_killed_driver_does_not_hold_its_run(local: Store) -> None:
    other = start(HOLD, "run", local.uri)
    with pytest.raises(RunBusyError, match=f"the other .*process {other.pid}"), hold_run(local, owner="me"):
        pass
    kill(other)
    with hold_run(local, owner="me") as epoch:
        assert epoch == 2


def test_whether_a_run_is_live_is_asked_without_a_trace(store: Store) -> None:
    assert not run_is_held(store)
    assert store.tree() == ()
    with hold_run(store, owner="first"):
        assert run_is_held(store)
        assert current_epoch(store) == 1
    assert not run_is_held(store)
    assert current_epoch(store) == 1


def test_a_tree_has_all_files_with_their_sizes_and_times(store: Store) -> None:
    before = time.time()
    for name, size in (("a/b/x", 3), ("a/.hidden", 2), ("y", 1)):
        store.write_bytes(name, b"1" * size)
    found = store.tree()
    assert [(file.name, file.num_bytes) for file in found] == [("a/.hidden", 2), ("a/b/x", 3), ("y", 1)]
    assert all(before - 2 <= file.modified_at <= time.time() + 2 for file in found)
    assert [file.name for file in store.child("a").tree()] == [".hidden", "b/x"]


def test_a_damaged_lease_is_told_and_never_gives_an_epoch_twice(local: Store) -> None:
    with hold_run(local, owner="first") as first:
        pass
    local.write_bytes("lease.json", b'{"epoch":')
    with pytest.raises(StorageError, match=r"lease\.json: not a lease"):
        current_epoch(local)
    with hold_run(local, owner="second") as second:
        assert second > first
        assert current_epoch(local) == second


def test_a_boundary_has_one_writer_and_who_waits_is_told_once(local: Store) -> None:
    told: list[str] = []
    entered = threading.Event()

    def wait() -> None:
        with hold_boundary(local, on_wait=told.append):
            entered.set()

    with hold_boundary(local):
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not told:
            time.sleep(0.01)
        time.sleep(0.5)
        assert not entered.is_set()
    waiter.join(30)
    assert entered.is_set()
    assert len(told) == 1
    assert f"process {os.getpid()}" in told[0]


def test_a_killed_writers_boundary_is_taken_over(local: Store) -> None:
    other = start(HOLD, "boundary", local.uri)
    told: list[str] = []

    def end(sentence: str) -> None:
        told.append(sentence)
        kill(other)

    with hold_boundary(local, on_wait=end):
        pass
    assert f"process {other.pid}" in told[0]


def test_a_lock_survives_the_removal_of_its_folder(local: Store) -> None:
    with hold_boundary(local):
        local.delete_tree()
        # The old lock has no name any more; a new one is made, and it is the one that counts.
        with hold_run(local, owner="new") as epoch:
            assert epoch == 1


@pytest.mark.parametrize("store", ["remote", "s3"], indirect=True)
def test_storage_without_locks_has_leases_that_expire(store: Store) -> None:
    with hold_run(store, owner="first") as first:
        lease = json.loads(store.read_bytes("lease.json"))
        assert lease["expires_at"] > time.time()
        with pytest.raises(RunBusyError, match="its hold ends in"), hold_run(store, owner="second"):
            pass
    # Given back, it is free at once.
    with hold_run(store, owner="second") as second:
        assert second == first + 1
        lease = json.loads(store.read_bytes("lease.json"))
    # Killed, it is free when it has expired.
    store.write_bytes("lease.json", json.dumps({**lease, "expires_at": time.time() - 1}).encode())
    with hold_run(store, owner="third") as third:
        assert third == second + 1


@pytest.mark.parametrize("store", ["remote", "s3"], indirect=True)
def test_a_lease_is_renewed_while_it_is_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.02)
    with hold_run(store, owner="first"):
        before = json.loads(store.read_bytes("lease.json"))["expires_at"]
        deadline = time.monotonic() + 10
        while json.loads(store.read_bytes("lease.json"))["expires_at"] <= before:
            assert time.monotonic() < deadline, "the lease was never renewed"
            time.sleep(0.01)


def test_uses_are_one_file_a_run(store: Store) -> None:
    add_use(store, "runs/a")
    add_use(store, "runs/a")
    add_use(store, "s3://bucket/b")
    uses = read_uses(store)
    assert {use.run for use in uses} == {os.path.abspath("runs/a"), "s3://bucket/b"}
    assert {use.host for use in uses} == {socket.gethostname()}
    assert all(abs(use.at - time.time()) < 60 for use in uses)
    remove_use(store, os.path.abspath("runs/a"))
    remove_use(store, "runs/never")
    assert len(store.child("uses").list_names()) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"run": "/x"}', b'{"run": "/x", "at": "soon"}', b"\xff"])
def test_a_damaged_use_counts_as_one_of_an_unknown_run(store: Store, content: bytes) -> None:
    store.child("uses").write_bytes("x.json", content)
    (use,) = read_uses(store)
    assert (use.run, use.host) == ("", "")
    assert abs(use.at - time.time()) < 60
