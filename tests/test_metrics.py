"""Metrics against tables worked by hand, laws, and a slow, plain reference; intervals, saturation, trust, gain."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import rows
from varcas.columns import Measured, Requests
from varcas.errors import InputError
from varcas.experiment import ArrivalKind
from varcas.intervals import t_quantile
from varcas.metrics import Series, compare, constraints_of, is_good, percentile, reported, summarise
from varcas.records import (
    LATENCIES,
    LATENCY_METRICS,
    MAX_EXCESS,
    SENT_STATISTICS,
    SLO_PRESETS,
    STATISTICS,
    LoadResult,
    RequestRecord,
    Sample,
    TrialRow,
)
from varcas.saturation import filling
from varcas.store import Store
from varcas.validity import CHECKS, invalid_reasons

INF = math.inf


def in_window(load: LoadResult) -> list[RequestRecord]:
    return [found for found in load.records if 0 <= found.scheduled_s < load.duration_s]


def good(answer: RequestRecord, slo: dict[str, float]) -> bool:
    (found,) = is_good(Requests.of([answer]), slo)
    return bool(found)


def is_saturated(load: LoadResult, samples: Sequence[Sample] = ()) -> bool:
    return filling(Measured.of_load(load), samples).saturated


NOT_CHECKED = "not cross-checked: no histograms of the server were read (`/metrics` of vLLM)"


def warned(found: dict[str, Any]) -> list[str]:
    """Warnings but for the one that most loads here give: no server was asked."""
    return [text for text in found["warnings"] if text != NOT_CHECKED]


def record(
    at_s: float,
    tokens_at_s: Sequence[float] = (),
    *,
    counts: Sequence[int] | None = None,
    sent_s: float | None = None,
    end_s: float | None = None,
    error: str | None = None,
    owed: int | None = None,
    index: int = 0,
) -> RequestRecord:
    """A request due at `at_s` whose token events came at these moments; sent on time unless told."""
    sent = at_s if sent_s is None else sent_s
    sizes = tuple(counts or (1,) * len(tokens_at_s))
    return RequestRecord(
        index=index,
        scheduled_s=at_s,
        sent_s=sent,
        first_token_s=tokens_at_s[0] if tokens_at_s else None,
        last_token_s=tokens_at_s[-1] if tokens_at_s else None,
        end_s=end_s if end_s is not None else (tokens_at_s[-1] if tokens_at_s else None),
        scheduled_prompt_tokens=10,
        scheduled_output_tokens=sum(sizes) if owed is None else owed,
        prompt_tokens=None if error else 10,
        output_tokens=sum(sizes),
        token_offsets_s=tuple(moment - sent for moment in tokens_at_s),
        token_counts=sizes,
        finish_reason=None if error else "length",
        error=error,
        http_status=None if error else 200,
        conversation=index,
        turn=0,
    )


def load_of(records: Sequence[RequestRecord], duration_s: float = 10.0, cpu_frac: float = 0.1) -> LoadResult:
    return LoadResult(tuple(records), t0_monotonic_s=0.0, duration_s=duration_s, drain_s=0.0, client_cpu_frac=cpu_frac)


# a table worked by hand: warm-up W, good A and B, C that ends in the drain, D that never ends, E that was refused

W = record(-1.0, (-0.5, 0.5, 1.5))
A = record(0.0, (0.11, 0.21, 0.41), sent_s=0.01)
B = record(2.0, (2.2, 2.4), counts=(1, 2))
C = record(9.0, (9.5, 10.5), sent_s=9.02)
D = record(5.0, (5.1,), error="unfinished", owed=4, end_s=40.0)
E = dataclasses.replace(record(6.0, error="connection refused", owed=3, end_s=6.0), sent_s=None)
TABLE = dataclasses.replace(load_of((W, A, B, D, E, C)), drain_s=10.0)


@pytest.mark.parametrize(
    ("column", "expected"),
    {
        "num_requests": 5,
        "num_completed": 3,
        "num_failed": 1,
        "num_unfinished": 1,
        "output_tokens_per_s": (2 + 3 + 3 + 1 + 1) / 10,  # W, A, B, C, D: what arrived in [0, 10)
        "prompt_tokens_per_s": (10 + 10 + 10 + 10) / 10,  # A, B, C, D: first token in [0, 10)
        "request_rate_rps": 3 / 10,  # W, A, B ended in [0, 10)
        "delivered_rate_rps": 4 / 10,  # E never left
        "goodput_rps": 2 / 10,  # A and B
        "send_lag_p99_ms": 20.0,
        "client_cpu_frac": 0.1,
        "ttft_mean_ms": (110 + 200 + 500) / 3,
        "ttft_sent_mean_ms": (100 + 200 + 480) / 3,
        "tpot_mean_ms": (300 / 2 + 200 / 2 + 1000 / 1) / 3,
        "itl_mean_ms": (100 + 200 + 200 + 1000) / 4,
        "e2e_mean_ms": (410 + 400 + 1500) / 3,
        "ttft_p50_ms": None,
        "duration_s": 10.0,
        "valid": False,
        "invalid_reasons": [
            "only 3 requests completed, bound 20: lengthen the window or raise the rate",
            "1 of 5 requests failed, bound 1%",
        ],
        "norm_mean_ms": (410 / 3 + 400 / 3 + 1500 / 2) / 3,
        "e2e_sent_mean_ms": (400 + 400 + 1480) / 3,
        "goodput_tokens_per_s": (3 + 3) / 10,  # A and B
        "output_tokens_per_s_drained": (2 + 3 + 3 + 2 + 1) / 20,  # and C's last, in 10 s of drain
        "request_rate_rps_drained": 3 / 20,
        "sustainable_rps": None,
        "ramp_s": None,
    }.items(),
)
def test_the_table_worked_by_hand(column: str, expected: Any) -> None:
    found = summarise(TABLE, {"ttft_p95_ms": 250.0})[column]
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    ("key", "limit", "expected"),
    [
        ("ttft_p50_ms", 250.0, 500 / 250 - 1),  # 110 200 500 inf inf
        ("ttft_p90_ms", 250.0, MAX_EXCESS),
        ("ttft_mean_ms", 250.0, MAX_EXCESS),
        ("tpot_p50_ms", 2000.0, 1000 / 2000 - 1),  # 100 150 1000 inf inf
        ("e2e_p50_ms", 1500.0, 0.0),
        ("itl_p50_ms", 250.0, MAX_EXCESS),  # 100 200 200 1000, then 3 owed by D and 3 by E
        ("ttft_p50_ms", 0.001, MAX_EXCESS),
    ],
)
def test_the_tables_constraints(key: str, limit: float, expected: float) -> None:
    columns = constraints_of(TABLE, {key: limit})
    assert columns["constraints"] == {key: pytest.approx(expected)}
    assert columns["slo_met"] is (expected <= 0)


def test_every_column_fits_the_row() -> None:
    columns = summarise(TABLE, {"ttft_p95_ms": 1.0}, [Sample(t_s=0.0, gpu_power_w=1.0)]) | constraints_of(TABLE, {})
    assert set(columns) <= set(TrialRow.model_fields)
    assert set(LATENCY_METRICS) <= set(columns)
    fixed = {name: "x" for name, field in TrialRow.model_fields.items() if field.is_required()}
    plain = fixed | {"number": 0, "purpose": "search", "state": "complete", "started_at": "2025-01-01T00:00:00Z"}
    row = TrialRow.model_validate(plain, strict=False)
    TrialRow(**(dict(row) | columns))  # strict: numpy's own types would be refused


def test_without_an_slo_nothing_is_constrained_and_every_whole_answer_is_good() -> None:
    assert constraints_of(TABLE, {}) == {"constraints": {}, "slo_met": None}
    assert summarise(TABLE, {})["goodput_rps"] == pytest.approx(0.3)


@pytest.mark.parametrize("records", [[], [W], [E]])
def test_every_slo_key_is_there_when_nothing_came(records: list[RequestRecord]) -> None:
    slo = dict.fromkeys(LATENCY_METRICS, 100.0)
    columns = constraints_of(load_of(records), slo)
    assert columns == {"constraints": dict.fromkeys(slo, MAX_EXCESS), "slo_met": False}
    summarise(load_of(records), slo)


def test_answers_of_one_token_wait_for_no_second() -> None:
    load = load_of([record(float(i), (i + 0.1,)) for i in range(5)])
    assert constraints_of(load, {"tpot_p95_ms": 10.0, "itl_p95_ms": 10.0})["slo_met"] is True
    assert summarise(load, {"tpot_p95_ms": 10.0})["goodput_rps"] == 0.5
    assert summarise(load, {})["tpot_mean_ms"] is None


def test_an_itl_limit_asks_the_requests_own_gaps() -> None:
    gaps_ms = (10, 10, 10, 90)
    answer = record(0.0, list(itertools.accumulate((g / 1e3 for g in gaps_ms), initial=0.1)))
    assert good(answer, {"itl_p50_ms": 11.0})
    assert good(answer, {"itl_mean_ms": 31.0})
    assert not good(answer, {"itl_mean_ms": 29.0})
    assert not good(answer, {"itl_p95_ms": 80.0})


# percentiles


@pytest.mark.parametrize(("name", "least"), [("p50", 20), ("p90", 100), ("p95", 200), ("p99", 1000), ("p99_9", 10000)])
def test_a_percentile_needs_ten_beyond(name: str, least: int) -> None:
    few, enough = np.arange(least - 1.0), np.arange(float(least))
    assert reported(Series(few), few, name) is None
    found = reported(Series(enough), enough, name)
    assert found is not None
    assert np.sum(np.arange(least) > found) == 10


def test_a_percentile_among_those_that_never_came_is_null() -> None:
    values = np.concatenate([np.arange(100.0), np.full(100, INF)])
    assert reported(Series(values), values, "p50") == 99.0
    assert reported(Series(values), values, "p90") is None
    assert reported(Series(values), values, "mean") == pytest.approx(49.5)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.integers(1, 999))
def test_a_percentile_is_an_observation_of_its_rank(values: list[float], permille: int) -> None:
    found = percentile(np.array(values), permille)
    assert found == sorted(values)[math.ceil(len(values) * permille / 1000 - 1e-9) - 1]


# laws


@st.composite
def loads(draw: st.DrawFn) -> LoadResult:
    """Loads of any sort: late sends, merged tokens, failures, requests without an end."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    count, failing = draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 0.2, 1.0]))
    records = []
    for index in range(count):
        at_s = rng.uniform(-1, 11)
        sent_s = at_s + rng.choice([0.0, rng.uniform(0, 0.1)])
        gaps = [rng.choice([0.0, rng.uniform(0.001, 0.5)]) for _ in range(rng.randrange(1, 8))]
        moments = list(itertools.accumulate(gaps[1:], initial=sent_s + rng.uniform(0.01, 1)))
        counts = [rng.choice([1, 1, 3]) for _ in moments]
        if rng.random() < failing:
            kept = rng.randrange(len(moments) + 1)
            error = rng.choice(["unfinished", "HTTP 500"])
            owed = sum(counts) + 1
            records.append(record(at_s, moments[:kept], counts=counts[:kept], sent_s=sent_s, error=error, owed=owed))
        else:
            records.append(record(at_s, moments, counts=counts, sent_s=sent_s, index=index))
    return load_of(records)


