from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
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

    def stamps(self) -> list[dict[str, Any]]:
        """What it noted of each completion that a load asked for (the probe for one token is left out)."""
        rows = [json.loads(line) for line in self.stamps_path.read_text().splitlines()]
        return [row for row in rows if row["max_tokens"] != 1]

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
