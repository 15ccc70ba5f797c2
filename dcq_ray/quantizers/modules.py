"""Quantizers as modules: a parametrization of a layer's weight, and a module that a layer's input goes through first.

What is learned is learned in logarithms: a step so stays positive, and Adam's step of a learning rate is relative to it. What
is not learned is a buffer. Starting points are those of least squared error on the teacher's weights, or on data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.activations import (
    ActivationStart,
    dorefa_activation,
    level_range,
    lsq_activation,
    pact_activation,
    round_to_levels,
)
from dcq_ray.quantizers.functions import nearest_level, working
from dcq_ray.quantizers.starts import least_squares_clip, least_squares_scale, search_sample
from dcq_ray.quantizers.weights import (
    TTQ_THRESHOLD,
    channel_means,
    dorefa_weight,
    lsq_weight,
    ttq_weight,
    twn_weight,
    wrpn_weight,
    xnor_weight,
)

# Starting points are searched on the so many largest and so many other values, of a weight or a channel; more would change
# them little and take long.
SEARCHED = (4096, 65536)
SEARCHED_PER_CHANNEL = (64, 256)
LEARNED_ACTIVATIONS = ("pact", "lsq")


class WeightQuantizer(nn.Module):
    """A weight's parametrization; `weight -> quantized weight`, same shape.

    Args:
        weight: the teacher's, from which the starting point is found.
        channel_dim: the dimension of output channels.
        search: False where a trained state is loaded afterwards: the search reads a large weight many times.
    """

    scale: Tensor
    log_step: nn.Parameter
    log_positive: nn.Parameter
    log_negative: nn.Parameter

    def __init__(self, scheme: str, bits: int, weight: Tensor, channel_dim: int, *, search: bool = True) -> None:
        super().__init__()
        self.scheme, self.bits, self.channel_dim = scheme, bits, channel_dim
        if not weight.numel():
            raise QuantizeError(
                f"quantize.weights: a weight of shape {tuple(weight.shape)} holds no numbers, so {scheme} has nothing to start "
                "from; leave that layer alone with bits: 32 under quantize.overrides"
            )
        # In bfloat16 a learned step would not move by a learning rate of a thousandth.
        weight = working(weight.detach())
        if not search:
            # One value a channel gives starts of the right shapes.
            weight = weight.new_ones([size if dim == channel_dim else 1 for dim, size in enumerate(weight.shape)])
        if scheme == "dorefa" and bits > 1:
            # Equation 9 gives weights in [-1, 1] whatever the teacher's were; a pretrained network would not survive that.
            self.register_buffer("scale", least_squares_scale(weight, dorefa_weight(weight, bits)))
        elif scheme == "wrpn":
            self.register_buffer("scale", _least_squares_clip(weight, None, 2 ** (bits - 1) - 1, 0))
        elif scheme in ("lsq", "lsq-channel"):
            high = 2 ** (bits - 1) - 1
            clip = _least_squares_clip(weight, channel_dim if scheme == "lsq-channel" else None, high, 1)
            # Flat, since optimizers know what is no weight, and must not decay, by its having fewer than two dimensions.
            self.log_step = nn.Parameter(torch.log(clip / high))
        elif scheme == "ttq":
            positive, negative = _ternary_means(weight)
            self.log_positive = nn.Parameter(torch.log(positive))
            self.log_negative = nn.Parameter(torch.log(negative))
        elif scheme not in ("dorefa", "xnor", "twn"):
            raise QuantizeError(f"quantize.weights.scheme: there is no scheme {scheme!r}")

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight."""
        if self.scheme == "dorefa":
            return dorefa_weight(weight, self.bits, None if self.bits == 1 else self.scale)
        if self.scheme == "xnor":
            return xnor_weight(weight, self.channel_dim)
        if self.scheme == "twn":
            return twn_weight(weight)
        if self.scheme == "ttq":
            return ttq_weight(weight, self.log_positive.exp(), self.log_negative.exp())
        if self.scheme == "wrpn":
            return wrpn_weight(weight, self.scale, self.bits)
        step = self.log_step.exp()
        if self.scheme == "lsq-channel":
            step = step.reshape([-1 if dim == self.channel_dim else 1 for dim in range(weight.ndim)])
        return lsq_weight(weight, step, self.bits)

    def scales(self, weight: Tensor) -> Tensor:
        """What integers are multiplied by to give the weight, to the bit: `weights` has the integers of every scheme.

        []; [channels] for xnor and lsq-channel; [2] for the two levels of ttq (+, -). float32, of a float64 weight float64.
        """
        weight = weight.detach()
        if self.scheme == "dorefa":
            found = (
                working(dorefa_weight(weight, 1)).abs().amax() if self.bits == 1 else self.scale / (2**self.bits - 1)
            )
        elif self.scheme == "xnor":
            found = channel_means(weight.abs(), self.channel_dim).flatten()
        elif self.scheme == "twn":
            found = working(twn_weight(weight)).abs().amax()
        elif self.scheme == "ttq":
            found = torch.stack([self.log_positive.exp(), self.log_negative.exp()])
        elif self.scheme == "wrpn":
            found = self.scale / (2 ** (self.bits - 1) - 1)
        else:
            found = self.log_step.exp()
        return working(found.detach()).cpu()

    def rescale(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Multiply the levels, in place; returns the latent weight that stays on the levels of the same numbers.

        Args:
            factor: above 0; [], or [channels] where every channel has a scale of its own.
        """
        rows = factor.reshape([-1 if dim == self.channel_dim else 1 for dim in range(weight.ndim)])
        with torch.no_grad():
            if self.scheme == "dorefa" and self.bits > 1:
                # Its levels follow from the shares of the largest weight.
                self.scale.mul_(factor)
                return weight
            if self.scheme == "ttq":
                # So does its threshold.
                self.log_positive.add_(factor.log())
                self.log_negative.add_(factor.log())
                return weight
            if self.scheme == "wrpn":
                self.scale.mul_(factor)
            elif self.scheme in ("lsq", "lsq-channel"):
                self.log_step.add_(factor.log())
        return weight * rows


class InputQuantizer(nn.Module):
    """Quantizes the input of a layer; trained by its scheme's gradients."""

    signed: Tensor
    log_clip: Tensor

    def __init__(self, scheme: str, bits: int, start: ActivationStart) -> None:
        super().__init__()
        self.scheme, self.bits = scheme, bits
        # A buffer, since it comes from data: whoever loads the state gets it too.
        self.register_buffer("signed", torch.tensor(start.signed))
        # The same as a plain flag: to ask the buffer would wait for the GPU at every call.
        self._signed = start.signed
        log_clip = torch.tensor(start.clip).log()
        if scheme in LEARNED_ACTIVATIONS:
            self.log_clip = nn.Parameter(log_clip)
        else:
            self.register_buffer("log_clip", log_clip)

    @property
    def step(self) -> Tensor:
        """The distance of neighbouring levels (one signed bit: half of it)."""
        _, high = level_range(self.bits, self._signed)
        return self.log_clip.exp() / high

    def forward(self, value: Tensor) -> Tensor:
        """The quantized input."""
        function = {"dorefa": dorefa_activation, "pact": pact_activation, "lsq": lsq_activation}[self.scheme]
        return function(value, self.step, self.bits, self._signed)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._signed = bool(self.signed)


class FrozenInputQuantizer(nn.Module):
    """An input quantizer as it is shipped; its numbers are not in the network's own state."""

    step: Tensor

    def __init__(self, step: Tensor, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.register_buffer("step", step, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """The quantized input."""
        return round_to_levels(value, self.step, self.bits, self.signed)


def _ternary_means(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the weights above TTQ's threshold and, in size, of those below minus it; where there are none, the other."""
    threshold = TTQ_THRESHOLD * weight.abs().amax()
    above, below = weight[weight > threshold], -weight[weight < -threshold]
    sides = [side.double().mean().to(weight.dtype) for side in (above, below) if side.numel()]
    return (sides[0], sides[-1]) if sides else (torch.ones_like(threshold), torch.ones_like(threshold))


def _least_squares_clip(weight: Tensor, channel_dim: int | None, high: int, extra_low: int) -> Tensor:
    """The clip of least squared error for levels -high - extra_low … high: [], or [channels] where there is a dimension."""

    def quantize(rows: Tensor, clips: Tensor) -> Tensor:
        return nearest_level(rows, clips / high, -high - extra_low, high)

    if channel_dim is None:
        rows, counts = search_sample(weight.reshape(1, -1), *SEARCHED)
        return least_squares_clip(rows, quantize, counts=counts).reshape(())
    channels = weight.transpose(0, channel_dim).reshape(weight.shape[channel_dim], -1)
    rows, counts = search_sample(channels, *SEARCHED_PER_CHANNEL)
    return least_squares_clip(rows, quantize, counts=counts).flatten()
