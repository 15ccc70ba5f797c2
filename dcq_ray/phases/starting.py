"""A student section where its training begins, and whether the training was worth it.

Quantizers on the teacher's weights are moved to where they fit best. That may be better than what a training of few steps, or
of too high a rate, comes to: so both ends of it are compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from dcq_ray.phases.context import Network
from dcq_ray.phases.sources import Source, first_batches
from dcq_ray.quantizers import activation_starts, fit_weights, put_quantizers
from dcq_ray.records import RunContext
from dcq_ray.section import batch_statistics

# A fit holds all inputs that it is made on.
MAX_START_INPUT_BYTES = 2**29
# On which a training's two ends are compared: enough, since they are the same for both.
NUM_COMPARED_SAMPLES = 256


def student_section(
    context: RunContext, index: int, network: Network, inputs: Source, device: torch.device, *, resumed: bool
) -> GraphModule:
    """A section with its quantizers where they start: on the teacher's weights, or fitted to them, and its first inputs.

    `resumed`: a state of the training is loaded afterwards, so there is nothing to fit.
    """
    # A copy: the network serves other sections and measurements after this one.
    module: GraphModule = copy.deepcopy(network.sections[index]).to(device)
    layers = context.plan.sections[index].layers
    job = context.job
    calibration = first_batches(inputs, job.data.batch_size)
    put_quantizers(module, layers, activation_starts(module, layers, calibration))
    if job.train.start == "fitted" and not resumed:
        rows = first_batches(inputs, job.data.batch_size, num_start_samples(context, index))
        fit_weights(module, network.sections[index].to(device), ((value, value) for value in rows), seed=job.seed)
    return module


def num_start_samples(context: RunContext, index: int) -> int:
    """Train images on which a section's start is fitted: as many as the job says, or as fit into 512 MiB."""
    sample_bytes = 4 * math.prod(context.plan.boundaries[index].shape)
    return min(context.job.train.start_samples, max(1, MAX_START_INPUT_BYTES // sample_bytes))


def better_of(
    start: GraphModule,
    trained: GraphModule,
    sources: Sequence[Source],
    loss: Callable[[Tensor, Any], Tensor],
    *,
    batch_size: int,
) -> GraphModule:
    """Of a section before and after its training that with the lower loss on the last 256 samples; of equals the trained one.

    Args:
        sources: the section's input, then its targets.
        loss: of the training; as there, BatchNorm runs on batch statistics.
    """
    num_samples = sources[0].num_samples
    first = max(0, num_samples - NUM_COMPARED_SAMPLES)
    positions = [
        np.arange(begin, min(begin + batch_size, num_samples)) for begin in range(first, num_samples, batch_size)
    ]

    def total(module: GraphModule) -> float:
        # A copy: statistics that run along are not to change.
        module = copy.deepcopy(module)
        batch_statistics(module)
        losses = []
        with torch.no_grad():
            for rows in positions:
                inputs, *targets = (source.read(rows) for source in sources)
                losses.append(len(rows) * float(loss(module(inputs.clone()), tuple(targets))))
        return math.fsum(losses)

    return start if total(start) < total(trained) else trained
