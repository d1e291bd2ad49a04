"""One server start, from the model's files to the freed GPU, and what is measured on it, one thing after the other.

Every failure is an outcome: the one catch is here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from varcas import hardware, telemetry
from varcas.early_stop import StopRules
from varcas.engine.live_server import ARGV, LiveServer, NotLiveError
from varcas.engine.node import Node, cache_dir
from varcas.engine.vllm import HOST, VllmServer, server_env
from varcas.errors import InputError, TrialError, VarcasError
from varcas.experiment import Experiment, Workload
from varcas.inner import Limits
from varcas.measurement import Loaded, Measurement
from varcas.records import Outcome, ServerFacts, StageTimes, State
from varcas.space import ServingConfig
from varcas.workload.chat_template import decide_endpoint
from varcas.workload.driver import Load
from varcas.workload.wire import Endpoint, Target

COLD_S = 20.0
INTERRUPTED_GRACE_S = 1.0
"""A stop that was asked for from outside has little time: Ray kills a job 3 s after its SIGTERM."""


@dataclass(frozen=True, slots=True)
class TrialTask:
    """What a worker needs to know of one server start.

    Attributes:
        label: names its log, say `00007-search`.
        experiment: as loaded.
        config: what to start.
        revision: of a hub model, as the sweep found it at its start: a branch may move meanwhile.
        resolved: vLLM's settings for it, as the validator gave them.
        endpoint: chat or completions, as the validator decided; None: decided from the model's files.
        log_dir: where the server's log goes.
        num_gpus: GPUs reserved for it; 0 on a CPU.
        stop_rules: what may end its load early; None: nothing.
        live: its limits are to change while it runs: it is started with our scheduler.
    """

    label: str
    experiment: Experiment
    config: ServingConfig
    revision: str | None
    resolved: Mapping[str, Any]
    endpoint: Endpoint | None
    log_dir: str
    num_gpus: int
    stop_rules: StopRules | None = None
    live: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement on a server.

    Attributes:
        config: what is measured, as it would be deployed.
        workload: the traffic.
        limits: what the running server is told before; None: nothing.
        discarded: a cold server's first load, which measures low: no row comes of it.
        stop_rules: what may end its load early; None: nothing.
    """

    config: ServingConfig
    workload: Workload
    limits: Limits | None = None
    discarded: bool = False
    stop_rules: StopRules | None = None


def cold_step(config: ServingConfig, workload: Workload, limits: Limits | None = None) -> Step:
    """A new server's first load, as it comes, but no longer than it takes to be warm; it measures low."""
    changed = {name: min(getattr(workload, name), COLD_S) for name in ("duration_s", "max_drain_s")}
    return Step(config, workload.model_copy(update=changed), limits, discarded=True)


@dataclass(frozen=True, slots=True)
class Done:
    """A step and what came of it."""

    step: Step
    outcome: Outcome


class Plan(Protocol):
    """What is measured on one server. Decided where the server runs: it travels there by pickle."""

    def next(self, done: Sequence[Done]) -> Step | None:
        """The next step, after those; None ends the server. There is a first one."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Steps that are known beforehand."""

    steps: tuple[Step, ...]

    def next(self, done: Sequence[Done]) -> Step | None:
        """As `Plan` has it."""
        return self.steps[len(done)] if len(done) < len(self.steps) else None


@dataclass(frozen=True, slots=True)
class Series:
    """What one server start gave.

    Attributes:
        done: in order. A failure is the last; what was measured before it stands.
        not_live: why the running server did not take new limits; what was left then was not measured.
    """

    done: tuple[Done, ...]
    not_live: str | None = None

    def kept(self) -> tuple[Done, ...]:
        """Without what is discarded, whose time the first of the others bears."""
        spent = [one.outcome.times for one in self.done if one.step.discarded]
        kept = [one for one in self.done if not one.step.discarded or one.outcome.state != "complete"]
        if not spent or not kept or kept[0].step.discarded:
            return tuple(kept)
        first = kept[0].outcome
        whole = dataclasses.replace(kept[0], outcome=dataclasses.replace(first, times=_sum([*spent, first.times])))
        return (whole, *kept[1:])


def _sum(times: Sequence[StageTimes]) -> StageTimes:
    """Of a discarded load all is warm-up but the start."""
    *cold, own = times
    whole = {field.name: sum(getattr(one, field.name) for one in times) for field in dataclasses.fields(StageTimes)}
    warmup_s = own.warmup_s + sum(one.warmup_s + one.load_s + one.drain_s for one in cold)
    return StageTimes(**whole | {"warmup_s": warmup_s, "load_s": own.load_s, "drain_s": own.drain_s})


