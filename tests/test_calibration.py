"""The dynamic roofline against known laws: what is fitted, what it says of itself, and what it never takes in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.rows import row
from varcas import gpus
from varcas.calibration import (
    PRIORS,
    Calibration,
    Key,
    Point,
    Traffic,
    calibrate,
    estimate,
    fit,
    points,
    prior,
)
from varcas.memory import Floats, Serve, settings
from varcas.model import ModelSpec, from_config
from varcas.records import RequestRecord, TrialRow
from varcas.roofline import decode, prefill
from varcas.steptime import PARAMETERS, Efficiency, StepTimes, kernel_of

LAW = limits(deadline=None, max_examples=40)
L4, T4, A10G = gpus.gpu("L4"), gpus.gpu("T4"), gpus.gpu("A10G")
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip
SEVEN = from_config(LLAMA, "seven")
ONE = from_config(LLAMA | {"hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4}, "one")
AWQ = from_config(LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "awq")
MIXTRAL = from_config(
    LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8}
)
WINDOWED = from_config(LLAMA | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 300})
EAGER = {"dtype": "half", "max_num_seqs": 64, "max_model_len": 2048, "enforce_eager": True}
SERVE = settings(EAGER, SEVEN, L4)
TRUTH = Efficiency(8e-3, 1e-4, 0.80, 0.40, 0.60, 1.5e-2)
KEY = Key("L4", "none float16 eager", "0.32.0")


# ---- the law of a step


@pytest.mark.parametrize("model", [SEVEN, AWQ, MIXTRAL, WINDOWED])
@LAW
@given(batch=st.integers(1, 64), context=st.integers(0, 1500))
def test_a_decode_step_is_the_static_rooflines(model: ModelSpec, batch: int, context: int) -> None:
    flops, moved = StepTimes.of(model, L4, SERVE).work(batch, context)
    step = decode(model, SERVE, batch, context, routing="uniform")
    assert flops == pytest.approx(step.flops, rel=1e-9)
    assert moved == pytest.approx(step.bytes, rel=1e-9)


@pytest.mark.parametrize("model", [SEVEN, AWQ, MIXTRAL, WINDOWED])
@LAW
@given(tokens=st.integers(1, 1000), cached=st.integers(0, 800))
def test_a_prefill_is_the_static_rooflines(model: ModelSpec, tokens: int, cached: int) -> None:
    flops, moved = StepTimes.of(model, L4, SERVE).work(0, 0, tokens, cached)
    step = prefill(model, SERVE, 1, tokens, cached=cached, routing="uniform")
    assert flops == pytest.approx(step.flops, rel=1e-9)
    assert moved == pytest.approx(step.bytes, rel=1e-9)


def test_a_mixed_step_reads_the_weights_once() -> None:
    times = StepTimes.of(SEVEN, L4, SERVE)
    (flops, moved), (own, read), (filling, also) = times.work(8, 300, 200), times.work(8, 300), times.work(0, 0, 200)
    assert flops == pytest.approx(own + filling)
    weights = read + also - moved
    assert weights == pytest.approx(SEVEN.weight_bytes("half") - 32000 * 4096 * 2, rel=1e-3)  # all but the embedding


@LAW
@given(
    batch=st.floats(1, 64), context=st.floats(0, 1500), tokens=st.floats(0, 1000), more=st.floats(1, 50),
    overlaps=st.booleans(),
)  # fmt: skip
def test_more_work_never_takes_less(batch: float, context: float, tokens: float, more: float, overlaps: bool) -> None:
    times, law = StepTimes.of(SEVEN, L4, SERVE), replace(TRUTH, overlaps=overlaps)
    least = times.seconds(law, batch, context, tokens) * (1 - 1e-12)
    assert times.seconds(law, batch + more, context, tokens) >= least
    assert times.seconds(law, batch, context + more, tokens) >= least
    assert times.seconds(law, batch, context, tokens + more) >= least


def test_steps_are_vectorised_over_batch_context_and_prompts() -> None:
    times = StepTimes.of(SEVEN, L4, SERVE)
    batch, context, tokens = np.array([1, 8, 32]), np.array([[100], [900]]), 64
    both = times.seconds(TRUTH, batch, context, tokens)
    assert both.shape == (2, 3)
    assert both[1, 2] == pytest.approx(float(times.seconds(TRUTH, 32, 900, 64)))


def test_at_full_efficiency_a_step_is_no_faster_than_its_bound() -> None:
    ideal = Efficiency(0, 0, 1, 1, 1, 0, overlaps=True)
    for batch in (1, 16, 200):
        bound = decode(SEVEN, SERVE, batch, 500).seconds(L4)
        assert StepTimes.of(SEVEN, L4, SERVE).seconds(ideal, batch, 500) >= bound * (1 - 1e-9)


@pytest.mark.parametrize(
    ("version", "flag", "kernel"),
    [
        ("0.15.1", "awq", "awq-plain float16 eager"),
        ("0.15.1", None, "awq-int4 float16 eager"),
        ("0.24.0", "awq", "awq-int4 float16 eager"),
        (None, "awq", "awq-int4 float16 eager"),
    ],
)
def test_only_an_old_vllm_that_is_told_so_runs_the_plain_awq_kernel(
    version: str | None, flag: str | None, kernel: str
) -> None:
    assert kernel_of(AWQ, SERVE, version, flag) == kernel


def test_the_plain_awq_kernel_takes_what_was_published_on_a_t4() -> None:
    known = prior(T4, "awq-plain float16 eager")
    steps = StepTimes.of(AWQ, T4, SERVE, "awq-plain float16 eager").parts(np.array([8, 16, 40]), 0)
    eight, sixteen, forty = (steps.matrices_s / known.median.compute_frac).tolist()
    assert eight == pytest.approx(sixteen, rel=0.01)
    assert 0.037 <= sixteen <= 0.041
    assert 0.105 <= forty <= 0.135  # published: 135 ms for the whole step of 40 sequences


# ---- fits to points


def made_points(
    rng: np.random.Generator,
    truth: Efficiency,
    starts: int,
    noise: float = 0.04,
    models: Sequence[ModelSpec] = (SEVEN, ONE),
) -> list[Point]:
    """Steps and first tokens of some starts: a common error of each start, and a smaller one of each point."""
    found = []
    tables = [StepTimes.of(model, L4, SERVE) for model in models]
    for start in range(starts):
        model, times = models[start % len(models)], tables[start % len(models)]
        common, top = rng.normal(0, noise), rng.uniform(8, 60)
        steps = [("decode", top * share, 0, 0) for share in (0.2, 0.5, 1.0)]
        steps += [("mixed", top / 2, 400, 0), ("mixed", top, 60, 0), ("prefill", 0, 150, 1), ("prefill", 0, 900, 1)]
        for kind, batch, tokens, alone in steps:
            context = rng.uniform(200, 1200)
            parts = times.parts(batch, context, tokens, requests=alone)
            seconds = float(parts.seconds(truth)) * math.exp(common + rng.normal(0, noise / 2))
            flops, moved = (float(x) for x in times.work(batch, context, tokens))
            found.append(
                Point(
                    kind, batch, context, tokens, 1, seconds, 0.01,  # type: ignore[arg-type]
                    f"t{start}", "s", start, f"server{start}", model.name, KEY, flops, moved, parts,
                )
            )  # fmt: skip
    return found


KNOWN = PRIORS["eager"]
SEEDS = 20


@pytest.mark.parametrize("overlaps", [False, True])
def test_intervals_hold_the_truth(overlaps: bool) -> None:
    truth, held = replace(TRUTH, overlaps=overlaps), dict.fromkeys(PARAMETERS, 0)
    for seed in range(SEEDS):
        found = fit(made_points(np.random.default_rng(seed), truth, starts=8), KNOWN)
        for name in PARAMETERS:
            figure = found.figure(name)
            assert figure.lo is not None
            assert figure.hi is not None
            held[name] += figure.lo <= getattr(truth, name) <= figure.hi
    assert min(held.values()) >= 0.9 * SEEDS, held


def test_many_starts_recover_the_law() -> None:
    found = fit(made_points(np.random.default_rng(0), TRUTH, starts=40), KNOWN)
    assert not found.efficiency.overlaps
    assert found.efficiency.weights_frac == pytest.approx(TRUTH.weights_frac, rel=0.1)
    assert found.efficiency.attention_frac == pytest.approx(TRUTH.attention_frac, rel=0.15)
    assert found.efficiency.compute_frac == pytest.approx(TRUTH.compute_frac, rel=0.1)
    assert found.efficiency.overhead_s == pytest.approx(TRUTH.overhead_s, rel=0.25)
    assert min(found.told[name] for name in ("weights_frac", "attention_frac", "compute_frac", "overhead_s")) > 0.8


def test_a_host_that_runs_ahead_is_told_from_one_that_does_not() -> None:
    launching = replace(TRUTH, overhead_s=0.04, overlaps=True)
    found = fit(made_points(np.random.default_rng(1), launching, starts=6), KNOWN)
    assert found.efficiency.overlaps


def test_the_error_left_out_is_of_the_size_of_the_noise() -> None:
    found = fit(made_points(np.random.default_rng(2), TRUTH, starts=10, noise=0.05), KNOWN)
    assert found.left_out is not None
    assert found.left_out.starts == 10
    assert 0.01 < found.left_out.median < 0.10
    assert found.left_out.median >= found.in_sample.median * 0.9
    assert f"{found.left_out.median:.1%}" in found.describe()


def test_one_start_has_no_interval_and_says_so() -> None:
    found = fit(made_points(np.random.default_rng(3), TRUTH, starts=1), KNOWN)
    assert found.figure("weights_frac").lo is None
    assert found.left_out is None
    assert "one trial, no interval" in found.describe()
    told = estimate(Calibration({KEY: found}), SEVEN, L4, SERVE, Traffic(400, 200, 0.5), engine_version="0.32.0")
    assert told.basis == "measured"
    assert told.tpot_s.lo is None
    assert told.tokens_per_s.lo is None


def test_what_points_cannot_tell_stays_as_the_prior_has_it() -> None:
    decoding = [p for p in made_points(np.random.default_rng(4), TRUTH, starts=3) if p.kind == "decode"]
    found = fit(decoding, KNOWN)
    assert found.told["request_s"] == pytest.approx(0, abs=1e-6)
    assert found.efficiency.request_s == pytest.approx(KNOWN.median.request_s, rel=1e-3)
    figure = found.figure("request_s")
    assert figure.hi is not None
    assert figure.hi == pytest.approx(KNOWN.median.request_s * KNOWN.factor.request_s**1.96, rel=0.01)


# ---- rows to points


def record(index: int, sent_s: float, prompt: int, tokens_s: Sequence[float]) -> RequestRecord:
    return RequestRecord(
        index=index,
        scheduled_s=sent_s,
        sent_s=sent_s,
        first_token_s=tokens_s[0],
        last_token_s=tokens_s[-1],
        end_s=tokens_s[-1],
        scheduled_prompt_tokens=prompt,
        scheduled_output_tokens=len(tokens_s),
        prompt_tokens=prompt,
        output_tokens=len(tokens_s),
        token_offsets_s=tuple(at - sent_s for at in tokens_s),
        token_counts=(1,) * len(tokens_s),
        finish_reason="length",
        error=None,
        http_status=200,
        conversation=index,
        turn=0,
    )


def load(
    truth: Efficiency, model: ModelSpec, rate: float, seed: int, duration_s: float = 60.0, start_error: float = 0.02
) -> list[RequestRecord]:
    """A server that batches continuously, with steps of a known law: what arrives is in the next step."""
    rng, times = np.random.default_rng(seed), StepTimes.of(model, L4, SERVE)
    law_error = math.exp(rng.normal(0, start_error))
    due = np.cumsum(rng.exponential(1 / rate, int(rate * duration_s)))
    prompts, outputs = rng.integers(50, 500, len(due)), rng.integers(20, 120, len(due))
    arrived = due + truth.request_s
    tokens: dict[int, list[float]] = {}
    running: list[int] = []
    clock, coming = 0.0, 0
    while running or coming < len(due):
        if not running:
            clock = max(clock, float(arrived[coming]))
        new = []
        while coming < len(due) and arrived[coming] <= clock:
            new.append(coming)
            coming += 1
        context = float(np.mean([prompts[i] + len(tokens[i]) for i in running])) if running else 0.0
        filled = float(sum(prompts[i] for i in new))
        step = times.seconds(truth, len(running), context, filled, 0, max(len(new), 1))
        clock += float(step) * law_error * math.exp(rng.normal(0, 0.02))
        for i in (*running, *new):
            tokens.setdefault(i, []).append(clock + rng.uniform(0, 2e-4))
        running = [i for i in (*running, *new) if len(tokens[i]) < outputs[i]]
    return [record(i, float(due[i]), int(prompts[i]), tokens[i]) for i in range(len(due))]


def measured(number: int, flags: Mapping[str, Any] = EAGER, **columns: Any) -> TrialRow:
    fixed = {"gpu_name": "NVIDIA L4", "duration_s": 60.0, "saturated": False, "config_json": json.dumps(dict(flags))}
    return row(8, number=number, **fixed | columns)


def test_steps_are_read_off_the_arrival_of_tokens() -> None:
    """Two sequences, a token every 20 ms, 30 ms in the step that takes the second one's prompt in."""
    first = [0.10 + 0.02 * k for k in range(50)]
    first += [first[-1] + 0.03 + 0.02 * k for k in range(60)]
    joined = first[50]
    second = [joined + 0.02 * k + 1e-4 for k in range(60)]
    records = [record(0, 0.0, 100, first), record(1, joined - 0.025, 300, second)]
    found, left = points([measured(1)], {"m": SEVEN}, requests=lambda _: records)
    assert not left
    alone, both = (p for p in found if p.kind == "decode")
    assert (alone.batch, both.batch) == (1, 2)
    assert alone.seconds == pytest.approx(0.02, rel=1e-3)
    assert both.seconds == pytest.approx(0.02, rel=1e-3)
    assert alone.context == pytest.approx(100 + 25, abs=2)
    assert both.bytes_per_s == pytest.approx(both.bytes / 0.02, rel=1e-3)
    assert both.intensity == pytest.approx(float(decode(SEVEN, SERVE, 2, both.context).intensity), rel=1e-6)


