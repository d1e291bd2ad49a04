"""What to try next, from a Gaussian process over tens of measurements: pure, of numbers and parameters.

Notation: n measured points, m candidates, d parameters. Objectives are logarithms, larger is better: configurations
act on throughput and latency as factors, and starts of one configuration differ by a share.

* The kernel is a Matern 5/2 with a length for each parameter (Rasmussen and Williams 2006, section 4.2.1). Numbers are
  scaled to 0..1, in the logarithm where they span a factor of 4 (batch sizes: neighbours are alike, which a sampler of
  categories never knows); any other value is as far from every other one as the two ends of a scale.
* Lengths, amplitude and noise are not optimised but averaged over draws from their priors and then about the best of
  these, weighted by the evidence (section 5.2): with ten points a maximum would believe too much.
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

NUM_DRAWS = 40
"""Of the hyperparameters from their priors, and as many again about the best."""
NUM_KEPT = 8
"""Of these, those of most evidence, which predict together."""
NUMBER_LENGTH, LABEL_LENGTH = (0.7, 0.7), (2.6, 0.8)
"""Prior median of a length, as a share of its parameter's range, and its log-deviation: that of most switches is long,
since most of them do little."""
COMPRESSED = 0.5
"""How far behind the best, as a logarithm, differences begin to count less: where it is slow, how slow is no matter."""
NOISE = (0.025, 0.5)
"""The same of the noise: starts of one configuration differ by 1-4 % (docs/measurement.md)."""
LEAST_AMPLITUDE = 0.25
JOINT, MAIN = 0.8, 0.6
"""Prior medians of the deviations of what parameters do together, and of what each does alone, in spreads."""
LEVEL, SLOPE = 0.5, 0.4
"""Deviations of how far an estimate is off by a factor, and of its slope about 1."""
LOG_FROM_RATIO = 4.0
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
    """Parameters as points: a column for each number, one for each value of what is no number.

    Args:
        points: all that will be encoded.
    """

    def __init__(self, points: Sequence[Params]) -> None:
        names = sorted({name for params in points for name in params})
        self._scales = {name: _scale([params.get(name) for params in points]) for name in names}
        self.num_params = len(names)
        priors = [NUMBER_LENGTH if isinstance(scale, _Numbers) else LABEL_LENGTH for scale in self._scales.values()]
        self.lengths = np.array(priors).reshape(len(names), 2)

    def matrix(self, points: Sequence[Params]) -> tuple[Floats, Floats]:
        """Points of shape (k, c), and the parameter of each of the c columns as a row of ones in (d, c)."""
        columns: list[Floats] = []
        owners: list[int] = []
        for number, (name, scale) in enumerate(self._scales.items()):
            block = scale.columns([params.get(name) for params in points])
            columns.append(block)
            owners += [number] * block.shape[1]
        belongs = np.zeros((self.num_params, len(owners)))
        belongs[owners, np.arange(len(owners))] = 1.0
        return np.hstack(columns) if columns else np.zeros((len(points), 0)), belongs


@dataclass(frozen=True, slots=True)
class _Numbers:
    low: float
    high: float
    log: bool

    def columns(self, values: Sequence[JsonValue]) -> Floats:
        """One column, and one that is 1 where the parameter is left out."""
        known = [isinstance(value, int | float) for value in values]
        scaled = [self._at(float(v)) if ok else 0.5 for v, ok in zip(values, known, strict=True)]  # type: ignore[arg-type]
        left_out = [0.0 if ok else 1.0 for ok in known]
        return np.array([scaled, left_out], dtype=np.float64).T

    def _at(self, value: float) -> float:
        low, high, value = (math.log(x) for x in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        return (value - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True, slots=True)
class _Labels:
    labels: tuple[str, ...]

    def columns(self, values: Sequence[JsonValue]) -> Floats:
        """A column for each label, so scaled that any two labels lie 1 apart."""
        texts = [json.dumps(value, sort_keys=True) for value in values]
        found = np.array([[math.sqrt(0.5) * (text == label) for label in self.labels] for text in texts])
        return found.reshape(len(texts), len(self.labels))


def _scale(values: Sequence[JsonValue]) -> _Numbers | _Labels:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    others = [v for v in values if v is not None and (isinstance(v, bool) or not isinstance(v, int | float))]
    if others or not numbers:
        return _Labels(tuple(sorted({json.dumps(value, sort_keys=True) for value in values})))
    low, high = float(min(numbers)), float(max(numbers))
    return _Numbers(low, high, low > 0 and high / low >= LOG_FROM_RATIO)


# ---- Gaussian process


@dataclass(frozen=True, slots=True)
class _Draw:
    """Hyperparameters; weights are 1 / length**2 of each parameter."""

    weights: Floats
    joint: float
    main: float
    noise: float


class Process:
    """A Gaussian process on points and their values.

    A value is its estimate, a level and a slope on that estimate, what each parameter does alone, and what they do
    together: an untried value of a parameter keeps an uncertainty of its own, however many others were measured.

    Args:
        points: (n, c), as `Encoding.matrix` gives them.
        belongs: (d, c).
        lengths: (d, 2): prior median of each parameter's length, and its log-deviation.
        values: (n,).
        rng: of the hyperparameters' draws.
        estimates: (n,) of the values; None: there are none.
    """

    def __init__(
        self,
        points: Floats,
        belongs: Floats,
        lengths: Floats,
        values: Floats,
        rng: np.random.Generator,
        estimates: Floats | None = None,
    ) -> None:
        told = np.zeros(len(values)) if estimates is None else estimates
        self._points, self._belongs, self._told = points, belongs, told
        self._centre = float(told.mean())
        self._mean = float((values - told).mean())
        self._values = values - told - self._mean
        self._squares = _squares(points, points, belongs)
        spread = max(float(self._values.std()), LEAST_AMPLITUDE)
        draws = [_draw(lengths, spread, rng) for _ in range(NUM_DRAWS)]
        scored = [(self._evidence(draw), draw) for draw in draws]
        best = max(scored, key=lambda pair: pair[0])[1]
        near = [_near(best, rng) for _ in range(NUM_DRAWS)]
        scored += [(self._evidence(draw), draw) for draw in near]
        kept = sorted(scored, key=lambda pair: -pair[0])[:NUM_KEPT]
        evidence = np.array([score for score, _ in kept])
        weights = np.exp(evidence - evidence.max())
        self._weights: Floats = weights / weights.sum()
        self._draws = [draw for _, draw in kept]
        self._factors = [np.linalg.cholesky(self._covariance(draw)) for draw in self._draws]

    @property
    def noise(self) -> float:
        """Standard deviation between two measurements of one point."""
        return float(sum(w * d.noise for w, d in zip(self._weights, self._draws, strict=True)))

    def believing(self, points: Floats, estimates: Floats | None = None) -> Process:
        """The same, as if these points had been measured to be what is predicted of them: they run just now."""
        if not len(points):
            return self
        told = np.zeros(len(points)) if estimates is None else estimates
        mean, _ = self.predict(points, estimates)
        found = copy.copy(self)
        found._points, found._told = np.vstack([self._points, points]), np.concatenate([self._told, told])
        found._values = np.concatenate([self._values, mean - told - self._mean])
        found._squares = _squares(found._points, found._points, self._belongs)
        found._factors = [np.linalg.cholesky(found._covariance(draw)) for draw in self._draws]
        return found

    def predict(self, points: Floats, estimates: Floats | None = None) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the noiseless value at each of (m, c) points."""
        told = np.zeros(len(points)) if estimates is None else estimates
        squares, linear = _squares(points, self._points, self._belongs), self._linear(told, self._told)
        means, variances = [], []
        for draw, factor in zip(self._draws, self._factors, strict=True):
            half = np.linalg.solve(factor, (_kernel(draw, squares) + linear).T)
            means.append(half.T @ np.linalg.solve(factor, self._values))
            whole = draw.joint**2 + len(draw.weights) * draw.main**2 + LEVEL**2 + (SLOPE * (told - self._centre)) ** 2
            variances.append(np.maximum(whole - (half**2).sum(axis=0), 1e-12))
        mean = self._weights @ np.array(means)
        spread = self._weights @ (np.array(variances) + (np.array(means) - mean) ** 2)
        return told + self._mean + mean, np.sqrt(spread)

    def _linear(self, a: Floats, b: Floats) -> Floats:
        """Covariance by level and slope of the estimates."""
        found: Floats = LEVEL**2 + SLOPE**2 * np.outer(a - self._centre, b - self._centre)
        return found

    def _covariance(self, draw: _Draw) -> Floats:
        found: Floats = _kernel(draw, self._squares) + self._linear(self._told, self._told)
        return found + np.eye(len(self._values)) * (draw.noise**2 + 1e-10)

    def _evidence(self, draw: _Draw) -> float:
        factor = np.linalg.cholesky(self._covariance(draw))
        half = np.linalg.solve(factor, self._values)
        return float(-0.5 * half @ half - np.log(np.diag(factor)).sum())


