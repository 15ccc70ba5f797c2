"""The packed file: every scheme to the bit, as small as was promised, and damage is refused by name."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dcq_ray
from dcq_ray.errors import DcqError, ExportError, StorageError
from dcq_ray.export.levels import encode, layer_levels
from dcq_ray.export.packed import MAGIC, open_packed, pack, unpack
from dcq_ray.quantizers import ActivationStart, LayerSite, bake, plan_layers, put_quantizers
from dcq_ray.records import LayerPlan
from dcq_ray.spec import WEIGHT_SCHEME_BITS, QuantizeSpec
from dcq_ray.storage import open_store

SCHEMES = [(scheme, bits) for scheme, allowed in WEIGHT_SCHEME_BITS.items() for bits in allowed]
KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.ConvTranspose2d)


def plans_of(module: nn.Module, **spec: object) -> tuple[LayerPlan, ...]:
    sites = [LayerSite(name=name, module=part) for name, part in module.named_modules() if isinstance(part, KINDS)]
    return plan_layers(sites, QuantizeSpec.model_validate({"first_last_bits": None, **spec}))


def baked(module: nn.Module, layers: tuple[LayerPlan, ...], *, trained: bool = False) -> dict[str, Tensor]:
    """Quantize a module in place as training leaves it; the state of its student's file."""
    starts = {layer.module: ActivationStart(clip=2.0, signed=True) for layer in layers}
    put_quantizers(module, layers, starts, trained=trained)
    extra = bake(module.eval())
    return {**module.state_dict(), **extra}


def packed_file(
    path: Path, module: nn.Module, *, trained: bool = False, model: str = "user:net", **spec: object
) -> str:
    layers = plans_of(module, **spec)
    state = baked(module, layers, trained=trained)
    path.write_bytes(pack(state, layers, model=model, args={}, metadata={"run": "small"}))
    return str(path)


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    with torch.no_grad():
        net(torch.randn(16, 3, 9, 9))
    return net.eval()


@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
@pytest.mark.parametrize("activations", [None, {"scheme": "dorefa", "bits": 1}, {"scheme": "lsq", "bits": 4}])
def test_every_scheme_gives_the_students_logits_to_the_bit(
    scheme: str, bits: int, activations: dict[str, Any] | None, tmp_path: Path
) -> None:
    student = small_net()
    path = packed_file(tmp_path / "s.dcq", student, weights={"scheme": scheme, "bits": bits}, activations=activations)
    loaded = dcq_ray.load(path, network=small_net(seed=1).train())
    images = torch.randn(4, 3, 9, 9)
    assert torch.equal(loaded(images), student(images))
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
def test_other_dtypes_come_back_to_the_bit(scheme: str, bits: int, dtype: torch.dtype) -> None:
    student = small_net().to(dtype)
    layers = plans_of(student, weights={"scheme": scheme, "bits": bits})
    state = baked(student, layers)
    found = unpack(open_packed(pack(state, layers, model="m:f", args={}, metadata={}), source="here"))
    for name, tensor in student.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.sampled_from(SCHEMES),
    channels=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.integers(1, 3),
    spread=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_weight_comes_back_to_the_bit(
    chosen: tuple[str, int], channels: tuple[int, int], kernel: int, spread: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Conv2d(*channels, kernel))
    with torch.no_grad():
        layer[0].weight.mul_(spread)
    layers = plans_of(layer, weights={"scheme": chosen[0], "bits": chosen[1]})
    state = baked(layer, layers)
    found = unpack(open_packed(pack(state, layers, model="m:f", args={}, metadata={}), source="here"))
    assert torch.equal(found["0.weight"].view(torch.int32), state["0.weight"].view(torch.int32))


@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
@pytest.mark.parametrize("num_inputs", [1, 9, 40])
def test_a_plan_promises_the_bytes_that_the_file_has(scheme: str, bits: int, num_inputs: int) -> None:
    layer = nn.Sequential(nn.Linear(num_inputs, 3, bias=False))
    layers = plans_of(layer, weights={"scheme": scheme, "bits": bits})
    found = open_packed(pack(baked(layer, layers), layers, model="m:f", args={}, metadata={}), source="here")
    assert sum(entry.num_bytes for entry in found.tensors) == layers[0].num_bytes


def test_one_bit_and_three_bits_by_hand() -> None:
    layer = nn.Sequential(nn.Linear(9, 1, bias=False))
    plan = plans_of(layer, weights={"scheme": "dorefa", "bits": 1})
    weight = torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, -1, 1]]) * 0.5
    state = {"0.weight": weight, "dcq.0.scale": torch.tensor(0.5)}
    assert open_packed(pack(state, plan, model="", args={}, metadata={}), source="").data[:2].hex() == "0d01"
    plan = plans_of(layer, weights={"scheme": "lsq", "bits": 3})
    # Codes 5, 2 and 7 are 4 more than their integers.
    state = {"0.weight": torch.tensor([[1.0, -2.0, 3.0]]) * 0.25, "dcq.0.scale": torch.tensor(0.25)}
    assert open_packed(pack(state, plan, model="", args={}, metadata={}), source="").data[:2].hex() == "d501"


