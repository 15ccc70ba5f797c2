"""Structures that users' classifiers have: each is cut everywhere, trained, stitched; or refused with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from dcq_ray.errors import PartitionError
from dcq_ray.jobfile import resolve_job
from dcq_ray.losses import nmse
from dcq_ray.partition import (
    TracedTeacher,
    assert_composition,
    choose_cuts,
    cut,
    describe_section,
    directly_called,
    measure_costs,
    prefix_digests,
    quantizable_layers,
    section_multiply_accumulates,
    trace_teacher,
)
from dcq_ray.phases import run_local
from dcq_ray.quantizers import LayerSite, activation_starts, bake, plan_layers, put_input_quantizers, put_quantizers
from dcq_ray.records import PartitionPlan, from_json
from dcq_ray.section import train_module
from dcq_ray.spec import QuantizeSpec, SectionsSpec, TrainSpec
from dcq_ray.stitch import stitch

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def build(function: Callable[[], nn.Module]) -> nn.Module:
    """A teacher with fixed weights, frozen, in eval mode."""
    torch.manual_seed(0)
    return function().eval().requires_grad_(False)


def cut_everywhere(module: nn.Module, *, front_end: str = "torch.fx", unused: tuple[str, ...] = ()) -> TracedTeacher:
    """Trace a teacher; every legal cut alone, and all at once, must compose bit for bit under the teacher's names."""
    traced = trace_teacher(module, IMAGES)
    assert traced.front_end == front_end
    names = [point.name for point in traced.cut_points]
    assert len(names) == len(set(names))
    for cuts in ([], *([name] for name in names), names):
        sections = cut(traced, cuts)
        for size in (1, 2, 4):
            assert_composition(module, sections, IMAGES[:size])
        keys = {key for section in sections for key in section.state_dict()}
        assert keys == {key for key in module.state_dict() if not key.startswith(unused or ("\0",))}
    return traced