slos = st.dictionaries(st.sampled_from(LATENCY_METRICS), st.floats(1, 2000), max_size=3)


@settings(deadline=None)
@given(loads(), slos, st.floats(1, 10))
def test_a_looser_slo_never_lowers_goodput_nor_raises_a_constraint(
    load: LoadResult, slo: dict[str, float], looser: float
) -> None:
    wide = {key: limit * looser for key, limit in slo.items()}
    assert summarise(load, wide)["goodput_rps"] >= summarise(load, slo)["goodput_rps"]
    tight, loose = constraints_of(load, slo)["constraints"], constraints_of(load, wide)["constraints"]
    assert all(loose[key] <= tight[key] for key in slo)


@settings(deadline=None)
@given(loads(), slos, st.randoms(use_true_random=False))
def test_the_order_of_requests_changes_nothing(load: LoadResult, slo: dict[str, float], rng: random.Random) -> None:
    mixed = dataclasses.replace(load, records=tuple(rng.sample(load.records, len(load.records))))
    assert close(summarise(mixed, slo), summarise(load, slo))
    assert close(constraints_of(mixed, slo)["constraints"], constraints_of(load, slo)["constraints"])


@settings(deadline=None)
@given(loads(), slos, st.sampled_from([0.25, 2.0, 8.0]))  # powers of two: no rounding moves a token over an edge
def test_times_c_times_longer_make_latencies_c_times_longer(load: LoadResult, slo: dict[str, float], c: float) -> None:
    slow = stretched(load, c)
    before, after = summarise(load, slo), summarise(slow, {key: limit * c for key, limit in slo.items()})
    for name in LATENCY_METRICS:
        assert after[name] == (None if before[name] is None else pytest.approx(c * before[name]))
    for name in (
        "output_tokens_per_s",
        "output_tokens_per_s_hi",
        "goodput_tokens_per_s",
        "goodput_rps",
        "request_rate_rps",
    ):
        assert after[name] == pytest.approx(before[name] / c)
    assert after["saturated"] == before["saturated"]


