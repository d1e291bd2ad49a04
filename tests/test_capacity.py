"""The capacity: the plan against servers whose capacity is known, the fit against slow references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.e2e.sweeps import varcas, write_experiment
from varcas.capacity import (
    MAX_LOADS,
    PRECISION,
    Judged,
    bracket,
    crossing,
    estimate,
    isotonic,
    next_rate,
    require_rate,
)  # fmt: skip
from varcas.errors import InputError
from varcas.experiment import parse_experiment
from varcas.results import Results

KEY = "ttft_p95_ms"


def share(of: float, n: int = 200, rng: np.random.Generator | None = None) -> dict[str, tuple[Any, Any]]:
    """A load of which so many requests miss; 5 % are allowed."""
    misses = (rng.random(n) < of) if rng is not None else np.arange(n) < round(of * n)
    return {KEY: (misses * 20.0, np.ones(n))}


def load(rate: float, of: float, **options: Any) -> Judged:
    parts = share(of, **options)
    num, den = parts[KEY]
    return Judged(rate, float(num.sum()) <= float(den.sum()), None, parts)


def miss_share(rate: float, capacity: float) -> float:
    """A server's: 5 % at its capacity, and steeply more beyond."""
    return min(1.0, 0.05 * (rate / capacity) ** 6)


def searched(capacity: float, first: float, n: int = 1000) -> list[Judged]:
    loads: list[Judged] = []
    while len(loads) < MAX_LOADS and (rate := next_rate(loads, first)) is not None:
        loads.append(load(rate, miss_share(rate, capacity), n=n))
    return loads


@settings(deadline=None, max_examples=40)
@given(st.floats(0.5, 200), st.floats(0.3, 20))
def test_the_bisection_finds_the_capacity(capacity: float, first: float) -> None:
    loads = searched(capacity, first)
    assert len(loads) <= 6 + abs(math.log2(capacity / first)) + math.log2(math.log(2) / math.log1p(PRECISION))
    found = bracket(loads)
    if found.met_rps is None:
        assert capacity < first / 2**9
        return
    if found.missed_rps is None:
        assert len(loads) == MAX_LOADS
        return
    assert found.met_rps <= capacity * 1.004
    assert capacity <= found.missed_rps * 1.004
    if len(loads) < MAX_LOADS:
        assert found.missed_rps <= found.met_rps * (1 + PRECISION) * 1.001
        assert estimate(loads).rps == pytest.approx(capacity, rel=PRECISION)


def test_a_rate_that_held_by_luck_is_tried_again_and_given_up() -> None:
    loads = [load(8, 0.0), load(16, 0.5), load(11.31, 0.0), load(13.45, 0.2), load(12.33, 0.2), load(11.81, 0.2)]
    loads.append(load(11.55, 0.2))
    assert next_rate(loads, 8) == 11.31
    loads.append(load(11.31, 0.3))  # with other arrivals
    found = bracket(loads)
    assert (found.met_rps, found.missed_rps) == (8, 11.31)
    assert next_rate(loads, 8) == pytest.approx(9.512, rel=1e-3)


def test_loads_of_one_rate_count_together() -> None:
    found = bracket([load(8, 0.0), load(10, 0.03), load(10, 0.06), load(12, 0.4)])
    assert (found.met_rps, found.loads_at_met) == (10, 2)


def test_a_server_that_is_overrun_has_lost_whatever_its_shares_say() -> None:
    overrun = Judged(10, False, "saturation", share(0.0))
    assert bracket([load(8, 0.0), overrun]).missed_rps == 10
    found = estimate([load(8, 0.0), overrun])
    assert found.limited_by == "saturation"
    assert 8 <= (found.rps or 0) <= 10
    assert estimate([overrun]).rps is None


def test_no_rate_holds() -> None:
    loads: list[Judged] = []
    while (rate := next_rate(loads, 8.0)) is not None:
        loads.append(load(rate, 1.0))
    assert len(loads) == 10
    assert estimate(loads).rps is None


def test_every_rate_holds() -> None:
    loads = [load(rate, 0.0) for rate in (8.0, 16.0, 32.0)]
    assert next_rate(loads, 8.0) == 64
    found = estimate(loads)
    assert (found.rps, found.hi, found.limited_by) == (32, None, None)


