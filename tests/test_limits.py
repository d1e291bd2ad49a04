"""`varcas roofline`: figures worked by hand, the seed's own, kinds of answer, exit codes, where models come from."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import varcas
from tests.rows import row
from varcas import gpus, known
from varcas.cli import app, run
from varcas.errors import InputError
from varcas.experiment import Experiment, load_experiment, parse_experiment
from varcas.limits import Lengths, Plan, batch_at_most, roofline_report, tokens_per_s
from varcas.limits_answer import Best, GpuRoofline, Point, Roofline
from varcas.limits_text import number, share
from varcas.memory import Serve
from varcas.model import describe
from varcas.roofline import bounds
from varcas.store import Store

ROOT = Path(__file__).parents[1]
SEED = ROOT / "experiments" / "llama2_7b_awq_t4.yaml"
CONFIGS = Path(varcas.__file__).parent / "configs"
AWQ, HALF, T4 = describe(CONFIGS / "llama-2-7b-awq"), Serve(dtype="half"), gpus.gpu("T4")


def experiment(**changes: Any) -> Experiment:
    data: dict[str, Any] = {
        "name": "t",
        "model": "TheBloke/Llama-2-7B-AWQ",
        "hardware": {"gpu": "T4"},
        "serve": {"dtype": "half", "max_model_len": 2048, "quantization": "awq", "gpu_memory_utilization": 0.9},
        "space": {"max_num_seqs": {"choices": [1, 8, 40]}},
        "workload": {"profile": "chat-medium", "rate_rps": 5, "duration_s": 60},
        "results": "/nonexistent",
    }
    return parse_experiment(json.dumps(data | changes))


Said = tuple[int, str, str]


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Said:
    """Exit code, stdout and stderr of `varcas roofline`, in this process."""
    capsys.readouterr()
    ended: list[Any] = []
    words = ["roofline", *map(str, arguments)]
    code = run(lambda: ended.append(app(words, prog_name="varcas", standalone_mode=False)))
    out, err = capsys.readouterr()
    return code or (ended[0] if ended else 0) or 0, out, err


@pytest.fixture(scope="module")
def seed() -> GpuRoofline:
    """The seed's case with the numbers of docs/roofline.md's command."""
    answer = roofline_report(
        load_experiment(SEED), ["T4"], engine_version="0.32.0", batches=[1, 8, 16, 40], contexts=[300, 2048],
        prompts=[160, 2048],
    )  # fmt: skip
    return answer.gpus[0]


def point(points: list[Point], batch: int, tokens: int) -> Point:
    return next(found for found in points if (found.batch, found.tokens) == (batch, tokens))


# ---- the seed's figures


def test_the_seeds_reading(seed: GpuRoofline) -> None:
    one = point(seed.decode, 1, 2048)
    assert seed.ridge == pytest.approx(65e12 / 320e9)
    assert one.intensity == pytest.approx(3.04, abs=0.005)
    assert one.utilisation == pytest.approx(3.04 / 203.1, rel=0.002)
    assert one.bound == "memory"
    assert [found.intensity for found in seed.prefill_unfused] == pytest.approx([149, 1205], abs=0.5)
    assert [found.bound for found in seed.prefill_unfused] == ["memory", "compute"], "150 is below the ridge"
    assert [found.intensity for found in seed.prefill] == pytest.approx([560, 5856], abs=0.5)
    assert [found.batch for found in seed.compute_bound] == [None, None]


def test_operator_classes_sum_to_the_step(seed: GpuRoofline) -> None:
    parts = [part for part in seed.classes if (part.phase, part.batch, part.tokens) == ("decode", 1, 2048)]
    assert {part.operators: round(part.bytes / 1e6) for part in parts} == {
        "attention_projections": 1116, "attention_scores": 1074, "mlp": 2249, "logits": 262, "other": 1,
    }  # fmt: skip
    whole = point(seed.decode, 1, 2048)
    assert sum(part.bytes for part in parts) == pytest.approx(whole.bytes)
    assert sum(part.flops for part in parts) == pytest.approx(whole.flops)


def test_memory_adds_up(seed: GpuRoofline) -> None:
    stack = seed.memory
    assert stack.verdict == "fits"
    assert stack.weights / 2**30 == pytest.approx(3.67, abs=0.005)
    assert stack.kv_bytes_per_token == 2 * 32 * 32 * 128 * 2
    peak = max(stack.activations, stack.logits)
    assert stack.weights + peak + stack.graphs + stack.overhead + stack.kv_cache == pytest.approx(stack.budget, abs=8)
    assert stack.budget + stack.rest == pytest.approx(stack.total, abs=8)
    assert stack.kv_tokens == stack.kv_cache // (16 * stack.kv_bytes_per_token) * 16
    assert stack.kv_tokens < stack.kv_tokens_at_most
    labels = [of.label for of in seed.memory_of]
    assert labels[0] == "baseline"
    assert "max_num_seqs=256" not in labels, "that is the baseline's default"
    assert {of.label: of.refused for of in seed.memory_of}["kv_cache_dtype=fp8"] == "cache_type_without_units"


def test_the_seeds_space(seed: GpuRoofline) -> None:
    pruned = seed.pruned
    assert sum(found.count for found in pruned.hard) == pruned.refused < pruned.judged
    assert [found.count for found in pruned.hard] == sorted((found.count for found in pruned.hard), reverse=True)
    lengths = next(found for found in pruned.hard if found.rule == "tokens_below_length")
    assert lengths.flags["enable_chunked_prefill"] is False
    fp8 = next(found for found in pruned.hard if found.rule == "cache_type_without_units")
    assert fp8.flags["kv_cache_dtype"] == "fp8"
    assert "7.5" in fp8.message
    assert "triton_attn.py" in fp8.source
    assert fp8.share == fp8.count / pruned.judged
    assert pruned.baseline is None
    assert pruned.nearest is None


def test_speculation_breaks_even_later_in_large_batches(seed: GpuRoofline) -> None:
    five = [found for found in seed.speculation if found.num_speculative_tokens == 5]
    assert [found.batch for found in five] == [1, 8, 40]
    shares = [found.acceptance for found in five if found.acceptance is not None]
    assert shares[0] < 0.001
    assert shares == sorted(shares)


# ---- bounds of a workload


def lengths(*pairs: tuple[int, int], shared: int = 0) -> Lengths:
    prompt, output = np.array(pairs, dtype=np.int64).T
    return Lengths(prompt, output, np.minimum(shared, prompt - 1))


@pytest.mark.parametrize("batch", [1, 8, 40])
def test_alike_requests_are_bounds_own_case(batch: int) -> None:
    same = lengths(*[(300, 200)] * 7)
    wanted = float(bounds(AWQ, T4, HALF, batch, 300, 200).tokens_per_s)
    assert tokens_per_s(AWQ, T4, HALF, same, batch) == pytest.approx(wanted)


def test_the_mean_context_by_hand() -> None:
    """10 tokens and 3 answers: steps at 11 and 12 cached; 20 and 2: one at 21, so (23 + 21) / 3 with n / 2 a step."""
    assert lengths((10, 3), (20, 2)).mean_context == pytest.approx((2 * 11.5 + 1 * 21) / 3)
    assert lengths((10, 3), (20, 2), shared=5).mean_context == pytest.approx((2 * 6.5 + 1 * 16) / 3)


def test_the_cache_bounds_the_batch() -> None:
    some, serve = lengths((300, 200)), Serve(dtype="half", max_num_seqs=256)
    assert batch_at_most(AWQ, serve, some, 20_000) == pytest.approx(50)
    assert batch_at_most(AWQ, Serve(dtype="half", max_num_seqs=8), some, 20_000) == 8
    assert batch_at_most(AWQ, serve, some, None) == 256, "no bound is known"
    mistral = describe(CONFIGS / "mistral-7b-v0.1")
    assert batch_at_most(mistral, serve, some, 20_000) == 256, "with a window caches do not grow with the context"


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.integers(2, 1500), st.integers(2, 500)), min_size=1, max_size=6),
    batch=st.integers(1, 128),
)
def test_a_larger_batch_or_a_shared_prefix_never_lowers_the_bound(pairs: list[tuple[int, int]], batch: int) -> None:
    rate = tokens_per_s(AWQ, T4, HALF, lengths(*pairs), batch)
    assert tokens_per_s(AWQ, T4, HALF, lengths(*pairs), batch + 1) >= rate * (1 - 1e-12)
    assert tokens_per_s(AWQ, T4, HALF, lengths(*pairs, shared=64), batch) >= rate * (1 - 1e-12)
    drafting = Plan(drafted=3)
    assert tokens_per_s(AWQ, T4, HALF, lengths(*pairs), batch, drafting) >= rate * (1 - 1e-12)
    mixed = replace(lengths(*pairs), server_decides=True)
    assert tokens_per_s(AWQ, T4, HALF, mixed, batch) >= rate * (1 - 1e-12), "any mix, so this one too"
    alone = [tokens_per_s(AWQ, T4, HALF, lengths(pair), batch) for pair in pairs]
    assert tokens_per_s(AWQ, T4, HALF, mixed, batch) >= max(alone) * (1 - 1e-12)


def test_the_best_of_the_space_is_over_what_is_left() -> None:
    spaced = experiment(space={"kv_cache_dtype": {"choices": ["auto", "fp8"]}, "max_num_seqs": {"choices": [8, 256]}})
    answer = roofline_report(spaced, ["T4", "L4"], engine_version="0.32.0")
    t4, l4 = answer.gpus
    assert t4.best is not None
    assert l4.best is not None
    assert t4.best.flags["kv_cache_dtype"] == "auto", "fp8 is refused there"
    assert l4.best.flags["kv_cache_dtype"] == "fp8"
    assert t4.best.batch < 256, "the KV cache holds no more"
    assert t4.best.max_rate_rps == pytest.approx(t4.best.tokens_per_s / answer.workload.output_tokens.mean)  # type: ignore[union-attr]
    assert t4.best.usd_per_m_tokens == pytest.approx(0.526 / 3600 / t4.best.tokens_per_s * 1e6)
    assert t4.best.joules_per_token == pytest.approx(70 / t4.best.tokens_per_s)


def test_accepted_drafts_raise_the_bound_and_are_named() -> None:
    """The seed's space drafts 3 or 5: without is no bound of it."""
    only = roofline_report(load_experiment(SEED), ["T4"], engine_version="0.32.0").gpus[0]
    assert only.best is not None
    assert only.best_drafted is not None
    assert (only.best.drafted, only.best.tokens_per_s) == (0, pytest.approx(2133, abs=2))
    assert only.best_drafted.drafted in (3, 5)
    assert only.best_drafted.tokens_per_s == pytest.approx(3306, abs=2), "all compute-bound"
    assert only.latency is not None
    assert only.latency_drafted is not None
    assert only.latency.tpot_p50_ms == pytest.approx(11.5, abs=0.05)
    assert only.latency_drafted.tpot_p50_ms == pytest.approx(11.5 / 6, rel=0.02), "five drafts cost next to nothing"


