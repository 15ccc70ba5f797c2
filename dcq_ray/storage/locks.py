"""Locks: one live run a run directory, one writer a boundary.

In a local or network-mounted folder the operating system keeps the lock (flock) and releases it when its holder dies, by
kill -9 too; between machines it holds as far as the mount passes flock on (NFS does since Linux 2.6.12, unless it is mounted
with local_lock). A file beside it says who holds it. Elsewhere a lock is an expiring lease: see `leases` for what that does not
promise. A program that a holder starts does not inherit the lock; a process that it forks without exec does, and holds it
on when the holder is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from dcq_ray.errors import RunBusyError, StorageError
from dcq_ray.records import to_json
from dcq_ray.storage.leases import Lease, hold_lease, new_lease, next_epoch, read_lease, readable_lease
from dcq_ray.storage.store import Store, explained

LEASE_FILE = "lease.json"
_RUN_LOCK_FILE = "lease.lock"
_BOUNDARY_LOCK_FILE = ".lock"
POLL_SECONDS = 0.2
# Whoever only asks whether a run is live holds its lock for a moment, too.
MAX_RUN_LOCK_TRIES = 3


def hold_run(store: Store, *, owner: str) -> AbstractContextManager[int]:
    """Hold a run directory against other drivers while the block runs, and yield the epoch of this holding.

    The epoch is larger than those of all earlier holders; `lease.json` in the folder says it, and who holds it. Whoever
    deletes `lease.lock` or `lease.json` from outside breaks this.

    Raises:
        RunBusyError: another live run holds it; or this one lost it meanwhile, which then ends the block.
        StorageError: the folder cannot be written, or its file system has no locks.
    """
    if store.local_path(_RUN_LOCK_FILE) is not None:
        return _hold_run_locally(store, owner)

    def refuse(lease: Lease) -> None:
        seconds = max(0.0, (lease.expires_at or 0.0) - time.time())
        raise _busy(store, lease, f"; if it is dead, its hold ends in {seconds:.0f} s")

    def lost(lease: Lease | None) -> RunBusyError:
        why = "it could not be renewed in time" if lease is None else f"it was taken over by {lease}"
        return RunBusyError(
            f"{store.location()}: this run no longer holds its run directory: {why}. Nothing was written since; what was finished "
            "is kept, and the same command again resumes once nobody else holds it"
        )

    return hold_lease(store, LEASE_FILE, owner, refuse, lost)


def current_epoch(store: Store) -> int:
    """The epoch of whoever holds a run directory, or held it last; 0 where nobody has; StorageError where damaged."""
    lease = read_lease(store, LEASE_FILE)
    return 0 if lease is None else lease.epoch


def run_is_held(store: Store) -> bool:
    """Whether a live driver holds a run directory now; writes nothing there."""
    if store.local_path(_RUN_LOCK_FILE) is None:
        lease = read_lease(store, LEASE_FILE)
        return lease is not None and (lease.expires_at or 0.0) > time.time()
    try:
        with explained(store, "lock", _RUN_LOCK_FILE):
            descriptor = os.open(Path(store.files.path(_RUN_LOCK_FILE)), os.O_RDONLY)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    try:
        # Released by closing it: nobody inherited this descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def hold_boundary(
    store: Store, *, owner: str = "a run that dumps it", on_wait: Callable[[str], None] | None = None
) -> AbstractContextManager[None]:
    """Hold a boundary's (or a fit's) folder in the cache against other writers while the block runs; waits until it is free.

    Args:
        owner: what those who wait are told of this holder.
        on_wait: called once, with a sentence that says who holds it, where it is not free at once.

    Raises:
        StorageError: the folder cannot be written, or its file system has no locks.
    """
    return _hold_boundary(store, owner, on_wait or (lambda _: None))


@contextlib.contextmanager
def _hold_run_locally(store: Store, owner: str) -> Iterator[int]:
    for _ in range(MAX_RUN_LOCK_TRIES):
        with explained(store, "lock", _RUN_LOCK_FILE):
            descriptor = _try_lock(Path(store.files.path(_RUN_LOCK_FILE)))
        if descriptor is not None:
            break
        time.sleep(POLL_SECONDS / 4)
    if descriptor is None:
        raise _busy(store, readable_lease(store, LEASE_FILE), "")
    with _released(descriptor):
        lease = new_lease(next_epoch(store, LEASE_FILE), owner)
        store.write_bytes(LEASE_FILE, to_json(lease))
        yield lease.epoch


def _busy(store: Store, lease: Lease | None, note: str) -> RunBusyError:
    holder = "another process" if lease is None else str(lease)
    return RunBusyError(
        f"{store.location()}: another live run holds this run directory: {holder}{note}; wait for it or stop it, or name "
        "another run directory (--run-dir)"
    )


@contextlib.contextmanager
def _hold_boundary(store: Store, owner: str, on_wait: Callable[[str], None]) -> Iterator[None]:
    told = False

    def wait(lease: Lease | None) -> None:
        nonlocal told
        if not told:
            holder = "another process" if lease is None else str(lease)
            on_wait(f"{store.location()}: waiting for {holder}")
            told = True
        time.sleep(POLL_SECONDS)

    if store.local_path(_BOUNDARY_LOCK_FILE) is None:
        with hold_lease(store, _BOUNDARY_LOCK_FILE, owner, wait):
            yield
        return
    path = Path(store.files.path(_BOUNDARY_LOCK_FILE))
    while True:
        with explained(store, "lock", _BOUNDARY_LOCK_FILE):
            # Tried again and again, not waited for in the kernel, so that Ctrl-C works in every thread.
            descriptor = _try_lock(path)
        if descriptor is not None:
            break
        wait(readable_lease(store, _BOUNDARY_LOCK_FILE))
    with _released(descriptor):
        with explained(store, "write", _BOUNDARY_LOCK_FILE):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, to_json(new_lease(1, owner)), 0)
        yield


def _try_lock(path: Path) -> int | None:
    """The descriptor of a locked file, which it makes; None where another holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # Python's descriptors are closed in programs that this process starts (PEP 446).
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = _is_at(descriptor, path)
        except BlockingIOError:
            return None
        finally:
            if not locked:
                os.close(descriptor)
        if locked:
            return descriptor
        # The folder was deleted between opening and locking: what is locked has no name any more.
        path.parent.mkdir(parents=True, exist_ok=True)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _released(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        # Said aloud: a forked process may still have the descriptor, and closing ours alone would not release it.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
