"""Quantizers as pure functions with straight-through gradients, and putting them on the layers of a module.

DoReFa-Net (Zhou et al., arXiv 1606.06160) in formulas, r the full-precision weight:

    1 bit    w = mean|r| * sign(r), sign(0) = +1                         levels -E, +E        (eq. 8, one E per tensor)
    k bits   w = 2 round(n x) / n - 1,  x = tanh(r) / (2 max|tanh r|) + 1/2,  n = 2^k - 1     (eq. 9)

Gradients pass rounding and sign unchanged (straight-through). Equation 9 gives weights in [-1, 1] whatever the teacher's
were; a pretrained network without BatchNorm after the layer would not survive that. On a module the quantizer therefore
multiplies by a fixed `scale`, the least-squares fit of the quantized to the teacher's weights: our one deviation.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcq_ray.errors import QuantizeError
from dcq_ray.records import LayerPlan
from dcq_ray.spec import QuantizeSpec

MAX_BITS = 8
UNQUANTIZED_BITS = 32
SCALE_BYTES = 4


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa-Net's quantized weight: at most 2^bits levels, same shape; bits from 1 to 8.

    The gradient is straight-through: for 1 bit the identity (eq. 7 with E held constant, as in the authors' code), for more
    bits that of the tanh normalisation with the maximum held constant.
    """
    if bits == 1:
        scale = weight.detach().abs().mean()
        quantized = torch.where(weight.detach() >= 0, scale, -scale)
        one_bit: Tensor = weight + (quantized - weight).detach()
        return one_bit
    if not 2 <= bits <= MAX_BITS:
        raise QuantizeError(f"dorefa: got {bits} bits, expected 1 to {MAX_BITS}")
    steps = 2**bits - 1
    bounded = torch.tanh(weight)
    largest = bounded.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    unit = bounded / (2 * largest) + 0.5
    # Division by the step count, not multiplication by its reciprocal, as exports do it: ties round the same way.
    rounded = torch.round(unit.detach() * steps) / steps
    levels: Tensor = 2 * (unit + (rounded - unit).detach()) - 1
    return levels


def least_squares_scale(weight: Tensor, quantized: Tensor) -> Tensor:
    """The scalar s that minimises |weight - s * quantized|^2: <w, q> / <q, q>; 1 where q is zero."""
    norm = quantized.double().square().sum()
    if norm == 0:
        return torch.ones((), dtype=weight.dtype)
    return ((weight.double() * quantized.double()).sum() / norm).to(weight.dtype)


class DorefaWeight(nn.Module):
    """A weight's parametrization: DoReFa levels times a fixed scale; one bit carries its own scale, mean|w|."""

    scale: Tensor | None

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.bits = bits
        scale = None if bits == 1 else least_squares_scale(weight, dorefa_weight(weight, bits))
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight."""
        quantized = dorefa_weight(weight, self.bits)
        return quantized if self.scale is None else self.scale * quantized


def plan_layers(layers: Sequence[tuple[str, nn.Module]], spec: QuantizeSpec) -> tuple[LayerPlan, ...]:
    """The bits of every layer of a network, given in order of execution.

    The scheme's bits, then `first_last_bits` for the first and the last layer, then `overrides`, the last match of which
    wins.

    Raises:
        QuantizeError: no layer; a pattern that matches nothing; a number of bits that the scheme does not have.
    """
    if not layers:
        raise QuantizeError("the teacher has no Conv or Linear layer: there is nothing to quantize")
    names = [name for name, _ in layers]
    for pattern in spec.overrides:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise QuantizeError(
                f"quantize.overrides: the pattern {pattern!r} matches no Conv or Linear layer; near it: {', '.join(near)}"
            )
    plans = []
    for position, (name, module) in enumerate(layers):
        bits = spec.weights.bits
        if spec.first_last_bits is not None and position in (0, len(layers) - 1):
            bits = spec.first_last_bits
        for pattern, override in spec.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                bits = override.bits
        if MAX_BITS < bits < UNQUANTIZED_BITS:
            raise QuantizeError(
                f"layer {name}: got {bits} bits, expected 1 to {MAX_BITS}, or {UNQUANTIZED_BITS} to leave it alone"
            )
        plans.append(
            LayerPlan(
                module=name,
                kind=type(module).__name__,
                num_weights=_weight(module).numel(),
                scheme=spec.weights.scheme,
                bits=bits,
            )
        )
    return tuple(plans)


def put_quantizers(module: nn.Module, layers: Iterable[LayerPlan]) -> None:
    """Put weight quantizers on those of the layers that this module has, in place; 32 bits leave a layer alone."""
    modules = dict(module.named_modules())
    for layer in layers:
        if layer.bits < UNQUANTIZED_BITS and layer.module in modules:
            target = modules[layer.module]
            with torch.no_grad():
                quantizer = DorefaWeight(layer.bits, _weight(target))
            parametrize.register_parametrization(target, "weight", quantizer)


def bake(module: nn.Module) -> dict[str, Tensor]:
    """Turn quantized weights into plain parameters under their own names, in place; returns the quantizers' other state.

    The state is `dcq.<module>.bits` (uint8) and `dcq.<module>.scale` (float32), one number each: the distance between
    neighbouring levels follows from both.
    """
    extra: dict[str, Tensor] = {}
    for name, layer in list(module.named_modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        quantizer = layer.parametrizations["weight"][0]
        assert isinstance(quantizer, DorefaWeight)
        with torch.no_grad():
            scale = layer.weight.abs().mean() if quantizer.scale is None else quantizer.scale
        extra[f"dcq.{name}.bits"] = torch.tensor(quantizer.bits, dtype=torch.uint8)
        extra[f"dcq.{name}.scale"] = scale.detach().float().cpu().reshape(())
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return extra


def packed_num_bytes(state: Mapping[str, Tensor], layers: Iterable[LayerPlan]) -> int:
    """Bytes of a student whose quantized weights are packed in bits, with a 4-byte scale each; the rest as it is."""
    quantized = {f"{layer.module}.weight": layer for layer in layers if layer.bits < UNQUANTIZED_BITS}
    total = 0
    for name, tensor in state.items():
        if name.startswith("dcq."):
            continue
        layer = quantized.get(name)
        if layer is None:
            total += tensor.numel() * tensor.element_size()
        else:
            total += -(-layer.num_weights * layer.bits // 8) + SCALE_BYTES
    return total


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
