"""A real vLLM server: its start, the proof that it is ours and works, what it is, and its end."""

from __future__ import annotations

import getpass
import http.client
import json
import re
import secrets
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from varcas import hardware
from varcas.child import Child, free_port, listener_is_ours
from varcas.engine.failures import classify, doomed, read_log, redact
from varcas.engine.probe import environment_for, probe_python
from varcas.errors import TrialError
from varcas.hardware import Gpu
from varcas.records import ServerFacts

HOST = "127.0.0.1"
MODEL_ID = "model"
"""`--served-model-name` of every server: requests, labels and logs do not depend on where a node keeps the model."""
POLL_S = 0.1
HTTP_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 1.0
POKE_S = 10.0
DOOM_S, QUIET_S = 5.0, 0.5
"""A server whose log says that its engine is dead gets so long at most to finish that log, and until it is quiet."""
STOP_GRACE_S = 15.0
FREED_S = 30.0
FREED_BYTES = 256 * 2**20
"""Memory may be so far above what it was before the start, and counts as freed."""
REMOVED = ("VLLM_SERVER_DEV_MODE", "VLLM_API_KEY")
"""Never inherited: development mode opens remote calls."""
NOT_INHERITED = ("OMP_NUM_THREADS", "CUDA_LAUNCH_BLOCKING")
"""Set for the experiment alone: Ray sets the first for its workers, and no start script would repeat it."""
Endpoint = Literal["chat", "completions"]

_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_COMPILE = re.compile(r"torch\.compile (?:took|and initial profiling/warmup run together took) ([\d.]+) s")
_CAPTURE = re.compile(r"Graph capturing finished in (\d+) secs")
_CPU_COMPILE = re.compile(
    r" \d\d-\d\d (\d\d):(\d\d):(\d\d) \[[^\]]*\] Warming up model for the compilation.*?"
    r" \d\d-\d\d (\d\d):(\d\d):(\d\d) \[[^\]]*\] Warming up done",
    re.DOTALL,
)
_CACHE_HIT = re.compile(r"Directly load (?:AOT compilation|the compiled graph\(s\))")
_CACHE_MISS = re.compile(r"saved AOT compiled function|Compiling a graph for|Cache the graph of")
_BACKEND = re.compile(r"Using (\w+) attention backend")
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def server_env(extra: Mapping[str, str], python: str | None = None) -> dict[str, str]:
    """Returns a server's environment without its key: this process's (CUDA_VISIBLE_DEVICES too), then `extra`'s."""
    own = environment_for(python or sys.executable)
    inherited = {name: value for name, value in own.items() if name not in NOT_INHERITED}
    fixed = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    # Each server has a TMPDIR of its own, for its sockets; PyTorch's default cache lies in it and must outlive it.
    cache = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"}
    env = {**cache, **inherited, **fixed, "NO_COLOR": "1", **extra}
    return {name: value for name, value in env.items() if name not in REMOVED}


def server_command(argv: Sequence[str], *, python: str, has_command: bool, port: int, model_path: str) -> list[str]:
    """Returns the command of a server: `vllm serve`, or its module where the command does not work.

    Args:
        argv: a configuration's, with `--model`; that and `--revision` give way to `model_path`.
        python: that has vLLM.
        has_command: `vllm serve` works there (`PythonFacts.has_command`).
        port: of 127.0.0.1.
        model_path: the model on this node.
    """
    rest = without(argv, "--model", "--revision")
    own = ["--host", HOST, "--port", str(port), "--served-model-name", MODEL_ID]
    if has_command:  # what the script `vllm` does, of the right Python
        return [python, "-m", "vllm.entrypoints.cli.main", "serve", model_path, *rest, *own]
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path, *rest, *own]


def without(argv: Sequence[str], *names: str) -> list[str]:
    """Arguments less some options and their values."""
    kept, items = [], iter(argv)
    for item in items:
        if item in names:
            next(items, None)
        elif not item.startswith(tuple(f"{name}=" for name in names)):
            kept.append(item)
    return kept


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes


