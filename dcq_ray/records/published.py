"""What is current where students are published."""

from __future__ import annotations

from dataclasses import dataclass

CURRENT_FILE = "current.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """The version that counts, and what a better one is compared with."""

    version: str
    student_sha256: str
    teacher_sha256: str
    num_samples: int
    """Held-out images on which the score was measured."""
    score: float
    """Top-1 on held-out images; without labels the agreement with the teacher."""
    published_at: str