def stretched(load: LoadResult, c: float) -> LoadResult:
    def times_c(value: Any) -> Any:
        return None if value is None else c * value

    records = [
        dataclasses.replace(
            found,
            token_offsets_s=tuple(c * offset for offset in found.token_offsets_s),
            **{name: times_c(getattr(found, name)) for name in (
                "scheduled_s", "sent_s", "first_token_s", "last_token_s", "end_s",
            )},
        )
        for found in load.records
    ]  # fmt: skip
    return dataclasses.replace(load, records=tuple(records), duration_s=c * load.duration_s)


def close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[name] == (pytest.approx(b[name]) if isinstance(b[name], float) else b[name]) for name in a
    )


@settings(deadline=None)
@given(loads())
def test_dropping_an_answer_never_makes_a_server_look_faster(load: LoadResult) -> None:
    """The request with the longest wait fails instead: no percentile falls."""
    good = [found for found in in_window(load) if found.ok]
    if not good:
        return
    worst = max(good, key=lambda found: found.last_token_s or 0.0)
    failed = dataclasses.replace(worst, error="HTTP 500")
    worse = dataclasses.replace(load, records=tuple(failed if r is worst else r for r in load.records))
    slo = {key: 100.0 for key in LATENCY_METRICS if key.startswith(("ttft", "e2e"))}
    before, after = constraints_of(load, slo)["constraints"], constraints_of(worse, slo)["constraints"]
    assert all(after[key] >= before[key] for key in slo)


@settings(deadline=None)
@given(loads())
def test_counts_add_up(load: LoadResult) -> None:
    found = summarise(load, {})
    parts = found["num_completed"] + found["num_failed"] + found["num_unfinished"]
    assert parts == found["num_requests"] == len(in_window(load))
    assert good_share(load) == pytest.approx(found["goodput_rps"])


def good_share(load: LoadResult) -> float:
    return sum(answer.ok for answer in in_window(load)) / load.duration_s


# against a slow, plain reference: one request at a time, in the words of docs/measurement.md


def plain_waits(load: LoadResult) -> dict[str, list[float]]:
    """Every latency of the window's requests in ms, by the page's formulas."""
    waits: dict[str, list[float]] = {name: [] for name in (*LATENCIES, "ttft_sent", "e2e_sent")}
    for r in sorted(in_window(load), key=lambda found: found.scheduled_s):
        gaps = [1e3 * (b - a) for a, b in itertools.pairwise(r.token_offsets_s)]
        if not r.ok or r.first_token_s is None or r.last_token_s is None or r.sent_s is None:
            owed = max(r.scheduled_output_tokens - sum(r.token_counts), 1)
            for name in waits:
                waits[name] += [*gaps, *[INF] * owed] if name == "itl" else [INF]
            continue
        waits["ttft"].append(1e3 * (r.first_token_s - r.scheduled_s))
        waits["ttft_sent"].append(1e3 * (r.first_token_s - r.sent_s))
        waits["e2e"].append(1e3 * (r.last_token_s - r.scheduled_s))
        waits["e2e_sent"].append(1e3 * (r.last_token_s - r.sent_s))
        waits["norm"].append(1e3 * (r.last_token_s - r.scheduled_s) / r.output_tokens)
        waits["itl"] += gaps
        if r.output_tokens > 1:
            waits["tpot"].append(1e3 * (r.last_token_s - r.first_token_s) / (r.output_tokens - 1))
    return waits


def plain_statistic(values: list[float], name: str) -> float:
    if name == "mean":
        return sum(values) / len(values)
    share = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}[name]
    return next(v for v in sorted(values) if sum(w <= v for w in values) >= share * len(values) - 1e-9)


def plain_column(values: list[float], name: str) -> float | None:
    if name == "mean":
        came = [value for value in values if value < INF]
        return sum(came) / len(came) if came else None
    if not values:
        return None
    found = plain_statistic(values, name)
    rank = sum(w < found for w in values) + 1  # of the first of equal ones; the rank itself may be a later one
    least = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}[name] * len(values)
    rank = max(rank, math.ceil(least - 1e-9))
    return found if len(values) - rank >= 10 and found < INF else None


def plain_rates(load: LoadResult, slo: dict[str, float]) -> dict[str, float]:
    """Rates by the page's formulas."""
    t, whole = load.duration_s, load.duration_s + load.drain_s
    events = [
        (r.sent_s + offset, count)
        for r in load.records
        if r.sent_s is not None
        for offset, count in zip(r.token_offsets_s, r.token_counts, strict=True)
    ]
    met = [r for r in in_window(load) if plain_good(r, slo)]
    return {
        "output_tokens_per_s": sum(n for at_s, n in events if 0 <= at_s < t) / t,
        "output_tokens_per_s_drained": sum(n for at_s, n in events if at_s >= 0) / whole,
        "prompt_tokens_per_s": sum(
            r.prompt_tokens or r.scheduled_prompt_tokens
            for r in load.records
            if r.first_token_s is not None and 0 <= r.first_token_s < t
        )
        / t,
        "request_rate_rps": sum(r.ok and 0 <= (r.end_s or 0.0) < t for r in load.records) / t,
        "request_rate_rps_drained": sum(r.ok for r in in_window(load)) / whole,
        "goodput_rps": len(met) / t,
        "goodput_tokens_per_s": sum(r.output_tokens for r in met) / t,
        "delivered_rate_rps": sum(r.sent_s is not None and 0 <= r.sent_s < t for r in load.records) / t,
    }


def plain_good(answer: RequestRecord, slo: dict[str, float]) -> bool:
    if not answer.ok:
        return False
    own = plain_waits(load_of([dataclasses.replace(answer)], duration_s=1e9))
    for key, limit in slo.items():
        name, _, stat = key.removesuffix("_ms").partition("_")
        if own[name] and plain_statistic(own[name], stat) > limit:
            return False
    return True


