"""Publishing: a validated student in its place for those who serve it, never a worse or a half-written one.

PLACE/20261126T020501Z-3f2a91c0/   job.yaml plan.json student.safetensors report.html report.json
PLACE/current.json                 names the version that counts; written last, whole or not at all
PLACE/current                      on a local disk, a link to that folder, switched in one step
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from datetime import UTC, datetime

from dcq_ray.digests import tensors_sha256
from dcq_ray.errors import DcqError, QualityGateMissed, StorageError, UsageError
from dcq_ray.phases.reduce import STUDENT_FILE
from dcq_ray.phases.session import REPORT_FILE, read_report
from dcq_ray.records import CURRENT_FILE, Current, RunReport, seal_json, unseal_json
from dcq_ray.storage import Store, hold_boundary
from dcq_ray.teacher import state_from_bytes

CURRENT_LINK = "current"
# The report last, as in a run directory: who sees it finds the student that it describes.
FILES = ("job.yaml", "plan.json", STUDENT_FILE, "report.html", REPORT_FILE)
_VERSION = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


def publish(source: Store, target: Store, *, keep: int, tolerance: float = 0.0) -> Current:
    """Put the student of a finished run into place, and give what is current afterwards.

    The very student that is current is not published again. Old versions beyond `keep` are removed, never the current one.

    Args:
        keep: versions, 1 or more.
        tolerance: by how much of a score, in [0, 1], the student may be worse than the current one.

    Raises:
        QualityGateMissed: it is worse on as many held-out images of the same teacher; the current one stays.
        StorageError: it is not whole, or cannot be written; the current one stays.
        UsageError: the run has no finished student, or the place is its own directory.
    """
    if target.uri == source.uri:
        raise UsageError(f"--publish {target.location()}: that is the run directory itself; name another folder")
    report = read_report(source)
    if report is None or report.status != "succeeded" or report.student is None or report.validation is None:
        raise UsageError(f"{source.location()}: no finished student to publish; run the job to its end first")
    with hold_boundary(target, owner="a run that publishes"):
        current = read_current(target)
        if current is not None and current.student_sha256 == report.student.sha256:
            return current
        found = _current_of(report)
        _refuse_worse(report, found, current, tolerance, target)
        _copy(source, target.child(found.version), report.student.sha256)
        target.write_bytes(CURRENT_FILE, seal_json(found))
        _link(target, found.version)
        _remove_old(target, found.version, keep)
    return found


def read_current(target: Store) -> Current | None:
    """What counts in a place, or None where nothing does, or what says so is damaged."""
    content = target.read_bytes_or_none(CURRENT_FILE)
    if content is not None:
        with contextlib.suppress(ValueError):
            return unseal_json(Current, content)
    return None


def _current_of(report: RunReport) -> Current:
    assert report.student is not None
    assert report.validation is not None
    now, validation = datetime.now(UTC), report.validation
    return Current(
        version=f"{now:%Y%m%dT%H%M%SZ}-{report.student.sha256[:8]}",
        student_sha256=report.student.sha256,
        teacher_sha256=report.teacher.sha256,
        num_samples=validation.num_samples,
        score=validation.agreement_with_teacher if validation.top1 is None else validation.top1,
        published_at=now.isoformat(timespec="seconds"),
    )


def _refuse_worse(report: RunReport, found: Current, current: Current | None, tolerance: float, target: Store) -> None:
    """Scores of another teacher, or on other images as far as their number tells, say nothing of each other."""
    if current is None or (current.teacher_sha256, current.num_samples) != (found.teacher_sha256, found.num_samples):
        return
    # Fractions carry noise in their last bits.
    if found.score < current.score - tolerance - 1e-12:
        raise QualityGateMissed(
            f"run {report.name}: the student scores {100 * found.score:.2f} % on held-out images, the published one of "
            f"{target.location()} {100 * current.score:.2f} %; that one stays current; allow so much with --publish-tolerance, "
            "or publish into another folder"
        )


def _copy(source: Store, version: Store, student_sha256: str) -> None:
    for name in FILES:
        version.write_bytes(name, source.read_bytes(name))
    where = version.location(STUDENT_FILE)
    try:
        written = tensors_sha256(state_from_bytes(version.read_bytes(STUDENT_FILE), source=where))
    except StorageError:
        raise
    except DcqError as error:
        raise StorageError(f"{error}; it is not made current; run the job again") from error
    if written != student_sha256:
        raise StorageError(
            f"{where}: its tensors have digest {written[:12]}, the report says {student_sha256[:12]}; it is not made current; "
            "run the job again"
        )


def _link(target: Store, version: str) -> None:
    """On a local disk, switch the link in one step."""
    path = target.local_path(CURRENT_LINK)
    if path is None:
        return
    beside = path.with_name(f".{CURRENT_LINK}-{uuid.uuid4().hex[:8]}")
    try:
        beside.symlink_to(version)
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(
            f"{path}: the link cannot be switched ({error}); {CURRENT_FILE} names the version that counts; remove what is there"
        ) from error


def _remove_old(target: Store, current: str, keep: int) -> None:
    versions = sorted(name for name in target.list_names() if _VERSION.fullmatch(name))
    # A clock that was set back may name the newest first.
    others = [name for name in versions if name != current]
    for name in others[: max(0, len(others) + 1 - max(1, keep))]:
        target.child(name).delete_tree()
