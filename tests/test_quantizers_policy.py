"""Which bits and which scheme every layer gets: the job's, the ends', the overrides'; refusals; packed bytes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dcq_ray.errors import JobError, QuantizeError
from dcq_ray.quantizers import LayerSite, packed_num_bytes, plan_layers
from dcq_ray.quantizers.policy import channel_dim
from dcq_ray.records import LayerPlan
from dcq_ray.spec import QuantizeSpec


def sites() -> list[LayerSite]:
    """Three layers in two sections."""
    return [
        LayerSite(name="conv", module=nn.Conv2d(1, 4, 3), section=0, multiply_accumulates=36),
        LayerSite(name="block.fc", module=nn.Linear(16, 8), section=1),
        LayerSite(name="head", module=nn.Linear(8, 3), section=1),
    ]


def plan(layers: list[LayerSite] | None = None, **spec: Any) -> tuple[LayerPlan, ...]:
    return plan_layers(sites() if layers is None else layers, QuantizeSpec.model_validate(spec))


def bits(**spec: Any) -> list[int]:
    return [layer.bits for layer in plan(**spec)]


def schemes(**spec: Any) -> list[str]:
    return [layer.scheme for layer in plan(**spec)]


def inputs(**spec: Any) -> list[tuple[str | None, int]]:
    return [(layer.activation_scheme, layer.activation_bits) for layer in plan(**spec)]


def test_the_first_and_the_last_layer_get_8_bits() -> None:
    assert bits() == [8, 1, 8]
    assert bits(first_last_bits=None) == [1, 1, 1]
    assert bits(first_last_bits=32, weights={"bits": 2}) == [32, 2, 32]


def test_the_ends_get_dorefa_where_the_scheme_has_no_such_bits() -> None:
    assert schemes(weights={"scheme": "twn", "bits": 2}) == ["dorefa", "twn", "dorefa"]
    assert schemes(weights={"scheme": "lsq", "bits": 2}) == ["lsq", "lsq", "lsq"]
    assert schemes(weights={"scheme": "twn", "bits": 2}, first_last_bits=2) == ["twn", "twn", "twn"]


def test_the_last_override_that_matches_wins() -> None:
    assert bits(overrides={"*": {"bits": 4}, "head": {"bits": 32}}) == [4, 4, 32]
    assert bits(overrides={"head": {"bits": 32}, "*": {"bits": 4}}) == [4, 4, 4]
    assert bits(overrides={"block.*": {"bits": 3}}) == [8, 3, 8]
    assert schemes(overrides={"block.*": {"scheme": "xnor"}}) == ["dorefa", "xnor", "dorefa"]


def test_a_pattern_can_name_a_section() -> None:
    assert bits(overrides={"section:1": {"bits": 4}}) == [8, 4, 4]


def test_the_image_stays_as_it_is_and_the_last_input_gets_the_bits_of_the_ends() -> None:
    assert inputs(activations={"scheme": "pact", "bits": 4}) == [(None, 32), ("pact", 4), ("pact", 8)]
    every = inputs(activations={"scheme": "lsq", "bits": 2}, first_last_bits=None)
    assert every == [("lsq", 2), ("lsq", 2), ("lsq", 2)]
    assert inputs() == [(None, 32)] * 3


def test_overrides_reach_inputs_too() -> None:
    overrides = {"block.fc": {"activation_bits": 2, "activation_scheme": "lsq"}, "head": {"activation_bits": 32}}
    assert inputs(activations={"bits": 4}, overrides=overrides) == [(None, 32), ("lsq", 2), (None, 32)]


def test_the_input_of_a_layer_that_is_not_called_stays_as_it_is() -> None:
    layers = sites()
    layers[1] = LayerSite(name="block.fc", module=nn.Linear(16, 8), section=1, called=False)
    found = plan(layers, activations={"bits": 4}, first_last_bits=None)
    assert [layer.activation_bits for layer in found] == [4, 32, 4]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # 128 weights in the middle layer, 8 output channels; 4 bytes a scale.
        ({"scheme": "dorefa", "bits": 1}, 128 // 8 + 4),
        ({"scheme": "xnor", "bits": 1}, 128 // 8 + 8 * 4),
        # Three levels: five weights in a byte, 26 bytes for 128.
        ({"scheme": "ttq", "bits": 2}, 26 + 2 * 4),
        ({"scheme": "wrpn", "bits": 2}, 26 + 4),
        ({"scheme": "wrpn", "bits": 3}, 128 * 3 // 8 + 4),
        ({"scheme": "lsq-channel", "bits": 3}, 128 * 3 // 8 + 8 * 4),
    ],
)
def test_packed_bytes_of_a_layer_by_hand(weights: dict[str, Any], expected: int) -> None:
    assert plan(weights=weights)[1].num_bytes == expected


def test_bytes_of_a_layer_that_is_left_alone_are_its_own() -> None:
    # 4 filters of 1 * 3 * 3 float32
    assert plan(first_last_bits=32)[0].num_bytes == 4 * 36


def test_tied_weights_and_scales_of_inputs_are_packed_once() -> None:
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    network[1].weight = network[0].weight
    layers = [LayerSite(name=name, module=network.get_submodule(name)) for name in ("0", "1", "2")]
    planned = plan(layers, activations={"scheme": "lsq", "bits": 4}, first_last_bits=None)
    # 64 weights of 1 bit and a scale; 16 of 1 bit and a scale; a bias of two; a scale for each of three inputs
    assert packed_num_bytes(network.state_dict(), planned) == (8 + 4) + (2 + 4) + 8 + 3 * 4


def test_output_channels_of_transposed_convolutions_come_second() -> None:
    assert channel_dim("Conv2d") == channel_dim("Linear") == 0
    assert channel_dim("ConvTranspose2d") == 1
    layers = [LayerSite(name="up", module=nn.ConvTranspose2d(4, 6, 3, groups=2))]
    # [4, 6 / 2, 3, 3]: 108 weights of 1 bit in 14 bytes, and 3 scales
    assert plan(layers, weights={"scheme": "xnor"}, first_last_bits=None)[0].num_bytes == 14 + 3 * 4


class Upsampling(nn.ConvTranspose2d):
    """A user's own name for it."""


