"""What goes over the wire: request bytes, where a response ends, and what its bytes said when.

Parsing is kept apart from receiving, so that the receive path does no more than stamp and find the response's end.
Standard library only.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONDecoder
from typing import Any, Literal

from pydantic import JsonValue

Endpoint = Literal["chat", "completions"]
Counting = Literal["token_ids", "usage", "text", "events"]

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

VLLM_ALONE = frozenset({"top_k", "min_p", "repetition_penalty", "ignore_eos", "cache_salt"})
"""Not in OpenAI's API: an endpoint that is strict about it refuses them."""

USAGE: dict[str, JsonValue] = {"stream_options": {"include_usage": True}}
"""How tokens are counted: by the `usage` that ends the stream, and by nothing that the server would work for.

vLLM 0.32's API server spends some 75 us of CPU on a token; `return_token_ids` adds 11-15, `continuous_usage_stats`
24-31: where that process is the limit, far more than 1 % of throughput. An event a token is the rule, and then the
final count proves it. Where it is not (speculative decoding, events that the server merged under load), whoever wants
to know how many tokens each event held may ask: `sampling: {return_token_ids: true}`.
"""

ERROR_KINDS: dict[str, str] = {
    "not sent": "the load ended before it could be",
    "dns": "the server's name was not resolved",
    "not connected": "refused, unreachable, or out of local ports",
    "tls": "no encrypted connection: a certificate that does not hold, or no TLS there at all",
    "connection broke": "reset while sending or receiving",
    "connection closed": "closed by the server before the response, within its head, or after some tokens",
    "http": "a status other than 200, with what its body says",
    "broken response": "not HTTP, its framing does not add up, or no event stream",
    "broken event": "an event is not JSON, or not of OpenAI's form",
    "stream": "the server reported an error within the stream, or ended the answer for a reason of its own",
    "no finish_reason": "the response came whole, but no event says why it ended",
    "no tokens": "the response came whole, and is empty",
    "unfinished": "the drain ran out, or the load was stopped",
}
"""What the first words of `RequestRecord.error` say. Every error begins with exactly one of these."""

TEXT_KEYS = ("content", "text", "reasoning_content", "reasoning", "tool_calls", "refusal")
ANSWER_KEYS = ("content", "text")
"""Of `TEXT_KEYS`, what a conversation's next turn repeats."""
CUT_SHORT = ("abort", "error")
"""Reasons of vLLM's for an end that neither the model nor the request asked for."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_HEAD_BYTES = 65536
MAX_LENGTH_DIGITS = 18
MAX_TOKENS = 2**31
SEVERAL = 1.01
"""Tokens an event above which events are held to bear several: below, some characters came in two tokens."""
PAUSE_EVERY = 16
MAX_ERROR_CHARS = 300
SCAN: Callable[[str, int], tuple[Any, int]] = vars(JSONDecoder())["scan_once"]
"""`json.loads` without looking for the encoding and the ends, which is half of its time for an event."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is asked. Its key is in no `repr`.

    Attributes:
        host: name or address.
        port: of TCP.
        model: as the server calls it.
        api_key: sent as a bearer token.
        tls: over HTTPS, with the certificate verified against the system's authorities (`SSL_CERT_FILE`).
        base: path before `/v1`, without a slash at its end.
        strict: takes nothing that is not in OpenAI's API.
    """

    host: str
    port: int
    model: str
    api_key: str | None = field(default=None, repr=False)
    tls: bool = False
    base: str = ""
    strict: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Sent with every request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.tls else 80)
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {
            "Host": host if usual else f"{host}:{self.port}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            **key,
        }


class Asking:
    """Makes POST requests that share their head; `path` is what comes after the target's base."""

    def __init__(self, target: Target, path: str) -> None:
        lines = [f"{name}: {value}" for name, value in target.headers.items()]
        head = "\r\n".join([f"POST {target.base}{path} HTTP/1.1", *lines, "Content-Length: "])
        self._head = head.encode("latin-1")

    def whole(self, data: bytes) -> bytes:
        """The request with this body."""
        return b"%b%d\r\n\r\n%b" % (self._head, len(data), data)


