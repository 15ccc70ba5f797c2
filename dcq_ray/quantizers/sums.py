"""Sums: layers whose output is added to another branch's, such as a residual block's last, and what the sum lacks there.

The branch that is added has errors of its own in a quantized network. The layer's wanted output takes them up, so that the sum
is what the teacher's is, and not only the layer's part of it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_METHODS = ("add", "add_", "__add__", "__iadd__")
# A BatchNorm's weight below this share of its largest hides its channel: no output of the layer would make up for anything.
_LEAST_WEIGHT_SHARE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Summand:
    """What a layer's output is added to."""

    other: str
    """The node whose value is added; known before the layer runs."""
    norm: _BatchNorm | None
    """Between the layer and the sum; in eval mode."""

    def shift(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """What the layer's output is to have more, so that the sum is the teacher's; values of `other`, channels last.

        Args:
            ours, theirs: in the student and in the teacher, [..., R].
        """
        lacking = theirs - ours
        if self.norm is None:
            return lacking
        # y of the layer adds weight (y - mean) / deviation to the sum.
        assert self.norm.running_var is not None
        deviation = (self.norm.running_var + self.norm.eps).sqrt()
        weight = torch.ones_like(deviation) if self.norm.weight is None else self.norm.weight.detach()
        speaks = weight.abs() > _LEAST_WEIGHT_SHARE * weight.abs().max()
        return lacking * torch.where(speaks, deviation / torch.where(speaks, weight, 1), 0)


def summands(teacher: GraphModule) -> dict[str, Summand]:
    """For the names of layers which are called once, and whose output only goes into a sum, perhaps through a BatchNorm: that sum.

    Left out are those whose other summand comes after them: there the other one makes good what this one lacks.
    """
    modules = dict(teacher.named_modules())
    places = {node: place for place, node in enumerate(teacher.graph.nodes)}
    calls = [str(node.target) for node in teacher.graph.nodes if node.op == "call_module"]

    def is_single_call(node: Node) -> bool:
        return node.op == "call_module" and calls.count(str(node.target)) == 1

    def is_batchnorm(node: Node) -> bool:
        return isinstance(modules[str(node.target)], _BatchNorm)

    found = {}
    for node in teacher.graph.nodes:
        if not is_single_call(node) or is_batchnorm(node):
            continue
        end, norm = node, None
        user = _only_user(end)
        if user is not None and is_single_call(user) and is_batchnorm(user):
            norm, end, user = modules[str(user.target)], user, _only_user(user)
        other = None if user is None else _other_summand(user, end)
        if other is not None and places[other] < places[node] and (norm is None or norm.running_var is not None):
            found[str(node.target)] = Summand(other=other.name, norm=norm)
    return found


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(node: Node, one: Node) -> Node | None:
    """What a node adds to `one`; None where it does something else."""
    adds = node.target in (_ADDITIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ())
    if not adds or node.kwargs or len(node.args) != 2:
        return None
    others = [argument for argument in node.args if argument is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None
