"""The models in a user's words: what a key may hold, which keys there are, which of them a text stands for.

Reads the JSON schema that pydantic makes of the models, so that a model is described in one place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from dcq_ray.jobfile.mistakes import Path, listed
from dcq_ray.spec import Job

Node = Mapping[str, Any]
"""A part of the JSON schema: what is asked of one value."""

NUMBER_PATTERN = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"

_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null")


@cache
def job_node() -> Node:
    """The schema of a whole job, for reading only."""
    return Job.model_json_schema()


def options(node: Node) -> tuple[Node, ...]:
    """What a value may be, one by one: references followed, unions taken apart."""
    if "$ref" in node:
        return options(job_node()["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return tuple(option for part in node["anyOf"] for option in options(part))
    return (node,)


def child(node: Node, part: str | int) -> Node | None:
    """What is asked of the value under a key, or at an index; None where there is nothing of that name."""
    for option in options(node):
        if isinstance(part, int) and option.get("type") == "array":
            items = option.get("prefixItems", ())
            found = items[part] if part < len(items) else option.get("items")
        elif isinstance(part, str) and option.get("type") == "object":
            found = option.get("properties", {}).get(part, option.get("additionalProperties"))
        else:
            continue
        if isinstance(found, Mapping):
            return found
    return None


def node_at(path: Path) -> Node | None:
    """What is asked of the value at a path; None where the models do not say."""
    node: Node | None = job_node()
    for part in path:
        node = None if node is None else child(node, part)
    return node


def keys(node: Node) -> tuple[str, ...]:
    """The keys that a mapping may have; none where the user names them."""
    return tuple(key for option in options(node) for key in option.get("properties", ()))


def all_paths(node: Node | None = None, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], ...]:
    """Every key of a job, with the keys above it."""
    node = job_node() if node is None else node
    found: list[tuple[str, ...]] = []
    for option in options(node):
        for key, below in option.get("properties", {}).items():
            found += [(*path, key), *all_paths(below, (*path, key))]
    return tuple(found)


def choices(node: Node) -> tuple[Any, ...]:
    """The values that may be given by name: those of enumerations and constants."""
    return tuple(value for option in options(node) for value in _values(option))


def _values(option: Node) -> tuple[Any, ...]:
    return (option["const"],) if "const" in option else tuple(option.get("enum", ()))


# -- phrases -----------------------------------------------------------------------------------------------------------


def expectation(node: Node) -> str:
    """What a value may be, as a noun phrase: `a whole number from 1 to 8`, `a number from 0 to 1, or auto`."""
    phrases = [_phrase(option) for option in options(node)]
    phrases.sort(key=lambda phrase: phrase in ("null", "auto"))  # the exception comes after the rule
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])}, or {phrases[-1]}"


def _phrase(option: Node) -> str:
    if values := _values(option):
        return listed([str(value) for value in values])
    kind = option.get("type")
    if kind in ("integer", "number"):
        return _number_phrase(option, whole=kind == "integer")
    if kind == "string":
        return _text_phrase(option)
    if kind == "array":
        return _list_phrase(option)
    if kind == "object":
        names = listed(keys(option), last="and") if keys(option) else ""
        return f"a mapping with keys among {names}" if names else "a mapping, such as {}"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "any value")


def _number_phrase(option: Node, *, whole: bool) -> str:
    noun = "a whole number" if whole else "a number"
    low, above = option.get("minimum"), option.get("exclusiveMinimum")
    high, below = option.get("maximum"), option.get("exclusiveMaximum")
    if whole and below is not None:
        high, below = below - 1, None
    if above is not None:
        start = f"greater than {above}"
    else:
        start = "" if low is None else f"from {low}" if high is not None or below is not None else f"of at least {low}"
    end = f"to {high}" if high is not None else f"to below {below}" if below is not None else ""
    return " ".join(part for part in (noun, start, end) if part)


def _text_phrase(option: Node) -> str:
    pattern = option.get("pattern")
    if pattern is None:
        return "a text that is not empty" if option.get("minLength") else "a text"
    if pattern == job_node()["properties"]["name"]["pattern"]:
        return "letters, digits, '.', '_' and '-', beginning with a letter or a digit"
    return "package.module:function"


def _list_phrase(option: Node) -> str:
    items = option.get("prefixItems")
    if items:
        return f"a list of {len(items)} values, each {expectation(items[0])}"
    least = "at least one value" if option.get("minItems") else "values"
    return f"a list of {least}, each {expectation(option.get('items', {}))}"


# -- texts that stand for other values ---------------------------------------------------------------------------------


def fitted(value: Any, node: Node | None) -> Any:
    """The value with texts read as the numbers, flags and nulls that the models ask for in their place.

    `1e-3` is a text to YAML 1.1, and so is all that comes out of a variable. Where a text may stand it stays one. Whole
    numbers written as `2.0` or `1e3` become whole.
    """
    if node is None:
        return value
    if isinstance(value, dict):
        return {key: fitted(item, child(node, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [fitted(item, child(node, index)) for index, item in enumerate(value)]
    if isinstance(value, str):
        value = _read(value, node)
    kinds = {option.get("type") for option in options(node)}
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return int(value)
    return value


def _read(text: str, node: Node) -> Any:
    kinds = {option.get("type") for option in options(node)}
    if text in choices(node) or any(option.get("type") == "string" and not _values(option) for option in options(node)):
        return text
    if "null" in kinds and text.lower() in _NULLS:
        return None
    if "boolean" in kinds:
        return _FLAGS.get(text.lower(), text)
    if kinds & {"integer", "number"} and re.fullmatch(NUMBER_PATTERN, text, re.ASCII):
        whole = "integer" in kinds and text.lstrip("+-").isdigit() and len(text) < 300  # int() refuses 4300 digits
        return int(text) if whole else float(text)
    return text
