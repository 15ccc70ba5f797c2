"""The teacher: build it, load its weights, freeze and digest it. The user's own module is never changed."""

from __future__ import annotations

import copy
import difflib
import inspect
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dcq_ray.callables import load_callable
from dcq_ray.digests import tensors_sha256
from dcq_ray.errors import StorageError, TeacherError
from dcq_ray.networks import NETWORKS
from dcq_ray.spec import TeacherSpec
from dcq_ray.storage import open_store

WRAPPERS = ("state_dict", "model_state_dict", "model")
MAX_NAMED_KEYS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A full-precision network in eval mode, without gradients."""

    module: nn.Module
    model: str
    sha256: str
    num_bytes: int


def build_network(spec: TeacherSpec, *, job_folder: str) -> nn.Module:
    """The network that `teacher.model` and `teacher.args` name, with the weights that its function gives it.

    Raises:
        TeacherError: no such network; arguments that its function does not take; not an nn.Module.
    """
    function = _function(spec.model, job_folder)
    try:
        module = function(**spec.args)
    except Exception as error:
        raise TeacherError(
            f"teacher.model: {spec.model} could not be built with {spec.args}: {type(error).__name__}: {error}; its function "
            f"is {_signature(function)}: put its arguments under teacher.args"
        ) from error
    if isinstance(module, torch.jit.ScriptModule):
        raise TeacherError(
            f"teacher.model: {spec.model} returned a compiled torch.jit.ScriptModule, expected the torch.nn.Module that it was "
            "made from: a compiled one has no layers to quantize"
        )
    if not isinstance(module, nn.Module):
        raise TeacherError(
            f"teacher.model: {spec.model} returned a {type(module).__name__}, expected a torch.nn.Module"
        )
    return module


def load_teacher(spec: TeacherSpec, *, job_folder: str) -> Teacher:
    """The teacher with its weights: from a file or URI, a torchvision enum, or as its function returns it.

    Raises:
        TeacherError: the weights cannot be had or do not fit.
    """
    module = build_network(spec, job_folder=job_folder)
    if spec.weights is not None:
        enum = _weights_enum(spec.model, spec.weights)
        if enum is None:
            load_state(module, read_state(spec.weights), source=spec.weights)
        else:
            load_state(module, _download(enum, spec.weights), source=spec.weights)
    return frozen_teacher(module, spec.model)


def frozen_teacher(module: nn.Module, model: str) -> Teacher:
    """A copy of a module in eval mode, without gradients, with the digest of its state; the module stays as it is.

    Raises:
        TeacherError: it cannot be copied, or a tensor of it is not finite.
    """
    try:
        frozen = copy.deepcopy(module)
    except Exception as error:
        raise TeacherError(
            f"teacher.model: {model} cannot be copied ({type(error).__name__}: {error}); a teacher must be a plain module "
            "whose attributes copy.deepcopy can copy"
        ) from error
    frozen.to("cpu").eval().requires_grad_(False)
    state = frozen.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TeacherError(
                f"teacher.model: {model}: its {name} holds values that are not finite; check the weights file"
            )
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return Teacher(module=frozen, model=model, sha256=tensors_sha256(state), num_bytes=num_bytes)


def read_state(source: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file (path or URI), without DataParallel's prefix or a wrapping dictionary.

    torch files are read with `weights_only=True`: a file that would run code is refused.
    """
    folder, separator, name = source.rpartition("/")
    try:
        content = open_store((folder or "/") if separator else ".").read_bytes(name)
    except StorageError as error:
        raise TeacherError(
            f"teacher.weights: {error}; name a .safetensors or torch file, or a torchvision weights enum"
        ) from error
    if source.endswith(".safetensors"):
        return _without_prefix(state_from_bytes(content, source=source))
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f"teacher.weights: {source} holds more than tensors, and loading it would run code: {_first_line(error)}; save the "
            "state_dict alone with torch.save, or better as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TeacherError(
            f"teacher.weights: {source} is neither a .safetensors nor a torch file: {_first_line(error)}"
        ) from error
    return _without_prefix(_unwrapped(loaded, source))


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state strictly into a module, in place; only `num_batches_tracked` may be absent.

    Raises:
        TeacherError: names missing and unexpected keys and those of another shape.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} ({tuple(tensor.shape)} instead of {tuple(expected[name].shape)})"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    told = [
        f"{what} {len(names)}: {', '.join(names[:MAX_NAMED_KEYS])}{', …' if len(names) > MAX_NAMED_KEYS else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if told:
        raise TeacherError(
            f"{source}: the tensors do not fit the network; {'; '.join(told)}; check teacher.model and teacher.args"
        )
    # In the module's own dictionary, since some classes look up the version in its metadata (MNASNet).
    expected.update(state)
    module.load_state_dict(expected)


def state_bytes(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A state as a safetensors file; tensors that share memory are written once each."""
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    return safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, dict(metadata)
    )


def state_from_bytes(content: bytes, *, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises TeacherError naming the source where it is damaged."""
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise TeacherError(f"{source}: not a whole safetensors file: {_first_line(error)}") from error


def _function(model: str, job_folder: str) -> Callable[..., Any]:
    prefix, _, name = model.partition(":")
    if prefix == "dcq_ray":
        if name not in NETWORKS:
            raise TeacherError(f"teacher.model: dcq_ray has no network {name!r}; {_near(name, sorted(NETWORKS))}")
        return NETWORKS[name]
    if prefix == "torchvision":
        # Only here: it brings torch._dynamo along, which takes longer to import than all else together.
        import torchvision

        names = torchvision.models.list_models()
        if name not in names:
            raise TeacherError(f"teacher.model: torchvision has no model {name!r}; {_near(name, names)}")
        builder: Callable[..., Any] = torchvision.models.get_model_builder(name)
        return builder
    return load_callable(model, folder=job_folder, where="teacher.model", error=TeacherError)


def _weights_enum(model: str, weights: str) -> Any:
    """The torchvision enum member of that name, or None where the name is none: then it is a file."""
    prefix, _, name = model.partition(":")
    if prefix != "torchvision" or "/" in weights or weights.endswith((".safetensors", ".pt", ".pth")):
        return None
    import torchvision

    enum = torchvision.models.get_model_weights(name)
    member = weights.rpartition(".")[2]
    if member in enum.__members__:
        return enum[member]
    if weights.isupper() or "_Weights" in weights:
        raise TeacherError(
            f"teacher.weights: {model} has no weights {weights!r}; it has {', '.join(enum.__members__) or 'none'}"
        )
    return None


def _download(enum: Any, name: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = dict(enum.get_state_dict(progress=False, check_hash=True))
    except Exception as error:
        raise TeacherError(
            f"teacher.weights: {name} could not be downloaded from {enum.url}: {_first_line(error)}; fetch that file "
            "elsewhere and name its path in teacher.weights"
        ) from error
    return state


def _unwrapped(loaded: Any, source: str) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()) or not loaded:
        got = f"keys {list(loaded)[:MAX_NAMED_KEYS]}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise TeacherError(
            f"teacher.weights: {source} holds {got}, expected a state_dict (name -> tensor), alone or under "
            f"{', '.join(WRAPPERS)}"
        )
    return dict(loaded)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DataParallel puts `module.` before every name."""
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _signature(function: Callable[..., Any]) -> str:
    try:
        return f"{function.__name__}{inspect.signature(function)}"
    except (TypeError, ValueError, AttributeError):
        return repr(function)


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names[:10])}, …"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
