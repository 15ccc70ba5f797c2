"""A student as a `torch.export` program: one file that runs without the network's own code."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dcq_ray.errors import ExportError

METADATA = "dcq-ray.json"


def write_program(network: nn.Module, example: Tensor, path: str, *, metadata: Mapping[str, str]) -> None:
    """Write a baked student, its weights in float32; its batch may have any size from 2 on, and 1.

    Args:
        example: images [B, C, H, W], B >= 2.

    Raises:
        ExportError: torch.export cannot trace the network.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace this network: {str(error).strip().splitlines()[0]}; choose packed or safetensors"
        ) from error
    _forget_sources(program)
    # Through a buffer: the library warns of a name that does not end in .pt2.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(dict(metadata), indent=2)})
    Path(path).write_bytes(buffer.getvalue())


def open_program(path: str) -> Callable[[Tensor], Tensor]:
    """The program of a file, from images [B, C, H, W] to logits [B, K]; both raise ExportError where it cannot."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(Path(path).read_bytes())).module()
    except Exception as error:
        raise ExportError(
            f"{path}: torch.export cannot load it: {str(error).strip().splitlines()[0]}; export it again"
        ) from error

    def run(images: Tensor) -> Tensor:
        try:
            return program(images)
        # Its guards are assertions.
        except Exception as error:
            raise ExportError(
                f"{path}: the program cannot run images of shape {tuple(images.shape)}: {str(error).strip().splitlines()[0]}; "
                "choose packed or safetensors"
            ) from error

    return run


def _forget_sources(program: torch.export.ExportedProgram) -> None:
    """Leave out the lines of source behind every node: a shipped file is not to tell the folders of who wrote it."""
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
