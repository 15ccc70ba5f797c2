"""Train a module: batches of (input, target) in, a result out.

The one training loop: for a section, for the teacher's fit, for a rival. It knows neither where batches come from nor what
is trained, and draws no random numbers, so the same batches give the same weights, also from a `TrainingState` on. Where
states are kept is the caller's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcq_ray.errors import SectionTrainingError
from dcq_ray.records import LossPoint
from dcq_ray.spec import OptimizerSpec

Batches = Callable[[int], Iterable[tuple[Tensor, Any]]]
"""Epoch -> its batches of (input, target); a target is a tensor, or a tuple of them, as the loss wants it."""

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingState:
    """A training after some of its steps: all that the same module, settings and batches need to go on from there.

    Tensors are copies on the CPU.
    """

    num_steps: int
    num_sample_passes: int
    module: Mapping[str, Tensor]
    """The module's state_dict, BatchNorm's statistics included."""
    optimizer: Mapping[str, Tensor]
    """`SLOT.PARAMETER` -> tensor, such as `exp_avg.conv1.weight`."""
    losses: tuple[float, ...]
    """Of every step."""
    seconds: float
    """Spent so far, by every process that took part."""
    input_wait_seconds: float


def train_module(
    module: nn.Module,
    batches: Batches,
    *,
    settings: OptimizerSpec,
    steps_per_epoch: int,
    loss: Callable[[Tensor, Any], Tensor],
    device: torch.device,
    what: str,
    warmup_steps: int = 0,
    start: TrainingState | None = None,
    on_step: Callable[[int, float], None] | None = None,
    after_epoch: Callable[[int], None] | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
    state_due: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train a module in place; it ends in eval mode, with gradients off.

    BatchNorm trains on batch statistics; everything else, dropout above all, stays in eval mode, since the targets were made
    so. A module without parameters is left as it is, after no step.

    Args:
        batches: epoch -> batches of (input [B, ...], target); as many as `steps_per_epoch`.
        what: the name of the module in errors, such as `section 3`.
        warmup_steps: see `rate_factor`.
        start: go on from this state of the same training; epochs that it has behind it are not asked for.
        on_step: called with the number of steps taken and the latest known loss.
        after_epoch: called with the epoch's number, the module in eval mode.
        on_state: called with the state after every epoch (after `after_epoch`), and after steps at which `state_due` holds.

    Raises:
        SectionTrainingError: a loss or a weight is not finite.
        ValueError: batches gave another number of steps; `start` is not of this module, or beyond the last step.
    """
    training = Training(
        module,
        settings=settings,
        num_steps=settings.epochs * steps_per_epoch,
        loss=loss,
        device=device,
        what=what,
        warmup_steps=warmup_steps,
        start=start,
    )
    if training.total:
        for epoch in range(training.num_steps // steps_per_epoch, settings.epochs):
            training.train()
            waiting = time.monotonic()
            # What is left of an epoch that was begun: its first batches are made again and passed over.
            for inputs, targets in islice(batches(epoch), training.num_steps - epoch * steps_per_epoch, None):
                training.wait_seconds += time.monotonic() - waiting
                training.step(inputs, targets)
                if on_step is not None:
                    on_step(training.num_steps, training.latest_loss)
                if (
                    on_state is not None
                    and state_due is not None
                    and training.num_steps % steps_per_epoch
                    and state_due()
                ):
                    on_state(training.state())
                waiting = time.monotonic()
            expected = (epoch + 1) * steps_per_epoch
            if training.num_steps != expected:
                raise ValueError(f"{what}: epoch {epoch} ended after {training.num_steps} steps, expected {expected}")
            module.eval()
            if after_epoch is not None:
                after_epoch(epoch)
            if on_state is not None:
                on_state(training.state())
    return training.finish(steps_per_epoch)


class Training:
    """One training, a step at a time: for callers that make a step's batch from what other trainings gave.

    A module without parameters takes no step: `total` is 0.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        settings: OptimizerSpec,
        num_steps: int,
        loss: Callable[[Tensor, Any], Tensor],
        device: torch.device,
        what: str,
        warmup_steps: int = 0,
        start: TrainingState | None = None,
    ) -> None:
        """Arguments as of `train_module`, which it is made of; `num_steps`: of the whole training."""
        self._started = time.monotonic()
        self._module, self._settings, self._loss = module, settings, loss
        self._device, self._what, self._warmup_steps = device, what, warmup_steps
        module.to(device).eval().requires_grad_(False)
        self._parameters = {name: value for name, value in module.named_parameters() if value.is_floating_point()}
        self.total = num_steps if self._parameters else 0
        self.num_steps = self.num_sample_passes = 0
        self.wait_seconds = self._seconds_before = 0.0
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        pause = 1 if device.type == "cpu" else STEPS_BETWEEN_GPU_READS
        self._recorder = _Recorder(self.total, what, settings.lr, pause)
        if start is not None:
            _refuse_foreign(start, module, self.total, what)
            # Into the module's own, which carries the metadata by which a class such as MNASNet knows what it loads.
            state = module.state_dict()
            state.update(start.module)
            module.load_state_dict(state)
        if not self.total:
            return
        self._optimizer = _optimizer(list(self._parameters.values()), settings)
        if start is not None:
            _load_optimizer_state(self._optimizer, self._parameters, start.optimizer)
            self._recorder.losses.extend(start.losses)
            self.num_steps, self.num_sample_passes = start.num_steps, start.num_sample_passes
            self._seconds_before, self.wait_seconds = start.seconds, start.input_wait_seconds

    @property
    def latest_loss(self) -> float:
        """The latest loss that was read from the device; NaN before the first."""
        return self._recorder.latest

    def train(self) -> None:
        """Put BatchNorm on batch statistics; everything else stays in eval mode."""
        batch_statistics(self._module)

    def step(self, inputs: Tensor, targets: Any) -> Tensor:
        """Take one step and return the output that it was made from, detached; raises SectionTrainingError."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * rate_factor(
                self._settings.schedule, self.num_steps, self.total, self._warmup_steps
            )
        output: Tensor = self._module(inputs.to(self._device))
        value = self._loss(output, _on(self._device, targets))
        self._optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.num_steps += 1
        self.num_sample_passes += len(inputs)
        self._recorder.take(self.num_steps, value.detach())
        return output.detach()

    def state(self) -> TrainingState:
        """All that is needed to go on from here."""
        self._recorder.read()
        return TrainingState(
            num_steps=self.num_steps,
            num_sample_passes=self.num_sample_passes,
            module=_copies(self._module.state_dict()),
            optimizer=_copies(_optimizer_state(self._optimizer, self._parameters)) if self.total else {},
            losses=tuple(self._recorder.losses),
            seconds=self._seconds_before + time.monotonic() - self._started,
            input_wait_seconds=self.wait_seconds,
        )

    def finish(self, steps_per_epoch: int) -> TrainingResult:
        """Put the module into eval mode, gradients off, and say how it went; the last epoch's mean is the final loss.

        Raises:
            SectionTrainingError: a loss or a weight is not finite.
        """
        self._recorder.read()
        self._module.eval().requires_grad_(False)
        for name, tensor in self._module.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise SectionTrainingError(
                    f"{self._what}: {name} is not finite after {self.num_steps} steps; lower the learning rate (now "
                    f"{self._settings.lr:g})"
                )
        losses = self._recorder.losses
        return TrainingResult(
            initial_loss=losses[0] if losses else None,
            final_loss=math.fsum(losses[-steps_per_epoch:]) / steps_per_epoch if losses else None,
            num_steps=self.num_steps,
            num_sample_passes=self.num_sample_passes,
            seconds=self._seconds_before + time.monotonic() - self._started,
            input_wait_seconds=self.wait_seconds,
            loss_curve=_curve(losses),
        )


