"""Runs as jobs of a cluster: submit one through the head's dashboard, follow its log, and learn how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes
from ray.job_submission import JobStatus, JobSubmissionClient

from dcq_ray.errors import ClusterError, RunTerminated, UsageError
from dcq_ray.remote.cluster import PROBE_SECONDS, address_file, answers

ANSWER_SECONDS = 5.0
# So long the log may be silent before the head is asked whether it is still there.
SILENCE_SECONDS = 15.0
# So often in a row the stream may break before we give up; each time takes ANSWER_SECONDS or more.
NUM_BREAKS = 12
# Ray ends a stopped job after three seconds; a training that is told to stop saves itself first.
STOP_SECONDS = 60
STOPPED_CODE = RunTerminated.exit_code
NUM_LARGEST = 5
# Both name another cluster than the one asked for, and Ray's client would follow them.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def open_jobs(address: str, *, environment: Mapping[str, str]) -> JobSubmissionClient:
    """A client of the cluster's jobs.

    Args:
        address: `http://HOST:8265` (the head's dashboard), `HOST:PORT` of the dashboard or of the GCS, or `auto`: what
            RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, or this machine's running Ray.

    Raises:
        ClusterError: nobody answers within seconds, or the cluster refuses us.
        UsageError: an address of Ray's client protocol, which knows no jobs.
    """
    target = _target(address, environment)
    with _unset(*_ADDRESS_VARIABLES), _told_plainly(address):
        return JobSubmissionClient(target)


def submit_run(
    client: JobSubmissionClient, arguments: Sequence[str], *, working_dir: Path, metadata: Mapping[str, str]
) -> str:
    """Upload the working directory, start `dcq-ray run` with these arguments in it, and give the job's id.

    Raises:
        UsageError: the working directory is larger than a cluster takes; nothing is uploaded then.
        ClusterError: the cluster refuses the job, or does not answer any more.
    """
    refuse_large(working_dir)
    # `exec`, so that a signal meets Python and not the shell; the cluster's own address, because `auto` might start another
    # Ray on a head that is slow to answer.
    entrypoint = f'exec python -m dcq_ray run {shlex.join(arguments)} --address "$RAY_ADDRESS"'
    environment = {"working_dir": str(working_dir), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    with _told_plainly(client.get_address()):
        job_id: str = client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata=dict(metadata))
    return job_id


def follow(
    client: JobSubmissionClient, job_id: str, write: Callable[[str], None], *, num_last: int | None = None
) -> int:
    """Write the job's log as it grows until the job ends; the exit code of its run, 143 where it was stopped.

    Args:
        num_last: of what the log holds already, write only so many lines; None: all.

    Raises:
        ClusterError: no such job, or the cluster does not answer any more; it says how the job failed to start where no
            process of it ever ran.
    """
    with _told_plainly(client.get_address()):
        client.get_job_info(job_id)
        num_shown = 0
        if num_last is not None:
            log = client.get_job_logs(job_id)
            write("".join(log.splitlines(keepends=True)[-num_last:] if num_last else []))
            num_shown = len(log)
        asyncio.run(_stream(client, job_id, write, num_shown))
        info = client.get_job_info(job_id)
    if info.status == JobStatus.STOPPED:
        return STOPPED_CODE
    if info.driver_exit_code is None and info.status != JobStatus.SUCCEEDED:
        raise ClusterError(f"job {job_id} did not run to its end: {(info.message or 'Ray does not say why').strip()}")
    code: int = info.driver_exit_code or 0
    # A process that a signal ended, as shells count it.
    return 128 - code if code < 0 else code


def stop(client: JobSubmissionClient, job_id: str) -> bool:
    """Ask the job to save itself and end; whether it was running."""
    with _told_plainly(client.get_address()):
        stopped: bool = client.stop_job(job_id)
    return stopped


def refuse_large(folder: Path) -> None:
    """Raise UsageError where a folder, less what Ray leaves out, is larger than Ray's limit for a working directory."""
    sizes = uploaded_sizes(folder)
    total = sum(sizes.values())
    if total < GCS_STORAGE_MAX_SIZE:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:NUM_LARGEST]
    told = ", ".join(f"{name} ({_mib(size)})" for name, size in largest)
    raise UsageError(
        f"the working directory {folder} holds {_mib(total)}, and Ray takes less than {_mib(GCS_STORAGE_MAX_SIZE)}; the "
        f"largest in it: {told}; name what the run does not need in {folder / '.rayignore'} (written as a .gitignore), or a "
        "smaller folder by --working-dir; put data where all nodes see it, and name that place in the job"
    )


