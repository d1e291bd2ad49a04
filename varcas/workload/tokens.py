"""Counts tokens as a server does: through its `/tokenize`, or, where it has none, through an answer's `usage`."""

from __future__ import annotations

import hashlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from varcas.errors import VarcasError
from varcas.workload.wire import PATHS, Endpoint, Target

A = TypeVar("A")
B = TypeVar("B")

NUM_CONNECTIONS = 8
TIMEOUT_S = 30.0
ABSENT = (400, 403, 404, 405, 422, 501)
"""What a server answers that has no `/tokenize`, or another one: Text Generation Inference wants `inputs`."""
BUSY = (429, 503)
MAX_WAITS = 5
MAX_WAIT_S = 10.0
PROBE = "The quick brown fox, 1234567890 times; jumps\nüber den Zaun: 你好 🙂 {}[]<|>"


def digest(*parts: object) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Counter(Protocol):
    """Counts tokens for one server and one endpoint.

    Attributes:
        cheap: counting costs the server nearly nothing; else every count is a request for a token.
        max_model_len: longest prompt + output; None when the server does not say.
        fingerprint: tells tokenizers, templates and models apart, by what the server makes of a probe text.
    """

    cheap: bool
    max_model_len: int | None
    fingerprint: str

    def prompt(self, text: str, system: str | None = None) -> int:
        """Tokens of a whole prompt: of a chat with these messages, or of this completion prompt."""

    def text(self, text: str) -> int:
        """Tokens of a text alone."""


class Connections:
    """A few connections to a server that stay open."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._local = threading.local()
        self._opened: list[http.client.HTTPConnection] = []
        self._pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="count")

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes them."""
        self._pool.shutdown(cancel_futures=True)
        for connection in self._opened:
            connection.close()

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """As `map`, over all connections at once."""
        return self._pool.map(function, items)

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Returns status and body; waits a little, a few times, while the server says that it is busy.

        Raises:
            VarcasError: nobody answers.
        """
        data = json.dumps(body).encode()
        for _ in range(MAX_WAITS):
            status, answer, wait_s = self._post(path, data)
            if status not in BUSY:
                break
            time.sleep(wait_s)
        return status, answer

    def _post(self, path: str, data: bytes) -> tuple[int, bytes, float]:
        """Posts once; a connection that the server closed meanwhile is opened again, once."""
        for last in (False, True):
            try:
                connection = self._connection()
                connection.request("POST", self._target.base + path, data, self._target.headers)
                response = connection.getresponse()
                retry_after = response.getheader("retry-after", "1")
                wait_s = float(retry_after) if retry_after.replace(".", "", 1).isdigit() else 1.0
                return response.status, response.read(), min(wait_s, MAX_WAIT_S)
            except (OSError, http.client.HTTPException) as error:
                self._local.connection.close()
                if last:
                    raise VarcasError(f"POST {path} failed: {error!r}") from error
        raise AssertionError

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            kind = http.client.HTTPSConnection if self._target.tls else http.client.HTTPConnection
            self._local.connection = kind(self._target.host, self._target.port, timeout=TIMEOUT_S)
            self._opened.append(self._local.connection)
        connection: http.client.HTTPConnection = self._local.connection
        return connection


def find_counter(connections: Connections, target: Target, endpoint: Endpoint) -> Counter:
    """The best way of counting that the server offers.

    Raises:
        VarcasError: it counts in no way, or refuses to answer.
    """
    status, data = connections.post("/tokenize", _asked(target, endpoint, PROBE, None))
    answer = _object(data)
    if status == 200 and isinstance(answer.get("count"), int):
        return TokenizeCounter(connections, target, endpoint, answer)
    if status not in (200, *ABSENT):
        raise VarcasError(f"POST /tokenize answered {status}: {_quoted(data)}")
    return UsageCounter(connections, target, endpoint, f"POST /tokenize answered {status}: {_quoted(data)}")


class TokenizeCounter:
    """Through `/tokenize`, with the chat template in place."""

    cheap = True

    def __init__(self, connections: Connections, target: Target, endpoint: Endpoint, probed: Mapping[str, Any]) -> None:
        self._connections, self._target, self._endpoint = connections, target, endpoint
        self.max_model_len: int | None = probed.get("max_model_len")
        self.fingerprint = digest(target.model, endpoint, probed["count"], probed.get("tokens"))

    def prompt(self, text: str, system: str | None = None) -> int:
        """Tokens of a whole prompt."""
        return self._count(_asked(self._target, self._endpoint, text, system))

    def text(self, text: str) -> int:
        """Tokens of a text alone."""
        return self._count({"model": self._target.model, "prompt": text, "add_special_tokens": False})

    def _count(self, body: Mapping[str, Any]) -> int:
        status, data = self._connections.post("/tokenize", body)
        count = _object(data).get("count")
        if status != 200 or not isinstance(count, int):
            raise VarcasError(f"POST /tokenize answered {status}: {_quoted(data)}")
        return count


class UsageCounter:
    """Through requests for one token, whose `usage` says how long the prompt was."""

    cheap = False
    max_model_len: int | None = None

    def __init__(self, connections: Connections, target: Target, endpoint: Endpoint, before: str) -> None:
        self._connections, self._target, self._endpoint = connections, target, endpoint
        self._before = before
        probed = self.prompt(PROBE)
        self._template_tokens = self.prompt("the") - 1
        self.fingerprint = digest(target.model, endpoint, target.host, target.port, target.base, probed)

    def prompt(self, text: str, system: str | None = None) -> int:
        """Tokens of a whole prompt."""
        path = PATHS[self._endpoint]
        body = _asked(self._target, self._endpoint, text, system)
        body.pop("add_special_tokens", None)
        status, data = self._connections.post(path, {**body, "max_tokens": 1})
        usage = _object(data).get("usage")
        if status != 200:
            raise VarcasError(f"{self._before}; POST {path} answered {status}: {_quoted(data)}")
        if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
            raise VarcasError(
                f"{self._before}; POST {path} gave no `usage`: prompts cannot be made to length for a server that "
                "counts no tokens. Have it (or the proxy before it) report `usage.prompt_tokens`, or serve `/tokenize`."
            )
        return int(usage["prompt_tokens"])

    def text(self, text: str) -> int:
        """Tokens of a text alone: what a message costs beyond its words is that of a one-token word."""
        return max(self.prompt(text) - self._template_tokens, 1)


def _asked(target: Target, endpoint: Endpoint, text: str, system: str | None) -> dict[str, Any]:
    if endpoint == "completions":
        return {"model": target.model, "prompt": joined(system, text), "add_special_tokens": True}
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {"model": target.model, "messages": [*messages, {"role": "user", "content": text}]}


def joined(system: str | None, text: str) -> str:
    """The one prompt that the completions endpoint takes."""
    return text if system is None else f"{system} {text}"


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _quoted(data: bytes) -> str:
    return data.decode(errors="replace")[:300]
