"""A student in every form: whatever its quantizers, the file gives its logits; a form that does not is not kept."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcq_ray.data import load_splits
from dcq_ray.errors import ExportError
from dcq_ray.export import Student, export_student, writing
from dcq_ray.export.checking import logits_of
from dcq_ray.export.loading import student_network
from dcq_ray.jobfile import resolve_job
from dcq_ray.quantizers import ActivationStart, LayerSite, bake, plan_layers, put_quantizers
from dcq_ray.quantizers.activations import activation_start
from dcq_ray.records import LayerPlan
from dcq_ray.spec import WEIGHT_SCHEME_BITS, Job
from dcq_ray.teacher import build_network

for extra in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(extra, reason="the export extra is not installed")

# The bits that have a width of their own in some form; tests/test_export_packed.py has the others.
BITS = (1, 2, 3, 4, 8)
WEIGHTS = [
    {"scheme": scheme, "bits": bits}
    for scheme, allowed in WEIGHT_SCHEME_BITS.items()
    for bits in allowed
    if bits in BITS
]
INPUTS = [None, *({"scheme": scheme, "bits": bits} for scheme in ("dorefa", "pact", "lsq") for bits in BITS)]
FORMS = ("safetensors", "packed", "onnx", "torch-export")


def job_of(**quantize: Any) -> Job:
    document = {
        "name": "forms",
        "teacher": {"model": "dcq_ray:lenet", "args": {"image_size": 16, "final_relu": False}},
        "data": {"dataset": "digits", "image_size": [16, 16], "held_out_samples": 40, "train_samples": 40},
        "quantize": {"first_last_bits": None, **quantize},
    }
    return resolve_job(document, source="test")


def starts_of(network: nn.Module, layers: Sequence[LayerPlan], images: Tensor) -> dict[str, ActivationStart]:
    """Where the quantizers of the layers' inputs start, as a run finds it from data."""
    starts: dict[str, ActivationStart] = {}
    for layer in layers:

        def hook(_: nn.Module, inputs: tuple[Tensor], layer: LayerPlan = layer) -> None:
            starts[layer.module] = activation_start(inputs[0], min(layer.activation_bits, 8))

        handle = network.get_submodule(layer.module).register_forward_pre_hook(hook)
        with torch.no_grad():
            network(images)
        handle.remove()
    return starts


def student_of(job: Job) -> Student:
    """A network that was not trained, quantized, as a run leaves its student."""
    torch.manual_seed(0)
    network = build_network(job.teacher, job_folder=".").eval()
    sites = [LayerSite(name=name, module=part) for name, part in network.named_modules() if hasattr(part, "weight")]
    layers = plan_layers(sites, job.quantize)
    held_out = load_splits(job.data, seed=0, job_folder=".").held_out
    put_quantizers(network, layers, starts_of(network, layers, held_out.images(np.arange(len(held_out)))))
    extra = bake(network)
    state = {name: value.clone() for name, value in {**network.state_dict(), **extra}.items()}
    again = student_network(build_network(job.teacher, job_folder="."), state, source="test")
    return Student(
        job=job,
        job_folder=".",
        layers=layers,
        state=state,
        network=again,
        held_out=held_out,
        logits=logits_of(again, held_out, job.data.batch_size),
        metadata={"run": "forms"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "activations"),
    zip(WEIGHTS, cycle(INPUTS)),
    ids=lambda found: "none" if found is None else f"{found['scheme']}{found['bits']}",
)
def test_every_quantizer_goes_through_every_form(
    weights: dict[str, Any], activations: dict[str, Any] | None, tmp_path: Path
) -> None:
    student = student_of(job_of(weights=weights, activations=activations))
    assert len(student.logits.unique(dim=0)) > 1
    for form in FORMS:
        # Raises where top-1 or logits are not the student's.
        done = export_student(student, form, str(tmp_path / form))
        assert done.num_samples == 40
        if form in ("safetensors", "packed"):
            assert done.largest_difference == 0
    assert sorted(os.listdir(tmp_path)) == sorted(FORMS)


def test_all_weights_and_all_inputs_are_among_them() -> None:
    assert len(WEIGHTS) >= len(INPUTS)


def test_one_held_out_image_is_enough(tmp_path: Path) -> None:
    job = job_of(weights={"scheme": "dorefa", "bits": 1})
    few = job.model_copy(update={"data": job.data.model_copy(update={"held_out_samples": 1})})
    student = student_of(few)
    assert len(student.held_out) == 1
    for form in FORMS:
        assert export_student(student, form, str(tmp_path / form)).num_samples == 1


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_file_does_not_tell_where_it_was_written(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "student"
    export_student(student_of(job_of(weights={"scheme": "dorefa", "bits": 1})), form, str(path))
    if form == "torch-export":
        program = torch.export.load(str(path))
        assert not [node for node in program.graph.nodes if "stack_trace" in node.meta]
    content = path.read_bytes()
    for told in (b".py", os.path.dirname(torch.__file__).encode(), os.getcwd().encode()):
        assert told not in content


# Safetensors writes its metadata in an order of its own, another each time.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "safetensors"])
def test_a_student_has_one_file_in_whatever_order_its_state_is_read(form: Any, tmp_path: Path) -> None:
    student = student_of(job_of(weights={"scheme": "ttq", "bits": 2}, activations={"scheme": "lsq", "bits": 4}))
    turned = dataclasses.replace(student, state=dict(reversed(student.state.items())))
    for name, found in (("a", student), ("b", turned)):
        export_student(found, form, str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_refused_is_told_by_the_name_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flawed(*arguments: object, **named: object) -> bytes:
        return b"dcq-pack" + bytes(100)

    monkeypatch.setattr(writing, "pack", flawed)
    path = tmp_path / "student.dcq"
    with pytest.raises(ExportError) as caught:
        export_student(student_of(job_of(weights={"scheme": "dorefa", "bits": 1})), "packed", str(path))
    assert str(caught.value).startswith(f"{path}: a packed student of version 0")
    assert os.listdir(tmp_path) == []
