"""Sensitivity: what errors of a layer's outputs do to the teacher's predictions, from one backward pass of the teacher."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcq_ray.quantizers.policy import layer_weight

# A teacher is all but sure of images that it was trained on, and their gradients would be all but nothing.
TEMPERATURE = 2.0


def output_metrics(
    sections: Sequence[nn.Module], layers: Collection[str], batches: Sequence[Tensor], *, seed: int
) -> dict[str, Tensor]:
    """For every layer M = E[g g'] over its outputs' places, [R, R]: g is the gradient of the log-likelihood of a drawn class.

    Classes are drawn from the teacher's own predictions, softened by a temperature of 2, so that M is the layer's block of
    the Fisher information. A layer that never reaches the predictions has zeros; one that does not run is left out.

    Args:
        sections: the teacher's, in order, in eval mode, from batches to logits [B, K].
        layers: names of Conv2d and Linear layers.
        seed: of the drawn classes.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            reached = output if output.requires_grad else output.detach().requires_grad_()
            seen.append((name, reached))
            # A clone, since what follows may work in place.
            return reached.clone()

        return hook

    found = [(name, module) for section in sections for name, module in section.named_modules() if name in layers]
    handles = [module.register_forward_hook(watch(name)) for name, module in found]
    rows = {name: (len(layer_weight(module)), 1 if isinstance(module, nn.Conv2d) else -1) for name, module in found}
    sums: dict[str, Tensor] = {}
    try:
        for batch in batches:
            value = batch.clone()
            with torch.enable_grad():
                for section in sections:
                    value = section(value)
            softened = (value.detach() / TEMPERATURE).softmax(1)
            drawn = torch.multinomial(softened.cpu(), 1, generator=generator).to(value.device)
            slopes = torch.zeros_like(softened).scatter_(1, drawn, 1.0) - softened
            outputs = [output for _, output in seen]
            if outputs and value.requires_grad:
                gradients = torch.autograd.grad(value, outputs, slopes, allow_unused=True)
                for (name, output), gradient in zip(seen, gradients, strict=True):
                    part = _products(output, gradient, rows[name])
                    sums[name] = sums[name] + part if name in sums else part
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _products(output: Tensor, gradient: Tensor | None, rows: tuple[int, int]) -> Tensor:
    """The sum over images and places of g g'; `rows`: how many, and their dimension."""
    if gradient is None:
        return output.new_zeros(rows[0], rows[0])
    flat = gradient.movedim(rows[1], -1).flatten(0, -2)
    return flat.t() @ flat
