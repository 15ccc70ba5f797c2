"""`Store`: the one way to read and write files, in a folder or below a URI; every failure says what, where and why.

It must not know what the files hold, nor who may write them (`locks`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

from dcq_ray.errors import StorageError
from dcq_ray.storage.file_systems import file_system, local_folder
from dcq_ray.storage.local_files import LocalFiles, StoredFile
from dcq_ray.storage.object_files import ObjectFiles

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A folder, local or behind a URI; it need not exist, and writing makes it.

    Names are relative, with `/` between parts. Names that begin with a dot are the store's own: locks, and what dead
    writers left; they are never listed. Every method raises StorageError where the storage fails.
    """

    uri: str
    """Absolute: a path, or a URI with its options; `open_store` opens it again."""
    files: LocalFiles | ObjectFiles = field(compare=False, repr=False)

    def location(self, name: str = "") -> str:
        """Where a name lies, to be told to a user."""
        return _join(self.uri, name) if name else self.uri

    def child(self, *parts: str) -> Store:
        """The folder below this one."""
        name = "/".join(parts)
        self._check(name)
        return Store(uri=_join(self.uri, name), files=self.files.child(name))

    def hurried(self) -> Store:
        """The same folder for who would rather fail than wait: by S3 and GCS nothing is tried again, nor waited for long."""
        if isinstance(self.files, LocalFiles):
            return self
        with self._explained("open"):
            return replace(self, files=self.files.hurried(self.uri))

    def read_bytes(self, name: str) -> bytes:
        """The content of a file; a missing file is a StorageError too."""
        with self._explained("read", name):
            return self.files.read(name)

    def read_bytes_or_none(self, name: str) -> bytes | None:
        """The content of a file, None where there is none."""
        with self._explained("read", name):
            try:
                return self.files.read(name)
            except FileNotFoundError:
                return None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, in place of an older one; makes the folders above it."""
        with self.open_output(name, num_bytes=len(content)) as output:
            output.write(content)

    @contextlib.contextmanager
    def open_output(self, name: str, *, num_bytes: int | None = None) -> Iterator[BinaryIO]:
        """A file to write in pieces, committed when the block ends; where it fails, an older file of that name stays.

        Args:
            num_bytes: how large it will be, about, for the message where the disk is full.
        """
        with self._explained("write", name, num_bytes), self.files.open_output(name) as output:
            yield output

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        with self._explained("read", name):
            return self.files.size(name)

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        with self._explained("read", name):
            return self.files.exists(name)

    def list_names(self) -> list[str]:
        """Names of the files and folders directly in this folder, sorted; none where the folder is missing."""
        with self._explained("list"):
            return sorted(name for name in self.files.list_names() if not name.startswith("."))

    def tree(self) -> tuple[StoredFile, ...]:
        """All files in this folder and below it, the store's own too; none where the folder is missing."""
        with self._explained("list"):
            return tuple(sorted(self.files.tree(), key=lambda file: file.name))

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with self._explained("delete", name):
            self.files.delete(name)

    def delete_tree(self) -> None:
        """Delete this folder and all that is in it, locks included; a missing folder is no error."""
        with self._explained("delete"):
            self.files.delete_tree()

    def delete_leftovers(self) -> None:
        """Delete what dead writers left directly in this folder; a live writer there fails, so nobody else may write."""
        with self._explained("delete"):
            self.files.delete_leftovers()

    def local_path(self, name: str) -> Path | None:
        """The path of a file, there or not, None where the storage is remote."""
        self._check(name)
        return self.files.path(name) if isinstance(self.files, LocalFiles) else None

    def free_bytes(self) -> int | None:
        """Bytes that this user may still write here, None where the storage is remote."""
        with self._explained("read"):
            return self.files.free_bytes()

    def _check(self, name: str) -> None:
        # Names also come out of files, and a damaged one must not lead out of the folder.
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise StorageError(
                f"{self.location()}: {name!r} cannot be a name in a folder; expected parts with / between them, none of "
                "them empty, `.` or `..`"
            )

    @contextlib.contextmanager
    def _explained(self, action: str, name: str = "", num_bytes: int | None = None) -> Iterator[None]:
        if name:
            self._check(name)
        with explained(self, action, name, num_bytes):
            yield


