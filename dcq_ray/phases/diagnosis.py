"""Diagnosis: where along the network accuracy is lost, and what the layers' weights and outputs look like.

The teacher's first sections are replaced by the student's, one more each time, and the teacher's others run behind them: what
the score falls by with a section is what that section costs where it stands, on the inputs that it has in the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dcq_ray.data import Part
from dcq_ray.phases.context import Network
from dcq_ray.quantizers.policy import channel_dim
from dcq_ray.records import Diagnosis, LayerDiagnosis, LayerPlan, RunContext
from dcq_ray.records.packing import PER_CHANNEL_SCHEMES
from dcq_ray.validate import agreement, side_by_side, top_k

# The least and the largest output of every channel of layers, by name.
Ranges = dict[str, tuple[Tensor, Tensor]]

# All of it is a hint, and costs about half a pass of the network a section.
MAX_DIAGNOSED_SAMPLES = 1000
MAX_WATERFALL_STEPS = 12
# Of more bits no shares of levels are told.
MAX_TOLD_BITS = 4


def diagnose(
    context: RunContext,
    state: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
    sections: Sequence[nn.Module],
    network: Network,
    held_out: Part,
    device: torch.device,
    *,
    num_at_once: int = 1,
) -> Diagnosis:
    """The waterfall from the teacher to the student, and the layers, on at most 1,000 held-out images.

    Args:
        state, extra: of the baked student; `sections`: the same as `student_sections`.
        num_at_once: as of `dcq_ray.validate.side_by_side`.
    """
    num_samples, batch_size = min(len(held_out), MAX_DIAGNOSED_SAMPLES), context.job.data.batch_size
    positions = [np.arange(first, min(first + batch_size, num_samples)) for first in range(0, num_samples, batch_size)]
    teacher_sections: list[nn.Module] = [section.to(device) for section in network.sections]
    student_sections = [section.to(device) for section in sections]
    after = waterfall_steps(len(sections))
    logits: list[list[Tensor]] = [[] for _ in range(len(after) + 1)]
    ranges: Ranges = {}

    def looked_at(networks: tuple[list[nn.Module], list[nn.Module]], images: Tensor) -> tuple[list[Tensor], Ranges]:
        teacher, student = networks
        # Here, since it holds in a thread alone.
        with torch.no_grad(), _ranges(student, context.plan.layers) as own:
            ours = images.to(device)
            found = [_through(teacher, ours)]
            for index, section in enumerate(student):
                ours = section(ours.clone())
                if index in after:
                    found.append(_through(teacher[index + 1 :], ours))
        return found, own

    images = (held_out.images(batch) for batch in positions)
    for own_logits, own_ranges in side_by_side(looked_at, (teacher_sections, student_sections), images, num_at_once):
        for parts, part in zip(logits, own_logits, strict=True):
            parts.append(part)
        for name, own in own_ranges.items():
            ranges[name] = _widest(ranges.get(name), own)
    found = [torch.cat(parts).float().cpu() for parts in logits]
    labels = None if held_out.labels is None else torch.from_numpy(held_out.labels[:num_samples])
    scores = [agreement(value, found[0]) if labels is None else top_k(value, labels, 1) for value in found]
    return Diagnosis(
        num_samples=num_samples,
        teacher_score=scores[0],
        after=after,
        scores=tuple(scores[1:]),
        layers=tuple(_layer_diagnosis(layer, state, extra, ranges) for layer in context.plan.layers),
    )


def waterfall_steps(num_sections: int) -> tuple[int, ...]:
    """After which sections the score is told: after all of up to 12, else after 12 of them, evenly; always after the last."""
    count = min(num_sections, MAX_WATERFALL_STEPS)
    return tuple(round((number + 1) * num_sections / count) - 1 for number in range(count))


def level_shares(weight: Tensor, scale: Tensor, layer: LayerPlan) -> tuple[float, ...]:
    """The shares of a quantized weight's values at its levels, ascending; only of levels that occur somewhere."""
    if scale.numel() == 1:
        integers = weight / scale
    elif layer.scheme in PER_CHANNEL_SCHEMES:
        shape = [1] * weight.ndim
        shape[channel_dim(layer.kind)] = -1
        integers = weight / scale.reshape(shape)
    else:
        # Three levels with a scale for each side.
        integers = weight.sign()
    counts = torch.unique(torch.nan_to_num(integers).round(), return_counts=True)[1]
    return tuple(float(count) / weight.numel() for count in counts)


def _layer_diagnosis(
    layer: LayerPlan,
    state: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
) -> LayerDiagnosis:
    shares: tuple[float, ...] = ()
    scale = extra.get(f"dcq.{layer.module}.scale")
    if scale is not None and layer.bits <= MAX_TOLD_BITS:
        shares = level_shares(state[f"{layer.module}.weight"].cpu(), scale.cpu(), layer)
    least, largest = ranges.get(layer.module, (torch.zeros(0), torch.zeros(0)))
    return LayerDiagnosis(
        module=layer.module,
        level_shares=shares,
        num_channels=len(least),
        num_constant_channels=int((least == largest).sum()),
    )


def _widest(earlier: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if earlier is None:
        return own
    return torch.minimum(earlier[0], own[0]), torch.maximum(earlier[1], own[1])


def _through(sections: Sequence[nn.Module], value: Tensor) -> Tensor:
    for section in sections:
        # A clone: a section may work in place on its input, which others take, too.
        value = section(value.clone())
    return value


@contextlib.contextmanager
def _ranges(sections: Sequence[nn.Module], layers: Sequence[LayerPlan]) -> Iterator[Ranges]:
    """The least and the largest output of every channel of the layers, over all that runs in the block."""
    found: Ranges = {}
    handles = []
    for section in sections:
        modules = dict(section.named_modules())
        for layer in layers:
            if layer.module in modules:

                def hook(
                    _: nn.Module, __: object, output: Tensor, name: str = layer.module, kind: str = layer.kind
                ) -> None:
                    rows = output.movedim(-1 if kind == "Linear" else 1, 0).flatten(1)
                    least, largest = rows.amin(1), rows.amax(1)
                    found[name] = _widest(found.get(name), (least, largest))

                handles.append(modules[layer.module].register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
