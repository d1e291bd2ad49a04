"""What every driver of server starts shares: the node, vLLM's word on a configuration, the pool's work, and rows."""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from varcas.engine.failures import HINTS
from varcas.engine.fetch import check_local_model, is_local
from varcas.engine.node import Checked, NodeFacts
from varcas.errors import InputError
from varcas.experiment import Experiment, Workload
from varcas.measurement import cut_short
from varcas.metrics import constraints_of, summarise
from varcas.pool import Finished, LostServiceError, Workers, in_ray_job
from varcas.records import ASIDE, MEASUREMENT_VERSION, Outcome, Purpose, StageTimes, TrialRow
from varcas.report import unreal_acceptance
from varcas.simulated import unmodelled
from varcas.space import ServingConfig, Space, server_python
from varcas.store import Store
from varcas.study import Proposal, make_sampler
from varcas.trial import Done, Series, TrialTask
from varcas.validity import UNCHECKED
from varcas.workload.schedule import check_workload, identity

ANSWER_S = 300.0
"""For vLLM's word on a configuration: its import on a cold, slow disk included."""
LEAVE_S = 2.5
"""For running trials to end when asked: Ray kills a stopped job 3 s after its SIGTERM."""
POLL_S = 0.25
Work = Callable[..., Series]
PoolT = TypeVar("PoolT", bound=Workers)
HOPELESS = frozenset({"bad_model_files", "missing_dependency", "model_download"})
"""Failures that no flag changes: a sweep whose baseline has one ends, and tries it again when resumed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the sweep is about to spend."""

    study: str
    space_size: int | None
    search_starts: int
    search_done: int
    search_left: int
    confirm_starts: int
    start_s: float
    load_s: float
    budget_s: float | None
    width: int
    ruled_out: Mapping[str, int] = field(default_factory=dict)  # of the space, by rule; empty where it is not listed
    audit_starts: int = 0  # of what is ruled out, at most

    @property
    def total_s(self) -> float:
        """Upper estimate of what is left, in wall seconds."""
        starts = self.search_left + self.audit_starts + self.confirm_starts
        estimate = starts * (self.start_s + self.load_s) / self.width
        return estimate if self.budget_s is None else min(estimate, self.budget_s)


@dataclass(frozen=True, slots=True)
class Event:
    """What happens while a sweep runs, for whoever shows it."""

    kind: Literal["plan", "note", "start", "row", "confirm"]
    text: str = ""
    plan: Plan | None = None
    row: TrialRow | None = None
    number: int | None = None  # of the trial that starts
    total: int | None = None  # starts that this confirmation is about to make


@dataclass(frozen=True, slots=True)
class Job:
    """One server start to make."""

    proposal: Proposal
    number: int
    purpose: Purpose
    checked: Checked
    arm: str | None = None
    attempt: int = 0
    audited_rule: str | None = None
    workload: Workload | None = None  # where it is not the experiment's
    live: bool = False  # on a server whose limits change
    server_id: str | None = None  # where it is not a start of its own

    @property
    def key(self) -> str:
        """Names it in the pool."""
        return f"{self.number}"


def check(experiment: Experiment, *, searched: bool = True) -> Space:
    """Checks what needs neither Ray nor vLLM, and returns the space.

    Args:
        experiment: what is to be measured.
        searched: its space is; else it may be empty.

    Raises:
        InputError: with file, line, key and fix.
    """
    with located(experiment):
        _require_real(experiment, searched)
        space = Space(experiment, may_be_empty=not searched)
        check_paths(experiment)
        check_local_model(experiment.model)
        check_workload(experiment.workload, experiment.serve)
        make_sampler(experiment, space)
    return space


def _require_real(experiment: Experiment, searched: bool) -> None:
    """Raises InputError: a simulated engine is asked for what takes several loads of one start."""
    wanted = any(objective.metric == "capacity_rps" for objective in experiment.objectives)
    if experiment.engine == "simulated" and (wanted or not searched):
        raise InputError(
            "engine: simulated: capacity and batch sizes are measured on real servers alone. Sweep with another "
            "objective, or take `engine` out."
        )


@contextlib.contextmanager
def located(experiment: Experiment) -> Iterator[None]:
    """Gives file and line to what is said about a key of the experiment."""
    try:
        yield
    except InputError as error:
        raise InputError(experiment.located(str(error))) from error


