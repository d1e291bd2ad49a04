"""The parent's side of the load: Locust children, started early, that load one server together, run after run.

A child is told on its stdin and answers on its stdout, a JSON line each; plans and results are files in a directory
of the caller, readable by nobody else and gone when read. The API key travels through the pipe alone.

Several children share one clock: chains of requests are dealt to them in turn, each makes its own ready, and then all
are told the same start of the window on CLOCK_MONOTONIC.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import os
import queue
import resource
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import JsonValue

from varcas.child import Child
from varcas.errors import TrialError, VarcasError
from varcas.records import Ended, LoadResult, Prompted, RequestRecord
from varcas.workload.wire import Endpoint, Target

READY_TIMEOUT_S = 60.0
PREPARE_TIMEOUT_S = 60.0
LEAD_S = 0.1
"""From telling the children to the first request, at least."""
MARGIN_S = 15.0
POLL_S = 0.1
STOP_GRACE_S = 1.0
CLOSE_GRACE_S = 2.0
ANSWER_S = 10.0
"""As long as an answer may take, for all we know beforehand."""
OWN_FILES = 128
"""Files that a child has open beside its connections: its own, and connections opened ahead of time."""
PASSED_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
PLAN_FIELDS = ("index", "at_s", "prompt_tokens", "output_tokens", "conversation", "turn", "gap_s")
"""What a child is told of each request, before its words: the fields of `exchange.Step`."""
Seen = Callable[[float, Sequence[int], Sequence[Ended]], bool]
"""Told, while a load runs, the second of its window, whose answers began, and which requests ended since the last time;
returns whether the load may end."""
RECORD_FIELDS = tuple(
    field.name for field in dataclasses.fields(RequestRecord) if field.name not in ("token_offsets_s", "token_counts")
)
"""What the child writes of each record, before the number of its token events."""


class StalledError(TrialError):
    """The server hangs: no token came though requests were in flight. `load` is what was measured until then."""

    def __init__(self, detail: str, load: LoadResult) -> None:
        super().__init__("hung", detail)
        self.load = load


@dataclasses.dataclass(slots=True)
class _Part:
    """What one child does of a run, as far as it has told.

    Attributes:
        plan: file with its chains.
        result: file that it will write.
        prepared: it waits for the start.
        sent: requests handed out.
        done: of these, ended.
        life_s: when it last saw the server live, on CLOCK_MONOTONIC.
        last: its last word.
    """

    plan: Path
    result: Path
    prepared: bool = False
    sent: int = 0
    done: int = 0
    life_s: float = 0.0
    last: dict[str, Any] | None = None


class _Run:
    """One run in all children."""

    def __init__(self, parts: Sequence[_Part], name: str, early_s: float) -> None:
        self.parts, self.name = parts, name
        self.stopping = self.stalled = self._started = False
        self._early_s, self._t0_s = early_s, 0.0

    def take(self, number: int, event: Mapping[str, Any]) -> None:
        """Notes what a child said; the end of an earlier run, which was given up, is passed over."""
        if event.get("run") != self.name:
            return
        part = self.parts[number]
        match event:
            case {"event": "prepared"}:
                part.prepared = True
            case {"event": "progress", "sent": sent, "done": done, "life_s": life_s}:
                part.sent, part.done, part.life_s = sent, done, life_s
            case {"event": "done"}:
                part.last, part.done = dict(event), part.sent

    def start(self) -> dict[str, Any] | None:
        """What to tell the children once all are prepared, and only then."""
        if self._started or not all(part.prepared for part in self.parts):
            return None
        self._started = True
        self._t0_s = time.monotonic() + LEAD_S + self._early_s
        return {"op": "go", "run": self.name, "t0_s": self._t0_s}

    def tell(self, event: Mapping[str, Any], seen: Seen) -> bool:
        """Hands on what a progress event of this run says of requests; whether the load may end."""
        if event.get("run") != self.name or "ended" not in event:
            return False
        now_s = time.monotonic() - self._t0_s
        return seen(now_s, event["began"], [Ended(*values) for values in event["ended"]])

    @property
    def is_over(self) -> bool:
        """All children have said their last word."""
        return all(part.last is not None for part in self.parts)

    @property
    def quiet_s(self) -> float:
        """How long requests have been in flight without any child seeing a sign of life."""
        in_flight = any(part.sent > part.done for part in self.parts)
        return time.monotonic() - max(part.life_s for part in self.parts) if in_flight else 0.0


class Load:
    """Locust processes that load one server, one measurement after the other.

    `with Load.start(...) as load:` leaves nothing of them behind.
    """

    def __init__(self, children: Sequence[Child], work_dir: Path) -> None:
        self._children = children
        self._work_dir = work_dir
        self._events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._ready: set[int] = set()
        for number in range(len(children)):
            threading.Thread(target=self._listen, args=[number], name=f"load {number}", daemon=True).start()

    @classmethod
    def start(cls, log: Path, work_dir: Path, clients: int = 1) -> Load:
        """Starts the children; their imports run while the server starts.

        Args:
            log: of the children.
            work_dir: for plans and results, made if need be; no server's key is ever written there.
            clients: processes, which share the requests; one spends some 15-20 us of CPU on an event.
        """
        work_dir.mkdir(parents=True, exist_ok=True)
        ours = {name for name in os.environ if name.startswith("VARCAS_") and not name.endswith("_KEY")}
        env = {name: text for name, text in os.environ.items() if name in PASSED_ENV or name in ours}
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        argv = [sys.executable, "-m", "varcas.workload.locustfile"]
        children: list[Child] = []
        try:
            for _ in range(clients):
                children.append(Child.start(argv, env=env, log=log, pipes=True))  # noqa: PERF401
        except BaseException:
            for child in children:
                child.close(0.0)
            raise
        return cls(children, work_dir)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the children."""
        return tuple(child.pid for child in self._children)

    def run(
        self,
        target: Target,
        requests: Sequence[Prompted],
        *,
        duration_s: float,
        max_drain_s: float,
        cache_salt: str | None,
        sampling: Mapping[str, JsonValue],
        endpoint: Endpoint,
        stall_timeout_s: float,
        cancelled: Callable[[], bool] | threading.Event,
        alive: Callable[[], bool],
        on_progress: Callable[[int, int], None] = lambda sent, done: None,
        seen: Seen | None = None,
    ) -> LoadResult:
        """Sends the requests as they come due, and waits for what becomes of each.

        Args:
            target: the server.
            requests: the schedule with its prompts, as `fit_prompts` gives them.
            duration_s: the window.
            max_drain_s: how long to wait after the window; what is left then is `unfinished`.
            cache_salt: keeps this load's prefix cache from any other's; a fresh one for every call.
            sampling: parameters over our own, which switch all sampling off.
            endpoint: chat or completions.
            stall_timeout_s: no token for so long, with requests in flight, means that the server hangs.
            cancelled: ends the load early, with what is there.
            alive: whether the server lives; once it does not, the load ends early, with what is there.
            on_progress: told now and then how many requests were sent, and how many of them have ended.
            seen: told some five times a second what became of requests; ends the load once it returns True.

        Returns:
            One record a request that came due. In a closed loop, users begin again when they have asked all that was
            planned for them: lap L's records have the index of the schedule plus L times its length. A load that ended
            early has the window it came to in `duration_s`.

        Raises:
            StalledError: `hung`: no token came for `stall_timeout_s`.
            VarcasError: a child failed, or did not keep its time, or there cannot be so many connections.
        """
        is_cancelled = cancelled.is_set if isinstance(cancelled, threading.Event) else cancelled
        chains = _chains(requests)
        _check_open_files(chains, _is_closed_loop(requests), len(self._children))
        name = uuid.uuid4().hex
        command = {
            "op": "prepare",
            "run": name,
            "target": dataclasses.asdict(target),
            "endpoint": endpoint,
            "sampling": dict(sampling),
            "cache_salt": cache_salt,
            "duration_s": duration_s,
            "max_drain_s": max_drain_s,
            "closed": _is_closed_loop(requests),
            "watched": seen is not None,
            "num_requests": max((one.request.index for one in requests), default=0) + 1,
            "num_conversations": max((one.request.conversation for one in requests), default=0) + 1,
        }
        early_s = max(0.0, -min((one.request.at_s for one in requests), default=0.0))
        deadline_s = time.monotonic() + PREPARE_TIMEOUT_S + early_s + duration_s + max_drain_s + MARGIN_S
        with self._parts(name) as parts:
            self._await_ready()
            for number, part in enumerate(parts):
                _write_private(part.plan, _plan(chains[number :: len(parts)]))
                self._tell(number, {**command, "plan": str(part.plan), "result": str(part.result)})
            run = _Run(parts, name, early_s)
            self._watch(run, deadline_s, stall_timeout_s, is_cancelled, alive, on_progress, seen)
            load = _merged([_read_result(part) for part in parts])
            if run.stalled:
                raise StalledError(f"no token for {stall_timeout_s:g} s with requests in flight", load)
            return load

    def close(self) -> None:
        """Ends the children and what they are doing."""
        for child in self._children:
            child.close(CLOSE_GRACE_S)

    def __enter__(self) -> Load:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves nothing behind."""
        self.close()

    @contextlib.contextmanager
    def _parts(self, name: str) -> Iterator[list[_Part]]:
        """The children's files, gone in the end; what fails in one of them ends the run in all."""
        stems = [self._work_dir / f"{name}-{number}" for number in range(len(self._children))]
        parts = [_Part(stem.with_suffix(".plan"), stem.with_suffix(".result")) for stem in stems]
        try:
            yield parts
        except BaseException:
            for number in range(len(parts)):
                with contextlib.suppress(VarcasError):  # it is the one that is gone
                    self._tell(number, {"op": "stop", "grace_s": 0.0})
            raise
        finally:
            for part in parts:
                part.plan.unlink(missing_ok=True)
                part.result.unlink(missing_ok=True)

    def _await_ready(self) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while len(self._ready) < len(self._children):
            number, event = self._event(deadline_s)
            if event is None:
                raise VarcasError(f"the load's process was not ready in its time; see {self._log}")
            if event["event"] == "ready":
                self._ready.add(number)

    def _watch(
        self,
        run: _Run,
        deadline_s: float,
        stall_timeout_s: float,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
        on_progress: Callable[[int, int], None],
        seen: Seen | None,
    ) -> None:
        """Follows a run to its end."""
        told = False
        while not run.is_over:
            number, event = self._event(min(deadline_s, time.monotonic() + POLL_S))
            if event is not None:
                run.take(number, event)
                self._tell_all(run.start())
                on_progress(sum(part.sent for part in run.parts), sum(part.done for part in run.parts))
                told = seen is not None and run.tell(event, seen)
            if not run.stopping:
                run.stalled = run.quiet_s > stall_timeout_s
                living = alive()
                if run.stalled or told or cancelled() or not living:
                    run.stopping = True
                    self._tell_all({"op": "stop", "grace_s": 0.0 if run.stalled or living else STOP_GRACE_S})
                    deadline_s = min(deadline_s, time.monotonic() + STOP_GRACE_S + MARGIN_S)
            if time.monotonic() > deadline_s:
                raise VarcasError(f"the load did not end in its time; see {self._log}")

    def _event(self, deadline_s: float) -> tuple[int, dict[str, Any] | None]:
        """The next line of a child; None when there was none until `deadline_s`."""
        try:
            number, event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            return 0, None
        if event is None:
            self._events.put((number, None))  # for whoever asks next
            status = self._children[number].wait(CLOSE_GRACE_S)
            raise VarcasError(f"the load's process ended with {status}; see {self._log}")
        return number, event

    @property
    def _log(self) -> Path:
        return self._children[0].log

    def _tell_all(self, command: Mapping[str, Any] | None) -> None:
        for number in range(len(self._children) if command else 0):
            self._tell(number, command or {})

    def _tell(self, number: int, command: Mapping[str, Any]) -> None:
        stdin = self._children[number].stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        except (OSError, ValueError) as error:  # it died, or was closed
            raise VarcasError(f"the load's process is gone; see {self._log}") from error

    def _listen(self, number: int) -> None:
        """Takes a child's lines, in a thread of its own, until there are no more."""
        stdout = self._children[number].stdout
        assert stdout is not None
        try:
            for line in stdout:
                self._events.put((number, json.loads(line)))
        except ValueError:  # closed under us
            return
        finally:
            self._events.put((number, None))


