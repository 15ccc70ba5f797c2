"""The file that says what a run is doing: `status.json`, for other terminals."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time

from dcq_ray.errors import StorageError
from dcq_ray.records import Progress, RunStatus, StatusReport, to_json
from dcq_ray.storage import Store

STATUS_FILE = "status.json"
SECONDS_BETWEEN_WRITES = 1.0
# An object store takes a new object for every write.
SECONDS_BETWEEN_REMOTE_WRITES = 10.0


class StatusFile:
    """Keeps the latest progress of every piece of work in the run directory, at most once a second."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._lines: dict[tuple[str, int | None], Progress] = {}
        self._lock = threading.Lock()
        local = store.local_path(STATUS_FILE) is not None
        self._pause_seconds = SECONDS_BETWEEN_WRITES if local else SECONDS_BETWEEN_REMOTE_WRITES
        self._written = 0.0

    def update(self, progress: Progress) -> None:
        """Take a line, and write the file where it is due."""
        with self._lock:
            self._lines[progress.phase, progress.index] = progress
            if time.monotonic() - self._written >= self._pause_seconds:
                self._write("running", "")

    def close(self, status: RunStatus, message: str = "") -> None:
        """Write how the run ended."""
        with self._lock:
            self._write(status, message)

    def _write(self, status: RunStatus, message: str) -> None:
        self._written = time.monotonic()
        report = StatusReport(
            name=self._name,
            status=status,
            updated_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            pid=os.getpid(),
            lines=tuple(self._lines.values()),
            message=message,
        )
        # Nobody's night is worth a status line: what really needs the disk will say that it is full.
        with contextlib.suppress(StorageError):
            self._store.write_bytes(STATUS_FILE, to_json(report))
