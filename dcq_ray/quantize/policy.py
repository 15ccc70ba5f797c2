"""Which bits and which scheme every layer gets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dcq_ray.errors import QuantizeError
from dcq_ray.records import LayerPlan
from dcq_ray.spec import MAX_WEIGHT_BITS, WEIGHT_SCHEME_BITS, OverrideSpec, QuantizeSpec

UNQUANTIZED_BITS = 32
SCALE_BYTES = 4
PER_CHANNEL_SCHEMES = ("xnor", "lsq-channel")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSite:
    """A Conv or Linear layer as the partition found it."""

    name: str
    module: nn.Module
    section: int = 0
    multiply_accumulates: int = 0
    called: bool = True
    """Called as a module; only then its input can be quantized."""


def plan_layers(sites: Sequence[LayerSite], spec: QuantizeSpec) -> tuple[LayerPlan, ...]:
    """The bits and schemes of every layer of a network, given in order of execution.

    The job's weights and activations, then `first_last_bits` for the first and the last layer (with dorefa where the scheme
    has no such bits; the first layer's input, the image, stays as it is), then `overrides`, the last match of which wins. A
    pattern matches the names of layers, and `section:N` those of a section.

    Raises:
        QuantizeError: no layer; a pattern that matches nothing; bits that the scheme does not have; activation bits where
            there are no activation quantizers; tied layers of unlike bits.
    """
    if not sites:
        raise QuantizeError("the teacher has no Conv or Linear layer: there is nothing to quantize")
    _check_patterns(sites, spec.overrides)
    plans = tuple(
        _plan(site, spec, position in (0, len(sites) - 1), position == 0) for position, site in enumerate(sites)
    )
    tied: dict[int, LayerPlan] = {}
    for site, plan in zip(sites, plans, strict=True):
        first = tied.setdefault(id(layer_weight(site.module)), plan)
        if (first.scheme, first.bits) != (plan.scheme, plan.bits):
            raise QuantizeError(
                f"layers {first.module} and {plan.module} share one weight, but get {first.scheme} {first.bits} bits and "
                f"{plan.scheme} {plan.bits} bits; give both the same under quantize.overrides"
            )
    return plans


def channel_dim(kind: str) -> int:
    """The dimension of output channels in the weight of a layer of that class (grouped transposed ones share it)."""
    return 1 if "Transpose" in kind else 0


def layer_weight(module: nn.Module) -> Tensor:
    """The weight of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def packed_num_bytes(state: Mapping[str, Tensor], layers: Sequence[LayerPlan]) -> int:
    """Bytes of a student whose quantized weights are packed in bits, with 4-byte scales; the rest as it is."""
    quantized = {f"{layer.module}.weight": layer for layer in layers if layer.bits < UNQUANTIZED_BITS}
    total = 0
    for name, tensor in state.items():
        if name in quantized:
            total += quantized[name].num_bytes
        elif not name.startswith("dcq."):
            total += tensor.numel() * tensor.element_size()
    return total + SCALE_BYTES * sum(layer.activation_bits < UNQUANTIZED_BITS for layer in layers)


def _plan(site: LayerSite, spec: QuantizeSpec, at_end: bool, is_first: bool) -> LayerPlan:
    scheme, bits = spec.weights.scheme, spec.weights.bits
    activation_scheme, activation_bits = None, UNQUANTIZED_BITS
    if spec.activations is not None and site.called:
        activation_scheme, activation_bits = spec.activations.scheme, spec.activations.bits
    if spec.first_last_bits is not None and at_end:
        bits = spec.first_last_bits
        scheme = scheme if bits in WEIGHT_SCHEME_BITS[scheme] else "dorefa"
        if activation_scheme is not None:
            activation_bits = UNQUANTIZED_BITS if is_first else spec.first_last_bits
    for pattern, override in spec.overrides.items():
        if not _matches(site, pattern):
            continue
        scheme = override.scheme or scheme
        bits = bits if override.bits is None else override.bits
        if override.activation_bits is not None:
            activation_bits = override.activation_bits
            named = override.activation_scheme or (None if spec.activations is None else spec.activations.scheme)
            if activation_bits < UNQUANTIZED_BITS and (named is None or not site.called):
                why = (
                    "its weight is used without calling the layer, so its input cannot be quantized"
                    if not site.called
                    else "quantize.activations is null; give it a scheme, or give the override an activation_scheme"
                )
                raise QuantizeError(
                    f"quantize.overrides: {pattern}: activation_bits {activation_bits} for layer {site.name}, but {why}"
                )
            activation_scheme = named
        elif override.activation_scheme is not None:
            activation_scheme = override.activation_scheme
    allowed = WEIGHT_SCHEME_BITS[scheme]
    if bits != UNQUANTIZED_BITS and bits not in allowed:
        told = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else str(allowed[0])
        raise QuantizeError(
            f"layer {site.name}: got {bits} bits, expected {told} for {scheme}, or {UNQUANTIZED_BITS} to leave it alone"
        )
    if MAX_WEIGHT_BITS < activation_bits < UNQUANTIZED_BITS:
        raise QuantizeError(
            f"layer {site.name}: got {activation_bits} activation bits, expected 1 to {MAX_WEIGHT_BITS}, or "
            f"{UNQUANTIZED_BITS} to leave its input alone"
        )
    weight, kind = layer_weight(site.module), type(site.module).__name__
    num_scales = weight.shape[channel_dim(kind)] if scheme in PER_CHANNEL_SCHEMES else 2 if scheme == "ttq" else 1
    quantized = bits < UNQUANTIZED_BITS
    return LayerPlan(
        module=site.name,
        kind=kind,
        num_weights=weight.numel(),
        scheme=scheme,
        bits=bits,
        activation_scheme=activation_scheme if activation_bits < UNQUANTIZED_BITS else None,
        activation_bits=activation_bits,
        multiply_accumulates=site.multiply_accumulates,
        num_bytes=-(-weight.numel() * bits // 8) + SCALE_BYTES * num_scales
        if quantized
        else weight.numel() * weight.element_size(),
    )


def _matches(site: LayerSite, pattern: str) -> bool:
    return fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(f"section:{site.section}", pattern)


def _check_patterns(sites: Sequence[LayerSite], overrides: Mapping[str, OverrideSpec]) -> None:
    names = [site.name for site in sites]
    for pattern in overrides:
        if not any(_matches(site, pattern) for site in sites):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise QuantizeError(
                f"quantize.overrides: the pattern {pattern!r} matches no Conv or Linear layer; near it: {', '.join(near)}; "
                f"sections are section:0 to section:{max(site.section for site in sites)}"
            )
