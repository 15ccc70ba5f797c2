"""`dcq-ray export`: the student of a finished run in a form to ship."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dcq_ray.cli.options import debug_option, read_run_job, set_option
from dcq_ray.errors import UsageError

if TYPE_CHECKING:
    from dcq_ray.export import Form, Student
    from dcq_ray.storage import Store


@click.command(
    epilog="\b\nExample:\n  dcq-ray export runs/quickstart --format packed -o student.dcq"
    "\n  dcq-ray export runs/quickstart --format onnx -o student.onnx --latency"
)
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "packed", "onnx", "torch-export"]),
    required=True,
    help="safetensors: quantized weights as floats, for the teacher's own class; packed: in bits, for dcq_ray.load; onnx; or "
    "torch-export, a program for torch.export.load.",
)
@click.option("-o", "--output", type=click.Path(), required=True, metavar="FILE", help="A local file.")
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Of --format onnx.")
@click.option(
    "--latency",
    is_flag=True,
    help="Of --format onnx: measure it here beside the teacher's, with one thread; `report` shows it.",
)
@set_option
@debug_option
def export(run: str, form: Form, output: str, opset: int | None, latency: bool, overrides: tuple[str, ...]) -> None:
    """Write the student of a finished run as one file.

    The file is run on the run's held-out images at once, and is kept only where it gives the student's results.
    """
    if opset is not None and form != "onnx":
        raise UsageError(f"--opset {opset}: only --format onnx has an opset; got --format {form}")
    if latency and form != "onnx":
        raise UsageError(f"--latency: only --format onnx is measured; got --format {form}")
    if Path(output).is_dir():
        raise UsageError(f"-o {output}: is a folder, expected a file")

    from dcq_ray.export import export_student, finished_report, open_student
    from dcq_ray.storage import open_store

    store = open_store(run)
    report = finished_report(store)
    job = read_run_job(store.read_bytes("job.yaml"), store.location("job.yaml"), overrides)
    # The job's own folder is not recorded; its modules must be importable from here.
    student = open_student(store, report, job, job_folder=str(Path.cwd()))
    done = export_student(student, form, output, opset=opset)
    top1 = student.metadata.get("held_out_top1")
    told = "the student's predictions" if top1 is None else f"the student's top-1 of {100 * float(top1):.2f} %"
    click.echo(
        f"wrote {output}: {done.num_bytes:,} bytes, 1/{done.num_float_bytes / done.num_bytes:.1f} of full precision; run on "
        f"{done.num_samples} held-out images: {told}, logits within {done.largest_difference:.1e} of the largest"
    )
    if latency:
        _measure(store, student, output)


def _measure(store: Store, student: Student, output: str) -> None:
    """Measure an exported graph, keep it in the run, and tell."""
    from rich.console import Console

    from dcq_ray.export.latency import measure_deploy
    from dcq_ray.records import to_json
    from dcq_ray.records.deploy import DEPLOY_FILE
    from dcq_ray.report.deploy import print_deploy

    deploy = measure_deploy(student, output)
    store.write_bytes(DEPLOY_FILE, to_json(deploy))
    print_deploy(deploy, Console())
