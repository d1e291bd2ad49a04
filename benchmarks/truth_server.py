"""A scripted vLLM that knows the truth: when each request came to this host's network, and when each chunk left.

    python benchmarks/truth_server.py --mode step --stamps truth.bin [--port 0] [--tokens 64] [--step-ms 20]

It puts on the wire what vLLM 0.32 behind uvicorn does: headers at once in a segment of their own, the role chunk just
before the first token, one HTTP chunk and one send an event, then usage, `[DONE]` and the end. Every answer has
`--tokens` tokens, whatever was asked.

`step`: all streams emit together at each tick, as an engine does; a request that came during one step emits its first
token at the end of the next. `free`: each stream has its own phase, from 1.5 steps after its request came.

CLOCK_MONOTONIC is read just before and just after each send. A request's arrival is the kernel's stamp of its last
segment, so that neither depends on how busy this process is. One thread, standard library only; prints its port; on
SIGTERM writes `--stamps` (see `load_truth.read`) and ends. `--state` is a file of five int64, kept up to date: requests
come, ended, being answered; the first one's arrival and the last one's end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import heapq
import mmap
import os
import re
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns
from types import FrameType

SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>
STAMP = struct.Struct("qq")
ANCILLARY_BYTES = socket.CMSG_SPACE(STAMP.size)
RECV_BYTES = 1 << 20
ID_CHARS = 32
MODEL = "truth"
PROMPT = re.compile(rb"bench-(\d+)")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TFD_TIMER_ABSTIME = 1
IDLE_POLL_S = 0.1
STATE = struct.Struct("5q")
VERSION = 1
PROMPT_TOKENS = 16
Piece = tuple[bytes, bytes]
"""An event's HTTP chunk before and after the response's id."""


def _chunk(event: str) -> Piece:
    """One HTTP chunk, cut where the id goes."""
    data = f"data: {event}\n\n".encode()
    size = len(data) + event.count("@") * (ID_CHARS - 1)
    before, _, after = data.partition(b"@")
    return b"%x\r\n%b" % (size, before), after + b"\r\n"


def _json(kind: str, choices: str, rest: str = "") -> str:
    prefix = "chatcmpl" if kind == "chat.completion.chunk" else "cmpl"
    head = f'{{"id":"{prefix}-@","object":"{kind}","created":{int(time.time())},"model":"{MODEL}"'
    return f'{head},"choices":[{choices}]{rest}}}'


def pieces(chat: bool, tokens: int) -> list[list[Piece]]:
    """What is sent at each step: a list of chunks; the role goes with the first token, the end with the last."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    steps = []
    for number in range(tokens):
        last = number == tokens - 1
        text = f" w{number}" if number else "w0"
        content = f'"delta":{{"content":"{text}"}}' if chat else f'"text":"{text}"'
        end = f'"finish_reason":{chr(34) + "length" + chr(34) if last else "null"}'
        stop = ',"stop_reason":null' if last or not chat else ""
        steps.append([_chunk(_json(kind, f'{{"index":0,{content},"logprobs":null,{end}{stop}}}'))])
    if chat:
        role = '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        steps[0].insert(0, _chunk(_json(kind, role)))
    counts = f'"prompt_tokens":{PROMPT_TOKENS},"total_tokens":{PROMPT_TOKENS + tokens},"completion_tokens":{tokens}'
    done = b"e\r\ndata: [DONE]\n\n\r\n"
    steps[-1] += [_chunk(_json(kind, "", f',"usage":{{{counts}}}')), (done, b""), (b"0\r\n\r\n", b"")]
    return steps