def train_and_stitch(
    module: nn.Module, traced: TracedTeacher, cuts: list[str], *, activation_bits: int = 4
) -> nn.Module:
    """One step per section at 2 bits on the teacher's activations; the stitched student equals its sections."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    sections = cut(traced, cuts)
    sites = [
        LayerSite(name=name, module=module.get_submodule(name), section=index, called=name in directly_called(section))
        for index, section in enumerate(sections)
        for name, _ in quantizable_layers(section)
    ]
    spec = QuantizeSpec.model_validate(
        {"weights": {"bits": 2}, "activations": {"scheme": "lsq", "bits": activation_bits}, "first_last_bits": None}
    )
    layers = plan_layers(sites, spec)
    value = IMAGES
    for index, section in enumerate(sections):
        with torch.no_grad():
            target = section(value.clone())
        put_quantizers(section, layers, activation_starts(section, layers, [value]))
        batch = (value, target)
        result = train_module(
            section,
            lambda _, batch=batch: [batch],  # type: ignore[misc]
            settings=TrainSpec(epochs=1, batch_size=4, lr=1e-3),
            steps_per_epoch=1,
            loss=nmse,
            device=CPU,
            what=f"section {index}",
        )
        assert result.num_steps == (1 if list(section.parameters()) else 0)
        value = target
    student = stitch(module, layers, [section.state_dict() for section in sections])
    assert type(student) is type(module)
    with torch.no_grad():
        expected = student(IMAGES.clone())
        value = IMAGES
        for section in sections:
            value = section(value.clone())
    assert torch.equal(value, expected)
    assert not torch.equal(expected, module(IMAGES.clone()))
    extra = bake(student)
    assert sorted(student.state_dict()) == sorted(module.state_dict())
    shipped = copy.deepcopy(module)
    shipped.load_state_dict(student.state_dict())
    put_input_quantizers(shipped, extra)
    assert torch.equal(shipped(IMAGES.clone()), expected)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    return student


def illegal(traced: TracedTeacher, name: str) -> str:
    """Why there is no cut of that name."""
    with pytest.raises(PartitionError) as caught:
        cut(traced, [name])
    return str(caught.value)


def refusal(module: nn.Module, images: Tensor = IMAGES) -> str:
    """What a teacher that cannot be cut is told."""
    with pytest.raises(PartitionError) as caught:
        trace_teacher(module, images)
    message = str(caught.value)
    assert "\n" not in message
    return message


def names_of(traced: TracedTeacher) -> list[str]:
    return [point.name for point in traced.cut_points]


# -- convolutions ------------------------------------------------------------------------------------------------------


def test_grouped_and_depthwise_convolutions() -> None:
    module = build(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.Flatten(),
            nn.Linear(32, 3),
        )
    )
    traced = cut_everywhere(module)
    assert names_of(traced) == ["0", "1", "2", "3", "4"]
    # 8 x 6x6 outputs of 1x3x3 weights; 8 x 4x4 of 2x3x3; 8 x 2x2 of 1x3x3 and 32 x 3
    assert section_multiply_accumulates(traced, ["0", "2"]) == (288 * 9, 128 * 18, 32 * 9 + 96)
    train_and_stitch(module, traced, ["0", "2"])


def test_transposed_dilated_and_circularly_padded_convolutions() -> None:
    module = build(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(1, 4, 2, stride=2),
            nn.Conv2d(4, 4, 3, dilation=2, padding=2, padding_mode="circular"),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )
    traced = cut_everywhere(module)
    # each of 64 inputs is spread by 4 x 2x2; 4 x 16x16 outputs of 4x3x3; 16 x 3
    assert section_multiply_accumulates(traced, ["0", "1"]) == (64 * 16, 1024 * 36, 48)
    train_and_stitch(module, traced, ["0", "1"])


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.bn(self.conv(x)), inplace=True)
        gate = functional.adaptive_avg_pool2d(x, 1)
        x = x * torch.sigmoid(self.excite(functional.relu(self.squeeze(gate))))
        return self.head(x.mean((2, 3)))


def test_squeeze_and_excitation_is_cut_before_and_behind_its_gate() -> None:
    module = build(SqueezeExcitation)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["conv", "bn", "silu", "mul", "mean"]
    assert "squeeze is no legal cut, because 2 values are live there: silu and squeeze" in illegal(traced, "squeeze")
    train_and_stitch(module, traced, ["silu", "mul"])


class Joins(nn.Module):
    """add, cat, stack and a gate join what several layers made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.mix = nn.Conv2d(12, 4, 1)
        self.gate = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mix(torch.cat([self.one(x), self.two(x), self.three(x)], dim=1)) + x
        x = torch.stack([x, self.one.bias.view(1, 4, 1, 1) + x, torch.relu(x)]).sum(0)
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        x = torch.sigmoid(self.gate(x)) * x
        return self.head(x)


def test_joins_of_several_inputs_are_cut_behind_the_join() -> None:
    module = build(Joins)
    traced = cut_everywhere(module)
    # one.bias is used in the stack too, so nothing between the two uses is a cut
    assert names_of(traced) == ["stem", "sum_1", "adaptive_avg_pool2d", "flatten", "mul"]
    assert "one.bias is used on both sides" in illegal(traced, "add")
    assert "one is no legal cut, because 2 values are live" in illegal(traced, "one")
    train_and_stitch(module, traced, ["stem", "sum_1", "mul"])


# -- what is shared ----------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(self.first(x.flatten(1))))
        return self.last(torch.relu(self.shared(x)))


def test_a_module_used_twice_stays_in_one_section() -> None:
    module = build(Twice)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["flatten", "first", "shared", "relu_1"]
    assert "shared.weight is used on both sides" in illegal(traced, "relu")
    # 64 x 6, twice 6 x 6, 6 x 3: both calls count
    assert section_multiply_accumulates(traced, ["first", "relu_1"]) == (384, 72, 18)
    student = train_and_stitch(module, traced, ["first", "relu_1"])
    assert len(student.shared.weight.unique()) <= 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 6)
        self.encode, self.between, self.decode = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.relu(self.encode(self.stem(x.flatten(1)))))
        return self.head(self.decode(x))


