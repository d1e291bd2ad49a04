"""`varcas capacity`: the highest request rate that meets the SLO, from one server start.

A load holds a rate when every limit of the SLO is met and the server keeps up (`saturation.py`). The rate is doubled or
halved until one load holds and one does not, then bisected on its logarithm until the two are `precision` apart; the
lower one must hold with other arrivals and lengths too. A load that is lost for certain ends at once (`early_stop.py`).

From all loads together: each limit is a ratio of sums over requests, the share of requests (of gaps, for ITL) beyond
the limit against what the percentile allows, or the mean over the limit. Load makes it no smaller, so the ratios are
made to rise with the rate by isotonic regression (Barlow, Bartholomew, Bremner and Brunk 1972, *Statistical Inference
under Order Restrictions*), and the capacity is where the first of them crosses, between
two rates that were measured. Its 95 % interval is the percentile bootstrap over blocks of requests, as long as these
resemble their neighbours (Künsch 1989, *The jackknife and the bootstrap for general stationary observations*), the
same for all rates: it holds for this start, and other starts differ by 2-4 %.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.columns import Floats, Measured
from varcas.early_stop import StopRules
from varcas.engine.failures import HINTS
from varcas.engine.node import Node
from varcas.errors import InputError, VarcasError
from varcas.experiment import Experiment, Workload
from varcas.intervals import autocorrelation_time
from varcas.metrics import constraints_of, latencies
from varcas.pool import Finished, Pool
from varcas.records import PERMILLE, TrialRow, split_key
from varcas.saturation import filling
from varcas.space import ServingConfig, Space
from varcas.starts import Event, Job, SeriesStarts, Work, check, opened
from varcas.store import Store
from varcas.study import Proposal
from varcas.trial import Done, Series, Step, cold_step, run_series

PRECISION = 0.04
"""The rate that holds and the one that does not lie at most this far apart."""
MAX_LOADS = 18
FEWEST_DOUBLINGS = 10
"""So often the first rate is halved before nothing is said to hold; doubled it is as long as there are loads."""
SEED_STEP = 1009
"""Between the seeds of loads of one rate."""
RESAMPLES = 1000
RATED = ("poisson", "constant", "gamma")
"""Arrivals that one rate describes."""
CLIFF = 1.0
"""Ratio of a load that was given up, or that overran the server, over what is allowed: at least this much above 1."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What one load says.

    Attributes:
        rate_rps: asked for.
        met: it holds.
        cliff: why it was given up (the SLO key that was lost), or `saturation` of a server that was overrun; None: it
            was measured whole and tells its shares.
        parts: SLO key to what each request adds to the numerator and the denominator of its ratio; 1 is the limit.
    """

    rate_rps: float
    met: bool
    cliff: str | None
    parts: Mapping[str, tuple[Floats, Floats]]


def judged(done: Done, slo: Mapping[str, float]) -> Judged:
    """Reads a load."""
    rate, outcome = done.step.workload.rate_rps or 0.0, done.outcome
    load = outcome.load
    if load is None or not load.records or outcome.state != "complete":
        return Judged(rate, False, _lost(done), {})
    measured = Measured.of_load(load)
    saturated = filling(measured, outcome.samples, arrival=done.step.workload.arrives.kind).saturated
    met = bool(constraints_of(measured, slo)["slo_met"]) and not saturated
    parts = {key: _parts(measured, key, limit) for key, limit in slo.items()}
    return Judged(rate, met, "saturation" if saturated else None, parts)


def _lost(done: Done) -> str:
    """What a load that was cut short was lost by."""
    stop, kind = done.outcome.early_stop, done.outcome.failure_kind
    return max(stop.bounds, key=lambda key: stop.bounds[key]) if stop and stop.bounds else kind or "no answer"


def _parts(measured: Measured, key: str, limit: float) -> tuple[Floats, Floats]:
    """Numerator and denominator of a limit's ratio, by request."""
    name, stat = split_key(key)
    series = latencies(measured.window)[name]
    if stat == "mean":
        over = np.minimum(series.values / limit, 1e6)
    else:
        over = (series.values > limit) * (1000.0 / (1000 - PERMILLE[stat]))
    if series.sizes is None:
        return over.astype(np.float64), np.ones(len(over))
    starts = np.concatenate([[0], np.cumsum(series.sizes)])
    sums = np.concatenate([[0.0], np.cumsum(over)])
    return sums[starts[1:]] - sums[starts[:-1]], series.sizes.astype(np.float64)


# the plan: pure, from what the loads so far say


