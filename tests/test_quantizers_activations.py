"""Activation quantizers: levels and gradients by hand, laws of the level sets, edges, and where they start."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.activations import (
    ActivationStart,
    activation_start,
    dorefa_activation,
    level_range,
    lsq_activation,
    pact_activation,
    round_to_levels,
)

Quantizer = Callable[[Tensor, Tensor, int, bool], Tensor]
SCHEMES: dict[str, Quantizer] = {"dorefa": dorefa_activation, "pact": pact_activation, "lsq": lsq_activation}


def gradients(
    function: Quantizer, values: list[float], step: float, bits: int, signed: bool
) -> tuple[list[float], float]:
    """Gradients of the values and of the step, the output's being 1, 10, 100 …"""
    value, learned = torch.tensor(values, requires_grad=True), torch.tensor(step, requires_grad=True)
    function(value, learned, bits, signed).backward(10.0 ** torch.arange(len(values)))
    assert value.grad is not None
    return value.grad.tolist(), 0.0 if learned.grad is None else float(learned.grad)


# --- levels


def test_level_ranges_by_hand() -> None:
    assert [level_range(bits, False) for bits in (1, 2, 4, 8)] == [(0, 1), (0, 3), (0, 15), (0, 255)]
    assert [level_range(bits, True) for bits in (1, 2, 4, 8)] == [(-1, 1), (-1, 1), (-7, 7), (-127, 127)]


@pytest.mark.parametrize("name", SCHEMES)
def test_levels_without_a_sign_by_hand(name: str) -> None:
    value = torch.tensor([-1.0, 0.0, 0.25, 0.75, 0.8, 1.25, 1.6, 9.0])
    # two bits, step 0.5: x / s = -2, 0, 0.5, 1.5, 1.6, 2.5, 3.2, 18; ties to even: -2, 0, 0, 2, 2, 2, 3, 18; clamped to 0 … 3
    expected = 0.5 * torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 3.0, 3.0])
    assert torch.equal(SCHEMES[name](value, torch.tensor(0.5), 2, False), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_levels_with_a_sign_by_hand(name: str) -> None:
    value = torch.tensor([-9.0, -1.25, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 9.0])
    # three bits, step 0.5: x / s = -18, -2.5, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 18; ties to even and clamped to -3 … 3
    expected = 0.5 * torch.tensor([-3.0, -2.0, -2.0, 0.0, 0.0, 0.0, 2.0, 2.0, 3.0])
    assert torch.equal(SCHEMES[name](value, torch.tensor(0.5), 3, True), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_one_bit_by_hand(name: str) -> None:
    value = torch.tensor([-3.0, -0.1, 0.0, 0.25, 0.3, 2.0])
    # With a sign: -s below 0 and +s from 0 on. Without: 0 up to s / 2 (0.25 is a tie, to the even 0), then s.
    step = torch.tensor(0.5)
    assert torch.equal(SCHEMES[name](value, step, 1, True), torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.5, 0.5]))
    assert torch.equal(SCHEMES[name](value, step, 1, False), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.5]))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_is_used(name: str, bits: int, signed: bool) -> None:
    low, high = level_range(bits, signed)
    step = torch.tensor(0.3)
    integers = torch.arange(low, high + 1).float()
    if bits == 1 and signed:
        integers = torch.tensor([-1.0, 1.0])
    value = torch.linspace(-100, 100, 8001)
    assert torch.equal(SCHEMES[name](value, step, bits, signed).unique(), integers * step)


# --- gradients


def test_gradients_of_dorefa_by_hand() -> None:
    # two bits, step 1: the clip is 3, and both its ends belong to it; the clip is fixed
    assert gradients(dorefa_activation, [-0.1, 0.0, 1.2, 3.0, 3.1], 1.0, 2, False) == ([0, 10, 100, 1000, 0], 0)
    # three bits with a sign: -3 … 3
    assert gradients(dorefa_activation, [-3.1, -3.0, -0.4, 3.0, 3.1], 1.0, 3, True) == ([0, 10, 100, 1000, 0], 0)
    # one bit with a sign: -1 … 1
    assert gradients(dorefa_activation, [-1.1, -1.0, 0.4, 1.0, 1.1], 1.0, 1, True) == ([0, 10, 100, 1000, 0], 0)


def test_gradients_of_pact_without_a_sign_by_hand() -> None:
    # two bits, step 1, so a = 3: x passes in [0, a); da is 1 in [a, inf) and 0 elsewhere (PACT, eq. 3): 1000 + 10000.
    # s = a / 3, so ds = 3 da.
    found = gradients(pact_activation, [-0.1, 0.0, 2.9, 3.0, 3.1], 1.0, 2, False)
    assert found == ([0, 10, 100, 0, 0], 3 * 11000)


