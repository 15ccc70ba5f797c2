"""How each rival trains: a student from the teacher in so many steps at a learning rate.

A method knows neither budgets nor which rate is best.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcq_ray.data import Part, epoch_order, ordered_batches, view_images
from dcq_ray.losses import LossFunction, cross_entropy, distillation
from dcq_ray.phases import Network, RunSession, activation_memory_bytes, section_objective
from dcq_ray.phases.objective import objective_loss
from dcq_ray.phases.reduce import MAX_BATCHNORM_SAMPLES, untrained_student
from dcq_ray.phases.starting import num_start_samples
from dcq_ray.quantizers import fit_weights, put_quantizers
from dcq_ray.section import train_module
from dcq_ray.stitch import reestimate_batchnorm, stitch
from dcq_ray.validate import predict

# Of the loss on labels, beside the teacher's softened outputs: as Hinton et al. advise, a considerably lower weight.
LABEL_SHARE = 0.1
Report = Callable[[int, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One training of a rival: everything but the method."""

    session: RunSession
    network: Network
    device: torch.device
    judge: Callable[[nn.Module], float]
    """Scores a student on held-out images."""
    lr: float
    num_steps: int
    """Of the whole network; a method made of stages or sections says what it makes of them."""
    report: Report

    @property
    def batch_size(self) -> int:
        return min(self.session.context.job.train.batch_size, len(self.train))

    @property
    def train(self) -> Part:
        return self.session.prepared.splits.train


def dorefa(lesson: Lesson) -> nn.Module:
    """The whole network on labels, with cross-entropy."""
    labels = torch.from_numpy(lesson.train.labels)

    def target(_: Tensor, positions: np.ndarray) -> Tensor:
        return labels[positions]

    return _end_to_end(lesson, _untrained(lesson), lesson.num_steps, target, cross_entropy)


def distill(lesson: Lesson) -> nn.Module:
    """The whole network on the teacher's softened logits and, where there are labels, for a tenth of the loss on them."""
    return _end_to_end(lesson, _untrained(lesson), lesson.num_steps, _distillation_target(lesson), _mixed(lesson))


