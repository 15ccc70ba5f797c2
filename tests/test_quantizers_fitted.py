"""Fitted starts: they give what the teacher gives better than the nearest levels do, and change nothing but latents and biases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn.utils import parametrize

from dcq_ray.quantizers import ActivationStart, fit_weights, put_quantizers
from dcq_ray.quantizers.fitted import _shrunk
from dcq_ray.records import LayerPlan


def layer_plan(module: str, kind: str = "Conv2d", scheme: str = "dorefa", bits: int = 1, **more: object) -> LayerPlan:
    return LayerPlan(module=module, kind=kind, num_weights=1, scheme=scheme, bits=bits, **more)  # type: ignore[arg-type]


def network(seed: int = 0) -> GraphModule:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
    )
    for number in range(20):
        module.train()(images(100 + number, 16))
    return symbolic_trace(module.eval().requires_grad_(False))


def images(seed: int, count: int = 64) -> Tensor:
    # Blurred: of white noise the signs of the weights are the best already.
    noise = torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return 3 * nn.functional.avg_pool2d(noise, 3, stride=1)


LAYERS = [layer_plan("0"), layer_plan("3"), layer_plan("6", "Linear")]


def student_of(teacher: GraphModule, layers: list[LayerPlan]) -> GraphModule:
    student = copy.deepcopy(teacher)
    put_quantizers(student, layers)
    return student


def with_batch_statistics(student: nn.Module, batch: Tensor) -> Tensor:
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    output: Tensor = student(batch)
    student.eval()
    return output


@pytest.mark.parametrize(
    ("scheme", "bits"), [("dorefa", 1), ("xnor", 1), ("twn", 2), ("ttq", 2), ("dorefa", 2), ("lsq", 2), ("wrpn", 3)]
)
def test_a_fitted_student_gives_more_nearly_what_the_teacher_gives_on_other_images(scheme: str, bits: int) -> None:
    layers = [layer_plan(layer.module, layer.kind, scheme, bits) for layer in LAYERS]
    teacher = network()
    nearest, fitted = student_of(teacher, layers), student_of(teacher, layers)
    batches = [images(seed) for seed in range(1, 5)]
    fits = fit_weights(fitted, teacher, [(batch, batch) for batch in batches], seed=0)
    assert [fit.module for fit in fits] == ["0", "3", "6"]
    assert all(0 <= fit.error_after < fit.error_before for fit in fits)
    unseen = images(9)

    def error(student: nn.Module) -> float:
        return (with_batch_statistics(student, unseen) - teacher(unseen)).square().mean().item()

    assert error(fitted) < 0.8 * error(nearest)
    # The last layer has a bias, which makes the mean of its outputs right with the very weights that it has.
    on_fitted = torch.cat([with_batch_statistics(fitted, batch) for batch in batches])
    wanted = torch.cat([teacher(batch) for batch in batches])
    assert (on_fitted.mean(0) - wanted.mean(0)).abs().max() < 0.02 * wanted.std()


def test_all_but_latents_and_biases_stays_and_the_same_images_give_the_same() -> None:
    teacher = network()
    first, second = student_of(teacher, LAYERS), student_of(teacher, LAYERS)
    before = copy.deepcopy(first.state_dict())
    teacher_before = copy.deepcopy(teacher.state_dict())
    for student in (first, second):
        fit_weights(student, teacher, [(images(1), images(1)), (images(2), images(2))], seed=3)
    for name, value in first.state_dict().items():
        assert value.equal(second.state_dict()[name])
        changes = name.endswith((".weight.original", "3.bias", "6.bias"))
        assert changes != value.equal(before[name]), name
    assert all(value.equal(teacher_before[name]) for name, value in teacher.state_dict().items())
    assert not first.get_submodule("1").training


def test_what_is_not_plain_or_has_many_bits_or_is_not_quantized_is_left_alone() -> None:
    teacher = network()
    student = student_of(teacher, [layer_plan("0", bits=8), layer_plan("3", scheme="xnor")])
    before = copy.deepcopy(student.state_dict())
    fits = fit_weights(student, teacher, [(images(1), images(1))], seed=0)
    assert [fit.module for fit in fits] == ["3"]
    assert student.state_dict()["0.parametrizations.weight.original"].equal(
        before["0.parametrizations.weight.original"]
    )
    assert student.state_dict()["6.weight"].equal(before["6.weight"])


def test_a_layer_of_too_many_weights_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # conv: 8 x 3 x 3 x 3 = 216 weights, grouped conv 8 x 4 x 3 x 3 = 288, linear 12 x 128.
    monkeypatch.setattr("dcq_ray.quantizers.fitted.MAX_FITTED_WEIGHTS", 216)
    teacher = network()
    student = student_of(teacher, LAYERS)
    assert [fit.module for fit in fit_weights(student, teacher, [(images(1), images(1))], seed=0)] == ["0"]


def test_the_inputs_are_those_that_the_students_input_quantizer_lets_through() -> None:
    torch.manual_seed(0)
    teacher = symbolic_trace(nn.Sequential(nn.Linear(6, 4)).eval().requires_grad_(False))
    # An input quantizer that makes every input 0 leaves nothing to fit on.
    student = copy.deepcopy(teacher)
    plan = layer_plan("0", "Linear", activation_scheme="dorefa", activation_bits=4)
    put_quantizers(student, [plan], {"0": ActivationStart(clip=1e-6, signed=False)})
    before = student.state_dict()["0.parametrizations.weight.original"].clone()
    values = -torch.rand(32, 6)
    fit_weights(student, teacher, [(values, values)], seed=0)
    assert student.state_dict()["0.parametrizations.weight.original"].equal(before)
    # What the outputs' mean lacks is still made good by the bias.
    assert (student(values).mean(0) - teacher(values).mean(0)).abs().max() < 1e-5


def test_the_students_inputs_may_be_others_than_the_teachers() -> None:
    torch.manual_seed(0)
    teacher = symbolic_trace(nn.Sequential(nn.Linear(8, 4)).eval().requires_grad_(False))
    ours, theirs = torch.randn(256, 8), torch.randn(256, 8)
    # What the student gets is the teacher's input turned around: its weights must turn around, too.
    student = student_of(teacher, [layer_plan("0", "Linear")])
    signs = student.get_submodule("0").weight.sign().clone()  # type: ignore[operator, union-attr]
    fit_weights(student, teacher, [(-theirs, theirs)], seed=0)
    turned = student.get_submodule("0").weight.sign()  # type: ignore[operator, union-attr]
    assert (turned == -signs).float().mean() > 0.8
    # And of inputs that have nothing to do with it, nothing is to be had.
    other = student_of(teacher, [layer_plan("0", "Linear")])
    fit = fit_weights(other, teacher, [(ours, theirs)], seed=0)[0]
    assert fit.error_after > 0.8


def test_a_metric_puts_the_errors_where_they_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher = symbolic_trace(nn.Sequential(nn.Linear(12, 8)).eval().requires_grad_(False))
    values = torch.randn(512, 12) @ torch.randn(12, 12)
    # One direction of the outputs counts a hundred times as much as the others.
    direction = torch.randn(8)
    metrics = {"0": 100 * torch.outer(direction, direction) + torch.eye(8), "absent": torch.eye(3)}

    def weight_and_cost(metrics: dict[str, Tensor] | None) -> tuple[Tensor, float]:
        student = student_of(teacher, [layer_plan("0", "Linear")])
        fit_weights(student, teacher, [(values, values)], seed=0, metrics=metrics)
        weight: Tensor = student.get_submodule("0").weight.detach()  # type: ignore[operator, union-attr, assignment]
        return weight, float(((student(values) - teacher(values)) @ direction).square().mean())

    (alone, cost_alone), (together, cost_together) = weight_and_cost(None), weight_and_cost(metrics)
    assert cost_together < 0.5 * cost_alone
    assert weight_and_cost({"0": torch.eye(8)})[0].equal(alone)
    monkeypatch.setattr("dcq_ray.quantizers.fitted.MAX_COUPLED_WEIGHTS", 95)
    assert weight_and_cost(metrics)[0].equal(alone)
    assert not together.equal(alone)


def test_a_tied_layer_is_fitted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(5, 5, bias=False) for _ in range(2))
            self.second.weight = self.first.weight

        def forward(self, value: Tensor) -> Tensor:
            result: Tensor = self.second(torch.relu(self.first(value)))
            return result

    torch.manual_seed(0)
    teacher = symbolic_trace(Tied().eval().requires_grad_(False))
    student = copy.deepcopy(teacher)
    put_quantizers(student, [layer_plan(name, "Linear") for name in ("first", "second")])
    values = torch.randn(64, 5)
    assert [fit.module for fit in fit_weights(student, teacher, [(values, values)], seed=0)] == ["first"]
    assert parametrize.is_parametrized(student.get_submodule("second"), "weight")


def test_few_images_leave_the_nearest_levels_where_they_say_nothing() -> None:
    # Two samples of a hundred inputs: by themselves they would let all the weights but a few turn at will.
    inputs = torch.randn(2, 100)
    weights = torch.randn(4, 100)
    square, cross = (inputs.t() @ inputs)[None] / 2, weights @ (inputs.t() @ inputs) / 2
    shrunk_square, shrunk_cross = _shrunk(square, cross, weights, num_samples=2)
    share = 10 / 12
    assert torch.allclose(shrunk_square.diagonal(dim1=1, dim2=2), square.diagonal(dim1=1, dim2=2))
    off = ~torch.eye(100, dtype=torch.bool)
    assert torch.allclose(shrunk_square[0][off], (1 - share) * square[0][off], atol=1e-6)
    # At the teacher's weights the error is least, before and after: they are what is wanted.
    for moments, crosses in ((square, cross), (shrunk_square, shrunk_cross)):
        assert torch.allclose(weights @ moments[0], crosses, atol=1e-4)
