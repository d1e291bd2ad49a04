"""What to try next, from a Gaussian process over tens of measurements: pure, of numbers and parameters.

Notation: n measured points, m candidates, d parameters. Objectives are logarithms, larger is better: configurations
act on throughput and latency as factors, and starts of one configuration differ by a share.

* The logarithm of an objective is an estimate (the roofline's; 0 where there is none), a level and a slope on that
  estimate, what each parameter does alone, what they do together, and noise:

      log y = estimate + level + slope x estimate + sum over p of f_p + f + noise
      cov(f_p, f_p') = main_p^2 exp(-w_p gap_p)      cov(f, f') = together^2 exp(-sum over p of w_p gap_p)

  An untried value of a parameter keeps an uncertainty of its own, however many others were measured. The gap of numbers
  is their difference to the power 1.5, on a scale from 0 to 1, in the logarithm where all are positive (neighbouring
  batch sizes are alike, which a sampler of categories never knows); any two other values lie 1 apart.
* Deviations, weights and noise are not fitted but averaged over: draws from their posterior by elliptical slice
  sampling (Murray, Adams, MacKay, AISTATS 2010). With ten points an optimum would believe too much.
* The score is the expected improvement over the best *predicted* mean (Jones et al. 1998; of the observed ones the best
  is lucky), times the chance to meet each limit (Gardner et al. 2014), times the chance to run, over the seconds it
  costs (Snoek et al. 2012, section 3.2). Several objectives are weighed anew at each proposal (ParEGO, Knowles 2006).
* Failures are no numbers: what every configuration that holds it failed with is a suspect (`Suspects`).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from varcas.columns import Floats

Params = Mapping[str, JsonValue]

SMOOTHNESS = 1.5
"""Of f along a number: 1 is a random walk, 2 a power series."""
LEVEL, SLOPE = 1.0, 0.5
"""Deviations of what an estimate is off by, as a logarithm, and of its slope about 1."""
NOISE = (math.log(0.03), 0.5)
"""Normal prior of a logarithm: that of the deviation between two starts of one configuration (2-4 % were seen)."""
MAIN, TOGETHER = (math.log(0.2), 0.8), (math.log(0.1), 0.8)
"""The same of what a parameter does by itself, and of what all do together: a value that was never tried may change the
objective by a fifth, of one flag as of another."""
NUMBER_WEIGHT, LABEL_WEIGHT = (math.log(2.0), 1.0), (math.log(1.0), 0.7)
"""The same of weights: of a number from one end of its range to the other, of two labels."""
BURN_IN, DRAWS, THIN = 30, 10, 4
"""Steps of the slice sampler before the first draw, draws, and steps for each."""
COMPRESSED = 0.5
"""How far behind the best, as a logarithm, differences begin to count less: how slow what is slow is, is no matter."""
CLIP = 1.5
"""Logarithm of value / limit beyond which a miss is only a miss."""
EXPLAINED_BY = 2
"""Failures that share a suspect; from here on what holds it is not proposed while anything else is left."""
DOUBT = 0.35
"""Chance to run that is left to a configuration for each suspect of one failure."""
AUGMENTED = 0.05
"""Share of the sum in ParEGO's weighing of objectives."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One configuration that was tried.

    Attributes:
        params: what was proposed.
        values: objectives, larger is better, in logarithms; None when it did not run.
        excess: log(value / limit) of each limit, met when at most 0; empty without limits or when it did not run.
    """

    params: Params
    values: tuple[float, ...] | None
    excess: tuple[float, ...] = ()

    @property
    def feasible(self) -> bool:
        """It runs and meets every limit."""
        return self.values is not None and all(value <= 0 for value in self.excess)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to try next.

    Attributes:
        place: of the candidate.
        improvement: expected of the best candidate over what is predicted of the best so far, as a logarithm (a share);
            infinite while nothing meets the limits.
        noise: standard deviation between starts of one configuration, as far as the measurements tell, likewise.
    """

    place: int
    improvement: float
    noise: float


