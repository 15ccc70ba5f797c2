"""Runs in this process: the laws of a run, and what goes wrong in one."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dcq_ray.data import load_splits
from dcq_ray.errors import (
    DataError,
    JobError,
    PartitionError,
    QualityGateMissed,
    RunBusyError,
    SectionTrainingError,
    StaleRunError,
    StorageError,
    TeacherError,
)
from dcq_ray.gate import check_gate
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import part_top1, read_report, run_local
from dcq_ray.phases.context import refuse_stale
from dcq_ray.phases.predict import makespan
from dcq_ray.phases.session import with_baselines
from dcq_ray.quantizers import put_input_quantizers
from dcq_ray.records import BaselineReport, PartitionPlan, Progress, RunContext, RunReport, from_json
from dcq_ray.storage import hold_run, open_store

pytestmark = pytest.mark.slow


FUNCTIONAL_MODULE = """
import torch
from user_nets import UserNet


class FunctionalHead(UserNet):
    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.pool(torch.relu(x + self.bn2(self.conv2(x))))
        return torch.nn.functional.linear(torch.flatten(x, 1), self.head.weight, self.head.bias)


def net():
    return FunctionalHead()
"""


class Watcher:
    """Collects progress, and interrupts where it is told to."""

    def __init__(self, stop_after_section: int | None = None) -> None:
        self.events: list[Progress] = []
        self._stop = stop_after_section

    def __call__(self, progress: Progress) -> None:
        self.events.append(progress)
        if (progress.phase, progress.index, progress.state) == ("train", self._stop, "done"):
            raise KeyboardInterrupt

    def sections(self, state: str) -> list[int | None]:
        return [event.index for event in self.events if event.phase == "train" and event.state == state]

    def states(self, phase: str) -> list[str]:
        return list(dict.fromkeys(event.state for event in self.events if event.phase == phase))


def run(document: dict[str, Any], folder: Path, watcher: Watcher | None = None, **options: Any) -> RunReport:
    job = resolve_job(document, source="test")
    return run_local(job, str(folder), emit=watcher or Watcher(), owner="test", **options)


def changed(document: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A copy with keys such as storage__run_dir replaced."""
    document = copy.deepcopy(document)
    for key, value in keys.items():
        *path, last = key.split("__")
        target = document
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return document


def test_from_a_job_to_a_validated_student_of_the_users_class(job_document: dict[str, Any], tmp_path: Path) -> None:
    report = run(job_document, tmp_path)
    assert report.status == "succeeded"
    assert [section.index for section in report.sections] == [0, 1, 2]
    assert report.teacher.top1 is not None
    assert report.student is not None
    assert report.student.top1 is not None
    assert report.student.top1 > 0.5
    assert report.student.bits == 1.0
    assert report.student.num_bytes_packed < report.teacher.num_bytes / 5
    for section in report.sections:
        assert section.initial_loss is not None
        assert section.final_loss is not None
        assert section.kept_start or section.final_loss < section.initial_loss
        assert section.top1_alone is not None
    validation = report.validation
    assert validation is not None
    assert validation.num_samples == 100
    assert validation.metric == round(100 * (validation.top1 or 0))
    assert len(validation.boundary_errors) == 3
    assert read_report(open_store(str(tmp_path / "run"))) == report

    import user_nets

    student = user_nets.user_net()
    state = safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")
    own = {name: value for name, value in state.items() if not name.startswith("dcq.")}
    student.load_state_dict(own, strict=True)
    assert len(student.conv2.weight.unique()) == 2
    assert state["dcq.head.bits"] == 1


def test_a_run_again_has_nothing_to_do_and_fresh_starts_over(job_document: dict[str, Any], tmp_path: Path) -> None:
    first = run(job_document, tmp_path)
    watcher = Watcher()
    again = run(job_document, tmp_path, watcher)
    assert again == first
    assert watcher.states("dump") == []
    assert watcher.sections("done") == []
    watcher = Watcher()
    fresh = run(job_document, tmp_path, watcher, fresh=True)
    assert watcher.sections("done") == [0, 1, 2]
    assert watcher.states("dump") == ["reused"]
    assert fresh.student == first.student


