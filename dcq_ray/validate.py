"""Validate: accuracy, agreement, and error at every boundary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dcq_ray.errors import DataError


def predict(module: nn.Module, batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Logits [N, K], float32 on the CPU, of all batches [B, C, H, W]; the module's mode is put back."""
    training = module.training
    module.to(device).eval()
    with torch.no_grad():
        logits = [module(images.to(device)).float().cpu() for images in batches]
    module.train(training)
    if not logits:
        raise DataError("there are no images to validate on")
    return torch.cat(logits)


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """The fraction of rows [N, K] whose label [N] is among the k largest logits."""
    if len(logits) != len(labels):
        raise DataError(f"got {len(logits)} predictions for {len(labels)} labels")
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return float((best == labels.unsqueeze(1)).any(dim=1).double().mean())


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """The fraction of rows [N, K] on which both predict the same class."""
    return float((logits_a.argmax(dim=1) == logits_b.argmax(dim=1)).double().mean())


def boundary_errors(
    teacher_sections: Sequence[nn.Module],
    student_sections: Sequence[nn.Module],
    batches: Iterable[Tensor],
    device: torch.device,
) -> tuple[float, ...]:
    """Relative error at boundaries 1 … n over all batches, the student on its own inputs: drift adds up."""
    sums = [(0.0, 0.0)] * len(teacher_sections)
    with torch.no_grad():
        for images in batches:
            ours, theirs = images.to(device), images.to(device)
            for index, (teacher, student) in enumerate(zip(teacher_sections, student_sections, strict=True)):
                # Clones: a section may work in place on its input.
                ours, theirs = student(ours.clone()), teacher(theirs.clone())
                error, norm = _squares(ours, theirs)
                sums[index] = (sums[index][0] + error, sums[index][1] + norm)
    return tuple(_ratio(*pair) for pair in sums)


def _squares(output: Tensor, target: Tensor) -> tuple[float, float]:
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, its target {tuple(target.shape)}")
    reference = target.double()
    return float((output.double() - reference).square().sum()), float(reference.square().sum())


def _ratio(error: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return math.sqrt(error / norm)
