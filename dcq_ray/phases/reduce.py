"""Reduce: measure every section alone, stitch them, re-estimate BatchNorm, validate, write the student and the report.

Held-out images serve every choice and every intermediate figure; test images are touched once, for the figures of the
teacher, the untrained and the final student.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dcq_ray.data import Part, Splits, ordered_batches
from dcq_ray.digests import json_sha256, tensors_sha256
from dcq_ray.phases.checkpoints import Effort
from dcq_ray.phases.committed import layer_identity, section_weights, trained_section
from dcq_ray.phases.context import Emit, Network, choose_device, refuse_stale, section_store
from dcq_ray.phases.diagnosis import diagnose
from dcq_ray.phases.kept_merge import MERGED_FILE, merge_key, take_merge
from dcq_ray.phases.polish import attempt_step, judge_of, polish, remove_polish
from dcq_ray.phases.prepare import part_top1, teacher_top1
from dcq_ray.phases.refitting import refit_sections
from dcq_ray.phases.saving import SaveRequest
from dcq_ray.phases.sources import CALIBRATION_SAMPLES
from dcq_ray.phases.validating import student_sections, validate
from dcq_ray.quantizers import activation_starts, bake, packed_num_bytes
from dcq_ray.records import (
    Diagnosis,
    MergeStep,
    Progress,
    RunContext,
    SectionMeasurement,
    SectionResult,
    ValidationReport,
    seal_json,
    unseal_json,
)
from dcq_ray.stitch import has_batchnorm, reestimate_batchnorm, stitch
from dcq_ray.storage import open_store
from dcq_ray.teacher import state_bytes
from dcq_ray.validate import agreement, divergence, top_k

# Statistics over so many images times their positions are exact enough; more would cost a pass over the train part.
MAX_BATCHNORM_SAMPLES = 5120
# A section alone is measured on so many held-out images at most: its score is a hint, and passes for it are many.
MAX_ALONE_SAMPLES = 1000
MEASUREMENT_FILE = "measurement.json"
SCORES_FILE = "test-scores.json"
STUDENT_FILE = "student.safetensors"
# As a report names it.
BATCHNORM_STEP = "BatchNorm re-estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class TestScores:
    """Top-1 on the test part; None without labels."""

    __test__ = False

    key: str
    teacher_top1: float | None
    untrained_top1: float | None
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What the reducer found about the stitched student."""

    student_sha256: str
    student_num_bytes_packed: int
    test_top1: float | None
    validation: ValidationReport
    diagnosis: Diagnosis
    merge_steps: tuple[MergeStep, ...]
    seconds: float
    cpu_seconds: float


def measured_section(context: RunContext, result: SectionResult) -> SectionMeasurement | None:
    """The measurement that an earlier reducer made of this attempt, or None."""
    content = section_store(context, result.index).child(result.attempt).read_bytes_or_none(MEASUREMENT_FILE)
    if content is None:
        return None
    try:
        found = unseal_json(SectionMeasurement, content)
    except ValueError:
        return None
    return found if found.task_digest == result.task_digest else None


def measure_sections(
    context: RunContext, results: Sequence[SectionResult], network: Network, splits: Splits
) -> tuple[SectionMeasurement, ...]:
    """Measure the teacher with one section replaced, for each of these; kept beside their weights.

    On the first `MAX_ALONE_SAMPLES` held-out images, which are in random order.
    Sections that are measured together share one pass of the teacher.
    """
    start_cpu_seconds = time.process_time()
    torch.set_num_threads(context.job.train.num_threads)
    device = choose_device(context.device)
    sections = [section.to(device).eval() for section in network.sections]
    students = {result.index: trained_section(context, result, network).to(device) for result in results}
    alone: dict[int, list[Tensor]] = {index: [] for index in students}
    errors, norms = dict.fromkeys(students, 0.0), dict.fromkeys(students, 0.0)
    reference = []
    with torch.no_grad():
        for images in _first_images(splits.held_out, context.job.data.batch_size, MAX_ALONE_SAMPLES):
            value, replaced = images.to(device), dict[int, Tensor]()
            for index, section in enumerate(sections):
                # Clones, since a section may work in place on its input.
                begun = {number: section(output) for number, output in replaced.items()}
                if index in students:
                    begun[index] = students[index](value.clone())
                value, replaced = section(value), begun
                if index in students:
                    errors[index] += float((replaced[index].double() - value.double()).square().sum())
                    norms[index] += float(value.double().square().sum())
            reference.append(value.float().cpu())
            for index, output in replaced.items():
                alone[index].append(output.float().cpu())
    labels = None if splits.held_out.labels is None else splits.held_out.labels[:MAX_ALONE_SAMPLES]
    cpu_seconds = (time.process_time() - start_cpu_seconds) / max(1, len(results))
    measurements = []
    for result in results:
        logits = torch.cat(alone[result.index])
        measurement = SectionMeasurement(
            index=result.index,
            task_digest=result.task_digest,
            top1_alone=None if labels is None else top_k(logits, torch.from_numpy(labels), 1),
            agreement_alone=agreement(logits, torch.cat(reference)),
            divergence_alone=divergence(logits, torch.cat(reference)),
            relative_error=(errors[result.index] / norms[result.index]) ** 0.5 if norms[result.index] else 0.0,
            cpu_seconds=cpu_seconds,
        )
        store = section_store(context, result.index).child(result.attempt)
        store.write_bytes(MEASUREMENT_FILE, seal_json(measurement))
        measurements.append(measurement)
    return tuple(measurements)


