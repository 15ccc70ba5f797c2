"""Checkpoints of sections: when they are due, whose they are, and that a killed training goes on to the very same result."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Killed, killed

from dcq_ray.errors import StaleRunError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import (
    DumpedSlice,
    dump_slices,
    ignore_progress,
    num_slices,
    open_network,
    open_run,
    run_local,
    saving,
)
from dcq_ray.phases.committed import section_weights
from dcq_ray.phases.dump import boundary_store, commit_boundary, reusable_boundaries
from dcq_ray.phases.saving import Pace, SaveRequest, SectionSaver, checkpoint_store
from dcq_ray.records import Boundary, Progress, RunContext, SectionResult, SectionTask
from dcq_ray.section import TrainingState
from dcq_ray.storage import current_epoch, hold_run, open_store

CPU = torch.device("cpu")
WRITES_OF_A_CHECKPOINT = 2


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every step, however short."""
    monkeypatch.setattr(saving, "TIMES_ITS_COST", 0.0)


def document_of(document: dict[str, Any], folder: Path, **train: Any) -> dict[str, Any]:
    """A job in a folder of its own, its cache shared, that saves as often as it may."""
    document = copy.deepcopy(document)
    document["train"].update(train)
    document["storage"]["run_dir"] = str(folder)
    document["storage"]["checkpoint_seconds"] = 1e-9
    return document


def run(document: dict[str, Any], folder: Path, events: list[Progress] | None = None) -> None:
    emit = ignore_progress if events is None else events.append
    run_local(resolve_job(document, source="test"), str(folder), emit=emit, owner="test")


def sections_of(document: dict[str, Any], folder: Path) -> list[tuple[SectionResult, dict[str, torch.Tensor]]]:
    job = resolve_job(document, source="test")
    with open_run(job, str(folder), device=CPU, emit=ignore_progress, owner="test") as session:
        return [(result, section_weights(session.context, result)) for _, result in sorted(session.results.items())]


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for (result, weights), (other, others) in zip(ours, theirs, strict=True):
        assert result.loss_curve == other.loss_curve
        assert (result.initial_loss, result.final_loss) == (other.initial_loss, other.final_loss)
        assert (result.num_steps, result.num_sample_passes) == (other.num_steps, other.num_sample_passes)
        assert weights.keys() == others.keys()
        assert all(torch.equal(value, others[name]) for name, value in weights.items())


# -- when --------------------------------------------------------------------------------------------------------------


def test_the_pace_by_hand() -> None:
    now = 100.0
    pace = Pace(30.0, clock=lambda: now)
    # Until one was saved, a checkpoint is taken to cost 25 ms: 40 times that is a second.
    now = 100.9
    assert not pace.due_after_epoch
    now = 101.1
    assert pace.due_after_epoch
    assert not pace.due
    now = 130.1
    assert pace.due
    with pace.saving():
        now = 130.35
    # It took 0.25 s: for 10 s none is due, whatever ends.
    now = 140.3
    assert not pace.due_after_epoch
    now = 140.4
    assert pace.due_after_epoch
    with pace.saving(share=0.5):
        now = 142.4
    # It took 2 s here, 4 s with all that save with it: 160 s are more than the interval.
    now = 142.4 + 159.0
    assert not pace.due
    now = 142.4 + 161.0
    assert pace.due


def test_a_request_is_answered_once() -> None:
    request = SaveRequest()
    assert not request.wanted
    request.make()
    assert request.wanted
    assert not request.wait(0.0)
    request.answer()
    assert not request.wanted
    assert request.wait(0.0)
    request.make()
    assert not request.wait(0.0)


# -- whose -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(job_document: dict[str, Any], tmp_path: Path) -> Iterator[RunContext]:
    job = resolve_job(job_document, source="test")
    with open_run(job, str(tmp_path), device=CPU, emit=ignore_progress, owner="test") as session:
        yield session.context


def state_after(num_steps: int) -> TrainingState:
    return TrainingState(
        num_steps=num_steps,
        num_sample_passes=32 * num_steps,
        module={"weight": torch.full((2,), float(num_steps))},
        optimizer={},
        losses=(1.0,) * num_steps,
        seconds=1.0,
        input_wait_seconds=0.0,
    )


