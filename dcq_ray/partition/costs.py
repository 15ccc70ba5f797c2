"""What the pieces between neighbouring candidate cuts cost: measured seconds, and analytic work that never varies."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcq_ray.partition.sections import cut, ordered_cuts
from dcq_ray.partition.trace import CutPoint, TracedTeacher

# To move a float costs about as much as so many multiply-accumulates.
MULTIPLY_ACCUMULATES_PER_FLOAT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCosts:
    """Candidate cuts, and for every piece before, between and after them what one batch costs."""

    candidates: tuple[str, ...]
    forward_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]
    """Forward and backward."""
    work: tuple[int, ...]
    """Multiply-accumulates and floats moved, per sample."""


def candidate_cuts(traced: TracedTeacher) -> tuple[CutPoint, ...]:
    """Between every two consecutive Conv or Linear layers the legal cut with the smallest activation, the last of equals.

    So cuts lie after a layer's BatchNorm, ReLU and pooling, never between a convolution and its BatchNorm.
    """
    candidates = []
    for first, following in zip(traced.weighted_nodes, traced.weighted_nodes[1:], strict=False):
        between = [point for point in traced.cut_points if first <= point.node_index < following]
        if between:
            candidates.append(min(reversed(between), key=lambda point: point.num_elements))
    return tuple(candidates)


def measure_costs(traced: TracedTeacher, example: Tensor, *, repeats: int) -> CutCosts:
    """Time each piece on the teacher's own activations of an example batch; the least of so many repeats counts."""
    points = candidate_cuts(traced)
    names = tuple(point.name for point in points)
    forward, step = [], []
    value = example
    for piece in cut(traced, names, copied=False):
        forward.append(min(_seconds(piece, value, backward=False) for _ in range(repeats + 1)))
        with _training(piece):
            step.append(min(_seconds(piece, value, backward=True) for _ in range(repeats)))
        with torch.no_grad():
            value = piece(value.clone())
    return CutCosts(
        candidates=names, forward_seconds=tuple(forward), step_seconds=tuple(step), work=_work(traced, points)
    )


def section_costs(traced: TracedTeacher, costs: CutCosts, cuts: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """(forward, step) seconds of each section that these cuts make.

    A cut that is no candidate shares its piece's seconds by multiply-accumulates.
    """
    points = {point.name: point for point in traced.cut_points}
    total = traced.total_multiply_accumulates
    edges = [0, *(points[name].multiply_accumulates_before for name in costs.candidates), total]
    bounds = [0, *(point.multiply_accumulates_before for point in ordered_cuts(traced, cuts)), total]
    result = []
    for low, high in itertools.pairwise(bounds):
        shares = [
            max(0, min(high, right) - max(low, left)) / (right - left) if right > left else 0.0
            for left, right in itertools.pairwise(edges)
        ]
        forward = sum(share * seconds for share, seconds in zip(shares, costs.forward_seconds, strict=True))
        step = sum(share * seconds for share, seconds in zip(shares, costs.step_seconds, strict=True))
        result.append((forward, step))
    return tuple(result)


def _work(traced: TracedTeacher, points: Sequence[CutPoint]) -> tuple[int, ...]:
    counts = [0, *(point.multiply_accumulates_before for point in points), traced.total_multiply_accumulates]
    sizes = [*(point.num_elements for point in points), 0]
    return tuple(
        high - low + MULTIPLY_ACCUMULATES_PER_FLOAT * size
        for low, high, size in zip(counts, counts[1:], sizes, strict=False)
    )


@contextlib.contextmanager
def _training(piece: nn.Module) -> Iterator[None]:
    """Gradients for a piece that is made of the teacher's own parameters; afterwards they are as they were."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in piece.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _seconds(piece: nn.Module, value: Tensor, *, backward: bool) -> float:
    # Activations are gradients' way through a section too, but its input needs none.
    inputs = value.clone()
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        output = piece(inputs)
        if backward and output.requires_grad:
            output.sum().backward()
    return time.perf_counter() - started
