"""Quantizers' values and straight-through gradients as autograd functions, as fast as memory allows.

On a CPU comparisons, `where` and products with flags take five to thirty times as long as arithmetic on floats, and every
operation on a large tensor is a way through memory. So "inside" and "above" are said in arithmetic here, in blocks. All is
computed in float32 at least and without a negative zero, which no integer level gives; results have the values' own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dcq_ray.quantizers.blocks import blocks

# A value at the clip, divided by the step, may come out one rounding beyond the highest level; it is inside all the same.
ROUNDING = 2.0**-22
# Zero lies above it, and no other value that matters lies between.
BELOW_ZERO = -torch.finfo(torch.float32).tiny

passed = torch.ops.aten.hardtanh_backward
"""(gradient, value, low, high) -> the gradient where low < value < high, else 0."""


def working(value: Tensor) -> Tensor:
    """The values in float32 at least, or themselves."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def nearest_level(value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """step * clamp(round(value / step), low, high) in the value's dtype, a constant; `step` is a scalar, or broadcasts to it."""
    full, step = working(value.detach()), _scalar(step.detach())
    result = torch.empty_like(full)
    for out, part in _stretches(step, result, full):
        torch.div(part, step, out=out).round_().clamp_(low, high).mul_(step).add_(0.0)
    return result.to(value.dtype)


def signed_level(value: Tensor, level: Tensor) -> Tensor:
    """-level below 0, else +level, in the value's dtype, a constant; `level` broadcasts."""
    full = working(value.detach())
    return torch.copysign(level.detach().to(full.dtype), full + 0.0).to(value.dtype)


def ternary_signs(value: Tensor, threshold: Tensor) -> Tensor:
    """-1 below -threshold, +1 above threshold, else 0, a constant, in float32 at least; the threshold is a scalar."""
    full, threshold = working(value.detach()), threshold.detach()
    result = torch.empty_like(full)
    for out, part in blocks(result, full):
        torch.sub(part, threshold, out=out).sign_().clamp_(min=0)
        out.sub_(torch.add(part, threshold).sign_().clamp_(max=0).neg_())
    return result