def asked_options(
    target: Target,
    num_tokens: int,
    *,
    cache_salt: str | None,
    sampling: Mapping[str, JsonValue],
) -> dict[str, Any]:
    """All of a request's body but its prompt: `num_tokens` tokens, streamed; at most so many of a strict endpoint.

    `ignore_eos` alone gives exactly that many. `min_tokens` would add a logits processor to every step, and a `seed`
    per request a random generator, and no production traffic has either: `sampling` may still bring them.
    """
    salt = {} if cache_salt is None else {"cache_salt": cache_salt}
    exact = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    asked = {"model": target.model, **SAMPLING, **USAGE, **sampling, **exact, **salt}
    refused = VLLM_ALONE.difference(sampling) if target.strict else ()
    return {name: value for name, value in asked.items() if name not in refused}


def completion_body(
    endpoint: Endpoint,
    target: Target,
    prompt: str,
    num_tokens: int,
    *,
    cache_salt: str | None,
    sampling: Mapping[str, JsonValue],
) -> dict[str, Any]:
    """What is asked of the server about one prompt; see `asked_options`."""
    asked: dict[str, Any] = (
        {"messages": [{"role": "user", "content": prompt}]} if endpoint == "chat" else {"prompt": prompt}
    )
    return asked | asked_options(target, num_tokens, cache_salt=cache_salt, sampling=sampling)


def said(endpoint: Endpoint, role: Literal["system", "user", "assistant"], text: str) -> bytes:
    """One message, encoded once, however often a conversation repeats it."""
    if endpoint == "chat":
        return json.dumps({"role": role, "content": text}).encode()
    return json.dumps(text)[1:-1].encode()


def body_bytes(endpoint: Endpoint, messages: Sequence[bytes], options: bytes) -> bytes:
    """A request's body: what `said` gave, in order, and the rest as a JSON object.

    A completions prompt is the same texts with a space between them.
    """
    if endpoint == "chat":
        return b'{"messages":[%b],%b' % (b",".join(messages), options[1:])
    return b'{"prompt":"%b",%b' % (b" ".join(messages), options[1:])


class _BrokenError(ValueError):
    """A response whose framing does not add up."""


