"""Sources: what a section reads in training, as rows at positions: stored boundaries, labels, noisy inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data import Splits
from dcq_ray.errors import DataError, ShardError
from dcq_ray.phases.dump import boundary_store
from dcq_ray.records import Boundary, RunContext
from dcq_ray.shards import BoundaryReader, load_manifest, open_boundary

# Activation quantizers start from what so many samples show; the train part is shuffled, so the first ones are a fair choice.
CALIBRATION_SAMPLES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of one tensor: `read` gives those at positions, on the training device; activations as float32."""

    read: Callable[[np.ndarray], Tensor]
    num_samples: int


def boundary_source(
    context: RunContext, boundary: Boundary, device: torch.device, memory_bytes: int, stack: contextlib.ExitStack
) -> Source:
    """A stored boundary, kept in memory where it fits; its files stay open until the stack is closed.

    Raises:
        ShardError: its shards are missing or damaged; they are struck off, and the next run dumps them again.
    """
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

    return Source(read=read, num_samples=reader.num_samples)


def label_source(splits: Splits | None, device: torch.device) -> Source:
    """Labels int64 of the train images; raises DataError where they have none."""
    if splits is None or splits.train.labels is None:
        raise DataError(
            "train.last_loss: cross-entropy needs labels of the train images; use distillation, or give labels"
        )
    labels = torch.from_numpy(splits.train.labels).to(device)

    def read(positions: np.ndarray) -> Tensor:
        return labels.index_select(0, torch.from_numpy(positions).to(device))

    return Source(read=read, num_samples=len(labels))


def first_batches(source: Source, batch_size: int, num_wanted: int = CALIBRATION_SAMPLES) -> Iterator[Tensor]:
    """The first so many rows in batches."""
    num_samples = min(source.num_samples, num_wanted)
    for start in range(0, num_samples, batch_size):
        yield source.read(np.arange(start, min(start + batch_size, num_samples)))


def with_noise(inputs: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Inputs [B, C, ...] of which half, at random, get Gaussian noise of `level` times their channel's root mean square.

    It stands for the errors of the student sections before, which a section meets only when it is stitched. Half stay clean,
    as in QDrop (Wei et al. 2022, arXiv 2203.05740, section 4), so that the section keeps to the teacher's own inputs too.
    The draws are made on the CPU, the same for every device.
    """
    if level == 0:
        return inputs
    rest = [dimension for dimension in range(inputs.ndim) if dimension != 1]
    size = inputs.square().mean(rest, keepdim=True).sqrt()
    noise = torch.randn(inputs.shape, generator=generator)
    noise *= torch.rand(inputs.shape, generator=generator) < 0.5
    return inputs + level * size * noise.to(inputs.device)


def _resident(reader: BoundaryReader, device: torch.device) -> Source:
    """The whole boundary as one tensor on the training device, in its stored dtype."""
    values = torch.from_numpy(reader.read(np.arange(reader.num_samples))).to(device)

    def read(positions: np.ndarray) -> Tensor:
        # Indexing copies, so that a section which works in place cannot change what is stored.
        return values.index_select(0, torch.from_numpy(positions).to(device)).float()

    return Source(read=read, num_samples=len(values))
