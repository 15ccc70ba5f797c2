"""Predict: how long each section and the whole will take on so many workers, from measured costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from dcq_ray.phases.prepare import COST_BATCH_SIZE
from dcq_ray.records import PartitionPlan, SectionPlan
from dcq_ray.spec import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds on a machine like the one on which the plan was made."""

    num_workers: int
    dump_seconds: float
    section_seconds: tuple[float, ...]
    train_seconds: float
    """With sections started longest first, each on the next free worker."""
    makespan_seconds: float


def predict(plan: PartitionPlan, job: Job, num_workers: int) -> Prediction:
    """Seconds per section and for dump and training together on `num_workers` (at least 1) workers."""
    num_samples = plan.boundaries[0].num_samples
    cost_batch = min(COST_BATCH_SIZE, num_samples, job.data.batch_size)
    num_passes = num_samples * job.train.epochs / cost_batch
    seconds = tuple(section.step_seconds * num_passes for section in plan.sections)
    forward_seconds = sum(section.forward_seconds for section in plan.sections) * num_samples / cost_batch
    train_seconds = makespan(seconds, num_workers)
    dump_seconds = forward_seconds / num_workers
    return Prediction(
        num_workers=num_workers,
        dump_seconds=dump_seconds,
        section_seconds=seconds,
        train_seconds=train_seconds,
        makespan_seconds=dump_seconds + train_seconds,
    )


def longest_first(sections: Sequence[SectionPlan]) -> list[SectionPlan]:
    """Sections in the order in which to start them: the costliest first, which ends at most 4/3 of the optimum late.

    R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969, theorem 2.
    """
    return sorted(sections, key=lambda section: (-section.step_seconds, section.index))


def makespan(seconds: Sequence[float], num_workers: int) -> float:
    """When the last of these pieces of work ends, longest first, each on the worker that is free first."""
    workers = [0.0] * num_workers
    for duration in sorted(seconds, reverse=True):
        heapq.heappush(workers, heapq.heappop(workers) + duration)
    return max(workers)


def makespan_lower_bound(seconds: Sequence[float], num_workers: int) -> float:
    """No schedule on so many workers is shorter: all work shared evenly, or the longest piece."""
    return max(sum(seconds) / num_workers, max(seconds, default=0.0))
