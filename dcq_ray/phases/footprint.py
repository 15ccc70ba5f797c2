"""Footprint: how much memory a section's worker, or a dump's, holds at most, from the plan and a trial of its sections.

What counts is anonymous memory: the pages of libraries and of mapped shards are the files', and the system takes them back when it
must. With P the section's parameters, T the teacher's bytes, B the greater of the two batch sizes, S the samples of a shard:

    section = base + max(3 T, T + 44 P + resident + max(step, start))
    step    = 2 kept + 12 B (numbers of its input and of its target)
    start   = 8 n (numbers of its input) + min(1 GiB, 2 n kept / B) + moments + kept
    dump    = base + max(3 T, T + S (stored bytes of a sample at all boundaries) + one shard + 2 kept of the costliest section)

- `base`: interpreter, libraries, a first optimizer.
- 3 T: the teacher's file, its tensors, the module.
- 44 P, eleven copies in float32: the student and its copy from the start, gradients, Adam's two moments; and while a checkpoint is
  made, the student and the moments copied, and once more as the file's bytes.
- `resident`: the boundaries that are kept in memory, in the stored dtype; at most what the job or the machine allows.
- `kept`: what a step of B samples keeps for its backward pass, measured in the trial, with that of the sections that look-ahead
  runs through; twice, since gradients and convolutions' own buffers are as large at most.
- 12 B: two batches at a time, each as stored and in float32.
- `start`: the fit on n images of a section's first weights, where the job has one.

Only `resident` grows with the number of train images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dcq_ray.phases.starting import MAX_START_INPUT_BYTES
from dcq_ray.phases.trial import SectionCosts
from dcq_ray.phases.views import num_views
from dcq_ray.quantizers.fitted import MAX_KEPT_BYTES
from dcq_ray.records import PartitionPlan
from dcq_ray.shards import samples_per_shard
from dcq_ray.spec import Job

# Measured with torch 2.14 for CUDA on Linux: 384 MiB after a first optimizer, 429 after a first convolution and its gradient.
BASE_BYTES = 460 * 2**20
OPENING_COPIES = 3
SECTION_COPIES = 11
TIMES_KEPT = 2
FLOAT_BYTES = 4
# Two batches, each in float32 and as stored.
BATCH_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The parts of what a worker holds at most, in bytes."""

    base_bytes: int
    teacher_bytes: int
    section_bytes: int = 0
    resident_bytes: int = 0
    """Boundaries, or a slice of all of them, in the stored dtype."""
    step_bytes: int = 0
    start_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """The greatest sum at any time."""
        working = self.section_bytes + self.resident_bytes + max(self.step_bytes, self.start_bytes)
        return self.base_bytes + max(OPENING_COPIES * self.teacher_bytes, self.teacher_bytes + working)


def section_footprint(
    plan: PartitionPlan, job: Job, index: int, costs: Sequence[SectionCosts], memory_bytes: int | None = None
) -> Footprint:
    """Of a worker that trains one section alone, on the CPU.

    Args:
        costs: of all sections, as `try_sections` measures them.
        memory_bytes: of activations that may be kept in memory; None: of all that there are.
    """
    boundaries = plan.boundaries[index : index + 2]
    share = None if memory_bytes is None else memory_bytes // (num_views(job) * len(boundaries))
    resident = sum(b.num_bytes for b in boundaries if share is None or b.num_bytes <= share) * num_views(job)
    # A trial is of a training's batch; calibration and BatchNorm take those of the data.
    batch_size = min(max(job.train.batch_size, job.data.batch_size), boundaries[0].num_samples)
    ahead = len(costs) if job.train.look_ahead == "all" else job.train.look_ahead
    kept_sample = sum(cost.kept_bytes for cost in costs[index : index + 1 + ahead]) / _trial_batch(plan, job)
    numbers = [math.prod(boundary.shape) for boundary in boundaries]
    kept = math.ceil(TIMES_KEPT * kept_sample * batch_size)
    return Footprint(
        base_bytes=BASE_BYTES,
        teacher_bytes=plan.teacher_num_bytes,
        section_bytes=SECTION_COPIES * FLOAT_BYTES * plan.sections[index].num_parameters,
        resident_bytes=resident,
        step_bytes=kept + BATCH_BYTES * batch_size * sum(numbers),
        start_bytes=_start_bytes(plan, job, numbers[0], costs[index], kept) if job.train.start == "fitted" else 0,
    )


def dump_footprint(plan: PartitionPlan, job: Job, costs: Sequence[SectionCosts]) -> Footprint:
    """Of a worker that dumps slices at all boundaries, on the CPU."""
    num_rows = min(samples_per_shard(job.data.batch_size), plan.boundaries[0].num_samples)
    batch_size = min(job.data.batch_size, num_rows)
    sample_bytes = [boundary.bytes_per_sample for boundary in plan.boundaries]
    kept_sample = max(cost.kept_bytes for cost in costs) / _trial_batch(plan, job)
    return Footprint(
        base_bytes=BASE_BYTES,
        teacher_bytes=plan.teacher_num_bytes,
        resident_bytes=num_rows * (sum(sample_bytes) + max(sample_bytes)),
        step_bytes=math.ceil(TIMES_KEPT * kept_sample * batch_size),
    )


def _trial_batch(plan: PartitionPlan, job: Job) -> int:
    return min(job.train.batch_size, plan.boundaries[0].num_samples)


def _start_bytes(plan: PartitionPlan, job: Job, num_inputs: int, cost: SectionCosts, kept: int) -> int:
    fitting = max(1, MAX_START_INPUT_BYTES // (FLOAT_BYTES * num_inputs))
    num_samples = min(fitting, job.train.start_samples, plan.boundaries[0].num_samples)
    live = math.ceil(2 * num_samples * cost.kept_bytes / _trial_batch(plan, job))
    return (
        num_samples * 2 * FLOAT_BYTES * num_inputs + min(MAX_KEPT_BYTES, live) + cost.moments_bytes + kept // TIMES_KEPT
    )
