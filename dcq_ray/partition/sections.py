"""Cut a traced teacher into sections that keep the teacher's own names, and say what is in them."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from dcq_ray.digests import json_sha256, tensors_sha256
from dcq_ray.errors import PartitionError
from dcq_ray.partition.graphs import LAYER_KEY, forget_owner
from dcq_ray.partition.interface import LAYER_TYPES, same_values
from dcq_ray.partition.trace import CutPoint, TracedTeacher

NUM_NEAR = 4


def find_cut(traced: TracedTeacher, name: str) -> CutPoint:
    """The legal cut of that name or alias; raises PartitionError listing the legal ones near it."""
    for point in traced.cut_points:
        if name in point.aliases:
            return point
    if name in traced.illegal:
        index, reason = traced.illegal[name]
        near = sorted(traced.cut_points, key=lambda point: abs(point.node_index - index))[:NUM_NEAR]
        near.sort(key=lambda point: point.node_index)
        told = f"no legal cut, because {reason}"
    else:
        known = {alias: point for point in traced.cut_points for alias in point.aliases}
        close = difflib.get_close_matches(name, known, n=NUM_NEAR, cutoff=0.3) or list(known)[:NUM_NEAR]
        near = list(dict.fromkeys(known[alias] for alias in close))
        told = "not the name of a module or node of the teacher"
    legal = ", ".join(point.name for point in near) or "none: the teacher cannot be cut"
    raise PartitionError(f"sections.cuts: {name} is {told}; legal cuts near it: {legal}")


def ordered_cuts(traced: TracedTeacher, cuts: Sequence[str]) -> tuple[CutPoint, ...]:
    """The cuts of those names in the order of the network; raises PartitionError where two are the same place."""
    points = sorted((find_cut(traced, name) for name in cuts), key=lambda point: point.node_index)
    for one, other in itertools.pairwise(points):
        if one == other:
            raise PartitionError(
                f"sections.cuts: {one.name} is named twice ({', '.join(one.aliases)} are the same place)"
            )
    return tuple(points)


def cut(traced: TracedTeacher, cuts: Sequence[str], *, copied: bool = True) -> tuple[GraphModule, ...]:
    """One module per section, in order; n cuts give n + 1 sections.

    The keys of a section's state_dict are the teacher's own.

    Args:
        copied: sections are deep copies: to train one changes nothing else. Otherwise they are made of the teacher's own
            modules: enough to look at or to run, and no memory.
    """
    nodes = list(traced.graph_module.graph.nodes)
    ends = [point.node_index for point in ordered_cuts(traced, cuts)]
    starts = [next(index for index, node in enumerate(nodes) if node.op == "placeholder"), *ends]
    sections = tuple(
        _section(traced.graph_module, nodes, start, end)
        for start, end in zip(starts, [*ends, len(nodes) - 1], strict=True)
    )
    return tuple(copy.deepcopy(section) for section in sections) if copied else sections


def assert_composition(module: nn.Module, sections: Sequence[nn.Module], example: Tensor) -> None:
    """Check that the sections, one after the other, equal the module bit for bit on an example; PartitionError otherwise."""
    with torch.no_grad():
        expected = module(example.clone())
        value = example
        for section in sections:
            value = section(value.clone())
    if not same_values(value, expected):
        differing = int((value != expected).any(dim=1).sum()) if value.shape == expected.shape else len(example)
        raise PartitionError(
            f"the {len(sections)} sections do not compose to the teacher: {differing} of {len(example)} outputs differ; the "
            "teacher's forward is not a pure function of its input (randomness, or state that it changes)"
        )


def prefix_digests(traced: TracedTeacher, cuts: Sequence[str]) -> tuple[str, ...]:
    """For every boundary a digest of the traced code and the tensors up to it; other cuts do not enter."""
    nodes = list(traced.graph_module.graph.nodes)
    ends = {*(point.node_index for point in ordered_cuts(traced, cuts)), len(nodes) - 1}
    chain = json_sha256(["input", list(traced.input_shape)])
    digests = [chain]
    # Nodes go by the order in which they are met, since their names may depend on what comes later.
    numbers: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        if node.op == "get_attr":
            # It counts where it is used.
            continue
        for met in (*(used for used in node.all_input_nodes if used.op == "get_attr"), node):
            if met not in numbers:
                chain = json_sha256([chain, _identity(traced.graph_module, met, numbers)])
                numbers[met] = len(numbers)
        if index in ends:
            digests.append(chain)
    return tuple(digests)


def _identity(root: GraphModule, node: Node, numbers: Mapping[Node, int]) -> list[Any]:
    """All that the value of a node depends on, but for the values of its arguments."""

    def told(argument: Any) -> Any:
        return f"%{numbers[argument]}" if isinstance(argument, Node) else argument

    target = node.target
    if callable(target):
        target = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    arguments = [repr(map_aggregate(value, told)) for value in (node.args, node.kwargs)]
    tensors = ""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        arguments.append(repr(module))
        tensors = tensors_sha256({**dict(module.named_buffers()), **module.state_dict()})
    elif node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = getattr(root.get_submodule(path), name)
        tensors = tensors_sha256({"": value}) if isinstance(value, Tensor) else repr(value)
    return [node.op, str(target), arguments, tensors]


def describe_section(section: GraphModule) -> tuple[tuple[str, ...], int]:
    """The names of a section's leaf modules in order of execution, and its number of parameters."""
    modules = dict.fromkeys(
        str(node.target if node.op == "call_module" else node.meta[LAYER_KEY])
        for node in section.graph.nodes
        if node.op == "call_module" or LAYER_KEY in node.meta
    )
    return tuple(modules), sum(parameter.numel() for parameter in section.parameters())