def store_of(rates: Sequence[float], model: ModelSpec = SEVEN) -> tuple[list[TrialRow], dict[str, list[RequestRecord]]]:
    rows = [measured(number, duration_s=120.0) for number in range(1, len(rates) + 1)]
    pairs = zip(rows, rates, strict=True)
    return rows, {one.trial_id: load(TRUTH, model, rate, one.number, duration_s=120) for one, rate in pairs}


def tpot_s(records: Sequence[RequestRecord]) -> float:
    times = [
        (r.last_token_s - r.first_token_s) / (r.output_tokens - 1)
        for r in records
        if r.last_token_s is not None and r.first_token_s is not None
    ]
    return float(np.mean(times))


def test_a_stores_requests_calibrate_and_predict_a_rate_that_was_not_measured() -> None:
    rows, records = store_of([0.15, 1.0, 2.0, 3.0])
    found = calibrate(rows, {"m": SEVEN}, requests=records.__getitem__)
    fitted = found.fits[KEY]
    assert {p.kind for p in fitted.points} == {"decode", "mixed", "prefill"}
    assert fitted.left_out is not None
    assert fitted.left_out.worst < 0.10
    assert fitted.efficiency.request_s == pytest.approx(TRUTH.request_s, rel=0.6)
    unseen = load(TRUTH, SEVEN, 1.5, seed=99)
    told = estimate(found, SEVEN, L4, SERVE, Traffic(275, 70, 1.5), engine_version="0.32.0")
    assert told.tpot_s.value == pytest.approx(tpot_s(unseen), rel=0.10)
    assert told.tpot_s.lo is not None
    assert told.tpot_s.hi is not None
    assert told.tpot_s.lo < tpot_s(unseen) < told.tpot_s.hi
    ttft = float(np.mean([r.first_token_s - r.sent_s for r in unseen if r.first_token_s and r.sent_s is not None]))
    assert told.ttft_s.value == pytest.approx(ttft, rel=0.20)
    assert told.tokens_per_s.value == pytest.approx(1.5 * 70)
    assert told.beyond == ("model: seven",)  # rows call it m