def run_trial(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """Measures one configuration on a server of its own; nothing of it is left when this returns.

    Args:
        task: what to start and how to load it.
        cancelled: set it to end early; what was measured until then is kept.
    """
    steps = (Step(task.config, task.experiment.workload, stop_rules=task.stop_rules),)
    return run_series(task, cancelled, plan=Listed(steps)).done[0].outcome


def run_series(
    task: TrialTask,
    cancelled: threading.Event,
    *,
    plan: Plan,
    on_done: Callable[[Done], None] = lambda done: None,
) -> Series:
    """Starts one server, measures what the plan says, and ends it; nothing of it is left when this returns.

    The first outcome bears the start's time, the last one the stop's.

    Args:
        task: what to start.
        cancelled: set it to end early; what was measured until then is kept.
        plan: what to measure; it ends with the first failure.
        on_done: told of each measurement as it ends, before the server stops.
    """
    return _Start(task, cancelled, plan, on_done).run()


@dataclass(frozen=True, slots=True)
class _Running:
    """A server that answers, and its load's process."""

    server: VllmServer
    load: Load
    endpoint: Endpoint


class _Start:
    """The state of one start, for the few minutes that it lives."""

    def __init__(
        self, task: TrialTask, cancelled: threading.Event, plan: Plan, on_done: Callable[[Done], None]
    ) -> None:
        self._task, self._cancelled, self._plan, self._on_done = task, cancelled, plan, on_done
        self._experiment = task.experiment
        self._gpus = hardware.gpus() if task.num_gpus else ()
        self._log_dir = Path(task.log_dir)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._log = self._log_dir / f"{task.label}.log"
        self._load_log = self._log_dir / f"{task.label}.load.log"
        for log in (self._log, self._load_log):  # of a start that died with its driver: not to be read as this one's
            log.unlink(missing_ok=True)
        self._facts = ServerFacts()
        self._live: LiveServer | None = None
        self._done: list[Done] = []
        self._begin()

    def _begin(self) -> None:
        """What follows belongs to the next outcome."""
        self._began_at, self._began_s = datetime.datetime.now(datetime.UTC), time.monotonic()
        self._spent_s: dict[str, float] = collections.defaultdict(float)
        self._in_force: dict[str, int] = {}
        self._measured: Measurement | None = None

    def run(self) -> Series:
        step, not_live = self._plan.next(()), None
        if step is None:
            raise ValueError("a plan has a first step")
        try:
            with self._started() as running:
                while step is not None:
                    self._measure(step, running)
                    self._keep(step)
                    step = self._plan.next(tuple(self._done))
        except NotLiveError as error:
            not_live = str(error)
        except TrialError as error:
            self._failed(step, error)
        self._book_stop()
        return Series(tuple(self._done), not_live)

    def _failed(self, step: Step | None, error: TrialError) -> None:
        """A step that failed; the last one, where all were measured and the server did not end."""
        state: State = "stopped" if error.kind == "interrupted" else "failed"
        if step is not None:
            self._keep(step, state, error)
            return
        last = self._done[-1]
        outcome = dataclasses.replace(last.outcome, state=state, failure_kind=error.kind, failure_detail=error.detail)
        self._done[-1] = dataclasses.replace(last, outcome=outcome)

    def _keep(self, step: Step, state: State = "complete", error: TrialError | None = None) -> None:
        """Turns what was measured since the last step into an outcome."""
        facts, measured = self._facts, self._measured
        if self._in_force:
            facts = dataclasses.replace(facts, resolved={**facts.resolved, "live": self._in_force})
        early_stop = measured.early_stop if measured and state == "complete" else None
        outcome = Outcome(
            state="stopped" if early_stop else state,
            started_at=self._began_at,
            host=telemetry.gpu_facts(self._gpus),
            times=self._times(),
            facts=facts,
            load=measured.load if measured else None,
            samples=measured.samples if measured else (),
            failure_kind=error.kind if error else None,
            failure_detail=error.detail if error else None,
            log_path=str(self._log),
            early_stop=early_stop,
            live=self._live is not None,
        )
        self._done.append(Done(step, outcome))
        self._on_done(self._done[-1])
        self._begin()

    def _book_stop(self) -> None:
        """Adds what passed since the last outcome, the stop, to it."""
        if not self._done:
            return
        last, more = self._done[-1], self._times()
        times = {f.name: getattr(last.outcome.times, f.name) + getattr(more, f.name) for f in dataclasses.fields(more)}
        outcome = dataclasses.replace(last.outcome, times=StageTimes(**times))
        self._done[-1] = dataclasses.replace(last, outcome=outcome)

    @contextlib.contextmanager
    def _started(self) -> Iterator[_Running]:
        """Starts the server, and ends it.

        Raises:
            TrialError: whichever stage fails first.
        """
        experiment, task = self._experiment, self._task
        with self._stage("fetch"):
            node = Node(experiment.server, experiment.model, task.revision)
            fetched = node.fetch()
            node.fetch_others(task.config.flags)
        telemetry.require_idle(self._gpus)
        with self._stage("cooldown"):
            telemetry.cool_down(self._cancelled, self._gpus)
        asked = task.endpoint or experiment.workload.endpoint
        endpoint = decide_endpoint(asked, Path(fetched.path), task.config.flags)
        with tempfile.TemporaryDirectory(prefix="varcas-load-") as work, contextlib.ExitStack() as running:
            with self._stage("server_start"):
                argv, env = self._command(Path(work))
                server = VllmServer.start(
                    argv,
                    python=experiment.server.python,
                    env=env,
                    model_path=fetched.path,
                    log=self._log,
                    gpus=self._gpus,
                )
                running.callback(self._stop, server)
                load = self._start_load(Path(work))
                running.callback(self._close, load)
                server.wait_ready(experiment.server.start_timeout_s, self._cancelled, endpoint)
            self._facts = server.facts(task.resolved, fetched.revision)
            yield _Running(server, load, endpoint)

    def _command(self, work_dir: Path) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of the server, with our scheduler where its limits are to change."""
        python, env = self._experiment.server.python, dict(self._experiment.server.env)
        if not self._task.live:
            return self._task.config.argv(), env
        self._live = LiveServer(work_dir)
        return [*self._task.config.argv(), *ARGV], {**env, **self._live.env(server_env(env, python))}

    def _start_load(self, work_dir: Path) -> Load:
        """Starts Locust early: its imports run while the server starts."""
        return Load.start(self._load_log, work_dir)

    def _measure(self, step: Step, running: _Running) -> None:
        """Limits, warm-up, window and drain; what was measured is kept, however it ended."""
        server, load, endpoint = running.server, running.load, running.endpoint
        if step.limits is not None:
            with self._stage("warmup"):
                self._set_limits(step.limits, running)
        self._measured = measurement = Measurement(
            load,
            Loaded(
                target=Target(HOST, server.port, server.model_id, server.api_key),
                url=server.url,
                endpoint=endpoint,
                gpus=self._gpus,
                max_model_len=self._max_model_len(),
                alive=server.alive,
                failure=lambda: server.failure("load"),
            ),
            step.workload,
            self._experiment.server.stall_timeout_s,
            cache_dir() / "prompts",
            self._cancelled,
            stop_rules=step.stop_rules,
        )
        try:
            with _ours_as_trial_error(server):
                measurement.run()
        finally:
            self._spent_s["warmup"] += measurement.warmup_s
            self._spent_s["load"], self._spent_s["drain"] = measurement.load_s, measurement.drain_s

    def _set_limits(self, limits: Limits, running: _Running) -> None:
        """Raises NotLiveError when they are not in force."""
        if self._live is None:
            raise NotLiveError("the server was not started with our scheduler")
        try:
            self._in_force = self._live.apply(limits, lambda: running.server.poke(running.endpoint), self._cancelled)
        except NotLiveError:
            if self._cancelled.is_set():
                raise TrialError("interrupted", "asked to stop while limits were changed") from None
            if not running.server.alive():
                raise running.server.failure("load") from None
            raise

    def _max_model_len(self) -> int | None:
        named = self._task.config.flags.get("max_model_len")
        resolved = (self._task.resolved.get("model") or {}).get("max_model_len")
        return next((n for n in (resolved, named) if isinstance(n, int)), None)

    def _stop(self, server: VllmServer) -> None:
        grace_s = INTERRUPTED_GRACE_S if self._cancelled.is_set() else self._experiment.server.stop_timeout_s
        with self._stage("stop"):
            server.stop(grace_s)
            problem = None if self._cancelled.is_set() else server.wait_freed()
        if problem:  # what was measured stands; the next start here finds the GPU busy, and is tried again
            with self._log.open("a") as log:
                log.write(f"varcas: after the stop, {problem}\n")

    def _close(self, load: Load) -> None:
        with self._stage("stop"):
            load.close()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._spent_s[name] += time.monotonic() - began_s

    def _times(self) -> StageTimes:
        """What was spent since the last outcome."""
        spent, wall_s = self._spent_s, time.monotonic() - self._began_s
        return StageTimes(
            fetch_s=spent["fetch"],
            cooldown_s=spent["cooldown"],
            server_start_s=spent["server_start"],
            warmup_s=spent["warmup"],
            load_s=spent["load"],
            drain_s=spent["drain"],
            stop_s=spent["stop"],
            overhead_s=max(0.0, wall_s - sum(spent.values())),
        )


@contextlib.contextmanager
def _ours_as_trial_error(server: VllmServer) -> Iterator[None]:
    """A load that could not be run: the dead server's fault, or the worker's, which is retried."""
    try:
        yield
    except InputError as error:  # no request fits this configuration: its own fault
        raise TrialError("unsupported_by_engine", str(error)) from error
    except VarcasError as error:
        if not server.alive():
            raise server.failure("load") from error
        raise TrialError("worker_lost", str(error)) from error
