"""Fit: train or fine-tune the full-precision teacher on the train part, keep the best by held-out accuracy.

A fitted teacher lies in the cache under the digest of all that determines it, so that it is fitted once. Until then its
checkpoints lie in a folder of that name, and a fit that was killed goes on from the newest whole one to the very same
teacher.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data import Splits, augmented_batches, ordered_batches
from dcq_ray.digests import json_sha256, library_versions
from dcq_ray.errors import StorageError, TeacherError
from dcq_ray.losses import smoothed_cross_entropy
from dcq_ray.partition import prefix_digests, trace_teacher
from dcq_ray.phases.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from dcq_ray.phases.context import WEIGHTS_FILE, Emit, save_teacher, teacher_store
from dcq_ray.records import Progress, seal_json, unseal_json
from dcq_ray.section import TrainingState, train_module
from dcq_ray.spec import Job
from dcq_ray.storage import Store, hold_boundary
from dcq_ray.teacher import Teacher, frozen_teacher, load_state, state_from_bytes
from dcq_ray.validate import predict, top_k

SECONDS_BETWEEN_REPORTS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The commit mark of a fitted teacher."""

    teacher_sha256: str
    best_epoch: int
    held_out_top1: float
    """Of the best epoch."""
    held_out_top1s: tuple[float, ...]
    """Of every epoch."""
    seconds: float


def fit_teacher(
    job: Job, teacher: Teacher, splits: Splits, cache: Store, *, device: torch.device, emit: Emit
) -> Teacher:
    """Train a copy of the teacher with cross-entropy as `teacher.fit` says; the best epoch by held-out top-1 is kept.

    Goes on from the newest whole checkpoint; where another process fits the same teacher, waits for it.

    Raises:
        TeacherError: the images have no labels.
        SectionTrainingError: a loss or a weight is not finite.
    """
    if splits.train.labels is None or splits.held_out.labels is None:
        raise TeacherError(
            "teacher.fit needs labels, but the train images have none; give labels, or fit: null with weights"
        )
    key = fit_key(job, teacher, splits, device)
    store = cache.child("fits", key)

    def on_wait(who: str) -> None:
        emit(Progress(phase="teacher", state="waiting", detail=who))

    found = _kept_teacher(key, teacher, cache)
    # A fit that was killed right after its commit leaves checkpoints too.
    if found is None or store.list_names():
        with hold_boundary(store, owner="a process that fits this teacher", on_wait=on_wait):
            # Whoever held it may have finished.
            found = _kept_teacher(key, teacher, cache)
            fitted = _fit(job, teacher, splits, cache, key, device=device, emit=emit) if found is None else found
            # What cannot be removed harms nobody: the result counts now.
            with contextlib.suppress(StorageError):
                store.delete_tree()
        if found is None:
            return fitted
    emit(Progress(phase="teacher", state="reused", detail="fitted by an earlier run"))
    return found


def fit_key(job: Job, teacher: Teacher, splits: Splits, device: torch.device) -> str:
    """Digest of all that determines a fitted teacher."""
    assert job.teacher.fit is not None
    return json_sha256(
        {
            # The traced code too: another network may start from the very same tensors.
            "network": prefix_digests(trace_teacher(teacher.module, splits.train.images(np.arange(2))), ())[-1],
            "fit": job.teacher.fit.model_dump(mode="json"),
            "train": splits.train.sha256,
            "held_out": splits.held_out.sha256,
            # Of the held-out images: other batches may give other last digits, and so another best epoch.
            "batch_size": job.data.batch_size,
            "seed": job.seed,
            "num_threads": job.train.num_threads,
            "device": device.type,
            "versions": library_versions(),
        }
    )


def fitted_teacher(job: Job, teacher: Teacher, splits: Splits, cache: Store, *, device: torch.device) -> Teacher | None:
    """The teacher that an earlier run fitted, or None where there is none or it is damaged."""
    return _kept_teacher(fit_key(job, teacher, splits, device), teacher, cache)


def best_epoch(held_out_top1s: Sequence[float]) -> int:
    """The epoch of the highest accuracy; the later of equals, since it has seen more."""
    return max(range(len(held_out_top1s)), key=lambda epoch: (held_out_top1s[epoch], epoch))


def _kept_teacher(key: str, teacher: Teacher, cache: Store) -> Teacher | None:
    content = cache.child("fits").read_bytes_or_none(f"{key}.json")
    if content is None:
        return None
    try:
        result = unseal_json(FitResult, content)
        weights = teacher_store(cache, result.teacher_sha256)
        module = copy.deepcopy(teacher.module)
        state = state_from_bytes(weights.read_bytes(WEIGHTS_FILE), source=weights.uri)
        load_state(module, state, source=weights.uri)
        found = frozen_teacher(module, teacher.model)
    except (ValueError, TeacherError, StorageError):
        return None
    return found if found.sha256 == result.teacher_sha256 else None


