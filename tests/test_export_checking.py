"""A file that gives other results than its student is told by them."""

from __future__ import annotations

import pytest
import torch

from dcq_ray.errors import ExportError
from dcq_ray.export.checking import LARGEST_TOLERANCE, MEAN_SQUARE_TOLERANCE, check_logits, check_report
from dcq_ray.records import ValidationReport

LOGITS = torch.tensor([[4.0, 0.0, -2.0], [0.0, 1.0, 0.5], [1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 2])


def check(found: torch.Tensor, *, labels: torch.Tensor | None = LABELS, steps_may_differ: bool = False) -> float:
    return check_logits(found, LOGITS, labels, steps_may_differ=steps_may_differ, source="s.onnx")


def test_the_largest_difference_is_told_as_a_share_of_the_largest_logit() -> None:
    assert check(LOGITS) == 0.0
    found = LOGITS.clone()
    found[1, 2] += 2.0**-14
    assert check(found) == 2.0**-14 / 4


def test_one_logit_beyond_float32_noise_is_refused() -> None:
    found = LOGITS.clone()
    found[1, 2] += 1.01 * LARGEST_TOLERANCE * 4
    with pytest.raises(
        ExportError, match=r"s\.onnx: its logits differ from the student's by 1\.0e-04 of their largest"
    ):
        check(found)


def test_where_steps_may_differ_all_logits_count_together() -> None:
    rms = float(LOGITS.square().mean().sqrt())
    found = LOGITS.clone()
    # One of twelve: the mean square is a twelfth of its own.
    found[0, 2] += 0.99 * MEAN_SQUARE_TOLERANCE * rms * 12**0.5
    check(found, steps_may_differ=True)
    found[0, 2] = LOGITS[0, 2] + 1.01 * MEAN_SQUARE_TOLERANCE * rms * 12**0.5
    with pytest.raises(ExportError, match="root mean square"):
        check(found, steps_may_differ=True)


@pytest.mark.parametrize("steps_may_differ", [False, True])
def test_another_top1_is_refused_even_a_better_one(steps_may_differ: bool) -> None:
    near = LOGITS.clone()
    near[3] = torch.tensor([0.0, 1.0, 1.0000001])
    with pytest.raises(
        ExportError, match=r"got top-1 100\.0000% on 4 held-out images, expected the student's 75\.0000%"
    ):
        check(near, steps_may_differ=steps_may_differ)


def test_without_labels_every_prediction_counts() -> None:
    assert check(LOGITS + 1e-5, labels=None) < LARGEST_TOLERANCE
    found = LOGITS.clone()
    found[1] = torch.tensor([1.1, 1.0, 0.5])
    with pytest.raises(ExportError, match=r"got agreement with the student 75\.0000%"):
        check(found, labels=None)


@pytest.mark.parametrize("found", [torch.full((4, 3), torch.nan), LOGITS[:3], LOGITS[:, :2]])
def test_what_are_no_logits_is_refused(found: torch.Tensor) -> None:
    with pytest.raises(ExportError):
        check(found, labels=None)


@pytest.mark.parametrize("steps_may_differ", [False, True])
def test_one_nan_is_refused(steps_may_differ: bool) -> None:
    found = LOGITS.clone()
    found[0, 2] = torch.nan
    labels = torch.full((4,), 2)
    student = LOGITS.clone()
    student[0] = torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises(ExportError, match="differ"):
        check_logits(found, student, labels, steps_may_differ=steps_may_differ, source="s.onnx")


def report_of(top1: float | None, num_samples: int = 4) -> ValidationReport:
    return ValidationReport(
        num_samples=num_samples,
        top1=top1,
        top5=None,
        agreement_with_teacher=1.0,
        boundary_errors=(),
        teacher_top1=None,
        metric=None,
        teacher_metric=None,
    )


def test_a_student_that_gives_another_top1_than_its_report_is_refused() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    logits = torch.nn.functional.one_hot(labels, 3).float()
    check_report(logits, labels, report_of(1.0), on_cpu=True, source="s")
    with pytest.raises(
        ExportError, match=r"^s: got top-1 100\.0000% on 4 held-out images, expected the report's 75\.0000%"
    ):
        check_report(logits, labels, report_of(0.75), on_cpu=True, source="s")
    # An image whose two greatest logits are the same but for noise may turn, as another device adds in another order.
    logits[3] = torch.tensor([1.0, 1.0 - 1e-5, 0.0])
    check_report(logits, labels, report_of(0.75), on_cpu=True, source="s")
    with pytest.raises(ExportError, match=r"the report's 50\.0000%"):
        check_report(logits, labels, report_of(0.5), on_cpu=True, source="s")
    logits[3] = torch.tensor([1.0, 1.0 - 1e-2, 0.0])
    check_report(logits, labels, report_of(0.75), on_cpu=False, source="s")
    with pytest.raises(ExportError, match="held-out"):
        check_report(logits, labels, report_of(0.75), on_cpu=True, source="s")


def test_a_student_on_other_images_than_its_reports_is_refused() -> None:
    logits = torch.eye(3)
    with pytest.raises(ExportError, match="got 3 held-out images, expected the 4 of the report"):
        check_report(logits, None, report_of(None), on_cpu=True, source="s")
    check_report(logits, None, report_of(None, num_samples=3), on_cpu=True, source="s")
