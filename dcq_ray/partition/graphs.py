"""A module -> its data-flow graph: by torch.fx, and by torch.export where torch.fx fails.

A graph has one placeholder, the batch of images, and one output, the logits, and works for any size of the batch. Both front
ends give the same kind of graph: layers are calls of the teacher's own modules, what lies between them are functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from dcq_ray.errors import PartitionError
from dcq_ray.partition.exported import export_twice, exported_graph
from dcq_ray.partition.interface import LAYER_TYPES, check_interface, first_line, same_values
from dcq_ray.partition.sizes import size_locally

LAYER_KEY = "dcq_layer"
"""In the `meta` of a functional call: the name of the Conv or Linear layer whose weight it uses."""

# Two sizes of the batch tell which numbers of a graph are made from it; 1 is for the check alone, since much is special then.
TRACED_BATCH_SIZE = 3
OTHER_BATCH_SIZE = 5

_FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFlow:
    """A module's graph."""

    graph_module: GraphModule
    values: dict[Node, Any]
    """What every node gives on a batch of `TRACED_BATCH_SIZE` images; tensors without their content."""
    batched: frozenset[Node]
    """The nodes that give a tensor whose first dimension is the batch."""
    front_end: str
    """torch.fx or torch.export: what made the graph."""


def data_flow(module: nn.Module, example: Tensor) -> DataFlow:
    """The data flow of a module in eval mode on images like these, [N, ...], N >= 1; all of N that count are a few.

    Raises:
        PartitionError: the module does not map one batch of images to one tensor [N, K], changes itself as it runs, has
            weights that are no parameters, or has no fixed graph.
    """
    images = _batch(example, TRACED_BATCH_SIZE)
    check_interface(module, images)
    try:
        return _checked(_symbolic(module), "torch.fx", module, images)
    except _NoGraph as first:
        told = f"torch.fx: {first}"
        try:
            return _exported(module, images)
        except _NoGraph as error:
            second = f"torch.export: {error}"
        raise PartitionError(
            f"the teacher {type(module).__name__} has no fixed graph to cut ({told}; {second}); {_remedy(told, second)}"
        ) from first


def function_name(node: Node) -> str:
    """The bare name of a call's function: `conv2d` for torch's, functional's and aten's."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def functional_weight(node: Node) -> Node | None:
    """The node that gives the weight of a functional convolution or linear call, or None."""
    if node.op != "call_function" or function_name(node) not in _FUNCTIONS:
        return None
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return weight if isinstance(weight, Node) else None


def forget_owner(graph_module: GraphModule) -> None:
    """Break the cycle of a module and its graph, so that memory goes back when the last user does, not at some collection."""
    graph_module.graph.owning_module = None


class _NoGraph(Exception):
    """A front end did not give a graph that equals the module; its text says why."""


class _Tracer(fx.Tracer):
    """torch.fx's, for the first argument of forward alone: the others keep their defaults, also as *args and **kwargs."""

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # They belong to torch.nn, but a whole network of the user's may be inside.
        return not isinstance(m, nn.DataParallel | DistributedDataParallel) and super().is_leaf_module(
            m, module_qualified_name
        )


def _is_leaf(module: nn.Module) -> bool:
    return _Tracer().is_leaf_module(module, "")


def _is_childless(module: nn.Module) -> bool:
    return _is_leaf(module) and next(module.children(), None) is None


def _is_none(_: nn.Module) -> bool:
    return False


