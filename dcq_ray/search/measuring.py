"""Scores of combinations of a library's sections, stitched and merged: what several have in common is computed once.

Two combinations that begin with the same trained sections give the same activations up to there, also while BatchNorm is
re-estimated: their sections make a tree, and each of its nodes takes a batch once. What is measured is kept for other searches,
with what the merge made of the combination, which a run takes over.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dcq_ray.data import ordered_batches
from dcq_ray.digests import json_sha256
from dcq_ray.phases import num_at_once
from dcq_ray.phases.committed import section_weights, trained_section
from dcq_ray.phases.kept_merge import keep_merge, merge_key
from dcq_ray.phases.polish import Judge, judged_step
from dcq_ray.phases.reduce import BATCHNORM_STEP, adapt_batchnorm
from dcq_ray.records import MergeStep, RunContext, seal_json, unseal_json
from dcq_ray.search.library import Library
from dcq_ray.stitch import has_batchnorm, stitch
from dcq_ray.storage import Store
from dcq_ray.validate import predict

SCORES_FOLDER = "combinations"
# About so many sections a tree holds at most: as many as eight combinations of ten with nothing in common.
MAX_IN_A_TREE = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A combination's score, and the digest of what it was measured for."""

    key: str
    score: float
    """Top-1 on held-out images; without labels the agreement with the teacher."""


