"""The load's process: Locust users, given requests as they come due, over sockets of our own.

    python -m varcas.workload.locustfile < commands > events

Commands and events are JSON lines. `prepare` (run: its name, plan, result, target, endpoint, sampling, cache_salt,
duration_s, max_drain_s, closed, watched, num_requests, num_conversations) is answered by `prepared`; `go` (run, t0_s:
when the window starts) by `progress` lines, which where `watched` tell what became of requests, and one `done`; `stop`
(grace_s) ends the run early. The end of the input, or SIGTERM, stops the run, writes what there is, and ends the
process.

Locust is a closed loop by nature: a user waits for its answer. Here a dispatcher owns the schedule, in absolute
deadlines, and hands each request to a user that waits for one; there is always one.

What must be exact happens in callbacks of gevent's hub: a timerfd tells when a request is due (and so does each
receive, so that a burst of those does not delay a send), and each receive takes the kernel's stamp along. `sent_s` is
taken just before the send is asked for: on loopback that call runs the server's half of the network too.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import bisect  # noqa: E402
import contextlib  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import heapq  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import ssl  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from array import array  # noqa: E402
from collections import deque  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from math import inf  # noqa: E402
from pathlib import Path  # noqa: E402
from time import monotonic  # noqa: E402
from typing import Any, ClassVar, NoReturn  # noqa: E402

import gevent  # noqa: E402
from gevent import socket  # noqa: E402
from gevent.event import AsyncResult, Event  # noqa: E402
from gevent.fileobject import FileObject  # noqa: E402
from gevent.hub import Waiter, get_hub  # noqa: E402
from gevent.pool import Group  # noqa: E402
from gevent.queue import Queue  # noqa: E402
from locust import User, constant, task  # noqa: E402
from locust.env import Environment  # noqa: E402
from locust.runners import LocalRunner  # noqa: E402

from varcas.workload.clock import (  # noqa: E402
    ANCILLARY_BYTES,
    NO_STAMP,
    Alarm,
    Offset,
    ask_for_stamps,
    keep_stamping,
)
from varcas.workload.exchange import UNFINISHED, Chain, Exchange, Step, Writer  # noqa: E402
from varcas.workload.wire import Answer, Target, scale_unfinished  # noqa: E402

RECV_BYTES = 65536
READ, WRITE = 1, 2  # libev's
CONNECT_TIMEOUT_S = 30.0
OPEN_TOGETHER = 16
OPEN_FIRST_TOGETHER = 64
OPEN_FIRST = 256  # in an open loop, where nobody knows how many will be needed
ANSWER_S = 10.0  # as long as an answer may take, for all we know beforehand
OPEN_FIRST_TIMEOUT_S = 5.0
SPARE_CONNECTIONS = 16
REFILL_S = 0.01
MAX_IDLE_S = 3.0  # uvicorn closes after 5
MIN_IDLE_S = 0.5  # no server closes a connection sooner for being idle
IDLE_RACE_S = 1.0  # one that was closed while idle shows it within a round trip
SPARE_USERS = 64
SPAWNED_TOGETHER = 8
LATE_S = 1.0  # a request that is this late at the window's end is not sent any more
PROGRESS_EVERY_S = 0.2
KILL_TIMEOUT_S = 5.0
MAX_ROOM = 65536  # files
FIRST = -20  # highest niceness
WRITABLE = "writable"
PlainSocket: Any = monkey.get_original("socket", "socket")


class Tls:
    """Encryption between the socket and us, so that the kernel's stamps are there with it too."""

    def __init__(self, host: str, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def shake_hands(self, sock: Any) -> None:
        """Blocks until both sides agree.

        Raises:
            OSError: they do not.
        """
        while True:
            try:
                self._object.do_handshake()
                return
            except ssl.SSLWantReadError:
                pass
            finally:
                self.flush(sock)
            socket.wait_read(sock.fileno(), timeout=CONNECT_TIMEOUT_S)
            if not (data := sock.recv(RECV_BYTES)):
                raise ssl.SSLError(0, "closed during the handshake")
            self._incoming.write(data)

    def flush(self, sock: Any) -> None:
        """Sends what the protocol itself has to say."""
        if data := self._outgoing.read():
            sock.send(data)

    def seal(self, data: bytes) -> bytes:
        """Encrypts."""
        self._object.write(data)
        return self._outgoing.read()

    def open(self, data: bytes) -> tuple[bytes, bool]:
        """Decrypts what came; says too whether the other side is done."""
        self._incoming.write(data)
        found = []
        try:
            while more := self._object.read(RECV_BYTES):
                found.append(more)
        except ssl.SSLWantReadError:
            return b"".join(found), False
        except ssl.SSLZeroReturnError:
            pass
        return b"".join(found), True


class Connection:
    """One connection: hands bytes to the kernel, stamps what comes, and wakes the user at the response's end.

    It is watched while it is idle too: one that the server closes is not taken again.
    """

    __slots__ = ("_exchange", "_recvmsg", "_run", "_sock", "_tls", "_waiter", "_watcher", "closed", "idle_since_s")

    def __init__(self, run: Run, sock: Any, tls: Tls | None) -> None:
        self._run, self._sock, self._tls = run, sock, tls
        self._recvmsg = sock.recvmsg
        self._exchange: Exchange | None = None
        self._waiter: Any = None
        self.closed = False
        self.idle_since_s = monotonic()
        self._watcher = get_hub().loop.io(sock.fileno(), READ)
        self._watcher.start(self._readable)

    def converse(self, exchange: Exchange, waiter: Any) -> str | None:
        """Sends one request and returns with the end of its response: what broke beneath HTTP, or None."""
        self._exchange, self._waiter = exchange, waiter
        exchange.begin(self._run.offset.steps)
        data = exchange.data if self._tls is None else self._tls.seal(exchange.data)
        exchange.sent_s = monotonic()
        try:
            num_sent = self._send(data)
            failure = self._send_rest(data, num_sent) if num_sent < len(data) else self._wait()
        except OSError as error:
            failure = self._broke(error)
        self._exchange = self._waiter = None
        return failure

    def _wait(self) -> str | None:
        """Sleeps until a callback wakes the user."""
        said: str | None = self._waiter.get()
        self._waiter.clear()
        return said

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return int(self._sock.send(data))
        except BlockingIOError:
            return 0

    def _send_rest(self, data: bytes, num_sent: int) -> str | None:
        """Sends what the kernel had no room for, unless the response ends before that."""
        writable = get_hub().loop.io(self._sock.fileno(), WRITE)
        try:
            while num_sent < len(data):
                writable.start(self._waiter.switch, WRITABLE)
                said = self._wait()
                writable.stop()
                if said is not WRITABLE:
                    self.close()  # half a request is on it
                    return said
                num_sent += self._send(memoryview(data)[num_sent:])
        finally:
            writable.stop()
            writable.close()
        return self._wait()

    def _readable(self) -> None:
        """The receive path: nothing here that could wait until later."""
        try:
            data, ancillary, _, _ = self._recvmsg(RECV_BYTES, ANCILLARY_BYTES)
            now_s = monotonic()
            exchange = self._exchange
            if exchange is None:
                self._idle_readable(data)
                return
            if data:
                exchange.stamps += ancillary[0][2] if ancillary else NO_STAMP
                exchange.seen_s.append(now_s)
                if self._tls is not None:
                    data, closed = self._tls.open(data)
                    self._tls.flush(self._sock)
                    over = exchange.response.feed(data)
                    if closed:
                        exchange.response.reusable = False
                        if not over:
                            self._closed_by_server(exchange)
                            return
                else:
                    over = exchange.response.feed(data)
                if b"data:" in data:
                    self._run.life_s = now_s
                    if not exchange.has_begun:
                        exchange.has_begun = True
                        self._run.news.began.append(exchange.index)
                if over:
                    self._waiter.switch(None)
            else:
                self._closed_by_server(exchange)
            if now_s >= self._run.next_s:
                self._run.send_due()
        except BlockingIOError:
            return
        except OSError as error:
            failure = self._broke(error)
            if self._exchange is not None:
                self._waiter.switch(failure)

    def _idle_readable(self, data: bytes) -> None:
        """Nobody asked: it is the end of the connection, or TLS's own housekeeping."""
        if data and self._tls is not None:
            data, closed = self._tls.open(data)
            self._tls.flush(self._sock)
            if not data and not closed:
                return
        self.close()

    def _closed_by_server(self, exchange: Exchange) -> None:
        exchange.response.closed()
        self.close()
        self._waiter.switch(None)

    def _broke(self, error: OSError) -> str:
        self.close()
        return f"connection broke: {error.strerror or error}"

    def close(self) -> None:
        """Ends it."""
        if not self.closed:
            self.closed = True
            self._watcher.stop()
            self._watcher.close()
            self._sock.close()


class Connections:
    """Keep-alive connections to one server, some of them opened ahead of time.

    One that was used goes first, the latest first of all; then those opened ahead, the oldest first: a server that
    accepts one at a time waits for that one.
    """

    def __init__(self, run: Run, target: Target) -> None:
        self._run = run
        self._target = target
        self._used: deque[Connection] = deque()
        self._fresh: deque[Connection] = deque()
        self._wanted = Event()
        self._addresses: list[Any] = []
        self._context: ssl.SSLContext | None = None
        self._openers = Group()
        self._num_opening = 0
        self._num_spare = 0

    def take(self, fresh: bool) -> Connection:
        """Returns a connection, one that is opened for this if `fresh`.

        Raises:
            OSError: there is none to be had.
        """
        oldest_s = monotonic() - MAX_IDLE_S
        while self._used and not fresh:
            connection = self._used.pop()
            if connection.closed:
                continue
            if connection.idle_since_s > oldest_s:
                return connection
            connection.close()
        while self._fresh and not fresh:
            connection = self._fresh.popleft()
            self._wanted.set()
            if not connection.closed:
                return connection
        return self._open()

    def give(self, connection: Connection) -> None:
        """Takes a connection back whose response was whole."""
        connection.idle_since_s = monotonic()
        self._used.append(connection)

    def open_first(self, num: int) -> None:
        """Opens so many before the load starts; a server that is not there shows itself in the load."""
        self._num_spare = min(num, SPARE_CONNECTIONS)
        for _ in range(min(num, OPEN_FIRST_TOGETHER)):
            self._openers.spawn(self._refill, num)
        self._openers.join(timeout=OPEN_FIRST_TIMEOUT_S)
        self._openers.kill()

    def keep_spare(self) -> NoReturn:
        """Opens one for each that was taken; several at once where that takes long, begun one by one."""
        while True:
            self._wanted.wait()
            self._wanted.clear()
            for _ in range(OPEN_TOGETHER):
                self._openers.spawn(self._refill, self._num_spare)
                gevent.idle()
                if self._num_lacking(self._num_spare) <= 0:
                    break
            gevent.sleep(REFILL_S)

    def close(self) -> None:
        """Closes those that nobody uses."""
        self._openers.kill()
        for connection in (*self._used, *self._fresh):
            connection.close()
        self._used.clear()
        self._fresh.clear()

    def _refill(self, num: int) -> None:
        for connection in [one for one in self._fresh if one.closed]:
            self._fresh.remove(connection)
        with contextlib.suppress(OSError):  # whoever needs one will see why there is none
            while self._num_lacking(num) > 0:
                self._num_opening += 1
                try:
                    self._fresh.append(self._open())
                finally:
                    self._num_opening -= 1

    def _num_lacking(self, num: int) -> int:
        return num - len(self._fresh) - self._num_opening

    def _open(self) -> Connection:
        if not self._addresses:
            found = socket.getaddrinfo(self._target.host, self._target.port, type=socket.SOCK_STREAM)
            self._addresses = [(family, address) for family, _, _, _, address in found]
        for place, (family, address) in enumerate(tuple(self._addresses), start=1):
            sock = PlainSocket(family, socket.SOCK_STREAM)
            try:
                _connect(sock, address)
                connection = Connection(self._run, sock, self._shake_hands(sock))
            except BaseException as error:
                sock.close()
                if place == len(self._addresses) or not isinstance(error, OSError):
                    raise
            else:
                self._addresses.sort(key=(family, address).__ne__)  # this one first the next time
                return connection
        raise AssertionError

    def _shake_hands(self, sock: Any) -> Tls | None:
        if not self._target.tls:
            return None
        if self._context is None:
            self._context = ssl.create_default_context()
        tls = Tls(self._target.host, self._context)
        tls.shake_hands(sock)
        return tls


def _connect(sock: Any, address: Any) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ask_for_stamps(sock)
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        socket.wait_write(sock.fileno(), timeout=CONNECT_TIMEOUT_S)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _why_not_connected(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"dns: {error.strerror or error}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"tls: certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"tls: {error.reason or error.strerror or error}".replace("_", " ").lower()
    return f"not connected: {error.strerror or error}"


class News:
    """What became of requests since it was last told."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.ended: list[list[Any]] = []

    def take(self) -> dict[str, Any]:
        """Returns it, and begins anew."""
        told = {"began": self.began, "ended": self.ended}
        self.began, self.ended = [], []
        return told


class Run:
    """One measurement."""

    def __init__(
        self,
        name: str,
        target: Target,
        writer: Writer,
        duration_s: float,
        max_drain_s: float,
        *,
        watched: bool,
    ) -> None:
        self.name = name
        self.connections = Connections(self, target)
        self.news = News()
        self.exchanges: list[Exchange] = []
        self.duration_s = duration_s
        self.max_drain_s = max_drain_s
        self.watched = watched
        self.offset = Offset()
        self.t0_s = 0.0
        self.next_s = inf  # when the next request is due
        self.idle_users: deque[Any] = deque()
        self.users_wanted = Event()
        self.num_sent = self.num_done = 0
        self.life_s = 0.0  # when a token came, or anything that shows that the server lives
        self.over = Event()
        self.stop_at_s: float | None = None
        self._writer = writer
        self._due: list[tuple[float, int, Exchange]] = []
        self._numbers = itertools.count()
        self._unserved: deque[Exchange] = deque()
        self._ended: deque[Exchange] = deque()
        self._awaited: deque[Exchange] = deque()  # those whose end something waits for: parsed first
        self._has_ended = Event()
        self._alarm = Alarm()
        self._watcher = get_hub().loop.io(self._alarm.fd, READ)
        self._watcher.start(self._ring)

    def plan(self, exchange: Exchange) -> None:
        """Takes in a request that is due at a time known beforehand."""
        self.exchanges.append(exchange)
        self._put(exchange)

    @property
    def num_due_soon(self) -> int:
        """Requests of the beginning that may be in flight together."""
        due_s = sorted(exchange.due_s for exchange in self.exchanges)
        return bisect.bisect(due_s, due_s[0] + ANSWER_S) if due_s else 0

    def start(self, t0_s: float) -> None:
        """Lets the clock run."""
        self.t0_s = t0_s
        self._wait_for_next()

    def stop(self, grace_s: float) -> None:
        """Sends nothing more, and gives what is in flight this long."""
        self.stop_at_s = monotonic() + grace_s
        self._forget_due()
        self.over.set()

    def close(self) -> None:
        """Lets go of all that it holds open."""
        self._watcher.stop()
        self._watcher.close()
        self._alarm.close()
        self.connections.close()

    def _put(self, exchange: Exchange) -> None:
        heapq.heappush(self._due, (exchange.due_s, next(self._numbers), exchange))

    def _ring(self) -> None:
        self._alarm.hear()
        self.send_due()

    def send_due(self) -> None:
        """Hands out each request that is due; to be called in the hub."""
        if monotonic() > self.t0_s + self.duration_s + LATE_S:
            self._forget_due()
        while self._due and self.t0_s + self._due[0][0] <= monotonic():
            exchange = heapq.heappop(self._due)[2]
            if not exchange.is_first:
                self.exchanges.append(exchange)
            self._hand_out(exchange)
        self._wait_for_next()

    def _hand_out(self, exchange: Exchange) -> None:
        if self.num_sent == self.num_done:
            self.life_s = monotonic()
        self.num_sent += 1
        self.over.clear()
        if self.idle_users:
            self.idle_users.popleft().switch(exchange)
        else:
            self._unserved.append(exchange)
        if len(self.idle_users) < SPARE_USERS // 2:
            self.users_wanted.set()

    def _wait_for_next(self) -> None:
        self.next_s = self.t0_s + self._due[0][0] if self._due else inf
        self._alarm.set(self.next_s)

    def _forget_due(self) -> None:
        self._due = []
        self._wait_for_next()

    def next(self, waiter: Any) -> Exchange:
        """A user waits for a request that is due."""
        if self._unserved:
            return self._unserved.popleft()
        self.idle_users.append(waiter)
        exchange: Exchange = waiter.get()
        waiter.clear()
        return exchange

    def exchange(self, exchange: Exchange, waiter: Any) -> None:
        """Sends one request and receives its response."""
        connection = None
        try:
            connection = self.connections.take(fresh=False)
            was_idle = monotonic() - connection.idle_since_s > MIN_IDLE_S
            exchange.failure = connection.converse(exchange, waiter)
            if was_idle and not exchange.response.begun and self._just_sent(exchange):  # closed meanwhile: no failure
                connection.close()
                connection = self.connections.take(fresh=True)
                exchange.failure = connection.converse(exchange, waiter)
            if exchange.failure is None and exchange.response.reusable and not connection.closed:
                self.connections.give(connection)
                connection = None
        except OSError as error:
            exchange.failure = _why_not_connected(error)
        except gevent.GreenletExit:
            exchange.failure = UNFINISHED
            raise
        finally:
            if connection is not None:
                connection.close()
            self._end(exchange)

    def _just_sent(self, exchange: Exchange) -> bool:
        return monotonic() - (exchange.sent_s or 0.0) < IDLE_RACE_S

    def _end(self, exchange: Exchange) -> None:
        exchange.end_s = self.life_s = monotonic()
        self.num_done += 1
        if exchange.is_followed and exchange.needs_reading:
            self._awaited.append(exchange)
        else:
            if exchange.is_followed:
                exchange.date_end(self.offset)
                self._follow(exchange, None)
            self._ended.append(exchange)
        self._has_ended.set()
        self.note_if_over()

    def note_if_over(self) -> None:
        """Nothing is in flight, and nothing comes due any more."""
        if self.num_done == self.num_sent and not self._due and not self._awaited:
            self.over.set()

    def parse_ended(self) -> NoReturn:
        """Parses ended responses a little at a time, when nothing else is to be done, so that no send waits for it.

        `gevent.sleep(0)` would not do: gevent runs 1,000 such callbacks before it looks at sockets and alarms again.
        """
        while True:
            self._has_ended.wait()
            while self._awaited or self._ended:
                is_awaited = bool(self._awaited)
                exchange = self._awaited[0] if is_awaited else self._ended.popleft()
                answer = exchange.read(self.offset, pause=gevent.idle)
                self.news.ended.append(exchange.told(answer, self.t0_s))
                if is_awaited:
                    self._follow(self._awaited.popleft(), answer)
                gevent.idle()
            self._has_ended.clear()

    def _follow(self, exchange: Exchange, answer: Answer | None) -> None:
        """Plans what waited for this one's end, unless the window is over by then."""
        follower = exchange.follower(self._writer, answer, self.t0_s)
        if follower is not None and follower.due_s < self.duration_s and self.stop_at_s is None:
            self._put(follower)
            self._wait_for_next()
        self.note_if_over()


class ChatUser(User):
    """Waits for a request that is due, sends it, and waits for the next."""

    wait_time = constant(0)
    load: ClassVar[Run]

    @task
    def chat(self) -> None:
        """Serves until it is killed."""
        load, waiter = self.load, Waiter()
        while True:
            exchange = load.next(waiter)
            load.exchange(exchange, waiter)
            self._tell_locust(exchange)

    def _tell_locust(self, exchange: Exchange) -> None:
        """Feeds Locust's own statistics; the records do not come from there."""
        assert exchange.end_s is not None
        self.environment.events.request.fire(
            request_type="POST",
            name="completion",
            response_time=(exchange.end_s - (exchange.sent_s or exchange.end_s)) * 1000,
            response_length=0,
            exception=exchange.failure and OSError(exchange.failure),
            context={},
        )


class Process:
    """Takes commands, one run at a time."""

    def __init__(self, commands_fd: int, events_fd: int) -> None:
        self._commands = FileObject(commands_fd, "rb", closefd=False)
        self._events_fd = events_fd
        self._plans: Queue[Mapping[str, Any] | None] = Queue()
        self._t0: AsyncResult[float | None] = AsyncResult()  # of the latest plan
        self._run: Run | None = None
        self._stop_grace_s: float | None = None
        self._environment = Environment(user_classes=[ChatUser])
        self._runner: LocalRunner = self._environment.create_local_runner()

    def serve(self) -> None:
        """Runs what is asked for until the input ends."""
        gevent.signal_handler(signal.SIGTERM, self.end)
        gevent.spawn(self._read)
        self._say(event="ready")
        while (command := self._plans.get()) is not None:
            self._measure(command)
        self._runner.quit()

    def end(self) -> None:
        """Stops the run, if there is one, and lets `serve` return."""
        self._stop(0.0)
        self._give_up_plan()
        self._plans.put(None)

    def _give_up_plan(self) -> None:
        """Lets go of a plan that was not started."""
        if not self._t0.ready():
            self._t0.set(None)

    def _read(self) -> None:
        for line in self._commands:
            command = json.loads(line)
            match command["op"]:
                case "prepare":
                    self._give_up_plan()
                    self._t0 = AsyncResult()
                    self._stop_grace_s = None
                    self._plans.put({**command, "t0": self._t0})
                case "go":
                    self._t0.set(command["t0_s"])
                case "stop":
                    self._stop(command["grace_s"])
        self.end()

    def _stop(self, grace_s: float) -> None:
        """Stops the run that was asked for, even if it has not begun."""
        self._stop_grace_s = grace_s
        if self._run is not None:
            self._run.stop(grace_s)

    def _say(self, **event: Any) -> None:
        """Writes a line to the parent, if there still is one."""
        try:
            os.write(self._events_fd, json.dumps(event).encode() + b"\n")
        except BrokenPipeError:
            self.end()

    def _measure(self, command: Mapping[str, Any]) -> None:
        run = self._prepare(command)
        try:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._say(event="prepared", run=run.name)
            t0_s = command["t0"].get()
            if t0_s is None:  # nobody waits for it any more
                return
            done = self._steer(run, t0_s)
            stamped_frac = _write_result(Path(command["result"]), run)
            self._say(event="done", run=run.name, **done, stamped_frac=stamped_frac)
        finally:
            self._run = None
            self._runner.user_greenlets.kill(timeout=KILL_TIMEOUT_S)
            run.close()
            gc.enable()
            gc.unfreeze()

    def _prepare(self, command: Mapping[str, Any]) -> Run:
        """Does beforehand all that can be: requests as bytes, connections, users."""
        target = Target(**command["target"])
        writer = Writer(target, command["endpoint"], cache_salt=command["cache_salt"], sampling=command["sampling"])
        run = Run(
            command["run"],
            target,
            writer,
            command["duration_s"],
            command["max_drain_s"],
            watched=command["watched"],
        )
        self._run = ChatUser.load = run
        chains = json.loads(Path(command["plan"]).read_bytes())
        for rows in chains:
            steps = tuple(Step.of_row(row, writer.endpoint) for row in rows)
            chain = Chain(steps, command["closed"], command["num_requests"], command["num_conversations"])
            run.plan(Exchange(chain, 0, 0, steps[0].at_s, writer))
        self._runner.spawn_users({"ChatUser": SPARE_USERS})
        if self._stop_grace_s is None:
            run.connections.open_first(len(chains) if command["closed"] else min(run.num_due_soon, OPEN_FIRST))
        else:
            run.stop(self._stop_grace_s)
        return run

    def _steer(self, run: Run, t0_s: float) -> dict[str, float]:
        """Follows one run from before its first request to its last; returns its times."""
        helpers = [gevent.spawn(work) for work in (run.parse_ended, run.connections.keep_spare)]
        helpers.append(gevent.spawn(self._keep_users, run))
        run.start(t0_s)
        self._follow(run, t0_s)
        cpu_from_s = time.process_time()
        self._follow(run, t0_s + run.duration_s)
        window_s = monotonic() - t0_s
        cpu_s = time.process_time() - cpu_from_s
        run.note_if_over()
        if run.stop_at_s is None:
            self._follow(run, t0_s + run.duration_s + run.max_drain_s, until_over=True)
        if run.stop_at_s is not None:
            self._drain_stopped(run)
        drain_s = max(0.0, monotonic() - t0_s - run.duration_s)
        gevent.killall(helpers)
        self._runner.user_greenlets.kill(timeout=KILL_TIMEOUT_S)
        window_s = min(max(window_s, 0.0), run.duration_s)
        return {
            "t0_monotonic_s": t0_s,
            "duration_s": run.duration_s if run.stop_at_s is None else window_s,
            "drain_s": drain_s,
            "client_cpu_frac": cpu_s / window_s if window_s > 0 else 0.0,
        }

    def _keep_users(self, run: Run) -> NoReturn:
        """Spawns users while too few are idle, a few at a time: each takes a while."""
        while True:
            run.users_wanted.wait()
            while len(run.idle_users) < SPARE_USERS:
                self._runner.spawn_users({"ChatUser": SPAWNED_TOGETHER})
                gevent.idle()
            run.users_wanted.clear()

    def _follow(self, run: Run, until_s: float, until_over: bool = False) -> None:
        """Reports progress until then; returns at once when stopped, or with the last response if `until_over`."""
        while run.stop_at_s is None and not (until_over and run.over.is_set()):
            wait_s = min(until_s - monotonic(), PROGRESS_EVERY_S)
            if wait_s <= 0:
                return
            gevent.sleep(wait_s) if run.over.is_set() else run.over.wait(wait_s)
            news = run.news.take()
            counts = {"sent": run.num_sent, "done": run.num_done, "life_s": run.life_s}
            self._say(event="progress", run=run.name, **counts, **(news if run.watched else {}))

    def _drain_stopped(self, run: Run) -> None:
        """Gives what is in flight the grace that the stop named."""
        while run.num_done < run.num_sent and run.stop_at_s is not None and monotonic() < run.stop_at_s:
            gevent.sleep(0.01)


def _write_result(path: Path, run: Run) -> float:
    """Writes what `driver._read_result` reads; returns the share of receives that the kernel stamped."""
    rows, offsets_s, counts = [], array("d"), array("I")
    exchanges = sorted(run.exchanges, key=lambda exchange: exchange.index)
    answers = [exchange.read(run.offset) for exchange in exchanges]
    scale_unfinished(answers)
    for exchange, answer in zip(exchanges, answers, strict=True):
        rows.append(exchange.record(answer, run.t0_s))
        sent_s = exchange.sent_s or 0.0
        offsets_s.extend(at_s - sent_s for at_s in answer.times)
        counts.extend(answer.counts)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(json.dumps(rows).encode() + b"\n")
        offsets_s.tofile(file)
        counts.tofile(file)
    num_unstamped = sum(exchange.num_unstamped for exchange in exchanges)
    if run.offset.steps:
        print(f"the clock was set {run.offset.steps} times: {num_unstamped} receives have no kernel stamp", flush=True)
    return 1.0 - num_unstamped / max(1, sum(exchange.num_receives for exchange in exchanges))


def _come_first() -> None:
    """Asks the kernel to run this process as soon as it has something to do; needs root or CAP_SYS_NICE.

    vLLM's processes spin while they wait for each other. On 2 cores Linux's autogroups (one a session: sched(7)) then
    let a client that needs 3 % of a core wait for seconds: send lag p99 was 1,100 ms, and is 5 ms with this.
    """
    with contextlib.suppress(OSError):  # refused: the send lag will tell
        Path("/proc/self/autogroup").write_text(str(FIRST))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, FIRST)


def _make_room_for_files() -> None:
    """Lets as many files be open as may be, and has the kernel make the table for them now.

    It doubles the table as files are opened, and waits 5-20 ms each time while other threads share it
    (`expand_fdtable` in Linux's fs/file.c): sends were that late while the number of connections grew.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(OSError):
        os.close(fcntl.fcntl(sys.stdin.fileno(), fcntl.F_DUPFD_CLOEXEC, min(most, MAX_ROOM) - 1))


def main() -> None:
    """Speaks on the pipe that stdout was; whatever else prints goes to the log."""
    _make_room_for_files()
    _come_first()
    events_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with keep_stamping():
        Process(sys.stdin.fileno(), events_fd).serve()


if __name__ == "__main__":
    main()
