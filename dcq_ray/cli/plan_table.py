"""The plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dcq_ray.phases import Footprint, Outlook, Prediction, SectionCosts, plan_notes, recomputes
from dcq_ray.records import PartitionPlan
from dcq_ray.report import layers_table, size, work_table
from dcq_ray.spec import Job


def print_plan(plan: PartitionPlan, prediction: Prediction, job: Job, console: Console) -> None:
    """Sections, layers and boundaries, what they need on disk, and how long they should take."""
    sections = Table(title=f"{job.name}: {len(plan.sections)} sections of {job.teacher.model}", title_justify="left")
    for name in ("section", "modules", "parameters", "bits", "MACs/sample", "predicted s"):
        sections.add_column(name, justify="left" if name == "modules" else "right", overflow="fold")
    for section, seconds in zip(plan.sections, prediction.section_seconds, strict=True):
        modules = section.modules
        told = modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}" if modules else "-"
        sections.add_row(
            str(section.index),
            told,
            f"{section.num_parameters:,}",
            "-" if section.bits == 32 else f"{section.bits:.2f}",
            f"{section.multiply_accumulates:,}",
            f"{seconds:.1f}",
        )
    console.print(sections)
    boundaries = Table(title="boundaries", title_justify="left")
    for name in ("boundary", "after", "shape", "bytes on disk"):
        boundaries.add_column(
            name, justify="right" if name in ("boundary", "bytes on disk") else "left", overflow="fold"
        )
    for boundary in plan.boundaries:
        shape = "x".join(str(extent) for extent in boundary.shape)
        stored = "recomputed" if recomputes(job) else size(boundary.num_bytes)
        boundaries.add_row(str(boundary.index), boundary.cut, shape, stored)
    boundaries.add_section()
    if recomputes(job):
        boundaries.add_row("", "all, recomputed: nothing is stored", "", size(0))
    else:
        total = sum(boundary.num_bytes for boundary in plan.boundaries)
        boundaries.add_row("", f"all, {job.storage.dtype}, before compression", "", size(total))
    console.print(boundaries)
    console.print(layers_table(plan.layers))
    console.print(work_table(plan.multiply_accumulates_by_bits))
    console.print(
        f"the whole model: {size(plan.teacher_num_bytes)} in full precision, {size(plan.num_bytes_packed)} packed, 1/"
        f"{plan.teacher_num_bytes / plan.num_bytes_packed:.1f}"
    )
    for note in plan_notes(plan, job):
        console.print(note, markup=False)
    console.print(
        f"on {prediction.num_workers} workers: dump {prediction.dump_seconds:.1f} s, training "
        f"{prediction.train_seconds:.1f} s, merge {prediction.reduce_seconds:.1f} s, together "
        f"{prediction.makespan_seconds:.1f} s (predicted from a few steps of every section)"
    )
    console.print(f"to pin these sections: sections: {{cuts: [{', '.join(plan.cuts)}]}}", markup=False, soft_wrap=True)


def print_memory(sections: Sequence[Footprint], dump: Footprint, console: Console) -> None:
    """How much a worker holds at most."""
    largest = max(range(len(sections)), key=lambda index: sections[index].num_bytes)
    console.print(
        f"memory of a worker on a CPU: at most {size(sections[largest].num_bytes)} for a section (section {largest}) and what "
        f"resources.memory_per_section lets it keep of activations; at most {size(dump.num_bytes)} for the dump"
    )


def print_storage(found: Outlook, job: Job, console: Console) -> None:
    """What is written and read."""
    kept, read = size(found.kept_read_bytes), size(found.read_bytes)
    console.print(
        f"storage: {size(found.written_bytes)} written by the dump; sections read {kept} where their activations stay in memory, "
        f"else {read} over {job.train.epochs} epochs"
    )


def print_outlook(
    found: Outlook, console: Console, *, images_per_second: float | None, measured: Sequence[SectionCosts]
) -> None:
    """Seconds and cost on machines that are not here; what of it is measured, and what is assumed."""
    here = 1 / sum(cost.forward_seconds for cost in measured)
    told = "as many" if images_per_second is None else f"{images_per_second:,.0f} assumed"
    console.print(
        f"the teacher's forward pass: {here:,.1f} images/s measured here on one worker, {told} on those of the run. There, on "
        f"{found.num_workers} workers: dump {found.dump_seconds:,.0f} s (limited by {found.dump_limit}), training "
        f"{found.train_seconds:,.0f} s on {found.num_training} of them ({found.train_limit}), merge {found.reduce_seconds:,.0f} s, "
        f"together {found.seconds:,.0f} s"
    )
    if found.cost is not None:
        console.print(f"cost: {found.cost:,.2f} for {found.num_workers} workers, in the unit of --price")
