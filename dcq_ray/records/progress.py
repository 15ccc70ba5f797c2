"""What a run is doing right now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dcq_ray.records.report import RunStatus
from dcq_ray.records.version import FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where one piece of work stands: a line on the screen."""

    phase: Literal["teacher", "plan", "changed", "dump", "train", "reduce", "baseline"]
    index: int | None = None
    """The section, in phase train."""
    state: Literal["waiting", "running", "done", "reused", "failed"] = "running"
    done: int = 0
    total: int = 0
    unit: str = "images"
    loss: float | None = None
    per_second: float | None = None
    seconds_left: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """What a run is doing: `status.json`, written by the driver every second or so."""

    format_version: int = FORMAT_VERSION
    name: str
    status: RunStatus
    updated_at: str
    host: str
    pid: int
    lines: tuple[Progress, ...]
    message: str