def _fit(
    job: Job, teacher: Teacher, splits: Splits, cache: Store, key: str, *, device: torch.device, emit: Emit
) -> Teacher:
    """Train from the newest checkpoint, or the start, to the end, and commit the best epoch's network."""
    fit = job.teacher.fit
    assert fit is not None
    assert splits.held_out.labels is not None
    held_out_labels = torch.from_numpy(splits.held_out.labels)
    store = cache.child("fits", key)
    store.delete_leftovers()
    begun, name = newest_checkpoint(store, on_damage=lambda told: emit(Progress(phase="teacher", detail=told)))
    start = None if begun is None else begun.training
    held_out_top1s = () if begun is None else begun.held_out_top1s
    best: Mapping[str, Tensor] = {} if begun is None else begun.best

    module = copy.deepcopy(teacher.module)
    batch_size = min(fit.batch_size, len(splits.train))
    steps_per_epoch = len(splits.train) // batch_size
    total = fit.epochs * steps_per_epoch
    report = _reporter(emit, total, batch_size, 0 if start is None else start.num_steps)
    saved_at = time.monotonic()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(
            splits.train,
            batch_size=batch_size,
            flip=fit.flip,
            crop_padding=fit.crop_padding,
            seed=job.seed,
            epoch=epoch,
        )

    def detail() -> str:
        told = epoch_detail(held_out_top1s, fit.epochs)
        if begun is None or len(held_out_top1s) > len(begun.held_out_top1s):
            return told
        return f"resumed after step {begun.training.num_steps}: {told}"

    def after_epoch(epoch: int) -> None:
        nonlocal best, held_out_top1s
        images = (images for images, _ in ordered_batches(splits.held_out, job.data.batch_size))
        held_out_top1s = (*held_out_top1s, top_k(predict(module, images, device), held_out_labels, 1))
        if best_epoch(held_out_top1s) == epoch:
            best = {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}
        report((epoch + 1) * steps_per_epoch, None, detail(), always=True)

    def on_state(training: TrainingState) -> None:
        nonlocal name, saved_at
        state = Checkpoint(training=training, held_out_top1s=held_out_top1s, best=best)
        name = save_checkpoint(store, state, beside=name)
        saved_at = time.monotonic()

    if start is not None:
        report(start.num_steps, start.losses[-1], detail(), always=True)
    result = train_module(
        module,
        batches,
        settings=fit,
        steps_per_epoch=steps_per_epoch,
        loss=smoothed_cross_entropy(fit.label_smoothing),
        device=device,
        what="the teacher (teacher.fit)",
        warmup_steps=round(fit.warmup_epochs * steps_per_epoch),
        start=start,
        on_step=lambda step, loss: report(step, loss, detail(), always=step == total),
        after_epoch=after_epoch,
        on_state=on_state,
        state_due=lambda: time.monotonic() - saved_at >= job.storage.checkpoint_seconds,
    )
    # Into the module's own, which carries the metadata by which a class such as MNASNet knows what it loads.
    state = module.to("cpu").state_dict()
    state.update(best)
    module.load_state_dict(state)
    fitted = frozen_teacher(module, teacher.model)
    # Weights that are there already are not those of a fitted teacher, which would have been taken: they are damaged.
    teacher_store(cache, fitted.sha256).delete(WEIGHTS_FILE)
    save_teacher(cache, fitted)
    epoch = best_epoch(held_out_top1s)
    committed = FitResult(
        teacher_sha256=fitted.sha256,
        best_epoch=epoch,
        held_out_top1=held_out_top1s[epoch],
        held_out_top1s=held_out_top1s,
        seconds=result.seconds,
    )
    cache.child("fits").write_bytes(f"{key}.json", seal_json(committed))
    told = f"held-out {100 * committed.held_out_top1:.2f} % after epoch {epoch + 1} of {fit.epochs}"
    emit(Progress(phase="teacher", state="done", done=total, total=total, unit="steps", detail=told))
    return fitted


# -- progress ----------------------------------------------------------------------------------------------------------


def epoch_detail(held_out_top1s: Sequence[float], epochs: int) -> str:
    """The epoch that runs, the accuracy after the one before, and the best one where that is another."""
    num_finished = len(held_out_top1s)
    told = f"epoch {min(num_finished + 1, epochs)}/{epochs}"
    if num_finished:
        told += f", held-out {100 * held_out_top1s[-1]:.2f} % after {num_finished}"
        best = best_epoch(held_out_top1s)
        if best != num_finished - 1:
            told += f", best {100 * held_out_top1s[best]:.2f} % after {best + 1}"
    return told


def _reporter(emit: Emit, total: int, batch_size: int, first_step: int) -> Callable[..., None]:
    """Tells where the fit stands, a few times a second; speed and what is left by this process's own steps."""
    started = time.monotonic()
    reported, latest = float("-inf"), None

    def report(step: int, loss: float | None, detail: str, *, always: bool) -> None:
        nonlocal reported, latest
        now = time.monotonic()
        latest = latest if loss is None else loss
        if now - reported < SECONDS_BETWEEN_REPORTS and not always:
            return
        reported = now
        per_second = (step - first_step) / max(now - started, 1e-9) if step > first_step else None
        emit(
            Progress(
                phase="teacher",
                done=step,
                total=total,
                unit="steps",
                loss=latest,
                per_second=None if per_second is None else per_second * batch_size,
                seconds_left=None if per_second is None else (total - step) / per_second,
                detail=detail,
            )
        )

    return report
