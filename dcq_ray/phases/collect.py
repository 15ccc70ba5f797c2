"""Collecting the cache: what no run uses is removed; what a run leases that lives, or that cannot be asked, stays.

A *use* (`storage.uses`) of a boundary counts

- while its run is live: a driver holds the run's lock;
- while its run has not succeeded, since it will go on from there;
- while its run cannot be asked, as one in a folder of another machine, until the use is `unseen_days` old.

It does not count once the run has succeeded, its folder is gone, or the user says so. A boundary is removed under its lock,
which a dumper holds; and in the order in which a run that begins meanwhile is seen: a run first says its use and then looks
for the manifest, this takes the manifest away and then looks for uses.

Teachers, and the checkpoints and results of their fits, have no uses of their own. They stay while any run is live or
cannot be asked, where the plan of an unfinished run names them, and for `fit_days` anyway: they take longest to make again.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from dcq_ray.errors import StorageError
from dcq_ray.phases.session import read_report
from dcq_ray.storage import Store, StoredFile, Use, hold_boundary, open_store, read_uses, remove_use, run_is_held

SECONDS_PER_DAY = 86400.0
UNSEEN_DAYS = 30.0
FIT_DAYS = 30.0
# A run says its uses a moment before its report says that it is running.
NEW_USE_SECONDS = 600.0
# No writer takes so long for one file.
LEFTOVER_SECONDS = SECONDS_PER_DAY

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST_FILE = "manifest.json"
_PLAN_FILE = "plan.json"
_LEFTOVER = re.compile(r"\.tmp-\d+-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One thing in the cache, and what becomes of it."""

    kind: str
    """boundary, teacher, fit or leftover."""
    name: str
    """Relative to the cache."""
    num_bytes: int
    removed: bool
    """With `dry_run`: would be."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What counts; ages in days."""

    unused_days: float = 0.0
    """Boundaries stay until nobody wrote or used them for so long."""
    fit_days: float = FIT_DAYS
    """Likewise teachers and fits."""
    unseen_days: float = UNSEEN_DAYS
    forgotten: frozenset[str] = frozenset()
    """Absolute addresses of runs whose uses do not count."""
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Whether a use counts, and why."""

    counts: bool
    reason: str
    plan_teacher: str | None = None
    """The teacher that the run needs, and no other; None where that is not known."""


def collect(cache: Store, rules: Rules) -> Iterator[Collected]:
    """Remove what no run uses from a cache, and yield each thing as it is decided; what cannot be removed is said and stays.

    Raises:
        StorageError: the cache cannot be listed.
    """
    names = cache.list_names()
    boundaries = [name for name in names if _DIGEST.fullmatch(name)]
    states: dict[Use, RunState] = {}
    uses = {name: _states(read_uses(cache.child(name)), rules, states) for name in boundaries}
    # Every run says here, before it looks for a teacher, that it uses the cache.
    runs = [*_states(read_uses(cache), rules, states), *(state for found in uses.values() for state in found)]
    for name in boundaries:
        yield _collect_boundary(cache, name, uses[name], rules)
    yield from _collect_teachers(cache, names, runs, rules)
    yield from _collect_leftovers(cache, rules)
    if not rules.dry_run:
        for use in read_uses(cache):
            if use.run and not use_state(use, rules).counts:
                with contextlib.suppress(StorageError):
                    remove_use(cache, use.run)


def use_state(use: Use, rules: Rules) -> RunState:
    """Whether a use counts."""
    age_seconds = time.time() - use.at
    if use.run in rules.forgotten:
        return RunState(counts=False, reason="you said to forget its run")
    if not use.run:
        return _unseen(use, "its use is damaged", age_seconds, rules)
    try:
        run = open_store(use.run)
        live, there, report = run_is_held(run), bool(run.list_names()), read_report(run)
    except StorageError as error:
        return _unseen(use, f"its run cannot be asked ({error})", age_seconds, rules)
    if live:
        return RunState(counts=True, reason=f"{use.run} is live")
    # What another machine calls by this path may be another folder.
    elsewhere = run.local_path(_PLAN_FILE) is not None and use.host != socket.gethostname()
    succeeded = report is not None and report.status == "succeeded"
    if there and not succeeded:
        return RunState(counts=True, reason=f"{use.run} has not finished", plan_teacher=_plan_teacher(run))
    if elsewhere:
        return _unseen(use, f"{use.run} is a folder of another machine ({use.host or 'unknown'})", age_seconds, rules)
    if age_seconds < NEW_USE_SECONDS:
        return RunState(counts=True, reason=f"{use.run} said just now that it uses it")
    return RunState(counts=False, reason="its run has succeeded" if there else "its run is gone")


def _unseen(use: Use, why: str, age_seconds: float, rules: Rules) -> RunState:
    days = age_seconds / SECONDS_PER_DAY
    if days > rules.unseen_days:
        return RunState(counts=False, reason=f"{why}, and that was {days:.0f} days ago")
    return RunState(counts=True, reason=f"{why}; it counts until it is {rules.unseen_days:g} days old")


def _states(uses: Sequence[Use], rules: Rules, known: dict[Use, RunState]) -> list[RunState]:
    for use in uses:
        if use not in known:
            known[use] = use_state(use, rules)
    return [known[use] for use in uses]


def _plan_teacher(run: Store) -> str | None:
    """The teacher that an unfinished run goes on with, None where its plan does not say."""
    with contextlib.suppress(StorageError, ValueError, KeyError, TypeError):
        return str(json.loads(run.read_bytes(_PLAN_FILE))["teacher_sha256"])
    return None


class _Held(Exception):
    """Another holds the folder's lock."""