@settings(deadline=None, max_examples=60)
@given(loads(), slos)
def test_columns_are_those_of_a_plain_reference(load: LoadResult, slo: dict[str, float]) -> None:
    load = dataclasses.replace(load, drain_s=3.5)
    found, waits = summarise(load, slo), plain_waits(load)
    for name, values in waits.items():
        for stat in STATISTICS if name in LATENCIES else SENT_STATISTICS:
            expected = plain_column(values, stat)
            assert found[f"{name}_{stat}_ms"] == (None if expected is None else pytest.approx(expected)), (name, stat)
    for name, rate in plain_rates(load, slo).items():
        assert found[name] == pytest.approx(rate), name
    excess = {
        key: min(plain_statistic(values, key.removesuffix("_ms").partition("_")[2]) / limit - 1, MAX_EXCESS)
        if (values := waits[key.partition("_")[0]])
        else -1.0
        for key, limit in slo.items()
    }
    if in_window(load):
        assert close(constraints_of(load, slo)["constraints"], excess)


@settings(deadline=None, max_examples=30)
@given(loads())
def test_a_loads_columns_are_the_same_from_the_store(load: LoadResult) -> None:
    row = rows.row(8)
    with tempfile.TemporaryDirectory() as directory:
        with Store(directory) as store:
            store.append(row, load.records)
        (path,) = (Path(directory) / "requests").glob("*.parquet")
        stored = Requests.from_arrow(pq.read_table(path))
    made = Requests.of(load.records)
    for name in Requests.__slots__:
        assert np.array_equal(getattr(made, name), getattr(stored, name), equal_nan=True), name


def test_a_refused_request_is_no_unfinished_one_in_the_store_either() -> None:
    load = load_of([W, A, D, E])
    made = Requests.of(load.records)
    assert (made.ok.tolist(), made.unfinished.tolist()) == ([True, True, False, False], [False, False, True, False])


# intervals


def test_every_figure_has_an_interval_or_is_called_unreliable() -> None:
    found = summarise(served(6.0, 8, 1.0, 300.0, 1), {})
    figures = [*LATENCY_METRICS, "request_rate_rps", "goodput_rps", "goodput_tokens_per_s", "prompt_tokens_per_s"]
    for name in figures:
        if found[name] is not None:
            assert name in found["lo"] or name in found["interval_unreliable"]
            assert found["lo"].get(name, -INF) <= found[name] <= found["hi"].get(name, INF), name
        else:
            assert name not in found["lo"]
    assert "tpot_mean_ms" not in found["interval_unreliable"]
    assert "e2e_p50_ms" not in found["interval_unreliable"]
    assert all(map(math.isfinite, [*found["lo"].values(), *found["hi"].values()]))


def test_too_few_requests_have_no_interval() -> None:
    found = summarise(TABLE, {})
    assert "ttft_mean_ms" not in found["lo"]
    assert "ttft_mean_ms" in found["interval_unreliable"]


# throughput's interval


def test_the_throughput_interval_holds_the_truth() -> None:
    """A stable server under Poisson arrivals: answers of random length, whose tokens cluster."""
    rng, rate_rps, duration_s, mean_tokens = np.random.default_rng(1), 4.0, 60.0, 20
    held = 0
    for _ in range(100):
        records = []
        for at_s in np.cumsum(rng.exponential(1 / rate_rps, size=360)) - 20.0:
            tokens = rng.geometric(1 / mean_tokens)
            records.append(record(float(at_s), (at_s + 0.1 + 0.05 * np.arange(tokens)).tolist()))
        found = summarise(load_of(records, duration_s), {})
        rate, lo, hi = (found[f"output_tokens_per_s{end}"] for end in ("", "_lo", "_hi"))
        assert lo <= rate <= hi
        held += lo <= rate_rps * mean_tokens <= hi
    assert held / 100 > 0.87


# saturation


def served(rate_rps: float, slots: int, service_s: float, duration_s: float, seed: int) -> LoadResult:
    """Poisson arrivals at a server with so many slots, empty at first, first come first served; drained to the end."""
    rng = random.Random(seed)
    free, records, at_s = [0.0] * slots, [], 0.0
    while (at_s := at_s + rng.expovariate(rate_rps)) < duration_s:
        begin_s = max(at_s, heapq.heappop(free))
        took_s = service_s * rng.uniform(0.5, 1.5)
        heapq.heappush(free, begin_s + took_s)
        records.append(record(at_s, (begin_s + 0.1 * took_s, begin_s + took_s), counts=(1, 99)))
    return load_of(records, duration_s)


@pytest.mark.parametrize(
    ("use", "slots", "service_s", "duration_s", "least", "most"),
    [
        (0.5, 8, 1.0, 60.0, 0.0, 0.0),
        (0.8, 8, 1.0, 60.0, 0.0, 0.03),
        (0.85, 1, 0.5, 60.0, 0.0, 0.1),  # one slot, nearly full: queues come and go
        (1.3, 8, 1.0, 60.0, 0.95, 1.0),
        (2.0, 8, 4.0, 60.0, 0.95, 1.0),
        (2.0, 1, 0.5, 60.0, 0.95, 1.0),
        (0.1, 2000, 40.0, 60.0, 0.0, 0.02),  # nothing waits; answers are as long as the window
    ],
)
def test_saturation_is_seen_and_not_imagined(
    use: float, slots: int, service_s: float, duration_s: float, least: float, most: float
) -> None:
    rate_rps = min(use * slots / service_s, 20.0)
    runs = [is_saturated(served(rate_rps, slots, service_s, duration_s, seed)) for seed in range(60)]
    assert least <= sum(runs) / len(runs) <= most


def test_a_server_that_stops_answering_is_saturated() -> None:
    records = [record(i / 10, (i / 10 + 0.2,)) for i in range(300)]
    records += [record(30 + i / 10, error="unfinished", end_s=90.0, owed=1) for i in range(300)]
    assert is_saturated(load_of(records, 60.0))


def test_a_short_window_shows_it_too() -> None:
    found = [is_saturated(served(1.3 * 8, 8, 1.0, 10.0, seed)) for seed in range(100)]
    stable = [is_saturated(served(0.8 * 8, 8, 1.0, 10.0, seed)) for seed in range(100)]
    assert sum(found) >= 60
    assert sum(stable) <= 5


def test_what_the_server_says_waits_decides_over_what_has_no_token() -> None:
    """Answers begin later and later, but nothing waits in the server's queue: it computes, it does not fall behind."""
    records = [record(i / 5, (i / 5 + 0.1 + i / 50, 100.0 + i / 5), owed=100) for i in range(100)]
    load = load_of(records, 20.0)
    idle = [Sample(t_s=float(t), num_requests_waiting=0.0) for t in range(21)]
    grows = [Sample(t_s=float(t), num_requests_waiting=5.0 * t) for t in range(21)]
    assert not is_saturated(load, idle)
    assert is_saturated(load, grows)


