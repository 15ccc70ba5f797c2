"""Quantized weights as codes of their levels, and back, to the bit.

A level is an integer times a scale, rounded once (`quantizers/weights.py`); the integers of a scheme are evenly spaced, so that
code c stands for `first + stride * c`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcq_ray.errors import ExportError
from dcq_ray.export.bits import Codes
from dcq_ray.quantizers.policy import channel_dim
from dcq_ray.records import LayerPlan
from dcq_ray.records.packing import PER_CHANNEL_SCHEMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The integers of a weight, and how its scale goes with them."""

    first: int
    stride: int
    num_levels: int
    scale_dim: int | None = None
    """The dimension that has a scale for each of its indices; None: one scale for all."""
    two_sided: bool = False
    """Two scales: the first for integers above 0, the second for those below."""


def layer_levels(layer: LayerPlan) -> Levels:
    """The levels of a quantized layer's weight, from its scheme and bits."""
    scale_dim = channel_dim(layer.kind) if layer.scheme in PER_CHANNEL_SCHEMES else None
    if layer.scheme in ("twn", "ttq"):
        return Levels(first=-1, stride=1, num_levels=3, two_sided=layer.scheme == "ttq")
    if layer.scheme == "wrpn":
        high = 2 ** (layer.bits - 1) - 1
        return Levels(first=-high, stride=1, num_levels=2 * high + 1)
    num_levels = 2**layer.bits
    if layer.scheme in ("lsq", "lsq-channel"):
        return Levels(first=-num_levels // 2, stride=1, num_levels=num_levels, scale_dim=scale_dim)
    # dorefa and xnor: -1 and +1, or -n, -n + 2 … n.
    return Levels(first=1 - num_levels, stride=2, num_levels=num_levels, scale_dim=scale_dim)


def encode(weight: Tensor, scale: Tensor, levels: Levels, *, name: str) -> Codes:
    """The codes [weights] of a quantized weight.

    Raises:
        ExportError: a weight is not at a level, to the bit; `name` is in the message.
    """
    full = weight.detach().to(scale.dtype)
    if levels.two_sided:
        integers = full.sign()
    else:
        # 0 / 0 is of a layer whose weights are all 0: any code is right.
        integers = torch.nan_to_num(full / _broadcast(scale, levels, full.ndim))
    codes = ((integers - levels.first) / levels.stride).round_().clamp_(0, levels.num_levels - 1)
    found: Codes = codes.to(torch.uint8).flatten().numpy()
    if not _same_bits(decode(found, scale, levels, weight.shape, weight.dtype), weight):
        raise ExportError(
            f"{name}: a weight is not at one of its {levels.num_levels} levels, so it cannot be packed; expected an integer times "
            "the layer's scale; run the job again so that the student is written anew"
        )
    return found


def decode(codes: Codes, scale: Tensor, levels: Levels, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of these codes."""
    integers = torch.from_numpy(codes.astype(np.int16)).reshape(shape) * levels.stride + levels.first
    if levels.two_sided:
        factor = torch.where(integers > 0, scale[0], scale[1])
    else:
        factor = _broadcast(scale, levels, len(shape))
    # Without a negative zero, which the quantizers do not give.
    return (integers.to(scale.dtype) * factor).add_(0.0).to(dtype)


def _broadcast(scale: Tensor, levels: Levels, num_dims: int) -> Tensor:
    if levels.scale_dim is None:
        return scale.reshape(())
    return scale.reshape([-1 if dim == levels.scale_dim else 1 for dim in range(num_dims)])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.detach().contiguous().reshape(-1).view(torch.uint8))
