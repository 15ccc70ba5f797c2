"""The deploy check in words: what the student's ONNX graph gains on one processor, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcq_ray.records.deploy import UNPACKING, DeployReport
from dcq_ray.report.words import ABSENT, size

DEPLOY_COLUMNS = ("measure", "student", "student, unpacked", "teacher")
# Within so much of each other two medians count as equal.
NOISE = 0.1


def deploy_rows(deploy: DeployReport) -> list[tuple[str, ...]]:
    """Rows of DEPLOY_COLUMNS."""
    rows: list[tuple[str, ...]] = [
        (name, size(ours), ABSENT, size(theirs))
        for name, ours, theirs in (
            ("ONNX file", deploy.student_num_bytes, deploy.teacher_num_bytes),
            ("weights in the graph", deploy.student_weight_num_bytes, deploy.teacher_weight_num_bytes),
        )
    ]
    rows += [
        (
            f"batch of {found.batch_size}",
            *(f"{1000 * s:.2f} ms" for s in (found.student_seconds, found.unpacked_seconds, found.teacher_seconds)),
        )
        for found in deploy.latencies
    ]
    return rows


def deploy_caption(deploy: DeployReport) -> str:
    """What was measured, and how."""
    runs = ", ".join(str(found.num_runs) for found in deploy.latencies)
    return (
        f"The exported ONNX graph beside the teacher's in full precision: {deploy.runtime}, "
        f"{deploy.num_threads} thread{'' if deploy.num_threads == 1 else 's'}, {deploy.processor}; medians of {runs} runs in turns"
    )


def deploy_verdict(deploy: DeployReport) -> str:
    """Whether the student is smaller and faster here, in sentences."""
    smaller = deploy.teacher_num_bytes / max(1, deploy.student_num_bytes)
    packed = [(found.batch_size, found.student_seconds / found.teacher_seconds) for found in deploy.latencies]
    unpacked = [(found.batch_size, found.unpacked_seconds / found.teacher_seconds) for found in deploy.latencies]
    told = (
        f"The student's file is {smaller:.1f} times smaller than the teacher's. On this processor it is {_told(packed)}; unpacked "
        f"once as it is opened (ONNX Runtime's session option {UNPACKING}=1, weights as floats in memory) {_told(unpacked)}."
    )
    gained = any(ratio < 1 - NOISE for _, ratio in (*packed, *unpacked))
    return told if gained else f"{told} What is gained here is size, not speed."


def print_deploy(deploy: DeployReport, console: Console) -> None:
    """Print the table, how it was measured, and what it means."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in DEPLOY_COLUMNS:
        table.add_column(name, justify="left" if name == DEPLOY_COLUMNS[0] else "right")
    for row in deploy_rows(deploy):
        table.add_row(*row)
    console.print(table)
    console.print(escape(deploy_caption(deploy)), style="dim")
    console.print(escape(deploy_verdict(deploy)))


def _told(ratios: Sequence[tuple[int, float]]) -> str:
    """Each batch size and how the seconds there compare."""
    parts = []
    for batch_size, ratio in ratios:
        kind = f"{1 / ratio:.2f} times faster" if ratio < 1 - NOISE else "as fast"
        kind = f"{ratio:.2f} times slower" if ratio > 1 + NOISE else kind
        parts.append(f"{kind} at a batch of {batch_size}")
    return ", ".join(parts)
