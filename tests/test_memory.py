"""Memory: golden figures of real servers, vLLM's own rounding, and laws."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import varcas
from varcas import gpus
from varcas.errors import InputError
from varcas.memory import (
    Serve,
    activation_bytes,
    allocated_bytes,
    block_bytes,
    blocks_each,
    ceiling_kv_tokens,
    cpu_cache_bytes,
    cpu_memory,
    floor_bytes,
    graph_bytes,
    kv_bytes_per_token,
    loaded_bytes,
    memory,
    settings,
    whole,
)
from varcas.model import ModelSpec, describe, from_config

ROOT = Path(__file__).parents[1]
MODELS = Path(varcas.__file__).parent / "configs"
LAW = hypothesis_settings(deadline=None, max_examples=50)
GIB = 2**30
T4, H100 = gpus.gpu("T4"), gpus.gpu("H100-SXM")


def llama(**changes: Any) -> ModelSpec:
    return from_config(json.loads((MODELS / "llama-2-7b" / "config.json").read_text()) | changes)


def awq() -> ModelSpec:
    return llama(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})


# ---- what real servers said (vLLM 0.24.0, one H100 80 GB, Llama-2-7B, eager, 2048 tokens)


def test_weights_as_the_h100_reported_them() -> None:
    serve = Serve(enforce_eager=True)
    assert loaded_bytes(awq(), serve, H100) / GIB == pytest.approx(3.74, abs=0.005)
    assert loaded_bytes(llama(), serve, H100) / GIB == pytest.approx(12.55, abs=0.005)


def test_tokens_as_the_h100_reported_them() -> None:
    """68.13 GiB = 139,536 tokens. Only 0.92, the default then, leaves room for it: see docs/roofline.md."""
    flags = {"dtype": "half", "max_model_len": 2048, "enforce_eager": True, "gpu_memory_utilization": 0.92}
    found = memory(awq(), H100, settings(flags, awq(), H100))
    assert found.kv_tokens == pytest.approx(139_536, rel=0.005)
    assert found.kv_cache / GIB == pytest.approx(68.13, rel=0.005)


def test_tokens_of_a_given_cache_are_exact() -> None:
    serve = Serve(kv_cache_memory_bytes=8721 * 8 * 2**20, max_model_len=2048)
    assert memory(awq(), H100, serve).kv_tokens == 139_536
    assert float(block_bytes(awq(), serve)) == 16 * kv_bytes_per_token(awq(), serve) == 8 * 2**20


def test_the_servers_own_refusal() -> None:
    """docs/h100.md, trial 3: 64 blocks are 0.5 GiB, one sequence of 2048 needs 1.0 GiB."""
    few = memory(awq(), H100, Serve(num_gpu_blocks_override=64))
    assert not few.fits
    assert few.blocks_each * few.block == 1.0 * GIB
    assert not memory(awq(), H100, Serve(num_gpu_blocks_override=128)).fits, "one block is kept back"
    assert memory(awq(), H100, Serve(num_gpu_blocks_override=129)).fits


def test_the_cpu_builds_space_is_exact() -> None:
    serve = Serve(dtype="bfloat16", block_size=128, kv_cache_memory_bytes=2 * GIB)
    assert cpu_memory(llama(), serve, 24 * GIB).kv_tokens == 2 * GIB // (128 * 2 * 32 * 4096 * 2) * 128


def test_the_cpu_builds_own_log(model_dir: Path) -> None:
    """tests/engine/logs: vLLM 0.32.0's CPU build with 1 GiB and this model."""
    log = (Path(__file__).parent / "engine" / "logs" / "compiled-vllm-0.32.0.log").read_text()
    reported = re.search(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens", log)
    assert reported is not None
    tokens, length = (int(number.replace(",", "")) for number in reported.groups())
    serve = Serve(dtype="bfloat16", block_size=128, kv_cache_memory_bytes=GIB, max_model_len=length)
    assert cpu_memory(describe(model_dir), serve, 24 * GIB).kv_tokens == tokens


@pytest.mark.parametrize(
    ("name", "dtype", "reported"),
    [
        ("qwen2.5-0.5b", "float16", 992_260_224),
        ("smollm2-135m", "float32", 540_157_664),
        ("gemma-3-1b", "bfloat16", 2_033_326_754),
    ],
)
def test_weights_as_the_cpu_build_holds_them(name: str, dtype: str, reported: int) -> None:
    """Rotary tables too, two for Gemma 3; all but the inverse frequencies and the like: docs/roofline_evidence.md."""
    found = cpu_memory(describe(MODELS / name), Serve(dtype=dtype), 24 * GIB)
    assert 0 <= reported - float(found.weights) < 1024


def test_a_share_of_the_cpus_memory_as_its_build_took_it() -> None:
    """docs/roofline_evidence.md: 0.5 of 16,871,796,736 bytes; the output projection is held twice."""
    serve = Serve(dtype="bfloat16", block_size=128, gpu_memory_utilization=0.5)
    found = cpu_memory(describe(MODELS / "qwen2.5-0.5b"), serve, 16_871_796_736)
    assert float(found.kv_tokens) == pytest.approx(483_712, rel=0.03)
    assert float(found.overhead) > 151_936 * 896 * 2


# ---- bytes a token


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("llama-2-7b", 2 * 32 * 4096),
        ("llama-3.1-8b", 2 * 32 * 8 * 128),
        ("qwen2.5-7b", 2 * 28 * 4 * 128),
        ("gemma-2-9b", 2 * 42 * 8 * 256),
        ("deepseek-v3", 61 * 576),
        ("deepseek-v2-lite", 27 * 576),
    ],
)
def test_bytes_a_token(name: str, elements: int) -> None:
    model = describe(MODELS / name)
    assert kv_bytes_per_token(model, Serve()) == 2 * elements
    assert kv_bytes_per_token(model, Serve(kv_cache_dtype="fp8")) == elements


