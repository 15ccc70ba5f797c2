"""Frozen records that cross a process or a file, and their JSON.

Fields are numbers, strings, flags, tuples, other records and the job: no tensors, no modules, nothing of Ray's. What can
be derived is a property. Accuracies are fractions in [0, 1], sizes bytes, times seconds.
"""

from dcq_ray.records.gpu import Card, GpuMemory
from dcq_ray.records.json import from_json, seal_json, to_json, to_jsonable, unseal_json
from dcq_ray.records.plan import BitsWork, Boundary, LayerPlan, PartitionPlan, SectionPlan
from dcq_ray.records.progress import Progress, StatusReport
from dcq_ray.records.published import CURRENT_FILE, Current
from dcq_ray.records.report import (
    BaselineReport,
    Diagnosis,
    LayerDiagnosis,
    PhaseCpuSeconds,
    RunReport,
    RunStatus,
    SectionReport,
    StudentReport,
    TeacherReport,
    Timings,
    ValidationReport,
)
from dcq_ray.records.shards import ShardInfo, ShardManifest
from dcq_ray.records.version import FORMAT_VERSION
from dcq_ray.records.work import (
    LossPoint,
    MergeStep,
    RunContext,
    SectionFailure,
    SectionMeasurement,
    SectionResult,
    SectionTask,
)

__all__ = [
    "CURRENT_FILE",
    "FORMAT_VERSION",
    "BaselineReport",
    "BitsWork",
    "Boundary",
    "Card",
    "Current",
    "Diagnosis",
    "GpuMemory",
    "LayerDiagnosis",
    "LayerPlan",
    "LossPoint",
    "MergeStep",
    "PartitionPlan",
    "PhaseCpuSeconds",
    "Progress",
    "RunContext",
    "RunReport",
    "RunStatus",
    "SectionFailure",
    "SectionMeasurement",
    "SectionPlan",
    "SectionReport",
    "SectionResult",
    "SectionTask",
    "ShardInfo",
    "ShardManifest",
    "StatusReport",
    "StudentReport",
    "TeacherReport",
    "Timings",
    "ValidationReport",
    "from_json",
    "seal_json",
    "to_json",
    "to_jsonable",
    "unseal_json",
]