class _Doom:
    """Whether a log says that the engine is dead, though its process may linger."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._seen_bytes = -1
        self._grew_s = 0.0
        self._since_s: float | None = None

    def is_told(self) -> bool:
        """It says so, and has said the rest: it no longer grows, or had its time."""
        now_s, size = time.monotonic(), self._log.stat().st_size
        if size != self._seen_bytes:
            self._seen_bytes, self._grew_s = size, now_s
            if self._since_s is None and doomed(read_log(self._log)):
                self._since_s = now_s
        return self._since_s is not None and (now_s - self._grew_s > QUIET_S or now_s - self._since_s > DOOM_S)


class VllmServer:
    """One server under a guardian. `with VllmServer.start(...) as server:` leaves nothing of it behind.

    Attributes:
        port: of 127.0.0.1.
        url: `http://127.0.0.1:PORT`.
        api_key: fresh; only in the environment of the server, in no log or command line.
        model_id: what requests call the model.
        log: the server's output, its command first.
    """

    def __init__(self, child: Child, port: int, api_key: str, gpus: Sequence[Gpu], memory_before_bytes: int) -> None:
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.api_key = api_key
        self.model_id = MODEL_ID
        self.log = child.log
        self._child = child
        self._gpus = tuple(gpus)
        self._memory_before_bytes = memory_before_bytes
        self._wait_until_s: float | None = None
        self._doom = _Doom(child.log)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        model_path: str,
        log: Path,
        port: int | None = None,
        api_key: str | None = None,
        gpus: Sequence[Gpu] | None = None,
    ) -> VllmServer:
        """Starts a server; `wait_ready` says when it can be used.

        Args:
            argv: of the configuration (`ServingConfig.argv()`).
            python: that has vLLM; None is this one.
            env: the experiment's (`server: {env: ...}`), over this process's own.
            model_path: the model on this node (`FetchedModel.path`).
            log: gets the server's output.
            port: a free one if None.
            api_key: a fresh one if None.
            gpus: whose memory is watched; by default those visible here.

        Raises:
            TrialError: `missing_dependency`: the Python has no vLLM, or cannot be run.
        """
        facts = probe_python(python)
        if facts.vllm_version is None:
            raise TrialError("missing_dependency", f"{facts.python}: {facts.problem or 'no vLLM is installed there'}")
        port = free_port() if port is None else port
        api_key = secrets.token_urlsafe(32) if api_key is None else api_key
        command = server_command(
            argv, python=facts.python, has_command=facts.has_command, port=port, model_path=model_path
        )
        watched = hardware.gpus() if gpus is None else tuple(gpus)
        before = hardware.memory_used_bytes(watched)
        whole_env = server_env(env or {}, facts.python) | {"VLLM_API_KEY": api_key}
        try:
            child = Child.start(command, env=whole_env, log=log, scratch=True)
        except OSError as error:
            raise TrialError("missing_dependency", f"{shlex.join(command[:3])}: {error.strerror}") from error
        return cls(child, port, api_key, watched, before)

    def wait_ready(
        self, timeout_s: float, cancelled: threading.Event | None = None, endpoint: Endpoint = "chat"
    ) -> None:
        """Waits for one real completion, having proved that the server behind the port is this one.

        The port's listening socket must belong to this server's processes, our key be accepted and another refused.

        Args:
            timeout_s: from now, all of it.
            cancelled: when set, the wait ends.
            endpoint: what the load will use.

        Raises:
            TrialError: the reason in the server's own words, `start_timeout` or `interrupted`.
        """
        cancelled = cancelled or threading.Event()
        self._wait_until_s = time.monotonic() + timeout_s
        while not self._answers_health():
            self._check(cancelled, timeout_s)
            cancelled.wait(POLL_S)
        self._prove()
        self._complete(cancelled, timeout_s, endpoint)

    def alive(self) -> bool:
        """The server's main process runs."""
        return self._child.poll() is None

    @property
    def exit_status(self) -> int | None:
        """Its return code (negative: the signal); None while it runs."""
        return self._child.poll()

    def poke(self, endpoint: Endpoint) -> bool:
        """Has one token generated; whether it came."""
        path, body = _hello(endpoint, 1)
        answer = self._request("POST", path, self.api_key, body, POKE_S)
        return answer is not None and answer.status == http.client.OK

    def failure(self, phase: Literal["start", "load"]) -> TrialError:
        """What the log and the exit status say went wrong."""
        kind, line = classify(read_log(self.log), self._child.poll(), phase)
        return TrialError(kind, redact(line, [self.api_key]))

    def facts(self, resolved: Mapping[str, Any] | None = None, model_revision: str | None = None) -> ServerFacts:
        """What the server is, in its own words: `/version`, `/metrics` and its log.

        Args:
            resolved: the validator's answer (`Checked.resolved`), completed by what only the running server knows.
            model_revision: of the fetched model.
        """
        text = read_log(self.log)
        cache = _cache_info(self._get("/metrics"))
        told = {
            section: dict(values) if isinstance(values, dict) else values
            for section, values in (resolved or {}).items()
        }
        told["cache"] = {**(told.get("cache") or {}), **cache}
        if backends := list(dict.fromkeys(_BACKEND.findall(text))):
            told["attention"] = {**(told.get("attention") or {}), "backend": ", ".join(backends)}
        version = self._get("/version")
        return ServerFacts(
            engine_version=json.loads(version.body)["version"] if version else None,
            resolved=told,
            kv_cache_tokens=kv_cache_tokens(text) or cache.get("kv_cache_size_tokens"),
            compile_s=compile_s(text),
            compile_cache_hit=compile_cache_hit(text),
            model_revision=model_revision,
        )

    def stop(self, grace_s: float = STOP_GRACE_S) -> int:
        """Ends the server and all its descendants: SIGTERM, and after `grace_s` SIGKILL; returns its return code.

        Raises:
            TrialError: `hung`: a process did not die of SIGKILL.
        """
        return self._child.stop(grace_s)

    def wait_freed(self, timeout_s: float = FREED_S) -> str | None:
        """After `stop`, waits until the port can be bound and the GPU memory is back; returns what is not, in words."""
        ends_s = time.monotonic() + timeout_s
        while (problem := self._not_freed()) and time.monotonic() < ends_s:
            time.sleep(POLL_S)
        return problem

    def __enter__(self) -> VllmServer:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops."""
        self.stop()

    def _answers_health(self) -> bool:
        answer = self._request("GET", "/health", None, None, HEALTH_TIMEOUT_S)
        return answer is not None and answer.status == http.client.OK

    def _check(self, cancelled: threading.Event, timeout_s: float) -> None:
        """Raises when waiting further makes no sense."""
        if cancelled.is_set():
            raise TrialError("interrupted", "asked to stop while the server started")
        if not self.alive() or self._doom.is_told():
            raise self.failure("start")
        assert self._wait_until_s is not None
        if time.monotonic() > self._wait_until_s:
            kind, line = classify(read_log(self.log), None)
            if kind != "crashed_at_start":
                raise TrialError(kind, line)
            raise TrialError("start_timeout", f"not ready within {timeout_s:g} s: {line}")

    def _prove(self) -> None:
        """Raises unless the server behind the port is this one."""
        stranger = f"port {self.port} is answered by a process that is not our server"
        if not listener_is_ours(self.port, self._child.descendants()):
            raise TrialError("port_in_use", stranger)
        ours, other = self._get("/v1/models", self.api_key), self._get("/v1/models", secrets.token_urlsafe(8))
        if ours is None or ours.status != http.client.OK:
            raise TrialError("port_in_use", f"{stranger}: it refuses our key ({ours.status if ours else 'no answer'})")
        if other is None or other.status != http.client.UNAUTHORIZED:
            raise TrialError("port_in_use", f"{stranger}: it takes any key")
        if MODEL_ID not in [model["id"] for model in json.loads(ours.body)["data"]]:
            raise TrialError("port_in_use", f"{stranger}: it serves no {MODEL_ID!r}")

    def _complete(self, cancelled: threading.Event, timeout_s: float, endpoint: Endpoint) -> None:
        """Has four tokens generated, in a thread, so that a server that hangs can be given up."""
        path, body = _hello(endpoint, 4)
        answers: list[_Answer | None] = []

        def ask() -> None:
            answers.append(self._request("POST", path, self.api_key, body, timeout_s))

        thread = threading.Thread(target=ask, name="first completion", daemon=True)
        thread.start()
        while thread.is_alive():
            self._check(cancelled, timeout_s)
            thread.join(POLL_S)
        answer = answers[0]
        if answer is None or answer.status >= http.client.INTERNAL_SERVER_ERROR:
            self._child.wait(DOOM_S)
            raise self.failure("start")
        if answer.status != http.client.OK:
            raise TrialError("unsupported_by_engine", f"the first completion was refused: {_message(answer)}")
        if not json.loads(answer.body)["usage"]["completion_tokens"]:
            raise TrialError("crashed_at_start", "the first completion came without a token")

    def _get(self, path: str, key: str | None = None) -> _Answer | None:
        return self._request("GET", path, key, None, HTTP_TIMEOUT_S)

    def _request(self, method: str, path: str, key: str | None, body: object, timeout_s: float) -> _Answer | None:
        """One request on a connection of its own, past any proxy; None without an answer."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return _Answer(response.status, response.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _not_freed(self) -> str | None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.port))
            except OSError:
                return f"port {self.port} is still taken"
        held = hardware.memory_used_bytes(self._gpus) - self._memory_before_bytes
        return f"{held / 2**30:.1f} GiB of GPU memory are still held" if held > FREED_BYTES else None


