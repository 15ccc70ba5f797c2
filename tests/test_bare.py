"""The bare loops: they do the work of a run, piece by piece, and come to a quantized student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import bare
from benchmarks.bare import Bare, Stopwatch

from dcq_ray.jobfile import resolve_job
from dcq_ray.quantizers.policy import layer_weight


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, lenet_document: Callable[..., dict[str, Any]]) -> Bare:
    folder = tmp_path_factory.mktemp("bare")
    document = lenet_document(
        data={"train_samples": 130, "held_out_samples": 40, "test_samples": 40},
        train={"epochs": 2, "batch_size": 20, "start_samples": 64},
        sections={"count": 3},
        quantize={"first_last_bits": None},
        storage={"run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
    )
    return bare.opened(resolve_job(document, source="a test"), str(folder))


def test_boundaries_are_the_teachers_own(opened: Bare) -> None:
    images = bare.all_images(opened.splits.held_out)
    found = bare.boundaries(opened, images)
    assert [tuple(value.shape) for value in found] == [(40, *boundary.shape) for boundary in opened.plan.boundaries]
    torch.testing.assert_close(found[-1], opened.teacher(images))
    torch.testing.assert_close(bare.through(opened.sections[1:], found[1], 7), found[-1])
    # The images are as they were: no section worked in place on them.
    torch.testing.assert_close(images, bare.all_images(opened.splits.held_out))


def test_an_epoch_has_every_position_once_but_for_the_last_small_batch(opened: Bare) -> None:
    batches = list(bare.orders(opened))
    # 130 images in batches of 20: 6 an epoch.
    assert bare.num_steps(opened) == len(batches) == 12
    for epoch in (batches[:6], batches[6:]):
        seen = torch.cat(epoch).tolist()
        assert len(seen) == len(set(seen)) == 120
        assert set(seen) < set(range(130))


def test_training_brings_a_section_nearer_to_its_target(opened: Bare) -> None:
    inputs, targets = bare.boundaries(opened, bare.all_images(opened.splits.train))[:2]
    module = bare.started(opened, 0, inputs, fitted=False)
    loss = bare.loss_of(opened)
    before = loss(bare.through([module], inputs, 32), targets)
    bare.train(opened, module, inputs, targets)
    assert loss(bare.through([module], inputs, 32), targets) < before


def test_a_whole_run_times_every_piece_and_gives_a_quantized_student(opened: Bare) -> None:
    watch = Stopwatch()
    student = bare.whole_run(opened, watch)
    assert set(watch.seconds) == {"teacher", "section 0", "section 1", "section 2", "untrained", "alone", "student"}
    assert min(watch.seconds.values()) > 0
    weights = [
        layer_weight(part).detach() for part in student.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert len(weights) == len(opened.plan.layers)
    assert [len(weight.unique()) for weight in weights] == [2] * len(weights)
