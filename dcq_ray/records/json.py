"""A record's JSON, both ways."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

R = TypeVar("R")


@cache
def _cached_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    # A class is hashable; mypy takes its metaclass for a reason to doubt it.
    adapter: TypeAdapter[Any] = _cached_adapter(kind)
    return adapter


def to_json(record: Any) -> bytes:
    """A record as indented UTF-8 JSON."""
    return _adapter(type(record)).dump_json(record, indent=2) + b"\n"


def from_json(kind: type[R], content: bytes) -> R:
    """The record of that kind in JSON bytes; raises pydantic's ValidationError (a ValueError) where they do not fit."""
    record: R = _adapter(kind).validate_json(content)
    return record


def to_jsonable(record: Any) -> Any:
    """A record as plain dicts, lists, numbers and strings."""
    return _adapter(type(record)).dump_python(record, mode="json")
