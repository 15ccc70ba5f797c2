"""Choose cuts: so many balanced sections, every layer or block, or those that the user names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dcq_ray.errors import PartitionError
from dcq_ray.partition.costs import CutCosts
from dcq_ray.partition.exported import module_stack
from dcq_ray.partition.sections import ordered_cuts
from dcq_ray.partition.trace import TracedTeacher
from dcq_ray.spec import SectionsSpec


def choose_cuts(traced: TracedTeacher, spec: SectionsSpec, costs: CutCosts) -> tuple[str, ...]:
    """The names of the cuts that a job asks for, in order.

    A number of sections is balanced by analytic work, not by measured seconds: those vary from run to run, and cuts decide what
    the student is.

    Raises:
        PartitionError: more sections than the teacher can be cut into; an illegal or unknown name; no blocks.
    """
    if spec.cuts is not None:
        return tuple(point.name for point in ordered_cuts(traced, spec.cuts))
    if spec.every == "layer":
        return costs.candidates
    if spec.every == "block":
        return block_cuts(traced)
    count = spec.count or 1
    if count > len(costs.candidates) + 1:
        raise PartitionError(
            f"sections.count: got {count}, but the teacher can be cut into at most {len(costs.candidates) + 1} sections with a "
            "Conv or Linear layer each"
        )
    return tuple(costs.candidates[piece] for piece in balanced_cuts(costs.work, count))


def block_cuts(traced: TracedTeacher) -> tuple[str, ...]:
    """A cut after every block: an innermost module with two or more Conv or Linear layers that ends at a legal cut.

    Layers before a block join it, layers after the last one make a section of their own.
    """
    nodes = list(traced.graph_module.graph.nodes)
    blocks: dict[str, list[int]] = {}
    for index in traced.weighted_nodes:
        for _, path in module_stack(nodes[index]):
            if path != str(nodes[index].target):
                blocks.setdefault(path, []).append(index)
    ends = {alias: point for point in traced.cut_points for alias in point.aliases}
    whole = [path for path, indices in blocks.items() if len(indices) > 1 and path in ends]
    innermost = [path for path in whole if not any(other.startswith(f"{path}.") for other in whole)]
    cuts = dict.fromkeys(ends[path].name for path in innermost if ends[path].node_index < traced.weighted_nodes[-1])
    if not cuts:
        raise PartitionError(
            "sections.every: block finds no block in the teacher (a module with two or more Conv or Linear layers that ends "
            "where one tensor is live); use every: layer, count, or cuts"
        )
    return tuple(cuts)


def balanced_cuts(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """Cut pieces into `count` runs so that the costliest costs least, of equals as early as possible; the pieces before a cut.

    A dynamic program over prefixes.
    """
    num_pieces = len(costs)
    sums = [0.0, *itertools.accumulate(costs)]
    infinity = float("inf")
    # best[end]: (largest run, cuts) of the first `end` pieces in the number of runs so far.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(infinity, ())] * num_pieces]
    for run in range(1, count + 1):
        following: list[tuple[float, tuple[int, ...]]] = [(infinity, ())] * (num_pieces + 1)
        for end in range(run, num_pieces + 1):
            for start in range(run - 1, end):
                if best[start][0] == infinity:
                    continue
                cuts = (*best[start][1], start - 1) if start else ()
                candidate = (max(best[start][0], sums[end] - sums[start]), cuts)
                following[end] = min(following[end], candidate)
        best = following
    return best[num_pieces][1]
