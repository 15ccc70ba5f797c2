"""Predict: how long each section and the whole will take on so many workers, from measured costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from dcq_ray.data import Splits
from dcq_ray.partition import balanced_cuts
from dcq_ray.phases.diagnosis import MAX_DIAGNOSED_SAMPLES, waterfall_steps
from dcq_ray.phases.reduce import MAX_ALONE_SAMPLES, MAX_BATCHNORM_SAMPLES
from dcq_ray.phases.refitting import MAX_JUDGED_SAMPLES
from dcq_ray.phases.sources import CALIBRATION_SAMPLES
from dcq_ray.phases.starting import NUM_COMPARED_SAMPLES
from dcq_ray.phases.trial import SectionCosts
from dcq_ray.phases.views import num_views, recomputes
from dcq_ray.records import PartitionPlan, SectionPlan
from dcq_ray.spec import Job

# Of a step: forward, and backward to the inputs, but no gradients of weights, in the sections that look-ahead runs through.
FROZEN_SHARE = 2 / 3
# A fit whose rows are chosen together, over one whose rows are not: ResNet-20 at 1 bit, processor seconds.
COUPLED_FIT_TIMES = 1.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds on a machine like the one on which the costs were measured, without what processes need to start."""

    num_workers: int
    dump_seconds: float
    section_seconds: tuple[float, ...]
    """Of each on one worker: start, steps, the choice between them, BatchNorm."""
    train_seconds: float
    """With sections started longest first, each on the next free worker."""
    reduce_seconds: float
    """Sections alone and the untrained student shared by the workers; then what the stitched student needs, on one."""
    makespan_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCounts:
    """How many images a job has."""

    train: int
    held_out: int
    test: int


def sample_counts(splits: Splits) -> SampleCounts:
    """Of a job's parts."""
    test = 0 if splits.test is None or splits.test.labels is None else len(splits.test)
    return SampleCounts(train=len(splits.train), held_out=len(splits.held_out), test=test)


def predict(costs: Sequence[SectionCosts], job: Job, counts: SampleCounts, num_workers: int) -> Prediction:
    """Seconds per section, and for dump, training and merge together on `num_workers` (at least 1) workers."""
    batch_size = min(job.train.batch_size, counts.train)
    num_steps = job.train.epochs * (counts.train // batch_size)
    steps = [cost.step_seconds for cost in costs]
    ahead = len(steps) if job.train.look_ahead == "all" else job.train.look_ahead
    num_forward = 2 * min(NUM_COMPARED_SAMPLES, counts.train) if job.train.start == "fitted" else 0
    if job.reduce.reestimate_batchnorm:
        num_forward += min(CALIBRATION_SAMPLES, counts.train)
    seconds = tuple(
        cost.start_seconds
        + (step + FROZEN_SHARE * sum(steps[index + 1 : index + 1 + ahead])) * num_steps
        + cost.forward_seconds * num_forward
        + (_recompute_seconds(costs, index, job, counts, num_steps * batch_size) if recomputes(job) else 0.0)
        for index, (cost, step) in enumerate(zip(costs, steps, strict=True))
    )
    per_sample = sum(cost.forward_seconds + cost.store_seconds for cost in costs)
    dump_seconds = 0.0 if recomputes(job) else per_sample * counts.train * num_views(job) / num_workers
    train_seconds = (
        makespan(seconds, num_workers)
        if job.train.inputs == "teacher"
        else streamed_makespan(seconds, num_workers, job.train.stagger)
    )
    reduce_seconds = _measuring_seconds(costs, job, counts) / num_workers + _finish_seconds(costs, job, counts)
    return Prediction(
        num_workers=num_workers,
        dump_seconds=dump_seconds,
        section_seconds=seconds,
        train_seconds=train_seconds,
        reduce_seconds=reduce_seconds,
        makespan_seconds=dump_seconds + train_seconds + reduce_seconds,
    )


def last_boundary(job: Job, index: int, num_sections: int) -> int:
    """The last boundary that a section reads in training: its own end, or that of the last section that it looks ahead to."""
    ahead = num_sections if job.train.look_ahead == "all" else job.train.look_ahead
    return min(index + 1 + ahead, num_sections)


def recomputed_passes(plan: PartitionPlan, job: Job) -> float:
    """How many passes of the whole teacher it takes to recompute all that all sections read for one image, by MACs."""
    macs = [section.multiply_accumulates for section in plan.sections]
    read = sum(sum(macs[: last_boundary(job, index, len(macs))]) for index in range(len(macs)))
    return read / max(1, sum(macs))


def _recompute_seconds(
    costs: Sequence[SectionCosts], index: int, job: Job, counts: SampleCounts, num_sample_passes: int
) -> float:
    """Of the teacher's own sections, run for what a section reads: of all samples its inputs, of most its targets too."""
    forward = [cost.forward_seconds for cost in costs]
    num_inputs, num_whole = 0, num_sample_passes
    if job.train.start == "fitted":
        num_inputs += min(job.train.start_samples, counts.train)
        num_whole += 2 * min(NUM_COMPARED_SAMPLES, counts.train)
    if job.reduce.reestimate_batchnorm:
        num_inputs += min(CALIBRATION_SAMPLES, counts.train)
    return num_inputs * sum(forward[:index]) + num_whole * sum(forward[: last_boundary(job, index, len(forward))])


def _measuring_seconds(costs: Sequence[SectionCosts], job: Job, counts: SampleCounts) -> float:
    """Of every section alone, each beside a pass of the teacher, and of the teacher and the untrained student on test images."""
    forward = [cost.forward_seconds for cost in costs]
    alone = sum(sum(forward) + sum(forward[index:]) for index in range(len(forward)))
    scores = sum(forward) * 2 * counts.test
    if counts.test and job.reduce.reestimate_batchnorm:
        scores += sum(forward) * min(MAX_BATCHNORM_SAMPLES, counts.train)
    return alone * min(MAX_ALONE_SAMPLES, counts.held_out) + scores


def _finish_seconds(costs: Sequence[SectionCosts], job: Job, counts: SampleCounts) -> float:
    """Of the stitched student: BatchNorm and its judge, validation beside the teacher, the waterfall, test images, a polish."""
    forward = [cost.forward_seconds for cost in costs]
    whole = sum(forward)
    num_passes = 2 * counts.held_out + counts.test
    if job.reduce.reestimate_batchnorm:
        num_passes += min(MAX_BATCHNORM_SAMPLES, counts.train)
        num_passes += 2 * counts.held_out if job.reduce.roll_back else 0
    waterfall = 2 * whole + sum(sum(forward[index + 1 :]) for index in waterfall_steps(len(forward)))
    refits = 0.0
    if job.reduce.refit:
        # Two fits of each section, each end tried in front of the sections behind, and all refitted together.
        tried = 2 * sum(sum(forward[index:]) for index in range(len(forward))) + whole
        fits = 2 * sum(cost.start_seconds for cost in costs)
        if job.reduce.refit_metric == "predictions":
            num_batches = min(job.train.start_samples, counts.train) / min(job.train.batch_size, counts.train)
            fits = COUPLED_FIT_TIMES * fits + FROZEN_SHARE * num_batches * sum(cost.step_seconds for cost in costs)
        refits = fits + tried * min(MAX_JUDGED_SAMPLES, counts.held_out)
    num_steps = job.reduce.polish_epochs * (counts.train // min(job.train.batch_size, counts.train))
    polish = sum(cost.step_seconds for cost in costs) * num_steps
    return whole * num_passes + waterfall * min(MAX_DIAGNOSED_SAMPLES, counts.held_out) + polish + refits


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
