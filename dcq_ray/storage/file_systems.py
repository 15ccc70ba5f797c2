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
# Of a client in a hurry, which asks once.
HURRIED_TIMEOUT_SECONDS = 4.0


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
    bucket = parts.netloc.rpartition("@")[2]
    return _bucket_system(_bucket_uri(uri)), f"{bucket}/{parts.path.strip('/')}".rstrip("/")


def hurried_file_system(uri: str) -> fs.FileSystem:
    """That of an S3 or GCS URI for who would rather fail than wait: each request is made once."""
    return _bucket_system(_bucket_uri(uri), hurried=True)


def _bucket_uri(uri: str) -> str:
    parts = urlsplit(uri)
    return f"{parts.scheme.lower()}://{parts.netloc}" + (f"?{parts.query}" if parts.query else "")


@functools.lru_cache(maxsize=32)
def _bucket_system(uri: str, *, hurried: bool = False) -> fs.FileSystem:
    with as_os_error():
        # It also looks for what is wrong in the URI, and for the bucket's region.
        system, _ = fs.FileSystem.from_uri(uri)
        options = {key: values[-1] for key, values in parse_qs(urlsplit(uri).query).items()}
        if isinstance(system, fs.GcsFileSystem):
            if "retry_limit_seconds" in options or urlsplit(uri).username is not None:
                return system
            # Fifteen minutes unless told: longer than a lease.
            return fs.GcsFileSystem(
                retry_time_limit=timedelta(seconds=HURRIED_TIMEOUT_SECONDS if hurried else REQUEST_TIMEOUT_SECONDS),
                **{key: options[key] for key in ("scheme", "endpoint_override") if key in options},
            )
        return fs.S3FileSystem(
            region=system.region,
            connect_timeout=HURRIED_TIMEOUT_SECONDS if hurried else CONNECT_TIMEOUT_SECONDS,
            request_timeout=HURRIED_TIMEOUT_SECONDS if hurried else REQUEST_TIMEOUT_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1 if hurried else MAX_REQUEST_ATTEMPTS),
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