def test_a_row_without_requests_gives_one_point_by_littles_law() -> None:
    columns = {
        "tpot_mean_ms": 50.0, "output_tokens_per_s": 400.0, "prompt_tokens_per_s": 800.0, "request_rate_rps": 4.0,
    }  # fmt: skip
    found, _ = points([measured(1, **columns)], {"m": SEVEN})
    (mean,) = found
    assert (mean.kind, mean.batch, mean.seconds) == ("mean", 20.0, 0.05)
    assert mean.context == pytest.approx(200 + 50)
    assert mean.prefill_tokens == pytest.approx(40)


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"simulated": True}, "simulated"),
    ({"state": "failed"}, "failed"),
    ({"valid": False}, "invalid"),
    ({"valid": None}, "invalid"),
    ({"saturated": True}, "saturated"),
    ({"measurement_version": 1}, "measurement version 1"),
    ({"engine": "openai"}, "engine openai"),
    ({"engine_version": None}, "no engine version"),
    ({"preemptions": 3}, "preempted"),
    ({"flags": EAGER | {"speculative_config": {"method": "ngram"}}}, "speculative_config"),
    ({"flags": EAGER | {"data_parallel_size": 2}}, "data_parallel_size"),
    ({"flags": EAGER | {"dtype": "float8"}}, "float8"),
    ({"gpu_name": "Voodoo 2"}, "not in gpus.toml"),
    ({"gpu_name": None}, "CPU"),
    ({"model": "other"}, "not described"),
]


