"""Validate: accuracy, agreement, and error at every boundary."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcq_ray.errors import DataError

M = TypeVar("M")
R = TypeVar("R")


def predict(module: nn.Module, batches: Iterable[Tensor], device: torch.device, *, num_at_once: int = 1) -> Tensor:
    """Logits [N, K], float32 on the CPU, of all batches [B, C, H, W]; the module's mode is put back.

    Args:
        num_at_once: as of `side_by_side`.
    """
    training = module.training
    module.to(device).eval()

    def logits_of(own: nn.Module, images: Tensor) -> Tensor:
        # Here, since it holds in a thread alone.
        with torch.no_grad():
            logits: Tensor = own(images.to(device)).float().cpu()
        return logits

    logits = list(side_by_side(logits_of, module, batches, num_at_once))
    module.train(training)
    if not logits:
        raise DataError("there are no images to validate on")
    return torch.cat(logits)


def side_by_side(
    function: Callable[[M, Tensor], R], modules: M, batches: Iterable[Tensor], num_at_once: int
) -> Iterator[R]:
    """What a function gives for some modules and each of the batches, in their order.

    Args:
        num_at_once: so many batches are computed beside each other, each with a copy of the modules and as many threads as this
            one has, so the results are the same; batches are taken one by one.
    """
    if num_at_once == 1:
        yield from (function(modules, images) for images in batches)
        return
    copies = [modules, *(copy.deepcopy(modules) for _ in range(num_at_once - 1))]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_at_once, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        waiting = iter(batches)
        while some := list(itertools.islice(waiting, num_at_once)):
            yield from pool.map(function, copies, some)


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """The fraction of rows [N, K] whose label [N] is among the k largest logits."""
    if len(logits) != len(labels):
        raise DataError(f"got {len(logits)} predictions for {len(labels)} labels")
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return float((best == labels.unsqueeze(1)).any(dim=1).double().mean())


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """The fraction of rows [N, K] on which both predict the same class."""
    return float((logits_a.argmax(dim=1) == logits_b.argmax(dim=1)).double().mean())


def divergence(logits: Tensor, reference: Tensor) -> float:
    """The mean over rows [N, K] of the Kullback-Leibler divergence KL(reference || logits) of their softmax, in nats, >= 0."""
    ours, theirs = (functional.log_softmax(value.double(), dim=1) for value in (logits, reference))
    return max(0.0, float(functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """A student beside its teacher on the same images."""

    logits: Tensor
    """Of the student, [N, K] float32 on the CPU."""
    reference: Tensor
    """Of the teacher."""
    boundary_errors: tuple[float, ...]
    """Relative error at boundaries 1 … n, the student on its own inputs: drift adds up."""


def compare(
    teacher_sections: Sequence[nn.Module],
    student_sections: Sequence[nn.Module],
    batches: Iterable[Tensor],
    device: torch.device,
    *,
    num_at_once: int = 1,
) -> Comparison:
    """Run both networks, cut alike and in eval mode, once over all batches; raises DataError where there are none.

    Args:
        num_at_once: as of `side_by_side`.
    """
    sums = [(0.0, 0.0)] * len(teacher_sections)
    logits, reference = [], []

    def compared(pairs: list[tuple[nn.Module, nn.Module]], images: Tensor) -> _Compared:
        squares = []
        # Here, since it holds in a thread alone.
        with torch.no_grad():
            ours, theirs = images.to(device), images.to(device)
            for teacher, student in pairs:
                # Clones: a section may work in place on its input.
                ours, theirs = student(ours.clone()), teacher(theirs.clone())
                squares.append(_squares(ours, theirs))
        return _Compared(logits=ours.float().cpu(), reference=theirs.float().cpu(), squares=squares)

    pairs = list(zip(teacher_sections, student_sections, strict=True))
    for batch in side_by_side(compared, pairs, batches, num_at_once):
        sums = [(total[0] + own[0], total[1] + own[1]) for total, own in zip(sums, batch.squares, strict=True)]
        logits.append(batch.logits)
        reference.append(batch.reference)
    if not logits:
        raise DataError("there are no images to validate on")
    return Comparison(
        logits=torch.cat(logits),
        reference=torch.cat(reference),
        boundary_errors=tuple(_ratio(*pair) for pair in sums),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compared:
    """Of a batch; squares: of the error and of the teacher's output at every section's end."""

    logits: Tensor
    reference: Tensor
    squares: list[tuple[float, float]]


def _squares(output: Tensor, target: Tensor) -> tuple[float, float]:
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, its target {tuple(target.shape)}")
    reference = target.double()
    return float((output.double() - reference).square().sum()), float(reference.square().sum())


def _ratio(error: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return math.sqrt(error / norm)
