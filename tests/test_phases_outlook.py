"""Bytes, seconds and cost on machines that are not here, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_phases_footprint import make_plan

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import Prediction, SectionCosts, outlook, scaled

PREDICTION = Prediction(
    num_workers=8,
    dump_seconds=10.0,
    section_seconds=(50.0, 60.0),
    train_seconds=60.0,
    reduce_seconds=20.0,
    makespan_seconds=90.0,
)


def test_costs_follow_the_teachers_speed_but_what_a_cpu_does_stays() -> None:
    cost = SectionCosts(forward_seconds=0.06, store_seconds=0.002, step_seconds=1.0, start_seconds=5.0)
    costs = [cost, replace(cost, forward_seconds=0.04, step_seconds=2.0)]
    # 10 images a second here, 200 there.
    found = scaled(costs, 200.0)
    assert [one.forward_seconds for one in found] == pytest.approx([0.003, 0.002])
    assert [one.step_seconds for one in found] == pytest.approx([0.05, 0.1])
    assert [one.start_seconds for one in found] == pytest.approx([0.25, 0.25])
    assert [one.store_seconds for one in found] == [0.002, 0.002]


def test_bytes_are_written_once_and_read_by_two_sections(job_document: dict[str, Any]) -> None:
    job = resolve_job({**job_document, "train": {"epochs": 4}}, source="test")
    found = outlook(make_plan(), job, PREDICTION)
    # 3,000 samples of 12, 10 and 4 bytes; the boundary between the sections is read by both.
    assert found.written_bytes == 3000 * 26
    assert found.kept_read_bytes == 3000 * (22 + 14)
    assert found.read_bytes == 4 * found.kept_read_bytes
    assert (found.num_workers, found.num_training) == (8, 2)
    assert (found.seconds, found.cost) == (90.0, None)
    assert (found.dump_limit, found.train_limit) == ("work", "work")


def test_views_are_all_written_and_each_epoch_reads_one(job_document: dict[str, Any]) -> None:
    job = resolve_job({**job_document, "train": {"epochs": 4, "augment": {"views": 3}}}, source="test")
    found = outlook(make_plan(), job, PREDICTION)
    assert found.written_bytes == 3 * 3000 * 26
    assert found.kept_read_bytes == 3 * 3000 * 36
    assert found.read_bytes == 4 * 3000 * 36


def test_slow_storage_is_waited_for_and_paid_for(job_document: dict[str, Any]) -> None:
    job = resolve_job({**job_document, "train": {"epochs": 4}}, source="test")
    # 78,000 bytes take 15.6 s, 432,000 take 86.4.
    found = outlook(make_plan(), job, PREDICTION, storage_bytes_per_second=5000.0, price_per_hour=2.0)
    assert (found.dump_seconds, found.train_seconds) == pytest.approx((15.6, 86.4))
    assert (found.dump_limit, found.train_limit) == ("storage", "storage")
    assert found.cost == pytest.approx(8 * 122.0 / 3600 * 2.0)
