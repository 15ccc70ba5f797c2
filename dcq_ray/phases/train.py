"""Train: one quantized section on the stored activations of its two boundaries, alone.

A worker knows nothing of the other sections. What it commits is an attempt folder with the weights and, written last, the
result that names it; a worker whose driver was replaced commits nothing.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from dcq_ray.data import Splits
from dcq_ray.digests import json_sha256, library_versions, tensors_sha256
from dcq_ray.errors import DataError, ShardError, StaleRunError, StorageError
from dcq_ray.losses import loss_function
from dcq_ray.phases.context import WEIGHTS_FILE, Emit, Network, choose_device
from dcq_ray.phases.dump import boundary_store
from dcq_ray.quantize import activation_starts, put_quantizers
from dcq_ray.records import Boundary, LayerPlan, Progress, RunContext, SectionResult, SectionTask, from_json, to_json
from dcq_ray.section import train_module
from dcq_ray.shards import BoundaryReader, load_manifest, open_boundary, sample_order, samples_per_shard
from dcq_ray.spec import Job
from dcq_ray.storage import Store, current_epoch, open_store
from dcq_ray.teacher import state_bytes, state_from_bytes

# Samples are shuffled within windows of so many shards, so that training may begin before the dump has ended.
SHARDS_PER_WINDOW = 8
SECONDS_BETWEEN_REPORTS = 0.25
RESULT_FILE = "result.json"
# Activation quantizers start from what so many samples show; the train part is shuffled, so the first ones are a fair choice.
CALIBRATION_SAMPLES = 512

Read = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A boundary's activations: `read` gives float32 rows at positions, on the training device."""

    read: Read
    num_samples: int


def section_tasks(context: RunContext) -> tuple[SectionTask, ...]:
    """The tasks of a plan; a task's digest covers all that determines its result."""
    plan, job = context.plan, context.job
    tasks = []
    for section in plan.sections:
        last = section.index == len(plan.sections) - 1
        settings = job.train.model_dump(mode="json")
        if not last:
            settings["last_loss"] = None
        content = {
            "index": section.index,
            "boundaries": [plan.boundaries[section.index].digest, plan.boundaries[section.index + 1].digest],
            "layers": [layer_identity(layer) for layer in section.layers],
            "train": settings,
            "seed": job.seed,
            "device": context.device,
            "versions": library_versions(),
        }
        tasks.append(SectionTask(index=section.index, digest=json_sha256(content)))
    return tuple(tasks)


def layer_identity(layer: LayerPlan) -> list[str | int | None]:
    """All of a layer's plan that its student depends on."""
    return [layer.module, layer.scheme, layer.bits, layer.activation_scheme, layer.activation_bits]


def section_store(context: RunContext, index: int) -> Store:
    """The folder of a section in the run directory."""
    return open_store(context.run_dir).child("sections", f"{index:02d}")


def finished_section(context: RunContext, task: SectionTask) -> SectionResult | None:
    """The result that an earlier run committed for this very task, or None; weights that do not match do not count."""
    content = section_store(context, task.index).read_bytes_or_none(RESULT_FILE)
    if content is None:
        return None
    try:
        result = from_json(SectionResult, content)
        if result.task_digest == task.digest and result.index == task.index:
            section_weights(context, result)
            return result
    except (ValueError, StorageError):
        # A damaged result or damaged weights: the section is trained again.
        pass
    return None


def section_weights(context: RunContext, result: SectionResult) -> dict[str, Tensor]:
    """The trained state of a section under the teacher's names; raises StorageError where it is damaged."""
    store = section_store(context, result.index).child(result.attempt)
    source = f"{store.uri}/{WEIGHTS_FILE}"
    try:
        state = state_from_bytes(store.read_bytes(WEIGHTS_FILE), source=source)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(
            f"{source}: not a safetensors file ({error}); run again to train section {result.index}"
        ) from error
    if tensors_sha256(state) != result.weights_sha256:
        raise StorageError(
            f"{source}: the tensors are not those of {RESULT_FILE} (sha256 differs); run again to train section {result.index}"
        )
    return state


