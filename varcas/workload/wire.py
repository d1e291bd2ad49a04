"""What goes over the wire: request bytes, where a response ends, and what its bytes said when.

Parsing is kept apart from receiving, so that the receive path does no more than stamp. Standard library only.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import JsonValue

Endpoint = Literal["chat", "completions"]
Counting = Literal["token_ids", "usage", "text"]

PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
SAMPLING: dict[str, JsonValue] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""All that a model's `generation_config.json` would set otherwise, switched off."""

COUNTING: dict[Counting, dict[str, JsonValue]] = {
    "token_ids": {"return_token_ids": True, "stream_options": {"include_usage": True}},
    "usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "text": {"stream_options": {"include_usage": True}},
}
"""How the tokens of an event are counted, from best to worst, and what to ask for it."""

LAST_CHUNK = b"\r\n0\r\n\r\n"
PAUSE_EVERY = 32
MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is asked. Its key is in no `repr`."""

    host: str
    port: int
    model: str
    api_key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Sent with every request."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Host": f"{self.host}:{self.port}", "Content-Type": "application/json", **key}


def request_bytes(target: Target, path: str, body: Mapping[str, Any]) -> bytes:
    """A whole POST request."""
    data = json.dumps(body).encode()
    lines = [f"{name}: {value}" for name, value in target.headers.items()]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, f"Content-Length: {len(data)}", "", ""])
    return head.encode("latin-1") + data


def completion_body(
    endpoint: Endpoint,
    model: str,
    prompt: str,
    num_tokens: int,
    *,
    cache_salt: str | None,
    sampling: Mapping[str, JsonValue],
    counting: Counting,
) -> dict[str, Any]:
    """What is asked of the server: `num_tokens` tokens, streamed.

    `ignore_eos` alone gives exactly that many. `min_tokens` would add a logits processor to every step, and a `seed`
    per request a random generator, and no production traffic has either: `sampling` may still bring them.
    """
    asked: dict[str, Any] = (
        {"messages": [{"role": "user", "content": prompt}]} if endpoint == "chat" else {"prompt": prompt}
    )
    salt = {} if cache_salt is None else {"cache_salt": cache_salt}
    exact = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    return {"model": model, **asked, **SAMPLING, **sampling, **exact, **salt, **COUNTING[counting]}


class End:
    """Tells, piece by piece, when a response is complete, at the least cost."""

    def __init__(self) -> None:
        self._head: bytearray | None = bytearray()
        self._tail = b""
        self._missing: int | None = None  # bytes of the body, where the response says how many

    def reached(self, data: bytes) -> bool:
        """Takes the next piece; returns whether it was the last one."""
        if self._head is not None:
            return self._in_head(data)
        if self._missing is not None:
            self._missing -= len(data)
            return self._missing <= 0
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        return self._tail == LAST_CHUNK

    def _in_head(self, data: bytes) -> bool:
        assert self._head is not None
        self._head += data
        head, found, body = bytes(self._head).partition(b"\r\n\r\n")
        if not found:
            return False
        headers = parse_head(head)[1]
        self._head = None
        if "content-length" in headers:
            self._missing = int(headers["content-length"])
        return self.reached(b"\r\n" + body) if self._missing is None else self.reached(body)


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Returns status and headers, names in lower case; status 0 when this is not HTTP."""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = first.split()[1:2]
    return int(status[0]) if first.startswith("HTTP/") and status and status[0].isdigit() else 0, headers


