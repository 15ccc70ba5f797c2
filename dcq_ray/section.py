"""Train a module: batches of (input, target) in, a result out.

The one training loop: for a section, for the teacher's fit, for a rival. It knows neither where batches come from nor what
is trained, and draws no random numbers, so the same batches give the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dcq_ray.errors import SectionTrainingError
from dcq_ray.records import LossPoint
from dcq_ray.spec import OptimizerSpec

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
LossFunction = Callable[[Tensor, Tensor], Tensor]

MAX_LOSS_POINTS = 200
# Reading a loss waits for the GPU, so there it is read once in so many steps.
STEPS_BETWEEN_GPU_READS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """How a training went."""

    initial_loss: float | None
    """Of the first step, before any update; None where no step was taken."""
    final_loss: float | None
    """Mean of the last epoch."""
    num_steps: int
    num_sample_passes: int
    seconds: float
    input_wait_seconds: float
    loss_curve: tuple[LossPoint, ...]


def nmse(output: Tensor, target: Tensor) -> Tensor:
    """Normalised mean squared error of a batch: sum (o - t)^2 / sum t^2; an all-zero target divides by the least float."""
    _same_shape(output, target)
    norm = target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)
    return (output - target).square().sum() / norm


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a batch."""
    _same_shape(output, target)
    return functional.mse_loss(output, target)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits [N, K] on labels [N], int64."""
    return functional.cross_entropy(output, target)


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


def train_module(
    module: nn.Module,
    batches: Batches,
    *,
    settings: OptimizerSpec,
    steps_per_epoch: int,
    loss: LossFunction,
    device: torch.device,
    what: str,
    on_step: Callable[[int, float], None] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Train a module in place; it ends in eval mode, with gradients off.

    BatchNorm trains on batch statistics; everything else, dropout above all, stays in eval mode, since the targets were made
    so. A module without parameters is left as it is, after no step.

    Args:
        batches: epoch -> batches of (input [B, ...], target); as many as `steps_per_epoch`.
        what: the name of the module in errors, such as `section 3`.
        on_step: called with the number of steps taken and the latest known loss.
        after_epoch: called with the epoch's number, the module in eval mode.

    Raises:
        SectionTrainingError: a loss or a weight is not finite.
        ValueError: batches gave another number of steps.
    """
    started = time.monotonic()
    module.to(device).eval().requires_grad_(False)
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    total = settings.epochs * steps_per_epoch if parameters else 0
    for parameter in parameters:
        parameter.requires_grad_(True)
    recorder = _Recorder(total, what, settings.lr, 1 if device.type == "cpu" else STEPS_BETWEEN_GPU_READS)
    num_sample_passes, wait_seconds, step = 0, 0.0, 0
    if total:
        optimizer = _optimizer(parameters, settings)
        for epoch in range(settings.epochs):
            _train_mode(module)
            waiting = time.monotonic()
            for inputs, targets in batches(epoch):
                wait_seconds += time.monotonic() - waiting
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate_factor(settings.schedule, step, total)
                value = loss(module(inputs.to(device)), targets.to(device))
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                num_sample_passes += len(inputs)
                recorder.take(step, value.detach())
                if on_step is not None:
                    on_step(step, recorder.latest)
                waiting = time.monotonic()
            if step != (epoch + 1) * steps_per_epoch:
                raise ValueError(
                    f"{what}: epoch {epoch} ended after {step} steps, expected {(epoch + 1) * steps_per_epoch}"
                )
            module.eval()
            if after_epoch is not None:
                after_epoch(epoch)
        recorder.read()
    module.eval().requires_grad_(False)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SectionTrainingError(
                f"{what}: {name} is not finite after {step} steps; lower the learning rate (now {settings.lr:g})"
            )
    losses = recorder.losses
    return TrainingResult(
        initial_loss=losses[0] if losses else None,
        final_loss=math.fsum(losses[-steps_per_epoch:]) / steps_per_epoch if losses else None,
        num_steps=step,
        num_sample_passes=num_sample_passes,
        seconds=time.monotonic() - started,
        input_wait_seconds=wait_seconds,
        loss_curve=_curve(losses),
    )


def rate_factor(schedule: str, step: int, total: int) -> float:
    """The share of the peak learning rate at a step (from 0) of so many.

    cosine: half a period to zero (SGDR without restarts, arXiv 1608.03983, eq. 5); step: a tenth after one half, a
    hundredth after three quarters; constant: 1.
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / total))
    if schedule == "step":
        return 1.0 if 2 * step < total else 0.1 if 4 * step < 3 * total else 0.01
    return 1.0


class _Recorder:
    """Collects losses, reads them from the device now and then, and refuses what is not finite."""

    def __init__(self, total: int, what: str, lr: float, steps_between_reads: int) -> None:
        self.losses: list[float] = []
        self._unread: list[Tensor] = []
        self._total, self._what, self._lr, self._pause = total, what, lr, steps_between_reads

    @property
    def latest(self) -> float:
        return self.losses[-1] if self.losses else math.nan

    def take(self, step: int, loss: Tensor) -> None:
        self._unread.append(loss)
        if len(self._unread) >= self._pause or step in (1, self._total):
            self.read()

    def read(self) -> None:
        if not self._unread:
            return
        for value in torch.stack(self._unread).tolist():
            self.losses.append(value)
            if not math.isfinite(value):
                raise SectionTrainingError(
                    f"{self._what}: the loss is {value} at step {len(self.losses)} of {self._total}; lower the learning "
                    f"rate (now {self._lr:g}), or look for extreme values in the data"
                )
        self._unread.clear()


def _optimizer(parameters: list[nn.Parameter], settings: OptimizerSpec) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay, foreach=True)
    return torch.optim.SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True
    )


def _train_mode(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.train()


def _curve(losses: list[float]) -> tuple[LossPoint, ...]:
    """The losses as at most MAX_LOSS_POINTS means over neighbouring steps."""

    def points() -> Iterator[LossPoint]:
        width = -(-len(losses) // MAX_LOSS_POINTS)
        for start in range(0, len(losses), width):
            part = losses[start : start + width]
            yield LossPoint(step=start + len(part), loss=math.fsum(part) / len(part))

    return tuple(points()) if losses else ()


def _same_shape(output: Tensor, target: Tensor) -> None:
    # Broadcasting would silently train towards something else.
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, its target {tuple(target.shape)}")
