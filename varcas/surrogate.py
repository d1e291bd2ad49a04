"""What of a listed space to try next: Gaussian processes over what was measured, and the improvement they expect.

Of each configuration the logarithm of the objective is held to be an estimate's (`order.expectations`; a constant where
there is none) plus a smooth error. Numbers are ordered: 16 and 32 sequences are more alike than 16 and 256. With some
tens of starts, and a space that can be listed, that uses more of each start than a sampler which draws.

    log y = estimate + level + slope x estimate + f + noise
    cov(f, f') = scale^2 exp(-sum over parameters of weight x difference^1.5)

`level` and `slope` are normal about 0, so that an estimate which is off by a factor, or flatter than the truth, costs
nothing for long. What is not known (scale, noise, weights) is not fitted but averaged over: draws from its posterior by
elliptical slice sampling (Murray, Adams, MacKay, AISTATS 2010). The next configuration has the largest expected
improvement over what seems best so far (Jones, Schonlau, Welch 1998, on the mean, since starts are noisy; integrated as
in Snoek, Larochelle, Adams, NeurIPS 2012), times the probability that it runs and meets each limit (Gardner et al.,
ICML 2014). Pure: numpy alone, the same answer for the same question.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from varcas.space import Params

Floats = npt.NDArray[np.float64]

SMOOTHNESS = 1.5
"""Of f along a number: 1 is a random walk, 2 a power series."""
LEVEL, SLOPE = 1.0, 0.5
"""Standard deviations of what the estimate is off by, as a logarithm, and of what its slope is."""
NOISE = (math.log(0.03), 0.5)
"""Normal prior of a logarithm: that of the standard deviation between two starts of one configuration (2-4 % were seen
on real servers)."""
MAIN, TOGETHER = (math.log(0.2), 0.8), (math.log(0.1), 0.8)
"""The same of the standard deviations of what each parameter does by itself, and of what they do together: a value that
was never tried may change the objective by a fifth, one flag as well as another."""
WEIGHT_OF_NUMBER, WEIGHT_OF_CHOICE = (math.log(2.0), 1.0), (math.log(1.0), 0.7)
"""The same of weights: of a number from one end of its range to the other, of two choices that differ."""
BURN_IN, DRAWS, THIN = 30, 10, 4
MOST_SEEN = 120
"""Trials that are looked at: the best and the latest, half each."""
MOST_SCORED = 4096
"""Candidates that are scored; of more, so many at random."""
CLIP = 1.5
"""Logarithm of value / limit beyond which a miss is only a miss."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one configuration.

    Attributes:
        key: its content hash.
        value: of the objective; None where it has none.
        excess: of each limit, as a logarithm: above 0 it is missed.
        runs: whether it ran at all.
    """

    key: str
    value: float | None
    excess: Mapping[str, float] = field(default_factory=dict)
    runs: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to try next.

    Attributes:
        key: its content hash.
        gain: expected improvement over the best so far, as a logarithm; None while nothing is feasible.
    """

    key: str
    gain: float | None


