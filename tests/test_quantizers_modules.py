"""Quantizers as modules: where they start, what they learn and how, and the scales that they tell."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.activations import ActivationStart
from dcq_ray.quantizers.functions import nearest_level
from dcq_ray.quantizers.modules import FrozenInputQuantizer, InputQuantizer, WeightQuantizer
from dcq_ray.quantizers.weights import dorefa_weight, lsq_weight
from dcq_ray.spec import WEIGHT_SCHEME_BITS

WEIGHT_SCHEMES = [
    (scheme, bits) for scheme, allowed in WEIGHT_SCHEME_BITS.items() for bits in (1, 2, 3, 4, 8) if bits in allowed
]
LEARNED = {"ttq": {"log_positive", "log_negative"}, "lsq": {"log_step"}, "lsq-channel": {"log_step"}}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """A weight whose output channels (dimension 0) differ in size, as trained ones do."""
    sizes = torch.linspace(0.2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return 0.05 * sizes * seeded(*shape, seed=seed)


def levels_of(scheme: str, bits: int, scale: Tensor, channel_dim: int, ndim: int) -> Tensor:
    """All levels, [1 or channels, levels], as integers times the scale."""
    high = 2 ** (bits - 1) - 1
    if scheme == "ttq":
        return torch.stack([-scale[1], torch.zeros_like(scale[0]), scale[0]]).reshape(1, 3)
    integers = {
        "dorefa": range(1 - 2**bits, 2**bits, 2),
        "xnor": (-1, 1),
        "twn": (-1, 0, 1),
        "wrpn": range(-high, high + 1),
    }.get(scheme, range(-high - 1, high + 1))
    return torch.tensor(list(integers), dtype=scale.dtype) * scale.reshape(-1, 1)


# --- weights


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_weight_is_an_integer_times_the_scale_that_is_told(
    scheme: str, bits: int, channel_dim: int, dtype: torch.dtype
) -> None:
    weight = uneven(5, 6, 3, 3).to(dtype)
    quantizer = WeightQuantizer(scheme, bits, weight, channel_dim)
    quantized, scale = quantizer(weight), quantizer.scales(weight)
    assert quantized.dtype == dtype
    assert scale.dtype == torch.promote_types(dtype, torch.float32)
    channels = scheme in ("xnor", "lsq-channel")
    assert scale.shape == ((weight.shape[channel_dim],) if channels else (2,) if scheme == "ttq" else ())
    levels = levels_of(scheme, bits, scale, channel_dim, weight.ndim).to(dtype)
    rows = quantized.transpose(0, channel_dim).reshape(weight.shape[channel_dim], -1) if channels else quantized
    for row, of_row in zip(rows if channels else [rows], levels, strict=True):
        assert torch.isin(row, of_row).all()


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
def test_only_what_is_learned_is_a_parameter_and_none_of_it_decays(scheme: str, bits: int) -> None:
    quantizer = WeightQuantizer(scheme, bits, uneven(4, 3, 3, 3), 0)
    names = dict(quantizer.named_parameters())
    assert names.keys() == LEARNED.get(scheme, set())
    # The training loop keeps weight decay from what has fewer than two dimensions: decay would pull a step towards 1.
    assert all(parameter.ndim < 2 for parameter in names.values())


@pytest.mark.parametrize("scheme", ["lsq", "lsq-channel", "ttq"])
def test_what_is_learned_of_half_precision_weights_is_float32(scheme: str) -> None:
    quantizer = WeightQuantizer(scheme, 2, uneven(4, 8).bfloat16(), 0)
    assert all(parameter.dtype == torch.float32 for parameter in quantizer.parameters())
    single = WeightQuantizer(scheme, 2, uneven(4, 8).bfloat16().float(), 0)
    for mine, theirs in zip(quantizer.parameters(), single.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheme", ["lsq", "lsq-channel"])
def test_a_step_learns_in_logarithms(scheme: str) -> None:
    weight = uneven(4, 30)
    quantizer = WeightQuantizer(scheme, 3, weight, 0)
    gradient = seeded(4, 30, seed=1)
    quantizer(weight).backward(gradient)
    step = quantizer.log_step.detach().exp().requires_grad_()
    lsq_weight(weight, step if scheme == "lsq" else step.reshape(4, 1), 3).backward(gradient)
    # d / d log s = s d / ds
    torch.testing.assert_close(quantizer.log_step.grad, step.detach() * step.grad)


def test_levels_of_ttq_learn_in_logarithms() -> None:
    weight = torch.tensor([[1.0, 3.0, -4.0, 0.0]])
    quantizer = WeightQuantizer("ttq", 2, weight, 0)
    quantizer(weight).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    # Levels 2 and -4: 2 (1 + 10) and -4 (100)
    torch.testing.assert_close(quantizer.log_positive.grad, torch.tensor(22.0))
    torch.testing.assert_close(quantizer.log_negative.grad, torch.tensor(-400.0))


def squared_error(weight: Tensor, quantized: Tensor) -> float:
    return float((weight - quantized).detach().double().square().sum())


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
def test_the_start_has_the_least_squared_error(scheme: str, bits: int) -> None:
    weight = uneven(4, 300)
    found = WeightQuantizer(scheme, bits, weight, 0)(weight).detach()
    high = 2 ** (bits - 1) - 1
    # At 8 bits the error of few values jumps up and down by some percent between clips that are next to each other.
    slack = 1.1 if bits == 8 else 1.0001
    if scheme in ("lsq", "lsq-channel", "wrpn"):
        low = -high if scheme == "wrpn" else -high - 1
        for part, quantized in zip(weight, found, strict=True) if scheme == "lsq-channel" else [(weight, found)]:
            steps = torch.linspace(0.001, 1.2, 2000) * part.abs().max() / high
            best = min(squared_error(part, nearest_level(part, step, low, high)) for step in steps)
            assert squared_error(part, quantized) <= best * slack
        return
    # The levels' pattern is the scheme's; their size is the best for the pattern, all in one, by side or by channel.
    groups = {
        "ttq": [weight > 0, weight < 0],
        "xnor": [torch.arange(4).reshape(4, 1).expand(4, 300) == c for c in range(4)],
    }
    for group in groups.get(scheme, [torch.ones_like(weight, dtype=torch.bool)]):
        for factor in (0.999, 1.001):
            changed = torch.where(group, factor * found, found)
            assert squared_error(weight, found) < squared_error(weight, changed)


def test_starts_by_hand() -> None:
    weight = torch.tensor([[2.0, -2.0, 2.0, -2.0], [0.5, 0.5, -0.5, 0.0]])

    def scale(scheme: str, bits: int) -> list[float]:
        return [round(value, 5) for value in WeightQuantizer(scheme, bits, weight, 0).scales(weight).flatten().tolist()]

    # mean|w| = 9.5 / 8 and by row 2 and 1.5 / 4
    assert scale("dorefa", 1) == [1.1875]
    assert scale("xnor", 1) == [2.0, 0.375]
    # Above 0.75 * 1.1875 there is 2 alone; above 0.05 * 2 there are 2, 2, .5, .5 and below -2, -2, -.5
    assert scale("twn", 2) == [2.0]
    assert scale("ttq", 2) == [1.25, 1.5]
    # Of levels -a, 0, a in one for all, 2 costs 3 * 0.25; a row of its own costs nothing
    assert scale("wrpn", 2) == [2.0]
    torch.testing.assert_close(WeightQuantizer("lsq-channel", 3, weight, 0)(weight), weight)


def test_dorefas_scale_by_hand() -> None:
    weight = torch.atanh(torch.tensor([0.8, -0.8, 0.2, 0.0]))
    # Levels 1, -1, 1/3, 1/3: <w, q> / <q, q> = (2 atanh(.8) + atanh(.2) / 3) / (2 + 2 / 9); the integers are 3, -3, 1, 1
    expected = (2 * math.atanh(0.8) + math.atanh(0.2) / 3) / (2 + 2 / 9)
    quantizer = WeightQuantizer("dorefa", 2, weight, 0)
    assert float(quantizer.scale) == pytest.approx(expected)
    assert float(quantizer.scales(weight)) == pytest.approx(expected / 3)
    assert torch.equal(quantizer(weight), torch.tensor([3.0, -3.0, 1.0, 1.0]) * quantizer.scales(weight))
    torch.testing.assert_close(quantizer(weight), expected * dorefa_weight(weight, 2))


@pytest.mark.parametrize("scheme", ["lsq", "lsq-channel", "wrpn"])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_start_of_a_large_weight_sees_every_place_of_its_kernel(scheme: str, bits: int) -> None:
    # 256 * 256 * 9 values, of which a sample with a stride of 9 or 36 would see one corner of every kernel.
    weight = seeded(256, 256, 3, 3) * 0.01
    weight[:, :, 1, 1] *= 10
    quantizer = WeightQuantizer(scheme, bits, weight, 0)
    found = squared_error(weight, quantizer(weight))
    high = 2 ** (bits - 1) - 1
    low = -high if scheme == "wrpn" else -high - 1
    # All channels are alike, so one step does for all.
    steps = torch.linspace(0.05, 1, 40) * weight.abs().max() / high
    best = min(squared_error(weight, nearest_level(weight, step, low, high)) for step in steps)
    assert found <= best * 1.02


@pytest.mark.parametrize(("scheme", "bits"), [("xnor", 1), ("lsq-channel", 2), ("lsq-channel", 4)])
def test_channels_of_a_transposed_convolution_are_those_of_its_second_dimension(scheme: str, bits: int) -> None:
    weight = uneven(5, 7, 3, 3)
    transposed = weight.transpose(0, 1)
    mine, theirs = WeightQuantizer(scheme, bits, weight, 0), WeightQuantizer(scheme, bits, transposed, 1)
    assert torch.equal(theirs.scales(transposed), mine.scales(weight))
    assert torch.equal(theirs(transposed), mine(weight).transpose(0, 1))


@pytest.mark.parametrize("scheme", ["dorefa", "lsq", "lsq-channel", "wrpn"])
def test_at_8_bits_a_weight_changes_by_less_than_a_percent(scheme: str) -> None:
    weight = seeded(64, 64, 3, 3) * 0.03
    error = (WeightQuantizer(scheme, 8, weight, 0)(weight) - weight).norm() / weight.norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_start_follows_the_size_of_the_weights(scheme: str, bits: int, factor: float) -> None:
    weight = uneven(4, 50)
    if scheme == "dorefa" and bits > 1:
        # tanh: small weights lie on its straight part, which any smaller ones do too
        weight, factor = weight * 1e-3, min(factor, 1e-20)
    quantized = WeightQuantizer(scheme, bits, weight, 0)(weight)
    large = weight * factor
    torch.testing.assert_close(WeightQuantizer(scheme, bits, large, 0)(large) / factor, quantized, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
def test_zero_weights_stay_zero(scheme: str, bits: int) -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    quantizer = WeightQuantizer(scheme, bits, weight, 0)
    quantized = quantizer(weight)
    quantized.sum().backward()
    assert torch.equal(quantized, torch.zeros(3, 4))
    assert torch.isfinite(quantizer.scales(weight)).all()
    assert torch.isfinite(weight.grad).all()
    assert all(torch.isfinite(parameter).all() for parameter in quantizer.parameters())


@pytest.mark.parametrize("scheme", ["xnor", "lsq-channel"])
def test_a_channel_of_zeros_stays_zero_beside_others(scheme: str) -> None:
    weight = uneven(3, 4)
    weight[1] = 0
    quantizer = WeightQuantizer(scheme, 1 if scheme == "xnor" else 4, weight, 0)
    assert torch.equal(quantizer(weight)[1], torch.zeros(4))
    assert quantizer(weight)[[0, 2]].all()
    if scheme == "lsq-channel":
        # A weight that leaves zero finds a step of the others' size, not one of 1e-40.
        assert quantizer.scales(weight)[1] == quantizer.scales(weight).max()


def test_ttq_of_weights_of_one_sign_has_both_levels() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    quantizer = WeightQuantizer("ttq", 2, weight, 0)
    torch.testing.assert_close(quantizer.scales(weight), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(WeightQuantizer("ttq", 2, -weight, 0).scales(-weight), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
def test_a_single_weight_is_possible(scheme: str, bits: int) -> None:
    weight = torch.tensor([[0.37]])
    quantized = WeightQuantizer(scheme, bits, weight, 0)(weight)
    torch.testing.assert_close(quantized, weight)


def test_a_weight_without_numbers_and_an_unknown_scheme_are_refused() -> None:
    with pytest.raises(QuantizeError, match=r"shape \(3, 0\) holds no numbers"):
        WeightQuantizer("dorefa", 1, torch.zeros(3, 0), 0)
    with pytest.raises(QuantizeError, match="no scheme 'best'"):
        WeightQuantizer("best", 1, torch.ones(3), 0)


# --- inputs


@pytest.mark.parametrize(("scheme", "learned"), [("dorefa", False), ("pact", True), ("lsq", True)])
@pytest.mark.parametrize(("bits", "signed", "high"), [(1, False, 1), (1, True, 1), (4, False, 15), (4, True, 7)])
def test_an_input_quantizer_starts_at_its_clip(scheme: str, learned: bool, bits: int, signed: bool, high: int) -> None:
    quantizer = InputQuantizer(scheme, bits, ActivationStart(clip=3.0, signed=signed))
    assert len(list(quantizer.parameters())) == learned
    assert all(parameter.ndim == 0 for parameter in quantizer.parameters())
    torch.testing.assert_close(quantizer.step.detach(), torch.tensor(3.0 / high))
    found = quantizer(torch.tensor([-9.0, 9.0])).detach()
    torch.testing.assert_close(found, torch.tensor([-3.0 if signed else 0.0, 3.0]))


def test_a_clip_learns_in_logarithms() -> None:
    quantizer = InputQuantizer("pact", 2, ActivationStart(clip=3.0))
    quantizer(torch.tensor([1.0, 4.0, 5.0])).backward(torch.tensor([1.0, 10.0, 100.0]))
    # da = 10 + 100 above the clip; d log a = 3 * 110
    torch.testing.assert_close(quantizer.log_clip.grad, torch.tensor(330.0))


@pytest.mark.parametrize("scheme", ["dorefa", "pact", "lsq"])
def test_a_loaded_state_brings_clip_and_sign(scheme: str) -> None:
    trained = InputQuantizer(scheme, 3, ActivationStart(clip=0.7, signed=True))
    fresh = InputQuantizer(scheme, 3, ActivationStart())
    fresh.load_state_dict(trained.state_dict())
    value = seeded(100)
    assert torch.equal(fresh(value), trained(value))
    assert torch.equal(copy.deepcopy(fresh)(value), trained(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", ["dorefa", "pact", "lsq"])
@pytest.mark.parametrize(("bits", "signed"), [(1, False), (1, True), (4, False), (8, True)])
def test_what_is_shipped_computes_what_was_trained(scheme: str, bits: int, signed: bool, dtype: torch.dtype) -> None:
    trained = InputQuantizer(scheme, bits, ActivationStart(clip=1.7, signed=signed))
    shipped = FrozenInputQuantizer(trained.step.detach().clone(), bits, signed)
    value = seeded(500).to(dtype)
    assert shipped(value).dtype == dtype
    assert torch.equal(shipped(value), trained(value))
    assert not shipped.state_dict()


def test_an_input_quantizer_is_a_module_that_moves() -> None:
    quantizer = InputQuantizer("pact", 4, ActivationStart(clip=2.0)).to("meta")
    assert {tensor.device.type for tensor in quantizer.state_dict().values()} == {"meta"}
    assert isinstance(quantizer, nn.Module)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("dorefa", 1), ("dorefa", 3), ("xnor", 1), ("twn", 2), ("ttq", 2), ("lsq", 2), ("lsq-channel", 3), ("wrpn", 3)],
)
def test_rescaled_levels_are_the_same_ones_times_the_factor(scheme: str, bits: int) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(scheme, bits, weight, 0)
    per_channel = scheme in ("xnor", "lsq-channel")
    factor = torch.linspace(0.5, 4, 6) if per_channel else torch.tensor(3.0)
    before = quantizer(weight).detach()
    after = quantizer(quantizer.rescale(weight, factor)).detach()
    rows = factor.reshape(-1, 1, 1, 1)
    assert torch.allclose(after, rows * before, rtol=1e-5, atol=1e-7)
