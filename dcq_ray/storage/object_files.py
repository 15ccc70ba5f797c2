"""Files below a `pyarrow.fs` path that is not a local folder: S3, GCS, Azure, HDFS.

An object store shows an object once its upload is complete, so the final name is written at once; there is no rename. What is
written is collected on this machine first and uploaded when it is whole: so what fails before leaves an older file as it is,
and an upload that the network breaks off can be begun again. Parts of an upload that never ended are invisible, but some
stores charge for them until a rule of the bucket (on S3: AbortIncompleteMultipartUpload) removes them.

Raises OSError, also where pyarrow raises its own; `store` turns that into words.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO, TypeVar, cast

from pyarrow import fs

from dcq_ray.storage.file_systems import as_os_error, hurried_file_system
from dcq_ray.storage.local_files import StoredFile
from dcq_ray.storage.retries import tried_again

# Larger files are collected in the system's temporary folder.
MAX_BYTES_IN_MEMORY = 64 * 1024**2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ObjectFiles:
    """The files below one path of a file system."""

    system: fs.FileSystem
    root: str
    max_tries: int | None = None
    """Of every operation; None: as many as `retries` says."""

    def child(self, name: str) -> ObjectFiles:
        return replace(self, root=self.path(name))

    def hurried(self, uri: str) -> ObjectFiles:
        """The same files by a client that asks once; `uri`: of these files. Only S3's and GCS's can be had so."""
        known = isinstance(self.system, fs.S3FileSystem | fs.GcsFileSystem)
        return replace(self, system=hurried_file_system(uri) if known else self.system, max_tries=1)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if self.root else name

    def read(self, name: str) -> bytes:
        return tried_again(lambda: self._read(self.path(name)), self.max_tries)

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.SpooledTemporaryFile(max_size=MAX_BYTES_IN_MEMORY) as spool:
            yield cast(BinaryIO, spool)
            spool.seek(0, 2)
            size = spool.tell()
            if size <= MAX_BYTES_IN_MEMORY:
                spool.seek(0)
                self._upload(name, spool.read())
            else:
                spool.flush()
                with mmap.mmap(spool.fileno(), size, access=mmap.ACCESS_READ) as content:
                    self._upload(name, content)

    def size(self, name: str) -> int | None:
        return tried_again(lambda: self._size(self.path(name)), self.max_tries)

    def exists(self, name: str) -> bool:
        return bool(self._info(name).type != fs.FileType.NotFound)

    def list_names(self) -> list[str]:
        return [info.base_name for info in self._list()]

    def tree(self) -> list[StoredFile]:
        skipped = len(self.root.rstrip("/")) + 1 if self.root else 0
        return [
            StoredFile(info.path[skipped:], info.size or 0, info.mtime.timestamp() if info.mtime else 0.0)
            for info in self._list(recursive=True)
            if info.type == fs.FileType.File
        ]

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self.system.delete_file(self.path(name)))

    def delete_tree(self) -> None:
        # A root without a slash is a bucket, which is not ours to remove.
        inner = "/" in self.root.strip("/")
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: (self.system.delete_dir if inner else self.system.delete_dir_contents)(self.root))

    def delete_leftovers(self) -> None:
        """Nothing to do: a dead writer's upload was never committed."""

    def free_bytes(self) -> int | None:
        return None

    def _read(self, path: str) -> bytes:
        with as_os_error():
            # A file, not a stream: its content is asked for in one request, and so is of one version of the object. No
            # decompression by the look of the name.
            with self.system.open_input_file(path) as file:
                size = file.size()
                content = cast(bytes, file.read(size))
            # The client takes an answer that broke off between its headers for one of no length, and an object may be
            # replaced by a longer one between the question for its size and that for its content.
            if len(content) != size or self._size(path) != size:
                raise OSError(f"its size changed, or the answer broke off, while it was read ({len(content):,} bytes)")
        return content

    def _size(self, path: str) -> int | None:
        with as_os_error():
            infos = [self.system.get_file_info(path)]
            if infos[0].type != fs.FileType.File:
                return None
            if infos[0].size == 0:
                # See _read.
                infos.append(self.system.get_file_info(path))
        if infos[-1].size != infos[0].size:
            raise OSError("the answer to the question for its size broke off")
        return cast(int, infos[0].size)

    def _list(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.root, allow_not_found=True, recursive=recursive)
        found: list[fs.FileInfo] = self._tried(lambda: self.system.get_file_info(selector))
        # An answer that broke off between its headers looks like an empty folder.
        return found or self._tried(lambda: self.system.get_file_info(selector))

    def _info(self, name: str) -> fs.FileInfo:
        return self._tried(lambda: self.system.get_file_info(self.path(name)))

    def _upload(self, name: str, content: bytes | mmap.mmap) -> None:
        # In a thread of its own, where no signal interrupts it: pyarrow commits a stream when it is collected, whatever
        # was written to it by then.
        with ThreadPoolExecutor(1, thread_name_prefix="upload") as executor:
            executor.submit(self._tried, lambda: self._write(self.path(name), content)).result()

    def _write(self, path: str, content: bytes | mmap.mmap) -> None:
        stream = self._open_stream(path)
        stream.write(content)
        stream.close()

    def _open_stream(self, path: str) -> BinaryIO:
        try:
            return cast(BinaryIO, self.system.open_output_stream(path, compression=None))
        except FileNotFoundError:
            # Only where folders exist at all: on S3 this would cost requests, and rights that a user may lack.
            self.system.create_dir(path.rpartition("/")[0], recursive=True)
            return cast(BinaryIO, self.system.open_output_stream(path, compression=None))

    def _tried(self, operation: Callable[[], T]) -> T:
        def once() -> T:
            with as_os_error():
                return operation()

        return tried_again(once, self.max_tries)
