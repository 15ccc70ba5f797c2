"""Workers that live over many tasks: who gets one, who is replaced, who ends, and that what they trained before leaves no trace."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from dcq_ray.errors import ClusterError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import RunSession, dump_slices, ignore_progress, num_slices, open_network, open_run
from dcq_ray.records import Progress, SectionResult, SectionTask
from dcq_ray.remote import attempts, pool, sections, workers
from dcq_ray.remote.attempts import MAX_DEATHS
from dcq_ray.remote.cluster import Share
from dcq_ray.remote.pool import Pool
from dcq_ray.remote.workers import SectionWorker


@dataclass(eq=False)
class Reference:
    """What a worker will answer, once a test says so."""

    value: Any = None
    is_there: bool = False
    error: Exception | None = None

    def answer(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error, self.is_there = value, error, True


@dataclass(eq=False)
class FakeWorker:
    """An actor of no cluster."""

    place: int
    start: int
    answers: list[Reference] = field(default_factory=list)
    killed: bool = False

    @property
    def progress(self) -> Any:
        def remote() -> Reference:
            self.answers.append(Reference())
            return self.answers[-1]

        return SimpleNamespace(remote=remote)


class FakeRay:
    """The three calls that a pool makes."""

    exceptions = ray.exceptions

    def wait(
        self, references: Sequence[Reference], num_returns: int = 1, timeout: float = 0
    ) -> tuple[list[Reference], list[Reference]]:
        there = [reference for reference in references if reference.is_there][:num_returns]
        return there, [reference for reference in references if reference not in there]

    def get(self, reference: Reference) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def kill(self, worker: FakeWorker) -> None:
        worker.killed = True


class Stage:
    """A pool of fake workers, and a clock that goes on only as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_places: int) -> None:
        self.now = 0.0
        self.workers: list[FakeWorker] = []
        monkeypatch.setattr(pool, "ray", FakeRay())
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(pool, "time", clock)
        self.pool = Pool(self.start, num_places)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self, place: int, start: int) -> FakeWorker:
        self.workers.append(FakeWorker(place=place, start=start))
        return self.workers[-1]

    def begin(self, num_waiting: int) -> None:
        """Start workers for so many tasks, and have them answer."""
        self.pool.fit(num_waiting)
        for worker in self.workers:
            worker.answers[0].answer()
        assert self.pool.arrived(0) == []


def task_of(index: int) -> SectionTask:
    return SectionTask(index=index, digest=f"{index:064d}")


def died() -> ray.exceptions.RayActorError:
    return ray.exceptions.RayActorError()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch, 3)


def test_no_more_workers_start_than_there_are_tasks_or_places(stage: Stage) -> None:
    stage.pool.fit(2)
    assert [(worker.place, worker.start) for worker in stage.workers] == [(1, 1), (2, 1)]
    stage.pool.fit(5)
    assert [worker.place for worker in stage.workers] == [1, 2, 3]


def test_a_worker_is_idle_only_once_it_has_answered_and_lives_over_its_tasks(stage: Stage) -> None:
    stage.pool.fit(1)
    assert stage.pool.idle == []
    stage.begin(1)
    (place,) = stage.pool.idle
    for index in range(3):
        reference = Reference()
        stage.pool.give(place, task_of(index), reference)
        assert (stage.pool.idle, stage.pool.busy) == ([], [stage.workers[0]])
        assert stage.pool.arrived(0) == []
        reference.answer("done")
        assert stage.pool.arrived(0) == [(place, task_of(index), reference)]
        assert (stage.pool.idle, stage.pool.busy) == ([place], [])
    assert len(stage.workers) == 1
    assert not stage.workers[0].killed


def test_workers_that_no_task_waits_for_end_and_those_that_still_start_first(stage: Stage) -> None:
    stage.pool.fit(3)
    first, second, third = stage.workers
    second.answers[0].answer()
    stage.pool.arrived(0)
    stage.pool.fit(1)
    assert (first.killed, second.killed, third.killed) == (True, False, True)
    stage.pool.fit(0)
    assert second.killed


def test_a_lost_worker_is_replaced_at_its_place(stage: Stage) -> None:
    stage.begin(2)
    first, second = stage.pool.idle
    stage.pool.give(first, task_of(0), Reference())
    stage.pool.lose(first)
    assert stage.workers[0].killed
    assert stage.pool.busy == []
    stage.pool.fit(2)
    assert [(worker.place, worker.start) for worker in stage.workers] == [(1, 1), (2, 1), (1, 2)]
    assert stage.pool.idle == [second]


def test_a_worker_that_dies_as_it_starts_is_replaced_after_a_pause(stage: Stage) -> None:
    stage.pool.fit(1)
    stage.workers[0].answers[0].answer(error=died())
    assert stage.pool.arrived(0) == []
    assert stage.workers[0].killed
    # Another place has done nothing wrong.
    stage.pool.fit(1)
    assert [worker.place for worker in stage.workers] == [1, 2]
    stage.pool.fit(3)
    assert [worker.place for worker in stage.workers] == [1, 2, 3]
    stage.now += pool.PAUSE_SECONDS
    stage.pool.fit(3)
    assert [(worker.place, worker.start) for worker in stage.workers[3:]] == [(1, 2)]


def test_places_at_which_no_worker_starts_are_given_up_and_with_the_last_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, 2)

    def kill_all() -> None:
        stage.pool.fit(2)
        for worker in stage.workers:
            if not worker.killed:
                worker.answers[0].answer(error=died())
        stage.pool.arrived(0)
        stage.now += pool.PAUSE_SECONDS

    for _ in range(MAX_DEATHS - 1):
        kill_all()
    with pytest.raises(
        ClusterError, match=rf"no worker starts: at the last of the places it died {MAX_DEATHS} times in a row"
    ):
        kill_all()
    assert len(stage.workers) == 2 * MAX_DEATHS


def test_news_are_of_the_task_at_hand_asked_for_now_and_then_and_never_waited_for(stage: Stage) -> None:
    stage.begin(1)
    (place,) = stage.pool.idle
    (worker,) = stage.workers
    assert list(stage.pool.news()) == []
    assert len(worker.answers) == 1
    stage.pool.give(place, task_of(1), Reference())
    assert list(stage.pool.news()) == []
    assert len(worker.answers) == 2
    # Not answered: not asked again, however long that takes.
    stage.now += 10 * pool.SECONDS_BETWEEN_QUESTIONS
    assert list(stage.pool.news()) == []
    assert len(worker.answers) == 2
    line = Progress(phase="train", index=1, done=5)
    worker.answers[-1].answer(line)
    assert list(stage.pool.news()) == [line]
    assert len(worker.answers) == 3
    # What is left of the task before is not told.
    worker.answers[-1].answer(Progress(phase="train", index=0, done=9))
    assert list(stage.pool.news()) == []
    assert len(worker.answers) == 3
    stage.now += pool.SECONDS_BETWEEN_QUESTIONS
    list(stage.pool.news())
    assert len(worker.answers) == 4
    # Its death is dealt with elsewhere.
    worker.answers[-1].answer(error=died())
    assert list(stage.pool.news()) == []


def test_all_workers_end_with_the_pool(stage: Stage) -> None:
    with stage.pool:
        stage.begin(3)
        stage.pool.give(stage.pool.idle[0], task_of(0), Reference())
    assert all(worker.killed for worker in stage.workers)


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
