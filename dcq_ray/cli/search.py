"""`dcq-ray search`: bits for every section under a budget, from a library of trained sections."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

import click

from dcq_ray.cli.options import (
    SEARCH_FILE,
    debug_option,
    job_argument,
    log_format_option,
    read_job,
    run_dir_option,
    set_option,
)
from dcq_ray.errors import UsageError

if TYPE_CHECKING:
    from dcq_ray.search import Option, Searched
    from dcq_ray.spec import Job
    from dcq_ray.storage import Store

UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
PLOT_FILE = "search.svg"


@click.command(
    epilog="\b\nExample:\n  dcq-ray search jobs/resnet20-cifar10-w1.yaml --options 1,2,4 --budget 60kB"
    "\n  dcq-ray search jobs/resnet20-cifar10-w1.yaml --options 1,2,4 --max-drop 1"
)
@job_argument
@set_option
@run_dir_option
@click.option(
    "--budget", metavar="BYTES", help="Of the packed student: 60000, 60kB, 1.5MiB, or as an option: `dorefa:2`."
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    metavar="PTS",
    help="Instead: the smallest that loses no more, on held-out images.",
)
@click.option(
    "--options",
    "option_text",
    default="1,2,4",
    show_default=True,
    metavar="LIST",
    help="What every section is trained with: bits with the job's scheme, SCHEME:BITS, or SCHEME:BITS/PATTERN=SCHEME:BITS, "
    "where layers of a section get others by their names (twn:2/*.conv1=lsq:3).",
)
@click.option(
    "--looks",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="How many networks that are predicted best within the budget are measured on held-out images.",
)
@click.option("--library", metavar="DIR_OR_URI", help="Where trained sections are kept; default: RUN/library.")
@click.option("--address", default="auto", show_default=True, metavar="auto|local|none|ADDR", help="As of `run`.")
@log_format_option
@debug_option
def search(
    job_path: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    budget: str | None,
    max_drop: float | None,
    option_text: str,
    looks: int,
    library: str | None,
    address: str,
    log_format: Literal["text", "json"],
) -> None:
    """Find bits for every section under a budget, and make the network.

    Every section is trained once with each option, as `run` does it; then any combination is a network without further
    training, so another budget costs seconds. The network that is found becomes the run of the job's run directory.
    """
    if (budget is None) == (max_drop is None):
        raise UsageError("search: give either --budget BYTES or --max-drop PTS")
    job, folder = read_job(job_path, overrides, run_dir)
    if job.train.inputs != "teacher":
        raise UsageError(
            "search: train.inputs is student, so a section depends on those before it, and cannot be combined freely; "
            "add --set train.inputs=teacher"
        )
    from dcq_ray.cli.run import interruptible, run_phases, show_report, watching
    from dcq_ray.phases import requantized
    from dcq_ray.search import combination_overrides, open_library, parse_option, search_library, take_sections
    from dcq_ray.storage import open_store

    run_store = open_store(job.storage.run_dir)
    shelf = run_store.child("library") if library is None else open_store(library)
    wanted = list(dict.fromkeys(parse_option(text, job.quantize.weights.scheme) for text in option_text.split(",")))
    if len({option.name for option in wanted}) < len(wanted):
        raise UsageError(
            f"--options {option_text}: two of them would be kept in one folder of the library; give one of them"
        )
    if budget is not None:
        # What is wrong with it is told before anything is trained; sizes are known after that.
        parse_budget(budget, dict.fromkeys(wanted, 0), job.quantize.weights.scheme)
    jobs = {option: _member_job(job_path, overrides, option, shelf.child(option.name).uri) for option in wanted}
    with watching(job, log_format) as (emit, say), interruptible(job):

        def run(member: Job) -> None:
            run_phases(member, folder, address=address, fresh=False, emit=emit, say=say)

        found = open_library(jobs, folder, emit=emit, run=run)
        sizes = {member.option: found.rest_num_bytes + sum(member.num_bytes) for member in found.members}
        budget_bytes = None if budget is None else parse_budget(budget, sizes, job.quantize.weights.scheme)
        drop = None if max_drop is None else max_drop / 100
        searched = search_library(
            found, shelf, budget_bytes=budget_bytes, max_drop=drop, num_looked_at=looks, emit=emit
        )
        # Scoring an untrained student of its bits would take as long as the search.
        chosen = (
            "reduce.test=student",
            *overrides,
            f"quantize.overrides={combination_overrides(found, searched.choices)}",
        )
        mixed, _ = read_job(job_path, chosen, run_dir)
        take_sections(found, searched.choices, run_store, scores=shelf)
        # Nothing is left to train, so no Ray is started for it.
        (prepared,) = requantized(found.prepared, [mixed], device=found.device)
        result = run_phases(mixed, folder, address="none", fresh=False, emit=emit, say=say, prepared=prepared)
    _keep(searched, run_store)
    show_report(mixed, result, log_format, searched=searched)


def parse_budget(text: str, sizes: dict[Option, int], scheme: str) -> int:
    """Bytes: a number with or without a unit, or the size of the network that has one of the options everywhere."""
    number = re.fullmatch(r"\s*([\d_,]*\.?\d+)\s*([a-zA-Z]*)\s*", text)
    if number is not None and number[2].lower() in UNITS:
        return int(float(number[1].replace(",", "").replace("_", "")) * UNITS[number[2].lower()])
    from dcq_ray.search import parse_option

    if ":" in text:
        option = parse_option(text, scheme)
        if option in sizes:
            return sizes[option]
    names = ", ".join(option.text for option in sizes)
    raise UsageError(f"--budget {text}: expected bytes such as 60000, 60kB or 1.5MiB, or one of the options: {names}")


def _member_job(job_path: str, overrides: tuple[str, ...], option: Option, run_dir: str) -> Job:
    own = [f"quantize.weights.scheme={option.scheme}", f"quantize.weights.bits={option.bits}"]
    if option.exceptions:
        changed: dict[str, Any] = {}
        for pattern, scheme, bits in option.exceptions:
            changed[pattern] = {"scheme": scheme, "bits": bits}
        # The job's own come behind: what it says of a layer holds for every member.
        for pattern, override in read_job(job_path, overrides)[0].quantize.overrides.items():
            changed.pop(pattern, None)
            changed[pattern] = override.model_dump(exclude_none=True)
        own.append(f"quantize.overrides={json.dumps(changed)}")
    # A member is looked at on held-out images alone: choices are made among members, and test images are for what was chosen.
    return read_job(job_path, (*overrides, *own, "reduce.max_drop=null", "reduce.test=none"), run_dir)[0]


def _keep(searched: Searched, store: Store) -> None:
    from dcq_ray.records import to_json
    from dcq_ray.report import searched_plot

    store.write_bytes(SEARCH_FILE, to_json(searched))
    store.write_bytes(PLOT_FILE, searched_plot(searched).encode())
