"""`dcq-ray run --publish`: a finished run's student in its place, without torch where it is there already."""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import TYPE_CHECKING, Literal

import click

from dcq_ray.errors import UsageError

if TYPE_CHECKING:
    from dcq_ray.records import RunReport
    from dcq_ray.storage import Store


def check_place(store: Store, target: str) -> None:
    """Refuse a place where nothing can be published, before hours of work for it.

    Raises:
        StorageError: it is no place for files, or cannot be written.
        UsageError: it is the run's own directory.
    """
    from dcq_ray.storage import open_store

    place = open_store(target)
    if place.uri == store.uri:
        raise UsageError(f"--publish {place.location()}: that is the run directory itself; name another folder")
    name = f".writable-{secrets.token_hex(8)}"
    place.write_bytes(name, b"")
    place.delete(name)


def published(
    store: Store,
    target: str,
    report: RunReport,
    keep: int,
    tolerance_points: float,
    log_format: Literal["text", "json"],
) -> str:
    """The version that is current afterwards; told without torch where it is this student's already."""
    from dcq_ray.records import CURRENT_FILE, Current, unseal_json
    from dcq_ray.storage import open_store

    place = open_store(target)
    content = place.read_bytes_or_none(CURRENT_FILE)
    version = None
    with contextlib.suppress(ValueError):
        current = None if content is None else unseal_json(Current, content)
        if current is not None and report.student is not None and current.student_sha256 == report.student.sha256:
            version = current.version
    if version is None:
        from dcq_ray.phases.publish import publish

        version = publish(store, place, keep=keep, tolerance=tolerance_points / 100).version
    tell(f"published: {place.location(version)} is current", log_format)
    return version


def tell(message: str, log_format: Literal["text", "json"]) -> None:
    """A line on standard error in the form of the others."""
    click.echo(json.dumps({"message": message}) if log_format == "json" else message, err=True)