def hints(lesson: Lesson) -> nn.Module:
    """Half of the steps on the first sections alone, towards the teacher's middle boundary; then `distill` on the whole."""
    teacher_sections, middle = lesson.network.sections, (len(lesson.network.sections) + 1) // 2
    context, device = lesson.session.context, lesson.device
    student = nn.Sequential(*student_sections(lesson))
    objective = objective_loss(context, middle - 1, lesson.network, device)
    before = nn.Sequential(*teacher_sections[:middle]).to(device)
    ahead = [section.to(device) for section in teacher_sections[middle : middle + _num_ahead(lesson, middle - 1)]]
    labels = lesson.train.labels

    def hint(images: Tensor, positions: np.ndarray) -> tuple[Tensor, ...]:
        return _targets(before(images.clone()), ahead, section_objective(context, middle - 1).labels, labels, positions)

    # Whole epochs in the second half, so the first one takes what does not divide: no step of the budget is lost.
    epochs, steps_per_epoch = epochs_of(lesson, lesson.num_steps - lesson.num_steps // 2)
    first, rest = lesson.num_steps - epochs * steps_per_epoch, epochs * steps_per_epoch
    _train(lesson, student[:middle], (1, first), hint, objective, "hints, first half", after_epoch=None)
    trained = _end_to_end(lesson, student, rest, _distillation_target(lesson), _mixed(lesson))
    return _stitched(lesson, trained)


def sequential(lesson: Lesson) -> nn.Module:
    """Each section in turn, all with `num_steps`, on the outputs of the trained sections before it, as the job trains it."""
    session, device = lesson.session, lesson.device
    context, train = session.context, lesson.train
    sections = student_sections(lesson)
    # Where both networks' activations fit, each section runs once over the images and not in every step.
    widest = max(boundary.bytes_per_sample for boundary in context.plan.boundaries)
    needed = 4 * widest * 2 * len(train)
    kept = context.job.train.augment is None and needed <= activation_memory_bytes(context.job, device, num_at_once=1)
    ours = theirs = _all_images(lesson) if kept else None
    epochs, steps_per_epoch = epochs_of(lesson, lesson.num_steps)
    for index, section in enumerate(sections):
        teacher_section = lesson.network.sections[index].to(device)
        if theirs is not None:
            theirs = _through(teacher_section, theirs, context.job.data.batch_size, device)
        ahead = [part.to(device) for part in lesson.network.sections[index + 1 : index + 1 + _num_ahead(lesson, index)]]
        labels = section_objective(context, index).labels
        before, teacher_before = nn.Sequential(*sections[:index]), nn.Sequential(*lesson.network.sections[: index + 1])
        if context.job.train.start == "fitted":
            _fit_start(lesson, section, index, before)

        def pair(
            images: Tensor,
            positions: np.ndarray,
            *,
            before: nn.Module = before,
            teacher_before: nn.Module = teacher_before,
            ahead: list[Any] = ahead,
            labels: bool = labels,
            ours: Tensor | None = ours,
            theirs: Tensor | None = theirs,
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            rows = torch.from_numpy(positions)
            value = before(images.clone()) if ours is None else ours[rows].to(device)
            target = teacher_before(images.clone()) if theirs is None else theirs[rows].to(device)
            return value, _targets(target, ahead, labels, train.labels, positions)

        def batches(epoch: int, pair: Any = pair) -> Iterator[tuple[Tensor, Any]]:
            for images, positions in _image_batches(lesson, steps_per_epoch, epoch, images=not kept):
                # Not around the yield: the training that takes the batch would run without gradients, too.
                with torch.no_grad():
                    made = pair(images, positions)
                yield made

        train_module(
            section,
            batches,
            settings=context.job.train.model_copy(update={"lr": lesson.lr, "epochs": epochs}),
            steps_per_epoch=steps_per_epoch,
            loss=objective_loss(context, index, lesson.network, device),
            device=device,
            what=f"baseline sequential, section {index}",
            on_step=lesson.report,
        )
        if context.job.reduce.reestimate_batchnorm:
            reestimate_batchnorm(section, _first_inputs(lesson, before, ours), device)
        if ours is not None:
            ours = _through(section, ours, context.job.data.batch_size, device)
    return _stitched(lesson, nn.Sequential(*sections))


METHODS: dict[str, Callable[[Lesson], nn.Module]] = {
    "dorefa": dorefa,
    "distill": distill,
    "hints": hints,
    "sequential": sequential,
}


def epochs_of(lesson: Lesson, num_steps: int) -> tuple[int, int]:
    """So many steps as epochs, after which a student is scored: at most as many as the job has; and the steps of each."""
    epochs = max(1, min(lesson.session.context.job.train.epochs, num_steps))
    return epochs, num_steps // epochs


def student_sections(lesson: Lesson) -> list[GraphModule]:
    """The untrained student cut as the plan says; activation quantizers start as those of the whole student."""
    state = _untrained(lesson).state_dict()
    sections: list[GraphModule] = []
    for section in lesson.network.sections:
        module = copy.deepcopy(section).to(lesson.device)
        put_quantizers(module, lesson.session.context.plan.layers, trained=True)
        module.load_state_dict({name: state[name] for name in module.state_dict()})
        sections.append(module)
    return sections


def _fit_start(lesson: Lesson, section: GraphModule, index: int, before: nn.Module) -> None:
    """Fit a section's weights as the job has its sections begin, on the outputs of the trained sections before it."""
    job = lesson.session.context.job
    teacher_before = nn.Sequential(*lesson.network.sections[:index])
    num_samples = min(num_start_samples(lesson.session.context, index), len(lesson.train))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, num_samples, job.data.batch_size):
            positions = np.arange(begin, min(begin + job.data.batch_size, num_samples))
            images = lesson.train.images(positions).to(lesson.device)
            with torch.no_grad():
                yield before(images.clone()), teacher_before(images.clone())

    fit_weights(section, lesson.network.sections[index].to(lesson.device), pairs(), seed=job.seed)


def _untrained(lesson: Lesson) -> nn.Module:
    return untrained_student(lesson.session.context, lesson.network, lesson.train, lesson.device).to(lesson.device)


def _stitched(lesson: Lesson, sections: nn.Module) -> nn.Module:
    """The sections of a student as one network of the teacher's class."""
    states = [section.state_dict() for section in sections.children()]
    layers = lesson.session.context.plan.layers
    return stitch(lesson.network.teacher.module.to(lesson.device), layers, states)


def _end_to_end(
    lesson: Lesson, student: nn.Module, num_steps: int, target: Callable[..., Any], loss: LossFunction
) -> nn.Module:
    """Train a whole network; it ends as its best epoch by held-out images."""
    best: tuple[float, dict[str, Tensor]] | None = None

    def after_epoch(_: int) -> None:
        nonlocal best
        score = lesson.judge(student)
        if best is None or score >= best[0]:
            best = score, copy.deepcopy(student.state_dict())

    _train(lesson, student, epochs_of(lesson, num_steps), target, loss, "baseline", after_epoch=after_epoch)
    if best is not None:
        student.load_state_dict(best[1])
    return student


def _train(
    lesson: Lesson,
    module: nn.Module,
    epochs_and_steps: tuple[int, int],
    target: Callable[..., Any],
    loss: Callable[[Tensor, Any], Tensor],
    what: str,
    *,
    after_epoch: Callable[[int], None] | None,
) -> None:
    epochs, steps_per_epoch = epochs_and_steps
    if steps_per_epoch == 0:
        return

    def batches(epoch: int) -> Iterator[tuple[Tensor, Any]]:
        for images, positions in _image_batches(lesson, steps_per_epoch, epoch):
            with torch.no_grad():
                targets = target(images, positions)
            yield images, targets

    train_module(
        module,
        batches,
        settings=lesson.session.context.job.train.model_copy(update={"lr": lesson.lr, "epochs": epochs}),
        steps_per_epoch=steps_per_epoch,
        loss=loss,
        device=lesson.device,
        what=f"{what} at lr {lesson.lr:g}",
        on_step=lesson.report,
        after_epoch=after_epoch,
    )


def _image_batches(
    lesson: Lesson, steps_per_epoch: int, epoch: int, *, images: bool = True
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Images and their positions for the steps of an epoch, which may end within a pass over the train part."""
    job, train = lesson.session.context.job, lesson.train
    augment = job.train.augment
    flip, padding = (False, 0) if augment is None else (augment.flip, augment.crop_padding)
    steps_per_pass = len(train) // lesson.batch_size
    number = -1
    for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
        if step // steps_per_pass != number:
            number = step // steps_per_pass
            order = epoch_order(len(train), seed=job.seed, epoch=number)
        start = step % steps_per_pass * lesson.batch_size
        positions = order[start : start + lesson.batch_size]
        if images:
            value = view_images(train, positions, flip=flip, crop_padding=padding, seed=job.seed, epoch=number)
            yield value.to(lesson.device), positions
        else:
            yield torch.empty(0), positions


def _distillation_target(lesson: Lesson) -> Callable[[Tensor, np.ndarray], tuple[Tensor, ...]]:
    teacher = lesson.network.teacher.module.to(lesson.device)
    labels, known = lesson.train.labels, _teacher_logits(lesson)

    def target(images: Tensor, positions: np.ndarray) -> tuple[Tensor, ...]:
        logits = teacher(images.clone()) if known is None else known[positions]
        return (logits,) if labels is None else (logits, torch.from_numpy(labels[positions]))

    return target


def _teacher_logits(lesson: Lesson) -> Tensor | None:
    """The teacher's logits of all train images, where every image is seen more than once, as it is, and they fit."""
    context, train = lesson.session.context, lesson.train
    num_bytes = context.plan.boundaries[-1].bytes_per_sample * 2 * len(train)
    allowed = activation_memory_bytes(context.job, lesson.device, num_at_once=1)
    if context.job.train.augment is not None or context.job.train.epochs < 2 or num_bytes > allowed:
        return None
    images = (images for images, _ in ordered_batches(train, context.job.data.batch_size))
    return predict(lesson.network.teacher.module, images, lesson.device)


def _mixed(lesson: Lesson) -> LossFunction:
    soft = distillation(lesson.session.context.job.train.temperature)

    def loss(output: Tensor, target: Any) -> Tensor:
        logits, *labels = target
        if not labels:
            return soft(output, logits)
        return (1 - LABEL_SHARE) * soft(output, logits) + LABEL_SHARE * cross_entropy(output, labels[0])

    return loss


def _num_ahead(lesson: Lesson, index: int) -> int:
    return len(section_objective(lesson.session.context, index).loss_names) - 1


def _targets(
    value: Tensor, ahead: list[Any], labels: bool, all_labels: np.ndarray | None, positions: np.ndarray
) -> tuple[Tensor, ...]:
    """The teacher's boundaries from `value` on, through the sections ahead; the last one is the labels where asked for."""
    targets = [value]
    for section in ahead:
        targets.append(section(targets[-1].clone()))
    if labels:
        assert all_labels is not None
        targets[-1] = torch.from_numpy(all_labels[positions])
    return tuple(targets)


def _all_images(lesson: Lesson) -> Tensor:
    return torch.cat(
        [images for images, _ in ordered_batches(lesson.train, lesson.session.context.job.data.batch_size)]
    )


def _first_inputs(lesson: Lesson, before: nn.Module, ours: Tensor | None) -> Iterator[Tensor]:
    """What the trained sections before a section give it, on as many of the first train images as BatchNorm is estimated on."""
    batch_size = lesson.session.context.job.data.batch_size
    num_samples = min(len(lesson.train), MAX_BATCHNORM_SAMPLES)
    for start in range(0, num_samples, batch_size):
        positions = np.arange(start, min(start + batch_size, num_samples))
        if ours is not None:
            yield ours[torch.from_numpy(positions)]
        else:
            with torch.no_grad():
                value = before(lesson.train.images(positions).to(lesson.device))
            yield value


@torch.no_grad()
def _through(section: nn.Module, values: Tensor, batch_size: int, device: torch.device) -> Tensor:
    return torch.cat([section(part.clone().to(device)).cpu() for part in torch.split(values, batch_size)])
