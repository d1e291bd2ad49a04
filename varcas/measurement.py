"""A warm-up and a measured window against one server that answers; what was measured outlives a failure."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from varcas import telemetry
from varcas.early_stop import StopRules, Watch
from varcas.errors import TrialError
from varcas.experiment import Workload
from varcas.hardware import Gpu
from varcas.records import EarlyStop, Ended, LoadResult, Prompted, RequestRecord, Sample
from varcas.workload.driver import Load, Seen, StalledError
from varcas.workload.prompts import fit_prompts
from varcas.workload.schedule import num_passed_over, schedule
from varcas.workload.wire import Endpoint, Target

WARMUP_DRAIN_S = 2.0
"""After the warm-up's window; what still runs then is aborted, and the server waited for until it is idle."""
IDLE_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A server under load, as its measurement sees it.

    Attributes:
        target: where requests go.
        url: of its `/metrics`; None when it has none.
        endpoint: chat or completions.
        gpus: to sample.
        max_model_len: longest prompt + output that it takes; None when unknown.
        alive: whether it lives.
        failure: what became of it, once it does not.
    """

    target: Target
    url: str | None
    endpoint: Endpoint
    gpus: tuple[Gpu, ...]
    max_model_len: int | None
    alive: Callable[[], bool]
    failure: Callable[[], TrialError]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is.

    Attributes:
        stream: `prompts` while they are made to length, `warmup`, or `measure`.
        sent: requests sent so far.
        done: of these, ended.
    """

    stream: str
    sent: int
    done: int


