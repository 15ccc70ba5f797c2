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


@click.command(epilog="\b\nExample:\n  dcq-ray plan jobs/quickstart.yaml --workers 4")
@job_argument
@set_option
@run_dir_option
@click.option(
    "--workers", type=click.IntRange(min=1), help="Predict for so many workers; default: this machine's cores."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def plan(job_path: str, overrides: tuple[str, ...], run_dir: str | None, workers: int | None, as_json: bool) -> None:
    """Show the sections, bits, bytes on disk and predicted seconds; evaluates nothing, writes nothing.

    Where the job trains its teacher (teacher.fit), the untrained network stands in for it, unless an earlier run fitted it.
    """
    job, folder = read_job(job_path, overrides, run_dir)
    import torch
    from rich.console import Console

    from dcq_ray.cli.plan_table import print_plan
    from dcq_ray.data import load_splits
    from dcq_ray.phases import choose_device, plan_job, planning_teacher, predict, sample_counts, try_sections
    from dcq_ray.records import to_jsonable
    from dcq_ray.storage import open_store

    device = torch.device("cpu") if job.resources.gpus_per_section == 0 else choose_device("auto")
    splits = load_splits(job.data, seed=job.seed, job_folder=folder)
    cache = open_store(job.storage.cache_dir)
    teacher = planning_teacher(job, folder, splits, cache, device)
    made = plan_job(job, teacher, splits, device=device, cache=cache)
    costs = try_sections(job, teacher, made, splits.train, device)
    prediction = predict(costs, job, sample_counts(splits), workers or os.cpu_count() or 1)
    if as_json:
        document = {
            "plan": to_jsonable(made),
            "multiply_accumulates_by_bits": [to_jsonable(work) for work in made.multiply_accumulates_by_bits],
            "unquantized_share": made.unquantized_share,
            "prediction": to_jsonable(prediction),
        }
        click.echo(json.dumps(document, indent=2))
    else:
        print_plan(made, prediction, job, Console())


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
