from __future__ import annotations

import random
from typing import Any

import pytest

from tests.rows import row
from varcas.compare import compare_studies, comparison_text
from varcas.errors import InputError
from varcas.records import TrialRow


def study(name: str, factor: float, *, seed: int, sd: float = 0.01, starts: int = 3, **columns: Any) -> list[TrialRow]:
    rng = random.Random(seed)
    rows = []
    for seqs, base in ((None, 100.0), (2, 150.0), (4, 200.0), (8, 230.0)):
        num = starts if seqs is None else 1
        for _ in range(num):
            rate = base * factor * rng.lognormvariate(0, sd)
            latency = 50.0 / factor * rng.lognormvariate(0, sd)
            purpose, arm = ("confirm", "baseline") if seqs is None else ("search", None)
            named = {"study": name, "purpose": purpose, "arm": arm, "ttft_mean_ms": latency}
            rows.append(row(seqs, rate, **named, **columns))
    return rows


def test_a_slower_version_is_a_regression() -> None:
    found = compare_studies(study("a", 1.0, seed=1), study("b", 0.9, seed=2, engine_version="0.33.0"))
    assert found.regressed
    assert found.changed["engine_version"] == ["0.32.0", "0.33.0"]
    by_metric = {one.metric: one for one in found.paired}
    assert by_metric["output_tokens_per_s"].verdict == "worse"
    assert by_metric["output_tokens_per_s"].ratio == pytest.approx(0.9, rel=0.02)
    assert by_metric["ttft_mean_ms"].verdict == "worse"
    assert found.configurations[0].name == "baseline"
    assert "worse" in comparison_text(found)


def test_a_faster_one_is_none() -> None:
    found = compare_studies(study("a", 1.0, seed=1), study("b", 1.1, seed=2))
    assert not found.regressed
    assert {one.verdict for one in found.paired} == {"better"}


def test_equals_are_called_a_regression_in_less_than_one_in_twenty() -> None:
    calls = [
        compare_studies(study("a", 1.0, seed=2 * n, sd=0.03), study("b", 1.0, seed=2 * n + 1, sd=0.03)).regressed
        for n in range(150)
    ]
    assert sum(calls) / len(calls) <= 0.06


def test_latencies_of_a_saturated_server_are_not_compared() -> None:
    found = compare_studies(study("a", 1.0, seed=1, saturated=True), study("b", 0.5, seed=2, saturated=True))
    assert {one.metric for one in found.paired} == {"output_tokens_per_s"}


def test_what_was_not_to_be_believed_counts_for_nothing() -> None:
    bad = [row(None, 1.0, study="b", valid=False)]
    with pytest.raises(InputError, match="no configuration in common"):
        compare_studies(study("a", 1.0, seed=1), bad)


def test_too_few_starts_are_said() -> None:
    found = compare_studies([row(None, 100.0, study="a")], [row(None, 90.0, study="b")])
    assert found.paired == []
    assert not found.regressed
    assert "nothing can be told" in found.warnings[0]
