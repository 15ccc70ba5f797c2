"""Files below a `pyarrow.fs` path that is not a local folder: S3, GCS, Azure, HDFS.

An object store shows an object once its upload is complete, so the final name is written at once; there is no rename.
Raises OSError, also where pyarrow raises its own; `store` turns that into words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import pyarrow as pa
from pyarrow import fs


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path in it; raises OSError where pyarrow cannot make one."""
    with _as_os_error():
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]


def local_folder(uri: str) -> str:
    """The folder that a `file://` URI names; raises OSError where it names none."""
    return file_system(uri)[1]


@dataclass(frozen=True, slots=True)
class ObjectFiles:
    """The files below one path of a file system."""

    system: fs.FileSystem
    root: str

    def child(self, name: str) -> ObjectFiles:
        return ObjectFiles(self.system, self.path(name))

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if self.root else name

    def read(self, name: str) -> bytes:
        # No decompression by the look of the name: bytes come back as they were written.
        with _as_os_error(), self.system.open_input_stream(self.path(name), compression=None) as stream:
            return cast(bytes, stream.read())

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[BinaryIO]:
        path = self.path(name)
        stream = self._open_stream(path)
        try:
            yield stream
            with _as_os_error():
                stream.close()
        except BaseException:
            # pyarrow cannot abort an upload: a stream commits when it is closed, at the latest when it is collected. So
            # what it commits is deleted.
            with contextlib.suppress(OSError, pa.ArrowException):
                stream.close()
            with contextlib.suppress(OSError, pa.ArrowException):
                self.system.delete_file(path)
            raise

    def _open_stream(self, path: str) -> BinaryIO:
        with _as_os_error():
            try:
                return cast(BinaryIO, self.system.open_output_stream(path, compression=None))
            except FileNotFoundError:
                # Only where folders exist at all: on S3 this would cost requests, and rights that a user may lack.
                self.system.create_dir(path.rpartition("/")[0], recursive=True)
                return cast(BinaryIO, self.system.open_output_stream(path, compression=None))

    def _info(self, name: str) -> fs.FileInfo:
        with _as_os_error():
            return self.system.get_file_info(self.path(name))

    def size(self, name: str) -> int | None:
        info = self._info(name)
        return cast(int, info.size) if info.type == fs.FileType.File else None

    def exists(self, name: str) -> bool:
        return bool(self._info(name).type != fs.FileType.NotFound)

    def list_names(self) -> list[str]:
        with _as_os_error():
            found = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return [info.base_name for info in found]

    def delete(self, name: str) -> None:
        with _as_os_error(), contextlib.suppress(FileNotFoundError):
            self.system.delete_file(self.path(name))

    def delete_tree(self) -> None:
        with _as_os_error(), contextlib.suppress(FileNotFoundError):
            if "/" in self.root.strip("/"):
                self.system.delete_dir(self.root)
            else:
                # The root is a bucket, which is not ours to remove.
                self.system.delete_dir_contents(self.root)

    def delete_leftovers(self) -> None:
        """Nothing to do: a dead writer's upload was never committed."""

    def free_bytes(self) -> int | None:
        return None