def test_a_class_derived_from_a_layer_is_a_layer_of_that_kind() -> None:
    layers = [
        LayerSite(name="up", module=Upsampling(4, 6, 3)),
        LayerSite(name="out", module=nn.MultiheadAttention(8, 2).out_proj),
    ]
    planned = plan(layers, weights={"scheme": "lsq-channel", "bits": 2}, first_last_bits=None)
    assert [layer.kind for layer in planned] == ["ConvTranspose2d", "Linear"]
    # 4 * 6 * 3 * 3 weights of 2 bits, and a scale for each of 6 channels
    assert planned[0].num_bytes == 54 + 6 * 4


def test_an_unmatched_pattern_names_what_is_near() -> None:
    with pytest.raises(JobError, match=r"'blok\.fc' matches no .*; near it: block\.fc.*section:0 to section:1"):
        plan(overrides={"blok.fc": {"bits": 2}})


def test_bits_that_a_scheme_does_not_have_are_refused_layer_by_layer() -> None:
    with pytest.raises(JobError, match=r"layer block\.fc: got 5 bits, expected 2 for twn, or 32"):
        plan(overrides={"block.fc": {"bits": 5, "scheme": "twn"}})
    with pytest.raises(JobError, match=r"(?s)2 mistakes.*layer conv: got 16 bits.*layer head: got 16 bits"):
        plan(first_last_bits=16)


def test_activation_bits_without_a_scheme_are_refused() -> None:
    with pytest.raises(JobError, match=r"layer block\.fc: got 4 activation bits, but quantize\.activations is null"):
        plan(overrides={"block.fc": {"activation_bits": 4}})


def test_tied_layers_of_unlike_bits_are_refused() -> None:
    shared = nn.Linear(8, 8)
    layers = [LayerSite(name=name, module=shared) for name in ("a", "b")]
    assert [layer.bits for layer in plan(layers)] == [8, 8]
    with pytest.raises(JobError, match="layers a and b share one weight"):
        plan(layers, overrides={"b": {"bits": 2}})


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(QuantizeError, match="nothing to quantize"):
        plan([])
