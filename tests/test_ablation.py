from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.rows import experiment, numbers
from tests.rows import row as plain_row
from varcas.ablation import MINIMAL, effects, minimal, missing
from varcas.experiment import Experiment
from varcas.records import TrialRow
from varcas.report import as_text, recommend
from varcas.space import ServingConfig

GAINS = {"a": 1.10, "b": 1.0, "c": 1.06}
WON = {"a": 1, "b": 1, "c": 1}


def made() -> Experiment:
    return experiment(study="{repeats: 3, ablate: 1}")


def row(flags: dict[str, Any], value: float | None, **columns: Any) -> TrialRow:
    whole = {"dtype": "half", **flags}
    config = ServingConfig("m", None, whole)
    fixed = {"config_json": json.dumps(whole), "config_hash": config.hash, "params_json": json.dumps(flags)}
    return plain_row(2 if flags else None, value, number=next(numbers), **fixed, **columns)


def rate(flags: dict[str, Any], rng: random.Random, gains: dict[str, float] = GAINS) -> float:
    value = 1000.0 * rng.lognormvariate(0, 0.005)
    for flag in flags:
        value *= gains.get(flag, 1.0)
    return value


def study(rng: random.Random, gains: dict[str, float] = GAINS) -> list[TrialRow]:
    rows = [row({}, rate({}, rng, gains)), row(WON, rate(WON, rng, gains), purpose="search")]
    rows += [row({}, rate({}, rng, gains), purpose="confirm", arm="baseline") for _ in range(3)]
    rows += [row(WON, rate(WON, rng, gains), purpose="confirm", arm="candidate") for _ in range(3)]
    return rows


def ablated(rows: list[TrialRow], rng: random.Random, gains: dict[str, float] = GAINS) -> list[TrialRow]:
    """Starts all that is missing, until nothing is."""
    while queue := missing(rows, rows[1], rows[0], made()):
        for arm, config in queue:
            flags = {name: value for name, value in config.flags.items() if name != "dtype"}
            rows.append(row(flags, rate(flags, rng, gains), purpose="ablate", arm=arm))
    return rows


def test_a_flag_that_brings_nothing_is_dropped_and_the_rest_started_again() -> None:
    rng = random.Random(0)
    rows = ablated(study(rng), rng)
    found = {effect.flag: effect for effect in effects(rows, rows[1], rows[0], made())}
    assert {flag for flag, effect in found.items() if effect.kept} == {"a", "c"}
    assert found["a"].gain == pytest.approx(0.10, abs=0.02)
    assert found["a"].lo is not None
    assert found["a"].lo > 0
    least = minimal(rows, rows[1], rows[0], made())
    assert least is not None
    assert json.loads(least.config_json) == {"dtype": "half", "a": 1, "c": 1}
    assert sum(r.arm == MINIMAL for r in rows) == 3


def test_the_recommendation_deploys_the_smaller_one_and_says_so() -> None:
    rng = random.Random(0)
    answer = recommend(ablated(study(rng), rng), made())
    assert answer.verdict == "better"
    assert answer.deploy == {"dtype": "half", "a": 1, "c": 1}
    assert answer.dropped == ["b"]
    text = as_text(answer)
    assert "b=1: brings" in text
    assert "nothing measurable" in text
    assert "confirmed without: b" in text


def test_where_every_flag_counts_the_winner_stands() -> None:
    rng, gains = random.Random(0), {"a": 1.1, "b": 1.08, "c": 1.06}
    rows = ablated(study(rng, gains), rng, gains)
    assert all(effect.kept for effect in effects(rows, rows[1], rows[0], made()))
    assert minimal(rows, rows[1], rows[0], made()) is None
    assert recommend(rows, made()).deploy == {"dtype": "half", **WON}


def test_a_flag_without_which_it_does_not_run_is_kept() -> None:
    rng = random.Random(0)
    rows = study(rng)
    rows.append(row({"a": 1, "c": 1}, None, purpose="ablate", arm="b", state="failed", failure_kind="out_of_memory",
                    valid=None))  # fmt: skip
    found = effects(rows, rows[1], rows[0], made())
    assert [(effect.flag, effect.kept, effect.failed) for effect in found] == [("b", True, 1)]


def test_flags_that_only_help_together_are_not_both_dropped() -> None:
    """Each alone may be put back without a loss; both at once cost 10 %: the minimal configuration is not deployed."""
    rng = random.Random(0)

    def value(flags: dict[str, Any]) -> float:
        return (
            1000
            * rng.lognormvariate(0, 0.005)
            * (1.1 if {"a", "b"} & set(flags) else 1.0)
            * (1.1 if "c" in flags else 1)
        )

    rows = [row({}, value({})), row(WON, value(WON), purpose="search")]
    rows += [row({}, value({}), purpose="confirm", arm="baseline") for _ in range(3)]
    rows += [row(WON, value(WON), purpose="confirm", arm="candidate") for _ in range(3)]
    while queue := missing(rows, rows[1], rows[0], made()):
        for arm, config in queue:
            flags = {name: v for name, v in config.flags.items() if name != "dtype"}
            rows.append(row(flags, value(flags), purpose="ablate", arm=arm))
    assert minimal(rows, rows[1], rows[0], made()) is None
    assert recommend(rows, made()).deploy == {"dtype": "half", **WON}


def test_one_flag_needs_no_ablation() -> None:
    rng = random.Random(0)
    rows = [row({}, 100.0), row({"a": 1}, rate({"a": 1}, rng), purpose="search")]
    assert missing(rows, rows[1], rows[0], made()) == []
