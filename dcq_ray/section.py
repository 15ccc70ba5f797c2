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

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcq_ray.errors import SectionTrainingError
from dcq_ray.losses import LossFunction
from dcq_ray.records import LossPoint
from dcq_ray.spec import OptimizerSpec

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]

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
    loss: LossFunction,
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
    started = time.monotonic()
    module.to(device).eval().requires_grad_(False)
    parameters = {name: value for name, value in module.named_parameters() if value.is_floating_point()}
    total = settings.epochs * steps_per_epoch if parameters else 0
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    recorder = _Recorder(total, what, settings.lr, 1 if device.type == "cpu" else STEPS_BETWEEN_GPU_READS)
    num_sample_passes, wait_seconds, seconds_before, step = 0, 0.0, 0.0, 0

    def state() -> TrainingState:
        recorder.read()
        return TrainingState(
            num_steps=step,
            num_sample_passes=num_sample_passes,
            module=_copies(module.state_dict()),
            optimizer=_copies(_optimizer_state(optimizer, parameters)),
            losses=tuple(recorder.losses),
            seconds=seconds_before + time.monotonic() - started,
            input_wait_seconds=wait_seconds,
        )

    if total:
        optimizer = _optimizer(list(parameters.values()), settings)
        if start is not None:
            _refuse_foreign(start, module, steps_per_epoch, total, what)
            module.load_state_dict(start.module)
            _load_optimizer_state(optimizer, parameters, start.optimizer)
            recorder.losses.extend(start.losses)
            step, num_sample_passes = start.num_steps, start.num_sample_passes
            seconds_before, wait_seconds = start.seconds, start.input_wait_seconds
        for epoch in range(step // steps_per_epoch, settings.epochs):
            _train_mode(module)
            waiting = time.monotonic()
            # What is left of an epoch that was begun: its first batches are made again and passed over.
            for inputs, targets in islice(batches(epoch), step - epoch * steps_per_epoch, None):
                wait_seconds += time.monotonic() - waiting
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate_factor(settings.schedule, step, total, warmup_steps)
                value = loss(module(inputs.to(device)), targets.to(device))
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                num_sample_passes += len(inputs)
                recorder.take(step, value.detach())
                if on_step is not None:
                    on_step(step, recorder.latest)
                if on_state is not None and state_due is not None and step % steps_per_epoch and state_due():
                    on_state(state())
                waiting = time.monotonic()
            if step != (epoch + 1) * steps_per_epoch:
                raise ValueError(
                    f"{what}: epoch {epoch} ended after {step} steps, expected {(epoch + 1) * steps_per_epoch}"
                )
            module.eval()
            if after_epoch is not None:
                after_epoch(epoch)
            if on_state is not None:
                on_state(state())
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
        seconds=seconds_before + time.monotonic() - started,
        input_wait_seconds=wait_seconds,
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


def _refuse_foreign(start: TrainingState, module: nn.Module, steps_per_epoch: int, total: int, what: str) -> None:
    ours = {name: value.shape for name, value in module.state_dict().items()}
    theirs = {name: value.shape for name, value in start.module.items()}
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(f"{what}: the state to start from is not of this module: {', '.join(differing[:5])} differ")
    if not 0 <= start.num_steps <= total or len(start.losses) != start.num_steps:
        raise ValueError(
            f"{what}: got a state after {start.num_steps} steps with {len(start.losses)} losses, expected as many losses as "
            f"steps, and at most {total} of them in epochs of {steps_per_epoch}"
        )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


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
