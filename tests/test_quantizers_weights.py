"""Weight quantizers: levels and gradients by hand, laws of the level sets, edges of the number range, starting points."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.functions import nearest_level
from dcq_ray.quantizers.starts import least_squares_clip, least_squares_scale, search_sample, spread_stride
from dcq_ray.quantizers.weights import (
    channel_means,
    dorefa_weight,
    lsq,
    lsq_weight,
    ttq_weight,
    twn_weight,
    wrpn_weight,
    xnor_weight,
)

Quantizer = Callable[[Tensor], Tensor]

# Every scheme at some bits, with scales that suit weights of about 1.
SCHEMES: dict[str, Quantizer] = {
    "dorefa-1": lambda w: dorefa_weight(w, 1),
    "dorefa-2": lambda w: dorefa_weight(w, 2),
    "dorefa-8": lambda w: dorefa_weight(w, 8),
    "dorefa-3-scaled": lambda w: dorefa_weight(w, 3, torch.tensor(0.7)),
    "xnor": lambda w: xnor_weight(w, 0),
    "twn": twn_weight,
    "ttq": lambda w: ttq_weight(w, torch.tensor(0.9), torch.tensor(1.1)),
    "lsq-2": lambda w: lsq_weight(w, torch.tensor(0.6), 2),
    "lsq-8": lambda w: lsq_weight(w, torch.tensor(0.02), 8),
    "wrpn-2": lambda w: wrpn_weight(w, torch.tensor(1.2), 2),
    "wrpn-8": lambda w: wrpn_weight(w, torch.tensor(2.5), 8),
}
# Without a level of their own for minus the largest one, or with two scales, or with sign(0) = +1, there is no mirror.
MIRRORED = ["twn", "wrpn-2", "wrpn-8"]
MIRRORED_BUT_AT_ZERO = ["dorefa-1", "xnor"]


def gradient_of(function: Quantizer, values: list[float], output_gradient: list[float]) -> Tensor:
    weight = torch.tensor(values, requires_grad=True)
    function(weight).backward(torch.tensor(output_gradient))
    assert weight.grad is not None
    return weight.grad


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- DoReFa


def test_one_bit_dorefa_by_hand() -> None:
    weight = torch.tensor([[0.5, -1.5], [0.0, 2.0]])
    # mean|w| = (0.5 + 1.5 + 0 + 2) / 4 = 1, and sign(0) = +1
    assert torch.equal(dorefa_weight(weight, 1), torch.tensor([[1.0, -1.0], [1.0, 1.0]]))


def test_negative_zero_has_the_sign_of_zero() -> None:
    assert torch.equal(dorefa_weight(torch.tensor([-0.0, 3.0]), 1), torch.tensor([1.5, 1.5]))


def test_two_bit_dorefa_by_hand() -> None:
    weight = torch.tensor([math.atanh(0.8), math.atanh(-0.8), math.atanh(0.2), 0.0])
    # x = tanh / (2 * 0.8) + 1/2 = 1, 0, 0.625, 0.5; times 3 rounded = 3, 0, 2, 2 (1.5 goes to the even 2); 2 q / 3 - 1
    assert torch.equal(dorefa_weight(weight, 2), torch.tensor([1.0, -1.0, 1 / 3, 1 / 3]))


def test_three_bit_dorefa_by_hand_with_a_scale() -> None:
    weight = torch.atanh(torch.tensor([0.5, -0.5, 0.3, -0.1]))
    # x = tanh / (2 * 0.5) + 1/2 = 1, 0, 0.8, 0.4; times 7 = 7, 0, 5.6, 2.8, rounded 7, 0, 6, 3
    # odd integers 2 q - 7 = 7, -7, 5, -1; the largest level 14 makes the scale of the integers 14 / 7 = 2
    assert torch.equal(dorefa_weight(weight, 3, torch.tensor(14.0)), torch.tensor([14.0, -14.0, 10.0, -2.0]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_uses_all_its_levels(bits: int) -> None:
    weight = torch.atanh(torch.linspace(-0.99, 0.99, 4001))
    steps = 2**bits - 1
    expected = (
        torch.arange(-steps, steps + 1, 2) / steps if bits > 1 else torch.tensor([-1.0, 1.0]) * weight.abs().mean()
    )
    torch.testing.assert_close(dorefa_weight(weight, bits).unique(), expected)
    assert len(dorefa_weight(weight, bits).unique()) == 2**bits


def test_gradient_of_one_bit_dorefa_is_the_identity() -> None:
    # Also beyond 1, where that of the plain sign function would be clipped.
    gradient = gradient_of(lambda w: dorefa_weight(w, 1), [0.3, -2.0, 0.0], [1.0, 2.0, 3.0])
    assert torch.equal(gradient, torch.tensor([1.0, 2.0, 3.0]))


def test_gradient_of_more_bits_is_that_of_tanh_over_its_maximum() -> None:
    # tanh = 0.5, -0.8, 0.2; dw/dr = (1 - tanh^2) / 0.8 = 0.75 / 0.8, 0.36 / 0.8, 0.96 / 0.8
    weights = [math.atanh(0.5), math.atanh(-0.8), math.atanh(0.2)]
    gradient = gradient_of(lambda w: dorefa_weight(w, 3), weights, [1.0, -1.0, 2.0])
    torch.testing.assert_close(gradient, torch.tensor([0.9375, -0.45, 2.4]))
    scaled = gradient_of(lambda w: dorefa_weight(w, 3, torch.tensor(4.0)), weights, [1.0, -1.0, 2.0])
    torch.testing.assert_close(scaled, 4 * torch.tensor([0.9375, -0.45, 2.4]))


@pytest.mark.parametrize("bits", [0, 9])
def test_dorefa_refuses_bits_out_of_range(bits: int) -> None:
    with pytest.raises(QuantizeError, match=f"got {bits} bits, expected 1 to 8"):
        dorefa_weight(torch.ones(2), bits)


# --- XNOR


def test_xnor_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, -0.5]])
    # Rows are output channels: means 2 and 0.25. Columns are: means 0.5 and 1.75.
    assert torch.equal(xnor_weight(weight, 0), torch.tensor([[2.0, -2.0], [0.25, -0.25]]))
    assert torch.equal(xnor_weight(weight, 1), torch.tensor([[0.5, -1.75], [0.5, -1.75]]))


def test_gradient_of_xnor_is_the_identity() -> None:
    weight = torch.tensor([[0.3, -2.0], [0.0, 1.0]], requires_grad=True)
    xnor_weight(weight, 0).backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(weight.grad, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_channel_means_keep_the_channel_dimension() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    # Channel c of dimension 1 holds 4c … 4c + 3 and 12 + 4c … 12 + 4c + 3: the mean is 4c + 1.5 + 6.
    assert torch.equal(channel_means(values, 1), torch.tensor([7.5, 11.5, 15.5]).reshape(1, 3, 1))


# --- TWN


def test_twn_by_hand() -> None:
    weight = torch.tensor([0.1, -0.2, 0.9, -2.0, 0.8])
    # mean|w| = 4 / 5 = 0.8, d = 0.6; kept are 0.9, -2 and 0.8 with a = 3.7 / 3
    scale = 3.7 / 3
    torch.testing.assert_close(twn_weight(weight), torch.tensor([0.0, 0.0, scale, -scale, scale]))


def test_twn_puts_a_weight_at_its_threshold_to_zero() -> None:
    # mean|w| = (3 + 4 + 5) / 3 = 4, d = 3: only what is above d is kept, a = 4.5
    assert torch.equal(twn_weight(torch.tensor([3.0, -4.0, 5.0])), torch.tensor([0.0, -4.5, 4.5]))


def test_gradient_of_twn_is_the_identity() -> None:
    assert torch.equal(gradient_of(twn_weight, [0.1, -2.0, 1.0], [1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))


# --- TTQ


def test_ttq_by_hand() -> None:
    weight = torch.tensor([1.0, -0.2, 0.05, -0.05, 0.0, 0.06, -0.06])
    # d = 0.05 * 1: what is at d is 0, what is beyond it is +3 or -2
    expected = torch.tensor([3.0, -2.0, 0.0, 0.0, 0.0, 3.0, -2.0])
    assert torch.equal(ttq_weight(weight, torch.tensor(3.0), torch.tensor(2.0)), expected)


def test_gradients_of_ttq_by_hand() -> None:
    weight = torch.tensor([1.0, -0.2, 0.01, 0.5, -0.7], requires_grad=True)
    positive, negative = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    ttq_weight(weight, positive, negative).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    # eq. 8: the output's gradient times 3 above, 1 at zero, 2 below
    assert torch.equal(weight.grad, torch.tensor([3.0, 20.0, 100.0, 3000.0, 20000.0]))
    # eq. 7: sums over the two weights above (1 + 1000) and the two below (10 + 10000), where the level is -negative
    assert positive.grad == 1001
    assert negative.grad == -10010


# --- LSQ


def test_lsq_weight_by_hand() -> None:
    weight = torch.tensor([0.0, 0.2, 0.25, 0.75, -0.25, -0.75, -0.8, -3.0, 3.0])
    # two bits, step 0.5: w / s = 0, 0.4, 0.5, 1.5, -0.5, -1.5, -1.6, -6, 6; to the nearest, ties to even: 0, 0, 0, 2, 0, -2,
    # -2, -6, 6; clamped to -2 … 1
    expected = 0.5 * torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, -2.0, -2.0, -2.0, 1.0])
    assert torch.equal(lsq_weight(weight, torch.tensor(0.5), 2), expected)


def test_gradients_of_lsq_by_hand() -> None:
    value = torch.tensor([0.3, -0.35, 5.0, -5.0, 1.0, -1.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    lsq(value, step, -2, 2, 0.25).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]))
    # v / s = 0.6, -0.7, 10, -10, 2, -2: the first two lie inside -2 … 2, the last two on its ends
    assert torch.equal(value.grad, torch.tensor([1.0, 10.0, 0.0, 0.0, 0.0, 0.0]))
    # round(v/s) - v/s = 1 - 0.6 = 0.4 and -1 + 0.7 = -0.3; outside and on the ends 2, -2, 2, -2; times the gradients, summed:
    # 0.4 - 3 + 200 - 2000 + 20000 - 200000 = -181802.6; times 0.25
    torch.testing.assert_close(step.grad, torch.tensor(-181802.6 / 4))


def test_lsq_has_a_step_and_a_gradient_for_every_channel() -> None:
    weight = torch.tensor([[0.6, -9.0], [0.6, 9.0]], requires_grad=True)
    step = torch.tensor([[1.0], [0.5]], requires_grad=True)
    # two bits: channel 0 rounds to 1 and clamps to -2, channel 1 rounds 1.2 to 1 and clamps 18 to 1
    quantized = lsq_weight(weight, step, 2)
    assert torch.equal(quantized, torch.tensor([[1.0, -2.0], [0.5, 0.5]]))
    quantized.sum().backward()
    # channel 0: 0.6 is inside, 1 - 0.6 = 0.4, and -9 is below: 0.4 - 2; channel 1: 1.2 and 18 are both above: 1 + 1
    # gradient scale: 2 weights in a channel, highest level 1: 1 / sqrt(2)
    torch.testing.assert_close(step.grad, torch.tensor([[-1.6], [2.0]]) / math.sqrt(2))
    assert torch.equal(weight.grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_gradient_scale_of_a_weight_counts_weights_and_levels() -> None:
    weight, step = torch.full((5, 4), 9.0), torch.tensor(1.0, requires_grad=True)
    lsq_weight(weight, step, 4).sum().backward()
    # 20 weights, all clamped to 7: 20 * 7 / sqrt(20 * 7) = sqrt(140)
    torch.testing.assert_close(step.grad, torch.tensor(math.sqrt(140)))


@pytest.mark.parametrize("bits", [1, 9])
def test_lsq_and_wrpn_refuse_bits_out_of_range(bits: int) -> None:
    with pytest.raises(QuantizeError, match=f"got {bits} bits of a weight, expected 2 to 8"):
        lsq_weight(torch.ones(2), torch.tensor(1.0), bits)
    with pytest.raises(QuantizeError, match=f"got {bits} bits, expected 2 to 8"):
        wrpn_weight(torch.ones(2), torch.tensor(1.0), bits)


# --- WRPN


def test_wrpn_by_hand() -> None:
    weight = torch.tensor([0.0, 1.0, -1.0, 5.0, -5.0, 3.0, 2.9])
    # three bits, m = 3, clip 6, so a step of 2: w / 2 = 0, 0.5, -0.5, 2.5, -2.5, 1.5, 1.45; ties to even: 0, 0, 0, 2, -2, 2, 1
    assert torch.equal(wrpn_weight(weight, torch.tensor(6.0), 3), torch.tensor([0.0, 0.0, 0.0, 4.0, -4.0, 4.0, 2.0]))
    assert torch.equal(wrpn_weight(torch.tensor([9.0, -9.0]), torch.tensor(6.0), 3), torch.tensor([6.0, -6.0]))


def test_gradient_of_wrpn_passes_inside_the_clip_and_on_its_ends() -> None:
    gradient = gradient_of(
        lambda w: wrpn_weight(w, torch.tensor(2.0), 3), [0.1, 2.0, -2.0, 2.5, -3.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    )
    assert torch.equal(gradient, torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]))


def test_the_clip_of_wrpn_is_a_constant() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    weight = torch.tensor([0.1, 9.0], requires_grad=True)
    wrpn_weight(weight, scale, 3).sum().backward()
    assert scale.grad is None


# --- laws

weights = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=40)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(list(SCHEMES)), values=weights)
def test_a_larger_weight_never_gets_a_lower_level(name: str, values: list[float]) -> None:
    weight = torch.tensor(sorted(values))
    quantized = SCHEMES[name](weight.reshape(1, -1)).flatten()
    assert (quantized.diff() >= 0).all()


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(MIRRORED + MIRRORED_BUT_AT_ZERO), values=weights)
def test_the_mirrored_weight_has_the_mirrored_levels(name: str, values: list[float]) -> None:
    weight = torch.tensor(values).reshape(1, -1)
    quantized, mirrored = SCHEMES[name](weight), SCHEMES[name](-weight)
    where = weight != 0 if name in MIRRORED_BUT_AT_ZERO else torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(mirrored[where], -quantized[where])


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(2, 8), values=weights)
def test_every_weight_is_an_integer_times_a_scale_to_the_bit(bits: int, values: list[float]) -> None:
    weight = torch.tensor(values)
    steps, high = 2**bits - 1, 2 ** (bits - 1) - 1
    scale = torch.tensor(0.731)
    cases = {
        "dorefa": (dorefa_weight(weight, bits, scale), scale / steps, range(-steps, steps + 1, 2)),
        "lsq": (lsq_weight(weight, scale, bits), scale, range(-high - 1, high + 1)),
        "wrpn": (wrpn_weight(weight, scale, bits), scale / high, range(-high, high + 1)),
    }
    for name, (quantized, step, integers) in cases.items():
        grid = torch.tensor(list(integers), dtype=torch.float32) * step
        assert torch.isin(quantized, grid).all(), name


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_quantizing_again_with_the_same_step_changes_nothing(bits: int, seed: int, exponent: int) -> None:
    weight = seeded(200, seed=seed) * 2.0**exponent
    step = weight.abs().max() / 2 ** (bits - 1) * 0.83
    once = lsq_weight(weight, step, bits)
    assert torch.equal(lsq_weight(once, step, bits), once)
    clip = weight.abs().max() * 0.83
    once = wrpn_weight(weight, clip, bits)
    assert torch.equal(wrpn_weight(once, clip, bits), once)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), size=st.integers(1, 700), exponent=st.integers(-20, 20))
def test_binary_and_ternary_weights_quantize_to_themselves(seed: int, size: int, exponent: int) -> None:
    weight = seeded(3, size, seed=seed) * 2.0**exponent
    for function in (lambda w: dorefa_weight(w, 1), lambda w: xnor_weight(w, 0), twn_weight):
        once = function(weight)
        assert torch.equal(function(once), once)


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(2, 8), exponent=st.integers(-60, 60), seed=st.integers(0, 100))
def test_lsq_and_wrpn_scale_with_their_weights(bits: int, exponent: int, seed: int) -> None:
    weight, factor, step = seeded(50, seed=seed), 2.0**exponent, torch.tensor(0.3)
    assert torch.equal(lsq_weight(weight * factor, step * factor, bits), lsq_weight(weight, step, bits) * factor)
    assert torch.equal(wrpn_weight(weight * factor, step * factor, bits), wrpn_weight(weight, step, bits) * factor)


def test_rounding_is_that_of_the_quotient_and_not_of_a_product_with_the_reciprocal() -> None:
    # Products with the reciprocal round some ties of this step the other way, so that an export would differ by a level.
    step = torch.tensor(0.0371)
    ties = (torch.arange(-127, 127) + 0.5) * step
    by_quotient, by_product = torch.round(ties / step), torch.round(ties * (1 / step))
    assert not torch.equal(by_quotient, by_product)
    assert torch.equal(nearest_level(ties, step, -128, 127), by_quotient * step)


@pytest.mark.parametrize("name", SCHEMES)
def test_there_is_no_negative_zero(name: str) -> None:
    quantized = SCHEMES[name](torch.tensor([[-1e-3, -0.01, 0.0, -0.0, 1.0, -1.0]]))
    assert not (torch.signbit(quantized) & (quantized == 0)).any()


# --- edges


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_float32_result_rounded(name: str, dtype: torch.dtype) -> None:
    weight = seeded(8, 40).to(dtype)
    quantized = SCHEMES[name](weight)
    assert quantized.dtype == dtype
    expected = SCHEMES[name](weight.float())
    if dtype == torch.float64:
        torch.testing.assert_close(quantized, expected.double(), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(quantized, expected.to(dtype))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_the_weight(name: str, dtype: torch.dtype) -> None:
    weight = seeded(8, 40).to(dtype).requires_grad_()
    reference = weight.detach().float().requires_grad_()
    SCHEMES[name](weight).sum().backward()
    SCHEMES[name](reference).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad.float(), reference.grad, rtol=1e-2, atol=1e-2)


def test_gradients_of_steps_keep_their_own_dtype() -> None:
    step = torch.tensor(0.1, requires_grad=True)
    positive, negative = torch.tensor(0.9, requires_grad=True), torch.tensor(1.1, requires_grad=True)
    weight = seeded(64, 64).bfloat16()
    (lsq_weight(weight, step, 4) + ttq_weight(weight, positive, negative)).sum().backward()
    reference = torch.tensor(0.1, requires_grad=True)
    lsq_weight(weight.float(), reference, 4).sum().backward()
    # The sums over 4096 weights are of float32, not of bfloat16, which has 256 between 1 and 2.
    torch.testing.assert_close(step.grad, reference.grad)
    assert positive.grad == (weight.float() > 0.05 * weight.float().abs().max()).sum()


@pytest.mark.parametrize("name", SCHEMES)
def test_all_zero_weights_stay_finite_and_learn_finitely(name: str) -> None:
    weight = torch.zeros(2, 4, requires_grad=True)
    quantized = SCHEMES[name](weight)
    quantized.sum().backward()
    assert torch.isfinite(quantized).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("name", ["dorefa-1", "xnor", "twn"])
def test_one_weight_is_kept(name: str) -> None:
    for value in (0.37, -0.37):
        assert torch.equal(SCHEMES[name](torch.tensor([[value]])), torch.tensor([[value]]))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 1e38])
def test_extreme_magnitudes_keep_their_levels(magnitude: float) -> None:
    # Binary and ternary levels follow the weights: sums of these would be infinite in float32 at 1e38.
    weight = torch.tensor([[0.5, -1.0, 2.0, -2.5]])
    for function in (lambda w: dorefa_weight(w, 1), lambda w: xnor_weight(w, 0), twn_weight):
        torch.testing.assert_close(function(weight * magnitude) / magnitude, function(weight))


def test_dorefa_of_tiny_weights_is_that_of_a_straight_line() -> None:
    # tanh r = r near 0, and the maximum is divided out
    weight = torch.tensor([1.0, -1.0, 0.4, -0.2])
    # x = 1, 0, 0.7, 0.4; times 3 = 3, 0, 2.1, 1.2
    expected = torch.tensor([1.0, -1.0, 1 / 3, -1 / 3])
    assert torch.equal(dorefa_weight(weight * 1e-30, 2), expected)
    assert torch.equal(dorefa_weight(weight * 1e30, 2), torch.tensor([1.0, -1.0, 1.0, -1.0]))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_layout_in_memory_does_not_matter(name: str) -> None:
    weight = seeded(6, 5, 3, 3)
    other = weight.to(memory_format=torch.channels_last)
    strided = torch.cat([weight, weight], dim=3)[..., :3]
    assert not other.is_contiguous()
    assert not strided.is_contiguous()
    assert torch.equal(SCHEMES[name](other), SCHEMES[name](weight))
    assert torch.equal(SCHEMES[name](strided), SCHEMES[name](weight))


# --- starting points


def test_least_squares_scale_by_hand() -> None:
    # <w, q> / <q, q> = (2 + 3) / 2
    assert least_squares_scale(torch.tensor([2.0, -3.0]), torch.tensor([1.0, -1.0])) == 2.5
    assert least_squares_scale(torch.tensor([2.0]), torch.tensor([0.0])) == 1.0


def test_least_squares_scale_of_half_precision_is_float32() -> None:
    weight, quantized = torch.tensor([0.3, 0.3]).bfloat16(), torch.tensor([1.0, 2.0]).bfloat16()
    scale = least_squares_scale(weight, quantized)
    assert scale.dtype == torch.float32
    # 0.3 in bfloat16 is 0.30078125: times 3 over 5
    torch.testing.assert_close(scale, torch.tensor(0.30078125 * 3 / 5))


def uniform(high: int, low: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda rows, clips: nearest_level(rows, clips / high, low, high)


def test_least_squares_clip_by_hand() -> None:
    # Levels -a, 0, +a. 1, 1, 1, 1.4 are best at their mean, 1.1; 4, 0.5, -0.5 at 4 with the small ones at 0 (error 0.5; all
    # three at a = 5/3 would cost 17.25/1 - 25/3)
    rows = torch.tensor([[1.0, 1.0, 1.0, 1.4], [4.0, 0.5, -0.5, 0.0]])
    torch.testing.assert_close(least_squares_clip(rows, uniform(1, -1)), torch.tensor([[1.1], [4.0]]))


DISTRIBUTIONS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: seeded(n),
    "uniform": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(1)) * 2 - 1,
    "heavy tails": lambda n: seeded(n, seed=2) ** 3,
    "one outlier": lambda n: torch.cat([seeded(n - 1, seed=3), torch.tensor([300.0])]),
    "negative": lambda n: -0.2 - torch.rand(n, generator=torch.Generator().manual_seed(4)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("high", "low"), [(1, -1), (1, -2), (3, -4), (7, -7), (127, -128)])
def test_the_clip_is_that_of_a_search_through_thousands(name: str, high: int, low: int) -> None:
    rows = DISTRIBUTIONS[name](1000).reshape(1, -1)

    def error(clips: Tensor) -> Tensor:
        every = rows.expand(len(clips), -1)
        return (nearest_level(every, clips / high, low, high) - every).square().sum(dim=1)

    grid = torch.linspace(0.0005, 1.3, 3000).reshape(-1, 1) * rows.abs().max()
    found = error(least_squares_clip(rows, uniform(high, low)))
    # At 8 bits the error jumps up and down by a percent between clips that are next to each other.
    assert found <= error(grid).min() * (1.0001 if high < 127 else 1.01)


def test_every_row_has_its_own_clip() -> None:
    rows = seeded(5, 400) * torch.tensor([1e-30, 1e-3, 1.0, 1e10, 1e30]).reshape(-1, 1)
    together = least_squares_clip(rows, uniform(7, -8))
    alone = torch.cat([least_squares_clip(row.reshape(1, -1), uniform(7, -8)) for row in rows])
    assert torch.equal(together, alone)


@settings(deadline=None, max_examples=40)
@given(exponent=st.integers(-90, 90), seed=st.integers(0, 50))
def test_the_clip_scales_with_the_values(exponent: int, seed: int) -> None:
    rows = seeded(2, 60, seed=seed)
    found = least_squares_clip(rows * 2.0**exponent, uniform(3, -4))
    assert torch.equal(found, least_squares_clip(rows, uniform(3, -4)) * 2.0**exponent)


def test_a_row_of_zeros_gets_the_clip_of_another_row() -> None:
    rows = torch.tensor([[0.0, 0.0], [2.0, -2.0], [0.5, 0.5]])
    assert torch.equal(least_squares_clip(rows, uniform(1, -1)), torch.tensor([[2.0], [2.0], [0.5]]))
    assert torch.equal(least_squares_clip(torch.zeros(2, 3), uniform(1, -1)), torch.ones(2, 1))


def test_counts_are_as_good_as_copies() -> None:
    rows = torch.tensor([[1.0, 0.3, -2.0, 0.7]])
    counts = torch.tensor([[1.0, 5.0, 2.0, 3.0]])
    copies = torch.repeat_interleave(rows, counts.int().flatten(), dim=1)
    found = least_squares_clip(rows, uniform(3, -4), counts=counts)
    torch.testing.assert_close(found, least_squares_clip(copies, uniform(3, -4)))


def test_a_clip_may_lie_far_below_an_outlier() -> None:
    # Levels -a, 0, +a: at a = 300 a million ones cost 1e6, at their own mean with 300 it costs 299^2 = 89401.
    rows, counts = torch.tensor([[1.0, 300.0]]), torch.tensor([[1e6, 1.0]])
    expected = torch.tensor([[1_000_300 / 1_000_001]])
    torch.testing.assert_close(least_squares_clip(rows, uniform(1, -1), counts=counts), expected)


def test_a_sample_stands_for_all_and_holds_the_largest() -> None:
    rows = seeded(3, 1000)
    values, counts = search_sample(rows, 10, 100)
    assert values.shape == counts.shape
    assert values.shape[1] <= 10 + 120
    torch.testing.assert_close(counts.sum(dim=1), torch.full((3,), 1000.0))
    for row, sample, count in zip(rows, values, counts, strict=True):
        largest = row.abs().sort().values[-10:]
        assert torch.equal(sample.abs()[count == 1].sort().values, largest)
        assert torch.isin(sample, row).all()


def test_a_sample_of_few_values_is_all_of_them() -> None:
    rows = seeded(2, 50)
    values, counts = search_sample(rows, 10, 40)
    assert torch.equal(values, rows)
    assert torch.equal(counts, torch.ones(2, 50))


@given(shape=st.tuples(*[st.sampled_from([1, 3, 5, 7, 16, 64, 512])] * 3), wanted=st.integers(1, 500))
@settings(deadline=None, max_examples=100)
def test_a_stride_meets_every_place_of_every_dimension_equally(shape: tuple[int, int, int], wanted: int) -> None:
    count = math.prod(shape)
    stride = spread_stride(count, wanted)
    for size in shape:
        assert math.gcd(stride, size) == 1
    assert stride >= count // wanted or stride == 1
