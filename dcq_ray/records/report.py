"""The report: what a run gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dcq_ray.records.deploy import DeployReport
from dcq_ray.records.plan import BitsWork, LayerPlan
from dcq_ray.records.version import FORMAT_VERSION
from dcq_ray.records.work import LossPoint, MergeStep, SectionFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherReport:
    model: str
    top1: float | None
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentReport:
    top1: float | None
    sha256: str
    num_bytes_packed: int
    bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineReport:
    """A rival trained from the same teacher, data and quantizer with the same budget."""

    method: str
    budget: Literal["passes", "cpu-seconds"] = "passes"
    budget_cpu_seconds: float | None = None
    """What the run took; None where passes are counted."""
    top1: float | None
    cpu_seconds: float
    """Of the chosen rate."""
    lr: float
    held_out_top1: float | None
    tried_lrs: tuple[float, ...]
    num_sample_passes: int
    seed: int = 0
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionReport:
    index: int
    modules: tuple[str, ...]
    num_parameters: int
    bits: float
    initial_loss: float | None
    final_loss: float | None
    relative_error: float | None
    top1_alone: float | None
    agreement_alone: float | None
    seconds: float
    cpu_seconds: float
    device: str
    restarts: int
    loss_curve: tuple[LossPoint, ...]
    num_bytes_packed: int
    input_wait_seconds: float = 0.0
    """Of its training: spent on getting batches."""
    read_seconds: float = 0.0
    """Spent on opening its boundaries, and on reading those that fit into memory."""
    start_seconds: float = 0.0
    """Spent on its start, fitted or not."""
    kept_start: bool = False
    """Whether it is as it began, since its training made it worse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The stitched student against the teacher on held-out images."""

    num_samples: int
    top1: float | None
    top5: float | None
    agreement_with_teacher: float
    boundary_errors: tuple[float, ...]
    """Relative L2 error of the student's activations at boundaries 1 … n, each on the student's own inputs."""
    teacher_top1: float | None
    metric: float | None
    teacher_metric: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDiagnosis:
    """A quantized student's layer."""

    module: str
    level_shares: tuple[float, ...]
    """Of its weights at the levels that occur, ascending; empty above 4 bits."""
    num_channels: int
    num_constant_channels: int
    """Output channels that were the same on all images, at all places: they carry nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Where accuracy is lost between the teacher and the stitched student; scores are top-1, without labels agreement."""

    num_samples: int
    """The first so many held-out images."""
    teacher_score: float
    after: tuple[int, ...]
    """Sections, ascending."""
    scores: tuple[float, ...]
    """With all sections up to each of `after` the student's, and the teacher's behind them."""
    layers: tuple[LayerDiagnosis, ...]

    def __post_init__(self) -> None:
        if len(self.after) != len(self.scores):
            raise ValueError(f"{len(self.scores)} scores after {len(self.after)} sections")

    @property
    def losses(self) -> tuple[float, ...]:
        """What each step of the waterfall costs, as a fraction; negative where the score rises."""
        before = (self.teacher_score, *self.scores)
        return tuple(earlier - later for earlier, later in zip(before, self.scores, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCpuSeconds:
    teacher: float = 0.0
    dump: float = 0.0
    train: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds by the clock; a phase whose result was reused counts what it cost when it was computed."""

    dump_seconds: float
    train_seconds: float
    reduce_seconds: float
    total_seconds: float
    makespan_lower_bound_seconds: float
    cpu_seconds: PhaseCpuSeconds


RunStatus = Literal["succeeded", "failed", "running", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run gave; `report.json`."""

    format_version: int = FORMAT_VERSION
    name: str
    status: RunStatus
    run_digest: str
    teacher: TeacherReport
    student: StudentReport | None
    untrained_top1: float | None
    baseline: BaselineReport | None
    """The rival to which `gap_closed` refers: dorefa at equal passes where it was trained, else the first of all."""
    baselines: tuple[BaselineReport, ...] = ()
    gap_closed: float | None
    sections: tuple[SectionReport, ...]
    layers: tuple[LayerPlan, ...] = ()
    multiply_accumulates_by_bits: tuple[BitsWork, ...] = ()
    unquantized_share: float = 0.0
    """Of the teacher's parameters: weights outside of Conv and Linear layers."""
    failures: tuple[SectionFailure, ...]
    validation: ValidationReport | None
    diagnosis: Diagnosis | None = None
    deploy: DeployReport | None = None
    """Of `dcq-ray export --latency`, which keeps it in a file of its own."""
    merge_steps: tuple[MergeStep, ...] = ()
    """What was done to the stitched student, in order, and what it gave on held-out images."""
    timings: Timings
    notes: tuple[str, ...]
    """What a reader should know: no labels, a gate missed, weights left alone."""
    versions: dict[str, str]
    started_at: str
    num_test_samples: int
    num_skipped_images: int = 0
    """Chosen ones that could not be used, where `data.on_error` is skip."""
    max_drop: float | None
