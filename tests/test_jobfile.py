"""Reading, checking and writing job files: what is accepted, and how every mistake reads."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dcq_ray.errors import JobError
from dcq_ray.jobfile import (
    EXAMPLE_JOB,
    job_schema,
    job_yaml,
    load_job,
    mask_credentials,
    parse_job,
    resolve_job,
)
from dcq_ray.jobfile.mistakes import dotted, nearest, shown
from dcq_ray.jobfile.validation import EXAMPLES
from dcq_ray.jobfile.words import all_paths, expectation, job_node, node_at, options
from dcq_ray.spec import Job, SectionsSpec

# The example of DESIGN.md, section 2, word for word.
CONTRACT_JOB = """\
name: resnet20-cifar10-w1
teacher:
  model: dcq_ray:resnet20          # or torchvision:resnet18, or package.module:function
  args: {}                         # keyword arguments of that function
  weights: "${DCQ_DATA:-data}/teachers/resnet20_cifar10_jpeg.safetensors"   # file, URI, torchvision enum name, or null
  fit: null                        # or {epochs: 10, lr: 0.1, …}: train or fine-tune it first, on the train part
  min_top1: auto                   # 1.5 x chance; `run` refuses a worse teacher; 0 switches it off
data:
  dataset: npz                     # digits, mnist, fashion-mnist, cifar10, svhn, imagefolder, npz, or package.module:function
  root: "${DCQ_DATA:-data}/cifar10-jpeg"
  train: cifar10_jpeg_train.npz    # npz only: `images` [N,H,W,C] uint8, or `jpeg` + `offsets`; `labels` [N] optional in train
  test: cifar10_jpeg_test.npz
  channels: 3
  image_size: [32, 32]
  normalize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
  train_samples: 10000             # null: all; a fixed, seeded, class-balanced choice
  held_out_samples: 2000           # taken from the train set, never trained on
  test_samples: null
  batch_size: 128
sections: {count: 4}               # or {every: block} / {every: layer} / {cuts: [layer1, layer2]}
quantize:
  weights: {scheme: dorefa, bits: 1}
  activations: null                # or {scheme: pact, bits: 4}
  first_last_bits: 8               # 32 leaves them alone; null: no exception
  overrides: {}                    # name pattern -> {bits: …}; a pattern that matches nothing is an error
