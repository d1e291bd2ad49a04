"""The rules: each with a case that it refuses and one that it only just does not, and the laws that hold for all."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

import varcas
from varcas.engine.validation import Validator
from varcas.errors import InputError
from varcas.gpus import GIB, ceiling, gpu
from varcas.memory import Serve, floor_bytes
from varcas.model import ModelSpec, describe, from_config
from varcas.roofline import decode, prefill
from varcas.rules import (
    NEEDS_MODEL,
    READ,
    RULES,
    Flags,
    Refusal,
    Site,
    bound_ms,
    judge,
    judge_all,
    nearest_feasible,
)
from varcas.space import ServingConfig

CONFIGS = Path(varcas.__file__).parent / "configs"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
BY_NAME = {rule.name: rule for rule in RULES}


def config(name: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / name / "config.json").read_text())
    return {**found, **more}


def described(name: str, **more: Any) -> ModelSpec:
    return from_config(config(name, **more), name)


LLAMA = described("llama-2-7b")
LLAMA_AWQ = described("llama-2-7b", quantization_config=AWQ)
LENGTHS = np.random.default_rng(0).integers(20, 900, 400)


def site(**facts: Any) -> Site:
    """The seed's: Llama-2-7B-AWQ on a T4."""
    return Site(
        **{
            "model": LLAMA_AWQ,
            "config": config("llama-2-7b", quantization_config=AWQ),
            "gpu": ceiling("T4"),
            "gpus_per_node": 1,
            "engine_version": "0.32.0",
            **facts,
        }
    )


def on_cpu(**facts: Any) -> Site:
    return site(**{"model": LLAMA, "gpu": None, "on_cpu": True, "gpus_per_node": None, **facts})