def _draw(priors: Floats, spread: float, rng: np.random.Generator) -> _Draw:
    lengths = priors[:, 0] * np.exp(priors[:, 1] * rng.standard_normal(len(priors)))
    joint, main = (share * spread * math.exp(0.6 * rng.standard_normal()) for share in (JOINT, MAIN))
    return _Draw(lengths**-2.0, joint, main, NOISE[0] * math.exp(NOISE[1] * rng.standard_normal()))


def _near(draw: _Draw, rng: np.random.Generator) -> _Draw:
    weights = draw.weights * np.exp(0.8 * rng.standard_normal(len(draw.weights)))
    joint, main, noise = (
        value * math.exp(0.3 * rng.standard_normal()) for value in (draw.joint, draw.main, draw.noise)
    )
    return _Draw(weights, joint, main, noise)


def _squares(a: Floats, b: Floats, belongs: Floats) -> Floats:
    """Squared distances of each parameter: (d, len(a), len(b))."""
    found = np.zeros((len(belongs), len(a), len(b)))
    for number, row in enumerate(belongs):
        for column in np.flatnonzero(row):
            found[number] += (a[:, column, None] - b[None, :, column]) ** 2
    return found


def _kernel(draw: _Draw, squares: Floats) -> Floats:
    """Covariance of what parameters do together, and of what each does alone."""
    weighed = draw.weights[:, None, None] * squares
    alone: Floats = _matern(weighed).sum(axis=0)
    return draw.joint**2 * _matern(weighed.sum(axis=0)) + draw.main**2 * alone


