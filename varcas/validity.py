"""Whether a measurement is to be believed, and what is odd about it: `docs/measurement.md`, Valid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from varcas.columns import Floats, Measured, Requests
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

LENGTH_WARNING_FRAC = 0.01
LENGTH_LIMIT_FRAC = 0.05
LEFT_OUT_LIMIT_FRAC = 0.02
KERNEL_STAMPED_MIN_FRAC = 0.99
MERGED_LIMIT_FRAC = 0.01
EARLY_FRAC = 0.1
LATE_FRAC = 0.5
WARMUP_MIN_RATIO = 1.1
LATE_BATCHES = 20
WARMUP_CONFIDENCE = 0.999
WARMUP_MIN_STRETCHES = 40.0
"""Independent stretches of the second half: with fewer, a queue that comes and goes looks like a warm-up."""

COLD_MIN_FRAC = 0.05
"""Of prompts' tokens, found in the prefix cache in the second half and not yet in the first tenth."""

SERVER_TOLERANCE_FRAC = 0.05
SERVER_TOLERANCE_MS = 5.0
SERVER_COUNT_TOLERANCE_FRAC = 0.02
SERVER_MEANS = ("ttft", "itl", "e2e")
UNCHECKED = "not cross-checked"
"""Begins the warning of a measurement that the server's own figures could not be held against."""


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


# work done


def work_not_done(measured: Measured, *, exact_lengths: bool) -> list[tuple[str, bool]]:
    """What was asked for and not done, each with whether that makes the measurement invalid.

    Args:
        measured: the load; answers and prompts of the window's good requests are counted.
        exact_lengths: lengths are the server's to keep; else they are told and make nothing invalid.
    """
    good = measured.window.where(measured.window.ok)
    first = good.where(good.turns == 0)  # a later turn's prompt has its history before it
    found = [
        _length_off("answers", good.output_tokens, good.scheduled_output_tokens, exact_lengths),
        _length_off("prompts", first.prompt_tokens, first.scheduled_prompt_tokens, exact_lengths),
        _left_out(measured),
    ]
    return [one for one in found if one]


def _length_off(what: str, came: Floats, scheduled: Floats, exact: bool) -> tuple[str, bool] | None:
    if not len(came) or not scheduled.sum():
        return None
    off = float(came.sum() / scheduled.sum()) - 1
    if abs(off) <= LENGTH_WARNING_FRAC:
        return None
    text = f"{what} have {came.mean():.0f} tokens on average, the schedule {scheduled.mean():.0f} ({off:+.1%})"
    is_reason = exact and abs(off) > LENGTH_LIMIT_FRAC
    return (f"{text}, bound {LENGTH_LIMIT_FRAC:.0%}" if is_reason else text), is_reason


def _left_out(measured: Measured) -> tuple[str, bool] | None:
    left_out = measured.num_left_out
    if not left_out:
        return None
    share = left_out / (left_out + len(measured.requests))
    text = f"{left_out} requests ({share:.1%}) did not fit the server's context and were not sent: the rate is lower"
    is_reason = share > LEFT_OUT_LIMIT_FRAC
    return (f"{text}, bound {LEFT_OUT_LIMIT_FRAC:.0%}" if is_reason else text), is_reason


# warm-up


def is_cache_cold(ordered: list[Sample], duration_s: float) -> bool:
    """Whether the window's first tenth found less in the prefix cache than its second half; true where nobody knows.

    Each load has a cache of its own: its first requests with a shared prompt, or first turns, compute what later ones
    find, and are slower by rights.
    """
    early = _hit_frac([sample for sample in ordered if sample.t_s <= EARLY_FRAC * duration_s])
    late = _hit_frac([sample for sample in ordered if sample.t_s >= LATE_FRAC * duration_s])
    return early is None or late is None or late - early > COLD_MIN_FRAC


def _hit_frac(ordered: list[Sample]) -> float | None:
    """Found of what was looked up; 0 where nothing was, None without counters."""
    queries, hits = growth(ordered, "prefix_cache_queries"), growth(ordered, "prefix_cache_hits")
    return None if queries is None or hits is None else hits / max(queries, 1.0)