def test_gradients_of_pact_with_a_sign_by_hand() -> None:
    # three bits, step 1, so a = 3: x passes in (-a, a); da is 1 from a on and -1 up to -a: 1000 + 10000 - 1 - 10.
    found = gradients(pact_activation, [-3.1, -3.0, 2.9, 3.0, 3.1], 1.0, 3, True)
    assert found == ([0, 0, 100, 0, 0], 3 * 10989)
    # one bit: a = s = 1
    assert gradients(pact_activation, [-1.0, -0.9, 0.9, 1.0], 1.0, 1, True) == ([0, 10, 100, 0], 1000 - 1)


def test_gradients_of_lsq_without_a_sign_by_hand() -> None:
    # two bits, step 1: x passes in (0, 3); ds is 0 at and below 0, round(x) - x inside, 3 at and above 3:
    # 100 (1 - 1.25) + 1000 * 3 + 10000 * 3 = 32975. A vector is five samples of one value: times 1 / sqrt(1 * 3).
    values, step = gradients(lsq_activation, [-0.1, 0.0, 1.25, 3.0, 9.0], 1.0, 2, False)
    assert values == [0, 0, 100, 0, 0]
    assert step == pytest.approx(32975 / math.sqrt(3))


def test_gradients_of_lsq_with_a_sign_by_hand() -> None:
    # three bits, step 1: -3 at and below -3, round(x) - x inside, 3 at and above 3:
    # 1 (-3) + 10 (-3) + 100 (-1 + 1.25) + 1000 * 3 = 2992; times 1 / sqrt(1 * 3)
    values, step = gradients(lsq_activation, [-9.0, -3.0, -1.25, 3.0], 1.0, 3, True)
    assert values == [0, 0, 100, 0]
    assert step == pytest.approx(2992 / math.sqrt(3))


def test_gradients_of_lsq_of_one_signed_bit_by_hand() -> None:
    # The sign takes the place of the rounded quotient. Step 0.5: x / s = -4, -1, -0.5, 0, 0.5, 1, 2, and the ends are outside:
    # 1 (-1) + 10 (-1) + 100 (-1 + 0.5) + 1000 (1 - 0) + 10^4 (1 - 0.5) + 10^5 (1) + 10^6 (1) = 1105939; times 1 / sqrt(1 * 1)
    values, step = gradients(lsq_activation, [-2.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0], 0.5, 1, True)
    assert values == [0, 0, 100, 1000, 10000, 0, 0]
    assert step == 1105939


def test_gradient_scale_of_lsq_counts_the_values_of_a_sample() -> None:
    step = torch.tensor(1.0, requires_grad=True)
    lsq_activation(torch.full((7, 2, 3), 99.0), step, 4, False).sum().backward()
    # 42 values at 15; 6 of them in a sample: 42 * 15 / sqrt(6 * 15)
    assert float(step.grad) == pytest.approx(42 * 15 / math.sqrt(90))


# --- laws

values_of = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(list(SCHEMES)),
    values=values_of,
    bits=st.integers(1, 8),
    signed=st.booleans(),
    step=st.floats(2**-10, 3, width=32),
)
def test_all_schemes_compute_what_is_shipped(
    name: str, values: list[float], bits: int, signed: bool, step: float
) -> None:
    value, size = torch.tensor(values), torch.tensor(step)
    quantized = SCHEMES[name](value, size, bits, signed)
    assert torch.equal(quantized, round_to_levels(value, size, bits, signed))
    # Again it changes nothing, a larger value never gets a lower level, and each is an integer times the step.
    assert torch.equal(SCHEMES[name](quantized, size, bits, signed), quantized)
    assert (SCHEMES[name](value.sort().values, size, bits, signed).diff() >= 0).all()
    low, high = level_range(bits, signed)
    assert torch.isin(quantized, torch.arange(low, high + 1) * size).all()
    if signed and bits > 1:
        assert torch.equal(SCHEMES[name](-value, size, bits, signed), -quantized)


def test_rounding_is_that_of_the_quotient_and_not_of_a_product_with_the_reciprocal() -> None:
    step = torch.tensor(0.0371)
    ties = (torch.arange(0, 255) + 0.5) * step
    by_quotient = torch.round(ties / step)
    assert not torch.equal(by_quotient, torch.round(ties * (1 / step)))
    for function in SCHEMES.values():
        assert torch.equal(function(ties, step, 8, False), by_quotient * step)


# --- edges


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_float32_result_rounded(name: str, bits: int, signed: bool, dtype: torch.dtype) -> None:
    step = torch.tensor(0.0371)
    value = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    reference = value.detach().float().requires_grad_()
    quantized = SCHEMES[name](value, step, bits, signed)
    expected = SCHEMES[name](reference, step, bits, signed)
    assert quantized.dtype == dtype
    torch.testing.assert_close(quantized, expected.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float64 else 0)
    quantized.sum().backward()
    expected.sum().backward()
    assert value.grad is not None
    assert value.grad.dtype == dtype
    assert torch.equal(value.grad.float(), reference.grad)


