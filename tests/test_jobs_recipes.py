"""The README's recipes, run as they stand there, on smaller jobs of the same names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def recipe(title: str) -> str:
    """The commands of the README's recipe."""
    found = re.search(rf"\*\*Recipe: {title}\*\*.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None, f"README.md has no recipe '{title}'"
    commands = found[1]
    assert 1 <= len(commands.splitlines()) <= 3
    return commands


def small_jobs(folder: Path) -> None:
    """A copy of `jobs/` whose trainings are short."""
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    for name in ("quickstart", "nightly"):
        path = folder / "jobs" / f"{name}.yaml"
        job = yaml.safe_load(path.read_text())
        job["teacher"]["fit"]["epochs"] = 3
        job["train"].update(epochs=1, start="nearest")
        job["reduce"] = {"max_drop": 100}
        job["sections"] = {"count": 2}
        job["data"].update(train_samples=320, held_out_samples=100, test_samples=100)
        path.write_text(yaml.safe_dump(job))


def told(commands: str, folder: Path, **environment: str) -> str:
    """What the commands print, in a folder, with this environment's programs."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_for_this_machine(tmp_path: Path) -> None:
    commands = recipe("on this machine")
    small_jobs(tmp_path)
    assert told(commands, tmp_path).count("stitched student") == 2
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_for_a_schedule(tmp_path: Path) -> None:
    commands = recipe("on a schedule")
    small_jobs(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    # A crontab of its own, which has a line already.
    (programs / "crontab").write_text(f'#!/bin/sh\n[ "$1" = -l ] && echo "# mine" || cat >{tmp_path}/crontab\n')
    (programs / "crontab").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    shown = told(commands, tmp_path, PATH=path)
    ended = json.loads(shown.splitlines()[0])
    assert (ended["event"], ended["exit_code"]) == ("run", 0)
    assert (tmp_path / "published" / "current").resolve().name == ended["published"]
    assert "stitched student" in shown
    lines = (tmp_path / "crontab").read_text().splitlines()
    assert lines[0] == "# mine"
    assert sum("dcq-ray run jobs/nightly.yaml" in line for line in lines) == 1
