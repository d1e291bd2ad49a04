"""Early stops: never one that the whole load would have contradicted, and soon where the answer is plain."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varcas.early_stop import MIN_BATCHES, PaceWatch, SloWatch, StopRules, Watch, batch_means, upper_bound
from varcas.metrics import constraints_of
from varcas.records import Ended, LoadResult, RequestRecord, ScheduledRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from false_stops import false_stops

LIMIT = {"ttft_p95_ms": 2000.0}


def plan(num: int, rate_rps: float = 20.0, tokens: int = 50) -> list[ScheduledRequest]:
    return [ScheduledRequest(i, i / rate_rps, 10, tokens, i, i) for i in range(num)]


def served(num: int, rate_rps: float, capacity_rps: float, tokens: int = 50) -> list[Ended]:
    """Requests that a server answers one after the other; the first token comes at its start."""
    free_s, found = 0.0, []
    for request in plan(num, rate_rps, tokens):
        begins_s = max(free_s, request.at_s)
        free_s = begins_s + 1 / capacity_rps
        found.append(Ended(request.index, request.at_s, begins_s + 0.1, free_s, tokens, True))
    return found


def stopped_at(watch: SloWatch, ended: list[Ended], until_s: float) -> float | None:
    for tick in range(1, int(until_s * 5)):
        now_s, before_s = tick / 5, (tick - 1) / 5
        watch.began(e.index for e in ended if before_s < (e.first_token_s or 0) <= now_s)
        watch.ended(e for e in ended if before_s < (e.last_token_s or 0) <= now_s)
        if watch.lost(now_s):
            return now_s
    return None


def test_an_overloaded_server_is_given_up_within_8_of_120_seconds() -> None:
    """20 requests/s at a T4 that takes 2.6: 121 of 2,400 must be late by 2 s."""
    watch = SloWatch(plan(2400), LIMIT)
    at_s = stopped_at(watch, served(2400, 20.0, 2.6), 120.0)
    assert at_s is not None
    assert at_s <= 9.0
    stop = watch.lost(at_s)
    assert stop is not None
    assert stop.kind == "slo"
    assert 0 < stop.bounds["ttft_p95_ms"] < 0.1
    assert "ttft_p95_ms" in stop.text


def test_a_server_that_holds_the_rate_is_never_given_up() -> None:
    assert stopped_at(SloWatch(plan(600), LIMIT), served(600, 20.0, 25.0), 30.0) is None


def test_a_failed_request_is_infinitely_late() -> None:
    watch = SloWatch(plan(10), {"e2e_p90_ms": 1e6})
    watch.ended([Ended(0, 0.0, None, None, 0, False)])
    assert watch.lost(1.0) is None  # one of ten may be late
    watch.ended([Ended(1, 0.05, None, None, 0, False)])
    stop = watch.lost(1.0)
    assert stop is not None
    assert stop.bounds["e2e_p90_ms"] == 100.0


def test_a_limit_on_the_mean_is_lost_by_what_has_been_waited_for() -> None:
    watch = SloWatch(plan(10, rate_rps=10.0), {"ttft_mean_ms": 1000.0})
    assert watch.lost(1.4) is None
    assert watch.lost(1.5) is not None  # 15 - 4.5 s of waiting over ten requests


def test_a_request_that_waits_for_another_is_not_overdue() -> None:
    later = [dataclasses.replace(one, turn=1, after=one.index - 1) for one in plan(2)[1:]]
    watch = SloWatch([*plan(1), *later], {"ttft_mean_ms": 900.0})
    assert watch.least(1.0)["ttft_mean_ms"] == 500.0


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[RequestRecord], float]:
    num = draw(st.integers(1, 30))
    waits = draw(st.lists(st.floats(0.01, 3.0), min_size=num, max_size=num))
    spans = draw(st.lists(st.floats(0.0, 3.0), min_size=num, max_size=num))
    kinds = draw(st.lists(st.sampled_from(["ok", "ok", "ok", "failed", "unfinished"]), min_size=num, max_size=num))
    tokens = draw(st.lists(st.integers(1, 5), min_size=num, max_size=num))
    records = []
    for i, (wait, span, kind, count) in enumerate(zip(waits, spans, kinds, tokens, strict=True)):
        first, last = i * 0.1 + wait, i * 0.1 + wait + (span if count > 1 else 0.0)
        offsets = tuple(np.linspace(wait, last - i * 0.1, count))
        error = {"ok": None, "failed": "500: no", "unfinished": "unfinished"}[kind]
        records.append(
            RequestRecord(i, i * 0.1, i * 0.1, first, last, last, 5, count, 5, count, offsets, (1,) * count, "length",
                          error, 200, i, 0)
        )  # fmt: skip
    return records, draw(st.floats(0.0, 12.0))


@given(loads(), st.sampled_from(["mean", "p50", "p90", "p99"]), st.sampled_from(["ttft", "tpot", "e2e", "norm"]))
def test_what_is_lost_at_any_moment_is_lost_in_the_end(
    load: tuple[list[RequestRecord], float], statistic: str, name: str
) -> None:
    records, now_s = load
    slo = {f"{name}_{statistic}_ms": 800.0}
    whole = LoadResult(tuple(records), 0.0, 10.0, 5.0, 0.1)
    final = constraints_of(whole, slo)["constraints"]
    watch = SloWatch([ScheduledRequest(r.index, r.scheduled_s, 5, r.output_tokens, 0, r.index) for r in records], slo)
    watch.began(r.index for r in records if r.first_token_s is not None and r.first_token_s <= now_s)
    watch.ended(
        Ended(r.index, r.scheduled_s, r.first_token_s, r.last_token_s, r.output_tokens, r.error is None)
        for r in records
        if r.end_s is not None and r.end_s <= now_s and r.error != "unfinished"
    )
    stop = watch.lost(now_s)
    if stop is not None:
        key = next(iter(slo))
        assert stop.bounds[key] <= final[key] + 1e-9
        assert final[key] > 0


def test_at_most_one_in_a_hundred_good_configurations_is_given_up_on_autocorrelated_data() -> None:
    """AR(1) with rho 0.9, looked at after every second of two minutes; `benchmarks/false_stops.py` runs more."""
    found = false_stops(rho=0.9, series=400, seconds=120, seed=0)
    assert found.share <= 0.01


def test_a_configuration_at_half_the_rate_is_given_up_within_a_window() -> None:
    rng, watch = np.random.default_rng(0), PaceWatch(1000.0)
    total = 0.0
    for second in range(1, 121):
        total += 500.0 * (1 + 0.05 * rng.standard_normal())
        watch.add(float(second), total)
        if watch.beaten(float(second)):
            break
    assert second < 100


def test_one_that_is_a_start_s_luck_behind_is_measured_in_full() -> None:
    watch, total = PaceWatch(1000.0), 0.0
    for second in range(1, 121):
        total += 930.0 + (second % 2)
        watch.add(float(second), total)
        assert watch.beaten(float(second)) is None


def test_the_bound_is_that_of_the_test_martingale() -> None:
    """At the bound the martingale is 1 / alpha: solved here for the mean by bisection."""
    means, alpha, g = np.array([1.0, 2.0, 1.5, 1.2, 2.2, 1.4]), 0.01, 4.0
    n = len(means)

    def martingale(mean: float) -> float:
        t2 = n * (means.mean() - mean) ** 2 / means.var(ddof=1)
        x = t2 / (n - 1)
        return float((1 + n * g) ** -0.5 * ((1 + x) / (1 + x / (1 + n * g))) ** (n / 2))

    assert martingale(upper_bound(means, alpha)) == pytest.approx(1 / alpha)
    assert upper_bound(means[: MIN_BATCHES - 1], alpha) == math.inf


def test_batches_are_long_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(1)
    walk = np.cumsum(rng.standard_normal(400)) + 100
    assert len(batch_means(walk)) == 0
    assert len(batch_means(rng.standard_normal(400))) >= MIN_BATCHES


def test_pace_counts_from_when_the_server_is_filled() -> None:
    watch = Watch(plan(100), StopRules({}, beat_tokens_per_s=1000.0))
    counts = [(float(s), 10.0 * s) for s in range(60)]
    assert not watch.counted(60.0, counts)  # nothing was answered yet: it all belongs to the ramp
    watch.seen(60.0, [], [Ended(i, 0.0, 0.1, 0.2, 5, True) for i in range(10)])
    later = [*counts, *((float(s), 10.0 * s) for s in range(60, 120))]
    assert watch.counted(120.0, later)
    assert watch.stop is not None
    assert watch.stop.kind == "beaten"