def _hello(endpoint: Endpoint, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a small request."""
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if endpoint == "chat" else {"prompt": "Hello"}
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    return path, {"model": MODEL_ID, **prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}


def kv_cache_tokens(log_text: str) -> int | None:
    """Tokens that the KV cache holds, from the log (`GPU KV cache size: 1,536 tokens`); of several engines the sum."""
    found = [int(tokens.replace(",", "")) for tokens in _KV_TOKENS.findall(log_text)]
    return sum(found) or None


def compile_s(log_text: str) -> float | None:
    """Seconds of torch.compile and graph capture, from the log; of several workers the slowest. None: it had none."""
    per_process: dict[str, float] = {}
    for line in log_text.splitlines():
        for pattern in (_COMPILE, _CAPTURE):
            if told := pattern.search(line):
                process = line.partition(")")[0] if line.startswith("(") else ""
                per_process[process] = per_process.get(process, 0.0) + float(told[1])
    if per_process:
        return max(per_process.values())
    if told := _CPU_COMPILE.search(log_text):  # the CPU backend tells no duration, but when it began and ended
        hours, minutes, seconds = (int(told[i + 3]) - int(told[i]) for i in (1, 2, 3))
        return float((hours * 3600 + minutes * 60 + seconds) % 86400)
    return None


def compile_cache_hit(log_text: str) -> bool | None:
    """Whether all that was compiled came from vLLM's cache; None when nothing was."""
    if _CACHE_MISS.search(log_text):
        return False
    return True if _CACHE_HIT.search(log_text) else None


def _cache_info(metrics: _Answer | None) -> dict[str, Any]:
    """The labels of `vllm:cache_config_info`, typed."""
    told = _CACHE_INFO.search(metrics.body.decode()) if metrics else None
    labels = _LABEL.findall(told[1]) if told else []
    return {name: _typed(value) for name, value in labels if name != "engine" and not name.startswith("_")}


def _typed(text: str) -> Any:
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _message(answer: _Answer) -> str:
    """The words of an OpenAI error."""
    try:
        body = json.loads(answer.body)
        return redact(str(body["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}: {redact(answer.body[:300].decode(errors='replace'))}"