class Response:
    """Reads one HTTP/1 response, piece by piece, only so far as to know its body and its end.

    Attributes:
        status: of HTTP; None until its head came.
        headers: names in lower case.
        parts: the body's bytes in each piece, one entry a piece, empty where there are none.
        begun: anything of it came; TLS may say something else before that.
        over: it is complete, or broken beyond reading: expect no more.
        whole: it came complete.
        reusable: the connection may serve another request.
        broken: what is wrong with its framing, in one line.
    """

    __slots__ = (
        "_held", "_left", "_state", "begun", "broken", "headers", "over", "parts", "reusable", "status", "whole",
    )  # fmt: skip

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.begun = self.over = self.whole = False
        self.reusable = True
        self.broken: str | None = None
        self._held = b""  # of a line that is not complete
        self._left = 0  # bytes missing of the body, or of the chunk
        self._state: Callable[[Response, bytes], bytes] = Response._in_head  # not bound: that would be a cycle

    def feed(self, piece: bytes) -> bool:
        """Takes the next piece; returns whether it was the last one."""
        try:
            self.parts.append(self._state(self, piece))
        except ValueError as error:
            self.parts.append(b"")
            self.broken, self.over, self.reusable = f"broken response: {_one_line(error)}", True, False
        return self.over

    def closed(self) -> None:
        """The server closed the connection in good order, which ends a response without a length."""
        self.whole = self.whole or self._state is Response._to_the_end
        self.over, self.reusable = True, False

    def _in_head(self, piece: bytes) -> bytes:
        self.begun = self.begun or bool(piece)
        data = self._held + piece
        while True:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                if not b"HTTP/".startswith(data[:5]) or len(data) > MAX_HEAD_BYTES:
                    raise _BrokenError(f"not HTTP: {_one_line(data[:60].decode('latin-1'))}")
                self._held = data
                return b""
            status, headers = parse_head(head)
            if status // 100 != 1:  # else an interim response: the real one follows
                break
            data = rest
        self._held = b""
        self.status, self.headers = status, headers
        self._state = self._body_of(head)
        if self._state is Response._of_length and not self._left:
            return self._end(rest)
        return self._state(self, rest) if rest else b""

    def _body_of(self, head: bytes) -> Callable[[Response, bytes], bytes]:
        """How the body's end is told (RFC 9112, 6.3), and whether the connection outlives it."""
        connection = self.headers.get("connection", "").lower()
        self.reusable = "close" not in connection and (head.startswith(b"HTTP/1.1") or "keep-alive" in connection)
        if self.status in (204, 304):
            return Response._of_length
        if coding := self.headers.get("content-encoding", "identity").lower().replace("identity", ""):
            raise _BrokenError(f"content-encoding {coding}, which was not asked for")
        if coding := self.headers.get("transfer-encoding", "").lower():
            if coding.rpartition(",")[2].strip() != "chunked":
                raise _BrokenError(f"transfer-encoding {coding}")
            return Response._in_chunks
        length = self.headers.get("content-length")
        if length is None:
            self.reusable = False
            return Response._to_the_end
        if not (length.isascii() and length.isdigit() and len(length) <= MAX_LENGTH_DIGITS):
            raise _BrokenError(f"content-length {length[:40]}")
        self._left = int(length)
        return Response._of_length

    def _to_the_end(self, piece: bytes) -> bytes:
        return piece

    def _of_length(self, piece: bytes) -> bytes:
        left = self._left
        self._left = left - len(piece)
        if self._left > 0:
            return piece
        self._end(piece[left:])
        return piece[:left]

    def _end(self, rest: bytes) -> bytes:
        self.over = self.whole = True
        if rest:  # nobody asked for more
            self.reusable = False
        return b""

    def _in_chunks(self, piece: bytes) -> bytes:
        """At the beginning of a chunk, as nearly always: a piece is one whole chunk."""
        end = piece.find(b"\r\n")
        if 0 < end <= 8 and piece.endswith(b"\r\n"):
            size = piece[:end]
            if size.isalnum() and _chunk_size(size) == len(piece) - end - 4 > 0:
                return piece[end + 2 : -2]
        self._state = Response._in_size
        return self._walk(piece)

    def _in_size(self, piece: bytes) -> bytes:
        return self._walk(piece)

    def _in_data(self, piece: bytes) -> bytes:
        if len(piece) < self._left:
            self._left -= len(piece)
            return piece
        return self._walk(piece)

    def _after_data(self, piece: bytes) -> bytes:
        return self._walk(piece)

    def _in_trailers(self, piece: bytes) -> bytes:
        return self._walk(piece)

    def _walk(self, piece: bytes) -> bytes:
        """From any place within chunks to any other: data, the end of their line, sizes with extensions, trailers."""
        data, self._held = self._held + piece, b""
        at, found = 0, []
        while at < len(data):
            if self._state is Response._in_data:
                found.append(data[at : at + self._left])
                at += len(found[-1])
                self._left -= len(found[-1])
                if not self._left:
                    self._state = Response._after_data
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._hold(data[at:])
                break
            line, at = data[at:end], end + 2
            self._take_line(line)
            if self.over:
                self._end(data[at:])
                break
        if self._state is Response._in_size and not self._held and not self.over:
            self._state = Response._in_chunks
        return b"".join(found)

    def _take_line(self, line: bytes) -> None:
        if self._state is Response._after_data:
            if line:
                raise _BrokenError("a chunk is longer than it says")
            self._state = Response._in_size
        elif self._state is Response._in_trailers:
            self.over = not line
        else:
            self._left = _chunk_size(line.partition(b";")[0].strip())
            self._state = Response._in_data if self._left else Response._in_trailers

    def _hold(self, line: bytes) -> None:
        """Keeps the beginning of a line, unless it can be none."""
        if self._state is Response._after_data and line != b"\r":
            raise _BrokenError("a chunk is longer than it says")
        if len(line) > MAX_HEAD_BYTES:
            raise _BrokenError("a chunk's head does not end")
        self._held = line


