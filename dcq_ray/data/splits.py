"""The three parts of a data set that a run uses: train, held-out and test.

Owns which images each part has, and a part's identity. Train and held-out images come from the train set and share
none; test images come from the test set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dcq_ray.data.builtin import cifar10_sources, digits_sources, mnist_sources, svhn_sources
from dcq_ray.data.choice import Indices, balanced_choice, generator_of
from dcq_ray.data.custom import custom_sources
from dcq_ray.data.imagefolder import imagefolder_sources
from dcq_ray.data.npz import npz_sources
from dcq_ray.data.pixels import Pixels, Size
from dcq_ray.data.preprocess import Preprocessing, check_transform, load_preprocessing, preprocess
from dcq_ray.data.source import Source, Sources
from dcq_ray.digests import json_sha256
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec

MAX_HELD_OUT_BY_DEFAULT = 5000
# One stream of random numbers for each choice, so that none depends on another's size.
_HELD_OUT, _TRAIN, _TEST = 1, 2, 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Some images in a fixed order."""

    name: str
    """train, held-out or test."""
    labels: Indices | None
    """[N] int64."""
    sha256: str
    """Of the ordered images, their labels, and all preprocessing."""
    pixels: Pixels
    preprocessing: Preprocessing
    skipped: tuple[str, ...] = ()
    """What is wrong with each image that was chosen, but left out."""

    def __len__(self) -> int:
        return self.pixels.num_images

    def images(self, positions: NDArray[np.int64]) -> Tensor:
        """The preprocessed images at positions [B]: float32 [B, C, H, W], each the same in any batch.

        Raises DataError: an image file is damaged, or the user's transform fails.
        """
        return preprocess(self.pixels.read(positions), self.preprocessing)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """The parts of a data set."""

    train: Part
    held_out: Part
    test: Part | None
    num_classes: int | None
    """None where nothing is labelled."""
    input_shape: tuple[int, ...]
    """[C, H, W] of a preprocessed image."""


def load_splits(data: DataSpec, *, seed: int, job_folder: str) -> Splits:
    """The parts that a job asks for, chosen by `seed`; `job_folder` is where the user's own functions are looked for.

    Held-out images are chosen first, then train images from the rest, each evenly over the classes; a test set that is
    used whole keeps the order of its file. Raises DataError: a data set that is missing, malformed or too small, labels
    of a single class, a transform that fails.
    """
    sources = _sources(data, job_folder)
    for source in (sources.train, sources.test):
        if source is not None:
            _check_source(source)
    preprocessing = load_preprocessing(data, job_folder=job_folder)
    train_indices, held_out_indices = _choose_train(sources.train, data, seed)
    train = _part("train", sources.train, train_indices, preprocessing, data)
    held_out = _part("held-out", sources.train, held_out_indices, preprocessing, data)
    test = None
    if sources.test is not None:
        test = _part("test", sources.test, _choose_test(sources.test, data, seed), preprocessing, data)
    elif data.test_samples is not None:
        raise DataError(
            f"data.test_samples: got {data.test_samples}, but {sources.train.where} comes without a test set"
        )

    check_transform(train.pixels.read(np.arange(min(2, len(train)))), preprocessing)
    input_shape = _shape(train)
    for part in (held_out, test):
        if part is not None and _shape(part) != input_shape:
            raise DataError(
                f"{part.name} images: got {list(_shape(part))} where train images have {list(input_shape)}, expected "
                "one shape; set data.image_size and data.channels"
            )
    return Splits(train=train, held_out=held_out, test=test, num_classes=_num_classes(sources), input_shape=input_shape)


def _sources(data: DataSpec, job_folder: str) -> Sources:
    match data.dataset:
        case "digits":
            return digits_sources(data)
        case "mnist":
            return mnist_sources(data, "MNIST")
        case "fashion-mnist":
            return mnist_sources(data, "FashionMNIST")
        case "cifar10":
            return cifar10_sources(data)
        case "svhn":
            return svhn_sources(data)
        case "npz":
            return npz_sources(data)
        case "imagefolder":
            return imagefolder_sources(data)
        case _:
            return custom_sources(data, job_folder=job_folder)


