"""The training loop: losses by hand, laws of the loop, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dcq_ray.errors import SectionTrainingError
from dcq_ray.section import (
    TrainingResult,
    cross_entropy,
    distillation,
    loss_function,
    mse,
    nmse,
    rate_factor,
    train_module,
)
from dcq_ray.spec import OptimizerSpec

CPU = torch.device("cpu")


def test_losses_by_hand() -> None:
    output, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert nmse(output, target) == pytest.approx(8 / 25)
    assert mse(output, target) == pytest.approx(4)
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([2])) == pytest.approx(math.log(4))
    # student (1/2, 1/2), teacher (3/4, 1/4) at temperature 1
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(1.0)(torch.zeros(1, 2), teacher) == pytest.approx(expected, rel=1e-5)
    assert distillation(2.0)(teacher, teacher) == pytest.approx(0, abs=1e-6)


def test_losses_never_broadcast() -> None:
    for name in ("nmse", "mse", "distillation"):
        with pytest.raises(ValueError, match="shape"):
            loss_function(name, temperature=1.0)(torch.zeros(4, 1), torch.zeros(4))


def test_nmse_of_a_zero_target_is_finite_where_the_output_is_zero_too() -> None:
    assert nmse(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def test_schedules_by_hand() -> None:
    assert [rate_factor("cosine", step, 4) for step in (0, 2)] == pytest.approx([1.0, 0.5])
    assert [rate_factor("step", step, 8) for step in (0, 3, 4, 5, 6, 7)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rate_factor("constant", 7, 8) == 1


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 6, generator=generator)
    targets = inputs @ torch.randn(6, 3, generator=generator)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3)), inputs, targets


def train(module: nn.Module, inputs: Tensor, targets: Tensor, **settings: object) -> TrainingResult:
    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(inputs.split(16), targets.split(16), strict=True)

    spec = OptimizerSpec.model_validate({"epochs": 20, "lr": 0.02, **settings})
    return train_module(module, batches, settings=spec, steps_per_epoch=4, loss=nmse, device=CPU, what="section 3")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_learns_and_tells(optimizer: str) -> None:
    module, inputs, targets = problem()
    result = train(module, inputs, targets, optimizer=optimizer)
    assert result.initial_loss is not None
    assert result.final_loss is not None
    assert result.final_loss < 0.3 * result.initial_loss
    assert (result.num_steps, result.num_sample_passes) == (80, 20 * 64)
    assert result.loss_curve[-1].step == 80
    assert len(result.loss_curve) <= 200
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_same_batches_give_the_same_weights_whatever_the_global_randomness() -> None:
    states = []
    for seed in (1, 2):
        module, inputs, targets = problem()
        torch.manual_seed(seed)
        train(module, inputs, targets)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_batchnorm_learns_statistics_and_dropout_stays_off() -> None:
    module, inputs, targets = problem()
    before = module[1].running_mean.clone()
    seen: list[bool] = []
    module[2].register_forward_hook(lambda part, _, __: seen.append(part.training))
    train(module, inputs, targets, epochs=1)
    assert not torch.equal(module[1].running_mean, before)
    assert seen == [False] * 4


def test_loss_that_is_not_finite_names_the_section_and_the_rate() -> None:
    module, inputs, targets = problem()
    with pytest.raises(SectionTrainingError, match=r"section 3: the loss is .* lower the learning rate \(now 1e\+30\)"):
        train(module, inputs, targets, lr=1e30, optimizer="sgd", schedule="constant")


def test_no_epochs_and_no_parameters_take_no_step() -> None:
    module, inputs, targets = problem()
    result = train(module, inputs, targets, epochs=0)
    assert (result.num_steps, result.initial_loss, result.final_loss, result.loss_curve) == (0, None, None, ())
    assert train(nn.ReLU(), inputs, inputs).num_steps == 0


def test_a_wrong_number_of_batches_is_an_error() -> None:
    module, inputs, targets = problem()
    with pytest.raises(ValueError, match="expected 4"):
        train(module, inputs[:32], targets[:32])
