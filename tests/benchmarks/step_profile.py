"""Where a section's training step goes: batch, forward, loss, backward and update, and what quantizers add.

    DCQ_DATA=… python tests/benchmarks/step_profile.py [--steps 20] [--set a.b=c]…

Every section of the job takes steps on the teacher's activations, once with its quantizers and once without, in turns; one thread,
processor seconds, medians over steps. Results go to results.json.
"""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dcq_ray.jobfile import load_job

if __package__:
    from . import bare, harness
else:
    import bare
    import harness

DEFAULT_JOB = Path(__file__).with_name("speed.yaml")
PARTS = ("batch", "forward", "loss", "backward", "update")


def timed_step(
    opened: bare.Bare, module: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Tensor]
) -> list[float]:
    """Take one step on the first rows of input and target, and give the seconds of each of its parts."""
    loss = bare.loss_of(opened)
    positions = torch.arange(min(opened.job.train.batch_size, len(rows[0])))
    moments = [time.process_time()]
    # As stored, and as a step reads them.
    inputs, target = (part.index_select(0, positions).float() for part in rows)
    moments.append(time.process_time())
    output = module(inputs)
    moments.append(time.process_time())
    value = loss(output, target)
    moments.append(time.process_time())
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    moments.append(time.process_time())
    optimizer.step()
    moments.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(moments)]


def profile(opened: bare.Bare, num_steps: int) -> list[tuple[list[float], float]]:
    """For each section the median seconds of a step's parts, and those of a step without quantizers."""
    found = []
    values = [value.half() for value in bare.boundaries(opened, bare.all_images(opened.splits.train))]
    for index, section in enumerate(opened.sections):
        quantized = bare.started(opened, index, values[index].float(), fitted=False)
        sides = []
        for module in (quantized, copy.deepcopy(section)):
            module.eval().requires_grad_(True)
            bare.batchnorm_trains(module)
            sides.append((module, torch.optim.Adam(module.parameters(), lr=opened.job.train.lr, foreach=True)))
        steps: tuple[list[list[float]], list[list[float]]] = ([], [])
        # The first step allocates what later ones use again.
        for _ in range(num_steps + 1):
            for (module, optimizer), taken in zip(sides, steps, strict=True):
                taken.append(timed_step(opened, module, optimizer, values[index : index + 2]))
        medians = [statistics.median(step[part] for step in steps[0][1:]) for part in range(len(PARTS))]
        found.append((medians, statistics.median(sum(step) for step in steps[1][1:])))
    return found


def figures(found: Sequence[tuple[Sequence[float], float]]) -> list[harness.Figure]:
    """The rows: a step in milliseconds, its parts' shares, and the ratio to a step without quantizers."""
    rows = []
    for index, (parts, plain) in enumerate(found):
        whole = sum(parts)
        rows.append(harness.Figure(name=f"section {index}, a step", value=1000 * whole, unit="ms"))
        rows.extend(
            harness.Figure(name=f"section {index}, {name}", value=100 * seconds / whole, unit="%")
            for name, seconds in zip(PARTS, parts, strict=True)
        )
        rows.append(
            harness.Figure(name=f"section {index}, with / without quantizers", value=whole / plain, unit="ratio")
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = harness.arguments_parser(__doc__, job=DEFAULT_JOB)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    begun = harness.begin(__file__, arguments)
    with tempfile.TemporaryDirectory() as place:
        settings = ["data.train_samples=512", *options.settings, f"storage.cache_dir={place}"]
        job = load_job(options.job, overrides=settings, environment=os.environ)
        rows = figures(profile(bare.opened(job, str(Path(options.job).resolve().parent)), options.steps))
        batch_size = job.train.batch_size
    return harness.conclude(
        begun,
        "step",
        f"A training step of every section of {Path(options.job).name}, batches of {batch_size}, one thread.",
        rows,
        kept=not options.no_keep,
    )


if __name__ == "__main__":
    sys.exit(main())