train: {epochs: 2, optimizer: adam, lr: 1.0e-3, loss: nmse, batch_size: 128, num_threads: 1}
reduce: {reestimate_batchnorm: true, rounds: 1, polish_epochs: 0, max_drop: null}
resources: {gpus_per_section: auto, cpus_per_section: 1, memory_per_section: auto}
storage: {run_dir: runs/resnet20-cifar10-w1, cache_dir: runs/.cache, dtype: float16, compression: none, checkpoint_seconds: 30}
seed: 0
"""

SMALL: dict[str, Any] = {"name": "a", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """SMALL with values at dotted paths."""
    document = copy.deepcopy(SMALL)
    for path, value in changes:
        *above, last = path.split(".")
        holder = document
        for part in above:
            holder = holder.setdefault(part, {})
        holder[last] = value
    return document


def resolved(*changes: tuple[str, Any], overrides: tuple[str, ...] = (), **environment: str) -> Job:
    return resolve_job(changed(*changes), source="job", overrides=overrides, environment=environment)


def mistakes(
    document: Any, *, overrides: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> list[str]:
    """The lines below the header of the error that a document (or, as text, a file) raises."""
    content = document.encode() if isinstance(document, str) else None
    told: dict[str, Any] = {"source": "jobs/x.yaml", "overrides": overrides, "environment": environment or {}}
    with pytest.raises(JobError) as caught:
        resolve_job(document, **told) if content is None else parse_job(content, **told)
    header, *lines = str(caught.value).split("\n")
    assert header == f"jobs/x.yaml: {len(lines)} mistake" + ("" if len(lines) == 1 else "s")
    return lines


def mistake(*changes: tuple[str, Any], overrides: tuple[str, ...] = ()) -> str:
    (line,) = mistakes(changed(*changes), overrides=overrides)
    return line


def paragraph(content: bytes) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(content, source="jobs/x.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is accepted --------------------------------------------------------------------------------------------------


def test_contract_job_loads(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(CONTRACT_JOB, encoding="utf-8")
    job = load_job(str(path), environment={})
    assert job.teacher.weights == "data/teachers/resnet20_cifar10_jpeg.safetensors"
    assert job.data.root == "data/cifar10-jpeg"
    assert job.data.image_size == (32, 32)
    assert job.sections == SectionsSpec(count=4)
    assert (job.train.lr, job.quantize.weights.bits, job.quantize.activations) == (1e-3, 1, None)
    assert job.storage.run_dir == "runs/resnet20-cifar10-w1"
    elsewhere = load_job(str(path), environment={"DCQ_DATA": "/mnt/data"})
    assert elsewhere.data.root == "/mnt/data/cifar10-jpeg"


def test_example_job_loads_and_is_short() -> None:
    job = parse_job(EXAMPLE_JOB.encode(), source="example")
    assert (job.teacher.model, job.teacher.args) == ("dcq_ray:lenet", {"in_channels": 1, "image_size": 32})
    assert (job.data.dataset, job.data.image_size) == ("digits", (32, 32))
    assert job.teacher.fit is not None
    assert (job.teacher.fit.epochs, job.teacher.fit.lr, job.teacher.fit.optimizer) == (20, 1e-3, "adam")
    assert (job.sections.count, job.quantize.weights.bits) == (3, 1)
    assert len(EXAMPLE_JOB.splitlines()) <= 20
    assert max(map(len, EXAMPLE_JOB.splitlines())) <= 120


def test_smallest_job_gets_the_defaults() -> None:
    job = resolved()
    assert job.sections == SectionsSpec(count=4)
    assert job.storage.run_dir == "runs/a"


def test_resolving_changes_nothing_that_it_was_given() -> None:
    document = changed(("train", {"lr": "${LR}"}), ("data.normalize", {"mean": [0.5], "std": [1]}))
    before = copy.deepcopy(document)
    job = resolve_job(document, source="x", overrides=["train.epochs=7", "data.channels=1"], environment={"LR": "1e-2"})
    assert (job.train.lr, job.train.epochs, job.data.channels) == (0.01, 7, 1)
    assert document == before


def test_tuples_are_lists() -> None:
    assert resolved(("data.image_size", (8, 9))).data.image_size == (8, 9)


def test_run_dir_that_is_given_stays() -> None:
    assert resolved(("storage.run_dir", "elsewhere")).storage.run_dir == "elsewhere"
    assert resolved(("storage.dtype", "float32")).storage.run_dir == "runs/a"
    assert resolved(overrides=("name=b",)).storage.run_dir == "runs/b"


def test_anchors_and_merge_keys() -> None:
    text = """
    name: a
    teacher: {model: 'dcq_ray:lenet', fit: &fit {epochs: 3, lr: 0.5}}
    data: {dataset: digits}
    train: {<<: *fit, lr: 0.25}
    """
    job = parse_job(text.encode(), source="x", overrides=["train.epochs=9"])
    assert job.teacher.fit is not None
    assert (job.teacher.fit.epochs, job.teacher.fit.lr) == (3, 0.5)
    assert (job.train.epochs, job.train.lr) == (9, 0.25)


def test_byte_order_mark_and_windows_line_ends() -> None:
    content = b"\xef\xbb\xbf" + EXAMPLE_JOB.replace("\n", "\r\n").encode()
    assert parse_job(content, source="x") == parse_job(EXAMPLE_JOB.encode(), source="x")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.lr", "1e-3", 1e-3),
        ("train.lr", "+.5E-1", 0.05),
        ("train.lr", "2", 2.0),
        ("train.epochs", "12", 12),
        ("train.epochs", "1e1", 10),
        ("train.epochs", "12.0", 12),
        ("data.channels", "3", 3),
        ("reduce.rounds", "1", 1),
        ("reduce.max_drop", "1.5", 1.5),
        ("reduce.max_drop", "null", None),
        ("data.train_samples", "", None),
        ("train.last_loss", "Null", None),
        ("teacher.min_top1", "0.25", 0.25),
        ("teacher.min_top1", "auto", "auto"),
        ("resources.gpus_per_section", "0.5", 0.5),
        ("data.image_size", ["8", "9"], (8, 9)),
        ("data.normalize", {"mean": ["1e-1"], "std": ["1"]}, None),
        ("data.download", "false", False),
        ("reduce.reestimate_batchnorm", "Yes", True),
        ("reduce.reestimate_batchnorm", "on", True),
        ("reduce.reestimate_batchnorm", "off", False),
        ("seed", "9007199254740993", 2**53 + 1),
        ("quantize.overrides", {"a.*": {"bits": "4"}}, None),
    ],
)
def test_texts_stand_for_what_belongs_there(path: str, text: Any, value: Any) -> None:
    found: Any = resolved((path, text))
    for part in path.split("."):
        found = getattr(found, part)
    if value is not None or not isinstance(text, Mapping):
        assert found == value
        assert type(found) is type(value)
    elif path == "data.normalize":
        assert (found.mean, found.std) == ((0.1,), (1.0,))
    else:
        assert found["a.*"].bits == 4


def test_texts_stay_texts_where_texts_belong() -> None:
    job = resolved(
        ("teacher.args", {"x": "1e-3", "y": ["2", "null", "yes"]}), ("teacher.weights", "123"), ("name", "1e3")
    )
    assert job.teacher.args == {"x": "1e-3", "y": ["2", "null", "yes"]}
    assert (job.teacher.weights, job.name) == ("123", "1e3")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", " 1", "1_0", "0x10", "1e400", "1,5", "٣", "", "9" * 5000])
def test_texts_that_are_no_numbers(text: str) -> None:
    assert mistake(("train.lr", text)).startswith("train.lr: got ")
    assert mistake(("train.epochs", text)).startswith("train.epochs: got ")


# -- variables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environment", "expanded"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("p/${A}/q/${B:-r}", {"A": "x"}, "p/x/q/r"),
        ("${A:-d}", {"A": "x"}, "x"),
        ("${A:-d}", {"A": ""}, "d"),
        ("x${A}", {"A": ""}, "x"),
        ("x${A:-}", {}, "x"),
        ("${A:-a:-b}", {}, "a:-b"),
        ("${A}", {"A": "${B}", "B": "no"}, "${B}"),
        ("${A}: {}\n- &x", {"A": "key: [1"}, "key: [1: {}\n- &x"),
        ("$A $ {A} $$ {}", {"A": "no"}, "$A $ {A} $$ {}"),
        ("$${A}", {"A": "no"}, "${A}"),
        ("$$${A}", {"A": "no"}, "$${A}"),
        ("${A:-ü}", {}, "ü"),
    ],
)
def test_variables(text: str, environment: dict[str, str], expanded: str) -> None:
    assert resolved(("teacher.weights", text), **environment).teacher.weights == expanded


def test_variables_expand_in_every_string_but_not_in_keys() -> None:
    job = resolved(
        ("teacher.args", {"${A}": ["${A}", {"deep": "${A}"}]}),
        ("quantize.overrides", {"${A}": {"bits": "${BITS}"}}),
        overrides=("data.root=${A}/data",),
        A="x",
        BITS="4",
    )
    assert job.teacher.args == {"${A}": ["x", {"deep": "x"}]}
    assert list(job.quantize.overrides) == ["${A}"]
    assert job.quantize.overrides["${A}"].bits == 4
    assert job.data.root == "x/data"


def test_unset_variables_are_each_named_and_said_once() -> None:
    lines = mistakes(changed(("train.lr", "${LR}"), ("data.root", "${ROOT}/x"), ("sections.cuts", ["${CUT}"])))
    assert lines == [
        "data.root: the environment variable ROOT is not set; set it, or give a default: ${ROOT:-default}",
        "train.lr: the environment variable LR is not set; set it, or give a default: ${LR:-default}",
        "sections.cuts[0]: the environment variable CUT is not set; set it, or give a default: ${CUT:-default}",
    ]


@pytest.mark.parametrize("text", ["${", "${A", "${}", "${1A}", "${A-b}", "${A:b}", "${A:-${B}}", "${Ä}", "${A }"])
def test_malformed_variables(text: str) -> None:
    assert mistake(("data.root", text)) == (
        f"data.root: cannot read the variable in {text!r}; write ${{NAME}} or ${{NAME:-default}}, and $${{ where ${{ is "
        "no variable"
    )


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_overrides() -> None:
    job = resolved(
        ("train", {"lr": 0.5, "epochs": 3}),
        ("teacher.fit", None),
        overrides=(
            "train.lr=1e-4",
            "teacher.fit.epochs=5",
            "data.image_size=[28, 28]",
            'quantize.overrides."layer1.*".bits=4',
            " quantize.weights = {bits: 2}",
            "teacher.weights=a=b=c",
            "sections={every: block}",
            "seed=1",
            "seed=2",
        ),
    )
    assert (job.train.lr, job.train.epochs) == (1e-4, 3)
    assert job.teacher.fit is not None
    assert job.teacher.fit.epochs == 5
    assert job.data.image_size == (28, 28)
    assert job.quantize.overrides["layer1.*"].bits == 4
    assert job.quantize.weights.bits == 2
    assert job.teacher.weights == "a=b=c"
    assert job.sections == SectionsSpec(every="block")
    assert job.seed == 2


def test_override_with_nothing_is_null() -> None:
    assert resolved(("reduce.max_drop", 3), overrides=("reduce.max_drop=",)).reduce.max_drop is None


def test_override_repairs_what_it_replaces() -> None:
    text = "name: a\nteacher: {model: 'dcq_ray:lenet'}\ndata: {dataset: digits}\ntrain: {lr: !!int x, lr: -1}\n"
    assert len(mistakes(text)) == 2
    assert parse_job(text.encode(), source="x", overrides=["train={lr: 0.5}"]).train.lr == 0.5


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr", "--set train.lr: there is no '='; expected KEY=VALUE, such as train.lr=0.01"),
        ("train..lr=1", "--set train..lr=1: cannot read the key; expected names joined by dots"),
        ("=1", "--set =1: cannot read the key; expected names joined by dots"),
        ('a."b=1', '--set a."b=1: cannot read the key; expected names joined by dots'),
        ("train.lr=-1", "--set train.lr=-1: train.lr: got -1, expected a number greater than 0"),
        (
            "train.lr.x=1",
            "--set train.lr.x=1: train.lr is 0.5, not a mapping, so it has no key x; set train.lr as a whole",
        ),
        (
            "data.image_size.0=1",
            "--set data.image_size.0=1: data.image_size is [8, 8], not a mapping, so it has no key 0",
        ),
        ("train.lr=[", "--set train.lr=[: train.lr: the value is not YAML: "),
        (
            "train.lr=*x",
            "--set train.lr=*x: train.lr: the value is not YAML: found undefined alias 'x'; put a text in quot",
        ),
        ("name=\0", "--set name=\\x00: name: the value is not YAML: special characters are not allowed"),
        ("train={lr: 1, lr: 2}", "--set train={lr: 1, lr: 2}: train.lr: this key is given twice; keep one of them"),
        ("trian.lr=1", "--set trian.lr=1: trian: unknown key; did you mean 'train'? allowed: data, name, "),
        ("train={lr: {x: 1}}", "--set train={lr: {x: 1}}: train.lr: got {x: 1}, expected a number greater than 0"),
        ("name=on", "--set name=on: name: got true, expected letters, digits, '.', '_' and '-', beginning with a"),
        ("data.root=${NOPE}", "--set data.root=${NOPE}: data.root: the environment variable NOPE is not set"),
        (
            'quantize.overrides."a.b"={}',
            '--set quantize.overrides."a.b"={}: quantize.overrides."a.b": changes nothing; ',
        ),
        (
            "quantize.overrides.x.y=1",
            "--set quantize.overrides.x.y=1: quantize.overrides.x.y: unknown key; allowed: activation_bits, ",
        ),
    ],
)
def test_overrides_that_are_mistakes(override: str, line: str) -> None:
    document = changed(("train.lr", 0.5), ("data.image_size", [8, 8]))
    lines = mistakes(document, overrides=(override,))
    assert lines[0].startswith(line)
    assert all(other.startswith(f"--set {override}: ") for other in lines[1:])


def test_pattern_without_quotes_gets_a_hint() -> None:
    lines = mistakes(changed(), overrides=("quantize.overrides.layer1.conv1.bits=4",))
    assert lines[-1] == (
        "--set quantize.overrides.layer1.conv1.bits=4: quantize.overrides.layer1.conv1: unknown key; allowed: "
        'activation_bits, activation_scheme, bits, scheme; a pattern is one key, dots and all: "layer1.conv1"'
    )


def test_every_override_is_checked() -> None:
    lines = mistakes(changed(("train.epochs", -1)), overrides=("foo", "seed=-1", "train.lr=0", "train.batch_size=0"))
    assert [line.split(": ")[0] for line in lines] == [
        *("train.epochs", "--set foo", "--set train.lr=0", "--set train.batch_size=0", "--set seed=-1")
    ]


# -- phrases that several messages share -------------------------------------------------------------------------------

TOP = "allowed: data, name, quantize, reduce, resources, sections, seed, storage, teacher, train"
FIT = (
    "allowed: batch_size, crop_padding, epochs, flip, label_smoothing, lr, momentum, optimizer, schedule, warmup_epochs, "
    "weight_decay"
)
TRAIN = (
    "a mapping with keys among epochs, optimizer, lr, schedule, momentum, weight_decay, batch_size, loss, last_loss, "
    "temperature, start, start_samples, inputs, anneal, stagger, look_ahead, look_ahead_weight, input_noise, augment and "
    "num_threads"
)
SIZE = "a list of 2 values, each a whole number of at least 1, or null"
CUTS = "a list of at least one value, each a text that is not empty, or null"
QUOTES = "; put a text that YAML takes for a number or a flag in quotes"
SCHEMES = "dorefa, xnor, twn, ttq, lsq, lsq-channel or wrpn"
ONLY_ONE = "(Only 1: a section is trained once; `train.inputs: student` does better what rounds on the student's own inputs would)"
LOSSES = "nmse, channel-nmse, mse, cosine or attention"
EXACTLY = ", expected exactly one of count, every or cuts; set the others to null"

# -- mistakes, word for word -------------------------------------------------------------------------------------------


def test_six_mistakes_are_told_at_once() -> None:
    text = """\
