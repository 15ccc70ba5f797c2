"""Sections measured alone: together or one by one, and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcq_ray.data import ordered_batches
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import measure_sections, open_network, open_run, run_local
from dcq_ray.phases.committed import section_weights
from dcq_ray.quantizers import put_quantizers
from dcq_ray.records import seal_json, unseal_json
from dcq_ray.storage import open_store


@pytest.mark.slow
def test_sections_measured_together_are_as_measured_one_by_one(job_document: dict[str, Any], tmp_path: Path) -> None:
    job = resolve_job(job_document, source="test")
    run_local(job, str(tmp_path), emit=lambda _: None, owner="test")
    with open_run(job, str(tmp_path), device=torch.device("cpu"), emit=lambda _: None, owner="test") as session:
        context, splits, network = session.context, session.prepared.splits, open_network(session.context)
        results = [session.results[index] for index in range(3)]
        for result in results:
            assert min(result.read_seconds, result.start_seconds, result.input_wait_seconds) > 0
            assert result.read_seconds + result.start_seconds + result.input_wait_seconds < result.seconds
        together = measure_sections(context, results, network, splits)
        one_by_one = [measure_sections(context, [result], network, splits)[0] for result in results]
        assert [replace(found, cpu_seconds=0.0) for found in together] == [
            replace(found, cpu_seconds=0.0) for found in one_by_one
        ]
        # The second section by hand.
        student = open_network(context).sections[1]
        put_quantizers(student, context.plan.sections[1].layers, trained=True)
        student.load_state_dict(section_weights(context, results[1]))
        right, error, norm = 0, 0.0, 0.0
        labels = torch.from_numpy(splits.held_out.labels)
        with torch.no_grad():
            for number, (images, _) in enumerate(ordered_batches(splits.held_out, job.data.batch_size)):
                value = network.sections[0](images)
                ours, theirs = student(value.clone()), network.sections[1](value.clone())
                error += float((ours.double() - theirs.double()).square().sum())
                norm += float(theirs.double().square().sum())
                rows = labels[number * job.data.batch_size :][: len(images)]
                right += int((network.sections[2](ours).argmax(1) == rows).sum())
        assert together[1].top1_alone == right / len(labels)
        assert together[1].relative_error == pytest.approx((error / norm) ** 0.5)


@pytest.mark.slow
def test_the_teachers_score_on_test_images_serves_every_run_with_it(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    first = resolve_job(job_document, source="test")
    report = run_local(first, str(tmp_path), emit=lambda _: None, owner="test")
    teachers = open_store(first.storage.cache_dir).child("teachers", report.teacher.sha256)
    kept = [name for name in teachers.list_names() if name.startswith("top1-")]
    assert len(kept) == 2  # held-out and test
    assert report.teacher.top1 in [unseal_json(float, teachers.read_bytes(name)) for name in kept]
    for name in kept:
        teachers.write_bytes(name, seal_json(0.984375))
    overrides = ("quantize.weights.bits=3", f"storage.run_dir={tmp_path / 'second'}")
    second = run_local(
        resolve_job(job_document, source="test", overrides=overrides), str(tmp_path), emit=lambda _: None, owner="test"
    )
    assert second.teacher.top1 == 0.984375
    assert second.untrained_top1 != report.untrained_top1
    # Asked for fewer scores, the same trained sections give the same student.
    for scored, shown in (("student", (0.984375, None)), ("none", (None, None))):
        asked = resolve_job(job_document, source="test", overrides=(*overrides, f"reduce.test={scored}"))
        again = run_local(asked, str(tmp_path), emit=lambda _: None, owner="test")
        assert (again.teacher.top1, again.untrained_top1) == shown
        assert again.student is not None
        assert second.student is not None
        assert again.student.top1 == (second.student.top1 if scored == "student" else None)
        assert again.student.sha256 == second.student.sha256
        assert again.validation == second.validation
