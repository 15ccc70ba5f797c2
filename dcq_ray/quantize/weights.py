"""Weight quantizers as pure functions, with their formulas, levels and gradients.

r is the full-precision weight, w the quantized one, n = 2^k - 1 and m = 2^(k-1) - 1 for k bits, s a scale or step:

    dorefa  1 bit    w = mean|r| sign(r), sign(0) = +1                    -E, +E                     (DoReFa-Net, eq. 8)
            k bits   w = 2 round(n x) / n - 1, x = tanh r / (2 max|tanh r|) + 1/2    2^k in [-1, 1]  (DoReFa-Net, eq. 9)
    xnor    1 bit    w = mean_c|r| sign(r), a mean per output channel     -E_c, +E_c                 (XNOR-Net, eq. 6)
    twn     2 bits   w = a sign(r) where |r| > d, else 0                  -a, 0, +a                  (TWN, eq. 3, 4 and 6)
                     d = 0.75 mean|r|,  a = mean of |r| above d
    ttq     2 bits   w = p where r > d, -q where r < -d, else 0           -q, 0, +p; p, q learned    (TTQ, eq. 6 and 9)
                     d = 0.05 max|r|
    lsq     k bits   w = s clamp(round(r / s), -m - 1, m)                 2^k; s learned             (LSQ, eq. 1 and 2)
    wrpn    k bits   w = s round(m clamp(r / s, -1, 1)) / m               2^k - 1 in [-s, s]         (WRPN, section 5)

DoReFa-Net: arXiv 1606.06160; XNOR-Net: 1603.05279; TWN: 1605.04711v3; TTQ: 1612.01064; LSQ: 1902.08153; WRPN: 1709.01134.

Every weight is an integer times a scale, rounded once, so that who has the integers and the scale has the weight to the bit:

    integers    dorefa of k > 1 bits: -n, -n + 2 … n;  lsq: -m - 1 … m;  wrpn: -m … m;  all others: -1, (0,) +1

Rounding is to the nearest, ties to even, of a quotient (never of a product with a reciprocal), as ONNX has it; there is no
negative zero, which no integer gives. float16 and bfloat16 are computed in float32: in 8 significant bits a quotient would
be rounded twice. Means are summed in float64: in any order and on any device they give the same float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcq_ray.errors import QuantizeError

MAX_BITS = 8
TWN_THRESHOLD = 0.75
TTQ_THRESHOLD = 0.05
# Below the linear grid of clips that are searched, so many more, each half of the one before.
NUM_HALVED_CLIPS = 8
NUM_REFINED_CLIPS = 20
NUM_REFITS = 4


def dorefa_weight(weight: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    """DoReFa-Net's weight: at most 2^bits levels, same shape and dtype; bits from 1 to 8.

    The gradient is straight-through: for 1 bit the identity (eq. 8, where E is held constant), for more bits that of the tanh
    normalisation with the maximum held constant.

    Args:
        scale: the largest level where it is not the authors' 1, a scalar held constant; for more than 1 bit only.
    """
    if not 1 <= bits <= MAX_BITS:
        raise QuantizeError(f"dorefa: got {bits} bits, expected 1 to {MAX_BITS}")
    if bits == 1:
        return _straight_through(weight, _signed(weight, _mean(working(weight.detach()).abs())))
    steps = 2**bits - 1
    bounded = torch.tanh(working(weight))
    largest = bounded.detach().abs().amax().clamp_min(torch.finfo(bounded.dtype).tiny)
    fraction = bounded / largest
    unit = bounded.detach() / (2 * largest) + 0.5
    odd = 2 * torch.round(unit * steps) - steps
    if scale is None:
        return _straight_through(fraction, odd / steps).to(weight.dtype)
    return _straight_through(scale * fraction, odd * (scale / steps)).to(weight.dtype)


def xnor_weight(weight: Tensor, channel_dim: int) -> Tensor:
    """XNOR-Net's binary weight: per output channel the mean of |weight| with the weight's sign.

    The gradient is the identity, as DoReFa-Net has it. The authors' own is 1 / N + mean where |r| <= 1, N being the weights of
    a channel (section 3.1): it would slow a channel of a pretrained layer by its mean, which is small.
    """
    return _straight_through(weight, _signed(weight, channel_means(weight.detach().abs(), channel_dim)))


def twn_weight(weight: Tensor) -> Tensor:
    """Ternary Weight Networks: three levels, threshold and scale from the weights themselves; the gradient is the identity."""
    value = working(weight.detach())
    magnitude = value.abs()
    kept = magnitude > TWN_THRESHOLD * _mean(magnitude)
    scale = ((magnitude * kept).sum(dtype=torch.float64) / kept.sum().clamp_min(1)).to(value.dtype)
    return _straight_through(weight, torch.sign(value) * kept * scale + 0.0)


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
    return lsq(weight, step, low, high, (weight.numel() / step.numel() * high) ** -0.5) + 0.0


def wrpn_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """WRPN's weight, clipped to [-scale, scale]; bits from 2 to 8; straight-through inside the clip, 0 outside.

    The authors clip to [-1, 1], at which most pretrained weights would become 0; with `scale` 1 it is theirs. It is constant.
    """
    if not 2 <= bits <= MAX_BITS:
        raise QuantizeError(f"wrpn: got {bits} bits, expected 2 to {MAX_BITS}: one bit has no level but 0")
    steps = 2 ** (bits - 1) - 1
    value, scale = working(weight), scale.detach()
    quantized = nearest_level(value.detach(), scale / steps, -steps, steps) + 0.0
    # Not torch.clamp, which halves the gradient at bounds that are tensors.
    inside = torch.where(value.abs() <= scale, value, 0)
    return _straight_through(inside, quantized).to(weight.dtype)


def nearest_level(value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """step * clamp(round(value / step), low, high) in the value's dtype; no gradient is defined here."""
    return torch.round(working(value) / step).clamp_(low, high).mul_(step).to(value.dtype)


