"""A file's bytes into plain values, the line of each one, and the keys that are given twice.

This module knows YAML and files; it does not know what a job is.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from dcq_ray.errors import JobError
from dcq_ray.jobfile.mistakes import Mistake, Path, Place, mask_credentials, shortened, shown
from dcq_ray.jobfile.values import MAX_DEPTH, DocumentTooLargeError, check_size, key_problem

_MAX_FILE_BYTES = 1 << 20
_MERGE_TAG = "tag:yaml.org,2002:merge"
_CONTAINER_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_HINTS = {
    "\\t": "indent with spaces, not with tabs",
    "mapping values are not allowed": "put a text that holds ': ' in quotes, and look at the indentation",
    "expected <block end>": "look at the indentation of this line and of those above it",
    "could not find expected ':'": "a key is followed by a colon and a space",
    "expected ',' or": "inside [...] and {...}, put a text that holds brackets or commas, such as ${VAR}, in quotes",
    "unexpected end of stream": "a quote or a bracket was not closed",
    "cannot start any token": "put a text that begins with this character in quotes",
    "undefined alias": "put a text that begins with * in quotes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Plain values, where each of them stands, and what is wrong with the way they are written."""

    value: Any
    places: dict[Path, Place] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def read_file(path: str) -> bytes:
    """The content of a job file; JobError where there is no such file, or it cannot be one."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file{_near_file(path)}") from None
    except IsADirectoryError:
        raise JobError(
            f"{path}: this is a folder; expected a job file, such as {os.path.join(path, 'job.yaml')}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobError(f"{path!r}: the job file cannot be read: {reason}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise JobError(f"{path}: larger than 1 MiB; expected a job file, which is a page of YAML text")
    return content


def _near_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        siblings = sorted(entry for entry in os.listdir(folder or ".") if entry.endswith((".yaml", ".yml")))
    except OSError:
        return f", nor the folder {folder}; relative paths are relative to the current folder"
    matches = difflib.get_close_matches(name, siblings, n=1)
    return (
        f"; did you mean {os.path.join(folder, matches[0])}?" if matches else f"; {len(siblings)} .yaml files beside it"
    )


def parse_file(content: bytes, *, source: str) -> Document:
    """The one YAML document of a file; JobError with line, column and reason where it is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(
            f"{source}: byte {error.start} is not UTF-8 text; expected a job file: YAML, stored as UTF-8"
        ) from None
    try:
        return parse_yaml(text, path=(), place=lambda mark: mark.line + 1)
    except yaml.MarkedYAMLError as error:
        raise JobError(f"{source}: {_syntax_problem(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise JobError(
            f"{source}: line {line}: holds the character {chr(int(error.character))!r}, which no text file has; "
            "expected a job file: YAML, stored as UTF-8"
        ) from None
    except (DocumentTooLargeError, RecursionError) as error:
        reason = str(error) if isinstance(error, DocumentTooLargeError) else "nested too deep"
        raise JobError(f"{source}: not a job file: {reason}") from None


def _syntax_problem(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    assert mark is not None, "PyYAML marks every error of its scanner, parser and composer"
    begun = error.context_mark
    context = f" {error.context}" if error.context else ""
    if context and begun and (begun.line, begun.column) != (mark.line, mark.column):
        context += f", which begins in line {begun.line + 1}"
    lines = text.splitlines()
    near = shortened(mask_credentials(lines[mark.line].strip()), 60) if mark.line < len(lines) else ""
    hint = next((hint for part, hint in _HINTS.items() if part in str(error.problem)), None)
    return (
        f"line {mark.line + 1}, column {mark.column + 1}: this is not YAML: {error.problem}{context}"
        + (f"; near {near!r}" if near else "")
        + (f"; {hint}" if hint else "")
    )


# -- values and their lines --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    loader: yaml.SafeLoader
    place: Callable[[yaml.Mark], Place]
    places: dict[Path, Place] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    counter: Iterator[int] = field(default_factory=itertools.count)
    checked: set[int] = field(default_factory=set)
    """Mappings whose keys were compared: an anchored one is read again at every alias."""

    def blame(self, path: Path, problem: str, node: yaml.Node, *, hides_more: bool = False) -> None:
        place = self.place(node.start_mark)
        self.mistakes.append(Mistake(path=path, problem=problem, place=place, hides_more=hides_more))


def parse_yaml(text: str, *, path: Path, place: Callable[[yaml.Mark], Place]) -> Document:
    """The one document of a YAML text as plain values; `path` is where it belongs, `place` names a position in it.

    Errors: yaml.YAMLError where the text is not YAML, DocumentTooLargeError or RecursionError where it is too much of
    it. Keys that are given twice, or are no text, and values that YAML cannot make are mistakes in the document.
    """
    # PyYAML's time grows with the square of open brackets, and more.
    if _num_open_brackets(text) > 10 * MAX_DEPTH:
        raise RecursionError("too many open brackets")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(value=None)
        reader = _Reader(loader=loader, place=place)
        reader.places[path] = place(node.start_mark)
        return Document(value=_value(node, path, reader), places=reader.places, mistakes=reader.mistakes)
    finally:
        loader.dispose()


def _num_open_brackets(text: str) -> int:
    """The most brackets that are open at one place of a text, those in quotes and comments too."""
    changes = (1 if found.group() in "[{" else -1 for found in re.finditer(r"[\[\]{}]", text))
    return max(itertools.accumulate(changes, lambda depth, change: max(0, depth + change)), default=0)


def _value(node: yaml.Node, path: Path, reader: _Reader) -> Any:
    check_size(len(path), reader.counter)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, reader)
    if node.tag not in _CONTAINER_TAGS:
        reader.blame(path, f"the YAML tag {shown(node.tag)} has no meaning here; leave it out", node, hides_more=True)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, reader)
    items = []
    for index, item in enumerate(node.value):
        reader.places[*path, index] = reader.place(item.start_mark)
        items.append(_value(item, (*path, index), reader))
    return items


def _mapping(node: yaml.MappingNode, path: Path, reader: _Reader) -> dict[str, Any]:
    if id(node) not in reader.checked:
        reader.checked.add(id(node))
        _blame_duplicates(node, path, reader)
    reader.loader.flatten_mapping(node)  # puts what `<<: *anchor` names before the mapping's own keys
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            reader.blame(path, "a key is a list or a mapping, expected text; put it in quotes", key_node)
            continue
        key = _scalar(key_node, path, reader)
        if problem := key_problem(key):
            reader.blame(path, problem, key_node)
            continue
        reader.places[*path, key] = reader.place(key_node.start_mark)
        values[key] = _value(value_node, (*path, key), reader)
    return values


def _blame_duplicates(node: yaml.MappingNode, path: Path, reader: _Reader) -> None:
    first: dict[tuple[str, str], yaml.Node] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE_TAG:
            continue
        seen = first.setdefault((key_node.tag, key_node.value), key_node)
        if seen is not key_node:
            before = reader.place(seen.start_mark)
            where = f", first in line {before}" if isinstance(before, int) else ""
            reader.blame((*path, key_node.value), f"this key is given twice{where}; keep one of them", key_node)


def _scalar(node: yaml.ScalarNode, path: Path, reader: _Reader) -> Any:
    try:
        return reader.loader.construct_object(node, deep=True)
    except (yaml.constructor.ConstructorError, ValueError, LookupError, AttributeError):
        # SafeLoader's constructors raise what int(), datetime() and their lookups raise.
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        reader.blame(
            path, f"cannot read {shown(node.value)} as YAML's {kind}; put a text in quotes", node, hides_more=True
        )
        return node.value
