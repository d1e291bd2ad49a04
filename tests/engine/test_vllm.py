"""A server is started, proved to be ours, told what it is and ended; against a stand-in (tests/e2e: real vLLM)."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varcas import guardian
from varcas.child import free_port
from varcas.engine import ENGINES
from varcas.engine.failures import read_log
from varcas.engine.vllm import (
    MODEL_ID,
    VllmServer,
    compile_cache_hit,
    compile_s,
    kv_cache_tokens,
    server_command,
    server_env,
    without,
)
from varcas.errors import TrialError

LOGS = Path(__file__).with_name("logs")
SCRIPTED = Path(__file__).resolve().parents[1] / "servers" / "scripted_openai.py"
LOG_0_24 = """\
(EngineCore pid=77) INFO 11-24 06:00:01 [cuda.py:479] Using FLASH_ATTN attention backend out of ['FLASH_ATTN'].
(Worker_TP0 pid=80) INFO 11-24 06:00:31 [monitor.py:48] torch.compile took 18.43 s in total
(Worker_TP1 pid=81) INFO 11-24 06:00:31 [monitor.py:48] torch.compile took 19.03 s in total
(EngineCore pid=77) INFO 11-24 06:00:33 [kv_cache_utils.py:2146] GPU KV cache size: 139,536 tokens
(Worker_TP0 pid=80) INFO 11-24 06:00:39 [gpu_model_runner.py:6656] Graph capturing finished in 5 secs, took 0.61 GiB
(Worker_TP1 pid=81) INFO 11-24 06:00:39 [gpu_model_runner.py:6656] Graph capturing finished in 6 secs, took 0.61 GiB
"""


class Starter:
    """Starts stand-ins in a folder of the test's own."""

    def __init__(self, python: str, model_dir: Path, log: Path) -> None:
        self.python, self.model_dir, self.log = python, model_dir, log

    @contextmanager
    def __call__(
        self, script: str = "", *argv: str, port: int | None = None, api_key: str | None = None, **env: str
    ) -> Iterator[VllmServer]:
        with VllmServer.start(
            ["--model", "org/name", "--revision", "main", *argv],
            python=self.python,
            env={"FAKE_VLLM": script, **env},
            model_path=str(self.model_dir),
            log=self.log,
            port=port,
            api_key=api_key,
        ) as server:
            yield server

    def failure(self, script: str, timeout_s: float = 20, port: int | None = None) -> TrialError:
        """What waiting for a server raises that cannot become ready."""
        with self(script, port=port) as server, pytest.raises(TrialError) as caught:
            server.wait_ready(timeout_s)
        return caught.value


@pytest.fixture
def start(fake_python: str, model_dir: Path, tmp_path: Path) -> Starter:
    return Starter(fake_python, model_dir, tmp_path / "server.log")


