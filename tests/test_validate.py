"""Accuracy, agreement and errors against values by hand."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from dcq_ray.errors import DataError
from dcq_ray.validate import agreement, compare, divergence, predict, top_k

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])


def test_top_k_by_hand() -> None:
    labels = torch.tensor([1, 2, 0, 0])
    assert top_k(LOGITS, labels, 1) == 0.5
    assert top_k(LOGITS, labels, 2) == 0.75
    assert top_k(LOGITS, labels, 5) == 1.0


def test_top_k_refuses_another_number_of_labels() -> None:
    with pytest.raises(DataError, match="4 predictions for 3 labels"):
        top_k(LOGITS, torch.zeros(3, dtype=torch.int64), 1)


def test_agreement_by_hand() -> None:
    assert agreement(LOGITS, LOGITS) == 1.0
    assert agreement(LOGITS, LOGITS.flip(1)) == 0.25


def test_predict_joins_batches_and_puts_the_mode_back() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train()
    images = torch.randn(5, 3)
    assert torch.equal(predict(module, images.split(2), CPU), torch.cat([module[1](part) for part in images.split(2)]))
    assert module.training
    with pytest.raises(DataError, match="no images"):
        predict(module, [], CPU)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.factor)


@pytest.mark.parametrize("num_at_once", [2, 3, 9])
def test_batches_beside_each_other_give_the_same_logits_in_order(num_at_once: int) -> None:
    torch.manual_seed(0)
    module = Remembering(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    batches = [torch.randn(size, 1, 8, 8) for size in (4, 4, 4, 4, 3)]
    expected = predict(module, iter(batches), CPU)
    before, threads = module.training, torch.get_num_threads()
    assert torch.equal(predict(module, iter(batches), CPU, num_at_once=num_at_once), expected)
    assert (module.training, torch.get_num_threads()) == (before, threads)
    with pytest.raises(DataError, match="no images"):
        predict(module, iter([]), CPU, num_at_once=num_at_once)


class Remembering(nn.Sequential):
    """Keeps its input between layers, as a network that two threads share would mix up."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        time.sleep(0.01)
        return super().forward(self.images)


def test_boundary_errors_add_up_over_sections_that_work_in_place() -> None:
    images = torch.tensor([[3.0, 4.0]])
    found = compare([Scale(1), Scale(2)], [Scale(1.1), Scale(2)], [images, images], CPU)
    assert found.boundary_errors == pytest.approx((0.1, 0.1))
    assert torch.equal(images, torch.tensor([[3.0, 4.0]]))
    assert torch.allclose(found.logits, 2.2 * torch.cat([images, images]))
    assert torch.equal(found.reference, 2 * torch.cat([images, images]))
    found = compare([Scale(1), Scale(2)], [Scale(1.1), Scale(2.2)], [images], CPU)
    assert found.boundary_errors == pytest.approx((0.1, 0.21))


@pytest.mark.parametrize("num_at_once", [2, 3])
def test_batches_beside_each_other_are_compared_as_one_after_the_other(num_at_once: int) -> None:
    torch.manual_seed(0)
    teacher = [Remembering(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(144, 3))]
    student = [Remembering(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(144, 3))]
    batches = [torch.randn(size, 1, 8, 8) for size in (4, 4, 4, 3)]
    alone = compare(teacher, student, iter(batches), CPU)
    beside = compare(teacher, student, iter(batches), CPU, num_at_once=num_at_once)
    assert torch.equal(alone.logits, beside.logits)
    assert torch.equal(alone.reference, beside.reference)
    assert alone.boundary_errors == beside.boundary_errors


def test_boundary_errors_of_a_zero_boundary() -> None:
    images = torch.ones(1, 2)
    assert compare([Scale(0)], [Scale(0)], [images], CPU).boundary_errors == (0.0,)
    assert compare([Scale(0)], [Scale(1)], [images], CPU).boundary_errors == (float("inf"),)


def test_compare_refuses_no_images() -> None:
    with pytest.raises(DataError, match="no images"):
        compare([Scale(1)], [Scale(1)], [], CPU)


def test_divergence_by_hand() -> None:
    # Softmax of (ln 3, 0) is (3/4, 1/4), of (0, 0) it is (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
    reference, ours = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(ours, reference) == pytest.approx(expected)
    assert divergence(torch.cat([ours, reference]), torch.cat([reference, reference])) == pytest.approx(expected / 2)
    assert divergence(reference, reference) == 0.0