def _give_up(who: str) -> None:
    raise _Held(who)


def _collect_boundary(cache: Store, name: str, states: Sequence[RunState], rules: Rules) -> Collected:
    store = cache.child(name)
    files = store.tree()

    def told(removed: bool, reason: str) -> Collected:
        return Collected(kind="boundary", name=name, num_bytes=_num_bytes(files), removed=removed, reason=reason)

    counting = [state for state in states if state.counts]
    if counting:
        return told(False, counting[0].reason)
    days = _age_days(files)
    if days < rules.unused_days:
        return told(False, f"it was written or used {days:.1f} days ago")
    reason = states[-1].reason if states else "no run uses it"
    if rules.dry_run:
        return told(True, reason)
    try:
        with hold_boundary(store, owner="dcq-ray gc", on_wait=_give_up):
            manifest = store.read_bytes_or_none(_MANIFEST_FILE)
            store.delete(_MANIFEST_FILE)
            new = [state for state in (use_state(use, rules) for use in read_uses(store)) if state.counts]
            if new:
                if manifest is not None:
                    store.write_bytes(_MANIFEST_FILE, manifest)
                return told(False, new[0].reason)
            store.delete_tree()
    except _Held as held:
        return told(False, str(held))
    except StorageError as error:
        return told(False, f"it cannot be removed: {error}")
    return told(True, reason)


def _collect_teachers(
    cache: Store, names: Collection[str], runs: Sequence[RunState], rules: Rules
) -> Iterator[Collected]:
    """Teachers, results of fits, and the checkpoints of fits that never ended.

    Only what has a digest for a name is ours: a folder that is no cache may have teachers, too.
    """
    counting = [run for run in runs if run.counts]
    blocking = next((run.reason for run in counting if run.plan_teacher is None), None)
    needed = {run.plan_teacher for run in counting}
    fits = cache.child("fits")
    fit_names = [n for n in fits.list_names() if _DIGEST.fullmatch(n.removesuffix(".json"))] if "fits" in names else []
    results = [name for name in fit_names if name.endswith(".json")]
    for name in results:
        teacher = _fitted_teacher(fits, name)
        yield _collect_files(cache, f"fits/{name}", "fit", blocking or _need(teacher, needed), rules)
    for name in [name for name in fit_names if not name.endswith(".json")]:
        # Of a fit that ended only the lock is left.
        unfinished = f"{name}.json" not in results
        why = "an unfinished run may go on with it" if unfinished and counting else blocking
        yield _collect_files(cache, f"fits/{name}", "fit", why, rules)
    teachers = cache.child("teachers").list_names() if "teachers" in names else []
    for name in [name for name in teachers if _DIGEST.fullmatch(name)]:
        yield _collect_files(cache, f"teachers/{name}", "teacher", blocking or _need(name, needed), rules)


def _need(teacher: str | None, needed: Collection[str | None]) -> str | None:
    return "an unfinished run trains towards it" if teacher in needed else None


def _fitted_teacher(fits: Store, name: str) -> str | None:
    with contextlib.suppress(StorageError, ValueError, KeyError, TypeError):
        return str(json.loads(fits.read_bytes(name))["teacher_sha256"])
    return None


def _collect_files(cache: Store, name: str, kind: str, blocking: str | None, rules: Rules) -> Collected:
    """Remove a file or a folder under its lock, where nothing blocks that and it is old enough."""
    store = cache.child(name)
    folder, _, last = name.rpartition("/")
    files = [file for file in cache.child(folder).tree() if file.name == last or file.name.startswith(f"{last}/")]

    def told(removed: bool, reason: str) -> Collected:
        return Collected(kind=kind, name=name, num_bytes=_num_bytes(files), removed=removed, reason=reason)

    if blocking is not None:
        return told(False, blocking)
    days = _age_days(files)
    if days < rules.fit_days:
        return told(False, f"it was written {days:.1f} days ago")
    if not rules.dry_run:
        try:
            if cache.size(name) is not None:
                cache.delete(name)
            else:
                with hold_boundary(store, owner="dcq-ray gc", on_wait=_give_up):
                    store.delete_tree()
        except _Held as held:
            return told(False, str(held))
        except StorageError as error:
            return told(False, f"it cannot be removed: {error}")
    return told(True, "no unfinished run needs it")


def _collect_leftovers(cache: Store, rules: Rules) -> Iterator[Collected]:
    """Half-written files of dead writers."""
    for file in cache.tree():
        age_seconds = time.time() - file.modified_at
        if _LEFTOVER.fullmatch(file.name.rpartition("/")[2]) and age_seconds > LEFTOVER_SECONDS:
            if not rules.dry_run:
                cache.delete(file.name)
            yield Collected(
                kind="leftover", name=file.name, num_bytes=file.num_bytes, removed=True, reason="its writer is dead"
            )


def _num_bytes(files: Sequence[StoredFile]) -> int:
    return sum(file.num_bytes for file in files)


def _age_days(files: Sequence[StoredFile]) -> float:
    """Since a file of it was written last; a use is a file, too, and a lock that was only tried is not one."""
    times = [file.modified_at for file in files if not file.name.rpartition("/")[2].startswith(".lock")]
    return (time.time() - max(times, default=0.0)) / SECONDS_PER_DAY
