"""Data sets that a function of the user's own returns.

Owns what such a function may return, and checks it. The function is the user's code: whatever it raises becomes a
DataError that says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dcq_ray.callables import describe_failure, load_callable
from dcq_ray.data.pixels import from_pillow
from dcq_ray.data.source import Source, Sources, array_source, checked_images, checked_labels, out_of_range
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec

_EXPECTED = (
    'expected {"train": …, "test": …} (test may be left out or None), each a pair (images, labels or None) or a '
    "torch.utils.data.Dataset of (image, label)"
)


def custom_sources(data: DataSpec, *, job_folder: str) -> Sources:
    """What the function `data.dataset` returns when called with `data.args`; raises DataError.

    Images are uint8 [N, H, W, C] or [N, H, W], or float32 [N, C, H, W] in [0, 1], as arrays or tensors. A Dataset is
    read once, into memory; its images are Pillow images, uint8 arrays [H, W, C] or [H, W], float32 arrays [C, H, W] in
    [0, 1], or uint8 or float32 tensors [C, H, W].
    """
    function = load_callable(data.dataset, folder=job_folder, where="data.dataset", error=DataError)
    try:
        result = function(**data.args)
    except Exception as raised:
        raise DataError(
            f"data.dataset ({data.dataset}): called with data.args {data.args}, it raised {describe_failure(raised)}"
        ) from raised
    if not isinstance(result, Mapping) or not {"train"} <= set(result) <= {"train", "test"}:
        got = f"the keys {sorted(map(str, result))}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        raise DataError(f"data.dataset ({data.dataset}): it returned {got}, {_EXPECTED}")
    train, test = (_source(result.get(part), part, data) for part in ("train", "test"))
    if train is None:
        raise DataError(f'data.dataset ({data.dataset}): it returned None for "train", {_EXPECTED}')
    return Sources(train=train, test=test)


def _source(value: Any, part: str, data: DataSpec) -> Source | None:
    where = f"data.dataset ({data.dataset}, {part})"
    skip, unread = data.on_error == "skip", dict[int, str]()
    if value is None:
        return None
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise DataError(f"{where}: got a {type(value).__name__} of {len(value)}, {_EXPECTED}")
        images, labels = value
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__") and not hasattr(value, "shape"):
        images, labels, unread = _read_dataset(value, where, skip=skip)
    else:
        raise DataError(f"{where}: got a {type(value).__name__}, {_EXPECTED}")
    checked = checked_images(_array(images), where, skip=skip)
    return array_source(
        checked,
        None if labels is None else checked_labels(_array(labels), len(checked), where),
        data=data,
        where=where,
        unusable=out_of_range(checked, where) | unread if skip else None,
    )


def _read_dataset(dataset: Any, where: str, *, skip: bool) -> tuple[NDArray[Any], list[int], dict[int, str]]:
    """Every (image, label) of a Dataset, and with `skip` index -> why of those that stand there as zeros."""
    images: list[NDArray[Any] | None] = []
    labels: list[int] = []
    unread: dict[int, str] = {}
    first: NDArray[Any] | None = None
    for index in range(len(dataset)):
        try:
            image, label = _read_pair(dataset, index, f"{index} of {where}", first)
        except DataError as error:
            if not skip:
                raise
            unread[index] = str(error)
            image, label = None, 0
        first = image if first is None else first
        images.append(image)
        labels.append(label)
    if first is None:
        reason = f": {next(iter(unread.values()))}" if unread else ""
        raise DataError(f"{where}: got a Dataset without an image that can be read, expected at least one{reason}")
    return np.stack([np.zeros_like(first) if image is None else image for image in images]), labels, unread


def _read_pair(dataset: Any, index: int, name: str, first: NDArray[Any] | None) -> tuple[NDArray[Any], int]:
    """The image and the label at an index; raises DataError where it cannot be read or is unlike the first."""
    try:
        value, label = dataset[index]
        label = int(label)
    except Exception as raised:
        raise DataError(
            f"image {name}: expected a pair (image, label), but reading it raised {describe_failure(raised)}"
        ) from raised
    image = _image(value, name)
    if first is not None and (image.shape != first.shape or image.dtype != first.dtype):
        raise DataError(
            f"image {name}: got {image.dtype} {list(image.shape)} after {first.dtype} {list(first.shape)}, expected one "
            "shape; resize images in the Dataset's transform"
        )
    return image, label


def _image(image: Any, name: str) -> NDArray[Any]:
    """One image, uint8 [H, W, C] or float32 [C, H, W]."""
    if isinstance(image, Image.Image):
        return from_pillow(image, name)
    array = _array(image)
    if isinstance(image, torch.Tensor) and array.dtype == np.uint8 and array.ndim == 3:
        return array.transpose(1, 2, 0)  # torchvision's tensors have channels first, whatever their dtype
    return array


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
