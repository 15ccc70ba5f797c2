"""torch.export's graph of a module, brought back to calls of the module's own layers and to any size of the batch.

torch.export traces what torch.fx cannot (control flow on shapes, code that looks at numbers), but gives operations on
parameters, in which BatchNorm is frozen and a layer's input cannot be seen. What a call of a layer did is one group of
operations, so that group becomes one call of the layer again, with the arguments that hooks saw.

It is given two batches of fixed sizes. What differs between the two graphs is what depends on the size: so `len(x)` and
`int(x.shape[0])` may be in a network, which torch.export refuses where it is told that sizes vary.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_map

IsLeaf = Callable[[nn.Module], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """How a module was called, in the one case that can be told from a graph: with one tensor, in whatever places."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """`_THE_TENSOR` stands where the tensor was."""
    outputs: tuple[tuple[int, ...] | None, ...] | None
    """The shapes of the parts that it gave; None where it gave one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What torch.export found, and what hooks saw meanwhile."""

    program: GraphModule
    other: GraphModule
    sizes: tuple[int, int]
    """Of the two batches."""
    calls: Mapping[str, list[_Call | None]]
    """By the path of a module; None where it took several tensors, or none."""


_THE_TENSOR = object()


def export_twice(module: nn.Module, batches: tuple[Tensor, Tensor]) -> Exported:
    """Export a module on two batches of unlike sizes, both above 1.

    Raises:
        Exception: whatever torch.export raises; ValueError where the graphs have not the same operations.
    """
    program, calls = _export(module, batches[0])
    other, _ = _export(module, batches[1])
    ours, theirs = (
        [(node.op, str(node.target), len(node.args)) for node in graph_module.graph.nodes]
        for graph_module in (program, other)
    )
    if ours != theirs:
        raise ValueError(
            f"its operations are others on a batch of {len(batches[0])} and on a batch of {len(batches[1])}"
        )
    return Exported(program=program, other=other, sizes=(len(batches[0]), len(batches[1])), calls=calls)


def exported_graph(module: nn.Module, exported: Exported, is_leaf: IsLeaf) -> GraphModule:
    """The graph of a module for any size of the batch, with the module's own parameters.

    Args:
        is_leaf: which modules become calls again, where they took one tensor and gave one; the outermost counts.

    Raises:
        ValueError: the graph depends on the size of the batch in another way than in proportion to it.
    """
    nodes, others = list(exported.program.graph.nodes), list(exported.other.graph.nodes)
    groups = _groups(exported, module, is_leaf)
    inside = {node for _, _, group in groups.values() for node in group}
    graph = Graph()
    values: dict[Node, Node] = {}
    images: Node | None = None
    for node, other in zip(nodes, others, strict=True):
        if node in groups:
            path, call, group = groups[node]
            values[node] = _called(graph, path, call, values[_input(group)], node)
        elif node.op == "placeholder":
            images = values[node] = graph.placeholder("x")
        elif node.op == "output":
            (result,) = node.args[0]
            graph.output(values[result])
        elif node not in inside and (node.users or _changes_something(node)):
            values[node] = graph.node_copy(node, values.__getitem__)
            if images is not None:
                _free(graph, values[node], (node, other), exported.sizes, images)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    parts = {target: _part(module, exported.program, target) for target in targets}
    return GraphModule(parts, graph, type(module).__name__)


def module_stack(node: Node) -> tuple[tuple[str, str], ...]:
    """The calls in which a node lies, outermost first: (key, path of the module); calls of one module have unlike keys."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = ((str(key), entry[0] if isinstance(entry, tuple) else str(key)) for key, entry in stack.items())
    # torch.export marks what belongs to no module so; the whole network has no name.
    return tuple((key, path) for key, path in entries if path and not path.startswith("_empty_nn_module_stack"))


