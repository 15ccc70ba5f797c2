"""Activation quantizers as pure functions.

x is the input of a layer, k its bits, a the clip, s = a / high the step. Levels without a sign are 0 … high = 2^k - 1 times s;
levels with one are symmetric, -high … high with high = 2^(k-1) - 1, and for one bit -a and +a. After a ReLU there is no sign;
images and joins want one; what is negative only a little (GELU, SiLU) wants one where many bits leave levels for it: data
decide, by least squared error. What is computed is the same for all three,

    y = s clamp(round(x / s), low, high)

with the rounding of ONNX's QuantizeLinear, in float32 at least; they differ in where the clip comes from and in gradients:

    dorefa  a fixed, found from data; x passes inside the clip           (DoReFa-Net, eq. 5 and 11, where a = 1)
    pact    a learned: dy/da = 1 where x >= a (-1 where x <= -a)         (PACT, arXiv 1805.06085, eq. 3)
    lsq     s learned by LSQ's gradient                                  (LSQ, arXiv 1902.08153, eq. 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.functions import Clipped, LearnedClip, LearnedStep, level
from dcq_ray.quantizers.starts import least_squares_clip, search_sample

# A start is searched on the so many largest values and so many of the others.
NUM_EXTREME_SEARCHED = 1024
NUM_OTHERS_SEARCHED = 32768


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
    """step * clamp(round(value / step), low, high), one signed bit: -step below 0, else +step; no gradient is defined here."""
    return level(value, step, *_levels(bits, signed))


def dorefa_activation(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Fixed clip; the gradient passes inside it, ends included, and is 0 outside."""
    result: Tensor = Clipped.apply(value, step, *_levels(bits, signed))  # type: ignore[no-untyped-call]
    return result


def pact_activation(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Learned clip; the value's gradient passes inside it, the clip's is 1 at and above it and -1 at and below minus it."""
    result: Tensor = LearnedClip.apply(value, step, *_levels(bits, signed))  # type: ignore[no-untyped-call]
    return result


def lsq_activation(value: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Learned step; gradients as `lsq`, scaled by one over the root of (values per sample times the highest level)."""
    _, high = level_range(bits, signed)
    gradient_scale = (max(1, value.shape[1:].numel()) * high) ** -0.5
    result: Tensor = LearnedStep.apply(value, step, *_levels(bits, signed), gradient_scale)  # type: ignore[no-untyped-call]
    return result


def activation_start(values: Tensor, bits: int) -> ActivationStart:
    """The start for values seen at a layer's input, in any order: the sign and the clip of least squared error.

    Without a sign where both are as good. No values or only zeros give a clip of 1.

    Raises:
        QuantizeError: a value is not finite.
    """
    # Sorted, the same values give the same sums, and so the same start, in whatever order they came.
    values = values.flatten().float().sort().values
    if not values.numel() or not values.any():
        return ActivationStart()
    if not torch.isfinite(values).all():
        raise QuantizeError(
            "quantize.activations: the input of a layer holds values that are not finite, so there is no clip for it; expected "
            "finite activations of the teacher on the train images; check its weights and the images, or leave that input "
            "alone with activation_bits: 32 under quantize.overrides"
        )
    largest = values.abs().max()
    rows, counts = search_sample((values / largest).reshape(1, -1), NUM_EXTREME_SEARCHED, NUM_OTHERS_SEARCHED)

    def found(signed: bool) -> tuple[float, float]:
        _, high = level_range(bits, signed)

        def quantize(rows: Tensor, clips: Tensor) -> Tensor:
            return round_to_levels(rows, clips / high, bits, signed)

        clip = least_squares_clip(rows, quantize, counts=counts)
        return float(((quantize(rows, clip) - rows).square() * counts).sum()), float(clip)

    error, clip = found(False)
    signed = False
    if values[0] < 0:
        signed_error, signed_clip = found(True)
        if signed_error < error:
            clip, signed = signed_clip, True
    return ActivationStart(clip=clip * float(largest), signed=signed)


def _levels(bits: int, signed: bool) -> tuple[int, int, bool]:
    """The lowest and the highest integer level, and whether there is a 0."""
    return (*level_range(bits, signed), not (bits == 1 and signed))