@pytest.mark.parametrize("flag", ["data_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_give_at_most_twice_and_cost_twice(flag: str) -> None:
    def best(flags: dict[str, Any]) -> Best:
        serve = {"max_model_len": 2048, "max_num_seqs": 8} | flags
        asked = experiment(serve=serve, space={}, hardware={"gpu": "H100", "count": 2})
        answer = roofline_report(asked, engine_version="0.32.0").gpus[0]
        assert answer.best is not None
        assert answer.gpus_per_server == (flags.get(flag) or 1)
        return answer.best

    one, two = best({}), best({flag: 2})
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    assert two.usd_per_m_tokens == pytest.approx(one.usd_per_m_tokens)
    assert two.tpot_ms == pytest.approx(one.tpot_ms)


def test_the_batch_is_not_rounded() -> None:
    only = roofline_report(experiment(space={"max_num_seqs": {"choices": [256]}}), ["T4"]).gpus[0]
    assert only.best is not None
    assert only.best.batch != round(only.best.batch)


# ---- answers of other kinds


@pytest.mark.parametrize(
    ("serve", "verdict"),
    [({"pipeline_parallel_size": 2}, "fits"), ({"cpu_offload_gb": 20}, "not told"), ({}, "cannot fit")],
)
def test_a_model_over_stages_or_offloaded_is_not_said_to_be_too_large(serve: dict[str, Any], verdict: str) -> None:
    flags = {"max_model_len": 2048, "dtype": "half"} | serve
    asked = experiment(model="meta-llama/Llama-2-13b-hf", serve=flags, hardware={"gpu": "L4", "count": 2})
    stack = roofline_report(asked, engine_version="0.32.0").gpus[0].memory
    assert stack.verdict == verdict
    assert (stack.kv_tokens_at_most is None) == (verdict == "not told")
    assert stack.kv_tokens_at_most is None or stack.kv_tokens_at_most >= stack.kv_tokens


@pytest.mark.parametrize("size", [2_000_000_000, "2G"])
def test_a_given_cache_bounds_its_own_tokens(size: int | str) -> None:
    stack = roofline_report(experiment(serve={"max_model_len": "2k", "kv_cache_memory_bytes": size})).gpus[0].memory
    assert stack.flags["max_model_len"] == 2000
    assert stack.kv_tokens_at_most is not None
    assert stack.kv_tokens <= stack.kv_tokens_at_most


def test_lengths_that_the_server_decides_are_bounded_by_the_shortest() -> None:
    closed = {"profile": "chat-medium", "arrival": {"kind": "closed", "users": 8}, "duration_s": 60}
    answer = roofline_report(experiment(workload=closed))
    assert any("depends on the server" in note for note in answer.notes)
    latency = answer.gpus[0].latency
    assert latency is not None
    assert latency.ttft_p50_ms == latency.ttft_p95_ms


def test_a_continuous_space_of_which_nothing_is_left_says_what_is_nearest() -> None:
    space = {"gpu_memory_utilization": {"low": 0.1, "high": 0.9}}
    asked = {"model": "meta-llama/Llama-3.1-70B", "serve": {"max_model_len": 4096}, "space": space}
    answer = roofline_report(experiment(**asked), ["T4"])
    assert "that were drawn" in (answer.gpus[0].pruned.nearest or "")
    assert "GiB" in (answer.gpus[0].pruned.nearest or "")
    assert not answer.has_answer


def test_what_is_enqueued_counts_as_in_a_sweep() -> None:
    space, enqueue = {"max_num_batched_tokens": {"choices": [8]}}, [{"max_num_batched_tokens": 2048}]
    serve = {"max_model_len": 2048, "max_num_seqs": 256}
    asked = {"serve": serve, "space": space}
    assert not roofline_report(experiment(**asked), engine_version="0.32.0").has_answer
    assert roofline_report(experiment(**asked, study={"enqueue": enqueue}), engine_version="0.32.0").has_answer


def test_fp8_models_lie_under_the_roof_of_fp8() -> None:
    config = ROOT / "varcas" / "configs" / "llama-3.1-8b"
    serve = {"max_model_len": 2048, "quantization": "fp8"}
    only = roofline_report(experiment(model=str(config), serve=serve, hardware={"gpu": "H100"})).gpus[0]
    assert only.units == "fp8"
    assert only.peak_flops == gpus.gpu("H100").peak_flops("fp8")


def test_a_model_that_cannot_fit_leaves_nothing_and_says_what_would_do() -> None:
    answer = roofline_report(experiment(model="meta-llama/Llama-3.1-70B", serve={"max_model_len": 4096}), ["T4"])
    only = answer.gpus[0]
    assert only.memory.verdict == "cannot fit"
    assert not answer.has_answer
    assert only.best is None
    assert {cell.verdict for cell in only.region} == {"refused"}
    assert only.pruned.baseline is not None
    assert "133 GiB" in (only.pruned.nearest or "")
    beside = roofline_report(
        experiment(model="meta-llama/Llama-3.1-70B", serve={"max_model_len": 4096}), ["T4", "H200"]
    )
    assert beside.has_answer, "some GPU is enough"


def test_an_slo_out_of_reach_names_the_nearest() -> None:
    answer = roofline_report(experiment(slo={"tpot_p50_ms": 5}), ["T4"])
    only = answer.gpus[0]
    assert not answer.has_answer
    assert [found.rule for found in only.pruned.hard] == ["slo_tpot"]
    least = only.slo[0].least_ms
    assert least is not None
    assert 5 < least < 12
    assert f"tpot_p50_ms of {int(least)}" in (only.pruned.nearest or ""), only.pruned.nearest


def test_the_feasible_region_by_hand(seed: GpuRoofline) -> None:
    cells = {(cell.max_num_seqs, cell.max_model_len): cell for cell in seed.region}
    assert set(cells) == {(n, length) for n in (1, 8, 16, 40, 256) for length in (512, 1024, 2048, 4096)}
    blocks = seed.memory.kv_tokens // 16
    assert cells[40, 2048].sequences == pytest.approx((blocks - 1) / 128, abs=0.02)
    assert cells[8, 2048].verdict == "holds"
    assert cells[40, 2048].verdict == "waits"


def test_texts_that_only_the_server_can_count_have_no_bounds(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "What is a roofline?", "output_tokens": 20}\n')
    answer = roofline_report(experiment(workload={"data": str(file), "rate_rps": 1, "duration_s": 20}), ["T4"])
    assert any("counted by the server alone" in note for note in answer.notes)
    assert answer.workload.prompt_tokens is None
    assert answer.gpus[0].bounds == []
    assert answer.gpus[0].best is None
    assert answer.gpus[0].memory.kv_tokens > 0


def test_a_continuous_space_is_drawn_from() -> None:
    answer = roofline_report(experiment(space={"gpu_memory_utilization": {"low": 0.1, "high": 0.9}}, serve={}), ["T4"])
    pruned = answer.gpus[0].pruned
    assert pruned.space_size is None
    assert 9_000 < pruned.judged <= 10_000
    assert any("drawn" in note for note in answer.notes)


def test_a_cpu_is_probed_and_its_cache_is_what_the_environment_says(model_dir: Path) -> None:
    given_env = {"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
    answer = roofline_report(
        experiment(model=str(model_dir), hardware={"gpu": "cpu"}, server=given_env, serve={"max_model_len": 1024})
    )
    only = answer.gpus[0]
    assert only.measured
    assert answer.gpus[0].memory.kv_tokens == 2**30 // (4 * 4 * 64 * 2) == 524288
    assert not answer.model.own_copy


def test_what_the_store_measured_lies_over_the_roofline(tmp_path: Path) -> None:
    flags = {"dtype": "half", "max_model_len": 2048, "quantization": "awq", "max_num_seqs": 8}
    measured = {
        "model": "TheBloke/Llama-2-7B-AWQ", "gpu_name": "Tesla T4", "config_json": json.dumps(flags),
        "tpot_mean_ms": 40.0, "prompt_tokens_per_s": 80.0, "request_rate_rps": 0.5, "saturated": False,
    }  # fmt: skip
    with Store(tmp_path / "results") as store:
        store.append(row(8, 150.0, number=1, **measured))
        store.append(row(8, 150.0, number=2, **(measured | {"saturated": True})))
        store.append(row(8, 150.0, number=3, **(measured | {"simulated": True})))
        store.append(row(8, 150.0, number=4, **(measured | {"model": "another"})))
    only = roofline_report(experiment(), results=tmp_path / "results").gpus[0]
    assert [(found.number, found.simulated) for found in only.measurements] == [(1, False), (3, True)]
    found = only.measurements[0]
    assert found.batch == pytest.approx(150 * 0.040), "Little's law"
    assert 0 < found.efficiency < 1
    assert found.flops_per_s < only.peak_flops
    assert only.left_out == {"saturated": 1, "simulated": 1}
    assert only.expected is not None
    assert only.expected.basis == "measured"
    assert only.attained[0].starts == 1
    elsewhere = roofline_report(experiment(), ["L4"], results=tmp_path / "results").gpus[0]
    assert elsewhere.measurements == []
    assert elsewhere.expected is not None
    assert elsewhere.expected.basis == "prior"


# ---- the command


def test_the_documented_command_as_json() -> None:
    words = ["roofline", str(SEED), "--gpu", "T4", "--gpu", "L4", "--gpu", "A10G", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "varcas", *words], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    out = done.stdout
    assert done.returncode == 0, done.stderr
    answer = Roofline.model_validate_json(out)
    assert [gpu.gpu for gpu in answer.gpus] == ["T4", "L4", "A10G"]
    assert answer.model.own_copy
    assert "own copy of 2026-11" in answer.model.source
    rates = [gpu.best.tokens_per_s for gpu in answer.gpus if gpu.best is not None]
    assert len(rates) == 3
    assert all(gpu.memory.verdict == "fits" for gpu in answer.gpus)
    assert "NaN" not in out
    assert "Infinity" not in out


def test_the_documented_command_prints_the_seeds_figures(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(
        capsys, SEED, "--gpu", "T4", "--vllm", "0.32.0", "--batches", "1,8,16,40", "--contexts", "300,2048",
        "--prompts", "160,2048",
    )  # fmt: skip
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    one = next(line for line in lines if line[:1] == ["1"])
    assert one[6:9] == ["3.04", "1.5", "%"], one
    prefill = {line[0]: line for line in lines if line and line[0] in ("160", "2,048")}
    assert "149" in prefill["160"]
    assert "1,205" in prefill["2,048"]
    for words in ("ridge 203 FLOP/byte", "own copy of 2026-11", "KV tokens ~", "cache_type_without_units", "≥", "≤"):
        assert words in out, words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "T40"], ["gpu: 'T40'", "Did you mean T4?"]),
        (["--batches", "1,many"], ["--batches", "'1,many'", "1,8,40"]),
        (["--contexts", "0"], ["--contexts", "positive integers"]),
        (["--results", "/nowhere"], ["--results", "/nowhere", "holds no results"]),
        (["--vllm", "new"], ["--vllm", "'new'", "0.32.0"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, SEED, *arguments)
    assert code == 2
    assert out == ""
    assert [word for word in words if word not in err] == [], err
    assert "Traceback" not in err


def test_nothing_left_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(
        "name: t\nmodel: meta-llama/Llama-3.1-70B\nhardware: {gpu: T4}\nserve: {max_model_len: 4096}\n"
        "space: {max_num_seqs: {choices: [8]}}\nworkload: {rate_rps: 1, duration_s: 30}\n"
    )
    code, out, err = said(capsys, path)
    assert code == 3, err
    assert "weights_beyond_memory" in out
    assert "133 GiB" in out


def test_figures_as_they_are_printed() -> None:
    assert [number(value) for value in (None, 0.0684, 12.34, 1234.5)] == ["-", "0.0684", "12.3", "1,234"]
    assert [share(value) for value in (0.01499, 1.0, 0.9999)] == ["1.5 %", "100 %", "100 %"]


# ---- models by name


def test_every_copy_is_described_and_indexed_once() -> None:
    directories = {name for name, _ in known.copies().values()}
    assert directories == {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    for name in ("TheBloke/Llama-2-7B-AWQ", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "JackFram/llama-160m"):
        assert name in known.copies()
    for directory in directories:
        assert describe(CONFIGS / directory).parameters > 0


def test_the_places_in_which_a_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = known.find_model("thebloke/llama-2-7b-awq")
    assert (copied.origin, copied.model.quantisation.method) == ("own copy", "awq")  # type: ignore[union-attr]
    local = tmp_path / "own"
    local.mkdir()
    (local / "config.json").write_text((CONFIGS / "tinyllama-1.1b" / "config.json").read_text())
    assert known.find_model(str(local)).origin == "directory"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"Did you mean TheBloke/Llama-2-7B-AWQ\?"):
        known.find_model("TheBloke/Llama-2-7B-AWQQ")


def test_the_hub_is_asked_last_and_a_copy_is_no_other_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()
            self.wfile.write((CONFIGS / "tinyllama-1.1b" / "config.json").read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert known.find_model("TheBloke/Llama-2-7B-AWQ").origin == "own copy"
        assert asked == []
        assert known.find_model("nobody/knows-this").origin == "hub"
        assert known.find_model("TheBloke/Llama-2-7B-AWQ", "v2").origin == "hub"
        server.shutdown()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "revision v2 was not looked at" in known.find_model("TheBloke/Llama-2-7B-AWQ", "v2").source
    assert asked == [
        ("/nobody/knows-this/resolve/main/config.json", "Bearer secret"),
        ("/TheBloke/Llama-2-7B-AWQ/resolve/v2/config.json", "Bearer secret"),
    ]


def test_the_hubs_own_cache_comes_before_a_copy(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "hub" / "models--TheBloke--Llama-2-7B-AWQ" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((CONFIGS / "tinyllama-1.1b" / "config.json").read_text())
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    done = subprocess.run(
        [sys.executable, "-c", "from varcas.known import find_model; f = find_model('TheBloke/Llama-2-7B-AWQ'); "
         "print(f.origin, f.model.parameters)"],
        capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")},
    )  # fmt: skip
    assert done.stdout.split() == ["hub", "cache", "1100048384"]
