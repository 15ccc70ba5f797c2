"""Fitted starts: latent weights whose quantized layers give, as well as their levels can, what the teacher's layers give.

The teacher's weights rounded to their nearest levels are a poor place to begin a training of few steps. Layer by layer, in the
order in which they run, the levels are chosen by least squares on a few images instead (`descent`): the inputs are those that
the quantized layers before leave, the wanted outputs the teacher's, so each layer also makes good what the ones before spoilt.
No labels, no gradients, and about one pass of both networks (`walk`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from dcq_ray.quantizers.descent import descend, descend_with_scale, errors
from dcq_ray.quantizers.levels import latents_on, level_numbers, weight_levels
from dcq_ray.quantizers.modules import WeightQuantizer
from dcq_ray.quantizers.policy import PER_CHANNEL_SCHEMES, layer_weight
from dcq_ray.quantizers.walk import Walk

# Of every image so many places of a layer's input (all channels and the window around it) take part.
PLACES_PER_IMAGE = 16
# Of activations, of both networks together; where more are live, they are computed again.
MAX_KEPT_BYTES = 2**30
# At many bits rounding costs too little to be made good.
MAX_FITTED_BITS = 4
# A fit of so many weights takes some seconds of one core; the moments of so many inputs take a gigabyte.
MAX_FITTED_WEIGHTS = 4_000_000
MAX_FITTED_INPUTS = 5_000
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


def fit_weights(
    student: GraphModule, teacher: GraphModule, batches: Iterable[tuple[Tensor, Tensor]], *, seed: int
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
    fits = []
    with torch.no_grad():
        for name, node in ours.items():
            layer: Any = student.get_submodule(name)
            if not parametrize.is_parametrized(layer, "weight"):
                continue
            quantizer = layer.parametrizations["weight"][0]
            # Tied layers share one weight: the first of them decides.
            if not _fittable(layer, quantizer) or id(quantizer) in done:
                continue
            done.add(id(quantizer))
            inputs = zip(walks[0].inputs_of(node), walks[1].inputs_of(theirs[name]), strict=True)
            fit = _fit_layer(layer, modules[name], inputs, name in free, seed, name)
            if fit is not None:
                fits.append(fit)
    for name, module in student.named_modules():
        module.training = modes[name]
    for name, norm in norms.items():
        for kind, value in norm.named_buffers():
            value.copy_(statistics[name][kind])
    return tuple(fits)


def _fit_layer(
    layer: Any,
    teacher_layer: nn.Module,
    inputs: Iterable[tuple[Tensor, Tensor]],
    scale_free: bool,
    seed: int,
    name: str,
) -> LayerFit | None:
    """Fit one layer; None where there is nothing to gain: a scale or the outputs are all 0."""
    moments = _moments(layer, teacher_layer, inputs, seed)
    if moments is None:
        return None
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
    return LayerFit(module=name, error_before=1 + old_error / total, error_after=1 + new_error / total)


def _shrunk(square: Tensor, cross: Tensor, rows: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """H and r drawn towards H's diagonal D and D w, w the teacher's weights [R, N]: what nearest levels are best for."""
    prior = PRIOR_SHARE * square.shape[1]
    share = prior / (prior + num_samples)
    diagonal = square.diagonal(dim1=1, dim2=2)
    independent = rows.reshape(len(square), -1, rows.shape[1]).to(cross.dtype) * diagonal[:, None]
    return torch.lerp(square, torch.diag_embed(diagonal), share), torch.lerp(cross, independent.flatten(0, 1), share)


# -- what both networks do at a layer ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """Means over places and images of a layer's inputs x and of the teacher's u, for the groups of a layer, float64.

    A row is an output channel, w its weights in the teacher, y = w'u.
    """

    inputs: Tensor
    """E[x], [G, N]."""
    products: Tensor
    """E[x x'], [G, N, N]."""
    wanted: Tensor
    """E[y], [G, R / G]."""
    crosses: Tensor
    """E[y x'], [G, R / G, N]."""
    squares: Tensor
    """E[y^2], [G, R / G]."""
    num_samples: int
    """Places of images that they are means of."""

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        """H [G, N, N], r [R, N] and E[y^2] [R], float32."""
        return self.products.float(), self.crosses.flatten(0, 1).float(), self.squares.flatten().float()

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of what differs from the mean: H and r are covariances, the last the variance."""
        products = self.products - self.inputs[:, :, None] * self.inputs[:, None]
        crosses = self.crosses - self.wanted[:, :, None] * self.inputs[:, None]
        variances = self.squares - self.wanted.square()
        return products.float(), crosses.flatten(0, 1).float(), variances.flatten().float()

    def mean_shift(self, weights: Tensor) -> Tensor:
        """What the mean of the outputs lacks with these weights [R, N], biases apart; [R]."""
        rows = weights.double().reshape(*self.wanted.shape, -1)
        return (self.wanted - torch.einsum("grn,gn->gr", rows, self.inputs)).flatten().to(weights.dtype)


def _moments(
    layer: nn.Module, teacher_layer: nn.Module, inputs: Iterable[tuple[Tensor, Tensor]], seed: int
) -> _Moments | None:
    """Of pairs of batches that the layer gets in the student and in the teacher; None where a number is not finite."""
    generator = torch.Generator().manual_seed(seed)
    rows = layer_weight(teacher_layer).detach().flatten(1)
    count, sums = 0, None
    for ours, theirs in inputs:
        places = None
        if ours.ndim > 2:
            num_places = _num_places(layer, ours)
            places = torch.randperm(num_places, generator=generator)[:PLACES_PER_IMAGE].sort().values.to(ours.device)
        x, u = (_windows(layer, value, places) for value in (ours, theirs))
        grouped = rows.reshape(len(x), -1, rows.shape[1])
        y = u @ grouped.transpose(1, 2)
        parts = (x.sum(1), x.transpose(1, 2) @ x, y.sum(1), y.transpose(1, 2) @ x, y.square().sum(1))
        sums = [part.double() for part in parts] if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
        count += x.shape[1]
    if sums is None or not all(torch.isfinite(value).all() for value in sums):
        return None
    means = [value / count for value in sums]
    inputs, products, wanted, crosses, squares = means
    return _Moments(
        inputs=inputs, products=products, wanted=wanted, crosses=crosses, squares=squares, num_samples=count
    )


def _num_places(layer: nn.Module, value: Tensor) -> int:
    if isinstance(layer, nn.Conv2d):
        sizes = zip(value.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, _padding(layer), strict=True)
        counts = [(size + before + after - d * (k - 1) - 1) // s + 1 for size, k, s, d, (before, after) in sizes]
        return counts[0] * counts[1]
    return value[0, ..., 0].numel()


def _windows(layer: nn.Module, value: Tensor, places: Tensor | None) -> Tensor:
    """The inputs of a layer's outputs at some places of every image, [G, B * places, N]."""
    if not isinstance(layer, nn.Conv2d):
        rows = value if places is None else value.flatten(1, -2)[:, places]
        return rows.reshape(1, -1, value.shape[-1])
    (top, bottom), (left, right) = _padding(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(value, (left, right, top, bottom), mode=mode)
    # Views of all windows, of which only those at the places are copied.
    windows = padded
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    rows, columns = _rows_and_columns(places, windows.shape[2:4])
    chosen = windows[:, :, rows, columns].permute(0, 1, 3, 4, 2).flatten(1, 3)
    grouped = chosen.reshape(len(value), layer.groups, -1, chosen.shape[-1])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def _rows_and_columns(places: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Where places of an image lie, in the order of its rows; all of them where None."""
    numbers = torch.arange(shape[0] * shape[1]) if places is None else places
    return numbers // shape[1], numbers % shape[1]


def _padding(layer: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many rows and columns are added before and after."""
    if not isinstance(layer.padding, str):
        height, width = layer.padding
        return (height, height), (width, width)
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    height, width = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return (height // 2, height - height // 2), (width // 2, width - width // 2)


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
