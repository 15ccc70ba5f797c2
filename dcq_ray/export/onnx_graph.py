"""A student as an ONNX graph: integer weights with DequantizeLinear, quantized inputs as QuantizeLinear and DequantizeLinear.

PyTorch's exporter writes the graph in float32. Then every quantized weight's initialiser becomes integers of the narrowest type
that holds them (INT2 from opset 25 on, INT4 from 21 on, else INT8), and a DequantizeLinear takes its name:

    -1 and +1, or -1, 0 and +1               one DequantizeLinear
    evenly spaced, zero not among them       2 s (c - 2^(k-1)) + s of the code c: DequantizeLinear and Add
    -q, 0 and +p (ttq)                       p [w > 0] + q (-[w < 0]): two DequantizeLinear and Add

An input quantizer becomes QuantizeLinear, DequantizeLinear, Clip, which round as it does; one signed bit, which has no zero, stays
Where.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcq_ray.errors import ExportError, UsageError
from dcq_ray.export.levels import Levels, encode, layer_levels
from dcq_ray.quantizers.activations import level_range
from dcq_ray.quantizers.modules import FrozenInputQuantizer
from dcq_ray.records import LayerPlan
from dcq_ray.records.deploy import UNPACKING
from dcq_ray.version import __version__

INT4_OPSET = 21
INT2_OPSET = 25
LEAST_OPSET = 18
INPUT, OUTPUT = "input", "logits"


@torch.library.custom_op("dcq_ray::quantized_input", mutates_args=())
def _quantized_input(value: Tensor, step: float, low: int, high: int) -> Tensor:
    """Stands in the traced graph for what becomes QuantizeLinear and DequantizeLinear."""
    return torch.clamp(torch.round(value / step), low, high) * step


@_quantized_input.register_fake
def _(value: Tensor, step: float, low: int, high: int) -> Tensor:
    return torch.empty_like(value)


class _ExportedQuantizer(nn.Module):
    """An input quantizer as the exporter is to see it."""

    def __init__(self, quantizer: FrozenInputQuantizer) -> None:
        super().__init__()
        self.step = float(quantizer.step)
        self.has_zero = not (quantizer.signed and quantizer.bits == 1)
        self.low, self.high = level_range(quantizer.bits, quantizer.signed)

    def forward(self, value: Tensor) -> Tensor:
        if not self.has_zero:
            # No integer type has these two levels alone.
            return torch.where(value < 0, -self.step, self.step)
        found: Tensor = torch.ops.dcq_ray.quantized_input(value, self.step, self.low, self.high)
        return found


def write_onnx(
    network: nn.Module,
    example: Tensor,
    path: str,
    *,
    layers: Sequence[LayerPlan],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    opset: int | None = None,
) -> None:
    """Write a baked student; its batch may have any size.

    Args:
        example: images [B, C, H, W], B >= 2.
        layers, state: of the student, with the scales under `dcq.<module>.scale`.
        opset: None: the oldest that has the integer types which the weights need.

    Raises:
        ExportError: PyTorch's exporter cannot write the network, or ONNX's checker refuses the graph.
        UsageError: an opset that is too old.
    """
    import onnx

    chosen = _opset(layers, opset)
    model = _float_model(network, example, chosen)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    for layer in layers:
        name = f"{layer.module}.weight"
        if layer.bits < 32 and name in initializers:
            tensors, made = _integer_weight(layer, state, chosen)
            model.graph.initializer.remove(initializers[name])
            model.graph.initializer.extend(tensors)
            nodes += made
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    _forget_sources(model)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version = "dcq-ray", __version__
    # The exporter's is older than the types of INT2 and INT4 are.
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import))
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"{path}: ONNX's checker refuses the graph: {str(error).splitlines()[0]}") from error


def open_onnx(
    path: str, *, num_threads: int | None = None, unpacked: bool = False
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What gives logits [B, K] of images [B, C, H, W] by ONNX Runtime on the CPU; both raise ExportError where it cannot.

    Args:
        num_threads: None: as many as torch uses.
        unpacked: turn integer weights into floats once, here, instead of at every run: more memory, less time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if num_threads is None else num_threads
    options.log_severity_level = 3
    if unpacked:
        options.add_session_config_entry(UNPACKING, "1")
    with _explained(path):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with _explained(path):
            found: NDArray[np.float32] = session.run([OUTPUT], {INPUT: np.ascontiguousarray(images)})[0]
        return found

    return run


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    # ONNX Runtime's errors have no common class.
    except Exception as error:
        raise ExportError(f"{path}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error


def _opset(layers: Sequence[LayerPlan], wanted: int | None) -> int:
    if wanted is not None:
        import onnx

        if wanted < LEAST_OPSET:
            raise UsageError(
                f"--opset {wanted}: expected {LEAST_OPSET} or more: PyTorch's exporter writes no older graphs"
            )
        newest = onnx.defs.onnx_opset_version()
        if wanted > newest:
            raise UsageError(f"--opset {wanted}: expected {newest} or less: onnx {onnx.__version__} knows no newer one")
        return wanted
    bits = [_least_bits(layer_levels(layer)) for layer in layers if layer.bits < 32]
    if 2 in bits:
        return INT2_OPSET
    return INT4_OPSET if 4 in bits else LEAST_OPSET


def _float_model(network: nn.Module, example: Tensor, opset: int) -> Any:
    exported = copy.deepcopy(network).eval()
    for module in list(exported.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, FrozenInputQuantizer):
                setattr(module, name, _ExportedQuantizer(part))
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                exported,
                (example,),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                custom_translation_table={torch.ops.dcq_ray.quantized_input.default: _translated},
            )
    except Exception as error:
        raise ExportError(
            f"PyTorch's exporter cannot write this network as ONNX: {str(error).strip().splitlines()[0]}; "
            "choose packed or safetensors"
        ) from error
    assert program is not None
    found = {entry.domain: entry.version for entry in program.model_proto.opset_import}
    # Where no converter reaches that opset, the exporter tells a log, and leaves the graph as it is.
    if found.get("") != opset:
        raise ExportError(
            f"--opset {opset}: PyTorch's exporter gave a graph of opset {found.get('')} and cannot convert it; choose another opset"
        )
    return program.model_proto


def _forget_sources(model: Any) -> None:
    """Leave out what the exporter notes of every node and value: lines of source, in the folders of who writes the file."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for function in model.functions:
        for part in (function, *function.node, *function.value_info):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


