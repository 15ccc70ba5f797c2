"""Prepare: images, teacher and plan of a job, checked before anything costly begins.

The plan is a pure function of the job, the teacher and measured costs; the costs are measured once and kept in the cache,
so that the same job is cut in the same way again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dcq_ray.callables import importable_from
from dcq_ray.data import Part, Splits, load_splits, ordered_batches
from dcq_ray.digests import json_sha256, library_versions
from dcq_ray.errors import DataError, TeacherError
from dcq_ray.partition import (
    CutCosts,
    TracedTeacher,
    assert_composition,
    choose_cuts,
    cut,
    describe_section,
    directly_called,
    measure_costs,
    prefix_digests,
    quantizable_layers,
    section_costs,
    section_multiply_accumulates,
    trace_teacher,
)
from dcq_ray.phases.context import Emit, save_teacher
from dcq_ray.phases.fit import fit_teacher, fitted_teacher
from dcq_ray.quantizers import LayerSite, packed_num_bytes, plan_layers
from dcq_ray.records import Boundary, LayerPlan, PartitionPlan, Progress, SectionPlan, seal_json, unseal_json
from dcq_ray.spec import Job
from dcq_ray.storage import Store, open_store
from dcq_ray.teacher import Teacher, load_teacher
from dcq_ray.validate import predict, top_k

# Costs are of one batch of this many images at most: enough to rank sections, short on a large network.
COST_BATCH_SIZE = 32
COST_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that is known before the dump."""

    teacher: Teacher
    splits: Splits
    plan: PartitionPlan
    held_out_top1: float | None
    teacher_cpu_seconds: float


def prepare(
    job: Job, job_folder: str, *, device: torch.device, emit: Emit, earlier: PartitionPlan | None = None
) -> Prepared:
    """Load the images, load or fit the teacher, refuse a bad one, and cut it; writes to the cache only.

    Args:
        earlier: the plan of an earlier run of this job, taken over where its key still fits.
    """
    start_cpu_seconds = time.process_time()
    # The driver of a GPU cluster may itself have none; the plan is then made on its CPU for the workers' GPUs.
    here = device if device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(job.train.num_threads)
    importable_from(job_folder)
    splits = load_splits(job.data, seed=job.seed, job_folder=job_folder)
    if job.train.last_loss == "cross-entropy" and splits.train.labels is None:
        raise DataError(
            "train.last_loss: cross-entropy needs labels, but the train images have none; use distillation, or give labels"
        )
    cache = open_store(job.storage.cache_dir)
    if job.teacher.fit is not None:
        # What is wrong with cuts or bits is told before hours of fitting, not after.
        plan_job(job, planning_teacher(job, job_folder, splits, cache, here), splits, device=device, cache=cache)
    teacher = obtain_teacher(job, job_folder, splits, cache, device=here, emit=emit)
    save_teacher(cache, teacher)
    plan = plan_job(job, teacher, splits, device=device, cache=cache, earlier=earlier, save_costs=True)
    top1 = teacher_top1(teacher, splits.held_out, job.data.batch_size, device=here, cache=cache)
    check_teacher(job, splits, top1)
    return Prepared(
        teacher=teacher,
        splits=splits,
        plan=plan,
        held_out_top1=top1,
        teacher_cpu_seconds=time.process_time() - start_cpu_seconds,
    )


def obtain_teacher(
    job: Job, job_folder: str, splits: Splits, cache: Store, *, device: torch.device, emit: Emit
) -> Teacher:
    """The teacher of a job: loaded, and fitted on the train part where the job says so."""
    with torch.random.fork_rng():
        # A teacher without a weights file starts from the initialisation that the seed gives.
        torch.manual_seed(job.seed)
        teacher = load_teacher(job.teacher, job_folder=job_folder)
    if job.teacher.fit is None:
        return teacher
    return fit_teacher(job, teacher, splits, cache, device=device, emit=emit)


def planning_teacher(job: Job, job_folder: str, splits: Splits, cache: Store, device: torch.device) -> Teacher:
    """The teacher that a plan is shown for; one that is still to be fitted is shown as it starts, and nothing is written."""
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        teacher = load_teacher(job.teacher, job_folder=job_folder)
    fitted = None if job.teacher.fit is None else fitted_teacher(job, teacher, splits, cache, device=device)
    return teacher if fitted is None else fitted


