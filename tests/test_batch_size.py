"""The curve from one server start: knee and pick by rule, the command end to end, what it does not measure again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import rows as imagined
from tests.e2e.sweeps import write_experiment
from varcas.batch_size import BatchSizeCurve, batch_size_search, confirmed, knee, pick, told_apart
from varcas.errors import InputError
from varcas.experiment import Hardware, Objective, load_experiment, parse_experiment
from varcas.pictures import draw_curve
from varcas.pool import Pool
from varcas.records import TrialRow
from varcas.results import Results

TOKENS = Objective(maximize="output_tokens_per_s")
TPOT = Objective(minimize="tpot_mean_ms")


def row(value: int, tokens: float, half: float = 0.0, **columns: Any) -> TrialRow:
    ends = {"lo": {"output_tokens_per_s": tokens - half}, "hi": {"output_tokens_per_s": tokens + half}}
    return imagined.row(value, tokens, number=value, **ends | columns)


def rows(*points: tuple[int, float]) -> dict[int, TrialRow]:
    return {value: row(value, tokens) for value, tokens in points}


def test_the_knee_is_the_smallest_value_that_the_best_does_not_beat() -> None:
    assert knee(rows((1, 100), (2, 190), (4, 340), (8, 500), (16, 510), (32, 495))) == 8
    assert knee(rows((1, 100), (2, 99))) == 1
    assert knee(rows((4, 1.0), (8, 2.0))) == 8
    assert knee({}) is None


def test_noise_moves_the_knee_down() -> None:
    sharp = {1: row(1, 90.0, 1.0), 2: row(2, 100.0, 1.0)}
    noisy = {1: row(1, 90.0, 8.0), 2: row(2, 100.0, 8.0)}
    assert (knee(sharp), knee(noisy)) == (2, 1)


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=9), st.floats(1.05, 4))
def test_a_knee_is_never_beaten_and_scales_do_not_matter(tokens: list[float], scale: float) -> None:
    curve = rows(*((2**i, found) for i, found in enumerate(tokens)))
    found = knee(curve)
    assert found is not None
    best = max(curve.values(), key=lambda r: r.output_tokens_per_s or 0)
    assert best is curve[found] or not told_apart(best, curve[found], TOKENS)
    assert all(told_apart(best, curve[v], TOKENS) for v in curve if v < found)
    scaled = rows(*((2**i, scale * one) for i, one in enumerate(tokens)))
    assert knee(scaled) == found or scale * max(tokens) > 1e300


def test_the_pick_meets_the_slo_and_is_measured_whole() -> None:
    found = [
        row(1, 100.0, slo_met=True),
        row(8, 500.0, slo_met=True),
        row(16, 900.0, slo_met=False),
        row(32, 950.0, slo_met=True, valid=False),
        row(64, 990.0, state="failed"),
    ]
    assert pick(found, TOKENS) is found[1]
    assert pick(found[2:], TOKENS) is None


def test_a_latency_is_picked_the_other_way_and_never_of_a_server_that_was_overrun() -> None:
    found = [
        row(1, 1.0, tpot_mean_ms=5.0, saturated=True),
        row(4, 1.0, tpot_mean_ms=9.0),
        row(8, 1.0, tpot_mean_ms=12.0),
    ]
    assert pick(found, TPOT) is found[1]


def test_fresh_starts_give_an_interval_over_starts() -> None:
    live = row(8, 105.0)
    found = confirmed(live, [row(8, x) for x in (99.0, 100.0, 101.0)], TOKENS)
    assert found is not None
    assert found.mean == pytest.approx(100)
    assert (found.lo, found.hi) == (pytest.approx(100 - 4.303 / 3**0.5, abs=1e-3), pytest.approx(102.484, abs=1e-3))
    assert found.live_ratio == pytest.approx(1.05)
    single = confirmed(live, [row(8, 99.0)], TOKENS)
    assert single is not None
    assert single.lo is None
    assert confirmed(live, [], TOKENS) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": [0, 2]}, "--values: 0: must be positive"),
        ({"flag": "block_size"}, "--flag: 'block_size'"),
    ],
)
def test_what_cannot_be_swept_is_refused(options: dict[str, Any], words: str) -> None:
    experiment = parse_experiment("name: t\nmodel: m\nworkload: {profile: chat-short, rate_rps: 1}\n")
    with pytest.raises(InputError, match=words):
        batch_size_search(experiment, **options)


WORKLOAD = {
    "profile": "chat-short",
    "rate_rps": 40,
    "duration_s": 1.5,
    "warmup_s": 0.2,
    "max_drain_s": 0.3,
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One local Ray, which every curve here joins."""
    with Pool(Hardware(gpu="cpu"), num_cpus=2):
        yield


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_curve_comes_from_one_server_and_nothing_is_measured_twice(
    tmp_path: Path, model_dir: Path, ray: None
) -> None:
    path = write_experiment(tmp_path, model_dir, "--itl-ms 4 --ttft-ms 4", workload=WORKLOAD,
                            study={"repeats": 1, "trials": 1}, space={}, baseline={})  # fmt: skip
    curve = batch_size_search(load_experiment(path), [1, 2, 8])
    assert [point.value for point in curve.points] == [1, 2, 8]
    assert curve.starts == 1
    assert all(point.measured_live for point in curve.points)
    tokens = [point.output_tokens_per_s or 0 for point in curve.points]
    assert tokens[0] * 1.5 < tokens[1]
    assert tokens[1] * 1.5 < tokens[2]
    assert (curve.pick, curve.knee) == (8, 8)
    assert curve.points[0].deploy == {"max_num_seqs": 8, "max_num_active_seqs": 1}
    assert curve.deploy == {"max_num_seqs": 8}
    assert "scheduler-cls" not in (curve.command or "")
    assert "<svg" in draw_curve(curve, tmp_path / "curve.svg").read_text()

    again = batch_size_search(load_experiment(path), [1, 2, 4, 8], confirm=True)
    assert again.starts == 2  # one for the new value, one to confirm
    old = [point.number for point in again.points if point.value != 4]
    assert old == [point.number for point in curve.points]
    assert again.confirmed is not None
    assert len(again.confirmed.values) == 1
    stored = Results(tmp_path / "results").trials()
    assert len({row.trial_id for row in stored}) == len(stored) == 5
    assert [row.purpose for row in stored] == ["batch_size"] * 5
    assert [row.measured_live for row in stored] == [True] * 4 + [False]
    assert len({row.server_id for row in stored}) == 3
    advice = Results(tmp_path / "results").recommend()
    assert (advice.verdict, advice.counts) == ("no_answer", {})  # no row of a search


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_server_that_takes_no_limits_gets_a_start_for_each_value(tmp_path: Path, model_dir: Path, ray: None) -> None:
    path = write_experiment(tmp_path, model_dir, "--itl-ms 4 --ttft-ms 4 --lacks-limits", workload=WORKLOAD,
                            space={}, baseline={})  # fmt: skip
    curve = batch_size_search(load_experiment(path), [1, 4])
    assert curve.starts == 3
    assert not any(point.measured_live for point in curve.points)
    assert curve.points[1].deploy == {"max_num_seqs": 4}
    assert "its scheduler has no max_num_scheduled_tokens" in " ".join(curve.notes)


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_what_vllm_refuses_and_what_fails_is_told_and_the_rest_is_measured(
    tmp_path: Path, model_dir: Path, ray: None
) -> None:
    serve = {"enable_chunked_prefill": False, "max_model_len": 1024}
    path = write_experiment(tmp_path, model_dir, workload=WORKLOAD, space={}, baseline={}, serve=serve)
    curve = batch_size_search(load_experiment(path), [512, 1024, 2048], flag="max_num_batched_tokens")
    assert [point.state for point in curve.points] == ["infeasible", "complete", "complete"]
    assert "max_num_batched_tokens (512) is smaller than max_model_len" in (curve.points[0].failure or "")
    assert curve.points[1].deploy["max_num_scheduled_tokens"] == 1024
    assert curve.pick == 1024  # the scripted server is as fast with both: the smaller one


def test_a_picture_needs_a_format(tmp_path: Path) -> None:
    curve = BatchSizeCurve(
        study="t", flag="max_num_seqs", model="m", engine_version=None, gpu=None, objective="output_tokens_per_s",
        slo={}, points=[], knee=None, pick=None, pick_value=None, pick_lo=None, pick_hi=None, confirmed=None,
        deploy=None, command=None, starts=0, wall_s=0.0, notes=[],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"curve.jpg: its suffix says no format"):
        draw_curve(curve, tmp_path / "curve.jpg")