def measure_combinations(
    library: Library, some: Sequence[tuple[int, ...]], judge: Judge, store: Store
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every combination with its held-out score, merged as the job says, polish aside; those first that are known.

    On the CPU so many trees at once as it has cores for; each combination scores what it scores alone.

    Args:
        some: the numbers of every section's member; each combination once.
        store: where scores and merges are kept.
    """
    # Members may have come out alike in a section, so that two combinations are one network.
    alike: dict[str, list[tuple[int, ...]]] = {}
    for choices in some:
        alike.setdefault(combination_key(library, choices), []).append(choices)
    unknown = []
    for key, same in alike.items():
        score = _kept(key, store)
        if score is None:
            unknown.append(same[0])
        else:
            yield from ((choices, score) for choices in same)
    if not unknown:
        return
    job = library.members[0].context.job
    most = num_at_once(job, library.device)
    trees = grouped(unknown, most)
    with ThreadPoolExecutor(
        min(most, len(trees)), initializer=torch.set_num_threads, initargs=(job.train.num_threads,)
    ) as pool:
        for tree, found in zip(
            trees, pool.map(lambda group: _measure(library, group, judge, store), trees), strict=True
        ):
            for choices, score in zip(tree, found, strict=True):
                yield from ((other, score) for other in alike[combination_key(library, choices)])


def grouped(some: Sequence[tuple[int, ...]], most: int) -> list[list[tuple[int, ...]]]:
    """Combinations by the trees in which they are measured: those that begin alike together, all of about the same work.

    Args:
        most: so many trees are measured at once.
    """
    ordered = sorted(some)
    # Sections that a combination does not share with the one before it, with which it has most in common.
    works = [len(ordered[0])]
    for before, choices in itertools.pairwise(ordered):
        works.append(
            next(len(choices) - k for k, pair in enumerate(zip(before, choices, strict=True)) if pair[0] != pair[1])
        )
    num_trees = max(math.ceil(sum(works) / MAX_IN_A_TREE), min(most, len(ordered)))
    groups: list[list[tuple[int, ...]]] = [[] for _ in range(num_trees)]
    done = 0
    for choices, work in zip(ordered, works, strict=True):
        groups[int((done + work / 2) * num_trees / sum(works))].append(choices)
        done += work
    return [group for group in groups if group]


def combination_key(library: Library, choices: Sequence[int]) -> str:
    """Digest of all that a combination's score depends on."""
    context, splits = _unpolished(library), library.prepared.splits
    reduce = context.job.reduce
    return json_sha256(
        {
            "teacher": context.plan.teacher_sha256,
            "cuts": context.plan.cuts,
            "weights": [library.members[number].results[k].weights_sha256 for k, number in enumerate(choices)],
            "reduce": [reduce.reestimate_batchnorm, reduce.roll_back],
            "train": splits.train.sha256,
            "held_out": splits.held_out.sha256,
            "batch_size": context.job.data.batch_size,
            "device": context.device,
        }
    )


def merge_store(library: Library, choices: Sequence[int], store: Store) -> Store:
    """Where a combination's merge is kept."""
    return store.child(SCORES_FOLDER, combination_key(library, choices)[:32])


class SectionTree(nn.Module):
    """Combinations as a network of all: images [N, C, H, W] -> logits [N, combinations, K]."""

    def __init__(self, library: Library, combinations: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.combinations = combinations
        self.nodes = nn.ModuleDict()
        for choices in combinations:
            for end in range(1, len(choices) + 1):
                name = _name(choices[:end])
                if name not in self.nodes:
                    member = library.members[choices[end - 1]]
                    self.nodes[name] = trained_section(member.context, member.results[end - 1], library.network)

    def forward(self, images: Tensor) -> Tensor:
        found: dict[tuple[int, ...], Tensor] = {}
        self._grow((), images, found)
        return torch.stack([found[choices] for choices in self.combinations], dim=1)

    def _grow(self, prefix: tuple[int, ...], value: Tensor, found: dict[tuple[int, ...], Tensor]) -> None:
        if prefix in self.combinations:
            found[prefix] = value
            return
        length = len(prefix) + 1
        begun = (choices[:length] for choices in self.combinations if choices[: len(prefix)] == prefix)
        for longer in dict.fromkeys(begun):
            # A clone, since a section may work in place on its input.
            self._grow(longer, self.nodes[_name(longer)](value.clone()), found)

    def combination_state(self, choices: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors of a combination's sections, under the teacher's names."""
        sections = (self.nodes[_name(choices[:end])] for end in range(1, len(choices) + 1))
        return {name: tensor for section in sections for name, tensor in section.state_dict().items()}


def _name(prefix: tuple[int, ...]) -> str:
    return "_".join(map(str, prefix))


def _measure(library: Library, group: Sequence[tuple[int, ...]], judge: Judge, store: Store) -> list[float]:
    """The scores of combinations that share a tree; what `merge` does with each, done with all at once."""
    context, splits = _unpolished(library), library.prepared.splits
    reduce = context.job.reduce
    tree = SectionTree(library, group)
    adapts = reduce.reestimate_batchnorm and has_batchnorm(tree)
    before = _scores(tree, judge) if adapts and reduce.roll_back else None
    if adapts:
        adapt_batchnorm(context, tree, splits.train, library.device)
    after = _scores(tree, judge)
    found = []
    for number, choices in enumerate(group):
        steps: tuple[MergeStep, ...] = ()
        score, accepted = after[number], True
        if before is not None:
            step = judged_step(BATCHNORM_STEP, before[number], after[number], roll_back=True)
            steps, accepted = (step,), step.accepted
            score = step.score_after if accepted else step.score_before
        members = [library.members[member] for member in choices]
        layers = [layer for k, member in enumerate(members) for layer in member.context.plan.sections[k].layers]
        states = [section_weights(member.context, member.results[k]) for k, member in enumerate(members)]
        student = stitch(library.network.teacher.module, layers, states)
        stitched, key = copy.deepcopy(student.state_dict()), merge_key(context, student, layers, splits)
        if accepted:
            student.load_state_dict({**stitched, **tree.combination_state(choices)})
        keep_merge(merge_store(library, choices, store), key, steps, stitched, student)
        own = combination_key(library, choices)
        # Written last: what is known is kept whole.
        store.write_bytes(_file(own), seal_json(Measured(key=own, score=score)))
        found.append(score)
    return found


def _scores(tree: SectionTree, judge: Judge) -> list[float]:
    images = (images for images, _ in ordered_batches(judge.held_out, judge.batch_size))
    logits = predict(tree, images, judge.device)
    return [judge.score(logits[:, number]) for number in range(logits.shape[1])]


def _kept(key: str, store: Store) -> float | None:
    content = store.read_bytes_or_none(_file(key))
    if content is not None:
        with contextlib.suppress(ValueError):
            found = unseal_json(Measured, content)
            if found.key == key:
                return found.score
    return None


def _file(key: str) -> str:
    return f"{SCORES_FOLDER}/{key[:32]}.json"


def _unpolished(library: Library) -> RunContext:
    context = library.members[0].context
    reduce = context.job.reduce.model_copy(update={"polish_epochs": 0})
    return replace(context, job=context.job.model_copy(update={"reduce": reduce}))
