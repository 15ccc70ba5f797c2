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

import torch
from torch import Tensor

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.functions import (
    Clipped,
    LearnedStep,
    StraightThrough,
    TanhLevels,
    TernaryLevels,
    signed_level,
    ternary_signs,
    working,
)

MAX_BITS = 8
TWN_THRESHOLD = 0.75
TTQ_THRESHOLD = 0.05


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
        return _straight_through(weight, signed_level(weight, _mean(working(weight.detach()).abs())))
    result: Tensor = TanhLevels.apply(weight, scale, 2**bits - 1)  # type: ignore[no-untyped-call]
    return result


def xnor_weight(weight: Tensor, channel_dim: int) -> Tensor:
    """XNOR-Net's binary weight: per output channel the mean of |weight| with the weight's sign.

    The gradient is the identity, as DoReFa-Net has it. The authors' own is 1 / N + mean where |r| <= 1, N being the weights of
    a channel (section 3.1): it would slow a channel of a pretrained layer by its mean, which is small.
    """
    return _straight_through(weight, signed_level(weight, channel_means(weight.detach().abs(), channel_dim)))


def twn_weight(weight: Tensor) -> Tensor:
    """Ternary Weight Networks: three levels, threshold and scale from the weights themselves; the gradient is the identity."""
    value = working(weight.detach())
    signs = ternary_signs(value, TWN_THRESHOLD * _mean(value.abs()))
    num_kept = signs.abs().sum(dtype=torch.float64)
    scale = ((signs * value).sum(dtype=torch.float64) / num_kept.clamp_min(1)).to(value.dtype)
    return _straight_through(weight, signs.mul_(scale).add_(0.0))


def ttq_weight(weight: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Trained Ternary Quantization: levels -negative, 0 and +positive, both scalars above 0.

    Gradients as in TTQ, eq. 7 and 8: of `positive` and `negative` the sums over the weights at that level (with the level's
    sign), of the weight the output's times the size of its level, and times 1 at zero.
    """
    low, high = torch.aminmax(working(weight.detach()))
    threshold = TTQ_THRESHOLD * torch.maximum(-low, high)
    result: Tensor = TernaryLevels.apply(weight, threshold, positive, negative)  # type: ignore[no-untyped-call]
    return result


def lsq(value: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
    """Learned Step size Quantization: step * clamp(round(value / step), low, high); `step` broadcasts against `value`.

    The gradient of the value passes where low < value / step < high and is 0 elsewhere (LSQ, eq. 5); that of the step is
    round(v / s) - v / s inside and the clamped integer outside (eq. 3), times `gradient_scale` (LSQ, section 2.2).
    """
    result: Tensor = LearnedStep.apply(value, step, low, high, True, gradient_scale)  # type: ignore[no-untyped-call]
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

    The authors clip to [-1, 1], at which most pretrained weights would become 0; with `scale` 1 it is theirs. It is constant.
    """
    if not 2 <= bits <= MAX_BITS:
        raise QuantizeError(f"wrpn: got {bits} bits, expected 2 to {MAX_BITS}: one bit has no level but 0")
    steps = 2 ** (bits - 1) - 1
    result: Tensor = Clipped.apply(weight, scale.detach() / steps, -steps, steps, True)  # type: ignore[no-untyped-call]
    return result


def channel_means(values: Tensor, channel_dim: int) -> Tensor:
    """Means over all dimensions but one, kept so that they broadcast; float32 at least."""
    return _mean(working(values), [dim for dim in range(values.ndim) if dim != channel_dim])


def _mean(values: Tensor, dims: list[int] | None = None) -> Tensor:
    return values.mean(dim=dims, keepdim=dims is not None, dtype=torch.float64).to(values.dtype)


def _straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """The quantized value with the gradient of the value."""
    result: Tensor = StraightThrough.apply(value, quantized)  # type: ignore[no-untyped-call]
    return result
