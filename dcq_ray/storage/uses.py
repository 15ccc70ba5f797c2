"""Uses: which runs use a boundary of the cache, so that nobody removes it under them.

One small file a run, since object stores cannot append. It must not know what a run or a boundary is.
"""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime

from dcq_ray.storage.store import Store, absolute_uri

_FOLDER = "uses"


@dataclass(frozen=True, slots=True)
class Use:
    """One run's use of a folder of the cache."""

    run: str
    """Where the run lies: absolute; empty where the file is damaged."""
    host: str
    """The machine of the driver that said so; empty where the file does not say."""
    at: float
    """When it was said last, seconds since 1970."""


def add_use(store: Store, run_uri: str) -> None:
    """Say in a boundary's folder that a run uses it; saying it again renews the date."""
    run = absolute_uri(run_uri)
    use = {"run": run, "host": socket.gethostname(), "at": datetime.now(UTC).isoformat(timespec="seconds")}
    store.child(_FOLDER).write_bytes(_file_name(run), json.dumps(use, indent=2).encode() + b"\n")


def remove_use(store: Store, run_uri: str) -> None:
    """Take a run's use of a boundary back; no error where there is none."""
    store.child(_FOLDER).delete(_file_name(absolute_uri(run_uri)))


def read_uses(store: Store) -> tuple[Use, ...]:
    """All uses of a boundary; a damaged file is a use by a run that nobody knows."""
    folder = store.child(_FOLDER)
    found = []
    for file in folder.tree():
        if file.name.startswith("."):
            continue
        content = folder.read_bytes_or_none(file.name)
        if content is not None:
            found.append(_use(content, file.modified_at))
    return tuple(found)


def _use(content: bytes, modified_at: float) -> Use:
    try:
        value = json.loads(content)
        at = datetime.fromisoformat(value["at"]).timestamp()
        return Use(run=str(value["run"]), host=str(value.get("host", "")), at=at)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Use(run="", host="", at=modified_at)


def _file_name(run: str) -> str:
    return f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"
