"""Images as arrays [N, C, H, W]: decoded, turned to grey, resized, and checked.

Owns what an image is between its file and preprocessing: uint8, or float32 in [0, 1], one or three channels. Knows
neither data sets nor splits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dcq_ray.errors import DataError

Size = tuple[int, int]
"""Height and width."""

IMAGES_AT_ONCE = 32
"""Few, so that a handful of photographs in floating point stays in the caches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pixels:
    """Chosen images in a fixed order, read by position."""

    num_images: int
    read: Callable[[NDArray[np.int64]], NDArray[Any]]
    """Positions [B] -> a fresh array [B, C, H, W], uint8, or float32 in [0, 1]."""
    sha256: str
    """Of the images' content and order (of files read lazily: of their names, sizes and times)."""


def pixels_of(images: NDArray[Any]) -> Pixels:
    """Images [N, C, H, W] held in memory."""
    images = np.ascontiguousarray(images)
    digest = hashlib.sha256(json.dumps([str(images.dtype), images.shape]).encode())
    digest.update(images.reshape(-1).view(np.uint8).data)
    read = partial(np.take, images, axis=0)
    return Pixels(num_images=len(images), read=read, sha256=digest.hexdigest())


def shaped(images: NDArray[Any], *, channels: int | None, image_size: Size | None) -> NDArray[Any]:
    """Images [N, C, H, W] of the size asked for, in grey where `channels` is 1; of the same dtype.

    One channel stays one: it is repeated when a batch is read, so that memory does not hold it three times.
    """
    num_channels = 1 if channels == 1 else images.shape[1]
    shape = (len(images), num_channels, *(image_size or images.shape[2:]))
    if shape == images.shape:
        return images
    result = np.empty(shape, images.dtype)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = images[start : start + IMAGES_AT_ONCE]
        if some.shape[1] != num_channels:
            some = to_grey(some)
        result[start : start + IMAGES_AT_ONCE] = some if some.shape[2:] == shape[2:] else resize(some, shape[2:])
    return result


def shaped_together(
    images: Sequence[NDArray[Any]], *, channels: int | None, image_size: Size | None
) -> list[NDArray[Any]]:
    """The same for single images [1, C, H, W] of any sizes: several times faster where all are of one size."""
    if len({image.shape for image in images}) == 1:
        together = shaped(np.concatenate(images), channels=channels, image_size=image_size)
        return list(together[:, None])
    return [shaped(image, channels=channels, image_size=image_size) for image in images]


def to_grey(images: NDArray[Any]) -> NDArray[Any]:
    """Luma of colour images [N, 3, H, W] -> [N, 1, H, W] (ITU-R BT.601); of uint8 in the integers that Pillow uses."""
    if images.dtype == np.uint8:
        red, green, blue = (images[:, [channel]].astype(np.uint32) for channel in range(3))
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)
    red, green, blue = (images[:, [channel]] for channel in range(3))
    luma: NDArray[Any] = red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114)
    np.minimum(luma, 1, out=luma)  # the sum may round to a little more
    return luma


def resize(images: NDArray[Any], size: Size) -> NDArray[Any]:
    """Images [N, C, H, W] resized to [N, C, *size], bilinear and antialiased; of the same dtype.

    Of images of another aspect ratio, the largest centred part of the right one is taken: the shorter side is resized
    and the longer one cropped.
    """
    top, left, height, width = _centred(images.shape[2], images.shape[3], size)
    part = np.ascontiguousarray(images[:, :, top : top + height, left : left + width])
    as_float = torch.from_numpy(part).to(torch.float32)
    resized = torch.nn.functional.interpolate(as_float, size, mode="bilinear", align_corners=False, antialias=True)
    if images.dtype == np.uint8:
        return resized.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return resized.clamp_(0.0, 1.0).numpy()


def _centred(height: int, width: int, size: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest centred part with the aspect ratio of `size`, in whole pixels."""
    part_height = min(height, max(1, round(width * size[0] / size[1])))
    part_width = min(width, max(1, round(height * size[1] / size[0])))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def decode(file: BinaryIO | Path, name: str) -> NDArray[np.uint8]:
    """One image file in colour [1, 3, H, W]; raises DataError with its name where it cannot be decoded."""
    with _decoding(name), Image.open(file) as image:
        _check_depth(image, name)
        return np.array(image.convert("RGB"))[None].transpose(0, 3, 1, 2)


def size_of(file: Path, name: str) -> Size:
    """Height and width of an image file, from its header; raises DataError with its name where it has none."""
    with _decoding(name), Image.open(file) as image:
        return image.height, image.width


def from_pillow(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """A Pillow image [H, W, C]: grey where it is grey, else in colour; raises DataError with its name."""
    with _decoding(name):
        _check_depth(image, name)
        return np.array(image.convert("L"))[:, :, None] if image.mode in ("1", "L") else np.array(image.convert("RGB"))


def _check_depth(image: Image.Image, name: str) -> None:
    # Pillow would clip these at 255 without a word.
    if image.mode.startswith(("I", "F")):
        raise DataError(f"image {name}: got Pillow mode {image.mode}, expected 8 bits per channel; convert it")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders raise what they please on damaged files
        raise DataError(
            f"image {name}: it cannot be decoded ({type(error).__name__}: {error}); replace it or remove it, or set "
            "data.on_error: skip"
        ) from error
