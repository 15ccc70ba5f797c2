"""What runs on a cluster's workers: tasks for slices and measurements, the actors that train, stitch, and reduce."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch

from dcq_ray.callables import importable_from
from dcq_ray.data import Splits
from dcq_ray.errors import ClusterError, DcqError, SectionTrainingError, ShardError, StaleRunError, StorageError
from dcq_ray.phases import (
    DumpedSlice,
    Finished,
    Network,
    SaveRequest,
    TestScores,
    activation_memory_bytes,
    choose_device,
    dump_slices,
    finish,
    measure_sections,
    measure_untrained,
    measured_section,
    needs_images,
    open_network,
    open_splits,
    polish_reached,
    section_failure,
    train_section,
)
from dcq_ray.records import (
    Boundary,
    Progress,
    RunContext,
    SectionFailure,
    SectionMeasurement,
    SectionResult,
    SectionTask,
    to_json,
)
from dcq_ray.remote.attempts import Attempts
from dcq_ray.remote.cluster import Share
from dcq_ray.remote.gpu_memory import cap_gpu_memory

ANSWER_SECONDS = 0.5

# The last run that this worker process opened: Ray uses a process for many short tasks, and reading a data set takes
# longer than most of them.
_opened: dict[bytes, tuple[Network, Splits]] = {}


def _open(context: RunContext) -> tuple[Network, Splits]:
    cap_gpu_memory()
    key = to_json(context)
    if key not in _opened:
        _opened.clear()
        torch.set_num_threads(context.job.train.num_threads)
        _opened[key] = (open_network(context), open_splits(context))
    return _opened[key]


def _free_memory() -> None:
    """Give back what an earlier section took: traced modules hold each other, so counting references alone frees none."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def shown_name(context: RunContext, work: str) -> str:
    """What Ray's dashboard shows of a task or an actor: the run, and what it does.

    Of actors names are unique, and that of one that died may still be taken when the next one starts: they say which try it is.
    """
    return f"dcq:{context.job.name}:{work}"


def _cuda_works() -> bool:
    return torch.cuda.is_available()


def _dump(context: RunContext, indices: Sequence[int], missing: Sequence[Boundary]) -> Iterator[DumpedSlice]:
    network, splits = _open(context)
    yield from dump_slices(context, network, splits, indices, missing)


def _measure(context: RunContext, result: SectionResult) -> SectionMeasurement:
    found = measured_section(context, result)
    return found if found is not None else measure_sections(context, [result], *_open(context))[0]


def _untrained(context: RunContext) -> TestScores:
    return measure_untrained(context, *_open(context))


class Worker:
    """Answers how far its work is, and saves it when it is asked to, while it does it."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._progress: Progress | None = None
        self._request: SaveRequest | None = None

    def progress(self) -> Progress | None:
        """The latest line of the work, or None before its first step."""
        return self._progress

    def save(self, timeout_seconds: float) -> bool:
        """Have the work save itself at its next step, and say whether it did in time; False at once where there is none."""
        request = self._request
        if request is None:
            return False
        request.make()
        return request.wait(timeout_seconds)

    @contextlib.contextmanager
    def _working(self) -> Iterator[SaveRequest]:
        """A piece of work begins without lines or wishes of an earlier one; yields where its own wishes are made."""
        self._progress, self._request = None, SaveRequest()
        try:
            yield self._request
        finally:
            self._request = None

    def _take(self, progress: Progress) -> None:
        self._progress = progress


class SectionWorker(Worker):
    """Trains sections, one after another; what one gives does not depend on those before it."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._network: Network | None = None
        self._splits: Splits | None = None

    def train(self, task: SectionTask, num_at_once: int, restarts: int) -> SectionResult | SectionFailure:
        """The result of the task, or why it failed where it would fail again; what may pass is raised."""
        context = self._context
        _free_memory()
        cap_gpu_memory()
        importable_from(context.job_folder)
        try:
            with self._working() as request:
                return train_section(
                    context,
                    task,
                    self._opened_network(),
                    self._opened_splits() if needs_images(context, task.index) else None,
                    emit=self._take,
                    memory_bytes=activation_memory_bytes(
                        context.job, choose_device(context.device), num_at_once=num_at_once
                    ),
                    restarts=restarts,
                    request=request,
                )
        except StaleRunError:
            raise
        except DcqError as error:
            if isinstance(error, StorageError) and not isinstance(error, ShardError):
                raise
            return section_failure(task, error)

    def _opened_network(self) -> Network:
        if self._network is None:
            self._network = open_network(self._context)
        return self._network

    def _opened_splits(self) -> Splits:
        if self._splits is None:
            self._splits = open_splits(self._context)
        return self._splits


