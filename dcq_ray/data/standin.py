"""Noise in the place of images that are not here, for a plan of them.

Owns what a data set's parts look like when nothing but their numbers and the images' size is known. Nothing is trained on it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcq_ray.data.pixels import Pixels
from dcq_ray.data.preprocess import load_preprocessing
from dcq_ray.data.splits import MAX_HELD_OUT_BY_DEFAULT, Part, Splits
from dcq_ray.digests import json_sha256
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec


def stand_in_splits(data: DataSpec, num_train: int, *, job_folder: str) -> Splits:
    """Parts of so many images of `data.image_size`, made as they are read; raises DataError where the job states no size.

    Held-out images are as many as the job asks for, or would be chosen from so many; test images as many as it asks for.
    """
    if data.image_size is None:
        raise DataError("data.image_size: noise in the place of images needs their size; set it to [height, width]")
    preprocessing = load_preprocessing(data, job_folder=job_folder)
    shape = (data.channels or 3, *data.image_size)

    def part(name: str, num_images: int) -> Part:
        identity = ["noise in the place of images", name, num_images, list(shape), preprocessing.identity]
        sha256 = json_sha256(identity)
        pixels = Pixels(num_images=num_images, read=partial(_noise, shape), sha256=sha256)
        labels = None if name == "train" else np.zeros(num_images, np.int64)
        return Part(name=name, labels=labels, sha256=sha256, pixels=pixels, preprocessing=preprocessing)

    num_held_out = data.held_out_samples or min(max(1, num_train // 10), MAX_HELD_OUT_BY_DEFAULT)
    train = part("train", num_train)
    return Splits(
        train=train,
        held_out=part("held-out", num_held_out),
        test=None if data.test_samples is None else part("test", data.test_samples),
        num_classes=None,
        input_shape=tuple(train.images(np.arange(1)).shape[1:]),
    )


def _noise(shape: tuple[int, ...], positions: NDArray[np.int64]) -> NDArray[Any]:
    """Other noise for every position, whatever batch it is read in."""
    images = [np.random.default_rng(position).integers(0, 256, shape, np.uint8) for position in map(int, positions)]
    return np.stack(images)
