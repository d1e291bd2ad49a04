"""Main effects: what is planted is found, what is not there is not."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rows import experiment, failed, row
from varcas.effects import label_of, level_order, main_effects
from varcas.records import TrialRow

OBJECTIVE = experiment().objectives[0]


def grid(figure: dict[tuple[int, bool], float]) -> list[TrialRow]:
    return [
        row(None, tokens_per_s, purpose="search", number=i, config_hash=f"c{seqs}{eager}",
            config_json=json.dumps({"seqs": seqs, "eager": eager}))
        for i, ((seqs, eager), tokens_per_s) in enumerate(figure.items())
    ]  # fmt: skip


def test_the_flag_that_matters_explains_the_spread() -> None:
    draw = random.Random(0)
    rows = grid(
        {(s, e): 100.0 * s * draw.uniform(0.98, 1.02) for s, e in itertools.product((1, 2, 4, 8), (True, False))}
    )
    effects = main_effects(rows, OBJECTIVE)
    assert [effect.flag for effect in effects] == ["seqs", "eager"]
    assert effects[0].share == pytest.approx(1, abs=0.01)
    assert effects[1].share == 0
    assert [(level.label, level.num) for level in effects[0].levels] == [("1", 2), ("2", 2), ("4", 2), ("8", 2)]
    assert effects[0].levels[3].best == pytest.approx(800, rel=0.03)


def test_as_many_values_as_configurations_explain_nothing() -> None:
    rows = [row(seqs, 100.0 + seqs) for seqs in (1, 2, 4, 8)]
    assert [(effect.flag, effect.share) for effect in main_effects(rows, OBJECTIVE)] == [("max_num_seqs", None)]


def test_only_what_was_measured_and_is_to_be_believed_counts() -> None:
    kept = [row(1, 100.0), row(2, 200.0), row(2, 210.0)]
    left_out = [failed(4), row(8, 9999.0, valid=False), row(1, 5000.0, purpose="confirm", arm="candidate"), row(4, 0.0)]
    assert main_effects([*kept, *left_out], OBJECTIVE) == main_effects(kept, OBJECTIVE)


def test_nothing_measured_has_no_effects() -> None:
    assert main_effects([], OBJECTIVE) == []
    assert main_effects([row(1, 100.0)], OBJECTIVE) == []


@given(st.permutations(range(8)), st.lists(st.floats(1, 1e6), min_size=8, max_size=8))
def test_shares_lie_within_0_and_1_whatever_the_order(order: list[int], values: list[float]) -> None:
    cells = list(itertools.product((1, 2, 4, 8), (True, False)))
    rows = grid(dict(zip(cells, values, strict=True)))
    effects = main_effects(rows, OBJECTIVE)
    assert all(effect.share is None or 0 <= effect.share <= 1 for effect in effects)
    again = main_effects([rows[i] for i in order], OBJECTIVE)
    assert {e.flag: e.share for e in again} == pytest.approx({e.flag: e.share for e in effects}, abs=1e-9)


def test_values_stand_in_their_own_order() -> None:
    values = ["fp8", 16, 2, None, True, {"a": 1}, 0.5]
    assert [label_of(value) for value in sorted(values, key=level_order)] == [
        "left out", "0.5", "2", "16", "fp8", "true", '{"a":1}',
    ]  # fmt: skip