def get(server: VllmServer, path: str, key: str | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_becomes_ready_and_leaves_nothing(start: Starter) -> None:
    with start("--grandchild", "--max-num-seqs", "8") as server:
        server.wait_ready(20)
        assert server.alive()
        assert server.exit_status is None
        status, body = get(server, "/v1/models", server.api_key)
        assert (status, json.loads(body)["data"][0]["id"]) == (200, MODEL_ID)
        assert get(server, "/v1/models", None)[0] == 401
        family = server._child.descendants()
        assert len(family) >= 2
        server.stop(5)
        assert server.wait_freed(5) is None
    assert not [pid for pid in family if (p := guardian.processes().get(pid)) and not p.dead]


def test_what_it_is_comes_from_the_server_and_the_validator(start: Starter) -> None:
    with start() as server:
        server.wait_ready(20)
        resolved = {"scheduler": {"max_num_seqs": 128}, "cache": {"cache_dtype": "fp8", "block_size": None}}
        facts = server.facts(resolved, "abc")
    assert facts.engine_version == "0.32.0"
    assert facts.model_revision == "abc"
    assert facts.kv_cache_tokens == 139_536
    assert facts.resolved["scheduler"] == {"max_num_seqs": 128}
    assert facts.resolved["cache"]["block_size"] == 16
    assert facts.resolved["cache"]["num_gpu_blocks"] == 100
    assert facts.resolved["cache"]["enable_prefix_caching"] is True
    assert resolved["cache"]["block_size"] is None


def test_the_key_is_in_the_environment_alone(start: Starter) -> None:
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    try:
        with start("", VLLM_SERVER_DEV_MODE="1", MINE="yes") as server:
            server.wait_ready(20)
            pid = server._child.pid
            env = dict(
                item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
            )
            assert server.api_key not in Path(f"/proc/{pid}/cmdline").read_text()
    finally:
        del os.environ["VLLM_SERVER_DEV_MODE"]
    assert env["VLLM_API_KEY"] == server.api_key
    assert "VLLM_SERVER_DEV_MODE" not in env
    assert (env["MINE"], env["VLLM_NO_USAGE_STATS"], env["DO_NOT_TRACK"]) == ("yes", "1", "1")
    assert server.api_key not in read_log(start.log)
    with start() as other:
        assert other.api_key != server.api_key


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (
            "--print 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.' --exit 1",
            "out_of_memory",
            "Tried to allocate 2.00 GiB",
        ),
        (
            "--print 'ValueError: No available memory for the cache blocks.' --exit 1",
            "kv_cache_too_small",
            "No available",
        ),
        ("--exit 3", "crashed_at_start", "exit status 3"),
        ("--die-after-requests 0", "out_of_memory", "SIGKILL"),
        ("--fail-requests-frac 1", "crashed_at_start", "it still runs"),
        ("--refuse-chat", "unsupported_by_engine", "default chat template is no longer allowed"),
    ],
)
def test_a_start_that_fails_says_why(start: Starter, script: str, kind: str, words: str) -> None:
    error = start.failure(script)
    assert error.kind == kind
    assert words in error.detail


def test_a_base_model_is_ready_for_completions(start: Starter) -> None:
    with start("--refuse-chat") as server:
        server.wait_ready(20, endpoint="completions")


@pytest.mark.parametrize("script", ["--start-delay-s 60", "--hang-after-requests 0"])
def test_a_start_that_takes_too_long_is_given_up(start: Starter, script: str) -> None:
    began_s = time.monotonic()
    error = start.failure(script, timeout_s=1.5)
    assert error.kind == "start_timeout"
    assert "not ready within 1.5 s" in error.detail
    assert time.monotonic() - began_s < 8


def test_a_server_whose_engine_died_is_not_waited_for(start: Starter) -> None:
    line = "(EngineCore pid=7) ERROR 11-24 06:38:51 [core.py:1233] "
    text = f"{line}EngineCore failed to start.\n{line}ValueError: No available memory for the cache blocks."
    began_s = time.monotonic()
    error = start.failure(f"--print '{text}' --start-delay-s 60", timeout_s=60)
    assert error.kind == "kv_cache_too_small"
    assert time.monotonic() - began_s < 15


@pytest.mark.parametrize("key", [None, "the same"])
def test_a_stranger_on_the_port_is_found_out(start: Starter, key: str | None) -> None:
    """One that takes any key, and one that even has ours: then the socket's owner tells."""
    port = free_port()
    command = [sys.executable, str(SCRIPTED), "--port", str(port), "--served-model-name", MODEL_ID]
    stranger = subprocess.Popen(command, env=os.environ | ({"VLLM_API_KEY": key} if key else {}))
    try:
        while not listens(port):
            time.sleep(0.05)
        with start("--start-delay-s 30", port=port, api_key=key) as server, pytest.raises(TrialError) as caught:
            server.wait_ready(20)
    finally:
        stranger.kill()
        stranger.wait()
    assert caught.value.kind == "port_in_use"
    assert f"port {port}" in caught.value.detail