def test_tied_parameters_stay_in_one_section() -> None:
    module = build(Tied)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["flatten", "stem", "decode"]
    assert "encode.weight is used on both sides" in illegal(traced, "between")
    student = train_and_stitch(module, traced, ["stem", "decode"])
    assert torch.equal(student.encode.weight, student.decode.weight)


# -- attention and recurrence --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Tokens with a learned position, a class token, nn.MultiheadAttention and nn.TransformerEncoderLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(batch, -1, -1), x], dim=1) + self.position(torch.arange(5))
        normed = self.norm(x)
        attended, _ = self.attention(normed, normed, normed, need_weights=False)
        x = self.encoder(x + attended)
        return self.head(x[:, 0])


def test_multi_head_attention_and_encoder_layers() -> None:
    module = build(Attention)
    traced = cut_everywhere(module)
    # the size taken at the top, for the class token, forbids no cut
    assert names_of(traced) == ["embed", "flatten", "transpose", "cat", "add", "add_1", "encoder", "getitem_3"]
    assert "2 values are live there: add and norm" in illegal(traced, "norm")
    sections = cut(traced, ["add", "add_1"])
    assert [name for name, _ in quantizable_layers(sections[1])] == ["attention.out_proj"]
    assert [name for name, _ in quantizable_layers(sections[2])] == [
        "encoder.self_attn.out_proj",
        "encoder.linear1",
        "encoder.linear2",
        "head",
    ]
    # attention calls its projections itself: their inputs are not to be had
    assert directly_called(sections[2]) == {"encoder", "head"}
    train_and_stitch(module, traced, ["add", "add_1", "encoder"])


class OwnAttention(nn.Module):
    """Scaled dot-product attention between Linear layers of one's own, reshaped as einops does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.query, self.key, self.value, self.project = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, c = x.shape
        x = self.embed(x.reshape(b, t, c))
        q, k, v = (
            layer(x).reshape(b, t, 2, c // 2).permute(0, 2, 1, 3) for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.project(y.transpose(1, 2).reshape(b, t, c))
        return self.head(x.reshape(b, t * c))


def test_attention_of_ones_own_takes_sizes_where_they_are_used() -> None:
    module = build(OwnAttention)
    traced = cut_everywhere(module)
    # the sizes that forward takes at its top are alive nowhere
    assert names_of(traced) == ["reshape", "embed", "add", "reshape_5"]
    assert directly_called(cut(traced, ["embed"])[1]) == {"query", "key", "value", "project", "head"}
    train_and_stitch(module, traced, ["embed", "add"])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.lstm = nn.LSTM(32, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).permute(0, 2, 1, 3).flatten(2)
        x, _ = self.lstm(x)
        _, state = self.gru(x)
        return self.head(state[-1])


def test_recurrent_heads() -> None:
    module = build(Recurrent)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["stem", "relu", "permute", "flatten", "getitem", "getitem_4"]
    # the state of a recurrent layer has the batch second
    assert "its first dimension is not the batch: shape (1, 3, 6) for 3 images" in illegal(traced, "getitem_3")
    assert "its value is a tuple of 2" in illegal(traced, "lstm")
    train_and_stitch(module, traced, ["relu", "getitem"])


# -- what is computed between layers -----------------------------------------------------------------------------------


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.fc, self.head = (
            nn.Conv2d(1, 4, 3),
            nn.Dropout2d(0.5),
            nn.Linear(144, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(x))
        x = functional.dropout(self.fc(x.flatten(1)), 0.5, training=self.training)
        if self.training:
            x = x + torch.randn_like(x)
        return self.head(x)


def test_dropout_and_the_training_flag() -> None:
    module = build(Dropouts)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["conv", "drop", "flatten", "fc", "dropout"]
    train_and_stitch(module, traced, ["drop", "dropout"])


class AlwaysDrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.dropout(x.flatten(1), 0.5))


def test_chance_in_eval_mode_is_refused() -> None:
    assert "or on chance; " in refusal(build(AlwaysDrops))


class Auxiliary(nn.Module):
    """As GoogLeNet: an auxiliary head in training mode, and a tuple of both logits then."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aux, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x))
        aux: Tensor | None = None
        if self.training:
            aux = self.aux(x.mean((2, 3)))
        x = self.head(x.mean((2, 3)))
        return (x, aux) if self.training else x


