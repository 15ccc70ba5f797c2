"""Checkpoints of a training: written whole, read back only where whole.

A checkpoint is a file of tensors under a name of its own and, written last, the mark that holds their digest; so one that
was killed half-way does not count. Owns the two files' form; knows neither what is trained nor who may write: whoever may be
replaced by another writer gives a `check`, which is called before every change and raises where that has happened.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from dcq_ray.digests import json_sha256, tensors_sha256
from dcq_ray.errors import StorageError, TeacherError
from dcq_ray.records import from_json, to_json
from dcq_ray.section import TrainingState
from dcq_ray.storage import Store
from dcq_ray.teacher import state_bytes, state_from_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a training took up to a checkpoint, all its processes together, and who trained it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    epoch: int = 0
    """Of the lease of the driver for which the process that saved it worked."""
    restarts: int = 0
    """Workers that died under that driver."""
    earlier_restarts: int = 0
    """Workers and drivers that ended before that driver."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A training after some of its steps, and the best of its epochs where they are compared."""

    training: TrainingState
    effort: Effort = Effort()
    held_out_top1s: tuple[float, ...] = ()
    """Of every finished epoch."""
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """The module's state after the best of them; empty before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMark:
    """The numbers of a checkpoint; it counts if their digest and that of its tensors fit."""

    num_steps: int
    num_sample_passes: int
    seconds: float
    input_wait_seconds: float
    held_out_top1s: tuple[float, ...]
    effort: Effort
    sha256: str


def save_checkpoint(
    store: Store,
    state: Checkpoint,
    *,
    beside: str | None,
    position: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Write a checkpoint and return its name; all others in the folder but the one named `beside` are deleted.

    Args:
        position: by which checkpoints of one folder are in order; the number of steps unless told.
        check: called before anything is written or deleted; raises where this process may not any more.
    """
    training = state.training
    tensors = {
        **{f"module/{name}": value for name, value in training.module.items()},
        **{f"optimizer/{name}": value for name, value in training.optimizer.items()},
        **{f"best/{name}": value for name, value in state.best.items()},
        "losses": torch.tensor(training.losses, dtype=torch.float64),
    }
    mark = CheckpointMark(
        num_steps=training.num_steps,
        num_sample_passes=training.num_sample_passes,
        seconds=training.seconds,
        input_wait_seconds=training.input_wait_seconds,
        held_out_top1s=state.held_out_top1s,
        effort=state.effort,
        sha256="",
    )
    name = f"{training.num_steps if position is None else position:010d}-{uuid.uuid4().hex[:8]}"
    content, sealed = state_bytes(tensors, {}), to_json(_sealed(mark, tensors))
    check()
    store.write_bytes(f"{name}.safetensors", content)
    check()
    store.write_bytes(f"{name}.json", sealed)
    check()
    kept = {f"{whole}{end}" for whole in (name, beside) for end in (".json", ".safetensors")}
    # Marks first (by their names, too): a mark without tensors would be told as damage.
    for old in sorted(set(store.list_names()) - kept):
        store.delete(old)
    return name


def newest_checkpoint(store: Store, *, on_damage: Callable[[str], None]) -> tuple[Checkpoint | None, str | None]:
    """The newest whole checkpoint of a folder and its name; (None, None) where there is none.

    Damaged ones are passed over, and `on_damage` is told of each in a sentence.
    """
    return _first_whole(store, sorted(_names(store), reverse=True), on_damage)


def checkpoint_at(
    store: Store, position: int, *, on_damage: Callable[[str], None]
) -> tuple[Checkpoint | None, str | None]:
    """A whole checkpoint at that very position and its name; (None, None) where there is none."""
    names = [name for name in _names(store) if _position(name) == position]
    return _first_whole(store, names, on_damage)


def checkpoint_positions(store: Store) -> set[int]:
    """The positions of the checkpoints of a folder by their marks, whole or damaged."""
    return {_position(name) for name in _names(store)}


def _names(store: Store) -> list[str]:
    """The checkpoints that have a mark; what else lies in the folder is none."""
    names = (name.removesuffix(".json") for name in store.list_names() if name.endswith(".json"))
    return [name for name in names if name.partition("-")[0].isdecimal()]


def _position(name: str) -> int:
    return int(name.partition("-")[0])


def _first_whole(
    store: Store, names: Iterable[str], on_damage: Callable[[str], None]
) -> tuple[Checkpoint | None, str | None]:
    for name in names:
        try:
            return _read_checkpoint(store, name), name
        except (ValueError, TeacherError, StorageError):
            on_damage(f"passed over a damaged checkpoint, {store.location(name)}")
    return None, None


def _read_checkpoint(store: Store, name: str) -> Checkpoint:
    """Raises ValueError, TeacherError or StorageError where it is damaged."""
    mark = from_json(CheckpointMark, store.read_bytes(f"{name}.json"))
    tensors = state_from_bytes(store.read_bytes(f"{name}.safetensors"), source=store.location(name))
    if _sealed(mark, tensors) != mark:
        raise StorageError(f"{store.location(name)}: the checkpoint is damaged: its sha256 differs")
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "optimizer": {}, "best": {}, "losses": {}}
    for path, value in tensors.items():
        part, _, inner = path.partition("/")
        parts[part][inner] = value
    training = TrainingState(
        num_steps=mark.num_steps,
        num_sample_passes=mark.num_sample_passes,
        module=parts["module"],
        optimizer=parts["optimizer"],
        losses=tuple(parts["losses"][""].tolist()),
        seconds=mark.seconds,
        input_wait_seconds=mark.input_wait_seconds,
    )
    return Checkpoint(training=training, effort=mark.effort, held_out_top1s=mark.held_out_top1s, best=parts["best"])


def _sealed(mark: CheckpointMark, tensors: Mapping[str, Tensor]) -> CheckpointMark:
    numbers = {**asdict(mark), "sha256": tensors_sha256(tensors)}
    return replace(mark, sha256=json_sha256(numbers))
