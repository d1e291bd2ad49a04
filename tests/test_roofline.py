"""The static roofline: figures worked by hand, the seed's own, and laws that no step may break."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import varcas
from varcas import gpus
from varcas.memory import Serve, kv_bytes_per_token
from varcas.model import ModelSpec, describe, from_config
from varcas.roofline import (
    OP_CLASSES,
    bounds,
    break_even_acceptance,
    compute_bound_batch,
    decode,
    prefill,
    tokens_per_step,
)

MODELS = Path(varcas.__file__).parent / "configs"
LAW = settings(deadline=None, max_examples=50)
T4, H100 = gpus.gpu("T4"), gpus.gpu("H100-SXM")
HALF = Serve(dtype="half")
LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
LOGITS = 4096 * 32000


def llama(**changes: Any) -> ModelSpec:
    return from_config(json.loads((MODELS / "llama-2-7b" / "config.json").read_text()) | changes)


FP16 = llama()
AWQ = llama(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})


# ---- by hand: Llama-2-7B


def test_decode_by_hand() -> None:
    step = decode(FP16, HALF, 1, 1023)
    assert step.classes["attention_projections"].flops == 2 * 32 * 4 * 4096**2
    assert step.classes["mlp"].flops == 2 * 32 * 3 * 4096 * 11008
    assert step.classes["logits"].flops == 2 * LOGITS
    assert step.classes["attention_scores"].flops == 4 * 32 * 4096 * 1024
    assert step.classes["attention_scores"].bytes == 1024 * 2 * 32 * 4096 * 2
    assert step.classes["mlp"].bytes == 2 * 32 * 3 * 4096 * 11008
    assert step.seconds(T4) == pytest.approx(float(step.bytes) / 320e9)


def test_prefill_by_hand() -> None:
    step = prefill(FP16, HALF, 2, 100)
    assert step.classes["mlp"].flops == 200 * 2 * 32 * 3 * 4096 * 11008
    assert step.classes["logits"].flops == 2 * 2 * LOGITS, "one token a prompt is sampled"
    assert step.classes["attention_scores"].flops == 2 * 32 * 4 * 4096 * 100 * 101 / 2
    assert step.classes["mlp"].bytes == decode(FP16, HALF, 1, 0).classes["mlp"].bytes, "weights are read once"


def test_a_cached_prefix_leaves_the_rest() -> None:
    whole, rest = prefill(FP16, HALF, 1, 100), prefill(FP16, HALF, 1, 40, cached=60)
    first = prefill(FP16, HALF, 1, 60)
    for name in ("attention_projections", "attention_scores", "mlp"):
        assert whole.classes[name].flops == first.classes[name].flops + rest.classes[name].flops  # type: ignore[index]


def test_a_window_of_a_sequence() -> None:
    mistral = describe(MODELS / "mistral-7b-v0.1")  # 4096
    scores = decode(mistral, Serve(dtype="bfloat16"), 1, np.array([100, 4095, 5000, 9000])).classes["attention_scores"]
    assert list(scores.flops / (4 * 32 * 32 * 128)) == [101, 4096, 4096, 4096]
    assert list(scores.bytes / (32 * 2 * 8 * 128 * 2)) == [101, 4096, 4096, 4096]
    pairs = sum(min(query, 4096) for query in range(1, 6001))
    assert prefill(mistral, Serve(), 1, 6000).classes["attention_scores"].flops == 4 * 32 * 32 * 128 * pairs


def test_mla_decodes_over_the_latent_vectors() -> None:
    lite = describe(MODELS / "deepseek-v2-lite")
    scores = decode(lite, Serve(dtype="bfloat16"), 1, 999).classes["attention_scores"]
    assert scores.flops == 27 * 16 * 2 * (576 + 512) * 1000
    assert scores.bytes == 27 * 576 * 2 * 1000
    long = prefill(lite, Serve(dtype="bfloat16"), 1, 1000).classes["attention_scores"]
    assert long.flops == 27 * 16 * 2 * (192 + 128) * 1000 * 1001 / 2


def test_experts_are_read_once_each() -> None:
    mixtral = describe(MODELS / "mixtral-8x7b")
    serve, expert = Serve(dtype="bfloat16"), 3 * 4096 * 14336 * 32 * 2
    least = decode(mixtral, serve, np.array([1, 64]), 0).classes["moe"].bytes
    some = decode(mixtral, serve, np.array([1, 64]), 0, routing="uniform").classes["moe"].bytes
    router = 4096 * 8 * 32 * 2
    assert list((least - router) / expert) == [2, 2]
    assert (some[0] - router) / expert == pytest.approx(2)
    assert (some[1] - router) / expert == pytest.approx(8, rel=1e-6)
    flops = decode(mixtral, serve, 1, 0).classes["moe"].flops
    assert flops == 2 * (2 * 3 * 4096 * 14336 + 4096 * 8) * 32


# ---- the seed's own figures (docs/roofline.md)


def test_the_seeds_decode() -> None:
    """AI = 3 and 1.5 %: one sequence of 2048 tokens, 4-bit weights, on a T4 of 203 FLOP/byte."""
    step = decode(AWQ, HALF, 1, 2048)
    assert step.intensity == pytest.approx(3.0, abs=0.05)
    assert step.utilisation(T4) == pytest.approx(0.015, abs=0.0003)
    assert T4.ridge("fp16") == pytest.approx(203, abs=0.2)


def test_the_seeds_prefill() -> None:
    """AI = 150-1200: 16-bit weights, every operator's input and output counted, prompts of 160 to 2048 tokens."""
    found = prefill(FP16, HALF, 1, np.array([160, 2048]), activations=True).intensity
    assert list(found) == pytest.approx([150, 1200], rel=0.01)