def test_tied_weights_are_stored_once() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net[2].weight = net[0].weight
    layers = plans_of(net, weights={"scheme": "lsq", "bits": 8})
    packed = open_packed(pack(baked(net, layers), layers, model="", args={}, metadata={}), source="")
    assert len(packed.data) < 2 * 64 * 64


def test_a_weight_beside_its_levels_is_not_packed() -> None:
    plan = plans_of(nn.Sequential(nn.Linear(2, 1)), weights={"scheme": "lsq", "bits": 2})[0]
    with pytest.raises(ExportError, match=r"fc\.weight: a weight is not at one of its 4 levels"):
        encode(torch.tensor([[0.25, 0.3]]), torch.tensor(0.25), layer_levels(plan), name="fc.weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "first_last_bits", "least_ratio"), [(1, None, 28), (2, None, 15), (1, 8, 22), (2, 8, 13)]
)
def test_resnet18_is_as_small_as_promised(
    bits: int, first_last_bits: int | None, least_ratio: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = torchvision.models.resnet18()
    num_float_bytes = sum(parameter.nbytes for parameter in student.parameters())
    path = packed_file(
        tmp_path / "s.dcq",
        student,
        model="torchvision:resnet18",
        weights={"scheme": "dorefa", "bits": bits},
        first_last_bits=first_last_bits,
    )
    assert Path(path).stat().st_size < num_float_bytes / least_ratio
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(dcq_ray.load(path)(images), student(images))


@pytest.mark.slow
def test_a_file_is_read_from_a_bucket_and_from_the_working_folder(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = small_net()
    path = packed_file(tmp_path / "s.dcq", student, weights={"scheme": "xnor", "bits": 1})
    open_store(s3_uri).write_bytes("s.dcq", Path(path).read_bytes())
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 9, 9)
    for place in ("s.dcq", s3_uri.replace("?", "/s.dcq?")):
        assert torch.equal(dcq_ray.load(place, network=small_net(1))(images), student(images))


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(StorageError, match=r"nowhere\.dcq"):
        dcq_ray.load("nowhere.dcq")


def test_three_levels_take_eight_fifths_of_a_bit(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(500, 400, bias=False))
    path = packed_file(tmp_path / "s.dcq", net, weights={"scheme": "ttq", "bits": 2})
    assert 40_000 < Path(path).stat().st_size < 41_000


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s.dcq"
    packed_file(path, small_net(), weights={"scheme": "dorefa", "bits": 1})
    content = path.read_bytes()
    for position in [*range(80), *range(80, len(content), 37), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ExportError, match=r"^s\.dcq: .*(not a packed|version|truncated|damaged)"):
            open_packed(bytes(damaged), source="s.dcq")
    for size in [*range(60), *range(60, len(content), 101), len(content) - 1]:
        with pytest.raises(ExportError, match=r"^s\.dcq: (not a packed student|truncated)"):
            open_packed(content[:size], source="s.dcq")
    with pytest.raises(ExportError, match="damaged: got"):
        open_packed(content + b"\0", source="s.dcq")
    other = content[:8] + struct.pack("<I", 2) + content[12:]
    with pytest.raises(ExportError, match="of version 2, expected version 1"):
        open_packed(other, source="s.dcq")
    with pytest.raises(ExportError, match="not a packed student"):
        open_packed(b"PK\x03\x04 a zip of pickles", source="s.dcq")


def crafted(document: Any, data: bytes = b"") -> bytes:
    """A file whose digest is right, whatever its header says."""
    header = json.dumps(document).encode()
    prefix = struct.pack("<8sIIQ", MAGIC, 1, len(header), len(data))
    return prefix + hashlib.sha256(prefix + header + data).digest() + header + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "0.weight", "dtype": "float32", "shape": [1], "offset": 0, "num_bytes": 4, **changes}


CODED = {"first": 0, "stride": 1, "num_levels": 4, "scale_dim": None, "two_sided": False, "num_bytes": 1}


@pytest.mark.parametrize(
    "entry",
    [
        tensor(shape=[2**60]),
        tensor(shape=[-1, -1]),
        tensor(shape=[2**62, 0], num_bytes=4),
        tensor(offset=1),
        tensor(offset=-4),
        tensor(dtype="object"),
        tensor(dtype=[]),
        tensor(name=None, shape=None),
        tensor(**{**CODED, "num_levels": 10**9}),
        tensor(**{**CODED, "num_levels": "3"}),
        tensor(**CODED),
        tensor(**{**CODED, "first": {}}),
        "text",
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(entry: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.dcq"
    path.write_bytes(crafted({"model": "m:f", "args": {}, "metadata": {}, "tensors": [entry]}, bytes(4)))
    with pytest.raises(DcqError, match=r"s\.dcq"):
        dcq_ray.load(str(path), network=nn.Sequential(nn.Linear(1, 1)))


@pytest.mark.parametrize("document", [[], {}, {"model": "m:f", "args": 3, "metadata": {}, "tensors": []}, None, 3])
def test_headers_of_another_form_are_refused(document: Any) -> None:
    with pytest.raises(ExportError, match="its header is malformed"):
        open_packed(crafted(document), source="s.dcq")
