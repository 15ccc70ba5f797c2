"""Which combination of a library's sections is chosen, and how it is made into a run of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dcq_ray.errors import UsageError
from dcq_ray.phases import Emit
from dcq_ray.phases.committed import RESULT_FILE
from dcq_ray.phases.context import WEIGHTS_FILE, section_store
from dcq_ray.phases.kept_merge import hand_on_merge
from dcq_ray.phases.polish import judge_of
from dcq_ray.phases.reduce import MEASUREMENT_FILE
from dcq_ray.records import Progress, seal_json
from dcq_ray.search.frontier import Choice, Combination, best_within, frontier, neighbours, rank_correlation, spread
from dcq_ray.search.library import Library
from dcq_ray.search.measuring import measure_combinations, merge_store
from dcq_ray.storage import Store

# So many combinations that are best by prediction are measured before one is chosen.
NUM_LOOKED_AT = 4
# Of the whole front.
NUM_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A combination that was looked at."""

    options: tuple[str, ...]
    """Of every section."""
    num_bytes: int
    """Of the whole student, packed."""
    predicted_divergence: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a search found."""

    budget_bytes: int | None
    max_drop: float | None
    chosen: Candidate
    choices: tuple[int, ...]
    """Of the chosen one: the number of every section's member."""
    uniform: tuple[Candidate, ...]
    """One quantizer for all sections, for each of the library's."""
    front: tuple[Candidate, ...]
    """Some of the Pareto front, from the smallest to the largest."""
    num_on_front: int
    rank_correlation: float | None
    """Spearman's, of the predicted order of the front and the measured one; None where there are too few."""
    num_looked_at: int | None = None
    """So many networks were measured to choose the best among: its score is that of the luckiest, too."""


def search_library(
    library: Library,
    store: Store,
    *,
    budget_bytes: int | None = None,
    max_drop: float | None = None,
    num_looked_at: int = NUM_LOOKED_AT,
    emit: Emit,
) -> Searched:
    """The best network within a budget, and the Pareto front, from sections that are trained already.

    Args:
        budget_bytes: of the whole packed student: the most accurate one within it; or else
        max_drop: of the score on held-out images, in [0, 1]: the smallest one that loses no more against the teacher.
        num_looked_at: so many combinations that are best by prediction within a budget are measured before one is chosen.
        store: where scores of combinations are kept, so that another budget costs little.

    Raises:
        UsageError: nothing of the library is so small, or so accurate.
    """
    sections = _distinct(library)
    alone = [[choice for _, choice in choices] for choices in sections]
    inside = frontier(alone)

    def whole(found: Combination) -> Combination:
        # Numbers among a section's distinct choices -> numbers of members.
        choices = tuple(sections[k][number][0] for k, number in enumerate(found.choices))
        return replace(found, choices=choices, num_bytes=found.num_bytes + library.rest_num_bytes)

    front = tuple(map(whole, inside))
    count = len(library.network.sections)
    uniform = [_uniform(library, number, count) for number in range(len(library.members))]
    judge = judge_of(library.members[0].context, library.network, library.prepared.splits.held_out, library.device)
    shown = spread(front, NUM_SHOWN)
    scores: dict[tuple[int, ...], float] = {}

    def score(found: Combination) -> float:
        if found.choices not in scores:
            score_all([found])
        return scores[found.choices]

    def score_all(some: Sequence[Combination]) -> None:
        unknown = list(dict.fromkeys(found.choices for found in some if found.choices not in scores))
        detail = "measuring combinations on held-out images"
        emit(Progress(phase="reduce", done=len(scores), unit="combinations", detail=detail))
        for choices, value in measure_combinations(library, unknown, judge, store):
            scores[choices] = value
            emit(Progress(phase="reduce", done=len(scores), unit="combinations", detail=detail))

    if budget_bytes is not None:
        if front[0].num_bytes > budget_bytes:
            raise UsageError(
                f"--budget {budget_bytes}: the smallest combination of this library takes {front[0].num_bytes:,} bytes; "
                "give a larger budget, or options of fewer bits"
            )
        # What is looked at anyway may beat what is predicted to be better.
        others = [found for found in (*shown, *uniform) if found.num_bytes <= budget_bytes]
        inside_bytes = budget_bytes - library.rest_num_bytes
        (predicted,) = best_within(inside, inside_bytes, 1)
        looked_at = [*map(whole, neighbours(predicted, alone, inside_bytes, num_looked_at)), *others]
        score_all([*looked_at, *shown, *uniform])
        best = max(looked_at, key=lambda found: (score(found), -found.num_bytes))
    else:
        top1 = library.prepared.held_out_top1
        # Without labels the score is the agreement with the teacher, which agrees with itself.
        least = (1.0 if top1 is None else top1) - (max_drop or 0.0)
        score_all([*shown, *uniform])
        # What is looked at anyway may be better than predicted, and smaller.
        looked_at = [_smallest(front, lambda found: score(found) >= least), *shown, *uniform]
        enough = [found for found in looked_at if score(found) >= least]
        best = min(enough, key=lambda found: found.num_bytes) if enough else max(looked_at, key=score)
        if not enough:
            raise UsageError(
                f"--max-drop: the most accurate combination of this library scores {score(best):.2%} on held-out images, "
                f"wanted at least {least:.2%}; allow a larger drop, or give options of more bits"
            )
    order = rank_correlation([-found.cost for found in shown], [score(found) for found in shown])

    def candidate(found: Combination) -> Candidate:
        return Candidate(
            options=tuple(library.members[number].option.name for number in found.choices),
            num_bytes=found.num_bytes,
            predicted_divergence=found.cost,
            score=score(found),
        )

    return Searched(
        budget_bytes=budget_bytes,
        max_drop=max_drop,
        chosen=candidate(best),
        choices=best.choices,
        uniform=tuple(candidate(found) for found in uniform),
        front=tuple(candidate(found) for found in shown),
        num_on_front=len(front),
        rank_correlation=None if math.isnan(order) else order,
        num_looked_at=len({found.choices for found in looked_at}),
    )


