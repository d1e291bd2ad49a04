from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from varcas.child import Child, free_port
from varcas.workload.driver import Load
from varcas.workload.wire import Target

SCRIPTED = Path(__file__).parents[1] / "servers" / "scripted_openai.py"
API_KEY = "sk-never-to-be-seen-0123456789"


@dataclass(frozen=True)
class Server:
    """A scripted server that runs."""

    process: subprocess.Popen[bytes]
    target: Target
    stamps_path: Path

    def stamps(self, num: int = 0) -> list[dict[str, Any]]:
        """What it noted of each completion, once there are so many: a note is written after the answer."""
        ends_s = time.monotonic() + 5
        while True:
            rows = [json.loads(line) for line in self.stamps_path.read_text().splitlines()]
            if len(rows) >= num or time.monotonic() > ends_s:
                return rows
            time.sleep(0.02)

    def alive(self) -> bool:
        return self.process.poll() is None


StartServer = Callable[..., Server]


def wait_until_up(process: subprocess.Popen[bytes] | Child, url: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.02)
    raise AssertionError(f"nobody answers at {url}")


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts scripted servers, and ends those that are left."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        port, stamps = free_port(), tmp_path / f"stamps-{len(servers)}"
        stamps.touch()
        argv = [sys.executable, str(SCRIPTED), "--port", str(port), "--stamps", str(stamps), *options]
        env = {**os.environ, "VLLM_API_KEY": API_KEY}
        with (tmp_path / "server.log").open("ab") as log:
            process = subprocess.Popen(argv, env=env, stderr=log)
        server = Server(process, Target("127.0.0.1", port, "scripted", API_KEY), stamps)
        servers.append(server)
        wait_until_up(process, f"http://127.0.0.1:{port}/health", 10)
        return server

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """One child for all tests of a file, as for all measurements of a server."""
    directory = tmp_path_factory.mktemp("load")
    with Load.start(directory / "load.log", directory / "load") as started:
        yield started


@pytest.fixture
def own_load(tmp_path: Path) -> Iterator[Load]:
    """A child for a test that ends it or looks at its files."""
    with Load.start(tmp_path / "load.log", tmp_path / "load") as started:
        yield started


class Raw:
    """A TCP server that answers each request with the next script: pieces, sent as they are, 5 ms apart.

    An empty piece closes the connection, None resets it.
    """

    def __init__(self) -> None:
        self.scripts: list[list[bytes | None]] = []
        self.num_used = 0  # connections with a request; others are opened ahead of time
        self.num_requests = 0
        self.heads: list[bytes] = []
        self.bodies: list[Any] = []
        self.max_read_bytes = 2**40
        self.accepting = threading.Event()
        self.accepting.set()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.target = Target("127.0.0.1", self.socket.getsockname()[1], "m")
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.accepting.wait()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection:
            for number in itertools.count():
                if not self.read(connection):
                    return
                self.num_used += number == 0
                self.num_requests += 1
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                for piece in script:
                    if piece is None:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    if not piece:
                        return
                    connection.sendall(piece)
                    time.sleep(0.005)

    def read(self, connection: socket.socket) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return False
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        self.heads.append(head + b"\r\n")
        length = int(
            next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1]
        )
        wanted = min(length, self.max_read_bytes)
        while len(body) < wanted:
            body += connection.recv(65536)
        if len(body) == length:
            self.bodies.append(json.loads(body))
        return True


@pytest.fixture
def raw() -> Iterator[Raw]:
    server = Raw()
    yield server
    server.socket.close()
