"""Uses: which runs use a boundary of the cache, so that nobody removes it under them.

One small file a run, since object stores cannot append. It must not know what a run or a boundary is.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

from dcq_ray.storage.store import Store, absolute_uri


def add_use(store: Store, run_uri: str) -> None:
    """Say in a boundary's folder that a run uses it; saying it again renews the date."""
    run = absolute_uri(run_uri)
    use = {"run": run, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    store.child("uses").write_bytes(_file_name(run), json.dumps(use, indent=2).encode() + b"\n")


def remove_use(store: Store, run_uri: str) -> None:
    """Take a run's use of a boundary back; no error where there is none."""
    store.child("uses").delete(_file_name(absolute_uri(run_uri)))


def _file_name(run: str) -> str:
    return f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"
