"""`varcas batch-size`: the whole curve of a scheduler's limit from one server start, its knee, and the pick.

The knee is the smallest value whose tokens per second the best one does not beat by more than the noise: the rule of
one standard error (Breiman, Friedman, Olshen and Stone 1984, *Classification and Regression Trees*, 3.4.3: the simplest
within the error of the best), with the 95 % interval of the ratio in its place and at least `RESOLUTION`. The pick is
the same by the experiment's objective, of what meets the SLO: among values that cannot be told apart, the smallest.
"""

from __future__ import annotations

import functools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.engine.failures import HINTS, RETRIED
from varcas.engine.node import Checked, Node
from varcas.errors import InputError, VarcasError
from varcas.experiment import Choices, Experiment, Objective
from varcas.inner import Limits, LiveStart, at_most, live_problem, live_start
from varcas.intervals import student_half
from varcas.pool import Finished, Pool
from varcas.pruner import VLLM_REFUSES
from varcas.records import TrialRow
from varcas.report import usable, value
from varcas.space import ServingConfig, Space
from varcas.starts import HOPELESS, Event, Job, SeriesStarts, Work, check, opened
from varcas.store import Store
from varcas.study import Proposal
from varcas.trial import Listed, Series, Step, cold_step, run_series

RESOLUTION = 0.03
"""Two values closer than this are equal: live and fresh servers differ by as much (docs/batch_size.md)."""
KNEE_METHOD = (
    "smallest value whose tokens/s the best beats by no more than the 95 % interval of their ratio, "
    f"or {RESOLUTION:.0%}"
)
MAX_STARTS_LOST = 3
"""Starts without a new measurement before the rest is given up."""
DEFAULT_VALUES: dict[str, tuple[int, ...]] = {
    "max_num_seqs": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "max_num_batched_tokens": (512, 1024, 2048, 4096, 8192),
}


class Point(BaseModel):
    """One value of the curve."""

    model_config = ConfigDict(frozen=True)
    value: int
    number: int | None = Field(description="of its row in the store: `varcas show N`")
    state: str
    failure: str | None = Field(description="why there are no figures")
    measured_live: bool
    output_tokens_per_s: float | None
    output_tokens_per_s_lo: float | None
    output_tokens_per_s_hi: float | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_mean_ms: float | None
    request_rate_rps: float | None
    goodput_rps: float | None
    saturated: bool | None
    slo_met: bool | None
    valid: bool | None
    deploy: dict[str, JsonValue] = Field(description="flags of the server that was measured")


class Confirmed(BaseModel):
    """Fresh starts of the pick."""

    model_config = ConfigDict(frozen=True)
    values: list[float] = Field(description="of the objective, one a start")
    mean: float
    lo: float | None = Field(description="lower end of the mean's 95 % interval over starts")
    hi: float | None
    live_ratio: float = Field(description="the curve's figure over this mean")


class BatchSizeCurve(BaseModel):
    """What `varcas batch-size` answers."""

    model_config = ConfigDict(frozen=True)
    study: str
    flag: str
    model: str
    engine_version: str | None
    gpu: str | None
    objective: str
    slo: dict[str, float]
    points: list[Point]
    knee: int | None
    knee_method: str = KNEE_METHOD
    pick: int | None = Field(description="by objective and SLO; None: nothing that was measured meets the SLO")
    pick_value: float | None = Field(description="of the objective")
    pick_lo: float | None = Field(description="lower end of its 95 % interval within the start")
    pick_hi: float | None
    confirmed: Confirmed | None
    deploy: dict[str, JsonValue] | None
    command: str | None
    starts: int = Field(description="server starts that this call made")
    wall_s: float
    notes: list[str]


