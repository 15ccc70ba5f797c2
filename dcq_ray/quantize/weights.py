"""Weight quantizers as pure functions, with their formulas, levels and gradients.

r is the full-precision weight, w the quantized one, n = 2^k - 1 and m = 2^(k-1) - 1 for k bits, s a scale or step:

    dorefa  1 bit    w = mean|r| sign(r), sign(0) = +1                    -E, +E                     (DoReFa-Net, eq. 8)
            k bits   w = 2 round(n x) / n - 1, x = tanh r / (2 max|tanh r|) + 1/2    2^k in [-1, 1]  (DoReFa-Net, eq. 9)
    xnor    1 bit    w = mean_c|r| sign(r), a mean per output channel     -E_c, +E_c                 (XNOR-Net, eq. 6)
    twn     2 bits   w = a sign(r) where |r| > d, else 0                  -a, 0, +a                  (TWN, eq. 5 and 6)
                     d = 0.75 mean|r|,  a = mean of |r| above d
    ttq     2 bits   w = p where r > d, -q where r < -d, else 0           -q, 0, +p; p, q learned    (TTQ, eq. 6)
                     d = 0.05 max|r|
    lsq     k bits   w = s clamp(round(r / s), -m - 1, m)                 2^k; s learned             (LSQ, eq. 1 and 2)
    wrpn    k bits   w = s round(m clamp(r / s, -1, 1)) / m               2^k - 1 in [-s, s]         (WRPN, section 5)

DoReFa-Net: arXiv 1606.06160; XNOR-Net: 1603.05279; TWN: 1605.04711; TTQ: 1612.01064; LSQ: 1902.08153; WRPN: 1709.01134.
Rounding is to the nearest, ties to even, of a quotient (never of a product with a reciprocal), as ONNX has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcq_ray.errors import QuantizeError

MAX_BITS = 8
TWN_THRESHOLD = 0.75
TTQ_THRESHOLD = 0.05


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa-Net's weight: at most 2^bits levels, same shape; bits from 1 to 8.

    The gradient is straight-through: for 1 bit the identity (eq. 7 with E held constant, as in the authors' code), for more
    bits that of the tanh normalisation with the maximum held constant.
    """
    if bits == 1:
        return _straight_through(weight, _signed(weight, weight.detach().abs().mean()))
    if not 2 <= bits <= MAX_BITS:
        raise QuantizeError(f"dorefa: got {bits} bits, expected 1 to {MAX_BITS}")
    steps = 2**bits - 1
    bounded = torch.tanh(weight)
    largest = bounded.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    unit = bounded / (2 * largest) + 0.5
    rounded = torch.round(unit.detach() * steps) / steps
    levels: Tensor = 2 * _straight_through(unit, rounded) - 1
    return levels


def xnor_weight(weight: Tensor, channel_dim: int) -> Tensor:
    """XNOR-Net's binary weight: per output channel the mean of |weight| with the weight's sign.

    The gradient is the identity, the means held constant; the authors clip it beyond 1, where pretrained weights may lie.
    """
    return _straight_through(weight, _signed(weight, channel_means(weight.detach().abs(), channel_dim)))


def twn_weight(weight: Tensor) -> Tensor:
    """Ternary Weight Networks: three levels, threshold and scale from the weights themselves; the gradient is the identity."""
    value = weight.detach()
    magnitude = value.abs()
    kept = magnitude > TWN_THRESHOLD * magnitude.mean()
    scale = (magnitude * kept).sum() / kept.sum().clamp_min(1)
    return _straight_through(weight, torch.sign(value) * kept * scale)


