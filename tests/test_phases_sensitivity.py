"""Sensitivity: the metric of a layer's outputs is the Fisher information of the teacher's softened predictions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dcq_ray.phases.sensitivity import TEMPERATURE, output_metrics


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def named(**layers: nn.Module) -> nn.Module:
    section = nn.Sequential()
    for name, layer in layers.items():
        section.add_module(name, layer)
    return section.eval().requires_grad_(False)


def test_the_last_layers_is_the_covariance_of_a_drawn_class() -> None:
    section = named(last=nn.Linear(3, 4))
    value = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    # Many draws for one image: E[(onehot - p)(onehot - p)'] = diag p - p p'.
    found = output_metrics([section], {"last"}, [value.expand(20000, -1)], seed=0)["last"] / 20000
    likely = (section(value)[0] / TEMPERATURE).softmax(0)
    assert torch.allclose(found, torch.diag(likely) - torch.outer(likely, likely), atol=0.01)


def test_a_layers_is_that_of_what_follows_it() -> None:
    torch.manual_seed(0)
    # The first layer runs twice; an activation works in place on its output.
    twice = nn.Conv2d(2, 2, 3, padding=1)
    first = named(
        twice=twice, relu=nn.ReLU(inplace=True), again=twice, rectify=nn.ReLU(inplace=True), conv=nn.Conv2d(2, 3, 2)
    )
    second = named(flatten=nn.Flatten(), linear=nn.Linear(48, 3))
    state = copy.deepcopy(first.state_dict())
    batches = [images(4), images(2) + 1]
    kept = [batch.clone() for batch in batches]
    found = output_metrics([first, second], {"twice", "conv", "linear", "absent"}, batches, seed=3)
    assert set(found) == {"twice", "conv", "linear"}
    # By the chain rule from the last one's gradients, drawn with the same seed, image by image.
    generator, wanted, last = torch.Generator().manual_seed(3), torch.zeros(3, 3), torch.zeros(3, 3)
    for batch in batches:
        logits = second(first(batch.clone()))
        softened = (logits / TEMPERATURE).softmax(1)
        drawn = torch.multinomial(softened, 1, generator=generator)[:, 0]
        slopes = nn.functional.one_hot(drawn, 3) - softened
        last += slopes.t() @ slopes
        places = (slopes @ second.get_submodule("linear").weight).reshape(-1, 3, 16)  # type: ignore[operator]
        wanted += torch.einsum("brp,bsp->rs", places, places)
    assert torch.allclose(found["linear"], last, atol=1e-6)
    assert torch.allclose(found["conv"], wanted, atol=1e-5)
    eigenvalues = torch.linalg.eigvalsh(found["twice"])
    assert eigenvalues.min() > -1e-5
    assert eigenvalues.max() > 0
    # Nothing is left behind: hooks, gradients, or changed batches.
    assert all(value.equal(state[name]) for name, value in first.state_dict().items())
    assert not any(part._forward_hooks for part in first.modules())
    assert all(batch.equal(before) for batch, before in zip(batches, kept, strict=True))


def test_what_does_not_reach_the_predictions_counts_nothing() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, value: Tensor) -> Tensor:
            self.aside(value)
            result: Tensor = self.used(value)
            return result

    module = Aside().eval().requires_grad_(False)
    found = output_metrics([module], {"used", "aside"}, [torch.ones(5, 3)], seed=0)
    assert found["aside"].equal(torch.zeros(2, 2))
    assert found["used"].abs().max() > 0