def plan_job(
    job: Job,
    teacher: Teacher,
    splits: Splits,
    *,
    device: torch.device,
    cache: Store,
    earlier: PartitionPlan | None = None,
    save_costs: bool = False,
) -> PartitionPlan:
    """Cut the teacher as the job asks, and assert that the sections compose to it bit for bit."""
    torch.set_num_threads(job.train.num_threads)
    example = example_images(job, splits)
    traced = trace_teacher(teacher.module, example)
    if splits.num_classes is not None and splits.num_classes > traced.output_shape[0]:
        raise TeacherError(
            f"teacher.model: {job.teacher.model} has {traced.output_shape[0]} outputs, but the data have labels up to "
            f"{splits.num_classes - 1}; set its number of classes under teacher.args"
        )
    network_sha256 = prefix_digests(traced, ())[-1]
    key = plan_key(job, network_sha256, splits, device)
    if earlier is not None and earlier.key == key:
        cuts: Sequence[str] = earlier.cuts
    else:
        earlier = None
        costs = cutting_costs(job, network_sha256, traced, example, device=device, cache=cache, save=save_costs)
        cuts = choose_cuts(traced, job.sections, costs)
    sections = cut(traced, cuts, copied=False)
    assert_composition(teacher.module, sections, example)
    if earlier is not None:
        return earlier
    sites = layer_sites(teacher, traced, sections)
    layers = {layer.module: layer for layer in plan_layers(sites, job.quantize)}
    parameters = dict(teacher.module.named_parameters())
    running = {name for section in sections for name in section.state_dict()}
    unquantized = _unquantized({name: value for name, value in parameters.items() if name in running}, layers)
    shapes = [tuple(example.shape[1:])]
    value = example
    with torch.no_grad():
        for section in sections:
            value = section(value.clone())
            shapes.append(tuple(value.shape[1:]))
    digests = prefix_digests(traced, cuts)
    boundary_names = ("input", *cuts, "output")
    boundaries = tuple(
        Boundary(
            index=index,
            cut=boundary_names[index],
            shape=shapes[index],
            num_samples=len(splits.train),
            dtype=job.storage.dtype,
            digest=json_sha256(
                {
                    "prefix": digests[index],
                    "cut": boundary_names[index],
                    "samples": splits.train.sha256,
                    "dtype": job.storage.dtype,
                    "batch_size": job.data.batch_size,
                    "num_threads": job.train.num_threads,
                    "device": device.type,
                    "versions": library_versions(),
                }
            ),
        )
        for index in range(len(shapes))
    )
    macs = section_multiply_accumulates(traced, cuts)
    seconds = section_costs(traced, costs, cuts)
    return PartitionPlan(
        key=key,
        teacher_sha256=teacher.sha256,
        teacher_num_bytes=teacher.num_bytes,
        input_shape=tuple(example.shape[1:]),
        boundaries=boundaries,
        sections=tuple(
            _section_plan(index, section, layers, *seconds[index], macs[index])
            for index, section in enumerate(sections)
        ),
        unquantized_parameters=unquantized,
        num_parameters=sum(value.numel() for value in parameters.values()),
        num_unquantized=sum(parameters[name].numel() for name in unquantized),
        unused_parameters=tuple(name for name in parameters if name not in running),
        uncalled_layers=tuple(site.name for site in sites if not site.called),
        num_bytes_packed=packed_num_bytes(teacher.module.state_dict(), tuple(layers.values())),
        total_multiply_accumulates=traced.total_multiply_accumulates,
    )


def example_images(job: Job, splits: Splits) -> torch.Tensor:
    """A batch of train images [B, C, H, W], on which a teacher is traced."""
    return splits.train.images(np.arange(min(len(splits.train), job.data.batch_size)))


def layer_sites(teacher: Teacher, traced: TracedTeacher, sections: Sequence[torch.fx.GraphModule]) -> list[LayerSite]:
    """The layers that may be quantized, where they are."""
    return [
        LayerSite(
            name=name,
            module=teacher.module.get_submodule(name),
            section=index,
            multiply_accumulates=traced.layer_multiply_accumulates.get(name, 0),
            called=name in directly_called(section),
        )
        for index, section in enumerate(sections)
        for name, _ in quantizable_layers(section)
    ]


def plan_key(job: Job, network_sha256: str, splits: Splits, device: torch.device) -> str:
    """Digest of all that a plan is made from, measured costs aside."""
    return json_sha256(
        {
            "network": network_sha256,
            "samples": splits.train.sha256,
            "sections": job.sections.model_dump(mode="json"),
            "quantize": job.quantize.model_dump(mode="json"),
            "dtype": job.storage.dtype,
            "batch_size": job.data.batch_size,
            "num_threads": job.train.num_threads,
            "device": device.type,
            "versions": library_versions(),
        }
    )


