"""The C library's memory: activations of a batch are given back after every layer, and asked for again at the next."""

from __future__ import annotations

import contextlib
import ctypes

# As <malloc.h> numbers them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
MAX_KEPT_BYTES = 2**30
# Larger pieces go back to the system at once: they are few, and live long.
MAX_KEPT_PIECE_BYTES = 2**28


def keep_freed_memory() -> None:
    """Have this process keep up to 1 GiB of memory that is freed, in pieces of up to 256 MiB, for its next allocations.

    By default glibc maps large pieces anew each time, and the system clears every page of them on its first use: a quarter of a
    forward pass of ResNet-20. Other C libraries are left as they are. It changes no number that is computed.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it, and these parameters
        library.mallopt(_MMAP_THRESHOLD, MAX_KEPT_PIECE_BYTES)
        library.mallopt(_TRIM_THRESHOLD, MAX_KEPT_BYTES)
