"""How often `early_stop.PaceWatch` gives up a configuration that is as good as the incumbent, and how soon a bad one.

    python benchmarks/false_stops.py [--series 4000] [--seconds 120]

SIMULATED: one look a second at a token counter whose increments are an AR(1) process about a mean. A false stop is a
series that is given up although its mean is just what the incumbent's margin asks for (the worst case: any better one
is given up less often). `stops` are series whose mean is `behind` below the incumbent's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from varcas.early_stop import START_MARGIN, PaceWatch

INCUMBENT = 1000.0
SPREAD = 0.10
"""Standard deviation of a second's rate, of its mean."""


@dataclass(frozen=True, slots=True)
class Stops:
    """Of some series: the share given up, and after how many seconds, in the median."""

    share: float
    median_s: float | None


def false_stops(rho: float, series: int, seconds: int, seed: int) -> Stops:
    """Series whose mean is what is asked of a configuration that may go on."""
    return _stops(INCUMBENT * (1 - START_MARGIN), rho, series, seconds, seed)


def true_stops(behind: float, rho: float, series: int, seconds: int, seed: int) -> Stops:
    """Series that are `behind` the incumbent, as a share of it."""
    return _stops(INCUMBENT * (1 - behind), rho, series, seconds, seed)


def _stops(mean: float, rho: float, series: int, seconds: int, seed: int) -> Stops:
    rng = np.random.default_rng(seed)
    when = [_stopped_s(mean, rho, seconds, rng) for _ in range(series)]
    found = [at_s for at_s in when if at_s is not None]
    return Stops(len(found) / series, float(np.median(found)) if found else None)


def _stopped_s(mean: float, rho: float, seconds: int, rng: np.random.Generator) -> float | None:
    shocks = rng.standard_normal(seconds) * np.sqrt(1 - rho**2)
    state, total, watch = rng.standard_normal(), 0.0, PaceWatch(INCUMBENT)
    watch.add(0.0, 0.0)
    for second in range(seconds):
        state = rho * state + shocks[second]
        total += mean * (1 + SPREAD * state)
        watch.add(second + 1.0, total)
        if watch.beaten(second + 1.0) is not None:
            return second + 1.0
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints JSON; exit code 1 when more than 1 % are given up falsely."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=4000)
    parser.add_argument("--seconds", type=int, default=120)
    asked = parser.parse_args(argv)
    rhos = (0.0, 0.5, 0.9)
    false = {rho: false_stops(rho, asked.series, asked.seconds, 1) for rho in rhos}
    true = {
        f"{behind:.0%}": {rho: true_stops(behind, rho, asked.series // 10, asked.seconds, 2) for rho in rhos}
        for behind in (0.2, 0.5, 0.8)
    }
    report = {
        "series": asked.series,
        "seconds": asked.seconds,
        "false_stops_by_rho": {rho: found.share for rho, found in false.items()},
        "stops_by_how_far_behind": {
            behind: {rho: [found.share, found.median_s] for rho, found in by_rho.items()}
            for behind, by_rho in true.items()
        },
    }
    print(json.dumps(report, indent=2))
    return 1 if max(found.share for found in false.values()) > 0.01 else 0


if __name__ == "__main__":
    sys.exit(main())
