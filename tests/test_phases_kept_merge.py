"""A kept merge gives back what the merge gave, to the bit, to that student alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dcq_ray.phases.kept_merge import (
    MERGED_FILE,
    MERGED_TENSORS_FILE,
    hand_on_merge,
    keep_merge,
    take_merge,
)
from dcq_ray.records import MergeStep
from dcq_ray.storage import open_store

STEPS = (MergeStep(name="BatchNorm re-estimated", score_before=0.5, score_after=0.75, accepted=True),)


def merged_twins() -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """A student as it was stitched, the same after a merge, and its state before."""
    torch.manual_seed(0)
    stitched = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    merged = copy.deepcopy(stitched)
    merged[1].running_mean.uniform_()
    merged[1].running_var.uniform_()
    return stitched, merged, copy.deepcopy(stitched.state_dict())


def test_a_kept_merge_makes_the_merged_student_of_the_stitched_one(tmp_path: Path) -> None:
    stitched, merged, before = merged_twins()
    source, target = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    keep_merge(source, "key", STEPS, before, merged)
    hand_on_merge(source, target)
    assert take_merge(target, "key", stitched) == STEPS
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in stitched.state_dict().items())


def test_nothing_is_taken_of_another_student_or_where_nothing_is(tmp_path: Path) -> None:
    stitched, merged, before = merged_twins()
    store = open_store(str(tmp_path))
    hand_on_merge(store.child("nothing"), store)
    assert take_merge(store, "key", stitched) is None
    keep_merge(store, "key", STEPS, before, merged)
    assert take_merge(store, "another", stitched) is None
    assert all(torch.equal(value, before[name]) for name, value in stitched.state_dict().items())


@pytest.mark.parametrize("name", [MERGED_FILE, MERGED_TENSORS_FILE])
@pytest.mark.parametrize("position", [0, -3])
def test_a_damaged_one_is_not_taken(tmp_path: Path, name: str, position: int) -> None:
    stitched, merged, before = merged_twins()
    keep_merge(open_store(str(tmp_path)), "key", STEPS, before, merged)
    content = bytearray((tmp_path / name).read_bytes())
    content[position] ^= 1
    (tmp_path / name).write_bytes(content)
    assert take_merge(open_store(str(tmp_path)), "key", stitched) is None
    assert all(torch.equal(value, before[name]) for name, value in stitched.state_dict().items())
