"""What changed under a run directory since its last run, and what is therefore done again.

Whether something is used again is decided by digests alone; this says it in words, before anything is done, so that nobody
takes an old result for a new one, or wonders where yesterday's work went.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dcq_ray.errors import DcqError
from dcq_ray.jobfile import parse_job
from dcq_ray.records import PartitionPlan, RunReport, unseal_json
from dcq_ray.spec import Job
from dcq_ray.storage import Store

PLAN_FILE = "plan.json"
JOB_FILE = "job.yaml"
# Where files lie, what they are called and where work runs changes no result.
WITHOUT_CONSEQUENCE = ("name", "storage.run_dir", "storage.cache_dir", "storage.checkpoint_seconds", "resources.")
# On these the images, or what is stored of them, depend.
OF_IMAGES = ("data.", "seed", "storage.dtype", "train.num_threads", "train.augment")
MAX_NAMED = 6
NOTE_BEGINNING = "Changed since the run before in this directory: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What the last run of a run directory left; None for what is not there or cannot be read."""

    job: Job | None
    plan: PartitionPlan | None
    versions: Mapping[str, str] | None


def earlier_run(store: Store, report: RunReport | None) -> Earlier:
    """Read it, before a new run writes over it; `report`: the directory's own."""
    job, plan = None, None
    content = store.read_bytes_or_none(JOB_FILE)
    if content is not None:
        # Of a version with other keys, or damaged: what depends on it has other digests in any case.
        with contextlib.suppress(DcqError, ValueError):
            job = parse_job(content, source=store.location(JOB_FILE), environment={})
    content = store.read_bytes_or_none(PLAN_FILE)
    if content is not None:
        with contextlib.suppress(ValueError):
            plan = unseal_json(PartitionPlan, content)
    return Earlier(job=job, plan=plan, versions=None if report is None else report.versions)


def changes(earlier: Earlier, job: Job, plan: PartitionPlan, versions: Mapping[str, str]) -> tuple[str, ...]:
    """A phrase for each thing that changed: keys of the job, the teacher, its code, the images, library versions.

    Keys that change no result are left out; none of this where there was no earlier run.
    """
    keys = [] if earlier.job is None else list(_changed_keys(earlier.job, job))
    found = [f"{key}: {_told(old)} -> {_told(new)}" for key, old, new in keys]
    others = []
    for name in sorted({*versions, *(earlier.versions or {})}) if earlier.versions is not None else ():
        old, new = (known.get(name, "none") for known in (earlier.versions or {}, versions))
        if old != new:
            others.append(f"version of {name}: {old} -> {new}")
    if earlier.plan is not None:
        others += _unseen(earlier.plan, plan, names={key for key, _, _ in keys}, versions_changed=bool(others))
    more = len(found) - MAX_NAMED
    if more > 0:
        found = [*found[:MAX_NAMED], f"{more} more keys of the job"]
    return (*found, *others)


def consequence(*, trained: int, again: int, boundaries_kept: int, boundaries: int) -> str:
    """What follows for sections that were trained and boundaries of the plan, in a sentence."""
    if not again:
        return f"all {trained} trained sections are used again"
    kept = "no trained section is used again" if again == trained else f"{trained - again} sections are used again"
    return (
        f"{again} of {trained} trained sections are trained again, {kept}; "
        f"{boundaries_kept} of {boundaries} boundaries stay the same"
    )


def changes_note(found: tuple[str, ...], sentence: str, earlier: RunReport | None) -> str | None:
    """What the report says of it; what an unfinished run was to say is not lost."""
    if found:
        return f"{NOTE_BEGINNING}{'; '.join(found)}. So {sentence}."
    if earlier is not None and earlier.status != "succeeded":
        return next((note for note in earlier.notes if note.startswith(NOTE_BEGINNING)), None)
    return None


def _changed_keys(old: Job, new: Job) -> Iterator[tuple[str, Any, Any]]:
    before, after = (dict(_flat("", job.model_dump(mode="json"))) for job in (old, new))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key) and not _starts(key, WITHOUT_CONSEQUENCE):
            yield key, before.get(key), after.get(key)


def _unseen(old: PartitionPlan, new: PartitionPlan, *, names: set[str], versions_changed: bool) -> Iterator[str]:
    """What changed although no key of the job says so."""
    if old.teacher_sha256 != new.teacher_sha256:
        yield f"the teacher's tensors: {old.teacher_sha256[:12]} -> {new.teacher_sha256[:12]}"
    of_images = versions_changed or any(_starts(name, OF_IMAGES) for name in names)
    if of_images:
        return
    first = old.boundaries[0], new.boundaries[0]
    if first[0].digest != first[1].digest:
        yield "the images, or how they are preprocessed, though the job names the same"
    elif old.teacher_sha256 == new.teacher_sha256 and not any(
        _starts(name, ("teacher.", "sections")) for name in names
    ):
        before, after = ({boundary.cut: boundary.digest for boundary in plan.boundaries} for plan in (old, new))
        if any(before[cut] != after[cut] for cut in before.keys() & after.keys()):
            yield "the teacher's code, with the same tensors"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), part)
    else:
        yield prefix, value


def _starts(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(
        key == prefix or (prefix.endswith(".") and key.startswith(prefix)) or key.startswith(f"{prefix}.")
        for prefix in prefixes
    )


def _told(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
