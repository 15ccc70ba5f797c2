"""What is prepared for a job is prepared for others that differ from it in their quantizers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dcq_ray.partition import cut, prefix_digests, trace_teacher
from dcq_ray.phases.prepare import Prepared, example_images, layer_sites, plan_key
from dcq_ray.quantizers import packed_num_bytes, plan_layers
from dcq_ray.spec import Job


def requantized(prepared: Prepared, jobs: Sequence[Job], *, device: torch.device) -> tuple[Prepared, ...]:
    """What `prepare` gives for these jobs, cut where the prepared one is cut; the teacher is traced once for all of them.

    Args:
        jobs: of the same teacher, images, cuts and stored activations as the job that was prepared.
    """
    teacher, splits, plan = prepared.teacher, prepared.splits, prepared.plan
    torch.set_num_threads(jobs[0].train.num_threads)
    traced = trace_teacher(teacher.module, example_images(jobs[0], splits))
    network_sha256 = prefix_digests(traced, ())[-1]
    sites = layer_sites(teacher, traced, cut(traced, plan.cuts, copied=False))
    state = teacher.module.state_dict()
    found = []
    for job in jobs:
        layers = {layer.module: layer for layer in plan_layers(sites, job.quantize)}
        sections = tuple(
            replace(section, layers=tuple(layers[layer.module] for layer in section.layers))
            for section in plan.sections
        )
        own = replace(
            plan,
            key=plan_key(job, network_sha256, splits, device),
            sections=sections,
            num_bytes_packed=packed_num_bytes(state, tuple(layers.values())),
        )
        found.append(replace(prepared, plan=own))
    return tuple(found)