def cutting_costs(
    job: Job,
    network_sha256: str,
    traced: TracedTeacher,
    example: torch.Tensor,
    *,
    device: torch.device,
    cache: Store,
    save: bool,
) -> CutCosts:
    """The cached costs of the pieces between candidate cuts, measured where there are none."""
    key = json_sha256(
        {
            "network": network_sha256,
            "shape": list(example.shape[1:]),
            "num_threads": job.train.num_threads,
            "device": device.type,
            "versions": library_versions(),
        }
    )
    store = cache.child("costs")
    content = store.read_bytes_or_none(f"{key}.json")
    if content is not None:
        try:
            return unseal_json(CutCosts, content)
        except ValueError:
            # A damaged measurement is measured again.
            pass
    costs = measure_costs(traced, example[:COST_BATCH_SIZE], repeats=COST_REPEATS)
    if save:
        store.write_bytes(f"{key}.json", seal_json(costs))
    return costs


def part_top1(
    module: torch.nn.Module, part: Part, batch_size: int, device: torch.device, *, num_at_once: int = 1
) -> float | None:
    """Top-1 accuracy on a part, or None where it has no labels; `num_at_once`: as of `dcq_ray.validate.predict`."""
    if part.labels is None:
        return None
    images = (images for images, _ in ordered_batches(part, batch_size))
    logits = predict(module, images, device, num_at_once=num_at_once)
    return top_k(logits, torch.from_numpy(part.labels), 1)


def teacher_top1(teacher: Teacher, part: Part, batch_size: int, *, device: torch.device, cache: Store) -> float | None:
    """The teacher's top-1 on a part, kept in the cache for every run with this teacher; None where it has no labels."""
    if part.labels is None:
        return None
    key = json_sha256({"held_out": part.sha256, "batch_size": batch_size, "device": device.type})
    store = cache.child("teachers", teacher.sha256)
    content = store.read_bytes_or_none(f"top1-{key}.json")
    if content is not None:
        try:
            return unseal_json(float, content)
        except ValueError:
            pass
    top1 = part_top1(teacher.module, part, batch_size, device)
    store.write_bytes(f"top1-{key}.json", seal_json(top1))
    return top1


def check_teacher(job: Job, splits: Splits, top1: float | None) -> None:
    """Refuse a teacher that is hardly better than chance on held-out images; raises TeacherError."""
    if top1 is None or splits.num_classes is None:
        return
    wanted = 1.5 / splits.num_classes if job.teacher.min_top1 == "auto" else job.teacher.min_top1
    if top1 < wanted:
        raise TeacherError(
            f"teacher.model: {job.teacher.model} scores {100 * top1:.1f} % top-1 on the {len(splits.held_out)} held-out "
            f"images, expected at least {100 * wanted:.1f} % (teacher.min_top1: {job.teacher.min_top1}); check its "
            "weights, data.normalize, data.image_size and the order of classes, train it (teacher.fit), or switch this "
            "check off with min_top1: 0"
        )


def prepared_progress(prepared: Prepared) -> Progress:
    """The line that says what was prepared."""
    plan = prepared.plan
    top1 = (
        "" if prepared.held_out_top1 is None else f", teacher {100 * prepared.held_out_top1:.1f} % on held-out images"
    )
    return Progress(phase="plan", state="done", detail=f"{len(plan.sections)} sections{top1}")


def _section_plan(
    index: int,
    section: torch.fx.GraphModule,
    layers: dict[str, LayerPlan],
    forward_seconds: float,
    step_seconds: float,
    multiply_accumulates: int,
) -> SectionPlan:
    modules, num_parameters = describe_section(section)
    return SectionPlan(
        index=index,
        modules=modules,
        layers=tuple(layers[name] for name, _ in quantizable_layers(section)),
        num_parameters=num_parameters,
        forward_seconds=forward_seconds,
        step_seconds=step_seconds,
        multiply_accumulates=multiply_accumulates,
    )


def _unquantized(parameters: Mapping[str, torch.Tensor], layers: Mapping[str, LayerPlan]) -> tuple[str, ...]:
    reached = {f"{name}.weight" for name in layers}
    return tuple(name for name, value in parameters.items() if value.ndim >= 2 and name not in reached)
