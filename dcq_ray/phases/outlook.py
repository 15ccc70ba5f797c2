"""Outlook: bytes, seconds and cost of a job on machines that are not here, from what was measured here and what is assumed of them.

Measured here: how the sections' costs are to each other and to the teacher's forward pass, and what it takes to convert and hash an
activation, which a CPU does everywhere. Assumed: how fast the teacher runs there, how fast the storage is, what an hour costs. With
work of W seconds and V bytes to move, a phase takes the longer of W and V / bandwidth: reads and writes go on beside the work.
Starts of processes, failures and the network's delays are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dcq_ray.phases.predict import Prediction
from dcq_ray.phases.trial import SectionCosts
from dcq_ray.phases.views import num_views
from dcq_ray.records import PartitionPlan
from dcq_ray.spec import Job

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a run takes; nothing of it was measured on the machines that it is of."""

    num_workers: int
    num_training: int
    """Workers that have a section to train: no more than there are sections."""
    written_bytes: int
    """By the dump, before compression."""
    read_bytes: int
    """By all sections over all epochs, where nothing of it stays in memory."""
    kept_read_bytes: int
    """By all sections where all of it stays in memory."""
    dump_seconds: float
    train_seconds: float
    reduce_seconds: float
    dump_limit: str
    """`work` or `storage`."""
    train_limit: str
    cost: float | None
    """Of all workers for the whole run, in the unit of the price."""

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.dump_seconds + self.train_seconds + self.reduce_seconds


def scaled(costs: Sequence[SectionCosts], images_per_second: float) -> tuple[SectionCosts, ...]:
    """Costs on a worker on which the teacher's forward pass runs at so many images a second; conversion and hashes stay."""
    times = images_per_second * sum(cost.forward_seconds for cost in costs)
    return tuple(
        replace(
            cost,
            forward_seconds=cost.forward_seconds / times,
            step_seconds=cost.step_seconds / times,
            start_seconds=cost.start_seconds / times,
        )
        for cost in costs
    )


def outlook(
    plan: PartitionPlan,
    job: Job,
    prediction: Prediction,
    *,
    storage_bytes_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> Outlook:
    """What a run takes.

    Args:
        prediction: from costs on the workers that are meant.
        storage_bytes_per_second: read or written by all workers together; None: storage is never waited for.
        price_per_hour: of one worker.
    """
    views = num_views(job)
    written = views * sum(boundary.num_bytes for boundary in plan.boundaries)
    pairs = zip(plan.boundaries, plan.boundaries[1:], strict=False)
    once = sum(before.num_bytes + after.num_bytes for before, after in pairs)
    # An epoch reads one view.
    read = once * job.train.epochs
    moving = [0.0 if storage_bytes_per_second is None else size / storage_bytes_per_second for size in (written, read)]
    work = [prediction.dump_seconds, prediction.train_seconds]
    seconds = [max(pair) for pair in zip(work, moving, strict=True)]
    limits = ["storage" if move > wanted else "work" for wanted, move in zip(work, moving, strict=True)]
    hours = prediction.num_workers * (sum(seconds) + prediction.reduce_seconds) / SECONDS_PER_HOUR
    return Outlook(
        num_workers=prediction.num_workers,
        num_training=min(prediction.num_workers, len(plan.sections)),
        written_bytes=written,
        read_bytes=read,
        kept_read_bytes=once * min(views, job.train.epochs),
        dump_seconds=seconds[0],
        train_seconds=seconds[1],
        reduce_seconds=prediction.reduce_seconds,
        dump_limit=limits[0],
        train_limit=limits[1],
        cost=None if price_per_hour is None else hours * price_per_hour,
    )