@contextlib.contextmanager
def opened(
    experiment: Experiment, make_pool: Callable[[], contextlib.AbstractContextManager[PoolT]]
) -> Iterator[tuple[Store, PoolT]]:
    """The experiment's store, locked, and then its workers; errors say where in the file they belong."""
    with located(experiment), Store(experiment.results) as store, make_pool() as pool:
        yield store, pool


def check_paths(experiment: Experiment) -> None:
    """Refuses paths that would be lost: a Ray job's working directory is an evictable copy.

    Raises:
        InputError: a relative `results` or file storage in a Ray job.
    """
    if not in_ray_job():
        return
    places = {"results": experiment.results}
    scheme, _, path = (experiment.study.storage or "").partition(":")
    if scheme == "journal" or (scheme == "sqlite" and not path.startswith("////")):
        places["study.storage"] = path.removeprefix("///")
    for name, place in places.items():
        if not Path(place).is_absolute():
            raise InputError(
                f"{name}: {place!r}: is relative, and a Ray job's working directory is a copy that Ray evicts. "
                f"Give an absolute path on a disk that stays, e.g. /mnt/varcas/{Path(place).name or 'results'}."
            )


class Starts:
    """Starts servers for one experiment. While it is entered, the node answers and the pool works.

    Args:
        experiment: what is measured.
        space: its flags.
        store: rows go there.
        pool: servers start there.
        on_event: told of what happens.
        stopping: set it to end early.
        node: what answers for a worker node.
    """

    searches: ClassVar[bool] = False
    """It is the search itself: how an earlier one ended is void."""

    def __init__(
        self,
        experiment: Experiment,
        space: Space,
        store: Store,
        pool: Workers,
        on_event: Callable[[Event], None],
        stopping: threading.Event,
        node: Callable[..., Any],
    ) -> None:
        self.experiment, self.space, self.store, self.pool = experiment, space, store, pool
        self._make_node, self.simulated = node, experiment.engine == "simulated"
        self._emit, self._stopping = on_event, stopping
        self._workload = identity(experiment.workload)
        self._jobs: dict[str, tuple[Job, float]] = {}  # and when it was submitted

    def __enter__(self) -> Self:
        """Asks the node what it has, and checks the experiment against it."""
        self._note("asking vLLM on the node for its flags and its word on the configurations")
        self._node = self._placed_node()
        try:
            self._open()
        except BaseException:
            self.pool.dismiss(self._node)
            raise
        gc.freeze()  # what the imports left: to look through it cost 60 ms each time
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        try:
            self.pool.cancel()
            deadline_s = time.monotonic() + LEAVE_S
            while self.pool.busy and time.monotonic() < deadline_s:
                self._collect()
        finally:
            self.pool.dismiss(self._node)

    def _open(self) -> None:
        """Asks the node, and holds the experiment against it and against what the store has under its name."""
        timeout_s = self.experiment.server.download_timeout_s + 60
        self.facts: NodeFacts = self._ask("facts", timeout_s=timeout_s)
        self.flag_names: list[str] = self._ask("flag_names")
        self.space.check_names(self.flag_names)
        self._check_experiment()
        self._keep_fingerprint()
        rows = self.store.rows(self.experiment.name)
        self._rows = [row for row in rows if self._is_own(row)]
        self._next_number = max((row.number for row in rows), default=-1) + 1

    def _is_own(self, row: TrialRow) -> bool:
        """Whether an earlier row of the study counts here."""
        return row.purpose not in ASIDE

    def _check_experiment(self) -> None:
        """Raises InputError for what vLLM's own word rules out."""

    def _collect(self) -> None:
        """Waits for the next work to end, and records it."""
        raise NotImplementedError

    def _drain(self) -> None:
        """Waits for all of it. Raises KeyboardInterrupt when asked to stop."""
        while self.pool.busy:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            self._collect()

    def _keep_fingerprint(self) -> None:
        """Rows of one study name must have measured the same thing.

        Raises:
            InputError: the name stands in this store with another model, workload, SLO, ...
        """
        now, name = self._fingerprint(), self.experiment.name
        before = self.store.study(name)
        if before is not None and self.store.rows(name):  # one without rows measured nothing
            old = before["fingerprint"]
            if changed := [_changes(key, old.get(key), now[key]) for key in now if old.get(key) != now[key]]:
                raise InputError(
                    f"name: {name!r}: {self.experiment.results} holds a study of that name with another "
                    f"{', another '.join(changed)}: their rows cannot be compared. "
                    "Give this experiment another `name`, or other `results`."
                )
        kept = {} if self.searches or before is None else before
        told = {"fingerprint": now, "experiment": json.loads(self.experiment.model_dump_json())}
        self.store.save_study(name, {**kept, **told})

    def _fingerprint(self) -> dict[str, Any]:
        e, facts = self.experiment, self.facts
        return {
            "model": e.model,
            "model_revision": facts.model_revision,
            "gpu": self.pool.slots.gpu,
            "engine": e.engine,
            "engine_version": facts.engine_version,
            "server.env": dict(e.server.env),
            "serve": dict(e.serve),
            "baseline": dict(e.baseline),
            "workload": self._workload,
            "slo": dict(e.slo),
            "objective": [json.loads(o.model_dump_json()) for o in e.objectives],
            **({"simulation": json.loads(e.simulation.model_dump_json())} if self.simulated else {}),
        }

    def _check(self, config: ServingConfig) -> Checked:
        """Asks for vLLM's own word on a configuration, before a GPU is touched."""
        checked: Checked = self._ask("check", config.argv(), self.experiment.workload.endpoint)
        return checked

    def _ask(self, method: str, *args: Any, timeout_s: float = ANSWER_S) -> Any:
        """Asks the node; one that died with its worker is replaced, once."""
        try:
            return self.pool.call(self._node, method, *args, timeout_s=timeout_s, stopping=self._stopping)
        except LostServiceError:
            self._node = self._placed_node()
            return self.pool.call(self._node, method, *args, timeout_s=timeout_s, stopping=self._stopping)

    def _placed_node(self) -> Any:
        e = self.experiment
        return self.pool.service(self._make_node, e.server, e.model, e.revision)

    def _task(self, job: Job, *, live: bool = False) -> TrialTask:
        """What the worker needs for a job's server."""
        return TrialTask(
            label=f"{job.number:05d}-{job.arm or job.purpose}",
            experiment=self.experiment,
            config=job.proposal.config,
            revision=None if is_local(self.experiment.model) else self.facts.model_revision,
            resolved=job.checked.resolved,
            endpoint=job.checked.endpoint,
            log_dir=str(self._log_dir()),
            num_gpus=job.proposal.config.num_gpus if self.pool.slots.on_gpu else 0,
            live=live,
        )

    def _submit(self, job: Job, work: Callable[[TrialTask, threading.Event], Any], task: TrialTask, text: str) -> None:
        """Has a worker do it."""
        self._jobs[job.key] = (job, time.monotonic())
        self.pool.submit(job.key, work, task, job.proposal.config.num_gpus)
        self.pool.prepare()
        self._emit(Event("start", text=text, number=job.number))

    def _number(self) -> int:
        number = self._next_number
        self._next_number += 1
        return number

    def _attempts(self, config: ServingConfig) -> int:
        key = config.hash
        running = sum(job.proposal.config.hash == key for job, _ in self._jobs.values())
        return sum(row.config_hash == key for row in self._rows) + running

    def _log_dir(self) -> Path:
        return Path(self.experiment.results).resolve() / "logs" / self.experiment.name

    def _note(self, text: str) -> None:
        self._emit(Event("note", text=text))

    def _trial_key(self, job: Job) -> str:
        parts = {
            "model": self.experiment.model,
            "model_revision": self.facts.model_revision,
            "gpu": self.pool.slots.gpu,
            "engine": self.experiment.engine,
            "engine_version": self.facts.engine_version,
            "env": dict(self.experiment.server.env),
            "config": job.proposal.config.hash,
            "workload": self._workload if job.workload is None else identity(job.workload),
            "live": job.live,
            "measurement_version": MEASUREMENT_VERSION,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _trial_id(self, job: Job) -> str:
        parts = f"{self._trial_key(job)}:{self.experiment.name}:{job.purpose}:{job.attempt}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def _measured_row(self, job: Job, finished: Finished, wall_s: float) -> tuple[TrialRow, Outcome | None]:
        """A trial's row from its outcome, or from the loss of its worker."""
        if finished.lost is not None:
            kind = "worker_lost"
            row = self._row(
                job, state="failed", failure_kind=kind, failure_detail=finished.lost, failure_hint=HINTS[kind]
            )
            return row, None
        outcome: Outcome = finished.result
        columns = outcome_columns(outcome, self.experiment)
        columns["overhead_s"] = max(0.0, wall_s - _staged_s(outcome.times))
        return self._row(job, **columns), outcome

    def _series_rows(
        self, job: Job, series: Series, wall_s: float, main: int | None = None
    ) -> list[tuple[TrialRow, Done]]:
        """A row for each measurement of one server start; the first one bears what none of its stages holds.

        Args:
            job: the start's.
            series: what came of it.
            wall_s: of the start.
            main: the measurement that answers the job; the others are points of a capacity. None: all answer it.
        """
        server_id = self._server_id(job)
        found: list[tuple[TrialRow, Done]] = []
        kept = series.kept()
        over_s = max(0.0, wall_s - sum(_staged_s(one.outcome.times) for one in kept))
        for index, one in enumerate(kept):
            step, outcome = one.step, one.outcome
            part = replace(
                job,
                proposal=replace(job.proposal, config=step.config),
                number=job.number if index == (main or 0) else self._number(),
                purpose=job.purpose if main in (None, index) else "capacity",
                workload=step.workload,
                live=outcome.live,
                server_id=server_id,
            )
            part = replace(part, attempt=self._measured_before(part, [row for row, _ in found]))
            columns = outcome_columns(outcome, self.experiment.model_copy(update={"workload": step.workload}))
            columns["overhead_s"] = 0.0 if index else over_s
            found.append((self._row(part, **columns), one))
        return found

    def _server_id(self, job: Job) -> str:
        """Of a start of several measurements."""
        return hashlib.sha256(f"{self._trial_id(job)}:{job.number}".encode()).hexdigest()[:16]

    def _measured_before(self, job: Job, beside: Sequence[TrialRow] = ()) -> int:
        """How often the same was measured for the same purpose, by the store and rows that are not in it yet."""
        key, stored = self._trial_key(job), self.store.rows(self.experiment.name)
        return sum(row.trial_key == key and row.purpose == job.purpose for row in (*stored, *beside))

    def _warnings(self, config: ServingConfig, found: Sequence[str]) -> list[str]:
        """Those of a measurement, and what is to be said of it because of how it was made."""
        acceptance = self.experiment.simulation.acceptance
        said = unreal_acceptance(config.flags, simulated=self.simulated, acceptance=acceptance)
        named = unmodelled(config.flags) if self.simulated else []
        text = f"without effect in a simulated engine: {', '.join(named)}"
        kept = [text for text in found if not (self.simulated and text.startswith(UNCHECKED))]
        return [*kept, *([said] if said else []), *([text] if named else [])]

    def _row(self, job: Job, **columns: Any) -> TrialRow:
        e, config = self.experiment, job.proposal.config
        workload = e.workload if job.workload is None else job.workload
        trial_id = self._trial_id(job)
        fixed: dict[str, Any] = {
            "trial_id": trial_id,
            "trial_key": self._trial_key(job),
            "study": e.name,
            "number": job.number,
            "server_id": job.server_id or trial_id[:16],
            "purpose": job.purpose,
            "arm": job.arm,
            "attempt": job.attempt,
            "config_json": json.dumps(dict(config.flags), sort_keys=True),
            "config_hash": config.hash,
            "params_json": json.dumps(job.proposal.params, sort_keys=True),
            "flags": {name: json.dumps(flag, sort_keys=True) for name, flag in config.flags.items()},
            "command": config.command(server_python(e), e.server.env),
            "env_json": json.dumps(dict(e.server.env), sort_keys=True),
            "resolved_json": json.dumps(job.checked.resolved, sort_keys=True) if job.checked.resolved else None,
            "model": e.model,
            "model_revision": self.facts.model_revision,
            "engine": e.engine,
            "engine_version": self.facts.engine_version,
            "simulated": self.simulated,
            "workload_json": workload.model_dump_json(),
            "profile": workload.name,
            "rate_rps": workload.mean_rps and float(workload.mean_rps),
            "duration_s": float(workload.duration_s),
            "seed": workload.seed,
            "started_at": datetime.datetime.now(datetime.UTC),
            "gpu_name": self.facts.gpu_name,
            "gpu_count": config.num_gpus if self.pool.slots.on_gpu else 0,
            "audited_rule": job.audited_rule,
            "measured_live": job.live,
        }
        if columns.get("num_requests") is not None:
            columns["warnings"] = self._warnings(config, columns.get("warnings", ()))
        return TrialRow(**(fixed | {key: new for key, new in columns.items() if new is not None}))


class SeriesStarts(Starts):
    """Several measurements of each start, for a purpose of their own.

    Args:
        run: what measures a series; the others are those of `Starts`.
    """

    purpose: ClassVar[Purpose]

    def __init__(
        self, experiment: Experiment, space: Space, store: Store, pool: Workers, on_event: Callable[[Event], None],
        stopping: threading.Event, node: Callable[..., Any], run: Work,
    ) -> None:  # fmt: skip
        super().__init__(experiment, space, store, pool, on_event, stopping, node)
        self._run = run

    def _is_own(self, row: TrialRow) -> bool:
        return row.purpose == self.purpose

    def _collect(self) -> None:
        for finished in self.pool.finished(POLL_S):
            job, submitted_s = self._jobs.pop(finished.key)
            self._take(job, finished, time.monotonic() - submitted_s)

    def _take(self, job: Job, finished: Finished, wall_s: float) -> None:
        """Records a start's rows: disk first."""
        raise NotImplementedError


def outcome_columns(outcome: Outcome, experiment: Experiment) -> dict[str, Any]:
    """The columns of a row that one server start decides: state, stage times, metrics, constraints."""
    facts, times, kind = outcome.facts, outcome.times, outcome.failure_kind
    columns: dict[str, Any] = {
        "state": outcome.state,
        "failure_kind": kind,
        "failure_detail": outcome.failure_detail,
        "failure_hint": HINTS[kind] if kind else None,
        "started_at": outcome.started_at,
        "host": outcome.host.host,
        "gpu_name": outcome.host.gpu_name,
        "driver_version": outcome.host.driver_version,
        "resolved_json": json.dumps(facts.resolved, sort_keys=True) if facts.resolved else None,
        "engine_version": facts.engine_version,
        "kv_cache_tokens": facts.kv_cache_tokens,
        "compile_s": facts.compile_s,
        "compile_cache_hit": facts.compile_cache_hit,
        "fetch_s": times.fetch_s,
        "cooldown_s": times.cooldown_s,
        "server_start_s": times.server_start_s,
        "warmup_s": times.warmup_s,
        "load_s": times.load_s,
        "drain_s": times.drain_s,
        "stop_s": times.stop_s,
        "log_path": outcome.log_path,
    }
    if outcome.load is not None and outcome.load.duration_s > 0:
        columns |= summarise(outcome.load, experiment.slo, outcome.samples, arrival=experiment.workload.arrives.kind)
        if outcome.state == "complete":
            columns |= constraints_of(outcome.load, experiment.slo)
        if outcome.state == "stopped":
            columns |= _stopped_columns(outcome, experiment)
    return columns


def _stopped_columns(outcome: Outcome, experiment: Experiment) -> dict[str, Any]:
    """What a load that was cut short may say: no figure of it is ranked."""
    assert outcome.load is not None
    stop = outcome.early_stop
    if stop is None:
        return {"valid": False, "invalid_reasons": [cut_short(outcome.load, experiment.workload.duration_s)]}
    least = {**dict.fromkeys(experiment.slo, 0.0), **stop.bounds}
    known = {"constraints": least, "slo_met": False} if stop.kind == "slo" else {}
    return {"valid": False, "invalid_reasons": [stop.text], "stopped_early": stop.text, **known}


def _changes(key: str, old: Any, new: Any) -> str:
    """`workload (rate_rps 6 -> 7)`: what differs between two values of a fingerprint."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{key} ({json.dumps(old)} -> {json.dumps(new)})"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return f"{key} ({', '.join(f'{n} {json.dumps(old.get(n))} -> {json.dumps(new.get(n))}' for n in names)})"


def _staged_s(times: StageTimes) -> float:
    started_s = times.fetch_s + times.cooldown_s + times.server_start_s
    return started_s + times.warmup_s + times.load_s + times.drain_s + times.stop_s
