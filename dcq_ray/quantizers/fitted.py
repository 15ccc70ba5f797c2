"""Fitted starts: latent weights whose quantized layers give, as well as their levels can, what the teacher's layers give.

The teacher's weights rounded to their nearest levels are a poor place to begin a training of few steps. Layer by layer, in the
order in which they run, the levels are chosen by least squares on a few images instead (`descent`): the inputs are those that
the quantized layers before leave, the wanted outputs the teacher's, so each layer also makes good what the ones before spoilt,
and where it is added to another branch (`sums`) what is spoilt there. No labels, no gradients, and about one pass of both
networks (`walk`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from dcq_ray.quantizers.coupling import couple
from dcq_ray.quantizers.descent import descend, descend_with_scale, errors
from dcq_ray.quantizers.levels import latents_on, level_numbers, weight_levels
from dcq_ray.quantizers.modules import WeightQuantizer
from dcq_ray.quantizers.moments import Moments, moments_num_bytes, moments_of
from dcq_ray.quantizers.policy import layer_weight
from dcq_ray.quantizers.sums import summands
from dcq_ray.quantizers.walk import Walk
from dcq_ray.records.packing import PER_CHANNEL_SCHEMES

# Of activations, of both networks together; where more are live, they are computed again.
MAX_KEPT_BYTES = 2**30
# At many bits rounding costs too little to be made good.
MAX_FITTED_BITS = 4
# A fit of so many weights takes some seconds of one core; the moments of so many inputs take a gigabyte.
MAX_FITTED_WEIGHTS = 4_000_000
MAX_FITTED_INPUTS = 5_000
# Rows that are chosen together are descended one by one, which for so many weights takes some seconds.
MAX_COUPLED_WEIGHTS = 2**18
# Added to the diagonal of the moments, as a share of its mean, so that inputs which are always 0 count a little.
RIDGE = 1e-4
# So many of N inputs count as samples in which inputs are independent, and the wanted weights are the teacher's: few images say
# nothing of some directions, and there the nearest levels are best.
PRIOR_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFit:
    """What the fit of a layer gave."""

    module: str
    error_before: float
    """Mean squared error over variance (without a bias or BatchNorm: mean square) of the layer's outputs, at nearest levels."""
    error_after: float
    seconds_seeing: float
    """Of passes and moments, which grow with the number of images; the search for levels does not."""


