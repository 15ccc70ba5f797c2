"""Mistakes in a job: what is wrong, at which key, in which line, and how that reads.

This module knows how a key, a value and a place are written for a user; it knows neither the models nor YAML.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcq_ray.errors import JobError

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the document."""
Place = int | str
"""Where a value came from: a line of the file, or the override as it was typed."""

_SHOWN_VALUE = 60
_SHOWN_KEY = 40
_SHOWN_OVERRIDE = 80

# A colon makes it a secret: `gs://anonymous@bucket` and `abfss://container@account` are names. After the colon a secret
# may hold unescaped slashes, but `host:8080/a@b` is a port and a path.
_USER_AND_SECRET = re.compile(r"(?<=://)[^\s/?#@:]*:(?!\d+/)[^\s?#@]*@")
_SECRET_PARAMETER = re.compile(
    r"([?&](?:[\w-]*(?:key|key_id|secret|token|password|credentials?|signature)|sig)=)[^&#\s'\"]*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One thing that is wrong, at one key."""

    path: Path
    problem: str
    place: Place | None = None
    """Where the place of the value at `path`, or of what holds it, would be the wrong one."""
    hides_more: bool = True
    """Whether more said of the value, or of what holds it, would be noise."""


def mask_credentials(text: str) -> str:
    """Replace what is secret in the URIs of a text by `***`: user and password, and parameters such as `token=`."""
    return _SECRET_PARAMETER.sub(r"\1***", _USER_AND_SECRET.sub("***:***@", text))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of a text, an ellipsis for the rest."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def dotted(path: Path) -> str:
    """A path as `--set` takes it, names that hold dots in double quotes; list items as `[0]`."""
    written = ""
    for part in path:
        if isinstance(part, int):
            written += f"[{part}]"
        else:
            name = shortened(repr(mask_credentials(part))[1:-1], _SHOWN_KEY)
            written += ("." if written else "") + (name if re.fullmatch(r"[^\s.=\"]+", part) else f'"{name}"')
    return written


def shown(value: Any) -> str:
    """A value on one line as YAML has it, without credentials, shortened."""
    if isinstance(value, str):
        masked = mask_credentials(value)
        return repr(shortened(masked, _SHOWN_VALUE))
    return shortened(_flow(value), _SHOWN_VALUE)


def _flow(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(mask_credentials(value))
    if isinstance(value, Mapping):
        entries = [f"{_flow_key(key)}: {_flow(item)}" for key, item in value.items()]
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to print what has more than 4300 digits
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return repr(str(value))[1:-1]  # on one line, whatever it is


def _flow_key(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[\w.*-]+", key) else _flow(key)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely stands for, if any is near."""
    by_lower = {word.lower(): word for word in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def listed(words: Sequence[str], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def related(path: Path, mistakes: Iterable[Mistake]) -> bool:
    """Whether a mistake is known at this path, above it or below it, beside which another one would be noise."""
    return any(mistake.hides_more and mistake.path[: len(path)] == path[: len(mistake.path)] for mistake in mistakes)


def _place(mistake: Mistake, places: Mapping[Path, Place]) -> Place | None:
    if mistake.place is not None:
        return mistake.place
    ancestors = (mistake.path[:length] for length in range(len(mistake.path), -1, -1))
    return next((places[path] for path in ancestors if path in places), None)


def job_error(source: str, mistakes: Sequence[Mistake], places: Mapping[Path, Place]) -> JobError:
    """All mistakes as one error: a header with their number, then one a line, in the order of the file."""
    lines: list[tuple[float, str]] = []
    for mistake in mistakes:
        place = _place(mistake, places)
        key = dotted(mistake.path)
        problem = f"{key}: {mistake.problem}" if key else mistake.problem
        if isinstance(place, int):
            lines.append((place, f"line {place}: {problem}"))
        elif place is None:
            lines.append((0, problem))
        else:
            override = shortened(mask_credentials(place), _SHOWN_OVERRIDE)
            lines.append((float("inf"), f"--set {repr(override)[1:-1]}: {problem}"))
    ordered = [text for _, text in sorted(lines, key=lambda line: line[0])]
    number = "1 mistake" if len(ordered) == 1 else f"{len(ordered)} mistakes"
    return JobError("\n".join([f"{source}: {number}", *ordered]))
