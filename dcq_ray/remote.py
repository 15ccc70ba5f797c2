"""The phases as Ray tasks and actors: the only module that knows Ray.

The dump is tasks over slices of the data; every section is a `SectionWorker` actor of its own, started longest first and
freed as soon as it ends; the `Reducer` actor takes results as they come and measures each in a short task, so that it holds
no GPU while sections need it. What travels is the `RunContext` and records; weights, images and activations are opened from
files by who needs them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from dcq_ray.callables import importable_from
from dcq_ray.data import Splits
from dcq_ray.errors import ClusterError, DcqError, SectionTrainingError, StaleRunError
from dcq_ray.phases import (
    DumpedSlice,
    Emit,
    Finished,
    Network,
    RunSession,
    TestScores,
    activation_memory_bytes,
    choose_device,
    dump_slices,
    finish,
    ignore_progress,
    longest_first,
    measure_section,
    measure_untrained,
    measured_section,
    num_slices,
    open_network,
    open_run,
    open_splits,
    report_failure,
    report_success,
    section_done,
    section_failure,
    train_section,
)
from dcq_ray.records import (
    Boundary,
    Progress,
    RunContext,
    RunReport,
    SectionFailure,
    SectionMeasurement,
    SectionResult,
    SectionTask,
    to_json,
)
from dcq_ray.spec import Job

PROBE_SECONDS = 2.0
POLL_SECONDS = 0.5
MAX_RESTARTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What Ray reserves for one section, one dump task or one measurement, and how many fit at once."""

    num_cpus: float
    num_gpus: float
    places: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


# -- joining a cluster -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(address: str, *, environment: Mapping[str, str], log_to_driver: bool = False) -> Iterator[str]:
    """Join or start a Ray, and leave it at the end; yields a phrase that says which.

    Args:
        address: `auto` joins the cluster that RAY_ADDRESS or this machine's running Ray names if it answers within two
            seconds, else starts a local one; `local` always starts one; anything else is a cluster's address.

    Raises:
        ClusterError: the address that was asked for does not answer.
    """
    target = None if address == "local" else _find_cluster(address, environment)
    # Ray warns of many things that are no concern of who quantizes a network; errors still reach the driver as exceptions.
    quiet = {"logging_level": "ERROR", "log_to_driver": log_to_driver}
    try:
        if target is None:
            ray.init(address="local", include_dashboard=False, **quiet)
            phrase = "a local Ray"
        else:
            ray.init(address=target, **quiet)
            phrase = f"the Ray cluster at {target}"
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise ClusterError(
            f"Ray could not be {'started here' if target is None else f'joined at {target}'}: {error}; "
            "run with --address none to do without Ray"
        ) from error
    try:
        yield phrase
    finally:
        ray.shutdown()


def _find_cluster(address: str, environment: Mapping[str, str]) -> str | None:
    """The address of a cluster that answers, or None where `auto` finds none."""
    if address != "auto":
        if not answers(address, PROBE_SECONDS):
            raise ClusterError(
                f"--address {address}: no Ray answers there within {PROBE_SECONDS:g} s; is the cluster up, is the port the "
                "GCS port (6379 unless told), or ray://HOST:10001 for the client port? Use --address local to start one here"
            )
        return address
    candidates = [environment.get("RAY_ADDRESS"), _address_file(environment)]
    for candidate in candidates:
        # A Ray job's own address may be "auto": the file below then says what it means.
        if candidate and candidate not in ("auto", "local") and answers(candidate, PROBE_SECONDS):
            return candidate
    return None


