"""Which bits and which scheme every layer gets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dcq_ray.errors import JobError, QuantizeError
from dcq_ray.records import LayerPlan
from dcq_ray.records.packing import SCALE_BYTES, num_scales, weight_num_bytes
from dcq_ray.spec import MAX_WEIGHT_BITS, WEIGHT_SCHEME_BITS, ActivationScheme, QuantizeSpec, WeightScheme

UNQUANTIZED_BITS = 32


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
        QuantizeError: the network has no layer to quantize.
        JobError: every mistake of the job's, one a line: a pattern that matches nothing; bits that a scheme does not have;
            activation bits where there are no activation quantizers; tied layers of unlike bits.
    """
    if not sites:
        raise QuantizeError("the teacher has no Conv or Linear layer: there is nothing to quantize")
    ends = (0, len(sites) - 1)
    choices = [_choice(site, spec, position in ends, position == 0) for position, site in enumerate(sites)]
    mistakes = [*_patterns(sites, spec), *_unlike_twins(sites, choices)]
    for site, choice in zip(sites, choices, strict=True):
        mistakes += _mistakes(site, choice)
    if mistakes:
        number = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise JobError("\n".join([f"the job does not fit its teacher: {number}", *mistakes]))
    return tuple(_layer_plan(site, choice) for site, choice in zip(sites, choices, strict=True))


def channel_dim(kind: str) -> int:
    """The dimension of output channels in the weight of a layer of that class (grouped transposed ones share it)."""
    return 1 if "Transpose" in kind else 0


def layer_kind(module: nn.Module) -> str:
    """The class of torch.nn that a layer is, or is derived from."""
    for kind in type(module).__mro__:
        name: str = kind.__name__
        if getattr(nn, name, None) is kind:
            return name
    raise QuantizeError(f"{type(module).__name__} is not derived from a layer of torch.nn")


def layer_weight(module: nn.Module) -> Tensor:
    """The weight of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def packed_num_bytes(state: Mapping[str, Tensor], layers: Sequence[LayerPlan]) -> int:
    """Bytes of a student whose quantized weights are packed in bits, with 4-byte scales; the rest as it is."""
    quantized = {f"{layer.module}.weight": layer for layer in layers if layer.bits < UNQUANTIZED_BITS}
    total = 0
    counted: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if name.startswith("dcq.") or (place in counted and tensor.numel()):
            continue
        # Tied weights, which lie in memory once, are packed once.
        counted.add(place)
        total += quantized[name].num_bytes if name in quantized else tensor.numel() * tensor.element_size()
    return total + SCALE_BYTES * sum(layer.activation_bits < UNQUANTIZED_BITS for layer in layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What a job asks for one layer, whether or not it can be had."""

    scheme: WeightScheme
    bits: int
    activation_scheme: ActivationScheme | None
    activation_bits: int


def _choice(site: LayerSite, spec: QuantizeSpec, at_end: bool, is_first: bool) -> _Choice:
    activations = spec.activations if site.called else None
    choice = _Choice(
        scheme=spec.weights.scheme,
        bits=spec.weights.bits,
        activation_scheme=None if spec.activations is None else spec.activations.scheme,
        activation_bits=UNQUANTIZED_BITS if activations is None else activations.bits,
    )
    if spec.first_last_bits is not None and at_end:
        bits = spec.first_last_bits
        choice = replace(choice, bits=bits, scheme=choice.scheme if _has(choice.scheme, bits) else "dorefa")
        if activations is not None:
            choice = replace(choice, activation_bits=UNQUANTIZED_BITS if is_first else bits)
    for pattern, override in spec.overrides.items():
        if _matches(site, pattern):
            activation_bits = override.activation_bits if site.called else None
            choice = _Choice(
                scheme=override.scheme or choice.scheme,
                bits=choice.bits if override.bits is None else override.bits,
                activation_scheme=override.activation_scheme or choice.activation_scheme,
                activation_bits=choice.activation_bits if activation_bits is None else activation_bits,
            )
    return choice


