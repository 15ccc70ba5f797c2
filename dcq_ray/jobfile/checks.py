"""Fields of a job against each other.

Works on the document, not on the models, so that these mistakes are told together with all others; where a field that a
check needs has a mistake of its own, or is not of its type, the check is silent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from dcq_ray.jobfile.mistakes import Mistake, Path, dotted, listed, related, shown
from dcq_ray.spec import WEIGHT_SCHEME_BITS, StorageSpec

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_WAYS_TO_CUT = ("count", "every", "cuts")
UNQUANTIZED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    document: Mapping[str, Any]
    known: Sequence[Mistake]

    def sound(self, *path: str) -> bool:
        """Whether nothing is wrong at, above or below a path."""
        return not related(path, self.known)

    def get(self, *path: str) -> Any:
        """The sound value at a path, else None."""
        value: Any = self.document
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value if self.sound(*path) else None

    def absent(self, *path: str) -> bool:
        """Whether a value is missing or null, and not merely wrong."""
        return self.sound(*path) and self.get(*path) is None


def cross_checked(document: Mapping[str, Any], known: Sequence[Mistake]) -> list[Mistake]:
    """All mistakes between fields of a document of which `known` is wrong already."""
    fields = _Fields(document=document, known=known)
    checks = (_teacher, _dataset, _normalize, _sections, _cuts, _quantize, _storage)
    return [mistake for check in checks for mistake in check(fields)]


def _teacher(fields: _Fields) -> Iterator[Mistake]:
    model = fields.get("teacher", "model")
    if isinstance(model, str) and not _REFERENCE.fullmatch(model):
        yield Mistake(
            path=("teacher", "model"),
            problem=f"got {shown(model)}, expected dcq_ray:NAME, torchvision:NAME or package.module:function",
        )
    warmup_epochs, epochs = fields.get("teacher", "fit", "warmup_epochs"), fields.get("teacher", "fit", "epochs") or 10
    if isinstance(warmup_epochs, int | float) and isinstance(epochs, int) and warmup_epochs >= epochs:
        yield Mistake(
            path=("teacher", "fit", "warmup_epochs"),
            problem=f"got {shown(warmup_epochs)}, expected less than teacher.fit.epochs, {epochs}; the rate would only rise",
        )


def _dataset(fields: _Fields) -> Iterator[Mistake]:
    dataset = fields.get("data", "dataset")
    if not isinstance(dataset, str):
        return
    is_own = ":" in dataset
    if not is_own and fields.get("data", "args"):
        yield _refused("args", f"dataset {dataset} takes none; they are for a package.module:function of your own")
    if not is_own and dataset != "digits" and fields.absent("data", "root"):
        yield _needed("root", dataset, f"the folder that it is in, such as `root: data/{dataset}`")
    if dataset == "npz":
        if fields.absent("data", "train"):
            yield _needed("train", dataset, "a file below data.root, such as `train: train.npz`")
        return
    for key in ("train", "test"):
        if fields.get("data", key) is not None:
            yield _refused(key, f"dataset {dataset} knows its own parts; this file is for dataset npz")


def _quantize(fields: _Fields) -> Iterator[Mistake]:
    # What the defaults give when a key is left out.
    scheme = fields.get("quantize", "weights", "scheme") or "dorefa"
    bits = fields.get("quantize", "weights", "bits") or 1
    if fields.sound("quantize", "weights") and isinstance(bits, int):
        yield from _scheme_bits(("quantize", "weights", "bits"), scheme, bits)
    overrides = fields.get("quantize", "overrides")
    for pattern, override in overrides.items() if isinstance(overrides, Mapping) else ():
        path = ("quantize", "overrides", pattern)
        if not isinstance(override, Mapping) or not fields.sound(*path):
            continue
        if all(value is None for value in override.values()):
            yield Mistake(
                path=path, problem="changes nothing; give it bits, scheme, activation_bits or activation_scheme"
            )
        if override.get("scheme") is not None and override.get("bits") is not None and override["bits"] != UNQUANTIZED:
            yield from _scheme_bits((*path, "bits"), override["scheme"], override["bits"])
        if fields.get("quantize", "activations") is None:
            yield from _activations_alone(path, override)


def _activations_alone(path: Path, override: Mapping[str, Any]) -> Iterator[Mistake]:
    """An override of activations where the job has none must say all of it."""
    scheme, bits = override.get("activation_scheme"), override.get("activation_bits")
    if scheme is None and bits is not None and bits != UNQUANTIZED:
        yield Mistake(
            path=(*path, "activation_bits"),
            problem="quantize.activations is null; give the override an activation_scheme too, or the job activations",
        )
    if scheme is not None and bits is None:
        yield Mistake(
            path=(*path, "activation_scheme"),
            problem="quantize.activations is null; give the override activation_bits too, or the job activations",
        )


def _scheme_bits(path: Path, scheme: str, bits: int) -> Iterator[Mistake]:
    allowed = WEIGHT_SCHEME_BITS.get(scheme)
    if allowed is not None and bits not in allowed:
        told = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else str(allowed[0])
        why = ", whose three levels take 2 bits" if scheme in ("twn", "ttq") else ""
        yield Mistake(path=path, problem=f"got {bits}, expected {told} for scheme {scheme}{why}")


def _needed(key: str, dataset: str, what: str) -> Mistake:
    return Mistake(path=("data", key), problem=f"missing; dataset {dataset} needs {what}")


def _refused(key: str, why: str) -> Mistake:
    return Mistake(path=("data", key), problem=f"{why}: leave this key out")


def _normalize(fields: _Fields) -> Iterator[Mistake]:
    mean, std = fields.get("data", "normalize", "mean"), fields.get("data", "normalize", "std")
    channels = fields.get("data", "channels")
    if isinstance(mean, list) and isinstance(std, list) and len(mean) != len(std):
        yield _wrong_length("std", std, len(mean), "as many as data.normalize.mean")
    elif isinstance(channels, int):
        for key, values in (("mean", mean), ("std", std)):
            if isinstance(values, list) and len(values) != channels:
                yield _wrong_length(key, values, channels, "as data.channels")


def _wrong_length(key: str, values: list[Any], expected: int, reason: str) -> Mistake:
    number = "1 value" if len(values) == 1 else f"{len(values)} values"
    problem = f"got {number}, {shown(values)}, expected {expected}, {reason}"
    return Mistake(path=("data", "normalize", key), problem=problem)


def _sections(fields: _Fields) -> Iterator[Mistake]:
    sections = fields.document.get("sections")
    if not isinstance(sections, Mapping):
        return  # absent: the default; anything else: a mistake already
    given = [key for key in sections if key in _WAYS_TO_CUT and sections[key] is not None]
    if len(given) > 1:
        others = listed([dotted(("sections", key)) for key in given[:-1]], last="and")
        yield Mistake(
            path=("sections", given[-1]),
            problem=f"given beside {others}, expected exactly one of {listed(_WAYS_TO_CUT)}; set the others to null",
        )
    elif not given and fields.sound("sections"):
        yield Mistake(
            path=("sections",),
            problem=f"got {shown(sections)}, expected exactly one of {listed(_WAYS_TO_CUT)}, such as {{count: 4}}",
        )


def _cuts(fields: _Fields) -> Iterator[Mistake]:
    cuts = fields.get("sections", "cuts")
    if not isinstance(cuts, list):
        return
    for index, name in enumerate(cuts):
        if name in cuts[:index]:
            yield Mistake(path=("sections", "cuts", index), problem=f"{shown(name)} is named twice; name each cut once")


def _storage(fields: _Fields) -> Iterator[Mistake]:
    default = StorageSpec.model_fields["cache_dir"].default
    cache_dir = default if fields.absent("storage", "cache_dir") else fields.get("storage", "cache_dir")
    folders = {"run_dir": fields.get("storage", "run_dir"), "cache_dir": cache_dir}
    named = {key: _location(folder) for key, folder in folders.items() if isinstance(folder, str)}
    if len(named) == 2 and named["run_dir"] is not None and named["run_dir"] == named["cache_dir"]:
        yield Mistake(
            path=("storage", "run_dir"),
            problem=f"got {shown(folders['run_dir'])}, which is storage.cache_dir too; expected another folder, since "
            "the cache is shared between runs",
        )
    root = fields.get("data", "root")
    above = _location(root) if isinstance(root, str) else None
    for key, location in named.items():
        if location is None:
            problem = f"got {shown(folders[key])}, expected a folder, or a URI such as s3://bucket/folder"
            yield Mistake(path=("storage", key), problem=problem)
        elif above is not None and above == location[: len(above)]:
            yield Mistake(
                path=("storage", key),
                problem=f"got {shown(folders[key])}, which lies in data.root, {shown(root)}; expected a folder "
                "outside, since nothing is written among the data",
            )


def _location(folder: str) -> Path | None:
    """What tells folders apart: scheme, host and the names on the way down; None for what is no URI.

    Links of local folders are followed.
    """
    try:
        parts = urlsplit(folder) if "://" in folder else None
    except ValueError:
        return None
    if parts is None or parts.scheme == "file":
        local = os.path.expanduser(folder) if parts is None else unquote(parts.path)
        return ("file", "", *(name for name in os.path.realpath(local).split(os.sep) if name))
    host = parts.netloc.rpartition("@")[2]
    names = os.path.normpath(parts.path).split("/")
    return (parts.scheme, host, *(name for name in names if name not in ("", ".")))
