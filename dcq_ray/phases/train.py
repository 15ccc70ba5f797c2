"""Train: one quantized section on the teacher's activations at its two boundaries, alone.

A worker knows nothing of the other sections. It goes on from the newest whole checkpoint of its task. What it commits is an
attempt folder with the weights and, written last, the result that names it; a worker whose driver was replaced commits
nothing.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from dcq_ray.data import Splits
from dcq_ray.digests import json_sha256, library_versions, tensors_sha256
from dcq_ray.errors import DcqError, ShardError, StorageError
from dcq_ray.phases.context import WEIGHTS_FILE, Emit, Network, choose_device, refuse_stale, section_store
from dcq_ray.phases.objective import objective_loss, section_objective
from dcq_ray.phases.recomputing import made_ahead, recomputed_sources
from dcq_ray.phases.saving import Pace, SaveRequest, SectionSaver, remove_checkpoints
from dcq_ray.phases.sources import Source, boundary_source, first_batches, label_source, with_noise
from dcq_ray.phases.starting import better_of, student_section
from dcq_ray.phases.views import boundary_views, recomputes
from dcq_ray.quantizers import put_quantizers
from dcq_ray.records import (
    Boundary,
    LayerPlan,
    Progress,
    RunContext,
    SectionFailure,
    SectionResult,
    SectionTask,
    seal_json,
    unseal_json,
)
from dcq_ray.section import TrainingResult, TrainingState, load_optimizers, train_module
from dcq_ray.shards import sample_order, samples_per_shard
from dcq_ray.spec import Job
from dcq_ray.stitch import has_batchnorm, reestimate_batchnorm
from dcq_ray.teacher import state_bytes, state_from_bytes

# Samples are shuffled within windows of so many shards, so that training may begin before the dump has ended.
SHARDS_PER_WINDOW = 8
SECONDS_BETWEEN_REPORTS = 0.25
RESULT_FILE = "result.json"


def section_tasks(context: RunContext) -> tuple[SectionTask, ...]:
    """The tasks of a plan; a task's digest covers all that determines its result."""
    plan, job = context.plan, context.job
    tasks: list[SectionTask] = []
    streamed = job.train.inputs == "student"
    ignored = {"loss", "last_loss", "look_ahead"} | (set() if streamed else {"anneal", "stagger"})
    if job.train.start == "nearest":
        ignored.add("start_samples")
    for section in plan.sections:
        objective = section_objective(context, section.index)
        settings = job.train.model_dump(mode="json", exclude=ignored)
        content = {
            "index": section.index,
            # What a section gives on streamed inputs depends on all sections before it, and on where it stands among all.
            "before": tasks[-1].digest if streamed and tasks else None,
            "num_sections": len(plan.sections) if streamed else None,
            "boundaries": [boundary.digest for boundary in section_boundaries(context, section.index)],
            "losses": objective.loss_names,
            "layers": [layer_identity(layer) for layer in section.layers],
            "train": settings,
            "seed": job.seed,
            "device": context.device,
            "versions": library_versions(),
        }
        if recomputes(job):
            # In float32, and of other batches than the dump's: equal to what is stored but for rounding.
            content["activations"] = "recomputed"
        tasks.append(SectionTask(index=section.index, digest=json_sha256(content)))
    return tuple(tasks)


def layer_identity(layer: LayerPlan) -> list[str | int | None]:
    """All of a layer's plan that its student depends on."""
    return [layer.module, layer.scheme, layer.bits, layer.activation_scheme, layer.activation_bits]


