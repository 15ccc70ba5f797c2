"""A kill in the middle of a write, without a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from dcq_ray.storage.local_files import LocalFiles


class Killed(BaseException):
    """Ends what runs as a kill does: nothing catches it."""


@contextlib.contextmanager
def killed(at_write: int, *, inside: str = "") -> Iterator[None]:
    """Kill whatever begins to write its file of that number, from 0, in a folder whose path has `inside` in it."""
    count, open_output = 0, LocalFiles.open_output

    def counting(files: LocalFiles, name: str) -> Any:
        nonlocal count
        if inside in str(files.root):
            if count == at_write:
                raise Killed
            count += 1
        return open_output(files, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFiles, "open_output", counting)
        yield
