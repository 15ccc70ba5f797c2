"""Local copies of remote files, which all processes of a machine share, under a limit of bytes.

A copy is known by the sha256 of its content, which is checked whenever a process opens it. Where the limit is reached, those
that nobody opened for longest go; one that a process has mapped takes its space until that process lets go. Nothing here may
fail a run: a copy that does not fit, or a disk that is full, means that the file is read into memory instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dcq_ray.errors import StorageError
from dcq_ray.storage.store import Store

FOLDER_VARIABLE = "DCQ_LOCAL_CACHE"
BYTES_VARIABLE = "DCQ_LOCAL_CACHE_BYTES"
MAX_BYTES = 20 * 10**9
MAX_SHARE_OF_FREE = 0.1
_LEFTOVER_SECONDS = 3600.0
_TEMPORARY_PREFIX = ".tmp-"
_LOCK_SUFFIX = ".lock"


@dataclass(frozen=True, slots=True)
class Copies:
    """A folder of copies."""

    folder: Path
    max_bytes: int | None
    """None: 20 GB, or a tenth of what is free if that is less."""


def local_copies(environment: Mapping[str, str]) -> Copies | None:
    """The folder that DCQ_LOCAL_CACHE names, else one of this user's in the system's temporary folder.

    DCQ_LOCAL_CACHE_BYTES is its limit. None where that is 0, or the folder is not this user's own.

    Raises:
        StorageError: the limit is not a whole number.
    """
    default = Path(tempfile.gettempdir(), f"dcq-ray-copies-{os.getuid()}")
    folder = Path(environment.get(FOLDER_VARIABLE) or default)
    told = environment.get(BYTES_VARIABLE, "").replace("_", "")
    if told and not told.isdecimal():
        raise StorageError(
            f"{BYTES_VARIABLE}={environment[BYTES_VARIABLE]}: expected a whole number of bytes; 0: no copies"
        )
    max_bytes = int(told) if told else None
    try:
        # Nobody else may change what a process has checked and mapped.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or max_bytes == 0:
            return None
    except OSError:
        return None
    return Copies(folder, max_bytes)


def copied(copies: Copies, store: Store, name: str, *, sha256: str, num_bytes: int) -> Path | None:
    """A local copy of a file, made where there is none; None where there is no room, or the file is not what it should be.

    Raises:
        StorageError: the file cannot be read.
    """
    path = copies.folder / sha256
    try:
        with _locked(copies.folder / f"{sha256[:2]}{_LOCK_SUFFIX}"):
            if _is_whole(path, sha256):
                return path
            path.unlink(missing_ok=True)
            with _room(copies, num_bytes) as temporary:
                if temporary is None:
                    return None
                content = store.read_bytes_or_none(name)
                if content is None or hashlib.sha256(content).hexdigest() != sha256:
                    return None
                temporary.write_bytes(content)
                os.replace(temporary, path)
                return path
    except OSError:
        return None


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        # The time of its last use, in which they are removed.
        os.utime(path)
    except FileNotFoundError:
        return False
    return whole


@contextlib.contextmanager
def _room(copies: Copies, num_bytes: int) -> Iterator[Path | None]:
    """The name of a file that others count from now on, after those went that had to; None where it cannot fit at all."""
    temporary = copies.folder / f"{_TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    with _locked(copies.folder / _LOCK_SUFFIX):
        fits = _make_room(copies, num_bytes)
        if fits:
            with temporary.open("xb") as file:
                file.truncate(num_bytes)
    try:
        yield temporary if fits else None
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(copies: Copies, num_bytes: int) -> bool:
    found = []
    for entry in os.scandir(copies.folder):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(_TEMPORARY_PREFIX) and time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                os.unlink(entry.path)
            elif not entry.name.endswith(_LOCK_SUFFIX):
                found.append((status.st_mtime, status.st_size, entry))
    total = sum(size for _, size, _ in found)
    limit = copies.max_bytes
    if limit is None:
        limit = min(MAX_BYTES, int(MAX_SHARE_OF_FREE * (shutil.disk_usage(copies.folder).free + total)))
    if num_bytes > limit:
        return False
    for _, size, entry in sorted(found, key=lambda one: one[0]):
        if total + num_bytes <= limit:
            break
        # Another process is writing it.
        if entry.name.startswith(_TEMPORARY_PREFIX):
            continue
        Path(entry.path).unlink(missing_ok=True)
        total -= size
    return total + num_bytes <= limit


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
