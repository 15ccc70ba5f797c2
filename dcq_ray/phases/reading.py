"""What a section reads: the boundaries of its input and targets in every view, opened as sources of samples."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from dcq_ray.data import Splits
from dcq_ray.errors import ShardError
from dcq_ray.phases.context import Network
from dcq_ray.phases.objective import section_objective
from dcq_ray.phases.recomputing import recomputed_sources
from dcq_ray.phases.sources import Source, boundary_source, label_source
from dcq_ray.phases.views import boundary_views, recomputes
from dcq_ray.records import Boundary, RunContext


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
