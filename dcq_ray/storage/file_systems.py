"""The `pyarrow.fs` file system of a URI, with our timeouts; one for all stores of a bucket in this process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs

CONNECT_TIMEOUT_SECONDS = 5.0
# pyarrow's documentation says that Linux ignores this. Measured with pyarrow 26: on Linux the client gives a request up when
# nothing came for so long; 3 s unless told, which a busy server may need to think.
REQUEST_TIMEOUT_SECONDS = 20.0
MAX_REQUEST_ATTEMPTS = 3


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turn pyarrow's own exceptions into OSError."""
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path in it; raises OSError where pyarrow cannot make one."""
    parts = urlsplit(uri)
    if parts.scheme.lower() not in ("s3", "gs", "gcs"):
        with as_os_error():
            return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    # The path is not part of what the client is made of, and making one takes requests.
    system = _bucket_system(f"{parts.scheme.lower()}://{parts.netloc}" + (f"?{parts.query}" if parts.query else ""))
    bucket = parts.netloc.rpartition("@")[2]
    return system, f"{bucket}/{parts.path.strip('/')}".rstrip("/")


@functools.lru_cache(maxsize=32)
def _bucket_system(uri: str) -> fs.FileSystem:
    with as_os_error():
        # It also looks for what is wrong in the URI, and for the bucket's region.
        system, _ = fs.FileSystem.from_uri(uri)
        options = {key: values[-1] for key, values in parse_qs(urlsplit(uri).query).items()}
        if isinstance(system, fs.GcsFileSystem):
            if "retry_limit_seconds" in options or urlsplit(uri).username is not None:
                return system
            # Fifteen minutes unless told: longer than a lease.
            return fs.GcsFileSystem(
                retry_time_limit=timedelta(seconds=REQUEST_TIMEOUT_SECONDS),
                **{key: options[key] for key in ("scheme", "endpoint_override") if key in options},
            )
        return fs.S3FileSystem(
            region=system.region,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            request_timeout=REQUEST_TIMEOUT_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_REQUEST_ATTEMPTS),
            # So that what is small is one request, not the three of an upload in parts.
            allow_delayed_open=True,
            # The default, said aloud: only so does a part that failed keep the stream from completing when it is collected.
            background_writes=True,
            allow_bucket_creation=options.get("allow_bucket_creation", "").lower() in ("1", "true"),
            **{key: options[key] for key in ("scheme", "endpoint_override", "tls_ca_file_path") if key in options},
        )


def local_folder(uri: str) -> str:
    """The folder that a `file://` URI names; raises OSError where it names none."""
    return file_system(uri)[1]
