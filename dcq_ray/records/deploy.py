"""What a student's ONNX graph takes and how fast it runs, beside its teacher's in full precision; `deploy.json`."""

from __future__ import annotations

from dataclasses import dataclass

from dcq_ray.records.version import FORMAT_VERSION

DEPLOY_FILE = "deploy.json"
# ONNX Runtime's session option. Without it DequantizeLinear stays for kernels that take integers, and runs every time where there
# is none.
UNPACKING = "session.disable_quant_qdq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds of a batch, medians over runs that took turns."""

    batch_size: int
    num_runs: int
    """Of each, after the warm-up."""
    student_seconds: float
    unpacked_seconds: float
    """Of the student, where the runtime turns its weights into floats once, as it opens the graph."""
    teacher_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployReport:
    """A student's graph beside one of the teacher's network in full precision, run by the same runtime on the same processor."""

    format_version: int = FORMAT_VERSION
    student_sha256: str
    student_num_bytes: int
    """Of the file."""
    teacher_num_bytes: int
    student_weight_num_bytes: int
    """Of the graph's tensors as it holds them; what a runtime makes of them in memory may be more."""
    teacher_weight_num_bytes: int
    latencies: tuple[Latency, ...]
    num_threads: int
    processor: str
    runtime: str
