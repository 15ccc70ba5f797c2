"""Predicted seconds by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import SampleCounts, SectionCosts, predict
from dcq_ray.phases.predict import FROZEN_SHARE, last_boundary, makespan, run_lower_bound, streamed_makespan
from dcq_ray.spec import Job


def test_streamed_sections_go_at_the_pace_of_the_slowest_run() -> None:
    seconds = [4.0, 1.0, 1.0, 2.0]
    # One worker does all of it.
    assert streamed_makespan(seconds, 1, 0.35) == 8.0
    # Two: 4 | 1 1 2, and the second half starts late by half of the stagger.
    assert streamed_makespan(seconds, 2, 0.4) == pytest.approx(4.0 * 1.2)
    # As many as sections, or more: 4 | 1 | 1 | 2.
    assert streamed_makespan(seconds, 4, 0.4) == streamed_makespan(seconds, 9, 0.4) == pytest.approx(4.0 * 1.3)


def _costs(*steps: float) -> list[SectionCosts]:
    return [
        SectionCosts(forward_seconds=0.01, store_seconds=0.002, step_seconds=step, start_seconds=1.0) for step in steps
    ]


COUNTS = SampleCounts(train=320, held_out=100, test=50)


def _job(document: dict[str, Any], **train: Any) -> Job:
    return resolve_job({**document, "train": {**document["train"], **train}}, source="test")


def test_predictions_by_hand(job_document: dict[str, Any]) -> None:
    found = predict(_costs(0.5, 0.2), _job(job_document), COUNTS, 2)
    # 3 epochs of 10 steps; 1 s for the start; 2 x 256 samples to choose by and 320 for BatchNorm, 0.01 s each.
    assert found.section_seconds == pytest.approx((1 + 30 * 0.5 + 8.32, 1 + 30 * 0.2 + 8.32))
    assert found.train_seconds == max(found.section_seconds)
    # 320 samples through both sections, 0.012 s each, on two workers.
    assert found.dump_seconds == pytest.approx(320 * 2 * 0.012 / 2)
    # Shared by two, in passes of a section: each alone beside the teacher (2 + 2 and 2 + 1) on 100; teacher and untrained on 50
    # each, and 320 for BatchNorm. On one: 320, twice 100 for the judge, twice 100 for validation, 50; 5 on 100 for the waterfall.
    shared = 7 * 100 + 2 * (2 * 50 + 320)
    alone = 2 * (320 + 200 + 200 + 50) + 5 * 100
    assert found.reduce_seconds == pytest.approx(0.01 * (shared / 2 + alone))
    assert found.makespan_seconds == found.dump_seconds + found.train_seconds + found.reduce_seconds


def test_refitting_costs_two_fits_of_each_section_and_the_tries_of_both_ends(job_document: dict[str, Any]) -> None:
    def seconds(**reduce: Any) -> float:
        job = _job({**job_document, "reduce": {**job_document.get("reduce", {}), **reduce}}, batch_size=32)
        return predict(_costs(0.5, 0.2), job, COUNTS, 1).reduce_seconds

    # Each end in front of what is behind, 2 + 1 sections, and all together, on 100 held-out images.
    plain = 2 * (1 + 1) + (2 * 3 + 2) * 100 * 0.01
    assert seconds(refit=True, refit_metric="outputs") - seconds() == pytest.approx(plain)
    # Slower fits, and a backward pass over 320 images: two thirds of 10 steps of both.
    coupled = 1.7 * 2 * (1 + 1) + 2 / 3 * 10 * 0.7 + (2 * 3 + 2) * 100 * 0.01
    assert seconds(refit=True) - seconds() == pytest.approx(coupled)


def test_recomputing_costs_the_teacher_up_to_a_sections_end_and_no_dump(job_document: dict[str, Any]) -> None:
    costs = _costs(0.5, 0.2, 0.1)
    stored, recomputed = (
        predict(costs, _job({**job_document, "storage": {**job_document["storage"], "activations": each}}), COUNTS, 1)
        for each in ("stored", "recomputed")
    )
    assert recomputed.dump_seconds == 0
    assert recomputed.reduce_seconds == stored.reduce_seconds
    # 30 steps of 32 and 2 x 256 to choose by through 1, 2, 3 sections; 320 for the start and 320 for BatchNorm through 0, 1, 2.
    extra = [0.01 * ((960 + 512) * (index + 1) + 640 * index) for index in range(3)]
    assert recomputed.section_seconds == pytest.approx(
        [seconds + more for seconds, more in zip(stored.section_seconds, extra, strict=True)]
    )
    ahead = _job({**job_document, "storage": {"activations": "recomputed"}}, look_ahead=1)
    assert [last_boundary(ahead, index, 3) for index in range(3)] == [2, 3, 3]


def test_a_plain_start_and_a_plain_merge_cost_less(job_document: dict[str, Any]) -> None:
    job = resolve_job({**job_document, "reduce": {"reestimate_batchnorm": False}}, source="test")
    costs = _costs(0.5, 0.2)
    full, plain = (predict(costs, each, COUNTS, 1) for each in (_job(job_document), job))
    # 0.01 s for each of 320 samples, in both sections; and both networks' re-estimation and judge.
    assert full.train_seconds - plain.train_seconds == pytest.approx(2 * 3.2)
    assert full.reduce_seconds - plain.reduce_seconds == pytest.approx(2 * 0.01 * (320 + 320 + 200))
    nearest = predict(costs, _job(job_document, start="nearest"), COUNTS, 1)
    assert full.train_seconds - nearest.train_seconds == pytest.approx(2 * 5.12)


def test_look_ahead_and_views_cost_what_they_do(job_document: dict[str, Any]) -> None:
    costs = _costs(0.5, 0.2, 0.1)
    plain = predict(costs, _job(job_document), COUNTS, 1)
    other = predict(costs, _job(job_document, look_ahead=1, augment={"views": 3}), COUNTS, 1)
    more = [ours - theirs for ours, theirs in zip(other.section_seconds, plain.section_seconds, strict=True)]
    assert more == pytest.approx([30 * FROZEN_SHARE * 0.2, 30 * FROZEN_SHARE * 0.1, 0.0])
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
