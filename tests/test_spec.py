"""The models of a job: defaults, ranges, and that nothing changes afterwards. How mistakes read is test_jobfile's."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dcq_ray import spec
from dcq_ray.spec import (
    ActivationsSpec,
    AugmentSpec,
    DataSpec,
    FitSpec,
    Job,
    NormalizeSpec,
    OptimizerSpec,
    OverrideSpec,
    QuantizeSpec,
    ReduceSpec,
    ResourcesSpec,
    SectionsSpec,
    SpecModel,
    StorageSpec,
    TeacherSpec,
    TrainSpec,
    WeightsSpec,
)

MODELS = [kind for kind in vars(spec).values() if isinstance(kind, type) and issubclass(kind, SpecModel)]


def smallest_job(**changes: Any) -> Job:
    fields: dict[str, Any] = {"name": "a", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}
    return Job.model_validate({**fields, **changes})


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_defaults_of_the_parts() -> None:
    job = smallest_job()
    assert job.sections == SectionsSpec(count=4)
    assert (job.sections.every, job.sections.cuts) == (None, None)
    assert job.quantize == QuantizeSpec(
        weights=WeightsSpec(scheme="dorefa", bits=1), activations=None, first_last_bits=8, overrides={}
    )
    assert job.reduce == ReduceSpec(reestimate_batchnorm=True, rounds=1, polish_epochs=0, max_drop=None)
    assert job.resources == ResourcesSpec(gpus_per_section="auto", cpus_per_section=1, memory_per_section="auto")
    assert job.seed == 0


def test_defaults_of_training() -> None:
    train = smallest_job().train
    assert (train.epochs, train.optimizer, train.lr, train.schedule) == (2, "adam", 1e-3, "cosine")
    assert (train.momentum, train.weight_decay, train.batch_size) == (0.9, 0.0, 128)
    assert (train.loss, train.last_loss, train.temperature, train.num_threads) == ("nmse", None, 2.0, 1)
    assert (train.inputs, train.look_ahead, train.input_noise, train.augment) == ("teacher", 0, 0.0, None)


def test_defaults_of_fitting() -> None:
    fit = FitSpec()
    assert (fit.epochs, fit.flip, fit.crop_padding, fit.lr) == (10, False, 0, 1e-3)
    assert (fit.warmup_epochs, fit.label_smoothing) == (0, 0)


def test_defaults_of_teacher_data_and_storage() -> None:
    job = smallest_job()
    assert job.teacher == TeacherSpec(model="dcq_ray:lenet", args={}, weights=None, fit=None, min_top1="auto")
    assert job.data.download is True
    assert job.data.batch_size == 128
    unset = ("root", "train", "test", "channels", "image_size", "normalize", "transform", "metric")
    samples = ("train_samples", "held_out_samples", "test_samples")
    assert {getattr(job.data, key) for key in unset + samples} == {None}
    assert job.storage == StorageSpec(
        cache_dir="runs/.cache", dtype="float16", compression="none", checkpoint_seconds=30.0, max_bytes=None
    )


def test_containers_are_not_shared_between_jobs() -> None:
    one, other = TeacherSpec(model="a:b"), TeacherSpec(model="a:b")
    one.args["x"] = 1
    assert other.args == {}
    assert QuantizeSpec().overrides is not QuantizeSpec().overrides


# -- laws of every model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_frozen(kind: type[BaseModel]) -> None:
    field = next(iter(kind.model_fields), None)
    if field is None:
        assert kind is SpecModel
        return
    instance = kind.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(instance, field, None)


@pytest.mark.parametrize("kind", MODELS)
def test_models_refuse_unknown_keys(kind: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"bogus": 1})
    assert ("bogus",) in [error["loc"] for error in caught.value.errors() if error["type"] == "extra_forbidden"]


@pytest.mark.parametrize("kind", MODELS)
def test_models_say_what_they_are(kind: type[BaseModel]) -> None:
    assert kind.__doc__


def test_job_of_parts_equals_job_of_mappings() -> None:
    job = Job(name="a", teacher=TeacherSpec(model="dcq_ray:lenet"), data=DataSpec(dataset="digits"))
    assert job == smallest_job()
    assert job != smallest_job(seed=1)


# -- ranges ------------------------------------------------------------------------------------------------------------

ACCEPTED = [
    (OptimizerSpec, "epochs", (0, 1, 10**6)),
    (OptimizerSpec, "lr", (1e-12, 1, 10.0)),
    (OptimizerSpec, "momentum", (0, 0.999)),
    (OptimizerSpec, "weight_decay", (0, 5e-4)),
    (OptimizerSpec, "batch_size", (1, 4096)),
    (OptimizerSpec, "schedule", ("cosine", "step", "constant")),
    (OptimizerSpec, "optimizer", ("adam", "sgd")),
    (FitSpec, "epochs", (1,)),
    (FitSpec, "crop_padding", (0, 4)),
    (FitSpec, "warmup_epochs", (0, 0.5, 5)),
    (FitSpec, "label_smoothing", (0, 0.1, 0.999)),
    (TrainSpec, "loss", ("nmse", "channel-nmse", "mse", "cosine", "attention")),
    (TrainSpec, "inputs", ("teacher", "student")),
    (TrainSpec, "anneal", (0, 0.5, 1)),
    (TrainSpec, "stagger", (0, 0.35, 1)),
    (TrainSpec, "look_ahead", (0, 1, "all")),
    (TrainSpec, "look_ahead_weight", (0.1, 10)),
    (TrainSpec, "input_noise", (0, 0.5)),
    (AugmentSpec, "views", (1, 20)),
    (AugmentSpec, "crop_padding", (0, 4)),
    (TrainSpec, "last_loss", (None, "cross-entropy", "distillation")),
    (TrainSpec, "temperature", (0.1, 20)),
    (TrainSpec, "num_threads", (1, 64)),
    (WeightsSpec, "bits", tuple(range(1, 9))),
    (OverrideSpec, "bits", (None, 1, 8, 16, 32)),
    (QuantizeSpec, "first_last_bits", (None, 1, 8, 32)),
    (QuantizeSpec, "activations", (None, ActivationsSpec(), ActivationsSpec(scheme="lsq", bits=1))),
    (ReduceSpec, "max_drop", (None, 0, 1.5, 100)),
    (ReduceSpec, "rounds", (1,)),
    (ReduceSpec, "polish_epochs", (0, 3)),
    (ReduceSpec, "polish_lr", (None, 1e-4)),
    (ResourcesSpec, "gpus_per_section", ("auto", 0, 0.25, 1)),
    (ResourcesSpec, "cpus_per_section", (0.5, 2)),
    (ResourcesSpec, "memory_per_section", ("auto", 1)),
    (ResourcesSpec, "accelerator", (None, "A100")),
    (SectionsSpec, "count", (None, 1)),
    (SectionsSpec, "every", (None, "block", "layer")),
    (SectionsSpec, "cuts", (None, ("a",))),
    (StorageSpec, "dtype", ("float16", "float32")),
    (StorageSpec, "compression", ("none", "zstd")),
    (StorageSpec, "checkpoint_seconds", (0.1, 3600)),
    (StorageSpec, "max_bytes", (None, 1)),
]

REFUSED = [
    (OptimizerSpec, "epochs", (-1, 1.5, None)),
    (OptimizerSpec, "lr", (0, -1e-3, math.inf, math.nan)),
    (OptimizerSpec, "momentum", (-0.1, 1, 1.5)),
    (OptimizerSpec, "weight_decay", (-1e-9,)),
    (OptimizerSpec, "batch_size", (0, -1)),
    (OptimizerSpec, "schedule", ("linear", None)),
    (OptimizerSpec, "optimizer", ("Adam", "adamw")),
    (FitSpec, "epochs", (0,)),
    (FitSpec, "crop_padding", (-1,)),
    (FitSpec, "warmup_epochs", (-0.5, math.inf, None)),
    (FitSpec, "label_smoothing", (-0.1, 1)),
    (TrainSpec, "loss", ("cross-entropy", None)),
    (TrainSpec, "inputs", ("images", None)),
    (TrainSpec, "anneal", (-0.1, 1.1)),
    (TrainSpec, "stagger", (-0.1, 1.1)),
    (TrainSpec, "look_ahead", (-1, "some")),
    (TrainSpec, "look_ahead_weight", (0,)),
    (TrainSpec, "input_noise", (-0.1, math.inf)),
    (AugmentSpec, "views", (0,)),
    (AugmentSpec, "crop_padding", (-1,)),
    (TrainSpec, "last_loss", ("nmse",)),
    (TrainSpec, "temperature", (0,)),
    (TrainSpec, "num_threads", (0,)),
    (WeightsSpec, "bits", (0, 9, 32)),
    (OverrideSpec, "bits", (0, 33)),
    (OverrideSpec, "scheme", ("pact",)),
    (OverrideSpec, "activation_bits", (0, 33)),
    (OverrideSpec, "activation_scheme", ("twn",)),
    (QuantizeSpec, "first_last_bits", (0, 33)),
    (QuantizeSpec, "activations", ({"scheme": "twn"}, {"bits": 9})),
    (ReduceSpec, "max_drop", (-0.1, 100.1)),
    (ReduceSpec, "rounds", (0, 2)),
    (ReduceSpec, "polish_epochs", (-1,)),
    (ReduceSpec, "polish_lr", (0,)),
    (ResourcesSpec, "gpus_per_section", (-1, "all")),
    (ResourcesSpec, "cpus_per_section", (0,)),
    (ResourcesSpec, "memory_per_section", (0,)),
    (SectionsSpec, "count", (0,)),
    (SectionsSpec, "every", ("stage",)),
    (SectionsSpec, "cuts", ((), ("",))),
    (StorageSpec, "dtype", ("bfloat16",)),
    (StorageSpec, "compression", ("lz4",)),
    (StorageSpec, "checkpoint_seconds", (0,)),
    (StorageSpec, "max_bytes", (0,)),
    (StorageSpec, "run_dir", ("", None)),
]


def cases(table: list[tuple[type[SpecModel], str, tuple[Any, ...]]]) -> list[Any]:
    return [
        pytest.param(kind, key, value, id=f"{kind.__name__}.{key}={value}")
        for kind, key, values in table
        for value in values
    ]


@pytest.mark.parametrize(("kind", "key", "value"), cases(ACCEPTED))
def test_accepted(kind: type[SpecModel], key: str, value: Any) -> None:
    assert getattr(kind.model_validate({key: value}), key) == value


@pytest.mark.parametrize(("kind", "key", "value"), cases(REFUSED))
def test_refused(kind: type[SpecModel], key: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({key: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {key}


@pytest.mark.parametrize("name", ["a", "resnet20-cifar10-w1", "0", "A.b_c"])
def test_names_accepted(name: str) -> None:
    assert smallest_job(name=name).name == name


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "é", "a\n", ".."])
def test_names_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        smallest_job(name=name)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds_accepted(seed: int) -> None:
    assert smallest_job(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5])
def test_seeds_refused(seed: Any) -> None:
    with pytest.raises(ValidationError):
        smallest_job(seed=seed)


@pytest.mark.parametrize("min_top1", ["auto", 0, 0.5, 1])
def test_min_top1_accepted(min_top1: Any) -> None:
    assert TeacherSpec(model="a:b", min_top1=min_top1).min_top1 == min_top1


@pytest.mark.parametrize("min_top1", ["none", -0.1, 1.1, None])
def test_min_top1_refused(min_top1: Any) -> None:
    with pytest.raises(ValidationError):
        TeacherSpec(model="a:b", min_top1=min_top1)


@pytest.mark.parametrize(
    "dataset", ["digits", "mnist", "fashion-mnist", "cifar10", "svhn", "imagefolder", "npz", "mine:load", "a.b.c:d_1"]
)
def test_datasets_accepted(dataset: str) -> None:
    assert DataSpec(dataset=dataset).dataset == dataset


@pytest.mark.parametrize("dataset", ["imagenet", "a.b", "a:b:c", ":f", "a:", "a b:c", "1a:b", ""])
def test_datasets_refused(dataset: str) -> None:
    with pytest.raises(ValidationError):
        DataSpec(dataset=dataset)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_channels_accepted(channels: Any) -> None:
    assert DataSpec(dataset="digits", channels=channels).channels == channels


@pytest.mark.parametrize(
    "fields",
    [
        {"channels": 2},
        {"image_size": [32]},
        {"image_size": [32, 0]},
        {"image_size": [1, 2, 3]},
        {"image_size": 32},
        {"transform": "no function"},
        {"metric": "f"},
        {"train_samples": 0},
        {"held_out_samples": 0},
        {"test_samples": 0},
        {"batch_size": 0},
        {"normalize": {"mean": [], "std": []}},
        {"normalize": {"mean": [0.5], "std": [0.0]}},
        {"normalize": {"mean": [0.5], "std": [-1]}},
        {"normalize": {"mean": [0.5]}},
    ],
    ids=str,
)
def test_data_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        DataSpec.model_validate({"dataset": "digits", **fields})
    assert {error["loc"][0] for error in caught.value.errors()} == set(fields)


def test_normalize_holds_tuples() -> None:
    normalize = NormalizeSpec.model_validate({"mean": [0, 0.5, -1], "std": [1, 2, 0.5]})
    assert normalize.mean == (0.0, 0.5, -1.0)
    assert normalize.std == (1.0, 2.0, 0.5)
