"""Files that nobody wrote so: mutated job files, manifests, shards, checkpoints, results, plans, reports and packed students.

    python tests/benchmarks/fuzz.py                 # 10,000 files
    python tests/benchmarks/fuzz.py --files 500 --seed 1 --kinds manifest shard

A small run is made on digits. Then every file is a mutation of one of its files: bits flipped, bytes cut out, put in or
repeated, cut short; in JSON and YAML also other types, huge and tiny numbers, missing and foreign keys, deep nesting, aliases and
tags; half of the sealed files get a seal that fits, as from somebody who knows the format. Each goes to the code that reads it in a
run. It may take the file, take it for absent, or refuse it by an error of ours; anything else, more than 20 seconds, or a file
outside of the run's folder is unhandled, and is kept. The exit code is 1 where anything was.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dcq_ray import load
from dcq_ray.cli import cli
from dcq_ray.errors import DcqError
from dcq_ray.jobfile import parse_job
from dcq_ray.phases import open_run, run_local
from dcq_ray.phases.changes import earlier_run
from dcq_ray.phases.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from dcq_ray.phases.committed import finished_section
from dcq_ray.phases.reduce import measured_section
from dcq_ray.phases.session import read_report
from dcq_ray.records.json import SEAL, content_sha256
from dcq_ray.report import print_report, report_html
from dcq_ray.section import Training
from dcq_ray.shards import load_manifest, open_boundary
from dcq_ray.storage import current_epoch, open_store, read_uses

MAX_SECONDS_A_FILE = 20
NETWORK = """
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 10),
    )
"""
JOB = """
name: fuzz
teacher: {model: "fuzz_nets:network", fit: {epochs: 1, lr: 0.01, batch_size: 32}, min_top1: 0}
data: {dataset: digits, train_samples: 64, held_out_samples: 32, test_samples: 32, batch_size: 32, image_size: [8, 8]}
sections: {count: 2}
quantize: {weights: {scheme: dorefa, bits: 1}, activations: {scheme: pact, bits: 4}, overrides: {"section:1": {bits: 2}}}
train: {epochs: 1, lr: 1e-3, batch_size: 32}
storage: {run_dir: %s, cache_dir: %s}
"""

Read = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A file, and the code that reads it in a run."""

    kind: str
    path: Path
    read: Read