def _head(content_type: str, framing: str) -> bytes:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    lines = ["HTTP/1.1 200 OK", f"date: {date}", "server: uvicorn", framing, f"content-type: {content_type}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _whole(body: bytes, content_type: str = "application/json") -> bytes:
    return _head(content_type, f"content-length: {len(body)}") + body


def _offset_ns() -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, of the closest of some looks."""
    looks = []
    for _ in range(50):
        before_ns, real_ns, after_ns = monotonic_ns(), time.time_ns(), monotonic_ns()
        looks.append((after_ns - before_ns, real_ns - (before_ns + after_ns) // 2))
    return min(looks)[1]


class Timer:
    """A timerfd on CLOCK_MONOTONIC: epoll itself waits in whole milliseconds."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = (ctypes.c_long * 4)()

    def set(self, at_ns: int) -> None:
        """Rings at that moment; replaces the moment before, and its ring."""
        self._spec[2], self._spec[3] = divmod(max(at_ns, 1), 1_000_000_000)
        self._libc.timerfd_settime(self.fd, TFD_TIMER_ABSTIME, self._spec, None)


class Stream:
    """One answer under way.

    Attributes:
        sock: where to.
        index: that the prompt names; -1 without one.
        id: of the response: the request's place in the order of arrival.
        steps: what is still to be sent, at each step.
        at: of these, the next one.
        arrival_ns: the kernel's stamp of the request's last segment.
        due_ns: of the next step.
        stamps: before and after each send of a chunk.
    """

    __slots__ = ("arrival_ns", "at", "due_ns", "first_due_ns", "id", "index", "sock", "stamps", "steps")

    def __init__(self, sock: socket.socket, index: int, id_: bytes, steps: list[list[Piece]], arrival_ns: int) -> None:
        self.sock, self.index, self.id, self.steps, self.arrival_ns = sock, index, id_, steps, arrival_ns
        self.at = self.due_ns = self.first_due_ns = 0
        self.stamps = array("q")

    def emit(self) -> bool:
        """Sends what is due; returns whether that was the last of it, or nobody listens any more."""
        send, stamp = self.sock.send, self.stamps.append
        try:
            for before, after in self.steps[self.at]:
                data = before + self.id + after if after else before
                stamp(monotonic_ns())
                num_sent = send(data)
                stamp(monotonic_ns())
                if num_sent < len(data):  # the client has left some megabytes unread
                    return True
        except OSError:
            return True
        self.at += 1
        return self.at == len(self.steps)


class Server:
    """The loop."""

    def __init__(self, mode: str, tokens: int, step_ns: int, state: Path | None) -> None:
        self.mode, self.step_ns = mode, step_ns
        self.steps = {True: pieces(True, tokens), False: pieces(False, tokens)}
        self.stopping = False
        self.offset_ns = _offset_ns()
        self.num_ended = 0
        self.streams: list[Stream] = []
        self.last_end_ns = 0
        self._epoll = select.epoll()
        self._timer = Timer()
        self._connections: dict[int, tuple[socket.socket, bytearray]] = {}
        self._active: list[Stream] = []
        self._waiting: list[Stream] = []
        self._heap: list[tuple[int, int, Stream]] = []
        self._tick_ns = 0
        self._state = _mapped(state) if state else None

    def serve(self, listener: socket.socket) -> None:
        """Serves until `stopping`."""
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._timer.fd, select.EPOLLIN)
        ring: Callable[[], None] = self._tick if self.mode == "step" else self._emit_due
        if self.mode == "step":
            self._tick_ns = monotonic_ns() + self.step_ns
            self._timer.set(self._tick_ns)
        listening, timing = listener.fileno(), self._timer.fd
        while not self.stopping:
            for fd, _ in self._epoll.poll(IDLE_POLL_S):
                if fd == timing:
                    ring()
                elif fd == listening:
                    self._accept(listener)
                else:
                    self._read(fd)

    def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                self._connections[sock.fileno()] = sock, bytearray()
                self._epoll.register(sock.fileno(), select.EPOLLIN)
        except BlockingIOError:
            return

    def _read(self, fd: int) -> None:
        sock, held = self._connections[fd]
        try:
            data, ancillary, _, _ = sock.recvmsg(RECV_BYTES, ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            del self._connections[fd]
            sock.close()  # epoll forgets it by itself
            return
        arrival_ns = monotonic_ns()
        if ancillary:
            seconds, ns = STAMP.unpack(ancillary[0][2])
            arrival_ns = seconds * 1_000_000_000 + ns - self.offset_ns
        held += data
        while (end := held.find(b"\r\n\r\n")) >= 0:
            found = LENGTH.search(held, 0, end + 2)
            total = end + 4 + (int(found[1]) if found else 0)
            if len(held) < total:
                return
            self._answer(sock, bytes(held[:total]), end, arrival_ns)
            del held[:total]

    def _answer(self, sock: socket.socket, request: bytes, end: int, arrival_ns: int) -> None:
        path = request[: request.find(b" HTTP/")]
        if path.startswith(b"POST /v1/c"):
            self._begin(sock, b"/chat/" in path, request, end, arrival_ns)
        elif path == b"POST /tokenize":
            count = len(request[end:].split())
            sock.send(_whole(b'{"count":%d,"max_model_len":8192,"tokens":[%b]}' % (count, b",".join([b"1"] * count))))
        elif path == b"GET /v1/models":
            sock.send(_whole(b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL.encode()))
        elif path == b"GET /metrics":
            sock.send(_whole(b"vllm:num_requests_running 0.0\n", "text/plain; version=1.0.0; charset=utf-8"))
        else:
            sock.send(_whole(b"{}"))

    def _begin(self, sock: socket.socket, chat: bool, request: bytes, end: int, arrival_ns: int) -> None:
        sock.send(_head("text/event-stream; charset=utf-8", "transfer-encoding: chunked"))
        found = PROMPT.search(request, end)
        id_ = b"%032x" % len(self.streams)
        stream = Stream(sock, int(found[1]) if found else -1, id_, self.steps[chat], arrival_ns)
        self.streams.append(stream)
        if self.mode == "step":
            self._waiting.append(stream)
        else:
            stream.due_ns = stream.first_due_ns = arrival_ns + self.step_ns * 3 // 2
            heapq.heappush(self._heap, (stream.due_ns, len(self.streams), stream))
            if self._heap[0][2] is stream:
                self._timer.set(stream.due_ns)
        self._tell()

    def _tick(self) -> None:
        ended = [stream for stream in self._active if stream.emit()]
        for stream in ended:
            self._active.remove(stream)
        self._tick_ns += self.step_ns
        for stream in self._waiting:
            stream.first_due_ns = self._tick_ns
        self._active += self._waiting
        self._waiting.clear()
        self._timer.set(self._tick_ns)
        self._note_ends(len(ended))

    def _emit_due(self) -> None:
        heap, ended = self._heap, 0
        while heap and heap[0][0] <= monotonic_ns():
            stream = heap[0][2]
            if stream.emit():
                heapq.heappop(heap)
                ended += 1
            else:
                stream.due_ns += self.step_ns
                heapq.heapreplace(heap, (stream.due_ns, heap[0][1], stream))
        if heap:
            self._timer.set(heap[0][0])
        else:
            os.read(self._timer.fd, 8)
        self._note_ends(ended)

    def _note_ends(self, num: int) -> None:
        if num:
            self.num_ended += num
            self.last_end_ns = monotonic_ns()
            self._tell()

    def _tell(self) -> None:
        if self._state is not None:
            active = len(self.streams) - self.num_ended
            first_ns = self.streams[0].arrival_ns
            STATE.pack_into(self._state, 0, len(self.streams), self.num_ended, active, first_ns, self.last_end_ns)

    def write(self, path: Path) -> None:
        """Writes int64: a header, then each request.

        Header: version, step, how far the clocks moved apart. Request: index, arrival, first due moment, number of
        stamps, stamps.
        """
        out = array("q", [VERSION, self.step_ns, _offset_ns() - self.offset_ns])
        for stream in self.streams:
            out.extend([stream.index, stream.arrival_ns, stream.first_due_ns, len(stream.stamps)])
            out.extend(stream.stamps)
        with path.open("wb") as file:
            out.tofile(file)


def _mapped(path: Path) -> mmap.mmap:
    path.write_bytes(bytes(STATE.size))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), STATE.size)


def main() -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["step", "free"], default="step")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    args = parser.parse_args()
    server = Server(args.mode, args.tokens, int(args.step_ms * 1e6), args.state)

    def stop(number: int, frame: FrameType | None) -> None:
        server.stopping = True

    signal.signal(signal.SIGTERM, stop)
    listener = socket.create_server(("127.0.0.1", args.port), backlog=4096)
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)  # the kernel takes a moment to begin stamping
    print(listener.getsockname()[1], flush=True)
    gc.disable()
    server.serve(listener)
    server.write(args.stamps)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
