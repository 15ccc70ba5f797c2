"""Predict: how long each section and the whole will take on so many workers, from measured costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from dcq_ray.partition import balanced_cuts
from dcq_ray.phases.prepare import COST_BATCH_SIZE
from dcq_ray.phases.views import num_views
from dcq_ray.records import PartitionPlan, SectionPlan
from dcq_ray.spec import Job

# Of a step: forward, and backward to the inputs, but no gradients of weights, in the sections that look-ahead runs through.
FROZEN_SHARE = 2 / 3


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
    steps = [section.step_seconds for section in plan.sections]
    ahead = len(steps) if job.train.look_ahead == "all" else job.train.look_ahead
    seconds = tuple(
        (step + FROZEN_SHARE * sum(steps[index + 1 : index + 1 + ahead])) * num_passes
        for index, step in enumerate(steps)
    )
    forward_seconds = sum(section.forward_seconds for section in plan.sections) * num_samples / cost_batch
    train_seconds = (
        makespan(seconds, num_workers)
        if job.train.inputs == "teacher"
        else streamed_makespan(seconds, num_workers, job.train.stagger)
    )
    dump_seconds = forward_seconds * num_views(job) / num_workers
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


def streamed_makespan(seconds: Sequence[float], num_workers: int, stagger: float) -> float:
    """When sections that train in step end, each run of neighbours on one worker, the slowest run as fast as possible.

    All go at the pace of the slowest worker, and the last one starts `stagger` of a training late, less what its own run takes
    part in from the beginning. One worker does all there is to do, and waits for nobody.
    """
    num_runs = min(num_workers, len(seconds))
    ends = [*(piece + 1 for piece in balanced_cuts(seconds, num_runs)), len(seconds)]
    slowest = max(sum(seconds[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return slowest * (1 + stagger * (1 - 1 / num_runs))


def run_lower_bound(
    *, dump: float, sections: Sequence[float], measuring: float, finish: float, num_workers: int
) -> float:
    """No schedule of a run on so many workers is shorter than this, in the unit of what its parts take.

    Either all of it shared evenly; or what cannot be at once: the dump shared evenly, the longest section, and the stitched
    student's BatchNorm and validations. Neither the teacher's preparation nor any start of a process is in it.

    Args:
        measuring: scores of the teacher, of the untrained student, and of sections alone.
    """
    chain = dump / num_workers + max(sections, default=0.0) + finish
    return max((dump + sum(sections) + measuring + finish) / num_workers, chain)
