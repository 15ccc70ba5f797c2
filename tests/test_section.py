"""The training loop: schedules by hand, laws of the loop, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from dcq_ray.errors import SectionTrainingError
from dcq_ray.losses import nmse
from dcq_ray.section import TrainingResult, TrainingState, rate_factor, train_module
from dcq_ray.spec import OptimizerSpec

CPU = torch.device("cpu")


def test_schedules_by_hand() -> None:
    assert [rate_factor("cosine", step, 4) for step in (0, 2)] == pytest.approx([1.0, 0.5])
    assert [rate_factor("step", step, 8) for step in (0, 3, 4, 5, 6, 7)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rate_factor("constant", 7, 8) == 1


def test_a_warmed_up_rate_rises_in_equal_parts_and_leaves_the_rest_to_the_schedule() -> None:
    assert [rate_factor("constant", step, 8, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    # After 4 of 8 steps the cosine has 4 of its own.
    assert [rate_factor("cosine", step, 8, 4) for step in (3, 4, 6)] == pytest.approx([1, 1, 0.5])
    assert [rate_factor("step", step, 8, 4) for step in (4, 5, 6, 7)] == [1, 1, 0.1, 0.01]
    assert rate_factor("cosine", 7, 8, 16) == 0.5


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 6, generator=generator)
    targets = inputs @ torch.randn(6, 3, generator=generator)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3)), inputs, targets


def train(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    start: TrainingState | None = None,
    states: list[TrainingState] | None = None,
    asked: list[int] | None = None,
    **settings: object,
) -> TrainingResult:
    """`states` collects the state after every step, `asked` the epochs whose batches were asked for."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if asked is not None:
            asked.append(epoch)
        # Epochs differ, so that a wrong one is noticed.
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
        return zip(inputs[order].split(16), targets[order].split(16), strict=True)

    return train_module(
        module,
        batches,
        settings=OptimizerSpec.model_validate({"epochs": 20, "lr": 0.02, **settings}),
        steps_per_epoch=4,
        loss=nmse,
        device=CPU,
        what="section 3",
        start=start,
        on_state=None if states is None else states.append,
        state_due=lambda: True,
    )


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


def one_weight(weight: float = 1.0) -> nn.Linear:
    """x -> weight * x + 2."""
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(weight)
        module.bias.fill_(2.0)
    return module


def train_one_weight(module: nn.Module, *, factor: float, warmup_steps: int = 0, **settings: object) -> None:
    """Four steps whose loss is `factor` times the output for the input 1, so every gradient is `factor`."""
    one = torch.ones(1, 1)
    train_module(
        module,
        lambda _: [(one, one)] * 4,
        settings=OptimizerSpec.model_validate(
            {"epochs": 1, "optimizer": "sgd", "lr": 0.1, "momentum": 0, "schedule": "constant", **settings}
        ),
        steps_per_epoch=4,
        loss=lambda output, _: factor * output.sum(),
        device=CPU,
        what="one weight",
        warmup_steps=warmup_steps,
    )


def test_a_warmed_up_training_takes_smaller_steps_first() -> None:
    module = one_weight()
    train_one_weight(module, factor=1.0, warmup_steps=2)
    # 1 - 0.1 * (1/2 + 1 + 1 + 1)
    assert module.weight.item() == pytest.approx(0.65)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_decay_shrinks_weights_but_neither_biases_nor_batchnorm(optimizer: str) -> None:
    module = nn.Sequential(one_weight(), nn.BatchNorm1d(1))
    before = copy.deepcopy(module.state_dict())
    one = torch.ones(2, 1)
    train_module(
        module,
        lambda _: [(one, one)],
        settings=OptimizerSpec.model_validate(
            {"epochs": 1, "optimizer": optimizer, "lr": 0.1, "weight_decay": 0.5, "schedule": "constant"}
        ),
        steps_per_epoch=1,
        # No gradient but that of the decay.
        loss=lambda output, _: 0.0 * output.sum(),
        device=CPU,
        what="decay",
    )
    after = module.state_dict()
    # SGD: 1 - 0.1 * 0.5 * 1; Adam's first step is the rate itself, in the direction of the gradient.
    assert after["0.weight"].item() == pytest.approx(0.95 if optimizer == "sgd" else 0.9, abs=1e-6)
    assert all(torch.equal(after[name], before[name]) for name in ("0.bias", "1.weight", "1.bias"))


