"""When a load has already told its answer: an SLO is lost for certain, or the incumbent is out of reach.

Pure and incremental: `SloWatch` is fed what becomes of each request, `PaceWatch` the server's token counter. Both only
ever err on the side of going on.

**An SLO is lost for certain.** Each request of the plan has a least value of each latency: its own once it has ended
(infinite when it failed), the time since its scheduled arrival while it waits, else 0. A statistic of the least values
is at most that of the final ones, so one beyond its limit decides: p95 of 2,400 requests is lost with the 121st miss.
What is not bound while it runs (TPOT of an open answer, gaps between tokens) counts when the answer has ended.

**The incumbent is out of reach.** Tokens a second in batches of `BATCH_TIMES` autocorrelation times each are near
independent and near normal (batch means: Law and Kelton, *Simulation Modeling and Analysis*, 9.5.3). Their mean has an
upper bound that holds at all moments at once, so that it may be looked at after every batch: the test martingale of
the t-statistic under a normal prior on the effect (Lai 1976, *On confidence sequences*; Wang and Ramdas 2024,
*Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance*, Theorem 4.7). With n batches
of mean m and standard deviation s, and g = `PRIOR_VARIANCE`, r = (sqrt(1 + n g) / alpha) ** (2 / n):

    bound = m + s * sqrt((n - 1) / n * (r - 1) / (1 - r / (1 + n g)))        infinite where r >= 1 + n g
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from varcas.columns import Floats
from varcas.intervals import autocorrelation_time, nearest_rank
from varcas.records import MAX_EXCESS, PERMILLE, EarlyStop, Ended, ScheduledRequest, split_key

ALPHA = 0.0025
"""Of the sequence, one-sided. Batches are not quite independent: `tests/test_early_stop.py` simulates what comes of it
(AR(1) with rho 0.9: at most 1 % false stops)."""
PRIOR_VARIANCE = 4.0
"""Of the standardised effect: a configuration worth stopping is several of its own batches' deviations behind."""
BATCH_TIMES = 8.0
MIN_BATCHES = 5
START_MARGIN = 0.10
"""A configuration is stopped only when it is this far behind: starts of one configuration differ by 2-4 %, either way,
and both have been started once."""
NOT_BEFORE_S = 5.0
RAMP_REQUESTS = 10
"""The server fills until so many requests have been answered; what it did until then says nothing of its pace."""
OVERDUE = ("ttft", "e2e", "norm")
WATCHED = ("ttft", "tpot", "e2e", "norm")


@dataclass(frozen=True, slots=True)
class StopRules:
    """What may end a load before its window does.

    Attributes:
        slo: limits that it must meet.
        beat_tokens_per_s: output tokens a second of the incumbent; None while there is none to beat.
    """

    slo: Mapping[str, float]
    beat_tokens_per_s: float | None = None


class SloWatch:
    """Least values of every latency of a plan, and whether they decide.

    Args:
        plan: every request that may come due in the window, in any order.
        slo: metric name to its limit in ms. Gaps between tokens (`itl`) are not watched.
    """

    def __init__(self, plan: Sequence[ScheduledRequest], slo: Mapping[str, float]) -> None:
        self._slo = {key: limit for key, limit in slo.items() if split_key(key)[0] in WATCHED}
        self._place = {request.index: place for place, request in enumerate(plan)}
        self._due_s = np.array([request.at_s if request.after is None else math.inf for request in plan])
        self._tokens = np.array([max(request.output_tokens, 1) for request in plan], dtype=np.float64)
        self._least_ms = {name: np.zeros(len(plan)) for name in WATCHED}
        self._waits = {name: np.ones(len(plan), dtype=np.bool_) for name in OVERDUE}
        self._num_ended = 0

    @property
    def num_answered(self) -> int:
        """Requests that have ended."""
        return self._num_ended

    def began(self, indices: Iterable[int]) -> None:
        """The first bytes of these answers came: their first token waits no longer."""
        places = [self._place[index] for index in indices if index in self._place]
        self._waits["ttft"][places] = False

    def ended(self, records: Iterable[Ended]) -> None:
        """These requests have ended, well or not."""
        for record in records:
            place = self._place.get(record.index)
            if place is None:  # another lap of a closed loop
                continue
            self._num_ended += 1
            for name, value in _latencies_ms(record).items():
                self._least_ms[name][place] = value
            for waits in self._waits.values():
                waits[place] = False

    def least(self, now_s: float) -> dict[str, float]:
        """The least that each limit's figure can come to, in ms, whatever follows."""
        waited_ms = np.maximum(1e3 * (now_s - self._due_s), 0.0)
        found = {}
        for key in self._slo:
            name, stat = split_key(key)
            values = self._least_ms[name]
            if name in OVERDUE:
                still = waited_ms / self._tokens if name == "norm" else waited_ms
                values = np.where(self._waits[name], still, values)
            found[key] = _least_statistic(values, stat)
        return found

    def lost(self, now_s: float) -> EarlyStop | None:
        """Says so once a limit cannot be met any more, with all limits' least excess (value / limit - 1)."""
        if not len(self._due_s):
            return None
        least = self.least(now_s)
        excess = {key: min(least[key] / limit - 1, MAX_EXCESS) for key, limit in self._slo.items()}
        worst = max(excess, key=lambda key: excess[key], default=None)
        if worst is None or excess[worst] <= 0:
            return None
        told = "infinite" if math.isinf(least[worst]) else f"at least {least[worst]:.4g} ms"
        text = f"{worst} is {told} (limit {self._slo[worst]:g} ms) whatever follows"
        return EarlyStop("slo", f"stopped after {now_s:.1f} s: {text}", now_s, excess)


