"""Who is told how a run ended: a command, a webhook, and the line for log collectors."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from dcq_ray.cli import main
from dcq_ray.cli.hooks import call_hook, check_webhook, post, split_command, told_at_end
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


class Listener(ThreadingHTTPServer):
    """Keeps what is posted to it; answers as the path says, and not at all at /silent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[tuple[str, str | None, dict[str, Any]]] = []
        self.ended = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, self.headers["Authorization"], json.loads(content)))
        if self.path == "/silent":
            self.server.ended.wait(60)
        self.send_response({"/busy": 503, "/moved": 302}.get(self.path, 200))
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_all_are_told_the_same_of_how_a_run_ended_and_change_no_exit_code(
    job_document: dict[str, Any], tmp_path: Path, listener: Listener
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_document))
    target = tmp_path / "told"
    hook = shlex.join(python(KEEP.format(target=str(target))))
    url = f"http://user:pass@127.0.0.1:{listener.server_port}/busy?key=secret"

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "dcq_ray", "run", str(tmp_path / "job.yaml"), "--address", "none"]
        command += ["--on-end", hook, "--webhook", url, "--log-format", "json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        (line,) = done.stdout.splitlines()
        assert "failed with exit code 9" in done.stderr
        assert not any(secret in done.stdout + done.stderr for secret in ("secret", "pass"))
        facts: dict[str, Any] = json.loads(line)
        assert told(target)[0] == listener.heard[-1][2] == facts
        return done.returncode, facts

    shop = tmp_path / "shop"
    code, first = run("--publish", str(shop))
    assert code == 0
    assert told(target)[1] == "done 0"
    assert first["drop_points"] == pytest.approx(100 * (first["teacher_top1"] - first["student_top1"]))
    assert (shop / "current").resolve().name == first["published"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert first["student_sha256"] == report["student"]["sha256"]
    assert first["cpu_seconds"] == pytest.approx(sum(report["timings"]["cpu_seconds"].values()), abs=0.001)
    # Nothing is left to do, and torch is not loaded to say so.
    code, again = run("--publish", str(shop))
    assert (code, again) == (0, first | {"seconds": again["seconds"]})
    code, missed = run("--max-drop", "0", "--set", "train.epochs=0", "--publish", str(shop))
    assert (code, missed["status"], missed["published"]) == (3, "gate-missed", None)
    assert "the gate allows 0" in missed["message"]
    with hold_run(open_store(first["run_dir"]), owner="a test"):
        code, busy = run()
    assert (code, busy["status"], busy["student_top1"]) == (75, "busy", None)
    assert told(target)[1] == "busy 75"


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

    def run() -> None:
        with told_at_end(python(KEEP.format(target=str(target))), None, "text") as ending:
            ending.job = job
            raise error

    with pytest.raises(type(error)):
        run()
    facts, got = told(target)
    assert got == variables
    assert (facts["message"], facts["student_top1"], facts["run_dir"]) == (str(error), None, job.storage.run_dir)


def test_a_job_file_that_cannot_be_read_is_told_as_any_other_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listener: Listener
) -> None:
    path, url = tmp_path / "job.yaml", f"http://127.0.0.1:{listener.server_port}/"
    path.write_text("name: [")
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path), "--log-format", "json", "--webhook", url])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    facts = json.loads(line)
    assert (facts["status"], facts["exit_code"], facts["name"], facts["run_dir"]) == ("failed", 2, None, None)
    assert str(path) in facts["message"]
    assert [json.loads(told)["message"] for told in shown.err.splitlines()] == [facts["message"]]
    assert [heard for _, _, heard in listener.heard] == [facts]


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


def test_a_webhook_gets_facts_and_credentials_as_a_browser_would_send_them(listener: Listener) -> None:
    facts = {"event": "run", "exit_code": 0, "name": "nächtlich"}
    assert post(f"http://us%40er:p%3As@127.0.0.1:{listener.server_port}/here?key=1#part", facts) == ""
    # base64 of "us@er:p:s"
    assert listener.heard == [("/here?key=1", "Basic dXNAZXI6cDpz", facts)]


@pytest.mark.parametrize(
    ("path", "problem"),
    [("busy", "answered with 503"), ("moved", "answered with 302"), ("silent", "timed out|TimeoutError")],
)
def test_a_webhook_that_fails_is_a_warning_that_names_its_host_alone(
    path: str, problem: str, listener: Listener
) -> None:
    url = f"http://user:word@127.0.0.1:{listener.server_port}/{path}"
    text = post(url, {"exit_code": 3}, timeout_seconds=1)
    assert re.search(problem, text)
    assert f"the webhook at http://127.0.0.1:{listener.server_port} " in text
    assert "exit code stays 3" in text
    assert not any(secret in text for secret in ("user", "word", path))
    assert len(listener.heard) == 1


def test_a_webhook_where_nobody_listens_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "cannot be reached" in post(f"http://127.0.0.1:{port}/secret", {"exit_code": 0})
    # No host has such a name, and no line of HTTP such a path.
    assert "secret" not in post("http://127.0.0.1:1/secret path\n", {"exit_code": 0})


@pytest.mark.parametrize(
    "wrong", ["ftp://host/secret", "file:///secret", "secret", "http://", "http://host:secret/", ""]
)
def test_a_url_of_no_webhook_is_refused_and_not_shown(wrong: str) -> None:
    parameter = click.Option(["--webhook"])
    context = click.Context(click.Command("run"))
    assert check_webhook(context, parameter, None) is None
    assert check_webhook(context, parameter, "https://host/path?a=b") == "https://host/path?a=b"
    with pytest.raises(click.BadParameter) as caught:
        check_webhook(context, parameter, wrong)
    assert "expected http://HOST/PATH" in str(caught.value)
    assert not wrong or "secret" not in str(caught.value).replace("may be a secret", "")