name: a
teacher:
  model: resnet18
data:
  dataset: cifar
train:
  optimiser: adam
  lr: -1
quantize:
  weights:
    bits: 9
storage: {run_dir: "${NOPE}/x"}
"""
    assert mistakes(text) == [
        "line 3: teacher.model: got 'resnet18', expected dcq_ray:NAME, torchvision:NAME or package.module:function",
        "line 5: data.dataset: got 'cifar', expected digits, mnist, fashion-mnist, cifar10, svhn, imagefolder or npz, or "
        "package.module:function; did you mean 'cifar10'?",
        "line 7: train.optimiser: unknown key; did you mean 'optimizer'? allowed: anneal, augment, batch_size, epochs, "
        "input_noise, inputs, last_loss, look_ahead, look_ahead_weight, loss, "
        "lr, momentum, num_threads, optimizer, schedule, stagger, start, start_samples, temperature, weight_decay",
        "line 8: train.lr: got -1, expected a number greater than 0",
        "line 11: quantize.weights.bits: got 9, expected a whole number from 1 to 8",
        "line 12: storage.run_dir: the environment variable NOPE is not set; set it, or give a default: "
        "${NOPE:-default}",
    ]


def test_lines_are_of_the_key_and_of_the_item() -> None:
    text = """\
# a comment
name: a

teacher:
  model:
    ""
  fit:
    epochs: 0
data:
  dataset: digits
  normalize:
    mean:
    - 0
    - x
    std: [1,
      0]
sections:
  cuts: [a,
    b,
    a]
