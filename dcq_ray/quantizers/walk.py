"""Walk: run a graph on the same batches up to one layer after the other, while the layers behind change no more.

To run a network anew up to every layer costs the square of its depth. Here what is live at a layer is kept and the next stretch
goes on from it, as long as that fits into a stated memory; where it does not, later stretches begin at the last place where it
did. Either way the values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

State = dict[Node, Any]


class _Reached(Exception):
    """No error: it ends a layer's call once its input is known."""


class Walk:
    """A network on its way through some batches."""

    def __init__(self, network: GraphModule, batches: Sequence[Tensor], *, max_kept_bytes: int) -> None:
        """`batches`: of the network's only input, each [B, ...]; they are not changed."""
        self._runner = Interpreter(network)
        self._nodes = list(network.graph.nodes)
        self._places = {node: place for place, node in enumerate(self._nodes)}
        self._max_kept_bytes = max_kept_bytes
        self._sizes = [len(batch) for batch in batches]
        self._place = 1 + next(place for place, node in enumerate(self._nodes) if node.op == "placeholder")
        self._states: list[State] = [{self._nodes[self._place - 1]: batch} for batch in batches]

    def first_calls(self) -> dict[str, Node]:
        """The names of the modules that the network calls, in the order in which they first run, and where it calls them."""
        found: dict[str, Node] = {}
        for node in self._nodes:
            if node.op == "call_module":
                found.setdefault(str(node.target), node)
        return found

    def inputs_of(self, node: Node, *, beside: Node | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For every batch what a layer gets at a call, its own hooks' work (an input quantizer's) done.

        Calls must come in the order of the graph, and each iterator be read to its end before the next is asked for.

        Args:
            beside: an earlier node, needed after the call, whose value then comes with the input; it is only to be read.
        """
        place, keeps = self._places[node], False
        for number, state in enumerate(self._states):
            # Copies, because modules may work in place on what is kept.
            reached = self._run({key: _copy(value) for key, value in state.items()}, place)
            if number == 0:
                sample_bytes = _num_bytes(reached) / self._sizes[0]
                keeps = sample_bytes * sum(self._sizes) <= self._max_kept_bytes
            arguments, keywords = self._in(reached, node)
            seen = _seen(self._runner.submodules[str(node.target)], arguments, keywords)
            yield seen, None if beside is None else reached[beside]
            if keeps:
                self._states[number] = reached
        if keeps:
            self._place = place

    def _run(self, state: State, place: int) -> State:
        """Run the nodes from where the states are to a place, and drop what nobody needs from there on."""
        self._runner.env = state
        with torch.no_grad():
            for node in self._nodes[self._place : place]:
                state[node] = self._runner.run_node(node)
                for dead in self._runner.user_to_last_uses.get(node, ()):
                    del state[dead]
        return state

    def _in(self, state: State, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._runner.env = state
        return self._runner.fetch_args_kwargs_from_env(node)


def _seen(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The first input of a layer at a call, after its pre-hooks; the layer itself does not run."""
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((inputs[0] if inputs else next(iter(named.values()))).detach().clone())
        raise _Reached

    # Registered last, so the layer's own hooks, an input quantizer above all, have run.
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            layer(*arguments, **keywords)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _copy(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _num_bytes(state: State) -> int:
    return sum(
        leaf.numel() * leaf.element_size() for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor)
    )