@contextlib.contextmanager
def explained(store: Store, action: str, name: str = "", num_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names the file, the reason and what to do."""
    try:
        yield
    except OSError as error:
        where = store.location(name)
        reason = os.strerror(error.errno) if error.errno and isinstance(store.files, LocalFiles) else str(error)
        if isinstance(error, FileNotFoundError) and action == "read":
            raise StorageError(f"{where}: there is no such file") from error
        if error.errno in _FULL:
            # What is written to an object store is collected on this machine first.
            full = store.files if isinstance(store.files, LocalFiles) else LocalFiles(Path(tempfile.gettempdir()))
            needed = "" if num_bytes is None else f"{num_bytes:,} bytes are needed, "
            with contextlib.suppress(OSError):
                reason += f" ({needed}{full.free_bytes():,} are free in {full.root})"
            remedy = "; free some, or name another folder"
        elif error.errno in _FORBIDDEN:
            remedy = f"; expected a place where this user may {action}: change its rights, or name another folder"
        elif isinstance(error, NotADirectoryError | FileExistsError):
            remedy = "; a file stands where a folder is expected: move it away, or name another folder"
        else:
            remedy = ""
        raise StorageError(f"{where}: cannot {action}: {reason}{remedy}") from error


def open_store(uri: str) -> Store:
    """The store at a local path (`~` expanded, relative to the current folder) or a `pyarrow.fs` URI.

    Nothing is created. A URI may carry pyarrow's options (`s3://bucket/runs?region=eu-central-1`), but no secrets.

    Raises:
        StorageError: an empty or malformed address, an unknown scheme, credentials in the URI, an unreachable store.
    """
    address = absolute_uri(uri)
    if not _URI.match(address):
        return Store(uri=address, files=LocalFiles(Path(address)))
    try:
        system, root = file_system(address)
    except OSError as error:
        raise StorageError(
            f"{address}: cannot be opened: {error}; expected a local folder or a URI that pyarrow knows: file://, s3://, "
            "gs://, abfs://, hdfs://"
        ) from error
    return Store(uri=address, files=ObjectFiles(system, root))


def absolute_uri(uri: str) -> str:
    """The address that means the same from every folder: an absolute path, or the URI without a slash at its end."""
    if not uri.strip() or "\0" in uri:
        raise StorageError(f"{uri!r} names no place for files; expected a folder or a URI such as s3://bucket/runs")
    if not _URI.match(uri):
        return os.path.abspath(os.path.expanduser(uri))
    _refuse_secrets(uri)
    if uri.lower().startswith("file://"):
        try:
            return os.path.abspath(local_folder(uri))
        except OSError as error:
            raise StorageError(f"{uri}: cannot be opened: {error}; expected file:///absolute/path") from error
    address, mark, options = uri.partition("?")
    return address.rstrip("/") + mark + options


def _refuse_secrets(uri: str) -> None:
    """Addresses go into job.yaml, logs and messages, so they may hold no credentials."""
    scheme, _, _ = uri.partition("://")
    try:
        parts = urlsplit(uri)
        secret = parts.password is not None or any("secret" in key or "key" in key for key in parse_qs(parts.query))
    except ValueError as error:
        raise StorageError(f"{scheme}://…: not a URI: {error}; expected {scheme}://place/path") from error
    if secret:
        raise StorageError(
            f"{scheme}://…: credentials stand in the address of a store, and addresses are written into files and logs; "
            "take them out and give them by environment variables (such as AWS_ACCESS_KEY_ID), a profile or the machine's role"
        )


def _join(uri: str, name: str) -> str:
    if not _URI.match(uri):
        return os.path.join(uri, name)
    address, mark, options = uri.partition("?")
    return f"{address}/{name}{mark}{options}"
