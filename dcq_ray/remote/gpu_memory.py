"""Parts of a card's memory: the part that measured work needs, and that a worker takes no more than the part that it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ray
import torch

from dcq_ray.phases import activation_memory_bytes, choose_device, cuda_card, kept_gpu_memory
from dcq_ray.records import GpuMemory, RunContext

# Left to each process for what it takes of a card beside its tensors (CUDA's context, loaded kernels): an allowance, not a measure.
CONTEXT_BYTES = 600 * 2**20
SMALLEST_FRACTION = 0.01
# Over what was measured: the same work reserves now more, now less, as its blocks fall.
MARGIN = 1.2


def cap_gpu_memory() -> None:
    """Limit this worker's tensors to its part of the card, less what CUDA itself takes; beyond it torch raises OutOfMemoryError.

    Ray counts GPUs, not their memory. To be called at the start of every task and actor that computes, since processes are used
    again; without a GPU, or where torch cannot use it, nothing happens.
    """
    num_gpus = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    if num_gpus and torch.cuda.is_available():
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(num_gpus, total_bytes))


def memory_fraction(num_gpus: float, total_bytes: int) -> float:
    """The share of a card's bytes, in (0, 1], that the tensors of a worker with so many GPUs may take."""
    return 1.0 if num_gpus >= 1 else max(SMALLEST_FRACTION, num_gpus - CONTEXT_BYTES / total_bytes)


def needed_gpus(peak_bytes: int, total_bytes: int) -> float:
    """The part of a card that work needs whose tensors take so many bytes at most: hundredths, rounded up, 1 at most.

    Work that fits a whole card only without the margin gets that card.
    """
    needed = (MARGIN * peak_bytes + CONTEXT_BYTES) / total_bytes
    # The small number forgives products such as 100 * 0.29.
    return min(1.0, max(1, math.ceil(100 * needed - 1e-9)) / 100)


def held_bytes(context: RunContext, memory: GpuMemory, indices: Sequence[int]) -> int:
    """What a worker that trains these sections takes of a card at most.

    With the whole teacher, of which the sections that it trained before may still be there.
    """
    return sum(memory.section_bytes[index] for index in indices) + context.plan.teacher_num_bytes


def activation_bytes(context: RunContext, indices: Sequence[int], *, num_at_once: int) -> int:
    """How many bytes of activations a worker that trains these sections may keep in memory.

    On a card, where it was measured what the training takes, that is all the rest of the worker's part; else half.
    """
    device = choose_device(context.device)
    kept = kept_gpu_memory(context, cuda_card(device)) if device.type == "cuda" else None
    working = None if kept is None else math.ceil(MARGIN * held_bytes(context, kept, indices))
    return activation_memory_bytes(context.job, device, num_at_once=num_at_once, working_bytes=working)
