"""A tree of combinations gives what each gives alone, to the bit, and computes what they have in common once."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dcq_ray.search import measuring
from dcq_ray.search.measuring import MAX_IN_A_TREE, SectionTree, grouped
from dcq_ray.stitch import reestimate_batchnorm

COMBINATIONS = [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 1)]


class InPlace(nn.Module):
    """A section that works on its input in place, as sections may."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.num_calls = inside, 0

    def forward(self, value: Tensor) -> Tensor:
        self.num_calls += 1
        output: Tensor = self.inside(value.relu_())
        return output


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> list[list[nn.Module]]:
    """Of every section (three) those of two members."""
    torch.manual_seed(0)
    made: list[list[nn.Module]] = [
        [InPlace(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))).eval() for _ in range(2)]
        for _ in range(2)
    ]
    made.append([InPlace(nn.Sequential(nn.Flatten(), nn.Linear(32, 3))).eval() for _ in range(2)])

    def trained(member: int, place: tuple[int, int], _: object) -> nn.Module:
        index, number = place
        assert member == number
        return copy.deepcopy(made[index][number])

    monkeypatch.setattr(measuring, "trained_section", trained)
    return made


def tree() -> SectionTree:
    members = [SimpleNamespace(context=number, results=[(index, number) for index in range(3)]) for number in range(2)]
    library: Any = SimpleNamespace(members=members, network=None)
    return SectionTree(library, COMBINATIONS)


def alone(sections: list[list[nn.Module]], choices: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(*(copy.deepcopy(sections[index][number]) for index, number in enumerate(choices)))


def test_every_combination_gives_what_it_gives_alone(sections: list[list[nn.Module]]) -> None:
    images = torch.randn(4, 2, 4, 4)
    together = tree()(images.clone())
    assert together.shape == (4, len(COMBINATIONS), 3)
    for number, choices in enumerate(COMBINATIONS):
        assert torch.equal(together[:, number], alone(sections, choices)(images.clone()))


def test_a_batch_passes_every_beginning_once(sections: list[list[nn.Module]]) -> None:
    made = tree()
    made(torch.randn(4, 2, 4, 4))
    # Beginnings: 2 of one section, 3 of two, 4 of three; one after the other they would be 12.
    assert [section.num_calls for section in made.nodes.values()] == [1] * 9


def test_batchnorm_is_that_of_each_alone(sections: list[list[nn.Module]]) -> None:
    batches = [torch.randn(4, 2, 4, 4) for _ in range(3)]
    made = tree()
    reestimate_batchnorm(made, [batch.clone() for batch in batches], torch.device("cpu"))
    for choices in COMBINATIONS:
        own = alone(sections, choices)
        reestimate_batchnorm(own, [batch.clone() for batch in batches], torch.device("cpu"))
        # Sections in a row name theirs alike, so names are those of the last section alone.
        state = made.combination_state(choices)
        assert all(torch.equal(state[name], value) for name, value in own[2].state_dict().items())
        middle = made.nodes["_".join(map(str, choices[:2]))]
        assert torch.equal(middle.inside[1].running_mean, own[1].inside[1].running_mean)
        assert torch.equal(middle.inside[1].running_var, own[1].inside[1].running_var)


def test_those_that_begin_alike_are_measured_together() -> None:
    # Of 12 sections, three of them begun alike, the trees have 5 and 4.
    assert grouped([(1, 1, 1), (0, 1, 1), (0, 0, 1), (1, 1, 0)], 2) == [[(0, 0, 1), (0, 1, 1)], [(1, 1, 0), (1, 1, 1)]]
    assert grouped([(1,), (0,)], 4) == [[(0,)], [(1,)]]
    assert grouped([(0, 1)], 4) == [[(0, 1)]]


@given(st.sets(st.tuples(*[st.integers(0, 2)] * 5), min_size=1, max_size=120), st.integers(1, 5))
def test_each_is_in_one_tree_and_no_tree_is_large(some: set[tuple[int, ...]], most: int) -> None:
    trees = grouped(list(some), most)
    assert sorted(itertools.chain.from_iterable(trees)) == sorted(some)
    for group in trees:
        sections = {choices[:end] for choices in group for end in range(1, 6)}
        # One combination more than its share, whose beginning it does not share with those before it in another tree.
        assert len(sections) <= MAX_IN_A_TREE + 2 * 5