def _has(scheme: WeightScheme, bits: int) -> bool:
    return bits == UNQUANTIZED_BITS or bits in WEIGHT_SCHEME_BITS[scheme]


def _mistakes(site: LayerSite, choice: _Choice) -> Iterator[str]:
    leave = f"or {UNQUANTIZED_BITS} to leave it alone"
    if not _has(choice.scheme, choice.bits):
        allowed = WEIGHT_SCHEME_BITS[choice.scheme]
        told = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else str(allowed[0])
        yield f"layer {site.name}: got {choice.bits} bits, expected {told} for {choice.scheme}, {leave}"
    if MAX_WEIGHT_BITS < choice.activation_bits < UNQUANTIZED_BITS:
        yield f"layer {site.name}: got {choice.activation_bits} activation bits, expected 1 to {MAX_WEIGHT_BITS}, {leave}"
    elif choice.activation_bits <= MAX_WEIGHT_BITS and choice.activation_scheme is None:
        yield (
            f"layer {site.name}: got {choice.activation_bits} activation bits, but quantize.activations is null; give it a "
            "scheme, or give the override an activation_scheme"
        )


def _unlike_twins(sites: Sequence[LayerSite], choices: Sequence[_Choice]) -> Iterator[str]:
    tied: dict[int, tuple[LayerSite, _Choice]] = {}
    for site, choice in zip(sites, choices, strict=True):
        first, other = tied.setdefault(id(layer_weight(site.module)), (site, choice))
        if (other.scheme, other.bits) != (choice.scheme, choice.bits):
            yield (
                f"layers {first.name} and {site.name} share one weight, but get {other.scheme} {other.bits} bits and "
                f"{choice.scheme} {choice.bits} bits; give both the same under quantize.overrides"
            )


def _layer_plan(site: LayerSite, choice: _Choice) -> LayerPlan:
    weight, kind = layer_weight(site.module), layer_kind(site.module)
    scales_num_bytes = SCALE_BYTES * num_scales(choice.scheme, weight.shape[channel_dim(kind)])
    packed = weight_num_bytes(weight.numel(), choice.scheme, choice.bits) + scales_num_bytes
    quantizes_input = choice.activation_scheme is not None and choice.activation_bits < UNQUANTIZED_BITS
    return LayerPlan(
        module=site.name,
        kind=kind,
        num_weights=weight.numel(),
        scheme=choice.scheme,
        bits=choice.bits,
        activation_scheme=choice.activation_scheme if quantizes_input else None,
        activation_bits=choice.activation_bits,
        multiply_accumulates=site.multiply_accumulates,
        num_bytes=packed if choice.bits < UNQUANTIZED_BITS else weight.numel() * weight.element_size(),
    )


def _matches(site: LayerSite, pattern: str) -> bool:
    return fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(f"section:{site.section}", pattern)


def _patterns(sites: Sequence[LayerSite], spec: QuantizeSpec) -> Iterator[str]:
    names = [site.name for site in sites]
    for pattern, override in spec.overrides.items():
        matched = [site for site in sites if _matches(site, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            last = max(site.section for site in sites)
            sections = "section:0" if last == 0 else f"section:0 to section:{last}"
            yield (
                f"quantize.overrides: the pattern {pattern!r} matches no Conv or Linear layer; near it: {', '.join(near)}; "
                f"sections are {sections}"
            )
        elif (override.activation_bits or UNQUANTIZED_BITS) < UNQUANTIZED_BITS and not any(s.called for s in matched):
            yield (
                f"quantize.overrides: the pattern {pattern!r} asks for activation_bits {override.activation_bits}, but the "
                f"network never calls {', '.join(site.name for site in matched[:3])}: it uses the weight in a function, so "
                "there is no input to quantize; leave activation_bits out"
            )
