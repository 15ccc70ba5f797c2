"""Work and its results: what a worker is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

from dcq_ray.records.plan import PartitionPlan
from dcq_ray.records.version import FORMAT_VERSION
from dcq_ray.spec import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """All that a worker needs to take part in a run; small, so it travels with every task."""

    job: Job
    job_folder: str
    """Importable in every process, so that the user's modules reach the workers."""
    run_dir: str
    cache_dir: str
    plan: PartitionPlan
    epoch: int
    """Of the lease under which the driver holds the run directory; a result with an older one does not count."""
    device: str
    """`cpu`, `cuda`, or `auto`: cuda where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionTask:
    """The training of one section; its digest covers all that determines the result."""

    index: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """Mean loss over the steps since the point before."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionResult:
    """The commit mark of a finished section; it names the attempt that holds the weights."""

    format_version: int = FORMAT_VERSION
    index: int
    task_digest: str
    epoch: int
    attempt: str
    weights_sha256: str
    initial_loss: float | None
    """Of the first step; null where no step was taken."""
    final_loss: float | None
    """Mean of the last epoch."""
    num_steps: int
    num_sample_passes: int
    seconds: float
    cpu_seconds: float
    input_wait_seconds: float
    device: str
    restarts: int
    loss_curve: tuple[LossPoint, ...]
    read_seconds: float = 0.0
    """Until its boundaries were open, and in memory where they fit."""
    start_seconds: float = 0.0
    """Until its weights were where training begins."""
    kept_start: bool = False
    """Whether the weights are those before the training, which made them worse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionFailure:
    """A section that could not be trained; the others' results stay."""

    index: int
    error_type: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionMeasurement:
    """The teacher with one section replaced, on held-out images."""

    index: int
    task_digest: str
    top1_alone: float | None
    agreement_alone: float
    divergence_alone: float
    """Mean Kullback-Leibler divergence, in nats, of its predictions from the teacher's."""
    relative_error: float
    """Norm of (student section - teacher section) over norm of teacher section, on the teacher's own inputs."""
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStep:
    """What a step of the merge did to the stitched student's score on held-out images."""

    name: str
    score_before: float
    """Top-1; without labels the agreement with the teacher."""
    score_after: float
    """Of the polish: after its best epoch."""
    accepted: bool
    """Whether it was kept; otherwise the student is as it was before."""