def test_key(context: RunContext, splits: Splits) -> str:
    """Digest of all that the scores of teacher and untrained student depend on."""
    return json_sha256(
        {
            "plan": context.plan.key,
            "test": None if splits.test is None else splits.test.sha256,
            "scored": context.job.reduce.test,
            "reestimate": context.job.reduce.reestimate_batchnorm,
            "layers": [layer_identity(layer) for layer in context.plan.layers],
            "device": context.device,
        }
    )


def measure_untrained(context: RunContext, network: Network, splits: Splits) -> TestScores:
    """Score the teacher and the student before any training on the test part, as `reduce.test` says; kept in the run directory."""
    start_cpu_seconds = time.process_time()
    torch.set_num_threads(context.job.train.num_threads)
    key = test_key(context, splits)
    store = open_store(context.run_dir)
    content = store.read_bytes_or_none(SCORES_FILE)
    if content is not None:
        try:
            found = unseal_json(TestScores, content)
            if found.key == key:
                return found
        except ValueError:
            pass
    device = choose_device(context.device)
    batch_size, scored = context.job.data.batch_size, context.job.reduce.test
    teachers_top1 = untrained_top1 = None
    if splits.test is not None and splits.test.labels is not None and scored != "none":
        cache = open_store(context.cache_dir)
        teachers_top1 = teacher_top1(network.teacher, splits.test, batch_size, device=device, cache=cache)
        if scored == "all":
            untrained = untrained_student(context, network, splits.train, device)
            adapt_batchnorm(context, untrained, splits.train, device)
            untrained_top1 = part_top1(untrained, splits.test, batch_size, device)
    scores = TestScores(
        key=key,
        teacher_top1=teachers_top1,
        untrained_top1=untrained_top1,
        cpu_seconds=time.process_time() - start_cpu_seconds,
    )
    store.write_bytes(SCORES_FILE, seal_json(scores))
    return scores


def untrained_student(context: RunContext, network: Network, train: Part, device: torch.device) -> nn.Module:
    """The student before any training: quantizers where they start, on the teacher's weights and activations."""
    teacher = network.teacher.module.to(device)
    batch_size = context.job.data.batch_size
    images = (value.to(device) for value in _first_images(train, batch_size, CALIBRATION_SAMPLES))
    starts = activation_starts(teacher, context.plan.layers, images)
    return stitch(teacher, context.plan.layers, [], starts)


