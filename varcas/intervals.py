"""95 % intervals of one start's figures that respect how requests resemble their neighbours.

Latencies of a queue are alike over many requests in a row: resampled one by one, as if each told something new, a
nominal 95 % interval of an M/M/1 queue's mean wait at 80 % load holds the truth in 18 % of cases. Here each figure has
a series of one term a request, in order of arrival, whose mean is the figure's error to first order: `value - mean` for
a mean, `1{value <= q} - p` for a quantile. The variance of that series' mean is estimated from

1. its integrated autocorrelation time (Sokal 1997, *Monte Carlo Methods in Statistical Mechanics*, section 3: window
   of `WINDOW_TIMES` times), and
2. batch means (Law and Kelton, *Simulation Modeling and Analysis*, 9.5.3): `MIN_BATCHES` to `MAX_BATCHES` of
   `BATCH_TIMES` autocorrelation times each, with Student's t,

the larger counts. A mean's interval is laid on its logarithm, a quantile's on its share's logit, so that neither passes
its bounds and both are wider towards the slow side. `docs/measurement.md` has the coverage
(`benchmarks/interval_coverage.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from varcas.columns import Floats, Ints

WINDOW_TIMES = 8.0
BATCH_TIMES = 8.0
MIN_BATCHES = 10
MAX_BATCHES = 20
MAX_BINS = 2048
"""A longer series is first summed into so many bins: autocorrelation times of interest are longer than a bin."""

MIN_STRETCHES = 10.0
"""Independent stretches needed on the rarer side of a figure; fewer, and its interval is unreliable."""
MIN_REQUESTS = 500
"""Needed to know an autocorrelation time: of fewer, those seem independent whose queue is yet to come (M/M/1 at 90 %
load, 200 requests: 84 % of the intervals with enough stretches held the truth, and none of those with a time below 2).
"""

UNSEEN = 60.0
"""The upper half of a latency's interval is wider by `UNSEEN` / stretches: few seldom hold the worst queue.

Less so the less requests are alike: the share is 1 - 1 / autocorrelation time, none when they are independent.
"""

RATE_BATCHES = 10
RATE_BINS = 500


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval.

    Attributes:
        lo: lower end.
        hi: upper end; infinite where the observations do not bound it.
        stretches: independent stretches that the window holds, on the rarer side of the figure.
        known: there are requests enough to know how alike they are.
    """

    lo: float
    hi: float
    stretches: float
    known: bool = True

    @property
    def reliable(self) -> bool:
        """Enough of them to know how far it may be off."""
        return self.known and self.stretches >= MIN_STRETCHES


def mean_interval(values: Floats, sizes: Ints | None = None) -> Interval | None:
    """Of the mean of positive values.

    Args:
        values: finite, in order of arrival.
        sizes: how many of them each request has, where it is not one each.

    Returns:
        None with fewer than twice `MIN_BATCHES` requests.
    """
    n = len(values) if sizes is None else int(np.count_nonzero(sizes))
    if n < 2 * MIN_BATCHES:
        return None
    mean = float(values.mean())
    series = _of_requests(values, sizes, mean)
    error, time = standard_error(series)
    seen = len(series) / time / 2
    if mean <= 0:
        return Interval(mean, mean, seen)
    half = error * len(series) / len(values) / mean
    return Interval(mean * math.exp(-half), mean * _exp(_unseen(half, seen, time)), seen, len(series) >= MIN_REQUESTS)


def quantile_interval(values: Floats, ordered: Floats, permille: int, sizes: Ints | None = None) -> Interval | None:
    """Of a quantile by nearest rank; infinite values count as beyond it.

    Args:
        values: in order of arrival.
        ordered: the same, sorted.
        permille: the quantile in thousandths.
        sizes: as `mean_interval` has it.

    Returns:
        None with fewer than twice `MIN_BATCHES` requests.
    """
    n, p = len(ordered), permille / 1000
    if (len(values) if sizes is None else int(np.count_nonzero(sizes))) < 2 * MIN_BATCHES:
        return None
    found = float(ordered[nearest_rank(n, permille) - 1])
    series = _of_requests((values <= found).astype(np.float64), sizes, None)
    error, time = standard_error(series)
    seen = len(series) / time * min(p, 1 - p)
    half = error * len(series) / n / (p * (1 - p))
    low, high = _shifted(p, -half), _shifted(p, _unseen(half, seen, time))
    top = math.ceil(n * high)
    hi = float(ordered[top - 1]) if top <= n and n * (1 - high) >= 1 else math.inf
    return Interval(float(ordered[max(math.ceil(n * low), 1) - 1]), max(hi, found), seen, len(series) >= MIN_REQUESTS)


