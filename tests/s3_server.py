"""A real S3-compatible server on loopback, in a process of its own, and a network to it that fails as it is told."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)

Fault = str
"""refuse: answer 503. drop: say nothing. cut-request, cut-answer: break off in the middle. hang: never answer."""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a moto server, which ends with the block, and when this process dies."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


class FaultyNetwork:
    """Passes one request a connection on to a server, and asks before each which fault it shall meet."""

    def __init__(self, server_port: int) -> None:
        self.requests: list[tuple[str, str]] = []
        """Method and path of each, in order."""
        self.decide: Callable[[int, str, str], Fault | None] = lambda number, method, path: None
        self._server_port = server_port
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        self._stop.set()
        self._accepting.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head, rest = self._read_head(client)
            if not head:
                return
            method, path = head.split(b" ")[:2]
            with self._lock:
                number = len(self.requests)
                self.requests.append((method.decode(), path.decode()))
                fault = self.decide(number, method.decode(), path.decode())
            if fault == "hang":
                self._stop_or_closed(client)
            elif fault == "refuse":
                answer = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(SLOW_DOWN)
                client.sendall(answer + (b"" if method == b"HEAD" else SLOW_DOWN))
                self._stop_or_closed(client, 0.2)
            elif fault != "drop":
                self._pass_on(client, head, rest, fault)

    def _read_head(self, client: socket.socket) -> tuple[bytes, bytes]:
        content = b""
        while b"\r\n\r\n" not in content:
            if not self._wait(client) or not (more := client.recv(65536)):
                return b"", b""
            content += more
        head, _, rest = content.partition(b"\r\n\r\n")
        # One request a connection, so that each can be judged.
        head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.IGNORECASE)
        return head + b"\r\nConnection: close\r\n\r\n", rest

    def _pass_on(self, client: socket.socket, head: bytes, rest: bytes, fault: Fault | None) -> None:
        sizes = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        # Half of the body of the request; of the answer, what is left of it after some of its bytes.
        allowed = int(sizes.group(1)) // 2 if sizes and fault == "cut-request" else None
        with socket.create_connection(("127.0.0.1", self._server_port)) as server:
            server.sendall(head + (rest if allowed is None else rest[:allowed]))
            sent = len(rest)
            while not self._stop.is_set():
                if allowed is not None and sent >= allowed:
                    return
                for source in select.select([client, server], [], [], 0.1)[0]:
                    content = source.recv(65536)
                    if not content:
                        return
                    if source is client:
                        sent += len(content)
                        server.sendall(
                            content if allowed is None else content[: max(0, len(content) - (sent - allowed))]
                        )
                    elif fault == "cut-answer" and not content.startswith(b"HTTP/1.1 100"):
                        client.sendall(content[: len(content) // 2])
                        return
                    else:
                        client.sendall(content)

    def _wait(self, client: socket.socket) -> bool:
        while not self._stop.is_set():
            if select.select([client], [], [], 0.1)[0]:
                return True
        return False

    def _stop_or_closed(self, client: socket.socket, seconds: float = 60.0) -> None:
        """Read on, whatever comes, until the other gives up."""
        client.settimeout(0.1)
        for _ in range(int(seconds / 0.1)):
            with contextlib.suppress(TimeoutError):
                if self._stop.is_set() or not client.recv(65536):
                    return
