"""Models and images that a caller of this process gave as objects, where a job asks for functions by name.

A job names `dcq_ray.given:model` and `dcq_ray.given:images` with the key under which they were given: the run's directory. They
are known in this process alone, for as long as it lives: nothing is pickled, and a run keeps weights and activations of them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dcq_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

MODEL = f"{__name__}:model"
IMAGES = f"{__name__}:images"

_models: dict[str, nn.Module] = {}
_images: dict[str, Any] = {}


def give_model(key: str, module: nn.Module) -> None:
    """Keep a module under a key, in place of an earlier one."""
    _models[key] = module


def give_images(key: str, parts: dict[str, Any]) -> None:
    """Keep what a data set's function would return under a key, in place of an earlier one."""
    _images[key] = parts


def model(key: str) -> nn.Module:
    """A copy of the module that was given under a key; raises UsageError where this process knows none."""
    found: nn.Module = _of(_models, key, "model")
    return copy.deepcopy(found)


def images(key: str) -> Any:
    """The images that were given under a key; raises UsageError where this process knows none."""
    return _of(_images, key, "images")


def _of(known: dict[str, Any], key: str, what: str) -> Any:
    if key not in known:
        raise UsageError(
            f"the {what} {key!r}: given to dcq_ray.quantize as an object, which no other process knows; call dcq_ray.quantize "
            "with it again in this process, or name a function, package.module:function, which every process can import"
        )
    return known[key]
