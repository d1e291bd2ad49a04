"""Exact bounds of a share that was counted (Clopper and Pearson, Biometrika 1934)."""

from __future__ import annotations

import math


def upper_bound(hits: int, of: int, level: float = 0.95) -> float:
    """One-sided upper end of a share (Clopper and Pearson), by bisection of the binomial's lower tail."""
    if hits >= of:
        return 1.0
    low, high = hits / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(hits, of, middle) > 1 - level else (low, middle)
    return high


def lower_bound(hits: int, of: int, level: float = 0.95) -> float:
    """One-sided lower end."""
    return 1 - upper_bound(of - hits, of, level)


def _at_most(hits: int, of: int, share: float) -> float:
    logs = (
        math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1)
        + k * math.log(share) + (of - k) * math.log1p(-share)
        for k in range(hits + 1)
    )  # fmt: skip
    return math.fsum(math.exp(log) for log in logs)