def test_quantised_caches_with_scales() -> None:
    one = kv_bytes_per_token(llama(), Serve(kv_cache_dtype="int8_per_token_head"))
    assert one == 32 * 32 * (2 * 128 + 8)
    assert kv_bytes_per_token(llama(), Serve(kv_cache_dtype="int4_per_token_head")) == 32 * 32 * (128 + 8)
    assert kv_bytes_per_token(describe(MODELS / "deepseek-v3"), Serve(kv_cache_dtype="fp8_ds_mla")) == 61 * 656


def test_an_unknown_cache_type_is_said() -> None:
    with pytest.raises(InputError, match="kv_cache_dtype: 'fp7'"):
        memory(llama(), T4, Serve(kv_cache_dtype="fp7"))


# ---- windows: groups of layers, as vLLM makes them


def test_windows_hold_less() -> None:
    gemma = describe(MODELS / "gemma-3-1b")  # 22 layers of 512, 4 that see all: 6 + 1 groups of 4 layers
    serve = Serve(dtype="bfloat16", max_model_len=32768, max_num_batched_tokens=2048)
    sliding = -(-(512 - 1 + 2 * 2048) // 16) + 1
    assert blocks_each(gemma, serve) == 6 * sliding + 32768 // 16
    assert block_bytes(gemma, serve) == 4 * 16 * 2 * 256 * 2
    plain = replace(serve, disable_hybrid_kv_cache_manager=True)
    assert blocks_each(gemma, plain) == 32768 // 16
    assert block_bytes(gemma, plain) == 26 * 16 * 2 * 256 * 2
    assert memory(gemma, T4, serve).kv_tokens > memory(gemma, T4, plain).kv_tokens


def test_nearly_equal_kinds_share_one_group_size() -> None:
    gemma = describe(MODELS / "gemma-2-9b")  # 21 and 21
    assert block_bytes(gemma, Serve()) == 21 * 16 * 2 * 8 * 256 * 2


@pytest.mark.vllm
def test_blocks_and_tokens_are_vllms_own() -> None:
    """vLLM's own functions, fed with the same attention layers."""
    pytest.importorskip("vllm")
    lengths = {
        "gemma-3-1b": 32768, "gemma-2-9b": 8192, "gemma-2-27b": 4096, "mistral-7b-v0.1": 32768, "llama-3.1-8b": 16384,
        "phi-3-mini-4k": 4096, "deepseek-v2-lite": 8192, "qwen3-30b-a3b": 40960,
    }  # fmt: skip
    cases = [(str(MODELS / name), length, 10 * GIB) for name, length in lengths.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kv_work", json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    answer = re.search(r"^ANSWER (.*)$", done.stdout, re.MULTILINE)
    assert answer is not None, done.stderr
    serve = Serve(dtype="bfloat16", max_num_batched_tokens=2048, kv_cache_memory_bytes=10 * GIB)
    found = [memory(describe(path), H100, replace(serve, max_model_len=length)) for path, length, _ in cases]
    assert [[one.blocks, one.kv_tokens] for one in found] == json.loads(answer[1])


# ---- the allocator


@pytest.mark.parametrize(
    ("size", "counted"),
    [
        (1, 512),
        (513, 1024),
        (9 * 2**20 + 1, 9 * 2**20 + 512),
        (25_165_824, 25_165_824),
        (45_088_768, 44 * 2**20),
        (20 * 2**20 + 2**19, 20 * 2**20 + 2**19),
    ],
)
def test_allocated_bytes(size: int, counted: int) -> None:
    assert allocated_bytes(size) == counted


@LAW
@given(st.integers(1, 10**10))
def test_the_allocator_never_gives_less_nor_a_mebibyte_more(size: int) -> None:
    assert size <= allocated_bytes(size) <= size + 2**20 + 512


# ---- defaults


def test_defaults_are_the_servers() -> None:
    assert (settings({}, llama(), T4).max_num_batched_tokens, settings({}, llama(), T4).max_num_seqs) == (2048, 256)
    assert settings({}, llama(), H100).max_num_batched_tokens == 8192
    assert settings({}, llama(), gpus.gpu("A100")).max_num_batched_tokens == 2048
    assert settings({}, llama(), gpus.gpu("B200")).max_num_batched_tokens == 16384
    assert settings({"max_num_seqs": 1, "max_model_len": 512}, llama(), T4).max_num_batched_tokens == 512
    assert settings({"enable_chunked_prefill": False}, llama(), T4).max_num_batched_tokens == 4096
    assert settings({"max_num_batched_tokens": 128}, llama(), T4).max_num_seqs == 128


def test_bf16_becomes_fp16_on_a_t4() -> None:
    model = describe(MODELS / "llama-3.1-8b")
    assert settings({}, model, T4).dtype == "float16"
    assert settings({}, model, H100).dtype == "bfloat16"
    assert settings({"dtype": "bfloat16"}, model, T4).dtype == "bfloat16", "refusing it is a rule's business"


# ---- laws

serves = st.builds(
    Serve,
    max_model_len=st.integers(16, 32768),
    max_num_seqs=st.integers(1, 1024),
    max_num_batched_tokens=st.integers(16, 32768),
    gpu_memory_utilization=st.floats(0.1, 1.0),
    enforce_eager=st.booleans(),
    kv_cache_dtype=st.sampled_from(["auto", "fp8"]),
)
models = st.sampled_from(
    ["llama-2-7b", "gemma-3-1b", "deepseek-v2-lite", "mistral-7b-v0.1", "qwen2.5-0.5b", "smollm2-135m"]
).map(lambda name: describe(MODELS / name))


@LAW
@given(model=models, serve=serves)
def test_more_to_hold_leaves_less(model: ModelSpec, serve: Serve) -> None:
    one = memory(model, H100, serve)
    for more in (
        replace(serve, max_num_seqs=serve.max_num_seqs * 2),
        replace(serve, max_num_batched_tokens=serve.max_num_batched_tokens * 2),
    ):
        assert memory(model, H100, more).kv_cache <= one.kv_cache
    assert memory(model, H100, replace(serve, gpu_memory_utilization=1.0)).kv_cache >= one.kv_cache
    assert memory(model, H100, replace(serve, enforce_eager=True)).kv_cache >= one.kv_cache


@LAW
@given(model=models, serve=serves)
def test_the_parts_make_the_budget(model: ModelSpec, serve: Serve) -> None:
    found = memory(model, H100, serve)
    parts = found.weights + found.peak + found.graphs + found.overhead + found.kv_cache
    assert parts == pytest.approx(float(found.budget))
    assert found.blocks * found.block <= np.maximum(found.kv_cache, 0)


@LAW
@given(model=models, serve=serves, gpu=st.sampled_from([T4, H100, gpus.gpu("B200")]))
def test_hard_figures_bound_the_estimate(model: ModelSpec, serve: Serve, gpu: gpus.GpuSpec) -> None:
    """What the estimate says fits, no rule may call impossible."""
    found = memory(model, gpu, serve)
    left = gpu.memory_bytes * float(serve.gpu_memory_utilization) - model.weight_bytes(serve.dtype)
    assert ceiling_kv_tokens(model, left, serve) >= found.kv_tokens
    if found.fits:
        assert floor_bytes(model, serve) <= gpu.memory_bytes


@LAW
@given(ranks=st.sampled_from([1, 2, 4, 8]))
def test_tensor_parallel_divides(ranks: int) -> None:
    model, serve = llama(), Serve(tensor_parallel_size=ranks)
    assert kv_bytes_per_token(model, serve) * ranks == kv_bytes_per_token(model, Serve())
    assert model.weight_bytes("half", ranks) * ranks == pytest.approx(model.weight_bytes("half"), rel=1e-3)
    assert loaded_bytes(model, serve) <= loaded_bytes(model, Serve()) / ranks * 1.02, "the allocator rounds each tensor"
    assert activation_bytes(model, serve) <= activation_bytes(model, Serve())


def test_tensor_parallel_copies_what_it_cannot_cut() -> None:
    lite = describe(MODELS / "deepseek-v2-lite")
    assert kv_bytes_per_token(lite, Serve(tensor_parallel_size=4)) == kv_bytes_per_token(lite, Serve())
    qwen = describe(MODELS / "qwen2.5-7b")
    assert kv_bytes_per_token(qwen, Serve(tensor_parallel_size=14)) == kv_bytes_per_token(qwen, Serve()) / 4


@LAW
@given(serve=serves)
def test_an_array_says_what_its_elements_say(serve: Serve) -> None:
    model, seqs = awq(), np.array([1, 8, 256])
    many = memory(model, T4, replace(serve, max_num_seqs=seqs))
    for index, count in enumerate(seqs):
        assert memory(model, T4, replace(serve, max_num_seqs=int(count))).kv_tokens == many.kv_tokens[index]


def test_graphs_cost_nothing_when_eager_and_more_for_more_sequences() -> None:
    seqs = np.array([1, 2, 4, 16, 64, 128, 256, 1024])
    serve = Serve(max_num_seqs=seqs)
    assert np.all(np.diff(graph_bytes(llama(), serve)) >= 0)
    assert not graph_bytes(llama(), replace(serve, enforce_eager=True)).any()


# ---- numbers as vLLM's command line reads them


@pytest.mark.parametrize(
    ("text", "number"), [("2k", 2000), ("2K", 2048), ("25.6k", 25_600), ("1G", 2**30), ("4096", 4096), (512, 512)]
)
def test_numbers_with_a_suffix(text: str | int, number: int) -> None:
    """The examples of `human_readable_int`."""
    assert whole({"max_model_len": text}, "max_model_len") == number


@pytest.mark.parametrize("value", ["1.5K", "many", 0, -5, True, 2.5, -1, "auto"])
def test_what_is_no_number_names_the_flag_and_the_fix(value: object) -> None:
    with pytest.raises(InputError, match=r"max_model_len: .*e\.g\. max_model_len: 2048"):
        whole({"max_model_len": value}, "max_model_len")


def test_the_cpu_builds_space() -> None:
    assert [cpu_cache_bytes({"VLLM_CPU_KVCACHE_SPACE": text}) for text in ("", "2")] == [None, 2 * GIB]
    assert cpu_cache_bytes({}) is None
    with pytest.raises(InputError, match="no integer of GiB"):
        cpu_cache_bytes({"VLLM_CPU_KVCACHE_SPACE": "1.5"})


def test_pipeline_stages_share_weights_and_cache() -> None:
    model, one = describe(MODELS / "llama-2-13b"), Serve()
    two = replace(one, pipeline_parallel_size=2)
    whole_, half = memory(model, H100, one), memory(model, H100, two)
    assert float(half.weights) == float(whole_.weights) / 2
    assert float(half.block) == float(whole_.block) / 2
    assert half.kv_tokens > whole_.kv_tokens * 2