def _address_file(environment: Mapping[str, str]) -> str | None:
    path = os.path.join(environment.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip() or None
    except OSError:
        return None


def answers(address: str, timeout_seconds: float) -> bool:
    """Whether a Ray answers at HOST:PORT or ray://HOST:PORT; never waits longer than asked."""
    client = address.startswith("ray://")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return False
    deadline = time.monotonic() + timeout_seconds
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds):
            pass
    except OSError:
        return False
    if client:
        return True
    alive = threading.Event()

    def ask() -> None:
        # Something else may listen on that port and never answer: this thread then waits alone.
        with contextlib.suppress(Exception):
            ray._raylet.GcsClient(address=address).internal_kv_get(b"ray", b"dcq", timeout=timeout_seconds)
            alive.set()

    threading.Thread(target=ask, daemon=True).start()
    return alive.wait(max(0.0, deadline - time.monotonic()))


def section_share(job: Job, num_sections: int, nodes: Sequence[Mapping[str, float]]) -> Share:
    """What each section gets on nodes with these resources (`CPU`, `GPU`); raises ClusterError where none fits.

    With `gpus_per_section: auto` the GPUs are dealt over the sections: one each at most, and below that a unit fraction, so
    that a whole number of sections shares a card.
    """
    num_cpus = job.resources.cpus_per_section
    total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    asked = job.resources.gpus_per_section
    if asked != "auto":
        num_gpus = asked
    elif total_gpus == 0:
        num_gpus = 0.0
    else:
        num_gpus = min(1.0, 1.0 / -(-num_sections // int(total_gpus)))
    places = 0
    for node in nodes:
        # The small number forgives sums such as 3 * (1 / 3).
        fitting = int(node.get("CPU", 0.0) / num_cpus + 1e-6)
        if num_gpus:
            fitting = min(fitting, int(node.get("GPU", 0.0) / num_gpus + 1e-6))
        places += fitting
    if places == 0:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "no node"
        raise ClusterError(
            f"resources: a section asks for {num_cpus:g} CPUs and {num_gpus:g} GPUs, but no node of the cluster has them "
            f"({have}); lower resources.cpus_per_section or resources.gpus_per_section"
        )
    return Share(num_cpus=num_cpus, num_gpus=num_gpus, places=places)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


# -- what runs on workers ----------------------------------------------------------------------------------------------

# The last run that this worker process opened: Ray uses a process for many short tasks, and reading a data set takes
# longer than most of them.
_opened: dict[bytes, tuple[Network, Splits]] = {}


def _open(context: RunContext) -> tuple[Network, Splits]:
    key = to_json(context)
    if key not in _opened:
        _opened.clear()
        torch.set_num_threads(context.job.train.num_threads)
        _opened[key] = (open_network(context), open_splits(context))
    return _opened[key]


def _cuda_works() -> bool:
    return torch.cuda.is_available()


def _dump(context: RunContext, indices: Sequence[int], missing: Sequence[Boundary]) -> Iterator[DumpedSlice]:
    network, splits = _open(context)
    yield from dump_slices(context, network, splits, indices, missing)


def _measure(context: RunContext, result: SectionResult) -> SectionMeasurement:
    found = measured_section(context, result)
    return found if found is not None else measure_section(context, result, *_open(context))


def _untrained(context: RunContext) -> TestScores:
    return measure_untrained(context, *_open(context))


def _finish(context: RunContext, results: Sequence[SectionResult]) -> Finished:
    return finish(context, results, *_open(context), emit=ignore_progress)


class SectionWorker:
    """Trains one section; answers how far it is while it trains."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._progress: Progress | None = None

    def train(self, task: SectionTask, num_at_once: int, restarts: int) -> SectionResult | SectionFailure:
        """The result of the task, or why it failed."""
        context = self._context
        importable_from(context.job_folder)
        try:
            needs_labels = (
                context.job.train.last_loss == "cross-entropy" and task.index == len(context.plan.sections) - 1
            )
            return train_section(
                context,
                task,
                open_network(context),
                open_splits(context) if needs_labels else None,
                emit=self._take,
                memory_bytes=activation_memory_bytes(
                    context.job, choose_device(context.device), num_at_once=num_at_once
                ),
                restarts=restarts,
            )
        except StaleRunError:
            raise
        except DcqError as error:
            return section_failure(task, error)

    def progress(self) -> Progress | None:
        """The latest line of the training, or None before its first step."""
        return self._progress

    def _take(self, progress: Progress) -> None:
        self._progress = progress


class Reducer:
    """Takes sections as they finish, has each measured alone, and at the end has them stitched and validated."""

    def __init__(self, context: RunContext, share: Share) -> None:
        self._context = context
        self._measure = _measure_task.options(**share.options)
        self._finish = _finish_task.options(**share.options)
        self._scores = _untrained_task.options(**share.options)
        self._measurements: list[Any] = []
        self._untrained: Any = None

    def take(self, result: SectionResult) -> None:
        """Start to measure a finished section."""
        self._measurements.append(self._measure.remote(self._context, result))

    def reduce(self, results: Sequence[SectionResult]) -> tuple[tuple[SectionMeasurement, ...], TestScores, Finished]:
        """Wait for the measurements, stitch, validate, and write the student."""
        untrained = self._scores.remote(self._context)
        finished = self._finish.remote(self._context, results)
        return tuple(ray.get(self._measurements)), ray.get(untrained), ray.get(finished)

    def num_measured(self) -> int:
        """How many sections are measured so far."""
        done, _ = (
            ray.wait(self._measurements, num_returns=len(self._measurements), timeout=0)
            if self._measurements
            else ([], [])
        )
        return len(done)


_cuda_task = ray.remote(_cuda_works)
_dump_task = ray.remote(_dump)
_measure_task = ray.remote(_measure)
_untrained_task = ray.remote(_untrained)
_finish_task = ray.remote(_finish)
_SectionActor = ray.remote(SectionWorker)
_ReducerActor = ray.remote(Reducer)


# -- the driver --------------------------------------------------------------------------------------------------------


def run_remote(
    job: Job,
    job_folder: str,
    *,
    address: str,
    environment: Mapping[str, str],
    emit: Emit,
    say: Callable[[str], None],
    owner: str,
    fresh: bool = False,
    log_to_driver: bool = False,
) -> RunReport:
    """Run a job from end to end on Ray; the same phases as `run_local`, and on CPUs the same student.

    Raises:
        ClusterError: no such cluster, or none of its nodes has what a section asks for.
        SectionTrainingError: sections failed; the report names them, the others' results stay.
    """
    with connected(address, environment=environment, log_to_driver=log_to_driver) as phrase:
        share = section_share(job, job.sections.count or 1, _nodes())
        device = _cluster_device(share)
        say(f"running on {phrase}: {share.places} sections at once on {device.type}")
        with open_run(job, job_folder, device=device, emit=emit, owner=owner, fresh=fresh) as session:
            if session.finished_report is not None:
                return session.finished_report
            share = section_share(job, len(session.tasks), _nodes())
            session.dump(lambda missing: _dumped(session.context, missing, share))
            started = time.monotonic()
            reducer = _ReducerActor.options(num_cpus=0, max_concurrency=2).remote(session.context, share)
            for result in session.results.values():
                reducer.take.remote(result)
            results, failures = _train_all(session, share, reducer)
            train_seconds = time.monotonic() - started
            if failures:
                raise report_failure(session, results, failures)
            measurements, scores, finished = _reduced(session, reducer, results)
            report = report_success(
                session,
                results,
                measurements,
                scores,
                finished,
                num_workers=share.places,
                train_seconds=train_seconds,
            )
            session.emit(Progress(phase="reduce", state="done"))
            return report


def _cluster_device(share: Share) -> torch.device:
    """cuda where a worker that holds a GPU can use it; Ray also schedules GPUs that are only declared."""
    if not share.num_gpus:
        return torch.device("cpu")
    return torch.device("cuda" if ray.get(_cuda_task.options(**share.options).remote()) else "cpu")


def _dumped(context: RunContext, missing: Sequence[Boundary], share: Share) -> Iterator[DumpedSlice]:
    """Deal the slices over as many tasks as fit, and yield each slice as it is written."""
    total = num_slices(context)
    num_tasks = min(share.places, total)
    task = _dump_task.options(num_returns="streaming", **share.options)
    context_ref = ray.put(context)
    waiting = [
        task.remote(context_ref, tuple(range(first, total, num_tasks)), tuple(missing)) for first in range(num_tasks)
    ]
    while waiting:
        ready, _ = ray.wait(waiting, num_returns=1)
        try:
            yield _get(next(ready[0]))
        except StopIteration:
            waiting.remove(ready[0])


def _train_all(session: RunSession, share: Share, reducer: Any) -> tuple[list[SectionResult], list[SectionFailure]]:
    """Train the pending sections, each in its own actor, longest first; a worker that dies is replaced twice."""
    results, failures = dict(session.results), []
    tasks = {task.index: task for task in session.pending}
    queue = [tasks[section.index] for section in longest_first(session.context.plan.sections) if section.index in tasks]
    restarts = dict.fromkeys(tasks, 0)
    running: dict[Any, tuple[Any, SectionTask]] = {}
    context_ref = ray.put(session.context)
    actor = _SectionActor.options(max_concurrency=2, **share.options)
    for task in queue:
        session.emit(Progress(phase="train", index=task.index, state="waiting"))
    while queue or running:
        while queue and len(running) < share.places:
            task = queue.pop(0)
            worker = actor.remote(context_ref)
            reference = worker.train.remote(task, min(share.places, len(session.tasks)), restarts[task.index])
            running[reference] = (worker, task)
        done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            worker, task = running.pop(reference)
            try:
                outcome = _get(reference)
            except ray.exceptions.RayActorError as error:
                restarts[task.index] += 1
                if restarts[task.index] <= MAX_RESTARTS:
                    session.emit(Progress(phase="train", index=task.index, state="waiting", detail="its worker died"))
                    queue.insert(0, task)
                    continue
                outcome = SectionFailure(
                    index=task.index,
                    error_type=type(error).__name__,
                    message=f"section {task.index}: its worker died {restarts[task.index]} times; the last time: {error}",
                    traceback="",
                )
            # A handle that is kept keeps the place taken.
            ray.kill(worker)
            if isinstance(outcome, SectionFailure):
                failures.append(outcome)
                session.emit(Progress(phase="train", index=task.index, state="failed", detail=outcome.message))
            else:
                results[task.index] = outcome
                reducer.take.remote(outcome)
                session.emit(section_done(outcome))
        _poll([worker for worker, _ in running.values()], session.emit)
    return [results[index] for index in sorted(results)], failures


def _poll(workers: Sequence[Any], emit: Emit) -> None:
    """Ask those workers that answer at once how far they are."""
    asked = [worker.progress.remote() for worker in workers]
    if not asked:
        return
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)
    for reference in answered:
        # A worker that just died is dealt with where its result is awaited.
        with contextlib.suppress(ray.exceptions.RayError):
            progress = ray.get(reference)
            if progress is not None:
                emit(progress)


def _reduced(
    session: RunSession, reducer: Any, results: Sequence[SectionResult]
) -> tuple[Sequence[SectionMeasurement], TestScores, Finished]:
    total = len(results) + 1
    reference = reducer.reduce.remote(results)
    while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
        done = _get(reducer.num_measured.remote())
        detail = "measuring sections alone" if done < len(results) else "stitching and validating"
        session.emit(Progress(phase="reduce", done=done, total=total, unit="steps", detail=detail))
    measurements, scores, finished = _get(reference)
    return sorted(measurements, key=lambda measurement: measurement.index), scores, finished


def _get(reference: Any) -> Any:
    """ray.get, with our own exceptions as they were raised in the worker, and a dead worker's told in a sentence."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, DcqError):
            raise cause from error
        raise SectionTrainingError(
            f"a worker failed: {type(cause).__name__}: {cause}; run with --debug to see where"
        ) from error
