"""Stitch: trained sections -> one quantized network of the teacher's own class, under the teacher's own names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers import ActivationStart, put_quantizers
from dcq_ray.records import LayerPlan

# So torch names what quantizes a weight.
PARAMETRIZED = ".parametrizations."


def stitch(
    teacher: nn.Module,
    layers: Sequence[LayerPlan],
    section_states: Sequence[Mapping[str, Tensor]],
    starts: Mapping[str, ActivationStart] | None = None,
) -> nn.Module:
    """A copy of the teacher with quantizers on and the sections' states loaded, in eval mode; the teacher is not changed.

    What no section holds (an auxiliary head that did not run) stays the teacher's; no states at all give the untrained
    student, whose activation quantizers begin at `starts`.

    Raises:
        QuantizeError: a section's tensor is not in the student, has another shape, or comes from two sections with different
            content; no section has a quantized layer.
    """
    student = copy.deepcopy(teacher)
    put_quantizers(student, layers, starts, trained=bool(section_states))
    state = student.state_dict()
    owners: dict[str, int] = {}
    for index, section in enumerate(section_states):
        for name, tensor in section.items():
            if name not in state:
                raise QuantizeError(
                    f"section {index}: its tensor {name} is not in the student; it belongs to another teacher"
                )
            if state[name].shape != tensor.shape:
                raise QuantizeError(
                    f"section {index}: {name} has shape {tuple(tensor.shape)}, the student expects {tuple(state[name].shape)}"
                )
            if name in owners and not torch.equal(tensor, section_states[owners[name]][name]):
                raise QuantizeError(f"{name} comes from sections {owners[name]} and {index}, with different content")
            owners[name] = index
            state[name] = tensor
    lost = [name for name in state if section_states and PARAMETRIZED in name and name not in owners]
    if lost:
        raise QuantizeError(
            f"no section has {lost[0]}, so that layer has no trained quantizer; got {len(section_states)} sections"
        )
    student.load_state_dict(state)
    return student.eval().requires_grad_(False)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether a module has BatchNorm with running statistics."""
    return any(isinstance(part, _BatchNorm) and part.track_running_stats for part in module.modules())


def reestimate_batchnorm(module: nn.Module, batches: Iterable[Tensor], device: torch.device) -> None:
    """Recompute BatchNorm's running statistics as plain averages over these batches; nothing else changes.

    Sections are trained on the teacher's activations but run on the student's, whose means and variances differ. A batch
    with one value per channel has no variance and is left out.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    module.to(device).eval()
    for norm in norms:
        norm.reset_running_stats()
        # None means a cumulative average over all batches.
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for images in batches:
                if len(images) > 1:
                    module(images.to(device))
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
        module.eval()
