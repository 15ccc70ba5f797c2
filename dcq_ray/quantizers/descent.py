"""Discrete least squares: the levels of a layer's weights that give the outputs which are wanted, one weight at a time.

For a row w of weights, inputs x and wanted outputs y, with H = E[x x'] and r = E[x y], the mean squared error of s w'x is
s^2 w'Hw - 2 s r'w + E[y^2]. Rounding every weight to its nearest level looks at none of this. Here that weight of a row moves
to a neighbouring level by which the row gains most, again and again, as long as that lowers

    the error at s = 1                              w'Hw - 2 r'w
    or, where a BatchNorm follows that undoes       -(r'w)^2 / w'Hw,   the least error over all s
    any scale s

What one weight's rounding costs is so made good by the others. The problem is that of Nagel et al. 2020 (arXiv 2004.10568,
eq. 13) and Frantar & Alistarh 2022 (arXiv 2208.11580, eq. 1), with the inputs that the quantized network has on one side and
the full-precision outputs on the other; the scale-free form is the squared correlation.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A move must gain this share of what there is: rounding errors would let two levels be tried in turn for ever.
_LEAST_GAIN = 1e-6
# Every move looks at all rows and columns of a block, so a large layer is done in blocks of columns of about so many weights,
_BLOCK_WEIGHTS = 2**18
_LEAST_COLUMNS = 64
# again and again, because a block's moves change what is best in the blocks before. The first passes bring nearly all.
_MAX_PASSES = 4
# Of weights for a scale and of a scale for the weights in turn.
_MAX_SCALE_ROUNDS = 8
_SCALE_IS_SETTLED = 1e-3
# So many times larger or smaller a scale becomes at most: outputs that inputs hardly explain have none.
_MAX_FACTOR = 16.0


def descend(
    moments: Tensor,
    crosses: Tensor,
    levels: Tensor,
    numbers: Tensor,
    *,
    scale_free: bool,
    num_columns: int | None = None,
    max_passes: int = _MAX_PASSES,
) -> Tensor:
    """The numbers of levels [R, N] that moves of single weights to neighbouring levels lead to; `numbers` is the start.

    Where one block holds all columns, no single move is left that lowers the error. With several, the weights of a block move
    while the others stay, one block after the other, until a pass over all of them moves nothing or `max_passes` are done.

    Args:
        moments: E[x x'] of each group of inputs, [G, N, N], symmetric; the R / G rows of a group follow each other.
        crosses: E[x y] of each row, [R, N].
        levels: ascending, [K, 1 or R].
        scale_free: whether a row's scale is free.
        num_columns: of a block; None: as many as make 262,144 weights, at least 64.
    """
    num_rows, num_inputs = crosses.shape
    num_columns = num_columns or max(_LEAST_COLUMNS, _BLOCK_WEIGHTS // num_rows)
    levels = levels.to(crosses.dtype).expand(-1, num_rows).t().contiguous()
    numbers = numbers.clone()
    for _ in range(max_passes):
        weights = levels.gather(1, numbers)
        products = _grouped_product(moments, weights)
        linear, quadratic = (crosses * weights).sum(1), (products * weights).sum(1)
        moved = False
        for first in range(0, num_inputs, num_columns):
            block = slice(first, first + num_columns)
            numbers[:, block], linear, quadratic = _descend_block(
                moments[:, block, block],
                crosses[:, block],
                products[:, block],
                linear,
                quadratic,
                levels,
                numbers[:, block],
                scale_free=scale_free,
            )
            steps = levels.gather(1, numbers[:, block]) - weights[:, block]
            if not bool(steps.any()):
                continue
            moved = True
            later = slice(first + num_columns, num_inputs)
            products[:, later] += _grouped_product(moments[:, block, later], steps)
        if not moved or num_columns >= num_inputs:
            break
    return numbers


def descend_with_scale(
    moments: Tensor, crosses: Tensor, levels: Tensor, numbers: Tensor, *, per_row: bool
) -> tuple[Tensor, Tensor]:
    """As `descend` at s = 1, the levels multiplied by a factor that is fitted with the weights, in turn.

    Where nothing undoes a scale, the one that is best for the weights is too small for the outputs, or too large: rounding
    errors that cancel each other leave less of the outputs than of the weights.

    Returns: the numbers of levels [R, N], and the factor above 0: [], or with `per_row` [R].
    """
    # From the factor 1 no round makes it worse; from the one that fits the weights as they came it is often better still.
    firsts = (
        levels.new_ones(len(crosses) if per_row else ()),
        _least_squares_factor(moments, crosses, levels, numbers, per_row),
    )
    ends = [_descend_in_turn(moments, crosses, levels, numbers, first, per_row) for first in firsts]
    return min(ends, key=lambda end: float(_scaled_errors(moments, crosses, levels, *end).sum()))


def _descend_in_turn(
    moments: Tensor, crosses: Tensor, levels: Tensor, numbers: Tensor, factor: Tensor, per_row: bool
) -> tuple[Tensor, Tensor]:
    for _ in range(_MAX_SCALE_ROUNDS):
        numbers = descend(moments, crosses, levels * factor, numbers, scale_free=False)
        found = _least_squares_factor(moments, crosses, levels, numbers, per_row)
        settled = bool(((found / factor - 1).abs() < _SCALE_IS_SETTLED).all())
        factor = found
        if settled:
            break
    return numbers, factor


def _scaled_errors(moments: Tensor, crosses: Tensor, levels: Tensor, numbers: Tensor, factor: Tensor) -> Tensor:
    weights = (levels * factor).to(crosses.dtype).expand(-1, len(crosses)).t().gather(1, numbers)
    return errors(moments, crosses, weights, scale_free=False)


def _least_squares_factor(moments: Tensor, crosses: Tensor, levels: Tensor, numbers: Tensor, per_row: bool) -> Tensor:
    """The s that lowers s^2 w'Hw - 2 s r'w most, of every row or of all; 1 where the weights point the wrong way."""
    weights = levels.to(crosses.dtype).expand(-1, len(crosses)).t().gather(1, numbers)
    linear = (crosses * weights).sum(1)
    quadratic = (_grouped_product(moments, weights) * weights).sum(1)
    if not per_row:
        linear, quadratic = linear.sum(), quadratic.sum()
    right = (linear > 0) & (quadratic > 0)
    factor = torch.where(right, linear / torch.where(right, quadratic, 1), 1)
    return factor.clamp(1 / _MAX_FACTOR, _MAX_FACTOR)


def _descend_block(
    moments: Tensor,
    crosses: Tensor,
    products: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    levels: Tensor,
    numbers: Tensor,
    *,
    scale_free: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the weights of some columns, while the others stay: the new numbers, r'w and w'Hw of every row.

    Args:
        products: H w of these columns, all columns' weights counted, [R, M].
        linear: r'w of every row, [R].
        quadratic: w'Hw of every row, [R].
        levels: [R, K].
    """
    num_rows, num_levels = levels.shape
    numbers, linears, quadratics = numbers.clone(), linear.clone(), quadratic.clone()
    weights = levels.gather(1, numbers)
    # Of the rows that still move.
    rows = torch.arange(num_rows, device=crosses.device)
    group = rows // (num_rows // len(moments))
    own = moments.diagonal(dim1=1, dim2=2)
    directions = (-1, 1) if num_levels > 2 else (None,)
    for _ in range(2 * numbers.shape[1] * (num_levels - 1)):
        current = _error(linear, quadratic, scale_free)
        least, column, moved = current, torch.zeros_like(rows), numbers[rows, 0]
        for direction in directions:
            to = _neighbours(numbers[rows], direction, num_levels)
            step = levels[rows].gather(1, to) - weights[rows]
            error = _error(
                linear[:, None] + step * crosses[rows],
                quadratic[:, None] + step * (2 * products + step * own[group]),
                scale_free,
            )
            found, at = error.min(1)
            better = found < least
            least, column = torch.where(better, found, least), torch.where(better, at, column)
            moved = torch.where(better, to.gather(1, at[:, None])[:, 0], moved)
        gains = least < current - _LEAST_GAIN * current.abs()
        if not bool(gains.any()):
            break
        rows, group, column, moved = rows[gains], group[gains], column[gains], moved[gains]
        linear, quadratic, products = linear[gains], quadratic[gains], products[gains]
        step = levels[rows, moved] - weights[rows, column]
        numbers[rows, column] = moved
        weights[rows, column] += step
        linear = linear + step * crosses[rows, column]
        quadratic = quadratic + step * (2 * products.gather(1, column[:, None])[:, 0] + step * own[group, column])
        products = products + step[:, None] * moments[group, column]
        linears[rows], quadratics[rows] = linear, quadratic
    return numbers, linears, quadratics


def errors(moments: Tensor, crosses: Tensor, weights: Tensor, *, scale_free: bool) -> Tensor:
    """What `descend` lowers, of every row [R]; 0 is what a row of zeros has."""
    weights = weights.to(crosses.dtype)
    products = _grouped_product(moments, weights)
    return _error((crosses * weights).sum(1), (products * weights).sum(1), scale_free)


def _neighbours(numbers: Tensor, direction: int | None, num_levels: int) -> Tensor:
    """The numbers of the next levels; of two levels (no direction) the other one. At an end a number stays."""
    return 1 - numbers if direction is None else (numbers + direction).clamp(0, num_levels - 1)


def _grouped_product(moments: Tensor, weights: Tensor) -> Tensor:
    """Every row [R, N] times the moments [G, N, M] of its group; [R, M]."""
    return (weights.reshape(len(moments), -1, weights.shape[1]) @ moments).flatten(0, 1)


def _error(linear: Tensor, quadratic: Tensor, scale_free: bool) -> Tensor:
    if not scale_free:
        return quadratic - 2 * linear
    # A row that points the wrong way is the worse the more it does; one without output has nothing to scale.
    runs = quadratic > 0
    return torch.where(runs, -linear * linear.abs() / torch.where(runs, quadratic, 1), 0)
