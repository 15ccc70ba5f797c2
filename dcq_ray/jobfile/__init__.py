"""Reading, checking and writing job files against the models of `spec`.

One idea a module: `mistakes` says what is wrong and where, `reading` turns a file into values with their lines,
`overrides` lays `--set a.b=c` over them, `values` expands variables, `words` puts the models into a user's words,
`validation` holds values against the models, `checks` compares fields with each other, `loading` composes these,
`writing` goes back to YAML, and `schema` serves editors. None of them knows what a job is used for.
"""

from __future__ import annotations

from dcq_ray.jobfile.example import EXAMPLE_JOB
from dcq_ray.jobfile.loading import load_job, parse_job, resolve_job
from dcq_ray.jobfile.mistakes import mask_credentials
from dcq_ray.jobfile.schema import job_schema
from dcq_ray.jobfile.writing import job_yaml

__all__ = ["EXAMPLE_JOB", "job_schema", "job_yaml", "load_job", "mask_credentials", "parse_job", "resolve_job"]