def test_auxiliary_heads_stay_the_teachers() -> None:
    module = build(Auxiliary)
    traced = cut_everywhere(module, unused=("aux.",))
    assert "aux" not in {name for section in cut(traced, []) for name, _ in quantizable_layers(section)}
    student = train_and_stitch(module, traced, ["relu"])
    assert torch.equal(student.aux.weight, module.aux.weight)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.25))
        self.register_buffer("mask", torch.arange(64.0) % 2, persistent=False)
        self.register_buffer("order", torch.randperm(8))
        self.plain = torch.linspace(0, 1, 8)
        self.fc, self.head = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean).flatten(1)) * self.mask
        x = self.fc(x)[:, self.order] + self.plain + torch.arange(8) / 8
        return self.head(x)


def test_buffers_registered_hidden_plain_and_computed() -> None:
    module = build(Buffers)
    traced = cut_everywhere(module)
    assert {"sub", "flatten", "mul", "fc", "getitem"} <= {*names_of(traced)}
    train_and_stitch(module, traced, ["mul", "fc"])
    # all of them are in the digest of a boundary behind them
    before = prefix_digests(traced, ["mul", "fc"])
    for name in ("mask", "plain"):
        changed = copy.deepcopy(module)
        getattr(changed, name).add_(1)
        after = prefix_digests(trace_teacher(changed, IMAGES), ["mul", "fc"])
        assert [one == other for one, other in zip(before, after, strict=True)] == (
            [True, False, False, False] if name == "mask" else [True, True, True, False]
        )


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x.flatten(1))


def test_a_teacher_that_changes_its_buffers_is_refused() -> None:
    assert "the teacher changes its own calls whenever it runs, in eval mode too" in refusal(build(Counts))


class Functional(nn.Module):
    """Layers that are used through their weights, and weights without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 8)
        self.free = nn.Parameter(torch.randn(8, 8))
        self.both, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.conv.weight, self.conv.bias)
        x = functional.linear(torch.relu(x).flatten(1), weight=self.fc.weight, bias=self.fc.bias)
        x = functional.linear(x, self.free)
        x = self.both(x) + functional.linear(x, self.both.weight)
        return self.head(x @ self.free.t())


def test_functional_calls_are_layers_without_a_quantized_input() -> None:
    module = build(Functional)
    traced = cut_everywhere(module)
    (whole,) = cut(traced, [])
    assert [name for name, _ in quantizable_layers(whole)] == ["conv", "fc", "both", "head"]
    assert directly_called(whole) == {"head"}
    assert set(describe_section(whole)[0]) == {"conv", "fc", "both", "head"}
    assert "free is used on both sides" in illegal(traced, "add")
    # 4 x 6x6 outputs of 3x3; 144 x 8; 8 x 8 of the free weight and twice that of `both`; 8 x 3
    assert section_multiply_accumulates(traced, ["relu", "linear"]) == (144 * 9, 144 * 8, 3 * 64 + 24)
    student = train_and_stitch(module, traced, ["relu", "linear"])
    assert len(student.fc.weight.unique()) <= 4


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.abs()


def test_norms_and_leaf_modules_of_ones_own() -> None:
    module = build(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            OwnLayer(),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.LayerNorm(144),
            nn.Linear(144, 3),
        )
    )
    traced = cut_everywhere(module)
    assert names_of(traced) == ["0", "1", "2", "3", "4", "5"]
    train_and_stitch(module, traced, ["1", "4"])


class Spectrum(nn.Module):
    """Complex, integer and double values on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(128, 3)
        self.table = nn.Embedding(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.ifft2(torch.fft.fft2(self.stem(x)) * 2).real
        codes = (x.flatten(2).mean(1) > 0).long()
        mixed = torch.cat([x.flatten(2).mean(1), self.table(codes).mean(1)], dim=1)
        return self.head(mixed.double().square().float())


def test_complex_integer_and_double_values_are_no_boundaries() -> None:
    module = build(Spectrum)
    traced = cut_everywhere(module)
    assert "its value has type torch.complex64, not torch.float32" in illegal(traced, "fft_fft2")
    assert "its value has type torch.float64, not torch.float32" in illegal(traced, "square")
    train_and_stitch(module, traced, ["stem", "cat"])


class Wrapper(nn.Module):
    """As DataParallel: any arguments go on to the network inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, lambda module: nn.Sequential(nn.DataParallel(module))])
def test_wrapped_networks_are_cut_inside(wrap: Callable[[nn.Module], nn.Module], tiny_teacher: nn.Module) -> None:
    module = wrap(tiny_teacher).eval()
    traced = cut_everywhere(module)
    assert len(traced.cut_points) == len(trace_teacher(tiny_teacher, IMAGES).cut_points)
    assert any(name.endswith("module.bn1") for name in names_of(traced))


class Options(nn.Module):
    """Arguments with defaults stay at their defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, **rest: Any) -> Tensor:
        x = self.fc(x.flatten(1)) * scale
        if mask is not None:
            x = x * mask
        return self.head(x)