def _check_source(source: Source) -> None:
    if source.num_images == 0:
        raise DataError(f"{source.where}: got no images, expected some")
    if source.labels is not None and (source.labels == source.labels[0]).all():
        raise DataError(
            f"{source.where}: got {source.num_images} images of one class, {source.labels[0]}, expected at least two "
            "classes: accuracy would mean nothing; leave the labels out, or add other classes"
        )


def _choose_train(source: Source, data: DataSpec, seed: int) -> tuple[Indices, Indices]:
    """Indices of the train and of the held-out images."""
    num_held_out = data.held_out_samples
    if num_held_out is None:
        num_held_out = min(max(1, source.num_images // 10), MAX_HELD_OUT_BY_DEFAULT)
    num_train = data.train_samples or max(1, source.num_images - num_held_out)
    if num_train + num_held_out > source.num_images:
        train_asked = data.train_samples or "at least 1"
        raise DataError(
            f"{source.where}: got {source.num_images} images in the train set, expected {num_train + num_held_out}: "
            f"data.train_samples {train_asked} and data.held_out_samples {num_held_out}; ask for fewer"
        )
    held_out = balanced_choice(
        source.labels, source.num_images, num_held_out, generator_of(seed, _HELD_OUT), leave_half=True
    )
    rest = np.setdiff1d(np.arange(source.num_images), held_out)
    rest_labels = None if source.labels is None else source.labels[rest]
    train = rest[balanced_choice(rest_labels, len(rest), num_train, generator_of(seed, _TRAIN))]
    return train, held_out


def _choose_test(source: Source, data: DataSpec, seed: int) -> Indices:
    if data.test_samples is None or data.test_samples == source.num_images:
        return np.arange(source.num_images)
    if data.test_samples > source.num_images:
        raise DataError(
            f"{source.where}: got {source.num_images} images in the test set, expected data.test_samples "
            f"{data.test_samples}; ask for fewer"
        )
    return balanced_choice(source.labels, source.num_images, data.test_samples, generator_of(seed, _TEST))


def _part(name: str, source: Source, indices: Indices, preprocessing: Preprocessing, data: DataSpec) -> Part:
    skipped: tuple[str, ...] = ()
    if data.on_error == "skip" and source.check is not None:
        indices, skipped = _usable(source, source.check, indices, any_size=data.image_size is not None)
    pixels = source.pick(indices)
    labels = None if source.labels is None else source.labels[indices]
    identity = {
        "images": pixels.sha256,
        "labels": None if labels is None else hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
        "preprocessing": preprocessing.identity,
    }
    return Part(
        name=name,
        labels=labels,
        sha256=json_sha256(identity),
        pixels=pixels,
        preprocessing=preprocessing,
        skipped=skipped,
    )


def _usable(
    source: Source, check: Callable[[int], Size], indices: Indices, *, any_size: bool
) -> tuple[Indices, tuple[str, ...]]:
    """The indices of the images that can be read and, unless they are resized, have the first one's size; and the reasons.

    Raises DataError where none is left.
    """
    kept: list[int] = []
    skipped: list[str] = []
    first: Size | None = None
    for index in map(int, indices):
        try:
            size = check(index)
        except DataError as error:
            skipped.append(str(error))
            continue
        first = size if first is None else first
        if size == first or any_size:
            kept.append(index)
        else:
            skipped.append(
                f"image {index} of {source.where}: got {size[0]}x{size[1]} pixels after one of {first[0]}x{first[1]}"
            )
    if not kept:
        raise DataError(f"{source.where}: none of {len(indices)} chosen images can be used; the first: {skipped[0]}")
    return np.array(kept, np.int64), tuple(skipped)


def _shape(part: Part) -> tuple[int, ...]:
    return tuple(part.images(np.arange(1)).shape[1:])


def _num_classes(sources: Sources) -> int | None:
    if sources.num_classes is not None:
        return sources.num_classes
    labelled = [source.labels for source in (sources.train, sources.test) if source and source.labels is not None]
    return max((int(labels.max()) + 1 for labels in labelled), default=None)
