"""The jobs and commands that the repository shows are the ones that work."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dcq_ray.cli.run import run as run_command
from dcq_ray.jobfile import load_job, resolve_job

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_is_valid_and_named_after_its_file(path: Path) -> None:
    job = load_job(str(path), environment={"DCQ_DATA": "/data"})
    assert job.name == path.stem
    assert yaml.safe_load(path.read_text())["storage"]["run_dir"] == f"runs/{path.stem}"


def test_every_job_and_command_of_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {name for name in re.findall(r"jobs/[\w.-]+\.yaml", readme) if not (ROOT / name).exists()} == set()
    blocks = "".join(re.findall(r"```\n(.*?)```", readme, re.DOTALL))
    commands = set(re.findall(r"^dcq-ray ([a-z]+)", blocks, re.MULTILINE))
    help_text = subprocess.run(
        [sys.executable, "-m", "dcq_ray", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert commands
    assert {command for command in commands if not re.search(rf"^ +{command}\b", help_text, re.MULTILINE)} == set()


def test_the_readmes_quantizers_are_a_part_of_a_job() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    smallest = {"name": "a", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}
    job = resolve_job({**smallest, **yaml.safe_load(block)}, source="README.md")
    assert len(job.quantize.overrides) == 3


def test_the_readme_opens_with_the_main_job_and_the_tests() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks[0].strip().endswith("dcq-ray run jobs/quickstart.yaml")
    assert blocks[1].strip().endswith(".venv/bin/pytest -n 2 --dist loadgroup")


def test_nothing_of_a_machine_is_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a checkout")
    # An image's own user is no machine's.
    pattern = re.compile(r"/(?:home/(?!ray\b)|root/|work/|Users/)\w")
    strays = {
        name
        for name in listed.stdout.split("\0")
        if name and not name.startswith("tests/") and pattern.search((ROOT / name).read_text(errors="ignore"))
    }
    assert strays == set()


def test_the_scheduled_command_is_one_that_works_and_is_the_same_everywhere() -> None:
    folder = ROOT / "jobs" / "nightly"
    (line,) = [line for line in (folder / "dcq-ray.cron").read_text().splitlines() if line[0] != "#"]
    fields = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[\d*/,-]+", field) for field in fields[:5])
    (command,) = re.findall(r"dcq-ray (run .*?) >>", fields[5])
    service = configparser.ConfigParser(interpolation=None, strict=False)
    service.optionxform = str  # type: ignore[assignment, method-assign]
    service.read(folder / "dcq-ray.service")
    assert service["Service"]["ExecStart"].partition("dcq-ray run")[2] == command.partition("run")[2]
    assert service["Service"]["SuccessExitStatus"] == "75"
    assert f"dcq-ray {command}" in (ROOT / "jobs" / "README.md").read_text()
    context = run_command.make_context("run", command.split()[1:])
    assert context.params["job_path"] == "jobs/nightly.yaml"
    assert (context.params["publish"], context.params["keep"]) == ("published", 7)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    units = [
        str(path) for path in (ROOT / "jobs" / "nightly").glob("dcq-ray.*") if path.suffix in (".service", ".timer")
    ]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", *units],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    # It misses the program alone, which is not in that place here.
    told = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert told == []
