"""Validating: the stitched student beside its teacher on held-out images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dcq_ray.callables import load_callable
from dcq_ray.data import Part, ordered_batches
from dcq_ray.errors import DataError
from dcq_ray.phases.context import Network
from dcq_ray.quantizers import put_input_quantizers
from dcq_ray.records import RunContext, ValidationReport
from dcq_ray.validate import agreement, compare, top_k


def validate(
    context: RunContext,
    sections: Sequence[nn.Module],
    network: Network,
    held_out: Part,
    device: torch.device,
    *,
    num_at_once: int = 1,
) -> ValidationReport:
    """A student, as `student_sections`, against the teacher on held-out images: accuracy, agreement, error at boundaries.

    Args:
        num_at_once: as of `dcq_ray.validate.side_by_side`.
    """
    job = context.job
    labels = None if held_out.labels is None else torch.from_numpy(held_out.labels)
    teacher_sections = [section.to(device) for section in network.sections]
    # The sections one after the other are the networks, bit for bit: one pass of each gives errors and logits.
    images = (images for images, _ in ordered_batches(held_out, job.data.batch_size))
    ours = [section.to(device) for section in sections]
    compared = compare(teacher_sections, ours, images, device, num_at_once=num_at_once)
    logits, reference = compared.logits, compared.reference
    return ValidationReport(
        num_samples=len(held_out),
        top1=None if labels is None else top_k(logits, labels, 1),
        top5=None if labels is None else top_k(logits, labels, 5),
        agreement_with_teacher=agreement(logits, reference),
        boundary_errors=compared.boundary_errors,
        teacher_top1=None if labels is None else top_k(reference, labels, 1),
        metric=_metric(context, logits, labels),
        teacher_metric=_metric(context, reference, labels),
    )


def student_sections(network: Network, state: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> list[nn.Module]:
    """The baked student as sections, on the teacher's own graph."""
    sections: list[nn.Module] = []
    for section in network.sections:
        module = copy.deepcopy(section)
        module.load_state_dict({name: state[name] for name in module.state_dict()})
        inside = {name for name, _ in module.named_modules()}
        # A key is dcq.<module>.<what>.
        own = {key: value for key, value in extra.items() if key.removeprefix("dcq.").rpartition(".")[0] in inside}
        put_input_quantizers(module, own)
        sections.append(module.eval())
    return sections


def _metric(context: RunContext, logits: Tensor, labels: Tensor | None) -> float | None:
    reference = context.job.data.metric
    if reference is None or labels is None:
        return None
    function = load_callable(reference, folder=context.job_folder, where="data.metric", error=DataError)
    value = function(logits, labels)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"data.metric: {reference} returned {value!r}, expected a number") from None