@pytest.mark.parametrize("stop", [0, 1])
def test_a_resumed_run_equals_an_undisturbed_one(job_document: dict[str, Any], tmp_path: Path, stop: int) -> None:
    other = changed(job_document, storage__run_dir=str(tmp_path / "other"))
    undisturbed = run(other, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(job_document, tmp_path, Watcher(stop_after_section=stop))
    interrupted = read_report(open_store(str(tmp_path / "run")))
    assert interrupted is not None
    assert interrupted.status == "interrupted"
    watcher = Watcher()
    resumed = run(job_document, tmp_path, watcher)
    assert watcher.sections("reused") == list(range(stop + 1))
    assert watcher.sections("done") == list(range(stop + 1, 3))
    assert resumed.student == undisturbed.student


def test_other_bits_use_the_same_activations(job_document: dict[str, Any], tmp_path: Path) -> None:
    run(job_document, tmp_path)
    watcher = Watcher()
    report = run(changed(job_document, quantize__weights={"bits": 2}), tmp_path, watcher)
    assert watcher.states("dump") == ["reused"]
    assert watcher.sections("done") == [0, 1, 2]
    assert report.student is not None
    assert report.student.bits == 2.0


def test_only_sections_whose_bits_changed_are_trained_again(job_document: dict[str, Any], tmp_path: Path) -> None:
    run(job_document, tmp_path)
    watcher = Watcher()
    run(changed(job_document, quantize__overrides={"conv2": {"bits": 3}}), tmp_path, watcher)
    assert watcher.sections("done") == [1]


@pytest.mark.parametrize("scheme", ["dorefa", "pact", "lsq"])
def test_low_bit_activations_are_trained_by_section_and_shipped_with_the_student(
    job_document: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    document = changed(job_document, quantize__activations={"scheme": scheme, "bits": 3}, quantize__weights={"bits": 2})
    document["quantize"]["overrides"] = {"conv1": {"activation_bits": 32}, "section:2": {"bits": 4}}
    report = run(document, tmp_path)
    assert [(layer.bits, layer.activation_bits) for layer in report.layers] == [(2, 32), (2, 3), (4, 3)]
    assert [(work.bits, work.activation_bits) for work in report.multiply_accumulates_by_bits] == [
        (2, 3),
        (2, 32),
        (4, 3),
    ]
    assert report.student is not None
    assert report.student.top1 is not None
    assert report.student.top1 > 0.5

    import user_nets

    state = safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")
    student = user_nets.user_net().eval()
    student.load_state_dict({name: value for name, value in state.items() if not name.startswith("dcq.")})
    put_input_quantizers(student, state)
    test = load_splits(resolve_job(document, source="test").data, seed=0, job_folder=str(tmp_path)).test
    assert test is not None
    assert part_top1(student, test, 32, torch.device("cpu")) == report.student.top1
    seen: list[torch.Tensor] = []
    student.head.dcq_input.register_forward_hook(lambda *values: seen.append(values[2]))
    student(test.images(np.arange(32)))
    assert 2 < len(seen[0].unique()) <= 8
    if scheme != "dorefa":
        assert state["dcq.conv2.input_step"] != state["dcq.head.input_step"]


def test_what_the_network_does_not_use_is_not_called_unquantized(job_document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "auxiliary_nets.py").write_text(
        "from torch import nn\nfrom user_nets import UserNet\n\n\ndef net():\n    made = UserNet()\n"
        "    made.auxiliary = nn.Linear(3, 3)\n    return made\n"
    )
    document = changed(job_document, teacher__model="auxiliary_nets:net", teacher__fit=None, teacher__min_top1=0)
    report = run(changed(document, train__epochs=0), tmp_path)
    assert report.unquantized_share == 0
    assert report.notes[-1].endswith("does not use them in eval mode: auxiliary.weight, auxiliary.bias.")
    assert not any(note.startswith("Not quantized") for note in report.notes)
    state = safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")
    assert state["auxiliary.weight"].dtype == torch.float32


def test_memory_does_not_change_the_student(job_document: dict[str, Any], tmp_path: Path) -> None:
    first = run(job_document, tmp_path)
    second = run(changed(job_document, resources__memory_per_section=1), tmp_path, fresh=True)
    assert second.student == first.student


def test_32_bits_without_training_is_the_teacher(job_document: dict[str, Any], tmp_path: Path) -> None:
    document = changed(job_document, train__epochs=0, reduce__reestimate_batchnorm=False)
    document["quantize"] = {"overrides": {"*": {"bits": 32}}}
    report = run(document, tmp_path)
    assert report.student is not None
    assert report.student.sha256 == report.teacher.sha256
    assert report.validation is not None
    assert report.validation.agreement_with_teacher == 1.0
    assert report.validation.boundary_errors == (0.0, 0.0, 0.0)


def test_damaged_weights_are_trained_again(job_document: dict[str, Any], tmp_path: Path) -> None:
    first = run(job_document, tmp_path)
    (tmp_path / "run" / "report.json").unlink()
    weights = next((tmp_path / "run" / "sections" / "01").glob("*/weights.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    watcher = Watcher()
    report = run(job_document, tmp_path, watcher)
    assert watcher.sections("done") == [1]
    assert report.student == first.student


def test_a_damaged_shard_fails_its_sections_only_and_is_dumped_again(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    first = run(job_document, tmp_path)
    plan = from_json(PartitionPlan, (tmp_path / "run" / "plan.json").read_bytes())
    shard = tmp_path / "cache" / plan.boundaries[-1].digest / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    watcher = Watcher()
    with pytest.raises(SectionTrainingError, match=r"1 of 3 sections failed: .*shard-00000.arrow"):
        run(job_document, tmp_path, watcher, fresh=True)
    assert watcher.sections("done") == [0, 1]
    failed = read_report(open_store(str(tmp_path / "run")))
    assert failed is not None
    assert failed.status == "failed"
    assert [failure.index for failure in failed.failures] == [2]
    watcher = Watcher()
    assert run(job_document, tmp_path, watcher).student == first.student
    assert watcher.sections("done") == [2]
    assert watcher.states("dump") == ["running", "done"]


def shards_of(folder: Path) -> tuple[list[Path], Path]:
    """Those of all boundaries but the last, and the first of the last."""
    plan = from_json(PartitionPlan, (folder / "run" / "plan.json").read_bytes())
    *others, last = [folder / "cache" / boundary.digest for boundary in plan.boundaries]
    return [shard for other in others for shard in sorted(other.glob("*.arrow"))], last / "shard-00000.arrow"


def test_a_shard_that_is_gone_after_the_dump_makes_its_boundary_missing_and_no_other(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    first = run(job_document, tmp_path)
    others, gone = shards_of(tmp_path)
    # What a lost node's own disk would have kept. Files are written once: one that is written again is another file.
    gone.unlink()
    before = [shard.stat().st_ino for shard in others]
    watcher = Watcher()
    assert run(job_document, tmp_path, watcher, fresh=True).student == first.student
    assert watcher.states("dump") == ["running", "done"]
    assert [shard.stat().st_ino for shard in others] == before


def test_a_shard_that_goes_between_dump_and_training_fails_its_section_by_name_and_is_dumped_again(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    first = run(job_document, tmp_path)
    _, gone = shards_of(tmp_path)

    class LosesShard(Watcher):
        def __call__(self, progress: Progress) -> None:
            super().__call__(progress)
            if (progress.phase, progress.state) == ("dump", "reused"):
                gone.unlink()

    with pytest.raises(SectionTrainingError, match=r"1 of 3 sections failed: .*shard-00000.arrow"):
        run(job_document, tmp_path, LosesShard(), fresh=True)
    watcher = Watcher()
    assert run(job_document, tmp_path, watcher).student == first.student
    assert watcher.sections("done") == [2]
    assert watcher.states("dump") == ["running", "done"]


def test_a_run_that_diverges_says_so_and_keeps_nothing_false(job_document: dict[str, Any], tmp_path: Path) -> None:
    document = changed(job_document, train__lr=1e30, train__optimizer="sgd")
    with pytest.raises(SectionTrainingError, match=r"3 of 3 sections failed: section 0: .* lower the learning rate"):
        run(document, tmp_path)
    assert not (tmp_path / "run" / "student.safetensors").exists()
    assert not list((tmp_path / "run").glob("sections/*/result.json"))


@pytest.mark.parametrize("loss", ["cross-entropy", "distillation"])
def test_the_last_section_may_learn_otherwise(job_document: dict[str, Any], tmp_path: Path, loss: str) -> None:
    run(job_document, tmp_path)
    watcher = Watcher()
    report = run(changed(job_document, train__last_loss=loss), tmp_path, watcher)
    assert watcher.sections("done") == [2]
    assert report.student is not None


def test_images_without_labels_give_agreement(job_document: dict[str, Any], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (200, 8, 8, 1), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "train.npz", images=images)
    document = changed(
        job_document,
        teacher={"model": "user_nets:user_net"},
        data={
            "dataset": "npz",
            "root": str(tmp_path / "images"),
            "train": "train.npz",
            "batch_size": 32,
            "held_out_samples": 40,
        },
    )
    report = run(document, tmp_path)
    assert report.teacher.top1 is None
    assert report.untrained_top1 is None
    assert report.validation is not None
    assert report.validation.top1 is None
    assert 0 <= report.validation.agreement_with_teacher <= 1
    assert any("agreement" in note for note in report.notes)


def test_a_teacher_near_chance_is_refused_before_the_dump(job_document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"held-out images, expected at least 15\.0 %"):
        run(changed(job_document, teacher__fit=None), tmp_path)
    run(changed(job_document, teacher__fit=None, teacher__min_top1=0), tmp_path)


def test_a_disk_budget_is_an_error_before_the_dump_with_both_numbers(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"need [\d,]+ bytes, but storage.max_bytes allows 1,000"):
        run(changed(job_document, storage__max_bytes=1000), tmp_path)
    assert not list((tmp_path / "cache").glob("*/*.arrow"))


def test_float16_overflow_is_an_error_that_names_float32(job_document: dict[str, Any], tmp_path: Path) -> None:
    module = (tmp_path / "user_nets.py").read_text().replace("self.conv1(x)))", "self.conv1(x))) * 1e6")
    (tmp_path / "loud_nets.py").write_text(module)
    document = changed(job_document, teacher__model="loud_nets:user_net", teacher__fit=None, teacher__min_top1=0)
    with pytest.raises(StorageError, match=r"does not fit float16 .* storage.dtype: float32"):
        run(document, tmp_path)
    run(changed(document, storage__dtype="float32"), tmp_path)


def test_two_drivers_on_one_run_directory(job_document: dict[str, Any], tmp_path: Path) -> None:
    with (
        hold_run(open_store(str(tmp_path / "run")), owner="the other driver"),
        pytest.raises(RunBusyError, match="the other driver"),
    ):
        run(job_document, tmp_path)


def test_a_worker_of_a_replaced_driver_commits_nothing(job_document: dict[str, Any], tmp_path: Path) -> None:
    run(job_document, tmp_path)
    job = resolve_job(job_document, source="test")
    plan = from_json(PartitionPlan, (tmp_path / "run" / "plan.json").read_bytes())
    context = RunContext(
        job=job,
        job_folder=str(tmp_path),
        run_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        plan=plan,
        epoch=1,
        device="cpu",
    )
    refuse_stale(context)
    with hold_run(open_store(str(tmp_path / "run")), owner="newer"), pytest.raises(StaleRunError, match="was replaced"):
        refuse_stale(context)


@pytest.mark.parametrize(
    ("keys", "error", "told"),
    [
        ({"sections": {"count": 9}}, PartitionError, "at most 3 sections"),
        ({"sections": {"cuts": ["conv2"]}}, PartitionError, "no legal cut"),
        ({"teacher__args": {"depth": 3}}, TeacherError, "user_net"),
        ({"teacher__model": "user_nets:nothing"}, TeacherError, "user_net"),
        ({"teacher__weights": "missing.safetensors"}, TeacherError, "missing.safetensors"),
        ({"data__train_samples": 100000}, DataError, "100000|100,000"),
        ({"data__transform": "user_nets:fragile"}, DataError, "finite"),
        ({"data__channels": 3}, PartitionError, "does not run on images"),
        (
            {"quantize__overrides": {"conv9.*": {"bits": 4}}},
            JobError,
            r"'conv9\.\*' matches no .* near it: conv2, conv1;",
        ),
        (
            {"quantize__overrides": {"section:7": {"bits": 4}, "conv2": {"bits": 12}}},
            JobError,
            r"2 mistakes\n.*'section:7' matches no .* sections are section:0 to section:2\nlayer conv2: got 12 bits",
        ),
        (
            {"teacher__model": "functional_nets:net", "quantize__activations": {}},
            JobError,
            r"'head' asks for activation_bits 4, but the network never calls head",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(
    job_document: dict[str, Any], tmp_path: Path, keys: dict[str, Any], error: type[Exception], told: str
) -> None:
    document = changed(job_document, **keys)
    if "data__channels" in keys:
        document["teacher"]["fit"] = None
    if "functional" in document["teacher"]["model"]:
        (tmp_path / "functional_nets.py").write_text(FUNCTIONAL_MODULE)
        document["quantize"]["overrides"] = {"head": {"activation_bits": 4}}
    with pytest.raises(error, match=told):
        run(document, tmp_path)
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    if error in (PartitionError, JobError) and document["teacher"]["fit"] is not None:
        # Not even the teacher was fitted before the mistake was told.
        assert not (tmp_path / "cache" / "teachers").exists()


def test_the_gate(job_document: dict[str, Any], tmp_path: Path) -> None:
    report = run(job_document, tmp_path)
    check_gate(report)
    assert report.student is not None
    lossy = dataclasses.replace(
        report,
        max_drop=1.0,
        teacher=dataclasses.replace(report.teacher, top1=0.98),
        student=dataclasses.replace(report.student, top1=0.97),
    )
    check_gate(lossy)
    with pytest.raises(QualityGateMissed, match=r"lost 1\.00 points of top-1, the gate allows 0\.5"):
        check_gate(dataclasses.replace(lossy, max_drop=0.5))


def test_gap_closed_by_hand(job_document: dict[str, Any], tmp_path: Path) -> None:
    report = run(job_document, tmp_path)
    assert report.student is not None
    report = dataclasses.replace(
        report,
        teacher=dataclasses.replace(report.teacher, top1=0.90),
        student=dataclasses.replace(report.student, top1=0.88),
    )
    rival = BaselineReport(
        method="dorefa",
        top1=0.80,
        cpu_seconds=1.0,
        lr=0.1,
        held_out_top1=0.8,
        tried_lrs=(0.1,),
        num_sample_passes=1,
        seconds=1.0,
    )
    assert with_baselines(report, [rival]).gap_closed == pytest.approx(0.8)
    assert with_baselines(report, [dataclasses.replace(rival, top1=0.95)]).gap_closed is None
    assert with_baselines(report, []).gap_closed is None


def test_makespan_by_hand() -> None:
    assert makespan([3, 3, 2, 2, 2], 2) == 7


def test_status_and_job_are_kept_beside_the_report(job_document: dict[str, Any], tmp_path: Path) -> None:
    run(job_document, tmp_path)
    folder = tmp_path / "run"
    assert json.loads((folder / "status.json").read_text())["status"] == "succeeded"
    assert "user_nets:user_net" in (folder / "job.yaml").read_text()
    assert not list((tmp_path / "cache").glob("*/uses/*"))
    assert torch.get_num_threads() == 1


def test_two_runs_that_need_the_same_boundary_dump_it_once(job_document: dict[str, Any], tmp_path: Path) -> None:
    """One dumps, the other waits until it is done; or, where the first dies, takes over what it left."""
    watchers = [Watcher(), Watcher()]
    first_dumps, may_go_on = threading.Event(), threading.Event()

    def hold_up(progress: Progress) -> None:
        watchers[0](progress)
        if progress.phase == "dump" and progress.state == "running":
            first_dumps.set()
            assert may_go_on.wait(60)

    def let_go_on(progress: Progress) -> None:
        watchers[1](progress)
        if progress.phase == "dump" and progress.state == "waiting":
            may_go_on.set()

    documents = [changed(job_document, storage__run_dir=str(tmp_path / name)) for name in ("one", "two")]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, documents[0], tmp_path, hold_up)
        assert first_dumps.wait(60)
        second = run(documents[1], tmp_path, let_go_on)
    assert watchers[0].states("dump") == ["running", "done"]
    assert watchers[1].states("dump") == ["waiting", "reused"]
    assert second.student == first.result().student
    assert second.status == "succeeded"
