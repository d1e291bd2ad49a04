"""Whether a measurement is to be believed, and what is odd about it: `docs/measurement.md`, Valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from varcas.columns import Bools, Floats, Measured, Requests
from varcas.intervals import autocorrelation_time, t_quantile
from varcas.records import Sample

SEND_LAG_P99_LIMIT_MS = 50.0
DELIVERED_TOLERANCE_FRAC = 0.02
CLIENT_CPU_LIMIT_FRAC = 0.9
ERROR_LIMIT_FRAC = 0.01
THROTTLE_LIMIT_FRAC = 0.2
THROTTLE_WARNING_FRAC = 0.05
MIN_COMPLETED = 20
"""Fewer answers, and not even the median has ten beyond it."""

KERNEL_STAMPED_MIN_FRAC = 0.99
EARLY_FRAC = 0.1
LATE_FRAC = 0.5
WARMUP_MIN_RATIO = 1.1
LATE_BATCHES = 20
WARMUP_CONFIDENCE = 0.999
WARMUP_MIN_STRETCHES = 40.0
"""Independent stretches of the second half: with fewer, a queue that comes and goes looks like a warm-up."""

SERVER_TOLERANCE_FRAC = 0.05
SERVER_TOLERANCE_MS = 5.0
SERVER_COUNT_TOLERANCE_FRAC = 0.02
SERVER_MEANS = ("ttft", "itl", "e2e")


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


def _too_few(columns: Mapping[str, Any]) -> str | None:
    """A saturated measurement is ranked by the tokens that came, not by the answers that ended."""
    completed = columns["num_completed"]
    if not completed or columns["saturated"] or completed >= MIN_COMPLETED:
        return None
    return f"only {completed} requests completed, bound {MIN_COMPLETED}: lengthen the window or raise the rate"


def _errors(columns: Mapping[str, Any]) -> str | None:
    failed, n = columns["num_failed"], columns["num_requests"]
    return f"{failed} of {n} requests failed, bound {ERROR_LIMIT_FRAC:.0%}" if failed > ERROR_LIMIT_FRAC * n else None


def _throttled(columns: Mapping[str, Any]) -> str | None:
    share = columns["throttle_frac"]
    if share is None or share <= THROTTLE_LIMIT_FRAC:
        return None
    return f"the GPU was throttled in {share:.0%} of samples, bound {THROTTLE_LIMIT_FRAC:.0%}"


CHECKS: tuple[Callable[[Mapping[str, Any]], str | None], ...] = (
    _sent_late, _rate_off, _client_busy, _nothing_completed, _too_few, _errors, _throttled,
)  # fmt: skip
"""Each says in words why a measurement is not to be believed, or None. Being saturated is no reason."""


def invalid_reasons(columns: Mapping[str, Any]) -> list[str]:
    """Every reason not to believe a measurement that its columns hold."""
    return [reason for check in CHECKS if (reason := check(columns))]


# warm-up


def still_warming(measured: Measured) -> list[str]:
    """Says of TTFT and of the time per token whether the window's first tenth was slower than its second half.

    A window starts on an empty server, so by rights its first requests are the fastest: slower ones mean that caches,
    compilation or clocks were not ready. Values are replaced by their ranks (one slow request decides nothing), and
    the first tenth's mean rank is held against the second half's by a one-sided t-test whose variance is that of
    batches, or of the autocorrelation time where that is larger. The difference must also be `WARMUP_MIN_RATIO` in the
    mean. Meaningful under steady open-loop arrivals below saturation alone.
    """
    window = measured.window
    tokens = window.output_tokens - 1
    figures: dict[str, tuple[Floats, Bools]] = {
        "TTFT": (window.first_token_s - window.scheduled_s, window.ok),
        "time per token": (
            (window.last_token_s - window.first_token_s) / np.maximum(tokens, 1),
            window.ok & (tokens > 0),
        ),
    }
    found = []
    for name, (values, has) in figures.items():
        chosen = has & np.isfinite(values)
        share = window.scheduled_s[chosen] / measured.duration_s
        ratio = _slower_at_first(values[chosen], share)
        if ratio is not None:
            found.append(
                f"warm-up is still visible: {name} of the window's first tenth is {ratio:.1f} times that of its "
                "second half: lengthen warmup_s"
            )
    return found


def _slower_at_first(values: Floats, share: Floats) -> float | None:
    """Mean of the first tenth over the mean of the second half, where it is larger beyond chance."""
    early, late = values[share < EARLY_FRAC], values[share >= LATE_FRAC]
    if len(early) < 2 or len(late) < 2 * LATE_BATCHES or late.mean() <= 0:
        return None
    ratio = float(early.mean() / late.mean())
    ranks = np.argsort(np.argsort(np.concatenate([early, late]), kind="stable"), kind="stable").astype(np.float64)
    first, second = ranks[: len(early)], ranks[len(early) :]
    edges = np.linspace(0, len(second), LATE_BATCHES + 1).astype(np.int64)[:-1]
    batched = float(np.add.reduceat(second - second.mean(), edges).var(ddof=1)) * LATE_BATCHES / len(second)
    time = max(autocorrelation_time(second), 1.0)
    if len(second) / time < WARMUP_MIN_STRETCHES:
        return None
    variance = max(batched, float(second.var()) * time)
    error = math.sqrt(variance * (1 / len(first) + 1 / len(second)))
    lead = float(first.mean() - second.mean())
    significant = lead > t_quantile(WARMUP_CONFIDENCE, LATE_BATCHES - 1) * error
    return ratio if significant and ratio >= WARMUP_MIN_RATIO else None


# warnings


def warnings_of(columns: Mapping[str, Any], measured: Measured, samples: list[Sample]) -> list[str]:
    """What is odd about a measurement, without making it invalid."""
    found = [
        _some_throttling(columns),
        _own_stamps(measured.kernel_stamped_frac),
        *_disagreements(columns, measured.requests, samples),
    ]
    return [text for text in found if text]


def _some_throttling(columns: Mapping[str, Any]) -> str | None:
    share = columns["throttle_frac"]
    if share is None or share <= THROTTLE_WARNING_FRAC:
        return None
    return f"the GPU was throttled in {share:.0%} of samples"


def _own_stamps(kernel_frac: float) -> str | None:
    if kernel_frac >= KERNEL_STAMPED_MIN_FRAC:
        return None
    return f"{1 - kernel_frac:.0%} of arrival times are the client's own, not the kernel's: they are late by its queue"


def server_columns(ordered: list[Sample]) -> dict[str, float | None]:
    """Means of the server's own histograms over window and drain, in ms."""
    return {f"server_{name}_mean_ms": _server_mean(ordered, name)[0] for name in SERVER_MEANS}


