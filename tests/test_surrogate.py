"""The surrogate against slow references, and what it proposes in spaces whose best is known."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varcas.surrogate import Encoding, Observed, Process, Suspects, advise, expected_improvement

GRID = [
    {"seqs": seqs, "tokens": tokens, "chunked": chunked, "dtype": dtype}
    for seqs, tokens, chunked, dtype in itertools.product(
        [1, 2, 4, 8, 16, 32, 64, 128], [512, 1024, 2048], [True, False], ["auto", "fp8"]
    )
]


def truth(params: dict[str, object]) -> float:
    """Rises with the batch to 64, falls beyond; two flags act as factors."""
    seqs = float(params["seqs"])  # type: ignore[arg-type]
    rise = 1 / (1 + 8 / seqs) * (0.85 if seqs > 64 else 1.0)
    return 1000 * rise * (1.0 if params["chunked"] else 0.93) * (1 + 0.05 * math.log2(float(params["tokens"]) / 512))  # type: ignore[arg-type]


def test_numbers_are_near_or_far_and_labels_are_not() -> None:
    points = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 256, "b": "z"}, {"b": "z"}]
    encoding = Encoding(points)
    gaps = encoding.gaps(encoding.matrix(points), encoding.matrix(points))
    assert gaps[0, 0, 1] == pytest.approx((1 / 8) ** 1.5)
    assert gaps[0, 0, 2] == pytest.approx(1.0)
    assert gaps[0, 0, 3] == 1.0
    assert gaps[0, 3, 3] == 0.0
    assert gaps[1, 0, 1] == gaps[1, 0, 2] == 1.0


def test_true_is_no_number() -> None:
    encoding = Encoding([{"a": True}, {"a": False}, {"a": 1}])
    assert encoding.gaps(encoding.matrix([{"a": True}]), encoding.matrix([{"a": 1}]))[0, 0, 0] == 1.0


def test_the_process_is_bayes_rule() -> None:
    """Mean and variance of one draw against the textbook formula with explicit inverses."""
    rng = np.random.default_rng(0)
    points = [{"a": float(a), "b": float(b)} for a, b in rng.random((7, 2))]
    new = [{"a": float(a), "b": float(b)} for a, b in rng.random((3, 2))]
    encoding = Encoding([*points, *new])
    at, to = encoding.matrix(points), encoding.matrix(new)
    values, told, told_new = np.sin(at.sum(axis=1)), at[:, 0] * 0.3, to[:, 0] * 0.3
    process = Process(encoding, at, values, np.random.default_rng(1), told)
    process._draws, process._roots = process._draws[:1], process._roots[:1]
    draw, centre = process._draws[0], told.mean()

    def kernel(a: Any, b: Any, ta: Any, tb: Any) -> Any:
        gap = [np.abs(a[:, None, k] - b[None, :, k]) ** 1.5 for k in range(2)]
        alone = sum(np.exp(2 * draw[2 + k]) * np.exp(-np.exp(draw[4 + k]) * gap[k]) for k in range(2))
        both = np.exp(2 * draw[1]) * np.exp(-sum(np.exp(draw[4 + k]) * gap[k] for k in range(2)))
        return alone + both + 1.0 + 0.25 * np.outer(ta - centre, tb - centre)

    whole = np.linalg.inv(kernel(at, at, told, told) + np.eye(7) * (np.exp(2 * draw[0]) + 1e-8))
    residual = values - told
    cross = kernel(to, at, told_new, told)
    mean = told_new + residual.mean() + cross @ whole @ (residual - residual.mean())
    variance = np.diag(kernel(to, to, told_new, told_new)) - np.diag(cross @ whole @ cross.T)
    found, deviation = process.predict(to, told_new)
    assert found == pytest.approx(mean, abs=1e-6)
    assert deviation**2 == pytest.approx(variance, abs=1e-6)


@given(st.floats(-2, 2), st.floats(0.01, 2), st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_expected_improvement_is_the_mean_of_what_is_above(mean: float, deviation: float, best: float) -> None:
    draws = np.random.default_rng(0).normal(mean, deviation, 200_000)
    mine = expected_improvement(np.array([mean]), np.array([deviation]), best)[0]
    assert mine == pytest.approx(np.maximum(draws - best, 0).mean(), abs=0.02 * deviation + 1e-3)


def run(starts: int, seed: int, fails: object = None, sd: float = 0.02) -> list[dict[str, object]]:
    rng, left = random.Random(seed), list(GRID)
    rng.shuffle(left)
    tried: list[Observed] = []
    order = []
    for number in range(starts):
        advice = advise(tried, left, seed=number) if sum(one.values is not None for one in tried) >= 2 else None
        params = left.pop(advice.place if advice else 0)
        order.append(params)
        ran = not (fails is not None and params["dtype"] == fails)
        values = (math.log(truth(params)) + rng.gauss(0, sd),) if ran else None
        tried.append(Observed(params, values))
    return order


def test_the_best_of_96_is_within_3_percent_after_10_starts() -> None:
    best = max(map(truth, GRID))
    ranks = []
    for seed in range(10):
        near = [n for n, params in enumerate(run(14, seed), start=1) if truth(params) >= 0.97 * best]
        ranks.append(near[0] if near else 99)
    assert np.median(ranks) <= 10, ranks


def test_a_value_that_always_fails_costs_two_starts_at_most() -> None:
    for seed in range(6):
        order = run(12, seed, fails="fp8")
        assert sum(params["dtype"] == "fp8" for params in order[2:]) <= 2


def test_suspects_are_what_only_failures_hold() -> None:
    suspects = Suspects([({"a": 1, "b": 1}, True), ({"a": 1, "b": 2}, False), ({"a": 2, "b": 2}, False)])
    assert suspects.chance({"a": 1, "b": 1}) == 1.0
    assert suspects.chance({"a": 3, "b": 2}) == 0.0
    assert 0 < suspects.chance({"a": 2, "b": 1}) < 1


def test_a_pair_is_suspected_where_no_single_value_explains() -> None:
    ran = [({"a": a, "b": b}, True) for a, b in ((1, 1), (1, 2), (2, 1), (3, 2))]
    suspects = Suspects([*ran, ({"a": 2, "b": 2, "c": 1}, False), ({"a": 2, "b": 2, "c": 2}, False), ({"c": 1}, True),
                         ({"c": 2}, True)])  # fmt: skip
    assert suspects.chance({"a": 2, "b": 2, "c": 3}) == 0.0
    assert suspects.chance({"a": 2, "b": 1}) == 1.0


def test_limits_move_the_proposals_to_where_they_hold() -> None:
    """The fastest half of the batch sizes misses a limit: what is proposed holds it, near its edge."""
    tried = [Observed({"seqs": seqs}, (math.log(seqs),), (math.log(seqs / 20),)) for seqs in (1, 2, 64, 128)]
    left = [{"seqs": seqs} for seqs in (4, 8, 16, 32, 256)]
    advice = advise(tried, left, seed=0)
    assert advice is not None
    assert left[advice.place]["seqs"] in (8, 16)


def test_while_nothing_meets_the_limits_what_is_missed_shrinks() -> None:
    tried = [Observed({"seqs": seqs}, (math.log(seqs),), (math.log(seqs / 2),)) for seqs in (32, 64, 128)]
    advice = advise(tried, [{"seqs": seqs} for seqs in (4, 256)], seed=0)
    assert advice is not None
    assert advice.place == 0
    assert advice.improvement == math.inf


def test_what_costs_ten_times_as_much_comes_later() -> None:
    tried = [Observed({"a": 1}, (0.0,)), Observed({"a": 2}, (0.01,))]
    left = [{"a": 4}, {"a": 3}]
    dear = advise(tried, left, cost_s=[1000.0, 10.0], seed=0)
    assert dear is not None
    assert dear.place == 1


def test_what_runs_just_now_is_not_proposed_beside() -> None:
    tried = [
        Observed({"seqs": seqs}, (math.log(truth({"seqs": seqs, "tokens": 512, "chunked": True})),))
        for seqs in (1, 4, 128)
    ]
    left = [{"seqs": seqs} for seqs in (2, 8, 16, 32, 64)]
    first = advise(tried, left, seed=0)
    assert first is not None
    again = advise(tried, left, running=[left[first.place]], seed=0)
    assert again is not None
    assert left[again.place] != left[first.place]


def test_there_is_no_advice_without_a_measurement_or_a_candidate() -> None:
    assert advise([], [{"a": 1}]) is None
    assert advise([Observed({"a": 1}, None)], [{"a": 2}]) is None
    assert advise([Observed({"a": 1}, (0.0,))], []) is None