def ttq_weight(weight: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Trained Ternary Quantization: levels -negative, 0 and +positive, both scalars above 0.

    Gradients as in TTQ, eq. 7 and 8: of `positive` and `negative` the sums over the weights at that level (with the level's
    sign), of the weight the output's times the size of its level, and times 1 at zero.
    """
    result: Tensor = _Ttq.apply(weight, positive, negative)  # type: ignore[no-untyped-call]
    return result


def lsq(value: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
    """Learned Step size Quantization: step * clamp(round(value / step), low, high); `step` broadcasts against `value`.

    The gradient of the value passes where low < value / step < high and is 0 elsewhere (LSQ, eq. 5); that of the step is
    round(v / s) - v / s inside and the clamped integer outside (eq. 3), times `gradient_scale` (LSQ, section 2.2).
    """
    result: Tensor = _Lsq.apply(value, step, low, high, gradient_scale)  # type: ignore[no-untyped-call]
    return result


def lsq_weight(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """LSQ of a signed weight with one step for all, or one per channel; bits from 2 to 8."""
    if not 2 <= bits <= MAX_BITS:
        raise QuantizeError(
            f"lsq: got {bits} bits of a weight, expected 2 to {MAX_BITS}: one signed bit has no second level"
        )
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return lsq(weight, step, low, high, (weight.numel() / step.numel() * high) ** -0.5)


def wrpn_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """WRPN's weight, clipped to [-scale, scale]; bits from 2 to 8; straight-through inside the clip, 0 outside.

    The authors clip to [-1, 1], at which most pretrained weights would become 0; with `scale` 1 it is theirs.
    """
    if not 2 <= bits <= MAX_BITS:
        raise QuantizeError(f"wrpn: got {bits} bits, expected 2 to {MAX_BITS}: one bit has no level but 0")
    steps = 2 ** (bits - 1) - 1
    clipped = torch.clamp(weight / scale, -1, 1)
    return scale * _straight_through(clipped, torch.round(clipped.detach() * steps) / steps)


def least_squares_scale(weight: Tensor, quantized: Tensor) -> Tensor:
    """The scalar s that minimises |weight - s * quantized|^2: <w, q> / <q, q>; 1 where q is zero."""
    norm = quantized.double().square().sum()
    if norm == 0:
        return torch.ones((), dtype=weight.dtype, device=weight.device)
    return ((weight.double() * quantized.double()).sum() / norm).to(weight.dtype)


def least_squares_clip(
    rows: Tensor, quantize: Callable[[Tensor, Tensor], Tensor], *, num_candidates: int = 40
) -> Tensor:
    """For every row of values [R, N] the clip [R, 1] whose quantization has the least squared error.

    Searched over equal fractions of the row's largest magnitude. Args: quantize: (rows, clips [R, 1]) -> quantized rows.
    """
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best_clip, best_error = largest, torch.full_like(largest, float("inf"))
    for number in range(1, num_candidates + 1):
        clip = largest * (number / num_candidates)
        error = (quantize(rows, clip) - rows).square().sum(dim=1, keepdim=True)
        better = error < best_error
        best_clip, best_error = torch.where(better, clip, best_clip), torch.where(better, error, best_error)
    return best_clip


def channel_means(values: Tensor, channel_dim: int) -> Tensor:
    """Means over all dimensions but one, kept so that they broadcast."""
    return values.mean(dim=[dim for dim in range(values.ndim) if dim != channel_dim], keepdim=True)


class _Ttq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        threshold = TTQ_THRESHOLD * weight.abs().max()
        above, below = weight > threshold, weight < -threshold
        ctx.save_for_backward(above, below, positive, negative)
        return positive * above - negative * below

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        above, below, positive, negative = ctx.saved_tensors
        size = torch.where(above, positive, torch.where(below, negative, torch.ones_like(gradient)))
        return gradient * size, (gradient * above).sum(), -(gradient * below).sum()


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.range = (low, high, gradient_scale)
        return torch.round(value / step).clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        value, step = ctx.saved_tensors
        low, high, gradient_scale = ctx.range
        scaled = value / step
        inside = (scaled > low) & (scaled < high)
        integer = torch.round(scaled).clamp_(low, high)
        of_step = torch.where(inside, integer - scaled, integer).mul_(gradient)
        return gradient * inside, of_step.sum_to_size(step.shape) * gradient_scale, None, None, None


def _signed(weight: Tensor, magnitude: Tensor) -> Tensor:
    return torch.where(weight.detach() >= 0, magnitude, -magnitude)


def _straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """The quantized value, with the gradient of the value."""
    result: Tensor = value + (quantized - value).detach()
    return result