@dataclass(frozen=True, slots=True)
class Bracket:
    """What is known of the capacity.

    Attributes:
        met_rps: the highest rate that holds below every one that does not; None: none yet.
        missed_rps: the lowest that does not hold; None: none yet.
        loads_at_met: so many loads had `met_rps`.
    """

    met_rps: float | None
    missed_rps: float | None
    loads_at_met: int


def bracket(loads: Sequence[Judged]) -> Bracket:
    """A rate holds when its loads together do: none on the cliff, and their ratios at most 1."""
    by_rate = _by_rate(loads)
    missed = min((rate for rate, same in by_rate.items() if not _holds(same)), default=None)
    met = [rate for rate, same in by_rate.items() if _holds(same) and (missed is None or rate < missed)]
    best = max(met, default=None)
    return Bracket(best, missed, len(by_rate[best]) if best is not None else 0)


def _by_rate(loads: Sequence[Judged]) -> dict[float, list[Judged]]:
    found: dict[float, list[Judged]] = {}
    for load in loads:
        found.setdefault(load.rate_rps, []).append(load)
    return found


def _holds(same: Sequence[Judged]) -> bool:
    if any(load.cliff for load in same):
        return False
    return all(load.met for load in same) or all(ratio <= 1 for ratio in _ratios(same).values())


def _ratios(same: Sequence[Judged]) -> dict[str, float]:
    """Of loads of one rate together."""
    keys = {key for load in same for key in load.parts}
    return {key: _ratio([load.parts[key] for load in same if key in load.parts]) for key in sorted(keys)}


def _ratio(parts: Sequence[tuple[Floats, Floats]]) -> float:
    weight = sum(float(den.sum()) for _, den in parts)
    return sum(float(num.sum()) for num, _ in parts) / weight if weight else 0.0


def next_rate(loads: Sequence[Judged], first_rps: float, precision: float = PRECISION) -> float | None:
    """The rate to try next; None when the capacity is known, or no rate worth the name holds."""
    found = bracket(loads)
    if not loads:
        return first_rps
    if found.missed_rps is None:
        return 2 * (found.met_rps or first_rps)
    if found.met_rps is None:
        lower = found.missed_rps / 2
        return lower if lower * 2**FEWEST_DOUBLINGS > first_rps else None
    if found.missed_rps <= found.met_rps * (1 + precision):
        return found.met_rps if found.loads_at_met < 2 else None
    return float(f"{math.sqrt(found.met_rps * found.missed_rps):.4g}")


@dataclass(frozen=True, slots=True)
class Bisection:
    """A `trial.Plan` that looks for the capacity of one server.

    Attributes:
        config: of the server.
        workload: the traffic, whose rate changes.
        slo: metric name to its limit in ms.
        precision: the bracket's width in the end, as a share.
        max_loads: at most so many, the discarded one apart.
        budget_s: for start and loads; None: `max_loads` alone ends it.
    """

    config: ServingConfig
    workload: Workload
    slo: Mapping[str, float]
    precision: float = PRECISION
    max_loads: int = MAX_LOADS
    budget_s: float | None = None

    def next(self, done: Sequence[Done]) -> Step | None:
        """As `trial.Plan` has it."""
        first_rps = self.workload.rate_rps or 1.0
        if not done:
            return cold_step(self.config, self.workload)
        loads = [judged(one, self.slo) for one in done if not one.step.discarded]
        if len(loads) >= self.max_loads or self._spent(done):
            return None
        rate = next_rate(loads, first_rps, self.precision)
        return None if rate is None else self._step(rate, sum(load.rate_rps == rate for load in loads))

    def _spent(self, done: Sequence[Done]) -> bool:
        """Whether one more load may end beyond the budget."""
        one_s = self.workload.warmup_s + self.workload.duration_s + self.workload.max_drain_s
        return self.budget_s is not None and sum(map(_wall_s, done)) + one_s > self.budget_s

    def _step(self, rate: float, again: int) -> Step:
        changed = {"rate_rps": rate, "seed": (self.workload.seed + SEED_STEP * again) % 2**32}
        return Step(self.config, self.workload.model_copy(update=changed), stop_rules=StopRules(dict(self.slo)))


def _wall_s(done: Done) -> float:
    times = done.outcome.times
    return times.fetch_s + times.server_start_s + times.warmup_s + times.load_s + times.drain_s + times.overhead_s


# the answer: pure


@dataclass(frozen=True, slots=True)
class Estimate:
    """A capacity.

    Attributes:
        rps: None when no rate holds.
        lo: lower end of its 95 % interval within the start; None as `rps`.
        hi: upper end; None when every rate holds, so that nothing bounds it.
        limited_by: the SLO key that is crossed first, `saturation`, or a failure's kind; None when none is.
    """

    rps: float | None
    lo: float | None
    hi: float | None
    limited_by: str | None


