"""What a section's training leaves: the task that it answers, an attempt folder with the weights, and the result that names it.

A result counts for the task whose digest it bears, and only with weights that match it.
"""

from __future__ import annotations

import copy
import traceback
import uuid

import torch
from torch import Tensor
from torch.fx import GraphModule

from dcq_ray.digests import json_sha256, library_versions, tensors_sha256
from dcq_ray.errors import DcqError, StorageError
from dcq_ray.phases.context import WEIGHTS_FILE, Network, choose_device, refuse_stale, section_store
from dcq_ray.phases.objective import section_objective
from dcq_ray.phases.reading import section_boundaries
from dcq_ray.phases.views import recomputes
from dcq_ray.quantizers import put_quantizers
from dcq_ray.records import (
    LayerPlan,
    RunContext,
    SectionFailure,
    SectionResult,
    SectionTask,
    seal_json,
    unseal_json,
)
from dcq_ray.section import TrainingResult
from dcq_ray.teacher import state_bytes, state_from_bytes

RESULT_FILE = "result.json"


def section_tasks(context: RunContext) -> tuple[SectionTask, ...]:
    """The tasks of a plan; a task's digest covers all that determines its result."""
    plan, job = context.plan, context.job
    tasks: list[SectionTask] = []
    streamed = job.train.inputs == "student"
    ignored = {"loss", "last_loss", "look_ahead"} | (set() if streamed else {"anneal", "stagger"})
    if job.train.start == "nearest":
        ignored.add("start_samples")
    for section in plan.sections:
        objective = section_objective(context, section.index)
        settings = job.train.model_dump(mode="json", exclude=ignored)
        content = {
            "index": section.index,
            # What a section gives on streamed inputs depends on all sections before it, and on where it stands among all.
            "before": tasks[-1].digest if streamed and tasks else None,
            "num_sections": len(plan.sections) if streamed else None,
            "boundaries": [boundary.digest for boundary in section_boundaries(context, section.index)],
            "losses": objective.loss_names,
            "layers": [layer_identity(layer) for layer in section.layers],
            "train": settings,
            "seed": job.seed,
            "device": context.device,
            "versions": library_versions(),
        }
        if recomputes(job):
            # In float32, and of other batches than the dump's: equal to what is stored but for rounding.
            content["activations"] = "recomputed"
        tasks.append(SectionTask(index=section.index, digest=json_sha256(content)))
    return tuple(tasks)


def layer_identity(layer: LayerPlan) -> list[str | int | None]:
    """All of a layer's plan that its student depends on."""
    return [layer.module, layer.scheme, layer.bits, layer.activation_scheme, layer.activation_bits]


def finished_section(context: RunContext, task: SectionTask) -> SectionResult | None:
    """The result that an earlier run committed for this very task, or None; weights that do not match do not count."""
    content = section_store(context, task.index).read_bytes_or_none(RESULT_FILE)
    if content is None:
        return None
    try:
        result = unseal_json(SectionResult, content)
        if result.task_digest == task.digest and result.index == task.index:
            section_weights(context, result)
            return result
    except (ValueError, StorageError):
        # A damaged result or damaged weights: the section is trained again.
        pass
    return None


def section_weights(context: RunContext, result: SectionResult) -> dict[str, Tensor]:
    """The trained state of a section under the teacher's names; raises StorageError where it is damaged."""
    store = section_store(context, result.index).child(result.attempt)
    source = store.location(WEIGHTS_FILE)
    try:
        state = state_from_bytes(store.read_bytes(WEIGHTS_FILE), source=source)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(
            f"{source}: not a safetensors file ({error}); run again to train section {result.index}"
        ) from error
    if tensors_sha256(state) != result.weights_sha256:
        raise StorageError(
            f"{source}: the tensors are not those of {RESULT_FILE} (sha256 differs); run again to train section {result.index}"
        )
    return state


def trained_section(context: RunContext, result: SectionResult, network: Network) -> GraphModule:
    """A trained section, on the teacher's own graph, in eval mode."""
    module: GraphModule = copy.deepcopy(network.sections[result.index])
    put_quantizers(module, context.plan.sections[result.index].layers, trained=True)
    module.load_state_dict(section_weights(context, result))
    module.eval().requires_grad_(False)
    return module


def commit_section(
    context: RunContext,
    task: SectionTask,
    module: torch.nn.Module,
    result: TrainingResult,
    *,
    seconds: float,
    cpu_seconds: float,
    restarts: int,
    read_seconds: float = 0.0,
    start_seconds: float = 0.0,
    kept_start: bool = False,
) -> SectionResult:
    """Write a trained section's weights into an attempt of its own and, last, the result that names it.

    Raises:
        StaleRunError: another driver holds the run directory now; no result is written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    attempt = f"{context.epoch}-{uuid.uuid4().hex[:8]}"
    store = section_store(context, task.index)
    sha256 = tensors_sha256(state)
    store.child(attempt).write_bytes(WEIGHTS_FILE, state_bytes(state, {"section": str(task.index), "sha256": sha256}))
    committed = SectionResult(
        index=task.index,
        task_digest=task.digest,
        epoch=context.epoch,
        attempt=attempt,
        weights_sha256=sha256,
        initial_loss=result.initial_loss,
        final_loss=result.final_loss,
        num_steps=result.num_steps,
        num_sample_passes=result.num_sample_passes,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        input_wait_seconds=result.input_wait_seconds,
        device=str(choose_device(context.device)),
        restarts=restarts,
        loss_curve=result.loss_curve,
        read_seconds=read_seconds,
        start_seconds=start_seconds,
        kept_start=kept_start,
    )
    refuse_stale(context)
    store.write_bytes(RESULT_FILE, seal_json(committed))
    return committed


def section_failure(task: SectionTask, error: Exception) -> SectionFailure:
    """What the report says of a section that failed; call it while the exception is handled."""
    told = str(error) if isinstance(error, DcqError) else f"section {task.index}: {type(error).__name__}: {error}"
    return SectionFailure(
        index=task.index, error_type=type(error).__name__, message=told, traceback=traceback.format_exc()
    )
