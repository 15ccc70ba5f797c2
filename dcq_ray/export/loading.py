"""A student's file -> a plain network in eval mode that gives the student's logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dcq_ray.errors import ExportError
from dcq_ray.export.packed import PackedFile, open_packed, unpack
from dcq_ray.networks import NETWORKS
from dcq_ray.quantizers import put_input_quantizers
from dcq_ray.spec import TeacherSpec
from dcq_ray.storage import open_store
from dcq_ray.teacher import build_network, load_state


def load_packed(path: str, *, network: nn.Module | None = None) -> nn.Module:
    """The student of a packed file (path or URI) as a plain network in eval mode, without gradients.

    Args:
        network: where the teacher is a function of your own, what it returns; the student is loaded into it, in place.
            Networks of dcq_ray and torchvision are built from the file.

    Raises:
        ExportError: no packed file, a damaged one, or one of another version; its network cannot be built, or is another.
    """
    packed = open_packed(_read(path), source=path)
    if network is None:
        network = _network(packed)
    _check_shapes(packed, network)
    return student_network(network, unpack(packed), source=path)


def student_network(network: nn.Module, state: Mapping[str, Tensor], *, source: str) -> nn.Module:
    """The network with a baked student's state and its input quantizers, in place, in eval mode, without gradients."""
    load_state(network, {name: value for name, value in state.items() if not name.startswith("dcq.")}, source=source)
    put_input_quantizers(network, state)
    return network.eval().requires_grad_(False)


def is_rebuilt(model: str, args: Mapping[str, Any]) -> bool:
    """Whether a file's network is built from the file alone: it names a function, and a stranger's file could name any."""
    prefix, _, name = model.partition(":")
    if prefix == "dcq_ray":
        return name in NETWORKS
    # With these arguments torchvision would fetch what the file replaces anyway.
    return prefix == "torchvision" and not {"weights", "weights_backbone"} & set(args)


def _read(path: str) -> bytes:
    # Options of a URI belong to its folder, which the store opens.
    place, question, options = path.partition("?") if "://" in path else (path, "", "")
    folder, separator, name = place.rpartition("/")
    return open_store(((folder or "/") if separator else ".") + question + options).read_bytes(name)


def _network(packed: PackedFile) -> nn.Module:
    if not is_rebuilt(packed.model, packed.args):
        raise ExportError(
            f"{packed.source}: its network is {packed.model} with the arguments {packed.args}, which is not built because a file "
            "says so, since that would run any code; build it yourself and give it: dcq_ray.load(path, network=…)"
        )
    return build_network(TeacherSpec(model=packed.model, args=packed.args), job_folder=str(Path.cwd()))


def _check_shapes(packed: PackedFile, network: nn.Module) -> None:
    """Refuse a file whose tensors are not the network's, before any is unpacked."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for entry in packed.tensors:
        if not entry.name.startswith("dcq.") and shapes.get(entry.name) != entry.shape:
            expected = f"the shape {tuple(shapes[entry.name])}" if entry.name in shapes else "no such tensor"
            raise ExportError(
                f"{packed.source}: {entry.name} has the shape {tuple(entry.shape)}, its network has {expected}; give the network "
                "that the student was trained from"
            )
