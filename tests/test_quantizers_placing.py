"""Quantizers on networks: from training through stitching, baking and a file to what is shipped, the same to the bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcq_ray.errors import QuantizeError
from dcq_ray.losses import nmse
from dcq_ray.quantizers import (
    ActivationStart,
    LayerSite,
    activation_starts,
    bake,
    packed_num_bytes,
    plan_layers,
    put_input_quantizers,
    put_quantizers,
)
from dcq_ray.quantizers.policy import channel_dim
from dcq_ray.records import LayerPlan
from dcq_ray.section import train_module
from dcq_ray.spec import WEIGHT_SCHEME_BITS, OptimizerSpec, QuantizeSpec
from dcq_ray.stitch import stitch
from dcq_ray.teacher import load_state, state_bytes, state_from_bytes

CPU = torch.device("cpu")
BITS = (1, 2, 3, 4, 8)
WEIGHT_SCHEMES = [(scheme, bits) for scheme, allowed in WEIGHT_SCHEME_BITS.items() for bits in BITS if bits in allowed]
ACTIVATIONS = [None, *[(scheme, bits) for scheme in ("dorefa", "pact", "lsq") for bits in BITS]]
LAYERS = {
    "Conv1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
    "Conv2d grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "Conv2d depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "Linear": lambda: nn.Linear(4, 4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "ConvTranspose2d grouped": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
}
SHAPES = {"Conv1d": (4, 6), "Linear": (4,)}
NORMS = {"Conv1d": nn.BatchNorm1d, "Linear": nn.BatchNorm1d}


def teacher_of(kind: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = NORMS.get(kind, nn.BatchNorm2d)(4)
    return nn.Sequential(LAYERS[kind](), norm, nn.ReLU(), LAYERS[kind]()).eval().requires_grad_(False)


def images_of(kind: str, count: int, seed: int) -> Tensor:
    return torch.randn(count, *SHAPES.get(kind, (4, 5, 5)), generator=torch.Generator().manual_seed(seed))


def plans_of(module: nn.Module, **spec: object) -> tuple[LayerPlan, ...]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    sites = [LayerSite(name=name, module=part) for name, part in module.named_modules() if isinstance(part, kinds)]
    return plan_layers(sites, QuantizeSpec.model_validate({"first_last_bits": None, **spec}))


def integers_of(scheme: str, bits: int) -> list[int]:
    high = 2 ** (bits - 1) - 1
    if scheme == "dorefa" and bits > 1:
        return list(range(1 - 2**bits, 2**bits, 2))
    return {
        "dorefa": [-1, 1],
        "xnor": [-1, 1],
        "twn": [-1, 0, 1],
        "ttq": [-1, 0, 1],
        "wrpn": list(range(-high, high + 1)),
    }.get(scheme, list(range(-high - 1, high + 1)))


def from_integers(weight: Tensor, layer: LayerPlan, scale: Tensor) -> Tensor:
    """The weight made again, of the nearest integers of its scheme and the scales of its file alone."""
    allowed = torch.tensor(integers_of(layer.scheme, layer.bits), dtype=torch.float32)
    if layer.scheme == "ttq":
        scale = torch.where(weight > 0, scale[0], scale[1])
    elif scale.ndim:
        scale = scale.reshape([-1 if dim == channel_dim(layer.kind) else 1 for dim in range(weight.ndim)])
    integers = allowed[(weight / scale).unsqueeze(-1).sub(allowed).abs().argmin(dim=-1)]
    return integers * scale


@pytest.mark.parametrize(("scheme", "bits"), WEIGHT_SCHEMES)
@settings(deadline=None, max_examples=18, derandomize=True)
@given(
    kind=st.sampled_from(list(LAYERS)),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
    optimizer=st.sampled_from(["adam", "sgd"]),
)
def test_a_student_is_the_same_to_the_bit_in_all_its_forms(
    scheme: str, bits: int, kind: str, activation: tuple[str, int] | None, seed: int, optimizer: str
) -> None:
    teacher = teacher_of(kind, seed)
    activations = None if activation is None else {"scheme": activation[0], "bits": activation[1]}
    layers = plans_of(teacher, weights={"scheme": scheme, "bits": bits}, activations=activations)
    images = images_of(kind, 8, seed)
    targets = teacher(images)

    student = copy.deepcopy(teacher)
    put_quantizers(student, layers, activation_starts(teacher, layers, [images]))

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield images[:4].clone(), targets[:4]
        yield images[4:].clone(), targets[4:]

    train_module(
        student,
        batches,
        settings=OptimizerSpec(epochs=1, lr=0.01, optimizer=optimizer, schedule="constant"),
        steps_per_epoch=2,
        loss=nmse,
        device=CPU,
        what="section 0",
    )
    expected = student(images)

    stitched = stitch(teacher, layers, [student.state_dict()])
    assert torch.equal(stitched(images), expected)

    extra = bake(stitched)
    assert torch.equal(stitched(images), expected)

    written = state_from_bytes(state_bytes({**stitched.state_dict(), **extra}, {}), source="student")
    plain = {name: tensor for name, tensor in written.items() if not name.startswith("dcq.")}
    assert plain.keys() == teacher.state_dict().keys()
    shipped = copy.deepcopy(teacher)
    load_state(shipped, plain, source="student")
    put_input_quantizers(shipped, written)
    assert torch.equal(shipped(images), expected)

    for layer in layers:
        weight, scale = plain[f"{layer.module}.weight"], written[f"dcq.{layer.module}.scale"]
        assert written[f"dcq.{layer.module}.bits"] == bits
        assert scale.dtype == torch.float32
        assert torch.equal(from_integers(weight, layer, scale), weight)
        rows = (
            weight.transpose(0, channel_dim(layer.kind)).flatten(1) if scheme in ("xnor", "lsq-channel") else [weight]
        )
        assert all(len(row.unique()) <= len(integers_of(scheme, bits)) <= 2**bits for row in rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("scheme", "bits"), [("dorefa", 1), ("dorefa", 4), ("xnor", 1), ("lsq-channel", 4), ("ttq", 2)]
)
@pytest.mark.parametrize("activation", ["dorefa", "pact", "lsq"])
def test_a_network_of_another_dtype_keeps_it_and_is_baked_to_the_bit(
    dtype: torch.dtype, scheme: str, bits: int, activation: str
) -> None:
    teacher = teacher_of("Conv2d", 0).to(dtype)
    images = images_of("Conv2d", 4, 0).to(dtype)
    layers = plans_of(teacher, weights={"scheme": scheme, "bits": bits}, activations={"scheme": activation, "bits": 4})
    put_quantizers(teacher, layers, activation_starts(teacher, layers, [images]))
    expected = teacher(images)
    assert expected.dtype == dtype
    bake(teacher)
    assert torch.equal(teacher(images), expected)
    assert {tensor.dtype for name, tensor in teacher.state_dict().items() if name.endswith("weight")} == {dtype}


def test_inputs_are_quantized_as_a_layer_is_called() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))
    layers = plans_of(module, overrides={"0": {"bits": 32}}, activations={"scheme": "dorefa", "bits": 2})
    put_quantizers(module, layers, {"0": ActivationStart(clip=3.0)})
    # step 1: 0.6 to 1, -5 to 0, 1.5 to the even 2, 9 to 3
    found = module(torch.tensor([[0.6, -5.0], [1.5, 9.0]]))
    assert torch.equal(found, torch.tensor([[1.0, 0.0], [2.0, 3.0]]))


def test_starts_come_from_what_each_layer_sees() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        module[0].weight.fill_(10.0)
    layers = plans_of(module, activations={"scheme": "pact", "bits": 1})
    starts = activation_starts(module, layers, [torch.tensor([[1.0], [-2.0]]), torch.tensor([[3.0], [-4.0]])])
    # One bit with a sign: the mean of 1, 2, 3, 4. After times 10 and ReLU, without: that of 10 and 30, or 30 alone: with 20
    # the error is 100 + 100, with 30 it is 100.
    assert starts["0"].signed
    assert starts["0"].clip == pytest.approx(2.5)
    assert starts["2"] == ActivationStart(clip=pytest.approx(30.0), signed=False)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 1000), bits=st.sampled_from(BITS))
def test_starts_do_not_depend_on_the_order_of_batches(seed: int, bits: int) -> None:
    teacher = teacher_of("Conv2d", seed)
    layers = plans_of(teacher, activations={"scheme": "lsq", "bits": bits})
    batches = list(images_of("Conv2d", 32, seed).split(8))
    starts = activation_starts(teacher, layers, batches)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
    assert activation_starts(teacher, layers, [batches[index] for index in order]) == starts
    assert starts.keys() == {"0", "3"}


def test_without_activation_quantizers_nothing_runs() -> None:
    teacher = teacher_of("Linear", 0)

    def batches() -> Iterator[Tensor]:
        raise AssertionError("no batch is needed")
        yield

    assert activation_starts(teacher, plans_of(teacher), batches()) == {}


def test_tied_layers_share_one_quantizer_and_are_baked_alike() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    module[2].weight = module[0].weight
    put_quantizers(module, plans_of(module, weights={"scheme": "lsq", "bits": 2}))
    assert module[0].parametrizations["weight"][0] is module[2].parametrizations["weight"][0]
    expected = module(torch.eye(3))
    extra = bake(module)
    assert torch.equal(module(torch.eye(3)), expected)
    assert torch.equal(module[0].weight, module[2].weight)
    assert torch.equal(extra["dcq.0.scale"], extra["dcq.2.scale"])


def test_bake_keeps_names_and_classes() -> None:
    module = teacher_of("Conv2d", 0)
    names = module.state_dict().keys()
    put_quantizers(module, plans_of(module))
    assert module.state_dict().keys() != names
    assert bake(module).keys() == {"dcq.0.bits", "dcq.0.scale", "dcq.3.bits", "dcq.3.scale"}
    assert module.state_dict().keys() == names
    assert type(module[0]) is nn.Conv2d
    assert isinstance(module[0].weight, nn.Parameter)


def test_32_bits_leave_a_module_alone() -> None:
    module = teacher_of("Conv2d", 0)
    before = copy.deepcopy(module.state_dict())
    put_quantizers(module, plans_of(module, overrides={"*": {"bits": 32}}))
    assert bake(module) == {}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_layers_of_other_sections_are_passed_over() -> None:
    teacher = teacher_of("Conv2d", 0)
    layers = plans_of(teacher)
    first = nn.Sequential(teacher[0])
    put_quantizers(first, layers)
    assert bake(first).keys() == {"dcq.0.bits", "dcq.0.scale"}


def test_a_foreign_or_incomplete_file_is_refused() -> None:
    bits = torch.tensor(4, dtype=torch.uint8)
    with pytest.raises(QuantizeError, match="names a layer that its network lacks"):
        put_input_quantizers(teacher_of("Linear", 0), {"dcq.7.input_bits": bits})
    with pytest.raises(QuantizeError, match="incomplete"):
        put_input_quantizers(teacher_of("Linear", 0), {"dcq.0.input_bits": bits, "dcq.0.input_step": torch.ones(())})


def test_packed_bytes_by_hand() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    layers = plans_of(module, weights={"bits": 2}, activations={"scheme": "pact", "bits": 4})
    put_quantizers(module, layers)
    extra = bake(module)
    # 9 weights of 2 bits in 3 bytes, a scale of 4, a bias of 12, a step of 4 for the input
    assert packed_num_bytes({**module.state_dict(), **extra}, layers) == 23


def test_an_input_that_is_not_finite_is_refused_by_the_layers_name() -> None:
    teacher = teacher_of("Linear", 0)
    layers = plans_of(teacher, activations={"scheme": "lsq", "bits": 4})
    with pytest.raises(QuantizeError, match=r"^layer 0: .*not finite"):
        activation_starts(teacher, layers, [torch.full((2, 4), float("inf"))])
