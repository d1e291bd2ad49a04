"""The main job: plan, propose, prune, run, record, confirm, recommend. One driver, which owns study and store."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from varcas import ablation
from varcas.budget import Budget, Purse
from varcas.capacity import Bisection, objective_columns, require_rate
from varcas.costs import StartCosts
from varcas.early_stop import StopRules
from varcas.engine.failures import HINTS, RETRIED
from varcas.engine.fetch import weights_problem
from varcas.engine.node import Checked, Node
from varcas.engine.validation import refusal
from varcas.errors import InputError, VarcasError
from varcas.experiment import Experiment, Hardware
from varcas.export import write_scripts
from varcas.gpus import gpu as catalogued
from varcas.gpus import variants
from varcas.inner import split
from varcas.inprocess import InProcessPool
from varcas.metrics import MIN_STARTS
from varcas.order import NUM_ORDERED, Order, first_proposals
from varcas.pool import Finished, Pool, Workers
from varcas.pruner import NEEDS_MORE_GPUS, VLLM_REFUSES, Pruner, gpu_at_best, is_pruned, reason_columns, site_of
from varcas.records import APART, Outcome, RequestRecord, Sample, TrialRow
from varcas.report import Recommendation, confirmations, described, find, recommend
from varcas.rules import Site
from varcas.sharing import Shared, num_rides, shared
from varcas.simulated import Simulator, unmodelled
from varcas.space import ServingConfig, Space
from varcas.starts import HOPELESS, POLL_S, Event, Job, Plan, Starts, check, opened
from varcas.store import Store
from varcas.study import Proposal, Study, open_study
from varcas.trial import Series, TrialTask, run_series, run_trial
from varcas.warm_start import best_elsewhere, copied, same_conditions

MAX_FINALISTS = 3
"""Winners that fail a confirmation start by their own fault are replaced by the next best, so many at most."""
GUESSED_START_S = {"cpu": 60.0, "gpu": 120.0}
"""Start of a server before any was measured (research/orchestration.md), for the plan and the budget's reserve."""
PROMISING = 1.03
"""A gain of 3 % that the usual starts leave open gets one more pair; benchmarks/false_winners.py has what that costs in
false winners and brings in true ones."""
MAX_LISTED = 10_000
"""Larger spaces are not listed to see how much of them is left, unless the rules listed them already."""
NOT_ASKED = Checked(ok=True)
"""Of a configuration that was ruled out before vLLM was asked."""
TOO_LATE = ". The search had ended by then: raise `study.trials` to try what that rule had ruled out"
SIMULATED_S = 1.0
"""Of a simulated start with its load, at most; for the plan."""
TYPICAL_LOADS = 8
"""Until a capacity is known, from a first rate that is off by a factor of four."""
STOP_S = 3.0
"""Of a server, its load and the wait for its memory, as measured; for the plan."""

Run = Callable[[TrialTask, threading.Event], Outcome]