class Measurement:
    """Runs once. `load`, `samples` and the stage times hold what there is, also after a failure.

    `early_stop` says why the load was ended by `stop_rules`; None when it was not.
    """

    def __init__(
        self, load: Load, server: Loaded, workload: Workload, stall_timeout_s: float, prompts: Path,
        cancelled: threading.Event, on_progress: Callable[[Progress], None] = lambda progress: None,
        stop_rules: StopRules | None = None,
    ) -> None:  # fmt: skip
        self._process, self._server, self._workload = load, server, workload
        self._stall_timeout_s, self._prompts, self._cancelled = stall_timeout_s, prompts, cancelled
        self._on_progress = on_progress
        self._stop_rules = stop_rules
        self._sampler: telemetry.Sampler | None = None
        self.load: LoadResult | None = None
        self.early_stop: EarlyStop | None = None
        self.samples: tuple[Sample, ...] = ()
        self.warmup_s = self.load_s = self.drain_s = 0.0

    def run(self) -> LoadResult:
        """Warms up, and measures.

        Raises:
            TrialError: the server died, hangs, failed every request of the warm-up or of the window, or the run was
                asked to stop.
            VarcasError: the load could not be run.
        """
        began_s = time.monotonic()
        try:
            if self._workload.warmup_s:
                warmed = self._run("warmup", self._workload.warmup_s, WARMUP_DRAIN_S)
                if warmed.records:
                    _check_not_all_failed(warmed, "warm-up: ")
                self._wait_idle()
            with telemetry.Sampler(self._server.url, self._server.gpus) as sampler:
                self._sampler = sampler
                try:
                    result = self._run("measure", self._workload.duration_s, self._workload.max_drain_s)
                finally:
                    sampler.stop()
                    self._book(sampler, began_s)
        finally:
            if self.load is None:
                self.warmup_s = time.monotonic() - began_s
        if not result.records:
            raise TrialError(
                "all_requests_failed", f"no request came due in {self._workload.duration_s:g} s: lengthen it"
            )
        _check_not_all_failed(result)
        return result

    def _book(self, sampler: telemetry.Sampler, began_s: float) -> None:
        """Keeps samples and times of a load, also of one that was cut short."""
        if self.load is None:
            return
        self.samples = sampler.samples(self.load.t0_monotonic_s)
        self.warmup_s = max(0.0, self.load.t0_monotonic_s - began_s)  # fitting and building requests too
        self.load_s, self.drain_s = self.load.duration_s, self.load.drain_s

    def _run(self, stream: str, duration_s: float, max_drain_s: float) -> LoadResult:
        """One load, of which the server must have lived to see the end."""
        server, workload = self._server, self._workload
        requests = schedule(workload, start_s=0.0, duration_s=duration_s, max_len=server.max_model_len, stream=stream)
        self._on_progress(Progress("prompts", 0, 0))
        fitted = fit_prompts(server.target, requests, endpoint=server.endpoint, cache_dir=self._prompts)
        run = functools.partial(
            self._process.run,
            server.target,
            fitted,
            duration_s=duration_s,
            max_drain_s=max_drain_s,
            cache_salt=uuid.uuid4().hex,  # no prefix cache carries over from any other load
            sampling=workload.sampling,
            endpoint=server.endpoint,
            stall_timeout_s=self._stall_timeout_s,
            cancelled=self._cancelled,
            alive=server.alive,
            on_progress=lambda sent, done: self._on_progress(Progress(stream, sent, done)),
            seen=self._watched(fitted) if stream == "measure" else None,
        )
        num_left_out = len(requests) - len(fitted) + num_passed_over(workload, requests, duration_s=duration_s)
        result = self._kept(run, num_left_out) if stream == "measure" else run()
        if self._cancelled.is_set():
            raise TrialError("interrupted", f"asked to stop during the {stream} load")
        if not server.alive():
            raise server.failure()
        return result

    def _watched(self, fitted: Sequence[Prompted]) -> Seen | None:
        """Ends the window's load once its answer is known; None where nothing may end it."""
        if self._stop_rules is None or self._workload.arrives.users is not None:
            return None
        watch = Watch([one.request for one in fitted], self._stop_rules)

        def seen(now_s: float, began: Sequence[int], ended: Sequence[Ended]) -> bool:
            if now_s >= self._workload.duration_s:
                return False
            samples = self._sampler.samples(time.monotonic() - now_s) if self._sampler else ()
            counts = [(one.t_s, one.output_tokens) for one in samples if one.output_tokens is not None]
            stops = watch.seen(now_s, began, ended) or watch.counted(now_s, counts)
            self.early_stop = watch.stop
            return stops

        return seen

    def _kept(self, run: Callable[[], LoadResult], num_left_out: int) -> LoadResult:
        """Runs a load and keeps what it measured, however it ended."""
        try:
            result = dataclasses.replace(run(), num_left_out=num_left_out)
        except StalledError as stalled:
            self.load = dataclasses.replace(stalled.load, num_left_out=num_left_out)
            raise
        if result.duration_s > 0:  # else it was stopped before its window
            self.load = result
        return result

    def _wait_idle(self) -> None:
        """Waits until the server has let go of what the warm-up aborted."""
        ends_s = time.monotonic() + IDLE_TIMEOUT_S
        while self._server.url and time.monotonic() < ends_s and not self._cancelled.is_set():
            with contextlib.suppress(OSError):
                seen = telemetry.scrape(self._server.url)
                if not seen.get("num_requests_running") and not seen.get("num_requests_waiting"):
                    return
            self._cancelled.wait(0.1)


def cut_short(load: LoadResult, asked_s: float) -> str:
    """Why what an interrupted load measured is not to be believed."""
    if load.duration_s < asked_s:
        return f"interrupted after {load.duration_s:.1f} of {asked_s:g} s"
    return "interrupted while the last requests were answered"


def _check_not_all_failed(load: LoadResult, stage: str = "") -> None:
    """One good answer is enough, or one that was not waited for.

    Raises:
        TrialError: there is none.
    """
    if all(record.error not in (None, "unfinished") for record in load.records):
        raise TrialError("all_requests_failed", stage + _commonest_error(load.records))


def _commonest_error(records: tuple[RequestRecord, ...]) -> str:
    (error, count), *_ = collections.Counter(record.error for record in records).most_common(1)
    return f"{count} of {len(records)} requests: {error}"
