"""A data set as folders of image files, a folder a class, decoded when a batch needs them.

Owns the layout of such folders. Nothing is written there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcq_ray.data.choice import Indices
from dcq_ray.data.pixels import Pixels, Size, decode, shaped_together, size_of
from dcq_ray.data.source import Source, Sources
from dcq_ray.digests import json_sha256
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec

_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_EXPECTED = "root/train/<class>/<image> and, for the test set, root/test/<class>/<image> or root/val/<class>/<image>"


def imagefolder_sources(data: DataSpec) -> Sources:
    """The images below root/train and root/test (or root/val); classes are numbered in order of their names.

    Without class folders, images straight in root/train have no labels. Raises DataError.
    """
    if data.root is None:
        raise DataError(f"data.root: got null, expected a folder with {_EXPECTED}")
    root = Path(data.root).expanduser()
    if not (root / "train").is_dir():
        raise DataError(f"{root / 'train'}: no such folder; expected {_EXPECTED}; correct data.root")
    classes = _classes(root / "train")
    test = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    unknown = sorted(set(_classes(root / test)) - set(classes)) if test else []
    if test and unknown:
        raise DataError(
            f"{root / test}: got {len(unknown)} class folder(s) that {root / 'train'} lacks, such as {unknown[0]!r}; "
            "expected the classes of the train set"
        )
    return Sources(
        train=_source(root, "train", classes, data),
        test=None if test is None else _source(root, test, classes, data),
        num_classes=len(classes) or None,
    )


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _source(root: Path, part: str, classes: Sequence[str], data: DataSpec) -> Source:
    """The source of one part's folder; images straight in it count only where there are no class folders."""
    files: list[str] = []
    labels: list[int] = []
    own_classes = _classes(root / part)
    for name in own_classes or [""]:
        found = _image_files(root, Path(part) / name)
        if not found:
            raise DataError(
                f"{root / part / name}: no images in it; expected {_EXPECTED}, with endings {' '.join(_ENDINGS)}"
            )
        files += found
        labels += [classes.index(name)] * len(found) if own_classes else []
    return Source(
        where=str(root / part),
        num_images=len(files),
        labels=np.array(labels, np.int64) if own_classes else None,
        pick=partial(_pick, root, files, data),
        check=partial(_size, root, files),
    )


def _image_files(root: Path, folder: Path) -> list[str]:
    """Names of the images anywhere below root/folder, relative to root, in order."""
    found = []
    for parent, _, names in os.walk(root / folder, followlinks=True):
        below = Path(parent).relative_to(root)
        visible = (name for name in names if not name.startswith(".") and name.lower().endswith(_ENDINGS))
        found += [(below / name).as_posix() for name in visible]
    return sorted(found)


def _pick(root: Path, files: Sequence[str], data: DataSpec, indices: Indices) -> Pixels:
    chosen = [files[index] for index in indices]
    states = [_state(root / name) for name in chosen]
    if data.image_size is None:
        _check_sizes(root, chosen)
    identity = [[name, state.st_size, state.st_mtime_ns] for name, state in zip(chosen, states, strict=True)]
    return Pixels(num_images=len(chosen), read=partial(_read, root, chosen, data), sha256=json_sha256(identity))


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(
            f"image {path}: it cannot be read ({error.strerror}); put it back or remove it, or set data.on_error: skip"
        ) from error


def _size(root: Path, files: Sequence[str], index: int) -> Size:
    path = root / files[index]
    height, width = decode(path, str(path)).shape[2:]
    return height, width


def _check_sizes(root: Path, names: Sequence[str]) -> None:
    first = size_of(root / names[0], str(root / names[0]))
    for name in names:
        size = size_of(root / name, str(root / name))
        if size != first:
            raise DataError(
                f"{root / name}: got {size[0]}x{size[1]} pixels, but {names[0]} has {first[0]}x{first[1]}; "
                "expected one size; set data.image_size: [height, width]"
            )


def _read(root: Path, names: Sequence[str], data: DataSpec, positions: NDArray[np.int64]) -> NDArray[Any]:
    images = [decode(root / names[position], str(root / names[position])) for position in positions]
    return np.concatenate(shaped_together(images, channels=data.channels, image_size=data.image_size))
