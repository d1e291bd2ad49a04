"""The parent's side of the load: one Locust child a server, started early, several measurements each.

The child is told on its stdin and answers on its stdout, a JSON line each; plans and results are files in a directory
of the caller, readable by nobody else and gone when read. The API key travels through the pipe alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import JsonValue

from varcas.child import Child
from varcas.errors import TrialError, VarcasError
from varcas.records import LoadResult, RequestRecord, ScheduledRequest
from varcas.workload.wire import Endpoint, Target

READY_TIMEOUT_S = 60.0
PREPARE_TIMEOUT_S = 60.0
MARGIN_S = 15.0
POLL_S = 0.1
STOP_GRACE_S = 1.0
CLOSE_GRACE_S = 2.0
PASSED_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
RECORD_FIELDS = tuple(
    field.name for field in dataclasses.fields(RequestRecord) if field.name not in ("token_offsets_s", "token_counts")
)
"""What the child writes of each record, before the number of its token events."""


class StalledError(TrialError):
    """The server hangs: no token came though requests were in flight. `load` is what was measured until then."""

    def __init__(self, detail: str, load: LoadResult) -> None:
        super().__init__("hung", detail)
        self.load = load


class Load:
    """A Locust process that loads one server, one measurement after the other.

    `with Load.start(...) as load:` leaves nothing of it behind.
    """

    def __init__(self, child: Child, work_dir: Path) -> None:
        self._child = child
        self._work_dir = work_dir
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._ready = False
        threading.Thread(target=self._listen, name="load", daemon=True).start()

    @classmethod
    def start(cls, log: Path, work_dir: Path) -> Load:
        """Starts the child; its imports run while the server starts.

        Args:
            log: of the child.
            work_dir: for plans and results, made if need be; no server's key is ever written there.
        """
        work_dir.mkdir(parents=True, exist_ok=True)
        env = {name: text for name, text in os.environ.items() if name in PASSED_ENV or name.startswith("VARCAS_")}
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        argv = [sys.executable, "-m", "varcas.workload.locustfile"]
        return cls(Child.start(argv, env=env, log=log, pipes=True), work_dir)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    def run(
        self,
        target: Target,
        requests: Sequence[tuple[ScheduledRequest, str]],
        *,
        duration_s: float,
        max_drain_s: float,
        cache_salt: str | None,
        sampling: Mapping[str, JsonValue],
        endpoint: Endpoint,
        stall_timeout_s: float,
        cancelled: Callable[[], bool] | threading.Event,
        alive: Callable[[], bool],
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

        Returns:
            One record a request. A load that ended early has the window it came to in `duration_s`.

        Raises:
            StalledError: `hung`: no token came for `stall_timeout_s`.
            VarcasError: the child failed, or did not keep its time.
        """
        is_cancelled = cancelled.is_set if isinstance(cancelled, threading.Event) else cancelled
        name = uuid.uuid4().hex
        plan, result = self._work_dir / f"{name}.plan", self._work_dir / f"{name}.result"
        try:
            self._await_ready()
            _write_private(plan, json.dumps([[*_as_row(request), prompt] for request, prompt in requests]).encode())
            command = {
                "op": "run",
                "run": name,
                "plan": str(plan),
                "result": str(result),
                "target": dataclasses.asdict(target),
                "endpoint": endpoint,
                "sampling": dict(sampling),
                "cache_salt": cache_salt,
                "duration_s": duration_s,
                "max_drain_s": max_drain_s,
            }
            self._tell(command)
            early_s = max(0.0, -min((request.at_s for request, _ in requests), default=0.0))
            deadline_s = time.monotonic() + PREPARE_TIMEOUT_S + early_s + duration_s + max_drain_s + MARGIN_S
            done = self._watch(name, deadline_s, stall_timeout_s, is_cancelled, alive)
            load = _read_result(result, done)
            if done["stalled"]:
                raise StalledError(f"no token for {stall_timeout_s:g} s with requests in flight", load)
            return load
        finally:
            plan.unlink(missing_ok=True)
            result.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the child and what it is doing."""
        self._child.close(CLOSE_GRACE_S)

    def __enter__(self) -> Load:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves nothing behind."""
        self.close()

    def _await_ready(self) -> None:
        if not self._ready:
            self._next(time.monotonic() + READY_TIMEOUT_S, "ready")
            self._ready = True

    def _watch(
        self,
        name: str,
        deadline_s: float,
        stall_timeout_s: float,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
    ) -> dict[str, Any]:
        """Follows one run to its end; returns the child's last word on it."""
        stopping = stalled = False
        while True:
            event = self._event(min(deadline_s, time.monotonic() + POLL_S))
            match event or {}:
                case {"run": other} if other != name:  # the end of a run that was given up
                    continue
                case {"event": "done", **done}:
                    return {**done, "stalled": stalled}
                case {"event": "progress", "quiet_s": quiet_s} if not stopping and quiet_s > stall_timeout_s:
                    stalled = stopping = self._stop(0.0)
            if not stopping and (cancelled() or not alive()):
                stopping = self._stop(0.0 if alive() else STOP_GRACE_S)
            if stopping:
                deadline_s = min(deadline_s, time.monotonic() + STOP_GRACE_S + MARGIN_S)
            if time.monotonic() > deadline_s:
                raise VarcasError(f"the load did not end in its time; see {self._child.log}")

    def _stop(self, grace_s: float) -> bool:
        self._tell({"op": "stop", "grace_s": grace_s})
        return True

    def _next(self, deadline_s: float, kind: str) -> dict[str, Any]:
        while (event := self._event(deadline_s)) is not None:
            if event["event"] == kind:
                return event
        raise VarcasError(f"the load's process was not {kind} in its time; see {self._child.log}")

    def _event(self, deadline_s: float) -> dict[str, Any] | None:
        """The child's next line; None when there was none until `deadline_s`."""
        try:
            event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            return None
        if event is None:
            self._events.put(None)  # for whoever asks next
            raise VarcasError(f"the load's process ended with {self._child.wait(CLOSE_GRACE_S)}; see {self._child.log}")
        return event

    def _tell(self, command: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()
        except (OSError, ValueError) as error:  # it died, or was closed
            raise VarcasError(f"the load's process is gone; see {self._child.log}") from error

    def _listen(self) -> None:
        """Takes the child's lines, in a thread of its own, until there are no more."""
        assert self._child.stdout is not None
        try:
            for line in self._child.stdout:
                self._events.put(json.loads(line))
        except ValueError:  # closed under us
            return
        finally:
            self._events.put(None)


def _as_row(request: ScheduledRequest) -> list[Any]:
    return [getattr(request, field.name) for field in dataclasses.fields(ScheduledRequest)]


def _write_private(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _read_result(path: Path, done: Mapping[str, Any]) -> LoadResult:
    """Reads a JSON line of records without their tokens, then every token's offset, then every count, in binary."""
    with path.open("rb") as file:
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
        t0_monotonic_s=done["t0_monotonic_s"],
        duration_s=done["duration_s"],
        drain_s=done["drain_s"],
        client_cpu_frac=done["client_cpu_frac"],
    )