def _matern(squares: Floats) -> Floats:
    distance = np.sqrt(5.0 * squares)
    return np.asarray((1 + distance + distance**2 / 3) * np.exp(-distance))


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
        estimate: of the first objective's logarithm, larger is better, before anything was measured; None: none.
        seed: of the draws; another one for each proposal.

    Returns:
        None without a candidate, and while nothing ran: there is nothing to learn from.
    """
    ran = [one for one in tried if one.values is not None]
    if not candidates or not ran:
        return None
    rng = np.random.default_rng(seed)
    encoding = Encoding([*(one.params for one in ran), *candidates, *running])
    points, belongs = encoding.matrix([one.params for one in ran])
    space, busy = encoding.matrix(candidates)[0], encoding.matrix(running)[0]
    feasible = [one.feasible for one in ran]
    goals = _goals(ran, any(feasible), rng)
    groups = ([one.params for one in ran], list(candidates), list(running))
    told = _estimates(groups, estimate) if any(feasible) and len(ran[0].values or ()) == 1 else (None, None, None)
    process = Process(points, belongs, encoding.lengths, goals, rng, told[0]).believing(busy, told[2])
    best = _best_predicted(process, points, told[0], feasible)
    mean, deviation = process.predict(space, told[1])
    expected = expected_improvement(mean, deviation, best)
    score = expected * _chance_to_meet(ran, points, belongs, encoding.lengths, space, rng) if any(feasible) else expected
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
    ran: Sequence[Observed],
    points: Floats,
    belongs: Floats,
    lengths: Floats,
    space: Floats,
    rng: np.random.Generator,
) -> Floats:
    """Of every limit, at each candidate."""
    chance = np.ones(len(space))
    known = [one.excess for one in ran]
    for number in range(len(known[0])):
        missed = np.array([excess[number] for excess in known])
        if (missed <= 0).all():
            continue
        mean, deviation = Process(points, belongs, lengths, missed, rng).predict(space)
        chance = chance * _below(-mean / deviation)
    return chance