def section_multiply_accumulates(traced: TracedTeacher, cuts: Sequence[str]) -> tuple[int, ...]:
    """Multiply-accumulates per sample in the Conv and Linear layers of each section."""
    before = [point.multiply_accumulates_before for point in ordered_cuts(traced, cuts)]
    edges = [0, *before, traced.total_multiply_accumulates]
    return tuple(high - low for low, high in itertools.pairwise(edges))


def quantizable_layers(section: GraphModule) -> tuple[tuple[str, nn.Module], ...]:
    """Conv and Linear layers in order of execution, by the teacher's names.

    One whose weight is used in a functional call is given as the module that holds the weight.
    """
    found: dict[str, nn.Module] = {}
    for node in section.graph.nodes:
        if node.op == "call_module":
            called = section.get_submodule(str(node.target))
            for name, module in called.named_modules(prefix=str(node.target)):
                if isinstance(module, LAYER_TYPES):
                    found.setdefault(name, module)
        elif LAYER_KEY in node.meta:
            name = str(node.meta[LAYER_KEY])
            found.setdefault(name, section.get_submodule(name))
    return tuple(found.items())


def directly_called(section: GraphModule) -> frozenset[str]:
    """Names of the modules that a section calls itself, and whose weight it uses nowhere else; their inputs can be quantized."""
    functional = {node.meta[LAYER_KEY] for node in section.graph.nodes if LAYER_KEY in node.meta}
    called = {str(node.target) for node in section.graph.nodes if node.op == "call_module"}
    return frozenset(called - functional)


def _section(root: GraphModule, nodes: Sequence[Node], start: int, end: int) -> GraphModule:
    """The nodes after `start`, whose value is the section's input, up to and with `end`, whose value is its output."""
    graph = Graph()
    values = {nodes[start]: graph.placeholder("x")}

    def value_of(node: Node) -> Node:
        if node not in values:
            # Only parameters and buffers are needed from before the section: liveness saw to that.
            values[node] = graph.node_copy(node, value_of)
        return values[node]

    for node in nodes[start + 1 : end + 1]:
        if node.op == "output":
            graph.output(value_of(node.args[0]))  # type: ignore[arg-type]
        elif node.op not in ("get_attr", "placeholder"):
            values[node] = graph.node_copy(node, value_of)
    if nodes[end].op != "output":
        graph.output(values[nodes[end]])
    section = GraphModule(root, graph, "Section").eval()
    forget_owner(section)
    section._register_deepcopy_hook(forget_owner)
    return section
