"""What a merge made of a stitched student, kept: a search that merged and judged one leaves it to the run it becomes.

A file of safetensors with the tensors that the merge changed, and beside it a record that says whose they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcq_ray.data import Splits
from dcq_ray.digests import json_sha256, library_versions, tensors_sha256
from dcq_ray.errors import DcqError
from dcq_ray.phases.committed import layer_identity
from dcq_ray.records import LayerPlan, MergeStep, RunContext, seal_json, unseal_json
from dcq_ray.storage import Store
from dcq_ray.teacher import state_bytes, state_from_bytes

MERGED_FILE = "merged.json"
MERGED_TENSORS_FILE = "merged.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMerge:
    """The record of a kept merge."""

    key: str
    """Digest of all that determines it."""
    tensors_sha256: str
    steps: tuple[MergeStep, ...]


def merge_key(context: RunContext, student: nn.Module, layers: Sequence[LayerPlan], splits: Splits) -> str:
    """Digest of all that a merge without a polish depends on, its student as it was stitched first of all.

    Args:
        layers: of that student, by which it was stitched; those of the context's plan may be others.
    """
    job = context.job
    return json_sha256(
        {
            "student": tensors_sha256(student.state_dict()),
            "layers": [layer_identity(layer) for layer in layers],
            "teacher": context.plan.teacher_sha256,
            "train": splits.train.sha256,
            "held_out": splits.held_out.sha256,
            "batch_size": job.data.batch_size,
            "reduce": [job.reduce.reestimate_batchnorm, job.reduce.roll_back],
            "num_threads": job.train.num_threads,
            "device": context.device,
            "versions": library_versions(),
        }
    )


def keep_merge(
    store: Store, key: str, steps: tuple[MergeStep, ...], before: Mapping[str, Tensor], student: nn.Module
) -> None:
    """Keep a merge in a folder; `before`: the student's state as it was stitched."""
    changed = {
        name: tensor.detach().cpu()
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor.cpu(), before[name].cpu())
    }
    store.write_bytes(MERGED_TENSORS_FILE, state_bytes(changed, {}))
    # Written last: it says that the tensors are whole.
    record = KeptMerge(key=key, tensors_sha256=tensors_sha256(changed), steps=steps)
    store.write_bytes(MERGED_FILE, seal_json(record))


def take_merge(store: Store, key: str, student: nn.Module) -> tuple[MergeStep, ...] | None:
    """Make of a stitched student what the kept merge made of it, in place; None, and nothing done, where there is none."""
    content, tensors = (store.read_bytes_or_none(name) for name in (MERGED_FILE, MERGED_TENSORS_FILE))
    if content is None or tensors is None:
        return None
    # A damaged one is merged again.
    with contextlib.suppress(ValueError, DcqError):
        found = unseal_json(KeptMerge, content)
        changed = state_from_bytes(tensors, source=store.location(MERGED_TENSORS_FILE))
        if found.key == key and tensors_sha256(changed) == found.tensors_sha256:
            student.load_state_dict({**student.state_dict(), **changed})
            return found.steps
    return None


def hand_on_merge(source: Store, target: Store) -> None:
    """Copy a kept merge, if there is one, into another folder."""
    for name in (MERGED_TENSORS_FILE, MERGED_FILE):
        content = source.read_bytes_or_none(name)
        if content is not None:
            target.write_bytes(name, content)
