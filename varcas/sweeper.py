"""The main job: plan, propose, prune, run, record, confirm, recommend. One driver, which owns study and store."""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from varcas.engine.failures import HINTS, RETRIED
from varcas.engine.fetch import check_local_model, is_local, weights_problem
from varcas.engine.node import Checked, Node, NodeFacts
from varcas.engine.validation import refusal
from varcas.errors import InputError, VarcasError
from varcas.experiment import Experiment, Hardware
from varcas.export import write_scripts
from varcas.inprocess import InProcessPool
from varcas.measurement import cut_short
from varcas.metrics import constraints_of, summarise
from varcas.order import NUM_ORDERED, Order, first_proposals
from varcas.pool import Finished, LostServiceError, Pool, Workers, in_ray_job
from varcas.pruner import NEEDS_MORE_GPUS, VLLM_REFUSES, Pruner, gpu_at_best, is_pruned, reason_columns, site_of
from varcas.records import MEASUREMENT_VERSION, Outcome, Purpose, StageTimes, TrialRow
from varcas.report import (
    Recommendation,
    confirmations,
    described,
    find,
    recommend,
    unreal_acceptance,
)
from varcas.rules import Site
from varcas.simulated import Simulator, unmodelled
from varcas.space import ServingConfig, Space, server_python
from varcas.store import Store
from varcas.study import Proposal, Study, make_sampler, open_study
from varcas.trial import TrialTask, run_trial
from varcas.validity import UNCHECKED
from varcas.workload.schedule import check_workload, identity

POLL_S = 0.25
ANSWER_S = 300.0
"""For vLLM's word on a configuration: its import on a cold, slow disk included."""
LEAVE_S = 2.5
"""For running trials to end when asked: Ray kills a stopped job 3 s after its SIGTERM."""
MAX_FINALISTS = 3
"""Winners that fail a confirmation start by their own fault are replaced by the next best, so many at most."""
GUESSED_START_S = {"cpu": 60.0, "gpu": 120.0}
"""Start of a server before any was measured (research/orchestration.md), for the plan and the budget's reserve."""
HOPELESS = frozenset({"bad_model_files", "missing_dependency", "model_download"})
"""Failures of the baseline that no flag changes: a sweep ends with them, and tries the baseline again when resumed."""
MAX_LISTED = 10_000
"""Larger spaces are not listed to see how much of them is left, unless the rules listed them already."""
NOT_ASKED = Checked(ok=True)
"""Of a configuration that was ruled out before vLLM was asked."""
TOO_LATE = ". The search had ended by then: raise `study.trials` to try what that rule had ruled out"
SIMULATED_S = 1.0
"""Of a simulated start with its load, at most; for the plan."""
STOP_S = 3.0
"""Of a server, its load and the wait for its memory, as measured; for the plan."""

Run = Callable[[TrialTask, threading.Event], Outcome]


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

    @property
    def key(self) -> str:
        """Names it in the pool."""
        return f"{self.number}"


def sweep(
    experiment: Experiment,
    *,
    address: str | None = None,
    budget_s: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    stopping: threading.Event | None = None,
    run: Run = run_trial,
    node: Callable[..., Any] = Node,
    pool: Callable[[Hardware], Workers] | None = None,
    **ray_options: Any,
) -> Recommendation:
    """Searches the experiment's space on real servers and returns what to deploy; resumes where it was stopped.

    Args:
        experiment: what to search (`load_experiment`).
        address: of a Ray cluster; None starts a local Ray, or joins the cluster of the Ray job this runs in.
        budget_s: wall seconds to spend at most, confirmation included.
        on_event: told of the plan, of each start and each row.
        stopping: set it to end early: running servers are stopped, everything measured so far is kept.
        run: what measures one configuration, `trial.run_trial` unless a benchmark measures varcas itself.
        node: what answers for a worker node, likewise.
        pool: where trials run in place of Ray; the simulated engine takes `inprocess.InProcessPool`.
        ray_options: further arguments of `ray.init` for a local Ray.

    Raises:
        InputError: the experiment cannot be run as asked here; nothing was started.
        VarcasError: the work failed.
    """
    space = check(experiment)
    with (
        located(experiment),
        Store(experiment.results) as store,
        _pool(experiment, address, pool, ray_options) as workers,
    ):
        simulator = simulator_of(experiment, store) if experiment.engine == "simulated" else None
        if simulator is not None:
            run, node = simulator.run, simulator.node
            on_event(Event("note", text=_simulated_note(experiment, simulator)))
        stop = stopping or threading.Event()
        sweeper = Sweeper(experiment, space, store, workers, budget_s, on_event, stop, run, node)
        with sweeper:
            sweeper.search()
            sweeper.confirm()
            return sweeper.answer()


