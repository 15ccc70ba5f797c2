"""Predicted seconds by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import open_run, predict
from dcq_ray.phases.predict import FROZEN_SHARE, makespan, run_lower_bound, streamed_makespan


def test_streamed_sections_go_at_the_pace_of_the_slowest_run() -> None:
    seconds = [4.0, 1.0, 1.0, 2.0]
    # One worker does all of it.
    assert streamed_makespan(seconds, 1, 0.35) == 8.0
    # Two: 4 | 1 1 2, and the second half starts late by half of the stagger.
    assert streamed_makespan(seconds, 2, 0.4) == pytest.approx(4.0 * 1.2)
    # As many as sections, or more: 4 | 1 | 1 | 2.
    assert streamed_makespan(seconds, 4, 0.4) == streamed_makespan(seconds, 9, 0.4) == pytest.approx(4.0 * 1.3)


def test_look_ahead_and_views_cost_what_they_do(job_document: dict[str, Any], tmp_path: Path) -> None:
    document = {**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}
    job = resolve_job(document, source="test")
    with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=lambda _: None, owner="test") as session:
        plan = session.context.plan
    plain = predict(plan, job, 1)
    train = {**document["train"], "look_ahead": 1, "augment": {"views": 3}}
    other = predict(plan, resolve_job({**document, "train": train}, source="test"), 1)
    first, second, third = plain.section_seconds
    expected = (first + FROZEN_SHARE * second, second + FROZEN_SHARE * third, third)
    assert other.section_seconds == pytest.approx(expected)
    assert other.dump_seconds == pytest.approx(3 * plain.dump_seconds)


def best_makespan(seconds: Sequence[int], num_workers: int) -> int:
    """Of all ways to deal the pieces of work."""
    ends = []
    for workers in itertools.product(range(num_workers), repeat=len(seconds)):
        loads = [0] * num_workers
        for worker, duration in zip(workers, seconds, strict=True):
            loads[worker] += duration
        ends.append(max(loads))
    return min(ends)


@given(seconds=st.lists(st.integers(1, 40), min_size=1, max_size=7), num_workers=st.integers(1, 3))
@example(seconds=[5, 5, 4, 4, 3, 3, 3], num_workers=3)
def test_longest_first_ends_within_grahams_bound_of_the_best_of_all_ways(seconds: list[int], num_workers: int) -> None:
    found, best = makespan(seconds, num_workers), best_makespan(seconds, num_workers)
    bound = run_lower_bound(dump=0.0, sections=seconds, measuring=0.0, finish=0.0, num_workers=num_workers)
    assert bound <= best + 1e-9
    assert best <= found <= (4 / 3 - 1 / (3 * num_workers)) * best + 1e-9


def test_grahams_bound_is_reached_by_his_own_example() -> None:
    seconds = [5, 5, 4, 4, 3, 3, 3]
    assert best_makespan(seconds, 3) == 9
    assert makespan(seconds, 3) == 11


@pytest.mark.parametrize(
    # All of it is 22; in a row are 4 over the workers, the section of 9, and 2.
    ("num_workers", "expected"),
    [(1, 22.0), (2, 13.0), (4, 12.0)],
)
def test_a_run_is_no_shorter_than_its_work_shared_nor_than_its_longest_chain(num_workers: int, expected: float) -> None:
    found = run_lower_bound(dump=4.0, sections=[9.0, 4.0], measuring=3.0, finish=2.0, num_workers=num_workers)
    assert found == pytest.approx(expected)
