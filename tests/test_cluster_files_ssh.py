"""`ray up`, `ray submit` and `ray down` with cluster/local.yaml, over a real sshd, to machines that are namespaces of this one.

Each machine has its own network, processes, home and /tmp/ray: `ray stop` on one of them finds nobody else's Ray, and what it
started ends with it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.chaos_network import OTHER_PREFIX, Namespace, namespaces

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"
BRIDGE = "dcq-ssh"
WAIT_SECONDS = 300.0
SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""
# The machine's own home, /tmp/ray and user, and then its only service; what it started ends with it.
MACHINE = (
    'mount --bind "$1" "$2" && mount --bind "$3" /tmp/ray && mount --bind "$4" /etc/passwd && exec "$5" -D -e -f "$6"'
)


def programs() -> str:
    """The path of sshd; skips where something is missing."""
    missing = [name for name in ("ip", "unshare", "rsync", "ssh", "ssh-keygen") if shutil.which(name) is None]
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if os.geteuid() or missing or sshd is None:
        pytest.skip(f"needs root, iproute2, util-linux, rsync and an sshd; missing here: {missing or 'root or sshd'}")
    return sshd


@contextlib.contextmanager
def machine(place: Namespace, folder: Path, sshd: str) -> Iterator[None]:
    """An sshd in a namespace, which is there as long as the block."""
    own = folder / place.name
    for name in ("home", "ray"):
        (own / name).mkdir(parents=True)
    (own / "home" / ".bashrc").write_text("# A machine's own.\n")
    config = own / "sshd_config"
    config.write_text(SSHD.format(address=place.address, folder=folder))
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", MACHINE, "machine"]
    command += [str(own / "home"), str(folder / "home"), str(own / "ray"), str(folder / "passwd"), sshd, str(config)]
    with (own / "log").open("w") as log:
        with place.inside():
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while True:
                with contextlib.closing(socket.socket()) as client:
                    client.settimeout(1.0)
                    if client.connect_ex((place.address, 22)) == 0:
                        break
                assert process.poll() is None, (own / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Namespace, ...]]:
    """A head's and two workers' machines, reached with the key `tmp_path`/key."""
    sshd = programs()
    (tmp_path / "home").mkdir()
    for folder in (Path("/run/sshd"), Path("/tmp/ray")):
        # sshd wants the one; the other is where each machine's own is mounted.
        folder.mkdir(mode=0o755, exist_ok=True)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    # ssh looks for keys in the home that the user has there, whatever HOME says.
    user = pwd.getpwuid(os.getuid())
    line = f"{user.pw_name}:x:{user.pw_uid}:{user.pw_gid}::{tmp_path / 'home'}:/bin/bash"
    (tmp_path / "passwd").write_text(f"{line}\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
    with contextlib.ExitStack() as stack:
        try:
            places = stack.enter_context(namespaces(3, bridge=BRIDGE, prefix=OTHER_PREFIX))
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        for place in places:
            stack.enter_context(machine(place, tmp_path, sshd))
        yield places


def written(places: tuple[Namespace, ...], folder: Path, project: Path) -> Path:
    """cluster/local.yaml with these machines, on which this environment is found instead of installed."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    head, *workers = [place.address for place in places]
    config["cluster_name"] = f"dcq-{secrets.token_hex(4)}"
    config["provider"].update(head_ip=head, worker_ips=workers)
    config["auth"] = {"ssh_user": getpass.getuser(), "ssh_private_key": str(folder / "key")}
    installing = [line for line in config["setup_commands"] if "-m venv" in line or "pip install" in line]
    assert len(installing) == 2
    config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/dcq-venv"] + [
        line for line in config["setup_commands"] if line not in installing
    ]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[key][-1] += " --num-cpus=1 --object-store-memory=100000000"
    path = project / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def rays_of(places: tuple[Namespace, ...]) -> list[str]:
    """What of Ray runs on the machines."""
    found = []
    for place in places:
        listed = subprocess.run(["ip", "netns", "pids", place.name], capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                found += [title] if "raylet" in title or "gcs_server" in title else []
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_machines_reached_by_ssh_give_the_local_student(machines: tuple[Namespace, ...], tmp_path: Path) -> None:
    project, own_home, shared = tmp_path / "project", tmp_path / "own", tmp_path / "shared"
    for name in ("dcq_ray", "jobs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    job = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    job["teacher"]["fit"]["epochs"] = job["train"]["epochs"] = 2
    job["teacher"]["min_top1"] = 0
    (project / "jobs" / "small.yaml").write_text(yaml.safe_dump(job))
    (own_home / ".ray").mkdir(parents=True)
    (own_home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    cluster = str(written(machines, tmp_path, project))
    environment = {**os.environ, "HOME": str(own_home)}

    def told(*command: str) -> str:
        done = subprocess.run(
            command,
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    places_for_files = ["--run-dir", str(shared / "run"), "--set", f"storage.cache_dir={shared / 'cache'}"]
    told(str(RAY), "up", "-y", cluster)
    try:
        # All three machines, of one CPU each, are waited for.
        waiting = ["--set", "resources.wait_seconds=240", "--set", "sections.count=3"]
        shown = told(
            str(RAY), "submit", cluster, "jobs/submit.py", "--", "jobs/small.yaml", *places_for_files, *waiting
        )
        told(str(RAY), "rsync-down", cluster, str(shared / "run" / "report.json"), str(own_home / "report.json"))
        assert len([title for title in rays_of(machines) if "raylet" in title]) >= 3
    finally:
        told(str(RAY), "down", "-y", cluster)
        name = yaml.safe_load(Path(cluster).read_text())["cluster_name"]
        for file in Path("/tmp/ray").glob(f"cluster-{name}.*"):
            file.unlink()
    # The launcher knows of no workers: these end when they have missed the head for a while.
    assert rays_of(machines[:1]) == []
    # A terminal's lines have colours, and are written over.
    assert re.search(r"section 2\b[^\n]*(running|done)", shown)
    assert "stitched student" in shown
    local = [
        sys.executable,
        "-m",
        "dcq_ray",
        "run",
        "jobs/small.yaml",
        "--address",
        "none",
        "--set",
        "sections.count=3",
    ]
    told(*local, "--run-dir", str(tmp_path / "local"), "--set", f"storage.cache_dir={tmp_path / 'cache'}")
    report = json.loads((own_home / "report.json").read_text())
    assert report["student"] == json.loads((tmp_path / "local" / "report.json").read_text())["student"]
