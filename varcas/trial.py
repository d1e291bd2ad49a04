"""One server start, from the model's files to the freed GPU. Every failure is an outcome: the one catch is here."""

from __future__ import annotations

import collections
import contextlib
import datetime
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcas import hardware, telemetry
from varcas.early_stop import StopRules
from varcas.engine.node import Node, cache_dir
from varcas.engine.vllm import HOST, VllmServer
from varcas.errors import InputError, TrialError, VarcasError
from varcas.experiment import Experiment
from varcas.measurement import Loaded, Measurement
from varcas.records import EarlyStop, LoadResult, Outcome, Sample, ServerFacts, StageTimes, State
from varcas.space import ServingConfig
from varcas.workload.chat_template import decide_endpoint
from varcas.workload.driver import Load
from varcas.workload.wire import Endpoint, Target

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


def run_trial(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """Measures one configuration on a server of its own; nothing of it is left when this returns.

    Args:
        task: what to start and how to load it.
        cancelled: set it to end early; what was measured until then is kept.
    """
    return _Trial(task, cancelled).run()


class _Trial:
    """The state of one start, for the few seconds that it lives."""

    def __init__(self, task: TrialTask, cancelled: threading.Event) -> None:
        self._task, self._cancelled = task, cancelled
        self._experiment = task.experiment
        self._gpus = hardware.gpus() if task.num_gpus else ()
        self._log_dir = Path(task.log_dir)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._log = self._log_dir / f"{task.label}.log"
        self._load_log = self._log_dir / f"{task.label}.load.log"
        for log in (self._log, self._load_log):  # of a start that died with its driver: not to be read as this one's
            log.unlink(missing_ok=True)
        self._spent_s: dict[str, float] = collections.defaultdict(float)
        self._facts = ServerFacts()
        self._load: LoadResult | None = None
        self._samples: tuple[Sample, ...] = ()
        self._early_stop: EarlyStop | None = None

    def run(self) -> Outcome:
        started_at = datetime.datetime.now(datetime.UTC)
        began_s = time.monotonic()
        state: State = "complete"
        kind = detail = None
        try:
            self._measure()
        except TrialError as error:
            kind, detail = error.kind, error.detail
            state = "stopped" if kind == "interrupted" else "failed"
        if state == "complete" and self._early_stop is not None:
            state = "stopped"
        return Outcome(
            state=state,
            started_at=started_at,
            host=telemetry.gpu_facts(self._gpus),
            times=self._times(time.monotonic() - began_s),
            facts=self._facts,
            load=self._load,
            samples=self._samples,
            failure_kind=kind,
            failure_detail=detail,
            log_path=str(self._log),
            early_stop=self._early_stop if state == "stopped" and kind is None else None,
        )

    def _measure(self) -> None:
        """Start, warm up, load, drain, stop.

        Raises:
            TrialError: whichever of these fails first.
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
                server = VllmServer.start(
                    task.config.argv(),
                    python=experiment.server.python,
                    env=experiment.server.env,
                    model_path=fetched.path,
                    log=self._log,
                    gpus=self._gpus,
                )
                running.callback(self._stop, server)
                load = self._start_load(Path(work))
                running.callback(self._close, load)
                server.wait_ready(experiment.server.start_timeout_s, self._cancelled, endpoint)
            self._facts = server.facts(task.resolved, fetched.revision)
            with _ours_as_trial_error(server):
                self._load_server(server, load, endpoint)

    def _start_load(self, work_dir: Path) -> Load:
        """Starts Locust early: its imports run while the server starts."""
        return Load.start(self._load_log, work_dir)

    def _load_server(self, server: VllmServer, load: Load, endpoint: Endpoint) -> None:
        """Warm-up, window and drain; what was measured is kept, however it ended."""
        measurement = Measurement(
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
            self._experiment.workload,
            self._experiment.server.stall_timeout_s,
            cache_dir() / "prompts",
            self._cancelled,
            stop_rules=self._task.stop_rules,
        )
        try:
            measurement.run()
        finally:
            self._load, self._samples = measurement.load, measurement.samples
            self._early_stop = measurement.early_stop
            self._spent_s["warmup"] = measurement.warmup_s
            self._spent_s["load"], self._spent_s["drain"] = measurement.load_s, measurement.drain_s

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

    def _times(self, wall_s: float) -> StageTimes:
        spent = self._spent_s
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
