"""What a sweep may spend: wall time, GPU hours or money, whichever is short first."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from varcas.errors import InputError

FORMS = "30m, 2h, 1h30m, 900s, 2gpuh or 5usd, or several with commas between"


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits; None: none.

    Attributes:
        wall_s: seconds of wall time.
        gpu_h: hours of GPUs reserved by starts.
        usd: of these hours, at the catalogue's list price.
    """

    wall_s: float | None = None
    gpu_h: float | None = None
    usd: float | None = None


def parse_budget(text: str, option: str = "--budget") -> Budget:
    """`30m`, `2gpuh`, `5usd`, or several: `2h,5usd`.

    Raises:
        InputError: it is none of these.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gpuh|usd)\s*", part.lower())
        kind = "wall_s" if match is None else "gpu_h" if match[2] == "gpuh" else "usd"
        if kind in found:
            raise InputError(f"{option}: {text!r}: names one limit twice. Write {FORMS}.")
        found[kind] = parse_duration(part, option) if match is None else float(match[1])
    return Budget(**found)


def parse_duration(text: str, option: str = "--budget") -> float:
    """Seconds of `30m`, `2h`, `90s` or `1h30m`.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    if text.strip().isdigit():
        raise InputError(f"{option}: {text!r}: has no unit: write {text.strip()}s or {text.strip()}m.")
    if not text.strip() or match is None:
        known = FORMS if option == "--budget" else "30m, 2h, 1h30m or 900s"
        raise InputError(f"{option}: {text!r}: write {known}.")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


class Purse:
    """A budget, and what is left of it.

    Args:
        budget: limits.
        usd_per_gpu_h: price of an hour of one GPU; needed where the budget is money.
        now_s: the clock.

    Raises:
        InputError: money, and no price.
    """

    def __init__(
        self, budget: Budget, usd_per_gpu_h: float | None = None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        if budget.usd is not None and usd_per_gpu_h is None:
            raise InputError(
                f"--budget: {budget.usd:g}usd: this GPU has no price in the catalogue (`varcas gpus`). "
                "Give the budget in GPU hours, e.g. --budget 2gpuh."
            )
        self._budget, self._now_s, self._began_s = budget, now_s, now_s()
        hours = [budget.gpu_h] if budget.gpu_h is not None else []
        hours += [budget.usd / usd_per_gpu_h] if budget.usd is not None and usd_per_gpu_h else []
        self._gpu_s = min(hours) * 3600 if hours else None
        self._by_money = (
            budget.usd is not None and usd_per_gpu_h is not None and min(hours) == budget.usd / usd_per_gpu_h
        )
        self._spent_gpu_s = 0.0

    @property
    def wall_s(self) -> float | None:
        """Limit on wall seconds."""
        return self._budget.wall_s

    @property
    def limits_gpus(self) -> bool:
        """GPU time is limited, by itself or by its price."""
        return self._gpu_s is not None

    def charge(self, gpu_s: float) -> None:
        """Seconds that a start reserved GPUs for, times GPUs."""
        self._spent_gpu_s += gpu_s

    def short_of(self, wall_s: float, gpu_s: float) -> str | None:
        """Which limit would not hold so much more; None when all do."""
        if self._budget.wall_s is not None and self._now_s() - self._began_s + wall_s > self._budget.wall_s:
            return "time"
        if self._gpu_s is not None and self._spent_gpu_s + gpu_s > self._gpu_s:
            return f"money ({self._budget.usd:g} USD)" if self._by_money else f"GPU ({self._budget.gpu_h:g} GPU hours)"
        return None
