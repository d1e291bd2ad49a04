"""Random numbers that are the same on every machine, Python and NumPy.

Only raw uniform doubles are drawn from the bit generator (NumPy promises that PCG64's stream stays); everything else
follows from them by inversion, or by rejection driven by them alone. Times become whole microseconds before they are
summed, so that a last bit in which two C libraries' `log` differ is rounded away and never adds up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

Uniform = Callable[[], float]
"""Gives a double in [0, 1) at each call."""

LEAST = 2.0**-54
"""Stands for a uniform draw of exactly 0, which has no logarithm."""
BLOCK = 256
NORMAL = NormalDist()


def streams(seed: int, stream: str, num: int) -> list[Uniform]:
    """Independent sources of random numbers; the first few are the same whatever `num` is."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
    return [_blocks(child).__next__ for child in np.random.SeedSequence((seed, name)).spawn(num)]


def _blocks(seed: np.random.SeedSequence) -> Iterator[float]:
    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield from generator.random(BLOCK).tolist()  # the same numbers as one by one, at a tenth of the cost


def exponential(uniform: Uniform) -> float:
    """Of mean 1."""
    return -math.log1p(-uniform())


def normal(uniform: Uniform) -> float:
    """Of mean 0 and standard deviation 1."""
    return NORMAL.inv_cdf(uniform() or LEAST)


def gamma(uniform: Uniform, shape: float) -> float:
    """Of mean `shape` and scale 1.

    Marsaglia and Tsang, A Simple Method for Generating Gamma Variables, ACM TOMS 26(3), 2000; their section 6 for a
    shape below 1: gamma(shape) = gamma(shape + 1) * U^(1 / shape).
    """
    if shape < 1:
        return gamma(uniform, shape + 1) * math.pow(uniform() or LEAST, 1 / shape)
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        x = normal(uniform)
        v = (1 + c * x) ** 3
        if v > 0 and math.log(uniform() or LEAST) < x * x / 2 + d - d * v + d * math.log(v):
            return d * v


def geometric(uniform: Uniform, mean: float) -> int:
    """A number from 1 up with P(k) = (1 - 1/mean)^(k-1) / mean; always 1 when the mean is."""
    return 1 if mean == 1 else 1 + math.floor(math.log(1 - uniform()) / math.log1p(-1 / mean))