def batch_size_search(
    experiment: Experiment,
    values: Sequence[int] = (),
    *,
    flag: str = "max_num_seqs",
    fresh: bool = False,
    confirm: bool = False,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    stopping: threading.Event | None = None,
    run: Work = run_series,
    node: Callable[..., Any] = Node,
    **ray_options: Any,
) -> BatchSizeCurve:
    """Measures the experiment's baseline with several values of a limit, on one server where vLLM allows it.

    What the store holds already is not measured again.

    Args:
        experiment: `serve`, `baseline`, workload, SLO and objective count.
        values: of the flag; none: the space's, else powers of two.
        flag: `max_num_seqs` or `max_num_batched_tokens`.
        fresh: a server of its own for each value.
        confirm: start the pick afresh, `study.repeats` times.
        address: of a Ray cluster; None starts a local Ray.
        on_event: told of starts and rows.
        stopping: set it to end early; what was measured is kept.
        run: what measures a series, `trial.run_series` unless a test measures varcas itself.
        node: what answers for a worker node, likewise.
        ray_options: further arguments of `ray.init` for a local Ray.

    Raises:
        InputError: the experiment cannot be run as asked here; nothing was started.
        VarcasError: no value could be measured.
    """
    chosen = _values(experiment, values, flag)
    if experiment.objectives[0].metric == "capacity_rps":
        raise InputError("objective: capacity_rps: has no figure at one rate. `varcas capacity` measures it.")
    space = check(experiment, searched=False)
    began_s = time.monotonic()
    with opened(experiment, lambda: Pool(experiment.hardware, address, **ray_options)) as (store, pool):
        stop = stopping or threading.Event()
        with Curve(experiment, space, store, pool, on_event, stop, node, run, flag, chosen) as curve:
            curve.measure(fresh)
            if confirm:
                curve.confirm()
            return curve.answer(time.monotonic() - began_s)