def test_a_taken_port_is_told_by_the_servers_own_words(start: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = start.failure("", port=taken.getsockname()[1])
    assert error.kind == "port_in_use"


def test_a_stop_from_outside_ends_the_wait(start: Starter) -> None:
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    began_s = time.monotonic()
    with start("--start-delay-s 60") as server, pytest.raises(TrialError) as caught:
        server.wait_ready(60, cancelled)
    assert caught.value.kind == "interrupted"
    assert time.monotonic() - began_s < 5


def test_a_python_without_vllm_fails_the_trial(without_vllm: str, tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="no vLLM is installed there") as caught:
        VllmServer.start(["--model", "x"], python=without_vllm, model_path="x", log=tmp_path / "x.log")
    assert caught.value.kind == "missing_dependency"


def test_a_server_that_died_under_load_is_told_so(start: Starter) -> None:
    with start() as server:
        server.wait_ready(20)
        os.kill(server._child.pid, 11)
        assert server._child.wait(5) == -11
        error = server.failure("load")
    assert error.kind == "crashed_under_load"
    assert "SIGSEGV" in error.detail


def test_a_port_that_stays_taken_is_reported(start: Starter) -> None:
    with start() as server:
        server.wait_ready(20)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", server.port))
        other.listen()
        assert server.wait_freed(0.2) == f"port {server.port} is still taken"


def test_the_command_is_vllm_serve_where_that_works() -> None:
    argv = ["--model", "org/name", "--revision=main", "--max-num-seqs", "8"]
    own = ["--max-num-seqs", "8", "--host", "127.0.0.1", "--port", "7", "--served-model-name", MODEL_ID]
    plain = server_command(argv, python="py", has_command=True, port=7, model_path="/m")
    assert plain == ["py", "-m", "vllm.entrypoints.cli.main", "serve", "/m", *own]
    module = server_command(argv, python="py", has_command=False, port=7, model_path="/m")
    assert module == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", "/m", *own]


@given(st.lists(st.sampled_from(["--a", "1", "--b", "--model", "x"])))
def test_without_leaves_no_such_option(argv: list[str]) -> None:
    left = without(argv, "--model")
    assert "--model" not in left
    assert left == argv or "--model" in argv


def test_what_ray_and_other_pythons_set_is_not_inherited(without_vllm: str) -> None:
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH="/x", CUDA_VISIBLE_DEVICES="3", VLLM_SERVER_DEV_MODE="1")
    try:
        env = server_env({})
        assert "OMP_NUM_THREADS" not in env
        assert env["CUDA_VISIBLE_DEVICES"] == "3"
        assert env["PYTHONPATH"] == "/x"
        assert "PYTHONPATH" not in server_env({}, without_vllm)
        assert server_env({"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"
        assert not {"VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"} & set(server_env({"VLLM_SERVER_DEV_MODE": "1"}))
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_what_the_log_tells() -> None:
    assert kv_cache_tokens(LOG_0_24) == 139_536
    assert compile_s(LOG_0_24) == pytest.approx(25.03)
    assert compile_cache_hit(LOG_0_24) is None
    cached = (
        "(Worker pid=8) INFO 11-24 06:00:31 [decorators.py:320] [backbone] Directly load AOT compilation from path /x\n"
    )
    assert compile_cache_hit(LOG_0_24 + cached) is True
    new = "(Worker pid=8) INFO 11-24 06:38:10 [decorators.py:743] [backbone] saved AOT compiled function to /x\n"
    assert compile_cache_hit(LOG_0_24 + cached + new) is False
    assert (kv_cache_tokens(""), compile_s(""), compile_cache_hit("")) == (None, None, None)


def test_what_the_log_of_the_cpu_build_tells() -> None:
    compiled = (LOGS / "compiled-vllm-0.32.0.log").read_text()
    assert compile_s(compiled) == 21.0
    assert compile_cache_hit(compiled) is False
    assert kv_cache_tokens(compiled) == 524_288


def test_engines_are_named_as_in_experiment_files() -> None:
    assert ENGINES["vllm"] is VllmServer


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    command = [sys.executable, "experiments/make_model.py", "tiny-llama", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


REAL = ["--model", "ignored", "--load-format", "dummy", "--max-model-len", "1024", "--enforce-eager"]
REAL_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.mark.vllm
def test_real_vllm_with_a_flag_it_does_not_know_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    argv = [*REAL, "--max-num-sqs", "4"]
    with (
        VllmServer.start(argv, env=REAL_ENV, model_path=str(tiny_llama), log=tmp_path / "x.log") as server,
        pytest.raises(TrialError, match="unrecognized arguments: --max-num-sqs") as caught,
    ):
        server.wait_ready(200)
    assert caught.value.kind == "unsupported_by_engine"
