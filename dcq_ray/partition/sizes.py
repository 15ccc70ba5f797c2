"""Take sizes where they are used, so that none of them is alive at a cut.

`b, c, h, w = x.shape` at the top of a network and `x.view(b, -1)` at its end keep four numbers alive all the way, and where
more than one value is alive there is no cut. Two runs tell what such a number is: equal in both, a constant, since the images'
shape is fixed; in proportion to the batch, so many times its size. It is then taken from a tensor that its user has anyway.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

Runs = tuple[Mapping[Node, Any], Mapping[Node, Any]]


def size_locally(graph_module: GraphModule, runs: Runs) -> bool:
    """Take the numbers that come from shapes at their users, in place; whether there were any.

    Args:
        runs: every node's value on two batches of different sizes.
    """
    graph = graph_module.graph
    first, second = runs
    images = next(node for node in graph.nodes if node.op == "placeholder")
    sizes = (len(first[images]), len(second[images]))
    numbers: set[Node] = set()
    for node in graph.nodes:
        if _is_numbers(first[node]) and _is_numbers(second[node]) and _comes_from_shapes(node, numbers):
            numbers.add(node)
    unpacked = {node for node in graph.nodes if node.target is operator.getitem and _is_part(node, first)}
    if not numbers and not unpacked:
        return False
    nodes = list(graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    # Of what is no number: those uses stay.
    last_uses = {node: max((places[user] for user in node.users if user not in numbers), default=-1) for node in nodes}
    for place, user in enumerate(nodes):
        wanted = [node for node in user.all_input_nodes if node in numbers]
        if not wanted or user in numbers:
            continue
        # What it uses, else what is alive there anyway, the latest first.
        alive = (node for node in reversed(nodes[:place]) if last_uses[node] > place)
        sources = (_batch_in(node, runs, sizes) for node in itertools.chain(user.all_input_nodes, alive))
        source = next((source for source in sources if source is not None), None)
        replaced: dict[Node, Any] = {}
        for node in wanted:
            found = _expressed(first[node], second[node], sizes)
            if found is not None and (source is not None or not _needs_batch(found)):
                replaced[node] = _built(found, graph, user, source)
        if replaced:
            user.args = _mapped(user.args, replaced)
            user.kwargs = _mapped(user.kwargs, replaced)
    # Only numbers, and parts of tuples that were unpacked: what else is without use may still change something.
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in numbers or node in unpacked):
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return True


class _Times(int):
    """So many times the size of the batch."""


def _is_numbers(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_is_numbers(part) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _comes_from_shapes(node: Node, numbers: set[Node]) -> bool:
    # A number made of data may be the same in both runs, and another one in the next.
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.target is getattr and node.args[1] in ("shape", "ndim"):
        return True
    made = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
    return made and all(source in numbers for source in node.all_input_nodes)


def _is_part(node: Node, values: Mapping[Node, Any]) -> bool:
    whole = node.args[0]
    return isinstance(whole, Node) and isinstance(values.get(whole), tuple | list)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a user finds the size of the batch: this dimension of that tensor has so many entries per image."""

    node: Node
    dim: int
    per_image: int


def _batch_in(node: Node, runs: Runs, sizes: tuple[int, int]) -> _Source | None:
    one, other = runs[0].get(node), runs[1].get(node)
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim:
        for dim, pair in enumerate(zip(one.shape, other.shape, strict=True)):
            found = _expressed(*pair, sizes)
            if isinstance(found, _Times) and found:
                return _Source(node, dim, found)
    return None


def _expressed(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    """The same numbers as constants and multiples of the batch; None where they are neither."""
    if isinstance(one, tuple):
        if not isinstance(other, tuple) or len(one) != len(other):
            return None
        parts = [_expressed(*pair, sizes) for pair in zip(one, other, strict=True)]
        return None if None in parts else tuple(parts)
    if one == other:
        return one
    if isinstance(one, int) and one * sizes[1] == other * sizes[0] and one % sizes[0] == 0:
        return _Times(one // sizes[0])
    return None


def _needs_batch(value: Any) -> bool:
    return any(map(_needs_batch, value)) if isinstance(value, tuple) else isinstance(value, _Times)


def _built(value: Any, graph: Graph, user: Node, source: _Source | None) -> Any:
    if isinstance(value, tuple):
        return tuple(_built(part, graph, user, source) for part in value)
    if not isinstance(value, _Times):
        return value
    assert source is not None
    with graph.inserting_before(user):
        made = [graph.call_method("size", (source.node, source.dim))]
        if source.per_image > 1:
            made.append(graph.call_function(operator.floordiv, (made[-1], int(source.per_image))))
        if value > 1:
            made.append(graph.call_function(operator.mul, (made[-1], int(value))))
    for node in made:
        # They belong to the modules that their user belongs to.
        node.meta = {key: entry for key, entry in user.meta.items() if key == "nn_module_stack"}
    return made[-1]


def _mapped(value: Any, replaced: Mapping[Node, Any]) -> Any:
    """Arguments with nodes replaced by nodes, numbers or tuples of them."""
    if isinstance(value, Node):
        return replaced.get(value, value)
    if isinstance(value, tuple):
        return tuple(_mapped(part, replaced) for part in value)
    if isinstance(value, list):
        return [_mapped(part, replaced) for part in value]
    if isinstance(value, dict):
        return {key: _mapped(part, replaced) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, replaced) for part in (value.start, value.stop, value.step)))
    return value
