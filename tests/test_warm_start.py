"""What another study measured counts here when, and only when, it measured the same thing."""

from __future__ import annotations

import hashlib
from typing import Any

from tests.rows import experiment, failed, row
from varcas.experiment import Experiment
from varcas.records import RequestRecord, TrialRow
from varcas.space import ServingConfig, Space
from varcas.warm_start import best_elsewhere, copied, same_conditions


def key(config: ServingConfig) -> str:
    return hashlib.sha256(f"here {config.hash}".encode()).hexdigest()


def other(seqs: int | None, value: float | None = 100.0, **columns: Any) -> TrialRow:
    made = row(seqs, value, study="other", **columns)
    return made.model_copy(update={"trial_key": key(ServingConfig("m", None, {"dtype": "half", "max_num_seqs": seqs}))})


def found(rows: list[TrialRow], made: Experiment | None = None) -> list[tuple[int, Any]]:
    made = made or experiment(baseline="{max_num_seqs: 1}")
    return [(row.number, params) for row, params in same_conditions(rows, made, Space(made), key)]


def test_the_same_conditions_count_and_others_do_not() -> None:
    same, elsewhere = other(2, number=7), row(4, 300.0, study="other", number=8)
    assert found([same, elsewhere]) == [(7, {"max_num_seqs": 2})]


def test_what_says_nothing_for_good_is_left_out() -> None:
    rows = [
        other(2, valid=False),
        other(2, None, state="failed", failure_kind="worker_lost", valid=None),
        other(2, None, state="stopped", valid=False),
        other(2, simulated=True),
        other(2, warm_from="older/3"),
        other(16),  # outside of the space
        other(1),  # the baseline is always measured anew
        other(2).model_copy(update={"study": "t"}),
    ]
    assert found(rows) == []


def test_a_failure_of_its_own_counts_until_it_was_measured() -> None:
    bad = failed(4, study="other", number=1)
    bad = bad.model_copy(update={"trial_key": other(4).trial_key})
    assert [number for number, _ in found([bad])] == [1]
    assert [number for number, _ in found([other(4, number=2), bad])] == [2]


def records(num: int = 20, wait_s: float = 0.2) -> list[RequestRecord]:
    return [
        RequestRecord(i, i * 0.1, i * 0.1, i * 0.1 + wait_s, i * 0.1 + wait_s + 0.1, i * 0.1 + wait_s + 0.1, 5, 2, 5, 2,
                      (wait_s, wait_s + 0.1), (1, 1), "length", None, 200, i, 0)
        for i in range(num)
    ]  # fmt: skip


def test_a_copy_says_where_it_is_from_and_is_judged_by_this_study_s_slo() -> None:
    made = experiment(slo="{ttft_p95_ms: 150}")
    old = other(2, number=7, duration_s=2.0, drain_s=0.5, constraints={"ttft_p95_ms": -0.9}, slo_met=True)
    copy = copied(old, {"max_num_seqs": 2}, made, 3, lambda study: {"ttft_p95_ms": 2000.0}, lambda _: (records(), ()))
    assert copy is not None
    assert (copy.study, copy.number, copy.warm_from, copy.purpose) == ("t", 3, "other/7", "search")
    assert copy.server_id == old.server_id
    assert copy.trial_id != old.trial_id
    assert copy.slo_met is False
    assert abs(copy.constraints["ttft_p95_ms"] - (200 / 150 - 1)) < 1e-6
    assert copied(old, {}, made, 3, lambda study: {"ttft_p95_ms": 2000.0}, lambda _: ((), ())) is None
    kept = copied(old, {}, made, 3, lambda study: {"ttft_p95_ms": 150.0}, lambda _: ((), ()))
    assert kept is not None
    assert kept.slo_met is True


def test_what_was_best_under_other_conditions_is_tried_first() -> None:
    made = experiment()
    rows = [row(seqs, 100.0 * seqs, study="a", gpu_name="L4") for seqs in (2, 4, 8)]
    rows += [row(seqs, 1000.0 - seqs, study="b", gpu_name="T4") for seqs in (2, 4, 8)]
    rows += [row(2, 1e9, study="c")]  # alone in its context: the best of one
    rows += [row(1, 1e9, study="d", simulated=True) for _ in range(3)]
    first = [config.flags["max_num_seqs"] for config in best_elsewhere(rows, made, Space(made))]
    assert first == [8, 4]