def test_a_queue_is_seen_though_no_sample_fell_into_the_last_fifth() -> None:
    """One at a time, 12 arrive a second: seen on a real server, whose last sample lay 1.1 s before the window's end."""
    records = [record(i / 12, (0.6 * i + 0.1, 0.6 * i + 0.5) if i < 16 else ()) for i in range(120)]
    load = load_of(records, 10.0)
    samples = [Sample(t_s=t + 0.87, num_requests_waiting=10.0 * t) for t in range(9)]
    assert is_saturated(load, samples)


def batched(steps: Sequence[tuple[float, float]], capacity_rps: float, seed: int) -> LoadResult:
    """Poisson arrivals at rates that begin at given seconds, of 60 s; a prefill at a time, then 500 tokens in a batch.

    What is computed in a batch slows down with it: 20 ms a token alone, 30 ms with 100.
    """
    rng = random.Random(seed)
    starts = [*(second for second, _ in steps), 60.0]
    due_s: list[float] = []
    for (_, rate), (begin, end) in zip(steps, itertools.pairwise(starts), strict=True):
        gaps = iter(lambda rate=rate: rng.expovariate(rate), None)  # type: ignore[misc]
        due_s += itertools.takewhile(lambda at, end=end: at < end, itertools.accumulate(gaps, initial=begin))
    records, free_s, ends = [], 0.0, list[float]()
    for at_s in due_s:
        free_s = max(free_s, at_s) + rng.uniform(0.5, 1.5) / capacity_rps
        running = sum(end > free_s for end in ends)
        last_s = free_s + 500 * (0.02 + 0.01 * min(running / 100, 2.0)) * rng.uniform(0.9, 1.1)
        ends.append(last_s)
        records.append(record(at_s, (free_s, last_s), counts=(1, 499)))
    return load_of(records, 60.0)


RISING = ((0.0, 2.0), (30.0, 10.0))


@pytest.mark.parametrize(
    ("steps", "arrival", "capacity_rps", "least", "most"),
    [
        (RISING, "steps", 14.0, 0.0, 0.05),
        (RISING, "trace", 14.0, 0.0, 0.05),
        (RISING, "steps", 5.0, 0.95, 1.0),  # twice too much in the second half
        (RISING, "trace", 5.0, 0.95, 1.0),
        (tuple((s, 1 + s / 6) for s in range(60)), "ramp", 14.0, 0.0, 0.05),
        (tuple((s, 1 + s / 6) for s in range(60)), "ramp", 5.0, 0.95, 1.0),
    ],
)
def test_a_rate_that_rises_is_not_taken_for_a_queue(
    steps: Sequence[tuple[float, float]], arrival: ArrivalKind, capacity_rps: float, least: float, most: float
) -> None:
    """Without samples what has no token waits; with them, what the server says."""
    loads = [Measured.of_load(batched(steps, capacity_rps, seed)) for seed in range(20)]
    assert least <= sum(filling(load, arrival=arrival).saturated for load in loads) / 20 <= most
    sampled = [filling(load, waiting_samples(load), arrival=arrival).saturated for load in loads]
    assert least <= sum(sampled) / 20 <= most


def waiting_samples(load: Measured) -> list[Sample]:
    due_s, first_s = load.requests.scheduled_s, load.requests.first_token_s
    return [Sample(t_s=t, num_requests_waiting=float(((due_s <= t) & (first_s > t)).sum())) for t in range(61)]


def test_a_closed_loop_is_never_saturated() -> None:
    load = served(20.0, 4, 1.0, 60.0, 0)
    assert summarise(load, {}, arrival="poisson")["saturated"] is True
    found = summarise(load, {}, arrival="closed")
    assert (found["saturated"], found["sustainable_rps"]) == (False, None)


def test_a_saturated_servers_sustainable_rate_is_its_capacity() -> None:
    found = summarise(served(12.0, 8, 1.0, 120.0, 3), {})
    assert found["sustainable_rps"] == pytest.approx(8.0, rel=0.05)
    assert found["lo"]["sustainable_rps"] <= 8.0 <= found["hi"]["sustainable_rps"]


def test_unfinished_requests_miss_the_slo() -> None:
    answers = [record(i / 10, (i / 10 + 0.1, i / 10 + 0.2)) for i in range(50)]
    cut = [dataclasses.replace(answer, error="unfinished") for answer in answers]
    found = summarise(load_of([*answers[:25], *cut[25:]], 10.0), {"ttft_p50_ms": 500.0})
    assert found["goodput_rps"] == 2.5
    assert found["goodput_tokens_per_s"] == 5.0
    assert constraints_of(load_of(cut, 10.0), {"ttft_p50_ms": 500.0})["constraints"]["ttft_p50_ms"] == MAX_EXCESS


def test_being_saturated_is_no_reason_to_disbelieve() -> None:
    found = summarise(served(20.0, 4, 1.0, 60.0, 0), {})
    assert (found["saturated"], found["valid"], found["invalid_reasons"]) == (True, True, [])


# trust

GOOD: dict[str, Any] = {
    "send_lag_p99_ms": 1.0,
    "num_requests": 1000,
    "num_completed": 1000,
    "num_failed": 0,
    "delivered_rate_rps": 10.0,
    "duration_s": 100.0,
    "client_cpu_frac": 0.2,
    "throttle_frac": None,
    "saturated": False,
}


@pytest.mark.parametrize(
    ("check", "within", "beyond", "word"),
    [
        ("_sent_late", {"send_lag_p99_ms": 50.0}, {"send_lag_p99_ms": 51.0}, "sent late"),
        ("_rate_off", {"delivered_rate_rps": 9.8}, {"delivered_rate_rps": 9.7}, "the schedule has 1000"),
        ("_client_busy", {"client_cpu_frac": 0.9}, {"client_cpu_frac": 0.95}, "load generator"),
        ("_nothing_completed", {"num_completed": 20}, {"num_completed": 0}, "no request completed"),
        ("_too_few", {"num_completed": 20}, {"num_completed": 19}, "only 19 requests"),
        ("_errors", {"num_failed": 10}, {"num_failed": 11}, "11 of 1000"),
        ("_throttled", {"throttle_frac": 0.2}, {"throttle_frac": 0.25}, "throttled"),
    ],
)
def test_each_check_has_a_bound(check: str, within: dict[str, Any], beyond: dict[str, Any], word: str) -> None:
    assert check in {found.__name__ for found in CHECKS}
    assert invalid_reasons(GOOD | within) == []
    (reason,) = invalid_reasons(GOOD | beyond)
    assert word in reason