def _latencies_ms(record: Ended) -> dict[str, float]:
    if not record.ok or record.first_token_s is None or record.last_token_s is None:
        return dict.fromkeys(WATCHED, math.inf)
    e2e_ms = 1e3 * (record.last_token_s - record.scheduled_s)
    after_first = max(record.output_tokens - 1, 1)
    return {
        "ttft": 1e3 * (record.first_token_s - record.scheduled_s),
        "tpot": 1e3 * (record.last_token_s - record.first_token_s) / after_first,
        "e2e": e2e_ms,
        "norm": e2e_ms / max(record.output_tokens, 1),
    }


def _least_statistic(values: Floats, stat: str) -> float:
    if stat == "mean":
        return float(values.mean())
    rank = nearest_rank(len(values), PERMILLE[stat])
    return float(np.partition(values, rank - 1)[rank - 1])


class PaceWatch:
    """Whether output tokens a second can still come to what the incumbent has.

    Args:
        beat_tokens_per_s: the incumbent's.
        alpha: chance, at most, of stopping one whose mean is as good, at whatever moment.
    """

    def __init__(self, beat_tokens_per_s: float, alpha: float = ALPHA) -> None:
        self._needed = beat_tokens_per_s * (1 - START_MARGIN)
        self._beat, self._alpha = beat_tokens_per_s, alpha
        self._rates: list[float] = []
        self._last: tuple[float, float] | None = None

    def add(self, at_s: float, tokens: float) -> None:
        """One look at the server's counter of output tokens."""
        if self._last is not None and at_s > self._last[0]:
            self._rates.append((tokens - self._last[1]) / (at_s - self._last[0]))
        self._last = (at_s, tokens)

    def bound(self) -> float:
        """Tokens a second that its mean does not exceed; infinite while that is unknown."""
        return upper_bound(batch_means(np.array(self._rates)), self._alpha)

    def beaten(self, now_s: float) -> EarlyStop | None:
        """Says so once the incumbent is out of reach."""
        if now_s < NOT_BEFORE_S or (bound := self.bound()) >= self._needed:
            return None
        text = (
            f"stopped after {now_s:.1f} s: at most {bound:.4g} output tokens/s, "
            f"and the best so far has {self._beat:.4g}"
        )
        return EarlyStop("beaten", text, now_s, {"output_tokens_per_s": bound})


def batch_means(series: Floats) -> Floats:
    """Means of batches of `BATCH_TIMES` autocorrelation times each; none where there are fewer than `MIN_BATCHES`."""
    n = len(series)
    if n < MIN_BATCHES:
        return np.empty(0)
    time = _long_time(series)
    size = max(1, math.ceil(BATCH_TIMES * time)) if time > 1.05 else 1
    num = n // size
    if num < MIN_BATCHES:
        return np.empty(0)
    return np.asarray(series[: num * size].reshape(num, size).mean(axis=1))


def _long_time(series: Floats) -> float:
    """Autocorrelation time, no less than that of an AR(1) with the same lag-1 correlation.

    A short series underestimates its own time by the window; its first correlation is known soonest.
    """
    centred = series - series.mean()
    variance = float(centred @ centred)
    if variance <= 0:
        return 1.0
    rho = float(centred[1:] @ centred[:-1]) / variance + 1.0 / len(series) * 4
    rho = min(max(rho, 0.0), 0.99)
    return max(autocorrelation_time(series), (1 + rho) / (1 - rho))


def upper_bound(means: Floats, alpha: float) -> float:
    """Upper end of the confidence sequence of a normal mean, one-sided; see the head of this file."""
    n = len(means)
    if n < MIN_BATCHES:
        return math.inf
    spread = 1 + n * PRIOR_VARIANCE
    ratio = (math.sqrt(spread) / alpha) ** (2 / n)
    if ratio >= spread:
        return math.inf
    beyond = (ratio - 1) / (1 - ratio / spread)
    return float(means.mean() + means.std(ddof=1) * math.sqrt((n - 1) / n * beyond))


class Watch:
    """Both together, as a load asks them.

    Args:
        plan: every request that may come due.
        rules: what may end it.
    """

    def __init__(self, plan: Sequence[ScheduledRequest], rules: StopRules) -> None:
        self._slo = SloWatch(plan, rules.slo)
        beat = rules.beat_tokens_per_s
        self._pace = PaceWatch(beat) if beat is not None else None
        self._num_counted = 0
        self.stop: EarlyStop | None = None

    def seen(self, now_s: float, began: Iterable[int], ended: Iterable[Ended]) -> bool:
        """Takes in what became of requests since the last call; True once the load may end."""
        self._slo.began(began)
        self._slo.ended(ended)
        self.stop = self.stop or self._slo.lost(now_s)
        return self.stop is not None

    def counted(self, now_s: float, counts: Sequence[tuple[float, float]]) -> bool:
        """Takes in all looks at the server's token counter so far (time, tokens); True once the load may end."""
        if self._pace is None or self._slo.num_answered < RAMP_REQUESTS:
            self._num_counted = len(counts)
            return self.stop is not None
        for at_s, tokens in counts[self._num_counted :]:
            self._pace.add(at_s, tokens)
        if len(counts) > self._num_counted:
            self.stop = self.stop or self._pace.beaten(now_s)
        self._num_counted = len(counts)
        return self.stop is not None