class TooSlow(Exception):
    """A file took longer than any may."""


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Another file that is nearly the same."""
    as_text = content[:1] in (b"{", b"[") or b": " in content[:200]
    if as_text and draw.random() < 0.6:
        changed = _mutated_json(content, draw) if content[:1] == b"{" else _mutated_yaml(content, draw)
        if changed is not None:
            return changed
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        if not data:
            break
        at, length = draw.randrange(len(data)), draw.choice((1, 1, 2, 8, 100))
        match draw.randrange(6):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = draw.randbytes(length)
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = draw.choice((b"\0", b"\xff", b"\x80")) * length
            case _:
                del data[at:]
    return bytes(data)


STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**30, -(10**30), 1e308, 1e-320, "", "..", "../../outside", "/etc/passwd", "\0", "x" * 10_000,
    [], {}, [[[]]], {"a": {"b": []}}, "nan", "\ud800", 0.5,
)  # fmt: skip


def _mutated_json(content: bytes, draw: random.Random) -> bytes | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw.choice(places)
        match draw.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(("extra", "", "index", "sha256"))] = copy.deepcopy(draw.choice(STRANGE))
            case 2:
                _, other = draw.choice(places)
                if isinstance(holder, dict) and other in holder:
                    holder[key] = holder[other]
            case _:
                holder[key] = copy.deepcopy(draw.choice(STRANGE))
    if isinstance(value, dict) and SEAL in value and draw.random() < 0.5:
        value.pop(SEAL)
        value[SEAL] = content_sha256(value)
    text = json.dumps(value)
    if draw.random() < 0.1:
        text = text.replace("1", draw.choice(("NaN", "Infinity", "1e999", "-0", "[" * 5000)), 1)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(part)


def _mutated_yaml(content: bytes, draw: random.Random) -> bytes | None:
    text = content.decode("utf-8", "replace")
    words = (
        "!!python/object/apply:os.system ['touch outside']", "&a [*a, *a]", "*unknown", "\t", "? :", "- - -", "{[}", "%YAML 9.9\n",
        "${HOME}", "${", "$${X}", "1e400", ".nan", "-.inf", "0o17", "2026-11-26", "<<: {a: 1}", "'", '"', "\u2028", "~", "[" * 3000,
        "&a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "e: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f]",
        "-1", "99999999999999999999", "null", "[]", "{}", "true", "../../outside", "\\0",
    )  # fmt: skip
    for _ in range(draw.choice((1, 1, 2, 4))):
        parts = text.replace("{", " { ").split(" ")
        at = draw.randrange(len(parts))
        match draw.randrange(4):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, draw.choice(words))
            case 2:
                parts[at] = draw.choice(words)
            case _:
                parts.insert(at, draw.choice(parts))
        text = " ".join(parts)
    return text.encode("utf-8", "surrogatepass")


# -- what is mutated ---------------------------------------------------------------------------------------------------


def targets(folder: Path) -> list[Target]:
    """Make a run in a folder, and list its files with their readers."""
    (folder / "fuzz_nets.py").write_text(NETWORK)
    run, cache = folder / "run", folder / "cache"
    text = JOB % (json.dumps(str(run)), json.dumps(str(cache)))
    (folder / "job.yaml").write_text(text)
    job = parse_job(text.encode(), source="job.yaml")
    run_local(job, str(folder), emit=lambda _: None, owner="fuzz")
    _leave_checkpoint(job, folder)
    store = open_store(str(run))
    with open_run(job, str(folder), device=torch.device("cpu"), emit=lambda _: None, owner="fuzz") as session:
        context, tasks, results = session.context, session.tasks, dict(session.results)
    boundary = open_store(str(cache)).child(context.plan.boundaries[1].digest)
    shard = Path(boundary.location("shard-00000.arrow"))
    manifest = load_manifest(boundary, digest=context.plan.boundaries[1].digest)
    assert manifest is not None
    attempt = run / "sections" / "00" / results[0].attempt
    checkpoints = folder / "checkpoints"
    mark = next(checkpoints.glob("*.json"))

    def read_shard(verify: bool) -> object:
        with open_boundary(boundary, manifest, verify=verify) as reader:
            return reader.read(np.arange(reader.num_samples))

    def read_finished() -> object:
        result = finished_section(context, tasks[0])
        return result and measured_section(context, result)

    def read_checkpoint() -> object:
        return newest_checkpoint(open_store(str(checkpoints)), on_damage=lambda _: None)[0]

    def read_manifest() -> object:
        found = load_manifest(boundary, digest=manifest.digest)
        if found is not None:
            with open_boundary(boundary, found) as reader:
                return reader.read(np.arange(min(4, reader.num_samples)))
        return None

    found = [
        Target(kind="job file", path=folder / "job.yaml", read=lambda: _resolve(folder / "job.yaml")),
        Target(kind="job of a run", path=run / "job.yaml", read=lambda: earlier_run(store, None).job),
        Target(kind="plan", path=run / "plan.json", read=lambda: earlier_run(store, None).plan),
        Target(kind="report", path=run / "report.json", read=lambda: _print_report(store)),
        Target(kind="result", path=run / "sections" / "00" / "result.json", read=read_finished),
        Target(kind="measurement", path=attempt / "measurement.json", read=read_finished),
        Target(kind="weights", path=attempt / "weights.safetensors", read=read_finished),
        Target(kind="checkpoint's mark", path=mark, read=read_checkpoint),
        Target(kind="checkpoint", path=mark.with_suffix(".safetensors"), read=read_checkpoint),
        Target(kind="manifest", path=Path(boundary.location("manifest.json")), read=read_manifest),
        Target(kind="shard", path=shard, read=lambda: read_shard(True)),
        Target(kind="shard, digest not looked at", path=shard, read=lambda: read_shard(False)),
    ]
    lease = next((path for path in run.iterdir() if "lease" in path.name), None)
    if lease is not None:
        found.append(Target(kind="lease", path=lease, read=lambda: current_epoch(store)))
    uses = next(iter(sorted((cache / "uses").glob("*"))), None)
    if uses is not None:
        found.append(Target(kind="use", path=uses, read=lambda: read_uses(open_store(str(cache)))))
    found += _exports(run, folder)
    return found


def _leave_checkpoint(job: Any, folder: Path) -> None:
    module = torch.nn.Linear(4, 3)
    training = Training(
        module,
        settings=job.train,
        num_steps=4,
        loss=torch.nn.functional.mse_loss,
        device=torch.device("cpu"),
        what="fuzz",
    )
    training.train()
    training.step(torch.zeros(2, 4), torch.zeros(2, 3))
    save_checkpoint(open_store(str(folder / "checkpoints")), Checkpoint(training=training.state()), beside=None)


def _exports(run: Path, folder: Path) -> list[Target]:
    packed = folder / "student.dcq"
    cli.main(["export", str(run), "--format", "packed", "-o", str(packed)], standalone_mode=False)
    return [Target(kind="packed student", path=packed, read=lambda: load(str(packed)))]


def _resolve(path: Path) -> object:
    return parse_job(path.read_bytes(), source=str(path), environment={"HOME": "/root"})


def _print_report(store: Any) -> object:
    report = read_report(store)
    if report is not None:
        with open("/dev/null", "w", encoding="utf-8") as nowhere:
            print_report(report, Console(file=nowhere))
        return report_html(report)
    return None


# -- doing it ----------------------------------------------------------------------------------------------------------


def fuzz(found: Sequence[Target], *, num_files: int, seed: int, keep: Path) -> dict[str, Counter[str]]:
    """Mutate and read so many files, the same number of each kind; the outcomes by kind. What is unhandled is kept."""
    draw, outcomes = random.Random(seed), {target.kind: Counter[str]() for target in found}
    signal.signal(signal.SIGALRM, _too_slow)
    root = found[0].path.parent
    beside = sorted(path.name for path in root.parent.iterdir())
    for number in range(num_files):
        target = found[number % len(found)]
        whole = target.path.read_bytes()
        content = mutated(whole, draw)
        target.path.write_bytes(content)
        outcome = _outcome(target.read)
        target.path.write_bytes(whole)
        if sorted(path.name for path in root.parent.iterdir()) != beside:
            outcome = "unhandled: it wrote outside"
        kind, _, detail = outcome.partition(": ")
        outcomes[target.kind][kind] += 1
        if kind == "unhandled":
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{number}-{target.path.name}").write_bytes(content)
            print(f"{target.kind}, file {number}: {detail}", file=sys.stderr, flush=True)
    return outcomes


def _outcome(read: Read) -> str:
    signal.alarm(MAX_SECONDS_A_FILE)
    try:
        return "taken" if read() is not None else "absent"
    except DcqError:
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"unhandled: {type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    finally:
        signal.alarm(0)


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {MAX_SECONDS_A_FILE} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, and print the table: 0 where all was handled."""
    parser = argparse.ArgumentParser(description="Read mutated files with the code that reads them in a run.")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="default: all")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-unhandled"), help="where unhandled files are put")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "inside"
        inside.mkdir()
        found = [target for target in targets(inside) if not options.kinds or target.kind in options.kinds]
        outcomes = fuzz(found, num_files=options.files, seed=options.seed, keep=options.keep)
    columns = ("taken", "absent", "refused", "unhandled")
    print("| file | " + " | ".join(columns) + " |\n| --- | --- | --- | --- | --- |")
    for kind, counts in outcomes.items():
        print(f"| {kind} | " + " | ".join(str(counts[column]) for column in columns) + " |")
    total = sum((counts for counts in outcomes.values()), Counter[str]())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{total.total():,} files in {time.monotonic() - started:.0f} s, {total['unhandled']} unhandled; "
        f"at most {peak:.1f} GiB"
    )
    return 1 if total["unhandled"] else 0


if __name__ == "__main__":
    sys.exit(main())
