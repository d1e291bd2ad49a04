"""Requests to numbers: latencies, rates, SLO, saturation, trust; and the gain of one configuration over another.

Clock, window and formula of each metric stand in `docs/measurement.md`. Times are seconds from the window's start, on
the load's monotonic clock. One rule for what went wrong: a request that is not `ok` has infinite latencies, so that a
server that drops requests never looks faster for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from varcas.records import LATENCIES, STATISTICS, LoadResult, RequestRecord, Sample

PERMILLE = {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99_9": 999}
"""Statistic to its rank in thousandths: integers, so that no rank depends on a rounding error."""

MIN_BEYOND = 10
"""A percentile is told only where at least so many observations lie beyond it."""

MAX_EXCESS = 100.0
"""Largest value of a constraint: an infinite latency is 101 times its limit, and Optuna's sums stay finite."""

NUM_BATCHES = 10
MIN_STARTS = 3
SEND_LAG_P99_LIMIT_MS = 50.0
DELIVERED_TOLERANCE_FRAC = 0.02
CLIENT_CPU_LIMIT_FRAC = 0.9
ERROR_LIMIT_FRAC = 0.01
THROTTLE_LIMIT_FRAC = 0.2
BACKLOG_SIGMAS = 3.0
BACKLOG_MIN_FRAC = 0.05
SLOWDOWN_MIN_RATIO = 1.25

Floats = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "inconclusive"]


# latencies


@dataclass(frozen=True, slots=True)
class Latencies:
    """What each request of a window waited for, in ms; infinite where it never came.

    Attributes:
        ttft: scheduled arrival to first token, one a request.
        tpot: (last token - first token) / (tokens - 1), of requests with at least two tokens.
        itl: gaps between successive token events of all requests, and an infinite one for each token that never came.
        e2e: scheduled arrival to last token, one a request.
    """

    ttft: Floats
    tpot: Floats
    itl: Floats
    e2e: Floats


def in_window(load: LoadResult) -> list[RequestRecord]:
    """Requests that were due within [0, duration_s): a warm-up's are not."""
    return [record for record in load.records if 0 <= record.scheduled_s < load.duration_s]


def latencies(records: Sequence[RequestRecord]) -> Latencies:
    """Every latency of these requests, in ms."""
    tpots = [tpot for record in records if (tpot := tpot_ms(record)) is not None]
    return Latencies(
        ttft=np.array([ttft_ms(record) for record in records], dtype=np.float64),
        tpot=np.array(tpots, dtype=np.float64),
        itl=np.concatenate([np.empty(0), *(gaps_ms(record) for record in records)]),
        e2e=np.array([e2e_ms(record) for record in records], dtype=np.float64),
    )


def ttft_ms(record: RequestRecord) -> float:
    """Scheduled arrival to first token."""
    if not record.ok or record.first_token_s is None:
        return math.inf
    return 1e3 * (record.first_token_s - record.scheduled_s)


def e2e_ms(record: RequestRecord) -> float:
    """Scheduled arrival to last token."""
    if not record.ok or record.last_token_s is None:
        return math.inf
    return 1e3 * (record.last_token_s - record.scheduled_s)


def tpot_ms(record: RequestRecord) -> float | None:
    """Time per output token after the first; None for a good answer of a single token, which has none."""
    if not record.ok or record.first_token_s is None or record.last_token_s is None:
        return math.inf
    if record.output_tokens < 2:
        return None
    return 1e3 * (record.last_token_s - record.first_token_s) / (record.output_tokens - 1)


def gaps_ms(record: RequestRecord) -> Floats:
    """Gaps between token events; a request that is not `ok` adds one infinite gap for each token it still owes."""
    gaps = 1e3 * np.diff(np.asarray(record.token_offsets_s, dtype=np.float64))
    if record.ok:
        return gaps
    owed = max(record.scheduled_output_tokens - sum(record.token_counts), 1)
    return np.concatenate([gaps, np.full(owed, math.inf)])


def percentile(values: Floats, permille: int) -> float:
    """Nearest rank: the smallest observation with at least `permille` / 1000 of all at or below it. May be infinite."""
    rank = _rank(len(values), permille)
    return float(np.partition(values, rank - 1)[rank - 1])


