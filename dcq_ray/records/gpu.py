"""What a run's work takes of a GPU's memory, as measured on one."""

from __future__ import annotations

from dataclasses import dataclass

from dcq_ray.records.version import FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as the work on it sees it."""

    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """The most bytes that torch reserves on a card for each kind of a run's work, boundaries that are kept on it apart."""

    format_version: int = FORMAT_VERSION
    key: str
    """Digest of all that the bytes depend on."""
    card: Card
    section_bytes: tuple[int, ...]
    """Of the training of each section."""
    dump_bytes: int
    """Of a dump's pass of the teacher."""
    score_bytes: int
    """Of a pass of the teacher beside the whole student."""
