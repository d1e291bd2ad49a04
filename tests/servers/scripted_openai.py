"""Speaks what vLLM's OpenAI server speaks, on a script: known token times, known failures, standard library only.

    python scripted_openai.py --port N [options]      # 127.0.0.1 only; unknown (vLLM's) arguments are ignored

A token is a whitespace-separated word; the chat template costs 5. The bytes on the wire are vLLM 0.32's behind uvicorn:
headers at once, the role chunk just before the first token, one HTTP chunk and one send per event.

With `--faults`, a prompt with the word `fault:KIND` is answered in another way: `WIRES` are ways that HTTP allows, and
`FAULTS` are not answers at all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import importlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TextIO

BLOCK_TOKENS = 16
KEEP_ALIVE_S = 5.0
CHAT_HEAD, CHAT_TAIL = ["<bos>", "<chat>"], ["<eot>", "<assistant>", "<nl>"]
NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template "
    "if the tokenizer does not define one."
)
OPENAI = {
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty",
    "stream", "stream_options", "seed", "stop",
}  # fmt: skip
"""Of OpenAI's parameters those that anybody here sends."""
OURS = ("/version", "/metrics", "/tokenize", "/v1/models")
"""Paths that other endpoints than vLLM's often have not."""
ENGINE_CORE = """
import signal, sys, time
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(segment._name, "shared_memory")  # as one made in C: only a clean end removes it
print(segment.name, flush=True)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
try:
    time.sleep(1e6)
finally:
    segment.close()
    segment.unlink()
"""


JSON_ERROR = b'{"error":{"message":"too much\\nof it","type":"BadRequestError","code":400}}'
HTML_ERROR = b"<html><head><title>502 Bad Gateway</title></head></html>"
DELAY_S = 0.003
"""Between segments that are meant to come apart."""
CHUNKED, CLOSE = "transfer-encoding: chunked", "connection: close"


@dataclass(frozen=True)
class Wire:
    """One way of putting events on the wire.

    Attributes:
        framing: the header that tells where the body ends.
        before: comes before the head.
        extension: after each chunk's size.
        trailers: after the last chunk.
        edit: of each event.
        segment: bytes a send; None: an event each; 0: all in one.
        chunk: bytes a chunk; None: an event each.
    """

    framing: str = CHUNKED
    before: bytes = b""
    extension: bytes = b""
    trailers: bytes = b""
    edit: Callable[[bytes], bytes] = lambda event: event
    segment: int | None = None
    chunk: int | None = None