class Stitcher(Worker):
    """Stitches and validates the student; a polish is saved as a section's training is."""

    def finish(self, results: Sequence[SectionResult]) -> Finished:
        """What `finish` found."""
        opened = _open(self._context)
        with self._working() as request:
            return finish(self._context, results, *opened, emit=self._take, request=request)


class Reducer:
    """Takes sections as they finish, has each measured alone, and at the end has them stitched and validated."""

    def __init__(self, context: RunContext, share: Share) -> None:
        self._context, self._share = context, share
        self._measurements: dict[int, Any] = {}
        self._stitcher: Any = None

    def take(self, result: SectionResult) -> None:
        """Start to measure a finished section; one that was trained again takes the place of its first result."""
        name = shown_name(self._context, f"measure-section-{result.index:02d}")
        self._measurements[result.index] = _measure_task.options(name=name, **self._share.options).remote(
            self._context, result
        )

    def reduce(self, results: Sequence[SectionResult]) -> tuple[tuple[SectionMeasurement, ...], TestScores, Finished]:
        """Wait for the measurements, stitch, validate, and write the student."""
        task = _untrained_task.options(name=shown_name(self._context, "untrained"), **self._share.options)
        untrained = task.remote(self._context)
        finished = self._finished(results)
        return tuple(ray.get(list(self._measurements.values()))), ray.get(untrained), finished

    def num_measured(self) -> int:
        """How many sections are measured so far."""
        done, _ = (
            ray.wait(list(self._measurements.values()), num_returns=len(self._measurements), timeout=0)
            if self._measurements
            else ([], [])
        )
        return len(done)

    def progress(self) -> Progress | None:
        """The latest line of the stitching, or None where it has not begun or does not answer."""
        return None if self._stitcher is None else _answer(self._stitcher.progress.remote(), ANSWER_SECONDS)

    def save(self, timeout_seconds: float) -> bool:
        """Have a polish save itself, and say whether it did in time."""
        return self._stitcher is not None and bool(
            _answer(self._stitcher.save.remote(timeout_seconds), timeout_seconds)
        )

    def _finished(self, results: Sequence[SectionResult]) -> Finished:
        """What a stitcher found; one that dies is replaced by another, which goes on where a polish was saved."""
        attempts = Attempts(polish_reached(self._context))
        while True:
            name = shown_name(self._context, f"stitcher:try-{attempts.num_restarts + 1}")
            actor = StitchActor.options(name=name, max_concurrency=3, **self._share.options)
            self._stitcher = actor.remote(self._context)
            try:
                found: Finished = ray.get(self._stitcher.finish.remote(results))
                return found
            except ray.exceptions.RayActorError as error:
                if not attempts.another(polish_reached(self._context)):
                    raise ClusterError(f"the worker that stitches died {attempts}; the last time: {error}") from error
            finally:
                # One that is only unavailable must not go on beside another.
                ray.kill(self._stitcher)


def _answer(reference: Any, timeout_seconds: float) -> Any:
    """What a worker answers; None where it is dead or does not in time."""
    with contextlib.suppress(ray.exceptions.RayError):
        if ray.wait([reference], timeout=timeout_seconds)[0]:
            return ray.get(reference)
    return None


def unwrapped(reference: Any) -> Any:
    """ray.get, with our own exceptions as they were raised in the worker, and a dead worker's told in a sentence."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        # An actor that found another one dead has nothing wrong itself.
        if isinstance(cause, DcqError | ray.exceptions.RayActorError):
            raise cause from error
        raise SectionTrainingError(
            f"a worker failed: {type(cause).__name__}: {cause}; run with --debug to see where"
        ) from error


cuda_task = ray.remote(_cuda_works)
dump_task = ray.remote(_dump)
_measure_task = ray.remote(_measure)
_untrained_task = ray.remote(_untrained)
SectionActor = ray.remote(SectionWorker)
StitchActor = ray.remote(Stitcher)
ReducerActor = ray.remote(Reducer)
