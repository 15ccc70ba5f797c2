"""Which part of a card each kind of a run's work needs, from peaks that are measured once, on a card that it has for itself.

Sections are dealt over the cards; what is measured says how many fit on one. Only where several are to share a card is there
anything to measure: who has a card for himself may fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from dcq_ray.partition import balanced_cuts
from dcq_ray.phases import (
    RunSession,
    choose_device,
    cuda_card,
    cuda_meter,
    kept_gpu_memory,
    measure_gpu_memory,
    open_network,
    open_splits,
)
from dcq_ray.records import Card, GpuMemory, RunContext
from dcq_ray.remote.cluster import Share, count_cards, on_a_card, section_share, wanted_share
from dcq_ray.remote.gpu_memory import cap_gpu_memory, held_bytes, needed_gpus
from dcq_ray.remote.workers import shown_name, unwrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNeeds:
    """The least part of a card, in (0, 1], for each kind of work; 0: it was not measured, and any part will do."""

    section: float = 0.0
    dump: float = 0.0
    score: float = 0.0
    """Of a section's measurement, and of the scores on test images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What Ray reserves for each kind of a run's work."""

    section: Share
    dump: Share
    score: Share
    stitch: Share


def _own_card() -> Card | None:
    device = choose_device("auto")
    return cuda_card(device) if device.type == "cuda" else None


def _measure(context: RunContext) -> GpuMemory:
    cap_gpu_memory()
    meter = cuda_meter(choose_device(context.device))
    return measure_gpu_memory(context, open_network(context), open_splits(context), meter)


_card_task = ray.remote(_own_card)
measure_task = ray.remote(_measure)


def card_of(share: Share) -> Card | None:
    """The GPU that a worker with such a share can use; None: it has none. Ray also schedules GPUs that are only declared."""
    if not share.num_gpus:
        return None
    card: Card | None = ray.get(_card_task.options(**share.options).remote())
    return card


def gpu_needs(
    session: RunSession,
    card: Card | None,
    nodes: Sequence[Mapping[str, float]],
    *,
    say: Callable[[str], None],
    measuring: Any = measure_task,
) -> GpuNeeds:
    """What the run's work needs of a card, measured now where the run directory does not have it.

    Args:
        card: as `card_of` found it.
        measuring: the Ray task that measures, given the run's context, on a card that it has for itself.

    Raises:
        ClusterError: a card is too small for a section, or for the whole network.
    """
    context, num_sections = session.context, len(session.tasks)
    share = wanted_share(context.job, num_sections, nodes)
    if card is None or context.job.resources.gpus_per_section != "auto" or not 0 < share.num_gpus < 1:
        return GpuNeeds()
    memory = kept_gpu_memory(context, card)
    if memory is None:
        say(f"measuring how much of a card's memory ({card.name}) {num_sections} sections take, to share cards")
        alone = replace(share, num_gpus=1.0)
        task = measuring.options(name=shown_name(context, "measure-gpu-memory"), **alone.options)
        found: GpuMemory = unwrapped(task.remote(context))
        memory = found
    total_bytes = memory.card.total_bytes
    needs = GpuNeeds(
        section=_section_need(session, memory, count_cards(context.job, nodes)),
        dump=needed_gpus(memory.dump_bytes, total_bytes),
        score=needed_gpus(memory.score_bytes, total_bytes),
    )
    on_card = on_a_card(num_sections, count_cards(context.job, nodes), needs.section)
    say(
        f"a section takes up to {max(memory.section_bytes):,} of a card's {total_bytes:,} bytes: {on_card} share a card"
    )
    return needs


def shares_of(share: Share, session: RunSession, needs: GpuNeeds, nodes: Sequence[Mapping[str, float]]) -> Shares:
    """The shares of all work beside the sections', which have `share`.

    The stitching gets a whole card where sections share one: it is alone by then, and a merge's steps take what they can.
    """
    job, num_sections = session.context.job, len(session.tasks)
    if not needs.section:
        return Shares(section=share, dump=share, score=share, stitch=share)
    dump, score, stitch = (section_share(job, num_sections, nodes, need) for need in (needs.dump, needs.score, 1.0))
    return Shares(section=share, dump=dump, score=score, stitch=stitch)


def _section_need(session: RunSession, memory: GpuMemory, num_cards: int) -> float:
    """The need of the section that takes most; of sections in step, that of the most workers on a card that all fit."""
    context, total_bytes = session.context, memory.card.total_bytes
    costs = [section.step_seconds for section in context.plan.sections]
    num_sections = len(costs)
    if not session.streams:
        largest = max(range(num_sections), key=lambda index: memory.section_bytes[index])
        return needed_gpus(held_bytes(context, memory, [largest]), total_bytes)
    for on_card in range(on_a_card(num_sections, num_cards, 0.0), 1, -1):
        # As neighbours are dealt over workers, each of which holds its sections together.
        cuts = balanced_cuts(costs, min(num_sections, on_card * num_cards))
        ends = [*(cut + 1 for cut in cuts), num_sections]
        groups = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if needed_gpus(max(held_bytes(context, memory, group) for group in groups), total_bytes) <= 1 / on_card:
            return 1 / on_card
    return 1.0