def _pool(
    experiment: Experiment,
    address: str | None,
    make: Callable[[Hardware], Workers] | None,
    ray_options: Mapping[str, Any],
) -> contextlib.AbstractContextManager[Workers]:
    if experiment.engine == "simulated" or make is not None:
        return contextlib.nullcontext((make or InProcessPool)(experiment.hardware))
    return Pool(experiment.hardware, address, **ray_options)


def simulator_of(experiment: Experiment, store: Store) -> Simulator:
    """What simulates an experiment, calibrated by the real measurements of its store and of those that it names.

    Raises:
        InputError: it cannot be simulated, or a directory that it names holds no results.
    """
    stores = [store, *(Store(path, readonly=True) for path in experiment.simulation.calibrate_from)]
    owner = {row.trial_id: held for held in stores for row in held.rows()}
    rows = {row.trial_id: row for held in stores for row in held.rows()}
    return Simulator.of(experiment, rows.values(), lambda trial_id: owner[trial_id].requests(trial_id))


def _simulated_note(experiment: Experiment, simulator: Simulator) -> str:
    flags = {**experiment.serve, **experiment.baseline}
    named = unmodelled({*flags, *experiment.space})
    said = f"; without effect here: {', '.join(named)}" if named else ""
    return (
        f"SIMULATED: no server is started. vLLM {simulator.version} on {simulator.gpu.name}; step times of the "
        f"baseline from {simulator.basis(flags)}{said}"
    )


def check(experiment: Experiment) -> Space:
    """Checks what needs neither Ray nor vLLM, and returns the space.

    Raises:
        InputError: with file, line, key and fix.
    """
    with located(experiment):
        space = Space(experiment)
        check_paths(experiment)
        check_local_model(experiment.model)
        check_workload(experiment.workload, experiment.serve)
        make_sampler(experiment, space)
    return space


@contextlib.contextmanager
def located(experiment: Experiment) -> Iterator[None]:
    """Gives file and line to what is said about a key of the experiment."""
    try:
        yield
    except InputError as error:
        raise InputError(experiment.located(str(error))) from error


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


