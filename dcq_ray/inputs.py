"""Whether a finished run's inputs are still the same, told without loading a network, images or torch.

A scheduled run that has nothing to do so ends in seconds. What a run is made from is written down as it ends: the job, every file
that it names (size, time, sha256), the users' own modules, the versions of libraries, and whether there are GPUs. A file whose
size and time are the same is not read again, unless it changed so shortly before it was written down that a later change may have
the same time (as git's index does it). Where anything is in doubt (a URI, a data set that is not in place, very many files) the
answer is no, and the run itself finds out.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from dcq_ray.records import RunReport, seal_json, unseal_json
from dcq_ray.spec import Job
from dcq_ray.storage import Store
from dcq_ray.version import __version__

INPUTS_FILE = "inputs.json"
MAX_FILES = 20_000
# Times of files are that coarse on some file systems.
TIME_STEP_NS = 2 * 10**9
LIBRARIES = ("torch", "torchvision", "numpy", "pyarrow", "scikit-learn", "pillow")
# Of these nothing that a run finds depends on; what is left of `storage` decides what is stored, and how.
WITHOUT_CONSEQUENCE: dict[str, Any] = {
    "name": True,
    "resources": True,
    "storage": {"run_dir", "cache_dir", "checkpoint_seconds", "max_bytes"},
    # The gate is looked at every time.
    "reduce": {"max_drop"},
}
COMPUTED = ("digits",)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file that a run reads."""

    path: str
    num_bytes: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All that a run is made from, and the student that it gave."""

    job_sha256: str
    surroundings: dict[str, str]
    files: tuple[InputFile, ...]
    seen_at_ns: int
    """When the files were looked at."""
    student_sha256: str = ""
    student_file_sha256: str = ""


def look_at_inputs(job: Job, job_folder: str, *, now_ns: int, earlier: Inputs | None = None) -> Inputs | None:
    """What the job is made from now, or None where that cannot be told cheaply.

    Args:
        earlier: what was seen before; files that are still the same as then are not read again.
    """
    paths = _paths(job, Path(job_folder))
    if paths is None:
        return None
    known = {} if earlier is None else {file.path: file for file in earlier.files}
    files = []
    for path in paths:
        try:
            found = _file(path, known.get(str(path)), 0 if earlier is None else earlier.seen_at_ns)
        except OSError:
            return None
        files.append(found)
    return Inputs(job_sha256=_job_sha256(job), surroundings=_surroundings(), files=tuple(files), seen_at_ns=now_ns)


def keep_inputs(store: Store, before: Inputs | None, after: Inputs | None, report: RunReport) -> None:
    """Write down what a finished run was made from, if that is known and did not change meanwhile."""
    if before is None or after is None or report.student is None or not _same(before, after):
        store.delete(INPUTS_FILE)
        return
    content = store.read_bytes("student.safetensors")
    kept = Inputs(
        job_sha256=before.job_sha256,
        surroundings=before.surroundings,
        files=before.files,
        seen_at_ns=before.seen_at_ns,
        student_sha256=report.student.sha256,
        student_file_sha256=hashlib.sha256(content).hexdigest(),
    )
    store.write_bytes(INPUTS_FILE, seal_json(kept))


def read_inputs(store: Store) -> Inputs | None:
    """What a run directory's last run was made from, or None."""
    content = store.read_bytes_or_none(INPUTS_FILE)
    if content is None:
        return None
    try:
        return unseal_json(Inputs, content)
    except ValueError:
        return None


def unchanged_report(store: Store, job: Job, job_folder: str, *, now_ns: int) -> RunReport | None:
    """The report of a finished run of a directory, where nothing that it was made from has changed, else None."""
    kept = read_inputs(store)
    content = store.read_bytes_or_none("report.json")
    if kept is None or content is None:
        return None
    try:
        report = unseal_json(RunReport, content)
    except ValueError:
        return None
    if report.status != "succeeded" or report.student is None or report.student.sha256 != kept.student_sha256:
        return None
    found = look_at_inputs(job, job_folder, now_ns=now_ns, earlier=kept)
    student = store.read_bytes_or_none("student.safetensors")
    if found is None or not _same(kept, found) or student is None:
        return None
    if hashlib.sha256(student).hexdigest() != kept.student_file_sha256:
        return None
    return replace(report, max_drop=job.reduce.max_drop)