def _translated(value: Any, step: float, low: int, high: int) -> Any:
    """The stand-in's operators.

    The Clip comes last: ONNX Runtime 1.32 takes one before a QuantizeLinear away, though it is narrower than the type.
    """
    import onnx
    from onnxscript import opset18

    op: Any = opset18
    scale = np.asarray(step, np.float32)
    kind = np.int8 if low < 0 else np.uint8

    def constant(number: NDArray[Any]) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(number))

    scales, zero = constant(scale), constant(np.array(0, kind))
    levels = op.DequantizeLinear(op.QuantizeLinear(value, scales, zero), scales, zero)
    return op.Clip(levels, *(constant(np.asarray(end, np.float32) * scale) for end in (low, high)))


def _least_bits(levels: Levels) -> int:
    """Bits of the narrowest integer type for a weight: 2, 4 or 8."""
    if levels.two_sided or levels.num_levels <= 4:
        return 2
    return 4 if levels.num_levels <= 16 else 8


def _integer_weight(layer: LayerPlan, state: Mapping[str, Tensor], opset: int) -> tuple[list[Any], list[Any]]:
    """The initialisers and the nodes that make a layer's weight, under its own name."""
    from onnx import helper, numpy_helper

    name = f"{layer.module}.weight"
    weight, scale, levels = state[name], state[f"dcq.{layer.module}.scale"], layer_levels(layer)
    codes = encode(weight, scale, levels, name=name).astype(np.int16).reshape(weight.shape)
    axis: dict[str, Any] = {} if levels.scale_dim is None else {"axis": levels.scale_dim}
    scales = scale.float().numpy()
    tensors: list[Any] = []
    nodes: list[Any] = []

    def dequantized(result: str, integers: NDArray[np.int16], factor: NDArray[np.float32]) -> str:
        tensors.append(_integers(f"{result}_integers", integers, _least_bits(levels), opset))
        tensors.append(numpy_helper.from_array(np.asarray(factor, np.float32), f"{result}_scale"))
        inputs = [f"{result}_integers", f"{result}_scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [result], name=f"{result}_dequantized", **axis))
        return result

    if levels.two_sided:
        signs = codes * levels.stride + levels.first
        above = dequantized(f"{name}_above", np.maximum(signs, 0), scales[0])
        below = dequantized(f"{name}_below", np.minimum(signs, 0), scales[1])
        nodes.append(helper.make_node("Add", [above, below], [name], name=f"{name}_both"))
    elif levels.stride == 2 and levels.num_levels > 2:
        even = dequantized(f"{name}_even", codes - levels.num_levels // 2, 2 * scales)
        shape = [-1 if dim == levels.scale_dim else 1 for dim in range(weight.ndim)]
        tensors.append(numpy_helper.from_array(scales.reshape(shape if axis else ()), f"{name}_offset"))
        nodes.append(helper.make_node("Add", [even, f"{name}_offset"], [name], name=f"{name}_shifted"))
    else:
        dequantized(name, codes * levels.stride + levels.first, scales)
    return tensors, nodes


def _integers(name: str, values: NDArray[np.int16], bits: int, opset: int) -> Any:
    import ml_dtypes
    from onnx import numpy_helper

    if bits == 2 and opset >= INT2_OPSET:
        return numpy_helper.from_array(values.astype(ml_dtypes.int2), name)
    if bits <= 4 and opset >= INT4_OPSET:
        return numpy_helper.from_array(values.astype(ml_dtypes.int4), name)
    return numpy_helper.from_array(values.astype(np.int8), name)
