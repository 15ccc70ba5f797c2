"""Runs as jobs of a real cluster on loopback that wants a token: the same student each way, exit codes, detaching."""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_jobs_recipes import recipe, small_jobs, told

from dcq_ray.cli.submit import use_token
from dcq_ray.errors import ClusterError, UsageError
from dcq_ray.remote import jobs
from dcq_ray.remote.jobs import open_jobs, refuse_large, uploaded_sizes

WAIT_SECONDS = 240.0
SUBMIT_SCRIPT = Path(__file__).parents[1] / "jobs" / "submit.py"
DCQ = [sys.executable, "-m", "dcq_ray"]


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of who may use a head of a cluster of its own; its address is in it as CLUSTER."""
    # Paths of Ray's sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="dcq", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    gcs, dashboard, agent, agent_grpc, metrics, environments, client = free_ports(7)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += [f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={environments}"]
    command += [f"--ray-client-server-port={client}", "--disable-usage-stats", f"--temp-dir={folder}"]
    with open(folder / "log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + WAIT_SECONDS
        while jobs._why_silent(address) is not None:
            assert head.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield environment | {"CLUSTER": address, "CLUSTER_GCS": f"127.0.0.1:{gcs}"}
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def dcq(environment: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DCQ, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=WAIT_SECONDS
    )


def shown_names(environment: dict[str, str], kind: str) -> set[str]:
    """The names of tasks or actors that the cluster's dashboard shows."""
    command = [str(Path(sys.executable).parent / "ray"), "list", kind, "--address", environment["CLUSTER"]]
    done = subprocess.run(
        [*command, "--format", "json", "--limit", "1000"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {found["name"] for found in json.loads(done.stdout)}


def student_of(run: Path) -> str:
    digest: str = json.loads((run / "report.json").read_bytes())["student"]["sha256"]
    return digest


def written(document: dict[str, Any], folder: Path) -> Path:
    """The job as a file whose run and cache directories are relative."""
    document = copy.deepcopy(document)
    document["sections"] = {"count": 2}
    document["storage"] = {"run_dir": "runs/one", "cache_dir": "runs/.cache"}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.slow
@pytest.mark.ray
def test_submitted_runs_give_the_local_student_and_their_exit_codes(
    cluster: dict[str, str], job_document: dict[str, Any], tmp_path: Path
) -> None:
    written(job_document, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    job, address = str(tmp_path / "job.yaml"), cluster["CLUSTER"]
    local = dcq(cluster, "run", job, "--address", "none", "--run-dir", str(tmp_path / "local"), cwd=tmp_path)
    assert local.returncode == 0, local.stderr

    # The user's module lies beside the job; the run directory is relative to where the command was given.
    done = dcq(cluster, "submit", job, "--address", address, cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "section 1 done" in done.stdout
    assert student_of(elsewhere / "runs" / "one") == student_of(tmp_path / "local")

    # Ray's dashboard shows by name what did it.
    shown = shown_names(cluster, "tasks") | shown_names(cluster, "actors")
    wanted = {"reducer:try-1", "stitcher:try-1", "untrained", "worker-1:try-1"}
    wanted |= {
        f"{work}{index}{ending}"
        for index in range(2)
        for work, ending in (("measure-section-0", ""), ("section-0", ":try-1"))
    }
    assert {f"dcq:small:{name}" for name in wanted} <= shown
    assert any(re.fullmatch(r"dcq:small:dump-\d+-of-\d+", name) for name in shown)

    # Through Ray's own command.
    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
    run = ["python", "-m", "dcq_ray", "run", "job.yaml", "--run-dir", str(tmp_path / "rayjob")]
    run += ["--set", f"storage.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run([*ray, *run], env=cluster, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert student_of(tmp_path / "rayjob") == student_of(tmp_path / "local")

    # As jobs/nightly does it, and as `ray submit` has the head do it: its script, in the mounted project.
    joined = cluster | {"RAY_ADDRESS": cluster["CLUSTER_GCS"], "DCQ_PROJECT": str(tmp_path)}
    own = ["job.yaml", "--set", f"storage.cache_dir={tmp_path / 'other-cache'}", "--log-format", "json"]
    ways = {
        "nightly": (*DCQ, "run", *own, "--publish", "published", "--keep", "7"),
        "ray-submit": (sys.executable, str(SUBMIT_SCRIPT), *own),
    }
    for name, way in ways.items():
        command = [*way, "--run-dir", str(tmp_path / name)]
        done = subprocess.run(command, env=joined, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"the Ray cluster at {cluster['CLUSTER_GCS']}" in done.stderr
        assert (
            json.loads(done.stdout)["student_sha256"] == student_of(tmp_path / name) == student_of(tmp_path / "local")
        )
    assert (tmp_path / "published" / "current" / "report.json").exists()

    # The finished run, below its gate; by the GCS's address, left and taken up again.
    gate = ("--address", cluster["CLUSTER_GCS"], "--max-drop", "0")
    left = dcq(cluster, "submit", job, *gate, "--no-wait", cwd=elsewhere)
    assert left.returncode == 0, left.stderr
    attached = dcq(cluster, "attach", left.stdout.strip(), "--address", address, cwd=tmp_path)
    assert attached.returncode == 3, attached.stdout + attached.stderr
    again = dcq(cluster, "attach", left.stdout.strip(), "--address", address, "--last", "1", cwd=tmp_path)
    assert again.returncode == 3
    assert attached.stdout.endswith(again.stdout)
    assert again.stdout.count("\n") == 1


@pytest.mark.slow
@pytest.mark.ray
def test_the_readmes_recipe_for_a_cluster(cluster: dict[str, str], tmp_path: Path) -> None:
    commands = recipe("on a cluster")
    small_jobs(tmp_path)
    shown = told(commands.replace("http://HOST:8265", cluster["CLUSTER"]), tmp_path, **cluster)
    assert "section 1 done" in shown
    assert shown.count("stitched student") == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_signal_leaves_the_job_which_is_stopped_by_its_id(
    cluster: dict[str, str], job_document: dict[str, Any], tmp_path: Path
) -> None:
    job_document["train"]["epochs"] = 100_000
    written(job_document, tmp_path)
    address = cluster["CLUSTER"]
    command = [*DCQ, "submit", "job.yaml", "--address", address]
    with subprocess.Popen(
        command, env=cluster, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        assert one.stderr is not None
        for line in one.stdout:
            if "section 1 running" in line:
                break
        one.send_signal(signal.SIGINT)
        told = one.stderr.read()
        assert one.wait(60) == 130
    found = re.search(r"left job (\S+), which goes on; `dcq-ray attach \1", told)
    assert found, told
    stopped = dcq(cluster, "attach", found[1], "--address", address, "--stop", cwd=tmp_path)
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    assert json.loads((tmp_path / "runs" / "one" / "report.json").read_bytes())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.ray
def test_who_has_no_token_or_another_one_is_told(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    for change, words in (
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, "wants another token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
    ):
        done = dcq({**cluster, **change}, "attach", "raysubmit_none", "--address", cluster["CLUSTER"], cwd=tmp_path)
        assert done.returncode == 1
        assert words in done.stderr
        assert (tmp_path / "token").read_text() not in done.stderr
        assert "Traceback" not in done.stderr
    done = dcq(cluster, "attach", "raysubmit_none", "--address", cluster["CLUSTER"], cwd=tmp_path)
    assert (done.returncode, "raysubmit_none" in done.stderr) == (1, True)


def test_where_nobody_answers_it_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.2)
    # Takes connections, and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=f"--address http://127.0.0.1:{port}: no Ray dashboard answers"):
            open_jobs(f"http://127.0.0.1:{port}", environment={})
    with pytest.raises(ClusterError, match=r"no Ray dashboard answers .* refused"):
        open_jobs(f"127.0.0.1:{port}", environment={})
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray dashboard"):
        open_jobs("auto", environment={"RAY_ADDRESS": "127.0.0.1:1"})


def test_addresses_of_rays_client_are_refused() -> None:
    with pytest.raises(UsageError, match="expected http://HOST:8265"):
        open_jobs("ray://127.0.0.1:10001", environment={})


def test_a_working_directory_beyond_rays_limit_is_refused_with_its_largest_entries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, size in (
        ("a.py", 10),
        ("data/big.npz", 3 << 20),
        ("data/small.npz", 5),
        ("skipped/x", 9 << 20),
        (".git/o", 9),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".rayignore").write_text("skipped/\n")
    sizes = uploaded_sizes(tmp_path)
    assert sizes == {".rayignore": 9, "a.py": 10, "data/big.npz": 3 << 20, "data/small.npz": 5}
    refuse_large(tmp_path)
    monkeypatch.setattr(jobs, "GCS_STORAGE_MAX_SIZE", 2 << 20)
    with pytest.raises(UsageError, match=r"the largest in it: data/big\.npz \(3 MiB\), a\.py .*\.rayignore"):
        refuse_large(tmp_path)


def test_a_token_that_ray_finds_is_sent(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    for environment in ({"RAY_AUTH_TOKEN": "t"}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        use_token(environment)
        assert environment["RAY_AUTH_MODE"] == "token"
    told = {"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"}
    use_token(told)
    assert told["RAY_AUTH_MODE"] == "disabled"
    none = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")}
    use_token(none)
    assert "RAY_AUTH_MODE" not in none
