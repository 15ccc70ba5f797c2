"""Quantizers against hand-computed values, their gradients, and quantizers on modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dcq_ray.errors import QuantizeError
from dcq_ray.quantize import LayerSite, bake, packed_num_bytes, plan_layers, put_quantizers
from dcq_ray.quantize.weights import dorefa_weight, least_squares_scale
from dcq_ray.records import LayerPlan
from dcq_ray.spec import QuantizeSpec


def layer(name: str, module: nn.Module, bits: int) -> LayerPlan:
    part = module.get_submodule(name)
    spec = QuantizeSpec.model_validate({"first_last_bits": None, "overrides": {name: {"bits": bits}}})
    (plan,) = plan_layers([LayerSite(name=name, module=part)], spec)
    return plan


def test_one_bit_by_hand() -> None:
    weight = torch.tensor([[0.5, -1.5], [0.0, 2.0]])
    # mean|w| = 4 / 4 = 1, and sign(0) = +1
    assert torch.equal(dorefa_weight(weight, 1), torch.tensor([[1.0, -1.0], [1.0, 1.0]]))


def test_two_bits_by_hand() -> None:
    weight = torch.tensor([math.atanh(0.8), math.atanh(-0.8), math.atanh(0.2), 0.0])
    # tanh / (2 * 0.8) + 1/2 = 1, 0, 0.625, 0.5; times 3 rounded = 3, 0, 2, 2 (ties to even); 2 q / 3 - 1
    expected = torch.tensor([1.0, -1.0, 1 / 3, 1 / 3])
    torch.testing.assert_close(dorefa_weight(weight, 2), expected)


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(1, 8), seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_levels_and_shape(bits: int, seed: int, scale: float) -> None:
    weight = torch.randn(7, 3, 3, generator=torch.Generator().manual_seed(seed)) * scale
    quantized = dorefa_weight(weight, bits)
    assert quantized.shape == weight.shape
    steps = 2**bits - 1
    if bits == 1:
        levels = quantized / weight.abs().mean()
        assert set(levels.round(decimals=4).flatten().tolist()) <= {-1.0, 1.0}
    else:
        index = (quantized + 1) / 2 * steps
        torch.testing.assert_close(index, index.round(), atol=1e-3, rtol=0)
        assert index.min() >= -1e-3
        assert index.max() <= steps + 1e-3


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_all_zero_weights_stay_finite(bits: int) -> None:
    assert torch.isfinite(dorefa_weight(torch.zeros(4), bits)).all()


def test_gradient_of_one_bit_is_the_identity() -> None:
    weight = torch.tensor([0.3, -2.0, 0.0], requires_grad=True)
    (dorefa_weight(weight, 1) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_gradient_of_more_bits_is_that_of_tanh_over_its_maximum() -> None:
    weight = torch.tensor([0.3, -1.2, 0.7], requires_grad=True)
    dorefa_weight(weight, 3).sum().backward()
    tanh = torch.tanh(weight.detach())
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (1 - tanh**2) / tanh.abs().max())


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(QuantizeError, match="got 9 bits"):
        dorefa_weight(torch.ones(2), 9)


def test_least_squares_scale_by_hand() -> None:
    # <w, q> / <q, q> = (2 + 3) / 2
    assert least_squares_scale(torch.tensor([2.0, -3.0]), torch.tensor([1.0, -1.0])) == 2.5
    assert least_squares_scale(torch.tensor([2.0]), torch.tensor([0.0])) == 1.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))


def layers_of(module: nn.Module) -> list[LayerSite]:
    return [
        LayerSite(name=name, module=part)
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]


def names_of(module: nn.Module) -> list[str]:
    return [site.name for site in layers_of(module)]


def test_first_and_last_layer_policy_and_overrides() -> None:
    layers = layers_of(network())

    def bits(**spec: object) -> list[int]:
        return [plan.bits for plan in plan_layers(layers, QuantizeSpec.model_validate(spec))]

    assert bits() == [8, 1, 8]
    assert bits(first_last_bits=None) == [1, 1, 1]
    assert bits(first_last_bits=32, weights={"bits": 2}) == [32, 2, 32]
    assert bits(overrides={"[34]": {"bits": 4}, "4": {"bits": 32}}) == [8, 4, 32]


def test_unmatched_override_names_what_is_near() -> None:
    with pytest.raises(QuantizeError, match=r"'layer9\.\*' matches no"):
        plan_layers(layers_of(network()), QuantizeSpec.model_validate({"overrides": {"layer9.*": {"bits": 2}}}))


def test_bits_between_8_and_32_are_refused() -> None:
    with pytest.raises(QuantizeError, match="got 16 bits"):
        plan_layers(layers_of(network()), QuantizeSpec(first_last_bits=16))


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(QuantizeError, match="nothing to quantize"):
        plan_layers([], QuantizeSpec())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bake_keeps_outputs_names_and_classes(bits: int) -> None:
    module = network()
    names = set(module.state_dict())
    put_quantizers(module, [layer(name, module, bits) for name in names_of(module)])
    images = torch.randn(2, 1, 4, 4)
    expected = module(images)
    extra = bake(module)
    assert torch.equal(module(images), expected)
    assert set(module.state_dict()) == names
    assert type(module[0]) is nn.Conv2d
    assert isinstance(module[0].weight, nn.Parameter)
    assert len(module[0].weight.unique()) <= 2**bits
    assert extra["dcq.0.scale"].shape == ()
    assert extra["dcq.0.bits"] == bits
    step = 2 * extra["dcq.0.scale"] / (2**bits - 1) if bits > 1 else 2 * extra["dcq.0.scale"]
    index = (module[0].weight - module[0].weight.min()) / step
    torch.testing.assert_close(index, index.round(), atol=1e-3, rtol=0)


def test_32_bits_leave_a_module_alone() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    put_quantizers(module, [layer(name, module, 32) for name in names_of(module)])
    assert bake(module) == {}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_quantized_weights_start_near_the_teachers() -> None:
    module = network()
    original = module[3].weight.detach().clone()
    put_quantizers(module, [layer("3", module, 8)])
    error = (module[3].weight - original).norm() / original.norm()
    assert error < 0.05


def test_packed_bytes_by_hand() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    put_quantizers(module, [layer("0", module, 2)])
    plan = layer("0", nn.Sequential(nn.Linear(3, 3)), 2)
    extra = bake(module)
    # 9 weights of 2 bits in 3 bytes, a scale of 4, a bias of 12
    assert packed_num_bytes({**module.state_dict(), **extra}, [plan]) == 19