"""
    assert [line.split(": got")[0].split(": 'a'")[0] for line in mistakes(text)] == [
        "line 5: teacher.model",
        "line 8: teacher.fit.epochs",
        "line 14: data.normalize.mean[1]",
        "line 16: data.normalize.std[1]",
        "line 20: sections.cuts[2]",
    ]


def test_mistake_below_an_alias_is_told_where_it_is_used() -> None:
    text = "name: a\nteacher: {model: 'a:b', fit: &f {lr: -1}}\ndata: {dataset: digits}\ntrain: *f\n"
    assert [line.split(" got")[0] for line in mistakes(text)] == ["line 2: teacher.fit.lr:", "line 2: train.lr:"]


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("train.lr", "x", "train.lr: got 'x', expected a number greater than 0"),
        ("train.lr", True, "train.lr: got true, expected a number greater than 0"),
        ("train.lr", None, "train.lr: got null, expected a number greater than 0"),
        ("train.lr", float("nan"), "train.lr: got .nan, expected a finite number"),
        ("train.lr", float("-inf"), "train.lr: got -.inf, expected a finite number"),
        ("train.weight_decay", float("inf"), "train.weight_decay: got .inf, expected a finite number"),
        ("teacher.args", {"x": [float("nan")]}, "teacher.args.x[0]: got .nan, expected a finite number"),
        ("train.epochs", 1.5, "train.epochs: got 1.5, expected a whole number of at least 0"),
        ("train.epochs", True, "train.epochs: got true, expected a whole number of at least 0"),
        ("teacher.fit", {"warmup_epochs": 10}, "teacher.fit.warmup_epochs: got 10, expected less than teacher.fit.epochs, 10; "
         "the rate would only rise"),
        ("train.momentum", 1, "train.momentum: got 1, expected a number from 0 to below 1"),
        ("train.loss", "NMSE ", f"train.loss: got 'NMSE ', expected {LOSSES}; did you mean 'nmse'?"),
        ("train.last_loss", "hinge", "train.last_loss: got 'hinge', expected cross-entropy or distillation, or null"),
        ("teacher.min_top1", "Auto", "teacher.min_top1: got 'Auto', expected a number from 0 to 1, or auto; did you mean 'auto'?"),
        ("teacher.min_top1", 2, "teacher.min_top1: got 2, expected a number from 0 to 1, or auto"),
        ("resources.gpus_per_section", [1], "resources.gpus_per_section: got [1], expected a number of at least 0, or auto"),
        ("teacher.model", 3, f"teacher.model: got 3, expected a text that is not empty{QUOTES}"),
        ("teacher.model", "", "teacher.model: got '', expected a text that is not empty"),
        ("teacher.args", None, "teacher.args: got null, expected a mapping, such as {}; leave the key out for its defaults"),
        ("train", None, f"train: got null, expected {TRAIN}; leave the key out for its defaults"),
        ("train", [1, "a"], f"train: got [1, 'a'], expected {TRAIN}"),
        ("data.download", 1, "data.download: got 1, expected true or false"),
        ("data.download", "maybe", "data.download: got 'maybe', expected true or false"),
        ("data.channels", 2, "data.channels: got 2, expected 1 or 3, or null"),
        ("data.channels", True, "data.channels: got true, expected 1 or 3, or null"),
        ("data.image_size", 32, f"data.image_size: got 32, expected {SIZE}"),
        ("data.image_size", [32], f"data.image_size: got [32], expected {SIZE}"),
        ("data.image_size", [1, 2, 3], f"data.image_size: got [1, 2, 3], expected {SIZE}"),
        ("data.image_size", [1, 0], "data.image_size[1]: got 0, expected a whole number of at least 1"),
        ("data.transform", "f", "data.transform: got 'f', expected package.module:function, or null"),
        ("sections.cuts", [], f"sections.cuts: got [], expected {CUTS}"),
        ("quantize.activations", {"scheme": "pakt"},
         "quantize.activations.scheme: got 'pakt', expected dorefa, pact or lsq; did you mean 'pact'?"),
        ("quantize.activations", {"bits": 0}, "quantize.activations.bits: got 0, expected a whole number from 1 to 8"),
        ("quantize.weights.scheme", "doreffa",
         f"quantize.weights.scheme: got 'doreffa', expected {SCHEMES}; did you mean 'dorefa'?"),
        ("quantize.weights.bits", 33, "quantize.weights.bits: got 33, expected a whole number from 1 to 8"),
        ("quantize.weights", {"scheme": "xnor", "bits": 2}, "quantize.weights.bits: got 2, expected 1 for scheme xnor"),
        ("quantize.weights", {"scheme": "twn", "bits": 1},
         "quantize.weights.bits: got 1, expected 2 for scheme twn, whose three levels take 2 bits"),
        ("quantize.weights", {"scheme": "lsq"}, "quantize.weights.bits: got 1, expected 2 to 8 for scheme lsq"),
        ("quantize.overrides", {"a": {"bits": 33}},
         "quantize.overrides.a.bits: got 33, expected a whole number from 1 to 32, or null"),
        ("quantize.overrides", {"a": {"bits": 1, "scheme": "wrpn"}},
         "quantize.overrides.a.bits: got 1, expected 2 to 8 for scheme wrpn"),
        ("quantize.overrides", {"a": {}}, "quantize.overrides.a: changes nothing; give it bits, scheme, "
         "activation_bits or activation_scheme"),
        ("quantize.overrides", {"a": {"activation_bits": 4}}, "quantize.overrides.a.activation_bits: "
         "quantize.activations is null; give the override an activation_scheme too, or the job activations"),
        ("quantize.overrides", {"a": {"activation_scheme": "lsq"}}, "quantize.overrides.a.activation_scheme: "
         "quantize.activations is null; give the override activation_bits too, or the job activations"),
        ("quantize.overrides", {"a": 3}, "quantize.overrides.a: got 3, expected a mapping with keys among "
         "bits, scheme, activation_bits and activation_scheme"),
        ("reduce.rounds", 4, f"reduce.rounds: got 4, expected 1 {ONLY_ONE}"),
        ("reduce.max_drop", 101, "reduce.max_drop: got 101, expected a number from 0 to 100, or null"),
        ("seed", -1, "seed: got -1, expected a whole number from 0 to 9223372036854775807"),
        ("name", "a b", "name: got 'a b', expected letters, digits, '.', '_' and '-', beginning with a letter or a digit"),
        ("epochs", 3, f"epochs: unknown key; did you mean 'train.epochs'? {TOP}"),
        ("batch_size", 3, f"batch_size: unknown key; did you mean 'data.batch_size' or 'train.batch_size'? {TOP}"),
        ("zzz", 3, f"zzz: unknown key; {TOP}"),
        ("teacher.fit", {"loss": "mse"}, f"teacher.fit.loss: unknown key; did you mean 'train.loss'? {FIT}"),
    ],
)  # fmt: skip
def test_mistake(path: str, value: Any, line: str) -> None:
    assert mistake((path, value)) == line


def test_missing_keys_come_with_examples() -> None:
    lines = mistakes({})
    assert lines == [
        "name: missing; expected letters, digits, '.', '_' and '-', beginning with a letter or a digit, such as "
        "`name: lenet-digits-w1`",
        "teacher: missing; expected a mapping, such as `teacher: {model: torchvision:resnet18, weights: "
        "IMAGENET1K_V1}`",
        "data: missing; expected a mapping, such as `data: {dataset: cifar10, root: data/cifar10}`",
    ]
    assert mistake(("data.normalize", {"mean": [0.5]})) == (
        "data.normalize.std: missing; expected a list of at least one value, each a number greater than 0, such as "
        "`std: [0.229, 0.224, 0.225]`"
    )
    text = "name: a\nteacher:\n  args: {}\ndata:\n  root: x\n"
    assert mistakes(text) == [
        "line 2: teacher.model: missing; expected a text that is not empty, such as `model: torchvision:resnet18`",
        "line 4: data.dataset: missing; expected digits, mnist, fashion-mnist, cifar10, svhn, imagefolder or npz, or "
        "package.module:function, such as `dataset: cifar10`",
    ]


def required_paths(path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    node = node_at(path)
    assert node is not None
    for option in options(node):
        yield from ((*path, key) for key in option.get("required", ()))
        for key in option.get("properties", {}):
            yield from required_paths((*path, key))
        if isinstance(option.get("additionalProperties"), dict):
            yield from required_paths((*path, "*"))


def test_every_required_key_has_an_example() -> None:
    assert set(required_paths()) == set(EXAMPLES)
    for path, example in EXAMPLES.items():
        assert list(yaml.safe_load(example)) == [path[-1]]


def test_examples_of_required_keys_make_a_job() -> None:
    whole = {key: value for path in EXAMPLES if len(path) == 1 for key, value in yaml.safe_load(EXAMPLES[path]).items()}
    assert resolve_job(whole, source="x").name == whole["name"]


def test_words_of_every_key_are_a_users() -> None:
    jargon = re.compile(r"\^|\$|\\|Input should|constrained|literal|object|array|integer|anyOf|string", re.IGNORECASE)
    for path in all_paths():
        node = node_at(path)
        assert node is not None
        words = expectation(node)
        assert words
        assert not jargon.search(words), (path, words)


@pytest.mark.parametrize("key", ["name", "train"])
def test_duplicate_keys_are_told_beside_what_is_wrong_below(key: str) -> None:
    text = "train: {epochs: 1}\nname: a\nteacher: {model: 'a:b'}\ndata: {dataset: digits}\ntrain: {lr: -1}\nname: b\n"
    first, second = {"name": (2, 6), "train": (1, 5)}[key]
    lines = mistakes(text)
    assert f"line {second}: {key}: this key is given twice, first in line {first}; keep one of them" in lines
    assert "line 5: train.lr: got -1, expected a number greater than 0" in lines
    assert len(lines) == 3


def test_keys_that_are_no_text() -> None:
    text = "name: a\nteacher: {model: 'a:b', args: {1: 2}}\ndata: {dataset: digits}\non: 1\n? [x]\n: 2\n"
    assert mistakes(text) == [
        "line 2: teacher.args: the key 1 is a number, expected text; put it in quotes",
        "line 4: the key true is a flag (to YAML, on, off, yes and no are flags), expected text; put it in quotes",
        "line 5: a key is a list or a mapping, expected text; put it in quotes",
    ]
    assert mistakes({**SMALL, 1: 2, None: 3, "seed": -1}) == [
        "the key 1 is a number, expected text; put it in quotes",
        "the key null is nothing, expected text; put it in quotes",
        "seed: got -1, expected a whole number from 0 to 9223372036854775807",
    ]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("2020-01-01", "got 2020-01-01, a date, expected text, a number, a list or a mapping; put a text in quotes"),
        ("2020-01-01 10:00:00", "got 2020-01-01 10:00:00, a date, expected text, a number, a list or a mapping; put"),
        ("2020-13-45", "cannot read '2020-13-45' as YAML's timestamp; put a text in quotes"),
        ("!!binary aGk=", "got b'hi', binary, expected text, a number, a list or a mapping; put a text in quotes"),
        ("!!bool perhaps", "cannot read 'perhaps' as YAML's bool; put a text in quotes"),
        ("!!int ''", "cannot read '' as YAML's int; put a text in quotes"),
        ("!mine x", "cannot read 'x' as YAML's !mine; put a text in quotes"),
        ("!!python/name:os.system x", "cannot read 'x' as YAML's python/name:os.system; put a text in quotes"),
        ("!!set {a}", "the YAML tag 'tag:yaml.org,2002:set' has no meaning here; leave it out"),
        (
            "!!python/object/apply:os.system [true]",
            "the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' has no",
        ),
        ("=", "cannot read '=' as YAML's value; put a text in quotes"),
        (r'"\ud800"', r"got '\ud800', which is not Unicode text"),
        (r'"a\0b"', r"got 'a\x00b', which holds a NUL character, which no path can hold"),
        ("0x" + "f" * 6000, "got a whole number of 24000 bits, more than any number here may have"),
        ("1" * 6000, "cannot read '1111111111"),
    ],
)
@pytest.mark.parametrize("key", ["lr", "args"])
def test_values_that_are_not_plain(value: str, problem: str, key: str) -> None:
    where = "train: {lr: " if key == "lr" else "teacher: {model: 'a:b', args: {x: "
    rest = "teacher: {model: 'a:b'}\n" if key == "lr" else ""
    text = f"name: a\ndata: {{dataset: digits}}\n{rest}{where}{value}\n" + ("}" if key == "lr" else "}}")
    (line,) = mistakes(text)
    place, name, told = line.split(": ", 2)
    assert place == ("line 4" if key == "lr" else "line 3")
    assert name == ("train.lr" if key == "lr" else "teacher.args.x")
    assert told.startswith(problem)


def test_python_objects_are_not_plain() -> None:
    assert mistake(("teacher.args", {"x": {1}})) == (
        "teacher.args.x: got {1}, a Python set, expected text, a number, a list or a mapping; put a text in quotes"
    )


def test_long_values_and_keys_are_shortened() -> None:
    lines = mistakes(
        changed(("train", {"lr": "ü" * 5000, "k" * 5000: 1, "epochs": list(range(5000)), "loss": "a\nb\x1b"}))
    )
    assert lines[0].startswith("train.epochs: got [0, 1, 2, 3, 4, ")
    assert lines[0].endswith("…, expected a whole number of at least 0")
    assert lines[1] == f"train.lr: got '{'ü' * 59}…', expected a number greater than 0"
    assert max(map(len, lines)) < 300
    assert lines[2] == r"train.loss: got 'a\nb\x1b', expected nmse, channel-nmse, mse, cosine or attention"
    assert lines[3].startswith(f"train.{'k' * 39}…: unknown key; ")
    (line,) = mistakes(changed(), overrides=("seed=" + "x" * 5000,))
    assert line.startswith("--set seed=" + "x" * 74 + "…: seed: got 'xxx")
    assert len(line) < 300


def test_messages_hold_no_credentials() -> None:
    uri = "s3://key:sEcret@bucket?secret_key=sEcret&region=x"
    text = f"name: a\nteacher: {{model: 'a:b', weights: ['{uri}']}}\ndata: {{dataset: digits}}\nseed: {uri}\n"
    lines = mistakes(text, overrides=(f"train.lr={uri}", f"train.epochs.x={uri}", uri))
    assert len(lines) == 5
    assert all("***" in line and "sEcret" not in line for line in lines)
    assert "sEcret" not in paragraph(f"a: b: {uri}".encode())


# -- mistakes between fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({}, "sections: got {}, expected exactly one of count, every or cuts, such as {count: 4}"),
        ({"count": None}, "sections: got {count: null}, expected exactly one of count, every or cuts, such as {count: 4}"),
        ({"count": 4, "every": "block"}, f"sections.every: given beside sections.count{EXACTLY}"),
        ({"cuts": ["a"], "every": "block", "count": 1}, f"sections.count: given beside sections.cuts and sections.every{EXACTLY}"),
        ({"cuts": ["a", "b", "a"]}, "sections.cuts[2]: 'a' is named twice; name each cut once"),
    ],
)  # fmt: skip
def test_sections_need_exactly_one_way(sections: Any, line: str) -> None:
    assert mistake(("sections", sections)) == line


@pytest.mark.parametrize(
    "sections", [{"count": 1}, {"every": "layer", "count": None}, {"cuts": ["a", "b"]}, {"count": 2, "cuts": None}]
)
def test_sections_with_exactly_one_way(sections: Any) -> None:
    assert resolved(("sections", sections)).sections == SectionsSpec.model_validate(sections)


def test_override_that_adds_a_second_way_to_cut_is_blamed() -> None:
    line = mistake(("sections", {"count": 4}), overrides=("sections.every=block",))
    assert line.startswith("--set sections.every=block: sections.every: given beside sections.count, ")


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar10", "svhn", "imagefolder"])
def test_named_data_sets_need_a_root_and_no_files(dataset: str) -> None:
    assert resolved(("data", {"dataset": dataset, "root": "d"})).data.dataset == dataset
    assert mistakes(changed(("data", {"dataset": dataset, "train": "a", "test": "b", "args": {"x": 1}}))) == [
        f"data.args: dataset {dataset} takes none; they are for a package.module:function of your own: leave this key out",
        f"data.root: missing; dataset {dataset} needs the folder that it is in, such as `root: data/{dataset}`",
        f"data.train: dataset {dataset} knows its own parts; this file is for dataset npz: leave this key out",
        f"data.test: dataset {dataset} knows its own parts; this file is for dataset npz: leave this key out",
    ]


def test_npz_needs_root_and_train() -> None:
    assert mistakes(changed(("data", {"dataset": "npz", "test": "t.npz"}))) == [
        "data.root: missing; dataset npz needs the folder that it is in, such as `root: data/npz`",
        "data.train: missing; dataset npz needs a file below data.root, such as `train: train.npz`",
    ]
    assert resolved(("data", {"dataset": "npz", "root": "d", "train": "t.npz"})).data.test is None


def test_digits_and_own_data_sets_need_no_root() -> None:
    assert resolved(("data.dataset", "digits")).data.root is None
    own = resolved(("data", {"dataset": "mine.data:load", "args": {"x": [1, None]}}))
    assert own.data.args == {"x": [1, None]}
    assert mistake(("data.args", {"x": 1})).startswith("data.args: dataset digits takes none; ")
    assert mistake(("data", {"dataset": "mine:load", "train": "x"})).startswith("data.train: dataset mine:load knows ")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"normalize": {"mean": [0, 0, 0], "std": [1]}},
         "data.normalize.std: got 1 value, [1], expected 3, as many as data.normalize.mean"),
        ({"normalize": {"mean": [0], "std": [1]}, "channels": 3},
         "data.normalize.mean: got 1 value, [0], expected 3, as data.channels"),
        ({"normalize": {"mean": [0, 0, 0], "std": [1, 1]}, "channels": 1},
         "data.normalize.std: got 2 values, [1, 1], expected 3, as many as data.normalize.mean"),
    ],
)  # fmt: skip
def test_normalize_fits_channels(data: Any, line: str) -> None:
    assert mistakes(changed(("data", {"dataset": "digits", **data})))[0] == line


@pytest.mark.parametrize("channels", [None, 1])
def test_normalize_that_fits(channels: Any) -> None:
    normalize = {"mean": [0], "std": [1]}
    job = resolved(("data", {"dataset": "digits", "normalize": normalize, "channels": channels}))
    assert job.data.normalize is not None


@pytest.mark.parametrize("model", ["dcq_ray:resnet20", "torchvision:resnet18", "pkg.mod_1.x:make_2", "m:f"])
def test_models(model: str) -> None:
    assert resolved(("teacher.model", model)).teacher.model == model


@pytest.mark.parametrize("model", ["resnet18", "a:b:c", ":x", "x:", "a.b", "a:b.c", "a b:c", "1a:b", "a/b:c", "m:f\n"])
def test_models_of_no_form(model: str) -> None:
    assert mistake(("teacher.model", model)) == (
        f"teacher.model: got {model!r}, expected dcq_ray:NAME, torchvision:NAME or package.module:function"
    )


@pytest.mark.parametrize(
    ("run_dir", "cache_dir"),
    [
        ("runs/x", "runs/x"),
        ("runs/x/", "runs//x"),
        ("runs/x", "./runs/y/../x"),
        ("runs/.cache", None),
        ("s3://b/x", "s3://b/x/"),
        ("s3://k:s@b/x", "s3://b/x?region=y"),
        ("file:///tmp/a%20b", "/tmp/a b"),
    ],
)
def test_run_and_cache_are_not_one_folder(run_dir: str, cache_dir: str | None) -> None:
    storage = {"run_dir": run_dir, **({"cache_dir": cache_dir} if cache_dir else {})}
    line = mistake(("storage", storage))
    assert line.startswith(f"storage.run_dir: got {shown(run_dir)}, which is storage.cache_dir too; expected another")


@pytest.mark.parametrize(
    ("run_dir", "cache_dir"),
    [("runs/x", "runs/y"), ("s3://b/x", "gs://b/x"), ("s3://b/x", "s3://c/x"), ("a", "s3://a"), ("a", "a/cache")],
)
def test_run_and_cache_in_two_folders(run_dir: str, cache_dir: str) -> None:
    assert resolved(("storage", {"run_dir": run_dir, "cache_dir": cache_dir})).storage.run_dir == run_dir


@pytest.mark.parametrize(
    ("root", "key", "folder"),
    [
        ("d", "run_dir", "d/x"),
        ("d", "run_dir", "d"),
        ("d", "cache_dir", "d/x/y"),
        (".", "run_dir", "x"),
        ("~/d", "run_dir", "~/d/x"),
        ("d/../e", "cache_dir", "e/x"),
        ("/d", "run_dir", "file:///d/x"),
        ("s3://b/d", "run_dir", "s3://b/d/x"),
    ],
)
def test_nothing_is_written_among_the_data(root: str, key: str, folder: str) -> None:
    other = {"run_dir": "cache_dir", "cache_dir": "run_dir"}[key]
    line = mistake(("data.root", root), ("storage", {key: folder, other: "/elsewhere"}))
    assert line.startswith(
        f"storage.{key}: got {folder!r}, which lies in data.root, {root!r}; expected a folder outside"
    )


@pytest.mark.parametrize("key", ["run_dir", "cache_dir"])
def test_folders_that_are_no_uris(key: str) -> None:
    assert mistake(("storage", {key: "s3://[b/x"})).startswith(
        f"storage.{key}: got 's3://[b/x', expected a folder, or a URI such as s3"
    )


def test_links_into_the_data_are_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "data", tmp_path / "link")
    line = mistake(("data.root", str(tmp_path / "data")), ("storage.run_dir", str(tmp_path / "link" / "run")))
    assert "which lies in data.root" in line


@pytest.mark.parametrize(
    ("root", "run_dir"),
    [("d", "dd"), ("d/e", "d/f"), ("d/e", "d"), ("d", "s3://d/x"), ("d/x", "runs/d/x"), ("s3://[", "s3://b/x")],
)
def test_runs_beside_the_data(root: str, run_dir: str) -> None:
    assert resolved(("data.root", root), ("storage.run_dir", run_dir)).data.root == root


def test_mistakes_between_fields_are_told_with_all_others() -> None:
    lines = mistakes(changed(("sections", {"count": 1, "every": "blok"}), ("data.args", {"x": 1}), ("train.lr", 0)))
    assert [line.split(": ")[0] for line in lines] == ["sections.every", "train.lr", "data.args", "sections.every"]


def test_checks_are_silent_where_a_field_is_wrong_already() -> None:
    assert len(mistakes(changed(("data", {"dataset": "npz", "root": 3, "train": []})))) == 2
    assert len(mistakes(changed(("data", {"dataset": "cifar"})))) == 1
    assert len(mistakes(changed(("data", [])))) == 1
    assert len(mistakes(changed(("sections", {"cout": 4})))) == 1
    assert len(mistakes(changed(("storage", 3)))) == 1
    assert len(mistakes(changed(("data.normalize", {"mean": ["x"], "std": [1, 2]})))) == 1


# -- files that are no job files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a job: there is nothing in it; expected a mapping with at least the keys name, teacher and data"),
        (b"# only\n# comments\n", "not a job: there is nothing in it; expected a mapping"),
        (b"null", "not a job: there is nothing in it"),
        (b"- a\n- b\n", "not a job: got ['a', 'b']; expected a mapping with"),
        (b"just text", "not a job: got 'just text'; expected a mapping with"),
        (b"\x89PNG\r\n", "byte 0 is not UTF-8 text; expected a job file: YAML, stored as UTF-8"),
        (b"name: a\0b\n", "line 1: holds the character '\\x00', which no text file has; expected a job file"),
        (b"a: 1\nb: \x07\n", "line 2: holds the character '\\x07', which no text file has; expected a job file"),
        (
            b"a: 1\n b: 2\n",
            "line 2, column 3: this is not YAML: mapping values are not allowed here; near 'b: 2'; put a",
        ),
        (
            b"a:\n\t- 1\n",
            "line 2, column 1: this is not YAML: found character '\\t' that cannot start any token while sc",
        ),
        (
            b"a:\n  b: 'x\n",
            "line 3, column 1: this is not YAML: found unexpected end of stream while scanning a quoted ",
        ),
        (
            b"a: [1,\nb: 2\n",
            "line 3, column 1: this is not YAML: expected ',' or ']', but got '<stream end>' while par",
        ),
        (
            b"a: {root: ${X}}\n",
            "line 1, column 12: this is not YAML: expected ',' or '}', but got '{' while parsing a fl",
        ),
        (
            b"a: *b\n",
            "line 1, column 4: this is not YAML: found undefined alias 'b'; near 'a: *b'; put a text that begi",
        ),
        (
            b"a: @b\n",
            "line 1, column 4: this is not YAML: found character '@' that cannot start any token while scannin",
        ),
        (
            b"a: 1\n---\nb: 2\n",
            "line 2, column 1: this is not YAML: but found another document expected a single docum",
        ),
        (b"a: &x [*x]\n", "not a job file: nested more than 40 deep; does an anchor hold itself?"),
        (b"a: &x {b: *x}\n", "not a job file: nested more than 40 deep; does an anchor hold itself?"),
        (b"[" * 20_000, "not a job file: nested too deep"),
        (b"a:\n  " + b"[" * 3_000 + b"\nb: {c: [d]}" * 2_000, "not a job file: nested too deep"),
        (b"a: " + b"[" * 60 + b"]" * 60, "not a job file: nested more than 40 deep"),
    ],
)
def test_content_that_is_no_job(content: bytes, problem: str) -> None:
    assert paragraph(content).startswith(f"jobs/x.yaml: {problem}")


def test_anchors_of_anchors_cannot_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    assert "more than 100,000 values" in paragraph("\n".join(lines).encode())


def test_deepest_document() -> None:
    def nested(depth: int) -> Any:
        return {"x": nested(depth - 1)} if depth else 0

    assert resolved(("teacher.args", nested(38))).teacher.args == nested(38)  # below teacher and args
    with pytest.raises(JobError, match="nested more than 40 deep"):
        resolved(("teacher.args", nested(39)))


def test_largest_file(tmp_path: Path) -> None:
    content = EXAMPLE_JOB.encode()
    (tmp_path / "a.yaml").write_bytes(content + b"#" * ((1 << 20) - len(content)))
    assert load_job(str(tmp_path / "a.yaml"), environment={}).name == "digits-w1"


def test_documents_that_hold_themselves() -> None:
    document = changed()
    document["teacher"]["args"] = {"self": document}
    with pytest.raises(JobError, match="nested more than 40 deep"):
        resolve_job(document, source="x")


def test_documents_that_are_no_mapping() -> None:
    for document in (None, [], 3, "text"):
        with pytest.raises(JobError, match=r"x: not a job: .*expected a mapping"):
            resolve_job(document, source="x")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(EXAMPLE_JOB)
    (tmp_path / "other.txt").write_text("")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 20) + b"#")
    nearest_file = re.escape(str(tmp_path / "quickstart.yaml"))
    for name, problem in {
        "quickstrat.yaml": f"there is no such job file; did you mean {nearest_file}",
        "zzz": "there is no such job file; 2 .yaml files beside it",
        "nowhere/a.yaml": "there is no such job file, nor the folder .*nowhere; relative paths are relative",
        "": "this is a folder; expected a job file, such as .*job.yaml",
        "quickstart.yaml/x": "the job file cannot be read: Not a directory",
        "a\0b": "the job file cannot be read: embedded null byte",
        "n" * 300: "the job file cannot be read: File name too long",
        "large.yaml": "larger than 1 MiB; expected a job file",
    }.items():
        with pytest.raises(JobError, match=problem):
            load_job(os.path.join(tmp_path, name), environment={})


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_give_a_job_error(content: bytes) -> None:
    with pytest.raises(JobError):
        parse_job(content, source="x")


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.dates()
        | st.binary(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
        ),
        max_leaves=20,
    ),
    st.sampled_from([path for path in all_paths() if path[-1] != "args"]),
)
def test_any_value_anywhere_is_accepted_or_told(value: Any, path: tuple[str, ...]) -> None:
    try:
        assert isinstance(resolved((".".join(path), value)), Job)
    except JobError as error:
        header, *lines = str(error).split("\n")
        assert header == f"job: {len(lines)} mistake" + ("" if len(lines) == 1 else "s")
        assert lines


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_override_is_accepted_or_told(override: str) -> None:
    try:
        outcome: Job | str = resolved(overrides=(override,))
    except JobError as error:
        outcome = str(error)
    assert isinstance(outcome, Job) or "--set " in outcome


# -- back to YAML ------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | NUMBERS | TEXTS | st.just("${X:-y}") | st.just("1e-3"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ARGS = st.dictionaries(TEXTS, PLAIN, max_size=3)
RATES = st.floats(1e-300, 1e300)
OPTIMIZER = {
    "epochs": st.integers(1, 10**9),
    "optimizer": st.sampled_from(["adam", "sgd"]),
    "lr": RATES,
    "schedule": st.sampled_from(["cosine", "step", "constant"]),
    "momentum": st.floats(0, 0.999),
    "weight_decay": st.floats(0, 1e300),
    "batch_size": st.integers(1, 10**9),
}
DOCUMENTS = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        "teacher": st.fixed_dictionaries(
            {"model": st.sampled_from(["dcq_ray:lenet", "a.b:c"])},
            optional={
                "args": ARGS,
                "weights": st.none() | TEXTS,
                "min_top1": st.just("auto") | st.floats(0, 1),
                "fit": st.none() | st.fixed_dictionaries({}, optional={**OPTIMIZER, "flip": st.booleans()}),
            },
        ),
        "data": st.fixed_dictionaries(
            {"dataset": st.just("mine:load")},
            optional={
                "args": ARGS,
                "channels": st.none() | st.just(3),
                "image_size": st.none() | st.lists(st.integers(1, 10**6), min_size=2, max_size=2),
                "normalize": st.fixed_dictionaries(
                    {"mean": st.lists(NUMBERS, min_size=3, max_size=3), "std": st.lists(RATES, min_size=3, max_size=3)}
                ),
                "download": st.booleans(),
                "test_samples": st.none() | st.integers(1, 10**9),
            },
        ),
    },
    optional={
        "sections": st.fixed_dictionaries({"count": st.integers(1, 99)})
        | st.fixed_dictionaries({"cuts": st.lists(TEXTS, min_size=1, max_size=3, unique=True)}),
        "quantize": st.fixed_dictionaries(
            {},
            optional={
                "first_last_bits": st.none() | st.integers(1, 32),
                "overrides": st.dictionaries(TEXTS, st.fixed_dictionaries({"bits": st.integers(1, 32)}), max_size=3),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                **OPTIMIZER,
                "last_loss": st.sampled_from([None, "distillation"]),
                "look_ahead": st.sampled_from([0, 3, "all"]),
                "augment": st.sampled_from([None, {}, {"views": 3, "flip": False}]),
            },
        ),
        "storage": st.fixed_dictionaries(
            {}, optional={"run_dir": TEXTS.map("runs/".__add__), "checkpoint_seconds": RATES}
        ),
        "seed": st.integers(0, 2**63 - 1),
    },
)


def escaped(value: Any) -> Any:
    """As a job file must write what holds `${` itself."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS)
