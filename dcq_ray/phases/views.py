"""Views: the boundaries of a plan, once for the images as they are, or once for each augmented view of them.

Owns which view an epoch sees and under which digest a view's activations lie. A view is drawn as an epoch of that number is
in end-to-end training, so a job with as many views as epochs sees what its rivals see.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from dcq_ray.data import Splits, view_images
from dcq_ray.digests import json_sha256
from dcq_ray.records import Boundary, RunContext
from dcq_ray.spec import Job


def recomputes(job: Job) -> bool:
    """Whether sections run the teacher again for what they read, and nothing is dumped."""
    return job.storage.activations == "recomputed"


def num_views(job: Job) -> int:
    """How many views of the train images the sections train on; epochs take them in turn.

    Each is a dump; where nothing is dumped, every epoch has its own.
    """
    augment, epochs = job.train.augment, job.train.epochs
    if augment is None:
        return 1
    return max(1, epochs if recomputes(job) else min(augment.views, epochs))


def boundary_views(context: RunContext) -> tuple[tuple[Boundary, ...], ...]:
    """For each view the boundaries of the plan, with the digests under which that view's activations lie."""
    augment, boundaries = context.job.train.augment, context.plan.boundaries
    if augment is None:
        return (boundaries,)
    drawn = {"flip": augment.flip, "crop_padding": augment.crop_padding, "seed": context.job.seed}
    return tuple(
        tuple(
            replace(boundary, view=view, digest=json_sha256({"boundary": boundary.digest, "view": view, **drawn}))
            for boundary in boundaries
        )
        for view in range(num_views(context.job))
    )


def all_boundaries(context: RunContext) -> tuple[Boundary, ...]:
    """The boundaries of all views, view by view."""
    return tuple(boundary for view in boundary_views(context) for boundary in view)


def images_of_view(context: RunContext, splits: Splits, positions: np.ndarray, view: int | None) -> Tensor:
    """Train images float32 [B, C, H, W] at positions, as that view shows them; None: as they are."""
    augment = context.job.train.augment
    if view is None or augment is None:
        return splits.train.images(positions)
    return view_images(
        splits.train,
        positions,
        flip=augment.flip,
        crop_padding=augment.crop_padding,
        seed=context.job.seed,
        epoch=view,
    )
