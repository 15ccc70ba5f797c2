"""A worker that holds a part of a GPU takes no more of its memory than that part, so that its neighbours have theirs."""

from __future__ import annotations

import ray
import torch

# Left to each process for what it takes of a card beside its tensors (CUDA's context, loaded kernels): an allowance, not a measure.
CONTEXT_BYTES = 600 * 2**20
SMALLEST_FRACTION = 0.01


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
