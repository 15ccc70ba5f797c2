"""The JSON schema of a job file, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from dcq_ray.jobfile.words import NUMBER_PATTERN
from dcq_ray.spec import Job

_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_NUMBER = {"type": "string", "pattern": rf"\$\{{|{NUMBER_PATTERN}"}
_ANNOTATIONS = ("default", "description", "title")


def job_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a job file as it is written, that is before variables are expanded.

    Where a number, a flag or a choice belongs it also takes a text that holds a variable, and for numbers one such as
    `1e-3`. What fields ask of each other is not in it.
    """
    schema = _for_raw_text(Job.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dcq-ray job"}


def _for_raw_text(node: dict[str, Any]) -> dict[str, Any]:
    rewritten = {key: _rewritten(key, value) for key, value in node.items()}
    if "properties" in node or "$ref" in node:
        return rewritten
    rewritten.pop("title", None)  # pydantic's own, `Batch Size` for batch_size
    alternative = _alternative(node)
    if alternative is None:
        return rewritten
    annotations = {key: rewritten.pop(key) for key in _ANNOTATIONS if key in rewritten}
    return {"anyOf": [rewritten, alternative], **annotations}


def _rewritten(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):
        return {name: _for_raw_text(part) for name, part in value.items()}
    if key in ("anyOf", "prefixItems"):
        return [_for_raw_text(part) for part in value]
    if key in ("items", "additionalProperties") and isinstance(value, dict):
        return _for_raw_text(value)
    return value


def _alternative(node: dict[str, Any]) -> dict[str, Any] | None:
    """What may stand in the file instead of a value of this kind."""
    if node.get("type") in ("integer", "number"):
        return _NUMBER
    is_choice = "enum" in node or "const" in node or "pattern" in node
    return _VARIABLE if node.get("type") == "boolean" or is_choice else None
