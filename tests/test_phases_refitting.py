"""Sections fitted anew at the merge, and what is chosen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, run_local
from dcq_ray.phases.refitting import Pairs, choose_ends, groups, told
from dcq_ray.records import RunReport


def times(*factors: float) -> GraphModule:
    """A section [B, 2] -> [B, 2] that multiplies its columns."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.diag(torch.tensor(factors, dtype=torch.float32))
    return symbolic_trace(nn.Sequential(layer).eval())


IMAGES = [torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([[-1.0, 0.25]])]
TEACHER = [times(1, 1), times(1, 1), times(1, 1)]


def factor_of(pairs: Pairs) -> float:
    """What an input of the student is to be multiplied by to be the teacher's."""
    ours, theirs = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    return float(theirs[0, 0] / ours[0, 0])


def test_an_end_is_taken_only_where_the_whole_network_is_better() -> None:
    asked: list[tuple[int, float]] = []

    def refit(index: int, pairs: Pairs) -> GraphModule:
        factor = factor_of(pairs)
        asked.append((index, factor))
        # The first cannot be fitted as well as it was trained.
        return times(3, 3) if index == 0 else times(factor, factor)

    trained = [times(2, 2), times(1.5, 1.5), times(1, 1)]
    chosen = choose_ends(TEACHER, trained, refit, held_out=IMAGES, train=IMAGES)
    # Trained: 2 x 1.5 x 1. The second at its start gives 2 x 1, fitted behind the first 2 x 0.5; then there is nothing to gain.
    # Beside it all are fitted behind the fitted ones: 3 x 1/3 x 1, which is no better.
    assert [index for index, _ in asked] == [0, 1, 1, 1, 2, 2, 2]
    assert [factor for _, factor in asked] == pytest.approx([1.0, 1.0, 0.5, 1 / 3, 1.0, 1.0, 1.0])
    assert chosen.ends == ("trained", "refitted", "trained")
    assert chosen.modules[0] is trained[0]
    assert chosen.modules[2] is trained[2]
    assert torch.equal(chosen.before, 3 * torch.cat(IMAGES))
    assert torch.equal(chosen.after, torch.cat(IMAGES))
    assert torch.equal(chosen.reference, torch.cat(IMAGES))


def test_all_refitted_are_taken_where_one_alone_would_be_no_better() -> None:
    def refit(index: int, pairs: Pairs) -> GraphModule:
        # What the first gives as it was trained is more than the second can make good.
        return times(1, 1) if factor_of(pairs) == 1 else times(3, 3)

    # Together they give 0.8; the first at its start in front of the second 0.4, the second behind the first 2 or 6.
    trained = [times(2, 2), times(0.4, 0.4)]
    chosen = choose_ends(TEACHER[:2], trained, refit, held_out=IMAGES, train=IMAGES)
    assert chosen.ends == ("start", "refitted")
    assert torch.equal(chosen.after, chosen.reference)


def test_fits_are_made_once_where_all_refitted_is_what_was_chosen() -> None:
    asked: list[int] = []

    def refit(index: int, pairs: Pairs) -> GraphModule:
        asked.append(index)
        return times(factor_of(pairs), factor_of(pairs)) if index else times(1.1, 1.1)

    trained = [times(3, 3), times(3, 3), times(3, 3)]
    chosen = choose_ends(TEACHER, trained, refit, held_out=IMAGES, train=IMAGES)
    assert chosen.ends[:2] == ("start", "refitted")
    assert asked == [0, 1, 1, 2, 2]


def test_a_training_that_did_harm_is_undone_by_the_start() -> None:
    trained = [times(1, 1), times(-1, 5), times(1, 1)]
    chosen = choose_ends(TEACHER, trained, lambda index, pairs: times(1, 1), held_out=IMAGES, train=IMAGES)
    assert chosen.ends == ("trained", "start", "trained")
    assert torch.equal(chosen.after, chosen.reference)


def test_statistics_of_the_sections_stay_as_they_are() -> None:
    trained = [symbolic_trace(nn.Sequential(nn.BatchNorm1d(2)).eval())]
    before = copy.deepcopy(trained[0].state_dict())
    images = [torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1]
    chosen = choose_ends([times(1, 1)], trained, lambda index, pairs: times(1, 1), held_out=images, train=images)
    assert chosen.ends == ("start",)
    # On batch statistics: of mean 0 and variance 1.
    assert torch.allclose(chosen.before.mean(0), torch.zeros(2), atol=1e-6)
    assert all(value.equal(before[name]) for name, value in trained[0].state_dict().items())
    assert not any(part.training for part in trained[0].modules())


def test_many_sections_are_tried_in_at_most_12_groups_in_which_each_follows_the_fitted_one_before() -> None:
    assert groups(1) == [range(1)]
    assert groups(12) == [range(number, number + 1) for number in range(12)]
    assert [list(group) for group in groups(30)][:3] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [index for group in groups(1000) for index in group] == list(range(1000))
    assert len(groups(1000)) == 12
    asked: dict[int, list[float]] = {index: [] for index in range(24)}

    def refit(index: int, pairs: Pairs) -> GraphModule:
        asked[index].append(factor_of(pairs))
        return times(2, 2) if index == 0 else times(asked[index][-1], asked[index][-1])

    teacher, trained = [times(1, 1) for _ in range(24)], [times(1, 1) for _ in range(24)]
    chosen = choose_ends(teacher, trained, refit, held_out=IMAGES, train=IMAGES)
    # On the teacher's activations, and behind the first one, which doubles: then the second halves.
    assert asked[0] == [1.0, 1.0]
    assert asked[1] == [1.0, 0.5]
    assert set(chosen.ends) == {"trained"}


def test_what_was_chosen_is_told_in_words() -> None:
    assert told(("trained", "trained")) == "sections refitted"
    assert (
        told(("start", "refitted", "start", "refitted")) == "sections 1, 3 refitted; sections 0, 2 back at their starts"
    )


def run(document: dict[str, Any], folder: Path, name: str, *, lr: float, **reduce: Any) -> RunReport:
    document = copy.deepcopy(document)
    document["train"] = {"epochs": 1, "batch_size": 32, "lr": lr, "start": "nearest"}
    document["reduce"] = {**document.get("reduce", {}), **reduce}
    document["storage"]["run_dir"] = str(folder / name)
    return run_local(resolve_job(document, source="test"), str(folder), emit=ignore_progress, owner="test")


@pytest.mark.slow
def test_a_run_that_refits_undoes_what_its_trainings_spoilt(job_document: dict[str, Any], tmp_path: Path) -> None:
    # From the nearest levels a wild training has no end to keep but its own.
    plain = run(job_document, tmp_path, "plain", lr=3.0)
    refitted = run(job_document, tmp_path, "refitted", lr=3.0, refit=True)
    assert plain.validation is not None
    assert refitted.validation is not None
    step = refitted.merge_steps[0]
    assert step.accepted
    assert step.name != "sections refitted"
    assert [step.name for step in plain.merge_steps] == [step.name for step in refitted.merge_steps[1:]]
    assert refitted.validation.agreement_with_teacher > plain.validation.agreement_with_teacher
    # The same job is not done again, and the same again elsewhere gives the same student.
    again = run(job_document, tmp_path, "again", lr=3.0, refit=True)
    assert again.student is not None
    assert refitted.student is not None
    assert again.student.sha256 == refitted.student.sha256
