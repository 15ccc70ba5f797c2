"""Find where a traced teacher may be cut.

A cut after a node is legal where the node's result is the only value that later nodes need, a floating-point tensor whose
first dimension is the batch, and where no parameter or buffer is used on both sides (a tied or twice-used one must stay in
one section). Residual networks thus cut at their joins by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dcq_ray.partition.graphs import LAYER_KEY, LAYER_TYPES, data_flow_graph, functional_weight, told


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPoint:
    """A legal interior cut: after the node at `node_index` of the graph."""

    name: str
    """The outermost module that ends here, or the node's own name where none does."""
    aliases: tuple[str, ...]
    """All names under which it may be asked for."""
    shape: tuple[int, ...]
    node_index: int
    multiply_accumulates_before: int

    @property
    def num_elements(self) -> int:
        """Per sample."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTeacher:
    """A teacher's graph, its legal cuts in order, and for every other place the reason why it is none."""

    graph_module: GraphModule
    cut_points: tuple[CutPoint, ...]
    illegal: dict[str, tuple[int, str]]
    """Name -> (node index, reason)."""
    weighted_nodes: tuple[int, ...]
    """Indices of the nodes that run a Conv or Linear layer."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    total_multiply_accumulates: int
    layer_multiply_accumulates: dict[str, int]
    """Per sample, of every Conv and Linear layer by its name."""


def trace_teacher(module: nn.Module, example: Tensor) -> TracedTeacher:
    """Trace a module in eval mode on an example batch [N, ...], N >= 1, and find its legal cuts.

    Raises:
        PartitionError: it cannot be traced or run, does not map one tensor to one tensor [N, K], or its graph depends on
            the size of the batch.
    """
    graph_module, values = data_flow_graph(module, example)
    nodes = list(graph_module.graph.nodes)
    output = values[nodes[-1]]
    works = [_work(node, graph_module, values, len(example)) for node in nodes]
    macs = [total for total, _ in works]
    layer_macs: dict[str, int] = {}
    for _, layers in works:
        for name, count in layers.items():
            layer_macs[name] = layer_macs.get(name, 0) + count
    spans = _tensor_spans(graph_module, nodes)
    points, illegal = [], {}
    for index, node in enumerate(nodes[:-1]):
        if node.op in ("placeholder", "get_attr"):
            continue
        names = _names(nodes, index)
        reason = _why_illegal(nodes, index, values, spans, len(example))
        if reason is None:
            points.append(
                CutPoint(
                    name=names[0],
                    aliases=names,
                    shape=tuple(values[node].shape[1:]),
                    node_index=index,
                    multiply_accumulates_before=sum(macs[: index + 1]),
                )
            )
        else:
            for name in names:
                illegal[name] = (index, reason)
    return TracedTeacher(
        graph_module=graph_module,
        cut_points=tuple(points),
        illegal=illegal,
        weighted_nodes=tuple(index for index, count in enumerate(macs) if count),
        input_shape=tuple(example.shape[1:]),
        output_shape=tuple(output.shape[1:]),
        total_multiply_accumulates=sum(macs),
        layer_multiply_accumulates=layer_macs,
    )


def _tensor_spans(graph_module: GraphModule, nodes: list[Node]) -> list[tuple[str, int, int]]:
    """For every parameter and buffer (name, first use, last use), tied names counted as one tensor."""
    modules = dict(graph_module.named_modules())
    places = {node: index for index, node in enumerate(nodes)}
    spans: dict[tuple[int, int], tuple[str, int, int]] = {}
    for index, node in enumerate(nodes):
        # A get_attr may stand far before its use.
        uses = [places[user] for user in node.users] if node.op == "get_attr" else [index]
        if not uses:
            continue
        for name, tensor in _used_tensors(node, graph_module, modules):
            key = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0)
            known, first, last = spans.get(key, (name, uses[0], uses[0]))
            spans[key] = (known, min(first, *uses), max(last, *uses))
    return list(spans.values())


def _used_tensors(node: Node, graph_module: GraphModule, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    if node.op == "call_module":
        module = modules[str(node.target)]
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"{node.target}.{name}", tensor
    elif node.op == "get_attr":
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            yield str(node.target), value


def _why_illegal(
    nodes: list[Node], index: int, values: dict[Node, Any], spans: list[tuple[str, int, int]], batch_size: int
) -> str | None:
    later = set(nodes[index + 1 :])
    live = [node for node in nodes[: index + 1] if node.op != "get_attr" and any(user in later for user in node.users)]
    if live != [nodes[index]]:
        if not live:
            return "nothing that comes later uses it"
        names = " and ".join(str(node.target if node.op == "call_module" else node.name) for node in live[:3])
        return f"{len(live)} values are live there: {names}" if len(live) > 1 else f"the live value there is {names}"
    value = values[nodes[index]]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return f"its value is {told(value)}, not a floating-point tensor"
    if value.ndim == 0 or len(value) != batch_size:
        return f"its first dimension is not the batch: shape {tuple(value.shape)}"
    for name, first, last in spans:
        if first <= index < last:
            return f"{name} is used on both sides of it"
    if all(node.op == "output" for node in nodes[index].users):
        return "it is the network's output"
    return None


def _names(nodes: list[Node], index: int) -> tuple[str, ...]:
    """Names of the place after a node: the modules that end there, outermost first, else the node's own name."""
    node = nodes[index]
    following = _stack(nodes[index + 1])
    ending = [path for path in _stack(node) if path and path not in following]
    if node.op == "call_module" and str(node.target) not in ending:
        ending.append(str(node.target))
    # A module that is called again ends at its last call only; the earlier calls go by their node's name.
    recurring = {
        path for later in nodes[index + 1 :] for path in (*_stack(later), str(later.target)) if later.op != "output"
    }
    names = [path for path in ending if path not in recurring]
    return (*names, node.name) if node.name not in names else tuple(names)


def _stack(node: Node) -> tuple[str, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    paths = (entry[0] if isinstance(entry, tuple) else str(key) for key, entry in stack.items())
    # torch.export marks what belongs to no module so.
    return tuple(path for path in paths if not path.startswith("_empty_nn_module_stack"))


def _work(
    node: Node, graph_module: GraphModule, values: dict[Node, Any], batch_size: int
) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates per sample of a node, and of them those of each Conv or Linear layer in it.

    Counted are Conv and Linear, as modules or functional calls, and the four projections of attention.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            query = values[node.all_input_nodes[0]]
            one = query.numel() // batch_size * module.embed_dim
            return 4 * one, {f"{node.target}.out_proj": one}
        if isinstance(module, LAYER_TYPES):
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            count = _products(module.weight, values[node], values[node.all_input_nodes[0]], transposed)
            return count, {str(node.target): count}
    source = functional_weight(node)
    weight = None if source is None else values.get(source)
    if isinstance(weight, Tensor):
        transposed = "transpose" in getattr(node.target, "__name__", "")
        count = _products(weight, values[node], values[node.all_input_nodes[0]], transposed)
        return count, {str(node.meta[LAYER_KEY]): count} if LAYER_KEY in node.meta else {}
    return 0, {}


def _products(weight: Tensor, output: Tensor, source: Tensor, transposed: bool) -> int:
    # Every output of a convolution sums over one filter; every input of a transposed one is spread by one.
    return int((source if transposed else output)[0].numel() * weight[0].numel())
