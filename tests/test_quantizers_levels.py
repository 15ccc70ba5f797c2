"""Levels: those that quantizers give, the number of each weight's, and latents that a quantizer puts where they are wanted."""

from __future__ import annotations

import pytest
import torch

from dcq_ray.quantizers.levels import latents_on, level_numbers, weight_levels
from dcq_ray.quantizers.modules import WeightQuantizer

SCHEMES = [
    ("dorefa", 1),
    ("dorefa", 2),
    ("dorefa", 3),
    ("xnor", 1),
    ("twn", 2),
    ("ttq", 2),
    ("lsq", 2),
    ("lsq", 4),
    ("lsq-channel", 3),
    ("wrpn", 3),
]
EXACT = {"xnor", "lsq", "lsq-channel", "wrpn"}


def quantizer_and_weight(scheme: str, bits: int) -> tuple[WeightQuantizer, torch.Tensor]:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    return WeightQuantizer(scheme, bits, weight, 0), weight


@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
def test_every_quantized_weight_is_on_a_level_and_has_its_number(scheme: str, bits: int) -> None:
    quantizer, weight = quantizer_and_weight(scheme, bits)
    levels = weight_levels(quantizer, weight)
    rows = quantizer(weight).detach().flatten(1)
    numbers = level_numbers(rows, levels)
    by_row = levels.detach().expand(-1, len(rows)).t()
    assert by_row.gather(1, numbers).sub(rows).abs().max() <= 1e-6 * rows.abs().max()
    assert (levels[1:] > levels[:-1]).all()
    assert len(levels) == (3 if scheme in ("twn", "ttq") else 2**bits - (scheme == "wrpn"))


def test_levels_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    assert weight_levels(WeightQuantizer("dorefa", 1, weight, 0), weight).tolist() == [[-2.0], [2.0]]
    assert weight_levels(WeightQuantizer("xnor", 1, torch.tensor([[1.0, -3.0], [4.0, 4.0]]), 0), weight).tolist() == [
        [-2.0, -2.0],
        [2.0, 2.0],
    ]
    numbers = level_numbers(torch.tensor([[-2.0, 2.0], [2.0, 2.0]]), torch.tensor([[-2.0], [2.0]]))
    assert numbers.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
def test_a_quantizer_puts_changed_latents_where_they_are_wanted_and_the_others_where_they_were(
    scheme: str, bits: int
) -> None:
    quantizer, weight = quantizer_and_weight(scheme, bits)
    levels = weight_levels(quantizer, weight).detach().expand(-1, 6).t()
    numbers = level_numbers(quantizer(weight).detach().flatten(1), weight_levels(quantizer, weight).detach())
    chosen = numbers.clone()
    # Every third weight goes to a neighbouring level, the largest one stays.
    moved = torch.zeros_like(chosen, dtype=torch.bool)
    moved.flatten()[::3] = True
    moved.flatten()[weight.abs().argmax()] = False
    chosen = torch.where(moved, torch.where(numbers > 0, numbers - 1, numbers + 1), numbers)
    wanted = levels.gather(1, chosen).reshape(weight.shape)
    latent = latents_on(quantizer, weight, wanted, moved.reshape(weight.shape))
    assert latent[~moved.reshape(weight.shape)].equal(weight[~moved.reshape(weight.shape)])
    found = quantizer(latent).detach()
    # Of twn and ttq the threshold and scale move: levels are compared by number.
    after = level_numbers(found.flatten(1), weight_levels(quantizer, latent).detach())
    assert (after != chosen).float().mean() <= (0.05 if scheme in ("twn", "ttq") else 0)
    if scheme in EXACT or scheme == "dorefa":
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_latent_of_zero_can_be_turned_to_the_lower_level() -> None:
    weight = torch.tensor([[0.0, 1.0]])
    quantizer = WeightQuantizer("dorefa", 1, weight, 0)
    latent = latents_on(quantizer, weight, torch.tensor([[-0.5, 0.5]]), torch.tensor([[True, False]]))
    assert quantizer(latent).tolist() == [[-0.5, 0.5]]