def test_every_check_has_a_case() -> None:
    (mark,) = test_each_check_has_a_bound.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == {check.__name__ for check in CHECKS}


def test_late_sends_make_a_measurement_invalid() -> None:
    records = [record(i / 10, (i / 10 + 0.3,), sent_s=i / 10 + 0.06) for i in range(100)]
    found = summarise(load_of(records), {})
    assert found["valid"] is False
    assert "sent late: p99 60 ms" in found["invalid_reasons"][0]


def warming(factor: float, until_s: float, seconds: float = 100.0) -> LoadResult:
    rng = random.Random(5)
    ttft_s = [rng.uniform(0.05, 0.15) for _ in range(1000)]
    at_s = [seconds * i / 1000 for i in range(1000)]
    moments = [(t, t + w * (factor if t < until_s else 1.0)) for t, w in zip(at_s, ttft_s, strict=True)]
    return load_of([record(t, (first, first + 0.5)) for t, first in moments], seconds)


def test_a_warm_up_that_is_still_visible_makes_a_measurement_invalid() -> None:
    even = cache_samples([0.1] * 101)
    assert summarise(warming(1.0, 10.0), {}, even)["invalid_reasons"] == []
    (reason,) = summarise(warming(3.0, 10.0), {}, even)["invalid_reasons"]
    assert "warm-up is still visible: TTFT of the window's first tenth is 3.0 times" in reason
    assert summarise(warming(0.3, 10.0), {}, even)["invalid_reasons"] == []  # an empty server is faster, by rights
    assert summarise(warming(3.0, 10.0), {}, even, arrival="ramp")["invalid_reasons"] == []
    assert summarise(warming(3.0, 10.0), {})["invalid_reasons"] == []  # it may be the prefix cache: nobody says


def cache_samples(hit_fracs: Sequence[float], queried: float = 1000.0) -> list[Sample]:
    """A sample a second, between which so much of what was looked up was found."""
    hits = itertools.accumulate((frac * queried for frac in hit_fracs), initial=0.0)
    return [
        Sample(t_s=second - 0.5, prefix_cache_queries=second * queried, prefix_cache_hits=found)
        for second, found in enumerate(hits)
    ]


def shared_prefixes(num: int, seed: int, *, slow_s: float = 0.0) -> tuple[LoadResult, list[Sample]]:
    """120 s at 10/s of requests with one of `num` system prompts: 250 ms to the first token at its first use, else 50.

    Each first use holds up the others' answers by a step of 200 ms. Until `slow_s` all steps take twice as long.
    """
    rng = random.Random(seed)
    due_s = list(itertools.takewhile(lambda at_s: at_s < 120, itertools.accumulate(
        iter(lambda: rng.expovariate(10.0), None))))  # fmt: skip
    prefixes = [rng.randrange(num) for _ in due_s]
    missed_s = {due_s[prefixes.index(prefix)] for prefix in set(prefixes)}
    records = []
    for at_s, prefix_missed in zip(due_s, (at_s in missed_s for at_s in due_s), strict=True):
        step_s = 0.04 if at_s < slow_s else 0.02
        tokens_s = [at_s + rng.uniform(0.9, 1.1) * (0.25 if prefix_missed else 0.05)]
        for _ in range(20):
            stalls = sum(tokens_s[-1] < missed <= tokens_s[-1] + step_s for missed in missed_s)
            tokens_s.append(tokens_s[-1] + rng.uniform(0.9, 1.1) * step_s + 0.2 * stalls)
        records.append(record(at_s, tokens_s))
    misses = [sum(second <= at_s < second + 1 for at_s in missed_s) for second in range(120)]
    return load_of(records, 120.0), cache_samples([1 - min(count / 10, 1.0) for count in misses])


@pytest.mark.parametrize("num", [30, 100])
def test_a_cold_prefix_cache_is_no_warm_up(num: int) -> None:
    for seed in range(4):
        load, samples = shared_prefixes(num, seed)
        assert summarise(load, {}, samples)["invalid_reasons"] == []
        assert summarise(load, {})["invalid_reasons"] == []


def test_a_warm_up_is_seen_beside_a_cold_prefix_cache() -> None:
    for seed in range(5):
        load, samples = shared_prefixes(30, seed, slow_s=12.0)
        (reason,) = summarise(load, {}, samples)["invalid_reasons"]
        assert "time per token of the window's first tenth is 2.0 times" in reason


def throttled(frac: float) -> list[Sample]:
    return [Sample(t_s=t / 10, gpu_throttled=t < 100 * frac) for t in range(100)]


def test_some_throttling_is_a_warning_and_much_is_a_reason() -> None:
    load = warming(1.0, 0.0, seconds=10.0)
    assert warned(summarise(load, {}, throttled(0.05))) == []
    assert warned(summarise(load, {}, throttled(0.1))) == ["the GPU was throttled in 10% of samples"]
    assert summarise(load, {}, throttled(0.1))["valid"] is True
    assert "throttled" in summarise(load, {}, throttled(0.3))["invalid_reasons"][0]


# the server's own histograms


def server_says(ttft_s: float, itl_s: float, e2e_s: float, count: int) -> list[Sample]:
    """A look before and one after, of which the first holds a warm-up's."""

    def look(t_s: float, n: int) -> Sample:
        names = {"ttft": ttft_s, "itl": itl_s, "e2e": e2e_s}
        sums: dict[str, Any] = {f"server_{name}_sum_s": 7.0 + n * mean for name, mean in names.items()}
        return Sample(t_s=t_s, **sums, **{f"server_{name}_count": 3.0 + n for name in names})

    return [look(-0.5, 0), look(20.0, count)]


def test_the_servers_means_stand_beside_ours() -> None:
    load = load_of([record(i / 10, (i / 10 + 0.1, i / 10 + 0.3), sent_s=i / 10) for i in range(100)])
    found = summarise(load, {}, server_says(0.097, 0.2, 0.298, 100))
    assert found["server_ttft_mean_ms"] == pytest.approx(97.0)
    assert found["server_itl_mean_ms"] == pytest.approx(200.0)
    assert found["server_e2e_mean_ms"] == pytest.approx(298.0)
    assert found["warnings"] == []


