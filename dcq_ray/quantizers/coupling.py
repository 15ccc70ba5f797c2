"""Coupling: the levels of a layer's rows chosen together, by what their errors do to the network and not each row alone.

Row i of a layer errs by e_i = s_i w_i'x - y_i. What that costs the network is, to second order and with inputs and gradients
taken as independent, the sum over i and j of M_ij E[e_i e_j], where M = E[g g'] for the gradients g of the network's loss at
the layer's outputs (Martens & Grosse 2015, arXiv 1503.05671, eq. 1). With the other rows as they are, it is least in row i
where the plain error is, of the outputs

    y_i - sum over j != i of (M_ij / M_ii) e_j

so every row in turn takes up what the others spoil in the directions that the network looks at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcq_ray.quantizers.descent import descend

# The first brings nearly all.
MAX_SWEEPS = 3
# Rows that hardly reach the network's outputs, by the share of the mean, are left: what they would take up is without bound.
_LEAST_SHARE = 1e-6


def couple(
    moments: Tensor, crosses: Tensor, levels: Tensor, numbers: Tensor, metric: Tensor, *, scale_free: bool
) -> Tensor:
    """The numbers of levels [R, N] to which moves of single weights lead from `numbers`, a row after the other.

    Rows of one group are coupled; those of different groups have other inputs, and count as if they were independent.

    Args:
        moments, crosses, levels, scale_free: as of `descend`.
        metric: M, [R, R], symmetric and positive semidefinite; its size means nothing.
    """
    num_rows = len(crosses)
    size = num_rows // len(moments)
    metric = metric.to(crosses)
    least = _LEAST_SHARE * metric.diagonal().mean()
    levels = levels.to(crosses.dtype).expand(-1, num_rows)
    numbers, lacks = numbers.clone(), torch.empty_like(crosses)

    def settle(row: int, wanted: Tensor) -> None:
        """Note E[e x] of a row; a free scale is the best for the wanted outputs."""
        weights = levels[:, row][numbers[row]]
        product = moments[row // size] @ weights
        scale = (wanted @ weights / (product @ weights).clamp_min(1e-30)).clamp_min(0) if scale_free else 1
        lacks[row] = scale * product - crosses[row]

    for row in range(num_rows):
        settle(row, crosses[row])
    for _ in range(MAX_SWEEPS):
        moved = False
        for row in range(num_rows):
            if not bool(metric[row, row] > least):
                continue
            first = row // size * size
            group = slice(first, first + size)
            shares = metric[row, group] / metric[row, row]
            wanted = crosses[row] - (shares @ lacks[group] - lacks[row])
            found = descend(
                moments[row // size : row // size + 1],
                wanted[None],
                levels[:, row : row + 1],
                numbers[row : row + 1],
                scale_free=scale_free,
            )[0]
            moved |= not found.equal(numbers[row])
            numbers[row] = found
            settle(row, wanted)
        if not moved:
            break
    return numbers
