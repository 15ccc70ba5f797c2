"""Dump: one pass of the teacher over a slice of the train images writes that slice's shard of every missing boundary.

A slice is as many images as one shard holds, and a shard is whole batches, so the activations do not depend on who dumps
which slice. A boundary counts only when its manifest is committed; finished shards of an interrupted dump are kept.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dcq_ray.data import Splits
from dcq_ray.errors import DataError, ShardError, StorageError
from dcq_ray.phases.context import Emit, Network, choose_device, refuse_stale
from dcq_ray.phases.views import all_boundaries, images_of_view, recomputes
from dcq_ray.records import Boundary, Progress, RunContext, ShardInfo, ShardManifest
from dcq_ray.shards import (
    check_storable,
    commit_manifest,
    finished_shards,
    load_manifest,
    samples_per_shard,
    shard_name,
    write_shard,
)
from dcq_ray.storage import Store, add_use, hold_boundary, open_store, remove_use

# So often slices are dumped whose shards are not there afterwards, before the dump gives up.
MAX_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpedSlice:
    """One slice of the data, dumped for some boundaries."""

    index: int
    num_samples: int
    cpu_seconds: float


def boundary_store(context: RunContext, boundary: Boundary) -> Store:
    """The folder of a boundary in the cache."""
    return open_store(context.cache_dir).child(boundary.digest)


def num_slices(context: RunContext) -> int:
    """How many slices the train images make."""
    num_samples = context.plan.boundaries[0].num_samples
    return -(-num_samples // samples_per_shard(context.job.data.batch_size))


def valid_manifest(context: RunContext, boundary: Boundary) -> ShardManifest | None:
    """The manifest of a boundary, or None where it is missing or damaged and so must be dumped again."""
    try:
        return load_manifest(boundary_store(context, boundary), digest=boundary.digest)
    except ShardError:
        return None


def reusable_boundaries(context: RunContext) -> tuple[Boundary, ...]:
    """The boundaries of the plan that lie in the cache, whole."""
    return tuple(b for b in all_boundaries(context) if valid_manifest(context, b) is not None)


@contextlib.contextmanager
def hold_boundaries(
    context: RunContext, boundaries: Iterable[Boundary], on_wait: Callable[[str], None]
) -> Iterator[tuple[Boundary, ...]]:
    """Lock boundaries against other runs, and give those that are still missing once all locks are held.

    Locks are taken in the order of digests, so that two runs never wait for each other; who waited finds the other's
    boundaries done, or takes over what a dead one left.
    """
    with contextlib.ExitStack() as stack:
        held = sorted(boundaries, key=lambda boundary: boundary.digest)
        for boundary in held:
            stack.enter_context(hold_boundary(boundary_store(context, boundary), on_wait=on_wait))
        done = {boundary.digest for boundary in held if valid_manifest(context, boundary) is not None}
        yield tuple(
            boundary for boundary in all_boundaries(context) if boundary in held and boundary.digest not in done
        )


def check_space(context: RunContext, missing: Sequence[Boundary]) -> None:
    """Refuse a dump that the disk, or the job's own limit, cannot hold; raises StorageError with both numbers."""
    needed = sum(
        boundary.num_bytes
        - sum(shard.num_bytes for shard in finished_shards(boundary_store(context, boundary)).values())
        for boundary in missing
    )
    free = open_store(context.cache_dir).free_bytes()
    remedy = (
        "free some, name another storage.cache_dir, use fewer data.train_samples or sections, dtype float16, or nothing "
        "stored (storage.activations: recomputed)"
    )
    if free is not None and needed > free:
        raise StorageError(
            f"{context.cache_dir}: the boundaries' activations need {needed:,} bytes, but only {free:,} are free; {remedy}"
        )
    limit = context.job.storage.max_bytes
    if limit is not None and needed > limit:
        raise StorageError(
            f"{context.cache_dir}: the boundaries' activations need {needed:,} bytes, but storage.max_bytes allows "
            f"{limit:,}; raise it, or {remedy}"
        )


def dump_missing(
    context: RunContext,
    wanted: Sequence[Boundary],
    run_slices: Callable[[Sequence[Boundary]], Iterable[DumpedSlice]],
    emit: Emit,
) -> float:
    """Dump those of the wanted boundaries that the cache lacks, however `run_slices` does it; returns processor seconds.

    Another run that dumps one of them is waited for. Shards that are not there once their slices were dumped, as when a node
    took its disk with it, are dumped again.
    """
    cpu_seconds = 0.0
    have = {boundary.digest for boundary in reusable_boundaries(context)}
    absent = [boundary for boundary in wanted if boundary.digest not in have]

    def on_wait(who: str) -> None:
        emit(Progress(phase="dump", state="waiting", detail=who))

    with hold_boundaries(context, absent, on_wait) as missing:
        if not missing:
            emit(Progress(phase="dump", state="reused", detail="the boundaries were in the cache"))
            return 0.0
        check_space(context, missing)
        total = context.plan.boundaries[0].num_samples * len({boundary.view for boundary in missing})
        emit(Progress(phase="dump", done=0, total=total))
        for _ in range(MAX_ROUNDS):
            done = 0
            for dumped in run_slices(missing):
                done += dumped.num_samples
                cpu_seconds += dumped.cpu_seconds
                emit(Progress(phase="dump", done=done, total=total))
            if not any(_lost(context, boundary) for boundary in missing):
                break
        for boundary in missing:
            commit_boundary(context, boundary)
    emit(Progress(phase="dump", state="done", done=total, total=total))
    return cpu_seconds


