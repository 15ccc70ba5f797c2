"""Digests of tensors, plain values and files, and the versions of the libraries that determine numbers."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcq_ray.version import __version__

LIBRARIES = ("torch", "torchvision", "numpy", "pyarrow")


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over sorted (name, dtype, shape, bytes); memory layout and device do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # As bytes, since numpy knows no bfloat16; a 0-dimensional tensor has no last dimension to view.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Hex digest of a plain value's canonical JSON; raises ValueError on NaN and infinity, TypeError on other objects."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of all that determines numbers."""
    return {"dcq_ray": __version__, "python": platform.python_version(), **dict(_installed_versions())}


@functools.cache
def _installed_versions() -> tuple[tuple[str, str], ...]:
    # Each look parses a distribution's whole metadata, and every section's digest asks.
    return tuple((name, metadata.version(name)) for name in LIBRARIES)