def test_job_yaml_loads_back_to_the_same_job(document: Any) -> None:
    job = resolve_job(escaped(document), source="x")
    written = job_yaml(job)
    back = parse_job(written.encode(), source="job.yaml")
    assert back == job
    assert back.teacher.args == document["teacher"].get("args", {})
    assert job_yaml(back) == written


@pytest.mark.parametrize(
    "text", ["\x85", "a\u2028b", "\u2029", "\ufeff", "a\n\n b\r\n", " ", "\x07", "1e-3", "no", "$${", "é"]
)
def test_job_yaml_keeps_odd_texts(text: str) -> None:
    job = resolve_job(escaped(changed(("teacher.args", {text: text, "a": [text]}))), source="x")
    assert parse_job(job_yaml(job).encode(), source="x").teacher.args == {text: text, "a": [text]}


def test_job_yaml_has_every_key_in_the_order_of_the_models() -> None:
    written = yaml.safe_load(
        job_yaml(
            resolved(
                ("teacher.fit", {}),
                ("train.augment", {}),
                ("data.normalize", {"mean": [0], "std": [1]}),
                ("quantize.activations", {}),
            )
        )
    )

    def paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, item in value.items() if isinstance(value, dict) else ():
            yield (*path, key)
            yield from paths(item, (*path, key))

    assert tuple(paths(written)) == all_paths()


