"""`dcq-ray plan` and `dcq-ray teacher`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import click

from dcq_ray.cli.options import debug_option, job_argument, log_format_option, read_job, run_dir_option, set_option

if TYPE_CHECKING:
    from dcq_ray.phases import Emit
    from dcq_ray.records import Progress


BYTES_PER_GIGABYTE = 1e9


@click.command(epilog="\b\nExample:\n  dcq-ray plan jobs/quickstart.yaml --workers 4")
@job_argument
@set_option
@run_dir_option
@click.option(
    "--workers", type=click.IntRange(min=1), help="Predict for so many workers; default: this machine's cores."
)
@click.option(
    "--stand-in",
    type=click.IntRange(min=1),
    metavar="IMAGES",
    help="The data are not here: plan for so many train images, with noise in their place.",
)
@click.option(
    "--images-per-second",
    type=click.FloatRange(min=0, min_open=True),
    help="The workers are not here: on one of them the teacher's forward pass runs at so many images a second.",
)
@click.option(
    "--storage-speed",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="What all workers together read or write a second, in 10^9 bytes; default: it is never waited for.",
)
@click.option("--price", type=click.FloatRange(min=0), help="Of one worker for an hour, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def plan(
    job_path: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    workers: int | None,
    stand_in: int | None,
    images_per_second: float | None,
    storage_speed: float | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Show the sections, bits, bytes on disk and predicted seconds; evaluates nothing, writes nothing.

    Where the job trains its teacher (teacher.fit), the untrained network stands in for it, unless an earlier run fitted it.
    For machines that are not here, how costs are to each other is measured here, and how fast a worker, or the storage, is
    there is what you say.
    """
    job, folder = read_job(job_path, overrides, run_dir)
    import torch
    from rich.console import Console

    from dcq_ray.cli.plan_table import print_memory, print_outlook, print_plan, print_storage
    from dcq_ray.data import load_splits, stand_in_splits
    from dcq_ray.phases import (
        choose_device,
        dump_footprint,
        outlook,
        plan_job,
        planning_teacher,
        predict,
        sample_counts,
        scaled,
        section_footprint,
        try_sections,
    )
    from dcq_ray.records import to_jsonable
    from dcq_ray.storage import open_store

    device = torch.device("cpu") if job.resources.gpus_per_section == 0 else choose_device("auto")
    if stand_in is None:
        splits = load_splits(job.data, seed=job.seed, job_folder=folder)
    else:
        splits = stand_in_splits(job.data, stand_in, job_folder=folder)
    cache = open_store(job.storage.cache_dir)
    teacher = planning_teacher(job, folder, splits, cache, device)
    made = plan_job(job, teacher, splits, device=device, cache=cache)
    costs = try_sections(job, teacher, made, splits.train, device)
    there = costs if images_per_second is None else scaled(costs, images_per_second)
    prediction = predict(there, job, sample_counts(splits), workers or os.cpu_count() or 1)
    speed = None if storage_speed is None else BYTES_PER_GIGABYTE * storage_speed
    expected = outlook(made, job, prediction, storage_bytes_per_second=speed, price_per_hour=price)
    sections = [section_footprint(made, job, section.index, costs, 0) for section in made.sections]
    dump = dump_footprint(made, job, costs)
    if as_json:
        document = {
            "plan": to_jsonable(made),
            "multiply_accumulates_by_bits": [to_jsonable(work) for work in made.multiply_accumulates_by_bits],
            "unquantized_share": made.unquantized_share,
            "prediction": to_jsonable(prediction),
            "outlook": to_jsonable(expected),
            "memory_bytes": {"sections": [section.num_bytes for section in sections], "dump": dump.num_bytes},
        }
        click.echo(json.dumps(document, indent=2))
    else:
        console = Console()
        print_plan(made, prediction, job, console)
        print_memory(sections, dump, console)
        print_storage(expected, job, console)
        if (images_per_second, storage_speed, price) != (None, None, None):
            print_outlook(expected, console, images_per_second=images_per_second, measured=costs)


@click.command(epilog="\b\nExample:\n  dcq-ray teacher jobs/quickstart.yaml")
@job_argument
@set_option
@run_dir_option
@log_format_option
@debug_option
def teacher(
    job_path: str, overrides: tuple[str, ...], run_dir: str | None, log_format: Literal["text", "json"]
) -> None:
    """Train or fine-tune the full-precision teacher where the job says so, and evaluate it.

    Interrupted, it goes on from its newest checkpoint when it is run again.
    """
    job, folder = read_job(job_path, overrides, run_dir)
    import torch

    from dcq_ray.cli.run import interruptible, watching
    from dcq_ray.data import load_splits
    from dcq_ray.phases import choose_device, obtain_teacher, part_top1
    from dcq_ray.storage import open_store

    device = torch.device("cpu") if job.resources.gpus_per_section == 0 else choose_device("auto")
    with watching(job, log_format) as (show, say), interruptible(job, kept_in=job.storage.cache_dir):
        emit = _telling(show, say)
        torch.set_num_threads(job.train.num_threads)
        splits = load_splits(job.data, seed=job.seed, job_folder=folder)
        made = obtain_teacher(job, folder, splits, open_store(job.storage.cache_dir), device=device, emit=emit)
        module = made.module.to(device)
        held_out = part_top1(module, splits.held_out, job.data.batch_size, device)
        test = None if splits.test is None else part_top1(module, splits.test, job.data.batch_size, device)
    if log_format == "json":
        row = {"model": made.model, "sha256": made.sha256, "num_bytes": made.num_bytes}
        click.echo(json.dumps({**row, "held_out_top1": held_out, "test_top1": test}))
        return
    click.echo(f"teacher   {made.model}, {made.num_bytes:,} bytes, sha256 {made.sha256[:12]}")
    for name, top1, part in (("held-out", held_out, splits.held_out), ("test", test, splits.test)):
        if part is not None:
            told = "no labels" if top1 is None else f"top-1 {100 * top1:.2f} %"
            click.echo(f"{name:9} {told} of {len(part)} images")


def _telling(show: Emit, say: Callable[[str], None]) -> Emit:
    """Say each new detail of the teacher's line, too: what an epoch gave stays on the screen and in every log."""
    told = ""

    def emit(progress: Progress) -> None:
        nonlocal told
        show(progress)
        if progress.phase == "teacher" and progress.state == "running" and progress.detail not in ("", told):
            told = progress.detail
            say(f"teacher: {told}")

    return emit
