"""The benchmark of memory: its table, and a small job's peaks within their bounds."""

from __future__ import annotations

import time

from benchmarks import memory
from benchmarks.memory import Peak, Size, compared, figures, growth

from dcq_ray.phases import Footprint

BOUND = Footprint(base_bytes=300 * 2**20, teacher_bytes=100 * 2**20, step_bytes=100 * 2**20)


def test_bars_are_of_peaks_over_their_bounds() -> None:
    # Three teachers are more than one and a step.
    rows = figures([("a", BOUND, Peak(anonymous=540 * 2**20, resident=700 * 2**20))])
    assert [row.value for row in rows] == [600.0, 540.0, 700.0, 0.9]
    assert rows[-1].met is True
    assert growth(Peak(anonymous=100, resident=1), Peak(anonymous=120, resident=1)).met is False


def test_memory_of_a_block_is_watched() -> None:
    with memory.watched() as before:
        pass
    with memory.watched() as found:
        block = bytearray(b"x") * 2**26
        time.sleep(0.05)
        del block
    assert found[0] >= before[0] + 2**25


def test_a_small_jobs_workers_stay_within_their_bounds() -> None:
    size = Size(name="small", model="resnet20", num_samples=64, batch_size=32, num_sections=2)
    found = compared(size)
    assert [name for name, _, _ in found] == ["small, dump", "small, section 0", "small, section 1"]
    for _, bound, peak in found:
        assert 2**27 < peak.anonymous <= min(bound.num_bytes, peak.resident)