def test_arguments_with_defaults_keep_them() -> None:
    module = build(Options)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["flatten", "fc", "mul"]
    train_and_stitch(module, traced, ["mul"])


# -- sizes -------------------------------------------------------------------------------------------------------------


class SizesAtTheTop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(256, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.size()
        shape = x.shape
        x = torch.relu(self.conv1(x))
        x = functional.interpolate(self.conv2(x)[:, :, ::2], size=shape[2:])
        x = x.view(b * 2, 2, h, w).view(shape[0], -1)
        return self.head(x)


def test_sizes_taken_at_the_top_forbid_no_cut() -> None:
    module = build(SizesAtTheTop)
    traced = cut_everywhere(module)
    assert names_of(traced) == ["conv1", "relu", "conv2", "getitem_4", "interpolate", "view_1"]
    assert "its first dimension is not the batch: shape (6, 2, 8, 8) for 3 images" in illegal(traced, "view")
    train_and_stitch(module, traced, ["relu", "interpolate"])


class QueryKeyValue(nn.Module):
    """Three of something first, as many as the images that a teacher is traced on."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(64, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1)).view(x.shape[0], 3, 8).transpose(0, 1).contiguous().unbind(0)
        return self.head(q * k + v)


def test_three_of_something_are_not_taken_for_the_batch() -> None:
    module = build(QueryKeyValue)
    traced = cut_everywhere(module)
    assert "its first dimension is not the batch" in illegal(traced, "contiguous")


# -- how many sections ---------------------------------------------------------------------------------------------------


def test_a_teacher_of_one_layer_is_one_section() -> None:
    module = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    traced = cut_everywhere(module)
    costs = measure_costs(traced, IMAGES, repeats=1)
    assert choose_cuts(traced, SectionsSpec(count=1), costs) == ()
    assert choose_cuts(traced, SectionsSpec(every="layer"), costs) == ()
    with pytest.raises(PartitionError, match="got 2, but the teacher can be cut into at most 1 section"):
        choose_cuts(traced, SectionsSpec(count=2), costs)
    train_and_stitch(module, traced, [])


def test_forty_sections_of_five_layers_are_refused_with_the_greatest_number() -> None:
    module = build(lambda: nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(5))))
    traced = trace_teacher(module, IMAGES)
    costs = measure_costs(traced, IMAGES, repeats=1)
    with pytest.raises(PartitionError, match="got 40, but the teacher can be cut into at most 5 sections"):
        choose_cuts(traced, SectionsSpec(count=40), costs)
    assert len(choose_cuts(traced, SectionsSpec(count=5), costs)) == 4


def test_cuts_by_name_in_any_order() -> None:
    module = build(Dropouts)
    traced = trace_teacher(module, IMAGES)
    costs = measure_costs(traced, IMAGES, repeats=1)
    assert choose_cuts(traced, SectionsSpec(cuts=("fc", "drop")), costs) == ("drop", "fc")


# -- weights that are computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_computed_weights_are_refused_by_the_name_of_their_layer(compute: Callable[[nn.Module], nn.Module]) -> None:
    module = build(lambda: nn.Sequential(nn.Flatten(), compute(nn.Linear(64, 8)), nn.Linear(8, 3)))
    message = refusal(module)
    assert message.startswith("the weight of the teacher's 1 is no parameter: it is computed in every forward")
    assert "remove_parametrizations" in message


# -- torch.export ------------------------------------------------------------------------------------------------------

EXPORTED = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular", bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        # a look at numbers, which torch.fx cannot take
        if x.shape[1] < 2 or int(x.shape[-1]) > 64:
            raise ValueError("too few channels")
        return self.act(self.bn(self.conv(x))) + x


class Looking(nn.Module):
    """Control flow on shapes and numbers: torch.fx cannot trace it, torch.export can."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.shared, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)
        self.fc, self.direct, self.head = nn.Linear(256, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)
        self.table = torch.linspace(-1, 1, 8)
        self.position = nn.Parameter(torch.zeros(1, 8))

    def forward(self, *images):
        (x,) = images
        batch, size = x.shape[0], float(x.shape[-1])
        for _ in range(x.dim() - 3):
            x = self.stem(x)
        x = self.blocks(x)
        x = torch.relu(self.fc(x.view(batch, -1))) / size
        x = self.drop(self.shared(self.shared(x))) + self.shift + (self.table + self.position)
        x = nn.functional.linear(x, self.direct.weight, self.direct.bias)
        return self.head(x)


def looking():
    return Looking()
'''


@pytest.fixture
def looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    (tmp_path / "exported_nets.py").write_text(EXPORTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "exported_nets", raising=False)
    module = build(__import__("exported_nets").looking)
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(16, 1, 8, 8))
    return module.eval()


def test_export_takes_over_where_fx_fails_and_gives_the_users_own_layers_back(looking: nn.Module) -> None:
    traced = cut_everywhere(looking, front_end="torch.export")
    assert names_of(traced) == [
        "stem",
        "blocks.0",
        "blocks",
        "view",
        "fc",
        "relu",
        "div",
        "shared",
        "drop",
        "add_2",
        "add_4",
        "linear_3",
    ]
    assert "blocks.1" in next(point.aliases for point in traced.cut_points if point.name == "blocks")
    assert "2 values are live there: stem and blocks.0.bn" in illegal(traced, "blocks.0.bn")
    assert "shared.weight is used on both sides" in illegal(traced, "shared@0")
    (whole,) = cut(traced, [])
    layers = ["stem", "blocks.0.conv", "blocks.1.conv", "fc", "shared", "direct", "head"]
    assert [name for name, _ in quantizable_layers(whole)] == layers
    assert {*layers} - directly_called(whole) == {"direct"}
    # 4 x 8x8 outputs of 3x3; as many of 4x3x3, twice; 256 x 8; twice 8 x 8; 8 x 8 and 8 x 10
    assert section_multiply_accumulates(traced, ["stem", "blocks", "fc"]) == (2304, 18432, 2048, 128 + 64 + 80)
    assert prefix_digests(traced, ["fc"]) == prefix_digests(trace_teacher(looking, IMAGES[:1]), ["fc"])
    student = train_and_stitch(looking, traced, ["blocks.0", "fc", "drop"])
    # BatchNorm trains, as it does in the graphs of torch.fx
    assert student.blocks[0].bn.num_batches_tracked == looking.blocks[0].bn.num_batches_tracked + 1


def exported_document(folder: Path) -> dict[str, Any]:
    return {
        "name": "exported",
        "teacher": {"model": "exported_nets:looking", "min_top1": 0},
        "data": {
            "dataset": "digits",
            "train_samples": 64,
            "held_out_samples": 40,
            "test_samples": 40,
            "batch_size": 32,
        },
        "sections": {"every": "block"},
        "quantize": {
            "weights": {"bits": 2},
            "activations": {"scheme": "pact", "bits": 4},
            "first_last_bits": None,
        },
        "train": {"epochs": 1, "batch_size": 32},
        "storage": {"run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
    }


def test_what_only_export_traces_runs_from_end_to_end(looking: nn.Module, tmp_path: Path) -> None:
    document = exported_document(tmp_path) | {"sections": {"cuts": ["blocks.0", "fc"]}}
    job = resolve_job(document, source="test")
    report = run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
    assert report.status == "succeeded"
    plan = from_json(PartitionPlan, (tmp_path / "run" / "plan.json").read_bytes())
    assert plan.sections[0].modules == ("stem", "blocks.0.conv", "blocks.0.bn", "blocks.0.act")
    # 40 in the stem, 152 in a block, 2056 in fc, 72 in shared and in direct, 90 in the head, 8 outside of layers
    assert plan.unquantized_parameters == ("position",)
    assert plan.unquantized_share == 8 / (40 + 2 * 152 + 2056 + 2 * 72 + 90 + 8)
    bits = {layer.module: layer.activation_bits for layer in plan.layers}
    assert bits == dict.fromkeys(bits, 4) | {"direct": 32}
    state = safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")
    student = type(looking)()
    student.load_state_dict({key: value for key, value in state.items() if not key.startswith("dcq.")}, strict=True)
    put_input_quantizers(student, state)
    assert all(len(student.get_submodule(name).weight.unique()) <= 4 for name in bits)
    assert report.validation is not None
    # The errors at boundaries come from the sections, the last of them can be had from the user's own class too.
    assert len(report.validation.boundary_errors) == 3
    assert report.student is not None
    assert report.student.top1 is not None


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.one(x) if x.sum() > 0 else self.two(x)


def test_control_flow_on_data_is_refused_in_one_clear_sentence() -> None:
    message = refusal(build(DataDependent))
    assert message.startswith("the teacher DataDependent has no fixed graph to cut (torch.fx: ")
    assert "; torch.export: " in message
    assert message.endswith("move it out of the network's forward")


class Baked(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc, self.size = nn.Linear(64, 3), size

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(self.size, 64))


def test_a_batch_size_in_the_code_is_refused() -> None:
    assert "does not run on images of shape (1, 8, 8)" in refusal(build(lambda: Baked(4)))


class TwoInputs(nn.Module):
    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return (image * mask).flatten(1)


class Detector(nn.Module):
    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": image} for image in x]


class Segmenter(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x, "aux": x}


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (TwoInputs, "the teacher takes 2 inputs (image, mask), expected one batch of images"),
        (Detector, "the teacher returns a list of 3 (dict), expected one tensor of logits"),
        (Segmenter, "the teacher returns a dict (out, aux), expected one tensor of logits"),
        (
            lambda: nn.Conv2d(1, 3, 3),
            "returns a tensor of shape (3, 3, 6, 6) and type torch.float32, expected one tensor of",
        ),
        (
            lambda: nn.Sequential(nn.Conv3d(1, 3, 3)),
            "a network for clips: its 0 is three-dimensional and wants (batch, ",
        ),
        (lambda: nn.Conv2d(5, 3, 3), "does not run on images of shape (1, 8, 8): Given groups=1"),
    ],
)
def test_what_is_no_classifier_of_images_is_told_why(function: Callable[[], nn.Module], told: str) -> None:
    assert told in refusal(build(function))


def test_one_image_is_enough_to_trace_on(looking: nn.Module) -> None:
    traced = trace_teacher(looking, IMAGES[:1])
    assert names_of(traced) == names_of(trace_teacher(looking, IMAGES))
    assert_composition(looking, cut(traced, ["blocks"]), IMAGES)


def test_a_trace_leaves_the_teacher_as_it_was() -> None:
    module = build(Attention)
    before = sorted(vars(module))
    first = prefix_digests(trace_teacher(module, IMAGES), ["add"])
    assert prefix_digests(trace_teacher(module, IMAGES), ["add"]) == first
    assert sorted(vars(module)) == before
