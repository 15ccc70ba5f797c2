"""How fast activations are written and read: the dump beside the bare teacher, shuffled batches beside a copy in memory.

    DCQ_DATA=… python tests/benchmarks/dump_speed.py [--repeats 3] [--set a.b=c]…

One process, one thread, warm page cache. The teacher's bare forward over images that lie in memory, and the dump of all
boundaries (images from the files, conversion, checksums, fsync), take turns, in processor seconds. Then every batch of one epoch of
the largest boundary, in a training's order, read from its maps, beside copies of as many bytes; and a training of every section, of
which the waiting for input is told. Results go to results.json; exits with 1 where a bar is missed.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dcq_ray.jobfile import load_job
from dcq_ray.phases import dump_slices, ignore_progress, num_slices, open_network, open_run, train_section
from dcq_ray.phases.dump import boundary_store
from dcq_ray.phases.session import RunSession
from dcq_ray.shards import load_manifest, open_boundary, sample_order

if __package__:
    from . import bare, harness
else:
    import bare
    import harness

DEFAULT_JOB = Path(__file__).with_name("speed.yaml")
MIN_DUMP, MIN_READ, MAX_WAIT = 0.9, 0.7, 0.05


@contextmanager
def opened(job_file: str, settings: Sequence[str], place: Path) -> Iterator[RunSession]:
    """A run of its own in an empty folder."""
    overrides = [*settings, f"storage.run_dir={place / 'run'}", f"storage.cache_dir={place / 'cache'}"]
    job = load_job(job_file, overrides=overrides, environment=os.environ)
    folder = str(Path(job_file).resolve().parent)
    with open_run(job, folder, device=torch.device("cpu"), emit=ignore_progress, owner="dump_speed.py") as session:
        yield session


def dump_ratio(session: RunSession, repeats: int) -> tuple[float, float, float]:
    """Images per processor second of the teacher and of the dump, and the median of their ratios, each beside each."""
    context, splits = session.context, session.prepared.splits
    network = open_network(context)
    images = bare.all_images(splits.train)
    teachers, dumps = [], []
    for repeat in range(repeats + 1):
        for boundary in context.plan.boundaries:
            boundary_store(context, boundary).delete_tree()
        started = time.process_time()
        bare.through(network.sections, images, context.job.data.batch_size)
        teacher_seconds = time.process_time() - started
        started = time.process_time()
        session.dump(lambda missing: dump_slices(context, network, splits, range(num_slices(context)), missing))
        if repeat:
            # The first round loads what is loaded once.
            teachers.append(len(images) / teacher_seconds)
            dumps.append(len(images) / (time.process_time() - started))
    ratios = [dump / teacher for dump, teacher in zip(dumps, teachers, strict=True)]
    return max(teachers), max(dumps), statistics.median(ratios)


def read_ratio(session: RunSession, repeats: int) -> tuple[float, float, float]:
    """Bytes per processor second of copies in memory and of shuffled batches from maps, and the median of their ratios."""
    context = session.context
    boundary = max(context.plan.boundaries, key=lambda found: found.num_bytes)
    store = boundary_store(context, boundary)
    manifest = load_manifest(store, digest=boundary.digest)
    assert manifest is not None
    batch_size = min(context.job.train.batch_size, boundary.num_samples)
    order = sample_order(boundary.num_samples, window=boundary.num_samples, seed=0, section=0, epoch=0)
    batches = [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]
    with open_boundary(store, manifest) as reader:
        whole = reader.read(np.arange(boundary.num_samples))
        copies, reads = [], []
        for repeat in range(repeats + 1):
            started = time.process_time()
            for number in range(len(batches)):
                np.array(whole[number * batch_size : (number + 1) * batch_size])
            copy_seconds = time.process_time() - started
            started = time.process_time()
            for positions in batches:
                reader.read(positions)
            if repeat:
                num_bytes = len(batches) * batch_size * boundary.bytes_per_sample
                copies.append(num_bytes / copy_seconds)
                reads.append(num_bytes / (time.process_time() - started))
    ratios = [read / copy for read, copy in zip(reads, copies, strict=True)]
    return max(copies), max(reads), statistics.median(ratios)


def waits(session: RunSession, memory_bytes: int) -> list[float]:
    """The share of each section's training in which it waited for its input."""
    network = open_network(session.context)
    results = [
        train_section(
            session.context,
            task,
            network,
            session.prepared.splits,
            emit=ignore_progress,
            memory_bytes=memory_bytes,
        )
        for task in session.tasks
    ]
    return [result.input_wait_seconds / result.seconds for result in results]


def figures(
    dump: tuple[float, float, float], read: tuple[float, float, float], waited: Sequence[float]
) -> list[harness.Figure]:
    """The table of the benchmark."""
    return [
        harness.Figure(name="teacher's bare forward", value=dump[0], unit="images/processor s"),
        harness.Figure(name="dump of all boundaries", value=dump[1], unit="images/processor s"),
        harness.Figure(name="dump / forward", value=dump[2], unit="ratio", bar=MIN_DUMP, higher_is_better=True),
        harness.Figure(name="copies in memory", value=read[0] / 1e9, unit="GB/processor s"),
        harness.Figure(name="shuffled batches from maps", value=read[1] / 1e9, unit="GB/processor s"),
        harness.Figure(name="batches / copies", value=read[2], unit="ratio", bar=MIN_READ, higher_is_better=True),
        harness.Figure(
            name="largest share of a section's training that waits for input, from maps",
            value=max(waited),
            unit="ratio",
            bar=MAX_WAIT,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 1 where a bar is missed."""
    parser = harness.arguments_parser(__doc__, job=DEFAULT_JOB)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    begun = harness.begin(__file__, arguments)
    settings = ["data.held_out_samples=256", "data.test_samples=256", "train.epochs=1", *options.settings]
    with tempfile.TemporaryDirectory() as place, opened(options.job, settings, Path(place)) as session:
        dump = dump_ratio(session, options.repeats)
        read = read_ratio(session, options.repeats)
        # As where activations do not fit into memory: from the maps.
        waited = waits(session, 0)
        size = f"{len(session.prepared.splits.train):,} images"
    table = figures(dump, read, waited)
    return harness.conclude(
        begun,
        "dump",
        f"Activations of {Path(options.job).name} ({size}) written and read; one thread.",
        table,
        kept=not options.no_keep,
    )


if __name__ == "__main__":
    sys.exit(main())
