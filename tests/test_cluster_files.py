"""The cluster files pass Ray's own loader, want a token, and mount and install what `ray submit` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
NAMES = ("local", "aws", "gcp")


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{request.param}.yaml").read_text())
    return loaded


def test_rays_loader_takes_the_file(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_every_ray_process_wants_the_mounted_token_and_the_dashboard_is_the_heads_own(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert {command.split()[0] for command in commands} == {"RAY_AUTH_MODE=token"}
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert config["file_mounts"]["~/dcq-ray"] == "."
    assert any('pip install --quiet -e "$HOME/dcq-ray[all]"' in command for command in config["setup_commands"])


def test_cloud_heads_are_kept_and_workers_are_on_the_spot_market() -> None:
    aws, gcp = (yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text()) for name in ("aws", "gcp"))
    types = aws["available_node_types"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    types = gcp["available_node_types"]
    assert "scheduling" not in types["head"]["node_config"]
    assert types["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


def submitted(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the script does where Ray puts it: alone in the head's home."""
    script = home / "submit.py"
    script.write_bytes((ROOT / "jobs" / "submit.py").read_bytes())
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "HOME": str(home), **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_script_of_ray_submit_says_where_it_wants_the_project(tmp_path: Path) -> None:
    done = submitted(tmp_path, "jobs/quickstart.yaml")
    assert done.returncode == 1
    assert f"no project at {tmp_path / 'dcq-ray'}" in done.stderr


@pytest.mark.slow
def test_the_script_of_ray_submit_runs_in_the_project_and_passes_the_exit_code_on(
    job_document: dict[str, Any], tmp_path: Path
) -> None:
    job_document["storage"] = {"run_dir": "runs/one", "cache_dir": "runs/.cache"}
    job_document["train"]["epochs"] = 1
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_document))
    home = tmp_path / "home"
    home.mkdir()
    done = submitted(home, "job.yaml", "--address", "none", "--max-drop", "0", DCQ_PROJECT=str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "runs" / "one" / "report.json").exists()