def finish(
    context: RunContext,
    results: Sequence[SectionResult],
    network: Network,
    splits: Splits,
    *,
    emit: Emit,
    request: SaveRequest | None = None,
    num_at_once: int = 1,
) -> Finished:
    """Stitch the sections, re-estimate BatchNorm, validate, and write the student.

    `student.safetensors` is committed before the driver writes the report that names its digest.

    Args:
        request: asked at every step of a polish whether somebody wants a checkpoint at once.
        num_at_once: batches of held-out and test images that are scored beside each other.
    """
    started, start_cpu_seconds = time.monotonic(), time.process_time()
    torch.set_num_threads(context.job.train.num_threads)
    job, device = context.job, choose_device(context.device)
    steps = ("stitch", "merge", "validate", "write")

    def say(number: int) -> None:
        emit(Progress(phase="reduce", done=number, total=len(steps), unit="steps", detail=steps[number]))

    say(0)
    refits: tuple[MergeStep, ...] = ()
    if job.reduce.refit:
        states, step = refit_sections(context, results, network, splits, device)
        refits = (step,)
    else:
        states = [section_weights(context, result) for result in results]
    student = stitch(network.teacher.module, context.plan.layers, states)
    say(1)
    merged = _kept(context, student, splits)
    if merged is None:
        merged = merge(context, student, network, splits, device, emit=emit, request=request)
    student.to(device)
    extra = bake(student)
    say(2)
    sections = student_sections(network, student.state_dict(), extra)
    validation = validate(context, sections, network, splits.held_out, device, num_at_once=num_at_once)
    diagnosis = diagnose(
        context, student.state_dict(), extra, sections, network, splits.held_out, device, num_at_once=num_at_once
    )
    test = None if job.reduce.test == "none" else splits.test
    test_top1 = None if test is None else part_top1(student, test, job.data.batch_size, device, num_at_once=num_at_once)
    say(3)
    student.to("cpu")
    state = {name: value.detach().contiguous() for name, value in (*student.state_dict().items(), *extra.items())}
    sha256 = tensors_sha256(state)
    metadata = {
        "format": "dcq-ray student 2",
        "run": job.name,
        "model": job.teacher.model,
        "teacher_sha256": context.plan.teacher_sha256,
        "sha256": sha256,
    }
    refuse_stale(context)
    store = open_store(context.run_dir)
    store.write_bytes(STUDENT_FILE, state_bytes(state, metadata))
    remove_polish(store)
    return Finished(
        student_sha256=sha256,
        student_num_bytes_packed=packed_num_bytes(state, context.plan.layers),
        test_top1=test_top1,
        validation=validation,
        diagnosis=diagnosis,
        merge_steps=(*refits, *merged.steps),
        seconds=merged.before.seconds + time.monotonic() - started,
        cpu_seconds=merged.before.cpu_seconds + time.process_time() - start_cpu_seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What each step of a merge gave on held-out images."""

    steps: tuple[MergeStep, ...] = ()
    before: Effort = field(default_factory=Effort)
    """Of processes that began a polish, and were killed."""


def _kept(context: RunContext, student: nn.Module, splits: Splits) -> Merged | None:
    """What a search that merged this very student left in the run directory; the student is changed in place."""
    store = open_store(context.run_dir)
    if context.job.reduce.polish_epochs or not store.exists(MERGED_FILE):
        return None
    steps = take_merge(store, merge_key(context, student, context.plan.layers, splits), student)
    return None if steps is None else Merged(steps=steps)


def merge(
    context: RunContext,
    student: nn.Module,
    network: Network,
    splits: Splits,
    device: torch.device,
    *,
    emit: Emit,
    request: SaveRequest | None = None,
) -> Merged:
    """Improve the stitched student in place, as the job says; `request`: as of `finish`."""
    job, before = context.job, Effort()
    steps: list[MergeStep] = []
    if not (job.reduce.polish_epochs or (job.reduce.reestimate_batchnorm and job.reduce.roll_back)):
        # Nothing is to be chosen, so nothing is scored.
        adapt_batchnorm(context, student, splits.train, device)
        return Merged()
    judge = judge_of(context, network, splits.held_out, device)

    def adapt() -> None:
        adapt_batchnorm(context, student, splits.train, device)

    def settle(name: str) -> None:
        if job.reduce.reestimate_batchnorm and has_batchnorm(student):
            steps.append(attempt_step(name, student, adapt, judge, roll_back=job.reduce.roll_back))

    student.to(device)
    settle(BATCHNORM_STEP)
    if job.reduce.polish_epochs:
        polished = polish(context, student, network, splits, judge, emit=emit, request=request)
        steps.append(polished.step)
        before = polished.before
        if polished.step.accepted:
            settle("BatchNorm re-estimated after the polish")
    return Merged(steps=tuple(steps), before=before)


def adapt_batchnorm(context: RunContext, student: nn.Module, train: Part, device: torch.device) -> None:
    """Re-estimate BatchNorm on train images, where the job asks for it."""
    student.to(device)
    if context.job.reduce.reestimate_batchnorm:
        reestimate_batchnorm(student, _first_images(train, context.job.data.batch_size), device)


def _images(part: Part, batch_size: int) -> Iterator[Tensor]:
    return (images for images, _ in ordered_batches(part, batch_size))


def _first_images(part: Part, batch_size: int, max_samples: int = MAX_BATCHNORM_SAMPLES) -> Iterator[Tensor]:
    # Parts are shuffled, so their beginning is a fair choice.
    num_samples = min(len(part), max_samples)
    for start in range(0, num_samples, batch_size):
        yield part.images(np.arange(start, min(start + batch_size, num_samples)))
