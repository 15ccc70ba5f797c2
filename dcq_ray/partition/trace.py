"""Find where a traced teacher may be cut.

A cut after a node is legal where the node's result is the only value that later nodes need, a floating-point tensor whose
first dimension is the batch, and where no parameter or buffer is used on both sides (a tied or twice-used one must stay in
one section). Residual networks thus cut at their joins by themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dcq_ray.partition.exported import module_stack
from dcq_ray.partition.graphs import LAYER_KEY, TRACED_BATCH_SIZE, DataFlow, data_flow, functional_weight
from dcq_ray.partition.interface import LAYER_TYPES, told

# Of the values that are live at a place, so many are named.
MAX_NAMED = 3


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
    front_end: str
    """torch.fx or torch.export: what made the graph."""


def trace_teacher(module: nn.Module, example: Tensor) -> TracedTeacher:
    """Trace a module in eval mode on an example batch [N, ...], N >= 1, and find its legal cuts.

    Raises:
        PartitionError: it cannot be traced or run, does not map one tensor to one tensor [N, K], or its graph depends on
            the size of the batch.
    """
    flow = data_flow(module, example)
    graph_module, values = flow.graph_module, flow.values
    nodes = list(graph_module.graph.nodes)
    works = [_work(node, graph_module, values) for node in nodes]
    layer_macs: dict[str, int] = {}
    for _, layers in works:
        for name, count in layers.items():
            layer_macs[name] = layer_macs.get(name, 0) + count
    macs = [total for total, _ in works]
    macs_up_to = list(itertools.accumulate(macs))
    reasons = _why_illegal(flow, nodes)
    points, illegal = [], {}
    for index, names in _names(nodes).items():
        reason = reasons[index]
        if reason is None:
            points.append(
                CutPoint(
                    name=names[0],
                    aliases=names,
                    shape=tuple(values[nodes[index]].shape[1:]),
                    node_index=index,
                    multiply_accumulates_before=macs_up_to[index],
                )
            )
        else:
            illegal.update(dict.fromkeys(names, (index, reason)))
    return TracedTeacher(
        graph_module=graph_module,
        cut_points=tuple(points),
        illegal=illegal,
        weighted_nodes=tuple(index for index, count in enumerate(macs) if count),
        input_shape=tuple(example.shape[1:]),
        output_shape=tuple(values[nodes[-1]].shape[1:]),
        total_multiply_accumulates=sum(macs),
        layer_multiply_accumulates=layer_macs,
        front_end=flow.front_end,
    )


def _why_illegal(flow: DataFlow, nodes: list[Node]) -> list[str | None]:
    """For the place after every node why it is no legal cut, or None where it is one; one pass over the graph."""
    places = {node: index for index, node in enumerate(nodes)}
    last_uses = [max((places[user] for user in node.users), default=-1) for node in nodes]
    ending: dict[int, list[int]] = {}
    for index, last in enumerate(last_uses):
        ending.setdefault(last, []).append(index)
    starting_spans: dict[int, list[str]] = {}
    ending_spans: dict[int, list[str]] = {}
    for name, first, last in _tensor_spans(flow.graph_module, nodes, places):
        starting_spans.setdefault(first, []).append(name)
        ending_spans.setdefault(last, []).append(name)
    live: dict[int, None] = {}
    spanning: dict[str, None] = {}
    reasons = []
    for index, node in enumerate(nodes):
        for ended in ending.get(index, ()):
            live.pop(ended, None)
        if last_uses[index] > index and node.op != "get_attr":
            live[index] = None
        spanning.update(dict.fromkeys(starting_spans.get(index, ())))
        for name in ending_spans.get(index, ()):
            spanning.pop(name, None)
        first_live = [nodes[place] for place in itertools.islice(live, MAX_NAMED)]
        reasons.append(
            _live_reason(node, first_live, len(live))
            or _value_reason(node, flow)
            or (f"{next(iter(spanning))} is used on both sides of it" if spanning else None)
            or ("it is the network's output" if all(user.op == "output" for user in node.users) else None)
        )
    return reasons


def _live_reason(node: Node, first_live: list[Node], num_live: int) -> str | None:
    if first_live == [node] and num_live == 1:
        return None
    if not num_live:
        return "nothing that comes later uses it"
    names = " and ".join(str(node.target if node.op == "call_module" else node.name) for node in first_live)
    more = f" and {num_live - MAX_NAMED} more" if num_live > MAX_NAMED else ""
    return f"{num_live} values are live there: {names}{more}" if num_live > 1 else f"the live value there is {names}"


def _value_reason(node: Node, flow: DataFlow) -> str | None:
    value = flow.values[node]
    if not isinstance(value, Tensor):
        return f"its value is {told(value)}, not a tensor"
    if value.dtype != torch.float32:
        # A boundary gives float32 to the section behind it, whatever it was.
        return f"its value has type {value.dtype}, not torch.float32"
    if value.layout != torch.strided:
        return f"its value has layout {value.layout}, not torch.strided"
    if node not in flow.batched:
        return f"its first dimension is not the batch: shape {tuple(value.shape)} for {TRACED_BATCH_SIZE} images"
    if value.ndim == 1:
        return "its value is one number per image"
    return None


def _tensor_spans(graph_module: GraphModule, nodes: list[Node], places: dict[Node, int]) -> list[tuple[str, int, int]]:
    """For every parameter and buffer that several nodes use (name, first use, last use), tied names as one tensor."""
    modules = dict(graph_module.named_modules())
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
    return [span for span in spans.values() if span[1] < span[2]]


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


def _names(nodes: list[Node]) -> dict[int, tuple[str, ...]]:
    """Names of the place after every node that makes a value: the modules that end there, outermost first, and its own.

    A module that is called again ends at its last call only; the earlier calls go by their node's name.
    """
    last_seen: dict[str, int] = {}
    for index, node in enumerate(nodes):
        last_seen.update(dict.fromkeys(_paths(node), index))
    names: dict[int, tuple[str, ...]] = {}
    taken: set[str] = set()
    for index, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        ending = [path for path in _paths(node) if last_seen[path] == index and path not in taken]
        if node.op != "call_module" or str(node.target) not in ending:
            # The first call of a module that is called again has the module's own name.
            ending.append(node.name if node.name not in last_seen else f"{node.name}@0")
        names[index] = tuple(ending)
        taken.update(names[index])
    return names


def _paths(node: Node) -> tuple[str, ...]:
    """The modules in whose calls a node lies, outermost first."""
    paths = [path for _, path in module_stack(node)]
    if node.op == "call_module":
        paths.append(str(node.target))
    return tuple(dict.fromkeys(paths))


def _work(node: Node, graph_module: GraphModule, values: dict[Node, Any]) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates per sample of a node, and of them those of each Conv or Linear layer in it.

    Counted are Conv and Linear, as modules or functional calls, and the four projections of attention.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            query = values[node.all_input_nodes[0]]
            one = query.numel() // TRACED_BATCH_SIZE * module.embed_dim
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
