"""Batches of a part: in order, or shuffled and augmented for training.

Owns the order and the augmentation of training images, fixed functions of (seed, epoch). Knows neither files nor jobs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data.choice import generator_of
from dcq_ray.data.splits import Part
from dcq_ray.errors import DataError

# The draws of an epoch, each from its own generator. Not 0: a key is filled up with zeros, and (seed, epoch) is the order's.
_MIRRORS, _CORNERS = 1, 2


def ordered_batches(part: Part, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images float32 [B, C, H, W] and labels int64 [B] or None, in the part's order; the last batch may be smaller."""
    for start in range(0, len(part), batch_size):
        positions = np.arange(start, min(start + batch_size, len(part)))
        labels = None if part.labels is None else torch.from_numpy(part.labels[positions])
        yield part.images(positions), labels


def augmented_batches(
    part: Part, *, batch_size: int, flip: bool, crop_padding: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float32 [B, C, H, W] and labels int64 [B] of one epoch, shuffled and augmented by (seed, epoch).

    `flip` mirrors each image left to right with probability one half; `crop_padding` pads each preprocessed image with
    that many zeros on each side and crops it at random back to size (He et al. 2015, arXiv 1512.03385, section 4.2). What
    is done to an image depends on (seed, epoch, its position in the part) alone. A last batch smaller than the others is
    dropped. Raises DataError where the part has no labels.
    """
    if part.labels is None:
        raise DataError(
            f"{part.name} images: got no labels, expected them for training with cross-entropy; "
            "add labels to the train set, or do without teacher.fit"
        )
    return _augmented_batches(part, part.labels, batch_size, flip, crop_padding, seed, epoch)


def _augmented_batches(
    part: Part, labels: np.ndarray, batch_size: int, flip: bool, crop_padding: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    order = epoch_order(len(part), seed=seed, epoch=epoch)
    mirrored = mirrors(len(part), seed=seed, epoch=epoch)
    corners = crop_corners(len(part), crop_padding, seed=seed, epoch=epoch)
    for index in range(max(1, len(part) // batch_size)):
        positions = order[index * batch_size : (index + 1) * batch_size]
        images = part.images(positions)
        if flip:
            images = flipped(images, mirrored[positions])
        if crop_padding:
            images = cropped(images, crop_padding, corners[:, positions])
        yield images, torch.from_numpy(labels[positions])


def view_images(part: Part, positions: np.ndarray, *, flip: bool, crop_padding: int, seed: int, epoch: int) -> Tensor:
    """Images float32 [B, C, H, W] at positions of a part, augmented as `augmented_batches` does in that epoch."""
    images = part.images(positions)
    if flip:
        images = flipped(images, mirrors(len(part), seed=seed, epoch=epoch)[positions])
    if crop_padding:
        images = cropped(
            images, crop_padding, crop_corners(len(part), crop_padding, seed=seed, epoch=epoch)[:, positions]
        )
    return images


def epoch_order(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order [N] in which an epoch of `augmented_batches` sees so many images."""
    return generator_of(seed, epoch).permutation(num_images)


def mirrors(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """Which of so many images an epoch mirrors [N], each with probability one half; more images change no earlier one."""
    drawn: np.ndarray = generator_of(seed, epoch, _MIRRORS).random(num_images) < 0.5
    return drawn


def crop_corners(num_images: int, padding: int, *, seed: int, epoch: int) -> np.ndarray:
    """Top rows and left columns of an epoch's cuts [2, N], even over 0 to twice the padding; see `mirrors`."""
    return generator_of(seed, epoch, _CORNERS).integers(0, 2 * padding + 1, (num_images, 2)).T


def flipped(images: Tensor, mirror: np.ndarray) -> Tensor:
    """Images [B, C, H, W], mirrored left to right where `mirror` [B] is true."""
    return torch.where(torch.from_numpy(mirror)[:, None, None, None], images.flip(3), images)


def cropped(images: Tensor, padding: int, corners: np.ndarray) -> Tensor:
    """Images [B, C, H, W] cut back to size out of images padded by zeros.

    `corners` [2, B] are the top rows and the left columns of the cuts, from 0 to twice the padding.
    """
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.from_numpy(corners)
    image = torch.arange(len(images))[:, None, None]
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, :]
    # Indexed dimensions with a slice between them come first: [B, H, W, C].
    return padded[image, :, rows, columns].permute(0, 3, 1, 2).contiguous()