WIRES = {
    "split": Wire(segment=41),
    "bytewise": Wire(segment=1),
    "merged": Wire(segment=0),
    "rechunked": Wire(chunk=7, segment=50),
    "extensions": Wire(extension=b';a="b"'),
    "trailers": Wire(trailers=b"x-sum: 0\r\n"),
    "interim": Wire(before=b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"),
    "length": Wire(framing="content-length: %d"),
    "close": Wire(framing=CLOSE),
    "last": Wire(framing=f"{CHUNKED}\r\n{CLOSE}"),
    "crlf": Wire(edit=lambda event: event.replace(b"\n", b"\r\n"), segment=30),
    "nospace": Wire(edit=lambda event: event.replace(b"data: ", b"data:")),
    "comments": Wire(edit=lambda event: b": ping\n\nevent: message\nid: 1\n" + event),
}
"""Ways that HTTP and server-sent events allow: each must be read as the usual one."""

FAULTS: dict[str, Callable[[bytes, list[bytes]], list[bytes | None]]] = {
    "reset_before": lambda head, chunks: [None],
    "close_before": lambda head, chunks: [b""],
    "close_in_head": lambda head, chunks: [head[:20], b""],
    "reset_midway": lambda head, chunks: [head, *chunks[:3], chunks[3][:30], None],
    "close_midway": lambda head, chunks: [head, *chunks[:3], chunks[3][:30], b""],
    "garbage": lambda head, chunks: [b"SSH-2.0-OpenSSH_9\r\n\r\n", b""],
    "bad_chunk": lambda head, chunks: [head, *chunks[:3], b"zz\r\n"],
    "truncated_json": lambda head, chunks: [head, _chunk(b'data: {"choices": [{"ind\n\n'), *chunks],
    "stream_error": lambda head, chunks: [head, _chunk(b'data: {"error": {"message": "EngineDead"}}\n\n'), *chunks],
    "odd_usage": lambda head, chunks: [head, _chunk(b'data: {"usage": {"completion_tokens": "6"}}\n\n'), *chunks],
    "odd_status": lambda head, chunks: [b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n"],
    "odd_length": lambda head, chunks: [b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n"],
    "no_finish": lambda head, chunks: [head, *(chunk.replace(b'"length"', b"    null") for chunk in chunks)],
    "stall": lambda head, chunks: [head, *chunks[:3]],
    "hang": lambda head, chunks: [],
    "http_400": lambda head, chunks: [_whole(b"400 Bad Request", b"application/json", JSON_ERROR)],
    "http_502": lambda head, chunks: [_whole(b"502 Bad Gateway", b"text/html", HTML_ERROR)],
    "http_503": lambda head, chunks: [_whole(b"503 Service Unavailable", b"text/plain", b"")],
    "not_streamed": lambda head, chunks: [_whole(b"200 OK", b"application/json", b"{}")],
}
"""What a broken server sends, given a good head and good chunks: pieces, an empty one to close, None to reset."""


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(status: bytes, content_type: bytes, body: bytes) -> bytes:
    lines = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return lines % (status, content_type, len(body)) + body


@dataclass
class Request:
    """One HTTP request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    received_s: float


@dataclass
class Generation:
    """One completion under way, and the row of `--stamps` that it becomes."""

    chat: bool
    model: str
    words: list[str]
    num_tokens: int
    finish_reason: str
    body: Mapping[str, Any]
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Names it as vLLM does."""
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Returns vLLM's count of tokens."""
        prompt = len(self.words)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion_tokens,
            "completion_tokens": completion_tokens,
        }

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """Returns one streamed object."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return found | ({"usage": usage} if usage else {})

    def token_choice(self, number: int) -> dict[str, Any]:
        """Returns the choice that carries one token; the last also says why it is the last."""
        text = word(number)
        content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        last = number == self.num_tokens - 1
        end: dict[str, Any] = {"finish_reason": self.finish_reason if last else None}
        if last or not self.chat:
            end["stop_reason"] = None
        return {"index": 0, **content, "logprobs": None, **end}

    def whole(self) -> dict[str, Any]:
        """Returns the answer that is not streamed."""
        text = "".join(word(number) for number in range(self.num_tokens))
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        end = {"logprobs": None, "finish_reason": self.finish_reason, "stop_reason": None}
        kind = "chat.completion" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": [{"index": 0, **content, **end}], "usage": self.usage(self.num_tokens)}


def word(number: int) -> str:
    """Returns the text of a token."""
    return f" w{number}" if number else "w0"


class Refused(Exception):
    """An answer that is an error, in vLLM's form."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}[status]
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}


class Closing(Exception):
    """The answer ends with its connection."""


class Engine:
    """The pretended engine: a queue, decode slots, a prefix cache and counters."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: str = options.served_model_name or options.model
        self.slots = asyncio.Semaphore(options.max_num_active_seqs or options.max_num_seqs)
        self.running = self.waiting = self.seen = 0
        self.limits = Limits(self) if options.scheduler_cls else None
        self.tokens_held = 0
        self.prompt_tokens = self.generation_tokens = self.cache_queries = self.cache_hits = 0
        self.cached: set[int] = set()
        self.stamps: TextIO | None = open(options.stamps, "a") if options.stamps else None  # noqa: SIM115

    def plan(self, chat: bool, body: Mapping[str, Any]) -> Generation:
        """Checks a request and decides how many tokens it gets.

        Raises:
            Refused: what vLLM would refuse too.
        """
        if chat and self.options.refuse_chat:
            raise Refused(HTTPStatus.BAD_REQUEST, NO_TEMPLATE)
        if self.options.strict and (unknown := set(body) - OPENAI):
            raise Refused(HTTPStatus.BAD_REQUEST, f"Unrecognized request arguments supplied: {sorted(unknown)}")
        if body.get("model", self.model) != self.model:
            raise Refused(HTTPStatus.NOT_FOUND, f"The model `{body['model']}` does not exist.", "model")
        words = tokenize(body)
        room = self.options.max_model_len - len(words)
        most = body.get("max_completion_tokens") or body.get("max_tokens") or (room if chat else 16)
        if room < most or room < 1:
            asked = f"{len(words)} input tokens and {most} output tokens were asked for"
            limit = f"This model's maximum context length is {self.options.max_model_len} tokens"
            raise Refused(HTTPStatus.BAD_REQUEST, f"{limit}. However, {asked}.", "input_tokens")
        wanted = most if body.get("ignore_eos") else max(self.options.eos_after, body.get("min_tokens") or 0)
        num_tokens = min(most, wanted)
        return Generation(chat, self.model, words, num_tokens, "length" if num_tokens == most else "stop", body)

    async def tokens(self, generation: Generation, client: Client) -> AsyncIterator[int]:
        """Yields the number of each token when it is due; ends early when the client left."""
        if self.limits is not None:
            self.limits.take()
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        self._prefill(generation)
        begun_s = time.monotonic()
        held = len(generation.words)
        self.tokens_held += held
        try:
            for number in range(generation.num_tokens):
                due_s = begun_s + (self.options.ttft_ms + number * self.options.itl_ms) / 1000
                await asyncio.sleep(due_s - time.monotonic())
                if client.left:
                    return
                self.tokens_held += 1
                held += 1
                self.generation_tokens += 1
                yield number
        finally:
            self.tokens_held -= held
            self.running -= 1
            self.slots.release()

    def _prefill(self, generation: Generation) -> None:
        """Counts the prompt, and how much of it an earlier one with the same salt left in the cache."""
        words = generation.words
        self.prompt_tokens += len(words)
        self.cache_queries += len(words)
        blocks = [hash(generation.body.get("cache_salt"))]
        for end in range(BLOCK_TOKENS, len(words) + 1, BLOCK_TOKENS):
            blocks.append(hash((blocks[-1], *words[end - BLOCK_TOKENS : end])))
        del blocks[0]
        known = next((at for at, block in enumerate(blocks) if block not in self.cached), len(blocks))
        self.cache_hits += known * BLOCK_TOKENS
        self.cached.update(blocks)

    def metrics(self) -> str:
        """Returns `/metrics` with vLLM's names."""
        blocks = self.options.num_gpu_blocks
        used_frac = min(1.0, self.tokens_held / (blocks * BLOCK_TOKENS))
        values = [
            ("gauge", "vllm:num_requests_running", self.running),
            ("gauge", "vllm:num_requests_waiting", self.waiting),
            ("gauge", "vllm:kv_cache_usage_perc", used_frac),
            ("counter", "vllm:num_preemptions_total", 0),
            ("counter", "vllm:prefix_cache_queries_total", self.cache_queries),
            ("counter", "vllm:prefix_cache_hits_total", self.cache_hits),
            ("counter", "vllm:prompt_tokens_total", self.prompt_tokens),
            ("counter", "vllm:generation_tokens_total", self.generation_tokens),
        ]
        labels = f'engine="0",model_name="{self.model}"'
        lines = [
            line
            for kind, name, value in values
            for line in (
                f"# HELP {name.removesuffix('_total')} Scripted.",
                f"# TYPE {name.removesuffix('_total')} {kind}",
                f"{name}{{{labels}}} {float(value)}",
            )
        ]
        info = f'block_size="{BLOCK_TOKENS}",cache_dtype="auto",enable_prefix_caching="True",engine="0"'
        name = "vllm:cache_config_info"
        lines += [f"# HELP {name} Scripted.", f"# TYPE {name} gauge"]
        lines.append(f'{name}{{{info},gpu_memory_utilization="0.9",num_gpu_blocks="{blocks}"}} 1.0')
        return "\n".join(lines) + "\n"

    def stamp(self, row: Mapping[str, object]) -> None:
        """Writes one request's times."""
        if self.stamps:
            self.stamps.write(json.dumps(row) + "\n")
            self.stamps.flush()


class Limits:
    """What of vLLM's scheduler `--scheduler-cls` may change, and the module that it names at work on it."""

    def __init__(self, engine: Engine) -> None:
        options = engine.options
        self.engine = engine
        self.max_num_running_reqs = options.max_num_seqs
        self.max_num_active_reqs = options.max_num_active_seqs or options.max_num_seqs
        if not options.lacks_limits:
            self.max_num_scheduled_tokens = options.max_num_batched_tokens
        module = importlib.import_module(options.scheduler_cls.rpartition(".")[0])
        self.limiter = module.Limiter(self, module.LiveFile(os.environ[module.VARIABLE]))

    @property
    def running(self) -> list[None]:
        return [None] * self.engine.running

    def get_num_unfinished_requests(self) -> int:
        return self.engine.running + self.engine.waiting

    def take(self) -> None:
        before = self.max_num_active_reqs
        self.limiter.apply()
        if self.max_num_active_reqs != before:
            self.engine.slots = asyncio.Semaphore(self.max_num_active_reqs)


def fault(words: list[str]) -> str:
    """Returns what the last `fault:KIND` of a prompt asks for, or an empty string."""
    kinds = [word.partition(":")[2] for word in words if word.startswith("fault:")]
    return kinds[-1] if kinds else ""


def cut(data: bytes, size: int) -> list[bytes]:
    """Returns pieces of so many bytes."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()


def tokenize(body: Mapping[str, Any]) -> list[str]:
    """Returns the words of a prompt or of messages in their template."""
    if "messages" in body:
        return [*CHAT_HEAD, *(w for message in body["messages"] for w in flat(message["content"])), *CHAT_TAIL]
    prompt = body["prompt"]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return [str(token) for token in prompt]
    return flat(prompt)


def flat(content: Any) -> list[str]:
    """Returns the words of a text, or of a list of `{"type": "text"}` parts."""
    if isinstance(content, str):
        return content.split()
    return [w for part in content for w in flat(part["text"] if isinstance(part, dict) else part)]


class Client:
    """One connection."""

    def __init__(self, engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.engine = engine
        self.options = engine.options
        self.reader = reader
        self.writer = writer

    @property
    def left(self) -> bool:
        """Whether the peer closed the connection."""
        return self.reader.at_eof() or self.writer.transport.is_closing()

    async def serve(self) -> None:
        """Answers requests until the connection closes or is idle for 5 s, as uvicorn does."""
        with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            while request := await self.read():
                try:
                    await self.answer(request)
                except Closing:
                    break
                except Refused as refused:
                    self.send_json(refused.body, refused.status)
                except (KeyError, TypeError, AttributeError) as error:
                    self.send_json(Refused(HTTPStatus.BAD_REQUEST, repr(error)).body, HTTPStatus.BAD_REQUEST)
                await self.writer.drain()
        self.writer.close()

    async def read(self) -> Request:
        """Reads one request."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), KEEP_ALIVE_S)
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        method, path, _ = first.split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        data = await self.reader.readexactly(int(headers.get("content-length", 0)))
        received_s = time.monotonic()
        try:
            body = json.loads(data) if data else {}
        except ValueError:
            body = None
        return Request(method, path.partition("?")[0], headers, body, received_s)

    async def answer(self, request: Request) -> None:
        """Sends what one request asks for."""
        if request.path.startswith("/v1") and not authorized(request):
            self.send_json({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
            return
        if self.options.strict and request.path in OURS:
            self.send_json({"detail": "Not Found"}, HTTPStatus.NOT_FOUND)
            return
        match request.method, request.path:
            case "GET", "/health":
                self.send(b"", HTTPStatus.OK, "")
            case "GET", "/version":
                self.send_json({"version": self.options.version})
            case "GET", "/metrics":
                self.send(self.engine.metrics().encode(), HTTPStatus.OK, "text/plain; version=1.0.0; charset=utf-8")
            case "GET", "/v1/models":
                self.send_json({"object": "list", "data": [self.model_card()]})
            case "POST", "/tokenize":
                self.answer_tokenize(request.body)
            case "POST", "/v1/chat/completions" | "/v1/completions":
                await self.answer_completion(request)
            case _:
                self.send_json({"detail": "Not Found"}, HTTPStatus.NOT_FOUND)

    def model_card(self) -> dict[str, Any]:
        """Returns the one entry of `/v1/models`."""
        card = {"id": self.engine.model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
        return card | {"root": self.options.model, "parent": None, "max_model_len": self.options.max_model_len}

    def answer_tokenize(self, body: Mapping[str, Any]) -> None:
        """Counts tokens; the ids mean nothing."""
        if "messages" in body and self.options.refuse_chat:
            raise Refused(HTTPStatus.BAD_REQUEST, NO_TEMPLATE)
        count = len(tokenize(body))
        tokens = list(range(count))
        self.send_json({"count": count, "max_model_len": self.options.max_model_len, "tokens": tokens})

    async def answer_completion(self, request: Request) -> None:
        """Generates, or fails as the script says."""
        self.engine.seen += 1
        await self.misbehave(self.engine.seen)
        generation = self.engine.plan(request.path.startswith("/v1/chat"), request.body)
        sends: list[tuple[str, float]] = []
        kind = fault(generation.words) if self.options.faults else ""
        try:
            if kind:
                await self.answer_otherwise(kind, generation)
            elif request.body.get("stream"):
                await self.stream(generation, sends)
            else:
                async for _ in self.engine.tokens(generation, self):
                    pass
                sends.append(("whole", time.monotonic()))
                self.send_json(generation.whole())
        finally:
            row = {"received_s": request.received_s, "path": request.path, "sends": sends}
            row |= {"cache_salt": request.body.get("cache_salt"), "prompt_tokens": len(generation.words)}
            row |= {"max_tokens": request.body.get("max_tokens"), "completion_tokens": generation.num_tokens}
            row |= {"prompt": " ".join(generation.words)}
            self.engine.stamp(row | {"aborted": self.left})

    async def answer_otherwise(self, kind: str, generation: Generation) -> None:
        """Answers in a way of `WIRES`, or as `FAULTS` has it."""
        events = [event async for event in self.events(generation)]
        good = head(HTTPStatus.OK, "text/event-stream; charset=utf-8", CHUNKED)
        if kind in WIRES:
            await self.send_over(WIRES[kind], events)
            return
        for piece in FAULTS[kind](good, [*map(_chunk, events), b"0\r\n\r\n"]):
            if piece is None:
                linger = struct.pack("ii", 1, 0)  # closing is then a reset
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            if not piece:
                raise Closing
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(DELAY_S)
        while kind in ("stall", "hang") and not self.left:
            await asyncio.sleep(0.05)

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """Yields the events of a stream, each when it is due."""
        always = (generation.body.get("stream_options") or {}).get("continuous_usage_stats")
        async for number in self.engine.tokens(generation, self):
            usage = generation.usage(number + 1) if always else None
            yield _event(generation.chunk([generation.token_choice(number)], usage))
        yield _event(generation.chunk([], generation.usage(generation.num_tokens)))
        yield b"data: [DONE]\n\n"

    async def send_over(self, wire: Wire, events: list[bytes]) -> None:
        """Sends events in one of the ways there are."""
        edited = [wire.edit(event) for event in events]
        body = b"".join(edited)
        framing = wire.framing % len(body) if "%d" in wire.framing else wire.framing
        pieces = [wire.before + head(HTTPStatus.OK, "text/event-stream; charset=utf-8", framing)]
        if CHUNKED in framing:
            parts = edited if wire.chunk is None else cut(body, wire.chunk)
            pieces += [b"%x%b\r\n%b\r\n" % (len(part), wire.extension, part) for part in parts]
            pieces.append(b"0\r\n" + wire.trailers + b"\r\n")
        else:
            pieces += edited
        raw = b"".join(pieces)
        segments = pieces if wire.segment is None else cut(raw, wire.segment or len(raw))
        for number, segment in enumerate(segments):
            self.writer.write(segment)
            if number % 64 == 0:
                await asyncio.sleep(DELAY_S)
        await self.writer.drain()
        if CLOSE in framing:
            raise Closing

    async def misbehave(self, number: int) -> None:
        """Dies, hangs or fails at the request with this number, counted from 1."""
        options = self.options
        if options.die_after_requests is not None and number > options.die_after_requests:
            os.kill(os.getpid(), signal.SIGKILL)
        if options.hang_after_requests is not None and number > options.hang_after_requests:
            while not self.left:
                await asyncio.sleep(0.1)
            raise ConnectionResetError
        frac = options.fail_requests_frac
        if math.floor(number * frac) > math.floor((number - 1) * frac):
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "EngineCore encountered an issue. (scripted)")

    async def stream(self, generation: Generation, sends: list[tuple[str, float]]) -> None:
        """Sends server-sent events, each stamped as it is handed to the kernel."""
        options = generation.body.get("stream_options") or {}
        with_usage = options.get("include_usage")
        always = with_usage and options.get("continuous_usage_stats")

        def send(kind: str, chunk: dict[str, Any] | None) -> None:
            data = "[DONE]" if chunk is None else json.dumps(chunk, separators=(",", ":"))
            event = f"data: {data}\n\n".encode()
            sends.append((kind, time.monotonic()))
            self.writer.write(b"%x\r\n%b\r\n" % (len(event), event))

        self.writer.write(head(HTTPStatus.OK, "text/event-stream; charset=utf-8", "transfer-encoding: chunked"))
        async for number in self.engine.tokens(generation, self):
            if number == 0 and generation.chat:
                role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                role_chunk = generation.chunk([role | {"finish_reason": None}], generation.usage(0) if always else None)
                send("role", role_chunk)
            usage = generation.usage(number + 1) if always else None
            send("token", generation.chunk([generation.token_choice(number)], usage))
            await self.writer.drain()
        if self.left:
            raise ConnectionResetError
        if with_usage:
            send("usage", generation.chunk([], generation.usage(generation.num_tokens)))
        send("done", None)
        self.writer.write(b"0\r\n\r\n")

    def send_json(self, body: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Sends one JSON document."""
        self.send(json.dumps(body, separators=(",", ":")).encode(), status, "application/json")

    def send(self, body: bytes, status: HTTPStatus, content_type: str) -> None:
        """Sends a whole answer."""
        self.writer.write(head(status, content_type, f"content-length: {len(body)}") + body)


def authorized(request: Request) -> bool:
    """Checks the key as vLLM does: from the environment, on /v1 alone."""
    key = os.environ.get("VLLM_API_KEY")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return not key or (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode()))


def head(status: HTTPStatus, content_type: str, length: str) -> bytes:
    """Returns the status line and headers as uvicorn writes them."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    lines = [f"HTTP/1.1 {int(status)} {status.phrase}", f"date: {date}", "server: uvicorn", length]
    lines += [f"content-type: {content_type}"] if content_type else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def start_engine_core() -> subprocess.Popen[str]:
    """Starts a process in a session of its own that holds shared memory, as vLLM's engine core does."""
    argv = [sys.executable, "-c", ENGINE_CORE]
    core = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert core.stdout is not None
    print(f"engine core {core.pid} holds {core.stdout.readline().strip()}", file=sys.stderr, flush=True)
    return core


async def listen(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    engine = Engine(options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, (lambda: None) if options.ignore_sigterm else stop.set)
    clients: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        try:
            await Client(engine, reader, writer).serve()
        finally:
            clients.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", options.port, backlog=2048, limit=2**24)
    print(f"INFO:     Uvicorn running on http://127.0.0.1:{options.port}", file=sys.stderr, flush=True)
    await stop.wait()
    server.close()
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """Reads the options; what vLLM would know and this does not is passed over."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256, help="how many decode at once; the rest wait")
    parser.add_argument("--max-num-active-seqs", type=int, help="fewer of them")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="echoed, and of no effect")
    parser.add_argument("--scheduler-cls", help="a module's class or factory; of the module `Limiter` is used")
    parser.add_argument(
        "--lacks-limits", action="store_true", help="as a scheduler of another vLLM, which has other names"
    )
    parser.add_argument("--version", default="0.32.0")
    parser.add_argument("--num-gpu-blocks", type=int, default=100, help="of 16 tokens, for the KV-cache gauge")
    parser.add_argument("--ttft-ms", type=float, default=20.0, help="from the slot to the first token")
    parser.add_argument("--itl-ms", type=float, default=5.0, help="between tokens")
    parser.add_argument("--eos-after", type=int, default=16, help="the model stops by itself after so many tokens")
    parser.add_argument("--start-delay-s", type=float, default=0.0, help="before it listens, or exits")
    parser.add_argument("--grandchild", action="store_true", help="start an engine core with shared memory")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--die-after-requests", type=int, help="SIGKILL itself on the next completion")
    parser.add_argument("--hang-after-requests", type=int, help="never answer a later completion")
    parser.add_argument("--fail-requests-frac", type=float, default=0.0, help="this share gets a 500, evenly spread")
    parser.add_argument("--faults", action="store_true", help="obey `fault:KIND` in prompts")
    parser.add_argument("--refuse-chat", action="store_true", help="as a model without a chat template")
    parser.add_argument("--strict", action="store_true", help="take OpenAI's parameters alone, and list no models")
    parser.add_argument("--print", dest="text", help="to stderr, at the start")
    parser.add_argument("--exit", dest="status", type=int, help="exit so instead of listening")
    parser.add_argument("--stamps", help="append a JSON line per completion: when it came, and each send")
    return parser.parse_known_args(args)[0]


def main() -> int:
    """Runs the server."""
    options = parse()
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    core = start_engine_core() if options.grandchild else None
    try:
        if options.text:
            print(options.text, file=sys.stderr, flush=True)
        time.sleep(options.start_delay_s)
        if options.status is not None:
            return int(options.status)
        asyncio.run(listen(options))
    finally:
        if core:
            core.terminate()
            core.communicate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