def test_where_the_seeds_reading_is_off() -> None:
    eight = decode(AWQ, HALF, 8, np.array([200, 2048]))
    assert eight.intensity[0] == pytest.approx(24, rel=0.01), "8 x 3 only while the KV cache is small"
    assert eight.intensity[1] < 10
    short = prefill(FP16, HALF, 1, 160, activations=True)
    assert not short.compute_bound(T4), "an intensity of 150 is below the ridge: prefill is not compute-bound there"
    assert compute_bound_batch(AWQ, T4, HALF, 2048) == np.inf, "no batch makes its decode compute-bound"


# ---- laws

models = st.sampled_from(
    ["llama-2-7b", "llama-3.2-1b", "gemma-3-1b", "mixtral-8x7b", "deepseek-v2-lite", "phi-2", "qwen3-30b-a3b"]
).map(lambda name: describe(MODELS / name))
batches, contexts = st.integers(1, 512), st.integers(0, 32768)
some_gpus = st.sampled_from([T4, H100, gpus.gpu("A10G"), gpus.gpu("RTX-4090"), gpus.gpu("MI300X")])


@LAW
@given(model=models, batch=batches, context=contexts)
def test_classes_make_the_step(model: ModelSpec, batch: int, context: int) -> None:
    for step in (decode(model, HALF, batch, context), prefill(model, HALF, batch, context + 1)):
        assert set(step.classes) <= set(OP_CLASSES)
        assert step.flops == pytest.approx(sum(float(work.flops) for work in step.classes.values()))
        assert step.bytes == pytest.approx(sum(float(work.bytes) for work in step.classes.values()))


@LAW
@given(context=contexts, name=st.sampled_from(["llama-2-7b", "llama-3.2-1b", "gemma-2-2b", "phi-2", "qwen3-8b"]))
def test_a_dense_decode_reads_every_weight_and_the_cache_once(context: int, name: str) -> None:
    """Bytes are conserved: weights less the embedding (of which one row is read), and the cache."""
    model, step = describe(MODELS / name), decode(describe(MODELS / name), HALF, 1, context)
    embedding = next(w for w in model.weights if w.op == "embed").parameters * 2
    weights = model.weight_bytes("half") - (0 if model.tied else embedding)
    cache = float(step.classes["attention_scores"].bytes)
    padding = 64 * model.hidden_size * 4
    assert 0 <= float(step.bytes) - cache - weights - 2 * model.hidden_size <= padding
    if all(kind.window is None for kind in model.attention):
        assert cache == kv_bytes_per_token(model, HALF) * (context + 1)


