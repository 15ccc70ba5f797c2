"""Activations recomputed by every section: what is read, what comes of it, and what is not written."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import (
    dump_slices,
    ignore_progress,
    num_slices,
    open_network,
    open_run,
    run_local,
)
from dcq_ray.phases.predict import recomputed_passes
from dcq_ray.phases.reading import needs_images, open_views
from dcq_ray.phases.recomputing import made_ahead, recomputed_sources
from dcq_ray.phases.views import boundary_views, images_of_view
from dcq_ray.records import Progress, RunReport
from dcq_ray.remote import run_remote

CPU = torch.device("cpu")


def document_of(document: dict[str, Any], folder: Path, name: str, activations: str, **train: Any) -> dict[str, Any]:
    storage = {
        "run_dir": str(folder / name),
        "cache_dir": str(folder / f"cache-{name}"),
        "dtype": "float32",
        "activations": activations,
    }
    return {**document, "train": {**document["train"], **train}, "storage": storage}


def run(document: dict[str, Any], folder: Path, emit: Any = ignore_progress) -> RunReport:
    return run_local(resolve_job(document, source="test"), str(folder), emit=emit, owner="test")


def both(document: dict[str, Any], folder: Path, **train: Any) -> tuple[RunReport, RunReport]:
    stored, recomputed = (
        run(document_of(document, folder, name, name, **train), folder) for name in ("stored", "recomputed")
    )
    return stored, recomputed


def shard_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith("shard-") or path.name == "manifest.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        {"look_ahead": 1, "input_noise": 0.1, "last_loss": "cross-entropy"},
        # As many views as epochs: what recomputing gives at any number.
        {"augment": {"views": 3, "crop_padding": 1}},
        {"inputs": "student"},
    ],
)
def test_sections_are_those_of_stored_float32_activations_and_nothing_is_stored(
    job_document: dict[str, Any], tmp_path: Path, train: dict[str, Any]
) -> None:
    stored, recomputed = both(job_document, tmp_path, **train)
    assert recomputed.student == stored.student
    assert recomputed.validation == stored.validation
    assert recomputed.diagnosis == stored.diagnosis
    assert [one.top1_alone for one in recomputed.sections] == [one.top1_alone for one in stored.sections]
    assert shard_files(tmp_path / "cache-stored")
    assert not shard_files(tmp_path / "cache-recomputed")
    assert recomputed.timings.dump_seconds == 0
    assert [note for note in recomputed.notes if note.startswith("Activations are recomputed, none are stored")]
    assert not [note for note in stored.notes if "recomputed" in note]


@pytest.mark.slow
def test_every_epoch_has_a_fresh_view_and_a_resumed_run_sees_the_same(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    augment = {"views": 1, "crop_padding": 1}
    undisturbed = run(document_of(job_document, tmp_path, "a", "recomputed", augment=augment), tmp_path)

    def interrupt(progress: Progress) -> None:
        # In the middle of the second section.
        if (progress.phase, progress.index, progress.state) == ("train", 1, "running") and progress.done:
            raise KeyboardInterrupt

    document = document_of(job_document, tmp_path, "b", "recomputed", augment=augment)
    with pytest.raises(KeyboardInterrupt):
        run(document, tmp_path, interrupt)
    assert run(document, tmp_path).student == undisturbed.student
    with opened(document, tmp_path) as (context, _, _):
        assert [view[0].view for view in boundary_views(context)] == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


@contextlib.contextmanager
def opened(document: dict[str, Any], folder: Path) -> Iterator[tuple[Any, Any, Any]]:
    job = resolve_job(document, source="test")
    with open_run(job, str(folder), device=CPU, emit=ignore_progress, owner="test") as session:
        yield session.context, session.prepared.splits, open_network(session.context)


@pytest.mark.slow
def test_sources_are_the_teacher_on_the_images_and_readers_may_work_in_place(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = document_of(job_document, tmp_path, "a", "recomputed", augment={"crop_padding": 1})
    with opened(document, tmp_path) as (context, splits, network), contextlib.ExitStack() as stack:
        assert needs_images(context, 1)
        # Section k runs the teacher to its own end.
        first, second, third = (section.multiply_accumulates for section in context.plan.sections)
        passes = (3 * first + 2 * second + third) / (first + second + third)
        assert recomputed_passes(context.plan, context.job) == pytest.approx(passes)
        positions = np.array([5, 3, 200, 4])
        views = open_views(context, 1, splits, CPU, 0, stack, network)
        assert len(views) == 3
        for number, (inputs, target) in enumerate(views):
            with torch.no_grad():
                first = network.sections[0](images_of_view(context, splits, positions, number))
                second = network.sections[1](first.clone())
            inputs.read(positions).zero_()
            assert torch.equal(inputs.read(positions), first)
            assert torch.equal(target.read(positions), second)
            # Other positions are another batch, also in place of the first.
            assert torch.allclose(target.read(positions[::-1].copy()), second.flip(0), rtol=1e-5, atol=1e-6)
            assert inputs.num_samples == 320
    with opened(document_of(job_document, tmp_path, "b", "stored"), tmp_path) as (context, _, _):
        assert not needs_images(context, 1)


@pytest.mark.slow
def test_any_batch_is_as_stored_but_for_rounding(job_document: dict[str, Any], tmp_path: Path) -> None:
    with opened(document_of(job_document, tmp_path, "a", "stored"), tmp_path) as (context, splits, network):
        boundaries = context.plan.boundaries
        list(dump_slices(context, network, splits, range(num_slices(context)), boundaries))
        sources = recomputed_sources(context, boundaries, network, splits, CPU)
        everything = [source.read(np.arange(320)) for source in sources]
        generator = np.random.default_rng(0)
        for size in (1, 7, 33):
            positions = generator.permutation(320)[:size]
            for source, whole in zip(sources, everything, strict=True):
                torch.testing.assert_close(source.read(positions), whole[torch.from_numpy(positions)])


def test_batches_are_made_ahead_in_order_by_a_thread_that_waits() -> None:
    made: list[int] = []
    third = threading.Event()

    def batches() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            if number == 3:
                third.set()
            yield number

    ahead = made_ahead(batches(), num_threads=1, num_ahead=2)
    assert next(ahead) == 0
    # One is taken, two wait, and one is made that finds no room.
    assert third.wait(10)
    assert made == [0, 1, 2, 3]
    assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
    ahead.close()
    assert len(made) <= 9
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_what_fails_in_the_thread_fails_where_batches_are_taken() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    ahead = made_ahead(batches(), num_threads=1)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no more"):
        next(ahead)
    assert list(made_ahead(iter([4, 5]), num_threads=1)) == [4, 5]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_ray_and_in_process_give_the_same_student(job_document: dict[str, Any], tmp_path: Path, inputs: str) -> None:
    augment = {"crop_padding": 1}
    here, there = (
        document_of(job_document, tmp_path, name, "recomputed", augment=augment, inputs=inputs) for name in ("a", "b")
    )
    local = run(here, tmp_path)
    remote = run_remote(
        resolve_job(there, source="test"),
        str(tmp_path),
        address="local",
        environment=os.environ,
        emit=ignore_progress,
        say=lambda _: None,
        owner="test",
    )
    assert remote.student == local.student
    assert not shard_files(tmp_path)
