"""`dcq-ray run`, and what other commands that work on a run share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from dcq_ray.cli.hooks import check_webhook, split_command, told_at_end
from dcq_ray.cli.options import debug_option, job_argument, log_format_option, read_job, run_dir_option, set_option
from dcq_ray.cli.publishing import check_place, published, tell
from dcq_ray.errors import RunInterrupted, RunTerminated
from dcq_ray.jobfile import EXAMPLE_JOB

if TYPE_CHECKING:
    from dcq_ray.phases import Emit, Prepared
    from dcq_ray.records import RunReport
    from dcq_ray.search import Searched
    from dcq_ray.spec import Job
    from dcq_ray.storage import Store

_EXAMPLE = "\n".join(f"  {line}" for line in EXAMPLE_JOB.strip().splitlines())


@click.command(
    epilog=f"\b\nExample:\n  dcq-ray run jobs/quickstart.yaml --set quantize.weights.bits=2\n\n\b\nA job file:\n{_EXAMPLE}"
)
@job_argument
@set_option
@run_dir_option
@click.option(
    "--address",
    default="auto",
    show_default=True,
    metavar="auto|local|none|ADDR",
    help="auto: the running Ray if there is one, else start one here; local: always start one; none: without Ray.",
)
@click.option("--fresh", is_flag=True, help="Start over, instead of resuming what the run directory holds.")
@click.option(
    "--max-drop", type=float, metavar="PTS", help="Exit 3 when the student loses more percentage points than this."
)
@click.option("--baseline", "with_rival", is_flag=True, help="Also train end-to-end DoReFa at equal sample passes.")
@click.option(
    "--publish", metavar="DIR_OR_URI", help="Make the student current there, if the gate is passed and it is no worse."
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Versions that --publish keeps.",
)
@click.option(
    "--publish-tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="PTS",
    help="How much worse than the current one.",
)
@click.option(
    "--on-end",
    callback=split_command,
    metavar="COMMAND",
    help="Start it when the run ends, with a line of JSON as input.",
)
@click.option(
    "--webhook",
    callback=check_webhook,
    envvar="DCQ_RAY_WEBHOOK",
    metavar="URL",
    help="POST the same JSON there when the run ends; also DCQ_RAY_WEBHOOK, which no list of processes shows.",
)
@click.option("--tensorboard", is_flag=True, help="Write event files for TensorBoard below the run directory.")
@log_format_option
@debug_option
def run(
    job_path: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    address: str,
    fresh: bool,
    max_drop: float | None,
    with_rival: bool,
    publish: str | None,
    keep: int,
    publish_tolerance: float,
    on_end: tuple[str, ...],
    webhook: str | None,
    tensorboard: bool,
    log_format: Literal["text", "json"],
) -> None:
    """Quantize the job's teacher: cut, dump, train every section in parallel, stitch, validate, report.

    Run it again to resume: what an earlier run of the same run directory finished is not done again.
    """
    if max_drop is not None:
        overrides = (*overrides, f"reduce.max_drop={max_drop}")
    from dcq_ray.gate import check_gate
    from dcq_ray.inputs import keep_inputs, look_at_inputs, read_inputs
    from dcq_ray.storage import open_store

    with told_at_end(on_end, webhook, log_format) as ending:
        job, folder = read_job(job_path, overrides, run_dir)
        ending.job = job
        store = open_store(job.storage.run_dir)
        if publish is not None:
            check_place(store, publish)
        result = None if fresh else _unchanged(store, job, folder, with_rival=with_rival)
        if result is not None:
            ending.report = result
            if log_format == "text":
                show_report(job, result, log_format, page=False)
            tell("nothing has changed since this run was finished", log_format)
        else:
            before = look_at_inputs(job, folder, now_ns=time.time_ns(), earlier=read_inputs(store))
            with (
                watching(job, log_format) as (show, say),
                _drawn(store, tensorboard, show, fresh=fresh) as (emit, finish),
                interruptible(job),
            ):
                result = run_phases(job, folder, address=address, fresh=fresh, emit=emit, say=say)
                finish(result)
                if with_rival and not _has_rival(result):
                    result = run_rival(job, folder, emit, "dorefa", "passes") or result
            after = look_at_inputs(job, folder, now_ns=time.time_ns(), earlier=before)
            ending.report = result
            keep_inputs(store, before, after, result)
            if log_format == "text":
                show_report(job, result, log_format)
            else:
                write_page(store, result)
        check_gate(result)
        if publish is not None:
            ending.published = published(store, publish, result, keep, publish_tolerance, log_format)


def _unchanged(store: Store, job: Job, folder: str, *, with_rival: bool) -> RunReport | None:
    """The report of a finished run with nothing left to do, told without torch or Ray; raises where a run holds the directory."""
    from dcq_ray.inputs import INPUTS_FILE, unchanged_report
    from dcq_ray.storage import hold_run

    if not store.exists(INPUTS_FILE):
        return None
    with hold_run(store, owner=f"dcq-ray run of job {job.name}"):
        found = unchanged_report(store, job, folder, now_ns=time.time_ns())
    if found is None or (with_rival and not _has_rival(found)):
        return None
    return found


def _has_rival(report: RunReport) -> bool:
    return any((rival.method, rival.budget) == ("dorefa", "passes") for rival in report.baselines)


def _drawn(
    store: Store, wanted: bool, emit: Emit, *, fresh: bool
) -> AbstractContextManager[tuple[Emit, Callable[[RunReport], None]]]:
    if not wanted:
        return contextlib.nullcontext((emit, lambda _: None))
    from dcq_ray.report.tensorboard import drawn

    return drawn(store, emit, fresh=fresh)


def run_rival(
    job: Job, folder: str, emit: Emit, method: str, budget: Literal["passes", "cpu-seconds"]
) -> RunReport | None:
    """Train the rival, unless it was; the run's report with its row, or None where the run is not finished."""
    import torch

    from dcq_ray.baseline import train_rival
    from dcq_ray.phases import choose_device, keep_baseline, kept_baseline, open_run

    device = torch.device("cpu") if job.resources.gpus_per_section == 0 else choose_device("auto")
    owner = f"dcq-ray baseline of job {job.name}"
    with open_run(job, folder, device=device, emit=emit, owner=owner, reporting=False) as session:
        found = kept_baseline(session, method, budget)
        return keep_baseline(session, train_rival(session, method, budget) if found is None else found)


