"""Files below a local folder: a file appears under its name whole or not at all.

Raises OSError as the system gives it; `store` turns that into words. It must not know of locks or of what files hold.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file below a folder."""

    name: str
    """Relative, with / between parts."""
    num_bytes: int
    modified_at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files below one folder, which need not exist yet."""

    root: Path

    def child(self, name: str) -> LocalFiles:
        return LocalFiles(self.root / name)

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[BinaryIO]:
        final = self.path(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only within one file system. Not by tempfile, whose files nobody
        # but their owner may read: a cache may be shared between users.
        temporary = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                # Otherwise a crash of the machine may leave the new name on an empty file.
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def size(self, name: str) -> int | None:
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def list_names(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return []

    def tree(self) -> list[StoredFile]:
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                # What others delete meanwhile is not there any more.
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    found.append(StoredFile(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime))
        return found

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def delete_tree(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)

    def delete_leftovers(self) -> None:
        for name in self.list_names():
            if name.startswith(TEMPORARY_PREFIX):
                self.delete(name)

    def free_bytes(self) -> int:
        folder = self.root
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free
