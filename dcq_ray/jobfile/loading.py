"""From a job file, or a document in memory, to a job: the steps in order, and all mistakes at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dcq_ray.errors import JobError
from dcq_ray.jobfile.checks import cross_checked
from dcq_ray.jobfile.mistakes import Mistake, Path, Place, job_error, shown
from dcq_ray.jobfile.overrides import apply_overrides
from dcq_ray.jobfile.reading import Document, parse_file, read_file
from dcq_ray.jobfile.validation import validated
from dcq_ray.jobfile.values import DocumentTooLargeError, expanded, plain_copy
from dcq_ray.jobfile.words import fitted, job_node
from dcq_ray.spec import Job

_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


def load_job(path: str, *, overrides: Sequence[str] = (), environment: Mapping[str, str]) -> Job:
    """The job in a YAML file, with overrides such as `train.lr=0.01` laid over it and variables expanded.

    `${VAR}` and `${VAR:-default}` are expanded from `environment` in the parsed strings, `$${` stands for `${`. Errors:
    JobError, which tells why there is no YAML mapping to read, or else every mistake with its line.
    """
    return parse_job(read_file(path), source=path, overrides=overrides, environment=environment)


def parse_job(
    content: bytes, *, source: str, overrides: Sequence[str] = (), environment: Mapping[str, str] = _NO_VARIABLES
) -> Job:
    """The job in the content of a YAML file that errors call `source`; otherwise as `load_job`."""
    return _resolved(parse_file(content, source=source), source, overrides, environment)


def resolve_job(
    document: Any, *, source: str, overrides: Sequence[str] = (), environment: Mapping[str, str] = _NO_VARIABLES
) -> Job:
    """The job in nested mappings, which are not changed; errors call them `source`; otherwise as `load_job`."""
    places: dict[Path, Place] = {}
    mistakes: list[Mistake] = []
    try:
        value = plain_copy(document, (), mistakes, itertools.count())
    except DocumentTooLargeError as error:
        raise JobError(f"{source}: not a job: {error}") from None
    return _resolved(Document(value=value, places=places, mistakes=mistakes), source, overrides, environment)


def _resolved(document: Document, source: str, overrides: Sequence[str], environment: Mapping[str, str]) -> Job:
    if not isinstance(document.value, dict):
        found = "there is nothing in it" if document.value is None else f"got {shown(document.value)}"
        raise JobError(
            f"{source}: not a job: {found}; expected a mapping with at least the keys name, teacher and data; "
            "`dcq-ray run --help` shows a small one"
        )
    apply_overrides(document, overrides)
    mistakes = document.mistakes
    values = expanded(document.value, environment, (), mistakes)
    values = _with_run_dir(fitted(values, job_node()))
    job, more = validated(values, mistakes)
    mistakes += more
    mistakes += cross_checked(values, mistakes)
    if mistakes or job is None:
        raise job_error(source, mistakes, document.places)
    return job


def _with_run_dir(values: dict[str, Any]) -> dict[str, Any]:
    """A run directory that the job does not name is `runs/<name>`."""
    name, storage = values.get("name"), values.get("storage", {})
    if not isinstance(storage, dict) or not isinstance(name, str) or not name:
        return values  # a mistake, which is told elsewhere
    return {**values, "storage": {"run_dir": f"runs/{name}", **storage}}
