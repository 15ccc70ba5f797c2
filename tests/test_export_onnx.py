"""ONNX and torch.export forms of students: every quantizer, run by ONNX Runtime and torch, beside the student itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcq_ray.errors import ExportError, UsageError
from dcq_ray.export.program import METADATA, open_program, write_program
from dcq_ray.quantizers import ActivationStart, LayerSite, bake, plan_layers, put_quantizers
from dcq_ray.records import LayerPlan
from dcq_ray.spec import WEIGHT_SCHEME_BITS, QuantizeSpec

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("onnxscript", reason="the export extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
from dcq_ray.export.onnx_graph import open_onnx, write_onnx  # noqa: E402

KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
SCHEMES = [
    (scheme, bits) for scheme, allowed in WEIGHT_SCHEME_BITS.items() for bits in allowed if bits in (1, 2, 3, 4, 8)
]
# A share of the largest logit: two float32 programs add in other orders.
NOISE = 1e-5


def small_net(channels: int = 4, groups: int = 2, kernel: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups),
        nn.ConvTranspose2d(channels, 6, 2),
        nn.Flatten(),
        nn.Linear(6 * 49, 5),
    )
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.randn(channels) * 0.1
            part.running_var = torch.rand(channels) + 0.5
    return net


def student(net: nn.Module, **spec: Any) -> tuple[nn.Module, tuple[LayerPlan, ...], dict[str, Tensor]]:
    """A quantized network in the form of its file: baked weights and frozen input quantizers; its layers and state."""
    sites = [LayerSite(name=name, module=part) for name, part in net.named_modules() if isinstance(part, KINDS)]
    layers = plan_layers(sites, QuantizeSpec.model_validate({"first_last_bits": None, **spec}))
    starts = {layer.module: ActivationStart(clip=1.7, signed=index == 0) for index, layer in enumerate(layers)}
    put_quantizers(net, layers, starts)
    extra = bake(net.eval())
    net.requires_grad_(False)
    return net, layers, {**net.state_dict(), **extra}


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def difference(found: np.ndarray, net: nn.Module, batch: Tensor) -> float:
    with torch.no_grad():
        wanted = net(batch).numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("activations", [None, {"scheme": "pact", "bits": 4}], ids=["weights", "weights and inputs"])
@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
def test_every_scheme_gives_its_students_logits(
    scheme: str, bits: int, activations: dict[str, Any] | None, tmp_path: Path
) -> None:
    net, layers, state = student(small_net(), weights={"scheme": scheme, "bits": bits}, activations=activations)
    path = str(tmp_path / "student.onnx")
    write_onnx(net, images(2), path, layers=layers, state=state, metadata={"run": "small"})
    model = onnx.load(path)
    widths = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("_integers")}
    expected = onnx.TensorProto.INT2 if bits <= 2 else onnx.TensorProto.INT4 if bits <= 4 else onnx.TensorProto.INT8
    assert widths == {expected}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"run": "small"}
    # No quantized weight is left in floating point.
    assert not {f"{layer.module}.weight" for layer in layers} & {tensor.name for tensor in model.graph.initializer}
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("QuantizeLinear") == (0 if activations is None else len(layers))
    for batch in (images(1), images(5)):
        assert difference(open_onnx(path)(batch.numpy()), net, batch) < NOISE


@pytest.mark.parametrize(("scheme", "bits"), [("dorefa", 1), ("dorefa", 8), ("pact", 2), ("lsq", 8), ("lsq", 3)])
def test_every_input_quantizer_rounds_as_the_students(scheme: str, bits: int, tmp_path: Path) -> None:
    net, layers, state = student(
        small_net(), weights={"scheme": "lsq-channel", "bits": 4}, activations={"scheme": scheme, "bits": bits}
    )
    path = str(tmp_path / "student.onnx")
    write_onnx(net, images(2), path, layers=layers, state=state, metadata={})
    # Multiples of half a step: ties, which go to the even level in both.
    step = float(state["dcq.0.input_step"])
    ties = torch.arange(3 * 36).reshape(1, 3, 6, 6) * step / 2 - 20 * step
    for batch in (images(4), ties):
        assert difference(open_onnx(path)(batch.numpy()), net, batch) < NOISE


@pytest.mark.parametrize(("opset", "kind"), [(18, "INT8"), (21, "INT4"), (25, "INT2")])
def test_an_older_opset_has_wider_integers(opset: int, kind: str, tmp_path: Path) -> None:
    net, layers, state = student(small_net(), weights={"scheme": "twn", "bits": 2})
    path = str(tmp_path / "student.onnx")
    write_onnx(net, images(2), path, layers=layers, state=state, metadata={}, opset=opset)
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    widths = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("_integers")}
    assert widths == {getattr(onnx.TensorProto, kind)}
    assert difference(open_onnx(path)(images().numpy()), net, images()) < NOISE


def test_an_opset_that_is_too_old_or_unknown_is_wrong_usage(tmp_path: Path) -> None:
    net, layers, state = student(small_net(), weights={"scheme": "twn", "bits": 2})
    with pytest.raises(UsageError, match="--opset 11: expected 18 or more"):
        write_onnx(net, images(2), str(tmp_path / "x"), layers=layers, state=state, metadata={}, opset=11)
    with pytest.raises(UsageError, match=r"--opset 99: expected [0-9]+ or less: onnx"):
        write_onnx(net, images(2), str(tmp_path / "x"), layers=layers, state=state, metadata={}, opset=99)


def test_a_scale_that_is_not_the_weights_is_refused(tmp_path: Path) -> None:
    net, layers, state = student(small_net(), weights={"scheme": "dorefa", "bits": 1})
    state["dcq.3.scale"] = state["dcq.3.scale"] * 1.01
    with pytest.raises(ExportError, match=r"3\.weight"):
        write_onnx(net, images(2), str(tmp_path / "x"), layers=layers, state=state, metadata={})


@pytest.mark.slow
@given(
    channels=st.sampled_from([2, 4, 6]),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3]),
    quantizer=st.sampled_from(SCHEMES),
)
@settings(max_examples=8, deadline=None)
def test_any_shape_and_quantizer(
    channels: int, groups: int, kernel: int, quantizer: tuple[str, int], tmp_path_factory: Any
) -> None:
    scheme, bits = quantizer
    net, layers, state = student(small_net(channels, groups, kernel), weights={"scheme": scheme, "bits": bits})
    path = str(tmp_path_factory.mktemp("onnx") / "student.onnx")
    write_onnx(net, images(2), path, layers=layers, state=state, metadata={})
    assert difference(open_onnx(path)(images().numpy()), net, images()) < NOISE


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"student\.onnx: ONNX Runtime cannot run it"):
        open_onnx(str(path))
    with pytest.raises(ExportError, match=r"student\.onnx: torch\.export cannot load it"):
        open_program(str(path))


@pytest.mark.parametrize("activations", [None, {"scheme": "lsq", "bits": 1}, {"scheme": "pact", "bits": 4}])
def test_a_program_gives_its_students_logits_for_any_batch(activations: dict[str, Any] | None, tmp_path: Path) -> None:
    net, _, _ = student(small_net(), weights={"scheme": "dorefa", "bits": 2}, activations=activations)
    path = str(tmp_path / "student.pt2")
    write_program(net, images(2), path, metadata={"run": "small"})
    for batch in (images(1), images(5)):
        assert difference(open_program(path)(batch).numpy(), net, batch) < NOISE
    extra = {METADATA: ""}
    torch.export.load(path, extra_files=extra)
    assert "small" in extra[METADATA]


@pytest.mark.parametrize("activations", [{"scheme": "lsq", "bits": 1}, {"scheme": "pact", "bits": 4}])
def test_a_program_takes_any_batch_of_large_inputs_too(activations: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    net, _, _ = student(net, weights={"scheme": "dorefa", "bits": 2}, activations=activations)
    path = str(tmp_path / "student.pt2")
    write_program(net, torch.randn(2, 3, 34, 34), path, metadata={})
    # A quantizer that works in blocks would have fixed how many there are: 16 x 32 x 32 values an image, 65,536 a block.
    batch = torch.randn(9, 3, 34, 34)
    with torch.no_grad():
        assert torch.equal(open_program(path)(batch), net(batch))


def test_a_batch_that_a_program_does_not_take_is_told(tmp_path: Path) -> None:
    net, _, _ = student(small_net(), weights={"scheme": "dorefa", "bits": 2})
    path = str(tmp_path / "student.pt2")
    write_program(net, images(2), path, metadata={})
    with pytest.raises(ExportError, match=r"student\.pt2: the program cannot run images of shape \(2, 3, 9, 9\)"):
        open_program(path)(torch.randn(2, 3, 9, 9))
