"""Which combinations of choices are worth having: the multiple-choice knapsack, solved exactly, for all budgets at once.

One choice for each section; bytes and costs add up. A combination is worth having where none is at most as large and costs
less. All of those, the Pareto front, are found section by section: what is not on the front of the first k sections is on no
front of more.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a section takes and costs with one of its quantizers."""

    num_bytes: int
    cost: float
    """What it costs the network, >= 0; of any unit that adds up over sections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One choice for every section, by number, and what they take and cost together."""

    choices: tuple[int, ...]
    num_bytes: int
    cost: float


def frontier(sections: Sequence[Sequence[Choice]]) -> tuple[Combination, ...]:
    """All combinations that no other one beats, from the smallest to the largest; equal ones once.

    Args:
        sections: the choices of each section, at least one.
    """
    num_bytes, costs = np.zeros(1, np.int64), np.zeros(1)
    # Of each section: where on the front before it a combination comes from, and what it adds.
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for choices in sections:
        sizes = (num_bytes[:, None] + np.array([choice.num_bytes for choice in choices])).ravel()
        sums = (costs[:, None] + np.array([choice.cost for choice in choices])).ravel()
        order = np.lexsort((sums, sizes))
        least = np.minimum.accumulate(sums[order])
        kept = order[np.concatenate(([True], least[1:] < least[:-1]))]
        num_bytes, costs = sizes[kept], sums[kept]
        steps.append((kept // len(choices), kept % len(choices)))
    found = []
    for end in range(len(num_bytes)):
        chosen, at = [], end
        for before, choice in reversed(steps):
            chosen.append(int(choice[at]))
            at = int(before[at])
        found.append(
            Combination(choices=tuple(reversed(chosen)), num_bytes=int(num_bytes[end]), cost=float(costs[end]))
        )
    return tuple(found)


def best_within(front: Sequence[Combination], budget_bytes: int, count: int) -> tuple[Combination, ...]:
    """The `count` combinations of a front that cost least within a budget, best first; fewer where it has no more."""
    return tuple(reversed([found for found in front if found.num_bytes <= budget_bytes][-count:]))


def neighbours(
    best: Combination, sections: Sequence[Sequence[Choice]], budget_bytes: int, count: int
) -> tuple[Combination, ...]:
    """Of those that differ from a combination in at most two sections, the `count` that cost least within a budget, best first.

    Most of them are on no front, but cost hardly more than those that are, by predictions that are no better than that.
    """
    moves = [
        (index, number, choice.num_bytes - own.num_bytes, choice.cost - own.cost)
        for index, choices in enumerate(sections)
        for own in (choices[best.choices[index]],)
        for number, choice in enumerate(choices)
        if number != best.choices[index]
    ]
    pairs = ((one, two) for one, two in itertools.combinations(moves, 2) if one[0] != two[0])
    found = []
    for changes in itertools.chain([()], ((move,) for move in moves), pairs):
        num_bytes = best.num_bytes + sum(move[2] for move in changes)
        if num_bytes <= budget_bytes:
            found.append((best.cost + sum(move[3] for move in changes), num_bytes, changes))
    nearest = heapq.nsmallest(count, found)
    return tuple(
        Combination(choices=_changed(best.choices, changes), num_bytes=num_bytes, cost=cost)
        for cost, num_bytes, changes in nearest
    )


def _changed(choices: tuple[int, ...], changes: Sequence[tuple[int, int, int, float]]) -> tuple[int, ...]:
    other = dict(enumerate(choices))
    other.update({index: number for index, number, _, _ in changes})
    return tuple(other.values())


def spread(front: Sequence[Combination], count: int) -> tuple[Combination, ...]:
    """About `count` combinations of a front, its ends among them, evenly spaced by the logarithm of their bytes."""
    if len(front) <= count:
        return tuple(front)
    sizes = np.log([max(1, found.num_bytes) for found in front])
    wanted = np.linspace(sizes[0], sizes[-1], count)
    nearest = {int(np.abs(sizes - size).argmin()) for size in wanted}
    return tuple(front[index] for index in sorted(nearest))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where one of them is constant or there are under two."""
    if len(first) < 2:
        return math.nan
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / norm if norm else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    distinct, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse.reshape(len(values))] if len(distinct) else values
