"""What a data set offers: its train and its test images, not chosen from and not loaded where that can wait.

Owns the record that every kind of data set is brought into, and the checks of arrays of images and labels. Does not
know which kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcq_ray.data.choice import Indices
from dcq_ray.data.pixels import Pixels, Size, pixels_of, shaped
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """The train or the test images of a data set."""

    where: str
    """The file or function that they come from, for messages."""
    num_images: int
    labels: Indices | None
    """[N] int64, not negative; None where nothing is labelled."""
    pick: Callable[[Indices], Pixels]
    """The images at these indices, in their order, in the size and the channels that the job asks for."""
    check: Callable[[int], Size] | None = None
    """Reads the image at an index, and gives its height and width before resizing; raises DataError where it cannot be used.

    None: all can.
    """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sources:
    """A data set."""

    train: Source
    test: Source | None
    num_classes: int | None = None
    """None: one more than the largest label."""


def array_source(
    images: NDArray[Any],
    labels: Indices | None,
    *,
    data: DataSpec,
    where: str,
    unusable: Mapping[int, str] | None = None,
) -> Source:
    """A source of images [N, C, H, W] in memory, uint8, or float32 in [0, 1]; `unusable`: index -> why."""
    return Source(
        where=where,
        num_images=len(images),
        labels=labels,
        pick=partial(_pick, images, data),
        check=partial(_check, images.shape[2:], unusable) if unusable else None,
    )


def _check(size: Size, unusable: Mapping[int, str], index: int) -> Size:
    if index in unusable:
        raise DataError(unusable[index])
    return size


def _pick(images: NDArray[Any], data: DataSpec, indices: Indices) -> Pixels:
    return pixels_of(shaped(images[indices], channels=data.channels, image_size=data.image_size))


def checked_images(images: NDArray[Any], where: str, *, skip: bool = False) -> NDArray[Any]:
    """Images as a view [N, C, H, W] of uint8 [N, H, W, C] or [N, H, W], or of float32 [N, C, H, W] in [0, 1].

    Raises DataError for any other dtype, shape or range (unless `skip`), and for no images at all.
    """
    got = f"got {images.dtype} {list(images.shape)}"
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"{where}: images: {got}, expected uint8 [N, H, W, C] or [N, H, W]"
            " (or, from a function of your own, float32 [N, C, H, W] in [0, 1]); convert them"
        )
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[..., None]
    channel_axis, layout = (3, "[N, H, W, C]") if images.dtype == np.uint8 else (1, "[N, C, H, W]")
    if images.ndim != 4 or images.shape[channel_axis] not in (1, 3):
        raise DataError(f"{where}: images: {got}, expected {layout} with 1 or 3 channels C; transpose or convert them")
    if images.size == 0:
        raise DataError(f"{where}: images: {got}, expected at least one image and one pixel")
    if images.dtype == np.uint8:
        return images.transpose(0, 3, 1, 2)
    unusable = out_of_range(images, where)
    if unusable and not skip:
        raise DataError(f"{len(unusable)} of {len(images)} images cannot be used: {next(iter(unusable.values()))}")
    return images


def out_of_range(images: NDArray[Any], where: str) -> dict[int, str]:
    """Index -> what is wrong, of float32 images [N, C, H, W] that have NaN or leave [0, 1]."""
    if images.dtype == np.uint8:
        return {}
    rows = images.reshape(len(images), -1)
    low, high = rows.min(axis=1), rows.max(axis=1)
    return {
        int(
            index
        ): f"image {index} of {where}: got float32 from {low[index]} to {high[index]}, expected [0, 1] without NaN; "
        "divide by the largest value and leave normalization to data.normalize"
        for index in np.flatnonzero(~((low >= 0) & (high <= 1)))
    }


def checked_labels(labels: NDArray[Any], num_images: int, where: str) -> Indices:
    """Labels as int64 [N]; raises DataError unless they are whole, not negative, and as many as images."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{where}: labels: got {labels.dtype} {list(labels.shape)}, expected integers [N]; "
            "store one class index per image"
        )
    if len(labels) != num_images:
        raise DataError(f"{where}: got {len(labels)} labels for {num_images} images, expected one each")
    if labels.size and labels.min() < 0:
        position = int(labels.argmin())
        raise DataError(
            f"{where}: labels: got {labels[position]} at index {position}, expected 0 or more; "
            "for images without labels leave `labels` out"
        )
    return labels.astype(np.int64)