def sweep(
    experiment: Experiment,
    *,
    address: str | None = None,
    budget: Budget | None = None,
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
        budget: wall time, GPU hours or money to spend at most, confirmation included.
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
    if any(objective.metric == "capacity_rps" for objective in experiment.objectives):
        require_rate(experiment)
    with opened(experiment, lambda: _pool(experiment, address, pool, ray_options)) as (store, workers):
        simulator = simulator_of(experiment, store) if experiment.engine == "simulated" else None
        if simulator is not None:
            run, node = simulator.run, simulator.node
            on_event(Event("note", text=_simulated_note(experiment, simulator)))
        stop = stopping or threading.Event()
        sweeper = Sweeper(experiment, space, store, workers, budget or Budget(), on_event, stop, run, node)
        with sweeper:
            sweeper.search()
            sweeper.confirm()
            sweeper.ablate()
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


class Sweeper(Starts):
    """One study's run. `search`, `confirm`, `ablate` and `answer` are called in that order."""

    searches = True

    def __init__(
        self,
        experiment: Experiment,
        space: Space,
        store: Store,
        pool: Workers,
        budget: Budget,
        on_event: Callable[[Event], None],
        stopping: threading.Event,
        run: Run,
        node: Callable[..., Any],
    ) -> None:
        super().__init__(experiment, space, store, pool, on_event, stopping, node)
        self._run = run
        self._purse = Purse(budget, _usd_per_gpu_h(pool.slots.gpu) if pool.slots.on_gpu else None)
        if self._purse.limits_gpus and not pool.slots.on_gpu:
            raise InputError("--budget: GPU hours and their price limit nothing here: the servers run on the CPU.")
        self._held: Job | None = None
        self._shared: dict[str, Shared] = {}  # by the key of its job
        self.ended: str | None = None
        self.ruled_out: str | None = None

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self.study.close()

    def _open(self) -> None:
        super()._open()
        experiment = self.experiment
        self._live = self._live_flags()
        self._adopt()
        site = self._site()
        self.pruner = Pruner(experiment, self.space, site, self._rows)
        for text in self.pruner.disabled.values():
            self._note(text)
        storage = experiment.study.storage or f"journal:{Path(experiment.results) / 'study.log'}"
        past = [row for row in self._rows if not _is_hopeless(row)]
        order = self._ordered(site)
        first = order.first if order is not None else ()
        expected = order.expected if order is not None else {}
        self.study: Study = open_study(
            experiment, self.space, storage, past=past, pruner=self.pruner, first=first, expected=expected
        )
        if order is not None and (count := self.study.num_ordered):
            self._note(f"the first {count} proposals of the search follow the estimates ({order.basis})")

    def _live_flags(self) -> Mapping[str, tuple[int, ...]]:
        """Flags of the space that a running server takes, with their values."""
        experiment = self.experiment
        if not experiment.study.live or self._by_capacity or self.simulated:
            return {}
        divided = split(experiment, self.flag_names)
        for flag, why in divided.why_not.items():
            self._note(f"each {flag} needs a server of its own: {why}")
        return divided.live

    def _adopt(self) -> None:
        """Copies what other studies measured under the same conditions: it counts, and says where it is from."""
        if not self.experiment.study.warm_start:
            return
        known = [row.config_hash for row in self._rows]
        found = same_conditions(self.store.rows(), self.experiment, self.space, self._key_of, answered=known)
        taken = 0
        for row, params in found:
            mine = copied(row, params, self.experiment, self._next_number, self._slo_of, self._requests_of)
            if mine is not None:
                self._next_number += 1
                self.store.append(mine, (), ())
                self._rows.append(mine)
                taken += 1
        if taken:
            self._note(f"{taken} configurations were measured under the same conditions in other studies: they count")

    def _key_of(self, config: ServingConfig) -> str:
        """`trial_key` of a fresh start of a configuration."""
        return self._trial_key(Job(Proposal(None, {}, {}, config, "search"), 0, "search", NOT_ASKED))

    def _slo_of(self, study: str) -> Mapping[str, float] | None:
        saved = self.store.study(study)
        return None if saved is None else saved["fingerprint"]["slo"]

    def _requests_of(self, trial_id: str) -> tuple[Sequence[RequestRecord], Sequence[Sample]]:
        return self.store.requests(trial_id), self.store.samples(trial_id)

    def _ordered(self, site: Site) -> Order | None:
        """What other conditions and the estimates put first, and what these expect."""
        order = first_proposals(self.experiment, self.space, site, self.pruner, self.store.rows())
        elsewhere = best_elsewhere(self.store.rows(), self.experiment, self.space) if self._may_seed() else []
        if not elsewhere:
            return order
        more = order.first if order is not None else ()
        first = {config.hash: config for config in (*elsewhere, *more) if self.pruner.verdict(config) is None}
        basis = "what was best under other conditions" + (f"; {order.basis}" if order is not None else "")
        return Order(tuple(first.values())[:NUM_ORDERED], basis, order.expected if order is not None else {})

    def _may_seed(self) -> bool:
        study = self.experiment.study
        return study.warm_start and study.order and study.sampler not in ("random", "grid")

    def _site(self) -> Site:
        """What the rules know: the node's GPU, or the best that goes by its name where there are several nodes."""
        slots = self.pool.slots
        gpu = gpu_at_best(slots.gpu, self.facts if slots.num_nodes == 1 else None) if slots.on_gpu else None
        most = min(slots.num_gpus, slots.gpus_per_node) if slots.on_gpu else None
        return site_of(self.experiment, self.facts, gpu, on_cpu=not slots.on_gpu, gpus_per_node=most)

    def _check_experiment(self) -> None:
        """The configuration to beat must be one that vLLM takes.

        Raises:
            InputError: in vLLM's words, with the flag's place in the file.
        """
        config = self.space.config(self.experiment.baseline)
        checked = self._check(config)
        if not checked.ok:
            said = refusal(self.experiment, checked, self.facts.engine_version, config.flags, "baseline")
            raise InputError(f"{said}; `varcas validate` asks it without starting anything.")

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
        self._note_ruled_out()
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

    def _note_ruled_out(self) -> None:
        """A row for each rule that rules something out, with one configuration: what knows them passes them by."""
        survey, known = self.pruner.survey(), {row.reason_rule for row in self._rows}
        for rule, params in survey.examples.items() if survey is not None else ():
            config = self.space.config(self.space.flags_of(params))
            refusal = self.pruner.verdict(config)
            if rule not in known and refusal is not None:
                proposal = Proposal(None, params, self.space.over_serve(config), config, "search")
                row = self._row(self._job(proposal, NOT_ASKED), state="infeasible", **reason_columns(refusal))
                self._record(row, None)
                self.study.hear(row)

    def _check_hope(self, rows: Sequence[TrialRow]) -> None:
        row = next((row for row in rows if _is_hopeless(row)), None)
        if row is None or any(row.state == "complete" for row in self._rows):
            return
        hint = weights_problem(self.experiment.model, row.config_flags) or row.failure_hint
        raise VarcasError(
            f"trial {row.number} (baseline): {row.failure_kind}: {row.failure_detail}. No flag of the space changes "
            f"that: the sweep ends. Fix: {hint}; then run it again. Log: {row.log_path or 'none'}"
        )

    def _next_job(self) -> Job | None:
        """The next configuration to start, None when there is no room, no time or nothing left."""
        job, self._held = self._held, None
        while job is None:
            if self._out_of_time():
                return None
            if not self.pool.has_room(1):
                return None
            self.study.costs = self._costs()
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

    def _costs(self) -> StartCosts:
        plan = self.plan()
        return StartCosts.of(self._rows, start_s=plan.start_s, load_s=plan.load_s)

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

    def _start(self, job: Job) -> None:
        rules = self._stop_rules(job)
        several = self._sharing(job, rules)
        if several is None:
            self._submit(job, self._work(job), replace(self._task(job), stop_rules=rules), _described(job))
            return
        task = replace(self._task(job, live=True), config=several.config, resolved=several.checked.resolved)
        text = f"{_described(job)}, and {len(several.proposals) - 1} more on its server"
        self._shared[job.key] = several
        self._submit(job, functools.partial(run_series, plan=several.plan), task, text)

    def _sharing(self, job: Job, rules: StopRules | None) -> Shared | None:
        """What else of the space is measured on the server of a proposal of the search; None where nothing is."""
        if job.purpose != "search" or not self._live:
            return None
        rides = self.study.alongside(job.proposal, self._live, self._num_rides())
        together, workload = [job.proposal, *rides], self.experiment.workload
        several = shared(together, self._live, self.flag_names, self._check, workload, rules) if rides else None
        taken = set() if several is None else {one.config.hash for one in several.proposals.values()}
        for ride in rides:
            if ride.config.hash not in taken:
                self.study.give_up(ride)
        return several

    def _num_rides(self) -> int:
        """As many as a start is worth, and as the budget holds beside what confirmation needs."""
        plan = self.plan()
        kept_s = plan.confirm_starts * (plan.start_s + plan.load_s) / plan.width
        rides = num_rides(plan.start_s, plan.load_s)
        while rides and self._purse.short_of(plan.start_s + (rides + 2) * plan.load_s + kept_s, 0.0) is not None:
            rides -= 1
        return rides

    def _work(self, job: Job) -> Callable[[TrialTask, threading.Event], Any]:
        """What the worker does: one load, or those that find a capacity."""
        e = self.experiment
        if not self._by_capacity:
            return self._run
        return functools.partial(run_series, plan=Bisection(job.proposal.config, e.workload, dict(e.slo)))

    @property
    def _by_capacity(self) -> bool:
        return any(objective.metric == "capacity_rps" for objective in self.experiment.objectives)

    def _stop_rules(self, job: Job) -> StopRules | None:
        """What may end a search's load early; baseline, audits and confirmation are measured in full."""
        experiment = self.experiment
        if job.purpose != "search" or not experiment.study.early_stop:
            return None
        by_tokens = [objective.metric for objective in experiment.objectives] == ["output_tokens_per_s"]
        best = find(self._rows, experiment).winner if by_tokens else None
        return StopRules(dict(experiment.slo), None if best is None else best.output_tokens_per_s)

    def _collect(self) -> None:
        """Waits for the next trial to end, and records it: disk first, then Optuna."""
        for finished in self.pool.finished(POLL_S):
            job, submitted_s = self._jobs.pop(finished.key)
            wall_s = time.monotonic() - submitted_s
            self._purse.charge(wall_s * job.proposal.config.num_gpus)
            if (several := self._shared.pop(finished.key, None)) is not None:
                self._collect_several(job, several, finished, wall_s)
                continue
            row, outcome = self._answered(job, finished, wall_s)
            self._record(row, None if job.purpose in APART else job.proposal, outcome)

    def _collect_several(self, job: Job, several: Shared, finished: Finished, wall_s: float) -> None:
        """Records what was measured on one server; what was not is open again."""
        left = dict(several.proposals)
        if not isinstance(finished.result, Series):
            row, _ = self._measured_row(job, finished, wall_s)
            self._record(row, job.proposal)
            left = {key: one for key, one in left.items() if one is not job.proposal}
        else:
            self._record_series(job, several, finished.result, wall_s, left)
        for proposal in left.values():
            self.study.give_up(proposal)

    def _record_series(
        self, job: Job, several: Shared, series: Series, wall_s: float, left: dict[str, Proposal]
    ) -> None:
        for row, done in self._series_rows(job, series, wall_s):
            proposal = left.pop(done.step.config.hash, None)
            params = proposal.params if proposal else self.space.params_of(done.step.config.flags) or {}
            told = row.model_copy(update={"params_json": json.dumps(params, sort_keys=True)})
            self._record(told, proposal, done.outcome)
            if proposal is None:  # the start failed, with the largest limits
                self.study.hear(told, retry=told.failure_kind in RETRIED)
        if series.not_live is not None:
            self._note(f"this server takes no new limits ({series.not_live}): each value gets a server of its own")
            self._live = {}

    def _answered(self, job: Job, finished: Finished, wall_s: float) -> tuple[TrialRow, Outcome | None]:
        """The row of a start; of one whose capacity was looked for, its other loads are stored beside it."""
        series = finished.result
        if not isinstance(series, Series):
            return self._measured_row(job, finished, wall_s)
        main, columns = objective_columns(series, self.experiment.slo)
        rows = self._series_rows(job, series, wall_s, main)
        for index, (row, done) in enumerate(rows):
            if index != main:
                load = done.outcome.load
                self.store.append(row, load.records if load else (), done.outcome.samples)
        row, done = rows[main]
        return row.model_copy(update=columns if row.state == "complete" else {}), done.outcome

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

    def ablate(self) -> None:
        """Puts each flag of a confirmed winner back alone, then starts what is left of them, as the budget goes."""
        if len(self.experiment.objectives) > 1:
            return
        for _ in range(2 + self.experiment.study.max_retries):
            pair = self._finalists()
            if pair is None or recommend(self._rows, self.experiment).verdict != "better":
                return
            queue = ablation.missing(self._rows, pair[1], pair[0], self.experiment)
            if not queue or not self._run_ablation(queue, pair[1]):
                return

    def _run_ablation(self, queue: list[tuple[str, ServingConfig]], winner: TrialRow) -> bool:
        """False when the budget did not hold all of them."""
        text = f"trial {winner.number} without {', '.join(dict.fromkeys(arm for arm, _ in queue))}, each alone"
        if queue[0][0] == ablation.MINIMAL:
            text = f"trial {winner.number} without all that brings nothing"
        self._emit(Event("confirm", text=text, total=len(queue)))
        while queue or self.pool.busy:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            while queue and not self._out_of_time(reserve=False) and self.pool.has_room(queue[0][1].num_gpus):
                self._start(self._ablation_job(*queue.pop(0)))
            self._collect()
            if queue and not self.pool.busy and self._out_of_time(reserve=False):
                return False
        return True

    def _ablation_job(self, arm: str, config: ServingConfig) -> Job:
        whole = ServingConfig(self.experiment.model, self.experiment.revision, config.flags)
        params = self.space.params_of(whole.flags) or {}
        proposal = Proposal(None, params, dict(whole.flags), whole, "ablate")
        return Job(proposal, self._number(), "ablate", self._check(whole), arm, self._attempts(whole))

    def _finalists(self) -> tuple[TrialRow, TrialRow] | None:
        found = find(self._rows, self.experiment)
        if found.baseline is None or found.winner is None or found.baseline.state != "complete":
            return None
        if found.baseline.config_hash == found.winner.config_hash:
            return None
        return found.baseline, found.winner

    def _confirm_pair(self, baseline: TrialRow, winner: TrialRow) -> bool:
        """Runs the missing starts of both arms; True when the winner failed and another must be confirmed."""
        queue = self._missing(baseline, winner) or self._extension(baseline, winner)
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
                return False
            best = find(self._rows, self.experiment).winner
            if best is None or best.config_hash != winner.config_hash:
                return best is not None
            queue = queue or self._retries(baseline, winner) or self._extension(baseline, winner)
        return False

    def _extension(self, baseline: TrialRow, winner: TrialRow) -> list[tuple[str, TrialRow]]:
        """One more start of each arm where the usual ones leave open a gain that is worth knowing."""
        study = self.experiment.study
        if self.pool.busy or study.repeats < MIN_STARTS or self._missing(baseline, winner):
            return []
        answer = recommend(self._rows, self.experiment)
        gain = answer.gain.ratio if answer.gain is not None else 1.0
        gain = gain if self.experiment.objectives[0].direction == "maximize" else 1 / gain
        if answer.verdict != "inconclusive" or gain < PROMISING:
            return []
        return self._missing(baseline, winner, study.repeats + 1)

    def _missing(self, baseline: TrialRow, winner: TrialRow, repeats: int | None = None) -> list[tuple[str, TrialRow]]:
        """Starts still to make, in the order B W W B B W ..., so that drift hits both arms alike."""
        repeats = repeats or self.experiment.study.repeats
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
        flags = row.config_flags
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
        off = list(self.pruner.disabled.values())
        told: dict[str, Any] = {"ended": self.ended, "ruled_out": self.ruled_out, "rules_off": off}
        saved = self.store.study(self.experiment.name) or {}
        self.store.save_study(self.experiment.name, {**saved, **told})
        return recommend(self._rows, self.experiment, script=script, **told)

    # pieces

    def plan(self) -> Plan:
        """What is about to be spent, from the start times that this study's store has seen."""
        workload, study = self.experiment.workload, self.experiment.study
        measured = [row.server_start_s for row in self._rows if row.server_start_s and row.state == "complete"]
        guess = 0.0 if self.simulated else GUESSED_START_S["gpu" if self.pool.slots.on_gpu else "cpu"]
        size, survey = self.space.size(), self.pruner.survey()
        may_work = size if survey is None else len(survey.left)
        searches = study.trials if may_work is None else min(study.trials, may_work + 1)
        done, loads = self.study.spent, TYPICAL_LOADS if self._by_capacity else 1
        loads_s = (workload.warmup_s + workload.duration_s + workload.max_drain_s) * loads
        return Plan(
            study=self.experiment.name,
            space_size=size,
            search_starts=searches,
            search_done=done,
            search_left=max(0, searches - done),
            confirm_starts=2 * study.repeats if len(self.experiment.objectives) == 1 else 0,
            start_s=statistics.median(measured) if measured else guess,
            load_s=SIMULATED_S if self.simulated else loads_s + STOP_S,
            budget_s=self._purse.wall_s,
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
        """Whether one more start would eat what is left, or what confirmation needs; then `ended` says which budget."""
        plan, gpus = self.plan(), self.space.config(self.experiment.baseline).num_gpus
        one_s, kept = plan.start_s + plan.load_s, plan.confirm_starts if reserve else 0
        busy_s = len(self._jobs) * one_s * gpus
        short = self._purse.short_of(one_s + kept * one_s / plan.width, busy_s + (1 + kept) * one_s * gpus)
        if short is not None and not self.pool.busy:
            self.ended = self.ended or f"{short} budget spent"
        return short is not None


def _usd_per_gpu_h(kind: str) -> float | None:
    """List price of a GPU of the catalogue; None where it has none."""
    price = catalogued(kind).price if variants(kind) else None
    return None if price is None else price.usd_per_h


def _is_hopeless(row: TrialRow) -> bool:
    return row.purpose == "baseline" and row.failure_kind in HOPELESS


def _described(job: Job) -> str:
    what = described(job.purpose, job.arm, job.proposal.params, job.proposal.config.flags)
    return f"trial {job.number}: {what}"