def still_warming(measured: Measured, figures: Mapping[str, Floats]) -> list[str]:
    """Says of each figure whether the window's first tenth was slower than its second half.

    A window starts on an empty server, so by rights its first requests are the fastest: slower ones mean that caches,
    compilation or clocks were not ready. Values are replaced by their ranks (one slow request decides nothing), and
    the first tenth's mean rank is held against the second half's by a one-sided t-test whose variance is that of
    batches, or of the autocorrelation time where that is larger. The difference must also be `WARMUP_MIN_RATIO` in the
    mean. Meaningful under steady open-loop arrivals below saturation alone.

    Args:
        measured: the load.
        figures: name to its value for each request of the window; not finite where it has none.
    """
    found = []
    for name, values in figures.items():
        chosen = np.isfinite(values)
        share = measured.window.scheduled_s[chosen] / measured.duration_s
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
        _unfinished(columns),
        _own_stamps(measured.kernel_stamped_frac),
        _merged(measured.window),
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


def _unfinished(columns: Mapping[str, Any]) -> str | None:
    """Of a saturated server that is a matter of course."""
    unfinished = columns["num_unfinished"]
    if not unfinished or columns["saturated"]:
        return None
    return f"{unfinished} of {columns['num_requests']} requests were unfinished when the drain ended: raise max_drain_s"


def _merged(window: Requests) -> str | None:
    """Events of one receive have one stamp, the last one's: those before it are late, and the gap between them is 0."""
    gaps = np.diff(window.offsets_s)
    num_gaps = int(np.maximum(window.num_events - 1, 0).sum())
    ends = window.splits[1:-1] - 1  # from one request's last event to the next one's first
    together = np.count_nonzero(gaps == 0) - np.count_nonzero(gaps[ends[(ends >= 0) & (ends < len(gaps))]] == 0)
    if together <= MERGED_LIMIT_FRAC * num_gaps:
        return None
    return (
        f"{together / num_gaps:.0%} of token events came in one receive with the next: their times are the last one's"
    )


def server_columns(ordered: list[Sample]) -> dict[str, float | None]:
    """Means of the server's own histograms over window and drain, in ms."""
    return {f"server_{name}_mean_ms": _server_mean(ordered, name)[0] for name in SERVER_MEANS}


def _server_mean(ordered: list[Sample], name: str) -> tuple[float | None, float]:
    """Mean in ms, and observations behind it."""
    total_s, count = growth(ordered, f"server_{name}_sum_s"), growth(ordered, f"server_{name}_count")
    return (1e3 * total_s / count, count) if total_s is not None and count else (None, count or 0.0)


def growth(ordered: list[Sample], name: str) -> float | None:
    """Growth of a counter from the last look before the window (or the first within) to the last look of all.

    None with fewer than two looks, and where it fell: then it is not one server's.
    """
    looks = [(s.t_s, float(value)) for s in ordered if (value := getattr(s, name)) is not None]
    before, after = [v for t_s, v in looks if t_s <= 0], [v for t_s, v in looks if t_s > 0]
    seen = [*before[-1:], *after]
    fell = any(after < before for before, after in itertools.pairwise(seen))
    return seen[-1] - seen[0] if len(seen) > 1 and not fell else None


def _disagreements(columns: Mapping[str, Any], requests: Requests, ordered: list[Sample]) -> list[str]:
    """Where the server's own means differ from ours by more than its own place in the path explains."""
    if all(columns[f"server_{name}_mean_ms"] is None for name in SERVER_MEANS):
        return [f"{UNCHECKED}: {_why_not(ordered)}"]
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


def _why_not(ordered: list[Sample]) -> str:
    """Why there is nothing of the server's to compare with."""
    counts = [sample.server_ttft_count for sample in ordered if sample.server_ttft_count is not None]
    if len(counts) < 2:
        return "no histograms of the server were read (`/metrics` of vLLM)"
    if any(after < before for before, after in itertools.pairwise(counts)):
        return "the server's counters fell: it was started anew, or several servers answer at one address"
    return "the server's histograms counted no request"


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
