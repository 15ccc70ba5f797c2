"""Put quantizers on the layers of a module, find where they start, and bake them into plain tensors.

The input of a layer is quantized as the layer is called, so a boundary lies before the quantizers of the section that
follows it, and after all of the section that it ends:

    section k   … [quantize input] conv -> BatchNorm -> ReLU -> | boundary | -> [quantize input] conv …   section k + 1

A boundary thus carries exactly what the next section sees, in training and in the stitched network; stitching neither adds
nor loses a quantizer, and a shortcut beside the layers stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcq_ray.errors import QuantizeError
from dcq_ray.quantizers.activations import ActivationStart, activation_start
from dcq_ray.quantizers.modules import FrozenInputQuantizer, InputQuantizer, WeightQuantizer
from dcq_ray.quantizers.policy import UNQUANTIZED_BITS, channel_dim, layer_weight
from dcq_ray.quantizers.starts import spread_stride
from dcq_ray.records import LayerPlan

INPUT_QUANTIZER = "dcq_input"
# So many values of a layer's input in a batch tell its distribution.
MAX_SEEN_PER_BATCH = 8192


def put_quantizers(
    module: nn.Module,
    layers: Iterable[LayerPlan],
    starts: Mapping[str, ActivationStart] | None = None,
    *,
    trained: bool = False,
) -> None:
    """Put quantizers on those of the layers that this module has, in place; 32 bits leave a weight or an input alone.

    Args:
        starts: where activation quantizers start, by layer.
        trained: a trained state is loaded afterwards, so no starts are needed, nor searched on the weights.
    """
    modules = dict(module.named_modules())
    shared: dict[int, WeightQuantizer] = {}
    for layer in layers:
        target = modules.get(layer.module)
        if target is None:
            continue
        if layer.activation_scheme is not None:
            start = (starts or {}).get(layer.module, ActivationStart())
            quantizer = InputQuantizer(layer.activation_scheme, layer.activation_bits, start)
            _put_on_input(target, quantizer.to(layer_weight(target).device))
        if layer.bits < UNQUANTIZED_BITS:
            weight = layer_weight(target)
            # Tied layers share one quantizer, or they would learn two steps for one weight.
            if id(weight) not in shared:
                shared[id(weight)] = WeightQuantizer(
                    layer.scheme, layer.bits, weight, channel_dim(layer.kind), search=not trained
                )
            # Unsafe: without a first call that checks what our quantizers keep to, shape and dtype.
            parametrize.register_parametrization(target, "weight", shared[id(weight)], unsafe=True)


def activation_starts(
    module: nn.Module, layers: Sequence[LayerPlan], batches: Iterable[Tensor]
) -> dict[str, ActivationStart]:
    """Where activation quantizers start, from the inputs that the layers of a full-precision module see on some batches.

    Raises:
        QuantizeError: an input is not finite; the layer is named.
    """
    modules = dict(module.named_modules())
    wanted = [layer for layer in layers if layer.activation_scheme is not None and layer.module in modules]
    if not wanted:
        return {}
    seen: dict[str, list[Tensor]] = {layer.module: [] for layer in wanted}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().flatten()
            seen[name].append(values[:: spread_stride(values.numel(), MAX_SEEN_PER_BATCH)].float().cpu())

        return hook

    handles = [modules[layer.module].register_forward_pre_hook(watch(layer.module)) for layer in wanted]
    try:
        with torch.no_grad():
            for batch in batches:
                module(batch.clone())
    finally:
        for handle in handles:
            handle.remove()
    starts = {}
    for layer in wanted:
        if seen[layer.module]:
            try:
                starts[layer.module] = activation_start(torch.cat(seen[layer.module]), layer.activation_bits)
            except QuantizeError as error:
                raise QuantizeError(f"layer {layer.module}: {error}") from error
    return starts


def bake(module: nn.Module) -> dict[str, Tensor]:
    """Turn quantized weights into plain parameters under their own names, in place; returns the quantizers' other state.

    It is, for every layer: `dcq.<module>.bits` (uint8) and `dcq.<module>.scale` (float32, see `WeightQuantizer.scales`);
    `dcq.<module>.input_bits`, `.input_signed` (uint8) and `.input_step` (float32) where its input is quantized.
    """
    extra: dict[str, Tensor] = {}
    baked: list[tuple[nn.Module, Tensor]] = []
    for name, layer in list(module.named_modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrization: Any = layer.parametrizations["weight"]  # type: ignore[index, union-attr]
            quantizer = parametrization[0]
            assert isinstance(quantizer, WeightQuantizer)
            extra[f"dcq.{name}.bits"] = torch.tensor(quantizer.bits, dtype=torch.uint8)
            extra[f"dcq.{name}.scale"] = quantizer.scales(parametrization.original)
            # All are computed before any is put back: tied layers share their original.
            baked.append((layer, layer_weight(layer).detach().clone()))
        inputs = getattr(layer, INPUT_QUANTIZER, None)
        if isinstance(inputs, InputQuantizer):
            step, signed = inputs.step.detach().clone(), bool(inputs.signed)
            extra[f"dcq.{name}.input_bits"] = torch.tensor(inputs.bits, dtype=torch.uint8)
            extra[f"dcq.{name}.input_signed"] = torch.tensor(signed, dtype=torch.uint8)
            extra[f"dcq.{name}.input_step"] = step.float().cpu()
            setattr(layer, INPUT_QUANTIZER, FrozenInputQuantizer(step, inputs.bits, signed))
    for layer, weight in baked:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        with torch.no_grad():
            layer_weight(layer).copy_(weight)
    return extra


def put_input_quantizers(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the input quantizers of a baked student's `dcq.*` state on a network of the teacher's class, in place.

    Raises:
        QuantizeError: a layer is not in the network, or its state is incomplete.
    """
    modules = dict(module.named_modules())
    for key, bits in state.items():
        name = key.removeprefix("dcq.").removesuffix(".input_bits")
        if key != f"dcq.{name}.input_bits":
            continue
        step, signed = state.get(f"dcq.{name}.input_step"), state.get(f"dcq.{name}.input_signed")
        if name not in modules or step is None or signed is None:
            raise QuantizeError(f"{key}: the student's file names a layer that its network lacks, or is incomplete")
        _put_on_input(modules[name], FrozenInputQuantizer(step, int(bits), bool(signed)))


def _put_on_input(layer: nn.Module, quantizer: nn.Module) -> None:
    layer.add_module(INPUT_QUANTIZER, quantizer)
    layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # The quantizer is looked up in the layer, so that a copy of the layer uses its own.
    quantizer = getattr(layer, INPUT_QUANTIZER)
    return (quantizer(inputs[0]), *inputs[1:])
