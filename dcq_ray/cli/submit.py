"""`dcq-ray submit` and `dcq-ray attach`: a run as a job of a cluster, and its log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import click

from dcq_ray.cli.options import debug_option, job_argument, quoted, read_job, run_dir_option, set_option
from dcq_ray.errors import RunInterrupted, RunTerminated, UsageError

address_option = click.option(
    "--address",
    default="auto",
    show_default=True,
    metavar="http://HOST:8265|HOST:PORT|auto",
    help="The head's dashboard, or its GCS port; auto: what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, or this machine's Ray.",
)


@click.command(
    epilog="\b\nExample:\n  dcq-ray submit jobs/quickstart.yaml --address http://HOST:8265 --run-dir s3://bucket/runs/quickstart "
    "\\\n      --set storage.cache_dir=s3://bucket/cache"
)
@job_argument
@address_option
@set_option
@run_dir_option
@click.option(
    "--working-dir",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What is uploaded, and is the run's current folder; default: the job file's folder.",
)
@click.option(
    "--max-drop", type=float, metavar="PTS", help="Exit 3 when the student loses more percentage points than this."
)
@click.option("--no-wait", is_flag=True, help="Print the job's id, and leave.")
@debug_option
def submit(
    job_path: str,
    address: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    working_dir: Path | None,
    max_drop: float | None,
    no_wait: bool,
) -> int:
    """Run a job on a cluster, show its log, and exit with its code. Submit it again to resume.

    The job file's folder travels along, less what .gitignore and .rayignore name: modules and data in it are found there.
    There the job's relative paths and variables mean what they mean on the cluster; only the run and cache directories mean
    this machine's current folder, since that copy does not outlive the job: nodes must see them at the same path, or as a URI.

    Ctrl-C leaves the job running: `dcq-ray attach` takes up its log again, or ends it.
    """
    if max_drop is not None:
        overrides = (*overrides, f"reduce.max_drop={max_drop}")
    job, folder = read_job(job_path, overrides, run_dir)
    working_dir = Path(folder) if working_dir is None else working_dir.resolve()
    job_file = Path(job_path).resolve()
    if not job_file.is_relative_to(working_dir):
        raise UsageError(
            f"--working-dir {working_dir}: {job_file} does not lie in it, so it would not be uploaded; name a folder above it"
        )
    arguments = [job_file.relative_to(working_dir).as_posix()]
    for override in overrides:
        arguments += ["--set", override]
    folders = {"run_dir": job.storage.run_dir, "cache_dir": job.storage.cache_dir}
    for key, place in folders.items():
        folders[key] = place if "://" in place else str(Path(place).absolute())
        arguments += ["--set", f"storage.{key}={quoted(folders[key])}"]
    use_token(os.environ)

    from dcq_ray.remote.jobs import open_jobs, submit_run

    client = open_jobs(address, environment=os.environ)
    job_id = submit_run(client, arguments, working_dir=working_dir, metadata={"dcq_ray_run": job.name})
    click.echo(f"job {job_id}, run directory {folders['run_dir']}", err=True)
    if no_wait:
        click.echo(job_id)
        return 0
    return _followed(client, job_id, address)


@click.command(epilog="\b\nExample:\n  dcq-ray attach raysubmit_4LamXRuQpYdSMg7J --address http://HOST:8265 --last 20")
@click.argument("job_id", metavar="ID")
@address_option
@click.option("--last", type=click.IntRange(min=0), metavar="LINES", help="Begin so many lines before the log's end.")
@click.option("--stop", "stopping", is_flag=True, help="Have the run save itself and end; submit it again to resume.")
@debug_option
def attach(job_id: str, address: str, last: int | None, stopping: bool) -> int:
    """Show the log of a submitted job from its beginning, until it ends, and exit with its code; 143 where it was stopped."""
    use_token(os.environ)

    from dcq_ray.remote.jobs import open_jobs, stop

    client = open_jobs(address, environment=os.environ)
    if stopping:
        click.echo(f"job {job_id} {'is told to end' if stop(client, job_id) else 'has ended already'}", err=True)
    return _followed(client, job_id, address, num_last=last)


def use_token(environment: MutableMapping[str, str]) -> None:
    """Have Ray send a token where it would find one; to be called before ray is imported, which reads this once."""
    path = environment.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in environment and (environment.get("RAY_AUTH_TOKEN") or os.path.isfile(path)):
        environment["RAY_AUTH_MODE"] = "token"


def _followed(client: Any, job_id: str, address: str, *, num_last: int | None = None) -> int:
    """Show the log to the job's end; a signal ends the showing, not the job."""
    from dcq_ray.remote.jobs import follow

    left = (
        f"left job {job_id}, which goes on; `dcq-ray attach {job_id} --address {address}` shows its log, --stop ends it"
    )
    earlier = signal.signal(signal.SIGTERM, _raising(RunTerminated(left)))
    try:
        code = follow(client, job_id, _show, num_last=num_last)
    except KeyboardInterrupt:
        raise RunInterrupted(left) from None
    finally:
        signal.signal(signal.SIGTERM, earlier)
    click.echo(f"job {job_id} ended with exit code {code}", err=True)
    return code


def _raising(error: Exception) -> Callable[[int, object], None]:
    def handle(_signal: int, _frame: object) -> None:
        raise error

    return handle


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
