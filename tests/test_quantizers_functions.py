"""The fast functions beside the plain formulas, which say `where` and compare; other laws are tested with the quantizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcq_ray.quantizers.blocks import NUM_VALUES
from dcq_ray.quantizers.functions import (
    Clipped,
    LearnedClip,
    LearnedStep,
    TanhLevels,
    TernaryLevels,
    level,
    ternary_signs,
)

# (low, high, has_zero): unsigned and signed grids, and one signed bit.
LEVELS = [(0, 1, True), (0, 15, True), (-1, 1, True), (-7, 7, True), (-8, 7, True), (-1, 1, False)]


def plain_level(value: Tensor, step: Tensor, low: int, high: int, has_zero: bool) -> Tensor:
    if not has_zero:
        return torch.where(value >= 0, step, -step)
    return step * torch.clamp(torch.round(value / step), low, high)


def gradients(function: object, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the inputs under an output gradient that is fixed."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    output = function(*leaves)  # type: ignore[operator]
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(9)))
    return (output.detach(), *(leaf.grad for leaf in leaves))


@settings(deadline=None, max_examples=60)
@given(
    levels=st.sampled_from(LEVELS),
    step=st.floats(0.01, 2.0),
    size=st.sampled_from([(5,), (3, 4, 5), (2, NUM_VALUES // 2 + 7)]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_plain_formulas(
    levels: tuple[int, int, bool], step: float, size: tuple[int, ...], seed: int
) -> None:
    low, high, _ = levels
    value = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    value.view(-1)[0] = 0.0
    scale = torch.tensor(step)
    given_gradient = torch.randn(size, generator=torch.Generator().manual_seed(9))
    expected = plain_level(value, scale, *levels)
    scaled = value / scale
    assert torch.equal(level(value, scale, *levels), expected)

    output, of_value, of_step = gradients(lambda v, s: LearnedStep.apply(v, s, *levels, 0.5), value, scale)
    inside = (scaled > low) & (scaled < high)
    assert torch.equal(output, expected)
    assert torch.equal(of_value, torch.where(inside, given_gradient, 0.0))
    slope = torch.where(inside, expected / scale - scaled, expected / scale)
    torch.testing.assert_close(of_step.double(), 0.5 * (slope.double() * given_gradient).sum(), rtol=1e-4, atol=2e-3)

    output, of_value, of_step = gradients(lambda v, s: LearnedClip.apply(v, s, *levels), value, scale)
    above, below = scaled >= high, (scaled <= low if low else scaled < 0)
    assert torch.equal(output, expected)
    assert torch.equal(of_value, torch.where(above | below, 0.0, given_gradient))
    of_clip = (given_gradient * above).double().sum() - (given_gradient * (below & (low < 0))).double().sum()
    torch.testing.assert_close(of_step.double(), high * of_clip, rtol=1e-4, atol=2e-3)

    output, of_value = gradients(lambda v: Clipped.apply(v, scale, *levels), value)
    assert torch.equal(output, expected)
    # A value within rounding of the clip may count as inside or not.
    clear = ((scaled - low).abs() > 1e-5) & ((scaled - high).abs() > 1e-5)
    passes = torch.where((scaled >= low) & (scaled <= high), given_gradient, 0.0)
    assert torch.equal(of_value[clear], passes[clear])


@pytest.mark.parametrize(("low", "high"), [(0, 15), (-7, 7)])
def test_the_gradient_passes_at_both_ends_of_a_fixed_clip(low: int, high: int) -> None:
    step = torch.tensor(0.37)
    ends = torch.tensor([low, high]) * step
    _, of_value = gradients(lambda v: Clipped.apply(v, step, low, high, True), ends)
    assert (of_value != 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_per_channel_is_that_many_steps(channels_last: bool) -> None:
    value = torch.randn(6, 40, 20, 20, generator=torch.Generator().manual_seed(1))
    if channels_last:
        value = value.contiguous(memory_format=torch.channels_last)
    steps = torch.linspace(0.1, 0.6, 6).reshape(6, 1, 1, 1)
    output, of_value, of_steps = gradients(lambda v, s: LearnedStep.apply(v, s, -8, 7, True, 1.0), value, steps)
    output_gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    for channel in range(6):
        one, step = value[channel].clone().requires_grad_(), steps[channel].reshape(()).clone().requires_grad_()
        LearnedStep.apply(one, step, -8, 7, True, 1.0).backward(output_gradient[channel])  # type: ignore[no-untyped-call]
        assert torch.equal(of_value[channel], one.grad)
        torch.testing.assert_close(of_steps[channel].reshape(()), step.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", [Clipped, LearnedClip, LearnedStep])
def test_a_single_step_may_have_the_dimensions_of_the_values(function: type[torch.autograd.Function]) -> None:
    value = torch.randn(1, NUM_VALUES + 3, generator=torch.Generator().manual_seed(4))
    rest = (0.5,) if function is LearnedStep else ()

    def found(step: Tensor) -> list[Tensor]:
        inputs = (value,) if function is Clipped else (value, step)
        return list(
            gradients(lambda v, s=step: function.apply(v, s, -7, 7, True, *rest), *inputs)  # type: ignore[misc]
        )

    for one, other in zip(found(torch.tensor(0.2)), found(torch.tensor([[0.2]])), strict=True):
        assert torch.equal(one.reshape(other.shape), other)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), threshold=st.floats(0.0, 2.0))
def test_ternary_levels_and_gradients_are_those_of_the_plain_formulas(seed: int, threshold: float) -> None:
    value = torch.randn(3, NUM_VALUES // 2, generator=torch.Generator().manual_seed(seed))
    limit, positive, negative = torch.tensor(threshold), torch.tensor(0.7), torch.tensor(1.3)
    value[0, :2] = torch.stack([limit, -limit])
    above, below = value > limit, value < -limit
    assert torch.equal(ternary_signs(value, limit), above.float() - below.float())
    output, of_value, of_positive, of_negative = gradients(
        lambda v, p, n: TernaryLevels.apply(v, limit, p, n), value, positive, negative
    )
    output_gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(output, torch.where(above, positive, torch.where(below, -negative, 0.0)))
    assert torch.equal(of_value, output_gradient * torch.where(above, positive, torch.where(below, negative, 1.0)))
    torch.testing.assert_close(of_positive, (output_gradient * above).sum(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(of_negative, -(output_gradient * below).sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_tanh_levels_have_the_gradient_of_the_normalised_tanh(bits: int) -> None:
    weight = torch.randn(3, NUM_VALUES // 2, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor(0.3)
    output, of_weight = gradients(lambda w: TanhLevels.apply(w, scale, 2**bits - 1), weight)
    largest = torch.tanh(weight).abs().max()
    _, expected = gradients(lambda w: scale * torch.tanh(w) / largest, weight)
    torch.testing.assert_close(of_weight, expected, rtol=1e-5, atol=1e-8)
    integers = output / (scale / (2**bits - 1))
    assert len(output.unique()) <= 2**bits
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
