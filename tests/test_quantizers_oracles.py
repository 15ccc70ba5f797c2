"""The quantizers beside second implementations: numpy in float64, torch's own, Brevitas, ONNX Runtime, Distiller's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dcq_ray.quantizers.activations import (
    ActivationStart,
    dorefa_activation,
    level_range,
    lsq_activation,
    pact_activation,
)
from dcq_ray.quantizers.modules import InputQuantizer, WeightQuantizer
from dcq_ray.quantizers.weights import dorefa_weight, lsq, lsq_weight, ttq_weight, twn_weight, wrpn_weight, xnor_weight

Array = npt.NDArray[np.float64]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off_ties(value: Tensor, step: Tensor | float, distance: float = 1e-3) -> Tensor:
    """Values whose quotient by the step is moved off the halves between integers, where roundings may differ."""
    quotient = value / step
    at_tie = (quotient - quotient.floor() - 0.5).abs() < distance
    return torch.where(at_tie, value + 3 * distance * step, value)


# --- numpy, in float64, as the papers write it


def np_round(value: Array) -> Array:
    whole, part = np.floor(value), value - np.floor(value)
    return np.where(part > 0.5, whole + 1, np.where(part < 0.5, whole, whole + whole % 2))


def np_sign(value: Array) -> Array:
    return np.where(value >= 0, 1.0, -1.0)


def np_dorefa(weight: Array, bits: int) -> Array:
    if bits == 1:
        return np_sign(weight) * np.mean(np.abs(weight))
    levels = 2**bits - 1
    bounded = np.tanh(weight)
    return 2 * np_round(levels * (bounded / (2 * np.max(np.abs(bounded))) + 0.5)) / levels - 1


def np_xnor(weight: Array) -> Array:
    return np.stack([np_sign(filters) * np.abs(filters).sum() / filters.size for filters in weight])


def np_twn(weight: Array) -> Array:
    threshold = 0.75 * np.abs(weight).sum() / weight.size
    kept = [value for value in np.abs(weight).flatten() if value > threshold]
    return np.where(weight > threshold, 1, np.where(weight < -threshold, -1, 0)) * (sum(kept) / len(kept))


def np_ttq(weight: Array, positive: float, negative: float) -> Array:
    threshold = 0.05 * np.abs(weight).max()
    return np.where(weight > threshold, positive, np.where(weight < -threshold, -negative, 0))


def np_lsq(weight: Array, step: float, bits: int) -> Array:
    # The paper clips before it rounds.
    return np_round(np.clip(weight / step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) * step


def np_wrpn(weight: Array, bits: int) -> Array:
    levels = 2 ** (bits - 1) - 1
    return np_round(levels * np.clip(weight, -1, 1)) / levels


def np_pact(value: Array, clip: float, bits: int) -> Array:
    clipped = 0.5 * (np.abs(value) - np.abs(value - clip) + clip)
    return np_round(clipped * (2**bits - 1) / clip) * clip / (2**bits - 1)


def np_dorefa_activation(value: Array, bits: int) -> Array:
    return np_round((2**bits - 1) * np.clip(value, 0, 1)) / (2**bits - 1)


WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Array], Array]]] = {
    **{
        f"dorefa-{bits}": (
            lambda w, bits=bits: dorefa_weight(w, bits),
            lambda w, bits=bits: np_dorefa(w, bits),
        )
        for bits in range(1, 9)
    },
    **{
        f"lsq-{bits}": (
            lambda w, bits=bits: lsq_weight(w, torch.tensor(0.17, dtype=w.dtype), bits),
            lambda w, bits=bits: np_lsq(w, 0.17, bits),
        )
        for bits in range(2, 9)
    },
    **{
        f"wrpn-{bits}": (
            lambda w, bits=bits: wrpn_weight(w, torch.tensor(1.0, dtype=w.dtype), bits),
            lambda w, bits=bits: np_wrpn(w, bits),
        )
        for bits in range(2, 9)
    },
    "xnor": (lambda w: xnor_weight(w, 0), np_xnor),
    "twn": (twn_weight, np_twn),
    "ttq": (
        lambda w: ttq_weight(w, torch.tensor(0.7, dtype=w.dtype), torch.tensor(1.3, dtype=w.dtype)),
        lambda w: np_ttq(w, 0.7, 1.3),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_of_the_papers_formulas(name: str) -> None:
    ours, theirs = WEIGHTS[name]
    weight = seeded(16, 8, 3, 3, seed=5).double()
    np.testing.assert_allclose(ours(weight).numpy(), theirs(weight.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_are_those_of_the_papers_formulas(bits: int) -> None:
    value = 2 * seeded(4000, seed=6).double()
    clip = torch.tensor(1.7, dtype=torch.float64)
    found = pact_activation(value, clip / (2**bits - 1), bits, False)
    np.testing.assert_allclose(found.numpy(), np_pact(value.numpy(), 1.7, bits), rtol=1e-12, atol=1e-12)
    step = torch.tensor(1.0, dtype=torch.float64) / (2**bits - 1)
    found = dorefa_activation(value, step, bits, False)
    np.testing.assert_allclose(found.numpy(), np_dorefa_activation(value.numpy(), bits), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_pacts_clip_is_that_of_the_clipped_value() -> None:
    # PACT's gradients are the exact ones of its equation 1, which does not round yet: by central differences.
    value = (2 * seeded(300, seed=7).double()).requires_grad_()
    step = torch.tensor(1.7 / 15, dtype=torch.float64, requires_grad=True)
    weights = seeded(300, seed=8).double()
    (pact_activation(value, step, 4, False) * weights).sum().backward()

    def clipped(values: Array, clip: float) -> Array:
        return 0.5 * (np.abs(values) - np.abs(values - clip) + clip)

    values, small = value.detach().numpy(), 1e-6
    of_clip = ((clipped(values, 1.7 + small) - clipped(values, 1.7 - small)) / (2 * small) * weights.numpy()).sum()
    assert float(step.grad) == pytest.approx(15 * of_clip, rel=1e-6)
    of_value = (clipped(values + small, 1.7) - clipped(values - small, 1.7)) / (2 * small) * weights.numpy()
    np.testing.assert_allclose(value.grad.numpy(), of_value, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_gradient_of_dorefa_is_that_of_its_formula_without_rounding(bits: int) -> None:
    weight = seeded(50, seed=9).double().requires_grad_()
    dorefa_weight(weight, bits).sum().backward()
    largest = weight.detach().tanh().abs().max()
    small = 1e-6
    # The maximum is held constant, so each weight moves alone.
    expected = ((weight.detach() + small).tanh() - (weight.detach() - small).tanh()) / (2 * small) / largest
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-8)


# --- torch's learnable fake quantization (it multiplies by the reciprocal, and lets gradients pass half a step beyond the ends)


def within_or_far(value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    quotient = value / step
    near = ((quotient >= high - 1e-3) & (quotient <= high + 0.6)) | ((quotient <= low + 1e-3) & (quotient >= low - 0.6))
    return torch.where(near, torch.zeros_like(value) + 0.25 * step, value)


@pytest.mark.parametrize(
    ("low", "high"), [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (2, 3, 4, 8)] + [(0, 3), (0, 255)]
)
def test_lsq_per_tensor_is_torchs_learnable_fake_quantize(low: int, high: int) -> None:
    start = torch.tensor(3.0 / high)
    value = off_ties(within_or_far(2 * seeded(2000, seed=10), start, low, high), start)
    gradient, factor = seeded(2000, seed=11), 0.125
    ours, step = value.clone().requires_grad_(), start.clone().requires_grad_()
    quantized = lsq(ours, step, low, high, factor)
    quantized.backward(gradient)
    theirs, scale = value.clone().requires_grad_(), start.reshape(1).clone().requires_grad_()
    zero_point = torch.zeros(1, requires_grad=True)
    expected = torch._fake_quantize_learnable_per_tensor_affine(theirs, scale, zero_point, low, high, factor)
    expected.backward(gradient)
    assert (expected == low * start).any()
    assert (expected == high * start).any()
    torch.testing.assert_close(quantized, expected)
    assert torch.equal(ours.grad, theirs.grad)
    torch.testing.assert_close(step.grad, scale.grad.reshape(()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channel_dim", [0, 1])
def test_lsq_per_channel_is_torchs_learnable_fake_quantize(bits: int, channel_dim: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    start = torch.linspace(0.5, 2, 6) / high
    shaped = start.reshape([-1 if dim == channel_dim else 1 for dim in range(4)])
    value = off_ties(within_or_far(seeded(6, 6, 3, 3, seed=12), shaped, low, high), shaped)
    gradient = seeded(6, 6, 3, 3, seed=13)
    ours, step = value.clone().requires_grad_(), shaped.clone().requires_grad_()
    quantized = lsq_weight(ours, step, bits)
    quantized.backward(gradient)
    theirs, scale = value.clone().requires_grad_(), start.clone().requires_grad_()
    factor = 1 / math.sqrt(54 * high)
    expected = torch._fake_quantize_learnable_per_channel_affine(
        theirs, scale, torch.zeros(6, requires_grad=True), channel_dim, low, high, factor
    )
    expected.backward(gradient)
    torch.testing.assert_close(quantized, expected)
    assert torch.equal(ours.grad, theirs.grad)
    torch.testing.assert_close(step.grad.flatten(), scale.grad, rtol=1e-4, atol=1e-4)


# --- Brevitas


@pytest.fixture(scope="module")
def brevitas() -> Any:
    """Its quantizers; the extra `oracles` has them."""
    pytest.importorskip("brevitas", reason="the extra `oracles` is not installed")
    from brevitas.core import function_wrapper, quant, scaling

    class Parts:
        binary, ternary, integer = quant.BinaryQuant, quant.TernaryQuant, quant.IntQuant
        constant, same = scaling.ConstScaling, function_wrapper.Identity

    return Parts


def test_binary_weights_are_those_of_brevitas(brevitas: Any) -> None:
    weight = torch.cat([seeded(500, seed=14), torch.zeros(2)]).requires_grad_()
    expected, *_ = brevitas.binary(brevitas.constant(float(weight.detach().abs().mean())))(weight)
    torch.testing.assert_close(dorefa_weight(weight, 1), expected)
    torch.testing.assert_close(xnor_weight(weight.reshape(1, -1), 0), expected.reshape(1, -1))


def test_ternary_weights_are_those_of_brevitas(brevitas: Any) -> None:
    weight = seeded(501, seed=15)
    magnitude = weight.abs()
    kept = magnitude > 0.75 * magnitude.mean()
    scale = float(magnitude[kept].mean())
    expected, *_ = brevitas.ternary(brevitas.constant(scale), float(0.75 * magnitude.mean()) / scale)(weight)
    torch.testing.assert_close(twn_weight(weight), expected)
    assert len(expected.unique()) == 3
    # TTQ with two levels of one size is the same with another threshold.
    expected, *_ = brevitas.ternary(brevitas.constant(0.4), float(0.05 * magnitude.max()) / 0.4)(weight)
    torch.testing.assert_close(ttq_weight(weight, torch.tensor(0.4), torch.tensor(0.4)), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_those_of_brevitas_to_the_bit_ties_included(brevitas: Any, bits: int) -> None:
    zero, width = torch.tensor(0.0), torch.tensor(float(bits))
    # Of the second step also WRPN's clip, m steps, gives exactly the step back.
    for step in torch.tensor([0.0371, 0.03125]):
        value = torch.cat([3 * seeded(2000, seed=16), (torch.arange(-300, 300) + 0.5) * step])

        def theirs(signed: bool, narrow: bool, step: Tensor = step, value: Tensor = value) -> Tensor:
            made = brevitas.integer(narrow_range=narrow, signed=signed, input_view_impl=brevitas.same())
            result: Tensor = made(step, zero, width, value)
            return result

        assert torch.equal(lsq_weight(value, step, bits), theirs(True, False))
        for function in (dorefa_activation, pact_activation, lsq_activation):
            assert torch.equal(function(value, step, bits, False), theirs(False, False))
            assert torch.equal(function(value, step, bits, True), theirs(True, True))
    assert torch.equal(wrpn_weight(value, step * (2 ** (bits - 1) - 1), bits), theirs(True, True))


# --- ONNX Runtime: QuantizeLinear and DequantizeLinear, which exports use


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("step", [0.0371, 0.1, 1 / 3, 0.0117])
def test_8_bits_are_those_of_onnx_runtime_to_the_bit_ties_included(signed: bool, step: float) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    helper, kinds = onnx.helper, onnx.TensorProto
    scale = torch.tensor(step)
    value = torch.cat([10 * seeded(5000, seed=17), (torch.arange(-300, 300) + 0.5) * scale])
    low, high = level_range(8, signed)
    # ONNX has no -127 … 127: the lowest level of ours is the clip's.
    value = value.clamp(low * scale, None)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "quantize",
        [helper.make_tensor_value_info("x", kinds.FLOAT, list(value.shape))],
        [helper.make_tensor_value_info("y", kinds.FLOAT, list(value.shape))],
        [
            helper.make_tensor("scale", kinds.FLOAT, [], [float(scale)]),
            helper.make_tensor("zero", kinds.INT8 if signed else kinds.UINT8, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": value.numpy()})
    for function in (dorefa_activation, pact_activation, lsq_activation):
        assert np.array_equal(function(value, scale, 8, signed).numpy(), expected)
    assert expected.max() == np.float32(high * scale)
    if signed:
        assert np.array_equal(lsq_weight(value, scale, 8).numpy(), expected)


# --- the numbers of Intel's Distiller (tests/test_quant_utils.py; its scale is one over our step)


@pytest.mark.parametrize(("clip", "scale"), [(4.0, 31.75), (10.0, 12.7)])
def test_8_bits_of_a_restricted_symmetric_range_have_distillers_scale(clip: float, scale: float) -> None:
    quantizer = InputQuantizer("dorefa", 8, ActivationStart(clip=clip, signed=True))
    assert 1 / float(quantizer.step.detach()) == pytest.approx(scale)
    weight = torch.tensor([0.0, clip])
    wrpn = WeightQuantizer("wrpn", 8, weight, 0)
    assert 1 / float(wrpn.scales(weight)) == pytest.approx(scale)


@pytest.mark.parametrize(("clip", "scale"), [(4.0, 31.875), (10.0, 12.75)])
def test_8_bits_of_a_whole_symmetric_range_have_distillers_scale(clip: float, scale: float) -> None:
    # DoReFa's 256 levels lie two integers apart, from -clip to clip: 255 / (2 clip).
    levels = dorefa_weight(torch.linspace(-1, 1, 5001), 8, torch.tensor(clip)).unique()
    assert len(levels) == 256
    assert float(1 / levels.diff().mean()) == pytest.approx(scale)


@pytest.mark.parametrize(("clip", "scale"), [(5.0, 51.0), (10.0, 25.5)])
def test_8_bits_of_a_range_from_zero_have_distillers_scale(clip: float, scale: float) -> None:
    quantizer = InputQuantizer("pact", 8, ActivationStart(clip=clip, signed=False))
    assert 1 / float(quantizer.step.detach()) == pytest.approx(scale)


def test_8_bit_ranges_are_distillers() -> None:
    assert level_range(8, False) == (0, 255)
    assert level_range(8, True) == (-127, 127)
    found = lsq_weight(torch.tensor([-1e6, 1e6]), torch.tensor(1.0), 8)
    assert found.tolist() == [-128, 127]