class Sweeper:
    """One study's run. `search`, `confirm` and `answer` are called in that order."""

    def __init__(
        self,
        experiment: Experiment,
        space: Space,
        store: Store,
        pool: Workers,
        budget_s: float | None,
        on_event: Callable[[Event], None],
        stopping: threading.Event,
        run: Run,
        node: Callable[..., Any],
    ) -> None:
        self.experiment, self.space, self.store, self.pool = experiment, space, store, pool
        self._make_node, self._simulated = node, experiment.engine == "simulated"
        self._workload = identity(experiment.workload)
        self._emit, self._stopping, self._run = on_event, stopping, run
        self._deadline_s = None if budget_s is None else time.monotonic() + budget_s
        self._budget_s = budget_s
        self._jobs: dict[str, tuple[Job, float]] = {}  # and when it was submitted
        self._held: Job | None = None
        self.ended: str | None = None
        self.ruled_out: str | None = None

    def __enter__(self) -> Sweeper:
        """Asks the node what it has, checks the experiment against it, and opens the study."""
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
            self.study.close()

    def _open(self) -> None:
        experiment = self.experiment
        timeout_s = experiment.server.download_timeout_s + 60
        self.facts: NodeFacts = self._ask("facts", timeout_s=timeout_s)
        self.space.check_names(self._ask("flag_names"))
        self._check_baseline()
        self._keep_fingerprint()
        self._rows = self.store.rows(experiment.name)
        self._next_number = max((row.number for row in self._rows), default=-1) + 1
        site = self._site()
        self.pruner = Pruner(experiment, self.space, site, self._rows)
        for text in self.pruner.disabled.values():
            self._note(text)
        storage = experiment.study.storage or f"journal:{Path(experiment.results) / 'study.log'}"
        past = [row for row in self._rows if not _is_hopeless(row)]
        order = self._ordered(site)
        first = order.first if order is not None else ()
        self.study: Study = open_study(experiment, self.space, storage, past=past, pruner=self.pruner, first=first)
        if order is not None and (count := self.study.num_ordered):
            self._note(f"the first {count} proposals of the search follow the roofline's estimates ({order.basis})")

    def _ordered(self, site: Site) -> Order | None:
        """What the estimates put first; None once the search is under way."""
        if sum(row.purpose == "search" for row in self._rows) >= NUM_ORDERED:
            return None
        return first_proposals(self.experiment, self.space, site, self.pruner, self.store.rows())

    def _site(self) -> Site:
        """What the rules know: the node's GPU, or the best that goes by its name where there are several nodes."""
        slots = self.pool.slots
        gpu = gpu_at_best(slots.gpu, self.facts if slots.num_nodes == 1 else None) if slots.on_gpu else None
        most = min(slots.num_gpus, slots.gpus_per_node) if slots.on_gpu else None
        return site_of(self.experiment, self.facts, gpu, on_cpu=not slots.on_gpu, gpus_per_node=most)

    def _check_baseline(self) -> None:
        """The configuration to beat must be one that vLLM takes.

        Raises:
            InputError: in vLLM's words, with the flag's place in the file.
        """
        config = self.space.config(self.experiment.baseline)
        checked = self._check(config)
        if not checked.ok:
            said = refusal(self.experiment, checked, self.facts.engine_version, config.flags, "baseline")
            raise InputError(f"{said}; `varcas validate` asks it without starting anything.")

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
        self.store.save_study(name, {"fingerprint": now, "experiment": json.loads(self.experiment.model_dump_json())})

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
            **({"simulation": json.loads(e.simulation.model_dump_json())} if self._simulated else {}),
        }

    # search

    def search(self) -> None:
        """Runs the study until its budget, its space or its luck is spent.

        Raises:
            VarcasError: the baseline fails for a reason that every configuration shares.
        """
        known = len(self._rows)
        if self._nothing_to_try():
            return
        self._emit(Event("plan", plan=self._opening_plan()))
        self._note_baseline()
        while not self._stopping.is_set():
            while not self._stopping.is_set() and (job := self._next_job()):
                self._start(job)
            if not self.pool.busy:
                break
            self._collect()
            self._check_hope(self._rows[known:])
        self.ended = self.study.ended or ("interrupted" if self._stopping.is_set() else self.ended)
        if self._stopping.is_set():
            raise KeyboardInterrupt

    def _nothing_to_try(self) -> bool:
        """Whether the rules rule out everything, so that nothing is to be started; not against what was measured."""
        if any(row.state == "complete" for row in self._rows):
            return False
        self.ruled_out = self.pruner.nothing_left()
        if self.ruled_out is None:
            return False
        self.ended = "every configuration is ruled out"
        self._note(self.ruled_out)
        return True

    def _note_baseline(self) -> None:
        baseline = self.space.config(self.experiment.baseline)
        refusal = self.pruner.says(baseline)
        if refusal is not None and self.study.answered(baseline.hash) is None:
            self._note(
                f"rule {refusal.rule} says that the baseline cannot work: {refusal.message} [{refusal.source}]. "
                "It is started all the same; if it works, that rule is wrong, and off for this study"
            )

    def _check_hope(self, rows: Sequence[TrialRow]) -> None:
        row = next((row for row in rows if _is_hopeless(row)), None)
        if row is None or any(row.state == "complete" for row in self._rows):
            return
        hint = weights_problem(self.experiment.model, json.loads(row.config_json)) or row.failure_hint
        raise VarcasError(
            f"trial {row.number} (baseline): {row.failure_kind}: {row.failure_detail}. No flag of the space changes "
            f"that: the sweep ends. Fix: {hint}; then run it again. Log: {row.log_path or 'none'}"
        )

    def _next_job(self) -> Job | None:
        """The next configuration to start, None when there is no room, no time or nothing left."""
        job, self._held = self._held, None
        while job is None:
            if self._out_of_time():
                self.ended = "time budget spent"
                return None
            if not self.pool.has_room(1):
                return None
            early = self._audit() if 3 * self.study.spent >= self.experiment.study.trials else None
            proposal = early or self.study.propose() or self._audit()
            if proposal is None:
                return None
            if self._rule_out(proposal):
                continue
            checked = self._check(proposal.config)
            if self._answer_without_start(proposal, checked):
                continue
            job = replace(self._job(proposal, checked), attempt=self._attempts(proposal.config))
        if self.pool.has_room(job.proposal.config.num_gpus):
            return job
        self._held = job
        return None

    def _audit(self) -> Proposal | None:
        """A configuration that is ruled out, to be started all the same, from a third of the search on.

        So what a rule found wrong had ruled out can still be proposed.
        """
        found = self.pruner.next_audit()
        if found is None:
            return None
        config, params = found
        return Proposal(None, params, self.space.over_serve(config), config, "audit")

    def _job(self, proposal: Proposal, checked: Checked) -> Job:
        """A job with the next number; one that tests a rule names it."""
        tests = proposal.purpose in ("audit", "baseline")
        refusal = self.pruner.says(proposal.config) if tests else None
        rule = None if refusal is None else refusal.rule
        return Job(proposal, self._number(), proposal.purpose, checked, audited_rule=rule)

    def _rule_out(self, proposal: Proposal) -> bool:
        """Records what the rules rule out: it costs no GPU time, and vLLM is not asked."""
        refusal = None if proposal.purpose == "audit" else self.pruner.verdict(proposal.config)
        if refusal is None:
            return False
        row = self._row(self._job(proposal, NOT_ASKED), state="infeasible", **reason_columns(refusal))
        self._record(row, proposal)
        return True

    def _answer_without_start(self, proposal: Proposal, checked: Checked) -> bool:
        """Records what needs no GPU: a configuration that vLLM refuses, or that needs more GPUs than a node has."""
        config, slots = proposal.config, self.pool.slots
        refused, rule = (None if checked.ok else checked.error), VLLM_REFUSES
        most = min(slots.num_gpus, slots.gpus_per_node)
        if not refused and slots.on_gpu and config.num_gpus > most:
            refused = f"needs {config.num_gpus} GPUs on one node, the experiment may use {most}"
            rule = NEEDS_MORE_GPUS
        if not refused:
            return False
        row = self._row(
            self._job(proposal, checked),
            state="infeasible",
            failure_kind="unsupported_by_engine",
            failure_detail=refused,
            failure_hint=HINTS["unsupported_by_engine"],
            reason_rule=rule,
        )
        self._record(row, proposal)
        return True

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

    def _start(self, job: Job) -> None:
        task = TrialTask(
            label=f"{job.number:05d}-{job.arm or job.purpose}",
            experiment=self.experiment,
            config=job.proposal.config,
            revision=None if is_local(self.experiment.model) else self.facts.model_revision,
            resolved=job.checked.resolved,
            endpoint=job.checked.endpoint,
            log_dir=str(self._log_dir()),
            num_gpus=job.proposal.config.num_gpus if self.pool.slots.on_gpu else 0,
        )
        self._jobs[job.key] = (job, time.monotonic())
        self.pool.submit(job.key, self._run, task, job.proposal.config.num_gpus)
        self.pool.prepare()
        self._emit(Event("start", text=_described(job), number=job.number))

    def _collect(self) -> None:
        """Waits for the next trial to end, and records it: disk first, then Optuna."""
        for finished in self.pool.finished(POLL_S):
            job, submitted_s = self._jobs.pop(finished.key)
            row, outcome = self._measured_row(job, finished, time.monotonic() - submitted_s)
            self._record(row, job.proposal if job.purpose != "confirm" else None, outcome)

    def _record(self, row: TrialRow, proposal: Proposal | None, outcome: Outcome | None = None) -> None:
        load = outcome.load if outcome else None
        wrong = self.pruner.heard(row)
        if wrong:
            wrong = [f"{text}{TOO_LATE}" for text in wrong] if self._search_spent() else wrong
            row = row.model_copy(update={"warnings": [*row.warnings, *wrong]})
        self.store.append(row, load.records if load else (), outcome.samples if outcome else ())
        self._rows.append(row)
        if wrong:
            self._switch_off(wrong)
        if proposal is not None:
            self.study.tell(proposal, row, retry=row.failure_kind in RETRIED and row.state != "infeasible")
        self._emit(Event("row", row=row))

    def _search_spent(self) -> bool:
        return self.study.spent >= self.experiment.study.trials

    def _switch_off(self, wrong: Sequence[str]) -> None:
        """Says loudly which rules are wrong, and opens again what they ruled out."""
        for text in wrong:
            self._note(text)
        self.study.reopen([row for row in self._rows if is_pruned(row) and not self.pruner.stands(row)])

    # confirm

    def confirm(self) -> None:
        """Starts baseline and winner afresh, interleaved; the gain comes from these starts alone."""
        if len(self.experiment.objectives) > 1 or self.experiment.study.repeats == 0:
            return
        for _ in range(MAX_FINALISTS):
            pair = self._finalists()
            if pair is None or not self._confirm_pair(*pair):
                return

    def _finalists(self) -> tuple[TrialRow, TrialRow] | None:
        found = find(self._rows, self.experiment)
        if found.baseline is None or found.winner is None or found.baseline.state != "complete":
            return None
        if found.baseline.config_hash == found.winner.config_hash:
            return None
        return found.baseline, found.winner

    def _confirm_pair(self, baseline: TrialRow, winner: TrialRow) -> bool:
        """Runs the missing starts of both arms; True when the winner failed and another must be confirmed."""
        queue = self._missing(baseline, winner)
        if queue:
            text = f"confirming trial {winner.number} against the baseline, {self.experiment.study.repeats} starts each"
            self._emit(Event("confirm", text=text, total=len(queue)))
        while queue or self.pool.busy:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            while queue and not self._out_of_time(reserve=False) and self.pool.has_room(queue[0][1].gpu_count or 1):
                self._start(self._confirm_job(*queue.pop(0)))
            self._collect()
            if not self.pool.busy and self._out_of_time(reserve=False):
                self.ended = self.ended or "time budget spent"
                return False
            best = find(self._rows, self.experiment).winner
            if best is None or best.config_hash != winner.config_hash:
                return best is not None
            queue = queue or self._retries(baseline, winner)
        return False

    def _missing(self, baseline: TrialRow, winner: TrialRow) -> list[tuple[str, TrialRow]]:
        """Starts still to make, in the order B W W B B W ..., so that drift hits both arms alike."""
        repeats = self.experiment.study.repeats
        have = {
            arm: sum(row.valid is not False for row in confirmations(self._rows, arm, row.config_hash))
            for arm, row in (("baseline", baseline), ("candidate", winner))
        }
        rows = {"baseline": baseline, "candidate": winner}
        order = [
            arm
            for i in range(repeats)
            for arm in (("baseline", "candidate") if i % 2 == 0 else ("candidate", "baseline"))
        ]
        for arm, done in have.items():
            for _ in range(done):
                if arm in order:
                    order.remove(arm)
        return [(arm, rows[arm]) for arm in order]

    def _retries(self, baseline: TrialRow, winner: TrialRow) -> list[tuple[str, TrialRow]]:
        """Starts that were lost or not to be believed, through no fault of the configuration: `max_retries` of them."""
        if self.pool.busy:
            return []
        again = sum(row.failure_kind in RETRIED or row.valid is False for row in self._rows if row.purpose == "confirm")
        return self._missing(baseline, winner) if again <= self.experiment.study.max_retries else []

    def _confirm_job(self, arm: str, row: TrialRow) -> Job:
        flags = json.loads(row.config_json)
        config = ServingConfig(self.experiment.model, self.experiment.revision, flags)
        proposal = Proposal(
            number=row.number, params=json.loads(row.params_json), flags=flags, config=config, purpose="confirm"
        )
        return Job(proposal, self._number(), "confirm", self._check(config), arm, self._attempts(config))

    # answer

    def answer(self) -> Recommendation:
        """Writes the start scripts and returns the recommendation."""
        directory = Path(self.experiment.results) / "studies" / self.experiment.name
        script = write_scripts(self._rows, self.experiment, directory)
        saved = self.store.study(self.experiment.name) or {}
        self.store.save_study(self.experiment.name, {**saved, "ended": self.ended, "ruled_out": self.ruled_out})
        found = recommend(self._rows, self.experiment, script=script, ended=self.ended, ruled_out=self.ruled_out)
        unsaid = [t for t in self.pruner.disabled.values() if not any(w.startswith(t) for w in found.warnings)]
        return found.model_copy(update={"warnings": [*unsaid, *found.warnings]}) if unsaid else found

    # pieces

    def plan(self) -> Plan:
        """What is about to be spent, from the start times that this study's store has seen."""
        workload, study = self.experiment.workload, self.experiment.study
        measured = [row.server_start_s for row in self._rows if row.server_start_s and row.state == "complete"]
        guess = 0.0 if self._simulated else GUESSED_START_S["gpu" if self.pool.slots.on_gpu else "cpu"]
        load_s = workload.warmup_s + workload.duration_s + workload.max_drain_s + STOP_S
        size, survey = self.space.size(), self.pruner.survey()
        may_work = size if survey is None else len(survey.left)
        searches = study.trials if may_work is None else min(study.trials, may_work + 1)
        done = self.study.spent
        return Plan(
            study=self.experiment.name,
            space_size=size,
            search_starts=searches,
            search_done=done,
            search_left=max(0, searches - done),
            confirm_starts=2 * study.repeats if len(self.experiment.objectives) == 1 else 0,
            start_s=statistics.median(measured) if measured else guess,
            load_s=SIMULATED_S if self._simulated else load_s,
            budget_s=self._budget_s,
            width=self.pool.slots.num_gpus,
            ruled_out=survey.by_rule if survey is not None else {},
            audit_starts=self.pruner.audits_left,
        )

    def _opening_plan(self) -> Plan:
        """The plan as far as the rows in the store tell what is left of it."""
        plan, left = self.plan(), self._search_left()
        pair = None if left else self._finalists()
        confirm = plan.confirm_starts if left else len(self._missing(*pair)) if pair and plan.confirm_starts else 0
        return replace(plan, search_starts=plan.search_done + left, search_left=left, confirm_starts=confirm)

    def _search_left(self) -> int:
        """Starts that the search may still make."""
        e, size, survey = self.experiment, self.space.size(), self.pruner.survey()
        left = max(0, e.study.trials - self.study.spent)
        if survey is None and (size is None or size > MAX_LISTED):
            return left
        named = [self.space.config(flags) for flags in (e.baseline, *e.study.enqueue)]
        listed = survey.left if survey is not None else [config.hash for config in self.space.configs()]
        hashes = {*(config.hash for config in named if self.pruner.verdict(config) is None), *listed}
        return min(left, sum(self.study.answered(key) is None for key in hashes))

    def _out_of_time(self, reserve: bool = True) -> bool:
        """Whether one more search start would eat what confirmation needs."""
        if self._deadline_s is None:
            return False
        plan = self.plan()
        one_s = plan.start_s + plan.load_s
        need_s = one_s + (plan.confirm_starts * one_s / plan.width if reserve else 0.0)
        return time.monotonic() + need_s > self._deadline_s

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

    def _trial_key(self, config: ServingConfig) -> str:
        identity = {
            "model": self.experiment.model,
            "model_revision": self.facts.model_revision,
            "gpu": self.pool.slots.gpu,
            "engine": self.experiment.engine,
            "engine_version": self.facts.engine_version,
            "env": dict(self.experiment.server.env),
            "config": config.hash,
            "workload": self._workload,
            "live": False,
            "measurement_version": MEASUREMENT_VERSION,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _trial_id(self, job: Job) -> str:
        parts = f"{self._trial_key(job.proposal.config)}:{self.experiment.name}:{job.purpose}:{job.attempt}"
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
        found = [text for text in columns.get("warnings", []) if not (self._simulated and text.startswith(UNCHECKED))]
        columns["warnings"] = [*found, *self._own_warnings(job.proposal.config)]
        return self._row(job, **columns), outcome

    def _own_warnings(self, config: ServingConfig) -> list[str]:
        """What is to be said of a measurement because of how it was made."""
        acceptance = self.experiment.simulation.acceptance
        said = unreal_acceptance(config.flags, simulated=self._simulated, acceptance=acceptance)
        named = unmodelled(config.flags) if self._simulated else []
        text = f"without effect in a simulated engine: {', '.join(named)}"
        return [*([said] if said else []), *([text] if named else [])]

    def _row(self, job: Job, **columns: Any) -> TrialRow:
        e, config, workload = self.experiment, job.proposal.config, self.experiment.workload
        fixed: dict[str, Any] = {
            "trial_id": self._trial_id(job),
            "trial_key": self._trial_key(config),
            "study": e.name,
            "number": job.number,
            "server_id": self._trial_id(job)[:16],
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
            "simulated": self._simulated,
            "workload_json": workload.model_dump_json(),
            "profile": workload.name,
            "rate_rps": workload.mean_rps and float(workload.mean_rps),
            "duration_s": float(workload.duration_s),
            "seed": workload.seed,
            "started_at": datetime.datetime.now(datetime.UTC),
            "gpu_name": self.facts.gpu_name,
            "gpu_count": config.num_gpus if self.pool.slots.on_gpu else 0,
            "audited_rule": job.audited_rule,
        }
        return TrialRow(**(fixed | {key: new for key, new in columns.items() if new is not None}))


def _is_hopeless(row: TrialRow) -> bool:
    return row.purpose == "baseline" and row.failure_kind in HOPELESS


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
            columns |= {"valid": False, "invalid_reasons": [cut_short(outcome.load, experiment.workload.duration_s)]}
    return columns


def _changes(key: str, old: Any, new: Any) -> str:
    """`workload (rate_rps 6 -> 7)`: what differs between two values of a fingerprint."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{key} ({json.dumps(old)} -> {json.dumps(new)})"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return f"{key} ({', '.join(f'{n} {json.dumps(old.get(n))} -> {json.dumps(new.get(n))}' for n in names)})"


def _staged_s(times: StageTimes) -> float:
    started_s = times.fetch_s + times.cooldown_s + times.server_start_s
    return started_s + times.warmup_s + times.load_s + times.drain_s + times.stop_s


def _described(job: Job) -> str:
    what = described(job.purpose, job.arm, job.proposal.params, job.proposal.config.flags)
    return f"trial {job.number}: {what}"
