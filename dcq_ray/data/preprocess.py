"""From stored pixels to what a network sees, a batch at a time.

Owns scaling to [0, 1], channels, the user's transform and normalization. No image's result depends on the other images
in its batch: every operation is elementwise, and a transform that breaks this rule is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcq_ray.callables import describe_failure, load_callable
from dcq_ray.digests import file_sha256
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec, NormalizeSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preprocessing:
    """What is done to every batch."""

    channels: int | None
    transform: Callable[..., Any] | None
    transform_name: str | None
    normalize: NormalizeSpec | None
    identity: dict[str, Any]
    """Plain values that determine the result, the size that images were brought to included; for digests."""


def load_preprocessing(data: DataSpec, *, job_folder: str) -> Preprocessing:
    """The preprocessing that a job asks for; raises DataError where its transform cannot be loaded."""
    transform, source_sha256 = None, None
    if data.transform is not None:
        transform = load_callable(data.transform, folder=job_folder, where="data.transform", error=DataError)
        source_sha256 = _source_sha256(transform)
    settings = data.model_dump(mode="json", include={"channels", "image_size", "normalize", "transform"})
    return Preprocessing(
        channels=data.channels,
        transform=transform,
        transform_name=data.transform,
        normalize=data.normalize,
        identity={**settings, "transform_source_sha256": source_sha256},
    )


def _source_sha256(function: Callable[..., Any]) -> str | None:
    """Digest of the file that defines a function; None where there is none, as for functions of compiled modules."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        file = inspect.getsourcefile(type(function)) if type(function).__module__ != "builtins" else None
    return None if file is None else file_sha256(file)


def preprocess(images: NDArray[Any], settings: Preprocessing) -> Tensor:
    """Images [B, C, H, W], uint8 or float32 in [0, 1], as the network's input: float32 [B, C', H', W'].

    In this order: to [0, 1], channels, transform, normalize; float32 images may be overwritten. Raises DataError where
    the transform fails or returns anything else, where `normalize` has another number of channels, and where a result
    is not finite.
    """
    batch = torch.from_numpy(images)
    if images.dtype == np.uint8:
        batch = batch.to(torch.float32).div_(255)
    if settings.channels == 3 and batch.shape[1] == 1:
        batch = batch.repeat(1, 3, 1, 1)
    if settings.transform is not None:
        batch = _transformed(batch, settings.transform, f"data.transform ({settings.transform_name})")
    if settings.normalize is not None:
        batch = _normalized(batch, settings.normalize)
    low, high = batch.aminmax()  # in one pass and without a copy; NaN if anything is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        num_bad = batch.numel() - int(torch.isfinite(batch).sum())
        raise DataError(
            f"images after preprocessing: got {num_bad} values that are not finite among {batch.numel()}, expected "
            f"none; correct data.transform ({settings.transform_name}) or data.normalize"
        )
    return batch


def _transformed(batch: Tensor, transform: Callable[..., Any], what: str) -> Tensor:
    num_images = len(batch)
    try:
        with torch.no_grad():
            result = transform(batch)
    except Exception as raised:
        raise DataError(f"{what}: given float32 {list(batch.shape)}, it raised {describe_failure(raised)}") from raised
    fits = isinstance(result, Tensor) and result.dtype == torch.float32 and result.ndim == 4
    if not fits or len(result) != num_images:
        got = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise DataError(f"{what}: it returned {got}, expected a float32 tensor [{num_images}, C, H, W]")
    tensor: Tensor = result.detach().contiguous()
    return tensor


def _normalized(batch: Tensor, normalize: NormalizeSpec) -> Tensor:
    for name, values in (("mean", normalize.mean), ("std", normalize.std)):
        if len(values) not in (1, batch.shape[1]):
            raise DataError(
                f"data.normalize.{name}: got {len(values)} values for images of {batch.shape[1]} channel(s), "
                "expected one for each channel, or one for all"
            )
    mean = torch.tensor(normalize.mean, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.tensor(normalize.std, dtype=torch.float32).view(1, -1, 1, 1)
    return (batch - mean).div_(std)


def check_transform(images: NDArray[Any], settings: Preprocessing) -> None:
    """Raises DataError unless the transform gives each of these images [B, C, H, W] alone what it gives it in a batch.

    A transform that is random, or that mixes images, would make activations depend on the batch size.
    """
    if settings.transform is None:
        return
    together = preprocess(images.copy(), settings)  # a transform may work in place
    for position in range(len(images)):
        alone = preprocess(images[position : position + 1].copy(), settings)
        if alone.shape[1:] != together.shape[1:] or not torch.allclose(alone[0], together[position], atol=1e-5):
            raise DataError(
                f"data.transform ({settings.transform_name}): it gives an image in a batch of {len(images)} another "
                "result than the same image alone, expected the same; remove what is random or mixes images"
            )
