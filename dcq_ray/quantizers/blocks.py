"""Chains of element-wise operations in blocks that stay in the processor's cache.

On a large tensor every operation of a chain reads and writes memory. Taken block by block only the first reads it and the
last writes it. Values are the same to the bit, since each depends on its own place alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# float32 blocks of the two or three tensors of a chain fit a core's own cache; smaller ones cost calls.
NUM_VALUES = 65536


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of several tensors of one shape, one after the other, as views: who writes one writes its tensor.

    All of them at once where blocks gain nothing (a GPU, small tensors), where the tensors lie in memory in unlike orders, and
    where a graph is recorded: its batch may have any size, and the number of blocks would bound that.
    """
    first = tensors[0]
    if torch.compiler.is_compiling():
        yield tensors
        return
    count = first.numel()
    if first.device.type != "cpu" or count <= NUM_VALUES or not _lie_alike(tensors):
        yield tensors
        return
    flat = [tensor.as_strided((count,), (1,)) for tensor in tensors]
    for start in range(0, count, NUM_VALUES):
        yield tuple(tensor[start : start + NUM_VALUES] for tensor in flat)


def _lie_alike(tensors: tuple[Tensor, ...]) -> bool:
    first = tensors[0]
    dense = first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))
    return dense and all(tensor.stride() == first.stride() for tensor in tensors)
