"""What is prepared once serves all quantizers: the plans are those that each job would have by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, prepare, requantized
from dcq_ray.spec import Job


def test_plans_are_those_of_the_jobs_by_themselves(job_document: dict[str, Any], tmp_path: Path) -> None:
    def job_of(quantize: dict[str, Any]) -> Job:
        document = copy.deepcopy(job_document)
        document["quantize"] = quantize
        return resolve_job(document, source="test")

    jobs = [
        job_of({"weights": {"scheme": "dorefa", "bits": 1}}),
        job_of({"weights": {"scheme": "lsq-channel", "bits": 3}, "activations": {"scheme": "pact", "bits": 4}}),
        job_of({"weights": {"scheme": "twn", "bits": 2}, "overrides": {"section:1": {"scheme": "lsq", "bits": 2}}}),
    ]
    device = torch.device("cpu")
    prepared = prepare(jobs[0], str(tmp_path), device=device, emit=ignore_progress)
    # Costs were measured for the first, and are kept in the cache.
    alone = [prepare(job, str(tmp_path), device=device, emit=ignore_progress).plan for job in jobs]
    assert [found.plan for found in requantized(prepared, jobs, device=device)] == alone
    assert len({plan.key for plan in alone}) == len({plan.num_bytes_packed for plan in alone}) == 3
