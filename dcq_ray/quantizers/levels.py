"""The levels of a quantized weight, which of them each weight has, and latent weights that the quantizer puts on wanted ones.

Levels are counted from the lowest, so that one more is the next higher one, whatever the scheme.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcq_ray.quantizers.functions import working
from dcq_ray.quantizers.modules import WeightQuantizer
from dcq_ray.quantizers.weights import dorefa_weight

# A latent weight of exactly 0 counts as positive: its mirror image is the largest number that does not.
_JUST_BELOW_ZERO = -1e-30


def weight_levels(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """The levels, ascending: [K, 1], or [K, channels] where every channel has a scale of its own; of `weights`' table."""
    scheme, bits = quantizer.scheme, quantizer.bits
    scales = quantizer.scales(weight).to(weight.device)
    if scheme == "ttq":
        positive, negative = scales
        return torch.stack([-negative, torch.zeros_like(positive), positive])[:, None]
    if bits == 1:
        integers = [-1, 1]
    elif scheme == "twn":
        integers = [-1, 0, 1]
    elif scheme == "dorefa":
        integers = list(range(1 - 2**bits, 2**bits, 2))
    else:
        high = 2 ** (bits - 1) - 1
        integers = list(range(-high if scheme == "wrpn" else -high - 1, high + 1))
    return torch.tensor(integers, dtype=scales.dtype, device=scales.device)[:, None] * scales.reshape(1, -1)


def level_numbers(rows: Tensor, levels: Tensor) -> Tensor:
    """The number of the level of every quantized weight; [R, N] int64 of rows [R, N] and levels [K, 1 or R]."""
    middles = ((levels[1:] + levels[:-1]) / 2).expand(-1, len(rows)).t().contiguous()
    return torch.searchsorted(middles, rows.contiguous())


def latents_on(quantizer: WeightQuantizer, weight: Tensor, wanted: Tensor, changed: Tensor) -> Tensor:
    """The latent weight, shape of `weight`, with the changed ones put where the quantizer gives the wanted levels.

    What is not changed stays where it is. For dorefa and xnor of 1 bit, lsq and wrpn the quantizer then gives exactly what is
    wanted; for dorefa of more bits as long as the largest weight stays; for twn and ttq the threshold and scale, which follow
    the weights, move a little.
    """
    if quantizer.bits == 1:
        # Mirrored, so that the mean magnitude, which is the scale, stays; and a small weight stays easy to turn back.
        latent = torch.where(weight == 0, _JUST_BELOW_ZERO, -weight)
    elif quantizer.scheme == "dorefa":
        largest = torch.tanh(working(weight)).abs().amax()
        # The shares of the largest level that equation 9 gives, taken back through the tanh.
        share = wanted / working(dorefa_weight(weight, quantizer.bits, quantizer.scale)).abs().amax()
        latent = torch.atanh(share.clamp(-1, 1) * largest).to(weight.dtype)
    else:
        latent = wanted.to(weight.dtype)
    return torch.where(changed, latent, weight)