@dataclass(slots=True)
class Answer:
    """What a response said. Times are of the receive stamps' clock.

    Attributes:
        status: of HTTP; None when not even that came.
        times: when each token-bearing event had arrived whole.
        counts: tokens in each.
        prompt_tokens: as the server's `usage` says.
        output_tokens: as the server's `usage` says; None when it did not come.
        finish_reason: as the server says.
        error: what is wrong with the response, in one line.
        counting: the best that the server offered.
    """

    status: int | None = None
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("I"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    counting: Counting = "text"
    _counted: int = 0

    def take(self, event: Mapping[str, Any], at_s: float) -> None:
        """Takes one event."""
        if "error" in event:
            self.error = f"stream: {_one_line(event['error'])}"
            return
        usage = event.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.output_tokens = usage.get("completion_tokens", self.output_tokens)
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if num_tokens := self._num_tokens(choice, usage):
                self._counted += num_tokens
                self.times.append(at_s)
                self.counts.append(num_tokens)

    def _num_tokens(self, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> int:
        """Tokens in this event: by their ids, else by the running usage, else one if there is text."""
        if (ids := choice.get("token_ids")) is not None:
            self.counting = "token_ids"
            return len(ids)
        if "completion_tokens" in usage:
            self.counting = "usage"
            return int(usage["completion_tokens"]) - self._counted
        delta = choice.get("delta") or choice
        return int(any(delta.get(key) for key in ("content", "text", "reasoning_content", "reasoning", "tool_calls")))


def parse(pieces: Sequence[bytes], stamps_s: Sequence[float], pause: Callable[[], None] = lambda: None) -> Answer:
    """Reads a response from what the receives gave, however the events lie in them.

    An event has arrived when the piece with its end had. A response that breaks off keeps what came before.

    Args:
        pieces: of each receive, in order.
        stamps_s: when each returned.
        pause: called now and then, to let others run.
    """
    answer = Answer()
    raw = b"".join(pieces)
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found:
        answer.error = "connection closed before the response" if not raw else "connection closed within the head"
        return answer
    answer.status, headers = parse_head(head)
    chunks, complete = _body(raw, len(head) + 4, headers)
    body = b"".join(raw[start:end] for start, end in chunks)
    if answer.status != 200:
        answer.error = f"http {answer.status}: {_error_line(body)}"
        return answer
    _take_events(answer, body, _Arrivals(chunks, pieces, stamps_s), pause)
    if answer.error is None and not (complete and answer.finish_reason):
        came = f"after {sum(answer.counts)} tokens"
        answer.error = f"no finish_reason {came}" if complete else f"connection closed {came}"
    return answer


def _take_events(answer: Answer, body: bytes, arrivals: _Arrivals, pause: Callable[[], None]) -> None:
    start = number = 0
    while (end := body.find(b"\n", start)) >= 0:
        line, start = body[start:end], end + 1
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            answer.take(json.loads(line[5:]), arrivals.of(start))
        except (ValueError, AttributeError, TypeError) as error:
            answer.error = f"broken event: {_one_line(repr(error))}"
        number += 1
        if number % PAUSE_EVERY == 0:
            pause()


class _Arrivals:
    """Maps an offset in the body to the stamp of the piece that brought its last byte; offsets only grow."""

    def __init__(self, chunks: Sequence[tuple[int, int]], pieces: Sequence[bytes], stamps_s: Sequence[float]) -> None:
        self._chunks = chunks
        self._pieces = pieces
        self._stamps_s = stamps_s
        self._chunk = 0
        self._body_end = chunks[0][1] - chunks[0][0] if chunks else 0
        self._piece = 0
        self._raw_end = len(pieces[0]) if pieces else 0

    def of(self, offset: int) -> float:
        """When the first `offset` bytes of the body had arrived."""
        while self._body_end < offset:
            self._chunk += 1
            start, end = self._chunks[self._chunk]
            self._body_end += end - start
        raw_offset = self._chunks[self._chunk][1] - (self._body_end - offset)
        while self._raw_end < raw_offset:
            self._piece += 1
            self._raw_end += len(self._pieces[self._piece])
        return self._stamps_s[self._piece]


def _body(raw: bytes, start: int, headers: Mapping[str, str]) -> tuple[list[tuple[int, int]], bool]:
    """Where the body's parts lie in `raw`, and whether it came whole."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _chunks(raw, start)
    length = headers.get("content-length")
    if length is None:  # it ends with the connection: only the end of the stream tells
        return [(start, len(raw))], raw.rstrip().endswith(b"[DONE]")
    return [(start, min(len(raw), start + int(length)))], len(raw) >= start + int(length)


def _chunks(raw: bytes, start: int) -> tuple[list[tuple[int, int]], bool]:
    """Where each chunk's data lie, as far as they came, and whether the last one, which is empty, was reached."""
    chunks: list[tuple[int, int]] = []
    while (line_end := raw.find(b"\r\n", start)) >= 0:
        try:
            size = int(raw[start:line_end].partition(b";")[0], 16)
        except ValueError:
            break
        if not size:
            return chunks, True
        data = line_end + 2
        chunks.append((data, min(data + size, len(raw))))
        start = data + size + 2
    return chunks, False


def _error_line(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(body)
    except ValueError:
        return _one_line(body.decode(errors="replace"))
    error = found.get("error", found) if isinstance(found, dict) else found
    return _one_line(error)


def _one_line(error: object) -> str:
    if isinstance(error, Mapping) and "message" in error:
        error = error["message"]
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:MAX_ERROR_CHARS]