def test_restarts_and_time_add_up_over_workers_and_drivers(context: RunContext) -> None:
    task = SectionTask(index=0, digest="a" * 64)

    def saver(driver: RunContext, restarts: int) -> SectionSaver:
        return SectionSaver(driver, task, restarts=restarts, emit=ignore_progress)

    first = saver(context, 0)
    assert (first.restarts, first.start, first.before.seconds) == (0, None, 0.0)
    first.save(state_after(3), seconds=10.0, cpu_seconds=7.0)
    second = saver(context, 1)
    assert second.restarts == 1
    assert second.start is not None
    assert (second.start.num_steps, second.before.seconds, second.before.cpu_seconds) == (3, 10.0, 7.0)
    second.save(state_after(5), seconds=12.0, cpu_seconds=8.0)
    # One worker died under the first driver, then the driver itself; under the second driver two more.
    store = open_store(context.run_dir)
    later = dataclasses.replace(context, epoch=context.epoch + 1)
    lease = (Path(store.uri) / "lease.json").read_text()
    (Path(store.uri) / "lease.json").write_text(lease.replace(f'"epoch": {context.epoch}', f'"epoch": {later.epoch}'))
    assert current_epoch(store) == later.epoch
    assert saver(later, 0).restarts == 2
    third = saver(later, 2)
    assert third.restarts == 4
    third.save(state_after(6), seconds=13.0, cpu_seconds=9.0)
    assert saver(later, 3).restarts == 5


