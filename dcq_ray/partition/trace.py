"""Trace a teacher into its data-flow graph, and find where it may be cut.

A cut after a node is legal where the node's result is the only value that later nodes need, a floating-point tensor whose
first dimension is the batch, and where no parameter or buffer is used on both sides (a tied or twice-used one must stay in
one section). Residual networks thus cut at their joins by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from dcq_ray.errors import PartitionError

LAYER_TYPES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


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


def trace_teacher(module: nn.Module, example: Tensor) -> TracedTeacher:
    """Trace a module in eval mode with torch.fx, on an example batch [N, ...], N >= 1.

    Raises:
        PartitionError: it cannot be traced or run, does not map one tensor to one tensor [N, K], or its graph depends on
            the size of the batch.
    """
    graph_module = _trace(module, example)
    values = _run(graph_module, example)
    nodes = list(graph_module.graph.nodes)
    output = values[nodes[-1]]
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(example)):
        raise PartitionError(
            f"the teacher returns {_told(output)}, expected one tensor of logits [batch, classes]; wrap it in a module that "
            "returns its logits"
        )
    _check_batch_freedom(module, graph_module, example)
    macs = [_multiply_accumulates(node, graph_module, values) for node in nodes]
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
    )


def _trace(module: nn.Module, example: Tensor) -> GraphModule:
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(module)
        graph_module = GraphModule(tracer.root, graph, type(module).__name__)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PartitionError(
            f"the teacher {type(module).__name__} cannot be traced: {reason}; control flow that depends on the data, or code "
            "that is not made of tensor operations, has no fixed graph to cut: move it out of the network's forward"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder" and not node.args]
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise PartitionError(f"the teacher takes {len(inputs)} inputs ({names}), expected one batch of images")
    return graph_module


def _run(graph_module: GraphModule, example: Tensor) -> dict[Node, Any]:
    """Every node's value on the example; tensors as meta tensors, so that nothing large is kept."""
    values: dict[Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            values[node] = value.detach().to("meta") if isinstance(value, Tensor) else value
            return value

    try:
        with torch.no_grad():
            Recorder(graph_module).run(example.clone())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PartitionError(
            f"the teacher does not run on images of shape {tuple(example.shape[1:])}: {reason}; check data.channels, "
            "data.image_size and teacher.args"
        ) from error
    return values


def _check_batch_freedom(module: nn.Module, graph_module: GraphModule, example: Tensor) -> None:
    one = example[:1]
    with torch.no_grad():
        try:
            output = graph_module(one.clone())
            same = len(output) == 1 and torch.equal(output, module(one.clone()))
        except Exception:
            same = False
    if not same:
        raise PartitionError(
            "the teacher's graph depends on the size of the batch (a shape was baked in while it was traced); use -1 or "
            "torch.flatten instead of sizes taken with int() or len()"
        )


def _tensor_spans(graph_module: GraphModule, nodes: list[Node]) -> list[tuple[str, int, int]]:
    """For every parameter and buffer (name, first use, last use), tied names counted as one tensor."""
    modules = dict(graph_module.named_modules())
    spans: dict[tuple[int, int], tuple[str, int, int]] = {}
    for index, node in enumerate(nodes):
        for name, tensor in _used_tensors(node, graph_module, modules):
            key = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0)
            first = spans[key][1] if key in spans else index
            spans[key] = (spans[key][0] if key in spans else name, first, index)
            if node.op == "get_attr":
                # A get_attr may stand far before its use.
                last = max((nodes.index(user) for user in node.users), default=index)
                spans[key] = (spans[key][0], min(spans[key][1], last), last)
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
        return f"its value is {_told(value)}, not a floating-point tensor"
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
    return tuple(entry[0] if isinstance(entry, tuple) else str(key) for key, entry in stack.items())


def _multiply_accumulates(node: Node, graph_module: GraphModule, values: dict[Node, Any]) -> int:
    """Multiply-accumulates per sample of a Conv or Linear, as a module or a functional call; 0 for all else."""
    output = values.get(node)
    if not isinstance(output, Tensor) or output.ndim < 2:
        return 0
    weight: Any = None
    transposed = False
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, LAYER_TYPES):
            weight, transposed = module.weight, isinstance(module, nn.modules.conv._ConvTransposeNd)
    elif node.op == "call_function" and getattr(node.target, "__name__", "") in (
        "conv1d",
        "conv2d",
        "conv3d",
        "linear",
    ):
        candidates = [
            argument for argument in (*node.args[1:2], node.kwargs.get("weight")) if isinstance(argument, Node)
        ]
        weight = values.get(candidates[0]) if candidates else None
    if not isinstance(weight, Tensor):
        return 0
    if transposed:
        source = values[node.all_input_nodes[0]]
        return int(source[0].numel() * weight[0].numel())
    return int(output[0].numel() * weight[0].numel())


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    # torch.fx has containers of its own, derived from these.
    for container in (dict, list, tuple):
        if isinstance(value, container):
            return f"a {container.__name__} of {len(value)}"
    return f"a {type(value).__name__}"
