"""Recomputing: what a section reads, from the frozen teacher run on each batch's images, with nothing stored.

For activations that no disk holds, and for views that are fresh in every epoch. The price is the teacher's sections up to the
last boundary that a section reads, run again for every batch; a thread does that a few batches ahead of the training.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dcq_ray.data import Splits
from dcq_ray.phases.context import Network
from dcq_ray.phases.sources import Source
from dcq_ray.phases.views import images_of_view
from dcq_ray.records import Boundary, RunContext

Batch = TypeVar("Batch")

# So many batches are made ahead; what is ready waits in (GPU) memory.
NUM_BATCHES_AHEAD = 2
SECONDS_BETWEEN_LOOKS = 0.1


def recomputed_sources(
    context: RunContext,
    boundaries: Sequence[Boundary],
    network: Network,
    splits: Splits,
    device: torch.device,
) -> list[Source]:
    """A source for each of these boundaries of one view; read at the same positions, they share one pass of the teacher.

    Activations are float32 whatever `storage.dtype` says. The latest batch's are kept, so one thread at a time may read.
    """
    last = max(boundary.index for boundary in boundaries)
    sections = [section.to(device) for section in network.sections[:last]]
    teacher_pass = _TeacherPass(context, sections, splits, boundaries, device)
    return [_source(teacher_pass, boundary) for boundary in boundaries]


def _source(teacher_pass: _TeacherPass, boundary: Boundary) -> Source:
    def read(positions: np.ndarray) -> Tensor:
        return teacher_pass.read(positions, boundary.index)

    return Source(read=read, num_samples=boundary.num_samples)


class _TeacherPass:
    """The teacher on one batch at a time, run as far as it was asked for."""

    def __init__(
        self,
        context: RunContext,
        sections: Sequence[torch.nn.Module],
        splits: Splits,
        boundaries: Sequence[Boundary],
        device: torch.device,
    ) -> None:
        self._context, self._sections, self._splits, self._device = context, sections, splits, device
        self._wanted, self._view = {boundary.index for boundary in boundaries}, boundaries[0].view
        self._positions: np.ndarray | None = None
        self._values: dict[int, Tensor] = {}

    def read(self, positions: np.ndarray, index: int) -> Tensor:
        """The activations [B, ...] at a wanted boundary."""
        if self._positions is None or not np.array_equal(positions, self._positions):
            images = images_of_view(self._context, self._splits, positions, self._view)
            self._positions, self._values = positions.copy(), {0: images.to(self._device)}
        reached = max(self._values)
        while reached < index:
            value = self._values[reached] if reached in self._wanted else self._values.pop(reached)
            with torch.no_grad():
                # A clone, since a section may work in place on its input.
                self._values[reached + 1] = self._sections[reached](value.clone())
            reached += 1
        # A copy, so that who reads may work in place on what he has; in the layout of what is stored, since a convolution of
        # images whose strides look like channels last sums in another order.
        value = self._values[index]
        return torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value)


def made_ahead(
    batches: Iterator[Batch], *, num_threads: int, num_ahead: int = NUM_BATCHES_AHEAD
) -> Generator[Batch, None, None]:
    """The same batches, made by a thread that is at most so many ahead; its errors are raised here, and it ends with this.

    Args:
        num_threads: CPU threads of each operation, as in the thread that trains: sums depend on it.
    """
    ready: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(num_ahead)
    ended = threading.Event()

    def put(batch: Batch | None, error: BaseException | None = None) -> bool:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((batch, error), timeout=SECONDS_BETWEEN_LOOKS)
                return True
        return False

    def make() -> None:
        torch.set_num_threads(num_threads)
        try:
            for batch in batches:
                if not put(batch):
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None)

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        ended.set()
        thread.join()