def _export(module: nn.Module, batch: Tensor) -> tuple[GraphModule, dict[str, list[_Call | None]]]:
    with _quiet(), _recorded(module) as calls:
        flat = torch.export.export(module, (batch,)).module()
    assert isinstance(flat, GraphModule)
    return flat, calls


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch.export prints and logs on its way to an error."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch._export", "torch.fx")]
    before = [logger.disabled for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


@contextlib.contextmanager
def _recorded(module: nn.Module) -> Iterator[dict[str, list[_Call | None]]]:
    """Watch how the modules inside are called."""
    calls: dict[str, list[_Call | None]] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            call = None
            gives = isinstance(output, Tensor | tuple | list)
            if gives and tensors and all(tensor is tensors[0] for tensor in tensors):
                call = _Call(
                    arguments=tree_map(lambda leaf: _THE_TENSOR if isinstance(leaf, Tensor) else leaf, (args, kwargs)),
                    outputs=None if isinstance(output, Tensor) else tuple(map(_shape, output)),
                )
            calls.setdefault(path, []).append(call)

        return hook

    handles = [
        part.register_forward_hook(watch(path), with_kwargs=True) for path, part in module.named_modules() if path
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _groups(exported: Exported, module: nn.Module, is_leaf: IsLeaf) -> dict[Node, tuple[str, _Call, list[Node]]]:
    """For every call of a leaf that can be made again, by the node of its result: path, call, and its operations."""
    leaves = {path for path, part in module.named_modules() if path and is_leaf(part)}
    members: dict[str, list[Node]] = {}
    keys: dict[str, list[str]] = {}
    for node in exported.program.graph.nodes:
        key, path = next((entry for entry in module_stack(node) if entry[1] in leaves), ("", ""))
        if key and key not in members:
            keys.setdefault(path, []).append(key)
        if key:
            members.setdefault(key, []).append(node)
    found = {}
    for path, in_order in keys.items():
        # torch.export may run the module more than once; the last time counts.
        seen = exported.calls.get(path, [])
        if len(seen) % len(in_order):
            continue
        for key, call in zip(in_order, seen[-len(in_order) :], strict=True):
            group = members[key]
            inside = set(group)
            outputs = [node for node in group if any(user not in inside for user in node.users)]
            if call is not None and len(outputs) == 1 and _inputs(group) == [_input(group)]:
                found[outputs[0]] = (path, call, group)
    return found


def _inputs(group: list[Node]) -> list[Node | None]:
    """The values, parameters aside, that a group takes from outside."""
    inside = set(group)
    taken = dict.fromkeys(node for member in group for node in member.all_input_nodes if node not in inside)
    return [node for node in taken if node.op != "get_attr"]


def _input(group: list[Node]) -> Node:
    found = _inputs(group)
    assert found[0] is not None
    return found[0]


def _called(graph: Graph, path: str, call: _Call, source: Node, replaced: Node) -> Node:
    args, kwargs = tree_map(lambda leaf: source if leaf is _THE_TENSOR else leaf, call.arguments)
    made = graph.call_module(path, args, kwargs)
    made.meta = dict(replaced.meta)
    if call.outputs is not None:
        # Of several results, the one that the graph goes on with; equality with the network is checked afterwards.
        place = call.outputs.index(_shape(replaced.meta["val"]))
        made = graph.call_function(operator.getitem, (made, place))
        made.meta = dict(replaced.meta)
    return made


def _free(graph: Graph, made: Node, pair: tuple[Node, Node], sizes: tuple[int, int], images: Node) -> None:
    """Replace the numbers in a node's arguments that go with the size of the batch."""

    def free(one: Any, other: Any) -> Any:
        if isinstance(one, tuple | list):
            if len(one) != len(other):
                raise ValueError(
                    f"{pair[0].name} takes {len(one)} numbers on one size of the batch, {len(other)} on another"
                )
            return type(one)(free(*both) for both in zip(one, other, strict=True))
        if isinstance(one, Node | Tensor) or one == other:
            return one
        if isinstance(one, int) and one * sizes[1] == other * sizes[0] and one % sizes[0] == 0:
            with graph.inserting_before(made):
                size = graph.call_method("size", (images, 0))
                return graph.call_function(operator.mul, (size, one // sizes[0]))
        raise ValueError(f"{pair[0].name} takes {one} on a batch of {sizes[0]}, {other} on a batch of {sizes[1]}")

    ours, theirs = pair
    # The new node has the same arguments, with its own nodes: numbers are where they were.
    made.args = _merged(made.args, free(ours.args, theirs.args))
    made.kwargs = {
        name: _merged(made.kwargs[name], free(value, theirs.kwargs[name])) for name, value in ours.kwargs.items()
    }


def _merged(own: Any, freed: Any) -> Any:
    if isinstance(own, tuple | list):
        return type(own)(_merged(*both) for both in zip(own, freed, strict=True))
    return own if isinstance(own, Node) else freed


def _part(module: nn.Module, flat: GraphModule, target: str) -> Any:
    """What a target stands for: the module's own part, or a constant that torch.export made."""
    for root in (module, flat):
        value: Any = root
        for name in target.split("."):
            value = getattr(value, name, None)
        if value is not None:
            return value
    raise AttributeError(target)


def _changes_something(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
