"""The least that a run can take, by hand, and the table of a run beside it."""

from __future__ import annotations

import json

import pytest
import yaml
from benchmarks import limit
from benchmarks.limit import Run, bound, figures

PIECES = {"teacher": 4.0, "section 0": 10.0, "section 1": 2.0, "untrained": 1.0, "alone": 1.0, "student": 2.0}
TIMINGS = {
    "dump_seconds": 2.0,
    "train_seconds": 10.0,
    "reduce_seconds": 3.0,
    "total_seconds": 17.0,
    "makespan_lower_bound_seconds": 11.0,
    "cpu_seconds": {"teacher": 1.0, "dump": 4.0, "train": 12.0, "reduce": 4.0},
}


@pytest.mark.parametrize(
    # All of it is 20; the chain is 4 over the workers, then 10 and 2.
    ("num_workers", "expected"),
    [(1, 20.0), (2, 14.0), (4, 13.0)],
)
def test_bound_is_the_greater_of_shared_work_and_the_longest_chain(num_workers: int, expected: float) -> None:
    assert bound(PIECES, num_workers) == pytest.approx(expected)


def test_the_table_says_where_a_runs_seconds_went() -> None:
    found = {figure.name: figure for figure in figures(PIECES, 2, Run(seconds=21.0, timings=TIMINGS, sha256=""), 5.0)}
    assert found["run / bound"].value == pytest.approx(1.5)
    assert found["run / bound"].met is False
    assert found["what starting a Ray of its own adds"].met is True
    names = ["starting the command, joining Ray, the tables at the end", "preparing: images, teacher, plan"]
    assert [found[name].value for name in (*names, "dump", "train", "reduce")] == [4.0, 2.0, 2.0, 10.0, 3.0]
    assert found["processor seconds that the report tells"].value == 21.0
    # 4, 12 and 4 beside 20.
    assert found["processor seconds of dump, train and reduce / bare"].value == pytest.approx(1.0)
    assert len(figures(PIECES, 2, Run(seconds=21.0, timings=TIMINGS, sha256=""), None)) == len(found) - 1


def test_bare_pieces_of_a_job_are_printed_as_json(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    document = {
        "name": "small",
        "teacher": {"model": "dcq_ray:lenet", "args": {"image_size": 16}, "min_top1": 0},
        "data": {
            "dataset": "digits",
            "image_size": [16, 16],
            "train_samples": 64,
            "held_out_samples": 32,
            "test_samples": 32,
        },
        "sections": {"count": 2},
        "train": {"epochs": 1, "batch_size": 32},
    }
    path.write_text(yaml.safe_dump(document))
    assert limit.main([str(path), "--bare", str(tmp_path / "cache")]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {
        "teacher",
        "section 0",
        "section 1",
        "untrained",
        "alone",
        "student",
    }
