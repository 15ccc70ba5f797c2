"""The command line as a person or a script meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dcq_ray.cli import inspect
from dcq_ray.phases.status import StatusFile
from dcq_ray.records import Progress
from dcq_ray.storage import hold_run, open_store

COMMANDS = ("run", "plan", "teacher", "baseline", "report", "status", "ls", "eval", "schema", "search", "gc")


def dcq(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dcq_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def job_path(job_document: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_document))
    return str(path)


def one_paragraph(text: str) -> bool:
    return text.startswith("dcq-ray: ") and "\n\n" not in text.strip() and "Traceback" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = dcq(command, "--help")
    assert done.returncode == 0
    assert f"dcq-ray {command}" in done.stdout
    assert "Example:" in done.stdout


def test_help_of_run_shows_a_job() -> None:
    text = dcq("run", "--help").stdout
    assert "dataset: digits" in text
    assert "teacher:" in text


@pytest.mark.slow
def test_run_report_eval_and_ls(job_path: str, tmp_path: Path) -> None:
    activations = ("--set", "quantize.activations={scheme: lsq, bits: 4}")
    done = dcq("run", job_path, "--address", "none", *activations)
    assert done.returncode == 0, done.stderr
    assert "stitched student" in done.stdout
    assert "lsq 4" in done.stdout
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    report = json.loads(dcq("report", str(tmp_path / "run"), "--json").stdout)
    evaluated = json.loads(dcq("eval", str(tmp_path / "run"), "--json", cwd=tmp_path).stdout)
    assert evaluated["test_top1"] == report["student"]["top1"]
    assert "small" in dcq("ls", str(tmp_path)).stdout
    assert "succeeded" in dcq("status", str(tmp_path / "run")).stdout
    again = dcq("run", job_path, "--address", "none", "--log-format", "json", "--max-drop", "100", *activations)
    assert again.returncode == 0
    assert json.loads(again.stdout)["student_sha256"] == report["student"]["sha256"]
    assert all(json.loads(line) for line in again.stderr.splitlines())
    teacher = json.loads(dcq("teacher", job_path, "--log-format", "json").stdout)
    assert teacher["test_top1"] == report["teacher"]["top1"]


@pytest.mark.slow
def test_the_gate_exits_3_every_time_and_publishes_nothing(job_path: str, tmp_path: Path) -> None:
    options = ("--address", "none", "--max-drop", "0", "--set", "train.epochs=0", "--publish", str(tmp_path / "shop"))
    for _ in range(2):
        done = dcq("run", job_path, *options)
        assert done.returncode == 3, done.stderr
        assert "the gate allows 0" in done.stderr
    assert not list((tmp_path / "shop").iterdir())
    done = dcq("run", job_path, "--address", "none", "--max-drop", "100", "--publish", str(tmp_path / "shop"))
    assert done.returncode == 0, done.stderr
    current = tmp_path / "shop" / "current"
    assert (current / "student.safetensors").read_bytes() == (tmp_path / "run" / "student.safetensors").read_bytes()
    assert current.resolve().name in done.stderr


@pytest.mark.parametrize(
    ("place", "code", "told"), [("run", 2, "that is the run directory itself"), ("job.yaml/shop", 1, "job.yaml/shop")]
)
def test_a_place_where_nothing_can_be_published_is_told_before_the_run(
    place: str, code: int, told: str, job_path: str, tmp_path: Path
) -> None:
    done = dcq("run", job_path, "--address", "none", "--publish", str(tmp_path / place))
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert one_paragraph(done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_rival_goes_beside_the_run(job_path: str, tmp_path: Path) -> None:
    done = dcq("run", job_path, "--address", "none", "--baseline")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["baseline"]["method"] == "dorefa"
    assert len(report["baseline"]["tried_lrs"]) == 3
    assert report["baseline"]["num_sample_passes"] == 3 * 320
    assert "end-to-end dorefa" in done.stdout
    done = dcq("baseline", job_path, "--method", "distill", "--budget", "cpu-seconds", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["baseline"]["method"] == "dorefa"
    assert {(rival["method"], rival["budget"]) for rival in report["baselines"]} == {
        ("dorefa", "passes"),
        ("distill", "cpu-seconds"),
    }
    assert "end-to-end distillation, equal processor s" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_rivals_trained_before_the_run_stand_beside_it_and_seconds_need_one(job_path: str, tmp_path: Path) -> None:
    done = dcq("baseline", job_path, "--method", "sequential", "--budget", "cpu-seconds")
    assert done.returncode == 2
    assert "is not finished, so its processor seconds are not known" in done.stderr
    assert one_paragraph(done.stderr.splitlines()[-1])
    done = dcq("baseline", job_path, "--method", "sequential", "--set", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["baseline"]["method"] == "sequential"
    assert "the run itself is not finished" in done.stderr
    # Another rival does not stand for the one that the run is asked to train.
    done = dcq("run", job_path, "--address", "none", "--baseline", "--set", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {rival["method"] for rival in report["baselines"]} == {"dorefa", "sequential"}
    assert report["baseline"]["method"] == "dorefa"


@pytest.mark.slow
def test_plan_writes_nothing_and_its_cuts_pin_the_sections(job_path: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = dcq("plan", job_path, "--json", "--set", "sections={count: 2}")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
    assert len(made["plan"]["sections"]) == 2
    total = made["plan"]["total_multiply_accumulates"]
    assert made["multiply_accumulates_by_bits"] == [{"bits": 1, "activation_bits": 32, "multiply_accumulates": total}]
    assert made["unquantized_share"] == 0
    cuts = [boundary["cut"] for boundary in made["plan"]["boundaries"][1:-1]]
    pinned = dcq("plan", job_path, "--json", "--set", f"sections={{cuts: {json.dumps(cuts)}}}")
    again = json.loads(pinned.stdout)["plan"]["boundaries"]
    assert [boundary["digest"] for boundary in again] == [boundary["digest"] for boundary in made["plan"]["boundaries"]]
    text = dcq("plan", job_path, "--set", "quantize.activations={scheme: pact, bits: 4}").stdout
    assert "bytes on disk" in text
    # conv2: 8 x 8 x 3 x 3 weights in one bit and a scale, and so many products at each of 8 x 8 pixels.
    assert re.search(r"conv2 +Conv2d +576 +dorefa 1 +pact 4 +76 B +36\.9 k", text)
    assert re.search(r"the whole model: [\d.]+ KiB in full precision, [\d.]+ (B|KiB) packed", text)
    assert "to pin these sections" in text


def test_plan_answers_for_data_and_machines_that_are_not_here(job_path: str, tmp_path: Path) -> None:
    away = ("--set", "data.dataset=imagefolder", "--set", "data.root=nowhere", "--set", "data.image_size=[8, 8]")
    there = (
        "--stand-in",
        "1000000",
        "--images-per-second",
        "1e6",
        "--storage-speed",
        "0.5",
        "--price",
        "3",
        "--workers",
        "64",
    )
    done = dcq("plan", job_path, "--json", "--set", "data.channels=1", *away, *there)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    boundaries = made["plan"]["boundaries"]
    assert {boundary["num_samples"] for boundary in boundaries} == {1_000_000}
    expected = made["outlook"]
    assert expected["num_training"] == len(made["plan"]["sections"]) < expected["num_workers"] == 64
    assert expected["written_bytes"] / 0.5e9 <= expected["dump_seconds"]
    assert expected["cost"] > 0
    assert min(made["memory_bytes"]["sections"]) > made["plan"]["teacher_num_bytes"]
    assert not (tmp_path / "run").exists()
    text = dcq("plan", job_path, "--price", "3").stdout
    assert "written by the dump" in text
    assert "cost: " in text


@pytest.mark.slow
def test_a_plan_that_recomputes_activations_says_what_that_takes_and_needs_no_disk(job_path: str) -> None:
    told = dcq("plan", job_path, "--set", "storage.activations=recomputed", "--set", "sections={count: 2}")
    assert told.returncode == 0, told.stderr
    assert re.search(r"all, recomputed: nothing is stored +│ +│ +0 B", told.stdout)
    # The first section runs a part of the teacher, the second one all of it.
    passes = re.search(r"together run ([\d.]+) passes of the teacher", " ".join(told.stdout.split()))
    assert passes is not None
    assert 1 <= float(passes[1]) <= 2
    assert "workers: dump 0.0 s" in " ".join(told.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["run"], 2, "Missing argument"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["run", "JOB", "--set", "train.lrr=1"], 2, "did you mean"),
        (["run", "JOB", "--set", "train.lr=-1", "--set", "train.epochs=-2"], 2, "2 mistakes"),
        (["plan", "JOB", "--set", "teacher.fit=null", "--set", "teacher.weights=no.pt"], 1, "no.pt"),
        (["plan", "JOB", "--set", "quantize.weights.scheme=trn"], 2, "did you mean 'twn'"),
        (["plan", "JOB", "--set", "quantize.weights.bits=0"], 2, "expected a whole number from 1 to 8"),
        (["plan", "JOB", "--set", "quantize.overrides.layer9={bits: 2}"], 2, "matches no Conv or Linear layer"),
        (["report", "nowhere"], 1, "no report.json"),
        (["status", "nowhere"], 1, "no status.json"),
        (["eval", "nowhere"], 1, "job.yaml"),
        (["baseline", "JOB", "--method", "magic"], 2, "'magic' is not one of"),
        (["baseline", "JOB", "--budget", "hours"], 2, "'hours' is not one of"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_the_right_code(
    job_path: str, tmp_path: Path, arguments: list[str], code: int, told: str
) -> None:
    done = dcq(*[job_path if argument == "JOB" else argument for argument in arguments], cwd=tmp_path)
    assert done.returncode == code
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert one_paragraph(done.stderr)
    assert not (tmp_path / "run").exists()


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    assert "Traceback" in dcq("report", str(tmp_path), "--debug").stderr


def test_status_is_watched_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StatusFile(open_store(str(tmp_path)), "small")
    file.update(Progress(phase="train", index=0, done=1, total=9, unit="steps"))
    to_come = [lambda: file.close("running"), lambda: file.close("succeeded", "what came last")]
    monkeypatch.setattr(inspect, "time", SimpleNamespace(sleep=lambda _: to_come.pop(0)()))
    done = CliRunner().invoke(inspect.status, [str(tmp_path), "--watch"])
    assert (done.exit_code, to_come) == (0, [])
    assert "succeeded" in done.output
    assert "what came last" in done.output


@pytest.mark.slow
def test_a_busy_run_directory_exits_75(job_path: str, tmp_path: Path) -> None:
    with hold_run(open_store(str(tmp_path / "run")), owner="the night shift"):
        done = dcq("run", job_path, "--address", "none")
    assert done.returncode == 75
    assert "the night shift" in done.stderr
    assert one_paragraph(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_say_how_to_resume_and_resume(
    job_path: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "dcq_ray", "run", job_path, "--address", "none", "--set", "train.epochs=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    status = tmp_path / "run" / "status.json"
    while time.monotonic() < deadline and not (status.exists() and '"train"' in status.read_text()):
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again to resume" in stderr
    assert json.loads(status.read_text())["status"] == "interrupted"
    if number == signal.SIGTERM:
        # The section in training saved itself first.
        assert list((tmp_path / "run" / "sections").glob("*/checkpoints/*/*.json"))
    assert dcq("run", job_path, "--address", "none").returncode == 0


def test_the_schema_is_json() -> None:
    assert "properties" in json.loads(dcq("schema").stdout)
