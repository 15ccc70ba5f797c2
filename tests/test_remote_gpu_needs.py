"""Sections that share cards by measured memory: the packing, and on a Ray with GPUs that are only declared."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcq_ray.errors import ClusterError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import Meter, RunSession, ignore_progress, measure_gpu_memory, open_network, open_run, open_splits
from dcq_ray.records import Card, GpuMemory, RunContext, SectionFailure, SectionResult, SectionTask
from dcq_ray.remote import Share, section_share, workers
from dcq_ray.remote.cluster import larger_share, node_resources, on_a_card
from dcq_ray.remote.driver import trained
from dcq_ray.remote.gpu_memory import CONTEXT_BYTES, MARGIN, held_bytes, memory_fraction, needed_gpus
from dcq_ray.remote.gpu_needs import GpuNeeds, Shares, gpu_needs, shares_of
from dcq_ray.remote.sections import train_alone
from dcq_ray.remote.workers import out_of_memory

GIB = 2**30
CARD = Card(name="a double", total_bytes=100 * GIB)


@pytest.mark.parametrize(
    ("peak_bytes", "expected"),
    [
        # 1.2 x 30 GiB and 600 MiB of 100 GiB are 36.59 %.
        (30 * GIB, 0.37),
        (0, 0.01),
        # With the margin it would be 120 %: it fitted when it was measured, so it gets the card.
        (99 * GIB, 1.0),
    ],
)
def test_the_part_of_a_card_that_measured_work_needs(peak_bytes: int, expected: float) -> None:
    assert needed_gpus(peak_bytes, CARD.total_bytes) == expected


@pytest.mark.parametrize(
    ("num_sections", "num_cards", "least_gpus", "expected"),
    [
        (8, 2, 0.0, 4),
        # Only two of 0.4 fit: four train at once, the rest wait.
        (8, 2, 0.4, 2),
        # More would fit than there are sections to place.
        (8, 2, 0.01, 4),
        (8, 2, 0.5, 2),
        (8, 2, 0.51, 1),
        (100, 1, 0.02, 50),
        (1, 4, 0.1, 1),
        (3, 2, 0.34, 2),
    ],
)
def test_as_many_sections_share_a_card_as_fit(
    num_sections: int, num_cards: int, least_gpus: float, expected: int
) -> None:
    assert on_a_card(num_sections, num_cards, least_gpus) == expected


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 90 * GIB), st.integers(8 * GIB, 200 * GIB))
def test_on_every_card_all_needs_are_met_and_fit_together(
    num_sections: int, num_cards: int, peak_bytes: int, total_bytes: int
) -> None:
    job = resolve_job(
        {"name": "j", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}, source="test"
    )
    need = needed_gpus(peak_bytes, total_bytes)
    share = section_share(job, num_sections, [{"CPU": 1000.0, "GPU": float(num_cards)}], need)
    on_card = round(1 / share.num_gpus)
    assert share.places == on_card * num_cards
    assert on_card * share.num_gpus <= 1 + 1e-9
    # Never more places on a card than it takes to place all, and no fewer than that where they fit.
    assert on_card == min(-(-num_sections // num_cards), int(1 / need + 1e-9))
    assert share.num_gpus >= need - 1e-9
    # What Ray makes of the part, in ten thousandths, still allows the worker's tensors what was measured.
    allowed = memory_fraction(int(share.num_gpus * 10_000) / 10_000, total_bytes) * total_bytes
    if on_card > 1:
        assert allowed >= MARGIN * peak_bytes * 0.99 or allowed >= 0.01 * total_bytes
        assert on_card * (MARGIN * peak_bytes + CONTEXT_BYTES) <= total_bytes * (1 + 1e-9)


def memory_of(section_bytes: Sequence[int]) -> GpuMemory:
    return GpuMemory(key="", card=CARD, section_bytes=tuple(section_bytes), dump_bytes=4 * GIB, score_bytes=20 * GIB)


def session_of(
    section_bytes: Sequence[int], *, streams: bool, monkeypatch: pytest.MonkeyPatch, **resources: Any
) -> RunSession:
    """A session of sections that take a second a step each, of which these bytes are kept."""
    document = {"name": "j", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}
    job = resolve_job({**document, "resources": resources}, source="test")
    sections = [SimpleNamespace(step_seconds=1.0) for _ in section_bytes]
    context = SimpleNamespace(job=job, plan=SimpleNamespace(sections=sections, teacher_num_bytes=GIB))
    monkeypatch.setattr("dcq_ray.remote.gpu_needs.kept_gpu_memory", lambda *_: memory_of(section_bytes))
    session: Any = SimpleNamespace(context=context, tasks=tuple(section_bytes), streams=streams)
    return session  # type: ignore[no-any-return]


def two_cards() -> list[Mapping[str, float]]:
    return [{"CPU": 16.0, "GPU": 2.0}]


def test_the_largest_section_decides_and_each_work_has_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    session = session_of([GIB] * 7 + [30 * GIB], streams=False, monkeypatch=monkeypatch)
    needs = gpu_needs(session, CARD, two_cards(), say=said.append)
    # 1.2 x (30 + the teacher's 1) GiB and 600 MiB; of the dump 1.2 x 4, of the scores 1.2 x 20.
    assert needs == GpuNeeds(section=0.38, dump=0.06, score=0.25)
    assert said == ["a section takes up to 32,212,254,720 of a card's 107,374,182,400 bytes: 2 share a card"]
    share = section_share(session.context.job, 8, two_cards(), needs.section)
    shares = shares_of(share, session, needs, two_cards())
    assert [(one.num_gpus, one.places) for one in (shares.section, shares.dump, shares.score, shares.stitch)] == [
        (0.5, 4),
        (0.25, 8),
        (0.25, 8),
        (1.0, 2),
    ]


def test_workers_of_neighbouring_sections_need_what_all_of_them_take(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four on a card would hold one section each; three, and two, would hold two of 20 GiB: 1.2 x 41 GiB and 600 MiB, 49.8 %.
    session = session_of([20 * GIB] * 8, streams=True, monkeypatch=monkeypatch)
    assert gpu_needs(session, CARD, two_cards(), say=lambda _: None).section == 0.5
    session = session_of([21 * GIB] * 8, streams=True, monkeypatch=monkeypatch)
    assert gpu_needs(session, CARD, two_cards(), say=lambda _: None).section == 1.0
    session = session_of([2 * GIB] * 8, streams=True, monkeypatch=monkeypatch)
    assert gpu_needs(session, CARD, two_cards(), say=lambda _: None).section == 0.25


@pytest.mark.parametrize(
    ("card", "num_sections", "resources"),
    [
        # No card that works; one each; told by the job.
        (None, 8, {}),
        (CARD, 2, {}),
        (CARD, 8, {"gpus_per_section": 0.25}),
    ],
)
def test_where_no_card_is_to_be_shared_by_measure_nothing_is_measured(
    card: Card | None, num_sections: int, resources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of([90 * GIB] * num_sections, streams=False, monkeypatch=monkeypatch, **resources)
    assert gpu_needs(session, card, two_cards(), say=pytest.fail) == GpuNeeds()
    share = section_share(session.context.job, num_sections, two_cards())
    assert shares_of(share, session, GpuNeeds(), two_cards()) == Shares(
        section=share, dump=share, score=share, stitch=share
    )


def test_a_worker_counts_the_teacher_beside_its_sections() -> None:
    context: Any = SimpleNamespace(plan=SimpleNamespace(teacher_num_bytes=7))
    assert held_bytes(context, memory_of([100, 200, 400]), [0, 2]) == 507


def test_half_as_many_on_a_card_have_twice_the_part_until_one_has_it_all() -> None:
    share: Share | None = Share(num_cpus=1.0, num_gpus=1 / 7, places=14)
    seen = []
    while share is not None:
        seen.append((round(1 / share.num_gpus), share.places))
        share = larger_share(share)
    assert seen == [(7, 14), (3, 6), (1, 2)]
    assert larger_share(Share(num_cpus=1.0, num_gpus=0.0, places=2)) is None
    assert larger_share(Share(num_cpus=1.0, num_gpus=2.0, places=2)) is None


@pytest.mark.parametrize(("enough", "tries"), [(0.5, [(0.25, 3), (0.5, 2)]), (2.0, [(0.25, 3), (0.5, 2), (1.0, 2)])])
def test_sections_that_run_out_of_a_cards_memory_are_tried_again_with_more_of_it(
    enough: float, tries: list[tuple[float, int]], job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}
    job = resolve_job(document, source="test")
    seen: list[tuple[float, int]] = []
    said: list[str] = []

    def train(session: RunSession, share: Share, took: Any) -> tuple[list[SectionResult], list[SectionFailure]]:
        """The first section fits any part, the others want enough of a card."""
        seen.append((share.num_gpus, len(session.pending)))
        done = [result_of(task) for task in session.tasks if task.index == 0 or share.num_gpus >= enough]
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")
        failed = [out_of_memory(task, error) for task in session.tasks if task.index not in {one.index for one in done}]
        return done, failed

    with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=ignore_progress, owner="test") as session:
        quarter = Share(num_cpus=1.0, num_gpus=0.25, places=4)
        results, failures = trained(session, quarter, lambda _: None, said.append, train=train)
    assert seen == tries
    assert said[0] == "sections [1, 2] take more than 0.25 of a card: trying them with 0.5"
    if enough <= 1:
        assert ([result.index for result in results], failures) == ([0, 1, 2], [])
    else:
        assert [failure.index for failure in failures] == [1, 2]
        assert failures[0].message.startswith(
            "section 1: its worker's part of a GPU is too small: CUDA out of memory. Tried to allocate 2 GiB.; lower"
        )


def test_a_worker_whose_part_is_too_small_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("cap_gpu_memory", "importable_from", "open_network", "activation_bytes", "needs_images"):
        monkeypatch.setattr(workers, name, lambda *_, **__: None)
    monkeypatch.setattr(workers, "train_section", raising)
    context: Any = SimpleNamespace(job_folder="")
    found = workers.SectionWorker(context).train(SectionTask(index=3, digest=""), 1, 0)
    assert isinstance(found, SectionFailure)
    assert (found.index, found.error_type) == (3, "OutOfMemoryError")


def result_of(task: SectionTask, restarts: int = 0) -> SectionResult:
    return SectionResult(
        index=task.index,
        task_digest=task.digest,
        epoch=1,
        attempt="a",
        weights_sha256="",
        initial_loss=None,
        final_loss=None,
        num_steps=0,
        num_sample_passes=0,
        seconds=1.0,
        cpu_seconds=1.0,
        input_wait_seconds=0.0,
        device="cuda",
        restarts=restarts,
        loss_curve=(),
    )


@pytest.fixture
def one_declared_card() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=4, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("one_declared_card")
def test_sections_share_a_card_by_what_was_measured_and_a_resumed_run_does_not_measure_again(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.mkdir()

    made = result_of(SectionTask(index=0, digest=""))

    # Within the test, so that they travel to the workers by value.
    def measure(context: RunContext) -> GpuMemory:
        (log / "measured").write_text(str(ray.get_runtime_context().get_assigned_resources()["GPU"]))
        peaks = iter([30 * GIB, 10 * GIB, 10 * GIB, 4 * GIB, 20 * GIB])
        meter = Meter(card=CARD, reset=lambda: None, peak_bytes=lambda: next(peaks))
        return measure_gpu_memory(context, open_network(context), open_splits(context), meter)

    def refuse(context: RunContext) -> GpuMemory:
        raise ClusterError("measured again")

    class Trainer:
        def __init__(self, context: RunContext) -> None:
            pass

        def progress(self) -> None:
            return None

        def save(self, timeout_seconds: float) -> bool:
            return False

        def train(self, task: SectionTask, num_at_once: int, restarts: int) -> SectionResult:
            held = [ray.get_runtime_context().get_assigned_resources()["GPU"], *ray.get_gpu_ids()]
            (log / f"began-{task.index}").write_text(json.dumps(held))
            # Until another has begun, too: two are to be on the card at once.
            while len(list(log.glob("began-*"))) < 2:
                time.sleep(0.05)
            others = [path for path in log.glob("began-*") if not (log / path.name.replace("began", "ended")).exists()]
            (log / f"beside-{task.index}").write_text(str(len(others)))
            (log / f"ended-{task.index}").touch()
            return replace(made, index=task.index, task_digest=task.digest, restarts=restarts)

    document = {**job_document, "teacher": {"model": "user_nets:user_net", "min_top1": 0}}
    job = resolve_job(document, source="test")
    said: list[str] = []
    with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=ignore_progress, owner="test") as session:
        assert len(session.tasks) == 3
        needs = gpu_needs(session, CARD, node_resources(), say=said.append, measuring=ray.remote(measure))
        assert needs == GpuNeeds(section=0.37, dump=0.06, score=0.25)
        assert (log / "measured").read_text() == "1.0"
        again = gpu_needs(session, CARD, node_resources(), say=said.append, measuring=ray.remote(refuse))
        assert again == needs
        assert [line.startswith("measuring how much") for line in said] == [True, False, False]
        other = Card(name="another", total_bytes=CARD.total_bytes)
        with pytest.raises(ClusterError, match="measured again"):
            gpu_needs(session, other, node_resources(), say=said.append, measuring=ray.remote(refuse))
        share = section_share(job, len(session.tasks), node_resources(), needs.section)
        assert (share.num_gpus, share.places) == (0.5, 2)
        results, failures = train_alone(session, share, lambda _: None, actor=ray.remote(Trainer))
    assert not failures
    assert [result.index for result in results] == [0, 1, 2]
    held = [json.loads((log / f"began-{index}").read_text()) for index in range(3)]
    # All on the one card, with a half of it each, two at a time and never three.
    assert Counter(map(tuple, held)) == {(0.5, 0): 3}
    beside = [int((log / f"beside-{index}").read_text()) for index in range(3)]
    assert max(beside) == 2