@pytest.mark.parametrize("name", ["pact", "lsq"])
def test_the_gradient_of_a_step_is_summed_in_float32(name: str) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        value = torch.full((1, 4097), 9.0, dtype=dtype)
        step = torch.tensor(0.25, requires_grad=True)
        SCHEMES[name](value, step, 4, False).sum().backward()
        assert step.grad.dtype == torch.float32
        found.append(float(step.grad))
    # All 4097 are above the clip: 15 each, for LSQ times 1 / sqrt(4097 * 15). bfloat16 has no 4097.
    expected = 15 * 4097 * (1 if name == "pact" else (4097 * 15) ** -0.5)
    assert found == pytest.approx([expected, expected])


@pytest.mark.parametrize("name", SCHEMES)
def test_an_empty_batch_and_single_values_pass(name: str) -> None:
    step = torch.tensor(0.5)
    assert SCHEMES[name](torch.zeros(0, 3), step, 4, False).shape == (0, 3)
    assert SCHEMES[name](torch.zeros(0, 3), step, 1, True).shape == (0, 3)
    assert SCHEMES[name](torch.tensor(0.8), step, 4, False) == 1.0


# --- where they start


def error(value: Tensor, clip: Tensor | float, bits: int, signed: bool) -> Tensor:
    _, high = level_range(bits, signed)
    step = torch.as_tensor(clip, dtype=torch.float32) / high
    return (round_to_levels(value, step, bits, signed) - value).double().square().sum()


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "images": lambda: normal(2000),
    "relu": lambda: normal(2000).relu(),
    "relu of a residual": lambda: (normal(2000) ** 3).relu(),
    "gelu": lambda: functional.gelu(normal(2000)),
    "silu": lambda: functional.silu(normal(2000)),
    "tanh": lambda: normal(2000).tanh(),
    "all negative": lambda: -normal(2000).abs() - 0.1,
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_start_has_the_least_squared_error_of_thousands_with_and_without_a_sign(name: str, bits: int) -> None:
    value = INPUTS[name]()
    start = activation_start(value, bits)
    clips = torch.linspace(0.001, 1.2, 1500) * value.abs().max()
    best = min(error(value, clip, bits, signed) for clip in clips for signed in (False, True))
    # At 8 bits the error jumps up and down by a percent between clips that are next to each other.
    assert error(value, start.clip, bits, start.signed) <= best * (1.0001 if bits < 8 else 1.01)


def test_start_of_one_bit_by_hand() -> None:
    # With a sign the best clip is mean|x|; without, the mean of what is nearer to it than to 0.
    found = activation_start(torch.tensor([1.0, -2.0, 3.0, -4.0]), 1)
    assert (found.clip, found.signed) == (pytest.approx(2.5), True)
    found = activation_start(torch.tensor([0.0, 0.1, 3.0, 4.0]), 1)
    assert (found.clip, found.signed) == (pytest.approx(3.5), False)


def test_a_few_small_negatives_cost_no_half_of_the_levels() -> None:
    gelu = functional.gelu(normal(5000))
    assert (gelu < 0).float().mean() > 0.4
    # Of 3 levels above 0, a sign leaves 1: far worse than to lose what lies between -0.17 and 0. Of 255 it leaves 127.
    assert not activation_start(gelu, 2).signed
    assert activation_start(gelu, 8).signed
    assert error(gelu, activation_start(gelu, 2).clip, 2, False) < 0.4 * min(
        error(gelu, clip, 2, True) for clip in torch.linspace(0.05, 4, 200)
    )


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_relu_never_gets_a_sign(bits: int) -> None:
    assert not activation_start(normal(1000).relu(), bits).signed


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("constant", [0.3, -0.3, 1e-30, 1e30, -1e30])
def test_a_constant_input_is_kept(bits: int, constant: float) -> None:
    value = torch.full((100,), constant)
    start = activation_start(value, bits)
    assert start.signed == (constant < 0)
    _, high = level_range(bits, start.signed)
    torch.testing.assert_close(round_to_levels(value, torch.tensor(start.clip) / high, bits, start.signed), value)


def test_zeros_and_nothing_give_a_clip_of_one() -> None:
    assert activation_start(torch.zeros(5), 4) == ActivationStart(clip=1.0, signed=False)
    assert activation_start(torch.zeros(0), 4) == ActivationStart(clip=1.0, signed=False)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), bits=st.integers(1, 8), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_the_start_does_not_depend_on_the_order_of_values(seed: int, bits: int, scale: float) -> None:
    value = functional.gelu(normal(3000, seed)) * scale
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))
    assert activation_start(value, bits) == activation_start(value[order], bits)


def test_a_sample_of_many_values_gives_as_good_a_start() -> None:
    value = (normal(300_000) ** 3).relu()
    for bits in (2, 4, 8):
        clips = torch.linspace(0.005, 1, 200) * value.max()
        best = min(error(value, clip, bits, False) for clip in clips)
        assert error(value, activation_start(value, bits).clip, bits, False) <= 1.02 * best


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(QuantizeError, match="not finite"):
        activation_start(torch.tensor([1.0, bad]), 4)
