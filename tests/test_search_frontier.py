"""The front: beside all combinations that there are."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcq_ray.search.frontier import Choice, Combination, best_within, frontier, neighbours, rank_correlation, spread

choices = st.builds(
    lambda num_bytes, cost: Choice(num_bytes=num_bytes, cost=cost / 8), st.integers(0, 12), st.integers(0, 24)
)


def every(sections: list[list[Choice]]) -> list[Combination]:
    return [
        Combination(
            choices=numbers,
            num_bytes=sum(section[number].num_bytes for section, number in zip(sections, numbers, strict=True)),
            cost=sum(section[number].cost for section, number in zip(sections, numbers, strict=True)),
        )
        for numbers in itertools.product(*(range(len(section)) for section in sections))
    ]


@given(st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_the_front_has_the_least_cost_of_every_budget_and_nothing_else(sections: list[list[Choice]]) -> None:
    front, combinations = frontier(sections), every(sections)
    for found in front:
        # Costs are eighths, so their sums are exact.
        assert found in combinations
    for budget in range(60):
        within = [found.cost for found in combinations if found.num_bytes <= budget]
        best = best_within(front, budget, 1)
        assert [found.cost for found in best] == ([min(within)] if within else [])
    assert all(a.num_bytes < b.num_bytes and a.cost > b.cost for a, b in itertools.pairwise(front))


@given(
    st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 60), st.integers(1, 9)
)
@settings(max_examples=150, deadline=None)
def test_neighbours_are_the_best_that_differ_in_two_sections(
    sections: list[list[Choice]], budget: int, count: int
) -> None:
    for best in best_within(frontier(sections), budget, 1):
        near = [
            found
            for found in every(sections)
            if found.num_bytes <= budget
            and sum(own != other for own, other in zip(found.choices, best.choices, strict=True)) <= 2
        ]
        found = neighbours(best, sections, budget, count)
        assert all(one in near for one in found)
        assert len({one.choices for one in found}) == len(found) == min(count, len(near))
        assert [one.cost for one in found] == sorted(one.cost for one in near)[:count]
        assert found[0].cost == best.cost


def test_two_sections_by_hand() -> None:
    # Bytes and costs: 1 bit 10 and 4, 2 bits 20 and 1; the second section is twice as large and costs half as much.
    sections = [
        [Choice(num_bytes=10, cost=4.0), Choice(num_bytes=20, cost=1.0)],
        [Choice(num_bytes=20, cost=2.0), Choice(num_bytes=40, cost=0.5)],
    ]
    # (1, 0) takes 40 and costs 3; (0, 1) takes 50 and costs 4.5: it is beaten.
    assert frontier(sections) == (
        Combination(choices=(0, 0), num_bytes=30, cost=6.0),
        Combination(choices=(1, 0), num_bytes=40, cost=3.0),
        Combination(choices=(1, 1), num_bytes=60, cost=1.5),
    )
    assert [found.choices for found in best_within(frontier(sections), 59, 4)] == [(1, 0), (0, 0)]
    assert best_within(frontier(sections), 29, 4) == ()


def test_spread_keeps_the_ends_and_goes_by_ratios() -> None:
    front = [Combination(choices=(k,), num_bytes=2**k, cost=float(-k)) for k in range(11)]
    assert [found.choices[0] for found in spread(front, 3)] == [0, 5, 10]
    assert spread(front[:2], 3) == tuple(front[:2])


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0, 1.5, 1.5, 3 beside 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1.0], [1.0]))
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))
