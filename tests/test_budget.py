from __future__ import annotations

import pytest

from varcas.budget import Budget, Purse, parse_budget
from varcas.errors import InputError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("30m", Budget(wall_s=1800)),
        ("2gpuh", Budget(gpu_h=2)),
        ("5.5usd", Budget(usd=5.5)),
        ("1h30m,5usd", Budget(wall_s=5400, usd=5)),
        ("2 GPUh, 10m", Budget(wall_s=600, gpu_h=2)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "said"), [("5eur", "2gpuh or 5usd"), ("30", "no unit"), ("5usd,6usd", "twice"), ("", "write")]
)
def test_budgets_that_are_none(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_budget(text)


def test_the_first_limit_that_is_short_is_named() -> None:
    clock = [0.0]
    purse = Purse(Budget(wall_s=100, gpu_h=1, usd=0.5), usd_per_gpu_h=1.0, now_s=lambda: clock[0])
    assert purse.short_of(99, 0) is None
    assert purse.short_of(101, 0) == "time"
    assert purse.short_of(0, 1801) == "money (0.5 USD)"
    purse.charge(1000)
    assert purse.short_of(0, 800) is None
    assert purse.short_of(0, 801) == "money (0.5 USD)"
    clock[0] = 50.0
    assert purse.short_of(51, 0) == "time"


def test_gpu_hours_without_money() -> None:
    purse = Purse(Budget(gpu_h=1))
    assert purse.limits_gpus
    assert purse.short_of(0, 3601) == "GPU (1 GPU hours)"


def test_money_needs_a_price() -> None:
    with pytest.raises(InputError, match="no price in the catalogue"):
        Purse(Budget(usd=5))
