"""What a module must be before it is traced: a map of one batch of images to logits, made of plain weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dcq_ray.errors import PartitionError

LAYER_TYPES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Whose weights and inputs are quantized."""

MAX_LINE = 120
_CLIP_TYPES = (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)


def check_interface(module: nn.Module, images: Tensor) -> None:
    """Check that a module in eval mode maps images [N, ...] to logits [N, K], and that its weights are its own.

    Raises:
        PartitionError: it does not; it changes itself as it runs; a layer's weight is computed; it is compiled.
    """
    _check_module(module)
    parameters = inspect.signature(module.forward).parameters.values()
    wanted = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if len(wanted) > 1:
        raise PartitionError(
            f"the teacher takes {len(wanted)} inputs ({', '.join(wanted)}), expected one batch of images; wrap it in a "
            "module that makes the others itself"
        )
    shape = f"(batch, {', '.join(map(str, images.shape[1:]))})"
    clips = [name for name, part in module.named_modules() if isinstance(part, _CLIP_TYPES)]
    if clips and images.ndim == 4:
        # Checked first: a 3-D convolution takes a batch of 3 images for one clip of 3 channels.
        raise PartitionError(
            f"the teacher is a network for clips: its {clips[0]} is three-dimensional and wants (batch, channels, frames, "
            f"height, width), but the data are images {shape}; only classifiers of images can be cut"
        )
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.no_grad():
            output = module(images.clone())
    except Exception as error:
        raise PartitionError(
            f"the teacher does not run on images of shape {tuple(images.shape[1:])}: {first_line(error)}; check "
            "data.channels, data.image_size and teacher.args"
        ) from error
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(images)):
        raise PartitionError(
            f"the teacher returns {told(output)}, expected one tensor of logits (batch, classes): it is no classifier, or "
            "gives more than its logits; wrap it in a module that returns its logits alone"
        )
    changed = [name for name, buffer in module.named_buffers() if not same_values(buffer, before.get(name, buffer))]
    if changed:
        raise PartitionError(
            f"the teacher changes its own {', '.join(changed[:3])} whenever it runs, in eval mode too, so its sections would "
            "not stay what they were; let it do so in training mode alone"
        )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; what is no number in one is none in the other."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def told(value: Any) -> str:
    """What a value is, in an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, dict):
        return f"a dict ({', '.join(map(str, list(value)[:4]))})"
    # torch.fx has containers of its own, derived from these.
    for container in (list, tuple):
        if isinstance(value, container):
            kinds = sorted({type(part).__name__ for part in value})
            return f"a {container.__name__} of {len(value)} ({', '.join(kinds)})"
    return f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of a long one, the first sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= MAX_LINE else line.partition(". ")[0]


def _check_module(module: nn.Module) -> None:
    if hasattr(module, "_orig_mod"):
        raise PartitionError(
            "the teacher is compiled (torch.compile); give the module itself, and compile the student when it is done"
        )
    for name, part in module.named_modules():
        if isinstance(part, LAYER_TYPES) and "weight" not in part._parameters:
            raise PartitionError(
                f"the weight of the teacher's {name or type(part).__name__} is no parameter: it is computed in every forward "
                "(weight norm, spectral norm, pruning, or another parametrization), and a quantizer would be put on what is "
                "not there; make it plain in the function that builds the teacher, with "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), remove_weight_norm, "
                "remove_spectral_norm, or prune.remove"
            )
