"""The pool of workers: who lives on, who is replaced, who is given up; and that what a section gives is not of those before it."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from dcq_ray.errors import ClusterError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import RunSession, dump_slices, ignore_progress, num_slices, open_network, open_run
from dcq_ray.records import Progress, SectionResult
from dcq_ray.remote import attempts, pool, sections, workers
from dcq_ray.remote.cluster import Share
from dcq_ray.remote.pool import Place, Pool
from dcq_ray.remote.workers import SectionWorker


@pytest.fixture
def session(job_document: dict[str, Any], tmp_path: Path) -> RunSession:
    """A run whose activations are there."""
    job_document["teacher"] = {"model": "user_nets:user_net", "min_top1": 0}
    job_document["train"]["epochs"] = 1
    job = resolve_job(job_document, source="test")
    opened = open_run(job, str(tmp_path), device=torch.device("cpu"), emit=ignore_progress, owner="test")
    # The lease ends with the block, and is still the run's.
    with opened as session:
        context, splits = session.context, session.prepared.splits
        network = open_network(context)
        session.dump(lambda missing: dump_slices(context, network, splits, range(num_slices(context)), missing))
    return session


def num_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_a_section_is_the_same_whatever_its_worker_trained_before_and_leaves_nothing_behind(
    session: RunSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "cap_gpu_memory", lambda: None)
    opened: list[object] = []
    monkeypatch.setattr(workers, "open_network", lambda context: opened.append(context) or open_network(context))

    def trained(worker: SectionWorker, index: int) -> str:
        result = worker.train(session.tasks[index], 1, 0)
        assert isinstance(result, SectionResult), result
        return result.weights_sha256

    assert len(session.tasks) == 3
    alone = {index: trained(SectionWorker(session.context), index) for index in range(3)}
    assert len(set(alone.values())) == 3
    opened.clear()
    worker = SectionWorker(session.context)
    assert trained(worker, 2) == alone[2]
    counts = []
    for index in (0, 1, 2, 0, 1, 2):
        assert trained(worker, index) == alone[index]
        counts.append(num_tensors())
    assert counts[:3] == counts[3:]
    assert len(opened) == 1


def test_neither_lines_nor_wishes_outlive_the_section_that_they_are_of(
    session: RunSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "cap_gpu_memory", lambda: None)
    worker = SectionWorker(session.context)
    # It does nothing that could be saved, and says so without a wait.
    assert not worker.save(600.0)
    worker.train(session.tasks[0], 1, 0)
    assert worker.progress() is not None
    assert not worker.save(600.0)
    seen: list[Any] = []
    monkeypatch.setattr(
        workers,
        "train_section",
        lambda *_, request, **__: seen.append((worker.progress(), request.wanted)),
    )
    worker.train(session.tasks[1], 1, 0)
    assert seen == [(None, False)]


class Double:
    """A worker that is asked, and never answers."""

    def __init__(self) -> None:
        self.progress = SimpleNamespace(remote=object)


def test_there_are_as_many_free_workers_as_tasks_wait_and_surplus_ones_end_the_starting_ones_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[object] = []
    monkeypatch.setattr(pool.ray, "kill", killed.append)
    started: list[tuple[int, int]] = []

    def start(place: int, time_there: int) -> Double:
        started.append((place, time_there))
        return Double()

    def up(place: Place) -> Place:
        place.awaited = None
        return place

    with Pool(start, 3) as workers_pool:
        workers_pool.fit(2)
        assert started == [(1, 1), (2, 1)]
        workers_pool.fit(5)
        assert started == [(1, 1), (2, 1), (3, 1)]
        places = list(workers_pool._places)
        up(places[1])
        assert workers_pool.idle == [places[1]]
        kept = places[1].worker
        workers_pool.fit(1)
        assert len(killed) == 2
        assert kept not in killed
        session_task: Any = object()
        workers_pool.give(places[1], session_task, object())
        assert workers_pool.busy == [kept]
        # Who has a task is not ended, and whose place was left may be started there again.
        workers_pool.fit(0)
        assert len(killed) == 2
        workers_pool.fit(1)
        assert started[3:] == [(1, 2)]
    assert len(killed) == 4


# -- on Ray, with workers that train nothing -----------------------------------------------------------------------------


class Writer:
    """Notes which process was given which section; what kills it is a file `kill-<section>`."""

    folder: Path

    def __init__(self, context: Any) -> None:
        if (self.folder / "stillborn").exists():
            os._exit(1)

    def progress(self) -> Progress | None:
        return None

    def save(self, timeout_seconds: float) -> bool:
        return False

    def train(self, task: Any, num_at_once: int, restarts: int) -> SimpleNamespace:
        with open(self.folder / "log", "a") as log:
            log.write(f"{os.getpid()} {task.index} {restarts}\n")
        time.sleep(0.2)
        deadly = self.folder / f"kill-{task.index}"
        if deadly.exists():
            deadly.unlink()
            os._exit(1)
        return SimpleNamespace(index=task.index)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_live_over_sections_and_only_one_that_died_is_replaced(
    session: RunSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(pool, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(attempts, "MAX_DEATHS", 2)
    monkeypatch.setattr(sections, "section_done", lambda outcome: Progress(phase="train", index=outcome.index))
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    actor = ray.remote(type("Writer", (Writer,), {"folder": tmp_path, "__module__": __name__}))
    share = Share(num_cpus=1, num_gpus=0, places=1)
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        taken: list[int] = []
        (tmp_path / "kill-1").touch()
        results, failures = sections.train_alone(session, share, lambda result: taken.append(result.index), actor=actor)
        assert ([result.index for result in results], failures) == ([0, 1, 2], [])
        assert sorted(taken) == [0, 1, 2]
        log = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
        assert len(log) == 4
        assert len({process for process, _, _ in log}) == 2
        assert sorted((index, restarts) for _, index, restarts in log) == [(0, 0), (1, 0), (1, 1), (2, 0)]
        died = next(process for process, index, restarts in log if (index, restarts) == (1, 0))
        # Longest first, until it died; the second one took the rest.
        assert [process == died for process, _, _ in log] == sorted((p == died for p, _, _ in log), reverse=True)
        # Their places are free at once: no worker of the pool is left.
        (tmp_path / "stillborn").touch()
        with pytest.raises(ClusterError, match=r"no worker starts: .* died 2 times in a row"):
            sections.train_alone(session, share, lambda result: None, actor=actor)
    finally:
        ray.shutdown()
