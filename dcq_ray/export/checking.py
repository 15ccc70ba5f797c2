"""Whether a student gives what its report says, and an exported file what its student gives, on the run's held-out images.

Two float32 programs for one network add in other orders. Over sums of thousands of terms and tens of layers that leaves about
1e-6 to 1e-5 of the largest logit, and one wrong weight, a BatchNorm left out or a channel's scale on its neighbour leaves far
more: the bound for every logit is 1e-4 of the largest. Where inputs of layers are quantized and other kernels run, a value
beside the middle of two levels may so come to the other one, a whole step away, as a few in a million do; there the bound is for
all logits together, 1e-2 of their root mean square. Files that run on the student's own kernels keep the first bound always.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dcq_ray.data import Part, ordered_batches
from dcq_ray.errors import ExportError
from dcq_ray.records import ValidationReport
from dcq_ray.validate import agreement, top_k

LARGEST_TOLERANCE = 1e-4
MEAN_SQUARE_TOLERANCE = 1e-2


def logits_of(run: Callable[[Tensor], Tensor], part: Part, batch_size: int) -> Tensor:
    """Logits [N, K] float32 of a part's images in order; `run` maps images [B, C, H, W] to logits [B, K]."""
    with torch.no_grad():
        return torch.cat([run(images).float().cpu() for images, _ in ordered_batches(part, batch_size)])


def check_logits(
    found: Tensor, student: Tensor, labels: Tensor | None, *, steps_may_differ: bool, source: str
) -> float:
    """The largest difference of a logit, as a share of the student's largest.

    Args:
        found: logits [N, K] of the exported file; `student`: of the student; on the same images, with labels [N] or None.
        steps_may_differ: the file runs on other kernels, and inputs of layers are quantized.

    Raises:
        ExportError: another top-1 (without labels: another prediction), or logits that differ by more than float32 noise.
    """
    if found.shape != student.shape:
        raise ExportError(f"{source}: got logits of shape {tuple(found.shape)}, expected {tuple(student.shape)}")
    name = "top-1" if labels is not None else "agreement with the student"
    scores = [agreement(logits, student) if labels is None else top_k(logits, labels, 1) for logits in (found, student)]
    if scores[0] != scores[1]:
        raise ExportError(
            f"{source}: got {name} {scores[0]:.4%} on {len(found)} held-out images, expected the student's {scores[1]:.4%}; "
            "the file is not kept; choose another format"
        )
    difference = (found.double() - student.double()).abs()
    largest = float(difference.max() / student.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    mean_square = float(difference.square().mean().sqrt() / student.double().square().mean().sqrt().clamp_min(1e-38))
    got, bound = (mean_square, MEAN_SQUARE_TOLERANCE) if steps_may_differ else (largest, LARGEST_TOLERANCE)
    # A comparison that NaN fails.
    if not got <= bound:
        kind = "root mean square" if steps_may_differ else "largest"
        raise ExportError(
            f"{source}: its logits differ from the student's by {got:.1e} of their {kind} on {len(found)} held-out images, "
            f"expected at most {bound:.0e}, which float32 explains; the file is not kept; choose another format"
        )
    return largest


def check_report(
    logits: Tensor, labels: Tensor | None, validation: ValidationReport, *, on_cpu: bool, source: str
) -> None:
    """Whether a student is on the held-out images what its report says.

    As many images may have turned as have their two greatest logits within each other's noise: none, mostly, where the run
    validated it on a processor as this one does, and a few where another kind of device did, with kernels of its own.

    Args:
        logits: of the student here [N, K], with labels [N] or None; `on_cpu`: the run had no other device.

    Raises:
        ExportError: other images, or another top-1 than the report's.
    """
    if len(logits) != validation.num_samples:
        raise ExportError(
            f"{source}: got {len(logits)} held-out images, expected the {validation.num_samples} of the report; the data set "
            "has changed since, or --set changes it; bring it back, or run the job again"
        )
    if labels is None or validation.top1 is None:
        return
    found = top_k(logits, labels, 1)
    noise = LARGEST_TOLERANCE * logits.abs().max() if on_cpu else MEAN_SQUARE_TOLERANCE * logits.square().mean().sqrt()
    greatest = logits.topk(min(2, logits.shape[1]), dim=1).values
    num_turned = round(abs(found - validation.top1) * len(logits))
    num_near = int((greatest[:, 0] - greatest[:, -1] <= 2 * noise).sum())
    if num_turned > num_near:
        raise ExportError(
            f"{source}: got top-1 {found:.4%} on {len(logits)} held-out images, expected the report's {validation.top1:.4%}; its "
            "images, their preprocessing or the network's code have changed since; bring them back, or run the job again"
        )
