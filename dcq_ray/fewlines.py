"""A run in a few lines of Python: `dcq_ray.quantize` makes a job of its arguments and runs it as the command line does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import nn

from dcq_ray import given
from dcq_ray.errors import UsageError
from dcq_ray.export import Exported, Form, export_student, open_student
from dcq_ray.export.loading import student_network
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, run_local
from dcq_ray.phases.reduce import STUDENT_FILE
from dcq_ray.progress import Monitor, Style, open_monitor
from dcq_ray.records import RunReport
from dcq_ray.report import report_html
from dcq_ray.report.words import verdict
from dcq_ray.spec import Job
from dcq_ray.storage import open_store
from dcq_ray.teacher import build_network, state_from_bytes

SOURCE = "dcq_ray.quantize"
PAGE_HEIGHT = "40rem"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Quantized:
    """A finished run: its student in eval mode without gradients, its report, and where its files lie.

    A notebook shows the report's page for it.
    """

    student: nn.Module
    report: RunReport
    run_dir: str
    job: Job

    def export(self, path: str, form: Form = "packed") -> Exported:
        """Write the student to a local file as `dcq-ray export` does, run on held-out images; raises ExportError."""
        student = open_student(open_store(self.run_dir), self.report, self.job, job_folder=_folder())
        return export_student(student, form, path)

    def __repr__(self) -> str:
        # The network, the curves and the digests would fill pages.
        return f"Quantized(run_dir={self.run_dir!r}): {verdict(self.report)}"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style and the notebook's stay apart."""
        style = f"width: 100%; height: {PAGE_HEIGHT}; border: 0"
        page = escape(report_html(self.report), quote=True)
        return f'<iframe title="Report of {escape(self.report.name, quote=True)}" style="{style}" srcdoc="{page}"></iframe>'


def quantize(
    model: nn.Module | str,
    dataset: Any,
    *,
    bits: int,
    sections: int,
    scheme: str,
    activations: int | None,
    epochs: int,
    test: Any,
    name: str | None,
    run_dir: str | None,
    address: str | None,
    settings: Mapping[str, Any] | None,
    fresh: bool,
    progress: bool,
) -> Quantized:
    """Quantize a model with the phases of `dcq-ray run`; see `dcq_ray.quantize`, which has the defaults."""
    name = _name(model) if name is None else name
    run_dir = f"runs/{name}" if run_dir is None else run_dir
    if address is not None:
        _refuse_objects(model, dataset, address)
    document: dict[str, Any] = {
        "name": name,
        "teacher": _teacher(model, run_dir),
        "data": _data(dataset, test, run_dir),
        "sections": {"count": sections},
        "quantize": {"weights": {"scheme": scheme, "bits": bits}},
        "train": {"epochs": epochs},
        "storage": {"run_dir": run_dir},
    }
    if activations is not None:
        document["quantize"]["activations"] = {"bits": activations}
    overrides = [_override(key, value) for key, value in (settings or {}).items()]
    job = resolve_job(document, source=SOURCE, overrides=overrides)
    with _same_threads(), _watching(job, progress) as monitor:
        report = _run(job, address=address, fresh=fresh, monitor=monitor)
    store = open_store(job.storage.run_dir)
    store.write_bytes("report.html", report_html(report).encode())
    source = store.location(STUDENT_FILE)
    state = state_from_bytes(store.read_bytes(STUDENT_FILE), source=source)
    network = build_network(job.teacher, job_folder=_folder()).to("cpu")
    return Quantized(
        student=student_network(network, state, source=source), report=report, run_dir=job.storage.run_dir, job=job
    )


def _run(job: Job, *, address: str | None, fresh: bool, monitor: Monitor | None) -> RunReport:
    emit = ignore_progress if monitor is None else monitor.update
    owner = f"{SOURCE} of job {job.name}"
    if address is None:
        return run_local(job, _folder(), emit=emit, owner=owner, fresh=fresh)
    from dcq_ray.remote import run_remote

    return run_remote(
        job,
        _folder(),
        address=address,
        environment=os.environ,
        emit=emit,
        say=(lambda _: None) if monitor is None else monitor.message,
        owner=owner,
        fresh=fresh,
    )


def _folder() -> str:
    """Where functions that are named are looked for."""
    return os.getcwd()


def _name(model: nn.Module | str) -> str:
    """A run's name after its model."""
    told = model.partition(":")[2] if isinstance(model, str) else type(model).__name__
    return re.sub(r"[^A-Za-z0-9._-]+", "-", told).strip("-._") or "model"


def _refuse_objects(model: nn.Module | str, dataset: Any, address: str) -> None:
    for what, value, example in (("model", model, "torchvision:resnet18"), ("dataset", dataset, "cifar10")):
        if not isinstance(value, str):
            raise UsageError(
                f"{SOURCE}: address={address!r} with a {what} that is an object ({type(value).__name__}): Ray's workers build "
                f"it by name; expected a name such as {example!r}, or 'package.module:function' of your own, or address=None, "
                "which runs in this process"
            )


def _teacher(model: nn.Module | str, key: str) -> dict[str, Any]:
    if isinstance(model, str):
        return {"model": model}
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{SOURCE}: model: got a {type(model).__name__}, expected a torch.nn.Module with its weights, or a name such as "
            "'torchvision:resnet18'"
        )
    given.give_model(key, model)
    return {"model": given.MODEL, "args": {"key": key}}


def _data(dataset: Any, test: Any, key: str) -> dict[str, Any]:
    if isinstance(dataset, str):
        if test is not None:
            raise UsageError(
                f"{SOURCE}: test: got a {type(test).__name__} beside the data set {dataset!r}, which has its own; leave it out"
            )
        return {"dataset": dataset}
    given.give_images(key, {"train": dataset, "test": test})
    return {"dataset": given.IMAGES, "args": {"key": key}}


def _override(key: str, value: Any) -> str:
    try:
        # JSON is YAML; and a value of Python is no place for variables.
        return f"{key}={json.dumps(value).replace('${', '$${')}"
    except TypeError as error:
        raise UsageError(
            f"{SOURCE}: settings[{key!r}]: got a {type(value).__name__}, expected what a job file holds: numbers, texts, lists "
            f"and mappings ({error})"
        ) from None


@contextlib.contextmanager
def _same_threads() -> Iterator[None]:
    """A run sets the threads of its job; the caller's are put back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _watching(job: Job, progress: bool) -> Iterator[Monitor | None]:
    """One line that rewrites itself, in a notebook and on a terminal; lines elsewhere."""
    if not progress:
        yield None
        return
    rewrites = sys.stdout.isatty() or "ipykernel" in sys.modules
    style: Style = "line" if rewrites else "plain"
    with open_monitor(style=style, stream=sys.stdout, name=job.name) as monitor:
        yield monitor
