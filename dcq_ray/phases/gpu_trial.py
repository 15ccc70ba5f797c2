"""GPU trial: how much of a card's memory each kind of a run's work takes, from a short go at it on that card.

A section's training is tried as it is made: its start, a few steps with its loss and its optimizer, BatchNorm re-estimated. What
is stored of its boundaries is not there yet; random numbers of their shape stand for it, since values do not change what is
reserved. Boundaries that are kept in memory come on top, and are given what is left over.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data import Part, Splits
from dcq_ray.digests import json_sha256
from dcq_ray.errors import ClusterError, SectionTrainingError
from dcq_ray.phases.committed import section_tasks
from dcq_ray.phases.context import Network, choose_device
from dcq_ray.phases.dump import boundary_values
from dcq_ray.phases.objective import objective_loss, section_objective
from dcq_ray.phases.reading import section_views
from dcq_ray.phases.recomputing import made_ahead, recomputed_sources
from dcq_ray.phases.reduce import untrained_student
from dcq_ray.phases.sources import Source, first_batches, label_source, with_noise
from dcq_ray.phases.starting import better_of, student_section
from dcq_ray.phases.views import images_of_view, recomputes
from dcq_ray.records import Boundary, Card, GpuMemory, RunContext, seal_json, unseal_json
from dcq_ray.section import train_module
from dcq_ray.stitch import reestimate_batchnorm
from dcq_ray.storage import open_store
from dcq_ray.validate import compare, predict

# The second step is the first with gradients and optimizer state at once.
NUM_STEPS = 3
NUM_BATCHES = 2
GPU_MEMORY_FILE = "gpu-memory.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """A card whose memory is watched."""

    card: Card
    reset: Callable[[], None]
    """Give back what is reserved and not in use, and begin a new peak."""
    peak_bytes: Callable[[], int]
    """The most that was reserved since then."""


def cuda_meter(device: torch.device) -> Meter:
    """The meter of a GPU that this process has for itself."""

    def reset() -> None:
        # Graphs hold themselves in circles.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)

    return Meter(card=cuda_card(device), reset=reset, peak_bytes=peak_bytes)


def cuda_card(device: torch.device) -> Card:
    """The GPU behind a device of this process."""
    properties = torch.cuda.get_device_properties(device)
    return Card(name=properties.name, total_bytes=properties.total_memory)


def gpu_memory_key(context: RunContext, card: Card) -> str:
    """Digest of all that a run's bytes on a card depend on."""
    return json_sha256(
        {
            "tasks": [task.digest for task in section_tasks(context)],
            "data_batch_size": context.job.data.batch_size,
            "reestimate": context.job.reduce.reestimate_batchnorm,
            "card": [card.name, card.total_bytes],
        }
    )


def kept_gpu_memory(context: RunContext, card: Card) -> GpuMemory | None:
    """What was measured for this very run on such a card, as its run directory has it, or None."""
    content = open_store(context.run_dir).read_bytes_or_none(GPU_MEMORY_FILE)
    if content is None:
        return None
    try:
        found = unseal_json(GpuMemory, content)
    except ValueError:
        return None
    return found if found.key == gpu_memory_key(context, card) else None


def measure_gpu_memory(context: RunContext, network: Network, splits: Splits, meter: Meter) -> GpuMemory:
    """Try all of a run's work on a card, and keep what it took in the run directory; the network ends on the CPU, unchanged.

    Raises:
        ClusterError: the card is too small for a section, or for the whole network.
    """
    torch.set_num_threads(context.job.train.num_threads)
    device = choose_device(context.device)

    def peak_of(work: Callable[[], None], what: str) -> int:
        meter.reset()
        try:
            work()
            peak_bytes = meter.peak_bytes()
        except torch.OutOfMemoryError as error:
            raise ClusterError(_too_small(what, "more", meter.card)) from error
        finally:
            # What follows is not to pay for it.
            network.teacher.module.to("cpu")
            for section in network.sections:
                section.to("cpu")
        if peak_bytes > meter.card.total_bytes:
            raise ClusterError(_too_small(what, f"{peak_bytes:,} bytes", meter.card))
        return peak_bytes

    section_bytes = tuple(
        peak_of(partial(_train, context, index, network, splits, device), f"the training of section {index}")
        for index in range(len(context.plan.sections))
    )
    found = GpuMemory(
        key=gpu_memory_key(context, meter.card),
        card=meter.card,
        section_bytes=section_bytes,
        dump_bytes=peak_of(partial(_dump, context, network, splits, device), "the dump of activations"),
        score_bytes=peak_of(partial(_score, context, network, splits, device), "teacher and student side by side"),
    )
    meter.reset()
    open_store(context.run_dir).write_bytes(GPU_MEMORY_FILE, seal_json(found))
    return found