def _chains(requests: Sequence[Prompted]) -> list[list[Prompted]]:
    """Requests of which each waits for the one before, in the order of their first ones."""
    chains: dict[int, list[Prompted]] = {}  # by the index of its last
    for one in sorted(requests, key=lambda one: one.request.index):
        after = one.request.after
        if after is not None and after not in chains:
            raise VarcasError(f"request {one.request.index} waits for {after}, which is not there or has a follower")
        chains[one.request.index] = [*chains.pop(after), one] if after is not None else [one]
    return sorted(chains.values(), key=lambda chain: (chain[0].request.at_s, chain[0].request.index))


def _is_closed_loop(requests: Sequence[Prompted]) -> bool:
    """Conversations wait for one another: users ask all the time."""
    return any(one.request.after is not None and one.request.turn == 0 for one in requests)


def _check_open_files(chains: Sequence[Sequence[Prompted]], closed: bool, clients: int) -> None:
    """A connection for each user; in an open loop, for all that come due in any `ANSWER_S`.

    Where more are open at once, requests fail: not connected, too many open files.

    Raises:
        VarcasError: this machine does not allow so many.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    due_s = [chain[0].request.at_s for chain in chains]  # in order
    together = [bisect.bisect(due_s, at_s + ANSWER_S) - number for number, at_s in enumerate(due_s)]
    num_open = len(chains) if closed else max(together, default=0)
    needed = -(-num_open // clients) + OWN_FILES
    if most not in (-1, resource.RLIM_INFINITY) and needed > most:
        raise VarcasError(
            f"the load may need {needed} open files in one process, and {most} are allowed: raise the hard limit "
            f"(`ulimit -Hn {needed}` as root), or spread it over more load processes"
        )


def _plan(chains: Sequence[Sequence[Prompted]]) -> bytes:
    rows = [
        [[*(getattr(one.request, name) for name in PLAN_FIELDS), one.text, one.system] for one in chain]
        for chain in chains
    ]
    return json.dumps(rows).encode()


def _write_private(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _merged(loads: Sequence[LoadResult]) -> LoadResult:
    """One load of several on the same clock."""
    return LoadResult(
        records=tuple(sorted((r for load in loads for r in load.records), key=lambda record: record.index)),
        t0_monotonic_s=loads[0].t0_monotonic_s,
        duration_s=min(load.duration_s for load in loads),
        drain_s=max(load.drain_s for load in loads),
        client_cpu_frac=max(load.client_cpu_frac for load in loads),
        clients=len(loads),
        kernel_stamped_frac=min(load.kernel_stamped_frac for load in loads),
    )


def _read_result(part: _Part) -> LoadResult:
    """Reads a JSON line of records without their tokens, then every token's offset, then every count, in binary."""
    assert part.last is not None
    with part.result.open("rb") as file:
        rows = json.loads(file.readline())
        num_events = sum(row[-1] for row in rows)
        offsets_s, counts = array("d"), array("I")
        offsets_s.fromfile(file, num_events)
        counts.fromfile(file, num_events)
    records, start = [], 0
    for *values, length in rows:
        end = start + length
        fields: dict[str, Any] = dict(zip(RECORD_FIELDS, values, strict=True))
        fields |= {"token_offsets_s": tuple(offsets_s[start:end]), "token_counts": tuple(counts[start:end])}
        records.append(RequestRecord(**fields))
        start = end
    return LoadResult(
        records=tuple(records),
        t0_monotonic_s=part.last["t0_monotonic_s"],
        duration_s=part.last["duration_s"],
        drain_s=part.last["drain_s"],
        client_cpu_frac=part.last["client_cpu_frac"],
        kernel_stamped_frac=part.last["stamped_frac"],
    )
