"""The search: what to try next, what Optuna is told, when it ends. The only door to Optuna.

The store is the only truth: an Optuna study that lacks rows, holds others, or is gone is made to agree with the rows
given to `open_study`. So the journal is written without fsync, and one that cannot be read is set aside.

What Optuna is told of a row:

| row | Optuna | constraints |
|---|---|---|
| measured | COMPLETE, its objectives | each SLO key: value / limit - 1; `runs`: -1 |
| failed by its own fault, pruned, or twice not to be believed | COMPLETE, worst feasible objectives so far | 1e3 each |
| the same while nothing was measured yet | PRUNED, so that no value is invented | 1e3 each |
| load ended early: an SLO is lost for certain | COMPLETE, worst feasible objectives so far | least excess of each |
| load ended early: the best so far is out of reach | COMPLETE, what it came to | 0 each |
| lost through no fault of its own, stopped, or once not to be believed | FAIL, and proposed again | none |
| pruned by a rule, in a space that the rules judged whole | FAIL | none |

The last because a sampler has nothing to learn there: what it proposes of it costs no start and is moved to the nearest
that may work. Told as failures they would fill its random start-up, and the share that it takes for good.

TPE ranks what violates constraints by the sum of its violations: those of measured rows are capped, so that a
configuration that runs is always preferred to one that does not. People are shown another study, made of the rows
alone (`dashboard_view`): what failed has no value there.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime
import hashlib
import html
import importlib.util
import itertools
import json
import mimetypes
import os
import random
import re
import threading
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast
from urllib.parse import unquote
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.artifacts import ArtifactMeta
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import JsonValue

from varcas.advisor import Advisor, Tried, constraints_of, objectives_of
from varcas.costs import StartCosts
from varcas.engine.failures import RETRIED
from varcas.errors import InputError, nearest
from varcas.experiment import Experiment
from varcas.order import NUM_ORDERED
from varcas.pruner import Pruner, is_pruned
from varcas.records import APART, LATENCY_METRICS, Purpose, TrialRow
from varcas.space import Drawn, Flags, Label, Params, ServingConfig, Space, distance

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

FAILED = 1e3
"""Constraint value of a configuration that does not run."""
MAX_FRUITLESS = 200
"""Proposals in a row that were duplicates or pruned, after which the search ends."""
LISTED = 10_000
"""Finite spaces of which this much is left are listed to find what is untried; of larger ones random draws are seen."""
DRAWN = 128
"""Random draws of those, each of which the rules judge."""
NUM_CANDIDATES = 500
"""Untried configurations that it looks at, at random."""
NUM_STARTUP = 5
"""Proposals before TPE takes over: at most `NUM_ORDERED` that the estimates put first, the rest random. The baseline
and enqueued ones count."""
NUM_BEST, NUM_LATEST = 40, 60
"""Finished trials that a sampler looks at: TPE's time a proposal grows with each (55 ms at 1,000 trials)."""
TOLD_VERSION = 1
"""Raised when rows are told to Optuna in another way: an older Optuna study is then rebuilt from the store."""
STALE_LOCK_S = 5.0
"""A journal's lock is held for milliseconds: an older one belongs to a process that was killed."""

Verdict = Literal["measured", "cut", "failed", "again", "given up"]


# samplers


def _auto(seed: int, space: Space) -> BaseSampler:
    """A Gaussian process where the space can be listed (`gp`), else TPE over all parameters at once.

    On recorded landscapes the former needs fewer starts (docs/search.md). TPE counts running trials as bad ones
    (constant liar), so that parallel proposals differ, and its choices have no order.
    """
    if can_be_listed(space):
        return _gp(seed, space)
    with _no_experimental_warnings():
        return TPESampler(seed=seed, n_startup_trials=NUM_STARTUP, multivariate=True, group=True, constant_liar=True)


def _tpe(seed: int, space: Space) -> BaseSampler:
    """TPE as Optuna has it, one parameter at a time."""
    return TPESampler(seed=seed, multivariate=False, constant_liar=True)


def _random(seed: int, space: Space) -> BaseSampler:
    """Uniform: what any other sampler must beat."""
    return RandomSampler(seed=seed)


def _grid(seed: int, space: Space) -> BaseSampler:
    """Every configuration in the order of the file, the last flag fastest; for spaces that can be tried whole."""
    if not can_be_listed(space):
        size = space.size()
        there = "is continuous" if size is None else f"has {size} configurations"
        raise InputError(
            f"study.sampler: 'grid': the space {there}: a grid is tried whole, up to {LISTED}. "
            "Give fewer choices, or write `sampler: auto`."
        )
    return RandomSampler(seed=seed)


def _gp(seed: int, space: Space) -> BaseSampler:
    """Gaussian process of varcas's own (`surrogate.py`): numbers are near or far, failures have culprits, starts costs.

    Its first two are random, unless the estimates order them.
    """
    return RandomSampler(seed=seed)


def can_be_listed(space: Space) -> bool:
    """Finite, and no larger than what is listed to find what is untried."""
    size = space.size()
    return size is not None and size <= LISTED


SAMPLERS: dict[str, Callable[[int, Space], BaseSampler]] = {
    "auto": _auto,
    "tpe": _tpe,
    "random": _random,
    "gp": _gp,
    "grid": _grid,
}
"""Sampler by its name in `study.sampler`: a function of seed and space, whose docstring is its documentation."""


class _ShortMemory(optuna.Study):
    """A study whose sampler sees the best and the latest finished trials only, and all running ones.

    Overrides what samplers read trials through, as Optuna's own Hyperband does; `get_trials` gives all. Samplers read
    them several times a proposal: each finished trial is ranked once.
    """

    _finished: list[int]  # numbers, as they were seen to finish
    _ranked: list[tuple[tuple[float, ...], int]]  # the best first
    _open: list[int]
    _num_seen: int
    forgotten: set[str]
    """`trial_id`s of rows that no longer say anything of their configurations."""

    def __init__(self, study_name: str, storage: BaseStorage, sampler: BaseSampler) -> None:
        super().__init__(study_name, storage, sampler)
        self.forgotten = set()
        self._finished, self._ranked, self._open, self._num_seen = [], [], [], 0

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Every trial."""
        return super()._get_trials(deepcopy, states)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, None, use_cache)
        if len(trials) > NUM_BEST + NUM_LATEST:
            self._look(trials)
            latest = set(self._finished[-NUM_LATEST:])
            older = (number for _, number in self._ranked if number not in latest)
            kept = latest.union(itertools.islice(older, NUM_BEST), self._open)
            trials = [trials[number] for number in sorted(kept)]
        return [
            trial for trial in trials if (states is None or trial.state in states) and not self._is_forgotten(trial)
        ]

    def _is_forgotten(self, trial: FrozenTrial) -> bool:
        return bool(self.forgotten) and trial.user_attrs.get("trial_id") in self.forgotten

    def _look(self, trials: Sequence[FrozenTrial]) -> None:
        """Ranks those that have finished since the last look; a trial's number is its place."""
        numbers = [*self._open, *range(self._num_seen, len(trials))]
        self._num_seen = len(trials)
        self._open = [number for number in numbers if not trials[number].state.is_finished()]
        for trial in (trials[number] for number in numbers):
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._finished.append(trial.number)
                bisect.insort(self._ranked, (self._rank(trial), trial.number))

    def _rank(self, trial: FrozenTrial) -> tuple[float, ...]:
        """Sorts the best first: by violation, then by the objectives in their order."""
        violation = sum(value for value in trial.constraints.values() if value > 0)
        signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in self.directions]
        return (violation, *(sign * value for sign, value in zip(signs, trial.values or (), strict=False)))


