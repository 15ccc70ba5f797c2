"""Discrete least squares: what it finds, beside all that there is, and that no single step is left that would help."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcq_ray.quantizers.descent import descend, descend_with_scale, errors


def problem(seed: int, *, num_inputs: int, num_rows: int, num_groups: int = 1) -> tuple[Tensor, Tensor]:
    """Moments [G, N, N] of correlated inputs and crosses [R, N] with the outputs of full-precision rows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_groups, num_inputs, num_inputs, generator=generator)
    moments = mixing @ mixing.transpose(1, 2) / num_inputs + 0.05 * torch.eye(num_inputs)
    rows = torch.randn(num_groups, num_rows // num_groups, num_inputs, generator=generator)
    return moments, (rows @ moments).flatten(0, 1)


def test_two_weights_by_hand() -> None:
    # H = [[1, .9], [.9, 1]], wanted outputs those of w = (1, -.5): r = (.55, .4). Signs give (1, -1): error .2 - .3 = -.1;
    # (1, 1) gives 3.8 - 1.9 = 1.9; so at scale 1 the signs stay. With a free scale -(r'w)^2 / w'Hw is -.0225 / .2 = -.1125
    # for the signs and -.9025 / 3.8 = -.2375 for (1, 1), which is taken.
    moments, crosses = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), torch.tensor([[0.55, 0.4]])
    levels, start = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1, 0]])
    assert errors(moments, crosses, torch.tensor([[1.0, -1.0]]), scale_free=False).item() == pytest.approx(-0.1)
    assert errors(moments, crosses, torch.tensor([[1.0, 1.0]]), scale_free=True).item() == pytest.approx(-0.2375)
    assert descend(moments, crosses, levels, start, scale_free=False).tolist() == [[1, 0]]
    assert descend(moments, crosses, levels, start, scale_free=True).tolist() == [[1, 1]]