def slow_isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pool adjacent violators, as the textbook has it."""
    blocks = [[float(value), float(weight), 1] for value, weight in zip(values, weights, strict=True)]
    i = 0
    while i + 1 < len(blocks):
        (one, light, few), (other, heavy, more) = blocks[i], blocks[i + 1]
        if one > other:
            blocks[i : i + 2] = [[(one * light + other * heavy) / (light + heavy), light + heavy, few + more]]
            i = max(i - 1, 0)
        else:
            i += 1
    return np.concatenate([np.full(int(length), mean) for mean, _, length in blocks])


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_isotonic_is_the_closest_rising_sequence(points: list[tuple[float, float]]) -> None:
    values, weights = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    fitted = isotonic(values, weights)
    assert np.all(np.diff(fitted) >= -1e-9)
    assert fitted == pytest.approx(slow_isotonic(values, weights), abs=1e-6)


def test_the_crossing_lies_between_the_rates_around_it() -> None:
    rates = np.array([2.0, 4.0, 8.0])
    ratios = np.array([[0.2, 0.6, 1.4], [0.1, 0.2, 0.3], [1.1, 1.2, 1.3], [0.5, 1.0, 1.0]])
    assert crossing(rates, ratios) == pytest.approx([6.0, 8.0, 2.0, 8.0])


def test_the_interval_holds_the_capacity_as_often_as_it_says() -> None:
    """200 requests a load, drawn anew: 95 % of the intervals hold the truth, within what 80 studies can tell."""
    rng, held = np.random.default_rng(1), 0
    rates = [6.0, 8.0, 9.0, 9.5, 10.0, 10.5, 11.0, 12.0]
    for _ in range(80):
        loads = [load(rate, miss_share(rate, 10.0), n=200, rng=rng) for rate in rates]
        found = estimate(loads, seed=int(rng.integers(1 << 30)))
        held += found.lo is not None and found.lo <= 10.0 <= (found.hi or math.inf)
    assert held >= 0.86 * 80


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workload: {profile: chat-short, rate_rps: 2}", "slo: missing"),
        (
            "slo: {ttft_p95_ms: 500}\nworkload: {profile: chat-short, arrival: {kind: closed, users: 4}}",
            "closed: has no",
        ),
        (
            "slo: {ttft_p95_ms: 500}\nworkload: {profile: chat-short, rate_rps: 1, arrival: {kind: ramp, to_rps: 4}}",
            "ramp: has no single rate",
        ),
    ],
)
def test_what_has_no_capacity_is_refused_with_the_fix(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        require_rate(parse_experiment(f"name: t\nmodel: m\n{text}\n", "t.yaml"))


SLO = {"ttft_p95_ms": 250}
WORKLOAD = {
    "profile": "chat-short",
    "rate_rps": 12,
    "duration_s": 2.5,
    "warmup_s": 0.2,
    "max_drain_s": 0.5,
    "max_tokens": 300,
}


@pytest.mark.ray
@pytest.mark.timeout(150)
def test_the_command_finds_what_a_scripted_server_holds(tmp_path: Path, model_dir: Path) -> None:
    """4 slots, and answers of about `n` tokens at 4 ms: 4 / (0.004 n) requests a second can be served at most."""
    path = write_experiment(
        tmp_path, model_dir, "--itl-ms 4 --ttft-ms 5", serve={"max_num_seqs": 4}, slo=SLO, workload=WORKLOAD, space={},
        baseline={},
    )  # fmt: skip
    code, out, err = varcas("capacity", path, "--precision", "0.25", "--json").finish(140)
    assert code == 0, err
    answer = json.loads(out)
    rows = answer["loads"]
    assert answer["highest_met_rps"] <= answer["capacity_rps"] <= answer["lowest_missed_rps"]
    assert answer["lowest_missed_rps"] <= 1.25 * answer["highest_met_rps"] * 1.01
    assert any(row["stopped_early"] or row["saturated"] for row in rows)
    assert answer["capacity_rps_lo"] <= answer["capacity_rps"]
    store = Results(tmp_path / "results").trials()
    assert {row.server_id for row in store} == {store[0].server_id}
    assert [row.rate_rps for row in store] == [row["rate_rps"] for row in rows]
    assert len({row.trial_id for row in store}) == len(store)
    assert sum((row.server_start_s or 0) > 0 for row in store) == 1


def test_the_command_without_an_slo_names_it(tmp_path: Path, model_dir: Path) -> None:
    path = write_experiment(tmp_path, model_dir)
    code, out, err = varcas("capacity", path).finish(30)
    assert (code, out) == (2, "")
    assert "slo: missing" in err
    assert "ttft_p95_ms: 500" in err
