"""Write a student in one of the forms, run the file, and only then give it its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dcq_ray.errors import ExportError, StorageError
from dcq_ray.export.checking import check_logits, logits_of
from dcq_ray.export.loading import is_rebuilt, load_packed, student_network
from dcq_ray.export.packed import pack
from dcq_ray.export.student import Student
from dcq_ray.teacher import build_network, state_bytes, state_from_bytes

Form = Literal["safetensors", "packed", "onnx", "torch-export"]
# What a network of the teacher's class needs beside its own weights to be the student.
_INPUT_KEYS = (".input_bits", ".input_signed", ".input_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that was written, run and found to give the student's results."""

    num_bytes: int
    num_float_bytes: int
    """Of the network's state in full precision."""
    num_samples: int
    """Held-out images on which it was run."""
    largest_difference: float
    """Of a logit, as a share of the student's largest."""


def export_student(student: Student, form: Form, path: str, *, opset: int | None = None) -> Exported:
    """Write a student to a local path, in place of what is there, once the file has given its results on held-out images.

    Args:
        opset: of the ONNX graph; None: the one that stores the weights smallest.

    Raises:
        ExportError: the file gives other results; there is none then, and an older one stays.
    """
    target = Path(path)
    # In the same folder, or the rename would be a copy; with the same ending, by which some readers know a form.
    temporary = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(student, form, str(temporary), opset)
        run = _runner(student, form, str(temporary))
        labels = None if student.held_out.labels is None else torch.from_numpy(student.held_out.labels)
        largest = check_logits(
            logits_of(run, student.held_out, student.job.data.batch_size),
            student.logits,
            labels,
            steps_may_differ=form in ("onnx", "torch-export") and _quantizes_inputs(student.state),
            source=f"{path} ({form})",
        )
        num_bytes = temporary.stat().st_size
        temporary.replace(target)
    except ExportError as error:
        # It is told of by the name that was asked for.
        raise ExportError(str(error).replace(str(temporary), path)) from error
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error}; name a file in a local folder that you may write to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(
        num_bytes=num_bytes,
        num_float_bytes=sum(value.nbytes for value in student.network.state_dict().values()),
        num_samples=len(student.held_out),
        largest_difference=largest,
    )


def _write(student: Student, form: Form, path: str, opset: int | None) -> None:
    teacher = student.job.teacher
    if form == "packed":
        content = pack(student.state, student.layers, model=teacher.model, args=teacher.args, metadata=student.metadata)
        Path(path).write_bytes(content)
    elif form == "safetensors":
        plain = {
            name: value
            for name, value in student.state.items()
            if not name.startswith("dcq.") or name.endswith(_INPUT_KEYS)
        }
        # Readers of safetensors know by this word that the tensors are PyTorch's.
        Path(path).write_bytes(state_bytes(plain, {"format": "pt", **student.metadata}))
    else:
        example = student.example()
        if form == "onnx":
            from dcq_ray.export.onnx_graph import write_onnx

            write_onnx(
                student.network,
                example,
                path,
                layers=student.layers,
                state=student.state,
                metadata=student.metadata,
                opset=opset,
            )
        else:
            from dcq_ray.export.program import write_program

            write_program(student.network, example, path, metadata=student.metadata)


def _runner(student: Student, form: Form, path: str) -> Callable[[Tensor], Tensor]:
    """What runs the file, by its own form's means alone."""
    teacher = student.job.teacher
    if form == "packed":
        network = None if is_rebuilt(teacher.model, teacher.args) else _fresh_network(student)
        return load_packed(path, network=network)
    if form == "safetensors":
        return student_network(
            _fresh_network(student), state_from_bytes(Path(path).read_bytes(), source=path), source=path
        )
    if form == "onnx":
        from dcq_ray.export.onnx_graph import open_onnx

        run = open_onnx(path)
        return lambda images: torch.from_numpy(run(images.numpy()))
    from dcq_ray.export.program import open_program

    return open_program(path)


def _fresh_network(student: Student) -> nn.Module:
    return build_network(student.job.teacher, job_folder=student.job_folder)


def _quantizes_inputs(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("dcq.") and name.endswith(".input_bits") for name in state)
