"""The shards of a boundary."""

from __future__ import annotations

from dataclasses import dataclass

from dcq_ray.records.version import FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard file of a boundary."""

    index: int
    file_name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """The commit mark of one boundary's shards, in order of the samples."""

    format_version: int = FORMAT_VERSION
    digest: str
    cut: str
    shape: tuple[int, ...]
    dtype: str
    compression: str
    num_samples: int
    samples_per_shard: int
    shards: tuple[ShardInfo, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)