def served(**facts: Any) -> Site:
    """With lengths, for SLO rules."""
    return site(prompt_tokens=LENGTHS, output_tokens=LENGTHS // 3 + 2, **facts)


def speculating(**settings: Any) -> Flags:
    return {"speculative_config": settings}


NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
DRAFT = {"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}
FLOOR = float(floor_bytes(LLAMA_AWQ, Serve(max_model_len=4096)))

Case = tuple[Site, Flags, Flags]
"""A site, flags that are refused, and flags that only just are not."""
CASES: dict[str, list[Case]] = {
    "tokens_below_seqs": [
        (site(), {"max_num_batched_tokens": 7, "max_num_seqs": 8}, {"max_num_batched_tokens": 8, "max_num_seqs": 8})
    ],
    "tokens_below_length": [
        (
            site(),
            {"max_num_batched_tokens": 2047, "max_model_len": 2048, "enable_chunked_prefill": False},
            {"max_num_batched_tokens": 2048, "max_model_len": 2048, "enable_chunked_prefill": False},
        ),
        (
            site(),
            {"max_num_batched_tokens": 512, "max_model_len": 2048, "enable_chunked_prefill": False},
            {"max_num_batched_tokens": 512, "max_model_len": 2048, "enable_chunked_prefill": True},
        ),
    ],
    "threshold_above_length": [
        (
            site(),
            {"long_prefill_token_threshold": 2049, "max_model_len": 2048},
            {"long_prefill_token_threshold": 2048, "max_model_len": 2048},
        )
    ],
    "share_out_of_range": [
        (site(), {"gpu_memory_utilization": 1.01}, {"gpu_memory_utilization": 1.0}),
        (site(), {"gpu_memory_utilization": 0}, {"gpu_memory_utilization": 0.9}),
    ],
    "length_above_model": [
        (on_cpu(), {"max_model_len": 4097}, {"max_model_len": 4096}),
        (
            on_cpu(config=config("llama-2-7b", rope_scaling={"rope_type": "linear", "factor": 2.0})),
            {"max_model_len": 8193},
            {"max_model_len": 8192},
        ),
    ],
    "bfloat16_without_units": [(site(), {"dtype": "bfloat16"}, {"dtype": "half"})],
    "float16_refused": [
        (
            on_cpu(model=described("gemma-2-2b"), config=config("gemma-2-2b")),
            {"dtype": "half"},
            {"dtype": "bfloat16"},
        ),
    ],
    "format_mismatch": [
        (site(), {"quantization": "gptq"}, {"quantization": "awq"}),
        (site(), {"quantization": "fp8"}, {"quantization": "awq_marlin"}),
    ],
    "format_without_type": [(site(), {"dtype": "float32"}, {"dtype": "half"})],
    "format_without_units": [
        (site(gpu=ceiling("V100")), {}, {"hf_overrides": {"a": 1}}),
        (site(model=LLAMA, gpu=ceiling("V100")), {"quantization": "fp8"}, {}),
    ],
    "cache_type_without_units": [
        (site(), {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int8_per_token_head"}),
        (site(), {"kv_cache_dtype": "fp8_e5m2"}, {"kv_cache_dtype": "auto"}),
    ],
    "cache_type_doubtful": [(site(), {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "auto"})],
    "too_few_gpus": [
        (site(gpus_per_node=4), {"tensor_parallel_size": 8}, {"tensor_parallel_size": 4}),
        (
            site(gpus_per_node=4),
            {"tensor_parallel_size": 4, "data_parallel_size": 2},
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        ),
    ],
    "heads_do_not_divide": [(on_cpu(), {"tensor_parallel_size": 3}, {"tensor_parallel_size": 4})],
    "kv_heads_do_not_divide": [
        (on_cpu(model=described("phi-4")), {"tensor_parallel_size": 4}, {"tensor_parallel_size": 5}),
    ],
    "experts_in_dense": [
        (on_cpu(), {"enable_expert_parallel": True}, {"enable_expert_parallel": False}),
        (on_cpu(), {"enable_expert_parallel": True}, {}),
    ],
    "speculation_without_model": [
        (site(), speculating(method="eagle", num_speculative_tokens=3), speculating(**NGRAM)),
        (site(), speculating(num_speculative_tokens=3), speculating(**DRAFT)),
        (site(), {"spec_tokens": 3}, {"spec_tokens": 3, "spec_method": "ngram"}),
    ],
    "speculation_without_count": [
        (site(), speculating(method="ngram"), speculating(**NGRAM)),
        (
            site(),
            speculating(method="ngram", num_speculative_tokens=0),
            speculating(method="ngram", num_speculative_tokens=1),
        ),
    ],
    "lookup_reversed": [
        (
            site(),
            speculating(**NGRAM, prompt_lookup_min=5, prompt_lookup_max=4),
            speculating(**NGRAM, prompt_lookup_min=4, prompt_lookup_max=4),
        )
    ],
    "draft_vocabulary": [
        (
            site(drafts={"draft": described("qwen2.5-0.5b"), "like": described("tinyllama-1.1b")}),
            speculating(**DRAFT),
            speculating(**{**DRAFT, "model": "like"}),
        ),
    ],
    "draft_longer": [
        (
            site(),
            speculating(**DRAFT, max_model_len=2049) | {"max_model_len": 2048},
            speculating(**DRAFT, max_model_len=2048) | {"max_model_len": 2048},
        )
    ],
    "draft_ranks": [
        (
            on_cpu(),
            speculating(**DRAFT, draft_tensor_parallel_size=2) | {"tensor_parallel_size": 4},
            speculating(**DRAFT, draft_tensor_parallel_size=1) | {"tensor_parallel_size": 4},
        ),
    ],
    "draft_named_ranks": [
        (site(), speculating(**NGRAM, tensor_parallel_size=1), speculating(**NGRAM)),
    ],
    "async_with_lookup": [
        (site(), speculating(**NGRAM) | {"async_scheduling": True}, speculating(**NGRAM) | {"async_scheduling": False}),
    ],
    "weights_beyond_memory": [
        (
            site(model=described("llama-2-13b"), gpus_per_node=2, engine_version=None),
            {"num_gpu_blocks_override": 256, "gpu_memory_utilization": 0.9},
            {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.1},
        ),
    ],
    "weights_do_not_fit": [
        (
            site(model=described("llama-2-13b"), gpu=ceiling("H100-SXM")),
            {"gpu_memory_utilization": 0.3},
            {"gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 256},
        ),
        (
            site(model=described("llama-2-13b"), gpu=ceiling("H100-SXM")),
            {"gpu_memory_utilization": 0.3},
            {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": GIB},
        ),
        (
            site(model=described("llama-2-13b"), gpus_per_node=2),
            {"tensor_parallel_size": 1},
            {"tensor_parallel_size": 2},
        ),
        (site(), {"gpu_memory_utilization": 0.2}, {"gpu_memory_utilization": 0.25}),
    ],
    "sequence_does_not_fit": [
        (
            site(),
            {"max_model_len": 4096, "gpu_memory_utilization": 0.999 * FLOOR / (16 * GIB)},
            {"max_model_len": 4096, "gpu_memory_utilization": 1.001 * FLOOR / (16 * GIB)},
        ),
        (
            site(model=described("mistral-7b-v0.1")),
            {"max_model_len": 32768, "gpu_memory_utilization": 0.86},
            {"max_model_len": 32768, "gpu_memory_utilization": 0.9},
        ),
    ],
    "given_cache_too_small": [
        (
            on_cpu(),
            {"max_model_len": 4096, "kv_cache_memory_bytes": 2 * GIB - 1},
            {"max_model_len": 4096, "kv_cache_memory_bytes": 2 * GIB},
        ),
        (on_cpu(env={"VLLM_CPU_KVCACHE_SPACE": "1"}), {"max_model_len": 2049}, {"max_model_len": 2048}),
        (
            site(),
            {"max_model_len": 4096, "kv_cache_memory_bytes": 2 * GIB - 1},
            {"max_model_len": 4096, "kv_cache_memory_bytes": 2 * GIB},
        ),
    ],
    "given_cache_beyond_memory": [
        (
            on_cpu(host_memory_bytes=24 * GIB),
            {"kv_cache_memory_bytes": 24 * GIB + 1},
            {"kv_cache_memory_bytes": 24 * GIB},
        ),
    ],
    "blocks_too_few": [
        (
            on_cpu(),
            {"max_model_len": 1025, "num_gpu_blocks_override": 8},
            {"max_model_len": 1024, "num_gpu_blocks_override": 8},
        ),
        (
            site(),
            {"max_model_len": 1025, "num_gpu_blocks_override": 64, "block_size": 16},
            {"max_model_len": 1024, "num_gpu_blocks_override": 64, "block_size": 16},
        ),
    ],
    "cpu_share_too_small": [
        (
            on_cpu(host_memory_bytes=24 * GIB),
            {"gpu_memory_utilization": 0.5, "max_model_len": 2048},
            {"gpu_memory_utilization": 0.57, "max_model_len": 2048},
        ),
    ],
    "slo_ttft": [(served(slo={"ttft_p95_ms": 100.0}), {}, {"pipeline_parallel_size": 1, "hf_overrides": {"a": 1}})],
    "slo_tpot": [(served(slo={"tpot_p50_ms": 9.0}), {}, speculating(**NGRAM))],
    "slo_itl": [(served(slo={"itl_mean_ms": 9.0}), {}, {"tensor_parallel_size": 2, "dtype": "half"})],
    "slo_e2e": [(served(slo={"e2e_p99_ms": 2500.0}), {}, speculating(**NGRAM))],
    "slo_norm": [(served(slo={"norm_mean_ms": 9.0}), {}, speculating(**NGRAM))],
    "estimated_too_small": [
        (
            site(),
            {"max_model_len": 4096, "gpu_memory_utilization": 0.4},
            {"max_model_len": 4096, "gpu_memory_utilization": 0.9},
        ),
    ],
}


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_every_rule_refuses_what_it_says_and_not_its_neighbour(name: str) -> None:
    rule = BY_NAME[name]
    for where, refused, neighbour in CASES[name]:
        said = rule.check(where, refused)
        assert said
        assert rule.check(where, neighbour) is None


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_a_rule_reads_no_flag_that_it_does_not_name(name: str) -> None:
    rule = BY_NAME[name]
    for where, refused, neighbour in CASES[name]:
        for flags in (refused, neighbour):
            asked = Watched(flags)
            rule.check(where, asked)
            assert asked.read <= set(rule.reads)


class Watched(Mapping[str, Any]):
    """Flags that remember which of them were asked for by name."""

    def __init__(self, flags: Flags) -> None:
        self.flags, self.read = flags, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.flags[name]

    def __iter__(self) -> Any:
        return iter(self.flags)

    def __len__(self) -> int:
        return len(self.flags)


def test_every_rule_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "roofline.md").read_text()
    for rule in RULES:
        versions = f"`{rule.versions}`" if rule.versions else "any"
        row = next(line for line in page.splitlines() if line.startswith(f"| `{rule.name}` |"))
        assert f"| {rule.kind} | {versions} | {rule.evidence} |" in row
        assert all(part.strip(" ;") in row.replace("`", "") for part in rule.source.split("; "))


def test_every_rule_has_a_source_and_its_own_name() -> None:
    assert len(BY_NAME) == len(RULES) == len(CASES)
    for rule in RULES:
        assert rule.source.startswith(("formula", "estimate")) or ".py: " in rule.source
        assert bool(rule.versions) or rule.source.startswith(("formula", "estimate"))


def test_an_unknown_version_silences_what_quotes_vllm() -> None:
    flags = {"max_num_batched_tokens": 1, "max_num_seqs": 8}
    assert judge(site(), flags) is not None
    for version in (None, "0.14.0", "0.34.0", "nightly"):
        assert judge(site(engine_version=version), flags) is None
    for version in (*READ, "0.32.0+cpu", "0.33.0.dev5"):
        assert judge(site(engine_version=version), flags) is not None


def test_an_unknown_model_or_gpu_silences_what_needs_it() -> None:
    everything = {
        "tensor_parallel_size": 3, "kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.01, "dtype": "bfloat16",
        "quantization": "gptq", "enable_expert_parallel": True, "max_model_len": 10**6,
    }  # fmt: skip
    assert judge(Site(engine_version="0.32.0", slo={"ttft_p95_ms": 1.0}), everything) is None


def test_rules_can_be_disabled_and_asked_by_kind() -> None:
    flags = {"max_num_batched_tokens": 1, "max_num_seqs": 8}
    assert judge(site(), flags, disabled={"tokens_below_seqs"}) is None
    assert judge(site(), flags, kinds=("soft",)) is None
    tight = {"max_model_len": 4096, "gpu_memory_utilization": 0.4}
    assert judge(site(), tight) is None
    soft = judge(site(), tight, kinds=("hard", "soft"))
    assert soft is not None
    assert (soft.rule, soft.kind) == ("estimated_too_small", "soft")


# ---- the seed


SEED = {
    "dtype": "half",
    "max_model_len": 2048,
    "gpu_memory_utilization": 0.90,
    "quantization": "awq",
    "enforce_eager": True,
}


@pytest.mark.parametrize("version", READ)
def test_the_seeds_real_failure_is_refused(version: str) -> None:
    """Its fp8 KV cache on a T4. By 0.15.1's source FlashInfer might take it there: doubt, so soft."""
    where = site(engine_version=version)
    refused = judge(where, {**SEED, "kv_cache_dtype": "fp8"}, kinds=("hard", "soft"))
    assert refused is not None
    assert refused.kind == ("soft" if version == "0.15.1" else "hard")
    assert "7.5" in refused.message
    assert (judge(where, {**SEED, "kv_cache_dtype": "fp8"}) is None) == (version == "0.15.1")


WRONG_CONCLUSIONS: dict[str, tuple[str, Flags]] = {
    "prefix caching conflicts with AWQ": ("T4", {"enable_prefix_caching": True}),
    "n-gram speculation conflicts with AWQ": ("T4", speculating(**NGRAM, prompt_lookup_max=4)),
    "a draft model of this family cannot work": ("T4", speculating(**{**DRAFT, "model": "JackFram/llama-160m"})),
    "TinyLlama as a draft": ("T4", speculating(**{**DRAFT, "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"})),
    "chunked prefill is of no use": ("T4", {"enable_chunked_prefill": True, "max_num_batched_tokens": 512}),
    "more than 8 sequences do not fit": ("T4", {"max_num_seqs": 64}),
    "CUDA graphs do not go with AWQ": ("T4", {"enforce_eager": False}),
    "FP8 is a matter of the T4 alone": ("L4", {"kv_cache_dtype": "fp8"}),
}


@pytest.mark.parametrize("version", READ)
@pytest.mark.parametrize("conclusion", WRONG_CONCLUSIONS)
def test_no_rule_repeats_the_seeds_wrong_conclusions(conclusion: str, version: str) -> None:
    name, flags = WRONG_CONCLUSIONS[conclusion]
    drafts = {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": described("tinyllama-1.1b")}
    where = site(gpu=ceiling(name), engine_version=version, drafts=drafts)
    assert judge(where, {**SEED, **flags}) is None


# ---- laws

VALUES: dict[str, list[Any]] = {
    "max_num_seqs": [1, 8, 256, True, "many"],
    "max_num_batched_tokens": [1, 512, 4096, 1.0],
    "max_model_len": [512, 2048, 4096, 8192, -1, "auto", "2k"],
    "gpu_memory_utilization": [0.1, 0.5, 0.9, 1.0, 1, 2, True],
    "kv_cache_memory_bytes": [2**28, 2**32, "1G"],
    "num_gpu_blocks_override": [4, 1000],
    "dtype": ["auto", "half", "bfloat16", "float32", "fp4", 3],
    "kv_cache_dtype": ["auto", "fp8", "int8_per_token_head", "nonsense"],
    "quantization": ["awq", "fp8", "gptq", "humming", None],
    "tensor_parallel_size": [1, 2, 3, 4, 0, "2"],
    "pipeline_parallel_size": [1, 2],
    "data_parallel_size": [1, 2],
    "enable_expert_parallel": [True, False],
    "enable_chunked_prefill": [True, False, None],
    "enable_prefix_caching": [True, False],
    "async_scheduling": [True, False],
    "cpu_offload_gb": [0, 4],
    "hf_overrides": [{}, {"num_hidden_layers": 1}],
    "speculative_config": [
        None, NGRAM, DRAFT, {"method": "eagle"}, "{\"method\": \"ngram\"}", "nonsense", 3,
        {"method": "ngram", "num_speculative_tokens": 1.0}, {"method": "ngram", "num_speculative_tokens": True},
    ],
}  # fmt: skip
FLAGS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALUES.items()})
SITES = st.sampled_from(
    [
        site(gpus_per_node=2),
        served(slo={"ttft_p95_ms": 200.0, "tpot_p99_ms": 10.0, "itl_p50_ms": 5.0}, shared_tokens=100),
        on_cpu(host_memory_bytes=24 * GIB, env={"VLLM_CPU_KVCACHE_SPACE": "1"}),
        site(model=described("deepseek-v2-lite"), gpu=ceiling("H100"), gpus_per_node=8),
        site(model=described("gemma-2-2b"), config=config("gemma-2-2b"), gpu=ceiling("A100"), gpus_per_node=None),
        site(model=None, gpu=None),
    ]
)


@settings(max_examples=60, deadline=None)
@given(SITES, st.lists(FLAGS, max_size=12), st.sampled_from([("hard",), ("hard", "soft")]))
def test_many_are_judged_as_one_by_one(where: Site, configs: list[Flags], kinds: Any) -> None:
    assert judge_all(where, configs, kinds=kinds) == [judge(where, flags, kinds=kinds) for flags in configs]


@settings(max_examples=100, deadline=None)
@given(FLAGS, st.floats(1, 8), st.floats(1, 4))
def test_more_memory_and_a_faster_gpu_refuse_nothing_new(flags: Flags, memory: float, speed: float) -> None:
    t4 = gpu("T4")
    better = replace(
        t4,
        memory_bytes=int(t4.memory_bytes * memory),
        memory_bytes_per_s=t4.memory_bytes_per_s * speed,
        peaks={dtype: peak * speed for dtype, peak in t4.peaks.items()},
    )
    slo = {"ttft_p95_ms": 150.0, "e2e_p50_ms": 2000.0}
    if judge(served(gpu=t4, slo=slo), flags) is None:
        assert judge(served(gpu=better, slo=slo), flags) is None


@settings(max_examples=60, deadline=None)
@given(FLAGS, st.sampled_from(["ttft", "tpot", "itl", "e2e", "norm"]), st.floats(1, 3000), st.floats(1, 10))
def test_a_looser_slo_refuses_nothing_new(flags: Flags, name: str, limit: float, looser: float) -> None:
    for statistic in ("mean", "p50", "p99"):
        key = f"{name}_{statistic}_ms"
        if judge(served(slo={key: limit}), flags) is None:
            assert judge(served(slo={key: limit * looser}), flags) is None


@settings(max_examples=100, deadline=None)
@given(FLAGS, st.integers(1, 4096), st.integers(0, 4096))
def test_a_shorter_sequence_is_not_refused_for_memory(flags: Flags, length: int, more: int) -> None:
    for name in ("sequence_does_not_fit", "given_cache_too_small", "blocks_too_few", "cpu_share_too_small"):
        for where in (site(), on_cpu(host_memory_bytes=24 * GIB, env={"VLLM_CPU_KVCACHE_SPACE": "1"})):
            if BY_NAME[name].check(where, {**flags, "max_model_len": length + more}) is None:
                assert BY_NAME[name].check(where, {**flags, "max_model_len": length}) is None


@pytest.mark.parametrize("name", ["llama-2-7b", "mistral-7b-v0.1", "gemma-2-9b", "gemma-3-1b", "deepseek-v2-lite"])
def test_the_need_is_no_more_than_the_memory_module_says(name: str) -> None:
    model = described(name)
    for length in (1, 100, 4096, 8192):
        floor = float(floor_bytes(model, Serve(dtype=model.dtype, max_model_len=length, concurrent_batches=1)))
        for share in (0.5, 1.0):
            big = replace(gpu("B200"), memory_bytes=int(floor / share) + 1)
            flags = {"max_model_len": length, "gpu_memory_utilization": share}
            assert BY_NAME["sequence_does_not_fit"].check(site(model=model, gpu=big), flags) is None


@pytest.mark.parametrize("space", [" 4", "4 ", "+4", "4_0"])
def test_a_cpu_cache_that_is_given_overrules_the_share_however_it_is_written(space: str) -> None:
    """Python's `int`, which vLLM reads it with, takes all of these."""
    flags: Flags = {"gpu_memory_utilization": 0.04, "max_model_len": 2048}
    assert judge(on_cpu(host_memory_bytes=24 * GIB), flags) is not None
    assert judge(on_cpu(host_memory_bytes=24 * GIB, env={"VLLM_CPU_KVCACHE_SPACE": space}), flags) is None


# ---- SLO


def test_bounds_take_account_of_caches_and_drafts() -> None:
    plain, shared = served(), served(shared_tokens=300)
    off, ngram = {"enable_prefix_caching": False}, speculating(**NGRAM)
    assert bound_ms(shared, {}, "ttft_p95_ms") < bound_ms(plain, {}, "ttft_p95_ms")  # type: ignore[operator]
    assert bound_ms(shared, off, "ttft_p95_ms") == bound_ms(plain, off, "ttft_p95_ms")
    assert bound_ms(plain, ngram, "e2e_mean_ms") < bound_ms(plain, {}, "e2e_mean_ms") / 2  # type: ignore[operator]
    assert bound_ms(plain, ngram, "itl_mean_ms") == bound_ms(plain, {}, "itl_mean_ms")
    tp = {"tensor_parallel_size": 4}
    assert bound_ms(plain, tp, "e2e_mean_ms") < bound_ms(plain, {}, "e2e_mean_ms") / 2  # type: ignore[operator]


def test_a_bound_is_the_statistic_of_the_requests_own_bounds() -> None:
    """By hand: 3.50 GB of weights and the cache of 20 to 900 tokens over 1.15 x 320 GB/s, less what the L2 may hold."""
    one = site(prompt_tokens=[100], output_tokens=[101])
    step = bound_ms(one, {}, "itl_mean_ms")
    read = LLAMA_AWQ.weight_bytes("float16") - 32000 * 4096 * 2  # of the embedding only a row is read
    assert step == pytest.approx(1e3 * (read + 101 * 2**19 - 6 * 2**20) / (1.15 * 320e9), rel=0.01)
    ttft, e2e = bound_ms(one, {}, "ttft_p50_ms"), bound_ms(one, {}, "e2e_p99_ms")
    assert e2e == pytest.approx(ttft + 100 * step)  # type: ignore[operator]
    several = served()
    by_hand = sorted(bound_ms(site(prompt_tokens=[p], output_tokens=[2]), {}, "ttft_mean_ms") for p in LENGTHS.tolist())
    assert bound_ms(several, {}, "ttft_p95_ms") == pytest.approx(by_hand[379])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(10, 60),
    st.floats(0.2, 5),
    st.integers(0, 10**6),
    st.sampled_from(["ttft_p50_ms", "ttft_p95_ms", "e2e_p90_ms"]),
)
def test_no_server_at_its_peak_beats_the_bound_of_its_queue(count: int, window_s: float, seed: int, key: str) -> None:
    """Shortest first, one after the other at all clocks' peak, and none sooner than it would be with nobody beside."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(20, 900, count), rng.integers(2, 60, count)
    due = np.sort(rng.uniform(0, window_s, count))
    alone = [
        bound_ms(site(prompt_tokens=[p], output_tokens=[o]), {}, key.replace("p95", "p50"))
        for p, o in zip(prompts.tolist(), outputs.tolist(), strict=True)
    ]
    work = [worked_s(p, o if key.startswith("e2e") else 1) for p, o in zip(prompts, outputs, strict=True)]
    now, waiting, late = 0.0, list(range(count)), np.zeros(count)
    while waiting:
        there = [at for at in waiting if due[at] <= now] or [min(waiting, key=lambda at: due[at])]
        chosen = min(there, key=lambda at: work[at])
        waiting.remove(chosen)
        now = max(now, due[chosen]) + work[chosen]
        late[chosen] = max(1e3 * (now - due[chosen]), alone[chosen])  # type: ignore[type-var]
    rank = -(-count * {"p50": 500, "p90": 900, "p95": 950}[key.split("_")[1]] // 1000)
    where = site(prompt_tokens=prompts, output_tokens=outputs, window_s=window_s)
    bound = bound_ms(where, {}, key)
    assert bound is not None
    assert bound <= np.sort(late)[rank - 1] * (1 + 1e-9)


def worked_s(prompt: int, output: int) -> float:
    """Compute of a request at the T4's highest clocks."""
    serve, peak = Serve(dtype="float16"), ceiling("T4").ceiling_flops("fp16")
    one, later = prefill(LLAMA_AWQ, serve, 1, prompt), decode(LLAMA_AWQ, serve, 1, prompt)
    return float(one.flops + (output - 1) * later.flops) / peak


def test_a_rate_that_no_clock_keeps_up_with_is_out_of_reach_and_the_one_that_is_not_is_named() -> None:
    slo = {"ttft_p95_ms": 2000.0}
    work_s = sorted(worked_s(p, 1) for p in LENGTHS.tolist())[:380]
    for window_s, refused in ((0.99 * (sum(work_s) - 2), True), (1.01 * (sum(work_s) - 2), False)):
        where = served(slo=slo, window_s=window_s)
        found = judge(where, {})
        assert (found is not None) is refused
        rate = nearest_feasible(where, [{}]).rate_rps
        assert rate is not None
        assert (rate < 400 / window_s) is refused
        if found is not None:
            assert f"with {400 / window_s:.3g} requests/s" in found.message
            assert rate == pytest.approx(400 / window_s * (window_s + 2) / sum(work_s), rel=1e-6)
    alone = served(slo={"ttft_p95_ms": 1.0}, window_s=1e4)
    assert nearest_feasible(alone, [{}]).rate_rps is None  # no rate is low enough
    tight = served(slo=slo, window_s=0.9 * (sum(work_s) - 2))
    assert judge(tight, {"data_parallel_size": 2}, disabled={"too_few_gpus"}) is None
    assert judge(tight, {"enable_prefix_caching": False}) is not None
    assert judge(tight, {"data_parallel_size": "2"}, disabled={"too_few_gpus"}) is None  # not read here


def test_a_draft_that_is_a_class_of_ones_own_or_keys_with_dashes_are_read_as_vllm_reads_them() -> None:
    """0.24 takes a model with a dot for a class, whatever the method says, and dashes for underscores."""
    reversed_ = {"prompt_lookup_min": 4, "prompt_lookup_max": 2}
    assert judge(site(), speculating(**NGRAM, **reversed_)) is not None
    assert judge(site(), speculating(**NGRAM, **reversed_, model="package.Proposer")) is None
    assert judge(site(), speculating(**{"method": "ngram", "num-speculative-tokens": 3})) is None


def test_an_unknown_number_of_drafts_or_other_lengths_give_no_bound() -> None:
    assert bound_ms(served(), speculating(method="eagle", model="m"), "tpot_p50_ms") is None
    assert bound_ms(site(), {}, "ttft_p50_ms") is None
    drawn = served(drawn_for=2048)
    assert bound_ms(drawn, {"max_model_len": 1024}, "ttft_p50_ms") is None
    assert bound_ms(drawn, {"max_model_len": 2048}, "ttft_p50_ms") is not None
    assert bound_ms(served(), {"kv_transfer_config": {"kv_connector": "x"}}, "ttft_p50_ms") is None


def test_a_space_pruned_whole_names_what_comes_nearest() -> None:
    where = served(slo={"ttft_p95_ms": 100.0, "tpot_p95_ms": 5.0})
    configs: list[Flags] = [{}, speculating(**NGRAM), {"gpu_memory_utilization": 0.1}]
    assert all(isinstance(verdict, Refusal) for verdict in judge_all(where, configs))
    near = nearest_feasible(where, configs)
    assert near.slo_ms["ttft_p95_ms"] == bound_ms(where, {}, "ttft_p95_ms")
    assert near.slo_ms["tpot_p95_ms"] == bound_ms(where, speculating(**NGRAM), "tpot_p95_ms")
    assert near.gpu_memory_bytes == pytest.approx(LLAMA_AWQ.weight_bytes("float16"))


def test_a_share_that_is_too_small_names_the_share_and_the_length_that_would_do() -> None:
    flags: Flags = {"max_model_len": 4096, "gpu_memory_utilization": 0.25}
    near = nearest_feasible(site(), [flags])
    assert near.share is not None
    assert near.max_model_len is not None
    assert judge(site(), flags) is not None
    assert judge(site(), {**flags, "gpu_memory_utilization": near.share * 1.001}) is None
    assert judge(site(), {**flags, "max_model_len": near.max_model_len}) is None
    assert judge(site(), {**flags, "max_model_len": near.max_model_len + 1}) is not None


def test_sparse_weights_are_not_described() -> None:
    dense = QUANTISED["compressed-tensors"]
    assert described("llama-2-7b", quantization_config=dense)
    for sparse in ({"sparsity_config": {"sparsity_structure": "2:4"}}, {"format": "marlin-24"}):
        with pytest.raises(InputError, match="2:4"):
            described("llama-2-7b", quantization_config={**dense, **sparse})


# ---- what vLLM itself says

SAME, OTHER = "draft-same", "draft-other"
QUANTISED: dict[str, dict[str, Any]] = {
    "awq": AWQ | {"version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group"},
            }
        },
        "ignore": ["lm_head"],
    },
}
GEMMA = {"head_dim": 32, "sliding_window": 512, "query_pre_attn_scalar": 32, "torch_dtype": "bfloat16"}
MADE: dict[str, dict[str, Any]] = {
    "tiny": {},
    SAME: {},
    OTHER: {"vocab_size": 1024},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **GEMMA},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **GEMMA},
    "moe": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    **{name: {"torch_dtype": "float16", "quantization_config": told} for name, told in QUANTISED.items()},
}
"""Directories made of the tiny model: what they have otherwise in `config.json`."""