def _checked(graph_module: GraphModule, front_end: str, module: nn.Module, images: Tensor) -> DataFlow:
    """The graph with sizes taken where they are used, if it equals the module at several sizes of the batch."""
    batches = {size: _batch(images, size) for size in (TRACED_BATCH_SIZE, 1, OTHER_BATCH_SIZE)}
    runs: dict[int, tuple[dict[Node, Any], Tensor]] = {}
    try:
        runs = {size: _run(graph_module, batches[size]) for size in (TRACED_BATCH_SIZE, 1)}
        if size_locally(graph_module, (runs[TRACED_BATCH_SIZE][0], runs[1][0])):
            runs = {size: _run(graph_module, batches[size]) for size in (TRACED_BATCH_SIZE, 1)}
        runs[OTHER_BATCH_SIZE] = _run(graph_module, batches[OTHER_BATCH_SIZE])
    except Exception as error:
        raise _NoGraph(f"{first_line(error)} on a batch of another size: a size was baked in") from error
    for size, batch in batches.items():
        with torch.no_grad():
            same = same_values(runs[size][1], module(batch.clone()))
        if not same:
            raise _NoGraph(
                f"the graph gives other logits than the network on a batch of {size}: size or chance matters"
            )
    _mark_layers(graph_module, module)
    _hide_constants(graph_module, module)
    forget_owner(graph_module)
    values, others = runs[TRACED_BATCH_SIZE][0], runs[1][0]
    batched = {
        node
        for node, value in values.items()
        if has_rows(value, TRACED_BATCH_SIZE)
        and has_rows(others[node], 1)
        and value.shape[1:] == others[node].shape[1:]
    }
    return DataFlow(graph_module=graph_module, values=values, batched=frozenset(batched), front_end=front_end)


def _symbolic(module: nn.Module) -> GraphModule:
    tracer = _Tracer()
    before = set(vars(module))
    try:
        graph = tracer.trace(module)
        graph_module = GraphModule(tracer.root, graph, type(module).__name__)
    except Exception as error:
        raise _NoGraph(first_line(error)) from error
    finally:
        # torch.fx leaves the constants that it meets in the module itself; the next trace would give them other names.
        for name in set(vars(module)) - before:
            delattr(module, name)
    # A network that looks at its input's class may have returned something else than a value of the graph.
    if not isinstance(next(iter(reversed(graph.nodes))).args[0], Node):
        raise _NoGraph("the logits do not depend on the images")
    return graph_module


def _exported(module: nn.Module, images: Tensor) -> DataFlow:
    try:
        exported = export_twice(module, (images, _batch(images, OTHER_BATCH_SIZE)))
    except Exception as error:
        raise _NoGraph(first_line(error)) from error
    reason: Exception | None = None
    # The finest graph that equals the network: attention has a fast path of its own, which only the whole module takes.
    for is_leaf in (_is_childless, _is_leaf, _is_none):
        try:
            return _checked(exported_graph(module, exported, is_leaf), "torch.export", module, images)
        except Exception as error:
            reason = reason or error
    raise _NoGraph(first_line(reason or RuntimeError())) from reason


def _remedy(*reasons: str) -> str:
    if any("batch of" in reason for reason in reasons):
        return (
            "its forward depends on the size of the batch, or on chance; treat every image alike (-1 or x.shape[0] in shapes), "
            "and use F.dropout only with training=self.training"
        )
    return (
        "control flow that depends on the data, or code that is not made of tensor operations, has no fixed graph: move it "
        "out of the network's forward"
    )


def _mark_layers(graph_module: GraphModule, module: nn.Module) -> None:
    for node in graph_module.graph.nodes:
        weight = functional_weight(node)
        if weight is None or weight.op != "get_attr":
            continue
        name, _, last = str(weight.target).rpartition(".")
        if last != "weight":
            continue
        try:
            owner = module.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(owner, LAYER_TYPES):
            node.meta[LAYER_KEY] = name


def _hide_constants(graph_module: GraphModule, module: nn.Module) -> None:
    """Keep what is not in the module's state out of the sections' state: a graph makes a buffer of every plain tensor."""
    state = module.state_dict().keys()
    for path, part in graph_module.named_modules():
        for name in part._buffers:
            if f"{path}.{name}".lstrip(".") not in state:
                part._non_persistent_buffers_set.add(name)


def _run(graph_module: GraphModule, images: Tensor) -> tuple[dict[Node, Any], Tensor]:
    """Every node's value on some images, tensors as meta tensors, so that nothing large is kept; and the logits."""
    values: dict[Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            values[node] = tree_map(_shape_only, value)
            return value

    with torch.no_grad():
        logits: Tensor = Recorder(graph_module).run(images.clone())
    return values, logits


def has_rows(value: Any, size: int) -> bool:
    """Whether a value is a tensor of so many rows."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def _shape_only(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _batch(images: Tensor, size: int) -> Tensor:
    """So many of the images, from the first on, again from the first where there are fewer."""
    return images[torch.arange(size, device=images.device) % len(images)]
