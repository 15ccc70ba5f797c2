"""Leases: the small JSON files that say who holds a lock, and locks that are made of nothing but such a file.

Object stores have no locks, and pyarrow 26 writes to none of them on a condition (it drops an If-None-Match without a
word), so there a lease expires unless its holder renews it. What that does not promise:

- Clocks of the machines must agree to within a few seconds, since the expiry is a time of day.
- Two who start within the same moment both write, wait, and read whose file stayed; where one was delayed for longer than
  that wait, both hold the lease until the loser next renews it.
- A holder that was cut off for longer than the expiry does not know that it lost the lease; it must compare epochs
  before it commits.
- After a holder died, the others wait until its lease has expired.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dcq_ray.errors import StorageError
from dcq_ray.records import from_json, to_json
from dcq_ray.storage.store import Store

EXPIRY_SECONDS = 60.0
RENEWAL_SECONDS = 15.0
SETTLE_SECONDS = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who holds a lock, or held it last."""

    epoch: int
    """How many times it was taken; a larger one is a later holder."""
    owner: str
    host: str
    pid: int
    acquired_at: str
    token: str = ""
    """Of this very acquisition, where nothing but this file is the lock."""
    expires_at: float | None = None
    """Seconds since 1970, where nothing but this file is the lock; 0 once given back."""

    def __str__(self) -> str:
        return f"{self.owner} (host {self.host}, process {self.pid}, since {self.acquired_at})"


def new_lease(epoch: int, owner: str) -> Lease:
    """A lease for this process, from now on."""
    return Lease(
        epoch=epoch,
        owner=owner,
        host=socket.gethostname(),
        pid=os.getpid(),
        acquired_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def read_lease(store: Store, name: str) -> Lease | None:
    """The lease in a file, None where there is none; raises StorageError where it is damaged."""
    content = store.read_bytes_or_none(name)
    if content is None:
        return None
    try:
        return from_json(Lease, content)
    except ValueError as error:
        raise StorageError(
            f"{store.location(name)}: not a lease: the file is damaged; the next run of this directory writes it anew"
        ) from error


def readable_lease(store: Store, name: str) -> Lease | None:
    """The lease in a file, None where there is none or it is damaged: for those who only want to tell who holds it."""
    try:
        return read_lease(store, name)
    except StorageError:
        return None


def next_epoch(store: Store, name: str) -> int:
    """The epoch of the next holder: larger than all before; raises StorageError where the file cannot be read."""
    try:
        lease = read_lease(store, name)
    except StorageError as error:
        if not _is_damage(error):
            raise
        # A damaged file does not say which epochs were given. The time of day is larger than any count that began at 1,
        # and than any that an earlier damage made begin at an earlier time.
        return int(time.time())
    return 1 if lease is None else lease.epoch + 1


@contextlib.contextmanager
def hold_lease(store: Store, name: str, owner: str, on_held: Callable[[Lease], None]) -> Iterator[int]:
    """Hold an expiring lease while the block runs, renewed by a daemon thread, and yield its epoch.

    Args:
        on_held: called with the other's lease each time it is found held; raises to give up, or sleeps to try again.
    """
    while not isinstance(lease := _try_lease(store, name, owner), _Mine):
        on_held(lease)
    mine = lease.lease
    stop = threading.Event()
    renewal = threading.Thread(target=_renew, args=(store, name, mine, stop), name=f"renew {name}", daemon=True)
    renewal.start()
    try:
        yield mine.epoch
    finally:
        stop.set()
        renewal.join()
        # Where it cannot be given back, it expires.
        with contextlib.suppress(StorageError):
            if _is_mine(store, name, mine):
                store.write_bytes(name, to_json(replace(mine, expires_at=0.0)))


@dataclass(frozen=True, slots=True)
class _Mine:
    lease: Lease


def _try_lease(store: Store, name: str, owner: str) -> Lease | _Mine:
    """Take a lease that nobody holds; else the one that another holds."""
    found = _undamaged_lease(store, name)
    if found is not None and found.expires_at is not None and found.expires_at > time.time():
        return found
    mine = replace(
        new_lease(next_epoch(store, name), owner), token=secrets.token_hex(16), expires_at=time.time() + EXPIRY_SECONDS
    )
    store.write_bytes(name, to_json(mine))
    time.sleep(SETTLE_SECONDS)
    winner = _undamaged_lease(store, name)
    return _Mine(mine) if winner is None or winner.token == mine.token else winner


def _undamaged_lease(store: Store, name: str) -> Lease | None:
    """As `readable_lease`, but raises StorageError where the storage fails: what cannot be read may well be held."""
    try:
        return read_lease(store, name)
    except StorageError as error:
        if not _is_damage(error):
            raise
        return None


def _is_damage(error: StorageError) -> bool:
    return isinstance(error.__cause__, ValueError)


def _is_mine(store: Store, name: str, mine: Lease) -> bool:
    found = _undamaged_lease(store, name)
    return found is not None and found.token == mine.token


def _renew(store: Store, name: str, mine: Lease, stop: threading.Event) -> None:
    where = store.location(name)
    while not stop.wait(RENEWAL_SECONDS):
        try:
            if not _is_mine(store, name, mine):
                _logger.warning("%s: another process has taken this lease over", where)
                return
            store.write_bytes(name, to_json(replace(mine, expires_at=time.time() + EXPIRY_SECONDS)))
        except StorageError as error:
            _logger.warning(
                "%s: the lease could not be renewed, tried again in %g s: %s", where, RENEWAL_SECONDS, error
            )
