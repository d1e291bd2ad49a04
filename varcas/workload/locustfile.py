"""The load's process: Locust users, given requests as they come due, over sockets of our own.

    python -m varcas.workload.locustfile < commands > events

Commands and events are JSON lines. `run` (its name, plan, result, target, endpoint, sampling, cache_salt, duration_s,
max_drain_s) is answered by `progress` lines and one `done`; `stop` (grace_s) ends it early. The end of the
input, or SIGTERM, stops the run, writes what there is, and ends the process.

Locust is a closed loop by nature: a user waits for its answer. Here a dispatcher owns the schedule, in absolute
deadlines, and hands each request to a user that waits for one; there is always one.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import contextlib  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from array import array  # noqa: E402
from collections import deque  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from time import monotonic  # noqa: E402
from typing import Any, ClassVar, NoReturn  # noqa: E402

import gevent  # noqa: E402
from gevent import socket  # noqa: E402
from gevent.event import Event  # noqa: E402
from gevent.fileobject import FileObject  # noqa: E402
from gevent.queue import Queue  # noqa: E402
from locust import User, constant, task  # noqa: E402
from locust.env import Environment  # noqa: E402
from locust.runners import LocalRunner  # noqa: E402

from varcas.workload.wire import (  # noqa: E402
    COUNTING,
    PATHS,
    Answer,
    Counting,
    End,
    Endpoint,
    Target,
    completion_body,
    parse,
    request_bytes,
)

RECV_BYTES = 65536
MAX_IDLE_S = 3.0  # uvicorn closes after 5
IDLE_RACE_S = 1.0  # a connection that was closed while idle shows it within a round trip
SPARE_USERS = 64
LEAD_S = 0.1
LATE_S = 1.0  # a request that is this late at the window's end is not sent any more
PROGRESS_EVERY_S = 0.2
KILL_TIMEOUT_S = 5.0
MAX_PROBE_S = 10.0
FIRST = -20  # highest niceness
UNFINISHED = "unfinished"


class Exchange:
    """One request and what came back, as it came."""

    __slots__ = ("answer", "at_s", "data", "end_s", "failure", "pieces", "row", "sent_s", "stamps_s")

    def __init__(self, row: list[Any], at_s: float, data: bytes) -> None:
        self.row = row
        self.at_s = at_s
        self.data = data
        self.sent_s: float | None = None
        self.end_s: float | None = None
        self.pieces: list[bytes] = []
        self.stamps_s: list[float] = []
        self.failure: str | None = None
        self.answer: Answer | None = None

    def read(self, pause: Any = lambda: None) -> Answer:
        """Parses what came, and lets go of the bytes."""
        if self.answer is None:
            self.answer = parse(self.pieces, self.stamps_s, pause)
            self.pieces, self.data = [], b""
        return self.answer


class Connections:
    """Keep-alive connections to one server; the one used last goes first."""

    def __init__(self, target: Target) -> None:
        self._address = (target.host, target.port)
        self._idle: deque[tuple[Any, float]] = deque()

    def take(self, fresh: bool) -> tuple[Any, bool]:
        """Returns a connected socket, and whether it was used before."""
        while self._idle and not fresh:
            connection, since_s = self._idle.pop()
            if monotonic() - since_s < MAX_IDLE_S:
                return connection, True
            connection.close()
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connection.connect(self._address)
        except BaseException:
            connection.close()
            raise
        return connection, False

    def give(self, connection: Any) -> None:
        """Takes a socket back whose response was whole."""
        self._idle.append((connection, monotonic()))

    def close(self) -> None:
        """Closes those that nobody uses."""
        while self._idle:
            self._idle.pop()[0].close()


class Run:
    """One measurement."""

    def __init__(
        self, name: str, target: Target, exchanges: list[Exchange], duration_s: float, max_drain_s: float
    ) -> None:
        self.name = name
        self.connections = Connections(target)
        self.exchanges = exchanges
        self.duration_s = duration_s
        self.max_drain_s = max_drain_s
        self.due: Queue[Exchange] = Queue()
        self.ended: Queue[Exchange] = Queue()
        self.idle_users = 0
        self.num_sent = self.num_done = 0
        self.life_s = 0.0  # when a token came, or anything that shows that the server lives
        self.over = Event()
        self.stop_at_s: float | None = None

    def exchange(self, exchange: Exchange) -> None:
        """Sends one request and receives its response."""
        connection = None
        if self.num_sent == self.num_done:
            self.life_s = monotonic()
        self.num_sent += 1
        try:
            connection, reused = self.connections.take(fresh=False)
            whole = self._converse(connection, exchange)
            if reused and not exchange.pieces and self._just_sent(exchange):  # closed while idle: not a failure
                connection.close()
                connection, _ = self.connections.take(fresh=True)
                whole = self._converse(connection, exchange)
            if whole:
                self.connections.give(connection)
                connection = None
        except OSError as error:
            exchange.failure = f"not connected: {error.strerror or error}"
        except gevent.GreenletExit:
            exchange.failure = UNFINISHED
            raise
        finally:
            if connection is not None:
                connection.close()
            self._end(exchange)

    def _converse(self, connection: Any, exchange: Exchange) -> bool:
        """Returns whether the response came whole; a connection that breaks is one that did not."""
        exchange.failure = None
        exchange.sent_s = monotonic()
        try:
            connection.sendall(exchange.data)
            return self.receive(connection, exchange)
        except OSError as error:
            exchange.failure = f"connection broke: {error.strerror or error}"
            return False

    def _just_sent(self, exchange: Exchange) -> bool:
        return monotonic() - (exchange.sent_s or 0.0) < IDLE_RACE_S

    def receive(self, connection: Any, exchange: Exchange) -> bool:
        """Stamps what comes until the response is whole or the connection ends: no parsing here."""
        pieces, stamps_s, end = exchange.pieces, exchange.stamps_s, End()
        while True:
            data = connection.recv(RECV_BYTES)
            now_s = monotonic()
            if not data:
                return False
            pieces.append(data)
            stamps_s.append(now_s)
            if b"data:" in data:
                self.life_s = now_s
            if end.reached(data):
                return True

    def _end(self, exchange: Exchange) -> None:
        self.life_s = monotonic()
        exchange.end_s = self.life_s if exchange.failure or not exchange.stamps_s else exchange.stamps_s[-1]
        self.num_done += 1
        self.ended.put(exchange)
        if self.num_done == len(self.exchanges):
            self.over.set()

    def stop(self, grace_s: float) -> None:
        """Sends nothing more, and gives what is in flight this long."""
        self.stop_at_s = monotonic() + grace_s
        self.over.set()

    @property
    def quiet_s(self) -> float:
        """How long requests have been in flight without a sign of life."""
        return monotonic() - self.life_s if self.num_sent > self.num_done else 0.0

    def dispatch(self, runner: LocalRunner, t0_s: float) -> None:
        """Hands out each request when it is due."""
        last_s = t0_s + self.duration_s + LATE_S
        for exchange in self.exchanges:
            due_s = t0_s + exchange.at_s
            while (wait_s := due_s - monotonic()) > 0:
                gevent.sleep(wait_s)
            if self.stop_at_s is not None or monotonic() > last_s:
                return
            self.due.put(exchange)
            if self.idle_users - self.due.qsize() < SPARE_USERS // 2:
                runner.spawn_users({"ChatUser": SPARE_USERS})
                gevent.sleep(0)  # they start, and count as idle

    def parse_ended(self) -> NoReturn:
        """Parses ended responses a little at a time, so that no receive waits for it."""
        while True:
            self.ended.get().read(pause=lambda: gevent.sleep(0))


class ChatUser(User):
    """Waits for a request that is due, sends it, and waits for the next."""

    wait_time = constant(0)
    load: ClassVar[Run]

    @task
    def chat(self) -> None:
        """Serves until it is killed."""
        load = self.load
        while True:
            load.idle_users += 1
            try:
                exchange = load.due.get()
            finally:
                load.idle_users -= 1
            load.exchange(exchange)
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
        self._runs: Queue[Mapping[str, Any] | None] = Queue()
        self._run: Run | None = None
        self._stop_grace_s: float | None = None
        self._counting: dict[tuple[Target, str], Counting] = {}
        self._environment = Environment(user_classes=[ChatUser])
        self._runner = self._environment.create_local_runner()

    def serve(self) -> None:
        """Runs what is asked for until the input ends."""
        gevent.signal_handler(signal.SIGTERM, self.end)
        gevent.spawn(self._read)
        self._say(event="ready")
        while (command := self._runs.get()) is not None:
            self._say(event="done", run=command["run"], **self._measure(command))
        self._runner.quit()

    def end(self) -> None:
        """Stops the run, if there is one, and lets `serve` return."""
        self._stop(0.0)
        self._runs.put(None)

    def _read(self) -> None:
        for line in self._commands:
            command = json.loads(line)
            if command["op"] == "run":
                self._stop_grace_s = None
                self._runs.put(command)
            else:
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

    def _measure(self, command: Mapping[str, Any]) -> dict[str, float]:
        target = Target(**command["target"])
        duration_s = command["duration_s"]
        counting = self._probe(target, command)
        rows = json.loads(Path(command["plan"]).read_bytes())
        exchanges = [Exchange(row, row[1], _request(target, command, row[-1], row[3], counting)) for row in rows]
        exchanges.sort(key=lambda exchange: exchange.at_s)
        run = self._run = ChatUser.load = Run(command["run"], target, exchanges, duration_s, command["max_drain_s"])
        if self._stop_grace_s is not None:
            run.stop(self._stop_grace_s)
        try:
            self._runner.spawn_users({"ChatUser": SPARE_USERS})
            done = self._steer(run)
            _write_result(Path(command["result"]), exchanges, done["t0_monotonic_s"])
            return done
        finally:
            self._run = None
            self._runner.user_greenlets.kill(timeout=KILL_TIMEOUT_S)
            run.connections.close()
            gc.enable()
            gc.unfreeze()

    def _steer(self, run: Run) -> dict[str, float]:
        """Follows one run from before its first request to its last; returns its times."""
        gc.collect()
        gc.freeze()
        gc.disable()
        first_s = min((exchange.at_s for exchange in run.exchanges), default=0.0)
        t0_s = monotonic() + LEAD_S - min(first_s, 0.0)
        helpers = [gevent.spawn(run.dispatch, self._runner, t0_s), gevent.spawn(run.parse_ended)]
        self._follow(run, t0_s)
        cpu_from_s = time.process_time()
        self._follow(run, t0_s + run.duration_s)
        window_s = monotonic() - t0_s
        cpu_s = time.process_time() - cpu_from_s
        if run.num_done < len(run.exchanges) and run.stop_at_s is None:
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

    def _follow(self, run: Run, until_s: float, until_over: bool = False) -> None:
        """Reports progress until then; returns at once when stopped, or with the last response if `until_over`."""
        while run.stop_at_s is None and not (until_over and run.over.is_set()):
            wait_s = min(until_s - monotonic(), PROGRESS_EVERY_S)
            if wait_s <= 0:
                return
            gevent.sleep(wait_s) if run.over.is_set() else run.over.wait(wait_s)
            self._say(event="progress", run=run.name, sent=run.num_sent, done=run.num_done, quiet_s=run.quiet_s)

    def _drain_stopped(self, run: Run) -> None:
        """Gives what is in flight the grace that the stop named."""
        while run.num_done < run.num_sent and run.stop_at_s is not None and monotonic() < run.stop_at_s:
            gevent.sleep(0.01)

    def _probe(self, target: Target, command: Mapping[str, Any]) -> Counting:
        """Finds the best way of counting tokens that this server knows, by a one-token request for each."""
        key = (target, command["endpoint"])
        for counting in () if key in self._counting else COUNTING:
            answer = self._try(target, command, counting)
            if answer.status is None:  # it will show in the run
                return "token_ids"
            if answer.counting == counting:
                self._counting[key] = counting
                break
        return self._counting.setdefault(key, "text")

    def _try(self, target: Target, command: Mapping[str, Any], counting: Counting) -> Answer:
        salt = command["cache_salt"] and f"{command['cache_salt']}-probe"
        exchange = Exchange([], 0.0, _request(target, {**command, "cache_salt": salt}, "a", 1, counting))
        run = self._run = Run("probe", target, [exchange], 0.0, 0.0)  # a stop ends this too
        sender = gevent.spawn(run.exchange, exchange)
        run.over.wait(MAX_PROBE_S)
        sender.kill()
        run.connections.close()
        return exchange.read()


def _request(target: Target, command: Mapping[str, Any], prompt: str, num_tokens: int, counting: Counting) -> bytes:
    endpoint: Endpoint = command["endpoint"]
    body = completion_body(
        endpoint,
        target.model,
        prompt,
        num_tokens,
        cache_salt=command["cache_salt"],
        sampling=command["sampling"],
        counting=counting,
    )
    return request_bytes(target, PATHS[endpoint], body)


def _write_result(path: Path, exchanges: list[Exchange], t0_s: float) -> None:
    """Writes what `driver._read_result` reads."""
    exchanges = sorted(exchanges, key=lambda exchange: exchange.row[0])
    rows, offsets_s, counts = [], array("d"), array("I")
    for exchange in exchanges:
        answer = exchange.read()
        rows.append(_record(exchange, answer, t0_s))
        sent_s = exchange.sent_s or 0.0
        offsets_s.extend(at_s - sent_s for at_s in answer.times)
        counts.extend(answer.counts)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(json.dumps(rows).encode() + b"\n")
        offsets_s.tofile(file)
        counts.tofile(file)


def _record(exchange: Exchange, answer: Answer, t0_s: float) -> list[Any]:
    """A row in the order of `driver.RECORD_FIELDS`, and the number of its token events."""
    index, at_s, prompt_tokens, output_tokens, _seed, conversation, turn, _prompt = exchange.row
    error = "not sent" if exchange.end_s is None else exchange.failure or answer.error

    def since_t0(moment_s: float | None) -> float | None:
        return None if moment_s is None else moment_s - t0_s

    return [
        index,
        at_s,
        since_t0(exchange.sent_s),
        since_t0(answer.times[0] if answer.times else None),
        since_t0(answer.times[-1] if answer.times else None),
        since_t0(exchange.end_s),
        prompt_tokens,
        output_tokens,
        answer.prompt_tokens,
        sum(answer.counts) if answer.output_tokens is None else answer.output_tokens,
        None if error == UNFINISHED else answer.finish_reason,
        error,
        answer.status,
        conversation,
        turn,
        len(answer.counts),
    ]


def _come_first() -> None:
    """Asks the kernel to run this process as soon as it has something to do; needs root or CAP_SYS_NICE.

    vLLM's processes spin while they wait for each other. On 2 cores Linux's autogroups (one a session: sched(7)) then
    let a client that needs 3 % of a core wait for seconds: send lag p99 was 1,100 ms, and is 5 ms with this.
    """
    with contextlib.suppress(OSError):  # refused: the send lag will tell
        Path("/proc/self/autogroup").write_text(str(FIRST))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, FIRST)


def main() -> None:
    """Speaks on the pipe that stdout was; whatever else prints goes to the log."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _come_first()
    events_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    Process(sys.stdin.fileno(), events_fd).serve()


if __name__ == "__main__":
    main()