def _too_small(what: str, needed: str, card: Card) -> str:
    return (
        f"GPU memory: {what} takes {needed} on a card ({card.name}) that has {card.total_bytes:,} bytes; lower "
        "train.batch_size (data.batch_size for dump and validation), cut the network into more sections, name cards with more "
        "memory (resources.accelerator), or train on CPUs (resources.gpus_per_section: 0)"
    )


def _train(context: RunContext, index: int, network: Network, splits: Splits, device: torch.device) -> None:
    """A section's training, as `train_section` makes it, with a few steps."""
    job = context.job
    with contextlib.ExitStack() as stack:
        inputs, *targets = _sources(context, index, network, splits, device)
        module = student_section(context, index, network, inputs, device, resumed=False)
        batch_size = min(job.train.batch_size, inputs.num_samples)
        num_steps = min(NUM_STEPS, inputs.num_samples // batch_size)

        def batches_in_order() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
            generator = torch.Generator().manual_seed(job.seed)
            for step in range(num_steps):
                positions = np.arange(step * batch_size, (step + 1) * batch_size)
                value, *others = (source.read(positions) for source in (inputs, *targets))
                yield with_noise(value, job.train.input_noise, generator), tuple(others)

        def batches(_: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
            if not recomputes(job):
                return batches_in_order()
            ahead = made_ahead(batches_in_order(), num_threads=job.train.num_threads)
            stack.callback(ahead.close)
            return ahead

        start = copy.deepcopy(module)
        loss = objective_loss(context, index, network, device)
        # Random numbers may lead anywhere; the memory was taken all the same.
        with contextlib.suppress(SectionTrainingError):
            train_module(
                module,
                batches,
                settings=job.train.model_copy(update={"epochs": 1}),
                steps_per_epoch=num_steps,
                loss=loss,
                device=device,
                what=f"section {index}",
            )
        if job.train.start == "fitted":
            better_of(start, module, [inputs, *targets], loss, batch_size=job.data.batch_size)
        if job.reduce.reestimate_batchnorm:
            reestimate_batchnorm(
                module, first_batches(inputs, job.data.batch_size, NUM_BATCHES * job.data.batch_size), device
            )


def _sources(
    context: RunContext, index: int, network: Network, splits: Splits, device: torch.device
) -> tuple[Source, ...]:
    """What a section reads: its input, its targets."""
    boundaries = section_views(context, index)[0]
    labels = (label_source(splits, device),) if section_objective(context, index).labels else ()
    if recomputes(context.job):
        return (*recomputed_sources(context, boundaries, network, splits, device), *labels)
    return (*(_stand_in(boundary, device) for boundary in boundaries), *labels)


def _stand_in(boundary: Boundary, device: torch.device) -> Source:
    """Random numbers in the place of a stored boundary, made float32 as its rows are."""
    dtype = torch.float16 if boundary.dtype == "float16" else torch.float32
    generator = torch.Generator(device).manual_seed(boundary.index)

    def read(positions: np.ndarray) -> Tensor:
        shape = (len(positions), *boundary.shape)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).float()

    return Source(read=read, num_samples=boundary.num_samples)


def _dump(context: RunContext, network: Network, splits: Splits, device: torch.device) -> None:
    sections = [section.to(device) for section in network.sections]
    positions = np.arange(min(context.job.data.batch_size, len(splits.train)))
    images = images_of_view(context, splits, positions, None).to(device)
    for _, value in boundary_values(sections, images, len(sections)):
        value.to("cpu", torch.float32)


def _score(context: RunContext, network: Network, splits: Splits, device: torch.device) -> None:
    """The whole student is calibrated and re-estimated, and goes beside the teacher through a few batches."""
    batch_size = context.job.data.batch_size
    student = untrained_student(context, network, splits.train, device)
    if context.job.reduce.reestimate_batchnorm:
        reestimate_batchnorm(student, _batches(splits.train, batch_size), device)
    predict(student, _batches(splits.train, batch_size), device)
    sections = [section.to(device) for section in network.sections]
    # While the student stays where it is, the teacher stands for it, too: their activations are of the same shapes.
    compare(sections, sections, _batches(splits.train, batch_size), device)


def _batches(part: Part, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, min(len(part), NUM_BATCHES * batch_size), batch_size):
        yield part.images(np.arange(start, min(start + batch_size, len(part))))
