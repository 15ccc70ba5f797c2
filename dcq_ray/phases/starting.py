"""A student section where its training begins: quantizers on the teacher's weights, moved to where they fit best."""

from __future__ import annotations

import copy
import math

import torch
from torch.fx import GraphModule

from dcq_ray.phases.context import Network
from dcq_ray.phases.sources import Source, first_batches
from dcq_ray.quantizers import activation_starts, fit_weights, put_quantizers
from dcq_ray.records import RunContext

# A fit holds all inputs that it is made on.
MAX_START_INPUT_BYTES = 2**29


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