class Surrogate:
    """A listed space, and what is expected of it before anything is measured.

    Args:
        points: parameters of each configuration, by content hash.
        expected: logarithm of the objective's estimate, by content hash; of what it lacks the mean is taken.
        maximize: whether more of the objective is better.
        seed: of the draws.
    """

    def __init__(
        self, points: Mapping[str, Params], expected: Mapping[str, float], *, maximize: bool, seed: int
    ) -> None:
        self._index = {key: at for at, key in enumerate(points)}
        self._axes = _axes(list(points.values()))
        known = [expected[key] for key in points if key in expected]
        middle = float(np.mean(known)) if known else 0.0
        self._expected = np.array([expected.get(key, middle) for key in points]) - middle
        self._sign, self._seed = 1.0 if maximize else -1.0, seed

    def next(self, seen: Sequence[Seen], pending: Sequence[str], left: Sequence[str]) -> Wanted | None:
        """The most promising of what is left; None when nothing is, or nothing was measured yet.

        Args:
            seen: all that was answered; configurations outside of the space are left out.
            pending: what runs now: taken to come out as expected.
            left: what may be proposed.
        """
        inside = [one for one in seen if one.key in self._index]
        measured = [one for one in inside if one.value is not None and one.value > 0]
        if not left or not measured:
            return None
        rng = np.random.default_rng(_number(self._seed, [one.key for one in inside], pending))
        at = self._places(left)
        if len(at) > MOST_SCORED:
            at = rng.choice(at, MOST_SCORED, replace=False)
        chance = self._chance(inside, at, rng)
        gain = self._gain(_kept(measured, self._sign), self._places(pending), at, rng)
        score = chance if gain is None else chance * gain
        best = int(np.argmax(score))
        keys = list(self._index)
        return Wanted(keys[at[best]], None if gain is None else float(score[best]))

    def _places(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.array([self._index[key] for key in keys if key in self._index], dtype=np.int64)

    def _gain(
        self,
        measured: Sequence[Seen],
        pending: npt.NDArray[np.int64],
        at: npt.NDArray[np.int64],
        rng: np.random.Generator,
    ) -> Floats | None:
        """Expected improvement over the best of what meets all limits; None where nothing does."""
        feasible = np.array([all(over <= 0 for over in one.excess.values()) for one in measured])
        if not feasible.any():
            return None
        here = self._places([one.key for one in measured])
        offset = self._sign * self._expected
        value = self._sign * np.log([one.value for one in measured if one.value is not None]) - offset[here]
        field_ = _Field(self._axes, offset, here, value - value.mean())
        total = np.zeros(len(at))
        for theta in field_.posterior(rng):
            told = field_.given(theta, pending)
            best = (told.mean(here) + offset[here])[feasible].max()
            mean, deviation = told.mean(at) + offset[at], told.deviation(at)
            total += _improvement(mean - best, deviation)
        return total / DRAWS

    def _chance(self, seen: Sequence[Seen], at: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
        """Probability that a configuration runs and meets every limit, as if these were independent."""
        chance = np.ones(len(at))
        limits = sorted({key for one in seen for key in one.excess})
        told = [[(one.key, one.excess[limit]) for one in seen if limit in one.excess] for limit in limits]
        told.append([(one.key, -1.0 if one.runs else 1.0) for one in seen])
        for pairs in told:
            over = np.clip([excess for _, excess in pairs], -CLIP, CLIP)
            if (over > 0).any():
                chance *= self._chance_below(self._places([key for key, _ in pairs]), over, at, rng)
        return chance

    def _chance_below(
        self, here: npt.NDArray[np.int64], over: Floats, at: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> Floats:
        field_ = _Field(self._axes, np.zeros(len(self._expected)), here, over)
        total = np.zeros(len(at))
        for theta in field_.posterior(rng):
            told = field_.given(theta, here[:0])
            total += _normal(-told.mean(at) / np.maximum(told.deviation(at), 1e-6))
        return total / DRAWS


# ---- a field of values over the space


@dataclass(frozen=True, slots=True)
class _Axis:
    """One parameter: numbers from 0 to 1, or codes of choices."""

    values: Floats
    is_number: bool

    def apart(self, some: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> Floats:
        """Differences of each of some to each of the others."""
        gaps = np.abs(self.values[some][:, np.newaxis] - self.values[other][np.newaxis, :])
        return np.asarray(gaps**SMOOTHNESS if self.is_number else gaps > 0, dtype=np.float64)


def _axes(points: Sequence[Params]) -> list[_Axis]:
    """Parameters that differ; numbers by their logarithm where all are positive."""
    names = dict.fromkeys(name for params in points for name in params)
    found = [_axis([params.get(name) for params in points]) for name in names]
    return [axis for axis in found if np.ptp(axis.values) > 0]


def _axis(values: Sequence[object]) -> _Axis:
    there = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        codes: dict[str, int] = {}
        coded = [codes.setdefault(json.dumps(value, sort_keys=True), len(codes)) for value in values]
        return _Axis(np.array(coded, dtype=np.float64), is_number=False)
    numbers = np.array([float(value) for value in there])  # type: ignore[arg-type]
    scaled = np.log(numbers) if numbers.min() > 0 else numbers
    low, span = scaled.min(), np.ptp(scaled) or 1.0
    filled = np.zeros(len(values))  # of a parameter that is not there: what brings it in differs too
    filled[[value is not None for value in values]] = (scaled - low) / span
    return _Axis(filled, is_number=True)


class _Field:
    """A Gaussian process, measured at some places.

    Args:
        axes: of the space.
        slope: what its mean may rise or fall with, at each place.
        here: places of the measurements.
        value: measured there.
    """

    def __init__(self, axes: Sequence[_Axis], slope: Floats, here: npt.NDArray[np.int64], value: Floats) -> None:
        self._axes, self._slope, self._here, self._value = axes, slope, here, value
        weights = [WEIGHT_OF_NUMBER if axis.is_number else WEIGHT_OF_CHOICE for axis in axes]
        priors = [NOISE, TOGETHER, *(MAIN for _ in axes), *weights]
        self._centre, self._width = np.array(priors).T
        self._apart = self._gaps(here, here)

    def _gaps(self, some: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> Floats:
        return np.stack([axis.apart(some, other) for axis in self._axes])

    def _covariance(
        self, theta: Floats, gaps: Floats, some: npt.NDArray[np.int64], other: npt.NDArray[np.int64]
    ) -> Floats:
        shared = LEVEL**2 + SLOPE**2 * np.outer(self._slope[some], self._slope[other])
        count = len(self._axes)
        weighted = np.exp(theta[2 + count :])[:, np.newaxis, np.newaxis] * gaps
        alone = np.tensordot(np.exp(2 * theta[2 : 2 + count]), np.exp(-weighted), axes=1)
        found: Floats = shared + alone + math.exp(2 * theta[1]) * np.exp(-weighted.sum(axis=0))
        return found

    def variance(self, theta: Floats, at: npt.NDArray[np.int64]) -> Floats:
        """Of each place by itself, before anything is measured."""
        own = np.exp(2 * theta[1 : 2 + len(self._axes)]).sum()
        return np.asarray(LEVEL**2 + SLOPE**2 * self._slope[at] ** 2 + own, dtype=np.float64)

    def posterior(self, rng: np.random.Generator) -> list[Floats]:
        """Draws of scale, noise and weights, as logarithms."""
        away = np.zeros(len(self._centre))
        likely, drawn = self._log_likelihood(away), []
        for step in range(BURN_IN + DRAWS * THIN):
            away, likely = self._slice(away, likely, rng)
            if step >= BURN_IN and (step - BURN_IN) % THIN == 0:
                drawn.append(self._centre + away)
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
        root = self._root(self._centre + away)
        return float(-0.5 * np.sum(np.linalg.solve(root, self._value) ** 2) - np.log(np.diag(root)).sum())

    def _root(self, theta: Floats) -> Floats:
        covariance = self._covariance(theta, self._apart, self._here, self._here)
        covariance[np.diag_indices_from(covariance)] += math.exp(2 * theta[0]) + 1e-8
        return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)

    def given(self, theta: Floats, pending: npt.NDArray[np.int64]) -> _Told:
        """What the measurements tell, with what is pending taken to be measured as expected."""
        told = _Told(self, theta, self._here, self._root(theta), self._value)
        if not len(pending):
            return told
        both = np.concatenate([self._here, pending])
        filled = _Field(self._axes, self._slope, both, np.concatenate([self._value, told.mean(pending)]))
        return _Told(filled, theta, both, filled._root(theta), filled._value)


@dataclass(frozen=True, slots=True)
class _Told:
    """A field for one draw of what is not known of it."""

    field_: _Field
    theta: Floats
    here: npt.NDArray[np.int64]
    root: Floats
    value: Floats

    def _solved(self, at: npt.NDArray[np.int64]) -> Floats:
        gaps = self.field_._gaps(self.here, at)
        return np.asarray(np.linalg.solve(self.root, self.field_._covariance(self.theta, gaps, self.here, at)))

    def mean(self, at: npt.NDArray[np.int64]) -> Floats:
        """Expected values."""
        return np.asarray(self._solved(at).T @ np.linalg.solve(self.root, self.value), dtype=np.float64)

    def deviation(self, at: npt.NDArray[np.int64]) -> Floats:
        """Standard deviations of these."""
        alone = self.field_.variance(self.theta, at)
        return np.asarray(np.sqrt(np.maximum(alone - np.sum(self._solved(at) ** 2, axis=0), 1e-12)), dtype=np.float64)


# ---- pieces


def _kept(measured: Sequence[Seen], sign: float) -> list[Seen]:
    """The best and the latest, in order."""
    if len(measured) <= MOST_SEEN:
        return list(measured)
    half = MOST_SEEN // 2
    best = sorted(measured[:-half], key=lambda one: -sign * (one.value or 0.0))[:half]
    return [*best, *measured[-half:]]


def _improvement(above: Floats, deviation: Floats) -> Floats:
    """Mean of the part above 0 of a normal variable."""
    ratio = above / np.maximum(deviation, 1e-12)
    density = np.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return np.asarray(above * _normal(ratio) + deviation * density, dtype=np.float64)


def _normal(x: Floats) -> Floats:
    """The normal distribution function."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in np.ravel(x)])


def _number(seed: int, keys: Sequence[str], pending: Sequence[str]) -> int:
    text = json.dumps([seed, list(keys), sorted(pending)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
