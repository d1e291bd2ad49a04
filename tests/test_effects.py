from __future__ import annotations

import itertools
import json
import random

import pytest

from tests.rows import experiment, row
from varcas.effects import effects, effects_text
from varcas.records import TrialRow


def rows(interaction: float = 1.0, sd: float = 0.005) -> list[TrialRow]:
    rng, found = random.Random(0), []
    for a, b, c in itertools.product([1, 2, 4], ["x", "y"], [True, False]):
        value = 1000 * {1: 0.8, 2: 1.0, 4: 1.25}[a] * (1.05 if c else 1.0) * rng.lognormvariate(0, sd)
        value *= interaction if (a, b) == (4, "y") else 1.0
        found.append(row(2, value, params_json=json.dumps({"a": a, "b": b, "c": c})))
    return found


def test_main_effects_are_what_was_put_in() -> None:
    found = effects(rows(), experiment())
    assert found.params[0].param == "a"
    by_name = {param.param: param for param in found.params}
    assert by_name["a"].share > 0.8
    assert by_name["b"].share < 0.02
    ratios = {value.value: value.ratio for value in by_name["a"].values}
    assert list(ratios) == ["1", "2", "4"]
    assert ratios["4"] / ratios["1"] == pytest.approx(1.25 / 0.8, rel=0.1)
    c = {value.value: value for value in by_name["c"].values}
    assert c["true"].ratio / c["false"].ratio == pytest.approx(1.05, rel=0.02)
    assert c["true"].lo is not None
    assert c["true"].lo < c["true"].ratio < (c["true"].hi or 0)
    assert "a: " in effects_text(found)


def test_what_two_flags_do_together_is_an_interaction() -> None:
    found = effects(rows(interaction=1.3), experiment())
    assert found.interactions[0].params == ("a", "b")


def test_few_measurements_tell_nothing() -> None:
    found = effects(rows()[:3], experiment())
    assert found.params == []
    assert "too few" in effects_text(found)


def test_what_failed_or_came_after_the_search_is_left_out() -> None:
    kept = rows()
    aside = [row(2, 1.0, purpose="confirm", params_json='{"a": 1}'), row(2, None, state="failed", valid=None)]
    assert effects([*kept, *aside], experiment()) == effects(kept, experiment())
