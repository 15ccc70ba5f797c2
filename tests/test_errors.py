"""The exception tree: what its docstring draws is what it is, and nothing gets lost between processes."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from dcq_ray import errors
from dcq_ray.errors import DcqError

EXCEPTIONS = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DcqError)),
    key=lambda kind: kind.__name__,
)


def drawn_tree() -> dict[str, tuple[str | None, int]]:
    """Name -> (parent's name, exit code), from the docstring's drawing."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r" {4}(?P<branch>[ │├└─]*)(?P<name>[A-Z]\w+) +(?P<code>\d+)   \S.*", line)
        if match:
            depth = len(match["branch"]) // 4
            del above[depth:]
            tree[match["name"]] = (above[-1] if above else None, int(match["code"]))
            above.append(match["name"])
    return tree


def test_docstring_draws_every_exception() -> None:
    assert sorted(drawn_tree()) == [kind.__name__ for kind in EXCEPTIONS]
    assert len(EXCEPTIONS) >= 15


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_parent_and_exit_code_are_as_drawn(kind: type[DcqError]) -> None:
    parent, exit_code = drawn_tree()[kind.__name__]
    assert kind.__base__ is (Exception if parent is None else getattr(errors, parent))
    assert kind.exit_code == exit_code


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("DcqError", 1),
        ("UsageError", 2),
        ("JobError", 2),
        ("QualityGateMissed", 3),
        ("RunBusyError", 75),
        ("RunInterrupted", 130),
        ("RunTerminated", 143),
    ],
)
def test_exit_codes_of_the_contract(name: str, exit_code: int) -> None:
    assert getattr(errors, name).exit_code == exit_code


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_message_survives_pickling(kind: type[DcqError], protocol: int) -> None:
    message = "jobs/x.yaml: 1 mistake\nline 3: träin.lr: got '…'"
    error = pickle.loads(pickle.dumps(kind(message), protocol=protocol))
    assert type(error) is kind
    assert str(error) == message
    assert error.args == (message,)


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_message_survives_copying_with_its_notes(kind: type[DcqError]) -> None:
    error = kind("what, where")
    error.add_note("remedy")
    assert str(copy.copy(error)) == "what, where"
    assert copy.copy(error).__notes__ == ["remedy"]


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_every_exception_says_what_it_means(kind: type[DcqError]) -> None:
    assert kind.__doc__
    assert kind.__doc__.endswith(".")