@pytest.mark.parametrize(("columns", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_a_row_that_tells_nothing_is_left_out_with_the_reason(columns: dict[str, Any], reason: str) -> None:
    flags = columns.pop("flags", EAGER)
    good, bad = measured(1), measured(2, flags, **columns)
    records = load(TRUTH, SEVEN, 1.0, 1, duration_s=20)
    found = calibrate([good, bad], {"m": SEVEN}, requests=lambda _: records)
    ((trial_id, said),) = found.excluded
    assert trial_id == bad.trial_id
    assert reason in said
    assert found.fits[KEY].starts == 1
    columns["flags"] = flags


def test_simulated_rows_are_taken_alone_and_labelled() -> None:
    real, made = measured(1), measured(2, simulated=True)
    records = load(TRUTH, SEVEN, 1.0, 1, duration_s=20)
    found = calibrate([real, made], {"m": SEVEN}, requests=lambda _: records, simulated=True)
    assert found.fits[KEY].starts == 1
    assert found.excluded == ((real.trial_id, "measured, not simulated"),)
    assert found.describe().startswith("SIMULATED")
    assert estimate(found, SEVEN, L4, SERVE, Traffic(275, 70, 1.0)).simulated


def test_versions_and_kernels_are_fitted_apart() -> None:
    rows = [measured(1), measured(2, engine_version="0.24.0"), measured(3, EAGER | {"enforce_eager": False})]
    records = load(TRUTH, SEVEN, 1.0, 1, duration_s=20)
    found = calibrate(rows, {"m": SEVEN}, requests=lambda _: records)
    assert set(found.fits) == {
        KEY, replace(KEY, engine_version="0.24.0"), replace(KEY, kernel="none float16 graphs"),
    }  # fmt: skip


# ---- estimates


def fitted() -> Calibration:
    return Calibration({KEY: fit(made_points(np.random.default_rng(5), TRUTH, starts=10), KNOWN)})


FITTED = fitted()
BUSY = Traffic(500, 200, 1.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"gpu": A10G}, "GPU: A10G"),
        ({"engine_version": "0.33.0"}, "version"),
        ({"serve": settings(EAGER | {"enforce_eager": False}, SEVEN, L4)}, "kernels"),
        ({"model": from_config(LLAMA, "seven-b")}, "model"),
        ({"serve": replace(SERVE, max_num_seqs=256), "traffic": Traffic(500, 200, None), "kv_tokens": 1e6}, "batch"),
        ({"traffic": Traffic(1800, 200, 0.2)}, "context"),
        ({"traffic": Traffic(2, 900, 0.05)}, "prompt"),
    ],
)
def test_an_estimate_says_where_it_leaves_what_was_measured(change: dict[str, Any], word: str | None) -> None:
    asked: dict[str, Any] = {
        "model": SEVEN, "gpu": L4, "serve": SERVE, "traffic": BUSY, "engine_version": "0.32.0",
    } | change  # fmt: skip
    told = estimate(FITTED, **asked)
    assert told.extrapolates == (word is not None), told.beyond
    if word:
        assert any(said.startswith(word) for said in told.beyond), told.beyond