def _values(experiment: Experiment, values: Sequence[int], flag: str) -> tuple[int, ...]:
    """Those that are asked for, in order.

    Raises:
        InputError: one is no positive integer, or the flag is none of the two.
    """
    if flag not in DEFAULT_VALUES:
        raise InputError(
            f"--flag: {flag!r}: cannot be swept on a running server. Allowed: {', '.join(DEFAULT_VALUES)}."
        )
    entry = experiment.space.get(flag)
    listed = entry.choices if isinstance(entry, Choices) else ()
    own = [choice for choice in listed if isinstance(choice, int) and not isinstance(choice, bool)]
    found = tuple(sorted(set(values or own or DEFAULT_VALUES[flag])))
    if found[0] < 1:
        raise InputError(f"--values: {found[0]}: must be positive integers, e.g. --values 1,2,4,8.")
    return found


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One value, and how it is measured: what its row is called, and what vLLM says of it."""

    value: int
    config: ServingConfig
    checked: Checked


class Curve(SeriesStarts):
    """One curve. `measure`, `confirm` and `answer` are called in that order."""

    purpose = "batch_size"

    def __init__(
        self, experiment: Experiment, space: Space, store: Store, pool: Pool, on_event: Callable[[Event], None],
        stopping: threading.Event, node: Callable[..., Any], run: Work, flag: str, values: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__(experiment, space, store, pool, on_event, stopping, node, run)
        self._flag, self._asked = flag, values
        flags = {**experiment.serve, **experiment.baseline, flag: None}
        self._base = ServingConfig(experiment.model, experiment.revision, flags)
        self._found: dict[int, TrialRow] = {}
        self._fresh_rows: list[TrialRow] = []
        self._values_of: Mapping[str, int] = {}
        self._series_done = Series(())
        self._notes: list[str] = []
        self._num_starts = 0

    def measure(self, fresh: bool) -> None:
        """Measures every value that the store does not hold.

        Raises:
            KeyboardInterrupt: asked to stop.
            VarcasError: no server starts.
        """
        wanted = self._taken(fresh_configs(self._base, self._flag, self._asked))
        problem = live_problem(self._base.flags, self.flag_names, (self._flag,))
        if problem and not fresh:
            self._say(f"{self._flag} cannot change on a running server: {problem}. Each value gets a server of its own")
        if not fresh and not problem and len(wanted) > 1:
            wanted = self._measure_live([one.value for one in wanted])
        self._measure_fresh([one for one in wanted if one.value not in self._found])

    def _taken(self, configs: Mapping[int, ServingConfig]) -> list[_Wanted]:
        """What vLLM takes of these; a refusal is a row, and costs no GPU."""
        wanted = [_Wanted(number, config, self._check(config)) for number, config in configs.items()]
        for one in wanted:
            if not one.checked.ok and one.value not in self._found:
                self._refused(one)
        return [one for one in wanted if one.checked.ok]

    def _refused(self, one: _Wanted) -> None:
        """Keeps a refusal, once."""
        key, kind = self._key(one, live=False), "unsupported_by_engine"
        row = next((row for row in self._rows if row.trial_key == key and row.state == "infeasible"), None)
        if row is None:
            columns = {"failure_kind": kind, "failure_detail": one.checked.error, "failure_hint": HINTS[kind]}
            job = self._job(one.value, one.config, one.checked)
            self._record(self._row(job, state="infeasible", reason_rule=VLLM_REFUSES, **columns))
        else:
            self._found[one.value] = row

    def _job(self, value: int, config: ServingConfig, checked: Checked, *, live: bool = False) -> Job:
        proposal = Proposal(None, {self._flag: value}, dict(config.flags), config, self.purpose)
        job = Job(proposal, self._number(), self.purpose, checked, live=live)
        return replace(job, attempt=self._measured_before(job))

    # live

    def _measure_live(self, values: list[int]) -> list[_Wanted]:
        """Measures what one server can; returns what is left for fresh ones."""
        lost = 0
        while values and lost < MAX_STARTS_LOST:
            start, checked = self._live_start(values)
            steps = self._taken({value: start.at(self._limits(value)) for value in values})
            left = [one for one in steps if not self._known(one, live=True)]
            if not left:
                return []
            series = self._series(left, start, checked)
            if series.not_live:
                self._say(f"this server takes no new limits ({series.not_live}): each value left gets its own")
                values = [one.value for one in left if one.value not in self._found]
                return self._taken(fresh_configs(self._base, self._flag, values))
            lost = 0 if any(one.outcome.state == "complete" for one in series.kept()) else lost + 1
            values = [one.value for one in left if one.value not in self._found]
        if values:
            self._say(f"given up on {self._flag} {', '.join(map(str, values))}: {lost} starts measured nothing")
        return []

    def _live_start(self, values: Sequence[int]) -> tuple[LiveStart, Checked]:
        most = self._check(at_most(self._base, {self._flag: values}))
        start = live_start(self._base, {self._flag: values}, self.flag_names, most.resolved)
        return start, self._check(start.config)

    def _limits(self, value: int) -> Limits:
        return Limits(**{self._flag: value})

    def _known(self, one: _Wanted, *, live: bool) -> bool:
        """Takes a measurement from the store."""
        key = self._key(one, live=live)
        row = next((row for row in self._rows if row.trial_key == key and row.is_believed), None)
        if row is not None:
            self._found[one.value] = row
        return row is not None

    def _key(self, one: _Wanted, *, live: bool) -> str:
        proposal = Proposal(None, {}, {}, one.config, self.purpose)
        return self._trial_key(Job(proposal, 0, self.purpose, one.checked, live=live))

    def _series(self, left: Sequence[_Wanted], start: LiveStart, checked: Checked) -> Series:
        """One server start and its loads, in an order that drift does not share with the values."""
        order = list(left)
        random.Random(self.experiment.study.seed).shuffle(order)
        cold = cold_step(start.config, self.experiment.workload, Limits())
        steps = (cold, *(Step(o.config, self.experiment.workload, self._limits(o.value)) for o in order))
        job = self._job(max(one.value for one in left), start.config, checked, live=True)
        text = f"{self._flag} {', '.join(str(one.value) for one in order)} on one server"
        self._emit(Event("confirm", text=f"{len(order)} values from one server start", total=len(order)))
        return self._run_job(job, Listed(steps), text, {one.config.hash: one.value for one in order}, live=True)

    # fresh

    def _measure_fresh(self, wanted: Sequence[_Wanted]) -> None:
        """A server for each."""
        for one in wanted:
            for _ in range(MAX_STARTS_LOST):
                if one.value in self._found or self._known(one, live=False):
                    break
                self._fresh(one, f"{self._flag} {one.value} on a server of its own")

    def _fresh(self, one: _Wanted, text: str) -> Series:
        job = self._job(one.value, one.config, one.checked)
        workload = self.experiment.workload
        steps = (cold_step(one.config, workload), Step(one.config, workload))
        return self._run_job(job, Listed(steps), text, {one.config.hash: one.value}, live=False)

    def confirm(self) -> None:
        """Starts the pick afresh, `study.repeats` times, less what the store holds."""
        row = self._pick()
        if row is None:
            return
        config = ServingConfig(self.experiment.model, self.experiment.revision, row.config_flags)
        one = _Wanted(self._value(row), config, self._check(config))
        key, repeats = self._key(one, live=False), max(1, self.experiment.study.repeats)
        for _ in range(repeats + MAX_STARTS_LOST):
            self._fresh_rows = [row for row in self._rows if row.trial_key == key and row.is_believed]
            if len(self._fresh_rows) >= repeats:
                break
            self._fresh(one, f"confirming {self._flag} {one.value} on a fresh server")

    # work

    def _run_job(self, job: Job, plan: Listed, text: str, values: Mapping[str, int], *, live: bool) -> Series:
        """Has a worker run it, waits for it, and records what came of it.

        Raises:
            KeyboardInterrupt: asked to stop.
            VarcasError: a failure that every value shares.
        """
        self._values_of = values
        self._series_done = Series(())
        work = functools.partial(self._run, plan=plan)
        self._num_starts += 1
        self._submit(job, work, self._task(job, live=live), text)
        self._drain()
        last = self._series_done.done[-1].outcome if self._series_done.done else None
        if last is not None and last.failure_kind in HOPELESS:
            raise VarcasError(
                f"{last.failure_kind}: {last.failure_detail}. No value of {self._flag} changes that. "
                f"Fix: {HINTS[last.failure_kind]}; then run it again. Log: {last.log_path or 'none'}"
            )
        return self._series_done

    def _take(self, job: Job, finished: Finished, wall_s: float) -> None:
        """Records a start's rows: disk first."""
        if finished.lost is not None:
            row, _ = self._measured_row(job, finished, wall_s)
            self._record(row)
            return
        self._series_done = finished.result
        for row, done in self._series_rows(job, finished.result, wall_s):
            value = self._values_of.get(done.step.config.hash, self._value(row))
            row = row.model_copy(update={"params_json": json.dumps({self._flag: value})})
            load = done.outcome.load
            self._record(row, load.records if load else (), done.outcome.samples)

    def _record(self, row: TrialRow, records: Sequence[Any] = (), samples: Sequence[Any] = ()) -> None:
        self.store.append(row, records, samples)
        self._rows.append(row)
        if row.state != "stopped" and row.failure_kind not in RETRIED:
            self._found.setdefault(self._value(row), row)
        self._emit(Event("row", row=row))

    def _value(self, row: TrialRow) -> int:
        found: int = json.loads(row.params_json)[self._flag]
        return found

    def _say(self, text: str) -> None:
        self._notes.append(text)
        self._note(text)

    # answer

    def _pick(self) -> TrialRow | None:
        return pick([row for _, row in sorted(self._found.items())], self.experiment.objectives[0])

    def answer(self, wall_s: float) -> BatchSizeCurve:
        """The curve as far as it was measured.

        Raises:
            VarcasError: nothing was.
        """
        rows = dict(sorted(self._found.items()))
        if not any(row.state == "complete" for row in rows.values()):
            last = next(iter(reversed(rows.values())), None)
            why = (
                f"{last.failure_kind}: {last.failure_detail}. Fix: {last.failure_hint}"
                if last
                else "no start came back"
            )
            raise VarcasError(f"no value of {self._flag} could be measured: {why}.")
        chosen, objective = self._pick(), self.experiment.objectives[0]
        lo, hi = interval_of(chosen, objective.metric) if chosen else (None, None)
        return BatchSizeCurve(
            study=self.experiment.name,
            flag=self._flag,
            model=self.experiment.model,
            engine_version=self.facts.engine_version,
            gpu=self.facts.gpu_name,
            objective=objective.metric,
            slo=dict(self.experiment.slo),
            points=[_point(number, row) for number, row in rows.items()],
            knee=knee({number: row for number, row in rows.items() if row.is_believed}),
            pick=self._value(chosen) if chosen else None,
            pick_value=value(chosen, objective) if chosen else None,
            pick_lo=lo,
            pick_hi=hi,
            confirmed=confirmed(chosen, self._fresh_rows, objective) if chosen else None,
            deploy=chosen.config_flags if chosen else None,
            command=chosen.command if chosen else None,
            starts=self._num_starts,
            wall_s=wall_s,
            notes=self._notes,
        )


