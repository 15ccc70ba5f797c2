"""Coupling: rows chosen together lower what their errors cost together, and are those of each alone where nothing couples them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcq_ray.quantizers.coupling import couple
from dcq_ray.quantizers.descent import descend

LEVELS = torch.tensor([[-1.0], [1.0]])


def problem(seed: int, *, num_inputs: int = 6, num_rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of correlated inputs, crosses with the outputs of full-precision rows, and a metric of two directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator)
    moments = (mixing @ mixing.t() / num_inputs + 0.05 * torch.eye(num_inputs))[None]
    rows = torch.randn(num_rows, num_inputs, generator=generator)
    gradients = torch.randn(2, num_rows, generator=generator)
    return moments, rows @ moments[0], gradients.t() @ gradients + 0.05 * torch.eye(num_rows)


def cost(moments: Tensor, crosses: Tensor, numbers: Tensor, metric: Tensor, *, scale_free: bool) -> float:
    """The sum of M_ij E[e_i e_j] but for E[y y']; free scales as are best for all rows together."""
    weights = LEVELS[:, 0][numbers]
    quadratic = metric * (weights @ moments[0] @ weights.t())
    linear = (metric @ crosses * weights).sum(1)
    if not scale_free:
        return float(quadratic.sum() - 2 * linear.sum())
    return -float(linear @ torch.linalg.solve(quadratic.double(), linear.double()).to(linear))


def test_two_rows_by_hand() -> None:
    # One input of mean square 1, both rows want 0.2: each alone takes +1 and errs by 0.8. Where only the sum of both errors
    # counts, (+1, +1) costs 1.6^2; with the first as it is, the second is to give 0.2 - 0.8 = -0.6: (+1, -1) costs 0.4^2.
    moments, crosses = torch.ones(1, 1, 1), torch.tensor([[0.2], [0.2]])
    alone = descend(moments, crosses, LEVELS, torch.ones(2, 1, dtype=torch.int64), scale_free=False)
    assert alone.tolist() == [[1], [1]]
    # The first row goes first: it takes up what the second spoils, and then the second has nothing to make good.
    assert couple(moments, crosses, LEVELS, alone, torch.ones(2, 2), scale_free=False).tolist() == [[0], [1]]
    assert couple(moments, crosses, LEVELS, alone, torch.eye(2), scale_free=False).tolist() == [[1], [1]]


@given(seed=st.integers(0, 10**6), scale_free=st.booleans())
@settings(max_examples=40, deadline=None)
def test_without_coupling_nothing_is_left_to_move(seed: int, scale_free: bool) -> None:
    moments, crosses, _ = problem(seed)
    start = descend(moments, crosses, LEVELS, (crosses >= 0).long(), scale_free=scale_free)
    metric = torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    assert couple(moments, crosses, LEVELS, start, metric, scale_free=scale_free).equal(start)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_it_never_costs_more(seed: int) -> None:
    moments, crosses, metric = problem(seed)
    start = descend(moments, crosses, LEVELS, (crosses >= 0).long(), scale_free=False)
    found = couple(moments, crosses, LEVELS, start, metric, scale_free=False)
    before, after = (cost(moments, crosses, numbers, metric, scale_free=False) for numbers in (start, found))
    assert after <= before + 1e-4 * (1 + abs(before))


@pytest.mark.parametrize("scale_free", [False, True])
def test_it_comes_nearer_to_the_best_of_all_choices(scale_free: bool) -> None:
    alone, together = 0.0, 0.0
    for seed in range(10):
        moments, crosses, metric = problem(seed, num_inputs=4, num_rows=2)
        every = [torch.tensor(bits).reshape(2, 4) for bits in itertools.product((0, 1), repeat=8)]
        best = min(cost(moments, crosses, numbers, metric, scale_free=scale_free) for numbers in every)
        start = descend(moments, crosses, LEVELS, (crosses >= 0).long(), scale_free=scale_free)
        found = couple(moments, crosses, LEVELS, start, metric, scale_free=scale_free)
        alone += cost(moments, crosses, start, metric, scale_free=scale_free) - best
        together += cost(moments, crosses, found, metric, scale_free=scale_free) - best
    assert together < 0.8 * alone


def test_groups_are_coupled_each_for_itself_and_rows_that_do_not_count_stay() -> None:
    (one, ours, metric), (other, theirs, _) = problem(3), problem(4)
    moments, crosses = torch.cat([one, other]), torch.cat([ours, theirs])
    start = (crosses >= 0).long()
    every = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    whole = every @ every.t()
    whole[:4, :4] = metric
    whole[5] = whole[:, 5] = 0
    found = couple(moments, crosses, LEVELS, start, whole, scale_free=True)
    assert found[:4].equal(couple(one, ours, LEVELS, start[:4], metric, scale_free=True))
    assert found[5].equal(start[5])
    assert not found.equal(start)
