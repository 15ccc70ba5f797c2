"""Losses of a batch's outputs against their targets: a section's on activations, a whole network's on labels or logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

LossFunction = Callable[[Tensor, Tensor], Tensor]

# Activations of an untrained network may fade to 1e-12; errors over such a norm have gradients that no float holds.
LEAST_MEAN_SQUARE = 1e-8


def nmse(output: Tensor, target: Tensor) -> Tensor:
    """Normalised mean squared error of a batch: sum (o - t)^2 / sum t^2; a mean t^2 below 1e-8 counts as 1e-8."""
    _same_shape(output, target)
    norm = target.square().sum().clamp_min(LEAST_MEAN_SQUARE * target.numel())
    return (output - target).square().sum() / norm


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a batch."""
    _same_shape(output, target)
    return functional.mse_loss(output, target)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits [N, K] on labels [N], int64."""
    return functional.cross_entropy(output, target)


def smoothed_cross_entropy(label_smoothing: float) -> LossFunction:
    """Cross-entropy of logits [N, K] on (1 - s) times the label [N] plus s / K on every class.

    Szegedy et al. 2015 (arXiv 1512.00567, section 7); s in [0, 1), and 0 is plain cross-entropy.
    """

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, label_smoothing=label_smoothing)

    return loss


def distillation(temperature: float) -> LossFunction:
    """KL divergence from the teacher's softened outputs, times temperature^2 (Hinton et al. 2015, arXiv 1503.02531)."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        _same_shape(output, target)
        log_student = functional.log_softmax(output / temperature, dim=1)
        log_teacher = functional.log_softmax(target / temperature, dim=1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return divergence * temperature**2

    return loss


def loss_function(name: str, *, temperature: float) -> LossFunction:
    """The loss of that name: nmse, mse, cross-entropy or distillation."""
    losses = {"nmse": nmse, "mse": mse, "cross-entropy": cross_entropy, "distillation": distillation(temperature)}
    return losses[name]


def _same_shape(output: Tensor, target: Tensor) -> None:
    # Broadcasting would silently train towards something else.
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, its target {tuple(target.shape)}")
