"""What checkpoints add to the training of sections: ResNet-20 in 4 sections, with them beside without them.

    DCQ_DATA=… python tests/benchmarks/checkpoint_cost.py [--repeats 3] [--epochs 8]

Every section is trained from the nearest levels without checkpoints, at the default pace (30 s, and at epochs' ends as long as that
costs little) and at 2 s, one after the other in a rotating order. The ratios are of processor seconds, each of a training to the
one without checkpoints beside it; the median is over sections and repeats. What the saves themselves took, copying the state
apart, stands beside: a ratio means little where others use the same cores. A Markdown table goes to standard output. Exits with 1
where a median is above the bar. What a killed worker loses is in chaos.py's row of actors.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dcq_ray.jobfile import load_job
from dcq_ray.phases import (
    activation_memory_bytes,
    dump_slices,
    ignore_progress,
    num_slices,
    open_network,
    open_run,
    train_section,
)
from dcq_ray.phases.saving import SectionSaver
from dcq_ray.spec import StorageSpec

if __package__:
    from .chaos import DEFAULT_JOB
else:
    from chaos import DEFAULT_JOB

MAX_ADDED = 0.03
DEFAULT_SECONDS = StorageSpec.model_fields["checkpoint_seconds"].default
PACES: tuple[float | None, ...] = (None, DEFAULT_SECONDS, 2.0)
"""Seconds between checkpoints; None: there are none."""


class NoPace:
    """A pace at which no checkpoint is ever due."""

    due = due_after_epoch = False

    def __init__(self, _interval_seconds: float) -> None:
        """As of `Pace`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a training of a section took."""

    cpu_seconds: float
    save_cpu_seconds: tuple[float, ...]
    """Of every checkpoint: encoding its tensors, their digest, writing."""
    weights_sha256: str


@contextlib.contextmanager
def timed_saves() -> Iterator[list[float]]:
    """The processor seconds of every call that saves a section while the block runs."""
    found: list[float] = []
    save = SectionSaver.save

    def timed(saver: SectionSaver, *arguments: Any, **named: Any) -> None:
        started = time.process_time()
        save(saver, *arguments, **named)
        found.append(time.process_time() - started)

    with mock.patch.object(SectionSaver, "save", timed):
        yield found


def trainings(epochs: int | None, repeats: int, folder: Path) -> Iterator[tuple[int, dict[float | None, Training]]]:
    """For every repeat and section: its index, and a training at every pace."""
    overrides = ["train.start=nearest", f"storage.run_dir={folder / 'run'}", f"storage.cache_dir={folder / 'cache'}"]
    if epochs is not None:
        overrides.append(f"train.epochs={epochs}")
    job = load_job(str(DEFAULT_JOB), overrides=overrides, environment=os.environ)
    device = torch.device("cpu")
    with open_run(job, str(folder), device=device, emit=ignore_progress, owner="checkpoint_cost.py") as session:
        context, splits = session.context, session.prepared.splits
        network = open_network(context)
        session.dump(lambda missing: dump_slices(context, network, splits, range(num_slices(context)), missing))

        def train(index: int, pace_seconds: float | None) -> Training:
            storage = job.storage.model_copy(update={"checkpoint_seconds": pace_seconds or DEFAULT_SECONDS})
            paced = replace(context, job=job.model_copy(update={"storage": storage}))
            with contextlib.ExitStack() as stack:
                saves = stack.enter_context(timed_saves())
                if pace_seconds is None:
                    stack.enter_context(mock.patch("dcq_ray.phases.train.Pace", NoPace))
                result = train_section(
                    paced,
                    session.tasks[index],
                    network,
                    splits,
                    emit=ignore_progress,
                    memory_bytes=activation_memory_bytes(job, device, num_at_once=1),
                )
            return Training(
                cpu_seconds=result.cpu_seconds, save_cpu_seconds=tuple(saves), weights_sha256=result.weights_sha256
            )

        # What is loaded at the first step of a process is no cost of either.
        train(0, None)
        for repeat in range(repeats):
            for task in session.tasks:
                turn = (repeat + task.index) % len(PACES)
                yield task.index, {pace: train(task.index, pace) for pace in (*PACES[turn:], *PACES[:turn])}


def ratios(found: Sequence[dict[float | None, Training]]) -> dict[float, list[float]]:
    """The processor seconds at every pace to those without checkpoints, each beside each, from least to most."""
    by_pace: dict[float, list[float]] = defaultdict(list)
    for paced in found:
        for pace, training in paced.items():
            if pace is not None:
                by_pace[pace].append(training.cpu_seconds / paced[None].cpu_seconds)
    return {pace: sorted(values) for pace, values in sorted(by_pace.items(), reverse=True)}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: those of chaos.yaml")
    options = parser.parse_args(arguments)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for index, paced in trainings(options.epochs, options.repeats, Path(folder)):
            told = ", ".join(
                f"{'none' if pace is None else f'{pace:g} s'}: {training.cpu_seconds:.2f} s"
                for pace, training in paced.items()
            )
            print(f"section {index}: {told}", file=sys.stderr, flush=True)
            found.append(paced)
    if any(len({training.weights_sha256 for training in paced.values()}) > 1 for paced in found):
        print("checkpoints changed what a section gives", file=sys.stderr)
        return 1
    plain_seconds = statistics.mean(paced[None].cpu_seconds for paced in found)
    print(f"{os.cpu_count()} cores; {len(found)} trainings a pace, {plain_seconds:.1f} processor seconds each without")
    print("\n| checkpoints, s | saved, mean | processor ms each | share in saves | ratio, median | least | most |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    by_pace = ratios(found)
    for pace, values in by_pace.items():
        saves = [seconds for paced in found for seconds in paced[pace].save_cpu_seconds]
        each = f"{1000 * statistics.mean(saves):.0f}" if saves else "-"
        share = sum(saves) / sum(paced[pace].cpu_seconds for paced in found)
        print(
            f"| {pace:g} | {len(saves) / len(found):.1f} | {each} | {100 * share:.2f} % | {statistics.median(values):.3f} "
            f"| {values[0]:.3f} | {values[-1]:.3f} |"
        )
    return 1 if any(statistics.median(values) > 1 + MAX_ADDED for values in by_pace.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
