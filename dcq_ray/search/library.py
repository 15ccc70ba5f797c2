"""A library of sections: one run for each choice of quantizer, and what each of its sections takes and costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dcq_ray.errors import UsageError
from dcq_ray.phases import (
    Emit,
    Network,
    Prepared,
    choose_device,
    measure_sections,
    measured_section,
    open_network,
    prepare,
    requantized,
    section_tasks,
)
from dcq_ray.phases.committed import finished_section
from dcq_ray.quantizers import packed_num_bytes
from dcq_ray.records import PartitionPlan, Progress, RunContext, SectionMeasurement, SectionResult
from dcq_ray.search.frontier import Choice
from dcq_ray.spec import Job
from dcq_ray.storage import open_store

# Smaller differences of divergences, in nats, are noise of the 1,000 images that they are measured on; where they counted, the
# front would have networks side by side that are one network for all purposes.
COST_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A quantizer of weights that every section is trained with."""

    scheme: str
    bits: int
    exceptions: tuple[tuple[str, str, int], ...] = ()
    """Patterns of layers' names, as of `quantize.overrides`, with a scheme and bits of their own; the last match wins."""

    @property
    def text(self) -> str:
        """As `parse_option` reads it."""
        others = (f"/{pattern}={scheme}:{bits}" for pattern, scheme, bits in self.exceptions)
        return f"{self.scheme}:{self.bits}{''.join(others)}"

    @property
    def name(self) -> str:
        """Its folder in a library."""
        return re.sub("[^A-Za-z0-9]+", "-", self.text)


def parse_option(text: str, scheme: str) -> Option:
    """`2`, with the job's own scheme, `twn:2`, or `twn:2/*.conv1=lsq:3` with exceptions by layers' names; raises UsageError."""
    first, *others = text.strip().split("/")
    exceptions = []
    for other in others:
        pattern, given, value = other.rpartition("=")
        if not given or not pattern:
            raise UsageError(
                f"--options: got {other!r} in {text!r}, expected PATTERN=SCHEME:BITS such as *.conv1=lsq:3 behind a slash"
            )
        exceptions.append((pattern, *_scheme_and_bits(value, scheme)))
    own_scheme, bits = _scheme_and_bits(first, scheme)
    return Option(scheme=own_scheme, bits=bits, exceptions=tuple(exceptions))


def _scheme_and_bits(text: str, scheme: str) -> tuple[str, int]:
    given, _, bits = text.strip().rpartition(":")
    if not bits.isdigit() or not 1 <= int(bits) <= 8:
        raise UsageError(f"--options: got {text!r}, expected bits from 1 to 8, or SCHEME:BITS such as twn:2")
    return given or scheme, int(bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """All sections trained with one quantizer."""

    option: Option
    context: RunContext
    results: tuple[SectionResult, ...]
    measurements: tuple[SectionMeasurement, ...]
    num_bytes: tuple[int, ...]
    """Of every section, packed."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What every section takes, and its divergence from the teacher, alone in it."""
        return tuple(
            Choice(num_bytes=size, cost=round(measurement.divergence_alone, COST_DIGITS))
            for size, measurement in zip(self.num_bytes, self.measurements, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """The members, what they have in common, and how many bytes lie outside of all sections."""

    members: tuple[Member, ...]
    prepared: Prepared
    network: Network
    device: torch.device
    rest_num_bytes: int


def open_library(jobs: Mapping[Option, Job], job_folder: str, *, emit: Emit, run: Callable[[Job], object]) -> Library:
    """Train what the library lacks, and measure every section alone on held-out images.

    Args:
        jobs: the job of every member: the same but for the quantizer and the run directory, and with the same cuts.
        run: trains a job from end to end; called where a section of a member is not there.
    """
    first = next(iter(jobs.values()))
    device = torch.device("cpu") if first.resources.gpus_per_section == 0 else choose_device("auto")
    prepared = prepare(first, job_folder, device=device, emit=emit)
    plans = [own.plan for own in requantized(prepared, list(jobs.values()), device=device)]
    contexts = {
        option: _context(job, job_folder, plan, device) for (option, job), plan in zip(jobs.items(), plans, strict=True)
    }
    for option, job in jobs.items():
        if any(result is None for result in _found(contexts[option])):
            emit(Progress(phase="plan", detail=f"training all sections with {option.name}"))
            run(job)
    network = open_network(contexts[next(iter(jobs))])
    members = tuple(_member(option, contexts[option], network, prepared) for option in jobs)
    inside = sum(members[0].num_bytes)
    return Library(
        members=members,
        prepared=prepared,
        network=network,
        device=device,
        rest_num_bytes=max(0, members[0].context.plan.num_bytes_packed - inside),
    )


def _context(job: Job, job_folder: str, plan: PartitionPlan, device: torch.device) -> RunContext:
    return RunContext(
        job=job,
        job_folder=job_folder,
        run_dir=open_store(job.storage.run_dir).uri,
        cache_dir=open_store(job.storage.cache_dir).uri,
        plan=plan,
        # Nothing is committed under it.
        epoch=0,
        device=device.type,
    )


def _found(context: RunContext) -> list[SectionResult | None]:
    return [finished_section(context, task) for task in section_tasks(context)]


def _member(option: Option, context: RunContext, network: Network, prepared: Prepared) -> Member:
    results = []
    for index, result in enumerate(_found(context)):
        if result is None:
            raise UsageError(
                f"{context.run_dir}: section {index} is not there after its run; where it was cut at other places before, since "
                f"costs were measured anew, pin the cuts: --set 'sections={{cuts: [{', '.join(context.plan.cuts)}]}}'; where the "
                "library was changed meanwhile, run the search again"
            )
        results.append(result)
    known = {result.index: measured_section(context, result) for result in results}
    unknown = [result for result in results if known[result.index] is None]
    measured = measure_sections(context, unknown, network, prepared.splits) if unknown else ()
    every = {found.index: found for found in (*known.values(), *measured) if found is not None}
    sizes = (
        packed_num_bytes(section.state_dict(), plan.layers)
        for section, plan in zip(network.sections, context.plan.sections, strict=True)
    )
    return Member(
        option=option,
        context=context,
        results=tuple(results),
        measurements=tuple(every[result.index] for result in results),
        num_bytes=tuple(sizes),
    )