def _same(before: Inputs, after: Inputs) -> bool:
    def contents(inputs: Inputs) -> dict[str, str]:
        return {file.path: file.sha256 for file in inputs.files}

    return (
        before.job_sha256 == after.job_sha256
        and before.surroundings == after.surroundings
        and contents(before) == contents(after)
    )


def _file(path: Path, known: InputFile | None, seen_at_ns: int) -> InputFile:
    state = path.stat()
    if (
        known is not None
        and (known.num_bytes, known.modified_ns) == (state.st_size, state.st_mtime_ns)
        and state.st_mtime_ns + TIME_STEP_NS < seen_at_ns
    ):
        return known
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(path=str(path), num_bytes=state.st_size, modified_ns=state.st_mtime_ns, sha256=sha256)


def _paths(job: Job, folder: Path) -> list[Path] | None:
    """The files that the job reads, in order; None where they are not known or too many."""
    weights = _weights(job)
    data = _data(job)
    own = _modules(job, folder)
    if weights is None or data is None or own is None:
        return None
    paths = sorted({*weights, *data, *own})
    return paths if len(paths) <= MAX_FILES else None


def _weights(job: Job) -> list[Path] | None:
    weights = job.teacher.weights
    if weights is None:
        return []
    if "://" in weights:
        return None
    path = Path(weights).expanduser()
    if path.is_file():
        return [path.resolve()]
    # The name of one of torchvision's: its version says which weights those are.
    return [] if job.teacher.model.startswith("torchvision:") else None


def _data(job: Job) -> list[Path] | None:
    data = job.data
    if data.dataset in COMPUTED:
        return []
    if data.root is None:
        # A function of the user's own, which reads what it likes: its modules tell, and nothing else can.
        return None
    root = Path(data.root).expanduser()
    if data.dataset == "npz":
        names = [name for name in (data.train, data.test) if name is not None]
        return [(root / name).resolve() for name in names]
    below = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "imagefolder": "", "cifar10": "", "svhn": ""}
    if data.dataset not in below:
        return None
    found: list[Path] = []
    for parent, folders, names in os.walk(root / below[data.dataset], followlinks=True):
        folders.sort()
        found += [Path(parent, name) for name in names]
        if len(found) > MAX_FILES:
            return None
    return found or None


def _modules(job: Job, folder: Path) -> list[Path] | None:
    """All Python files of the job's folder where it names functions of its own; None where one comes from elsewhere."""
    references = (job.teacher.model, job.data.dataset, job.data.transform, job.data.metric)
    own = [reference for reference in references if reference and ":" in reference]
    modules = [name for name, _, _ in (reference.partition(":") for reference in own)]
    modules = [name for name in modules if name not in ("dcq_ray", "torchvision")]
    if not modules:
        return []
    for name in modules:
        path = folder.joinpath(*name.split("."))
        if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
            return None
    return [path.resolve() for path in _python_files(folder)]


def _python_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def _job_sha256(job: Job) -> str:
    content = job.model_dump_json(exclude=WITHOUT_CONSEQUENCE)
    return hashlib.sha256(content.encode()).hexdigest()


def _surroundings() -> dict[str, str]:
    """What numbers depend on beside the job and its files."""
    found = {"dcq_ray": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    # Whether torch finds a GPU, as far as that can be told without it.
    found["gpus"] = ",".join(sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")))
    found["visible"] = str(_visible(os.environ))
    return found


def _visible(environment: Mapping[str, str]) -> str | None:
    return environment.get("CUDA_VISIBLE_DEVICES")