def _server_mean(ordered: list[Sample], name: str) -> tuple[float | None, float]:
    """Mean in ms, and observations behind it."""
    total_s, count = growth(ordered, f"server_{name}_sum_s"), growth(ordered, f"server_{name}_count")
    return (1e3 * total_s / count, count) if total_s is not None and count else (None, count or 0.0)


def growth(ordered: list[Sample], name: str) -> float | None:
    """Growth of a counter from the last look before the window (or the first within) to the last look of all."""
    looks = [(s.t_s, float(value)) for s in ordered if (value := getattr(s, name)) is not None]
    before, after = [v for t_s, v in looks if t_s <= 0], [v for t_s, v in looks if t_s > 0]
    seen = [*before[-1:], *after]
    return seen[-1] - seen[0] if len(seen) > 1 else None


def _disagreements(columns: Mapping[str, Any], requests: Requests, ordered: list[Sample]) -> list[str]:
    """Where the server's own means differ from ours by more than its own place in the path explains."""
    found = []
    for name, (mean_ms, count) in _client_means(requests).items():
        theirs_ms, seen = columns[f"server_{name}_mean_ms"], _server_mean(ordered, name)[1]
        if theirs_ms is None or mean_ms is None:
            continue
        if abs(seen - count) > SERVER_COUNT_TOLERANCE_FRAC * count + 1:
            found.append(f"the server counted {seen:.0f} {name} values, the load {count}: not compared")
        elif abs(mean_ms - theirs_ms) > max(SERVER_TOLERANCE_MS, SERVER_TOLERANCE_FRAC * theirs_ms):
            found.append(f"mean {name} is {mean_ms:.1f} ms here, {theirs_ms:.1f} ms by the server's own count")
    return found


def _client_means(requests: Requests) -> dict[str, tuple[float | None, int]]:
    """The same means from the send, over all requests of window and drain that the server counts too, in ms.

    Time between tokens is one a token here: the server counts its engine's steps, which its front end may merge into
    one event when it is busy.
    """
    first_s, span_s = requests.first_token_s - requests.sent_s, requests.last_token_s - requests.first_token_s
    began = ~np.isnan(first_s)
    gaps = int(requests.counts.sum()) - int(np.count_nonzero(requests.num_events))
    return {
        "ttft": _mean_ms(first_s[began]),
        "itl": (1e3 * float(span_s[began].sum()) / gaps, gaps) if gaps > 0 else (None, 0),
        "e2e": _mean_ms((requests.last_token_s - requests.sent_s)[requests.ok]),
    }


def _mean_ms(seconds: Floats) -> tuple[float | None, int]:
    return (1e3 * float(seconds.mean()), len(seconds)) if len(seconds) else (None, 0)
