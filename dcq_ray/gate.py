"""The quality gate: how much a student may lose before a finished run counts as missed."""

from __future__ import annotations

from dcq_ray.errors import QualityGateMissed
from dcq_ray.records import RunReport


def accuracy_drop(report: RunReport) -> float | None:
    """Top-1 that the student lost against the teacher, as a fraction: on test images, else held-out ones, else None."""
    if report.student is not None and report.student.top1 is not None and report.teacher.top1 is not None:
        return report.teacher.top1 - report.student.top1
    validation = report.validation
    if validation is not None and validation.top1 is not None and validation.teacher_top1 is not None:
        return validation.teacher_top1 - validation.top1
    return None


def check_gate(report: RunReport) -> None:
    """Raise QualityGateMissed where the student lost more than `reduce.max_drop` percentage points, or no one can tell."""
    if report.max_drop is None:
        return
    drop = accuracy_drop(report)
    if drop is None:
        raise QualityGateMissed(
            f"run {report.name}: reduce.max_drop is {report.max_drop:g} points, but without labels no accuracy is known; "
            "give labels to the test or the train images, or remove the gate"
        )
    # Fractions such as 0.97 - 0.96 carry noise in their last bits, which must not miss a gate.
    if 100 * drop > report.max_drop + 1e-9:
        raise QualityGateMissed(
            f"run {report.name}: the student lost {100 * drop:.2f} points of top-1, the gate allows {report.max_drop:g}; the "
            "report and the student are kept; train longer, use more bits where the report shows the loss, or raise the gate"
        )
