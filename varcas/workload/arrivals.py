"""Open-loop arrivals: who comes when, in whole microseconds from the start of the window.

Each kind is a generator of non-decreasing times; whoever asks stops at the window's end. `trace` takes the times of a
file, and a closed loop has no arrivals: both are in `schedule.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from varcas.experiment import Arrival
from varcas.workload.draws import Uniform, exponential, gamma

US = 1_000_000
"""Microseconds in a second."""
MASS = 2**32
"""Parts of the unit in which a time-changed Poisson process is summed: whole numbers, as microseconds are elsewhere."""

Arrivals = Callable[[Arrival, float, float, Uniform], Iterator[int]]


def poisson(arrival: Arrival, rate_rps: float, duration_s: float, uniform: Uniform) -> Iterator[int]:
    """Exponential gaps of mean 1 / rate."""
    mean_us = US / rate_rps
    at_us = 0
    while True:
        at_us += round(exponential(uniform) * mean_us)
        yield at_us


def constant(arrival: Arrival, rate_rps: float, duration_s: float, uniform: Uniform) -> Iterator[int]:
    """The n-th, from 0, at n / rate: no gap's rounding is carried into the next."""
    for number in itertools.count():
        yield round(number * US / rate_rps)


def gamma_gaps(arrival: Arrival, rate_rps: float, duration_s: float, uniform: Uniform) -> Iterator[int]:
    """Gamma gaps of shape `burstiness` and scale 1 / (rate * burstiness), as `vllm bench serve --burstiness` has them.

    Their mean is 1 / rate, their coefficient of variation 1 / sqrt(burstiness). vLLM then stretches its schedule until
    the last request falls on number / rate; here the number in a window varies as such a process's does.
    """
    assert arrival.burstiness is not None
    scale_us = US / (rate_rps * arrival.burstiness)
    at_us = 0
    while True:
        at_us += round(gamma(uniform, arrival.burstiness) * scale_us)
        yield at_us


def ramp(arrival: Arrival, rate_rps: float, duration_s: float, uniform: Uniform) -> Iterator[int]:
    """A Poisson process whose rate goes linearly from `rate_rps` to `to_rps` over the window.

    By time change: with `slope` = (to - from) / duration the expected count at t is L(t) = from * t + slope * t^2 / 2,
    and the arrivals are L^-1 of a Poisson process of rate 1.
    """
    assert arrival.to_rps is not None
    slope = (arrival.to_rps - rate_rps) / duration_s
    for mass in _unit_poisson(uniform):
        square = rate_rps * rate_rps + 2 * slope * mass
        if square < 0:  # a falling rate, and past the point where it would be 0
            return
        yield round(2 * mass / (rate_rps + math.sqrt(square)) * US)


def steps(arrival: Arrival, rate_rps: float, duration_s: float, uniform: Uniform) -> Iterator[int]:
    """A Poisson process whose rate changes at given seconds, by the same time change."""
    assert arrival.steps is not None
    masses = _unit_poisson(uniform)
    mass, mass_before = next(masses), 0.0
    ends = [*(second for second, _ in arrival.steps[1:]), math.inf]
    for (start_s, rate), end_s in zip(arrival.steps, ends, strict=True):
        while rate > 0 and (at_s := start_s + (mass - mass_before) / rate) < end_s:
            yield round(at_s * US)
            mass = next(masses)
        mass_before += rate * (end_s - start_s)


ARRIVALS: dict[str, Arrivals] = {
    "poisson": poisson,
    "constant": constant,
    "gamma": gamma_gaps,
    "ramp": ramp,
    "steps": steps,
}


def _unit_poisson(uniform: Uniform) -> Iterator[float]:
    total = 0
    while True:
        total += round(exponential(uniform) * MASS)
        yield total / MASS