def combination_overrides(library: Library, choices: Sequence[int]) -> str:
    """The combination as a value of `quantize.overrides`: every layer by its name."""
    found: dict[str, dict[str, int | str]] = {}
    for index, number in enumerate(choices):
        for layer in library.members[number].context.plan.sections[index].layers:
            entry: dict[str, int | str] = {"scheme": layer.scheme, "bits": layer.bits}
            entry["activation_bits"] = layer.activation_bits
            if layer.activation_scheme is not None:
                entry["activation_scheme"] = layer.activation_scheme
            found[layer.module] = entry
    return json.dumps(found)


def take_sections(library: Library, choices: Sequence[int], run_dir: Store, *, scores: Store) -> None:
    """Put the chosen sections into a run directory, whose run then finds them trained; and merged, as they were for their score.

    Args:
        scores: where `search_library` kept the scores of combinations.
    """
    hand_on_merge(merge_store(library, choices, scores), run_dir)
    for index, number in enumerate(choices):
        member = library.members[number]
        result = member.results[index]
        source, target = section_store(member.context, index), run_dir.child("sections", f"{index:02d}")
        for name in (WEIGHTS_FILE, MEASUREMENT_FILE):
            target.child(result.attempt).write_bytes(name, source.child(result.attempt).read_bytes(name))
        # Written last: it marks the section as finished.
        target.write_bytes(RESULT_FILE, seal_json(result))


def _smallest(front: Sequence[Combination], is_enough: Callable[[Combination], bool]) -> Combination:
    """The smallest of a front that is enough, found by halving as if all larger ones were, too; the largest where none is."""
    low, high = 0, len(front) - 1
    while low < high:
        middle = (low + high) // 2
        if is_enough(front[middle]):
            high = middle
        else:
            low = middle + 1
    return front[low]


def _distinct(library: Library) -> list[list[tuple[int, Choice]]]:
    """Every section's choices with their members' numbers; those that came out alike once."""
    sections = []
    for index in range(len(library.network.sections)):
        choices: dict[str, tuple[int, Choice]] = {}
        for number, member in enumerate(library.members):
            choices.setdefault(member.results[index].weights_sha256, (number, member.choices[index]))
        sections.append(list(choices.values()))
    return sections


def _uniform(library: Library, number: int, count: int) -> Combination:
    choices = library.members[number].choices
    return Combination(
        choices=(number,) * count,
        num_bytes=library.rest_num_bytes + sum(choice.num_bytes for choice in choices),
        cost=sum(choice.cost for choice in choices),
    )