def uploaded_sizes(folder: Path) -> dict[str, int]:
    """Bytes of what Ray would upload of a folder, by its entries, and those of its folders' one level further down.

    .gitignore and .rayignore hold, and Ray's own list (.git, .venv, venv, __pycache__).
    """
    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            parts = path.relative_to(folder).parts
            name = "/".join(parts[:2])
            sizes[name] = sizes.get(name, 0) + path.stat().st_size

    # Ray's own walk: what is counted is what is sent.
    _dir_travel(folder, [_get_excludes(folder, get_runtime_env_default_excludes())], count, include_gitignore=True)
    return sizes


def _target(address: str, environment: Mapping[str, str]) -> str:
    """What Ray's client is given: a URL, or a GCS address that answers."""
    if address != "auto":
        return _answering(address, f"--address {address}")
    for name in _ADDRESS_VARIABLES:
        if (value := environment.get(name)) and value not in ("auto", "local"):
            return _answering(value, f"{name}={value}")
    found = address_file(environment)
    if found is None or not answers(found, PROBE_SECONDS):
        raise ClusterError(
            "--address auto: no Ray runs on this machine, and neither RAY_API_SERVER_ADDRESS nor RAY_ADDRESS is set; name the "
            "head's dashboard, such as --address http://HOST:8265"
        )
    return found


def _answering(address: str, told: str) -> str:
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "http", "https"):
        raise UsageError(f"{told}: jobs are submitted to the head's dashboard; expected http://HOST:8265 or HOST:PORT")
    if not scheme and answers(address, PROBE_SECONDS):
        return address
    url = f"{scheme or 'http'}://{rest.rstrip('/')}"
    if (why := _why_silent(url)) is not None:
        raise ClusterError(
            f"{told}: no Ray dashboard answers at {url} within {ANSWER_SECONDS:g} s ({why}); is the cluster up, and is this the "
            "dashboard's port (8265 unless told)? A dashboard listens only on the head itself unless it is told otherwise: "
            "`ray dashboard CLUSTER.yaml` or `ssh -L 8265:127.0.0.1:8265 HEAD` brings it here"
        )
    return url


def _why_silent(url: str) -> str | None:
    """Why nobody answers there, None where somebody does, whatever the answer."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


async def _stream(client: JobSubmissionClient, job_id: str, write: Callable[[str], None], num_shown: int) -> None:
    """Write what the log holds beyond its first characters, until it is complete; a stream that breaks is taken up again."""
    num_breaks = 0
    while True:
        try:
            num_seen = 0
            async for text in _lively(client, job_id):
                # Every stream begins at the log's beginning.
                num_seen += len(text)
                if num_seen > num_shown:
                    write(text[-(num_seen - num_shown) :])
                    num_shown, num_breaks = num_seen, 0
            if (await asyncio.to_thread(client.get_job_info, job_id)).status.is_terminal():
                return
            raise ConnectionError("the stream ended before the job")
        except (OSError, RuntimeError, _client_error()) as error:
            num_breaks += 1
            if num_breaks == NUM_BREAKS:
                raise ConnectionError(
                    f"the job's log broke off {num_breaks} times in a row, the last time: {error}; "
                    f"the job may go on: `dcq-ray attach {job_id}` takes up its log again"
                ) from error
            await asyncio.sleep(ANSWER_SECONDS)


async def _lively(client: JobSubmissionClient, job_id: str) -> Any:
    """The job's log from its beginning; raises where the head has gone, which a silent connection alone does not show."""
    stream = client.tail_job_logs(job_id)
    waiting = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(stream, None))
            while not (await asyncio.wait({waiting}, timeout=SILENCE_SECONDS))[0]:
                if (why := await asyncio.to_thread(_why_silent, client.get_address())) is not None:
                    raise ConnectionError(why)
            text = waiting.result()
            if text is None:
                return
            yield text
    finally:
        if waiting is not None and not waiting.done():
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        await stream.aclose()


def _client_error() -> type[Exception]:
    # Comes with ray[default], and is loaded by Ray's client already.
    import aiohttp

    return aiohttp.ClientError


@contextlib.contextmanager
def _told_plainly(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into a ClusterError of one sentence; a token is never told."""
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        refused = "a token" if "required" in str(error) else "another token than the one found here"
        raise ClusterError(
            f"the cluster at {address} wants {refused}: put its token into the file ~/.ray/auth_token, or name its file in "
            "RAY_AUTH_TOKEN_PATH; `ray get-auth-token` on the head tells it"
        ) from None
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise ClusterError(f"the cluster at {address}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _unset(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
