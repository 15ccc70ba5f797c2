"""Leases: the small JSON files that say who holds a lock, and locks that are made of nothing but such a file.

Object stores have no locks, and pyarrow 26 writes to none of them on a condition (it drops an If-None-Match without a
word), so there a lease expires unless its holder renews it. What that does not promise:

- Clocks of the machines must agree to within a few seconds, since the expiry is a time of day.
- Two who start within the same moment both write, wait, and read whose file stayed; where one was delayed for longer than
  that wait, both hold the lease until the loser next renews it.
- A renewal is begun only if the holder is still the one that the file names, and so early that it has ended, or been given
  up by S3's and GCS's clients, before the lease expires. Where a given-up request (or one of another storage, whose clients
  have no such limit) arrives at the store later still, it may name a holder again that lost the lease: for at most one
  renewal of the new one, which so learns that it is not alone, and stops.
- A holder that could not renew in time stops. What it began before may still arrive: it must compare epochs before it
  commits.
- After a holder died, the others wait until its lease has expired.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dcq_ray.errors import StaleRunError, StorageError
from dcq_ray.records import from_json, to_json
from dcq_ray.storage.store import Store

EXPIRY_SECONDS = 60.0
RENEWAL_SECONDS = 15.0
RETRY_SECONDS = 3.0
TRY_SECONDS = 25.0
"""The longest that a renewal takes: up to five requests of a client in a hurry, and a little."""
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
def hold_lease(
    store: Store,
    name: str,
    owner: str,
    on_held: Callable[[Lease], None],
    lost_error: Callable[[Lease | None], Exception] | None = None,
) -> Iterator[int]:
    """Hold an expiring lease while the block runs, renewed by a daemon thread, and yield its epoch.

    Args:
        on_held: called with the other's lease each time it is found held; raises to give up, or sleeps to try again.
        lost_error: makes the error with which the block ends once the lease is lost, from the new holder's lease, or None
            where it could not be renewed; in the main thread the block is interrupted. None: a loss does no harm.
    """
    while not isinstance(lease := _try_lease(store, name, owner), _Mine):
        on_held(lease)
    mine, hurried = lease.lease, store.hurried()
    stop, losses = threading.Event(), list[Lease | None]()
    with _Interruption(enabled=lost_error is not None) as interruption:

        def lose(found: Lease | None) -> None:
            losses.append(found)
            interruption.interrupt()

        renewal = threading.Thread(
            target=_renew, args=(hurried, name, mine, stop, lose), name=f"renew {name}", daemon=True
        )
        renewal.start()
        try:
            yield mine.epoch
        except BaseException as error:
            if isinstance(error, StaleRunError) and not losses:
                # A worker noticed it before the next renewal.
                losses.append(readable_lease(hurried, name))
            if losses and lost_error is not None:
                raise lost_error(losses[0]) from error
            raise
        finally:
            interruption.end()
            stop.set()
            renewal.join()
            # Where it cannot be given back, it expires.
            with contextlib.suppress(StorageError):
                if not losses and _is_mine(hurried, name, mine):
                    hurried.write_bytes(name, to_json(replace(mine, expires_at=0.0)))
    if losses and lost_error is not None:
        raise lost_error(losses[0])


class _Lost(BaseException):
    """The lease is lost: nothing but who holds it may catch this."""


class _Interruption(contextlib.AbstractContextManager["_Interruption"]):
    """Lets a thread end what the main thread does with `_Lost`, by a signal, which also ends its waiting."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interruption:
        if self._enabled:
            self._earlier = signal.signal(signal.SIGUSR2, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGUSR2, self._earlier)
        self._enabled = False

    def interrupt(self) -> None:
        """To be called by the other thread."""
        if self._enabled:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    def end(self) -> None:
        """From here on the main thread is no longer interrupted."""
        if self._enabled:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    @staticmethod
    def _raise(*_: object) -> None:
        raise _Lost


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


def _renew(store: Store, name: str, mine: Lease, stop: threading.Event, lose: Callable[[Lease | None], None]) -> None:
    """Renew a lease until told to stop, or until it is lost."""
    where, pause_seconds = store.location(name), RENEWAL_SECONDS
    expires_at = mine.expires_at or 0.0
    while not stop.wait(pause_seconds):
        pause_seconds = RETRY_SECONDS
        if time.time() + TRY_SECONDS > expires_at:
            _logger.warning("%s: the lease could not be renewed before it expires", where)
            lose(None)
            return
        try:
            found = _undamaged_lease(store, name)
            if found is None or found.token != mine.token:
                _logger.warning("%s: another process has taken this lease over", where)
                lose(found)
                return
            renewed = time.time() + EXPIRY_SECONDS
            store.write_bytes(name, to_json(replace(mine, expires_at=renewed)))
            expires_at, pause_seconds = renewed, RENEWAL_SECONDS
        except StorageError as error:
            _logger.warning("%s: the lease could not be renewed, tried again in %g s: %s", where, RETRY_SECONDS, error)