def fresh_configs(base: ServingConfig, flag: str, values: Iterable[int]) -> dict[int, ServingConfig]:
    """Each value to the plain configuration with it."""
    return {number: ServingConfig(base.model, base.revision, {**base.flags, flag: number}) for number in values}


def _point(number: int, row: TrialRow) -> Point:
    failure = row.failure_kind and f"{row.failure_kind}: {row.failure_detail}"
    same = {name: getattr(row, name) for name in Point.model_fields if hasattr(row, name)}
    if row.valid is False and not failure:
        failure = f"not to be believed: {'; '.join(row.invalid_reasons)}"
    return Point(**same | {"value": number, "failure": failure, "deploy": row.config_flags})


def interval_of(row: TrialRow, metric: str) -> tuple[float | None, float | None]:
    """The 95 % interval of a column within its start."""
    return row.lo.get(metric), row.hi.get(metric)


def told_apart(better: TrialRow, other: TrialRow, objective: Objective) -> bool:
    """Whether one row beats another by more than the 95 % interval of their ratio, and than `RESOLUTION`."""
    good, bad = value(better, objective), value(other, objective)
    if not good or not bad:
        return good != bad
    gain = abs(math.log(good / bad))
    halves = [_half(better, objective.metric, good), _half(other, objective.metric, bad)]
    return gain > max(math.log1p(RESOLUTION), math.hypot(*halves))