@given(
    seed=st.integers(0, 10**6),
    num_levels=st.integers(2, 5),
    scale_free=st.booleans(),
    num_groups=st.sampled_from([1, 2]),
    num_columns=st.sampled_from([None, 1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_no_single_step_to_a_neighbouring_level_would_lower_the_error(
    seed: int, num_levels: int, scale_free: bool, num_groups: int, num_columns: int | None
) -> None:
    moments, crosses = problem(seed, num_inputs=6, num_rows=4, num_groups=num_groups)
    levels = torch.linspace(-1, 1, num_levels)[:, None]
    start = torch.randint(num_levels, (4, 6), generator=torch.Generator().manual_seed(seed))
    found = descend(moments, crosses, levels, start, scale_free=scale_free, num_columns=num_columns, max_passes=100)

    def error(numbers: Tensor) -> Tensor:
        return errors(moments, crosses, levels[:, 0][numbers], scale_free=scale_free)

    least = error(found)
    assert (least <= error(start) + 1e-6).all()
    for column, direction in itertools.product(range(6), (-1, 1)):
        moved = found.clone()
        moved[:, column] = (moved[:, column] + direction).clamp(0, num_levels - 1)
        assert (error(moved) >= least - 1e-4 * (1 + least.abs())).all()


def test_it_comes_near_the_best_of_all_choices_where_rounding_is_far() -> None:
    gaps = []
    for seed in range(10):
        moments, crosses = problem(seed, num_inputs=8, num_rows=1)
        rows = torch.linalg.solve(moments[0], crosses.t()).t()
        levels = torch.tensor([[-1.0], [1.0]])
        start = (rows >= 0).long()
        every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
        best = errors(moments, crosses.expand(len(every), -1), every, scale_free=True).min().item()
        rounded = errors(moments, crosses, levels[:, 0][start], scale_free=True).item()
        found = descend(moments, crosses, levels, start, scale_free=True)
        reached = errors(moments, crosses, levels[:, 0][found], scale_free=True).item()
        assert best - 1e-4 <= reached <= rounded + 1e-6
        gaps.append((reached - best, rounded - best))
    assert sum(reached for reached, _ in gaps) < 0.3 * sum(rounded for _, rounded in gaps)


def test_rows_of_a_group_use_its_moments_and_their_own_levels() -> None:
    moments, crosses = problem(3, num_inputs=5, num_rows=4, num_groups=2)
    levels = torch.tensor([[-1.0, -2.0, -0.5, -1.0], [1.0, 2.0, 0.5, 1.0]])
    start = torch.zeros(4, 5, dtype=torch.int64)
    together = descend(moments, crosses, levels, start, scale_free=False)
    for row in range(4):
        alone = descend(
            moments[row // 2 : row // 2 + 1], crosses[[row]], levels[:, [row]], start[[row]], scale_free=False
        )
        assert together[[row]].equal(alone)


@given(
    seed=st.integers(0, 10**6), num_columns=st.integers(1, 12), max_passes=st.integers(1, 3), scale_free=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_every_pass_over_blocks_lowers_the_error_or_leaves_it(
    seed: int, num_columns: int, max_passes: int, scale_free: bool
) -> None:
    moments, crosses = problem(seed, num_inputs=12, num_rows=4, num_groups=2)
    levels = torch.tensor([[-1.0], [0.0], [1.0]])
    numbers = torch.randint(3, (4, 12), generator=torch.Generator().manual_seed(seed))
    least = errors(moments, crosses, levels[:, 0][numbers], scale_free=scale_free)
    for passes in range(1, max_passes + 1):
        found = descend(
            moments, crosses, levels, numbers, scale_free=scale_free, num_columns=num_columns, max_passes=passes
        )
        reached = errors(moments, crosses, levels[:, 0][found], scale_free=scale_free)
        assert (reached <= least + 1e-4 * (1 + least.abs())).all()
        least = reached


def test_a_scale_by_hand() -> None:
    # One input of mean square 1 and one of 4, independent; wanted is 3 x: from levels -1 and 1 the weights stay, and s = 3.
    moments, crosses = torch.diag(torch.tensor([1.0, 4.0]))[None], torch.tensor([[3.0, 12.0]])
    levels, start = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1, 1]])
    numbers, factor = descend_with_scale(moments, crosses, levels, start, per_row=False)
    assert numbers.tolist() == [[1, 1]]
    assert factor.item() == pytest.approx(3.0)
    # Two rows, (1, 1) and (-3, 3): for both s = (5 + 15) / 10 = 2; each for itself 1 and 3.
    moments, crosses = moments, torch.tensor([[1.0, 4.0], [-3.0, 12.0]])
    start = torch.tensor([[1, 1], [0, 1]])
    assert descend_with_scale(moments, crosses, levels, start, per_row=False)[1].item() == pytest.approx(2.0)
    numbers, factors = descend_with_scale(moments, crosses, levels, start, per_row=True)
    assert numbers.tolist() == start.tolist()
    assert factors.tolist() == pytest.approx([1.0, 3.0])


@given(seed=st.integers(0, 10**6), num_levels=st.integers(2, 5), per_row=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_fitted_scale_never_makes_it_worse(seed: int, num_levels: int, per_row: bool) -> None:
    moments, crosses = problem(seed, num_inputs=6, num_rows=4)
    levels = torch.linspace(-1, 1, num_levels)[:, None]
    start = torch.randint(num_levels, (4, 6), generator=torch.Generator().manual_seed(seed))

    def error(of_levels: Tensor, numbers: Tensor) -> float:
        weights = of_levels.expand(-1, 4).t().gather(1, numbers)
        return errors(moments, crosses, weights, scale_free=False).sum().item()

    numbers, factor = descend_with_scale(moments, crosses, levels, start, per_row=per_row)
    assert (factor > 0).all()
    plain = error(levels, start)
    assert error(levels * factor, numbers) <= plain + 1e-4 * (1 + abs(plain))