def fit_weights(
    student: GraphModule,
    teacher: GraphModule,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int,
    metrics: Mapping[str, Tensor] | None = None,
    made_good: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LayerFit, ...]:
    """Move a student's latent weights, in place, to where its layers give most nearly what the teacher's give.

    Layers that are fitted: Conv2d and Linear of at most 4 bits, 4 million weights, and 5,000 of them a row. A layer's new
    levels are kept only where they are better on the very images. Biases take up the change of the mean; what a BatchNorm
    follows may have any scale.

    Args:
        student: the teacher with quantizers on it (`put_quantizers`); BatchNorm runs on batch statistics meanwhile.
        teacher: in eval mode, of the same graph.
        batches: inputs [B, ...] of the student and of the teacher, from the same images.
        seed: of the places that take part.
        metrics: of layers of at most 262,144 weights, by name: what their rows' errors cost together, [R, R] (`coupling`).
        made_good: the share of what a sum lacks that is put into the wanted outputs of its last summand.
        clock: by which the seconds are told.
    """
    kept = list(batches)
    modules, done = dict(teacher.named_modules()), set()
    free = _before_batchnorm(teacher)
    # Of BatchNorm alone: a quantizer's scale is a buffer, too, and is fitted.
    norms = {name: module for name, module in student.named_modules() if isinstance(module, _BatchNorm)}
    statistics = {name: copy.deepcopy(dict(module.named_buffers())) for name, module in norms.items()}
    modes = {name: module.training for name, module in student.named_modules()}
    for module in norms.values():
        module.train()
    walks = [
        Walk(network, batches, max_kept_bytes=MAX_KEPT_BYTES // 2)
        for network, batches in zip((student, teacher), zip(*kept, strict=True), strict=True)
    ]
    ours, theirs = (walk.first_calls() for walk in walks)
    sums = summands(teacher)
    named = [{node.name: node for node in network.graph.nodes} for network in (student, teacher)]
    fits = []
    with torch.no_grad():
        for name in ours:
            layer: Any = student.get_submodule(name)
            if not parametrize.is_parametrized(layer, "weight"):
                continue
            quantizer = layer.parametrizations["weight"][0]
            # Tied layers share one weight: the first of them decides.
            if not _fittable(layer, quantizer) or id(quantizer) in done:
                continue
            done.add(id(quantizer))
            summand = sums.get(name)
            pairs = [
                walk.inputs_of(calls[name], beside=None if summand is None else nodes[summand.other])
                for walk, calls, nodes in zip(walks, (ours, theirs), named, strict=True)
            ]
            started = clock()
            moments = moments_of(layer, modules[name], zip(*pairs, strict=True), summand, seed, made_good)
            seconds = clock() - started
            metric = (metrics or {}).get(name)
            fit = None if moments is None else _fit_layer(layer, modules[name], moments, name in free, metric)
            if fit is not None:
                errors_before, errors_after = fit
                fits.append(
                    LayerFit(
                        module=name,
                        error_before=errors_before,
                        error_after=errors_after,
                        seconds_seeing=seconds,
                    )
                )
    for name, module in student.named_modules():
        module.training = modes[name]
    for name, norm in norms.items():
        for kind, value in norm.named_buffers():
            value.copy_(statistics[name][kind])
    return tuple(fits)


def fit_num_bytes(student: GraphModule, batch_size: int) -> int:
    """What the fit of a student's largest layer takes beside the activations, on batches of so many images."""
    layers: list[Any] = [layer for layer in student.modules() if parametrize.is_parametrized(layer, "weight")]
    fitted = [layer for layer in layers if _fittable(layer, layer.parametrizations["weight"][0])]
    return max((moments_num_bytes(layer, batch_size) for layer in fitted), default=0)


def _fit_layer(
    layer: Any, teacher_layer: nn.Module, moments: Moments, scale_free: bool, metric: Tensor | None
) -> tuple[float, float] | None:
    """Fit one layer, and give its error before and after; None where there is nothing to gain: a scale or all outputs are 0."""
    centred = scale_free or layer.bias is not None
    square, cross, variance = moments.centred() if centred else moments.plain()
    square, cross = _shrunk(square, cross, layer_weight(teacher_layer).detach().flatten(1), moments.num_samples)
    ridge = RIDGE * square.diagonal(dim1=1, dim2=2).mean(1)
    square = square + ridge[:, None, None] * torch.eye(square.shape[1], device=square.device)
    quantizer: WeightQuantizer = layer.parametrizations["weight"][0]
    latent: Tensor = layer.parametrizations["weight"].original
    before = layer_weight(layer).detach().flatten(1)
    levels = weight_levels(quantizer, latent)
    total = float(variance.sum())
    if not bool((levels[1:] > levels[:-1]).all()) or not total > 0:
        return None
    numbers = level_numbers(before, levels)
    old_error = float(errors(square, cross, before, scale_free=scale_free).sum())
    kept, kept_state = latent.clone(), copy.deepcopy(quantizer.state_dict())
    if scale_free:
        chosen = descend(square, cross, levels, numbers, scale_free=True)
    else:
        chosen, factor = descend_with_scale(
            square, cross, levels, numbers, per_row=quantizer.scheme in PER_CHANNEL_SCHEMES
        )
    if metric is not None and latent.numel() <= MAX_COUPLED_WEIGHTS:
        scaled = levels if scale_free else levels * factor
        chosen = couple(square, cross, scaled, chosen, metric, scale_free=scale_free)
    wanted = levels.expand(-1, len(before)).t().gather(1, chosen).reshape(latent.shape)
    latent.copy_(latents_on(quantizer, latent, wanted, (chosen != numbers).reshape(latent.shape)))
    if not scale_free:
        latent.copy_(quantizer.rescale(latent, factor.to(latent.dtype)))
    # Not what was wanted, but what the quantizer makes of it.
    after = layer_weight(layer).detach().flatten(1)
    new_error = float(errors(square, cross, after, scale_free=scale_free).sum())
    if new_error >= old_error:
        latent.copy_(kept)
        quantizer.load_state_dict(kept_state)
        after, new_error = before, old_error
    if layer.bias is not None:
        layer.bias.copy_(layer.bias + moments.mean_shift(after))
    return 1 + old_error / total, 1 + new_error / total


def _shrunk(square: Tensor, cross: Tensor, rows: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """H and r drawn towards H's diagonal D and D w, w the teacher's weights [R, N]: what nearest levels are best for."""
    prior = PRIOR_SHARE * square.shape[1]
    share = prior / (prior + num_samples)
    diagonal = square.diagonal(dim1=1, dim2=2)
    independent = rows.reshape(len(square), -1, rows.shape[1]).to(cross.dtype) * diagonal[:, None]
    return torch.lerp(square, torch.diag_embed(diagonal), share), torch.lerp(cross, independent.flatten(0, 1), share)


# -- which layers --------------------------------------------------------------------------------------------------------


def _fittable(layer: nn.Module, quantizer: WeightQuantizer) -> bool:
    # A subclass may do something else with its weight than its parent; torch makes one for a parametrized layer.
    return (
        type(layer).__mro__[1] in (nn.Conv2d, nn.Linear)
        and quantizer.bits <= MAX_FITTED_BITS
        and layer_weight(layer).numel() <= MAX_FITTED_WEIGHTS
        and layer_weight(layer)[0].numel() <= MAX_FITTED_INPUTS
    )


def _before_batchnorm(teacher: GraphModule) -> set[str]:
    """Names of the layers whose output goes into a BatchNorm and nowhere else."""
    modules = dict(teacher.named_modules())

    def is_batchnorm(node: Any) -> bool:
        return node.op == "call_module" and isinstance(modules.get(node.target), _BatchNorm)

    calls: dict[str, list[bool]] = {}
    for node in teacher.graph.nodes:
        if node.op == "call_module":
            found = bool(node.users) and all(is_batchnorm(user) for user in node.users)
            calls.setdefault(str(node.target), []).append(found)
    return {name for name, found in calls.items() if all(found)}
