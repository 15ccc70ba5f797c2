"""Where scales and clips start: at the least squared error on the values that they are for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dcq_ray.quantizers.blocks import blocks

# Below the linear grid of clips that are searched, so many more, each half of the one before.
NUM_HALVED_CLIPS = 8
NUM_REFINED_CLIPS = 20
NUM_REFITS = 4


def least_squares_scale(weight: Tensor, quantized: Tensor) -> Tensor:
    """The scalar s that minimises |weight - s * quantized|^2: <w, q> / <q, q>; 1 where q is zero. float32 at least."""
    kept = torch.promote_types(weight.dtype, torch.float32)
    product, norm = (torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(2))
    for part, level in blocks(weight.detach().to(kept), quantized.detach().to(kept)):
        product += (part * level).sum(dtype=torch.float64)
        norm += level.square().sum(dtype=torch.float64)
    return (product / norm).to(kept) if norm > 0 else torch.ones((), dtype=kept, device=weight.device)


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
