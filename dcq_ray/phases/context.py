"""What a worker opens from a `RunContext`: the teacher, its sections, the images; and whether its driver still holds the run.

A context is small and travels with every task; weights and images do not: each process opens them from the cache and from
the data's own place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from dcq_ray.callables import importable_from
from dcq_ray.data import Splits, load_splits
from dcq_ray.errors import StaleRunError, StorageError, TeacherError
from dcq_ray.partition import cut, trace_teacher
from dcq_ray.phases.memory import keep_freed_memory
from dcq_ray.records import Progress, RunContext
from dcq_ray.spec import Job
from dcq_ray.storage import Store, current_epoch, open_store
from dcq_ray.teacher import Teacher, build_network, frozen_teacher, load_state, state_bytes, state_from_bytes

Emit = Callable[[Progress], None]

WEIGHTS_FILE = "weights.safetensors"


def ignore_progress(_: Progress) -> None:
    """For callers who watch nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The teacher and its sections, on the CPU, frozen, in eval mode."""

    teacher: Teacher
    sections: tuple[GraphModule, ...]


def choose_device(name: str) -> torch.device:
    """The device that `cpu`, `cuda` or `auto` means in this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def num_at_once(job: Job, device: torch.device) -> int:
    """How many things that have `train.num_threads` each this machine can compute beside each other; 1 on a GPU."""
    return 1 if device.type != "cpu" else max(1, (os.cpu_count() or 1) // job.train.num_threads)


def section_store(context: RunContext, index: int) -> Store:
    """The folder of a section in the run directory."""
    return open_store(context.run_dir).child("sections", f"{index:02d}")


def refuse_stale(context: RunContext) -> None:
    """Raise StaleRunError where a newer driver holds the run directory than the one this process works for."""
    epoch = current_epoch(open_store(context.run_dir))
    if epoch != context.epoch:
        raise StaleRunError(
            f"{context.run_dir}: this worker's driver (lease {context.epoch}) was replaced (lease {epoch}); nothing was written"
        )


def teacher_store(cache: Store, sha256: str) -> Store:
    """Where the cache keeps the teacher with that digest."""
    return cache.child("teachers", sha256)


def save_teacher(cache: Store, teacher: Teacher) -> None:
    """Put the teacher's weights where every worker finds them by digest."""
    store = teacher_store(cache, teacher.sha256)
    if not store.exists(WEIGHTS_FILE):
        content = state_bytes(teacher.module.state_dict(), {"model": teacher.model, "sha256": teacher.sha256})
        store.write_bytes(WEIGHTS_FILE, content)


def open_teacher(cache: Store, sha256: str, module: nn.Module, model: str) -> Teacher:
    """The teacher with that digest: the cache's weights in a freshly built module; raises TeacherError otherwise."""
    store = teacher_store(cache, sha256)
    source = store.location(WEIGHTS_FILE)
    try:
        content = store.read_bytes(WEIGHTS_FILE)
    except StorageError as error:
        raise TeacherError(
            f"the teacher's weights are not where the driver put them: {error}; every worker must see the cache: name "
            "storage that all nodes share under storage.cache_dir"
        ) from error
    load_state(module, state_from_bytes(content, source=source), source=source)
    teacher = frozen_teacher(module, model)
    if teacher.sha256 != sha256:
        raise TeacherError(
            f"{source}: its tensors have digest {teacher.sha256[:12]}…, expected {sha256[:12]}…: the file is damaged; "
            "delete it and run again"
        )
    return teacher


def open_network(context: RunContext) -> Network:
    """The teacher of a run, cut as its plan says, in a process that is ready to run it."""
    keep_freed_memory()
    importable_from(context.job_folder)
    module = build_network(context.job.teacher, job_folder=context.job_folder)
    cache = open_store(context.cache_dir)
    teacher = open_teacher(cache, context.plan.teacher_sha256, module, context.job.teacher.model)
    traced = trace_teacher(teacher.module, torch.zeros(2, *context.plan.input_shape))
    return Network(teacher=teacher, sections=cut(traced, context.plan.cuts, copied=False))


def open_splits(context: RunContext) -> Splits:
    """The images of a run in their fixed order."""
    importable_from(context.job_folder)
    return load_splits(context.job.data, seed=context.job.seed, job_folder=context.job_folder)
