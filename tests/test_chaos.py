"""Runs that are killed at random moments, in short; and the sums of the benchmark that does it at length."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks import chaos
from benchmarks.chaos import KINDS, MIXED, Run, difference, draw_kills, parsed, summary, table
from benchmarks.chaos_cluster import MARKER, Process, marked, processes, send
from benchmarks.checkpoint_cost import Training, ratios

from dcq_ray.jobfile import load_job

SEEN = {"task": (4.0, 5.0), "actor": (10.0, 11.0, 12.0), "raylet": (4.0, 10.0), "cut": (4.0, 10.0), "driver": (1.0,)}
UNDISTURBED = Run(kind="", seconds=20.0, digest="a", section_digests=("x", "y"), seen=SEEN)


def test_kills_are_drawn_from_moments_that_had_a_victim_and_are_the_seed_s() -> None:
    for kind in (*KINDS, MIXED):
        kills = draw_kills(kind, 30, UNDISTURBED, random.Random(3))
        assert kills == draw_kills(kind, 30, UNDISTURBED, random.Random(3))
        assert [kill.seconds for kill in kills] == sorted(kill.seconds for kill in kills)
        assert all(kill.seconds in SEEN[kill.kind] for kill in kills)
        assert {kill.kind for kill in kills} == (set(KINDS) if kind == MIXED else {kind})


def test_the_benchmark_s_own_job_has_cuts_that_do_not_depend_on_measured_costs() -> None:
    job = load_job(str(parsed([]).job), environment={})
    assert job.sections.cuts is not None
    assert len(job.sections.cuts) == 3


def test_seconds_lost_and_students_by_hand() -> None:
    runs = [
        UNDISTURBED,
        Run(kind="actor", seconds=31.0, killed=("actor", "actor"), digest="a", restarts=2),
        Run(kind="actor", seconds=25.0, killed=("actor",), digest="a", restarts=1),
        Run(kind=MIXED, seconds=30.0, killed=("cut", "driver"), digest="b", section_digests=("x", "z"), restarts=4),
        Run(kind="driver", seconds=900.0, killed=("driver",), failure="no end after 900 s"),
        Run(kind="", seconds=24.0, digest="a"),
    ]
    found = summary(runs)
    # Undisturbed is (20 + 24) / 2 = 22 s: the first run lost 9 / 2 a kill, the second 3.
    assert found["kinds"]["actor"] == {
        **{"runs": 2, "kills": 3, "restarts": 3, "failed": 0, "differing": 0},
        **{"seconds_lost_per_kill_median": 3.8, "seconds_lost_per_kill_most": 4.5},
    }
    # What did not end has lost nothing that could be told.
    assert found["kinds"]["driver"]["seconds_lost_per_kill_median"] is None
    assert (found["kills"], found["runs"], found["failed"], found["differing"]) == (6, 6, 1, 1)
    assert found["undisturbed_seconds"] == [20.0, 24.0]
    assert "| mixed | 1 | 2 | 4 | 4.0 (4.0) | 0 of 1 |" in table(found)
    assert difference(UNDISTURBED, runs[1]) == "the same student"
    assert difference(UNDISTURBED, runs[3]) == "ANOTHER STUDENT, sections that differ: 1"


def test_a_worker_is_known_by_its_title_and_what_was_started_by_its_mark(tmp_path: Path) -> None:
    titles = {
        "ray::_dump": (True, False),
        "ray::SectionWorker": (True, True),
        "ray::dcq:small:section-03:try-1": (True, True),
        "ray::dcq:small:measure-section-03": (True, False),
        "ray::Stitcher.finish": (True, True),
        "ray::Reducer": (True, True),
        "ray::IDLE": (False, False),
        "ray::DashboardAgent": (False, False),
        "python -m dcq_ray": (False, False),
    }
    for title, (busy, actor) in titles.items():
        process = Process(pid=1, parent=0, title=title)
        assert (process.is_busy, process.is_actor) == (busy, actor), title
    child = subprocess.Popen(["sleep", "600"], env={**os.environ, MARKER: str(tmp_path)})
    try:
        assert [process.parent for process in processes() if process.pid == child.pid] == [os.getpid()]
        assert marked(str(tmp_path)) == [child.pid]
        assert send(child.pid, signal.SIGKILL)
        child.wait()
        assert marked(str(tmp_path)) == []
        assert not send(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()


def test_checkpoints_cost_what_the_pairs_say() -> None:
    def at(cpu_seconds: float) -> Training:
        return Training(cpu_seconds=cpu_seconds, save_cpu_seconds=(), weights_sha256="")

    found: list[dict[float | None, Training]] = [
        {None: at(10.0), 30.0: at(10.1), 2.0: at(10.4)},
        {2.0: at(20.2), None: at(20.0), 30.0: at(19.8)},
    ]
    by_pace = ratios(found)
    assert list(by_pace) == [30.0, 2.0]
    assert by_pace[30.0] == pytest.approx([0.99, 1.01])
    assert by_pace[2.0] == pytest.approx([1.01, 1.04])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_run_with_kills_of_all_kinds_gives_the_undisturbed_student(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {
        **job_document,
        # Trained beforehand, so that the kills fall upon the dump and the sections.
        "teacher": {"model": "user_nets:user_net", "min_top1": 0},
        "train": {"epochs": 100, "batch_size": 16},
        "storage": {"checkpoint_seconds": 0.3},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [sys.executable, chaos.__file__, "--job", str(path), "--kills", "3", "--only", MIXED, "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Moments are those of the undisturbed run: where that had less of the machine, some come after the end of the other.
    assert found["kills"] >= 1
    assert (found["failed"], found["differing"]) == (0, 0)