def test_a_disagreement_with_the_server_is_a_warning() -> None:
    load = load_of([record(i / 10, (i / 10 + 0.1, i / 10 + 0.3), sent_s=i / 10) for i in range(100)])
    assert summarise(load, {}, server_says(0.08, 0.2, 0.3, 100))["warnings"] == [
        "mean ttft is 100.0 ms here, 80.0 ms by the server's own count"
    ]
    assert summarise(load, {}, server_says(0.1, 0.2, 0.2, 100))["warnings"] == [
        "mean e2e is 300.0 ms here, 200.0 ms by the server's own count"
    ]
    others = summarise(load, {}, server_says(0.05, 0.2, 0.3, 150))["warnings"]
    assert [text.split(":")[0] for text in others] == [
        f"the server counted 150 {name} values, the load 100" for name in ("ttft", "itl", "e2e")
    ]
    assert summarise(load, {}, [])["server_ttft_mean_ms"] is None


def test_a_load_that_was_not_cross_checked_says_so() -> None:
    load = load_of([record(i / 10, (i / 10 + 0.1, i / 10 + 0.3)) for i in range(100)])
    before, after = server_says(0.1, 0.2, 0.3, 100)
    assert summarise(load, {}, [before, after])["warnings"] == []
    assert summarise(load, {}, [])["warnings"] == [NOT_CHECKED]
    assert summarise(load, {}, [before])["warnings"] == [NOT_CHECKED]
    idle = summarise(load, {}, [before, dataclasses.replace(before, t_s=5.0)])["warnings"]
    assert idle == ["not cross-checked: the server's histograms counted no request"]


def test_counters_that_fall_give_no_figure() -> None:
    """Behind a load balancer each look may be another server's."""
    load = load_of([record(i / 10, (i / 10 + 0.1, i / 10 + 0.3)) for i in range(100)])
    before, after = server_says(0.1, 0.2, 0.3, 100)
    looks = [before, after, dataclasses.replace(before, t_s=21.0)]
    counted = zip(looks, (900.0, 40.0, 1000.0), strict=True)
    found = summarise(load, {}, [dataclasses.replace(one, preemptions=n) for one, n in counted])
    assert (found["server_ttft_mean_ms"], found["preemptions"]) == (None, None)
    assert found["warnings"] == [
        "not cross-checked: the server's counters fell: it was started anew, or several servers answer at one address"
    ]


# the work that was asked for


def answered(tokens: int, owed: int, prompt_tokens: int = 10, turn: int = 0, n: int = 100) -> LoadResult:
    """Answers of so many tokens where others were scheduled, to prompts scheduled with 10."""
    records = []
    for i in range(n):
        answer = record(i / 10, [i / 10 + 0.1 + 0.01 * k for k in range(tokens)], owed=owed)
        records.append(dataclasses.replace(answer, prompt_tokens=prompt_tokens, turn=turn))
    return load_of(records)


@pytest.mark.parametrize(
    ("load", "reason", "warning"),
    [
        (answered(100, 100), None, None),
        (answered(100, 101), None, None),
        (answered(100, 103), None, "answers have 100 tokens on average, the schedule 103 (-2.9%)"),
        (answered(30, 188), "answers have 30 tokens on average, the schedule 188 (-84.0%), bound 5%", None),
        (answered(200, 100), "answers have 200 tokens on average, the schedule 100 (+100.0%), bound 5%", None),
        (
            answered(5, 5, prompt_tokens=12),
            "prompts have 12 tokens on average, the schedule 10 (+20.0%), bound 5%",
            None,
        ),
        (answered(5, 5, prompt_tokens=400, turn=1), None, None),  # its history is the server's own words
    ],
)
def test_work_that_was_not_done_is_told(load: LoadResult, reason: str | None, warning: str | None) -> None:
    found = summarise(load, {})
    assert found["invalid_reasons"] == ([reason] if reason else [])
    assert warned(found) == ([warning] if warning else [])


def test_lengths_that_a_server_need_not_keep_are_a_warning() -> None:
    found = summarise(answered(30, 188), {}, exact_lengths=False)
    assert found["valid"] is True
    assert warned(found) == ["answers have 30 tokens on average, the schedule 188 (-84.0%)"]


@pytest.mark.parametrize(("num_left_out", "valid"), [(0, True), (2, True), (3, False)])
def test_requests_that_did_not_fit_are_told(num_left_out: int, valid: bool) -> None:
    found = summarise(dataclasses.replace(answered(5, 5), num_left_out=num_left_out), {})
    assert found["valid"] is valid
    told = [text for text in warned(found) + found["invalid_reasons"] if "did not fit the server's context" in text]
    assert len(told) == (num_left_out > 0)


def test_unfinished_requests_of_a_server_that_keeps_up_are_a_warning() -> None:
    load = answered(5, 5)
    cut = [dataclasses.replace(one, error="unfinished") if i % 2 else one for i, one in enumerate(load.records)]
    (warning,) = warned(summarise(dataclasses.replace(load, records=tuple(cut)), {}))
    assert warning == "50 of 100 requests were unfinished when the drain ended: raise max_drain_s"
    saturated = summarise(served(20.0, 4, 1.0, 60.0, 0), {})
    assert warned(saturated) == []


def test_events_that_came_in_one_receive_are_told() -> None:
    apart = [record(i / 10, (i / 10 + 0.1, i / 10 + 0.2, i / 10 + 0.3)) for i in range(100)]
    merged = [record(i / 10, (i / 10 + 0.2, i / 10 + 0.2, i / 10 + 0.3)) for i in range(100)]
    assert warned(summarise(load_of([*apart[:99], merged[99]]), {})) == []
    (warning,) = warned(summarise(load_of([*apart[:50], *merged[50:]]), {}))
    assert warning.startswith("25% of token events came in one receive with the next")


def test_presets_are_limits_that_exist() -> None:
    assert all(set(limits) <= set(LATENCY_METRICS) for limits in SLO_PRESETS.values())
    assert SLO_PRESETS["mlperf-llama2-70b-interactive"] == {"ttft_p99_ms": 450.0, "tpot_p99_ms": 40.0}


# samples