def train_section(
    context: RunContext,
    task: SectionTask,
    network: Network,
    splits: Splits | None,
    *,
    emit: Emit,
    memory_bytes: int,
    restarts: int = 0,
) -> SectionResult:
    """Train one section to the end and commit its result.

    Args:
        splits: needed only where the last section learns from labels.
        memory_bytes: activations that fit are kept in (GPU) memory; the result is the same either way.

    Raises:
        SectionTrainingError: the loss or a weight is not finite.
        ShardError: a boundary's shards are missing or damaged; they are struck off, and the next run dumps them again.
        StaleRunError: another driver holds the run directory now.
    """
    started, start_cpu_seconds = time.monotonic(), time.process_time()
    job, plan = context.job, context.plan
    torch.set_num_threads(job.train.num_threads)
    device = choose_device(context.device)
    section = plan.sections[task.index]
    # A copy: the network serves other sections and measurements after this one.
    module: GraphModule = copy.deepcopy(network.sections[task.index]).to(device)
    last = task.index == len(plan.sections) - 1
    loss_name = job.train.last_loss if last and job.train.last_loss is not None else job.train.loss
    loss = loss_function(loss_name, temperature=job.train.temperature)

    with contextlib.ExitStack() as stack:
        inputs = _open(context, plan.boundaries[task.index], device, memory_bytes // 2, stack)
        if loss_name == "cross-entropy":
            targets = _labels(splits, device)
        else:
            targets = _open(context, plan.boundaries[task.index + 1], device, memory_bytes // 2, stack)
        if inputs.num_samples != targets.num_samples:
            raise ShardError(
                f"section {task.index}: its input has {inputs.num_samples} samples, its target {targets.num_samples}; "
                "run again with --fresh and another storage.cache_dir"
            )
        put_quantizers(module, section.layers, activation_starts(module, section.layers, _first(inputs, job)))
        batch_size = min(job.train.batch_size, inputs.num_samples)
        steps_per_epoch = inputs.num_samples // batch_size
        window = SHARDS_PER_WINDOW * samples_per_shard(job.data.batch_size)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            order = sample_order(inputs.num_samples, window=window, seed=job.seed, section=task.index, epoch=epoch)
            for step in range(steps_per_epoch):
                positions = order[step * batch_size : (step + 1) * batch_size]
                yield inputs.read(positions), targets.read(positions)

        result = train_module(
            module,
            batches,
            settings=job.train,
            steps_per_epoch=steps_per_epoch,
            loss=loss,
            device=device,
            what=f"section {task.index}",
            on_step=_reporter(emit, task.index, job.train.epochs * steps_per_epoch, batch_size),
        )
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    attempt = f"{context.epoch}-{uuid.uuid4().hex[:8]}"
    store = section_store(context, task.index)
    sha256 = tensors_sha256(state)
    store.child(attempt).write_bytes(WEIGHTS_FILE, state_bytes(state, {"section": str(task.index), "sha256": sha256}))
    committed = SectionResult(
        index=task.index,
        task_digest=task.digest,
        epoch=context.epoch,
        attempt=attempt,
        weights_sha256=sha256,
        initial_loss=result.initial_loss,
        final_loss=result.final_loss,
        num_steps=result.num_steps,
        num_sample_passes=result.num_sample_passes,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - start_cpu_seconds,
        input_wait_seconds=result.input_wait_seconds,
        device=str(device),
        restarts=restarts,
        loss_curve=result.loss_curve,
    )
    refuse_stale(context)
    store.write_bytes(RESULT_FILE, to_json(committed))
    return committed


def activation_memory_bytes(job: Job, device: torch.device, *, num_at_once: int) -> int:
    """How many bytes of activations one of so many sections on this machine (or GPU) may keep in memory."""
    asked = job.resources.memory_per_section
    if asked != "auto":
        return asked
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free_bytes // (2 * max(1, num_at_once))


def refuse_stale(context: RunContext) -> None:
    """Raise StaleRunError where a newer driver holds the run directory than the one this process works for."""
    epoch = current_epoch(open_store(context.run_dir))
    if epoch != context.epoch:
        raise StaleRunError(
            f"{context.run_dir}: this worker's driver (lease {context.epoch}) was replaced (lease {epoch}); nothing was written"
        )


def _open(
    context: RunContext, boundary: Boundary, device: torch.device, memory_bytes: int, stack: contextlib.ExitStack
) -> _Source:
    store = boundary_store(context, boundary)
    try:
        manifest = load_manifest(store, digest=boundary.digest)
        if manifest is None:
            raise ShardError(
                f"{store.uri}: no activations of boundary {boundary.index} ({boundary.cut}) there; is storage.cache_dir a "
                "folder that every node shares? Run again to dump them"
            )
        reader = stack.enter_context(open_boundary(store, manifest))
    except ShardError:
        # Nobody may trust it again; who reads it now has his files open.
        store.delete("manifest.json")
        raise
    if reader.num_samples * boundary.bytes_per_sample <= memory_bytes:
        return _resident(reader, device)

    def read(positions: np.ndarray) -> Tensor:
        return torch.from_numpy(reader.read(positions)).to(device).float()

    return _Source(read=read, num_samples=reader.num_samples)


def _resident(reader: BoundaryReader, device: torch.device) -> _Source:
    """The whole boundary as one tensor on the training device, in its stored dtype."""
    values = torch.from_numpy(reader.read(np.arange(reader.num_samples))).to(device)

    def read(positions: np.ndarray) -> Tensor:
        # Indexing copies, so that a section which works in place cannot change what is stored.
        return values.index_select(0, torch.from_numpy(positions).to(device)).float()

    return _Source(read=read, num_samples=len(values))


def _first(inputs: _Source, job: Job) -> Iterator[Tensor]:
    num_samples = min(inputs.num_samples, CALIBRATION_SAMPLES)
    for start in range(0, num_samples, job.data.batch_size):
        yield inputs.read(np.arange(start, min(start + job.data.batch_size, num_samples)))


def _labels(splits: Splits | None, device: torch.device) -> _Source:
    if splits is None or splits.train.labels is None:
        raise DataError(
            "train.last_loss: cross-entropy needs labels of the train images; use distillation, or give labels"
        )
    labels = torch.from_numpy(splits.train.labels).to(device)

    def read(positions: np.ndarray) -> Tensor:
        return labels.index_select(0, torch.from_numpy(positions).to(device))

    return _Source(read=read, num_samples=len(labels))


def _reporter(emit: Emit, index: int, total: int, batch_size: int) -> Callable[[int, float], None]:
    started = reported = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported < SECONDS_BETWEEN_REPORTS and step < total:
            return
        reported = now
        steps_per_second = step / max(now - started, 1e-9)
        emit(
            Progress(
                phase="train",
                index=index,
                done=step,
                total=total,
                unit="steps",
                loss=loss,
                per_second=steps_per_second * batch_size,
                seconds_left=(total - step) / steps_per_second,
            )
        )

    return on_step
