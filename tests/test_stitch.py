"""Stitching and BatchNorm's re-estimation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dcq_ray.errors import QuantizeError
from dcq_ray.partition import cut, directly_called, quantizable_layers, trace_teacher
from dcq_ray.quantizers import (
    LayerSite,
    activation_starts,
    bake,
    plan_layers,
    put_input_quantizers,
    put_quantizers,
)
from dcq_ray.quantizers.modules import InputQuantizer
from dcq_ray.records import LayerPlan
from dcq_ray.spec import QuantizeSpec
from dcq_ray.stitch import reestimate_batchnorm, stitch

CPU = torch.device("cpu")


def planned(teacher: nn.Module, bits: int) -> tuple[tuple[nn.Module, ...], tuple[LayerPlan, ...]]:
    sections = cut(trace_teacher(teacher, torch.zeros(2, 1, 16, 16)), ["relu", "relu_2"])
    layers = [
        LayerSite(name=name, module=module) for section in sections for name, module in quantizable_layers(section)
    ]
    spec = QuantizeSpec.model_validate(
        {"weights": {"bits": min(bits, 8)}, "first_last_bits": None if bits < 32 else 32}
    )
    plans = plan_layers(layers, spec)
    if bits == 32:
        names = {plan.module: {"bits": 32} for plan in plans}
        plans = plan_layers(layers, QuantizeSpec.model_validate({"overrides": names}))
    return sections, plans


def test_32_bits_stitched_equal_the_teacher(tiny_teacher: nn.Module) -> None:
    sections, layers = planned(tiny_teacher, 32)
    student = stitch(tiny_teacher, layers, [section.state_dict() for section in sections])
    images = torch.randn(5, 1, 16, 16)
    assert torch.equal(student(images), tiny_teacher(images))
    assert type(student) is type(tiny_teacher)
    assert list(student.state_dict()) == list(tiny_teacher.state_dict())


def test_stitched_equals_the_sections_one_after_the_other(tiny_teacher: nn.Module) -> None:
    before = {name: value.clone() for name, value in tiny_teacher.state_dict().items()}
    sections, layers = planned(tiny_teacher, 1)
    for section in sections:
        put_quantizers(section, layers)
        for parameter in section.parameters():
            parameter.add_(0.01)
    student = stitch(tiny_teacher, layers, [section.state_dict() for section in sections])
    images = torch.randn(5, 1, 16, 16)
    value = images
    for section in sections:
        value = section(value)
    assert torch.equal(student(images), value)
    assert all(torch.equal(before[name], value) for name, value in tiny_teacher.state_dict().items())


class ChecksItsInput(nn.Module):
    """torch.fx cannot trace the check, so the sections' graphs come from torch.export."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise ValueError("expected grey images")
        result: Tensor = self.network(x)
        return result


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("scheme", ["dorefa", "pact", "lsq"])
def test_stitching_neither_adds_nor_loses_an_activation_quantizer(
    tiny_teacher: nn.Module, scheme: str, exported: bool
) -> None:
    teacher = ChecksItsInput(tiny_teacher).eval() if exported else tiny_teacher
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    traced = trace_teacher(teacher, images)
    cuts = [traced.cut_points[index].name for index in (2, 4)]
    sections = cut(traced, cuts)
    sites = [
        LayerSite(name=name, module=teacher.get_submodule(name), called=name in directly_called(section))
        for section in sections
        for name, _ in quantizable_layers(section)
    ]
    spec = {"weights": {"bits": 2}, "activations": {"scheme": scheme, "bits": 3}, "first_last_bits": None}
    layers = plan_layers(sites, QuantizeSpec.model_validate(spec))
    assert [layer.activation_bits for layer in layers] == [3] * 6
    value, calls = images, []
    for section in sections:
        put_quantizers(section, layers, activation_starts(section, layers, [value]))
        for parameter in section.parameters():
            parameter.requires_grad_(False).add_(0.01)
        for name, part in section.named_modules():
            if isinstance(part, InputQuantizer):
                part.register_forward_hook(lambda *_, name=name: calls.append(name))
        value = section(value)
    assert sorted(calls) == sorted(f"{layer.module}.dcq_input" for layer in layers)
    student = stitch(teacher, layers, [section.state_dict() for section in sections])
    assert torch.equal(student(images), value)
    extra = bake(student)
    assert torch.equal(student(images), value)
    fresh = copy.deepcopy(teacher)
    fresh.load_state_dict(student.state_dict())
    put_input_quantizers(fresh, extra)
    assert torch.equal(fresh(images), value)
    assert not torch.equal(teacher(images), value)


def test_a_layer_that_no_section_has_trained_is_refused(tiny_teacher: nn.Module) -> None:
    sections, layers = planned(tiny_teacher, 2)
    for section in sections:
        put_quantizers(section, layers)
    states = [section.state_dict() for section in sections]
    with pytest.raises(QuantizeError, match=r"no section has conv2\..* got 2 sections"):
        stitch(tiny_teacher, layers, states[:2])


def test_foreign_misshapen_and_contradicting_tensors_are_refused(tiny_teacher: nn.Module) -> None:
    _, layers = planned(tiny_teacher, 32)
    weight = tiny_teacher.state_dict()["fc2.weight"]
    with pytest.raises(QuantizeError, match="nowhere"):
        stitch(tiny_teacher, layers, [{"nowhere": torch.ones(1)}])
    with pytest.raises(QuantizeError, match="has shape"):
        stitch(tiny_teacher, layers, [{"fc2.weight": torch.ones(1)}])
    with pytest.raises(QuantizeError, match="sections 0 and 1"):
        stitch(tiny_teacher, layers, [{"fc2.weight": weight}, {"fc2.weight": weight + 1}])


def test_batchnorm_statistics_by_hand() -> None:
    module = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5)).eval()
    weights = {name: value.clone() for name, value in module.named_parameters()}
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]]), torch.tensor([[100.0]])]
    reestimate_batchnorm(module, batches, CPU)
    # means 2 and 7; unbiased variances 2 and 8; the batch of one has none
    assert module[0].running_mean.item() == pytest.approx(4.5)
    assert module[0].running_var.item() == pytest.approx(5.0)
    assert module[0].momentum == 0.1
    assert not module.training
    assert all(torch.equal(weights[name], value) for name, value in module.named_parameters())


def test_reestimation_on_the_teachers_own_data_does_not_depend_on_earlier_statistics(tiny_teacher: nn.Module) -> None:
    batches = list(torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1)).split(16))
    reestimate_batchnorm(tiny_teacher, batches, CPU)
    first = tiny_teacher.bn1.running_mean.clone()
    tiny_teacher.bn1.running_mean.fill_(7)
    reestimate_batchnorm(tiny_teacher, batches, CPU)
    assert torch.equal(tiny_teacher.bn1.running_mean, first)


def test_without_batchnorm_nothing_runs() -> None:
    def never() -> object:
        raise AssertionError("no batch is needed")
        yield

    reestimate_batchnorm(nn.Linear(2, 2), never(), CPU)  # type: ignore[arg-type]