def test_samples_worked_by_hand() -> None:
    samples = [
        Sample(t_s=-2.0, preemptions=0.0, prefix_cache_queries=0.0, prefix_cache_hits=0.0, gpu_power_w=50.0),
        Sample(t_s=-1.0, preemptions=3.0, prefix_cache_queries=100.0, prefix_cache_hits=90.0, gpu_power_w=50.0),
        Sample(t_s=1.0, gpu_power_w=150.0, gpu_sm_clock_mhz=1500.0, gpu_temperature_c=60.0, gpu_throttled=False),
        Sample(t_s=9.0, gpu_power_w=150.0, gpu_sm_clock_mhz=1300.0, gpu_temperature_c=66.0, gpu_throttled=True),
        Sample(t_s=12.0, preemptions=8.0, prefix_cache_queries=300.0, prefix_cache_hits=140.0, gpu_temperature_c=99.0),
    ]
    found = summarise(TABLE, {}, random.Random(0).sample(samples, 5))
    assert found["preemptions"] == 5
    assert found["prefix_cache_hit_frac"] == pytest.approx(50 / 200)
    assert found["energy_j"] == pytest.approx((100 + 150) / 2 * 1 + 150 * 9)  # 100 W at 0 s, between -1 s and 1 s
    assert found["power_w"] == pytest.approx(found["energy_j"] / 10)
    assert (found["sm_clock_mhz"], found["temperature_c"], found["throttle_frac"]) == (1400.0, 66.0, 0.5)


def test_what_was_never_seen_is_null() -> None:
    found = summarise(TABLE, {}, [Sample(t_s=1.0, prefix_cache_queries=5.0, prefix_cache_hits=5.0)])
    names = ("preemptions", "prefix_cache_hit_frac", "energy_j", "power_w", "gpu_memory_used_bytes", "throttle_frac")
    assert [found[name] for name in names] == [None] * 6
    flat = [Sample(t_s=t, prefix_cache_queries=5.0, prefix_cache_hits=5.0, preemptions=2.0) for t in (0.0, 5.0)]
    assert summarise(TABLE, {}, flat)["prefix_cache_hit_frac"] is None
    assert summarise(TABLE, {}, flat)["preemptions"] == 0


# gain


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (30, 2.042272)]
)
def test_t_quantiles_are_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-5)


def test_a_gain_worked_by_hand() -> None:
    """Logs of the ratio's arms: means 0 and ln 1.2, standard deviation 0.02 each, so half = t(4) 0.02 sqrt(2/3)."""
    baseline = [100 * math.exp(x) for x in (-0.02, 0.0, 0.02)]
    gain = compare(baseline, [1.2 * value for value in baseline], direction="maximize")
    half = 2.776445 * 0.02 * math.sqrt(2 / 3)
    assert gain.ratio == pytest.approx(1.2)
    assert (gain.lo, gain.hi) == (pytest.approx(1.2 * math.exp(-half)), pytest.approx(1.2 * math.exp(half)))
    assert (gain.verdict, gain.reason, gain.n) == ("better", None, (3, 3))
    assert gain.candidate_mean == pytest.approx(1.2 * gain.baseline_mean)
    assert compare(baseline, [1.2 * v for v in baseline], direction="minimize").verdict == "worse"
    assert compare(baseline, [0.8 * v for v in baseline], direction="minimize").verdict == "better"


@pytest.mark.parametrize(
    ("baseline", "candidate", "why"),
    [
        ([1.0, 1.0], [2.0, 2.0, 2.0], "2 and 3 starts"),
        ([1.0, 1.1, 0.9], [2.0], "3 and 1 starts"),
        ([0.0, 1.0, 1.0], [2.0, 2.0, 2.0], "zero or less"),
        ([1.0, 1.1, 0.9], [1.01, 1.1, 0.95], "holds 1"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "holds 1"),
    ],
)
def test_inconclusive_says_why(baseline: list[float], candidate: list[float], why: str) -> None:
    gain = compare(baseline, candidate, direction="maximize")
    assert gain.verdict == "inconclusive"
    assert gain.reason is not None
    assert why in gain.reason
    if len(candidate) < 3 or len(baseline) < 3:
        assert (gain.lo, gain.hi) == (None, None)


def test_an_empty_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="without a start"):
        compare([], [1.0], direction="maximize")


def share(verdict: str, draw: Callable[[np.random.Generator], tuple[Any, Any]], runs: int) -> float:
    rng = np.random.default_rng(0)
    found = [compare(*draw(rng), direction="maximize").verdict for _ in range(runs)]
    return sum(v == verdict for v in found) / runs


@pytest.mark.parametrize("starts", [3, 5])
@pytest.mark.parametrize(("spread", "other"), [(0.01, 0.01), (0.04, 0.04), (0.01, 0.04)])
def test_equal_configurations_are_seldom_called_different(spread: float, other: float, starts: int) -> None:
    def equal(rng: np.random.Generator) -> tuple[list[float], list[float]]:
        return (100 * (1 + spread * rng.normal(size=starts))).tolist(), (
            100 * (1 + other * rng.normal(size=starts))
        ).tolist()

    assert 1 - share("inconclusive", equal, 1500) <= 0.06


def test_a_gain_of_20_percent_is_found() -> None:
    def better(rng: np.random.Generator) -> tuple[list[float], list[float]]:
        return (100 * (1 + 0.02 * rng.normal(size=3))).tolist(), (120 * (1 + 0.02 * rng.normal(size=3))).tolist()

    assert share("better", better, 500) > 0.95


@settings(deadline=None)
@given(
    st.lists(st.floats(0.1, 1e4), min_size=3, max_size=6),
    st.lists(st.floats(0.1, 1e4), min_size=3, max_size=6),
    st.floats(0.01, 100),
)
def test_a_gain_has_no_unit_and_a_mirror(baseline: list[float], candidate: list[float], unit: float) -> None:
    gain = compare(baseline, candidate, direction="maximize")
    scaled = compare([unit * v for v in baseline], [unit * v for v in candidate], direction="maximize")
    mirror = compare(candidate, baseline, direction="maximize")
    assert gain.lo is not None
    assert gain.hi is not None
    assert scaled.ratio == pytest.approx(gain.ratio)
    assert mirror.ratio == pytest.approx(1 / gain.ratio)
    assert mirror.lo == pytest.approx(1 / gain.hi)


def test_a_preset_stands_for_its_limits_in_an_experiment() -> None:
    assert rows.experiment(slo="mlperf-llama3.1-8b-interactive").slo == {"ttft_p99_ms": 500.0, "tpot_p99_ms": 30.0}
    with pytest.raises(InputError, match=r"slo: .*no preset\. Did you mean mlperf-llama2-70b\?.*Known: mlperf"):
        rows.experiment(slo="mlperf-llama2-70")