def _chunk_size(text: bytes) -> int:
    try:
        if text.isalnum():  # int() would take signs, spaces and underscores
            return int(text, 16)
    except ValueError:
        pass
    raise _BrokenError(f"chunk size {_one_line(text.decode('latin-1'))!r}")


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Returns status and headers, names in lower case.

    Raises:
        ValueError: this is not HTTP.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split()
    status = words[1] if len(words) > 1 else ""
    if not (first.startswith("HTTP/1.") and status.isascii() and status.isdigit() and len(status) == 3):
        raise _BrokenError(f"not HTTP: {_one_line(first)}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status), headers


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
        counting: what told the tokens of each event: its token ids; a running `usage`; that it bears text, with the
            final `usage` for their sum; or `events`: nothing did, and each is held for one.
        texts: of the answer, where they are wanted (`keep_text`).
    """

    status: int | None = None
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("I"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    counting: Counting = "text"
    keep_text: bool = False
    texts: list[str] = field(default_factory=list)
    _counted: int = 0  # as the running usage has it
    _finish_s: float | None = None
    _done: bool = False

    def take(self, event: Mapping[str, Any], at_s: float) -> None:
        """Takes one event."""
        error = event if event.get("object") == "error" else event.get("error")  # as vLLM had it once, and has it now
        if error is not None:
            self.error = self.error or f"stream: {_one_line(error)}"
            return
        usage = event.get("usage")
        if usage:
            self.prompt_tokens = _told(usage, "prompt_tokens", self.prompt_tokens)
            self.output_tokens = _told(usage, "completion_tokens", self.output_tokens)
        for choice in event.get("choices") or ():
            if finish_reason := choice.get("finish_reason"):
                self.finish_reason, self._finish_s = _one_line(finish_reason), at_s
                if self.finish_reason in CUT_SHORT:
                    self.error = self.error or f"stream: finish_reason {self.finish_reason}"
            delta = choice.get("delta") or choice
            num_tokens = self._num_tokens(choice, delta, usage)
            if num_tokens is not None:
                self.times.append(at_s)
                self.counts.append(num_tokens)
            if self.keep_text:
                self.texts += [_text(delta[key]) for key in ANSWER_KEYS if delta.get(key)]

    def _num_tokens(
        self, choice: Mapping[str, Any], delta: Mapping[str, Any], usage: Mapping[str, Any] | None
    ) -> int | None:
        """Tokens in this event: by their ids, else by a running usage, else one if there is text.

        None: it bears none. 0: it may bear one that has no text yet, as while a character is incomplete.
        """
        if (ids := choice.get("token_ids")) is not None:
            self.counting = "token_ids"
            return len(ids) or None
        if usage and usage.get("completion_tokens") is not None and self._is_running(choice):
            self.counting = "usage"
            before, self._counted = self._counted, self.output_tokens or 0
            return max(0, self._counted - before) or None
        if self.counting != "text":
            return None
        if delta.get("content") or delta.get("text") or any(delta.get(key) for key in TEXT_KEYS):
            return 1
        return 0 if "role" not in delta and "" in (delta.get("content"), delta.get("text")) else None

    def _is_running(self, choice: Mapping[str, Any]) -> bool:
        """Whether a `usage` beside a choice is a running one, not the final one that some put on the last event."""
        if self.counting == "text":
            return not self.counts or not choice.get("finish_reason")
        return self.counting == "usage"

    def settle(self) -> None:
        """Makes events that were not told their tokens add up to the final `usage`.

        Are there as many events as tokens, each is one, whether it has text or not. Else those without text are none,
        and the tokens are spread over the others. Times stay as they were: what is between two events is known in any
        case.
        """
        total = self.output_tokens
        if self.counting != "text":
            return
        if total == len(self.counts):
            self.counts = array("I", [1]) * total
            return
        if 0 in self.counts:
            self.times = array("d", itertools.compress(self.times, self.counts))
            self.counts = array("I", filter(None, self.counts))
        if total is None:
            self.counting = "events"
        elif total != len(self.counts):
            if not self.times and self._finish_s is not None:  # tokens that have no text, all of them
                self.times.append(self._finish_s)
            self.spread(total)

    def spread(self, total: int) -> None:
        """Spreads tokens evenly over the events: event i of n gets ceil((i + 1) T / n) - ceil(i T / n) of T."""
        bounds = [-(-i * total // len(self.times)) for i in range(len(self.times) + 1)] if self.times else []
        self.counts = array("I", (end - start for start, end in itertools.pairwise(bounds)))


def _told(usage: Mapping[str, Any], name: str, before: int | None) -> int | None:
    """A count of tokens that `usage` holds; what was told before where it holds none.

    Raises:
        TypeError: it is no count.
    """
    count = usage.get(name)
    if count is None:
        return before
    if type(count) is not int or not 0 <= count < MAX_TOKENS:
        raise TypeError(f"{name} is no count")
    return count


def _text(value: object) -> str:
    """A text that the conversation's next turn can repeat.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError("this is no text")
    return value


def scale_unfinished(answers: Iterable[Answer]) -> None:
    """Gives answers that broke off before their `usage` as many tokens an event as the whole ones had."""
    found = list(answers)
    told = [answer for answer in found if answer.counting == "text" and answer.output_tokens is not None]
    num_events = sum(len(answer.counts) for answer in told)
    per_event = sum(answer.output_tokens or 0 for answer in told) / num_events if num_events else 1.0
    if per_event < SEVERAL:
        return
    for answer in found:
        if answer.counting == "events" and answer.error is not None:
            answer.spread(round(per_event * len(answer.times)))


def parse(
    response: Response, stamps_s: Sequence[float], pause: Callable[[], None] = lambda: None, *, keep_text: bool = False
) -> Answer:
    """Reads what a response says, however its events lie in the pieces.

    An event has arrived when the piece with the end of its line had. A response that breaks off keeps what came before.

    Args:
        response: that was fed.
        stamps_s: when each piece arrived.
        pause: called now and then, to let others run.
        keep_text: keep the answer's text too.
    """
    answer = Answer(status=response.status, keep_text=keep_text)
    if response.status is None:
        where = "within the head" if response.begun else "before the response"
        answer.error = response.broken or f"connection closed {where}"
    elif response.status != 200:
        answer.error = f"http {response.status}: {_error_line(b''.join(response.parts))}"
    else:
        num_events = _take_events(answer, response, stamps_s, pause)
        answer.settle()
        answer.error = answer.error or response.broken or _what_is_missing(answer, response, num_events)
    return answer


def _what_is_missing(answer: Answer, response: Response, num_events: int) -> str | None:
    came = f"after {sum(answer.counts)} tokens"
    kind = response.headers.get("content-type", "text/event-stream")
    framed = "content-length" in response.headers or "transfer-encoding" in response.headers
    if not response.whole:
        return f"connection closed {came}"
    if not num_events and not kind.startswith("text/event-stream"):
        return f"broken response: {kind} is no event stream"
    if not framed and not answer._done:  # only the stream itself tells whether that was its end
        return f"connection closed {came}"
    if not answer.finish_reason:
        return f"no finish_reason {came}"
    return None if any(answer.counts) else "no tokens"


def _take_events(answer: Answer, response: Response, stamps_s: Sequence[float], pause: Callable[[], None]) -> int:
    """Takes the stream's events; returns how many there were (WHATWG HTML, 9.2.6, but for what nobody sends)."""
    held = b""
    num_events = 0
    for line, at_s in _lines(response, stamps_s):
        if not line.startswith(b"data:"):
            if held and not line.strip():
                answer.error = answer.error or _broken_event(held)
                held = b""
            continue
        try:
            held = _take_data(answer, held + line[5:], at_s)
        except (AttributeError, TypeError, RecursionError):
            answer.error = answer.error or _broken_event(line[5:])
        num_events += 1
        if num_events % PAUSE_EVERY == 0:
            pause()
    if held and response.whole:
        answer.error = answer.error or _broken_event(held)
    return num_events


def _take_data(answer: Answer, data: bytes, at_s: float) -> bytes:
    """Takes one event's data; returns them when they are not JSON yet: an event may have several lines of them."""
    try:
        text = data.decode().strip()
        if text and text != "[DONE]":
            event, end = SCAN(text, 0)
            if end != len(text):
                return data
            answer.take(event, at_s)
        elif text:
            answer._done = True
    except (ValueError, StopIteration):
        return data
    return b""


def _broken_event(data: bytes) -> str:
    return f"broken event: {_one_line(data.decode(errors='replace'))[:80]}"


def _lines(response: Response, stamps_s: Sequence[float]) -> Iterator[tuple[bytes, float]]:
    """Yields each line of the body with its end, and the stamp of the piece that brought its last byte."""
    parts, body = response.parts, b"".join(response.parts)
    offset = len(BYTE_ORDER_MARK) if body.startswith(BYTE_ORDER_MARK) else 0
    piece = 0
    piece_end = len(parts[0]) if parts else 0
    for line in body[offset:].splitlines(keepends=True):
        offset += len(line)
        if not (line.endswith((b"\n", b"\r")) or response.whole):
            return
        while piece_end < offset:
            piece += 1
            piece_end += len(parts[piece])
        yield line, stamps_s[piece]


def _error_line(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return _one_line(body.decode(errors="replace"))
    error = found.get("error", found) if isinstance(found, dict) else found
    return _one_line(error)


def _one_line(error: object) -> str:
    if isinstance(error, Mapping) and "message" in error:
        error = error["message"]
    text = str(error).encode(errors="replace").decode()  # JSON may hold halves of characters, no file does
    lines = text.strip().splitlines() or [""]
    return lines[0][:MAX_ERROR_CHARS]
