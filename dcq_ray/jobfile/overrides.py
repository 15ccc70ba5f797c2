"""`--set a.b=c`: values laid over a document.

This module knows the syntax of an override; the document to it is nested mappings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from dcq_ray.jobfile.mistakes import Mistake, Path, dotted, shown
from dcq_ray.jobfile.reading import Document, parse_yaml
from dcq_ray.jobfile.values import DocumentTooLargeError

_PART = r'(?:"[^"]+"|[^\s."=]+)'
_OVERRIDE = re.compile(rf"\s*(?P<key>{_PART}(?:\.{_PART})*)\s*=(?P<value>.*)", re.DOTALL)


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set each override in the document, in order, in place; one that cannot be set becomes a mistake."""
    for override in overrides:
        problem = _apply(document, override)
        if problem is not None:
            document.mistakes.append(Mistake(path=(), problem=problem, place=override, hides_more=False))


def _apply(document: Document, override: str) -> str | None:
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        return _syntax_problem(override)
    path = tuple(part.strip('"') for part in re.findall(_PART, match["key"]))
    try:
        parsed = parse_yaml(match["value"], path=path, place=lambda mark: override)
    except (yaml.YAMLError, DocumentTooLargeError, RecursionError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        return f"{dotted(path)}: the value is not YAML: {reason}; put a text in quotes: {match['key']}='\"…\"'"
    holder = _holder(document, path, override)
    if isinstance(holder, str):
        return holder
    _forget(document, path)
    holder[path[-1]] = parsed.value
    document.places.update({**parsed.places, path: override})
    document.mistakes.extend(parsed.mistakes)
    return None


def _syntax_problem(override: str) -> str:
    if "=" not in override:
        return "there is no '='; expected KEY=VALUE, such as train.lr=0.01"
    return (
        "cannot read the key; expected names joined by dots, such as train.lr=0.01, with double quotes around a name "
        'that holds dots: quantize.overrides."layer1.*".bits=4'
    )


def _holder(document: Document, path: tuple[str, ...], override: str) -> dict[str, Any] | str:
    """The mapping that holds the last key of the path, made if need be; or why there cannot be one."""
    holder: dict[str, Any] = document.value
    for length in range(1, len(path)):
        below = holder.get(path[length - 1])
        if below is None:
            below = holder[path[length - 1]] = {}
            document.places[path[:length]] = override
        elif not isinstance(below, dict):
            above = dotted(path[:length])
            return f"{above} is {shown(below)}, not a mapping, so it has no key {path[length]}; set {above} as a whole"
        holder = below
    return holder


def _forget(document: Document, path: Path) -> None:
    """What lay below an overridden key is gone, and with it what was wrong there."""
    for place in [place for place in document.places if place[: len(path)] == path]:
        del document.places[place]
    for mistake in [mistake for mistake in document.mistakes if mistake.path[: len(path)] == path]:
        document.mistakes.remove(mistake)
