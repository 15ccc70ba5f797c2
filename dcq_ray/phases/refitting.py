"""Refitting: at the merge each section is fitted anew on what the student's sections before it give, and held-out images decide.

A section is trained alone, on what the teacher gives it. A few steps may lower its own loss and still cost the network, where
errors add up. So from the first section to the last each is tried at its other ends, the others as they are: at its start, fitted
on the teacher's own activations, and fitted (`fit_weights`) from the activations of the sections chosen before it towards the
teacher's, which makes good what those spoil. What a layer's errors count, `sensitivity` may say.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcq_ray.data import Part, Splits
from dcq_ray.phases.committed import trained_section
from dcq_ray.phases.context import Network
from dcq_ray.phases.sensitivity import output_metrics
from dcq_ray.phases.sources import CALIBRATION_SAMPLES
from dcq_ray.phases.starting import MAX_START_INPUT_BYTES
from dcq_ray.quantizers import activation_starts, fit_weights, put_quantizers
from dcq_ray.records import MergeStep, RunContext, SectionResult
from dcq_ray.section import batch_statistics
from dcq_ray.stitch import has_batchnorm, reestimate_batchnorm
from dcq_ray.validate import agreement, divergence, top_k

End = Literal["trained", "start", "refitted"]
Pairs = Sequence[tuple[Tensor, Tensor]]
Refit = Callable[[int, Pairs], GraphModule]
# Enough to tell ends apart; each more goes through the network some dozen times.
MAX_JUDGED_SAMPLES = 1000
# More sections are put together to so many groups, since each group costs a pass through all behind it.
MAX_GROUPS = 12
# Where predictions count: of what a sum lacks about half is lost at the activation behind it, so half of it is made good.
SHARE_MADE_GOOD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What was chosen, and the student's predictions on held-out images, BatchNorm on batch statistics."""

    ends: tuple[End, ...]
    modules: tuple[GraphModule, ...]
    before: Tensor
    """Logits [N, K] of all sections as trained."""
    after: Tensor
    reference: Tensor
    """Of the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    end: End
    module: GraphModule
    running: GraphModule
    """A copy on batch statistics: those of a section before BatchNorm is re-estimated on the whole student say little."""


def refit_sections(
    context: RunContext, results: Sequence[SectionResult], network: Network, splits: Splits, device: torch.device
) -> tuple[list[dict[str, Tensor]], MergeStep]:
    """The states of all sections at their chosen ends, and what that did to the score on at most 1,000 held-out images."""
    job = context.job
    sample_bytes = 4 * max(math.prod(boundary.shape) for boundary in context.plan.boundaries)
    largest = max(1, MAX_START_INPUT_BYTES // sample_bytes)

    def batches(part: Part, wanted: int) -> list[Tensor]:
        count = min(len(part), wanted, largest)
        firsts = range(0, count, job.data.batch_size)
        return [part.images(np.arange(first, min(first + job.data.batch_size, count))).to(device) for first in firsts]

    teacher = [section.to(device).eval() for section in network.sections]
    num_calibrating = -(-CALIBRATION_SAMPLES // job.data.batch_size)

    train = batches(splits.train, job.train.start_samples)
    metrics, made_good = None, 1.0
    if job.reduce.refit_metric == "predictions":
        metrics = output_metrics(teacher, {layer.module for layer in context.plan.layers}, train, seed=job.seed)
        made_good = SHARE_MADE_GOOD

    def refit(index: int, pairs: Pairs) -> GraphModule:
        module: GraphModule = copy.deepcopy(network.sections[index])
        layers = context.plan.sections[index].layers
        seen = [ours.clone() for ours, _ in pairs[:num_calibrating]]
        put_quantizers(module, layers, activation_starts(module, layers, seen))
        fit_weights(module, network.sections[index], pairs, seed=job.seed, metrics=metrics, made_good=made_good)
        if job.reduce.reestimate_batchnorm and has_batchnorm(module):
            # As a trained section's, on its own inputs.
            reestimate_batchnorm(module, (ours.clone() for ours, _ in pairs), device)
        return module

    chosen = choose_ends(
        teacher,
        [trained_section(context, result, network).to(device) for result in results],
        refit,
        held_out=batches(splits.held_out, MAX_JUDGED_SAMPLES),
        train=train,
    )
    labels = splits.held_out.labels

    def score(logits: Tensor) -> float:
        if labels is None:
            return agreement(logits, chosen.reference)
        return top_k(logits.cpu(), torch.from_numpy(labels[: len(logits)]), 1)

    step = MergeStep(
        name=told(chosen.ends),
        score_before=score(chosen.before),
        score_after=score(chosen.after),
        accepted=set(chosen.ends) != {"trained"},
    )
    return [dict(module.state_dict()) for module in chosen.modules], step


def told(ends: Sequence[End]) -> str:
    """What was chosen, in words."""
    refitted, started = (
        [str(index) for index, end in enumerate(ends) if end == name] for name in ("refitted", "start")
    )
    parts = [f"sections {', '.join(refitted)} refitted"] if refitted else []
    parts += [f"sections {', '.join(started)} back at their starts"] if started else []
    return "; ".join(parts) or "sections refitted"


def choose_ends(
    teacher: Sequence[nn.Module],
    trained: Sequence[GraphModule],
    refit: Refit,
    *,
    held_out: Sequence[Tensor],
    train: Sequence[Tensor],
) -> Chosen:
    """Choose an end of every section by the divergence of the network's predictions from the teacher's on held-out images.

    It begins with all sections as trained. From the first group of sections to the last the other ends are tried, the groups
    before as chosen, those behind as they are, and another is kept where the divergence is lower. At last all sections
    refitted, each behind the refitted ones, take the place of what was chosen where they are better still: in front of
    trained sections a refitted one does not show all that it is worth.

    Args:
        teacher: its sections, in eval mode.
        refit: a section's number, and batches [B, ...] of the student's and of the teacher's inputs -> the section fitted to them.
        held_out, train: batches of images on the device of the modules; `train` is what is fitted on.
    """
    current = [_candidate("trained", module) for module in trained]
    with torch.no_grad():
        reference = torch.cat(_through(teacher, held_out))
        before = after = torch.cat(_through(_running(current), held_out))
        least = divergence(after, reference)
        judged, ours, theirs, followed = held_out, train, train, train
        chain: list[_Candidate] = []
        for group in groups(len(trained)):
            members = slice(group.start, group.stop)
            others = {"start": list(_fitted("start", group, refit, teacher, theirs, theirs))}
            # Before the first section both networks have the same, and the two are one.
            if ours is not theirs or len(group) > 1:
                others["refitted"] = list(_fitted("refitted", group, refit, teacher, ours, theirs))
            for other in others.values():
                logits = torch.cat(_through(_running([*other, *current[group.stop :]]), judged))
                found = divergence(logits, reference)
                if found < least:
                    least, after, current[members] = found, logits, other
            # As long as what was chosen is the chain, its next sections are fitted already.
            link = others.get("refitted", others["start"])
            if followed is not ours:
                link = list(_fitted("refitted", group, refit, teacher, followed, theirs))
            chain += link
            is_chain = followed is ours and all(a is b for a, b in zip(current[members], link, strict=True))
            judged, ours = (_through(_running(current[members]), batches) for batches in (judged, ours))
            followed = ours if is_chain else _through(_running(link), followed)
            theirs = _through(teacher[members], theirs)
        logits = torch.cat(_through(_running(chain), held_out))
        if divergence(logits, reference) < least:
            current, after = chain, logits
    return Chosen(
        ends=tuple(candidate.end for candidate in current),
        modules=tuple(candidate.module for candidate in current),
        before=before,
        after=after,
        reference=reference,
    )


def groups(num_sections: int) -> list[range]:
    """Sections that are tried together: at most 12 groups of neighbours, as even as can be."""
    count = min(num_sections, MAX_GROUPS)
    edges = [round(number * num_sections / count) for number in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(edges)]


def _fitted(
    end: End,
    group: range,
    refit: Refit,
    teacher: Sequence[nn.Module],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
) -> Iterator[_Candidate]:
    """A group's sections, each fitted on what the one before gives; at their starts on what the teacher's gives."""
    for index in group:
        candidate = _candidate(end, refit(index, list(zip(ours, theirs, strict=True))))
        yield candidate
        if index != group[-1]:
            theirs = _through([teacher[index]], theirs)
            ours = theirs if end == "start" else _through([candidate.running], ours)


def _candidate(end: End, module: GraphModule) -> _Candidate:
    running = copy.deepcopy(module)
    batch_statistics(running)
    return _Candidate(end=end, module=module, running=running)


def _running(candidates: Sequence[_Candidate]) -> list[GraphModule]:
    return [candidate.running for candidate in candidates]


def _through(modules: Sequence[nn.Module], batches: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for batch in batches:
        # A clone, since a section may work in place on its input.
        value = batch.clone()
        for module in modules:
            value = module(value)
        found.append(value)
    return found
