"""Who is told how a run ended, however it ended: a command, a webhook, and standard output's line for log collectors."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shlex
import subprocess
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from dcq_ray.cli.options import debugging
from dcq_ray.errors import DcqError
from dcq_ray.gate import accuracy_drop

if TYPE_CHECKING:
    from dcq_ray.records import RunReport
    from dcq_ray.spec import Job

HOOK_TIMEOUT_SECONDS = 30.0
WEBHOOK_TIMEOUT_SECONDS = 10.0
_STATUS = {0: "done", 3: "gate-missed", 75: "busy", 130: "interrupted", 143: "interrupted"}


@dataclass(slots=True, kw_only=True)
class Ending:
    """What is known of a run as it ends; the run fills it in."""

    job: Job | None = None
    """None where the job file could not be read."""
    report: RunReport | None = None
    published: str | None = None
    """The version that is current where the run publishes, if its student is the one."""


def split_command(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """The words of a command, which no shell sees; click.BadParameter where quotes do not match or there are none."""
    try:
        words = tuple(shlex.split(value or ""))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}; quote it as for a shell") from error
    if value is not None and not words:
        raise click.BadParameter("the command is empty; give a program with its arguments")
    return words


def check_webhook(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """An http or https URL as it is; click.BadParameter, which does not repeat it, where it is none."""
    with contextlib.suppress(ValueError):
        if value is None or (_parts(value).scheme in ("http", "https") and _parts(value).hostname):
            return value
    raise click.BadParameter(
        "expected http://HOST/PATH or https://HOST/PATH (what was given is not shown, it may be a secret)"
    )


@contextlib.contextmanager
def told_at_end(command: tuple[str, ...], webhook: str | None, log_format: Literal["text", "json"]) -> Iterator[Ending]:
    """Tell how the block ended, with what it filled in; what the block raises goes on.

    As JSON, the line about the end is to be the last one, so an error is told and ends the process here.
    """
    started = time.monotonic()
    ending = Ending()

    def tell(code: int, message: str) -> None:
        facts = facts_of(ending, code=code, message=message, seconds=time.monotonic() - started)
        warnings = [call_hook(command, facts)] if command else []
        warnings += [post(webhook, facts)] if webhook else []
        for warning in filter(None, warnings):
            click.echo(json.dumps({"message": warning}) if log_format == "json" else warning, err=True)
        if log_format == "json":
            click.echo(json.dumps(facts))

    try:
        yield ending
    except BaseException as error:
        code = _exit_code(error)
        if log_format == "json":
            if not isinstance(error, DcqError) or debugging():
                traceback.print_exc()
            if str(error):
                click.echo(json.dumps({"message": str(error)}), err=True)
            tell(code, str(error))
            raise SystemExit(code) from error
        tell(code, str(error))
        raise
    tell(0, "")


def facts_of(ending: Ending, *, code: int, message: str, seconds: float) -> dict[str, Any]:
    """What is told of a run: accuracies as fractions, the drop in percentage points, None what no one knows.

    `seconds` are those of this command, `cpu_seconds` those of all that the student took, whichever run spent them.
    """
    report = ending.report
    drop = None if report is None else accuracy_drop(report)
    spent = None if report is None else report.timings.cpu_seconds
    return {
        "event": "run",
        "name": None if ending.job is None else ending.job.name,
        "status": _STATUS.get(code, "failed"),
        "exit_code": code,
        "message": message,
        "run_dir": None if ending.job is None else ending.job.storage.run_dir,
        "seconds": round(seconds, 3),
        "cpu_seconds": None if spent is None else round(spent.teacher + spent.dump + spent.train + spent.reduce, 3),
        "teacher_top1": None if report is None else report.teacher.top1,
        "student_top1": None if report is None or report.student is None else report.student.top1,
        "drop_points": None if drop is None else 100 * drop,
        "student_sha256": None if report is None or report.student is None else report.student.sha256,
        "published": ending.published,
    }


def post(url: str, facts: dict[str, Any], timeout_seconds: float = WEBHOOK_TIMEOUT_SECONDS) -> str:
    """POST facts as JSON; a warning, which names the URL's host alone, where that fails. Redirects are not followed."""
    parts = _parts(url)
    headers = {"Content-Type": "application/json", "User-Agent": "dcq-ray"}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    host = parts.netloc.rpartition("@")[2]
    target = parts._replace(netloc=host, fragment="").geturl()
    try:
        request = urllib.request.Request(target, json.dumps(facts).encode(), headers)
        urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_seconds).close()
    except urllib.error.HTTPError as error:
        problem = f"answered with {error.code}"
    except urllib.error.URLError as error:
        problem = f"cannot be reached: {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Their texts may repeat the URL.
        problem = f"cannot be told: {type(error).__name__}"
    else:
        return ""
    return f"warning: the webhook at {parts.scheme}://{host} {problem}; the run's exit code stays {facts['exit_code']}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host is not told what one was to be told, nor its credentials."""

    def redirect_request(self, *_arguments: Any, **_named: Any) -> None:
        return None


def _parts(url: str) -> urllib.parse.SplitResult:
    """A URL's parts; ValueError where it is none, or its port."""
    parts = urllib.parse.urlsplit(url)
    _ = parts.port
    return parts


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
