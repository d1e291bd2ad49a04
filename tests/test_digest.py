"""What a report says: each figure against a slow reference, each section there when its rows are."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rows import confirm, experiment, failed, row
from tests.studies import load_of, samples_of
from varcas.digest import (
    Evidence,
    Section,
    advice,
    batch_rows,
    changes,
    confidence,
    digest,
    facts,
    front_of,
    progression,
    starts_of,
    wanted,
)
from varcas.experiment import Experiment
from varcas.records import TrialRow
from varcas.report import Verdict, recommend


def evidence(rows: list[TrialRow], of: Experiment | None = None, **more: Any) -> Evidence:
    of = of or experiment()
    return Evidence(of, rows, recommend(rows, of), **more)


def section(rows: list[TrialRow], key: str, of: Experiment | None = None, **more: Any) -> Section:
    return {found.key: found for found in digest(evidence(rows, of, **more))}[key]


CONFIRMED = [
    row(None, 100, number=0), row(2, 120, number=1), row(4, 90, number=2), row(8, 130, number=3),
    *confirm(None, 100.0, 101.0, 99.0), *confirm(8, 120.0, 121.0, 119.0),
]  # fmt: skip


def test_steps_are_the_baseline_and_what_beat_all_before_it() -> None:
    steps = progression(evidence(CONFIRMED))
    assert [(name, found.number, status) for name, found, status in steps] == [
        ("baseline", 0, "baseline"), ("improvement 1", 1, "surpassed"), ("improvement 2", 3, "DEPLOY"),
    ]  # fmt: skip
    table = section(CONFIRMED, "progression").tables[0]
    assert [cells[table.columns.index("against the first")] for cells in table.rows] == ["+0.0%", "+20.0%", "+30.0%"]


def test_a_step_that_is_not_to_be_believed_or_misses_the_slo_is_none() -> None:
    rows = [row(None, 100), row(2, 500, valid=False), row(4, 400, slo_met=False, constraints={"ttft_p95_ms": 1.0})]
    assert [name for name, _, _ in progression(evidence(rows, experiment(slo="{ttft_p95_ms: 5}")))] == ["baseline"]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    rows = [row(1, float(y), ttft_p50_ms=float(x), number=i, config_hash=f"{i}") for i, (x, y) in enumerate(points)]

    def beaten(x: int, y: int) -> bool:
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    front = front_of(rows, "ttft_p50_ms", "output_tokens_per_s")
    on_it = {(r.ttft_p50_ms, r.output_tokens_per_s) for r in rows if r.trial_id in front}
    assert on_it == {(x, y) for x, y in points if not beaten(x, y)}


def test_an_overrun_servers_latency_is_on_no_front() -> None:
    rows = [row(1, 900.0, ttft_p50_ms=1.0, saturated=True), row(2, 100.0, ttft_p50_ms=50.0)]
    assert front_of(rows, "ttft_p50_ms", "output_tokens_per_s") == {rows[1].trial_id}


def test_a_batch_curve_is_of_rows_that_differ_in_nothing_else() -> None:
    other = [row(seqs, 50.0, config_json=json.dumps({"dtype": "float", "max_num_seqs": seqs})) for seqs in (1, 2)]
    rows = [*other, *(row(seqs, 10.0 * seqs, ttft_p50_ms=5.0) for seqs in (8, 1, 4))]
    assert [json.loads(found.config_json)["max_num_seqs"] for found in batch_rows(evidence(rows))] == [1, 4, 8]
    assert batch_rows(evidence(other)) == []
    table = section(rows, "batch-size").figures[0].table
    assert table.columns[:4] == ("max_num_seqs", "trial", "output_tokens_per_s", "ttft_p50_ms")
    assert [cells[2] for cells in table.rows] == [10, 40, 80]


def test_latency_curves_are_the_requests_own() -> None:
    row_ = row(None, 100, duration_s=60.0)
    load = load_of(random.Random(1), 500.0)
    found = section([row_], "latency", requests={row_.trial_id: load.records}).figures[0]
    waits = np.sort([1e3 * (r.first_token_s - r.scheduled_s) for r in load.records if r.first_token_s is not None])
    curve = [(p["ms"], p["share"]) for p in found.data if p["latency"] == "time to first token"]
    for ms, share in curve:
        assert share == pytest.approx((waits <= ms + 1e-9).mean(), abs=1e-9)
    assert curve == sorted(curve)
    cells = dict(zip(found.table.columns, found.table.rows[0], strict=True))
    assert cells["p50"] == pytest.approx(waits[int(np.ceil(0.5 * len(waits))) - 1])
    assert cells["never came"] == 0


def test_requests_that_never_came_keep_a_curve_from_its_end() -> None:
    row_ = row(None, 100, duration_s=60.0)
    records = load_of(random.Random(0), 500.0).records
    cut = [dataclasses.replace(r, error="unfinished", end_s=None) if i % 4 == 0 else r for i, r in enumerate(records)]
    found = section([row_], "latency", requests={row_.trial_id: cut}).figures[0]
    assert max(p["share"] for p in found.data) == pytest.approx(0.75)
    assert found.table.rows[0][-1] == len(records) / 4


def test_a_trial_over_time_has_its_samples_and_tokens() -> None:
    row_ = row(None, 100, duration_s=60.0)
    load, samples = load_of(random.Random(0), 500.0), samples_of(random.Random(0))
    made = section([row_], "time", requests={row_.trial_id: load.records}, samples={row_.trial_id: samples})
    data, end_s = made.figures[0].data
    assert end_s == 60
    panels = {point["panel"] for point in data}
    assert {"requests", "KV cache used, %", "GPU power, W", "output tokens/s"} <= panels
    rates = [point["value"] for point in data if point["panel"] == "output tokens/s"]
    tokens = sum(sum(r.token_counts) for r in load.records)
    assert np.mean(rates) * (samples[-1].t_s - samples[0].t_s) == pytest.approx(tokens, rel=0.02)
    assert len(made.figures[0].table.rows) <= 41


def test_failures_stand_by_cause_with_the_logs_last_line() -> None:
    rows = [
        row(None, 100), failed(2, number=5, failure_detail="Traceback\n  frame\nValueError: too small"),
        failed(4, number=6, failure_detail="x"), failed(8, "worker_lost", number=7),
    ]  # fmt: skip
    table = section(rows, "failures").tables[0]
    assert [(cells[0], cells[1], cells[2]) for cells in table.rows] == [
        ("out_of_memory", 2, "5, 6"),
        ("worker_lost", 1, "7"),
    ]
    assert table.rows[0][4] == "ValueError: too small"
    assert [cells[-1] for cells in table.rows] == ["yes", "no: tried again"]


def test_what_was_ruled_out_stands_by_rule() -> None:
    ruled = {
        "state": "infeasible",
        "valid": None,
        "reason_rule": "weights_do_not_fit",
        "failure_detail": "13 > 12 [src]",
    }
    rows = [row(None, 100, audited_rule="some_rule"), row(4, None, **ruled, number=2), row(8, None, **ruled, number=3)]
    found = section(rows, "pruned")
    assert found.tables[0].rows == (("weights_do_not_fit", 2, "2, 3", "max_num_seqs=4", "13 > 12 [src]"),)
    assert found.tables[1].rows[0][:2] == (rows[0].number, "some_rule")


def test_fresh_starts_are_preferred_over_the_search() -> None:
    rows = CONFIRMED
    assert [start.purpose for start in starts_of(rows[3], rows)] == ["confirm"] * 3
    assert starts_of(rows[1], rows) == [rows[1]]
    shown = wanted(rows, experiment(), recommend(rows, experiment()))
    assert [start.arm for start in shown] == ["baseline"] * 3 + ["candidate"] * 3


def test_resolved_settings_stand_side_by_side() -> None:
    rows = [
        row(None, 100, resolved_json='{"a": {"b": 1, "c": 2}}'),
        row(8, 130, resolved_json='{"a": {"b": 1, "c": 3}}'),
    ]
    folded = section(rows, "method").folded
    assert folded[0].columns == ("setting", "baseline", "recommended")
    assert folded[0].rows == (("a.c", "2", "3"),)
    assert len(folded[1].rows) == 2


def test_methods_hold_validity_and_what_is_not_to_be_believed() -> None:
    rows = [row(None, 100, saturated=True), row(8, 130, valid=False, invalid_reasons=["late"], warnings=["odd"])]
    found = section(rows, "method")
    validity = dict(found.tables[1].rows)
    assert (validity["measurements"], validity["to be believed"], validity["with warnings"]) == (2, 1, 1)
    assert found.tables[2].rows[0][2] == "late"


@pytest.mark.parametrize("verdict", Verdict.__args__)  # type: ignore[attr-defined]
def test_each_verdict_has_words(verdict: Verdict) -> None:
    answer = recommend(CONFIRMED, experiment()).model_copy(update={"verdict": verdict})
    assert confidence(answer).endswith(".")
    assert advice(answer).endswith(".")
    assert dict(facts(answer).rows)["winner, mean of fresh starts"] == pytest.approx(120)
    assert changes(answer) == ["max_num_seqs = 8"]


def test_an_empty_and_a_failed_study_still_have_a_page() -> None:
    for rows in ([], [failed(None), failed(8)]):
        assert {found.key for found in digest(evidence(rows))} >= {"method"}
