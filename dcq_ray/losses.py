"""Losses of a batch's outputs against their targets: a section's on activations, a whole network's on labels or logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

LossFunction = Callable[[Tensor, Tensor], Tensor]

# Activations of an untrained network may fade to 1e-12; errors over such a norm have gradients that no float holds.
LEAST_MEAN_SQUARE = 1e-8
CHANNEL_VARIANCE_FLOOR = 1e-3


def nmse(output: Tensor, target: Tensor) -> Tensor:
    """Normalised mean squared error of a batch: sum (o - t)^2 / sum t^2; a mean t^2 below 1e-8 counts as 1e-8."""
    _same_shape(output, target)
    norm = target.square().sum().clamp_min(LEAST_MEAN_SQUARE * target.numel())
    return (output - target).square().sum() / norm


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a batch."""
    _same_shape(output, target)
    return functional.mse_loss(output, target)


def channel_nmse(output: Tensor, target: Tensor) -> Tensor:
    """Mean over channels (dimension 1) of sum (o - t)^2 / sum (t - mean t)^2, over batch and positions.

    So that a channel of small variance, which BatchNorm may well make large again, counts as much as any other. A channel
    whose variance is below a thousandth of the mean one counts as if it had that.
    """
    _same_shape(output, target)
    error = (output - target).square().transpose(0, 1).flatten(1).mean(1)
    variance = target.transpose(0, 1).flatten(1).var(1, correction=0)
    floor = (CHANNEL_VARIANCE_FLOOR * variance.mean()).clamp_min(LEAST_MEAN_SQUARE)
    return (error / variance.maximum(floor)).mean()


def cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of 1 - cos(o, t), each taken as one vector: blind to the size of the output."""
    _same_shape(output, target)
    return 1 - functional.cosine_similarity(output.flatten(1), target.flatten(1), dim=1).mean()


def attention(output: Tensor, target: Tensor) -> Tensor:
    """nmse plus the squared distance of the normalised attention maps, mean over samples.

    A map is the sum over channels of the squared activations (Zagoruyko and Komodakis 2016, arXiv 1612.03928, eq. 2, with
    p = 2). Maps alone would leave the channels free, so the error beside them ties them to the teacher's. What has no
    positions [N, C] has no map: nmse alone.
    """
    error = nmse(output, target)
    if output.ndim < 3:
        return error
    ours, theirs = (functional.normalize(value.square().sum(1).flatten(1), dim=1) for value in (output, target))
    return error + (ours - theirs).square().sum(1).mean()


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
    """The loss of that name in a job: nmse, channel-nmse, mse, cosine, attention, cross-entropy or distillation."""
    losses = {
        "nmse": nmse,
        "channel-nmse": channel_nmse,
        "mse": mse,
        "cosine": cosine,
        "attention": attention,
        "cross-entropy": cross_entropy,
        "distillation": distillation(temperature),
    }
    return losses[name]


def _same_shape(output: Tensor, target: Tensor) -> None:
    # Broadcasting would silently train towards something else.
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, its target {tuple(target.shape)}")
