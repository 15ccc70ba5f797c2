"""dcq-ray beside what a user would do instead, in processor seconds: same network, data, quantizer, batches and threads.

    DCQ_DATA=… python tests/benchmarks/rivals_speed.py [--only steps|accuracy] [--set a.b=c]…

steps     the same steps of every section, from the nearest levels: (a) as the paper's author trains, the whole teacher and the
          whole student from the images on every step; (c) as BRECQ and AIMET do, one section after the other on the student's own
          inputs, all activations in memory; and dcq-ray's dump and trainings in this process. They take turns section by section.
accuracy  (b) end-to-end DoReFa (`plain_dorefa.py`, at the better of two rates, which counts once) until its last step, and the
          smallest of a row of ever larger runs of dcq-ray that reaches its accuracy on test images: dump, training and all that
          is measured at the merge.

Results go to results.json; exits with 1 where a bar is missed.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dcq_ray.jobfile import load_job
from dcq_ray.phases import (
    activation_memory_bytes,
    dump_slices,
    ignore_progress,
    num_slices,
    open_network,
    open_run,
    run_local,
    train_section,
)
from dcq_ray.spec import Job

if __package__:
    from . import bare, harness, plain_dorefa
else:
    import bare
    import harness
    import plain_dorefa

DEFAULT_JOB = Path(__file__).with_name("speed.yaml")
OURS, AUTHOR, SEQUENTIAL = "dcq-ray", "whole networks on every step", "sequential, cached in memory"
MIN_AGAINST_AUTHOR, MAX_AGAINST_SEQUENTIAL, MAX_AGAINST_DOREFA = 3.0, 1.0, 1 / 3
DOREFA_EPOCHS, DOREFA_FACTORS = 6, (1.0, 3.0)
LADDER = (500, 1000, 2000, 5000)
"""Train images, each seen once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a training came to."""

    cpu_seconds: float
    top1: float
    told: str


def whole_networks(opened: bare.Bare, index: int, images: torch.Tensor) -> nn.Module:
    """Train one section in the author's way: both networks whole, from the images, on every step."""
    students = [copy.deepcopy(section) for section in opened.sections]
    inputs = bare.through(opened.sections[:index], images[: bare.NUM_CALIBRATION], opened.job.data.batch_size)
    students[index] = bare.started(opened, index, inputs, fitted=False)
    module = students[index]
    stepper, loss = bare.Stepper(opened, module, bare.num_steps(opened)), bare.loss_of(opened)
    for positions in bare.orders(opened):
        batch = images[positions]
        with torch.no_grad():
            ours, theirs = batch.clone(), batch.clone()
            for teacher, student in zip(opened.sections[:index], students[:index], strict=True):
                ours, theirs = student(ours), teacher(theirs)
            target = opened.sections[index](theirs)
            rest = target.clone()
            for teacher in opened.sections[index + 1 :]:
                rest = teacher(rest)
        output = module(ours)
        with torch.no_grad():
            rest = output.detach().clone()
            for student in students[index + 1 :]:
                rest = student(rest)
        stepper.step(loss(output, target))
    return module.eval()


def steps(job_file: str, settings: Sequence[str]) -> dict[str, float]:
    """Processor seconds of the three ways to the same number of steps of every section."""
    folder = str(Path(job_file).resolve().parent)
    watch = bare.Stopwatch()
    with tempfile.TemporaryDirectory() as place:
        overrides = [
            *settings,
            "train.start=nearest",
            f"storage.run_dir={place}/run",
            f"storage.cache_dir={place}/cache",
        ]
        job = load_job(job_file, overrides=overrides, environment=os.environ)
        opened = bare.opened(job, folder)
        images = bare.all_images(opened.splits.train)
        # What is loaded and chosen at a first step is no cost of any.
        bare.through(opened.sections, images[: job.data.batch_size], job.data.batch_size)
        with open_run(
            job, folder, device=torch.device("cpu"), emit=ignore_progress, owner="rivals_speed.py"
        ) as session:
            context, splits = session.context, session.prepared.splits
            network = open_network(context)

            def dump() -> None:
                session.dump(lambda missing: dump_slices(context, network, splits, range(num_slices(context)), missing))

            watch.time(OURS, dump)
            cached = watch.time(SEQUENTIAL, lambda: bare.boundaries(opened, images))
            memory_bytes = activation_memory_bytes(job, torch.device("cpu"), num_at_once=1)
            values = images
            for index, task in enumerate(session.tasks):

                def one_after_the_other(index: int = index, values: torch.Tensor = values) -> torch.Tensor:
                    module = bare.started(opened, index, values, fitted=False)
                    bare.train(opened, module, values, cached[index + 1])
                    if index + 1 == len(opened.sections):
                        return values
                    return bare.through([module], values, job.data.batch_size)

                watch.time(
                    OURS,
                    lambda task=task: train_section(
                        context, task, network, splits, emit=ignore_progress, memory_bytes=memory_bytes
                    ),
                )
                values = watch.time(SEQUENTIAL, one_after_the_other)
                watch.time(AUTHOR, lambda index=index: whole_networks(opened, index, images))
                print(f"section {index}: {watch.seconds}", file=sys.stderr, flush=True)
    return watch.seconds


