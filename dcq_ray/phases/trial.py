"""Trial: what each section's student costs on this machine, from a few steps of it with its quantizers on."""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcq_ray.data import Part
from dcq_ray.losses import loss_function
from dcq_ray.partition import cut, trace_teacher
from dcq_ray.phases.memory import keep_freed_memory
from dcq_ray.phases.starting import MAX_START_INPUT_BYTES
from dcq_ray.quantizers import activation_starts, fit_num_bytes, fit_weights, put_quantizers
from dcq_ray.records import PartitionPlan
from dcq_ray.section import Training
from dcq_ray.spec import Job
from dcq_ray.teacher import Teacher

T = TypeVar("T")

NUM_STEPS = 3
# A fit is tried on a batch, and on so many where batches are smaller; of its seconds those grow with the number of images in which
# it sees them.
FIT_SAMPLES = 32
# Of the largest boundary in a trial.
MAX_TRIAL_BYTES = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionCosts:
    """Seconds of one section on this machine, on one worker."""

    forward_seconds: float
    """Of one sample in eval mode."""
    store_seconds: float
    """To convert and hash one sample of the boundary at the section's end."""
    step_seconds: float
    """Of one step of a training: forward, loss, backward, update."""
    start_seconds: float
    """Of the fit of quantized weights, where the job has one."""
    kept_bytes: int = 0
    """What a step of a full batch keeps for its backward pass, parameters apart."""
    moments_bytes: int = 0
    """What a fit of the section's largest layer holds of its inputs' moments."""


def try_sections(
    job: Job, teacher: Teacher, plan: PartitionPlan, train: Part, device: torch.device
) -> tuple[SectionCosts, ...]:
    """Try every section of a plan on a few train images; the teacher stays as it is, and nothing is written."""
    torch.set_num_threads(job.train.num_threads)
    # As workers do: else the first passes pay for memory that later ones find.
    keep_freed_memory()
    traced = trace_teacher(teacher.module, torch.zeros(2, *plan.input_shape))
    sections = cut(traced, plan.cuts, copied=True)
    largest_bytes = max(4 * math.prod(boundary.shape) for boundary in plan.boundaries)
    num_rows = min(len(train), max(job.train.batch_size, FIT_SAMPLES), max(2, MAX_TRIAL_BYTES // largest_bytes))
    value, costs = train.images(np.arange(num_rows)).to(device), []
    for index, section in enumerate(sections):
        value, cost = _try_section(job, plan, index, section.to(device), value, device)
        costs.append(cost)
    return tuple(costs)


def _try_section(
    job: Job, plan: PartitionPlan, index: int, section: GraphModule, inputs: Tensor, device: torch.device
) -> tuple[Tensor, SectionCosts]:
    """What the teacher's section gives for these inputs, and its costs."""
    num_rows = len(inputs)
    batch_size = min(job.train.batch_size, plan.boundaries[0].num_samples)
    num_stepped = min(batch_size, num_rows)
    outputs, forward_seconds = _timed(lambda: _forward(section, inputs, job.data.batch_size), device)
    _, store_seconds = _timed(lambda: _store(outputs, job.storage.dtype), device)
    student, start_seconds = _started(job, plan, index, section, inputs, device)
    # Where fewer rows fit into memory than a batch has, theirs stand for it.
    times = batch_size / num_stepped
    step_seconds, kept_bytes = _step_costs(job, student, inputs[:num_stepped], outputs[:num_stepped], device)
    return outputs, SectionCosts(
        forward_seconds=forward_seconds / num_rows,
        store_seconds=store_seconds / num_rows,
        step_seconds=step_seconds * times,
        start_seconds=start_seconds,
        kept_bytes=math.ceil(kept_bytes * times),
        moments_bytes=fit_num_bytes(student, job.data.batch_size) if job.train.start == "fitted" else 0,
    )


def _forward(section: GraphModule, value: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        # Clones: a section may work in place on its input.
        return torch.cat([section(batch.clone()) for batch in _batches(value, batch_size)])


def _batches(rows: Tensor, batch_size: int) -> list[Tensor]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _store(outputs: Tensor, dtype: str) -> str:
    stored = outputs.to("cpu", torch.float16 if dtype == "float16" else torch.float32)
    return hashlib.sha256(stored.contiguous().numpy().tobytes()).hexdigest()


def _started(
    job: Job,
    plan: PartitionPlan,
    index: int,
    section: GraphModule,
    inputs: Tensor,
    device: torch.device,
) -> tuple[GraphModule, float]:
    """A student section, and the seconds that its fit on all its samples would take."""
    student: GraphModule = copy.deepcopy(section)
    layers = plan.sections[index].layers
    put_quantizers(student, layers, activation_starts(student, layers, [inputs[: job.data.batch_size].clone()]))
    if job.train.start != "fitted":
        return student, 0.0
    count = min(max(FIT_SAMPLES, job.data.batch_size), len(inputs))
    rows = [batch.clone() for batch in _batches(inputs[:count], job.data.batch_size)]

    fits, seconds = _timed(
        lambda: fit_weights(
            copy.deepcopy(student), section, [(row, row) for row in rows], seed=job.seed, clock=_clock(device)
        ),
        device,
    )
    fitting = max(1, MAX_START_INPUT_BYTES // (4 * math.prod(plan.boundaries[index].shape)))
    num_samples = min(fitting, job.train.start_samples, plan.boundaries[0].num_samples)
    seeing = sum(fit.seconds_seeing for fit in fits)
    return student, seconds + max(0, num_samples - count) / count * seeing


def _step_costs(
    job: Job, student: GraphModule, inputs: Tensor, targets: Tensor, device: torch.device
) -> tuple[float, int]:
    """Seconds of a step, and the bytes that it keeps for its backward pass."""
    training = Training(
        student,
        settings=job.train,
        num_steps=NUM_STEPS + 1,
        loss=loss_function(job.train.loss, temperature=job.train.temperature),
        device=device,
        what="a trial",
    )
    if not training.total:
        return 0.0, 0
    training.train()
    # The first step allocates what later ones use again.
    kept_bytes = kept_by(lambda: training.step(inputs.clone(), targets), student)
    return statistics.median(
        _timed(lambda: training.step(inputs.clone(), targets), device)[1] for _ in range(NUM_STEPS)
    ), kept_bytes


def kept_by(step: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the tensors that a step keeps for its backward pass, each once, the module's own parameters and buffers apart."""
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        step()
    return sum(found.values())


def _clock(device: torch.device) -> Callable[[], float]:
    # On one CPU thread that of the processor, whose seconds are the same whatever else the machine does.
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What the work gives, and its seconds."""
    clock = _clock(device)
    started = clock()
    value = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return value, clock() - started
