"""Losses by hand, and that they never broadcast."""

from __future__ import annotations

import math

import pytest
import torch

from dcq_ray.losses import (
    attention,
    channel_nmse,
    cosine,
    cross_entropy,
    distillation,
    loss_function,
    mse,
    nmse,
    smoothed_cross_entropy,
)


def test_losses_by_hand() -> None:
    output, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert nmse(output, target) == pytest.approx(8 / 25)
    assert mse(output, target) == pytest.approx(4)
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([2])) == pytest.approx(math.log(4))
    # student (1/2, 1/2), teacher (3/4, 1/4) at temperature 1
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(1.0)(torch.zeros(1, 2), teacher) == pytest.approx(expected, rel=1e-5)
    assert distillation(2.0)(teacher, teacher) == pytest.approx(0, abs=1e-6)


def test_channels_are_normalised_by_hand() -> None:
    # Channel 0: targets 0, 2 (variance 1), errors 1, 1; channel 1: targets 10, 30 (variance 100), errors 10, 0.
    target = torch.tensor([[[0.0, 2.0], [10.0, 30.0]]])
    output = torch.tensor([[[1.0, 3.0], [20.0, 30.0]]])
    assert channel_nmse(output, target) == pytest.approx((1 / 1 + 50 / 100) / 2)
    # A dead channel counts as one of a thousandth of the mean variance: (1 / (0.001 * 50) + 0) / 2.
    target, output = torch.tensor([[[5.0, 5.0], [10.0, 30.0]]]), torch.tensor([[[6.0, 4.0], [10.0, 30.0]]])
    assert channel_nmse(output, target) == pytest.approx((1 / 0.05) / 2)


def test_channels_count_alike_whatever_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 8, 3, 4, 4, generator=generator)
    scale = torch.tensor([1.0, 10.0, 3.0]).view(1, 3, 1, 1)
    assert channel_nmse(output * scale, target * scale) == pytest.approx(float(channel_nmse(output, target)), rel=1e-5)
    assert nmse(output * scale, target * scale) != pytest.approx(float(nmse(output, target)), rel=1e-3)


def test_cosine_by_hand() -> None:
    target = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    # cos = 24 / 25 and 0; the size of an output does not count.
    output = torch.tensor([[4.0, 3.0], [0.0, 5.0]])
    assert cosine(output, target) == pytest.approx(((1 - 24 / 25) + 1) / 2)
    assert cosine(7 * output, target) == pytest.approx(float(cosine(output, target)))


def test_attention_by_hand() -> None:
    # One channel, two positions: maps (9, 16) / sqrt(337) and (1, 0); nmse = (4 + 16) / 1.
    output, target = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 0.0]]])
    first, second = 9 / math.sqrt(337), 16 / math.sqrt(337)
    assert attention(output, target) == pytest.approx(20 + (first - 1) ** 2 + second**2, rel=1e-6)
    # Without positions there is no map.
    flat_output, flat_target = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert attention(flat_output, flat_target) == nmse(flat_output, flat_target)


def test_smoothed_labels_by_hand() -> None:
    # Softmax (3/4, 1/4); label 0 smoothed by 0.2 over two classes: 0.8 + 0.1 and 0.1.
    logits, label = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert smoothed_cross_entropy(0.2)(logits, label) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(smoothed_cross_entropy(0.0)(logits, label), cross_entropy(logits, label))


def test_losses_never_broadcast() -> None:
    for name in ("nmse", "mse", "distillation"):
        with pytest.raises(ValueError, match="shape"):
            loss_function(name, temperature=1.0)(torch.zeros(4, 1), torch.zeros(4))


def test_nmse_of_a_zero_target_is_finite_where_the_output_is_zero_too() -> None:
    assert nmse(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def test_nmse_of_a_target_that_has_faded_has_gradients_that_a_float_holds() -> None:
    output = torch.full((2, 3), 0.5, requires_grad=True)
    loss = nmse(output, torch.full((2, 3), 1e-12))
    # 6 x 0.25 over 6 x 1e-8; its gradient 2 x 0.5 over 6 x 1e-8
    assert loss.item() == pytest.approx(0.25e8)
    loss.backward()
    assert output.grad is not None
    assert output.grad[0, 0].item() == pytest.approx(1e8 / 6)
    assert nmse(torch.full((2, 3), 2e-4), torch.full((2, 3), 1e-4)) == pytest.approx(1.0)
