"""Arguments that several commands share, and the job that they name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dcq_ray.jobfile import load_job, parse_job
from dcq_ray.spec import Job

Command = Callable[..., Any]
# In a run directory: what the last search for it found.
SEARCH_FILE = "search.json"

job_argument = click.argument("job_path", metavar="JOB.yaml", type=click.Path())
_DEBUG = "dcq_ray.debug"


def _note_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    context.meta[_DEBUG] = value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show a traceback with an error."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="a.b=c", help="Override a key of the job; may be given several times."
)
run_dir_option = click.option("--run-dir", metavar="DIR_OR_URI", help="Instead of the job's storage.run_dir.")
log_format_option = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of progress lines.",
)


def read_job(job_path: str, overrides: tuple[str, ...], run_dir: str | None = None) -> tuple[Job, str]:
    """The job of a file with overrides, and the folder whose modules it may name."""
    if run_dir is not None:
        # Through the same door as --set, so that it is checked in the same way.
        overrides = (*overrides, f"storage.run_dir={quoted(run_dir)}")
    job = load_job(job_path, overrides=overrides, environment=os.environ)
    return job, str(Path(job_path).resolve().parent)


def read_run_job(content: bytes, source: str, overrides: tuple[str, ...]) -> Job:
    """The job that a run directory keeps."""
    return parse_job(content, source=source, overrides=overrides, environment=os.environ)


def quoted(text: str) -> str:
    """A text as the value of an override."""
    # As JSON, which YAML reads as it stands; and a path is no place for variables.
    return json.dumps(text).replace("${", "$${")


def debugging() -> bool:
    """Whether the command that runs now was given `--debug`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_DEBUG))