def test_a_worker_whose_driver_was_replaced_saves_and_deletes_nothing(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    job = resolve_job(job_document, source="test")
    with open_run(job, str(tmp_path), device=CPU, emit=ignore_progress, owner="test") as session:
        context, task = session.context, session.tasks[0]
        stale = SectionSaver(context, task, restarts=0, emit=ignore_progress)
        stale.save(state_after(1), seconds=1.0, cpu_seconds=1.0)
        stale.save(state_after(2), seconds=1.0, cpu_seconds=1.0)
    store = checkpoint_store(context, task)
    names = store.list_names()
    assert len(names) == 2 * WRITES_OF_A_CHECKPOINT
    with hold_run(open_store(context.run_dir), owner="the new driver"):
        with pytest.raises(StaleRunError, match="was replaced"):
            stale.save(state_after(3), seconds=1.0, cpu_seconds=1.0)
        with pytest.raises(StaleRunError, match="was replaced"):
            SectionSaver(context, task, restarts=0, emit=ignore_progress)
    assert store.list_names() == names


def test_another_tasks_checkpoint_is_not_taken(context: RunContext) -> None:
    tasks = [SectionTask(index=0, digest=letter * 64) for letter in "ab"]
    SectionSaver(context, tasks[0], restarts=0, emit=ignore_progress).save(state_after(1), seconds=1.0, cpu_seconds=1.0)
    assert SectionSaver(context, tasks[1], restarts=0, emit=ignore_progress).start is None
    assert SectionSaver(context, tasks[0], restarts=0, emit=ignore_progress).start is not None


# -- the same result ---------------------------------------------------------------------------------------------------

NOISY_VIEWS = {"input_noise": 0.2, "augment": {"views": 2, "flip": True, "crop_padding": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("train", [{}, NOISY_VIEWS], ids=["plain", "noise and views"])
def test_a_section_killed_anywhere_goes_on_to_the_same_result(
    job_document: dict[str, Any], tmp_path: Path, every_step: None, train: dict[str, Any]
) -> None:
    whole = document_of(job_document, tmp_path / "whole", **train)
    run(whole, tmp_path)
    undisturbed = sections_of(whole, tmp_path)
    broken = document_of(job_document, tmp_path / "broken", **train)
    # Three epochs of ten steps: killed in the midst of the second's checkpoint, at an epoch's end, and after almost all.
    for at_write in (3, 20, 56):
        with killed(at_write, inside="sections/01/checkpoints"), pytest.raises(Killed):
            run(broken, tmp_path)
        events: list[Progress] = []
        run(broken, tmp_path, events)
        resumed = {event.detail for event in events if event.phase == "train" and "resumed" in event.detail}
        assert resumed == {f"resumed after step {at_write // WRITES_OF_A_CHECKPOINT}"}
        found = sections_of(broken, tmp_path)
        assert_same(found, undisturbed)
        assert [result.restarts for result, _ in found] == [0, 1, 0]
        assert not list((tmp_path / "broken").rglob("checkpoints"))
        shutil.rmtree(tmp_path / "broken")


@pytest.mark.slow
def test_a_section_killed_again_and_again_and_with_a_damaged_checkpoint(
    job_document: dict[str, Any], tmp_path: Path, every_step: None
) -> None:
    whole, broken = (document_of(job_document, tmp_path / name) for name in ("whole", "broken"))
    run(whole, tmp_path)
    for _ in range(3):
        with killed(6, inside="sections/00/checkpoints"), pytest.raises(Killed):
            run(broken, tmp_path)
    files = sorted((tmp_path / "broken" / "sections" / "00").rglob("*.safetensors"))
    assert [int(file.name.partition("-")[0]) for file in files] == [8, 9]
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    events: list[Progress] = []
    run(broken, tmp_path, events)
    assert any("passed over a damaged checkpoint" in event.detail for event in events)
    assert any(event.detail == "resumed after step 8" for event in events)
    found = sections_of(broken, tmp_path)
    assert_same(found, sections_of(whole, tmp_path))
    assert [result.restarts for result, _ in found] == [3, 0, 0]
    assert found[0][0].seconds > 0


@pytest.mark.slow
def test_a_stream_killed_anywhere_goes_on_where_all_sections_were_saved(
    job_document: dict[str, Any], tmp_path: Path, every_step: None
) -> None:
    student = {"inputs": "student", "stagger": 0.4, "input_noise": 0.1}
    whole = document_of(job_document, tmp_path / "whole", **student)
    run(whole, tmp_path)
    undisturbed = sections_of(whole, tmp_path)
    broken = document_of(job_document, tmp_path / "broken", **student)
    # 30 steps each, begun at ticks 0, 6 and 12. Killed while section 1 saves, when section 0 has saved the tick already:
    # before section 2 has begun, amid all, and after section 0 has ended, which then only passes activations on.
    for num_saved, resumed_after in ((2, {0: 8, 1: 2}), (20, {0: 26, 1: 20, 2: 14}), (27, {1: 27, 2: 21})):
        with killed(num_saved * WRITES_OF_A_CHECKPOINT, inside="sections/01/checkpoints"), pytest.raises(Killed):
            run(broken, tmp_path)
        events: list[Progress] = []
        run(broken, tmp_path, events)
        resumed = {(event.index, event.detail) for event in events if "resumed" in event.detail}
        assert resumed == {(index, f"resumed after step {step}") for index, step in resumed_after.items()}
        assert_same(sections_of(broken, tmp_path), undisturbed)
        assert not list((tmp_path / "broken").rglob("checkpoints"))
        shutil.rmtree(tmp_path / "broken")


@pytest.mark.slow
def test_a_stream_of_which_no_tick_is_whole_begins_anew(
    job_document: dict[str, Any], tmp_path: Path, every_step: None
) -> None:
    student = {"inputs": "student", "stagger": 0.4}
    whole, broken = (document_of(job_document, tmp_path / name, **student) for name in ("whole", "broken"))
    run(whole, tmp_path)
    with killed(10 * WRITES_OF_A_CHECKPOINT, inside="sections/02/checkpoints"), pytest.raises(Killed):
        run(broken, tmp_path)
    # Sections 0 and 1 have ticks 22 and 23, section 2 has 21 and 22.
    files = sorted((tmp_path / "broken" / "sections" / "02").rglob("*.safetensors"))
    assert [int(file.name.partition("-")[0]) for file in files] == [21, 22]
    files[-1].write_bytes(files[-1].read_bytes()[:-1])
    events: list[Progress] = []
    run(broken, tmp_path, events)
    assert any("passed over a damaged checkpoint" in event.detail for event in events)
    # No tick is whole in all of them any more, so the stream begins anew.
    assert not any("resumed" in event.detail for event in events)
    assert_same(sections_of(broken, tmp_path), sections_of(whole, tmp_path))


# -- the dump ----------------------------------------------------------------------------------------------------------


def test_shards_that_are_gone_after_a_slice_was_dumped_are_dumped_again(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    job = resolve_job(job_document, source="test")
    rounds = []
    with open_run(job, str(tmp_path), device=CPU, emit=ignore_progress, owner="test") as session:
        context, network = session.context, open_network(session.context)

        def dump_all(missing: Sequence[Boundary]) -> Iterator[DumpedSlice]:
            rounds.append(len(missing))
            yield from dump_slices(context, network, session.prepared.splits, range(num_slices(context)), missing)
            if len(rounds) == 1:
                # As if the node that dumped it had kept it on its own disk, and died.
                (Path(boundary_store(context, missing[0]).uri) / "shard-00000.arrow").unlink()

        session.dump(dump_all)
        assert rounds == [4, 4]
        assert len(reusable_boundaries(context)) == 4


def test_a_replaced_driver_and_its_workers_commit_no_boundary(job_document: dict[str, Any], tmp_path: Path) -> None:
    job = resolve_job(job_document, source="test")
    with open_run(job, str(tmp_path), device=CPU, emit=ignore_progress, owner="test") as session:
        context, splits = session.context, session.prepared.splits
    network = open_network(context)
    boundary = context.plan.boundaries[0]
    with hold_run(open_store(context.run_dir), owner="the new driver"):
        with pytest.raises(StaleRunError):
            list(dump_slices(context, network, splits, [0], [boundary]))
        with pytest.raises(StaleRunError):
            commit_boundary(context, boundary)
    assert not [name for name in boundary_store(context, boundary).list_names() if name != "uses"]
