"""Plain values: the copy of a document, and the expansion of variables in its strings.

A job holds texts, finite numbers, flags, nulls, lists and mappings from texts, because it travels as JSON and is
digested as JSON. This module knows nothing of what they mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dcq_ray.jobfile.mistakes import Mistake, Path, shown

MAX_DEPTH = 40
MAX_VALUES = 100_000
_MAX_BITS = 1024  # beyond what a float holds, and far beyond what anything here counts

# `$${` stands for `${` itself. What begins like a variable and is none is a mistake, not text.
_VARIABLE = re.compile(r"\$(?P<escaped>\$\{)|\$\{(?:(?P<name>[A-Za-z_]\w*)(?P<default>:-[^{}]*)?\})?", re.ASCII)


class DocumentTooLargeError(ValueError):
    """More values, or deeper ones, than any job has: an anchor that holds itself, or anchors of anchors."""


def check_size(depth: int, counter: Iterator[int]) -> None:
    """Count one more value; raises DocumentTooLargeError, so that a document of anchors cannot fill the memory."""
    if depth > MAX_DEPTH:
        raise DocumentTooLargeError(f"nested more than {MAX_DEPTH} deep; does an anchor hold itself?")
    if next(counter) >= MAX_VALUES:
        raise DocumentTooLargeError(f"more than {MAX_VALUES:,} values; a job is a page of text")


def key_problem(key: Any) -> str | None:
    """What is wrong with the key of a mapping; None for a text."""
    if isinstance(key, str):
        return f"the key {shown(key)} {problem}" if (problem := _text_problem(key)) else None
    return f"the key {shown(key)} is {_kind(key)}, expected text; put it in quotes"


def plain_copy(value: Any, path: Path, mistakes: list[Mistake], counter: Iterator[int]) -> Any:
    """A copy of mappings and sequences as dicts and lists that share nothing; keys that are no text are mistakes."""
    check_size(len(path), counter)
    if isinstance(value, Mapping):
        copied = {}
        for key, item in value.items():
            if problem := key_problem(key):
                mistakes.append(Mistake(path=path, problem=problem, hides_more=False))
            else:
                copied[key] = plain_copy(item, (*path, key), mistakes, counter)
        return copied
    if isinstance(value, list | tuple):
        return [plain_copy(item, (*path, index), mistakes, counter) for index, item in enumerate(value)]
    return value


def expanded(value: Any, environment: Mapping[str, str], path: Path, mistakes: list[Mistake]) -> Any:
    """The value with `${VAR}` and `${VAR:-default}` of every string expanded; what is not plain is a mistake.

    As in a shell, the default also stands in for an empty variable. An expanded text is not expanded again.
    """
    if isinstance(value, dict):
        return {key: expanded(item, environment, (*path, key), mistakes) for key, item in value.items()}
    if isinstance(value, list):
        return [expanded(item, environment, (*path, index), mistakes) for index, item in enumerate(value)]
    text, problems = _expanded_text(value, environment) if isinstance(value, str) else (value, [])
    if problem := next(iter(problems), None) or _problem(text):
        mistakes.append(Mistake(path=path, problem=problem))
        return value if isinstance(value, str) and not _text_problem(value) else None  # the rest must stay plain
    return text


def _expanded_text(text: str, environment: Mapping[str, str]) -> tuple[str, list[str]]:
    problems: list[str] = []

    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["escaped"]:
            return "${"
        if name is None:
            problems.append(
                f"cannot read the variable in {shown(text)}; write ${{NAME}} or ${{NAME:-default}}, and $${{ where ${{ "
                "is no variable"
            )
        elif default is not None:
            return environment.get(name) or default.removeprefix(":-")
        elif name not in environment:
            problems.append(
                f"the environment variable {name} is not set; set it, or give a default: ${{{name}:-default}}"
            )
        else:
            return environment[name]
        return match[0]

    return _VARIABLE.sub(replace, text), problems


def _problem(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return f"got {shown(value)}, which {problem}" if (problem := _text_problem(value)) else None
    if isinstance(value, int):
        return None if value.bit_length() <= _MAX_BITS else f"got {shown(value)}, more than any number here may have"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"got {shown(value)}, expected a finite number"
    return f"got {shown(value)}, {_kind(value)}, expected text, a number, a list or a mapping; put a text in quotes"


def _text_problem(text: str) -> str | None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not Unicode text"  # half of a surrogate pair alone, which no UTF-8 file can hold
    return "holds a NUL character, which no path can hold" if "\0" in text else None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a flag (to YAML, on, off, yes and no are flags)"
    if isinstance(value, int | float):
        return "a number"
    if value is None:
        return "nothing"
    return {"date": "a date", "datetime": "a date", "bytes": "binary"}.get(
        type(value).__name__, f"a Python {type(value).__name__}"
    )