def finished_section(context: RunContext, task: SectionTask) -> SectionResult | None:
    """The result that an earlier run committed for this very task, or None; weights that do not match do not count."""
    content = section_store(context, task.index).read_bytes_or_none(RESULT_FILE)
    if content is None:
        return None
    try:
        result = unseal_json(SectionResult, content)
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
    source = store.location(WEIGHTS_FILE)
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
    request: SaveRequest | None = None,
) -> SectionResult:
    """Train one section to the end, from the newest whole checkpoint where there is one, and commit its result.

    Args:
        splits: needed only where `needs_images` says so.
        memory_bytes: activations that fit are kept in (GPU) memory; the result is the same either way.
        restarts: how many workers on this task died under this driver.
        request: asked at every step whether somebody wants a checkpoint at once.

    Raises:
        SectionTrainingError: the loss or a weight is not finite.
        ShardError: a boundary's shards are missing or damaged; they are struck off, and the next run dumps them again.
        StaleRunError: another driver holds the run directory now.
    """
    load_optimizers()
    started, start_cpu_seconds = time.monotonic(), time.process_time()
    job = context.job
    torch.set_num_threads(job.train.num_threads)
    device = choose_device(context.device)
    saver = SectionSaver(context, task, restarts=restarts, emit=emit)
    pace = Pace(job.storage.checkpoint_seconds)
    first_step = 0 if saver.start is None else saver.start.num_steps
    request = SaveRequest() if request is None else request

    def spent() -> tuple[float, float]:
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - start_cpu_seconds
        return saver.before.seconds + seconds, saver.before.cpu_seconds + cpu_seconds

    with contextlib.ExitStack() as stack:
        views = open_views(context, task.index, splits, device, memory_bytes, stack, network)
        inputs, read = views[0][0], time.monotonic()
        module = student_section(context, task.index, network, inputs, device, resumed=saver.start is not None)
        begun = time.monotonic()
        batch_size = min(job.train.batch_size, inputs.num_samples)
        steps_per_epoch = inputs.num_samples // batch_size
        window = SHARDS_PER_WINDOW * samples_per_shard(job.data.batch_size)

        def batches(epoch: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
            read_batches = batches_in_order(epoch)
            if not recomputes(job):
                return read_batches
            ahead = made_ahead(read_batches, num_threads=job.train.num_threads)
            # An error leaves the loop over the batches before their end, and its traceback keeps them.
            stack.callback(ahead.close)
            return ahead

        def batches_in_order(epoch: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
            order = sample_order(inputs.num_samples, window=window, seed=job.seed, section=task.index, epoch=epoch)
            sources = views[epoch % len(views)]
            generator = torch.Generator().manual_seed(noise_seed(job.seed, task.index, epoch))
            for step in range(steps_per_epoch):
                if epoch * steps_per_epoch + step < first_step and not job.train.input_noise:
                    # It is passed over, and no draw of noise depends on it: so it is not read.
                    yield torch.empty(0), ()
                    continue
                positions = order[step * batch_size : (step + 1) * batch_size]
                value, *targets = (source.read(positions) for source in sources)
                yield with_noise(value, job.train.input_noise, generator), tuple(targets)

        total = job.train.epochs * steps_per_epoch

        def on_state(training: TrainingState) -> None:
            if not request.wanted:
                # After the last step the result follows at once.
                ended = training.num_steps % steps_per_epoch == 0
                if training.num_steps == total or (ended and not pace.due_after_epoch):
                    return
            seconds, cpu_seconds = spent()
            with pace.saving():
                saver.save(training, seconds=seconds, cpu_seconds=cpu_seconds)
            if request.wanted:
                request.answer()

        start = copy.deepcopy(module)
        loss = objective_loss(context, task.index, network, device)
        result = train_module(
            module,
            batches,
            settings=job.train,
            steps_per_epoch=steps_per_epoch,
            loss=loss,
            device=device,
            what=f"section {task.index}",
            start=saver.start,
            on_step=step_reporter(emit, task.index, total, batch_size, first_step=first_step),
            on_state=on_state,
            state_due=lambda: request.wanted or pace.due,
        )
        kept = module
        if job.train.start == "fitted" and total:
            if first_step:
                # What it began with was not fitted in this process.
                start = student_section(context, task.index, network, inputs, device, resumed=False)
            kept = better_of(start, module, views[0], loss, batch_size=job.data.batch_size)
        if job.reduce.reestimate_batchnorm and has_batchnorm(kept):
            # What runs along with the last steps is noise beside it, and a start has the teacher's: alike, all are comparable.
            reestimate_batchnorm(kept, first_batches(inputs, job.data.batch_size), device)
    seconds, cpu_seconds = spent()
    committed = commit_section(
        context,
        task,
        kept.requires_grad_(False),
        result,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        restarts=saver.restarts,
        read_seconds=read - started,
        start_seconds=begun - read,
        kept_start=kept is not module,
    )
    remove_checkpoints(context, task.index)
    return committed


def trained_section(context: RunContext, result: SectionResult, network: Network) -> GraphModule:
    """A trained section, on the teacher's own graph, in eval mode."""
    module: GraphModule = copy.deepcopy(network.sections[result.index])
    put_quantizers(module, context.plan.sections[result.index].layers, trained=True)
    module.load_state_dict(section_weights(context, result))
    module.eval().requires_grad_(False)
    return module


def commit_section(
    context: RunContext,
    task: SectionTask,
    module: torch.nn.Module,
    result: TrainingResult,
    *,
    seconds: float,
    cpu_seconds: float,
    restarts: int,
    read_seconds: float = 0.0,
    start_seconds: float = 0.0,
    kept_start: bool = False,
) -> SectionResult:
    """Write a trained section's weights into an attempt of its own and, last, the result that names it.

    Raises:
        StaleRunError: another driver holds the run directory now; no result is written.
    """
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
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        input_wait_seconds=result.input_wait_seconds,
        device=str(choose_device(context.device)),
        restarts=restarts,
        loss_curve=result.loss_curve,
        read_seconds=read_seconds,
        start_seconds=start_seconds,
        kept_start=kept_start,
    )
    refuse_stale(context)
    store.write_bytes(RESULT_FILE, seal_json(committed))
    return committed


def section_failure(task: SectionTask, error: Exception) -> SectionFailure:
    """What the report says of a section that failed; call it while the exception is handled."""
    told = str(error) if isinstance(error, DcqError) else f"section {task.index}: {type(error).__name__}: {error}"
    return SectionFailure(
        index=task.index, error_type=type(error).__name__, message=told, traceback=traceback.format_exc()
    )


def activation_memory_bytes(
    job: Job, device: torch.device, *, num_at_once: int, working_bytes: int | None = None
) -> int:
    """How many bytes of activations a section may keep in memory; of a GPU, of this process's part of it.

    Args:
        num_at_once: so many sections share this machine's memory.
        working_bytes: what the training itself takes of the GPU, where that was measured; None: half of what is free.
    """
    asked = job.resources.memory_per_section
    if asked != "auto":
        return asked
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        part_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * total_bytes)
        own_bytes = min(free_bytes, part_bytes - torch.cuda.memory_reserved(device))
        return max(0, own_bytes // 2 if working_bytes is None else own_bytes - working_bytes)
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free_bytes // (2 * max(1, num_at_once))


def section_views(context: RunContext, index: int) -> tuple[tuple[Boundary, ...], ...]:
    """For each view of the train images the boundaries that a section reads: its input, and its targets."""
    needed = (index, *section_objective(context, index).boundaries)
    return tuple(tuple(view[number] for number in needed) for view in boundary_views(context))


def section_boundaries(context: RunContext, index: int) -> tuple[Boundary, ...]:
    """All boundaries, of every view, that a section reads."""
    return tuple(boundary for view in section_views(context, index) for boundary in view)


def needs_images(context: RunContext, index: int) -> bool:
    """Whether a section's training reads the images or their labels themselves."""
    return recomputes(context.job) or section_objective(context, index).labels


def open_views(
    context: RunContext,
    index: int,
    splits: Splits | None,
    device: torch.device,
    memory_bytes: int,
    stack: contextlib.ExitStack,
    network: Network | None = None,
) -> list[list[Source]]:
    """For each view of the images what a section reads: its input, then its targets; open until the stack is closed.

    Where they are recomputed it takes the images and the network.
    """
    views = section_views(context, index)
    share = memory_bytes // (len(views) * len(views[0]))

    def opened_view(view: Sequence[Boundary]) -> list[Source]:
        if not recomputes(context.job):
            return [boundary_source(context, boundary, device, share, stack) for boundary in view]
        assert network is not None
        assert splits is not None
        return recomputed_sources(context, view, network, splits, device)

    labels = [label_source(splits, device)] if section_objective(context, index).labels else []
    opened = [[*opened_view(view), *labels] for view in views]
    counts = sorted({source.num_samples for sources in opened for source in sources})
    if len(counts) > 1:
        raise ShardError(
            f"section {index}: its input and its targets have {counts} samples, expected as many of each; run again with "
            "--fresh and another storage.cache_dir"
        )
    return opened


def noise_seed(seed: int, section: int, number: int) -> int:
    """The seed of the noise on a section's inputs, for an epoch or a step of that number."""
    return int(np.random.SeedSequence((seed, section, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def step_reporter(
    emit: Emit, index: int, total: int, batch_size: int, *, first_step: int = 0
) -> Callable[[int, float], None]:
    """What tells of a section's steps now and then, and of the last one; speed is of the steps after `first_step`."""
    detail = f"resumed after step {first_step}" if first_step else ""
    started = reported = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported < SECONDS_BETWEEN_REPORTS and step < total:
            return
        reported = now
        steps_per_second = (step - first_step) / max(now - started, 1e-9)
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
                detail=detail,
            )
        )

    return on_step
