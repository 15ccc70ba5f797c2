"""The simulated cluster: its waits and bounds by hand, its workers' files as real ones leave them, and a tiny run."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from benchmarks import scale, waiting
from benchmarks.scale import Setting, Simulated, bound, efficiency_figures, job_of, samples_figures, waits_of

from dcq_ray.phases import RunSession, checkpoint_positions, checkpoint_store, ignore_progress, open_run
from dcq_ray.phases.committed import RESULT_FILE
from dcq_ray.phases.context import section_store
from dcq_ray.records import SectionResult, unseal_json

FOUND = Simulated(
    seconds=25.0,
    bound_seconds=20.0,
    scheduled_seconds=21.0,
    times_measured=3.0,
    opening_cpu_seconds=1.0,
    driver_cpu_seconds=2.0,
    driver_peak_bytes=2**30,
)


def test_waits_keep_the_measured_proportions_and_have_the_mean() -> None:
    waits, times = waits_of([0.001, 0.003], 10.0)
    assert waits == pytest.approx([5.0, 15.0])
    assert times == pytest.approx(5000.0)


@pytest.mark.parametrize(("num_workers", "expected"), [(1, 12.0), (2, 6.0), (4, 5.0)])
def test_bound_is_the_greater_of_shared_work_and_the_longest_section(num_workers: int, expected: float) -> None:
    assert bound([5.0, 4.0, 3.0], num_workers) == expected


def test_bars_are_of_16_and_64_workers_and_of_growth() -> None:
    rows = [*efficiency_figures(4, FOUND), *efficiency_figures(16, FOUND), *efficiency_figures(64, FOUND)]
    assert [(row.name, row.value, row.bar, row.met) for row in rows if row.bar is not None] == [
        ("16 workers: bound / time", 0.8, 0.95, False),
        ("64 workers: bound / time", 0.8, 0.9, False),
    ]
    assert [row.met for row in samples_figures(FOUND, FOUND)] == [True, True]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSession:
    monkeypatch.setattr(waiting, "SECONDS_BETWEEN_REPORTS", 0.01)
    job = job_of(Setting(num_workers=1, num_sections=3, mean_seconds=0.2, num_samples=128), str(tmp_path))
    job = job.model_copy(update={"storage": job.storage.model_copy(update={"checkpoint_seconds": 0.05})})
    folder = str(Path(scale.__file__).parent)
    with open_run(job, folder, device=torch.device("cpu"), emit=ignore_progress, owner="test") as opened:
        return opened


def test_a_waiting_worker_leaves_what_a_real_one_does(
    session: RunSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, task = tmp_path / "ready", session.tasks[1]
    ready.mkdir()
    # In its own process there is none.
    monkeypatch.delitem(sys.modules, "torch")
    waits = waiting.Waits(seconds={1: 0.3}, num_steps=100, num_workers=2, ready_folder=str(ready))
    worker = type("Waiting", (waiting.WaitingWorker,), {"waits": waits})(session.context)
    results: list[SectionResult] = []
    thread = threading.Thread(target=lambda: results.append(worker.train(task, 2, 0)))
    thread.start()
    # The second worker is not ready yet.
    time.sleep(0.1)
    assert worker.progress() is None
    (ready / "other").touch()
    positions: set[int] = set()
    while thread.is_alive():
        positions |= checkpoint_positions(checkpoint_store(session.context, task))
        time.sleep(0.01)
    assert positions
    assert max(positions) <= 100
    (result,) = results
    store = section_store(session.context, 1)
    assert unseal_json(SectionResult, store.read_bytes(RESULT_FILE)) == result
    assert result.seconds >= 0.3
    assert (
        store.child(result.attempt).size("weights.safetensors") == 4 * session.context.plan.sections[1].num_parameters
    )
    assert checkpoint_positions(checkpoint_store(session.context, task)) == set()


@pytest.mark.slow
@pytest.mark.ray
def test_a_tiny_cluster_is_simulated() -> None:
    found = scale.simulated(Setting(num_workers=2, num_sections=4, mean_seconds=0.5, num_samples=128))
    assert 1.0 <= found.bound_seconds <= found.scheduled_seconds <= found.seconds
    assert found.driver_peak_bytes > 2**27
    assert found.times_measured > 0
