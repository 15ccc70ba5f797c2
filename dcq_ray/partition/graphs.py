"""A module -> its data-flow graph on an example: by torch.fx, and by torch.export where torch.fx fails.

A graph has one placeholder, the batch of images, and one output, the logits, and works for any size of the batch. Graphs of
torch.export are of aten operations: their layers are functional calls on the parameters, and their BatchNorm is frozen.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map

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
LAYER_KEY = "dcq_layer"
"""In the `meta` of a functional call: the name of the Conv or Linear layer whose weight it uses."""

_FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


def data_flow_graph(module: nn.Module, example: Tensor) -> tuple[GraphModule, dict[Node, Any]]:
    """The graph of a module in eval mode, and every node's value on the example (tensors as meta tensors).

    Raises:
        PartitionError: the module does not map one batch of images to one tensor [N, K], or has no fixed graph.
    """
    _check_interface(module, example)
    try:
        return _checked(_symbolic(module), module, example)
    except PartitionError as error:
        try:
            return _checked(_exported(module, example), module, example)
        except Exception as second:
            # The first error is the one that says what to change; the second tells why nothing else helped.
            reason = f"; torch.export: {_first_line(second)}" if not isinstance(second, PartitionError) else ""
            raise PartitionError(f"{error}{reason}") from error


def function_name(node: Node) -> str:
    """The bare name of a call's function: `conv2d` for torch's, functional's and aten's."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def functional_weight(node: Node) -> Node | None:
    """The node that gives the weight of a functional convolution or linear call, or None."""
    if node.op != "call_function" or function_name(node) not in _FUNCTIONS:
        return None
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return weight if isinstance(weight, Node) else None


def told(value: Any) -> str:
    """What a value is, in an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    # torch.fx has containers of its own, derived from these.
    for container in (dict, list, tuple):
        if isinstance(value, container):
            return f"a {container.__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _check_interface(module: nn.Module, example: Tensor) -> None:
    parameters = inspect.signature(module.forward).parameters.values()
    wanted = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(wanted) > 1:
        raise PartitionError(
            f"the teacher takes {len(wanted)} inputs ({', '.join(wanted)}), expected one batch of images"
        )
    try:
        with torch.no_grad():
            output = module(example.clone())
    except Exception as error:
        raise PartitionError(
            f"the teacher does not run on images of shape {tuple(example.shape[1:])}: {_first_line(error)}; check "
            "data.channels, data.image_size and teacher.args"
        ) from error
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(example)):
        raise PartitionError(
            f"the teacher returns {told(output)}, expected one tensor of logits [batch, classes]; wrap it in a module that "
            "returns its logits"
        )


def _checked(graph_module: GraphModule, module: nn.Module, example: Tensor) -> tuple[GraphModule, dict[Node, Any]]:
    try:
        values = _run(graph_module, example)
        with torch.no_grad():
            one = graph_module(example[:1].clone())
            same = len(one) == 1 and torch.equal(one, module(example[:1].clone()))
    except Exception:
        same = False
    if not same:
        raise PartitionError(
            "the teacher's graph depends on the size of the batch (a shape was baked in while it was traced), or on chance; "
            "use -1 or torch.flatten instead of sizes taken with int() or len()"
        )
    _mark_layers(graph_module, module)
    return graph_module, values


def _symbolic(module: nn.Module) -> GraphModule:
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(module)
        return GraphModule(tracer.root, graph, type(module).__name__)
    except Exception as error:
        raise PartitionError(
            f"the teacher {type(module).__name__} cannot be traced: {_first_line(error)}; control flow that depends on the "
            "data, or code that is not made of tensor operations, has no fixed graph to cut: move it out of the network's "
            "forward"
        ) from error


def _exported(module: nn.Module, example: Tensor) -> GraphModule:
    """torch.export's graph with the teacher's own parameters, for any size of the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        flat = program.module()
    assert isinstance(flat, GraphModule)
    graph = Graph()
    values: dict[Node, Node] = {}
    images = next(node for node in flat.graph.nodes if node.op == "placeholder")
    batch_symbol = str(images.meta["val"].shape[0])
    sizes = {node for node in flat.graph.nodes if _is_size(node, images)}

    def size_for(user: Node) -> Node:
        # Taken from a tensor at hand, not from the images: else it would be live, and forbid a cut, all the way.
        source = next((node for node in user.all_input_nodes if _batch_size(node) == batch_symbol), images)
        return graph.call_function(torch.ops.aten.sym_size.int, (values[source], 0))

    for node in flat.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder("x")
            values[node].meta = copy.copy(node.meta)
        elif node.op == "output":
            (result,) = node.args[0]
            graph.output(values[result])
        elif node.users and node not in sizes:
            # The sizes that this node uses become its own; what else it uses is there already.
            own = {**values, **{size: size_for(node) for size in node.all_input_nodes if size in sizes}}
            values[node] = graph.node_copy(node, own.__getitem__)
    return GraphModule(flat, graph, type(module).__name__)


def _is_size(node: Node, images: Node) -> bool:
    return node.target == torch.ops.aten.sym_size.int and node.args == (images, 0)


def _batch_size(node: Node) -> str | None:
    value = node.meta.get("val")
    return str(value.shape[0]) if isinstance(value, Tensor) and value.ndim else None


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


def _run(graph_module: GraphModule, example: Tensor) -> dict[Node, Any]:
    """Every node's value on the example; tensors as meta tensors, so that nothing large is kept."""
    values: dict[Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            values[node] = tree_map(_shape_only, value)
            return value

    with torch.no_grad():
        Recorder(graph_module).run(example.clone())
    return values


def _shape_only(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
