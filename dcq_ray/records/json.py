"""A record's JSON, both ways; sealed, it holds a digest of itself, so that a byte that changed is noticed."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

R = TypeVar("R")

SEAL = "content_sha256"


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


def seal_json(record: Any) -> bytes:
    """A record as JSON with a digest of its content under `content_sha256`, beside its fields or else its `content`."""
    value = to_jsonable(record)
    fields = value if isinstance(value, dict) else {"content": value}
    return json.dumps({**fields, SEAL: content_sha256(fields)}, indent=2).encode() + b"\n"


def unseal_json(kind: type[R], content: bytes) -> R:
    """The record of that kind in sealed JSON bytes; raises ValueError where they do not fit or differ from their digest."""
    try:
        fields = json.loads(content, parse_int=_int64)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(fields, dict) or fields.pop(SEAL, None) != content_sha256(fields):
        raise ValueError("its content does not have the digest that it states")
    value = fields["content"] if list(fields) == ["content"] else fields
    # Through JSON again: only there a list stands for a tuple.
    return from_json(kind, json.dumps(value).encode())


def _int64(digits: str) -> int:
    """No record of ours holds a larger one, and numpy, by which plots are drawn, makes objects of them."""
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError("it has an integer of more than 64 bits")
    return number


def content_sha256(fields: Any) -> str:
    """The digest under which sealed JSON states its content."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