def _half(row: TrialRow, metric: str, found: float) -> float:
    """Half a figure's interval, as a share of it; 0 where there is none."""
    lo, hi = interval_of(row, metric)
    return 0.0 if lo is None or hi is None else (hi - lo) / 2 / found


def _smallest(rows: Sequence[TrialRow], objective: Objective) -> TrialRow | None:
    """The first of rows, in order of their value, that the best does not beat."""
    sign = 1 if objective.direction == "maximize" else -1
    known = [row for row in rows if value(row, objective) is not None]
    if not known:
        return None
    best = max(known, key=lambda row: sign * (value(row, objective) or 0.0))
    return next(row for row in known if row is best or not told_apart(best, row, objective))


def knee(rows: Mapping[int, TrialRow]) -> int | None:
    """The smallest value that the best does not beat in tokens per second; None without a measurement.

    Args:
        rows: value to its measurement.
    """
    ordered = sorted(rows.items())
    found = _smallest([row for _, row in ordered], Objective(maximize="output_tokens_per_s"))
    return next((number for number, row in ordered if row is found), None)


def pick(rows: Sequence[TrialRow], objective: Objective) -> TrialRow | None:
    """What to deploy of rows in order of their value: the smallest that the best does not beat, within the SLO."""
    return _smallest([row for row in rows if usable(row, objective)], objective)


def confirmed(row: TrialRow, fresh: Sequence[TrialRow], objective: Objective) -> Confirmed | None:
    """The pick's fresh starts; None without any. The interval is Student's over starts, from two on."""
    values = [found for one in fresh if (found := value(one, objective)) is not None]
    live = value(row, objective)
    if not values or live is None:
        return None
    mean = float(np.mean(values))
    half = student_half(values) if len(values) > 1 else None
    return Confirmed(
        values=values,
        mean=mean,
        lo=None if half is None else mean - half,
        hi=None if half is None else mean + half,
        live_ratio=live / mean if mean else math.inf,
    )
