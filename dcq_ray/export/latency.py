"""What an exported ONNX graph gains on this processor: bytes, and seconds beside the same network in full precision.

ONNX Runtime runs both with one thread, in turns, so that whatever else the machine does falls on both; medians are kept. The
student's graph is run as it is, with integer weights that become floats at every run, and unpacked, with weights that did once.
The weights' values do not matter for the speed of a graph in full precision: that one is of the teacher's network as it is built.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcq_ray.export.onnx_graph import open_onnx, write_onnx
from dcq_ray.export.student import Student
from dcq_ray.records.deploy import DeployReport, Latency
from dcq_ray.teacher import build_network

BATCH_SIZES = (1, 32)
NUM_THREADS = 1
NUM_WARM_UPS = 3
MIN_RUNS, MAX_RUNS = 15, 200
SECONDS_PER_BATCH_SIZE = 5.0
CPU_FILE = Path("/proc/cpuinfo")

Run = Callable[[NDArray[np.float32]], object]


def measure_deploy(student: Student, path: str, *, batch_sizes: Sequence[int] = BATCH_SIZES) -> DeployReport:
    """Compare the student's ONNX file at `path` with its teacher's network in full precision; raises ExportError."""
    import onnx
    import onnxruntime

    example = student.example()
    with tempfile.TemporaryDirectory() as folder:
        teacher_path = str(Path(folder) / "teacher.onnx")
        network = build_network(student.job.teacher, job_folder=student.job_folder).to("cpu").eval()
        write_onnx(network, example, teacher_path, layers=(), state={}, metadata={})
        runs = (
            open_onnx(path, num_threads=NUM_THREADS),
            open_onnx(path, num_threads=NUM_THREADS, unpacked=True),
            open_onnx(teacher_path, num_threads=NUM_THREADS),
        )
        latencies = []
        for size in batch_sizes:
            indices = np.resize(np.arange(len(student.held_out)), size)
            latencies.append(_latency(runs, student.held_out.images(indices).numpy()))
        return DeployReport(
            student_sha256=student.metadata["student_sha256"],
            student_num_bytes=Path(path).stat().st_size,
            teacher_num_bytes=Path(teacher_path).stat().st_size,
            student_weight_num_bytes=weight_num_bytes(onnx.load(path)),
            teacher_weight_num_bytes=weight_num_bytes(onnx.load(teacher_path)),
            latencies=tuple(latencies),
            num_threads=NUM_THREADS,
            processor=_processor(),
            runtime=f"ONNX Runtime {onnxruntime.__version__}",
        )


def weight_num_bytes(model: Any) -> int:
    """Bytes of a graph's initialisers, elements packed as their type says: 2 bits of an INT2 are a quarter of a byte."""
    import onnx

    narrow = {f"{sign}INT{bits}": bits for sign in ("", "U") for bits in (2, 4)}
    total = 0
    for tensor in model.graph.initializer:
        bits = narrow.get(onnx.TensorProto.DataType.Name(tensor.data_type))
        if bits is None:
            bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += -(-int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8)
    return total


def _latency(runs: Sequence[Run], images: NDArray[np.float32]) -> Latency:
    """Of the student, the student unpacked, and the teacher."""
    for run in runs:
        for _ in range(NUM_WARM_UPS):
            run(images)
    end = time.monotonic() + SECONDS_PER_BATCH_SIZE
    seconds: list[list[float]] = [[] for _ in runs]
    num_runs = 0
    while num_runs < MIN_RUNS or (num_runs < MAX_RUNS and time.monotonic() < end):
        # Who comes first or last may find other caches: they take turns in that too.
        first = num_runs % len(runs)
        for number in (*range(first, len(runs)), *range(first)):
            started = time.perf_counter()
            runs[number](images)
            seconds[number].append(time.perf_counter() - started)
        num_runs += 1
    student, unpacked, teacher = (statistics.median(found) for found in seconds)
    return Latency(
        batch_size=len(images),
        num_runs=num_runs,
        student_seconds=student,
        unpacked_seconds=unpacked,
        teacher_seconds=teacher,
    )


def _processor() -> str:
    """The processor's name as the system gives it."""
    if CPU_FILE.exists():
        for line in CPU_FILE.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