def estimate(loads: Sequence[Judged], seed: int = 0) -> Estimate:
    """The capacity from all loads, with its interval."""
    found = bracket(loads)
    if found.met_rps is None:
        return Estimate(None, None, None, None)
    rates = np.array(sorted(_by_rate(loads)))
    plain, limits = _crossings(loads, rates, None)
    rps = max(float(plain[0]), found.met_rps)
    rps = rps if found.missed_rps is None else min(rps, found.missed_rps)
    drawn, _ = _crossings(loads, rates, np.random.default_rng(seed))
    lo, hi = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    given_up = next((load.cliff for load in loads if load.cliff and load.rate_rps == found.missed_rps), None)
    limited_by = None if found.missed_rps is None else given_up or limits[0]
    return Estimate(rps, min(lo, rps), None if found.missed_rps is None else max(hi, rps), limited_by)


def _crossings(loads: Sequence[Judged], rates: Floats, rng: np.random.Generator | None) -> tuple[Floats, list[str]]:
    """Where the first limit's fitted ratio passes 1, and which it is: as measured, or `RESAMPLES` times drawn anew."""
    keys = sorted({key for load in loads for key in load.parts})
    if not keys:
        return rates[:1], [""]
    sums = [_sums(load, keys, rng) for load in loads]  # each: key, numerator or denominator, draw
    at = np.array([[crossing(rates, isotonic(*_curve(loads, sums, rates, k))) for k in range(len(keys))]])[0]
    first = at.argmin(axis=0)
    return at.min(axis=0), [keys[k] for k in first]


def _curve(loads: Sequence[Judged], sums: Sequence[Floats], rates: Floats, key: int) -> tuple[Floats, Floats]:
    """A limit's ratio at each rate and the ratio's weight, by draw; a cliff has one that is far too large."""
    ratios, weights = [], []
    for rate in rates:
        same = [index for index, load in enumerate(loads) if load.rate_rps == rate]
        num, den = sum(sums[i][key, 0] for i in same), np.maximum(sum(sums[i][key, 1] for i in same), 1.0)
        on_cliff = any(loads[i].cliff is not None for i in same)
        ratios.append(np.maximum(num / den, 1 + CLIFF) if on_cliff else num / den)
        weights.append(den)
    return np.stack(ratios, axis=-1), np.stack(weights, axis=-1)


def _sums(load: Judged, keys: Sequence[str], rng: np.random.Generator | None) -> Floats:
    """Sums of a load's numerators and denominators, by key and draw."""
    draws = 1 if rng is None else RESAMPLES
    found = np.zeros((len(keys), 2, draws))
    size = _block_size(load)
    for k, key in enumerate(keys):
        for row, values in enumerate(load.parts.get(key, ())):
            if rng is None or not len(values):
                found[k, row] = values.sum()
                continue
            if row == 0:
                places = _blocks(len(values), size, rng)
            found[k, row] = values[places].sum(axis=1)
    return found