@contextlib.contextmanager
def _no_experimental_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def make_sampler(experiment: Experiment, space: Space, num_trials: int = 0) -> BaseSampler:
    """The experiment's sampler, seeded anew on each resume: the same seed would propose what it proposed before.

    Raises:
        InputError: there is none of that name, or it needs what is not installed here.
    """
    name = experiment.study.sampler
    if name not in SAMPLERS:
        raise InputError(f"study.sampler: {name!r} is unknown.{nearest(name, SAMPLERS)} Known: {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]((experiment.study.seed + 7919 * num_trials) % 2**32, space)


# what rows say


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration to measure.

    Attributes:
        number: of its Optuna trial; None when it lies outside of the space, where Optuna cannot follow.
        params: what was chosen, by parameter name.
        flags: what it sets over `serve`; None for a flag that it leaves out.
        config: the whole configuration.
        purpose: why it is run.
    """

    number: int | None
    params: Params
    flags: Flags
    config: ServingConfig
    purpose: Purpose


@dataclass(slots=True)
class _Ledger:
    """What a study's rows say so far: answers, starts spent, worst objectives."""

    experiment: Experiment
    judged_whole: bool = False
    answers: dict[str, tuple[TrialRow, Verdict]] = field(default_factory=dict)
    worst: list[float] | None = None
    worst_feasible: list[float] | None = None
    _servers: set[str] = field(default_factory=set)
    _lost: Counter[str] = field(default_factory=Counter)
    _doubtful: Counter[str] = field(default_factory=Counter)

    @property
    def spent(self) -> int:
        """Server starts that came to something."""
        return len(self._servers)

    def add(self, row: TrialRow, retry: bool, key: str) -> Verdict:
        """Takes a row in, and says what it means for its configuration; `retry`: it was not its fault."""
        verdict = self._verdict(row, retry)
        if verdict != "again":
            self.answers.setdefault(key, (row, verdict))
            if row.state != "infeasible" and row.purpose != "audit" and row.warm_from is None:
                self._servers.add(row.server_id)
        if verdict == "measured":
            self._note_worst(row)
        return verdict

    def _verdict(self, row: TrialRow, retry: bool) -> Verdict:
        key = row.config_hash
        if row.stopped_early:
            return "cut"
        if row.state == "stopped" or row.failure_kind == "interrupted":
            return "again"
        if retry:
            self._lost[key] += 1
            return "again" if self._lost[key] <= self.experiment.study.max_retries else "given up"
        if row.state != "complete":
            return "failed"
        if row.valid is False or objectives_of(row, self.experiment) is None:
            self._doubtful[key] += 1
            return "again" if self._doubtful[key] == 1 and self.experiment.study.max_retries else "failed"
        return "measured"

    def _note_worst(self, row: TrialRow) -> None:
        values = objectives_of(row, self.experiment)
        assert values is not None
        self.worst = self._worse(self.worst, values)
        if max(constraints_of(row, self.experiment).values()) <= 0:
            self.worst_feasible = self._worse(self.worst_feasible, values)

    def _worse(self, known: list[float] | None, values: list[float]) -> list[float]:
        if known is None:
            return values
        picks = [min if o.direction == "maximize" else max for o in self.experiment.objectives]
        return [pick(a, b) for pick, a, b in zip(picks, known, values, strict=True)]


def _violated(experiment: Experiment) -> dict[str, float]:
    return dict.fromkeys(_keys(experiment), FAILED)


def _met(experiment: Experiment) -> dict[str, float]:
    """Of a load that was ended because it was slow: no limit is known to be missed."""
    return {**dict.fromkeys(_keys(experiment), 0.0), "runs": -1.0}


def _keys(experiment: Experiment) -> list[str]:
    keys = [*sorted(experiment.slo), "runs"]
    if any(objective.metric in LATENCY_METRICS for objective in experiment.objectives):
        keys.append("holds_rate")
    return keys


@dataclass(frozen=True, slots=True)
class _Told:
    """What Optuna is told of one row."""

    state: TrialState
    values: list[float] | None
    constraints: dict[str, float]
    attributes: dict[str, Any]


def _told(row: TrialRow, verdict: Verdict, ledger: _Ledger) -> _Told:
    experiment = ledger.experiment
    if verdict in ("again", "given up") or (ledger.judged_whole and is_pruned(row)):
        return _Told(TrialState.FAIL, None, {}, _attributes(row, {}, experiment))
    if verdict == "measured":
        constraints = constraints_of(row, experiment)
        values = objectives_of(row, experiment)
        return _Told(TrialState.COMPLETE, values, constraints, _attributes(row, constraints, experiment))
    constraints = _violated(experiment) if verdict == "failed" else constraints_of(row, experiment)
    values = ledger.worst_feasible or ledger.worst
    if verdict == "cut" and row.slo_met is None:  # out of reach: what it came to is no better than it is
        constraints, values = _met(experiment), objectives_of(row, experiment) or values
    state = TrialState.COMPLETE if values else TrialState.PRUNED
    return _Told(state, values, constraints, _attributes(row, constraints, experiment))


def _attributes(row: TrialRow, constraints: Mapping[str, float], experiment: Experiment) -> dict[str, Any]:
    """User attributes; `trial_id` ties an Optuna trial to its row."""
    named: dict[str, Any] = {
        "trial": row.number,
        "trial_id": row.trial_id,
        "outcome": row.reason_rule or row.failure_kind or row.state,
        "feasible": bool(constraints) and max(constraints.values()) <= 0,
        "slo_violation": round(sum(max(value, 0.0) for value in constraints.values()), 4),
        **{key: getattr(row, key) for key in sorted(experiment.slo)},
        "failure_kind": row.failure_kind,
        "failure_detail": row.failure_detail[:500] if row.failure_detail else None,
        "log": row.log_path,
        "command": row.command,
    }
    if row.valid is False:
        named["not_believed"] = "; ".join(row.invalid_reasons) or "invalid"
    return {name: value for name, value in named.items() if value is not None}


def _flags_text(flags: Mapping[str, JsonValue]) -> str:
    return " ".join(f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in flags.items())


# Optuna's side of a space


class _Asked:
    """A `Suggest` that asks an Optuna trial."""

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._trial = trial

    def categorical(self, name: str, labels: Sequence[Label]) -> Label:
        return cast(Label, self._trial.suggest_categorical(name, labels))

    def integer(self, name: str, low: int, high: int, step: int, log: bool) -> int:
        return self._trial.suggest_int(name, low, high, step=step, log=log)

    def number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        return self._trial.suggest_float(name, low, high, step=step, log=log)


class _Replayed:
    """A `Suggest` that repeats known parameters and keeps the distributions Optuna would have drawn them from.

    Raises:
        KeyError: a parameter is missing or no longer possible, so these are no whole proposal of this space.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.distributions: dict[str, BaseDistribution] = {}

    def categorical(self, name: str, labels: Sequence[Label]) -> Label:
        return cast(Label, self._kept(name, CategoricalDistribution(labels)))

    def integer(self, name: str, low: int, high: int, step: int, log: bool) -> int:
        return int(self._kept(name, IntDistribution(low, high, log=log, step=step)))

    def number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        return float(self._kept(name, FloatDistribution(low, high, log=log, step=step)))

    def _kept(self, name: str, distribution: BaseDistribution) -> Any:
        self.distributions[name] = distribution
        value = self._params[name]
        try:
            distribution.to_internal_repr(value)
        except ValueError as error:
            raise KeyError(name) from error
        return value


class _Untried:
    """What a space holds that is neither tried nor ruled out."""

    def __init__(self, space: Space, seed: int, pruner: Pruner | None) -> None:
        self._space, self._pruner, self._rng = space, pruner, random.Random(seed)
        self._listed: dict[str, Params] | None = None

    def near(self, params: Params, known: Callable[[str], bool]) -> Params | None:
        """An untried configuration, the nearest found to what the sampler wanted."""
        candidates = self._sample(known)
        return min(candidates, key=lambda candidate: distance(params, candidate), default=None)

    def some(self, known: Callable[[str], bool], at_most: int) -> list[Params]:
        """Untried configurations at random, so many at most."""
        return self._sample(known, at_most)

    def of(self, points: Sequence[Params], known: Callable[[str], bool]) -> list[Params]:
        """Those of some points that are in the space, untried and not ruled out."""
        configs = {}
        for params in points:
            with contextlib.suppress(KeyError, StopIteration):  # not of this space
                config = self._space.config(self._space.flags_of(params))
                if self._space.params_of(config.flags) == params and not known(config.hash):
                    configs[config.hash] = (params, config)
        pairs = list(configs.values())
        allowed = [True] * len(pairs) if self._pruner is None else self._pruner.allowed([config for _, config in pairs])
        return [params for (params, _), ok in zip(pairs, allowed, strict=True) if ok]

    def first(self, known: Callable[[str], bool]) -> Params | None:
        """The first untried one in the order of the space."""
        if self._listed is None:
            self._listed = self._list()
        return next((params for key, params in self._listed.items() if not known(key)), None)

    def may_work(self) -> Mapping[str, Params] | None:
        """What the rules leave of the space, tried or not; None where that is not known in advance."""
        survey = self._pruner.survey() if self._pruner is not None else None
        return None if survey is None else survey.left

    def relist(self) -> None:
        """The rules say less than before."""
        self._listed = None

    def _sample(self, known: Callable[[str], bool], at_most: int = 512) -> list[Params]:
        if self._listed is None:
            self._listed = self._list()
        if not self._listed:
            return self._draw(known)
        self._listed = {key: params for key, params in self._listed.items() if not known(key)}
        left = list(self._listed.values())
        return self._rng.sample(left, min(len(left), at_most))

    def _list(self) -> dict[str, Params]:
        """All of it, or nothing where that is too much."""
        left, size = self.may_work(), self._space.size()
        if left is not None:
            return dict(left) if len(left) <= LISTED else {}
        if size is None or size > LISTED:
            return {}
        return {self._space.config(flags).hash: params for params, flags in self._space.points()}

    def _draw(self, known: Callable[[str], bool]) -> list[Params]:
        drawn = [self._space.propose(Drawn(self._rng)) for _ in range(DRAWN)]
        configs = [self._space.config(flags) for _, flags in drawn]
        allowed = [True] * DRAWN if self._pruner is None else self._pruner.allowed(configs)
        pairs = zip(drawn, configs, allowed, strict=True)
        return [params for (params, _), config, ok in pairs if ok and not known(config.hash)]


# the study


def _is_advised(experiment: Experiment, space: Space) -> bool:
    """A surrogate proposes."""
    name = experiment.study.sampler
    return name == "gp" or (name == "auto" and can_be_listed(space))


@dataclass(frozen=True, slots=True)
class _Queued:
    config: ServingConfig
    purpose: Purpose


class Study:
    """One experiment's search: `propose` and `tell`. Made by `open_study`; used by one driver, from one thread.

    Attributes:
        ended: why the last `propose` had nothing more to give; None while it may have.
        num_ordered: proposals that were taken from `first` when it was opened.
        costs: of a start, as far as known; whoever makes the starts keeps them.
    """

    def __init__(
        self,
        experiment: Experiment,
        space: Space,
        storage: BaseStorage,
        study: _ShortMemory,
        past: Sequence[TrialRow],
        pruner: Pruner | None = None,
        first: Sequence[ServingConfig] = (),
        expected: Mapping[str, float] | None = None,
    ) -> None:
        self.experiment, self.space = experiment, space
        self.num_ordered = 0
        self._storage = storage
        self.ended: str | None = None
        self._optuna = study
        self._ledger = _Ledger(experiment, pruner is not None and pruner.survey() is not None)
        self._queue: deque[_Queued] = deque()
        self._in_flight: dict[str, Proposal] = {}
        self._riding: set[str] = set()  # of those, what is measured on the server of another
        self._params: dict[str, Params] = {}  # of what is answered, by key
        self._advisor = Advisor(experiment, space, expected) if _is_advised(experiment, space) else None
        self._rng = random.Random(experiment.study.seed)
        self.costs: StartCosts | None = None
        self._trials: dict[int, optuna.trial.Trial] = {}
        self._in_space: set[str] = set()
        self._untried = _Untried(space, experiment.study.seed, pruner)
        self._fruitless = 0
        self._missed: Params | None = None  # what the sampler wanted last, and the rules ruled out
        self._last: str | None = None
        self._reconcile(past)
        self._order(first)

    @property
    def spent(self) -> int:
        """Server starts of the search so far; retried ones, audits and those that were ruled out do not count."""
        return self._ledger.spent

    def answered(self, config_hash: str) -> TrialRow | None:
        """The row that finally answers a configuration, None when it is still to be measured."""
        answer = self._ledger.answers.get(config_hash)
        return answer[0] if answer else None

    def propose(self) -> Proposal | None:
        """The next configuration to measure; None when there is none now, and `ended` says why.

        First the baseline, then what was lost or enqueued, what the estimates put first, and the sampler at last.
        Duplicates are answered from the store. After a proposal that was ruled out comes the nearest that is not.
        After a None, a lost start may make room for another proposal: ask again until nothing runs.
        """
        if self._last in self._in_flight:  # it was neither pruned nor answered: it runs
            self._fruitless = 0
        self._last = None
        while (ended := self._end()) is None:
            proposal = self._queued() if self._queue else self._near_missed() if self._missed else self._sampled()
            if proposal is not None:
                self._last = proposal.config.hash
                self._in_flight[self._last] = proposal
                break
        self.ended = ended
        return None if ended else proposal

    def alongside(self, proposal: Proposal, live: Mapping[str, Sequence[JsonValue]], at_most: int) -> list[Proposal]:
        """Untried configurations that differ from a proposal in live flags alone, to be measured on its server.

        Args:
            proposal: of the server.
            live: flags of the space that a running server takes, with their values.
            at_most: so many.
        """
        candidates, chosen = self._beside(proposal, live), list[Proposal]()
        while candidates and len(chosen) < at_most:
            params = self._advised(candidates, None) or self._rng.choice(candidates)
            candidates.remove(params)
            ride = self._proposal(params)
            self._in_flight[ride.config.hash] = ride
            self._riding.add(ride.config.hash)
            chosen.append(ride)
        return chosen

    def give_up(self, proposal: Proposal) -> None:
        """What was to be measured alongside was not: it may be proposed again."""
        self._in_flight.pop(proposal.config.hash, None)
        self._riding.discard(proposal.config.hash)
        if proposal.number is not None:
            self._finish(
                self._trials.pop(proposal.number), _Told(TrialState.FAIL, None, {}, {"outcome": "not measured"})
            )

    def tell(self, proposal: Proposal, row: TrialRow, *, retry: bool = False) -> None:
        """Takes the row that a proposal led to, which the store already holds.

        Args:
            proposal: as `propose` gave it.
            row: its row; `row.config_hash` is that of the proposal, unless it was measured on another's server.
            retry: the failure was not the configuration's fault; it is proposed again up to `max_retries` times.
        """
        if proposal.purpose == "audit":
            self.hear(row, retry=retry)
            return
        key = proposal.config.hash
        self._in_flight.pop(key, None)
        self._riding.discard(key)
        verdict = self._ledger.add(row, retry, key)
        self._params[key] = proposal.params
        if key == self._last:
            self._fruitless = self._fruitless + 1 if row.state == "infeasible" else 0
        if is_pruned(row) and proposal.purpose == "search":
            self._missed = proposal.params
        if verdict == "again":
            self._queue.appendleft(_Queued(proposal.config, proposal.purpose))
        if proposal.number is not None:
            self._finish(self._trials.pop(proposal.number), _told(row, verdict, self._ledger))
        elif proposal.purpose == "baseline" and verdict != "again":
            self._note_baseline(row)

    def hear(self, row: TrialRow, *, retry: bool = False) -> None:
        """Takes a row that no proposal led to; what it measured is a configuration like any other."""
        key, params = self._place(row)
        verdict = self._ledger.add(row, retry, key)
        if params is not None:
            self._in_space.add(key)
            self._params[key] = params
            self._restore(row, verdict, params, [])

    def reopen(self, rows: Iterable[TrialRow]) -> None:
        """Forgets rows that were pruned by a rule found wrong: their configurations may be proposed."""
        for row in rows:
            answer = self._ledger.answers.get(row.config_hash)
            if answer is not None and answer[0].trial_id == row.trial_id:
                del self._ledger.answers[row.config_hash]
            self._optuna.forgotten.add(row.trial_id)
        self._untried.relist()
        self._fruitless = 0
        self._fill_queue([])

    def close(self) -> None:
        """Leaves the storage; its connections are closed."""
        _close(self._storage)

    # ends

    def _end(self) -> str | None:
        if self._ledger.spent + len(self._in_flight) - len(self._riding) >= self.experiment.study.trials:
            return "budget spent"
        if self._queue:
            return None
        may_work = self._untried.may_work()
        size = self.space.size() if may_work is None else len(may_work)
        if size is not None and self._num_tried(may_work) >= size:
            return "space exhausted"
        if self._fruitless >= MAX_FRUITLESS:
            return f"{MAX_FRUITLESS} proposals in a row were duplicates or pruned"
        if self.experiment.study.stop == "auto" and self._advisor is not None:
            return self._advisor.ended()
        return None

    def _num_tried(self, may_work: Mapping[str, Params] | None) -> int:
        return sum(self._known(key) for key in self._in_space if may_work is None or key in may_work)

    def _known(self, config_hash: str) -> bool:
        return config_hash in self._ledger.answers or config_hash in self._in_flight

    # proposals

    def _queued(self) -> Proposal | None:
        """The first of the queue, unless it was answered meanwhile."""
        entry = self._queue.popleft()
        if self._known(entry.config.hash):
            return None
        params = self.space.params_of(entry.config.flags)
        number = None if params is None else self._ask(params)[0].number
        flags = self.space.over_serve(entry.config)
        return Proposal(number, params or {}, flags, entry.config, entry.purpose)

    def _sampled(self) -> Proposal | None:
        """What the sampler proposes, or what lies nearest to it when it repeats itself; None for a duplicate."""
        if (chosen := self._chosen()) is not None:
            return self._proposal(chosen)
        trial, params, config = self._ask()
        if not self._known(config.hash):
            return Proposal(trial.number, params, self.space.over_serve(config), config, "search")
        self._answer(trial, config)
        self._fruitless += 1
        return self._untried_near(params) if self.space.size() is not None else None

    def _chosen(self) -> Params | None:
        """What is chosen among all that is left, not by Optuna; None where Optuna proposes."""
        if self.experiment.study.sampler == "grid":
            return self._untried.first(self._known)
        return self._advised(self._untried.some(self._known, NUM_CANDIDATES), self.costs)

    def _advised(self, candidates: Sequence[Params], costs: StartCosts | None) -> Params | None:
        if self._advisor is None or not candidates:
            return None
        running = [proposal.params for proposal in self._in_flight.values() if proposal.number is not None]
        return self._advisor.next(self._tried(), candidates, running, costs)

    def _tried(self) -> list[Tried]:
        """What the space's configurations came to, in the order of their answers."""
        return [
            Tried(self._params[key], row, verdict in ("measured", "cut"))
            for key, (row, verdict) in self._ledger.answers.items()
            if key in self._in_space and key in self._params and verdict != "given up"
            and not (self._ledger.judged_whole and is_pruned(row))
        ]  # fmt: skip

    def _beside(self, proposal: Proposal, live: Mapping[str, Sequence[JsonValue]]) -> list[Params]:
        values = {flag: choices for flag, choices in live.items() if flag in proposal.params}
        if proposal.number is None or not values:
            return []
        combined = itertools.product(*values.values())
        points = [{**proposal.params, **dict(zip(values, chosen, strict=True))} for chosen in combined]
        return self._untried.of(points, self._known)

    def _proposal(self, params: Params) -> Proposal:
        trial, params, config = self._ask(params)
        return Proposal(trial.number, params, self.space.over_serve(config), config, "search")

    def _near_missed(self) -> Proposal | None:
        params, self._missed = self._missed, None
        return None if params is None else self._untried_near(params)

    def _untried_near(self, params: Params) -> Proposal | None:
        near = self._untried.near(params, self._known)
        if near is None:
            return None
        return self._proposal(near)

    def _ask(self, fixed: Params | None = None) -> tuple[optuna.trial.Trial, Params, ServingConfig]:
        """A new Optuna trial, with given parameters or those of the sampler."""
        if fixed is not None:
            self._optuna.enqueue_trial(fixed)
        trial = self._optuna.ask()
        params, flags = self.space.propose(_Asked(trial))
        config = self.space.config(flags)
        trial.set_user_attr("config", _flags_text(config.flags))
        self._trials[trial.number] = trial
        self._in_space.add(config.hash)
        return trial, params, config

    def _answer(self, trial: optuna.trial.Trial, config: ServingConfig) -> None:
        """Tells a duplicate from the row that its configuration has; one whose configuration runs just now, FAIL."""
        del self._trials[trial.number]
        if config.hash in self._ledger.answers:
            row, verdict = self._ledger.answers[config.hash]
            self._finish(trial, _told(row, verdict, self._ledger))
        else:
            self._finish(trial, _Told(TrialState.FAIL, None, {}, {"outcome": "duplicate of a running trial"}))

    # Optuna

    def _finish(self, trial: optuna.trial.Trial, told: _Told) -> None:
        for name, value in told.attributes.items():
            trial.set_user_attr(name, value)
        for name, value in told.constraints.items():
            trial.set_constraint(name, value)
        self._optuna.tell(trial, told.values, state=told.state)

    def _note_baseline(self, row: TrialRow) -> None:
        """A baseline outside of the space has no parameters: Optuna's samplers could do nothing with its trial."""
        values = objectives_of(row, self.experiment)
        names = [objective.metric for objective in self.experiment.objectives]
        measured = dict(zip(names, values, strict=True)) if values else {"outcome": row.failure_kind or row.state}
        self._optuna.set_user_attr("baseline", {"trial": row.number, **measured, "config": row.config_json})

    def _reconcile(self, past: Sequence[TrialRow]) -> None:
        """Makes Optuna agree with the store, and fills the queue with what is still to be measured."""
        finished = self._frozen(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        told = {trial.user_attrs.get("trial_id") for trial in finished}
        unfinished = self._unfinished()
        lost: list[_Queued] = []
        for row in sorted((row for row in past if row.purpose not in APART), key=lambda row: row.number):
            key, params = self._place(row)
            verdict = self._ledger.add(row, row.failure_kind in RETRIED and row.state != "infeasible", key)
            config = self._config(row.config_flags)
            if params is not None:
                self._in_space.add(key)
                self._params[key] = params
            if verdict == "again" and row.purpose != "audit":
                lost.append(_Queued(config, row.purpose))
            if params is not None and row.trial_id not in told:
                self._restore(row, verdict, params, unfinished)
            elif row.purpose == "baseline" and params is None and verdict != "again":
                self._note_baseline(row)
        for entry in unfinished:
            self._finish(entry.trial, _Told(TrialState.FAIL, None, {}, {"outcome": "lost with its driver"}))
            if entry.config is not None:
                lost.append(_Queued(entry.config, "search"))
        self._fill_queue(lost)

    def _restore(self, row: TrialRow, verdict: Verdict, params: Params, unfinished: list[_Unfinished]) -> None:
        """Tells Optuna a row that it lacks: through the trial that was running for it, else as a new one."""
        told = _told(row, verdict, self._ledger)
        running = next((entry for entry in unfinished if entry.config and entry.config.hash == row.config_hash), None)
        if running is not None:
            unfinished.remove(running)
            self._finish(running.trial, told)
            return
        replayed = _Replayed(params)
        self.space.propose(replayed)
        trial = create_trial(
            state=told.state,
            values=told.values,
            params=params,
            distributions=replayed.distributions,
            user_attrs={"config": _flags_text(row.config_flags), **told.attributes},
            constraints=told.constraints,
        )
        self._optuna.add_trial(trial)

    def _place(self, row: TrialRow) -> tuple[str, Params | None]:
        """Which configuration a row answers, by its hash, and its parameters; None outside of the space.

        What was measured on a running server has other flags once it is deployed: its parameters name it.
        """
        flags: Flags = row.config_flags
        if not row.measured_live:
            return row.config_hash, self.space.params_of(flags)
        params: Params = json.loads(row.params_json)
        try:
            return self.space.config(self.space.flags_of(params)).hash, params
        except (KeyError, StopIteration):  # of another space
            return row.config_hash, None

    def _unfinished(self) -> list[_Unfinished]:
        """Trials that a driver before this one left open."""
        while self._frozen(TrialState.WAITING):  # it was killed between enqueue and ask
            self._optuna.ask()
        return [
            _Unfinished(optuna.trial.Trial(self._optuna, frozen._trial_id), self._config_of(frozen))
            for frozen in self._frozen(TrialState.RUNNING)
        ]

    def _config_of(self, trial: FrozenTrial) -> ServingConfig | None:
        """The configuration of an Optuna trial; None when it was killed before all was chosen."""
        try:
            _, flags = self.space.propose(_Replayed({**trial.system_attrs.get("fixed_params", {}), **trial.params}))
        except KeyError:
            return None
        return self.space.config(flags)

    def _frozen(self, *states: TrialState) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False, states=states)

    def _config(self, flags: Mapping[str, JsonValue]) -> ServingConfig:
        return ServingConfig(self.experiment.model, self.experiment.revision, flags)

    def _fill_queue(self, lost: Sequence[_Queued]) -> None:
        baseline = _Queued(self.space.config(self.experiment.baseline), "baseline")
        asked = [_Queued(self.space.config(flags), "search") for flags in self.experiment.study.enqueue]
        queued: set[str] = set(self._ledger.answers)
        for entry in (baseline, *lost, *asked):
            if entry.config.hash not in queued:
                queued.add(entry.config.hash)
                self._queue.append(entry)

    def _order(self, first: Sequence[ServingConfig]) -> None:
        """Queues what leaves some of the start-up random; what is in the space and was asked for already counts."""
        queued = {entry.config.hash for entry in self._queue}
        inside = {e.config.hash for e in self._queue if self.space.params_of(e.config.flags) is not None}
        room = max(0, NUM_ORDERED - len(self._in_space | inside))
        new = [config for config in first if config.hash not in queued and not self._known(config.hash)][:room]
        self._queue.extend(_Queued(config, "search") for config in new)
        self.num_ordered = len(new)


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """An Optuna trial that was never told, and the configuration it stood for."""

    trial: optuna.trial.Trial
    config: ServingConfig | None


def open_study(
    experiment: Experiment,
    space: Space,
    storage_url: str,
    *,
    past: Sequence[TrialRow],
    pruner: Pruner | None = None,
    first: Sequence[ServingConfig] = (),
    expected: Mapping[str, float] | None = None,
) -> Study:
    """Opens the experiment's Optuna study, or makes it, and brings it to what the store's rows say.

    Args:
        experiment: its `name` is the study's.
        space: what may be proposed.
        storage_url: `journal:PATH`, `sqlite:///PATH` or `postgresql://...`.
        past: this study's rows in the store.
        pruner: what rules configurations out; None when nothing does. Rows that no longer stand are left out.
        first: what the estimates put first (`order.first_proposals`); the start-up proposals come from it in part.
        expected: of the estimates, by content hash (`order.Order.expected`): what a surrogate starts from.

    Raises:
        InputError: an unknown sampler, or a storage that cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = make_sampler(experiment, space, len(past))
    past = [row for row in past if pruner is None or pruner.stands(row)]
    with _as_input_error(storage_url), _no_experimental_warnings():
        storage = _storage(storage_url)
        try:
            study = _agreeing(storage, experiment, sampler, {row.trial_id for row in past})
            return Study(experiment, space, storage, study, past, pruner, first, expected)
        except BaseException:
            _close(storage)
            raise


def _agreeing(storage: BaseStorage, experiment: Experiment, sampler: BaseSampler, rows: set[str]) -> _ShortMemory:
    """The Optuna study of that name; an empty one where it knows rows that the store lacks, or another question."""
    study = _loaded(storage, experiment, sampler)
    fingerprint = _fingerprint(experiment)
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    foreign = any(trial.user_attrs.get("trial_id") not in rows for trial in finished)
    if foreign or study.user_attrs.get("fingerprint", fingerprint) != fingerprint:
        optuna.delete_study(study_name=experiment.name, storage=storage)
        study = _loaded(storage, experiment, sampler)
    if "fingerprint" not in study.user_attrs:
        for name, value in _study_attributes(experiment).items():
            study.set_user_attr(name, value)
        study.set_metric_names([objective.metric for objective in experiment.objectives])
        study.set_user_attr("fingerprint", fingerprint)
    return study


def _loaded(storage: BaseStorage, experiment: Experiment, sampler: BaseSampler) -> _ShortMemory:
    directions = [objective.direction for objective in experiment.objectives]
    optuna.create_study(storage=storage, study_name=experiment.name, directions=directions, load_if_exists=True)
    return _ShortMemory(experiment.name, storage, sampler)


def _fingerprint(experiment: Experiment) -> str:
    """Changes with whatever decides what a row means to Optuna."""
    asked = json.loads(experiment.model_dump_json(include={"space", "serve", "slo", "objective"}))
    return hashlib.sha256(json.dumps([TOLD_VERSION, asked], sort_keys=True).encode()).hexdigest()[:16]


def _study_attributes(experiment: Experiment) -> dict[str, Any]:
    workload = experiment.workload
    return {
        "model": experiment.model,
        "gpu": f"{experiment.hardware.count} x {experiment.hardware.gpu}",
        "workload": f"{workload.described} for {workload.duration_s:g} s",
        "objective": ", ".join(f"{o.direction} {o.metric}" for o in experiment.objectives),
        "slo": ", ".join(f"{key} <= {limit:g}" for key, limit in experiment.slo.items()) or "none",
        "serve": _flags_text(experiment.serve),
    }


# storage


class _Journal(JournalFileBackend):
    """Optuna's journal without its fsync at each of some 20 writes a trial: the store can rebuild it."""

    def __init__(self, path: Path) -> None:
        self._path, self._own_lock = path, JournalFileOpenLock(str(path), grace_period=10)
        super().__init__(str(path), lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._own_lock.acquire()
        try:
            with open(self._path, "ab") as file:
                file.write(lines.encode())
        finally:
            self._own_lock.release()


def _storage(url: str) -> BaseStorage:
    scheme, _, rest = url.partition(":")
    if scheme == "journal" and rest:
        return _journal(Path(rest))
    if scheme == "sqlite" and rest.startswith("///") and rest != "///":
        Path(rest.removeprefix("///")).parent.mkdir(parents=True, exist_ok=True)
        return RDBStorage(url)
    if _is_postgresql(url):
        with contextlib.suppress(ValueError):  # a port that is no number
            return RDBStorage(_with_driver(url), engine_kwargs={"connect_args": {"connect_timeout": 10}})
    raise InputError(
        f"study.storage: {_redacted(url, url)!r}: is no storage. Write journal:PATH, sqlite:///PATH or "
        "postgresql://USER@HOST:PORT/DATABASE."
    )


def _close(storage: BaseStorage) -> None:
    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def _is_postgresql(url: str) -> bool:
    return url.partition("://")[0].partition("+")[0] in ("postgresql", "postgres") and "://" in url


def _with_driver(url: str) -> str:
    """Names psycopg 3, which SQLAlchemy does not take by itself."""
    scheme, _, rest = url.partition("://")
    return f"{scheme if '+' in scheme else 'postgresql+psycopg'}://{rest}"


def _journal(path: Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_stale_lock(path)
    _cut_torn_line(path)
    try:
        return JournalStorage(_Journal(path))
    except (ValueError, KeyError, TypeError, AssertionError):  # not a journal, or one torn by a power cut
        path.rename(path.with_name(f"{path.name}.unreadable-{time.time_ns()}"))
        return JournalStorage(_Journal(path))


def _cut_torn_line(path: Path) -> None:
    """Cuts a journal to its last whole line: Optuna would append to the torn one, and never read the file again."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _drop_stale_lock(path: Path) -> None:
    """Removes the lock of a killed process; one that is a moment old may be held by a running dashboard."""
    lock = path.with_name(path.name + ".lock")
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.lstat().st_mtime > STALE_LOCK_S:
            lock.unlink()


@contextlib.contextmanager
def _as_input_error(url: str) -> Iterator[None]:
    """What a storage says against its URL, without the password in it."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError, ImportError, OSError) as error:
        cause = error.__cause__ or error
        reason = _redacted(" ".join(str(cause).split("\n(Background")[0].split()), url)
        raise InputError(
            f"study.storage: {_redacted(url, url)!r}: cannot be used: {reason[:500]}. Check that it can be written "
            "and, for a database, that it runs and that user and database exist (`pip install 'varcas[postgresql]'`)."
        ) from None


def _redacted(text: str, url: str) -> str:
    """`text` without the passwords in `url`."""
    found = re.search(r"://[^:/@]*:(.*)@", url)
    secrets = [found[1]] if found else []
    secrets += re.findall(r"[?&]password=([^&]*)", url)
    for secret in filter(None, [*secrets, *map(unquote, secrets)]):
        text = text.replace(secret, "***")
    return text


# what the dashboard shows

SHOWN = (
    "output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "saturated", "goodput_rps",
    "request_rate_rps", "server_start_s", "slo_met", "valid",
)  # fmt: skip
"""Columns that a trial of the dashboard carries, in its order; objectives and SLO keys stand before them."""
REFRESH_S = 3.0
"""The dashboard looks for new rows at most this often, and only when a page asks."""
AS_TEXT = (".log", ".sh", ".md")
"""Files that browsers should show rather than store."""
UNSET = "none"
"""A flag that is left out, as `Space` names it."""


class _View(InMemoryStorage):
    """A throw-away storage whose best trial meets the SLO, where one does."""

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        best = super().get_best_trial(study_id)
        trials = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        feasible = [trial for trial in trials if max(trial.constraints.values(), default=0.0) <= 0]
        if not feasible:
            return best
        largest = self.get_study_directions(study_id)[0] == StudyDirection.MAXIMIZE
        return max(feasible, key=lambda trial: (trial.values or [0.0])[0] * (1 if largest else -1))


class KeptFiles:
    """An artifact store of Optuna's over files where they lie: nothing is copied, nothing is written."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}

    def attribute(self, path: Path) -> dict[str, str]:
        """Keeps a file, and returns the system attribute that makes it an artifact of a trial or a study.

        `optuna.artifacts.upload_artifact` sets the same one, but not of a trial that has ended.
        """
        artifact_id = str(uuid.uuid5(uuid.NAMESPACE_URL, path.absolute().as_uri()))
        self._paths[artifact_id] = path
        kind, encoding = mimetypes.guess_type(path.name)
        kind = "text/plain; charset=utf-8" if path.suffix in AS_TEXT else kind or "application/octet-stream"
        meta = ArtifactMeta(artifact_id=artifact_id, filename=path.name, mimetype=kind, encoding=encoding)
        return {f"artifacts:{artifact_id}": json.dumps(asdict(meta))}

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The file of an artifact."""
        try:
            return self._paths[artifact_id].open("rb")
        except (KeyError, OSError) as error:
            raise ArtifactNotFound(f"artifact {artifact_id} is not here") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refuses: what is shown is a view of the store."""
        raise PermissionError("the dashboard is a view: it keeps no uploads")

    def remove(self, artifact_id: str) -> None:
        """Forgets it; the file stays."""
        self._paths.pop(artifact_id, None)


@dataclass(frozen=True, slots=True)
class Beside:
    """What the dashboard shows of a study beside its rows.

    Attributes:
        note: in Markdown.
        files: report, plots, scripts.
        kept: serves them, and each trial's log.
    """

    note: str = ""
    files: tuple[Path, ...] = ()
    kept: KeptFiles = field(default_factory=KeptFiles)


def dashboard_view(experiment: Experiment, rows: Sequence[TrialRow], beside: Beside | None = None) -> BaseStorage:
    """Rows as Optuna studies to look at; never the one that proposes, which is told values for failures too.

    A trial has its row's number. Search and baseline are one study, confirmation starts another. A measured row is
    COMPLETE, one pruned before a start PRUNED, one without a believable result FAIL; a number without a row WAITING.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _View()
    by_number = {row.number: row for row in sorted(rows, key=lambda row: (row.number, row.attempt))}
    searched = {number: row for number, row in by_number.items() if row.purpose not in APART}
    confirmed = [row for row in by_number.values() if row.purpose == "confirm"]
    placed, beside = _placed(experiment, searched.values()), beside or Beside()
    study = _view_study(storage, experiment, experiment.name)
    _set_beside(study, beside)
    for number in range(max(searched, default=-1) + 1):
        if number in searched:
            _show(study, searched[number], experiment, *placed[number], {}, beside.kept)
        else:
            study.add_trial(_missing(number in by_number))
    if confirmed:
        study = _view_study(storage, experiment, f"{experiment.name} (confirmation)")
        arms: dict[str, BaseDistribution] = {"arm": CategoricalDistribution(("baseline", "candidate"))}
        for row in confirmed:
            _show(study, row, experiment, {"arm": row.arm}, arms, {"trial": row.number}, beside.kept)
    return storage


def _set_beside(study: optuna.Study, beside: Beside) -> None:
    from optuna_dashboard import save_note

    if beside.note:
        save_note(study, beside.note)
    for path in beside.files:
        if path.is_file():
            for key, meta in beside.kept.attribute(path).items():
                study._storage.set_study_system_attr(study._study_id, key, meta)


def _view_study(storage: BaseStorage, experiment: Experiment, name: str) -> optuna.Study:
    directions = [objective.direction for objective in experiment.objectives]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, sampler=RandomSampler())
    with _no_experimental_warnings():
        study.set_metric_names([objective.metric for objective in experiment.objectives])
    for key, value in _study_attributes(experiment).items():
        study.set_user_attr(key, value)
    return study


def _missing(confirms: bool) -> FrozenTrial:
    """Holds the place of a number without a row of the search."""
    if confirms:
        return create_trial(state=TrialState.PRUNED, user_attrs={"outcome": "a confirmation start, in its own study"})
    return create_trial(state=TrialState.WAITING, user_attrs={"outcome": "no row yet: it runs, or its driver was lost"})


_Placed = tuple[dict[str, Any], dict[str, BaseDistribution]]


def _placed(experiment: Experiment, rows: Iterable[TrialRow]) -> dict[int, _Placed]:
    """Parameters and distributions by number.

    A configuration outside of the space gets labels of its own: Optuna's importances and plots look only at parameters
    that every trial has, and the baseline often lies outside.
    """
    space = Space(experiment)
    flags = {row.number: row.config_flags for row in rows}
    inside: dict[int, Params] = {}
    known: dict[str, BaseDistribution] = {}
    for number in flags:
        params = space.params_of(flags[number])
        if params is not None:
            replayed = _Replayed(params)
            space.propose(replayed)
            inside[number] = params
            known |= replayed.distributions
    found = {number: inside.get(number) or _labels(flags[number], known) for number in flags}
    for name, distribution in known.items():
        if isinstance(distribution, CategoricalDistribution):
            used = dict.fromkeys(
                (*distribution.choices, *(params[name] for params in found.values() if name in params))
            )
            known[name] = CategoricalDistribution(cast(Sequence[Label], tuple(used)))
    return {number: (params, {name: known[name] for name in params}) for number, params in found.items()}


def _labels(flags: Flags, known: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """A configuration outside of the space, by the space's parameters."""
    labels: dict[str, Any] = {}
    for name, distribution in known.items():
        value = flags.get(name)
        if isinstance(distribution, CategoricalDistribution):
            labels[name] = UNSET if value is None else value if isinstance(value, Label) else json.dumps(value)
        elif isinstance(value, int | float) and distribution._contains(value):
            labels[name] = value
    return labels


def _show(
    study: optuna.Study,
    row: TrialRow,
    experiment: Experiment,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    first: dict[str, Any],
    kept: KeptFiles,
) -> None:
    from optuna_dashboard import save_note

    state, values = _shown_result(row, experiment)
    constraints = constraints_of(row, experiment) if values else {}
    files = kept.attribute(Path(row.log_path)) if row.log_path and Path(row.log_path).is_file() else {}
    trial = create_trial(
        state=state,
        values=values,
        params=params,
        distributions=distributions,
        user_attrs=first | _shown_attributes(row, experiment),
        system_attrs={"constraints": list(constraints.values())} | files,  # the key that optuna-dashboard 0.21 reads
        constraints=constraints,
    )
    trial.datetime_start = row.started_at.astimezone().replace(tzinfo=None)  # as Optuna has it: local, naive
    trial.datetime_complete = trial.datetime_start + datetime.timedelta(seconds=_wall_s(row))
    study.add_trial(trial)
    added = study.get_trials(deepcopy=False)[-1]
    save_note(optuna.trial.Trial(study, added._trial_id), _note(row, experiment))


def _shown_result(row: TrialRow, experiment: Experiment) -> tuple[TrialState, list[float] | None]:
    if row.state == "infeasible":
        return TrialState.PRUNED, None
    values = objectives_of(row, experiment)
    if row.state != "complete" or row.valid is False or values is None:
        return TrialState.FAIL, None
    return TrialState.COMPLETE, values


def _wall_s(row: TrialRow) -> float:
    stages = (row.fetch_s, row.server_start_s, row.warmup_s, row.load_s, row.drain_s, row.stop_s, row.overhead_s)
    return sum(stage or 0.0 for stage in stages)


def _outcome(row: TrialRow) -> str:
    if row.state == "complete":
        return "not to be believed" if row.valid is False else "misses the SLO" if row.slo_met is False else "complete"
    return row.reason_rule or row.failure_kind or row.state


def _shown_attributes(row: TrialRow, experiment: Experiment) -> dict[str, Any]:
    columns = dict.fromkeys((*(o.metric for o in experiment.objectives), *sorted(experiment.slo), *SHOWN))
    named: dict[str, Any] = {
        "outcome": _outcome(row),
        "failure_detail": row.failure_detail[:500] if row.failure_detail else None,
        "hint": row.failure_hint,
        "not_believed": "; ".join(row.invalid_reasons) or None,
        **{name: _rounded(getattr(row, name)) for name in columns},
        "log": row.log_path,
        "command": row.command,
        "config": _flags_text(row.config_flags),
    }
    return {name: value for name, value in named.items() if value is not None}


def _rounded(value: float | bool | None) -> float | bool | None:
    return round(value, 2) if isinstance(value, float) else value


def _note(row: TrialRow, experiment: Experiment) -> str:
    """One trial in Markdown: what came of it and why, what to do, its log, how to start it again."""
    missed = [
        f"{key} is {getattr(row, key):.4g}, the limit {limit:g}"
        for key, limit in sorted(experiment.slo.items())
        if row.constraints.get(key, 0) > 0 and getattr(row, key) is not None
    ]
    reasons = "; ".join([*row.invalid_reasons, *missed])
    parts = [
        f"**{'SIMULATED: ' if row.simulated else ''}{_outcome(row)}**",
        _fenced(row.failure_detail) if row.failure_detail else None,
        f"What to do: {html.escape(row.failure_hint, quote=False)}" if row.failure_hint else None,
        html.escape(reasons, quote=False) or None,
        _metrics_table(row, experiment) if row.state == "complete" else None,
        f"Server log: [{row.log_path}](/log/{row.number})" if row.log_path else None,
        f"Start this server again:\n{_fenced(row.command)}" if row.command else None,
    ]
    return "\n\n".join(part for part in parts if part)


def _fenced(text: str) -> str:
    """A block of strangers' text, whose fence is longer than any within it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _metrics_table(row: TrialRow, experiment: Experiment) -> str:
    columns = dict.fromkeys((*(o.metric for o in experiment.objectives), *sorted(experiment.slo), *SHOWN))
    named = [(name, found) for name in columns if (found := _rounded(getattr(row, name))) is not None]
    return "\n".join(["| metric | value |", "|---|---|", *(f"| {name} | {found} |" for name, found in named)])


class _Fresh:
    """The dashboard's WSGI application over the newest rows, and the servers' logs at `/log/N`."""

    def __init__(
        self, experiment: Experiment, read: Callable[[], Sequence[TrialRow]], beside: Callable[[], Beside]
    ) -> None:
        self._experiment, self._read, self._beside = experiment, read, beside
        self._lock = threading.Lock()
        self._rows: Sequence[TrialRow] = ()
        self._app: WSGIApplication | None = None
        self._looked_s = 0.0

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        app = self._refreshed()
        number = environ["PATH_INFO"].removeprefix("/log/")
        return self._log(number, start_response) if number.isdecimal() else app(environ, start_response)

    def _refreshed(self) -> WSGIApplication:
        from optuna_dashboard import wsgi

        with self._lock:
            if self._app is None or time.monotonic() - self._looked_s > REFRESH_S:
                rows = self._read()
                if self._app is None or [row.trial_id for row in rows] != [row.trial_id for row in self._rows]:
                    beside = self._beside()
                    view = dashboard_view(self._experiment, rows, beside)
                    self._rows, self._app = rows, wsgi(view, artifact_store=beside.kept)
                self._looked_s = time.monotonic()
            return self._app

    def _log(self, number: str, start_response: StartResponse) -> Iterable[bytes]:
        paths = [Path(row.log_path) for row in self._rows if row.number == int(number) and row.log_path]
        found = [path for path in paths if path.is_file()]
        start_response("200 OK" if found else "404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [found[-1].read_bytes() if found else b"This log is not on this machine."]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Unlogged(WSGIRequestHandler):
    """Writes no line per request: an open page asks every few seconds."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing."""


def dashboard_server(
    experiment: Experiment,
    read: Callable[[], Sequence[TrialRow]],
    port: int,
    beside: Callable[[], Beside] = Beside,
) -> WSGIServer:
    """optuna-dashboard on the loopback, over the rows that `read` gives; `serve_forever` runs it.

    Args:
        experiment: the study's.
        read: gives its rows, asked again while pages are open.
        port: of the loopback.
        beside: gives what is shown beside the rows.

    Raises:
        InputError: optuna-dashboard is not installed.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise InputError("dashboard: optuna-dashboard is not installed: `pip install 'varcas[dashboard]'`.")
    warnings.filterwarnings("ignore", category=UserWarning, module="optuna")  # of few trials, at each look
    server = make_server("127.0.0.1", port, _Fresh(experiment, read, beside), _Server, _Unlogged)
    assert isinstance(server, WSGIServer)
    return server
