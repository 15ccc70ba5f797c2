"""Merge steps after stitching: BatchNorm re-estimated, a short end-to-end polish; each kept only where held-out images agree.

A local loss may fall while the network gets worse, so what was trained section by section is judged as a whole before
anything is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dcq_ray.data import Part, Splits, ordered_batches
from dcq_ray.losses import distillation
from dcq_ray.phases.context import Emit, Network
from dcq_ray.phases.views import images_of_view, num_views
from dcq_ray.records import MergeStep, Progress, RunContext
from dcq_ray.section import train_module
from dcq_ray.shards import sample_order
from dcq_ray.validate import agreement, predict, top_k

# The rate of the polish as a share of the sections': it starts from a network that already works.
POLISH_RATE_SHARE = 0.3
# The order of the polish is drawn as that of a section which no plan has.
POLISH_SECTION = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Scores networks on held-out images: top-1, or where they have no labels the agreement with the teacher."""

    held_out: Part
    batch_size: int
    device: torch.device
    reference: Tensor | None
    """The teacher's logits; None where labels are there."""

    def __call__(self, module: nn.Module) -> float:
        logits = predict(module, (images for images, _ in ordered_batches(self.held_out, self.batch_size)), self.device)
        if self.reference is not None:
            return agreement(logits, self.reference)
        assert self.held_out.labels is not None
        return top_k(logits, torch.from_numpy(self.held_out.labels), 1)


def judge_of(context: RunContext, network: Network, held_out: Part, device: torch.device) -> Judge:
    """The judge of a run's merge steps."""
    batch_size, reference = context.job.data.batch_size, None
    if held_out.labels is None:
        teacher = network.teacher.module.to(device)
        reference = predict(teacher, (images for images, _ in ordered_batches(held_out, batch_size)), device)
    return Judge(held_out=held_out, batch_size=batch_size, device=device, reference=reference)


def attempt_step(
    name: str, student: nn.Module, change: Callable[[], None], judge: Judge, *, roll_back: bool
) -> MergeStep:
    """Change the student in place and score it; where `roll_back` is on and it got worse, put it back."""
    # Whole, with its metadata, by which a class such as MNASNet knows what it loads.
    earlier = copy.deepcopy(student.state_dict())
    score_before = judge(student)
    change()
    score_after = judge(student)
    accepted = not roll_back or score_after >= score_before
    if not accepted:
        student.load_state_dict(earlier)
    return MergeStep(name=name, score_before=score_before, score_after=score_after, accepted=accepted)


def polish(
    context: RunContext, student: nn.Module, network: Network, splits: Splits, judge: Judge, *, emit: Emit
) -> MergeStep:
    """Train the stitched student end to end for `reduce.polish_epochs`, in place; it keeps its best epoch by the judge.

    The loss is the distillation from the teacher's logits (Hinton et al. 2015, arXiv 1503.02531), so images need no labels.
    With `reduce.roll_back` the student as it came counts as an epoch, too.
    """
    job, device = context.job, judge.device
    teacher = network.teacher.module.to(device)
    batch_size = min(job.train.batch_size, len(splits.train))
    steps_per_epoch = len(splits.train) // batch_size
    lr = POLISH_RATE_SHARE * job.train.lr if job.reduce.polish_lr is None else job.reduce.polish_lr
    score_before = judge(student)
    best_score = score_before if job.reduce.roll_back else -1.0
    best = copy.deepcopy(student.state_dict())
    scores = []

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        num_samples = len(splits.train)
        order = sample_order(num_samples, window=num_samples, seed=job.seed, section=POLISH_SECTION, epoch=epoch)
        view = None if job.train.augment is None else epoch % num_views(job)
        for step in range(steps_per_epoch):
            # In the part's order within a batch, as a data set on disk likes it; a sum over the batch does not mind.
            positions = np.sort(order[step * batch_size : (step + 1) * batch_size])
            images = images_of_view(context, splits, positions, view).to(device)
            with torch.no_grad():
                logits = teacher(images.clone())
            yield images, logits

    def after_epoch(_: int) -> None:
        nonlocal best_score, best
        score = judge(student)
        scores.append(score)
        if score > best_score:
            best_score, best = score, copy.deepcopy(student.state_dict())

    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0:
            total = job.reduce.polish_epochs * steps_per_epoch
            emit(Progress(phase="reduce", done=step, total=total, unit="steps", loss=loss, detail="polish"))

    train_module(
        student,
        batches,
        settings=job.train.model_copy(update={"lr": lr, "epochs": job.reduce.polish_epochs}),
        steps_per_epoch=steps_per_epoch,
        loss=distillation(job.train.temperature),
        device=device,
        what="polish",
        on_step=on_step,
        after_epoch=after_epoch,
    )
    student.load_state_dict(best)
    reached = max(scores, default=score_before)
    accepted = bool(scores) and best_score == reached
    return MergeStep(name="polish", score_before=score_before, score_after=reached, accepted=accepted)
