"""The command that `dcq-ray run --on-end` starts when a run ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from dcq_ray.errors import DcqError
from dcq_ray.gate import accuracy_drop

if TYPE_CHECKING:
    from dcq_ray.records import RunReport
    from dcq_ray.spec import Job

HOOK_TIMEOUT_SECONDS = 30.0
_STATUS = {0: "done", 3: "gate-missed", 75: "busy", 130: "interrupted", 143: "interrupted"}


def split_command(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """The words of a command, which no shell sees; click.BadParameter where quotes do not match or there are none."""
    try:
        words = tuple(shlex.split(value or ""))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}; quote it as for a shell") from error
    if value is not None and not words:
        raise click.BadParameter("the command is empty; give a program with its arguments")
    return words


@contextlib.contextmanager
def told_at_end(
    command: tuple[str, ...], job: Job, log_format: Literal["text", "json"]
) -> Iterator[Callable[[RunReport], None]]:
    """Start `command` when the block ends, with the report that it was given, if any; what the block raises goes on."""
    started = time.monotonic()
    reports: list[RunReport] = []
    code, message = 0, ""
    try:
        yield reports.append
    except BaseException as error:
        code, message = _exit_code(error), str(error)
        raise
    finally:
        if command:
            report = reports[-1] if reports else None
            seconds = time.monotonic() - started
            facts = facts_of(job, report, code=code, message=message, seconds=seconds)
            warning = call_hook(command, facts)
            if warning:
                click.echo(json.dumps({"message": warning}) if log_format == "json" else warning, err=True)


def facts_of(job: Job, report: RunReport | None, *, code: int, message: str, seconds: float) -> dict[str, Any]:
    """What a hook is told of a run: accuracies as fractions, the drop in percentage points, None what no one knows."""
    drop = None if report is None else accuracy_drop(report)
    return {
        "event": "run",
        "name": job.name,
        "status": _STATUS.get(code, "failed"),
        "exit_code": code,
        "message": message,
        "run_dir": job.storage.run_dir,
        "seconds": round(seconds, 3),
        "teacher_top1": None if report is None else report.teacher.top1,
        "student_top1": None if report is None or report.student is None else report.student.top1,
        "drop_points": None if drop is None else 100 * drop,
        "student_sha256": None if report is None or report.student is None else report.student.sha256,
    }


def call_hook(command: tuple[str, ...], facts: dict[str, Any], timeout_seconds: float = HOOK_TIMEOUT_SECONDS) -> str:
    """Run a command with facts as a line of JSON on its standard input and as DCQ_RAY_* variables; a warning where it fails."""
    known = {f"DCQ_RAY_{key.upper()}": str(value) for key, value in facts.items() if value is not None}
    try:
        # Standard output is the report's: a hook writes to standard error.
        done = subprocess.run(
            command,
            input=json.dumps(facts) + "\n",
            text=True,
            stdout=2,
            env={**os.environ, **known},
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"did not end within {timeout_seconds:g} s and was killed"
    except (OSError, ValueError) as error:
        problem = f"could not be started: {error}"
    else:
        if done.returncode == 0:
            return ""
        problem = f"failed with exit code {done.returncode}"
    # Arguments may hold a secret.
    return f"warning: the hook {command[0]} {problem}; the run's exit code stays {facts['exit_code']}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, DcqError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, click.ClickException) else 1