def drafting(**more: Any) -> Flags:
    return speculating(**{"method": "draft_model", "model": SAME, "num_speculative_tokens": 3, **more})


def unchunked(tokens: int, length: int) -> Flags:
    return {"max_num_batched_tokens": tokens, "max_model_len": length, "enable_chunked_prefill": False}


def lookup(least: int, most: int) -> Flags:
    return speculating(**NGRAM, prompt_lookup_min=least, prompt_lookup_max=most)


ASYNC = {"async_scheduling": True}
REFUSED: dict[str, list[tuple[str, Flags]]] = {
    "tokens_below_seqs": [
        ("tiny", {"max_num_batched_tokens": tokens, "max_num_seqs": seqs})
        for tokens, seqs in ((64, 128), (1, 2), (7, 8))
    ],
    "tokens_below_length": [("tiny", unchunked(*pair)) for pair in ((512, 1024), (1023, 1024), (300, 2048))],
    "threshold_above_length": [
        ("tiny", {"max_model_len": length, "long_prefill_token_threshold": length + more})
        for length, more in ((1024, 1), (512, 512), (2048, 1))
    ],
    "share_out_of_range": [("tiny", {"gpu_memory_utilization": share}) for share in (1.01, 0.0, -0.5, 2)],
    "length_above_model": [
        ("tiny", {"max_model_len": 2049}), ("linear", {"max_model_len": 4097}), ("yarn", {"max_model_len": 4097}),
        ("gemma3", {"max_model_len": 4096}),
    ],
    "float16_refused": [("gemma2", {"dtype": "half"}), ("gemma2", {"dtype": "float16"}), ("gemma3", {"dtype": "half"})],
    "format_mismatch": [
        (stored, {"quantization": asked}) for stored in QUANTISED for asked in QUANTISED if asked != stored
    ],
    "format_without_type": [
        ("awq", {"dtype": "float32"}), ("gptq", {"dtype": "float32"}), ("fp8", {"dtype": "float"}),
        ("tiny", {"quantization": "fp8", "dtype": "float32"}),
    ],
    "heads_do_not_divide": [("tiny", {"tensor_parallel_size": ranks}) for ranks in (3, 5, 16)],
    "experts_in_dense": [(name, {"enable_expert_parallel": True}) for name in ("tiny", "gemma2", "awq")],
    "speculation_without_model": [
        *(("tiny", speculating(method=method, num_speculative_tokens=3)) for method in NEEDS_MODEL),
        ("tiny", speculating(num_speculative_tokens=3)), ("tiny", {"spec_tokens": 3}),
    ],
    "speculation_without_count": [
        ("tiny", speculating(method="ngram")), ("tiny", speculating(method="ngram", num_speculative_tokens=0)),
        ("tiny", {"spec_method": "ngram"}),
    ],
    "lookup_reversed": [("tiny", lookup(*pair)) for pair in ((5, 4), (2, 1), (9, 3))],
    "draft_vocabulary": [
        ("tiny", drafting(model=OTHER)), ("awq", drafting(model=OTHER)),
        ("tiny", speculating(model=OTHER, num_speculative_tokens=2)),
    ],
    "draft_longer": [
        ("tiny", drafting(max_model_len=length) | {"max_model_len": 1024}) for length in (1025, 2000, 2048)
    ],
    "draft_ranks": [
        ("tiny", drafting(draft_tensor_parallel_size=own) | {"tensor_parallel_size": ranks})
        for own, ranks in ((2, 1), (4, 2), (3, 4))
    ],
    "draft_named_ranks": [
        ("tiny", speculating(**NGRAM, tensor_parallel_size=1)), ("tiny", drafting(tensor_parallel_size=1)),
        ("tiny", speculating(**NGRAM, tensor_parallel_size=2)),
    ],
    "async_with_lookup": [
        ("tiny", speculating(**NGRAM) | ASYNC), ("tiny", {"spec_method": "ngram", "spec_tokens": 2, **ASYNC}),
        ("awq", speculating(method="ngram", num_speculative_tokens=1) | ASYNC),
    ],
}  # fmt: skip
TAKEN: list[tuple[str, Flags]] = [
    ("tiny", {"max_num_batched_tokens": 128, "max_num_seqs": 128}),
    ("tiny", unchunked(1024, 1024)),
    ("tiny", {"max_model_len": 1024, "long_prefill_token_threshold": 1024}),
    ("tiny", {"gpu_memory_utilization": 1.0, "max_model_len": 2048}),
    ("linear", {"max_model_len": 4096}),
    ("gemma2", {"dtype": "bfloat16"}),
    *((name, {"quantization": name}) for name in QUANTISED),
    ("awq", {"dtype": "bfloat16"}),
    ("compressed-tensors", {"dtype": "float32"}),
    ("moe", {"enable_expert_parallel": True}),
    ("tiny", {"spec_tokens": 3, "spec_method": "ngram"}),
    ("awq", speculating(**NGRAM, prompt_lookup_max=4) | {"enable_prefix_caching": True}),
    ("awq", drafting()),
    ("tiny", drafting(model=OTHER, use_heterogeneous_vocab=True)),
    ("tiny", drafting(max_model_len=1024, draft_tensor_parallel_size=1) | {"max_model_len": 1024}),
    ("tiny", drafting() | ASYNC),
]