@LAW
@given(model=models, gpu=some_gpus, batch=batches, context=contexts)
def test_more_sequences_take_longer_and_give_more(
    model: ModelSpec, gpu: gpus.GpuSpec, batch: int, context: int
) -> None:
    one, more = decode(model, HALF, batch, context), decode(model, HALF, batch + 1, context)
    assert more.seconds(gpu) >= one.seconds(gpu)
    assert (batch + 1) / more.seconds(gpu) >= batch / one.seconds(gpu) * (1 - 1e-12)
    assert decode(model, HALF, batch, context + 1).seconds(gpu) >= one.seconds(gpu)


@LAW
@given(model=models, gpu=some_gpus, batch=batches, prompt=st.integers(1, 32768))
def test_bounds_are_never_below_physics(model: ModelSpec, gpu: gpus.GpuSpec, batch: int, prompt: int) -> None:
    """No faster than peak arithmetic, nor than peak bandwidth; the order of kernels only adds to that."""
    for step in (decode(model, HALF, batch, prompt), prefill(model, HALF, batch, prompt)):
        fastest = max(gpu.peaks.values())
        assert step.seconds(gpu) >= step.flops / fastest
        assert step.seconds(gpu) >= step.bytes / gpu.memory_bytes_per_s
        assert step.serial_seconds(gpu) >= step.seconds(gpu) * (1 - 1e-12)
        assert 0 < step.utilisation(gpu) <= 1
    assert decode(model, HALF, batch, prompt, routing="uniform").bytes >= decode(model, HALF, batch, prompt).bytes
    counted = decode(model, HALF, batch, prompt, activations=True)
    assert counted.bytes > decode(model, HALF, batch, prompt).bytes


@LAW
@given(batch=batches, context=contexts, ranks=st.sampled_from([2, 4, 8]))
def test_tensor_parallel_divides_work_and_traffic(batch: int, context: int, ranks: int) -> None:
    one, each = (
        decode(FP16, HALF, batch, context),
        decode(FP16, replace(HALF, tensor_parallel_size=ranks), batch, context),
    )
    assert each.flops * ranks == pytest.approx(float(one.flops), rel=1e-3)
    assert each.bytes * ranks == pytest.approx(float(one.bytes), rel=1e-2)
    assert one.collective_bytes == 0 < each.collective_bytes