class Encoding:
    """Parameters as numbers from 0 to 1, NaN where one is left out, or as codes of labels.

    Args:
        points: all that will be encoded.
    """

    def __init__(self, points: Sequence[Params]) -> None:
        names = sorted({name for params in points for name in params})
        axes = {name: _axis([params.get(name) for params in points]) for name in names}
        self._axes = {name: axis for name, axis in axes.items() if axis.differs}
        self.is_number = np.array([isinstance(axis, _Numbers) for axis in self._axes.values()], dtype=np.bool_)

    def matrix(self, points: Sequence[Params]) -> Floats:
        """Points of shape (k, d)."""
        columns = [[axis.at(params.get(name)) for params in points] for name, axis in self._axes.items()]
        return np.array(columns, dtype=np.float64).reshape(len(self._axes), len(points)).T

    def gaps(self, some: Floats, other: Floats) -> Floats:
        """How far each parameter of (k, d) points lies from that of (l, d) others: (d, k, l)."""
        a, b = some.T[:, :, None], other.T[:, None, :]
        apart = np.abs(a - b)
        number = np.where(np.isnan(a) & np.isnan(b), 0.0, np.where(np.isnan(apart), 1.0, apart**SMOOTHNESS))
        return np.asarray(np.where(self.is_number[:, None, None], number, apart > 0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Numbers:
    low: float
    high: float
    log: bool
    differs: bool

    def at(self, value: JsonValue) -> float:
        if not isinstance(value, int | float):
            return math.nan
        low, high, here = (math.log(x) for x in (self.low, self.high, value)) if self.log else (
            self.low, self.high, float(value),
        )  # fmt: skip
        return (here - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True, slots=True)
class _Labels:
    codes: Mapping[str, int]

    @property
    def differs(self) -> bool:
        return len(self.codes) > 1

    def at(self, value: JsonValue) -> float:
        return float(self.codes[json.dumps(value, sort_keys=True)])


def _axis(values: Sequence[JsonValue]) -> _Numbers | _Labels:
    there = [value for value in values if value is not None]
    numbers = [value for value in there if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(there) or not numbers:
        texts = dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)
        return _Labels({text: code for code, text in enumerate(texts)})
    low, high = float(min(numbers)), float(max(numbers))
    return _Numbers(low, high, low > 0, low < high or len(there) < len(values))


# ---- Gaussian process


class Process:
    """A Gaussian process on points and their values, averaged over what is not known of it.

    Args:
        encoding: of the points.
        points: (n, d), as `encoding.matrix` gives them.
        values: (n,).
        rng: of the draws.
        estimates: (n,) of the values; None: there are none.
    """

    def __init__(
        self,
        encoding: Encoding,
        points: Floats,
        values: Floats,
        rng: np.random.Generator,
        estimates: Floats | None = None,
    ) -> None:
        told = np.zeros(len(values)) if estimates is None else estimates
        self._encoding, self._points, self._told = encoding, points, told
        self._centre = float(told.mean())
        self._mean = float((values - told).mean())
        self._values = values - told - self._mean
        self._gaps = encoding.gaps(points, points)
        weights = [NUMBER_WEIGHT if is_number else LABEL_WEIGHT for is_number in encoding.is_number]
        self._prior, self._width = np.array([NOISE, TOGETHER, *(MAIN for _ in weights), *weights]).T
        self._draws = self._posterior(rng)
        self._roots = [self._root(draw) for draw in self._draws]

    @property
    def noise(self) -> float:
        """Standard deviation between two measurements of one point."""
        return float(np.mean([math.exp(draw[0]) for draw in self._draws]))

    def believing(self, points: Floats, estimates: Floats | None = None) -> Process:
        """The same, as if these points had been measured to be what is predicted of them: they run just now."""
        if not len(points):
            return self
        told = np.zeros(len(points)) if estimates is None else estimates
        mean, _ = self.predict(points, estimates)
        found = copy.copy(self)
        found._points, found._told = np.vstack([self._points, points]), np.concatenate([self._told, told])
        found._values = np.concatenate([self._values, mean - told - self._mean])
        found._gaps = self._encoding.gaps(found._points, found._points)
        found._roots = [found._root(draw) for draw in self._draws]
        return found

    def predict(self, points: Floats, estimates: Floats | None = None) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the noiseless value at each of (m, d) points."""
        told = np.zeros(len(points)) if estimates is None else estimates
        gaps, linear = self._encoding.gaps(self._points, points), self._linear(self._told, told)
        means, variances = [], []
        for draw, root in zip(self._draws, self._roots, strict=True):
            half = np.linalg.solve(root, self._smooth(draw, gaps) + linear)
            means.append(half.T @ np.linalg.solve(root, self._values))
            own = np.exp(2 * draw[1 : 2 + len(self._encoding.is_number)]).sum()
            whole = own + LEVEL**2 + (SLOPE * (told - self._centre)) ** 2
            variances.append(np.maximum(whole - (half**2).sum(axis=0), 1e-12))
        mean = np.mean(means, axis=0)
        spread = np.mean(np.array(variances) + (np.array(means) - mean) ** 2, axis=0)
        return told + self._mean + mean, np.sqrt(spread)

    def _linear(self, some: Floats, other: Floats) -> Floats:
        """Covariance by level and slope of the estimates."""
        slope = SLOPE**2 * np.outer(some - self._centre, other - self._centre)
        return np.asarray(LEVEL**2 + slope, dtype=np.float64)

    def _smooth(self, draw: Floats, gaps: Floats) -> Floats:
        """Covariance of what each parameter does alone, and of what they do together."""
        count = len(gaps)
        weighed = np.exp(draw[2 + count :])[:, None, None] * gaps
        alone = np.tensordot(np.exp(2 * draw[2 : 2 + count]), np.exp(-weighed), axes=1)
        return np.asarray(alone + math.exp(2 * draw[1]) * np.exp(-weighed.sum(axis=0)), dtype=np.float64)

    def _root(self, draw: Floats) -> Floats:
        covariance = self._smooth(draw, self._gaps) + self._linear(self._told, self._told)
        covariance[np.diag_indices_from(covariance)] += math.exp(2 * draw[0]) + 1e-8
        return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)

    def _posterior(self, rng: np.random.Generator) -> list[Floats]:
        """Draws of noise, deviations and weights, as logarithms."""
        away = np.zeros(len(self._prior))
        likely, drawn = self._log_likelihood(away), []
        for step in range(BURN_IN + DRAWS * THIN):
            away, likely = self._slice(away, likely, rng)
            if step >= BURN_IN and (step - BURN_IN) % THIN == 0:
                drawn.append(self._prior + away)
        return drawn

    def _slice(self, away: Floats, likely: float, rng: np.random.Generator) -> tuple[Floats, float]:
        """One step of elliptical slice sampling."""
        other, floor = self._width * rng.standard_normal(len(away)), likely + math.log(1 - rng.random())
        angle = rng.uniform(0, 2 * math.pi)
        low, high = angle - 2 * math.pi, angle
        while True:
            tried = away * math.cos(angle) + other * math.sin(angle)
            found = self._log_likelihood(tried)
            if found >= floor or high - low < 1e-6:
                return tried, found
            low, high = (angle, high) if angle < 0 else (low, angle)
            angle = rng.uniform(low, high)

    def _log_likelihood(self, away: Floats) -> float:
        root = self._root(self._prior + away)
        half = np.linalg.solve(root, self._values)
        return float(-0.5 * half @ half - np.log(np.diag(root)).sum())


# ---- what fails


class Suspects:
    """Values, and pairs of values, that every configuration which holds them failed with.

    A pair is a suspect only of failures that no single value explains.

    Args:
        tried: parameters, and whether the configuration ran.
    """

    def __init__(self, tried: Sequence[tuple[Params, bool]]) -> None:
        ran = {item for params, ok in tried if ok for item in _items(params)}
        failures = [_items(params) for params, ok in tried if not ok]
        alone = Counter(item for items in failures for item in items if item not in ran)
        unexplained = [items for items in failures if not any(alone[item] >= EXPLAINED_BY for item in items)]
        ran_pairs = {pair for params, ok in tried if ok for pair in _pairs(_items(params))}
        pairs = Counter(pair for items in unexplained for pair in _pairs(items) if pair not in ran_pairs)
        self._alone, self._pairs = dict(alone), {p: c for p, c in pairs.items() if not set(p) & set(alone)}

    def chance(self, params: Params) -> float:
        """Chance that it runs; 0 where a suspect explains `EXPLAINED_BY` failures or more."""
        items = _items(params)
        counts = [self._alone[item] for item in items if item in self._alone]
        counts += [self._pairs[pair] for pair in _pairs(items) if pair in self._pairs]
        if not counts:
            return 1.0
        return 0.0 if max(counts) >= EXPLAINED_BY else DOUBT ** min(len(counts), 3)


def _items(params: Params) -> list[tuple[str, str]]:
    return [(name, json.dumps(value, sort_keys=True)) for name, value in sorted(params.items())]


def _pairs(items: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return list(itertools.combinations(items, 2))


# ---- advice


def advise(
    tried: Sequence[Observed],
    candidates: Sequence[Params],
    *,
    running: Sequence[Params] = (),
    cost_s: Sequence[float] | None = None,
    estimate: Callable[[Params], float | None] = lambda params: None,
    seed: int = 0,
) -> Advice | None:
    """The candidate to try next.

    Args:
        tried: what was measured or failed; of many, those that matter.
        candidates: what may be tried.
        running: what is being tried just now.
        cost_s: of each candidate; None: all the same.
        estimate: of the first objective's logarithm, larger is better, before anything was measured; or None.
        seed: of the draws; another one for each proposal.

    Returns:
        None without a candidate, and while nothing ran: there is nothing to learn from.
    """
    ran = [one for one in tried if one.values is not None]
    if not candidates or not ran:
        return None
    rng = np.random.default_rng(seed)
    encoding = Encoding([*(one.params for one in ran), *candidates, *running])
    points, space, busy = (encoding.matrix(some) for some in ([one.params for one in ran], candidates, running))
    feasible = [one.feasible for one in ran]
    goals = _goals(ran, any(feasible), rng)
    groups = ([one.params for one in ran], list(candidates), list(running))
    told = _estimates(groups, estimate) if any(feasible) and len(ran[0].values or ()) == 1 else (None, None, None)
    process = Process(encoding, points, goals, rng, told[0]).believing(busy, told[2])
    best = _best_predicted(process, points, told[0], feasible)
    mean, deviation = process.predict(space, told[1])
    expected = expected_improvement(mean, deviation, best)
    score = expected * _chance_to_meet(ran, encoding, points, space, rng) if any(feasible) else expected
    suspects = Suspects([(one.params, one.values is not None) for one in tried])
    runs = np.array([suspects.chance(params) for params in candidates])
    score = score * runs if runs.any() else score
    dear = np.ones(len(candidates)) if cost_s is None else np.asarray(cost_s, dtype=np.float64)
    place = int(np.argmax(score / np.maximum(dear, 1e-9)))
    improvement = float(score.max()) if any(feasible) else math.inf
    return Advice(place, improvement, process.noise)


def _goals(ran: Sequence[Observed], any_feasible: bool, rng: np.random.Generator) -> Floats:
    """What is to be made large: the objective, several as one; while nothing meets the limits, how little is missed."""
    if not any_feasible:
        return np.array([-sum(max(value, 0.0) for value in one.excess) for one in ran])
    values = np.array([one.values for one in ran], dtype=np.float64)
    if values.shape[1] == 1:
        return _compressed(values[:, 0], float(values.max()))
    low, high = values.min(axis=0), values.max(axis=0)
    scaled = (values - low) / np.maximum(high - low, 1e-9)
    weights = rng.dirichlet(np.ones(values.shape[1]))
    weighed = weights * (scaled - 1)
    return np.asarray(weighed.min(axis=1) + AUGMENTED * weighed.sum(axis=1))


def _compressed(values: Floats, best: float) -> Floats:
    """Behind the best, near it as it is and ever less apart farther away."""
    behind = best - values
    return np.asarray(-COMPRESSED * np.log1p(behind / COMPRESSED))


def _estimates(
    groups: Sequence[Sequence[Params]], estimate: Callable[[Params], float | None]
) -> tuple[Floats | None, ...]:
    """Of each group, compressed as values are; what has none is held for a middling one. None without any."""
    found = [[estimate(params) for params in group] for group in groups]
    known = [value for group in found for value in group if value is not None]
    if not known:
        return (None, None, None)
    best, usual = max(known), float(np.median(known))
    whole = [np.array([usual if value is None else value for value in group]) for group in found]
    return tuple(_compressed(values, best) for values in whole)


def _best_predicted(process: Process, points: Floats, told: Floats | None, feasible: Sequence[bool]) -> float:
    mean, _ = process.predict(points, told)
    allowed = np.array(feasible) if any(feasible) else np.ones(len(points), dtype=np.bool_)
    return float(mean[allowed].max())


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """Of normal values over `best`."""
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    found: Floats = deviation * (z * _below(z) + density)
    return np.maximum(found, 0.0)


def _below(z: Floats) -> Floats:
    """The normal distribution function."""
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])


def _chance_to_meet(
    ran: Sequence[Observed], encoding: Encoding, points: Floats, space: Floats, rng: np.random.Generator
) -> Floats:
    """Of every limit, at each candidate."""
    chance = np.ones(len(space))
    known = [one.excess for one in ran]
    for number in range(len(known[0])):
        missed = np.clip(np.array([excess[number] for excess in known]), -CLIP, CLIP)
        if (missed <= 0).all():
            continue
        mean, deviation = Process(encoding, points, missed, rng).predict(space)
        chance = chance * _below(-mean / deviation)
    return chance
