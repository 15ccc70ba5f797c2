"""What a section reads and is trained towards: look-ahead, augmented views, noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcq_ray.data import augmented_batches
from dcq_ray.jobfile import resolve_job
from dcq_ray.losses import distillation, nmse
from dcq_ray.phases import (
    RunSession,
    dump_slices,
    ignore_progress,
    num_slices,
    open_network,
    open_run,
    run_local,
    section_objective,
)
from dcq_ray.phases.objective import objective_loss
from dcq_ray.phases.reading import open_views, section_boundaries
from dcq_ray.phases.sources import with_noise
from dcq_ray.phases.views import boundary_views, images_of_view

CPU = torch.device("cpu")


@contextlib.contextmanager
def opened(document: dict[str, Any], folder: Path, **train: Any) -> Iterator[RunSession]:
    job = resolve_job({**document, "train": {**document["train"], **train}}, source="test")
    with open_run(job, str(folder), device=CPU, emit=lambda _: None, owner="test") as session:
        yield session


@pytest.mark.parametrize(
    ("train", "index", "boundaries", "labels", "names"),
    [
        ({}, 0, (1,), False, ("nmse",)),
        ({"look_ahead": 1}, 0, (1, 2), False, ("nmse", "nmse")),
        ({"look_ahead": "all", "last_loss": "distillation"}, 0, (1, 2, 3), False, ("nmse", "nmse", "distillation")),
        ({"look_ahead": 5, "last_loss": "cross-entropy"}, 1, (2,), True, ("nmse", "cross-entropy")),
        ({"look_ahead": 1, "last_loss": "cross-entropy"}, 2, (), True, ("cross-entropy",)),
    ],
)
def test_objectives_of_three_sections(
    job_document: dict[str, Any],
    tmp_path: Path,
    train: dict[str, Any],
    index: int,
    boundaries: tuple[int, ...],
    labels: bool,
    names: tuple[str, ...],
) -> None:
    with opened(job_document, tmp_path, **train) as session:
        objective = section_objective(session.context, index)
        assert (objective.boundaries, objective.labels, objective.loss_names) == (boundaries, labels, names)
        assert tuple(boundary.index for boundary in section_boundaries(session.context, index)) == (index, *boundaries)


def test_look_ahead_is_the_sum_over_the_teachers_sections(job_document: dict[str, Any], tmp_path: Path) -> None:
    train = {"look_ahead": "all", "look_ahead_weight": 0.5, "last_loss": "distillation", "temperature": 3.0}
    with opened(job_document, tmp_path, **train) as session:
        network = open_network(session.context)
        images = session.prepared.splits.train.images(np.arange(8))
        with torch.no_grad():
            targets = [images]
            for section in network.sections:
                targets.append(section(targets[-1].clone()))
        output = (targets[1] + 0.1).requires_grad_(True)
        loss = objective_loss(session.context, 0, network, CPU)(output, tuple(targets[1:]))
        second = network.sections[1](output.clone())
        expected = (
            nmse(output, targets[1])
            + 0.5 * nmse(second, targets[2])
            + 0.5 * distillation(3.0)(network.sections[2](second.clone()), targets[3])
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()
        assert output.grad is not None
        # The teacher learns nothing.
        assert all(parameter.grad is None for parameter in network.teacher.module.parameters())


def test_what_a_section_reads_is_in_its_tasks_digest(job_document: dict[str, Any], tmp_path: Path) -> None:
    def digests(**train: Any) -> list[str]:
        with opened(job_document, tmp_path, **train) as session:
            return [task.digest for task in session.tasks]

    alone, ahead, noisy = digests(), digests(look_ahead=1), digests(input_noise=0.1)
    # The last section has nothing ahead of it.
    assert [a == b for a, b in zip(alone, ahead, strict=True)] == [False, False, True]
    assert not set(alone) & set(noisy)
    # What streams do not use does not count; on streams, what the sections before have does.
    assert digests(anneal=0.9) == alone
    assert not set(digests(inputs="student")) & set(digests(inputs="student", anneal=0.9))
    # So it is with the images of a fit.
    nearest, fitted = digests(start="nearest"), digests(start="fitted")
    assert digests(start="nearest", start_samples=9) == nearest
    assert not (set(fitted) & set(nearest)) | (set(fitted) & set(digests(start="fitted", start_samples=9)))


def test_a_fitted_section_begins_nearer_to_the_teacher(job_document: dict[str, Any], tmp_path: Path) -> None:
    def initial_losses(start: str) -> list[float]:
        storage = {**job_document["storage"], "run_dir": str(tmp_path / start)}
        document = {**job_document, "train": {**job_document["train"], "epochs": 1, "start": start}, "storage": storage}
        report = run_local(resolve_job(document, source="test"), str(tmp_path), emit=ignore_progress, owner="test")
        return [section.initial_loss for section in report.sections if section.initial_loss is not None]

    pairs = list(zip(initial_losses("fitted"), initial_losses("nearest"), strict=True))
    assert len(pairs) == 3
    assert all(fitted < nearest for fitted, nearest in pairs)


def test_views_are_the_epochs_that_a_rival_sees(job_document: dict[str, Any], tmp_path: Path) -> None:
    with opened(job_document, tmp_path, augment={"views": 9, "crop_padding": 1}) as session:
        context, train = session.context, session.prepared.splits.train
        views = boundary_views(context)
        # No more views than epochs.
        assert [view[0].view for view in views] == [0, 1, 2]
        plain = {boundary.digest for boundary in context.plan.boundaries}
        digests = [boundary.digest for view in views for boundary in view]
        assert len(set(digests) | plain) == 4 * len(plain)
        rival = augmented_batches(train, batch_size=len(train), flip=True, crop_padding=1, seed=0, epoch=1)
        expected, _ = next(rival)
        ours = images_of_view(context, session.prepared.splits, np.arange(len(train)), 1)
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, 1]))).permutation(len(train))
        assert sorted(map(float, expected.flatten(1).sum(1))) == pytest.approx(
            sorted(map(float, ours.flatten(1).sum(1)))
        )
        assert len(order) == len(ours)


@pytest.mark.slow
def test_each_view_is_dumped_as_the_teacher_sees_it(job_document: dict[str, Any], tmp_path: Path) -> None:
    with opened(job_document, tmp_path, augment={"views": 2, "crop_padding": 1}) as session:
        context, splits = session.context, session.prepared.splits
        network = open_network(context)
        session.dump(lambda missing: dump_slices(context, network, splits, range(num_slices(context)), missing))
        positions = np.arange(32)
        with contextlib.ExitStack() as stack:
            views = open_views(context, 1, None, CPU, 2**28, stack)
            assert len(views) == 2
            for number, (inputs, target) in enumerate(views):
                with torch.no_grad():
                    first = network.sections[0](images_of_view(context, splits, positions, number))
                    second = network.sections[1](first.clone())
                assert torch.equal(inputs.read(positions), first.half().float())
                assert torch.equal(target.read(positions), second.half().float())
            assert not torch.equal(views[0][0].read(positions), views[1][0].read(positions))


@pytest.mark.slow
def test_a_run_with_every_switch_ends(job_document: dict[str, Any], tmp_path: Path) -> None:
    document = {
        **job_document,
        "train": {
            **job_document["train"],
            "loss": "channel-nmse",
            "look_ahead": 1,
            "input_noise": 0.2,
            "augment": {"views": 2, "flip": False, "crop_padding": 1},
        },
    }
    report = run_local(resolve_job(document, source="test"), str(tmp_path), emit=lambda _: None, owner="test")
    assert report.student is not None
    assert report.student.top1 is not None
    assert report.student.top1 > 0.5


def test_noise_is_on_half_of_the_inputs_and_of_its_channels_size() -> None:
    inputs = torch.ones(64, 2, 16, 16) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    noise = with_noise(inputs, 0.3, torch.Generator().manual_seed(0)) - inputs
    assert (noise == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    sizes = [float(noise[:, channel][noise[:, channel] != 0].std()) for channel in range(2)]
    assert sizes == pytest.approx([0.3, 3.0], rel=0.05)
    assert with_noise(inputs, 0.0, torch.Generator()) is inputs