def step_figures(seconds: dict[str, float]) -> list[harness.Figure]:
    """The table of the steps."""
    found = [harness.Figure(name=f"steps: {name}", value=value, unit="processor s") for name, value in seconds.items()]
    found.append(
        harness.Figure(
            name=f"steps: {AUTHOR} / {OURS}",
            value=seconds[AUTHOR] / seconds[OURS],
            unit="ratio",
            bar=MIN_AGAINST_AUTHOR,
            higher_is_better=True,
        )
    )
    found.append(
        harness.Figure(
            name=f"steps: {OURS} / {SEQUENTIAL}",
            value=seconds[OURS] / seconds[SEQUENTIAL],
            unit="ratio",
            bar=MAX_AGAINST_SEQUENTIAL,
        )
    )
    return found


def dorefa(job: Job, folder: str) -> Reached:
    """End-to-end DoReFa at the better rate by held-out images; the other rate's seconds do not count."""
    opened = bare.opened(job, folder)
    assert opened.splits.test is not None
    tried = []
    for factor in DOREFA_FACTORS:
        started = time.process_time()
        outcome = plain_dorefa.train(opened.teacher, job, opened.splits, factor * job.train.lr)
        tried.append((outcome, time.process_time() - started))
    outcome, seconds = max(tried, key=lambda pair: pair[0].held_out_top1)
    top1 = plain_dorefa.accuracy(outcome.network, opened.splits.test)
    told = f"{len(opened.splits.train):,} images x {job.train.epochs}, rate {outcome.lr:g}"
    return Reached(cpu_seconds=seconds, top1=top1, told=told)


def run_of(job_file: str, settings: Sequence[str], num_samples: int) -> Reached:
    """A run on so many images, each once; its teacher's seconds, which are loading and planning, are not counted."""
    folder = str(Path(job_file).resolve().parent)
    with tempfile.TemporaryDirectory() as place:
        folders = [f"storage.run_dir={place}/run", f"storage.cache_dir={place}/cache"]
        overrides = [*settings, f"data.train_samples={num_samples}", "train.epochs=1", *folders]
        job = load_job(job_file, overrides=overrides, environment=os.environ)
        report = run_local(job, folder, emit=ignore_progress, owner="rivals_speed.py")
    assert report.student is not None
    assert report.student.top1 is not None
    cpu = report.timings.cpu_seconds
    return Reached(
        cpu_seconds=cpu.dump + cpu.train + cpu.reduce, top1=report.student.top1, told=f"{num_samples:,} images x 1"
    )


def accuracy(job_file: str, settings: Sequence[str]) -> list[harness.Figure]:
    """The table of the accuracy: DoReFa's, and the first run that reaches it, or the largest."""
    folder = str(Path(job_file).resolve().parent)
    with tempfile.TemporaryDirectory() as place:
        overrides = [f"train.epochs={DOREFA_EPOCHS}", *settings, f"storage.cache_dir={place}/cache"]
        job = load_job(job_file, overrides=overrides, environment=os.environ)
        rival = dorefa(job, folder)
    ours = None
    for num_samples in LADDER:
        ours = run_of(job_file, settings, min(num_samples, job.data.train_samples or num_samples))
        print(f"{ours.told}: {100 * ours.top1:.1f} % in {ours.cpu_seconds:.1f} s", file=sys.stderr, flush=True)
        if ours.top1 >= rival.top1:
            break
    assert ours is not None
    return accuracy_figures(rival, ours)


def accuracy_figures(rival: Reached, ours: Reached) -> list[harness.Figure]:
    """Both sides, and the ratio of their seconds, which says little where the run is not as good as the rival."""
    ratio = ours.cpu_seconds / rival.cpu_seconds
    return [
        harness.Figure(name=f"accuracy: end-to-end DoReFa ({rival.told}), test", value=100 * rival.top1, unit="%"),
        harness.Figure(name="accuracy: end-to-end DoReFa", value=rival.cpu_seconds, unit="processor s"),
        harness.Figure(
            name=f"accuracy: {OURS} ({ours.told}), test",
            value=100 * ours.top1,
            unit="%",
            bar=round(100 * rival.top1, 2),
            higher_is_better=True,
        ),
        harness.Figure(name=f"accuracy: {OURS}", value=ours.cpu_seconds, unit="processor s"),
        harness.Figure(
            name=f"accuracy: {OURS} / end-to-end DoReFa",
            value=ratio,
            unit="ratio",
            bar=round(MAX_AGAINST_DOREFA, 3),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 1 where a bar is missed."""
    parser = harness.arguments_parser(__doc__, job=DEFAULT_JOB)
    parser.add_argument("--only", choices=["steps", "accuracy"])
    options = parser.parse_args(arguments)
    begun = harness.begin(__file__, arguments)
    names = [options.only] if options.only else ["steps", "accuracy"]
    code = 0
    for name in names:
        measured = (
            step_figures(steps(options.job, options.settings))
            if name == "steps"
            else accuracy(options.job, options.settings)
        )
        title = f"{Path(options.job).name} beside what a user would do instead."
        code |= harness.conclude(begun, f"rivals-{name}", title, measured, kept=not options.no_keep)
    return code


if __name__ == "__main__":
    sys.exit(main())
