"""Drivers that die: a killed one's workers end with it, a terminated one has them save, and the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import ignore_progress, run_local

DEADLINE_SECONDS = 240.0


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)


def processes_of(marker: str) -> list[int]:
    """The processes with that in their environment: a driver, the Ray that it started, and its workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                living = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if living and marker.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                # It has ended since, or is another user's.
                continue
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_whose_drivers_were_killed_and_terminated_gives_the_undisturbed_student(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    document = {**job_document, "train": {"epochs": 150, "batch_size": 16}}
    document["storage"] = {**job_document["storage"], "checkpoint_seconds": 0.5}
    storage = {**document["storage"], "run_dir": str(tmp_path / "whole")}
    undisturbed = run_local(
        resolve_job({**document, "storage": storage}, source="test"), str(tmp_path), emit=ignore_progress, owner="test"
    )
    job_path = tmp_path / "job.yaml"
    job_path.write_text(yaml.safe_dump(document))
    run_dir, marker = tmp_path / "run", f"DCQ_TEST_MARKER={tmp_path}"
    command = [sys.executable, "-m", "dcq_ray", "run", str(job_path), "--log-format", "json", "--address"]
    environment = {**os.environ, "DCQ_TEST_MARKER": str(tmp_path)}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "local"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path
        )

    def checkpoints() -> set[str]:
        return {str(path) for path in run_dir.glob("sections/*/checkpoints/*/*.json")}

    driver = start()
    wait_until(lambda: bool(checkpoints()), "a section saved itself")
    driver.kill()
    driver.communicate()
    wait_until(lambda: not processes_of(marker), "the killed driver's Ray had ended")
    left = checkpoints()
    assert left
    # Its lock died with it.
    driver = start()
    wait_until(lambda: bool(checkpoints() - left), "a section went on")
    driver.send_signal(signal.SIGTERM)
    _, told = driver.communicate(timeout=DEADLINE_SECONDS)
    assert driver.returncode == 143, told.decode()
    assert "run the same command again to resume" in told.decode()
    assert json.loads((run_dir / "status.json").read_text())["status"] == "interrupted"
    subprocess.run([*command, "none"], env=environment, check=True, capture_output=True, cwd=tmp_path)
    report = json.loads((run_dir / "report.json").read_text())
    assert undisturbed.student is not None
    assert report["student"]["sha256"] == undisturbed.student.sha256
    # Which sections the second driver had finished is a matter of speed; one at least went on from a checkpoint.
    assert max(section["restarts"] for section in report["sections"]) >= 1
