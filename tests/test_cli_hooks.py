"""The command that a run starts when it ends."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from dcq_ray.cli.hooks import call_hook, split_command, told_at_end
from dcq_ray.cli.options import read_job
from dcq_ray.errors import QualityGateMissed, RunInterrupted, RunTerminated, StorageError
from dcq_ray.storage import hold_run, open_store

KEEP = """
import os, sys
facts = sys.stdin.read()
open({target!r}, "w").write(facts + os.environ["DCQ_RAY_STATUS"] + " " + os.environ["DCQ_RAY_EXIT_CODE"])
sys.exit(9)
"""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def told(target: Path) -> tuple[dict[str, Any], str]:
    line, variables = target.read_text().split("\n")
    return json.loads(line), variables


@pytest.mark.slow
def test_a_hook_is_told_how_a_run_ended_and_changes_no_exit_code(job_document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_document))
    target = tmp_path / "told"
    hook = shlex.join(python(KEEP.format(target=str(target))))

    def run(*arguments: str) -> int:
        command = [sys.executable, "-m", "dcq_ray", "run", str(tmp_path / "job.yaml"), "--address", "none"]
        done = subprocess.run(
            [*command, "--on-end", hook, *arguments], capture_output=True, text=True, timeout=300, check=False
        )
        assert "failed with exit code 9" in done.stderr
        return done.returncode

    assert run() == 0
    first, variables = told(target)
    assert variables == "done 0"
    assert first["drop_points"] == pytest.approx(100 * (first["teacher_top1"] - first["student_top1"]))
    assert run() == 0
    assert told(target)[0]["student_sha256"] == first["student_sha256"]
    with hold_run(open_store(first["run_dir"]), owner="a test"):
        assert run() == 75
    assert told(target)[1] == "busy 75"
    assert told(target)[0]["student_top1"] is None


@pytest.mark.parametrize(
    ("error", "variables"),
    [
        (QualityGateMissed("missed"), "gate-missed 3"),
        (RunTerminated("terminated"), "interrupted 143"),
        (RunInterrupted("interrupted"), "interrupted 130"),
        (KeyboardInterrupt(), "interrupted 130"),
        (StorageError("the disk is full"), "failed 1"),
        (ZeroDivisionError("a bug"), "failed 1"),
    ],
)
def test_every_end_is_told_and_the_error_goes_on(
    error: BaseException, variables: str, job_document: dict[str, Any], tmp_path: Path
) -> None:
    path, target = tmp_path / "job.yaml", tmp_path / "told"
    path.write_text(yaml.safe_dump(job_document))
    job, _ = read_job(str(path), ())
    with pytest.raises(type(error)), told_at_end(python(KEEP.format(target=str(target))), job, "text"):
        raise error
    facts, got = told(target)
    assert got == variables
    assert (facts["message"], facts["student_top1"], facts["run_dir"]) == (str(error), None, job.storage.run_dir)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (python("import sys; sys.exit(4)"), "failed with exit code 4"),
        (python("import time; time.sleep(600)"), "did not end within"),
        (("/no/such/program", "secret"), "could not be started"),
    ],
)
def test_a_hook_that_fails_is_a_warning_without_its_arguments(command: tuple[str, ...], problem: str) -> None:
    text = call_hook(command, {"exit_code": 3}, timeout_seconds=2)
    assert problem in text
    assert "exit code stays 3" in text
    assert "secret" not in text


def test_a_command_is_split_as_a_shell_does_and_a_wrong_one_is_refused() -> None:
    parameter = click.Option(["--on-end"])
    context = click.Context(click.Command("run"))
    assert split_command(context, parameter, None) == ()
    assert split_command(context, parameter, "notify 'two words' $HOME") == ("notify", "two words", "$HOME")
    for wrong in ("notify 'open", "  "):
        with pytest.raises(click.BadParameter):
            split_command(context, parameter, wrong)