def _rank(n: int, permille: int) -> int:
    return max(1, -(-n * permille // 1000))


def statistic(values: Floats, name: str) -> float:
    """One of `STATISTICS` over every observation: the plain empirical figure, infinite where a miss decides it."""
    return float(values.mean()) if name == "mean" else percentile(values, PERMILLE[name])


def reported(values: Floats, name: str) -> float | None:
    """A statistic as a column shows it.

    The mean is over what came. A percentile is None where fewer than `MIN_BEYOND` observations lie beyond it, and
    where it falls among those that never came.
    """
    if name == "mean":
        came = values[np.isfinite(values)]
        return float(came.mean()) if len(came) else None
    n = len(values)
    if n - _rank(n, PERMILLE[name]) < MIN_BEYOND:
        return None
    found = percentile(values, PERMILLE[name])
    return found if math.isfinite(found) else None


# a measurement's columns


def summarise(load: LoadResult, slo: Mapping[str, float], samples: Sequence[Sample] = ()) -> dict[str, Any]:
    """The metric columns of `TrialRow` for one load; `constraints_of` gives those of the SLO.

    Args:
        load: the records and their window.
        slo: metric name to its limit in ms; decides `goodput_rps`.
        samples: on the records' clock (`t_s` from the start of the window).
    """
    records = in_window(load)
    waits = latencies(records)
    columns: dict[str, Any] = {
        f"{name}_{stat}_ms": reported(getattr(waits, name), stat) for name in LATENCIES for stat in STATISTICS
    }
    columns |= _counts(records) | _rates(load, records, slo) | _client(load, records)
    columns |= sample_columns(samples, load.duration_s)
    columns |= {"duration_s": float(load.duration_s), "saturated": is_saturated(load)}
    reasons = invalid_reasons(columns)
    return columns | {"valid": not reasons, "invalid_reasons": reasons}


def _counts(records: Sequence[RequestRecord]) -> dict[str, Any]:
    completed = sum(record.ok for record in records)
    unfinished = sum(not record.ok and record.error in (None, "unfinished") for record in records)
    return {
        "num_requests": len(records),
        "num_completed": completed,
        "num_failed": len(records) - completed - unfinished,
        "num_unfinished": unfinished,
    }


def _rates(load: LoadResult, records: Sequence[RequestRecord], slo: Mapping[str, float]) -> dict[str, Any]:
    duration_s = load.duration_s
    rate, lo, hi = token_rate(load)
    prompt_tokens = sum(
        record.scheduled_prompt_tokens if record.prompt_tokens is None else record.prompt_tokens
        for record in load.records
        if record.first_token_s is not None and 0 <= record.first_token_s < duration_s
    )
    completed = sum(r.ok and r.end_s is not None and 0 <= r.end_s < duration_s for r in load.records)
    return {
        "output_tokens_per_s": rate,
        "output_tokens_per_s_lo": lo,
        "output_tokens_per_s_hi": hi,
        "prompt_tokens_per_s": prompt_tokens / duration_s,
        "request_rate_rps": completed / duration_s,
        "goodput_rps": sum(is_good(record, slo) for record in records) / duration_s,
    }


def _client(load: LoadResult, records: Sequence[RequestRecord]) -> dict[str, Any]:
    """What the load generator did: how late it sent, how much, at what cost."""
    lags = np.array([1e3 * (r.sent_s - r.scheduled_s) for r in records if r.sent_s is not None], dtype=np.float64)
    sent_ttft = [
        1e3 * (r.first_token_s - r.sent_s)
        for r in records
        if r.ok and r.first_token_s is not None and r.sent_s is not None
    ]
    sent = sum(r.sent_s is not None and 0 <= r.sent_s < load.duration_s for r in load.records)
    return {
        "delivered_rate_rps": sent / load.duration_s,
        "send_lag_p99_ms": percentile(lags, PERMILLE["p99"]) if len(lags) else None,
        "client_cpu_frac": float(load.client_cpu_frac),
        "ttft_sent_mean_ms": float(np.mean(sent_ttft)) if sent_ttft else None,
    }


def token_rate(load: LoadResult) -> tuple[float, float, float]:
    """Output tokens that arrived in [0, duration_s) per second, with the 95 % interval (mean, lo, hi).

    Tokens of warm-up requests that arrive in the window count: the server made them then. Tokens cluster (a request
    brings hundreds), so the interval comes from the means of `NUM_BATCHES` equal stretches of the window, which are
    nearly independent when a stretch is longer than a response (batch means: Law and Kelton, *Simulation Modeling and
    Analysis*, section 9.5.3). It holds chance within this start only; starts differ by more.
    """
    arrivals, counts = _token_events(load.records)
    edges = np.linspace(0.0, load.duration_s, NUM_BATCHES + 1)
    inside = (arrivals >= 0) & (arrivals < load.duration_s)
    batch = np.minimum(np.searchsorted(edges, arrivals[inside], side="right") - 1, NUM_BATCHES - 1)
    tokens = np.bincount(batch, weights=counts[inside], minlength=NUM_BATCHES)
    rate = float(tokens.sum()) / load.duration_s
    spread = float(np.std(tokens, ddof=1)) * NUM_BATCHES / load.duration_s
    half = t_quantile(0.975, NUM_BATCHES - 1) * spread / math.sqrt(NUM_BATCHES)
    return rate, max(0.0, rate - half), rate + half


def _token_events(records: Sequence[RequestRecord]) -> tuple[Floats, Floats]:
    """Arrival time in s and tokens of every token event."""
    sent = [record for record in records if record.sent_s is not None and record.token_offsets_s]
    times = [np.asarray(r.token_offsets_s, dtype=np.float64) + (r.sent_s or 0.0) for r in sent]
    counts = [np.asarray(r.token_counts, dtype=np.float64) for r in sent]
    return np.concatenate([np.empty(0), *times]), np.concatenate([np.empty(0), *counts])


# SLO


def is_good(record: RequestRecord, slo: Mapping[str, float]) -> bool:
    """Whether a request came whole and within every limit.

    A limit on any statistic is a limit on the request's own figure; for ITL, which a request has many of, the same
    statistic over its own gaps.
    """
    return record.ok and all(_own_ms(record, key) <= limit for key, limit in slo.items())


def _own_ms(record: RequestRecord, key: str) -> float:
    name, stat = split_key(key)
    if name == "ttft":
        return ttft_ms(record)
    if name == "e2e":
        return e2e_ms(record)
    if name == "tpot":
        return tpot_ms(record) or 0.0
    gaps = gaps_ms(record)
    return statistic(gaps, stat) if len(gaps) else 0.0


def split_key(key: str) -> tuple[str, str]:
    """`ttft_p99_9_ms` is (`ttft`, `p99_9`)."""
    name, _, rest = key.removesuffix("_ms").partition("_")
    return name, rest


def constraints_of(load: LoadResult, slo: Mapping[str, float]) -> dict[str, Any]:
    """The columns `constraints` (SLO key to value / limit - 1) and `slo_met` (None without an SLO).

    Computed over every request of the window whatever their number, misses as infinite, and at most `MAX_EXCESS`:
    every key is there, on every measurement.
    """
    records = in_window(load)
    waits = latencies(records)
    excess = {key: _excess(getattr(waits, split_key(key)[0]), key, limit, bool(records)) for key, limit in slo.items()}
    return {"constraints": excess, "slo_met": all(value <= 0 for value in excess.values()) if slo else None}


def _excess(values: Floats, key: str, limit: float, measured: bool) -> float:
    if not measured:
        return MAX_EXCESS
    if not len(values):
        return -1.0  # every answer was one token long: there was nothing to wait for
    return min(statistic(values, split_key(key)[1]) / limit - 1, MAX_EXCESS)


# saturation


def is_saturated(load: LoadResult) -> bool:
    """Whether the server fell behind the arrivals.

    Two things must hold. In the window's second half more requests arrive than end, by more than `BACKLOG_SIGMAS`
    standard deviations of a stable server's count in flight (Poisson: variance = mean, so 2 N of a difference) and by
    more than `BACKLOG_MIN_FRAC` of the arrivals. And requests of the last third wait longer for each of their tokens
    than those of the first, by `SLOWDOWN_MIN_RATIO`: long answers in a short window also pile up, without slowing.
    """
    half_s, end_s = load.duration_s / 2, load.duration_s
    growth = in_flight(load.records, end_s) - in_flight(load.records, half_s)
    arrived = sum(half_s <= record.scheduled_s < end_s for record in load.records)
    noise = BACKLOG_SIGMAS * math.sqrt(2 * in_flight(load.records, half_s) + 1)
    return growth > max(noise, BACKLOG_MIN_FRAC * arrived) and _slows_down(load)


def in_flight(records: Sequence[RequestRecord], at_s: float) -> int:
    """Requests that were due before `at_s` and had not ended by then."""
    return sum(r.scheduled_s < at_s and (r.end_s is None or r.end_s >= at_s) for r in records)


def _slows_down(load: LoadResult) -> bool:
    third_s = load.duration_s / 3
    early = _token_wait_ms([r for r in in_window(load) if r.scheduled_s < third_s])
    late = _token_wait_ms([r for r in in_window(load) if r.scheduled_s >= 2 * third_s])
    return math.isinf(late) or late > SLOWDOWN_MIN_RATIO * early


def _token_wait_ms(records: Sequence[RequestRecord]) -> float:
    """Median of end-to-end latency per scheduled output token."""
    waits = [e2e_ms(record) / max(record.scheduled_output_tokens, 1) for record in records]
    return percentile(np.array(waits), PERMILLE["p50"]) if waits else 0.0


# trust


def _sent_late(columns: Mapping[str, Any]) -> str | None:
    lag_ms = columns["send_lag_p99_ms"]
    if lag_ms is None or lag_ms <= SEND_LAG_P99_LIMIT_MS:
        return None
    return f"requests were sent late: p99 {lag_ms:.0f} ms after schedule, bound {SEND_LAG_P99_LIMIT_MS:.0f} ms"


def _rate_off(columns: Mapping[str, Any]) -> str | None:
    """The schedule is known, so one request that crosses the window's edge is all the noise there is."""
    asked, sent = columns["num_requests"], columns["delivered_rate_rps"] * columns["duration_s"]
    if abs(sent - asked) <= DELIVERED_TOLERANCE_FRAC * asked + 1:
        return None
    return (
        f"{sent:.0f} requests were sent in the window, the schedule has {asked}; bound {DELIVERED_TOLERANCE_FRAC:.0%}"
    )


def _client_busy(columns: Mapping[str, Any]) -> str | None:
    cpu = columns["client_cpu_frac"]
    if cpu <= CLIENT_CPU_LIMIT_FRAC:
        return None
    return f"the load generator was the limit: it used {cpu:.0%} of a core, bound {CLIENT_CPU_LIMIT_FRAC:.0%}"


def _nothing_completed(columns: Mapping[str, Any]) -> str | None:
    return None if columns["num_completed"] else "no request completed"


def _errors(columns: Mapping[str, Any]) -> str | None:
    failed, n = columns["num_failed"], columns["num_requests"]
    return f"{failed} of {n} requests failed, bound {ERROR_LIMIT_FRAC:.0%}" if failed > ERROR_LIMIT_FRAC * n else None


def _throttled(columns: Mapping[str, Any]) -> str | None:
    share = columns["throttle_frac"]
    if share is None or share <= THROTTLE_LIMIT_FRAC:
        return None
    return f"the GPU was throttled in {share:.0%} of samples, bound {THROTTLE_LIMIT_FRAC:.0%}"


CHECKS: tuple[Callable[[Mapping[str, Any]], str | None], ...] = (
    _sent_late, _rate_off, _client_busy, _nothing_completed, _errors, _throttled,
)  # fmt: skip
"""Each says in words why a measurement is not to be believed, or None. Being saturated is no reason."""


def invalid_reasons(columns: Mapping[str, Any]) -> list[str]:
    """Every reason not to believe a measurement, from its columns."""
    return [reason for check in CHECKS if (reason := check(columns))]


# samples


def sample_columns(samples: Sequence[Sample], duration_s: float) -> dict[str, Any]:
    """The columns that come from the server's counters (window and drain) and the GPU (window)."""
    ordered = sorted(samples, key=lambda sample: sample.t_s)
    inside = [sample for sample in ordered if 0 <= sample.t_s <= duration_s]
    queries, hits = _delta(ordered, "prefix_cache_queries"), _delta(ordered, "prefix_cache_hits")
    preemptions, energy_j = _delta(ordered, "preemptions"), _energy_j(ordered, duration_s)
    memory, clocks = _seen(inside, "gpu_memory_used_bytes"), _seen(inside, "gpu_sm_clock_mhz")
    temperatures, throttled = _seen(inside, "gpu_temperature_c"), _seen(inside, "gpu_throttled")
    return {
        "preemptions": None if preemptions is None else round(preemptions),
        "prefix_cache_hit_frac": hits / queries if queries and hits is not None else None,
        "energy_j": energy_j,
        "power_w": None if energy_j is None else energy_j / duration_s,
        "gpu_memory_used_bytes": round(max(memory)) if memory else None,
        "sm_clock_mhz": float(np.median(clocks)) if clocks else None,
        "temperature_c": max(temperatures) if temperatures else None,
        "throttle_frac": sum(throttled) / len(throttled) if throttled else None,
    }


def _seen(samples: Sequence[Sample], name: str) -> list[float]:
    return [float(value) for sample in samples if (value := getattr(sample, name)) is not None]


def _delta(ordered: Sequence[Sample], name: str) -> float | None:
    """Growth of a counter from the last look before the window (or the first within) to the last look of all."""
    before = _seen([sample for sample in ordered if sample.t_s <= 0], name)
    after = _seen([sample for sample in ordered if sample.t_s > 0], name)
    seen = [*before[-1:], *after]
    return seen[-1] - seen[0] if len(seen) > 1 else None


def _energy_j(ordered: Sequence[Sample], duration_s: float) -> float | None:
    """Trapezoid over the window; the nearest look stands for its ends where none lies beyond."""
    looks = [(sample.t_s, sample.gpu_power_w) for sample in ordered if sample.gpu_power_w is not None]
    times, power = np.array([t for t, _ in looks]), np.array([w for _, w in looks])
    inner = times[(times > 0) & (times < duration_s)] if looks else times
    if not len(inner):
        return None
    grid = np.concatenate([[0.0], inner, [duration_s]])
    return float(np.trapezoid(np.interp(grid, times, power), grid))


# gain


@dataclass(frozen=True, slots=True)
class Gain:
    """One configuration against another, from one value a start.

    Attributes:
        ratio: candidate / baseline, of geometric means.
        lo: lower end of the ratio's 95 % interval; None where the starts do not give one.
        hi: upper end of it.
        baseline_mean: arithmetic mean of the baseline's starts.
        candidate_mean: arithmetic mean of the candidate's starts.
        n: starts of baseline and candidate.
        verdict: whether the whole interval lies on one side of 1.
        reason: why it is inconclusive; None when it is not.
    """

    ratio: float
    lo: float | None
    hi: float | None
    baseline_mean: float
    candidate_mean: float
    n: tuple[int, int]
    verdict: Verdict
    reason: str | None = None


def compare(
    baseline: Sequence[float], candidate: Sequence[float], *, direction: Literal["maximize", "minimize"]
) -> Gain:
    """Compares two configurations by their starts: Welch's t-interval on the logarithms of one value a start.

    The start is the unit of replication: whatever is measured within one start shares its luck. Logarithms make the
    interval one of the ratio. At three starts an arm it calls equal configurations different in 3-5.4 % of cases
    (tests/test_metrics.py simulates it); a percentile bootstrap of three values does so in 20 %.

    Raises:
        ValueError: an arm is empty.
    """
    if not baseline or not candidate:
        raise ValueError("an arm without a start cannot be compared")
    means, n = (float(np.mean(baseline)), float(np.mean(candidate))), (len(baseline), len(candidate))
    if min(*baseline, *candidate) <= 0:
        ratio = means[1] / means[0] if means[0] else math.nan
        return Gain(ratio, None, None, *means, n, "inconclusive", "a start measured zero or less: no ratio to be had")
    logs = np.log(baseline), np.log(candidate)
    gain = float(logs[1].mean() - logs[0].mean())
    if min(n) < MIN_STARTS:
        few = f"{n[0]} and {n[1]} starts: at least {MIN_STARTS} an arm are needed"
        return Gain(math.exp(gain), None, None, *means, n, "inconclusive", few)
    half = _welch_half(*logs)
    lo, hi = math.exp(gain - half), math.exp(gain + half)
    verdict = _verdict(lo, hi, direction)
    reason = "the 95 % interval of the ratio holds 1" if verdict == "inconclusive" else None
    return Gain(math.exp(gain), lo, hi, *means, n, verdict, reason)


def _verdict(lo: float, hi: float, direction: str) -> Verdict:
    if lo <= 1 <= hi:
        return "inconclusive"
    return "better" if (lo > 1) == (direction == "maximize") else "worse"


def _welch_half(a: Floats, b: Floats) -> float:
    """Half the 95 % interval of a difference of means (Welch 1947, with Satterthwaite's degrees of freedom)."""
    va, vb = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    if va + vb == 0:
        return 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t_quantile(0.975, freedom) * math.sqrt(va + vb)


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
