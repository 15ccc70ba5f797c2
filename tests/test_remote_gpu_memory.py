"""Parts of a GPU: how much of its memory each worker may take. The card is a double."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import activation_memory_bytes
from dcq_ray.remote.gpu_memory import CONTEXT_BYTES, cap_gpu_memory, memory_fraction

GIB = 2**30


@given(st.integers(2, 12), st.integers(8 * GIB, 200 * GIB))
def test_the_workers_of_a_card_with_their_contexts_fit_it(num_workers: int, total_bytes: int) -> None:
    fraction = memory_fraction(1 / num_workers, total_bytes)
    assert 0 < fraction < 1 / num_workers
    taken = num_workers * (fraction * total_bytes + CONTEXT_BYTES)
    assert taken <= total_bytes * (1 + 1e-9) or fraction == 0.01


def test_who_holds_a_whole_card_may_fill_it() -> None:
    assert memory_fraction(1.0, 80 * GIB) == 1.0
    assert memory_fraction(2.0, 80 * GIB) == 1.0


@pytest.mark.parametrize(
    ("assigned", "works", "set_to"),
    [
        # A quarter of 60,000 MiB, less 600.
        ({"CPU": 1.0, "GPU": 0.25}, True, [0.24]),
        ({"GPU": 1.0}, True, [1.0]),
        ({"CPU": 1.0}, True, []),
        # GPUs that are only declared.
        ({"GPU": 0.25}, False, []),
    ],
)
def test_a_worker_is_limited_to_what_ray_assigned_to_it(
    assigned: dict[str, float], works: bool, set_to: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    fractions: list[float] = []
    context = SimpleNamespace(get_assigned_resources=lambda: assigned)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=60_000 * 2**20)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    cap_gpu_memory()
    assert fractions == pytest.approx(set_to)


@pytest.mark.parametrize(
    ("free_bytes", "part", "reserved_bytes", "working_bytes", "expected"),
    [
        # Alone on the card, nothing measured: half of what is free.
        (80, 1.0, 0, None, 40),
        # A quarter of 100, of which 5 are reserved: the rest of the card is others'.
        (80, 0.25, 5, None, 10),
        # What was measured is left free, and no more.
        (80, 0.25, 5, 12, 8),
        (80, 0.25, 5, 30, 0),
        # Somebody else has more of the card than he was given.
        (10, 0.5, 0, 4, 6),
    ],
)
def test_a_worker_keeps_activations_in_its_own_part_of_the_card(
    free_bytes: int,
    part: float,
    reserved_bytes: int,
    working_bytes: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = resolve_job(
        {"name": "j", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}, source="test"
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 100))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: part)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved_bytes)
    # How many train at once on all cards does not matter.
    found = activation_memory_bytes(job, torch.device("cuda"), num_at_once=7, working_bytes=working_bytes)
    assert found == expected
