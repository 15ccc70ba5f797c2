"""Moments: windows are what a layer's outputs are made of, and values beside them are taken at the same places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcq_ray.quantizers.moments import _num_places, _outputs, _windows


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2),
        nn.Conv2d(4, 6, 2, padding="valid", groups=2),
        nn.Conv2d(4, 4, 3, padding=(2, 1), groups=4, padding_mode="reflect"),
        nn.Linear(7, 5),
    ],
)
def test_windows_times_weights_are_the_layers_outputs(layer: nn.Module) -> None:
    value = torch.randn(3, 4, 9, 7)
    outputs = layer(value)
    if isinstance(layer, nn.Conv2d):
        wanted = outputs.flatten(2)
        places = torch.arange(wanted.shape[2])
        assert _num_places(layer, value) == wanted.shape[2]
        wanted = wanted.permute(0, 2, 1)
    else:
        wanted = outputs.flatten(1, -2)
        places = torch.arange(wanted.shape[1])
        assert _num_places(layer, value) == wanted.shape[1]
    windows = _windows(layer, value, places)
    weight = layer.weight.flatten(1)  # type: ignore[operator, union-attr]
    rows = weight.reshape(len(windows), -1, weight.shape[1])
    found = (windows @ rows.transpose(1, 2)).permute(1, 0, 2).flatten(1) + layer.bias
    assert torch.allclose(found.reshape(wanted.shape), wanted, atol=1e-5)
    some = places[[2, 0]]
    assert _windows(layer, value, some).shape[1] == 6
    # A value of the outputs' shape lies as they do; one of another shape is none.
    found = _outputs(layer, outputs, value, some)
    assert found is not None
    assert found.equal(wanted[:, some].flatten(0, 1))
    assert _outputs(layer, outputs[:1], value, some) is None
    assert _outputs(layer, outputs[..., :-1], value, some) is None
    assert _outputs(layer, None, value, some) is None