def lease_boundaries(context: RunContext) -> None:
    """Say in every boundary's folder that this run uses it; one that recomputes its activations uses none."""
    for boundary in () if recomputes(context.job) else all_boundaries(context):
        add_use(boundary_store(context, boundary), context.run_dir)


def release_boundaries(context: RunContext) -> None:
    """Say that this run needs its boundaries and the cache no longer; they stay for others until they are collected."""
    remove_use(open_store(context.cache_dir), context.run_dir)
    for boundary in all_boundaries(context):
        remove_use(boundary_store(context, boundary), context.run_dir)


def dump_slices(
    context: RunContext, network: Network, splits: Splits, indices: Iterable[int], missing: Sequence[Boundary]
) -> Iterator[DumpedSlice]:
    """Dump slices of the train images, one teacher pass for each view, and yield each slice as it is finished.

    Shards that an earlier, interrupted dump finished are not written again; where none of a slice is missing, the teacher
    does not run.

    Raises:
        StaleRunError: another driver holds the run directory now.
    """
    torch.set_num_threads(context.job.train.num_threads)
    device = choose_device(context.device)
    sections = [section.to(device) for section in network.sections]
    size = samples_per_shard(context.job.data.batch_size)
    finished = {boundary.digest: finished_shards(boundary_store(context, boundary)) for boundary in missing}
    views = list(dict.fromkeys(boundary.view for boundary in missing))
    for index, view in itertools.product(indices, views):
        start_cpu_seconds = time.process_time()
        positions = np.arange(index * size, min((index + 1) * size, len(splits.train)))
        wanted = [boundary for boundary in missing if boundary.view == view and index not in finished[boundary.digest]]
        if wanted:
            refuse_stale(context)
            last = max(boundary.index for boundary in wanted)
            # In the stored dtype, so that a slice in memory is as large as its shards.
            stored = {boundary.index: (boundary, _empty(boundary, len(positions))) for boundary in wanted}
            for start in range(0, len(positions), context.job.data.batch_size):
                batch = positions[start : start + context.job.data.batch_size]
                images = images_of_view(context, splits, batch, view).to(device)
                for number, value in boundary_values(sections, images, last):
                    if number in stored:
                        # Copied: the next section may work in place on this very tensor.
                        boundary, rows = stored[number]
                        where = boundary_store(context, boundary).location(shard_name(index))
                        _put(boundary, rows, start, value, where)
            while stored:
                # Each shard's rows are let go as it is written, before the next slice asks for its own.
                boundary, rows = stored.pop(next(iter(stored)))
                _write(context, boundary, index, rows.numpy())
                del rows
        yield DumpedSlice(index=index, num_samples=len(positions), cpu_seconds=time.process_time() - start_cpu_seconds)


def commit_boundary(context: RunContext, boundary: Boundary) -> ShardManifest:
    """Write the manifest of a boundary whose shards are all there.

    Raises:
        ShardError: some are missing; it names them.
        StaleRunError: another driver holds the run directory now.
    """
    refuse_stale(context)
    store = boundary_store(context, boundary)
    shards: dict[int, ShardInfo] = finished_shards(store)
    lost = _lost(context, boundary)
    if lost:
        raise ShardError(
            f"{store.uri}: boundary {boundary.index} ({boundary.cut}) lacks shards {lost[:5]} of {num_slices(context)} "
            "after the dump; is storage.cache_dir a folder that every node shares? Run again to dump what is missing"
        )
    manifest = ShardManifest(
        digest=boundary.digest,
        cut=boundary.cut,
        shape=boundary.shape,
        dtype=boundary.dtype,
        compression=context.job.storage.compression,
        num_samples=boundary.num_samples,
        samples_per_shard=samples_per_shard(context.job.data.batch_size),
        shards=tuple(shards[index] for index in range(num_slices(context))),
    )
    commit_manifest(store, manifest)
    return manifest


def _lost(context: RunContext, boundary: Boundary) -> list[int]:
    """The slices of which a boundary lacks the shard."""
    shards = finished_shards(boundary_store(context, boundary))
    return [index for index in range(num_slices(context)) if index not in shards]


def boundary_values(
    sections: Sequence[torch.nn.Module], images: torch.Tensor, last: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The teacher's activations at boundaries 0 to `last`, each with its number; the next section may work in place on them."""
    value = images
    yield 0, value
    with torch.no_grad():
        for number, section in enumerate(sections[:last], start=1):
            value = section(value)
            yield number, value


def _empty(boundary: Boundary, num_samples: int) -> torch.Tensor:
    dtype = torch.float16 if boundary.dtype == "float16" else torch.float32
    return torch.empty((num_samples, *boundary.shape), dtype=dtype)


def _put(boundary: Boundary, rows: torch.Tensor, start: int, value: torch.Tensor, where: str) -> None:
    """Copy a batch's activations among the rows of a slice, from row `start` on, as they are stored; `where`: in errors."""
    if value.shape[1:] != boundary.shape:
        raise DataError(
            f"boundary {boundary.index} ({boundary.cut}): got activations of shape {tuple(value.shape[1:])}, the plan says "
            f"{boundary.shape}; the data have changed since the plan was made: run again with --fresh"
        )
    value = value.to("cpu", torch.float32)
    check_storable(value.numpy(), boundary.dtype, where, first_sample=start)
    # Torch converts as numpy does, to the nearest, of ties to the even one, and ten times as fast.
    rows[start : start + len(value)].copy_(value)


def _write(context: RunContext, boundary: Boundary, index: int, array: np.ndarray) -> None:
    write_shard(
        boundary_store(context, boundary),
        index=index,
        array=array,
        dtype=boundary.dtype,
        compression=context.job.storage.compression,
        digest=boundary.digest,
    )
