"""Data sets in .npz files of the user's own: arrays, or image files joined end to end.

Owns the layout of these files. Nothing in them is unpickled.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcq_ray.data.choice import Indices
from dcq_ray.data.pixels import IMAGES_AT_ONCE, Pixels, Size, decode, pixels_of, shaped_together
from dcq_ray.data.source import Source, Sources, array_source, checked_images, checked_labels
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec


def npz_sources(data: DataSpec) -> Sources:
    """The images of `data.train` and, unless it is null, `data.test` below `data.root`; raises DataError.

    Keys of a file: `images` uint8 [N, H, W, C] or [N, H, W]; or `jpeg` uint8 [bytes], files of any format that Pillow
    reads, joined, and `offsets` [N + 1], where each begins; and optionally `labels` [N].
    """
    if data.train is None:
        raise DataError("data.train: got null, expected the name of an .npz file below data.root, for data.dataset npz")
    root = Path(data.root or "").expanduser()
    test = None if data.test is None else _source(root / data.test, data)
    return Sources(train=_source(root / data.train, data), test=test)


def _source(path: Path, data: DataSpec) -> Source:
    arrays = _arrays(path)
    where = str(path)
    if "images" in arrays:
        if arrays["images"].dtype != np.uint8:
            raise DataError(
                f"{where}: images: got {arrays['images'].dtype}, expected uint8; store values from 0 to 255"
            )
        images = checked_images(arrays["images"], where)
        return array_source(images, _labels(arrays, len(images), where), data=data, where=where)
    if "jpeg" in arrays and "offsets" in arrays:
        content, offsets = arrays["jpeg"], arrays["offsets"]
        _check_files(content, offsets, where)
        labels = _labels(arrays, len(offsets) - 1, where)
        return Source(
            where=where,
            num_images=len(offsets) - 1,
            labels=labels,
            pick=partial(_pick, content, offsets, data, where),
            check=partial(_size, content, offsets, where),
        )
    raise DataError(
        f"{where}: got keys {', '.join(sorted(arrays)) or 'none'}, expected `images`, or `jpeg` and `offsets`; "
        "write it with numpy.savez(file, images=…, labels=…)"
    )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            # What else the file holds, such as class names, is none of ours, and may be pickled.
            wanted = {"images", "jpeg", "offsets", "labels"}
            return {key: file[key] if key in wanted else np.empty(0) for key in file.files}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; correct data.root, data.train or data.test") from error
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: it cannot be read as .npz without pickle ({type(error).__name__}: {error}); "
            "write it with numpy.savez from arrays of numbers"
        ) from error


def _labels(arrays: dict[str, NDArray[Any]], num_images: int, where: str) -> Indices | None:
    return checked_labels(arrays["labels"], num_images, where) if "labels" in arrays else None


def _check_files(content: NDArray[Any], offsets: NDArray[Any], where: str) -> None:
    if content.dtype != np.uint8 or content.ndim != 1:
        raise DataError(f"{where}: jpeg: got {content.dtype} {list(content.shape)}, expected uint8 [bytes]")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise DataError(f"{where}: offsets: got {offsets.dtype} {list(offsets.shape)}, expected integers [N + 1]")
    if len(offsets) < 2:
        raise DataError(f"{where}: offsets: got {len(offsets)} of them, expected N + 1 for at least one image")
    falls = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if falls.size:
        first = int(falls[0])
        raise DataError(
            f"{where}: offsets: got {offsets[first]} before {offsets[first + 1]} at index {first}, expected rising "
            "ones; offset i is where image i begins in `jpeg`"
        )
    if offsets[0] < 0 or offsets[-1] > len(content):
        raise DataError(
            f"{where}: offsets: got {offsets[0]} to {offsets[-1]}, expected them within the "
            f"{len(content)} bytes of `jpeg`"
        )


def _pick(content: NDArray[Any], offsets: NDArray[Any], data: DataSpec, where: str, indices: Indices) -> Pixels:
    images: NDArray[np.uint8] | None = None
    for start in range(0, len(indices), IMAGES_AT_ONCE):
        some = indices[start : start + IMAGES_AT_ONCE]
        decoded = [decode(_file(content, offsets, index), f"{index} of {where}") for index in some]
        shaped = shaped_together(decoded, channels=data.channels, image_size=data.image_size)
        if images is None:
            images = np.empty((len(indices), *shaped[0].shape[1:]), np.uint8)
        for position, image in enumerate(shaped, start):
            if image.shape[1:] != images.shape[1:]:
                raise DataError(
                    f"image {indices[position]} of {where}: got {image.shape[2]}x{image.shape[3]} pixels after one of "
                    f"{images.shape[2]}x{images.shape[3]}, expected one size; set data.image_size: [height, width]"
                )
            images[position] = image[0]
    assert images is not None, "an empty choice of images"
    return pixels_of(images)


def _size(content: NDArray[Any], offsets: NDArray[Any], where: str, index: int) -> Size:
    height, width = decode(_file(content, offsets, index), f"{index} of {where}").shape[2:]
    return height, width


def _file(content: NDArray[Any], offsets: NDArray[Any], index: int) -> io.BytesIO:
    return io.BytesIO(content[int(offsets[index]) : int(offsets[index + 1])].tobytes())