def nearest_rank(n: int, permille: int) -> int:
    """From 1: the smallest of `n` ordered observations with at least `permille` / 1000 of all at or below it."""
    return max(1, -(-n * permille // 1000))


def rate_interval(at_s: Floats, weights: Floats, start_s: float, end_s: float) -> tuple[float, Interval]:
    """Sum of weights per second between two moments, with its interval: `RATE_BATCHES` batch means and Student's t.

    Args:
        at_s: when each came, in any order; those outside are left out.
        weights: of each.
        start_s: of the stretch.
        end_s: of the stretch.
    """
    span_s = end_s - start_s
    inside = (at_s >= start_s) & (at_s < end_s)
    place = ((at_s[inside] - start_s) / span_s * RATE_BINS).astype(np.int64)
    counted = np.bincount(np.minimum(place, RATE_BINS - 1), weights=weights[inside], minlength=RATE_BINS)
    sums: Floats = counted.astype(np.float64)
    rate = float(sums.sum()) / span_s
    batches = sums.reshape(RATE_BATCHES, -1).sum(axis=1) * (RATE_BATCHES / span_s)
    half = student_half(batches)
    variance = float(sums.var())
    time = autocorrelation_time(sums) if variance > 0 else 1.0
    stretches = min(RATE_BINS / max(time, 1.0), float(np.count_nonzero(inside)))
    return rate, Interval(max(0.0, rate - half), rate + half, stretches)


def standard_error(series: Floats) -> tuple[float, float]:
    """Half the 95 % interval of a series' mean, and its autocorrelation time in requests, at least 1."""
    n = len(series)
    variance = float(series.var())
    if variance <= 0:
        return 0.0, 1.0
    bins = min(n, MAX_BINS)
    edges = np.linspace(0, n, bins + 1).astype(np.int64)
    sums = np.add.reduceat(series, edges[:-1])
    long_run = float(sums.var()) * bins / n * autocorrelation_time(sums)
    time = max(long_run / variance, 1.0)
    num_batches = int(np.clip(n / (BATCH_TIMES * time), MIN_BATCHES, MAX_BATCHES))
    groups = np.linspace(0, bins, num_batches + 1).astype(np.int64)[:-1]
    batched = float(np.add.reduceat(sums, groups).var(ddof=1)) * num_batches / n
    spread = max(batched, long_run)
    return t_quantile(0.975, num_batches - 1) * math.sqrt(spread / n), max(time, batched / variance)


def autocorrelation_time(series: Floats) -> float:
    """1 + 2 * the sum of autocorrelations, over the first window that is `WINDOW_TIMES` as long as that sum."""
    n = len(series)
    spectrum = np.fft.rfft(series - series.mean(), 2 * n)
    covariance = np.fft.irfft(spectrum * np.conj(spectrum))[:n]
    if covariance[0] <= 0:
        return 1.0
    times = 2 * np.cumsum(covariance / covariance[0]) - 1
    closed = np.arange(n) >= WINDOW_TIMES * times
    return float(max(times[np.argmax(closed)] if closed.any() else times.max(), 1e-3))


def _of_requests(values: Floats, sizes: Ints | None, mean: float | None) -> Floats:
    """One term a request, of mean zero; of several values in a request, the sum of their terms."""
    centre = float(values.mean()) if mean is None else mean
    if sizes is None:
        return values - centre
    some = sizes[sizes > 0]
    starts = np.cumsum(some) - some
    return np.asarray(np.add.reduceat(values, starts) - centre * some, dtype=np.float64)


def _unseen(half: float, stretches: float, time: float) -> float:
    return half * (1 + UNSEEN * (1 - 1 / time) / stretches)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _shifted(p: float, by: float) -> float:
    """A share moved on the logit scale."""
    return 1 / (1 + math.exp(min(max(-(math.log(p / (1 - p)) + by), -700.0), 700.0)))


def student_half(values: Sequence[float] | Floats, p: float = 0.975) -> float:
    """Half the interval of a mean over at least two independent values (Student 1908); 95 % by default."""
    return t_quantile(p, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def welch_half(a: Sequence[float] | Floats, b: Sequence[float] | Floats, p: float = 0.975) -> float:
    """Half the interval of a difference of means (Welch 1947, with Satterthwaite's degrees of freedom)."""
    va, vb = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    if va + vb == 0:
        return 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t_quantile(p, freedom) * math.sqrt(va + vb)


def pooled_deviation(groups: Iterable[Sequence[float]], min_freedom: int = 2) -> tuple[float | None, int]:
    """Standard deviation within groups, pooled, and its degrees of freedom; None with fewer than `min_freedom`."""
    squares, freedom = 0.0, 0
    for group in groups:
        if len(group) > 1:
            squares += float(((np.asarray(group) - np.mean(group)) ** 2).sum())
            freedom += len(group) - 1
    return (math.sqrt(squares / freedom) if freedom >= min_freedom else None), freedom


@functools.cache
def t_quantile(p: float, freedom: float) -> float:
    """Quantile of Student's t for p > 0.5 and freedom >= 1, within 1e-5 of tables.

    With x = sqrt(freedom) tan(a) the density is proportional to cos(a) ** (freedom - 1), which is integrated over
    half the circle and inverted.
    """
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(2 * p - 1, mass / mass[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)
