"""The records: JSON and pickle both ways, and what is derived from them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcq_ray import records
from dcq_ray.records import (
    BaselineReport,
    BitsWork,
    Boundary,
    Card,
    Current,
    Diagnosis,
    GpuMemory,
    LayerDiagnosis,
    LayerPlan,
    LossPoint,
    MergeStep,
    PartitionPlan,
    PhaseCpuSeconds,
    Progress,
    RunContext,
    RunReport,
    SectionFailure,
    SectionMeasurement,
    SectionPlan,
    SectionReport,
    SectionResult,
    SectionTask,
    ShardInfo,
    ShardManifest,
    StatusReport,
    StudentReport,
    TeacherReport,
    Timings,
    ValidationReport,
    from_json,
    seal_json,
    to_json,
    to_jsonable,
    unseal_json,
)
from dcq_ray.spec import Job

JOB = Job.model_validate(
    {
        "name": "a",
        "teacher": {"model": "mine:net", "args": {"widths": [8, 16], "deep": {"x": None}}, "fit": {"epochs": 3}},
        "data": {"dataset": "digits", "image_size": [16, 16], "normalize": {"mean": [0.5], "std": [0.25]}},
        "sections": {"cuts": ["conv1", "block.relu"]},
        "quantize": {"overrides": {"block.*": {"bits": 4}}},
        "resources": {"cpus_per_section": 2},
    }
)
INPUT = Boundary(index=0, cut="input", shape=(1, 16, 16), num_samples=100, dtype="float32", digest="d0")
INTERIOR = Boundary(index=1, cut="conv1", shape=(8, 8, 8), num_samples=100, dtype="float16", digest="d1")
OUTPUT = Boundary(index=2, cut="output", shape=(10,), num_samples=100, dtype="float16", digest="d2")
CONV = LayerPlan(module="conv1", kind="Conv2d", num_weights=72, scheme="dorefa", bits=8)
WIDE_CONV = LayerPlan(module="conv2", kind="Conv2d", num_weights=1152, scheme="dorefa", bits=1)
LEFT_ALONE = LayerPlan(module="fc", kind="Linear", num_weights=160, scheme="dorefa", bits=32)


def section(index: int, *layers: LayerPlan) -> SectionPlan:
    return SectionPlan(
        index=index,
        modules=tuple(layer.module for layer in layers),
        layers=layers,
        num_parameters=sum(layer.num_weights for layer in layers),
        forward_seconds=0.001,
        step_seconds=0.003,
        multiply_accumulates=4608,
    )


PLAN = PartitionPlan(
    key="k",
    teacher_sha256="f" * 64,
    teacher_num_bytes=5536,
    input_shape=(1, 16, 16),
    boundaries=(INPUT, INTERIOR, OUTPUT),
    sections=(section(0, CONV), section(1, WIDE_CONV, LEFT_ALONE)),
    unquantized_parameters=("fc.weight",),
    num_parameters=2000,
    num_unquantized=160,
    num_bytes_packed=900,
    total_multiply_accumulates=9216,
)
SHARDS = (
    ShardInfo(index=0, file_name="shard-00000.arrow", num_samples=64, num_bytes=1000, sha256="a"),
    ShardInfo(index=1, file_name="shard-00001.arrow", num_samples=36, num_bytes=600, sha256="b"),
)
MANIFEST = ShardManifest(
    digest="d1",
    cut="conv1",
    shape=(8, 8, 8),
    dtype="float16",
    compression="none",
    num_samples=100,
    samples_per_shard=64,
    shards=SHARDS,
)
CURVE = (LossPoint(step=10, loss=0.5), LossPoint(step=20, loss=0.125))
RESULT = SectionResult(
    index=1,
    task_digest="t",
    epoch=2,
    attempt="2-abc",
    weights_sha256="w",
    initial_loss=None,
    final_loss=0.1,
    num_steps=20,
    num_sample_passes=200,
    seconds=1.5,
    cpu_seconds=1.25,
    input_wait_seconds=0.0,
    device="cpu",
    restarts=0,
    loss_curve=CURVE,
)
FAILURE = SectionFailure(index=0, error_type="SectionTrainingError", message="diverged: träin", traceback="a\nb")
MEASUREMENT = SectionMeasurement(
    index=0, task_digest="t", top1_alone=None, agreement_alone=0.99, divergence_alone=0.02, relative_error=0.01
)
MERGE_STEP = MergeStep(name="polish", score_before=0.8, score_after=0.85, accepted=True)
TEACHER = TeacherReport(model="mine:net", top1=0.9, sha256="f", num_bytes=5536)
STUDENT = StudentReport(top1=None, sha256="e", num_bytes_packed=400, bits=1.4)
BASELINE = BaselineReport(
    method="dorefa",
    top1=0.8,
    cpu_seconds=3.0,
    lr=0.01,
    held_out_top1=None,
    tried_lrs=(0.01, 0.001),
    num_sample_passes=400,
    seconds=3.0,
)
SECTION = SectionReport(
    index=0,
    modules=("conv1", "bn1"),
    num_parameters=72,
    bits=8.0,
    initial_loss=1.0,
    final_loss=None,
    relative_error=None,
    top1_alone=0.5,
    agreement_alone=None,
    seconds=1.0,
    cpu_seconds=1.0,
    device="cuda",
    restarts=3,
    loss_curve=CURVE,
    num_bytes_packed=72,
)
VALIDATION = ValidationReport(
    num_samples=50,
    top1=0.75,
    top5=None,
    agreement_with_teacher=0.9,
    boundary_errors=(0.1, 0.25),
    teacher_top1=0.875,
    metric=None,
    teacher_metric=0.5,
)
LAYER_DIAGNOSIS = LayerDiagnosis(module="conv1", level_shares=(0.25, 0.75), num_channels=8, num_constant_channels=1)
DIAGNOSIS = Diagnosis(
    num_samples=50, teacher_score=0.875, after=(0, 1), scores=(0.875, 0.75), layers=(LAYER_DIAGNOSIS,)
)
CPU_SECONDS = PhaseCpuSeconds(dump=1.0, train=2.0)
TIMINGS = Timings(
    dump_seconds=1.0,
    train_seconds=2.0,
    reduce_seconds=0.5,
    total_seconds=4.0,
    makespan_lower_bound_seconds=1.75,
    cpu_seconds=CPU_SECONDS,
)
BITS_WORK = BitsWork(bits=1, activation_bits=32, multiply_accumulates=9216)
REPORT = RunReport(
    name="a",
    status="succeeded",
    run_digest="r",
    teacher=TEACHER,
    student=STUDENT,
    untrained_top1=0.1,
    baseline=BASELINE,
    gap_closed=None,
    sections=(SECTION, dataclasses.replace(SECTION, index=1, loss_curve=())),
    layers=PLAN.layers,
    multiply_accumulates_by_bits=(BITS_WORK,),
    unquantized_share=0.08,
    failures=(FAILURE,),
    validation=VALIDATION,
    timings=TIMINGS,
    notes=("no labels",),
    versions={"torch": "2.15"},
    started_at="2026-01-01T00:00:00+00:00",
    num_test_samples=0,
    max_drop=1.5,
)
UNFINISHED_REPORT = dataclasses.replace(
    REPORT, status="failed", student=None, untrained_top1=None, baseline=None, validation=None, sections=(), notes=()
)
CONTEXT = RunContext(
    job=JOB, job_folder="/jobs", run_dir="/runs/a", cache_dir="s3://b/c", plan=PLAN, epoch=3, device="auto"
)
PROGRESS = Progress(phase="train", index=1, done=3, total=10, unit="steps", loss=0.5)
STATUS = StatusReport(
    name="a",
    status="running",
    updated_at="2026-01-01T00:00:00+00:00",
    host="h",
    pid=1,
    lines=(PROGRESS, Progress(phase="dump", state="reused")),
    message="",
)
CURRENT = Current(
    version="2026-01-01T00-00-00",
    student_sha256="e",
    teacher_sha256="f",
    num_samples=50,
    score=0.75,
    published_at="2026-01-01T00:00:00+00:00",
)
CARD = Card(name="NVIDIA H200", total_bytes=139 * 2**30)
GPU_MEMORY = GpuMemory(key="k", card=CARD, section_bytes=(2**30, 2**31), dump_bytes=2**29, score_bytes=2**28)
EVERY_RECORD = [
    *(INPUT, CONV, PLAN.sections[1], PLAN, SHARDS[0], MANIFEST, CONTEXT, SectionTask(index=0, digest="t"), CURVE[0]),
    *(RESULT, FAILURE, MEASUREMENT, TEACHER, STUDENT, BASELINE, SECTION, VALIDATION, CPU_SECONDS, TIMINGS),
    *(BITS_WORK, REPORT, UNFINISHED_REPORT, PROGRESS, STATUS, MERGE_STEP, CURRENT, LAYER_DIAGNOSIS, DIAGNOSIS),
    *(CARD, GPU_MEMORY),
]


def test_multiply_accumulates_by_bits_by_hand() -> None:
    quantized = dataclasses.replace(CONV, multiply_accumulates=4000, bits=1, activation_scheme="lsq", activation_bits=4)
    same = dataclasses.replace(WIDE_CONV, multiply_accumulates=5000, activation_scheme="lsq", activation_bits=4)
    alone = dataclasses.replace(LEFT_ALONE, multiply_accumulates=160)
    plan = dataclasses.replace(PLAN, sections=(section(0, quantized), section(1, same, alone)))
    # 9216 in all: what is in no layer, 9216 - 9160, is in full precision too
    assert [
        (work.bits, work.activation_bits, work.multiply_accumulates) for work in plan.multiply_accumulates_by_bits
    ] == [
        (1, 4, 9000),
        (32, 32, 160 + 56),
    ]
    assert plan.unquantized_share == 160 / 2000
    assert dataclasses.replace(PLAN, num_parameters=0).unquantized_share == 0.0


def kind_name(record: Any) -> str:
    return type(record).__name__


# -- laws of every record ----------------------------------------------------------------------------------------------


def test_there_is_one_of_every_record() -> None:
    defined = {
        name for name, value in vars(records).items() if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    assert {kind_name(record) for record in EVERY_RECORD} == defined


@pytest.mark.parametrize("record", EVERY_RECORD, ids=kind_name)
def test_json_both_ways(record: Any) -> None:
    back = from_json(type(record), to_json(record))
    assert back == record
    assert repr(back) == repr(record)  # floats are floats again, and 1.0 is not 1


@pytest.mark.parametrize("record", EVERY_RECORD, ids=kind_name)
def test_pickle_both_ways(record: Any) -> None:
    back = pickle.loads(pickle.dumps(record))
    assert back == record
    assert repr(back) == repr(record)
    assert copy.deepcopy(record) == record


@pytest.mark.parametrize("record", EVERY_RECORD, ids=kind_name)
def test_json_is_indented_utf8_and_the_same_as_to_jsonable(record: Any) -> None:
    content = to_json(record)
    assert content.endswith(b"}\n")
    assert b'{\n  "' in content
    assert json.loads(content.decode("utf-8")) == to_jsonable(record)


@pytest.mark.parametrize("record", EVERY_RECORD, ids=kind_name)
def test_records_are_frozen_and_closed(record: Any) -> None:
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)
    assert not hasattr(record, "__dict__")
    with pytest.raises(TypeError, match="positional"):
        type(record)(*(getattr(record, item.name) for item in dataclasses.fields(record)))


@pytest.mark.parametrize("record", EVERY_RECORD, ids=kind_name)
def test_what_does_not_fit_is_refused(record: Any) -> None:
    values = to_jsonable(record)
    required = [
        item.name
        for item in dataclasses.fields(record)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    for name in required:
        without = {key: value for key, value in values.items() if key != name}
        with pytest.raises(ValueError, match=name):
            from_json(type(record), json.dumps(without).encode())
    for content in (b"", b"[]", b"null", b'{"', b"\xff"):
        with pytest.raises(ValueError):
            from_json(type(record), content)


def test_report_has_all_that_the_contract_names() -> None:
    """The keys of `report.json` that DESIGN.md, section 2, promises."""
    report = to_jsonable(REPORT)
    top = "format_version name status teacher student untrained_top1 baseline gap_closed sections validation timings"
    parts = {
        "teacher": "model top1 sha256 num_bytes",
        "student": "top1 sha256 num_bytes_packed bits",
        "baseline": "method top1 cpu_seconds",
        "validation": "num_samples top1 top5 agreement_with_teacher boundary_errors",
        "timings": "dump_seconds train_seconds reduce_seconds total_seconds makespan_lower_bound_seconds cpu_seconds",
    }
    section_keys = (
        "index modules num_parameters bits initial_loss final_loss relative_error top1_alone seconds cpu_seconds "
        "device restarts"
    )
    assert {*top.split(), "versions", "started_at"} <= set(report)
    for part, keys in parts.items():
        assert set(keys.split()) <= set(report[part])
    assert all(set(section_keys.split()) <= set(item) for item in report["sections"])
    assert set(report["timings"]["cpu_seconds"]) == {"teacher", "dump", "train", "reduce"}


@pytest.mark.parametrize("status", ["succeeded", "failed", "running", "interrupted"])
def test_statuses_of_a_run(status: Any) -> None:
    report = dataclasses.replace(REPORT, status=status)
    assert from_json(RunReport, to_json(report)).status == status


def test_another_status_is_refused() -> None:
    with pytest.raises(ValueError, match="status"):
        from_json(RunReport, to_json(REPORT).replace(b'"succeeded"', b'"perhaps"'))


def test_context_carries_a_whole_job() -> None:
    back = from_json(RunContext, to_json(CONTEXT)).job
    assert isinstance(back, Job)
    assert back == JOB
    assert back.teacher.args == {"widths": [8, 16], "deep": {"x": None}}
    assert back.sections.cuts == ("conv1", "block.relu")


def test_context_with_an_invalid_job_is_refused() -> None:
    values = to_jsonable(CONTEXT)
    values["job"]["train"]["lr"] = -1
    with pytest.raises(ValueError, match="lr"):
        from_json(RunContext, json.dumps(values).encode())


# -- floats ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(loss=st.floats(allow_nan=False, allow_infinity=False), step=st.integers(0, 2**63))
def test_finite_floats_survive_json_bit_for_bit(loss: float, step: int) -> None:
    back = from_json(LossPoint, to_json(LossPoint(step=step, loss=loss)))
    assert back.loss.hex() == loss.hex()
    assert back.step == step


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_word_for_what_is_not_finite(value: float) -> None:
    """It becomes null: read back as None where a field may be None, and refused where it may not."""
    result = dataclasses.replace(RESULT, final_loss=value)
    assert json.loads(to_json(result))["final_loss"] is None
    assert from_json(SectionResult, to_json(result)).final_loss is None
    point = LossPoint(step=1, loss=value)
    with pytest.raises(ValueError, match="loss"):
        from_json(LossPoint, to_json(point))
    assert repr(pickle.loads(pickle.dumps(point))) == repr(point)


# -- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "num_samples", "bytes_per_sample", "num_bytes"),
    [
        ((1, 16, 16), "float32", 100, 1024, 102_400),
        ((8, 8, 8), "float16", 100, 1024, 102_400),
        ((10,), "float16", 3, 20, 60),
        ((10,), "float32", 3, 40, 120),
        ((), "float32", 7, 4, 28),
        ((64, 0), "float32", 7, 0, 0),
        ((3, 224, 224), "float16", 0, 301_056, 0),
    ],
)
def test_bytes_of_a_boundary(
    shape: tuple[int, ...], dtype: str, num_samples: int, bytes_per_sample: int, num_bytes: int
) -> None:
    boundary = dataclasses.replace(INPUT, shape=shape, dtype=dtype, num_samples=num_samples)
    assert boundary.bytes_per_sample == bytes_per_sample
    assert boundary.num_bytes == num_bytes


def test_bits_of_a_section_are_weighted_by_weights() -> None:
    # (72 * 8 + 1152 * 1) / 1224 = 1728 / 1224; the Linear layer that is left alone does not count
    assert section(0, CONV, WIDE_CONV, LEFT_ALONE).bits == pytest.approx(1728 / 1224, rel=1e-15)
    assert section(0, CONV).bits == 8.0
    assert section(0, WIDE_CONV).bits == 1.0


def test_bits_of_a_section_without_quantized_layers() -> None:
    assert section(0).bits == 32.0
    assert section(0, LEFT_ALONE).bits == 32.0


def test_cuts_of_a_plan_are_its_interior_boundaries() -> None:
    assert PLAN.cuts == ("conv1",)
    more = (INPUT, INTERIOR, dataclasses.replace(INTERIOR, index=2, cut="block"), OUTPUT)
    assert dataclasses.replace(PLAN, boundaries=more).cuts == ("conv1", "block")
    assert dataclasses.replace(PLAN, boundaries=(INPUT, OUTPUT)).cuts == ()


def test_layers_of_a_plan_are_in_order() -> None:
    assert PLAN.layers == (CONV, WIDE_CONV, LEFT_ALONE)


def test_bytes_of_a_manifest_are_its_shards() -> None:
    assert MANIFEST.num_bytes == 1600
    assert dataclasses.replace(MANIFEST, shards=()).num_bytes == 0


@pytest.mark.parametrize("record", [PLAN, MANIFEST, RESULT, REPORT, STATUS], ids=kind_name)
def test_files_state_their_format(record: Any) -> None:
    assert to_jsonable(record)["format_version"] == records.FORMAT_VERSION == 1


def test_cpu_seconds_default_to_none_spent() -> None:
    assert PhaseCpuSeconds() == PhaseCpuSeconds(teacher=0.0, dump=0.0, train=0.0, reduce=0.0)


def test_progress_defaults() -> None:
    progress = Progress(phase="dump")
    assert (progress.index, progress.state, progress.done, progress.total) == (None, "running", 0, 0)
    assert (progress.unit, progress.loss, progress.per_second, progress.seconds_left, progress.detail) == (
        *("images", None, None, None),
        "",
    )


def test_a_sealed_record_comes_back_and_any_other_content_is_noticed() -> None:
    sealed = seal_json(MEASUREMENT)
    assert unseal_json(SectionMeasurement, sealed) == MEASUREMENT
    assert unseal_json(float, seal_json(0.5)) == 0.5
    assert json.loads(sealed)["agreement_alone"] == 0.99
    with pytest.raises(ValueError, match="does not have the digest"):
        unseal_json(SectionMeasurement, sealed.replace(b"0.99", b"0.98"))
    with pytest.raises(ValueError, match="does not have the digest"):
        unseal_json(SectionMeasurement, to_json(MEASUREMENT))
    with pytest.raises(ValueError, match="nested too deeply"):
        unseal_json(SectionMeasurement, b"[" * 100_000)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_of_a_sealed_record_changes_nothing_or_is_a_value_error(data: Any) -> None:
    sealed = bytearray(seal_json(MEASUREMENT))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = unseal_json(SectionMeasurement, bytes(sealed))
    except ValueError:
        return
    assert found == MEASUREMENT


@pytest.mark.parametrize(("number", "fits"), [(2**63 - 1, True), (-(2**63), True), (2**63, False), (-(10**30), False)])
def test_a_sealed_integer_has_64_bits_at_most(number: int, fits: bool) -> None:
    sealed = seal_json(dataclasses.replace(MEASUREMENT, index=number))
    if fits:
        assert unseal_json(SectionMeasurement, sealed).index == number
    else:
        with pytest.raises(ValueError, match="more than 64 bits"):
            unseal_json(SectionMeasurement, sealed)


def test_a_diagnosis_has_a_score_for_every_section_that_it_names() -> None:
    whole = Diagnosis(num_samples=4, teacher_score=1.0, after=(0, 1), scores=(0.75, 0.5), layers=())
    assert whole.losses == (0.25, 0.25)
    content = to_json(whole).replace(b"0.75,", b"")
    assert b"0.75" not in content
    with pytest.raises(ValueError, match="1 scores after 2 sections"):
        from_json(Diagnosis, content)
