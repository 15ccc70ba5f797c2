"""What a card's memory is asked for, measured on a double: a card that counts the bytes of live tensors of this process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcq_ray.digests import tensors_sha256
from dcq_ray.errors import ClusterError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import (
    Meter,
    ignore_progress,
    kept_gpu_memory,
    measure_gpu_memory,
    open_network,
    open_run,
    open_splits,
)
from dcq_ray.phases.gpu_trial import GPU_MEMORY_FILE
from dcq_ray.records import Card, RunContext

CARD = Card(name="a double", total_bytes=2**30)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is on, and their greatest sum."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.peak_bytes = 0

    def reset(self) -> None:
        self._live.clear()
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage.data_ptr()
                if key and self._live.get(key) is None:
                    self._live[key] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, key, None)
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))
        return result


@contextmanager
def counted_card() -> Iterator[Meter]:
    mode = LiveBytes()
    with mode:
        yield Meter(card=CARD, reset=mode.reset, peak_bytes=lambda: mode.peak_bytes)


def told_card(peaks: list[int], card: Card = CARD) -> Meter:
    """A card that says these peaks, one for each piece of work."""
    waiting = iter(peaks)
    return Meter(card=card, reset=lambda: None, peak_bytes=lambda: next(waiting))


@pytest.fixture
def opened(job_document: dict[str, Any], tmp_path: Path) -> Callable[..., RunContext]:
    def opened(**train: Any) -> RunContext:
        document = {**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}
        job = resolve_job({**document, "train": {**document["train"], **train}}, source="test")
        with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=ignore_progress, owner="test") as session:
            return session.context

    return opened


def measured(context: RunContext, meter: Meter) -> Any:
    return measure_gpu_memory(context, open_network(context), open_splits(context), meter)


def test_larger_batches_take_more_and_sections_take_what_their_tensors_have(
    opened: Callable[..., RunContext],
) -> None:
    found = {}
    for batch_size in (16, 160):
        context = opened(batch_size=batch_size, start="nearest")
        with counted_card() as meter:
            found[batch_size] = measured(context, meter)
    small, large = found[16], found[160]
    # Section by section: a convolution 1 -> 8 channels, one 8 -> 8 with a pooling, the head 128 -> 10, on 8 x 8 pixels. A step
    # holds its input, its output, and the output's gradient at least: 4 bytes each.
    numbers = [64 + 2 * 512, 512 + 128, 128 + 2 * 10]
    for index, count in enumerate(numbers):
        assert large.section_bytes[index] >= 160 * 4 * count
        # The calibration sees batches of `data`, whatever those of the training are.
        assert small.section_bytes[index] < large.section_bytes[index]
    assert large.section_bytes[0] - small.section_bytes[0] >= 144 * 4 * numbers[0] // 2
    # A pass of the dump has 32 images, and no gradients.
    assert 32 * 4 * 512 <= large.dump_bytes == small.dump_bytes
    # Two networks side by side, and the student's copy of the teacher.
    assert large.score_bytes > large.dump_bytes


def test_what_was_measured_is_kept_for_this_very_run_and_card(opened: Callable[..., RunContext]) -> None:
    context = opened()
    assert kept_gpu_memory(context, CARD) is None
    found = measured(context, told_card([100, 300, 200, 50, 70]))
    assert (found.section_bytes, found.dump_bytes, found.score_bytes) == ((100, 300, 200), 50, 70)
    assert kept_gpu_memory(context, CARD) == found
    assert kept_gpu_memory(context, Card(name="another", total_bytes=2**30)) is None
    assert kept_gpu_memory(opened(batch_size=64), CARD) is None
    # The first job again: what is kept is still its own.
    assert kept_gpu_memory(opened(), CARD) == found
    file = Path(context.run_dir) / GPU_MEMORY_FILE
    file.write_bytes(file.read_bytes().replace(b"300", b"301"))
    assert kept_gpu_memory(context, CARD) is None


@pytest.mark.parametrize(
    "train",
    [
        {"start": "fitted", "start_samples": 32},
        {"look_ahead": "all", "input_noise": 0.1},
        {"last_loss": "cross-entropy"},
        # The loss is not finite after the first step.
        {"lr": 1e30, "optimizer": "sgd"},
    ],
)
def test_every_kind_of_training_is_tried_and_the_teacher_stays_as_it_is(
    train: dict[str, Any], opened: Callable[..., RunContext]
) -> None:
    context = opened(**train)
    network = open_network(context)
    with counted_card() as meter:
        found = measure_gpu_memory(context, network, open_splits(context), meter)
    assert min(*found.section_bytes, found.dump_bytes, found.score_bytes) > 0
    assert tensors_sha256(network.teacher.module.state_dict()) == context.plan.teacher_sha256
    assert not any(parameter.requires_grad for parameter in network.teacher.module.parameters())


def test_recomputed_activations_are_measured_with_the_teacher_that_makes_them(
    job_document: dict[str, Any], opened: Callable[..., RunContext]
) -> None:
    context = opened(start="nearest")
    with counted_card() as meter:
        stored = measured(context, meter)
    job_document["storage"]["activations"] = "recomputed"
    context = opened(start="nearest")
    with counted_card() as meter:
        recomputed = measured(context, meter)
    # The last section's inputs come out of all the teacher before it.
    assert recomputed.section_bytes[2] != stored.section_bytes[2]


def out_of_memory() -> int:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("peaks", "told"),
    [
        (
            [100, 2**31],
            r"the training of section 1 takes 2,147,483,648 bytes on a card \(a double\) that has 1,073,741,824",
        ),
        ([100, 100, 100, 2**31], "the dump of activations takes 2,147,483,648 bytes"),
        (
            [100, None],
            r"the training of section 1 takes more on a card .*train\.batch_size.*resources\.accelerator.*CPUs",
        ),
    ],
)
def test_a_card_that_is_too_small_is_told_with_the_bytes_and_what_to_do(
    peaks: list[int | None], told: str, opened: Callable[..., RunContext]
) -> None:
    context, waiting = opened(), iter(peaks)

    def peak_bytes() -> int:
        peak = next(waiting)
        return out_of_memory() if peak is None else peak

    with pytest.raises(ClusterError, match=told):
        measured(context, Meter(card=CARD, reset=lambda: None, peak_bytes=peak_bytes))
    assert kept_gpu_memory(context, CARD) is None
