"""What a run tells Prometheus, through Ray's own endpoint: the driver's progress lines as gauges and counters.

All is recorded in the driver, when it hears of progress anyway: workers and their training know nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import ray
from ray.util.metrics import Counter, Gauge

from dcq_ray.phases import DumpedSlice, Emit
from dcq_ray.records import Boundary, Progress

SECONDS_BETWEEN_RECORDS = 1.0
# Name -> what it is; Prometheus shows them with `ray_` before, and `_total` after counters.
SECTION_GAUGES = {
    "dcq_ray_section_loss": "The loss of a section's latest reported step.",
    "dcq_ray_section_images_per_second": "Images that a section trains on per second.",
    "dcq_ray_section_progress_ratio": "The share of a section's training that is done, 0 to 1.",
}
SECTION_COUNTERS = {"dcq_ray_section_wait_seconds": "Seconds that a section waited for a worker."}
RUN_COUNTERS = {"dcq_ray_dumped_bytes": "Bytes of activations that were dumped at boundaries."}


def section_values(progress: Progress) -> dict[str, float]:
    """What a line says of a section: a gauge's name -> its value; nothing of what it leaves open."""
    values: dict[str, float] = {}
    if progress.phase != "train" or progress.index is None:
        return values
    if progress.loss is not None:
        values["dcq_ray_section_loss"] = progress.loss
    if progress.per_second is not None:
        values["dcq_ray_section_images_per_second"] = progress.per_second
    if progress.state in ("done", "reused"):
        values["dcq_ray_section_progress_ratio"] = 1.0
    elif progress.total:
        values["dcq_ray_section_progress_ratio"] = progress.done / progress.total
    return values


def waits(clock: Callable[[], float]) -> Callable[[Progress], float]:
    """What tells of each line how many seconds its section waited, once it does so no longer; else 0."""
    since: dict[int, float] = {}

    def waited(progress: Progress) -> float:
        if progress.phase != "train" or progress.index is None:
            return 0.0
        if progress.state == "waiting":
            since.setdefault(progress.index, clock())
            return 0.0
        now = clock()
        return now - since.pop(progress.index, now)

    return waited


def metered(emit: Emit, run: str, *, clock: Callable[[], float] = time.monotonic) -> Emit:
    """An emit that also records what it is told; to be called once Ray is connected."""
    # A client of a cluster elsewhere has no Ray of its own that would pass metrics on.
    if ray.util.client.ray.is_connected():
        return emit
    gauges = {name: Gauge(name, told, tag_keys=("run", "section")) for name, told in SECTION_GAUGES.items()}
    ((name, told),) = SECTION_COUNTERS.items()
    wait_seconds = Counter(name, told, tag_keys=("run", "section"))
    waited = waits(clock)
    latest: dict[tuple[str, str], float] = {}
    recorded_at = float("-inf")

    def record_and_emit(progress: Progress) -> None:
        nonlocal recorded_at
        section = str(progress.index)
        latest.update({(name, section): value for name, value in section_values(progress).items()})
        # Ray shows a gauge once each time it is set, so those of sections at rest are set again and again, too.
        if clock() - recorded_at >= SECONDS_BETWEEN_RECORDS or progress.state != "running":
            recorded_at = clock()
            for (name, index), value in latest.items():
                gauges[name].set(value, tags={"run": run, "section": index})
        seconds = waited(progress)
        if seconds > 0:
            wait_seconds.inc(seconds, tags={"run": run, "section": section})
        emit(progress)

    return record_and_emit


def counted(slices: Iterable[DumpedSlice], missing: Sequence[Boundary], run: str) -> Iterator[DumpedSlice]:
    """The slices as they come, with their bytes recorded."""
    if ray.util.client.ray.is_connected():
        yield from slices
        return
    ((name, told),) = RUN_COUNTERS.items()
    dumped_bytes = Counter(name, told, tag_keys=("run",))
    # A slice is of one view, and all views have the same boundaries.
    num_views = len({boundary.view for boundary in missing})
    bytes_per_sample = sum(boundary.bytes_per_sample for boundary in missing) / num_views
    for dumped in slices:
        num_bytes = dumped.num_samples * bytes_per_sample
        if num_bytes > 0:
            dumped_bytes.inc(num_bytes, tags={"run": run})
        yield dumped