def test_job_yaml_reads_well() -> None:
    written = job_yaml(resolved(("data.image_size", [32, 32]), ("name", "x-1")))
    assert written.startswith("name: x-1\nteacher:\n  model: dcq_ray:lenet\n  args: {}\n  weights: null\n")
    assert "\n  image_size: [32, 32]\n" in written
    assert "\n  run_dir: runs/x-1\n" in written
    assert written.endswith("seed: 0\n")


def test_job_yaml_shares_nothing_and_keeps_text_on_one_line() -> None:
    shared = ["x"]
    written = job_yaml(resolved(("teacher.args", {"a": shared, "b": shared, "c": "word " * 100, "d": "é"})))
    assert "&id" not in written
    assert "word " * 20 in written
    assert "d: é" in written


def test_job_yaml_holds_no_credentials() -> None:
    job = resolved(
        ("storage", {"run_dir": "s3://${KEY}:${SECRET}@bucket/run", "cache_dir": "s3://b/c?access_key=k&secret_key=${SECRET}"}),
        ("teacher.weights", "https://host/w.pt?X-Amz-Signature=${SECRET}&v=1#frag"),
        ("teacher.args", {"deep": [{"uri": "gs://u:${SECRET}@b"}]}),
        KEY="AKIA",
        SECRET="s/3+cr=t",
    )  # fmt: skip
    assert "s/3+cr=t" in job.storage.run_dir
    written = job_yaml(job)
    assert "cr=t" not in written
    assert "AKIA" not in written
    back = parse_job(written.encode(), source="x")
    assert back.storage.run_dir == "s3://***:***@bucket/run"
    assert back.storage.cache_dir == "s3://b/c?access_key=***&secret_key=***"
    assert back.teacher.weights == "https://host/w.pt?X-Amz-Signature=***&v=1#frag"
    assert back.teacher.args == {"deep": [{"uri": "gs://***:***@b"}]}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://key:secret@bucket/x", "s3://***:***@bucket/x"),
        ("s3://key:se/cr@bucket/x", "s3://***:***@bucket/x"),
        ("abfss://:password@account.dfs.core.windows.net/x", "abfss://***:***@account.dfs.core.windows.net/x"),
        ("from s3://a:b@c to s3://d:e@f", "from s3://***:***@c to s3://***:***@f"),
        ("x?token=abc", "x?token=***"),
        ("s3://b?a=1&Session_Token=abc&c=2", "s3://b?a=1&Session_Token=***&c=2"),
        ("https://a/b?sig=x%2B&se=1", "https://a/b?sig=***&se=1"),
        ("https://a/b?api_key=x", "https://a/b?api_key=***"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked
    assert mask_credentials(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        *("runs/x", "gs://anonymous@bucket/x", "abfss://container@account/x", "http://host:8080/a@b", "a:b@c", ""),
        *("s3://bucket/a:b@c", "s3://b?region=eu&endpoint_override=http://h:9000", "dcq_ray:lenet", "s3://b/token=x"),
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask_credentials(text) == text


# -- the schema --------------------------------------------------------------------------------------------------------

VALIDATOR = jsonschema.Draft202012Validator(job_schema())


def test_schema_is_a_schema_and_is_json() -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "dcq-ray job"
    assert json.loads(json.dumps(schema)) == schema
    assert schema["required"] == ["name", "teacher", "data"]


def test_schema_is_new_each_time() -> None:
    schema = job_schema()
    schema["properties"].clear()
    assert job_schema()["properties"]
    assert job_node()["properties"]


@pytest.mark.parametrize("text", [CONTRACT_JOB, EXAMPLE_JOB])
def test_schema_accepts_raw_files(text: str) -> None:
    VALIDATOR.validate(yaml.safe_load(text))


def test_schema_accepts_what_is_written() -> None:
    VALIDATOR.validate(yaml.safe_load(job_yaml(resolved())))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.lr", "1e-3"),
        ("train.lr", "${LR}"),
        ("train.epochs", "${EPOCHS:-10}"),
        ("train.optimizer", "${OPTIMIZER:-adam}"),
        ("data.channels", "${C}"),
        ("data.channels", "3"),
        ("data.download", "${D:-false}"),
        ("data.image_size", ["${H}", "32"]),
        ("data.dataset", "${DATASET}"),
        ("data.transform", "${T}"),
        ("data.normalize", {"mean": ["1e-1"], "std": ["${S}"]}),
        ("quantize.overrides", {"a.*": {"bits": "${B}"}}),
        ("teacher.min_top1", "${M}"),
        ("teacher.min_top1", "0.5"),
        ("teacher.fit", {"lr": "1e-1"}),
        ("reduce.rounds", "${R}"),
        ("reduce.max_drop", "1.5"),
        ("name", "${USER}-run"),
        ("seed", "${SEED:-0}"),
    ],
)
def test_schema_accepts_variables_and_numbers_as_texts(path: str, value: Any) -> None:
    VALIDATOR.validate(changed((path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("bogus", 1),
        ("train.optimiser", "adam"),
        ("teacher.fit", {"bogus": 1}),
        ("quantize.overrides", {"a": {"bogus": 1, "bits": 1}}),
        ("quantize.overrides", {"a": {}}),
        ("train.lr", -1),
        ("train.lr", "fast"),
        ("train.lr", "nan"),
        ("train.epochs", 1.5),
        ("quantize.weights.bits", 9),
        ("train.optimizer", "adamw"),
        ("data.dataset", "cifar"),
        ("data.download", "x"),
        ("data.image_size", [32]),
        ("data.channels", 2),
        ("name", "a b"),
        ("teacher.model", ""),
        ("teacher", None),
        ("reduce.rounds", 2),
    ],
)
def test_schema_refuses(path: str, value: Any) -> None:
    assert not VALIDATOR.is_valid(changed((path, value)))
    assert mistake((path, value))


@pytest.mark.parametrize("path", [path for path in all_paths() if path[-1] in ("lr", "dataset", "max_drop", "run_dir")])
def test_schema_keeps_descriptions_and_defaults(path: tuple[str, ...]) -> None:
    node: Any = job_schema()
    definitions = node["$defs"]
    for part in path:
        while "properties" not in node:
            node = next(option for option in (node, *node.get("anyOf", ())) if "$ref" in option)
            node = definitions[node["$ref"].removeprefix("#/$defs/")]
        node = node["properties"][part]
    original = node_at(path)
    assert original is not None
    assert node["description"] == original["description"]
    assert node.get("default") == original.get("default")
    assert "title" not in node


@settings(deadline=None, max_examples=40)
@given(DOCUMENTS)
def test_schema_accepts_every_job(document: Any) -> None:
    VALIDATOR.validate(document)


# -- small pieces ------------------------------------------------------------------------------------------------------


def test_dotted() -> None:
    assert dotted(("a", "b", 0, "c")) == "a.b[0].c"
    assert dotted(("overrides", "layer1.*", "bits")) == 'overrides."layer1.*".bits'
    assert dotted(("a b", "x=y", "")) == '"a b"."x=y".""'
    assert dotted(()) == ""
    assert dotted(("a\nb", "\x1b")) == r'"a\nb".\x1b'


def test_shown() -> None:
    assert (
        shown({"a": [1, 2.5, None, True, "x"], "b c": {}, "\n": "'"})
        == "{a: [1, 2.5, null, true, 'x'], 'b c': {}, '\\n': \"'\"}"
    )
    assert shown("x" * 61) == "'" + "x" * 59 + "…'"
    assert shown("x" * 60) == "'" + "x" * 60 + "'"
    assert len(shown(list(range(1000)))) == 60


def test_nearest() -> None:
    assert nearest("OPTIMISER", ["optimizer", "lr"]) == "optimizer"
    assert nearest("batchsize", ["batch_size", "epochs"]) == "batch_size"
    assert nearest("zzz", ["optimizer", "lr"]) is None
    assert nearest("x", []) is None
