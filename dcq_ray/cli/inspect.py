"""Commands that look at runs: `report`, `status`, `ls`, `eval`, and the job file's JSON schema."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dcq_ray.cli.options import SEARCH_FILE, debug_option, read_run_job, set_option
from dcq_ray.errors import StorageError, UsageError

if TYPE_CHECKING:
    from dcq_ray.records import RunReport
    from dcq_ray.records.deploy import DeployReport
    from dcq_ray.search import Searched
    from dcq_ray.storage import Store


@click.command(epilog="\b\nExample:\n  dcq-ray report runs/quickstart --html quickstart.html")
@click.argument("runs", metavar="RUN…", nargs=-1, required=True)
@click.option("--html", type=click.Path(), metavar="FILE", help="Write one self-contained page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def report(runs: tuple[str, ...], html: str | None, as_json: bool) -> None:
    """The report of a run, or of several side by side."""
    from rich.console import Console

    from dcq_ray.phases import read_report
    from dcq_ray.report import compare_reports, print_front, print_report, report_html, report_json
    from dcq_ray.storage import open_store

    found, searched = [], None
    for run in runs:
        store = open_store(run)
        one = read_report(store)
        if one is None:
            raise StorageError(
                f"{run}: no report.json that can be read there; is it a run directory, and did the run start?"
            )
        found.append(replace(one, deploy=_deploy(store, one)))
        searched = _searched(store)
    if html is not None:
        if len(found) > 1:
            raise UsageError("--html takes one run; got " + ", ".join(runs))
        target = Path(html).resolve()
        open_store(str(target.parent)).write_bytes(target.name, report_html(found[0], searched).encode())
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(report_json(found[0]) if len(found) == 1 else "[" + ",\n".join(map(report_json, found)) + "]")
    elif len(found) > 1:
        compare_reports(found, runs, Console())
    elif html is None:
        if searched is not None:
            print_front(searched, Console())
        print_report(found[0], Console())


def _searched(store: Store) -> Searched | None:
    """What the last search for a run directory found, where there was one."""
    from dcq_ray.records import from_json
    from dcq_ray.search import Searched

    content = store.read_bytes_or_none(SEARCH_FILE)
    try:
        return None if content is None else from_json(Searched, content)
    except ValueError:
        return None


def _deploy(store: Store, report: RunReport) -> DeployReport | None:
    """The deploy check of the report's student, where one was made."""
    from dcq_ray.records import from_json
    from dcq_ray.records.deploy import DEPLOY_FILE, DeployReport

    content = store.read_bytes_or_none(DEPLOY_FILE)
    if content is None or report.student is None:
        return None
    try:
        deploy = from_json(DeployReport, content)
    except ValueError:
        return None
    return deploy if deploy.student_sha256 == report.student.sha256 else None


@click.command(epilog="\b\nExample:\n  dcq-ray status runs/quickstart --watch")
@click.argument("run", metavar="RUN")
@click.option("--watch", is_flag=True, help="Go on until the run has ended.")
@debug_option
def status(run: str, watch: bool) -> None:
    """What a run is doing, from another terminal."""
    from rich.console import Console
    from rich.live import Live

    from dcq_ray.progress import status_table
    from dcq_ray.records import StatusReport, from_json
    from dcq_ray.storage import open_store

    store = open_store(run)

    def read() -> StatusReport:
        content = store.read_bytes_or_none("status.json")
        if content is None:
            raise StorageError(f"{run}: no status.json there; is it a run directory, and did the run start?")
        try:
            return from_json(StatusReport, content)
        except ValueError:
            raise StorageError(
                f"{run}/status.json cannot be read; it is rewritten as the run goes on: try again"
            ) from None

    console = Console()
    found = read()
    if not watch:
        console.print(status_table(found))
        return
    with Live(status_table(found), console=console, refresh_per_second=2) as live:
        while found.status == "running":
            time.sleep(1.0)
            found = read()
            live.update(status_table(found))


@click.command(epilog="\b\nExample:\n  dcq-ray ls runs")
@click.argument("root", metavar="[ROOT]", default="runs")
@debug_option
def ls(root: str) -> None:
    """All runs below a folder or URI."""
    from rich.console import Console
    from rich.table import Table

    from dcq_ray.phases import read_report
    from dcq_ray.storage import open_store

    store = open_store(root)
    table = Table("run", "name", "status", "teacher", "student", "seconds", "started")
    for name in store.list_names():
        try:
            found = read_report(store.child(name))
        except StorageError:
            # A file among the folders.
            continue
        if found is None:
            continue
        scores = (found.teacher.top1, None if found.student is None else found.student.top1)
        told = ["-" if top1 is None else f"{100 * top1:.2f} %" for top1 in scores]
        table.add_row(name, found.name, found.status, *told, f"{found.timings.total_seconds:.0f}", found.started_at)
    if not table.row_count:
        click.echo(f"no runs below {store.uri}", err=True)
        return
    Console().print(table)


@click.command("eval", epilog="\b\nExample:\n  dcq-ray eval runs/quickstart --set data.test_samples=100")
@click.argument("run", metavar="RUN_OR_FILE")
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def evaluate(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Accuracy of a student, from its files alone."""
    import torch

    from dcq_ray.data import load_splits
    from dcq_ray.export.loading import student_network
    from dcq_ray.phases import choose_device, part_top1
    from dcq_ray.storage import open_store
    from dcq_ray.teacher import build_network, state_from_bytes

    folder, _, name = run.rpartition("/") if run.endswith(".safetensors") else (run, "", "student.safetensors")
    store = open_store(folder or ".")
    job = read_run_job(store.read_bytes("job.yaml"), f"{folder}/job.yaml", overrides)
    source = store.location(name)
    state = state_from_bytes(store.read_bytes(name), source=source)
    # The job's own folder is not recorded; its modules must be importable from here.
    module = student_network(build_network(job.teacher, job_folder=str(Path.cwd())), state, source=source)
    torch.set_num_threads(job.train.num_threads)
    device = choose_device("auto")
    module.to(device)
    splits = load_splits(job.data, seed=job.seed, job_folder=str(Path.cwd()))
    rows = {"held_out": splits.held_out, "test": splits.test}
    scores = {
        key: None if part is None else part_top1(module, part, job.data.batch_size, device)
        for key, part in rows.items()
    }
    if as_json:
        click.echo(json.dumps({f"{key}_top1": value for key, value in scores.items()}))
        return
    for key, part in rows.items():
        if part is not None:
            score = scores[key]
            told = "no labels" if score is None else f"top-1 {100 * score:.2f} %"
            click.echo(f"{key.replace('_', '-'):9} {told} of {len(part)} images")


@click.command(epilog="\b\nExample:\n  dcq-ray schema > job.schema.json")
@debug_option
def schema() -> None:
    """The JSON schema of job files, for editors."""
    from dcq_ray.jobfile import job_schema

    click.echo(json.dumps(job_schema(), indent=2))