@pytest.mark.parametrize("gpu", [T4, L4, A10G])
def test_without_rows_an_estimate_is_a_labelled_prior(gpu: gpus.GpuSpec) -> None:
    told = estimate(Calibration(), AWQ, gpu, settings(EAGER, AWQ, gpu), BUSY)
    assert (told.basis, told.extrapolates) == ("prior", True)
    assert told.tpot_s.lo is not None
    assert told.tpot_s.hi is not None
    assert told.tpot_s.lo < told.tpot_s.value < told.tpot_s.hi
    assert ("24 of 65" in told.source) == (gpu is T4)


def test_the_order_of_configurations_is_the_laws() -> None:
    seqs = [1, 2, 4, 8, 16, 32, 64]
    serves = [replace(SERVE, max_num_seqs=n) for n in seqs]
    truth = Calibration({KEY: replace(FITTED.fits[KEY], efficiency=TRUTH)})
    traffic = Traffic(400, 200)

    def rates(calibration: Calibration) -> Floats:
        told = [estimate(calibration, model, L4, one, traffic) for model in (SEVEN, ONE) for one in serves]
        return np.array([one.tokens_per_s.value for one in told])

    law, guess = rates(truth), rates(FITTED)
    apart = np.abs(np.log(law[:, None] / law[None, :])) > 0.05
    agree = np.sign(law[:, None] - law[None, :]) == np.sign(guess[:, None] - guess[None, :])
    assert agree[apart].all()


