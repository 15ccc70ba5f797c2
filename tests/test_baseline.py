"""The rival: as many sample passes as DCQ, chosen on held-out images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcq_ray.baseline import RATE_FACTORS, train_dorefa
from dcq_ray.errors import DataError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import RunSession, open_run
from dcq_ray.records import Progress

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def opened(document: dict[str, Any], folder: Path, events: list[Progress]) -> Iterator[RunSession]:
    job = resolve_job(document, source="test")
    with open_run(job, str(folder), device=torch.device("cpu"), emit=events.append, owner="test") as session:
        yield session


def test_the_rival_has_equal_sample_passes_and_its_best_of_three_rates(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    events: list[Progress] = []
    with opened(job_document, tmp_path, events) as session:
        rival = train_dorefa(session)
        again = train_dorefa(session)
    job = resolve_job(job_document, source="test")
    assert rival.num_sample_passes == job.train.epochs * 320
    assert rival.tried_lrs == tuple(factor * job.train.lr for factor in RATE_FACTORS)
    assert rival.lr in rival.tried_lrs
    assert rival.top1 is not None
    assert rival.top1 > 0.3
    assert (again.lr, again.top1, again.held_out_top1) == (rival.lr, rival.top1, rival.held_out_top1)
    assert [event.detail for event in events if event.phase == "baseline" and event.state == "done"] == [
        f"best at lr {rival.lr:g}"
    ] * 2


def test_the_rival_needs_labels(job_document: dict[str, Any], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "plain.npz", images=generator.integers(0, 255, (400, 8, 8, 1), dtype=np.uint8))

    document = {
        **job_document,
        "teacher": {"model": "user_nets:user_net"},
        "data": {"dataset": "npz", "root": str(tmp_path / "images"), "train": "plain.npz", "held_out_samples": 50},
    }
    with opened(document, tmp_path, []) as session, pytest.raises(DataError, match="learns from labels"):
        train_dorefa(session)