class StraightThrough(torch.autograd.Function):
    """(value, quantized) -> quantized, to the bit, which a sum with a difference would not give; the value's gradient is 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class Clipped(torch.autograd.Function):
    """(value, step, low, high, has_zero) -> the level; the gradient passes from low to high steps, ends included."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, low: int, high: int, has_zero: bool) -> Tensor:
        ctx.save_for_backward(value, _scalar(step))
        ctx.range = (low, high)
        return level(value, step, low, high, has_zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        value, step = ctx.saved_tensors
        low, high = ctx.range
        least = low * (1 + ROUNDING) if low else BELOW_ZERO
        full, incoming = working(value), working(gradient)
        result = torch.empty_like(incoming)
        for out, part, given in _stretches(step, result, full, incoming):
            passed.grad_input(given, part / step, least, high * (1 + ROUNDING), grad_input=out)
        return result.to(gradient.dtype), None, None, None, None


class LearnedStep(torch.autograd.Function):
    """(value, step, low, high, has_zero, gradient_scale) -> the level, with LSQ's gradients (arXiv 1902.08153, eq. 3 and 5).

    The value's gradient passes where low < value / step < high; the step's is integer - value / step there and the integer
    elsewhere, summed over all that share the step, times `gradient_scale`.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, step: Tensor, low: int, high: int, has_zero: bool, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.settings = (low, high, has_zero, gradient_scale)
        return level(value, step, low, high, has_zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # type: ignore[override]
        value, given_step = ctx.saved_tensors
        low, high, has_zero, gradient_scale = ctx.settings
        step = _scalar(given_step)
        full, incoming = working(value), working(gradient)
        result, of_step = torch.empty_like(incoming), torch.zeros_like(step, dtype=full.dtype)
        for out, part, given in _stretches(step, result, full, incoming):
            scaled = part / step
            integers = torch.round(scaled).clamp_(low, high) if has_zero else signed_level(scaled, step.new_ones(()))
            slope = integers.sub_(passed(scaled, scaled, low, high))
            of_step += slope.mul_(given).sum_to_size(step.shape)
            passed.grad_input(given, scaled, low, high, grad_input=out)
        of_step = (of_step * gradient_scale).reshape(given_step.shape).to(step.dtype)
        return result.to(gradient.dtype), of_step, None, None, None, None


class LearnedClip(torch.autograd.Function):
    """(value, step, low, high, has_zero) -> the level, with PACT's gradients (arXiv 1805.06085, eq. 3).

    The clip is high * step. The value's gradient passes inside it; the clip's is 1 where the value reaches the clip, -1 where
    levels have a sign and it reaches minus the clip, and 0 inside. The step's is the clip's times `high`.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, low: int, high: int, has_zero: bool) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.range = (low, high)
        return level(value, step, low, high, has_zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        value, given_step = ctx.saved_tensors
        low, high = ctx.range
        least = low or BELOW_ZERO
        step = _scalar(given_step)
        full, incoming = working(value), working(gradient)
        result, of_clip = torch.empty_like(incoming), torch.zeros((), dtype=full.dtype, device=full.device)
        for out, part, given in blocks(result, full, incoming):
            scaled = part / step
            passed.grad_input(given, scaled, least, high, grad_input=out)
            # What did not pass came from above the clip, or from below the lowest level, which moves with the clip or is 0.
            sides = scaled.sign_() if low else scaled.sign_().clamp_(min=0)
            of_clip += sides.mul_(given - out).sum()
        return result.to(gradient.dtype), (high * of_clip).reshape(given_step.shape).to(step.dtype), None, None, None


class TernaryLevels(torch.autograd.Function):
    """(value, threshold, positive, negative) -> -negative, 0 or positive, with TTQ's gradients (arXiv 1612.01064, eq. 7 and 8).

    Of `positive` and `negative` the sums over the values at that level, with the level's sign; of the value the output's times
    the size of its level, and times 1 at zero.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        signs = ternary_signs(value, threshold)
        ctx.save_for_backward(signs, positive, negative)
        result = torch.empty_like(signs)
        for out, sign in blocks(result, signs):
            torch.clamp(sign, min=0, out=out).mul_(positive).add_(torch.clamp(sign, max=0).mul_(negative))
        return result.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:  # type: ignore[override]
        signs, positive, negative = ctx.saved_tensors
        incoming = working(gradient)
        result = torch.empty_like(incoming)
        of_positive, of_negative = torch.zeros_like(positive), torch.zeros_like(negative)
        for out, sign, given in blocks(result, signs, incoming):
            above, below = torch.clamp(sign, min=0), torch.clamp(sign, max=0).neg_()
            # Not torch.dot, whose sum may depend on where in memory the values lie.
            of_positive += (given * above).sum()
            of_negative -= (given * below).sum()
            # Of the three one is 1, so nothing is rounded.
            torch.sub(1, above, out=out).sub_(below).add_(above.mul_(positive)).add_(below.mul_(negative)).mul_(given)
        return result.to(gradient.dtype), None, of_positive, of_negative


class TanhLevels(torch.autograd.Function):
    """(weight, scale, steps) -> scale * (2 round(steps x) / steps - 1), x = tanh w / (2 max|tanh w|) + 1/2; DoReFa-Net, eq. 9.

    The gradient is that of scale * tanh w / max|tanh w|, with the maximum held constant. `scale` is a constant scalar, 1 if None.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor | None, steps: int) -> Tensor:
        full = working(weight)
        bounded = torch.tanh(full)
        low, high = torch.aminmax(bounded)
        largest = torch.maximum(-low, high).clamp_min(torch.finfo(full.dtype).tiny)
        ctx.save_for_backward(bounded, (1 if scale is None else scale) / largest)
        result = torch.empty_like(full)
        for out, part in blocks(result, bounded):
            torch.div(part, 2 * largest, out=out).add_(0.5).mul_(steps).round_().mul_(2).sub_(steps)
            if scale is None:
                out.div_(steps)
            else:
                out.mul_(scale / steps)
        return result.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        bounded, factor = ctx.saved_tensors
        result = torch.ops.aten.tanh_backward(working(gradient), bounded).mul_(factor)
        return result.to(gradient.dtype), None, None


def level(value: Tensor, step: Tensor, low: int, high: int, has_zero: bool) -> Tensor:
    """The nearest of low … high steps; without a zero the levels are minus and plus one step."""
    return nearest_level(value, step, low, high) if has_zero else signed_level(value, step)


def _scalar(step: Tensor) -> Tensor:
    # A single step of shape [1, 1] would give a stretch a dimension more.
    return step.reshape(()) if step.numel() == 1 else step


def _stretches(step: Tensor, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    # A step per channel goes with the whole of a tensor, not with a stretch of it.
    return blocks(*tensors) if step.numel() == 1 else [tensors]
