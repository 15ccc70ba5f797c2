"""Memory that is freed is used again, and not cleared by the system each time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# 64 MiB, 16,384 pages, are written again and again; of each three times the first is not counted.
PROGRAM = """
import resource
from dcq_ray.phases.memory import keep_freed_memory

def faults():
    bytearray(b"x") * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        bytearray(b"x") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_pages_of_freed_memory_are_not_asked_for_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    given_back, kept = (int(line) for line in done.stdout.split())
    assert kept < 1000 < given_back
