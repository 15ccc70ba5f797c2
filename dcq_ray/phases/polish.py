"""Merge steps after stitching: BatchNorm re-estimated, a short end-to-end polish; each kept only where held-out images agree.

A local loss may fall while the network gets worse, so what was trained section by section is judged as a whole before
anything is written.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dcq_ray.data import Part, Splits, ordered_batches
from dcq_ray.digests import json_sha256, library_versions, tensors_sha256
from dcq_ray.errors import StorageError
from dcq_ray.losses import distillation
from dcq_ray.phases.checkpoints import Checkpoint, Effort, checkpoint_positions, newest_checkpoint, save_checkpoint
from dcq_ray.phases.context import Emit, Network, refuse_stale
from dcq_ray.phases.saving import Pace, SaveRequest
from dcq_ray.phases.views import images_of_view, num_views
from dcq_ray.records import MergeStep, Progress, RunContext
from dcq_ray.section import TrainingState, train_module
from dcq_ray.shards import sample_order
from dcq_ray.spec import TrainSpec
from dcq_ray.storage import Store, open_store
from dcq_ray.validate import agreement, predict, top_k

# The rate of the polish as a share of the sections': it starts from a network that already works.
POLISH_RATE_SHARE = 0.3
# The order of the polish is drawn as that of a section which no plan has.
POLISH_SECTION = 2**31
POLISH_FOLDER = "polish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Scores networks on held-out images: top-1, or where they have no labels the agreement with the teacher."""

    held_out: Part
    batch_size: int
    device: torch.device
    reference: Tensor | None
    """The teacher's logits; None where labels are there."""

    def __call__(self, module: nn.Module) -> float:
        images = (images for images, _ in ordered_batches(self.held_out, self.batch_size))
        return self.score(predict(module, images, self.device))

    def score(self, logits: Tensor) -> float:
        """Of logits [N, K] of all held-out images."""
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
    step = judged_step(name, score_before, judge(student), roll_back=roll_back)
    if not step.accepted:
        student.load_state_dict(earlier)
    return step


def judged_step(name: str, score_before: float, score_after: float, *, roll_back: bool) -> MergeStep:
    """A step of a merge, taken back where `roll_back` is on and it got worse."""
    accepted = not roll_back or score_after >= score_before
    return MergeStep(name=name, score_before=score_before, score_after=score_after, accepted=accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """What a polish gave."""

    step: MergeStep
    before: Effort
    """Of processes that began it, and were killed."""


def polish(
    context: RunContext,
    student: nn.Module,
    network: Network,
    splits: Splits,
    judge: Judge,
    *,
    emit: Emit,
    request: SaveRequest | None = None,
) -> Polished:
    """Train the stitched student end to end for `reduce.polish_epochs`, in place; it keeps its best epoch by the judge.

    The loss is the distillation from the teacher's logits (Hinton et al. 2015, arXiv 1503.02531), so images need no labels.
    With `reduce.roll_back` the student as it came counts as an epoch, too. It saves itself as sections do, and goes on from
    the newest whole checkpoint of a polish of this very student.

    Args:
        request: asked at every step whether somebody wants a checkpoint at once.
    """
    started, start_cpu_seconds = time.monotonic(), time.process_time()
    job, device = context.job, judge.device
    teacher = network.teacher.module.to(device)
    batch_size = min(job.train.batch_size, len(splits.train))
    steps_per_epoch = len(splits.train) // batch_size
    lr = POLISH_RATE_SHARE * job.train.lr if job.reduce.polish_lr is None else job.reduce.polish_lr
    settings = job.train.model_copy(update={"lr": lr, "epochs": job.reduce.polish_epochs})
    store = polish_store(context, student, splits, settings)

    def on_damage(told: str) -> None:
        emit(Progress(phase="reduce", detail=told))

    begun, name = newest_checkpoint(store, on_damage=on_damage)
    before = Effort() if begun is None else begun.effort
    scores = [] if begun is None else list(begun.held_out_top1s)
    score_before = judge(student)
    best_score = max([score_before if job.reduce.roll_back else -1.0, *scores])
    # Whole, with its metadata, by which a class such as MNASNet knows what it loads.
    best = copy.deepcopy(student.state_dict())
    improved = begun is not None and bool(begun.best)
    if begun is not None:
        best.update(begun.best)
        emit(Progress(phase="reduce", detail=f"polish, resumed after step {begun.training.num_steps}"))
    request, pace = SaveRequest() if request is None else request, Pace(job.storage.checkpoint_seconds)

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
        nonlocal best_score, best, improved
        score = judge(student)
        scores.append(score)
        if score > best_score:
            best_score, best, improved = score, copy.deepcopy(student.state_dict()), True

    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0:
            total = job.reduce.polish_epochs * steps_per_epoch
            emit(Progress(phase="reduce", done=step, total=total, unit="steps", loss=loss, detail="polish"))

    def on_state(training: TrainingState) -> None:
        nonlocal name
        if not (request.wanted or pace.due_after_epoch):
            return
        effort = Effort(
            seconds=before.seconds + time.monotonic() - started,
            cpu_seconds=before.cpu_seconds + time.process_time() - start_cpu_seconds,
            epoch=context.epoch,
        )
        state = Checkpoint(
            training=training, effort=effort, held_out_top1s=tuple(scores), best=best if improved else {}
        )
        with pace.saving():
            name = save_checkpoint(store, state, beside=name, check=lambda: refuse_stale(context))
        if request.wanted:
            request.answer()

    train_module(
        student,
        batches,
        settings=settings,
        steps_per_epoch=steps_per_epoch,
        start=None if begun is None else begun.training,
        loss=distillation(job.train.temperature),
        device=device,
        what="polish",
        on_step=on_step,
        after_epoch=after_epoch,
        on_state=on_state,
        state_due=lambda: request.wanted or pace.due,
    )
    student.load_state_dict(best)
    reached = max(scores, default=score_before)
    accepted = bool(scores) and best_score == reached
    step = MergeStep(name="polish", score_before=score_before, score_after=reached, accepted=accepted)
    return Polished(step=step, before=before)


def polish_store(context: RunContext, student: nn.Module, splits: Splits, settings: TrainSpec) -> Store:
    """The folder of the checkpoints of a student's polish, named by all that determines it."""
    job = context.job
    content = {
        "student": tensors_sha256(student.state_dict()),
        "teacher": context.plan.teacher_sha256,
        "train": splits.train.sha256,
        "held_out": splits.held_out.sha256,
        "data_batch_size": job.data.batch_size,
        "settings": settings.model_dump(mode="json"),
        "roll_back": job.reduce.roll_back,
        "seed": job.seed,
        "device": context.device,
        "versions": library_versions(),
    }
    return open_store(context.run_dir).child(POLISH_FOLDER, json_sha256(content)[:32])


def polish_reached(context: RunContext) -> int:
    """How far a run's newest checkpoint of a polish is, in steps; 0 where there is none, or that cannot be told."""
    store = open_store(context.run_dir).child(POLISH_FOLDER)
    with contextlib.suppress(StorageError):
        positions = [checkpoint_positions(store.child(name)) for name in store.list_names()]
        return max((position for found in positions for position in found), default=0)
    return 0


def remove_polish(store: Store) -> None:
    """Remove what polishes left in a run directory, whose student is written now; what cannot be removed harms nobody."""
    with contextlib.suppress(StorageError):
        store.child(POLISH_FOLDER).delete_tree()
