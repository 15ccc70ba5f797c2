"""Frozen records that cross a process or a file, and their JSON.

Fields are numbers, strings, flags, tuples, other records and the job: no tensors, no modules, nothing of Ray's. What can
be derived is a property. Accuracies are fractions in [0, 1], sizes bytes, times seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from dcq_ray.spec import Job

FORMAT_VERSION = 1

R = TypeVar("R")


@cache
def _cached_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    # A class is hashable; mypy takes its metaclass for a reason to doubt it.
    adapter: TypeAdapter[Any] = _cached_adapter(kind)
    return adapter


def to_json(record: Any) -> bytes:
    """A record as indented UTF-8 JSON."""
    return _adapter(type(record)).dump_json(record, indent=2) + b"\n"


def from_json(kind: type[R], content: bytes) -> R:
    """The record of that kind in JSON bytes; raises pydantic's ValidationError (a ValueError) where they do not fit."""
    record: R = _adapter(kind).validate_json(content)
    return record


def to_jsonable(record: Any) -> Any:
    """A record as plain dicts, lists, numbers and strings."""
    return _adapter(type(record)).dump_python(record, mode="json")


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """The tensor between two sections: boundary 0 is the network's input, the last one its output."""

    index: int
    cut: str
    """The module whose output this is; `input` and `output` at the ends."""
    shape: tuple[int, ...]
    """Of one sample, without the batch."""
    num_samples: int
    dtype: str
    """As stored: float16 or float32."""
    digest: str
    """Of all that determines the stored activations; their folder's name in the cache."""

    @property
    def bytes_per_sample(self) -> int:
        size = 2 if self.dtype == "float16" else 4
        for extent in self.shape:
            size *= extent
        return size

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, uncompressed, without the few of the headers."""
        return self.bytes_per_sample * self.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One Conv or Linear layer and the bits of its weights and of its input; 32 bits: left alone."""

    module: str
    kind: str
    num_weights: int
    scheme: str
    bits: int
    activation_scheme: str | None = None
    activation_bits: int = 32
    multiply_accumulates: int = 0
    """Per sample."""
    num_bytes: int = 0
    """Of the weights, packed in bits, with their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsWork:
    """Multiply-accumulates per sample with weights and inputs of so many bits."""

    bits: int
    activation_bits: int
    multiply_accumulates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionPlan:
    """Section k maps boundary k to boundary k + 1."""

    index: int
    modules: tuple[str, ...]
    """Names of the leaf modules in order of execution."""
    layers: tuple[LayerPlan, ...]
    num_parameters: int
    forward_seconds: float
    """Measured: one batch through the section, on this machine."""
    step_seconds: float
    """Measured: forward and backward of one batch."""
    multiply_accumulates: int
    """Per sample, in Conv and Linear layers."""

    @property
    def bits(self) -> float:
        """Mean bits per quantized weight; 32 where nothing is quantized."""
        quantized = [layer for layer in self.layers if layer.bits < 32]
        num_weights = sum(layer.num_weights for layer in quantized)
        return sum(layer.num_weights * layer.bits for layer in quantized) / num_weights if num_weights else 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """The teacher cut into sections; there is one boundary more than sections."""

    format_version: int = FORMAT_VERSION
    key: str
    """Digest of all that the plan was made from; a plan with another key is made again."""
    teacher_sha256: str
    teacher_num_bytes: int
    input_shape: tuple[int, ...]
    boundaries: tuple[Boundary, ...]
    sections: tuple[SectionPlan, ...]
    unquantized_parameters: tuple[str, ...]
    """Parameters with two or more dimensions that no quantizer reaches."""
    num_parameters: int
    """Of the whole network."""
    num_unquantized: int
    """Numbers in `unquantized_parameters`."""
    uncalled_layers: tuple[str, ...] = ()
    """Layers that the network never calls, but uses the weight of in a function; their inputs cannot be quantized."""
    num_bytes_packed: int
    """Of the student, its quantized weights packed in bits."""
    total_multiply_accumulates: int
    """Per sample, those outside of Conv and Linear layers too as far as they are counted (attention's projections)."""

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the interior boundaries; put them under `sections.cuts` to pin this plan."""
        return tuple(boundary.cut for boundary in self.boundaries[1:-1])

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for section in self.sections for layer in section.layers)

    @property
    def unquantized_share(self) -> float:
        """The share of the network's parameters that are weights outside of Conv and Linear layers."""
        return self.num_unquantized / self.num_parameters if self.num_parameters else 0.0

    @property
    def multiply_accumulates_by_bits(self) -> tuple[BitsWork, ...]:
        """Multiply-accumulates per sample by bits of weights and inputs, most first; 32 bits for what is left alone."""
        counts: dict[tuple[int, int], int] = {}
        for layer in self.layers:
            key = (layer.bits, layer.activation_bits)
            counts[key] = counts.get(key, 0) + layer.multiply_accumulates
        rest = self.total_multiply_accumulates - sum(counts.values())
        if rest > 0:
            counts[32, 32] = counts.get((32, 32), 0) + rest
        return tuple(
            BitsWork(bits=bits, activation_bits=activation_bits, multiply_accumulates=count)
            for (bits, activation_bits), count in sorted(counts.items(), key=lambda item: -item[1])
            if count
        )


# -- shards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard file of a boundary."""

    index: int
    file_name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """The commit mark of one boundary's shards, in order of the samples."""

    format_version: int = FORMAT_VERSION
    digest: str
    cut: str
    shape: tuple[int, ...]
    dtype: str
    compression: str
    num_samples: int
    samples_per_shard: int
    shards: tuple[ShardInfo, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


# -- work and its results ----------------------------------------------------------------------------------------------


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
    relative_error: float
    """Norm of (student section - teacher section) over norm of teacher section, on the teacher's own inputs."""


# -- the report --------------------------------------------------------------------------------------------------------


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
    """A rival trained from the same teacher, data and quantizer with as many sample passes."""

    method: str
    top1: float | None
    cpu_seconds: float
    lr: float
    held_out_top1: float | None
    tried_lrs: tuple[float, ...]
    num_sample_passes: int
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
    gap_closed: float | None
    sections: tuple[SectionReport, ...]
    layers: tuple[LayerPlan, ...] = ()
    multiply_accumulates_by_bits: tuple[BitsWork, ...] = ()
    unquantized_share: float = 0.0
    """Of the teacher's parameters: weights outside of Conv and Linear layers."""
    failures: tuple[SectionFailure, ...]
    validation: ValidationReport | None
    timings: Timings
    notes: tuple[str, ...]
    """What a reader should know: no labels, a gate missed, weights left alone."""
    versions: dict[str, str]
    started_at: str
    num_test_samples: int
    max_drop: float | None


# -- progress ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where one piece of work stands: a line on the screen."""

    phase: Literal["teacher", "plan", "dump", "train", "reduce", "baseline"]
    index: int | None = None
    """The section, in phase train."""
    state: Literal["waiting", "running", "done", "reused", "failed"] = "running"
    done: int = 0
    total: int = 0
    unit: str = "images"
    loss: float | None = None
    per_second: float | None = None
    seconds_left: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """What a run is doing: `status.json`, written by the driver every second or so."""

    format_version: int = FORMAT_VERSION
    name: str
    status: RunStatus
    updated_at: str
    host: str
    pid: int
    lines: tuple[Progress, ...]
    message: str
