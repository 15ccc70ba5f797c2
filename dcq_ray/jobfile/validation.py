"""A document against the models, key by key, with every mistake in a user's words.

pydantic finds the mistakes; its messages speak of inputs, unions and constraints, so only kind and place are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from dcq_ray.jobfile.mistakes import Mistake, Path, dotted, listed, nearest, related, shown
from dcq_ray.jobfile.words import Node, all_paths, child, choices, expectation, job_node, keys, node_at, options
from dcq_ray.spec import Job

# What a missing key could look like; a test holds this against the models' required keys.
EXAMPLES: dict[Path, str] = {
    ("name",): "name: lenet-digits-w1",
    ("teacher",): "teacher: {model: torchvision:resnet18, weights: IMAGENET1K_V1}",
    ("teacher", "model"): "model: torchvision:resnet18",
    ("data",): "data: {dataset: cifar10, root: data/cifar10}",
    ("data", "dataset"): "dataset: cifar10",
    ("data", "normalize", "mean"): "mean: [0.485, 0.456, 0.406]",
    ("data", "normalize", "std"): "std: [0.229, 0.224, 0.225]",
}


def validated(document: dict[str, Any], known: Sequence[Mistake]) -> tuple[Job | None, list[Mistake]]:
    """The job, or None and what is wrong; nothing more is said of a value that already has a known mistake.

    The document holds plain values only. It is checked strictly, as JSON: a flag is no number, 1 is no flag.
    """
    kinds: dict[Path, str] = dict.fromkeys(_flags_for_numbers(document, job_node()), "flag")
    job = None
    try:
        job = Job.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            path = tuple(item["loc"]) if item["type"] == "extra_forbidden" else _path(item["loc"], document)
            kinds.setdefault(path, item["type"])  # one value of a union gets an error for each branch
    # A list with a wrong item also counts as too short; the item says it all.
    wrong = [path for path in kinds if not any(path == other[: len(path)] for other in kinds if other != path)]
    mistakes = [
        Mistake(path=path, problem=_problem(kinds[path], path, document)) for path in wrong if not related(path, known)
    ]
    return (None if kinds else job), mistakes


def _flags_for_numbers(value: Any, node: Node, path: Path = ()) -> Iterator[Path]:
    """Where a flag stands for a number; pydantic takes true for 1 in a choice of numbers."""
    if isinstance(value, bool):
        kinds = {option.get("type") for option in options(node)}
        if kinds & {"integer", "number"} and "boolean" not in kinds:
            yield path
        return
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in parts:
        below = child(node, part)
        if below is not None:
            yield from _flags_for_numbers(item, below, (*path, part))


def _path(location: Sequence[str | int], document: Any) -> Path:
    """pydantic's location without what is no key: the names of a union's branches, an item that a list lacks."""
    node: Node | None = job_node()
    path: Path = ()
    for part in location:
        node = None if node is None else child(node, part)
        lacking = isinstance(part, int) and not _look_up(document, (*path, part))[0]
        if node is None or lacking:
            break
        path = (*path, part)
    return path


def _problem(kind: str, path: Path, document: Any) -> str:
    if kind == "extra_forbidden":
        return _unknown_key(path)
    node = node_at(path)
    assert node is not None, "the path was walked along the models"
    present, value = _look_up(document, path)
    if not present:
        return _missing(path, node)
    return "".join([f"got {shown(value)}, expected {expectation(node)}", *_advice(value, node)])


def _advice(value: Any, node: Node) -> Iterator[str]:
    kinds = {option.get("type") for option in options(node)}
    near = nearest(value, [str(choice) for choice in choices(node)]) if isinstance(value, str) else None
    if near:
        yield f"; did you mean {near!r}?"
    if isinstance(value, bool | int | float) and kinds <= {"string", "null"}:
        yield "; put a text that YAML takes for a number or a flag in quotes"
    if value is None and kinds == {"object"}:
        yield "; leave the key out for its defaults"
    if kinds == {"null"} or any("const" in option for option in options(node) if option.get("type") == "integer"):
        yield f" ({str(node.get('description', '')).rstrip('.')})"  # why there is no choice, yet


def _unknown_key(path: Path) -> str:
    above, name = path[:-1], str(path[-1])
    node = node_at(above)
    assert node is not None, "pydantic forbids keys of models only"
    allowed = sorted(keys(node))
    near = nearest(name, allowed)
    suggestions = [near] if near else _elsewhere(name)
    meant = f" did you mean {listed([repr(key) for key in suggestions])}?" if suggestions else ""
    is_pattern = above[:2] == ("quantize", "overrides")
    hint = '; a pattern is one key, dots and all: "layer1.conv1"' if is_pattern and not near else ""
    return f"unknown key;{meant} allowed: {', '.join(allowed)}{hint}"


def _elsewhere(name: str) -> list[str]:
    """The keys of that name in other parts of the job, of those parts the least deep."""
    paths = [path for path in all_paths() if path[-1] == name.lower()]
    depth = min(map(len, paths), default=0)
    return [dotted(path) for path in paths if len(path) == depth]


def _missing(path: Path, node: Node) -> str:
    generic = ("quantize", "overrides", "*", *path[3:]) if path[:2] == ("quantize", "overrides") else path
    example = EXAMPLES.get(generic)
    is_mapping = bool(example and keys(node))  # the example says more than all the keys
    expected = "a mapping" if is_mapping else expectation(node)
    return f"missing; expected {expected}" + (f", such as `{example}`" if example else "")


def _look_up(document: Any, path: Path) -> tuple[bool, Any]:
    value = document
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False, None
    return True, value
