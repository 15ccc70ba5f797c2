"""Event files for TensorBoard, which is an extra: a run's progress lines as curves, and what it gave."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from dcq_ray.errors import UsageError
from dcq_ray.records import Progress, RunReport
from dcq_ray.storage import Store

FOLDER = "tensorboard"
Events = tuple[Callable[[Progress], None], Callable[[RunReport], None]]


def check_tensorboard() -> None:
    """Raise UsageError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard: TensorBoard is not installed here; run `pip install 'dcq-ray[tensorboard]'`, or leave the option out"
        )


@contextlib.contextmanager
def drawn(run: Store, emit: Callable[[Progress], None], *, fresh: bool = False) -> Iterator[Events]:
    """Write event files below a run directory until the block ends; those of earlier runs stay, and TensorBoard joins them.

    Args:
        fresh: the run starts over: TensorBoard is to pass over the curves of earlier files.

    Yields:
        What takes a run's progress and passes it on to `emit`, and what takes the report of the run when it is finished.

    Raises:
        UsageError: TensorBoard is missing, or the run directory is not on this machine.
    """
    check_tensorboard()
    folder = run.local_path(FOLDER)
    if folder is None:
        raise UsageError(
            f"--tensorboard: {run.location()} is no folder of this machine, and event files are written while the run goes on; "
            "leave the option out, or name a folder by --run-dir"
        )
    from torch.utils.tensorboard import SummaryWriter

    @functools.cache
    def writer() -> Any:
        # Opened by the first point: a run that is refused, since another holds the directory, is not to hide that one's curves.
        return SummaryWriter(str(folder), flush_secs=10, purge_step=0 if fresh else None)  # type: ignore[no-untyped-call]

    def take(progress: Progress) -> None:
        for name, value in section_scalars(progress).items():
            writer().add_scalar(name, value, progress.done)
        emit(progress)

    def finish(report: RunReport) -> None:
        for name, value in report_scalars(report).items():
            writer().add_scalar(name, value, 0)

    try:
        yield take, finish
    finally:
        if writer.cache_info().currsize:
            writer().close()


def section_scalars(progress: Progress) -> dict[str, float]:
    """What a line says of a section in training: a curve's name -> its value."""
    if progress.phase != "train" or progress.index is None or progress.state != "running":
        return {}
    found = {"loss": progress.loss, "images_per_second": progress.per_second}
    return {f"{name}/section-{progress.index:02d}": float(value) for name, value in found.items() if value is not None}


def report_scalars(report: RunReport) -> dict[str, float]:
    """Top-1 on test images, as far as it is known: a curve's name -> its value."""
    found = {
        "top1/teacher": report.teacher.top1,
        "top1/untrained": report.untrained_top1,
        "top1/student": None if report.student is None else report.student.top1,
    }
    return {name: value for name, value in found.items() if value is not None}
