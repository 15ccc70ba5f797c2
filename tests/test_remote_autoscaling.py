"""Waiting for an autoscaler: with a double that brings nodes, and with Ray's own, whose nodes are processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from test_remote_driver import processes_of, wait_until
from test_remote_jobs import free_ports

from dcq_ray.errors import ClusterError
from dcq_ray.jobfile import resolve_job
from dcq_ray.remote import autoscaling
from dcq_ray.remote.autoscaling import asked_for
from dcq_ray.remote.cluster import answers


class Autoscaler:
    """A cluster without a place for work that gets a node of two CPUs every 10 seconds after it was asked, up to a number."""

    def __init__(self, num_nodes: int) -> None:
        self.now, self.said = 0.0, list[str]()
        self.requests = list[list[dict[str, float]]]()
        self._num_nodes = num_nodes

    def nodes(self) -> list[Mapping[str, float]]:
        arrived = int(self.now // 10) if self.requests else 0
        return [{"memory": 1.0}] + [{"CPU": 2.0}] * min(arrived, self._num_nodes)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def request(self, bundles: list[dict[str, float]]) -> None:
        self.requests.append(bundles)


@pytest.fixture
def open_asking(job_document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Autoscaler, Any]]:
    def make(num_nodes: int, **resources: float) -> tuple[Autoscaler, Any]:
        double = Autoscaler(num_nodes)
        monkeypatch.setattr(autoscaling, "request_resources", double.request)
        job = resolve_job({**job_document, "resources": resources}, source="test")
        asking = asked_for(
            job, say=double.said.append, nodes=double.nodes, clock=lambda: double.now, sleep=double.sleep
        )
        return double, asking

    return make


def test_all_sections_are_asked_for_at_once_and_withdrawn_at_the_end(
    open_asking: Callable[..., tuple[Autoscaler, Any]],
) -> None:
    double, asking = open_asking(8, wait_seconds=100, cpus_per_section=1.5, gpus_per_section=0)
    with asking as share:
        assert share(3, 1).places == 1
        assert double.now == 10
        assert share(3, 3).places == 3
        assert double.now == 30
    assert double.requests == [[{"CPU": 1.5}] * 3] * 2 + [[]]
    assert double.said[0] == "waiting for an autoscaler's nodes: asked for 3 x 1.5 CPU, 0 places are there, 100 s left"
    # One at the start of each wait, and one every 15 seconds: at 0; 10 and 25.
    assert [line.rpartition(", ")[2] for line in double.said] == ["100 s left", "90 s left", "75 s left"]


def test_a_run_goes_on_with_fewer_places_when_the_limit_is_reached(
    open_asking: Callable[..., tuple[Autoscaler, Any]],
) -> None:
    double, asking = open_asking(1, wait_seconds=30)
    with asking as share:
        share(4, 1)
        assert share(4, 4).places == 2
        # Both waits together have that limit, and a third has nothing left of it.
        assert double.now == 30
        assert share(4, 4).places == 2
        assert double.now == 30
    assert double.said[-1] == "the autoscaler brought 2 of 4 places in 30 s; going on with these"


def test_where_nothing_comes_the_error_says_what_was_asked_and_what_is_there(
    open_asking: Callable[..., tuple[Autoscaler, Any]],
) -> None:
    double, asking = open_asking(8, wait_seconds=60, gpus_per_section=0.5)
    with pytest.raises(ClusterError) as caught, asking as share:
        share(4, 1)
    assert "asked for 4 x 1 CPU and 0.5 GPU and brought no place in 60 s" in str(caught.value)
    assert "0 CPUs and 0 GPUs; 2 CPUs and 0 GPUs" in str(caught.value)
    assert double.requests[-1] == []


def test_without_a_limit_nobody_is_asked(open_asking: Callable[..., tuple[Autoscaler, Any]]) -> None:
    double, asking = open_asking(8)
    with asking as share, pytest.raises(ClusterError, match=r"resources\.wait_seconds"):
        share(2, 1)
    assert (double.requests, double.now) == ([], 0)


MARKER = "DCQ_AUTOSCALING_TEST"


@pytest.fixture
def growing_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of who may use a head without CPUs, whose autoscaler brings up to two nodes with one CPU each.

    Its address is in it as CLUSTER. Ray's own AutoscalingCluster would end all of this machine's Rays before it starts.
    """
    # Paths of Ray's sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="dcq", dir="/tmp"))
    port, client, metrics = free_ports(3)
    (folder / "token").write_text(secrets.token_hex(32))
    worker = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2}
    provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "launch_multiple": True}
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        # Several nodes have one address here.
        "provider": provider | {"use_node_id_as_ip": True, "disable_node_updaters": True},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": worker | {"min_workers": 0},
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 10,
        "upscaling_speed": 1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
    lists = ["cluster_synced_files", "rsync_exclude", "rsync_filter"]
    lists += [f"{when}_commands" for when in ("initialization", "setup", "head_setup", "worker_setup")]
    config |= {name: [] for name in (*lists, "head_start_ray_commands", "worker_start_ray_commands")}
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        MARKER: str(folder),
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--num-cpus=0", f"--autoscaling-config={folder / 'autoscaling.yaml'}"]
    command += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--include-dashboard=false"]
    command += ["--disable-usage-stats", f"--temp-dir={folder}"]
    with open(folder / "log", "w") as log:
        own = environment | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        head = subprocess.Popen(command, env=own, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"127.0.0.1:{port}", 1.0) or head.poll() is not None, "the head answered")
        assert head.poll() is None, (folder / "log").read_text()
        yield environment | {"CLUSTER": f"127.0.0.1:{port}"}
    finally:
        head.terminate()
        head.wait(60)
        # The nodes are the autoscaler's, and stay.
        for pid in processes_of(f"{MARKER}={folder}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_begins_without_a_place_grows_for_all_sections_of_a_run(
    growing_cluster: dict[str, str], job_document: dict[str, Any], tmp_path: Path
) -> None:
    job_document["sections"] = {"count": 2}
    job_document["train"]["epochs"] = 1
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_document))
    command = [sys.executable, "-m", "dcq_ray", "run", str(tmp_path / "job.yaml"), "--address"]
    done = subprocess.run(
        [*command, growing_cluster["CLUSTER"], "--set", "resources.wait_seconds=240"],
        env=growing_cluster,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "asked for 2 x 1 CPU, 0 places are there" in done.stderr
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["status"] == "succeeded"
