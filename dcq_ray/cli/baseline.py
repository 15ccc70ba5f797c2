"""`dcq-ray baseline`."""

from __future__ import annotations

import json
from typing import Literal

import click

from dcq_ray.cli.options import debug_option, job_argument, log_format_option, read_job, run_dir_option, set_option


@click.command(epilog="\b\nExample:\n  dcq-ray baseline jobs/mnist-lenet-w1.yaml --method distill --budget cpu-seconds")
@job_argument
@set_option
@run_dir_option
@click.option(
    "--method",
    type=click.Choice(["dorefa", "distill", "hints", "sequential"]),
    default="dorefa",
    show_default=True,
    help="dorefa: the whole network on labels; distill: on labels and the teacher's logits; hints: its first half on the "
    "teacher's activations, then distill; sequential: section by section on what the ones before give.",
)
@click.option(
    "--budget",
    type=click.Choice(["passes", "cpu-seconds"]),
    default="passes",
    show_default=True,
    help="passes: as many sample passes as a section has; cpu-seconds: as many steps as fit into what the finished run took.",
)
@log_format_option
@debug_option
def baseline(
    job_path: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    method: str,
    budget: Literal["passes", "cpu-seconds"],
    log_format: Literal["text", "json"],
) -> None:
    """Train a rival from the same teacher, data and quantizer; its row goes beside the run's.

    It gets the best of three learning rates by held-out images: the job's, and that times 0.3 and 3.
    """
    job, folder = read_job(job_path, overrides, run_dir)
    from dcq_ray.cli.run import interruptible, run_rival, show_report, watching

    with watching(job, log_format) as (emit, _), interruptible(job):
        result = run_rival(job, folder, emit, method, budget)
    if result is not None:
        show_report(job, result, log_format)
        return
    from dcq_ray.storage import open_store

    kept = open_store(job.storage.run_dir).read_bytes(f"baselines/{method}-{budget}.json")
    click.echo(json.dumps(json.loads(kept), indent=2))
    click.echo(f"the run itself is not finished: `dcq-ray run {job_path}` puts this row beside its own", err=True)
