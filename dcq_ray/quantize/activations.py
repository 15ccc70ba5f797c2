"""Activation quantizers as pure functions.

x is the input of a layer, k its bits, a the clip, s = a / high the step. Where the values seen are never negative (after a
ReLU) the levels are 0 … high = 2^k - 1 times s; where they are negative too (images, joins, GELU) they are symmetric,
-high … high with high = 2^(k-1) - 1, and for one bit -a and +a. What is computed is the same for all three,

    y = s clamp(round(x / s), low, high)

with the rounding of ONNX's QuantizeLinear; they differ in where the clip comes from and in gradients:

    dorefa  a fixed, found from data; x passes inside the clip           (DoReFa-Net, eq. 5 and 11, where a = 1)
    pact    a learned: dy/da = 1 where x >= a (-1 where x <= -a)         (PACT, arXiv 1805.06085, eq. 3)
    lsq     s learned by LSQ's gradient                                  (LSQ, arXiv 1902.08153, eq. 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcq_ray.quantize.weights import least_squares_clip, lsq


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStart:
    """Where an activation quantizer starts: the clip of least squared error on data, and whether they have a sign."""

    clip: float = 1.0
    signed: bool = False


def level_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest integer level; one signed bit has -1 and +1 and no 0."""
    high = max(1, 2 ** (bits - 1) - 1) if signed else 2**bits - 1
    return (-high if signed else 0), high


def round_to_levels(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """step * clamp(round(value / step), low, high); no gradient is defined here."""
    low, high = level_range(bits, signed)
    if bits == 1 and signed:
        return torch.where(value >= 0, step, -step).to(value.dtype)
    return torch.round(value / step).clamp_(low, high).mul_(step)


def dorefa_activation(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Fixed clip; the gradient passes inside it and is 0 outside."""
    low, high = level_range(bits, signed)
    clipped = torch.minimum(torch.maximum(value, low * step), high * step)
    return clipped + (round_to_levels(value.detach(), step, bits, signed) - clipped).detach()


def pact_activation(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Learned clip; the value's gradient passes inside it, the clip's is 1 at and above it and -1 at and below minus it."""
    result: Tensor = _Pact.apply(value, step, bits, signed)  # type: ignore[no-untyped-call]
    return result


def lsq_activation(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Learned step; gradients as `lsq`, scaled by one over the root of (values per sample times the highest level)."""
    low, high = level_range(bits, signed)
    gradient_scale = (max(1, value[0].numel()) * high) ** -0.5
    if bits == 1 and signed:
        result: Tensor = _SignedBit.apply(value, step, gradient_scale)  # type: ignore[no-untyped-call]
        return result
    return lsq(value, step, low, high, gradient_scale)


def activation_start(values: Tensor, bits: int) -> ActivationStart:
    """The start for values seen at a layer's input: the clip of least squared error among fractions of the largest."""
    if not values.numel() or not values.any():
        return ActivationStart()
    signed = bool((values < 0).any())
    _, high = level_range(bits, signed)
    clip = least_squares_clip(
        values.reshape(1, -1).float(), lambda rows, clips: round_to_levels(rows, clips / high, bits, signed)
    )
    return ActivationStart(clip=float(clip), signed=signed)


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.range = level_range(bits, signed)
        return round_to_levels(value, step, bits, signed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        value, step = ctx.saved_tensors
        low, high = ctx.range
        clip = high * step
        above = value >= clip
        below = value <= low * step
        # The step is the clip over the highest level, so its gradient is the clip's times that level.
        of_clip = (gradient * above).sum()
        if low < 0:
            of_clip = of_clip - (gradient * below).sum()
        inside = ~(above | below) if low < 0 else (value >= 0) & ~above
        return gradient * inside, (high * of_clip).reshape(step.shape), None, None


class _SignedBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.gradient_scale = gradient_scale
        return torch.where(value >= 0, step, -step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        value, step = ctx.saved_tensors
        scaled = value / step
        inside = scaled.abs() < 1
        sign = torch.where(value >= 0, 1.0, -1.0)
        of_step = torch.where(inside, sign - scaled, sign) * gradient
        return gradient * inside, of_step.sum_to_size(step.shape) * ctx.gradient_scale, None
