"""Arrivals keep the rate and the spread that their kind promises."""

from __future__ import annotations

import itertools
import math
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varcas.experiment import Arrival
from varcas.workload.arrivals import ARRIVALS, US
from varcas.workload.draws import exponential, gamma, geometric, normal, streams

seeds = st.integers(0, 2**32 - 1)


def due_s(arrival: Arrival, rate_rps: float, duration_s: float, seed: int) -> list[float]:
    times_us = ARRIVALS[arrival.kind](arrival, rate_rps, duration_s, streams(seed, "measure", 1)[0])
    found = list(itertools.takewhile(lambda at_us: at_us < duration_s * US, times_us))
    assert all(isinstance(at_us, int) for at_us in found)
    assert found == sorted(found)
    return [at_us / US for at_us in found]


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def assert_poisson_count(num: int, expected: float) -> None:
    assert abs(num - expected) <= 5 * math.sqrt(expected) + 1


@given(rate_rps=st.floats(0.5, 500), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_poisson_and_constant_keep_the_rate(rate_rps: float, seed: int) -> None:
    assert_poisson_count(len(due_s(Arrival(kind="poisson"), rate_rps, 20, seed)), 20 * rate_rps)
    assert len(due_s(Arrival(kind="constant"), rate_rps, 20, seed)) == pytest.approx(20 * rate_rps, abs=1)


def test_constant_does_not_drift() -> None:
    found = due_s(Arrival(kind="constant"), 3, 10_000, 0)
    assert len(found) == 30_000
    assert all(abs(at_s - number / 3) <= 0.5e-6 for number, at_s in enumerate(found))


def test_poisson_gaps_are_exponential() -> None:
    found = sorted(gaps(due_s(Arrival(kind="poisson"), 100, 100, 3)))
    # Kolmogorov-Smirnov, alpha = 0.001: 1.95 / sqrt(n)
    distance = max(abs((i + 0.5) / len(found) - (1 - math.exp(-100 * gap))) for i, gap in enumerate(found))
    assert distance < 1.95 / math.sqrt(len(found))


@given(burstiness=st.floats(0.1, 20), rate_rps=st.floats(1, 100), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_gamma_gaps_have_the_mean_and_spread_of_vllm_bench_serve(burstiness: float, rate_rps: float, seed: int) -> None:
    found = gaps(due_s(Arrival(kind="gamma", burstiness=burstiness), rate_rps, 6000 / rate_rps, seed))
    spread = 1 / math.sqrt(burstiness)
    assert fmean(found) * rate_rps == pytest.approx(1, abs=6 * spread / math.sqrt(len(found)))
    # a sample's coefficient of variation scatters with the kurtosis, 3 + 6 / burstiness
    assert pstdev(found) / fmean(found) == pytest.approx(spread, rel=6 * math.sqrt((2 + 8 / burstiness) / len(found)))


def test_gamma_of_shape_1_is_poisson_and_large_shapes_are_even() -> None:
    found = sorted(gaps(due_s(Arrival(kind="gamma", burstiness=1), 100, 100, 3)))
    distance = max(abs((i + 0.5) / len(found) - (1 - math.exp(-100 * gap))) for i, gap in enumerate(found))
    assert distance < 1.95 / math.sqrt(len(found))
    even = gaps(due_s(Arrival(kind="gamma", burstiness=10_000), 100, 10, 3))
    assert max(abs(gap - 0.01) for gap in even) < 0.001


@given(from_rps=st.floats(0.5, 200), to_rps=st.floats(0.5, 200), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_a_ramp_has_the_expected_count_in_each_half(from_rps: float, to_rps: float, seed: int) -> None:
    found = due_s(Arrival(kind="ramp", to_rps=to_rps), from_rps, 40, seed)
    middle_rps = (from_rps + to_rps) / 2
    assert_poisson_count(sum(at_s < 20 for at_s in found), 20 * (from_rps + middle_rps) / 2)
    assert_poisson_count(sum(at_s >= 20 for at_s in found), 20 * (middle_rps + to_rps) / 2)


@given(rates=st.lists(st.sampled_from([0.0, 1.0, 10.0, 100.0]), min_size=1, max_size=5), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_every_step_has_its_own_rate(rates: list[float], seed: int) -> None:
    steps = [(20.0 * number, rate) for number, rate in enumerate(rates)]
    found = due_s(Arrival(kind="steps", steps=steps), 0, 20 * len(rates), seed)
    for (start_s, rate), num in zip(
        steps, (sum(start_s <= at_s < start_s + 20 for at_s in found) for start_s, _ in steps), strict=True
    ):
        assert num == 0 if rate == 0 else abs(num - 20 * rate) <= 5 * math.sqrt(20 * rate) + 1, (start_s, rate, num)


def test_a_ramp_that_is_level_and_a_single_step_are_poisson_processes() -> None:
    for arrival in (Arrival(kind="ramp", to_rps=50), Arrival(kind="steps", steps=[(0, 50)])):
        found = sorted(gaps(due_s(arrival, 50, 200, 5)))
        distance = max(abs((i + 0.5) / len(found) - (1 - math.exp(-50 * gap))) for i, gap in enumerate(found))
        assert distance < 1.95 / math.sqrt(len(found))


@given(mean=st.floats(1, 20), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_turns_have_their_mean(mean: float, seed: int) -> None:
    uniform = streams(seed, "measure", 1)[0]
    found = [geometric(uniform, mean) for _ in range(4000)]
    assert min(found) >= 1
    assert fmean(found) == pytest.approx(mean, abs=6 * math.sqrt(mean * (mean - 1) / 4000) + 1e-9)


def test_draws_survive_a_uniform_number_of_zero_and_the_largest() -> None:
    for value in (0.0, 1 - 2.0**-53):
        always = itertools.repeat(value).__next__
        assert all(math.isfinite(draw(always)) for draw in (exponential, normal))
        assert math.isfinite(gamma(iter([value, value, 0.5, 0.5, value]).__next__, 0.2))
        assert geometric(always, 3) >= 1


def test_streams_do_not_shift_when_more_are_taken() -> None:
    few, many = streams(3, "measure", 2), streams(3, "measure", 7)
    assert [draw() for draw in few for _ in range(300)] == [draw() for draw in many[:2] for _ in range(300)]