# -- states ------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "weight_decay": 1e-3},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
}


def told(result: TrainingResult) -> dict[str, object]:
    """All of a result but its seconds."""
    return {field.name: getattr(result, field.name) for field in fields(result) if not field.name.endswith("seconds")}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_training_goes_on_from_every_state_to_the_same_end(settings: dict[str, object]) -> None:
    module, inputs, targets = problem()
    states: list[TrainingState] = []
    undisturbed = train(module, inputs, targets, epochs=3, states=states, **settings)
    assert [state.num_steps for state in states] == list(range(1, 13))
    for state in states:
        again, _, _ = problem(seed=9)  # whatever it was before
        asked: list[int] = []
        result = train(again, inputs, targets, epochs=3, start=state, asked=asked, **settings)
        assert told(result) == told(undisturbed)
        assert asked == list(range(state.num_steps // 4, 3))
        ours, theirs = module.state_dict(), again.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_training_with_states_is_the_one_without() -> None:
    modules = []
    for states in (None, []):
        module, inputs, targets = problem()
        train(module, inputs, targets, epochs=2, states=states)
        modules.append(module.state_dict())
    assert all(torch.equal(modules[0][name], modules[1][name]) for name in modules[0])


def test_a_state_comes_after_every_epoch_and_after_its_evaluation() -> None:
    module, inputs, targets = problem()
    events: list[object] = []
    train_module(
        module,
        lambda _: zip(inputs.split(16), targets.split(16), strict=True),
        settings=OptimizerSpec(epochs=2),
        steps_per_epoch=4,
        loss=nmse,
        device=CPU,
        what="section 3",
        after_epoch=lambda epoch: events.append(("epoch", epoch)),
        on_state=lambda state: events.append(("state", state.num_steps)),
    )
    assert events == [("epoch", 0), ("state", 4), ("epoch", 1), ("state", 8)]


def test_a_state_holds_the_optimizers_tensors_by_the_parameters_names() -> None:
    # Every gradient is 1, so the buffer of momentum 0.5 is 1, 1.5, 1.75, 1.875 after the four steps.
    one, states = torch.ones(1, 1), list[TrainingState]()
    train_module(
        one_weight(),
        lambda _: [(one, one)] * 4,
        settings=OptimizerSpec(epochs=1, optimizer="sgd", momentum=0.5),
        steps_per_epoch=4,
        loss=lambda output, _: output.sum(),
        device=CPU,
        what="one weight",
        on_state=states.append,
        state_due=lambda: True,
    )
    assert [state.optimizer["momentum_buffer.weight"].item() for state in states] == [1, 1.5, 1.75, 1.875]
    assert set(states[0].optimizer) == {"momentum_buffer.weight", "momentum_buffer.bias"}
    assert [len(state.losses) for state in states] == [1, 2, 3, 4]
    assert states[-1].num_sample_passes == 4


def test_a_foreign_state_is_refused() -> None:
    module, inputs, targets = problem()
    states: list[TrainingState] = []
    train(module, inputs, targets, epochs=1, states=states)
    other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"section 3: .* not of this module: 3\.bias, 3\.weight differ"):
        train(other, inputs, targets, start=states[-1])
    with pytest.raises(ValueError, match="got a state after 4 steps with 3 losses"):
        train(module, inputs, targets, start=replace(states[-1], losses=states[-1].losses[:3]))
    with pytest.raises(ValueError, match=r"after 90 steps .* at most 80"):
        train(module, inputs, targets, start=replace(states[-1], num_steps=90, losses=(0.5,) * 90))
