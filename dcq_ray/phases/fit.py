"""Fit: train or fine-tune the full-precision teacher on the train part, keep the best by held-out accuracy.

A fitted teacher lies in the cache under the digest of all that determines it, so that it is fitted once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data import Splits, augmented_batches, ordered_batches
from dcq_ray.digests import json_sha256, library_versions
from dcq_ray.errors import StorageError, TeacherError
from dcq_ray.partition import prefix_digests, trace_teacher
from dcq_ray.phases.context import WEIGHTS_FILE, Emit, save_teacher, teacher_store
from dcq_ray.records import Progress, from_json, to_json
from dcq_ray.section import cross_entropy, train_module
from dcq_ray.spec import Job
from dcq_ray.storage import Store
from dcq_ray.teacher import Teacher, frozen_teacher, load_state, state_from_bytes
from dcq_ray.validate import predict, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The commit mark of a fitted teacher."""

    teacher_sha256: str
    best_epoch: int
    held_out_top1: float
    seconds: float


def fit_teacher(
    job: Job, teacher: Teacher, splits: Splits, cache: Store, *, device: torch.device, emit: Emit
) -> Teacher:
    """Train a copy of the teacher with cross-entropy as `teacher.fit` says; the best epoch by held-out top-1 is kept."""
    fit = job.teacher.fit
    assert fit is not None
    if splits.train.labels is None or splits.held_out.labels is None:
        raise TeacherError(
            "teacher.fit needs labels, but the train images have none; give labels, or fit: null with weights"
        )
    found = fitted_teacher(job, teacher, splits, cache, device=device)
    if found is not None:
        emit(Progress(phase="teacher", state="reused", detail="fitted by an earlier run"))
        return found

    started = time.monotonic()
    module = copy.deepcopy(teacher.module)
    batch_size = min(fit.batch_size, len(splits.train))
    steps_per_epoch = len(splits.train) // batch_size
    total = fit.epochs * steps_per_epoch
    held_out_labels = torch.from_numpy(splits.held_out.labels)
    best: tuple[float, int, dict[str, Tensor]] | None = None

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(
            splits.train,
            batch_size=batch_size,
            flip=fit.flip,
            crop_padding=fit.crop_padding,
            seed=job.seed,
            epoch=epoch,
        )

    def on_step(step: int, loss: float) -> None:
        emit(Progress(phase="teacher", done=step, total=total, unit="steps", loss=loss))

    def after_epoch(epoch: int) -> None:
        nonlocal best
        logits = predict(
            module, (images for images, _ in ordered_batches(splits.held_out, job.data.batch_size)), device
        )
        top1 = top_k(logits, held_out_labels, 1)
        # The later of equals: it has seen more.
        if best is None or top1 >= best[0]:
            best = (top1, epoch, {name: value.detach().cpu().clone() for name, value in module.state_dict().items()})

    train_module(
        module,
        batches,
        settings=fit,
        steps_per_epoch=steps_per_epoch,
        loss=cross_entropy,
        device=device,
        what="the teacher (teacher.fit)",
        on_step=on_step,
        after_epoch=after_epoch,
    )
    assert best is not None
    top1, epoch, state = best
    module.to("cpu").load_state_dict(state)
    fitted = frozen_teacher(module, teacher.model)
    save_teacher(cache, fitted)
    result = FitResult(
        teacher_sha256=fitted.sha256, best_epoch=epoch, held_out_top1=top1, seconds=time.monotonic() - started
    )
    cache.child("fits").write_bytes(f"{fit_key(job, teacher, splits, device)}.json", to_json(result))
    emit(
        Progress(
            phase="teacher", state="done", done=total, total=total, unit="steps", detail=f"held-out {100 * top1:.1f} %"
        )
    )
    return fitted


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
            "seed": job.seed,
            "num_threads": job.train.num_threads,
            "device": device.type,
            "versions": library_versions(),
        }
    )


def fitted_teacher(job: Job, teacher: Teacher, splits: Splits, cache: Store, *, device: torch.device) -> Teacher | None:
    """The teacher that an earlier run fitted, or None where there is none or it is damaged."""
    content = cache.child("fits").read_bytes_or_none(f"{fit_key(job, teacher, splits, device)}.json")
    if content is None:
        return None
    try:
        result = from_json(FitResult, content)
        weights = teacher_store(cache, result.teacher_sha256)
        module = copy.deepcopy(teacher.module)
        state = state_from_bytes(weights.read_bytes(WEIGHTS_FILE), source=weights.uri)
        load_state(module, state, source=weights.uri)
        found = frozen_teacher(module, teacher.model)
    except (ValueError, TeacherError, StorageError):
        return None
    return found if found.sha256 == result.teacher_sha256 else None