def test_beyond_capacity_ttft_has_no_end_and_tokens_are_capped() -> None:
    told = estimate(FITTED, SEVEN, L4, replace(SERVE, max_num_seqs=4), replace(BUSY, rate_rps=50.0))
    closed = estimate(FITTED, SEVEN, L4, replace(SERVE, max_num_seqs=4), replace(BUSY, rate_rps=None))
    assert told.saturated
    assert told.batch == 4
    assert math.isinf(told.ttft_s.value)
    assert told.tokens_per_s.value == pytest.approx(closed.tokens_per_s.value)
    assert told.tokens_per_s.value < 50 * 200


def test_a_small_kv_cache_limits_the_batch() -> None:
    told = estimate(FITTED, SEVEN, L4, SERVE, Traffic(500, 200), kv_tokens=6000)
    assert told.batch == pytest.approx(10)


@LAW
@given(rate=st.floats(0.01, 20), more=st.floats(1.0, 3.0), seqs=st.sampled_from([1, 4, 32, 64]))
def test_more_traffic_is_never_faster(rate: float, more: float, seqs: int) -> None:
    serve = replace(SERVE, max_num_seqs=seqs)
    less, then = (estimate(FITTED, SEVEN, L4, serve, Traffic(300, 100, r)) for r in (rate, rate * more))
    assert then.tpot_s.value >= less.tpot_s.value * (1 - 1e-9)
    assert then.ttft_s.value >= less.ttft_s.value * (1 - 1e-9)
    assert then.tokens_per_s.value >= less.tokens_per_s.value * (1 - 1e-9)
    alone = float(StepTimes.of(SEVEN, L4, serve).seconds(FITTED.fits[KEY].efficiency, 1, 350))
    assert less.tpot_s.value >= alone * (1 - 1e-9)


def test_a_memory_that_holds_nothing_still_gives_an_answer() -> None:
    told = estimate(Calibration(), SEVEN, T4, Serve(dtype="half"), BUSY)
    assert told.batch >= 1
    assert math.isfinite(told.tpot_s.value)
