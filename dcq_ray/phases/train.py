"""Train: one quantized section on the teacher's activations at its two boundaries, alone.

A worker knows nothing of the other sections. It goes on from the newest whole checkpoint of its task; a worker whose driver was
replaced commits nothing.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data import Splits
from dcq_ray.phases.committed import commit_section
from dcq_ray.phases.context import Emit, Network, choose_device
from dcq_ray.phases.objective import objective_loss
from dcq_ray.phases.reading import open_views
from dcq_ray.phases.recomputing import made_ahead
from dcq_ray.phases.saving import Pace, SaveRequest, SectionSaver, remove_checkpoints
from dcq_ray.phases.sources import first_batches, with_noise
from dcq_ray.phases.starting import better_of, student_section
from dcq_ray.phases.views import recomputes
from dcq_ray.records import Progress, RunContext, SectionResult, SectionTask
from dcq_ray.section import TrainingState, load_optimizers, train_module
from dcq_ray.shards import sample_order, samples_per_shard
from dcq_ray.spec import Job
from dcq_ray.stitch import has_batchnorm, reestimate_batchnorm

# Samples are shuffled within windows of so many shards, so that training may begin before the dump has ended.
SHARDS_PER_WINDOW = 8
SECONDS_BETWEEN_REPORTS = 0.25


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