def run_phases(
    job: Job, folder: str, *, address: str, fresh: bool, emit: Emit, say: Any, prepared: Prepared | None = None
) -> RunReport:
    """Run a job at an address of `--address`; `prepared`: of this very job, taken where that is `none`."""
    owner = f"dcq-ray run of job {job.name}"
    if address == "none":
        from dcq_ray.phases import StopRequest, run_local

        stop = StopRequest(_raising(signal.getsignal(signal.SIGTERM)))
        # A training saves itself first. `interruptible` puts back what was there before it.
        signal.signal(signal.SIGTERM, lambda *_: stop.make())
        return run_local(job, folder, emit=emit, owner=owner, fresh=fresh, stop=stop, prepared=prepared)
    from dcq_ray.remote import run_remote

    return run_remote(
        job,
        folder,
        address=address,
        environment=os.environ,
        emit=emit,
        say=say,
        owner=owner,
        fresh=fresh,
        log_to_driver="--debug" in sys.argv,
    )


def _raising(handler: Any) -> Callable[[], NoReturn]:
    """A signal's handler that raises, as a function that does."""

    def stop() -> NoReturn:
        handler(signal.SIGTERM, None)
        raise AssertionError("the handler of SIGTERM returned")

    return stop


@contextlib.contextmanager
def watching(job: Job, log_format: Literal["text", "json"]) -> Iterator[tuple[Emit, Any]]:
    """Show progress on standard error: live on a terminal, else in lines."""
    from dcq_ray.progress import open_monitor

    style: Literal["live", "plain", "json"] = "plain"
    if log_format == "json":
        style = "json"
    elif sys.stderr.isatty():
        style = "live"
    with open_monitor(style=style, stream=sys.stderr, name=job.name) as monitor:
        yield monitor.update, monitor.message


@contextlib.contextmanager
def interruptible(job: Job, *, kept_in: str | None = None) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into errors that say how to resume; `kept_in`: instead of the run directory."""
    resume = f"run the same command again to resume: what was finished is kept in {kept_in or job.storage.run_dir}"

    def terminate(_signal: int, _frame: object) -> None:
        raise RunTerminated(f"terminated; {resume}")

    earlier = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted; {resume}") from None
    finally:
        signal.signal(signal.SIGTERM, earlier)


def show_report(
    job: Job,
    report: RunReport,
    log_format: Literal["text", "json"],
    *,
    page: bool = True,
    searched: Searched | None = None,
) -> None:
    """Write the page, and print the tables, with what a search found; `page`: False where it stands there already."""
    from rich.console import Console

    from dcq_ray.report import print_front, print_report, report_json
    from dcq_ray.storage import open_store

    store = open_store(job.storage.run_dir)
    if page:
        write_page(store, report, searched)
    if log_format == "json":
        click.echo(report_json(report))
        return
    if searched is not None:
        print_front(searched, Console())
        click.echo()
    print_report(report, Console())
    click.echo(f"\nstudent  {store.location('student.safetensors')}\nreport   {store.location('report.html')}")


def write_page(store: Store, report: RunReport, searched: Searched | None = None) -> None:
    """Write the report's page into the run directory."""
    from dcq_ray.report import report_html

    store.write_bytes("report.html", report_html(report, searched).encode())
