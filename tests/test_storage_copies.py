"""Copies are checked, shared, and never more than their limit; what they cannot do, they leave to whoever asked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcq_ray.errors import StorageError
from dcq_ray.storage import Copies, Store, copied, local_copies, open_store

COPY = """
import sys
from pathlib import Path
from dcq_ray.storage import Copies, copied, open_store
folder, uri, *shas = sys.argv[1:]
for sha in shas * 5:
    path = copied(Copies(Path(folder), 2500), open_store(uri), sha, sha256=sha, num_bytes=1000)
    assert path is None or path.name == sha
"""


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    folder = tmp_path / "copies"
    folder.mkdir()
    return Copies(folder, 2500)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def put(store: Store, fill: int, size: int = 1000) -> str:
    content = bytes([fill]) * size
    sha256 = hashlib.sha256(content).hexdigest()
    store.write_bytes(sha256, content)
    return sha256


def copy(copies: Copies, store: Store, sha256: str, size: int = 1000) -> Path | None:
    return copied(copies, store, sha256, sha256=sha256, num_bytes=size)


def held(copies: Copies) -> dict[str, int]:
    return {
        path.name: path.stat().st_size
        for path in copies.folder.iterdir()
        if path.suffix != ".lock" and path.name != ".lock"
    }


def test_a_copy_is_made_once_and_read_again_without_the_storage(copies: Copies, store: Store) -> None:
    sha256 = put(store, 1)
    path = copy(copies, store, sha256)
    assert path is not None
    assert path.read_bytes() == bytes([1]) * 1000
    store.delete(sha256)
    assert copy(copies, store, sha256) == path


def test_the_least_recently_used_go_first_and_the_limit_holds(copies: Copies, store: Store) -> None:
    one, two, three = (put(store, fill) for fill in (1, 2, 3))
    for age, sha256 in ((300, one), (200, two)):
        path = copy(copies, store, sha256)
        assert path is not None
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    # Used again, the first is the later one.
    assert copy(copies, store, one) is not None
    assert copy(copies, store, three) is not None
    assert set(held(copies)) == {one, three}
    assert sum(held(copies).values()) <= 2500


def test_what_cannot_fit_is_left_alone(copies: Copies, store: Store) -> None:
    one, large = put(store, 1), put(store, 2, 2501)
    assert copy(copies, store, one) is not None
    assert copy(copies, store, large, 2501) is None
    assert set(held(copies)) == {one}


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_copy_is_made_anew(copies: Copies, store: Store, damage: str) -> None:
    sha256 = put(store, 1)
    path = copy(copies, store, sha256)
    assert path is not None
    path.write_bytes(bytes(1000) if damage == "flip" else b"1")
    assert copy(copies, store, sha256) == path
    assert path.read_bytes() == bytes([1]) * 1000


def test_a_file_that_is_missing_or_not_what_it_should_be_is_not_kept(copies: Copies, store: Store) -> None:
    sha256 = put(store, 1)
    store.write_bytes(sha256, b"another")
    assert copy(copies, store, sha256) is None
    assert copy(copies, store, "f" * 64) is None
    assert held(copies) == {}


def test_a_full_disk_is_no_error(small_disk: Path, store: Store) -> None:
    copies = Copies(small_disk, 10**9)
    sha256 = put(store, 1, 5 * 1024**2)
    assert copy(copies, store, sha256, 5 * 1024**2) is None
    assert held(copies) == {}


def test_processes_share_a_folder_and_keep_its_limit(copies: Copies, store: Store) -> None:
    shas = [put(store, fill) for fill in range(5)]
    commands = [[sys.executable, "-c", COPY, str(copies.folder), store.uri, *order] for order in (shas, shas[::-1])]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert 0 < sum(held(copies).values()) <= 2500
    assert all(hashlib.sha256((copies.folder / name).read_bytes()).hexdigest() == name for name in held(copies))


def test_the_folder_and_its_limit_come_from_the_environment(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert local_copies({"DCQ_LOCAL_CACHE": str(folder), "DCQ_LOCAL_CACHE_BYTES": "5_000"}) == Copies(folder, 5000)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert local_copies({"DCQ_LOCAL_CACHE": str(folder)}) == Copies(folder, None)
    assert local_copies({"DCQ_LOCAL_CACHE": str(folder), "DCQ_LOCAL_CACHE_BYTES": "0"}) is None
    with pytest.raises(StorageError, match=r"DCQ_LOCAL_CACHE_BYTES=20 GB: expected a whole number"):
        local_copies({"DCQ_LOCAL_CACHE": str(folder), "DCQ_LOCAL_CACHE_BYTES": "20 GB"})
    (tmp_path / "file").write_text("")
    assert local_copies({"DCQ_LOCAL_CACHE": str(tmp_path / "file")}) is None
