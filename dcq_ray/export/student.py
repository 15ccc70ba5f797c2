"""A finished run -> its student as a network, its held-out images, and what is said of it in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dcq_ray.data import Part, load_splits
from dcq_ray.digests import library_versions, tensors_sha256
from dcq_ray.errors import ExportError, StorageError, UsageError
from dcq_ray.export.checking import check_report, logits_of
from dcq_ray.export.loading import student_network
from dcq_ray.phases import read_report
from dcq_ray.phases.reduce import STUDENT_FILE
from dcq_ray.records import LayerPlan, RunReport
from dcq_ray.spec import Job
from dcq_ray.storage import Store
from dcq_ray.teacher import build_network, state_from_bytes
from dcq_ray.validate import top_k


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Student:
    """The student of a finished run, and what it gives on the run's held-out images."""

    job: Job
    job_folder: str
    layers: Sequence[LayerPlan]
    state: dict[str, Tensor]
    """As the run wrote it, with its `dcq.*` tensors."""
    network: nn.Module
    held_out: Part
    logits: Tensor
    """Of the held-out images, in order: [N, K] float32."""
    metadata: dict[str, str]
    """For the file: of which run and teacher it is, and how good."""

    def example(self) -> Tensor:
        """Two held-out images [2, C, H, W], of one where there is one alone: a batch of 1 would be traced as no other."""
        return self.held_out.images(np.resize(np.arange(len(self.held_out)), 2))


def finished_report(store: Store) -> RunReport:
    """The report of a finished run; raises UsageError where there is no run, or it has not finished."""
    try:
        report = read_report(store)
    except StorageError as error:
        raise UsageError(f"{store.uri}: {error}") from error
    if report is None:
        raise UsageError(
            f"{store.uri}: no report.json that can be read there, expected a run directory; name a finished run"
        )
    if report.status != "succeeded" or report.student is None:
        raise UsageError(
            f"{store.uri}: its run has not finished: got the status {report.status}, expected succeeded; `dcq-ray run` goes on"
        )
    return report


def open_student(store: Store, report: RunReport, job: Job, *, job_folder: str) -> Student:
    """Build the student of a finished run and run it on the held-out images, on the CPU.

    Raises:
        ExportError: the student's file is not the one that the report names, or it does not give the report's top-1 here.
    """
    assert report.student is not None
    state = state_from_bytes(store.read_bytes(STUDENT_FILE), source=store.location(STUDENT_FILE))
    sha256 = tensors_sha256(state)
    if sha256 != report.student.sha256:
        raise ExportError(
            f"{store.location(STUDENT_FILE)}: got tensors of SHA-256 {sha256}, expected {report.student.sha256} of the report; "
            "the file was changed, or is damaged; run the job again"
        )
    torch.set_num_threads(job.train.num_threads)
    network = student_network(
        build_network(job.teacher, job_folder=job_folder), state, source=store.location(STUDENT_FILE)
    )
    held_out = load_splits(job.data, seed=job.seed, job_folder=job_folder).held_out
    logits = logits_of(network, held_out, job.data.batch_size)
    if report.validation is not None:
        labels = None if held_out.labels is None else torch.from_numpy(held_out.labels)
        on_cpu = all(section.device == "cpu" for section in report.sections)
        check_report(logits, labels, report.validation, on_cpu=on_cpu, source=store.location(STUDENT_FILE))
    return Student(
        job=job,
        job_folder=job_folder,
        layers=report.layers,
        state=state,
        network=network,
        held_out=held_out,
        logits=logits,
        metadata=_metadata(report, job, held_out, logits),
    )


def _metadata(report: RunReport, job: Job, held_out: Part, logits: Tensor) -> dict[str, str]:
    assert report.student is not None
    versions = library_versions()
    accuracy = {
        "test_top1": report.student.top1,
        "teacher_test_top1": report.teacher.top1,
        "held_out_top1": None if held_out.labels is None else top_k(logits, torch.from_numpy(held_out.labels), 1),
        "agreement_with_teacher": None if report.validation is None else report.validation.agreement_with_teacher,
    }
    return {
        "run": report.name,
        "run_digest": report.run_digest,
        "model": job.teacher.model,
        "args": json.dumps(job.teacher.args, sort_keys=True),
        "teacher_sha256": report.teacher.sha256,
        "student_sha256": report.student.sha256,
        **{name: repr(value) for name, value in accuracy.items() if value is not None},
        "dcq_ray": versions["dcq_ray"],
        "torch": versions["torch"],
    }