def rate_factor(schedule: str, step: int, total: int, warmup_steps: int = 0) -> float:
    """The share of the peak learning rate at a step (from 0) of so many.

    It rises in equal parts to 1 over `warmup_steps` (Goyal et al. 2017, arXiv 1706.02677, section 2.2); over the rest it
    follows the schedule. cosine: half a period to zero (SGDR without restarts, arXiv 1608.03983, eq. 5); step: a tenth after
    one half, a hundredth after three quarters; constant: 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    step, total = step - warmup_steps, total - warmup_steps
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


def load_optimizers() -> None:
    """Load what a process's first optimizer loads, torch's compiler: more than a second that is no training's."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])


def _optimizer(parameters: list[nn.Parameter], settings: OptimizerSpec) -> torch.optim.Optimizer:
    # Decay is for what multiplies: biases, BatchNorm's parameters and quantizers' scales, all of fewer than two dimensions,
    # go without (He et al. 2018, arXiv 1812.01187, section 3.1).
    groups = [
        {"params": [value for value in parameters if value.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.lr, foreach=True)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, foreach=True)


def _optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """An optimizer's tensors as `SLOT.PARAMETER`; slots' names have no dots."""
    return {
        f"{slot}.{name}": value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    for key, value in state.items():
        slot, _, name = key.partition(".")
        parameter = parameters[name]
        # Adam counts its steps on the CPU, wherever the parameter is.
        device = value.device if slot == "step" else parameter.device
        optimizer.state[parameter][slot] = value.to(device, copy=True)


def _refuse_foreign(start: TrainingState, module: nn.Module, total: int, what: str) -> None:
    ours = {name: value.shape for name, value in module.state_dict().items()}
    theirs = {name: value.shape for name, value in start.module.items()}
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(f"{what}: the state to start from is not of this module: {', '.join(differing[:5])} differ")
    if not 0 <= start.num_steps <= total or len(start.losses) != start.num_steps:
        raise ValueError(
            f"{what}: got a state after {start.num_steps} steps with {len(start.losses)} losses, expected as many losses as "
            f"steps, and at most {total} of them"
        )


def _on(device: torch.device, targets: Any) -> Any:
    return tuple(part.to(device) for part in targets) if isinstance(targets, tuple) else targets.to(device)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def batch_statistics(module: nn.Module) -> None:
    """Put BatchNorm on batch statistics, as in training; everything else stays in its mode."""
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