def _blocks(n: int, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`RESAMPLES` times `n` places, in blocks drawn from a circle of as many."""
    size = min(size, n)
    starts = rng.integers(0, n, (RESAMPLES, -(-n // size), 1))
    return ((starts + np.arange(size)) % n).reshape(RESAMPLES, -1)[:, :n]


def _block_size(load: Judged) -> int:
    """Requests after which those of a load resemble each other no longer, by the slowest of its limits."""
    times = [autocorrelation_time(num) for num, _ in load.parts.values() if len(num) > 1 and float(num.std()) > 0]
    return max(1, math.ceil(max(times, default=1.0)))


def crossing(rates: Floats, ratios: Floats) -> Floats:
    """Where rising ratios (by draw and rate) pass 1, linear in between; the first or last rate when they never do."""
    above = ratios > 1
    k = np.where(above.any(axis=-1), above.argmax(axis=-1), len(rates) - 1)
    before = np.maximum(k - 1, 0)
    low, high = (np.take_along_axis(ratios, at[..., None], axis=-1)[..., 0] for at in (before, k))
    share = np.clip((1 - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    inside = above.any(axis=-1) & (k > 0)
    return np.asarray(np.where(inside, rates[before] + share * (rates[k] - rates[before]), rates[k]))


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The rising sequence along the last axis that is closest to values in weighted squares.

    By the max-min formula (Barlow et al. 1972, theorem 1.4): the largest over i <= k of the smallest over j >= k of the
    weighted mean from i to j.
    """
    n = values.shape[-1]
    zero = np.zeros((*values.shape[:-1], 1))
    sums, total = (np.concatenate([zero, np.cumsum(x, axis=-1)], axis=-1) for x in (values * weights, weights))
    spans = total[..., None, 1:] - total[..., :-1, None]
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / np.where(spans > 0, spans, 1.0)
    upward = np.triu(np.ones((n, n), dtype=np.bool_))  # j >= i
    least = np.minimum.accumulate(np.where(upward, means, np.inf)[..., ::-1], axis=-1)[..., ::-1]
    return np.asarray(np.where(upward, least, -np.inf).max(axis=-2))


class CapacityPoint(BaseModel):
    """One load."""

    model_config = ConfigDict(frozen=True)
    number: int = Field(description="of its row in the store: `varcas show N`")
    rate_rps: float
    met: bool
    saturated: bool | None
    stopped_early: str | None
    load_s: float | None
    constraints: dict[str, float]
    output_tokens_per_s: float | None
    failure: str | None


class Capacity(BaseModel):
    """What `varcas capacity` answers."""

    model_config = ConfigDict(frozen=True)
    study: str
    model: str
    engine_version: str | None
    gpu: str | None
    slo: dict[str, float]
    capacity_rps: float | None = Field(description="None: no rate that was tried meets the SLO")
    capacity_rps_lo: float | None = Field(description="lower end of its 95 % interval within this start")
    capacity_rps_hi: float | None
    limited_by: str | None = Field(description="the limit that is crossed first, or `saturation`")
    highest_met_rps: float | None
    lowest_missed_rps: float | None
    loads: list[CapacityPoint]
    ended: str
    deploy: dict[str, JsonValue]
    command: str | None
    wall_s: float
    notes: list[str]


def find_capacity(
    experiment: Experiment,
    *,
    budget_s: float | None = None,
    precision: float = PRECISION,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    stopping: threading.Event | None = None,
    run: Work = run_series,
    node: Callable[..., Any] = Node,
    **ray_options: Any,
) -> Capacity:
    """Looks for the highest rate at which the experiment's baseline meets its SLO, on one server.

    Args:
        experiment: `serve`, `baseline`, workload and SLO count; its rate is tried first.
        budget_s: for the start and the loads.
        precision: how far apart the rate that holds and the one that does not may be in the end.
        address: of a Ray cluster; None starts a local Ray.
        on_event: told of the start and of each load's row.
        stopping: set it to end early; what was measured is kept.
        run: what measures a series, `trial.run_series` unless a test measures varcas itself.
        node: what answers for a worker node, likewise.
        ray_options: further arguments of `ray.init` for a local Ray.

    Raises:
        InputError: the experiment has no SLO or no rate; nothing was started.
        VarcasError: the server failed before a load ended.
    """
    require_rate(experiment)
    space = check(experiment, searched=False)
    began_s = time.monotonic()
    with opened(experiment, lambda: Pool(experiment.hardware, address, **ray_options)) as (store, pool):
        stop = stopping or threading.Event()
        with CapacitySearch(experiment, space, store, pool, on_event, stop, node, run) as search:
            search.measure(precision, budget_s)
            return search.answer(time.monotonic() - began_s)


def require_rate(experiment: Experiment) -> None:
    """Raises InputError where no capacity can be had."""
    if not experiment.slo:
        raise InputError(
            f"{experiment.place('slo')}: missing: a capacity is the highest rate that meets one. Add it, e.g. "
            "slo: {ttft_p95_ms: 500}."
        )
    arrives, workload = experiment.workload.arrives.kind, experiment.workload
    if arrives not in RATED or workload.rate_rps is None:
        raise InputError(
            f"{experiment.place('workload', 'arrival')}: {arrives}: has no single rate that could be raised. Allowed: "
            f"{', '.join(RATED)}, with a `rate_rps` to begin with."
        )


class CapacitySearch(SeriesStarts):
    """One capacity. `measure` and `answer` are called in that order."""

    purpose = "capacity"

    def __init__(
        self, experiment: Experiment, space: Space, store: Store, pool: Pool, on_event: Callable[[Event], None],
        stopping: threading.Event, node: Callable[..., Any], run: Work,
    ) -> None:  # fmt: skip
        super().__init__(experiment, space, store, pool, on_event, stopping, node, run)
        flags = {**experiment.serve, **experiment.baseline}
        self._config = ServingConfig(experiment.model, experiment.revision, flags)
        self._measured: list[tuple[TrialRow, Done]] = []
        self._lost: str | None = None

    def measure(self, precision: float, budget_s: float | None) -> None:
        """Starts the server and loads it until its capacity is known.

        Raises:
            InputError: vLLM refuses the configuration.
            KeyboardInterrupt: asked to stop.
        """
        checked = self._check(self._config)
        if not checked.ok:
            raise InputError(f"serve: vLLM {self.facts.engine_version} refuses the baseline: {checked.error}.")
        e = self.experiment
        plan = Bisection(self._config, e.workload, dict(e.slo), precision, budget_s=budget_s)
        proposal = Proposal(None, {}, dict(self._config.flags), self._config, self.purpose)
        job = Job(proposal, self._number(), self.purpose, checked)
        self._submit(job, functools.partial(self._run, plan=plan), self._task(job), "loads of one server")
        self._drain()

    def _take(self, job: Job, finished: Finished, wall_s: float) -> None:
        if finished.lost is not None:
            self._lost = finished.lost
            return
        for row, done in self._series_rows(job, finished.result, wall_s):
            load = done.outcome.load
            self.store.append(row, load.records if load else (), done.outcome.samples)
            self._rows.append(row)
            self._measured.append((row, done))
            self._emit(Event("row", row=row))

    def answer(self, wall_s: float) -> Capacity:
        """The capacity, from what was measured.

        Raises:
            VarcasError: nothing was.
        """
        e = self.experiment
        loaded = [
            (row, done) for row, done in self._measured if done.outcome.load is not None and not done.step.discarded
        ]
        if not loaded:
            raise VarcasError(self._why_nothing())
        loads = [judged(done, e.slo) for _, done in loaded]
        found, bounds = estimate(loads, e.workload.seed), bracket(loads)
        return Capacity(
            study=e.name,
            model=e.model,
            engine_version=self.facts.engine_version,
            gpu=self.facts.gpu_name,
            slo=dict(e.slo),
            capacity_rps=found.rps,
            capacity_rps_lo=found.lo,
            capacity_rps_hi=found.hi,
            limited_by=found.limited_by,
            highest_met_rps=bounds.met_rps,
            lowest_missed_rps=bounds.missed_rps,
            loads=[_point(row, one) for (row, _), one in zip(loaded, loads, strict=True)],
            ended=why_ended(loads, bounds),
            deploy=dict(self._config.flags),
            command=loaded[0][0].command,
            wall_s=wall_s,
            notes=_notes(loaded),
        )

    def _why_nothing(self) -> str:
        if not self._measured:
            return f"worker_lost: {self._lost or 'the worker gave no result'}. Run the same command again."
        row = self._measured[-1][0]
        return f"{row.failure_kind}: {row.failure_detail}. Fix: {HINTS.get(row.failure_kind or '', 'see the log')}."


def why_ended(loads: Sequence[Judged], found: Bracket) -> str:
    """Why no further load was run."""
    if found.met_rps is None:
        return f"no rate down to {min(load.rate_rps for load in loads):g} requests/s holds"
    if found.missed_rps is None:
        return "the budget ended before a rate was missed: the capacity is higher"
    if found.missed_rps <= found.met_rps * (1 + PRECISION) and found.loads_at_met > 1:
        return "the bracket is as narrow as asked for"
    return "the budget ended before the bracket was narrow"


def _point(row: TrialRow, load: Judged) -> CapacityPoint:
    failure = row.failure_kind and f"{row.failure_kind}: {row.failure_detail}"
    same = {name: getattr(row, name) for name in CapacityPoint.model_fields if hasattr(row, name)}
    return CapacityPoint(**same | {"met": load.met, "rate_rps": load.rate_rps, "failure": failure})


def _notes(loaded: Sequence[tuple[TrialRow, Done]]) -> list[str]:
    """What is odd about loads that were measured whole."""
    odd = [(row.number, row.invalid_reasons) for row, _ in loaded if row.state == "complete" and row.valid is False]
    return [f"load {number} is not to be believed: {'; '.join(reasons)}" for number, reasons in odd]


# as an objective of a sweep


def objective_columns(series: Series, slo: Mapping[str, float]) -> tuple[int, dict[str, Any]]:
    """Of one start's kept measurements, which one its row is of, and the columns of the capacity.

    The row is the load at the highest rate that holds; without one, the load at the lowest rate.
    """
    kept = series.kept()
    loads = [judged(done, slo) for done in kept]
    found, bounds = estimate(loads), bracket(loads)
    wanted = bounds.met_rps if bounds.met_rps is not None else min((load.rate_rps for load in loads), default=0.0)
    index = next((i for i, load in enumerate(loads) if load.rate_rps == wanted), 0)
    columns: dict[str, Any] = {"capacity_rps": found.rps or 0.0}
    if found.rps is None:
        columns["slo_met"] = False
    return index, columns