@pytest.fixture(scope="module")
def made(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory for each of MADE."""
    folder = tmp_path_factory.mktemp("made")
    for name, more in MADE.items():
        shutil.copytree(model_dir, folder / name)
        told = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**told, **more}))
    return folder


def placed(folder: Path, flags: Flags) -> Flags:
    """The draft's name as a path."""
    told = flags.get("speculative_config")
    if not isinstance(told, dict) or told.get("model") not in (SAME, OTHER):
        return flags
    return {**flags, "speculative_config": {**told, "model": str(folder / str(told["model"]))}}


def site_of(folder: Path, name: str, version: str) -> Site:
    drafts = {str(folder / draft): describe(folder / draft) for draft in (SAME, OTHER)}
    told = json.loads((folder / name / "config.json").read_text())
    return Site(describe(folder / name), config=told, drafts=drafts, on_cpu=True, engine_version=version)


@pytest.mark.parametrize("rule", REFUSED)
def test_these_are_the_rules_cases(made: Path, rule: str) -> None:
    """That vLLM refuses them too is asked below, where there is one."""
    for name, flags in REFUSED[rule]:
        refused = judge(site_of(made, name, "0.32.0"), placed(made, flags))
        assert refused is not None
        assert refused.rule == rule


@pytest.mark.vllm
def test_real_vllm_refuses_what_the_rules_refuse(made: Path, tmp_path: Path) -> None:
    assert all(len(cases) >= 3 for cases in REFUSED.values())
    with Validator(sys.executable, dict(os.environ), tmp_path) as real:

        def takes(name: str, flags: Flags) -> bool:
            argv = ServingConfig(str(made / name), None, placed(made, flags)).argv()
            return real.check([*argv, "--load-format", "dummy"], "completions").ok

        version = real.version
        wrong = [
            (rule, name, flags)
            for rule, cases in REFUSED.items()
            if BY_NAME[rule].holds_for(Version(version))
            for name, flags in cases
            if takes(name, flags)
        ]
        assert wrong == []
        for name, flags in TAKEN:
            assert takes(name, flags), (name, flags)
            assert judge(site_of(made, name, version), placed(made, flags)) is None


# ---- speed


def test_a_large_space_is_judged_quickly() -> None:
    """Of 100,000, one flag continuous: under 2 s on 2 cores; here a tenth, with room for a busy machine."""
    draw = np.random.default_rng(0)
    configs = [
        {
            **SEED,
            "max_num_seqs": int(draw.integers(1, 257)),
            "gpu_memory_utilization": float(draw.uniform(0.1, 0.95)),
            "kv_cache_dtype": ["auto", "fp8"][int(draw.integers(2))],
            "speculative_config": [None, dict(NGRAM)][int(draw.integers(2))],
        }
        for _ in range(10_000)
    ]
    start = time.perf_counter()
    verdicts = judge_all(served(slo={"ttft_p95_ms": 500.0}), configs)
    assert time.perf_counter() - start < 1.0
    pruned = {verdict.rule for verdict in verdicts if verdict}
    assert pruned == {"cache_type_without_units", "weights_do_not_fit", "sequence_does_not_fit"}