@LAW
@given(model=models, batch=batches, prompt=st.integers(1, 4096), output=st.integers(1, 4096))
def test_served_bounds(model: ModelSpec, batch: int, prompt: int, output: int) -> None:
    found = bounds(model, H100, HALF, batch, prompt, output)
    cheaper = bounds(model, H100, HALF, batch, prompt, output, cached=prompt // 2)
    drafting = bounds(model, H100, HALF, batch, prompt, output, drafted=3)
    assert found.ttft_s == prefill(model, HALF, 1, prompt).seconds(H100)
    assert cheaper.ttft_s <= found.ttft_s
    assert cheaper.tpot_s <= found.tpot_s
    assert cheaper.tokens_per_s >= found.tokens_per_s * (1 - 1e-9)
    verify = decode(model, HALF, batch, prompt, new_tokens=4).seconds(H100)
    assert float(found.tpot_s) / 4 <= float(drafting.tpot_s) == pytest.approx(float(verify) / 4)
    assert found.tokens_per_s * found.usd_per_m_tokens == pytest.approx(6.88 / 3600 * 1e6)
    assert found.tokens_per_s * found.joules_per_token == pytest.approx(700)


@LAW
@given(batch=batches, context=st.integers(0, 4096))
def test_the_compute_bound_batch_is_the_first(batch: int, context: int) -> None:
    model, serve = describe(MODELS / "llama-3.1-8b"), Serve(dtype="bfloat16")
    first = float(compute_bound_batch(model, H100, serve, context))
    assert bool(decode(model, serve, batch, context).compute_bound(H100)) == (batch >= first)


def test_arrays_broadcast() -> None:
    batch, context = np.arange(1, 9)[:, None], np.array([128, 1024])[None, :]
    grid = decode(AWQ, HALF, batch, context)
    assert grid.intensity.shape == (8, 2)
    assert grid.intensity[3, 1] == decode(AWQ, HALF, 4, 1024).intensity


# ---- fp8, prices, speculation


def test_fp8_multiplies_at_twice_the_rate_where_there_are_units() -> None:
    fp8, step = llama().quantised("fp8"), prefill(FP16, HALF, 1, 4096)
    narrow = prefill(fp8, HALF, 1, 4096)
    assert narrow.classes["mlp"].seconds(H100) == pytest.approx(float(step.classes["mlp"].seconds(H100)) / 2, rel=0.01)
    assert narrow.classes["mlp"].seconds(T4) == step.classes["mlp"].seconds(T4)


def test_no_price_is_not_free() -> None:
    found = bounds(FP16, replace(T4, price=None, power_w=None), HALF, 1, 10, 10)
    assert np.isnan(found.usd_per_m_tokens)
    assert np.isnan(found.joules_per_token)


@LAW
@given(drafted=st.integers(1, 8), acceptance=st.floats(0, 1))
def test_tokens_per_step(drafted: int, acceptance: float) -> None:
    tokens = float(tokens_per_step(acceptance, drafted))
    assert 1 <= tokens <= drafted + 1
    if acceptance < 1:
        assert tokens == pytest.approx((1 - acceptance ** (drafted + 1)) / (1 - acceptance))


def test_break_even_acceptance() -> None:
    batch = np.array([1, 8, 64, 512])
    free = break_even_acceptance(AWQ, T4, HALF, batch, 512, 5)
    assert free[0] < 0.01, "verifying six tokens of one sequence is one read of the weights"
    assert np.all(np.diff(free) > 0)
    slow = break_even_acceptance(AWQ, T4, HALF, 1, 512, 5, draft_s=lambda batch, context: 0.004 * batch)
    assert slow > free[0]
    assert break_even_acceptance(AWQ, T4, HALF, 1, 512, 5, draft_s=1.0) == np.inf
    plain = float(decode(AWQ, HALF, 1, 512).seconds(T4))
    verify = float(decode(AWQ, HALF, 1, 512, new_tokens=6).seconds(T4))
    assert tokens_per_step(slow, 5) * plain == pytest.approx(verify + 5 * 0.004)


def test_the_page_computes_what_it_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "roofline.md").read_text()
    block = re.search(r"```py\n(.*?)```", page, re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    for key, said in re.findall(r'"([^"]+)": .*# (.*)', block[1]):
        wanted = [np.inf if word == "never" else float(word) for word in said.split(", ")]
        assert np.atleast_1d(names["seed"][key]) == pytest.approx(wanted, rel=0.004), key


def test_the_pages_table_of_bounds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "roofline.md").read_text()
    rows = re.findall(r"\| (T4|L4|A10G|H100 SXM) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", page)
    assert len(rows) == 4
    for name, *cells in rows:
        batch, tpot_ms, rate, price = ([float(word) for word in cell.split(" / ")] for cell in cells)
        found = bounds(AWQ, gpus.gpu(name), HALF, np.array(batch), 300, 200)
        assert found.tpot_s * 1e3 == pytest.approx(tpot_ms, abs=0.051)
        assert found.tokens_per_s == pytest.approx(rate, abs=0.51)
        assert found.usd_per_m_tokens == pytest.approx(price, abs=0.0051)
