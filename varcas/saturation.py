"""Whether the server kept up, and from when on it was filled: `docs/measurement.md`, Saturated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from varcas.columns import Bools, Floats, Measured, Requests
from varcas.experiment import ArrivalKind
from varcas.records import Sample

FIRST_REQUESTS = 10
"""The ramp-up lasts as long as the answers to the first so many requests, which met an empty server: their p90."""

DRIFT_SIGMAS = 1.5
"""Growth in flight over its standard deviation at a load of exactly 1; there chance gives so much in 7 %."""

STEADY_ARRIVALS = ("poisson", "constant", "gamma")
"""Under these the rate does not change: more in flight, or slower answers, are not the load's own doing."""

MIN_ARRIVED = 10
BACKLOG_MIN_FRAC = 0.05
SLOWDOWN_MIN_RATIO = 1.25
WAITING_MIN_FRAC = 0.5
MIN_SAMPLES = 5
DISPERSION = (0.25, 4.0)
"""Bounds of the squared coefficients of variation of gaps and of answers' lengths: short windows tell little."""


@dataclass(frozen=True, slots=True)
class Filling:
    """How the server filled up.

    Attributes:
        ramp_s: end of the ramp-up; None when the window does not hold twice as much.
        steady_s: from here on rates are not the ramp-up's: `ramp_s`, else half the window.
        saturated: it could not keep up.
    """

    ramp_s: float | None
    steady_s: float
    saturated: bool


def filling(measured: Measured, samples: Sequence[Sample] = (), *, arrival: ArrivalKind = "poisson") -> Filling:
    """Reads it from arrivals, ends, waiting times and samples.

    Args:
        measured: the load.
        samples: of the server, on the load's clock; without them, what has no first token yet is what waits.
        arrival: how requests came. Users of a closed loop wait for their answers: they cannot outrun the server. Where
            the rate changes by itself, only what waits tells.
    """
    ramp_s = _ramp_s(measured)
    steady_s = measured.duration_s / 2 if ramp_s is None else ramp_s
    return Filling(ramp_s, steady_s, arrival != "closed" and _falls_behind(measured, samples, steady_s, arrival))


def _ramp_s(measured: Measured) -> float | None:
    window = measured.window
    took_s = np.where(window.ok, window.end_s - window.scheduled_s, math.inf)[:FIRST_REQUESTS]
    if len(took_s) < FIRST_REQUESTS:
        return None
    ramp_s = float(np.sort(took_s)[-(-len(took_s) * 9 // 10) - 1])
    return ramp_s if ramp_s <= measured.duration_s / 2 else None


def _falls_behind(measured: Measured, samples: Sequence[Sample], from_s: float, arrival: ArrivalKind) -> bool:
    """More arrives than ends, beyond chance, and either more and more wait, or answers slow down.

    Where the rate rises, more are in flight and in a batch by rights: then those that wait must be beyond chance.
    """
    requests, to_s = measured.requests, measured.duration_s
    arrived = int(np.count_nonzero((requests.scheduled_s >= from_s) & (requests.scheduled_s < to_s)))
    ended = int(np.count_nonzero((requests.end_s >= from_s) & (requests.end_s < to_s)))
    if arrived < MIN_ARRIVED:
        return False
    growth = arrived - ended
    gaps, lengths = _dispersion(np.diff(measured.window.scheduled_s)), _dispersion(requests.scheduled_output_tokens)
    noise = DRIFT_SIGMAS * math.sqrt(arrived * gaps + ended * lengths)
    chance = max(noise, BACKLOG_MIN_FRAC * arrived)
    if growth <= chance:
        return False
    waiting = _waiting_growth(requests, samples, from_s, to_s)
    if arrival not in STEADY_ARRIVALS:
        return waiting > chance
    return waiting >= WAITING_MIN_FRAC * growth or _slows_down(measured)


def _dispersion(values: Floats) -> float:
    """Squared coefficient of variation."""
    mean = float(values.mean()) if len(values) else 0.0
    return float(np.clip(values.var() / mean**2 if mean > 0 else 0.0, *DISPERSION))


def _waiting_growth(requests: Requests, samples: Sequence[Sample], from_s: float, to_s: float) -> float:
    """How many more wait at the stretch's end than at its beginning: means over its last and first fifth."""
    span_s = (to_s - from_s) / 5
    seen = [
        (sample.t_s, float(sample.num_requests_waiting))
        for sample in samples
        if from_s <= sample.t_s <= to_s and sample.num_requests_waiting is not None
    ]
    ends = any(t_s <= from_s + span_s for t_s, _ in seen) and any(t_s >= to_s - span_s for t_s, _ in seen)
    if len(seen) >= MIN_SAMPLES and ends:
        at_s, waiting = np.array(seen).T
    else:  # a sample a second: a short stretch may have none in its last fifth
        at_s = np.linspace(from_s, to_s, 51)
        waiting = _without_token(requests, at_s)
    first, last = waiting[at_s <= from_s + span_s], waiting[at_s >= to_s - span_s]
    # the mean of the last fifth is 0.1 of the stretch old, that of the first too: 0.8 of the growth lies between
    return float(last.mean() - first.mean()) / 0.8


def _without_token(requests: Requests, at_s: Floats) -> Floats:
    """Requests that were due by then and had neither a first token nor an end."""
    left_s = np.fmin(requests.first_token_s, requests.end_s)
    due = np.searchsorted(np.sort(requests.scheduled_s), at_s)
    left = np.searchsorted(np.sort(left_s[~np.isnan(left_s)]), at_s)
    return (due - left).astype(np.float64)


def _slows_down(measured: Measured) -> bool:
    """Requests of the last third wait longer for each of their tokens than those of the first."""
    due_s, third_s = measured.window.scheduled_s, measured.duration_s / 3
    early = _token_wait(measured.window, due_s < third_s)
    late = _token_wait(measured.window, due_s >= 2 * third_s)
    return late > SLOWDOWN_MIN_RATIO * early


def _token_wait(requests: Requests, mask: Bools) -> float:
    """Median wait for a token, from the scheduled arrival; of an unfinished answer, for those that came."""
    chosen = requests.where(mask & (requests.ok | requests.unfinished))
    if not len(chosen):
        return 0.0
    came = ~np.isnan(chosen.last_token_s)
    wait_s = np.where(came, chosen.last_token_s - chosen.scheduled_s, math.inf)
    return float(np.median(wait_s / np.maximum(chosen.output_tokens, 1.0)))