def working(value: Tensor) -> Tensor:
    """The values in float32 at least, or themselves."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def least_squares_scale(weight: Tensor, quantized: Tensor) -> Tensor:
    """The scalar s that minimises |weight - s * quantized|^2: <w, q> / <q, q>; 1 where q is zero. float32 at least."""
    kept = torch.promote_types(weight.dtype, torch.float32)
    norm = quantized.double().square().sum()
    if norm == 0:
        return torch.ones((), dtype=kept, device=weight.device)
    return ((weight.double() * quantized.double()).sum() / norm).to(kept)


def least_squares_clip(
    rows: Tensor,
    quantize: Callable[[Tensor, Tensor], Tensor],
    *,
    counts: Tensor | None = None,
    num_candidates: int = 40,
) -> Tensor:
    """For every row of values [R, N] the clip [R, 1], above 0, whose quantization has the least squared error.

    Searched over equal fractions of the row's largest magnitude and halves of the least of them, then around the best; at last
    the clip is refitted to the integers that it gives, <v, q> / <q, q>, which never raises the error. A row of zeros fits any
    clip, and gets the largest of the other rows', or 1.

    Args:
        quantize: (rows, clips [R, 1]) -> quantized rows, proportional to both together.
        counts: how many values each one stands for, [R, N]; 1 where None.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    empty = largest == 0
    # The squares of values near 1e-30 or 1e30 are no float32.
    rows = rows / torch.where(empty, 1, largest)
    weights = torch.ones_like(rows) if counts is None else counts
    best = torch.ones_like(largest)
    error = torch.full_like(largest, math.inf)

    def consider(clip: Tensor) -> None:
        nonlocal best, error
        found = ((quantize(rows, clip) - rows).square_().mul_(weights)).sum(dim=1, keepdim=True)
        better = found < error
        best, error = torch.where(better, clip, best), torch.where(better, found, error)

    fractions = [number / num_candidates for number in range(num_candidates, 0, -1)]
    fractions += [fractions[-1] / 2**number for number in range(1, NUM_HALVED_CLIPS + 1)]
    for fraction in fractions:
        consider(torch.full_like(largest, fraction))
    coarse, width = best, (best / 2).clamp_max(1 / num_candidates)
    for number in range(-NUM_REFINED_CLIPS // 2, NUM_REFINED_CLIPS // 2 + 1):
        consider(coarse + width * (2 * number / NUM_REFINED_CLIPS))
    for _ in range(NUM_REFITS):
        quantized = quantize(rows, best)
        norm = (quantized.square() * weights).sum(dim=1, keepdim=True)
        refit = (quantized * rows * weights).sum(dim=1, keepdim=True) / torch.where(norm == 0, 1, norm)
        consider(torch.where(norm == 0, best, best * refit))
    clips = best * largest
    return torch.where(empty, torch.where(empty.all(), 1, clips.max()), clips)


def search_sample(rows: Tensor, num_extreme: int, num_others: int) -> tuple[Tensor, Tensor]:
    """Values of every row [R, N] to search a clip on, [R, M], and how many values each stands for, [R, M].

    A clip depends on the few largest magnitudes, so they are all there, each for itself; of the others about so many, evenly
    spread.
    """
    count = rows.shape[1]
    if count <= num_extreme + num_others:
        return rows, torch.ones_like(rows)
    indices = rows.abs().topk(num_extreme, dim=1).indices
    is_other = torch.ones_like(rows, dtype=torch.bool).scatter_(1, indices, False)
    stride = spread_stride(count, num_others)
    is_other = is_other[:, ::stride]
    share = (count - num_extreme) / is_other.sum(dim=1, keepdim=True).clamp_min(1)
    values = torch.cat([rows.gather(1, indices), rows[:, ::stride]], dim=1)
    return values, torch.cat([torch.ones_like(indices, dtype=rows.dtype), is_other * share], dim=1)


def spread_stride(count: int, wanted: int) -> int:
    """A stride that takes about `wanted` of `count` values and, coprime to it, keeps to no row, column or channel."""
    stride = max(1, count // wanted)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def channel_means(values: Tensor, channel_dim: int) -> Tensor:
    """Means over all dimensions but one, kept so that they broadcast; float32 at least."""
    return _mean(working(values), [dim for dim in range(values.ndim) if dim != channel_dim])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Ttq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        threshold = TTQ_THRESHOLD * working(weight).abs().amax()
        above, below = working(weight) > threshold, working(weight) < -threshold
        ctx.save_for_backward(above, below, positive, negative)
        return (positive * above - negative * below).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        above, below, positive, negative = ctx.saved_tensors
        full = working(gradient)
        size = torch.where(above, positive, torch.where(below, negative, torch.ones_like(full)))
        of_weight = (full * size).to(gradient.dtype)
        return of_weight, (full * above).sum().to(positive.dtype), -(full * below).sum().to(negative.dtype)


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.range = (low, high, gradient_scale)
        return nearest_level(value, step, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        value, step = ctx.saved_tensors
        low, high, gradient_scale = ctx.range
        scaled = working(value) / step
        inside = (scaled > low) & (scaled < high)
        integer = torch.round(scaled).clamp_(low, high)
        of_step = torch.where(inside, integer - scaled, integer).mul_(gradient)
        return gradient * inside, (of_step.sum_to_size(step.shape) * gradient_scale).to(step.dtype), None, None, None


def _mean(values: Tensor, dims: list[int] | None = None) -> Tensor:
    return values.mean(dim=dims, keepdim=dims is not None, dtype=torch.float64).to(values.dtype)


def _signed(weight: Tensor, magnitude: Tensor) -> Tensor:
    return torch.where(weight.detach() >= 0, magnitude, -magnitude)


def _straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """The quantized value to the bit, which a sum with a difference would not give, with the gradient of the value."""
    result: Tensor = _StraightThrough.apply(value, quantized)  # type: ignore[no-untyped-call]
    return result
