"""Moments: what a fit needs to know of a layer in two networks, its inputs and the outputs that are wanted, over some images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcq_ray.quantizers.policy import layer_weight
from dcq_ray.quantizers.sums import Summand

# Of every image so many places of a layer's input (all channels and the window around it) take part.
PLACES_PER_IMAGE = 16

Seen = tuple[Tensor, Tensor | None]
"""A layer's input, and the value that its output is added to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
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


def moments_of(
    layer: nn.Module,
    teacher_layer: nn.Module,
    inputs: Iterable[tuple[Seen, Seen]],
    summand: Summand | None,
    seed: int,
    made_good: float = 1.0,
) -> Moments | None:
    """Of batches that the layer gets in the student and in the teacher, and of what its output is added to there.

    `made_good` is the share of what the sum lacks that the outputs are to make good.

    None where a number is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = layer_weight(teacher_layer).detach().flatten(1)
    count, sums = 0, None
    for (ours, our_other), (theirs, their_other) in inputs:
        places = None
        if ours.ndim > 2:
            num_places = _num_places(layer, ours)
            places = torch.randperm(num_places, generator=generator)[:PLACES_PER_IMAGE].sort().values.to(ours.device)
        x, u = (_windows(layer, value, places) for value in (ours, theirs))
        grouped = rows.reshape(len(x), -1, rows.shape[1])
        y = u @ grouped.transpose(1, 2)
        if summand is not None:
            others = [
                _outputs(layer, value, like, places) for value, like in ((our_other, ours), (their_other, theirs))
            ]
            if others[0] is not None and others[1] is not None:
                lacking = made_good * summand.shift(others[0], others[1])
                y = y + lacking.reshape(-1, *y.shape[::2]).transpose(0, 1)
        parts = (x.sum(1), x.transpose(1, 2) @ x, y.sum(1), y.transpose(1, 2) @ x, y.square().sum(1))
        sums = [part.double() for part in parts] if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
        count += x.shape[1]
    if sums is None or not all(torch.isfinite(value).all() for value in sums):
        return None
    means = [value / count for value in sums]
    inputs, products, wanted, crosses, squares = means
    return Moments(inputs=inputs, products=products, wanted=wanted, crosses=crosses, squares=squares, num_samples=count)


def moments_num_bytes(layer: nn.Module, batch_size: int) -> int:
    """What the moments of a layer take while they are made and used: at most five copies in float64, and a batch's windows.

    The windows of both networks are in float32, each once as they are gathered and once as they lie.
    """
    num_groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    num_rows, num_inputs = layer_weight(layer).flatten(1).shape
    moments = 5 * 8 * num_inputs * (num_groups * num_inputs + num_rows)
    return moments + 2 * 2 * 4 * batch_size * PLACES_PER_IMAGE * num_groups * num_inputs


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


def _outputs(layer: nn.Module, value: Tensor | None, inputs: Tensor, places: Tensor | None) -> Tensor | None:
    """A value of the shape of a layer's outputs at these places of every image, [B * places, R]; None of another shape."""
    num_rows = len(layer_weight(layer))
    if value is None or len(value) != len(inputs) or value.ndim != inputs.ndim:
        return None
    if isinstance(layer, nn.Conv2d):
        if value.shape[1] != num_rows or value[0, 0].numel() != _num_places(layer, inputs):
            return None
        value = value.flatten(2).transpose(1, 2)
    elif value.shape != (*inputs.shape[:-1], num_rows):
        return None
    elif places is not None:
        value = value.flatten(1, -2)
    return value.flatten(0, -2) if places is None else value[:, places].flatten(0, 1)


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
