"""Parameters are exact against published counts; bytes follow the format; what is not described is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import varcas
from varcas.described import described_model, model_text
from varcas.errors import InputError
from varcas.model import FAMILIES, ModelSpec, describe, dtype_name, from_config
from varcas.quantisation import Quantisation, parse

MODELS = Path(varcas.__file__).parent / "configs"
LAW = settings(deadline=None, max_examples=50)

# directory in varcas/configs: (published parameters, where they are published)
GOLDEN = {
    "llama-2-7b": (6738415616, "Hugging Face API, safetensors.total 6738417664 less 32x64 stored inv_freq"),
    "llama-2-13b": (13015864320, "Hugging Face API, safetensors.total 13015866880 less 40x64 stored inv_freq"),
    "llama-2-70b": (68976648192, "Hugging Face API, safetensors.total 68976653312 less 80x64 stored inv_freq"),
    "llama-3.1-8b": (8030261248, "Hugging Face API, safetensors.total, rev d04e592b"),
    "llama-3.1-70b": (70553706496, "Hugging Face API, safetensors.total, rev 349b2ddb"),
    "llama-3.1-405b": (405853388800, "Hugging Face API, safetensors.total, rev b906e4dc"),
    "llama-3.2-1b": (1235814400, "Hugging Face API, safetensors.total"),
    "llama-3.2-3b": (3212749824, "Hugging Face API, safetensors.total"),
    "tinyllama-1.1b": (1100048384, "Hugging Face API, safetensors.total"),
    "smollm2-135m": (134515008, "Hugging Face API, safetensors.total"),
    "mistral-7b-v0.1": (7241732096, "Hugging Face API, safetensors.total"),
    "mistral-nemo-12b": (12247782400, "Hugging Face API, safetensors.total"),
    "qwen2.5-0.5b": (494032768, "Hugging Face API, safetensors.total"),
    "qwen2.5-3b": (3085938688, "Hugging Face API, safetensors.total"),
    "qwen2.5-7b": (7615616512, "Hugging Face API, safetensors.total"),
    "qwen2.5-14b": (14770033664, "Hugging Face API, safetensors.total"),
    "qwen2.5-32b": (32763876352, "Hugging Face API, safetensors.total"),
    "qwen2.5-72b": (72706203648, "Hugging Face API, safetensors.total"),
    "qwen3-0.6b": (596049920, "Hugging Face API, safetensors.total"),
    "qwen3-8b": (8190735360, "Hugging Face API, safetensors.total"),
    "qwen3-32b": (32762123264, "Hugging Face API, safetensors.total"),
    "qwen3-30b-a3b": (30532122624, "general.parameter_count of the GGUF; Hugging Face API, safetensors.total"),
    "qwen3-235b-a22b": (235093634560, "Hugging Face API, safetensors.total"),
    "qwen1.5-moe-a2.7b": (14315784192, "keras-hub qwen_moe presets"),
    "gemma-7b": (8537680896, "Hugging Face API, safetensors.total"),
    "gemma-2-2b": (2614341888, "keras-hub gemma_presets.py; Gemma 2 report, table 2"),
    "gemma-2-9b": (9241705984, "keras-hub gemma_presets.py; Gemma 2 report, table 2"),
    "gemma-2-27b": (27227128320, "Gemma 2 report, table 2 (26047480320 beside the embedding)"),
    "gemma-3-1b": (999885952, "Hugging Face API, safetensors.total"),
    "phi-2": (2779683840, "Hugging Face API, safetensors.total"),
    "phi-3-mini-4k": (3821079552, "keras-hub phi3_presets.py"),
    "phi-4": (14659507200, "general.parameter_count of Ollama's phi4"),
    "phi-4-mini": (3836021760, "Hugging Face API, safetensors.total"),
    "mixtral-8x7b": (46702792704, "keras-hub mixtral_presets.py"),
    "mixtral-8x22b": (140620634112, "Hugging Face API, safetensors.total"),
    "deepseek-v2-lite": (15706484224, "Hugging Face API, safetensors.total"),
    "deepseek-v2": (235741434880, "Hugging Face API, safetensors.total"),
    "deepseek-v3": (671026419200, "checkpoint headers without MTP and scales (README_WEIGHTS.md: 671B)"),
}

LLAMA: dict[str, Any] = json.loads((MODELS / "llama-2-7b" / "config.json").read_text())
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def llama(quantisation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    config = LLAMA | changes
    return from_config(config | {"quantization_config": quantisation} if quantisation else config)


def linear_elements(model: ModelSpec) -> int:
    return sum(weight.elements * weight.experts * len(weight.layers) for weight in model.weights if weight.linear)


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert describe(MODELS / name).parameters == GOLDEN[name][0]


def test_the_golden_table_is_wide_and_sourced() -> None:
    assert len(GOLDEN) >= 20
    assert all(source for _, source in GOLDEN.values())
    assert {path.name for path in MODELS.iterdir()} >= set(GOLDEN)
    covered = {json.loads((MODELS / name / "config.json").read_text())["model_type"] for name in GOLDEN}
    assert set(FAMILIES) - covered == {"gemma3"}, "gemma3 is gemma3_text with a vision tower"


@pytest.mark.skipif(
    not os.environ.get("VARCAS_TEST_META"), reason="VARCAS_TEST_META=1 builds models on the meta device"
)
@pytest.mark.parametrize(
    "name", ["gemma-3-1b", "phi-2", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "qwen3-8b", "mixtral-8x7b", "phi-4-mini"]
)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(MODELS / name))
    assert describe(MODELS / name).parameters == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22), ("deepseek-v3", 37), ("deepseek-v2", 21)],
)
def test_active_parameters_are_the_advertised_ones(name: str, billions: float) -> None:
    assert describe(MODELS / name).active_parameters / 1e9 == pytest.approx(billions, rel=0.035)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama-2-7b", {None: 32}),
        ("mistral-7b-v0.1", {4096: 32}),
        ("gemma-2-2b", {4096: 13, None: 13}),
        ("gemma-3-1b", {512: 22, None: 4}),
        ("phi-3-mini-4k", {2047: 32}),
        ("qwen2.5-7b", {None: 28}),
    ],
)
def test_windows(name: str, layers: dict[int | None, int]) -> None:
    assert {kind.window: kind.layers for kind in describe(MODELS / name).attention} == layers


def test_fp16_weights_are_two_bytes_a_parameter() -> None:
    """vLLM 0.24.0 on an H100: 12.55 GiB for Llama-2-7B in fp16."""
    model = llama()
    assert model.weight_bytes("half") == 2 * model.parameters
    assert model.weight_bytes("half") / 2**30 == pytest.approx(12.55, abs=0.005)


def test_awq_counts_scales_zeros_and_what_stays_unquantised() -> None:
    model = llama(AWQ)
    linear = linear_elements(model)
    by_hand = linear // 2 + linear // 128 * 2 + linear // 128 // 2 + 2 * (model.parameters - linear)
    assert model.weight_bytes("half") == by_hand == 3_889_307_648
    assert model.weight_bytes("half", wide_zeros=True) - by_hand == linear // 128 * 3 // 2


@pytest.mark.parametrize(
    ("config", "bytes_a_weight"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}, 0.5 + 2 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False}, 1 + 3 / 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.5 + 4 / 64),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
                "weights": {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True},
                "targets": ["Linear"]}}},
            0.5 + 2 / 128,
        ),
    ],
    ids=["gptq4", "gptq8", "nf4", "w4a16"],
)  # fmt: skip
def test_bytes_of_a_format(config: dict[str, Any], bytes_a_weight: float) -> None:
    model = llama(config)
    linear = linear_elements(model)
    assert model.weight_bytes("half") == linear * bytes_a_weight + 2 * (model.parameters - linear)


def test_fp8_is_one_byte_and_few_scales() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"weights": fp8, "input_activations": fp8, "targets": ["Linear"]}}
    model = llama({"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]})
    linear = linear_elements(model)
    assert model.quantisation is not None
    assert model.quantisation.activations == "fp8"
    assert 1 < (model.weight_bytes("half") - 2 * (model.parameters - linear)) / linear < 1.002
    assert llama().quantised("fp8").weight_bytes("half") == model.weight_bytes("half")


def test_deepseek_v3_holds_block_scales_and_the_absorbed_projection() -> None:
    model = describe(MODELS / "deepseek-v3")
    linear = linear_elements(model)
    wide = 2 * (model.parameters - linear)
    absorbed = 61 * 512 * 128 * 256 * 2
    scales = model.weight_bytes("bfloat16") - wide - linear - absorbed
    assert scales == pytest.approx(4 * linear / 128**2, rel=0.01)


def test_skipped_layers_stay_wide() -> None:
    some = llama(AWQ | {"modules_to_not_convert": ["layers.0.", "layers.31.mlp"]})
    every = llama(AWQ)
    left = 4 * 4096**2 + 2 * 3 * 4096 * 11008
    assert some.weight_bytes("half") - every.weight_bytes("half") == left * 2 - left * (0.5 + 2.5 / 128)
    assert llama(AWQ | {"modules_to_not_convert": ["re:.*"]}).quantisation.skips("anything")  # type: ignore[union-attr]


def test_tied_embeddings_are_held_once() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama()
    assert untied.parameters - tied.parameters == 32000 * 4096


@LAW
@given(ranks=st.sampled_from([1, 2, 4, 8]), name=st.sampled_from(sorted(GOLDEN)))
def test_tensor_parallel_loses_no_weight(ranks: int, name: str) -> None:
    """Ranks together hold everything, and a copy at most of what cannot be cut."""
    model = describe(MODELS / name)
    assume(model.attention[0].cuts_into(ranks))
    each, whole = model.weight_bytes("bfloat16", ranks), model.weight_bytes("bfloat16")
    assert each * ranks >= whole
    assert each <= whole
    if ranks == 1:
        assert each == whole


def test_tensor_parallel_halves_a_llama() -> None:
    model = describe(MODELS / "llama-3.1-70b")
    assert model.weight_bytes("bfloat16", 2) / model.weight_bytes("bfloat16") == pytest.approx(0.5, rel=1e-4)


def test_key_value_heads_are_copied_where_ranks_outnumber_them() -> None:
    model = describe(MODELS / "qwen2.5-7b")  # 4 key-value heads
    qkv = next(weight for weight in model.weights if len(weight.parts) == 3)
    assert qkv.shape_on_rank(4)[1] == (28 * 128) // 4 + 2 * 128
    assert qkv.shape_on_rank(7)[1] == (28 * 128) // 7 + 2 * 128


def test_a_vision_tower_is_said_to_be_missing() -> None:
    text = json.loads((MODELS / "gemma-3-1b" / "config.json").read_text())
    model = from_config({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    assert not model.complete
    assert model.parameters == GOLDEN["gemma-3-1b"][0]


def test_headers_are_counted_without_loading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert describe(tmp_path).checkpoint is None
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]},
        "b": {"dtype": "I32", "shape": [2], "data_offsets": [64, 72]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    checkpoint = describe(tmp_path).checkpoint
    assert checkpoint is not None
    assert (checkpoint.files, checkpoint.tensors, checkpoint.bytes) == (1, 2, 72)
    assert checkpoint.elements == {"F16": 32, "I32": 2}


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"])
def test_a_broken_safetensors_file_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="safetensors"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lama"}, "'lama' is not described here. Did you mean llama"),
        ({}, "'None' is not described"),
        ([], "is no mapping"),
        ({"model_type": "llama"}, "hidden_size"),
        (LLAMA | {"hidden_size": "wide"}, "wrong type"),
        (LLAMA | {"num_attention_heads": 0}, "wrong type"),
        (LLAMA | {"quantization_config": AWQ | {"bits": "few"}}, "wrong type"),
        (LLAMA | {"quantization_config": [4]}, "wrong type"),
        (LLAMA | {"quantization_config": {"quant_method": "compressed-tensors"}}, "mixed precision"),
        (LLAMA | {"torch_dtype": "int8"}, "no type to compute in"),
        (LLAMA | {"quantization_config": {"quant_method": "exotic"}}, "'exotic' is not described"),
    ],
)
def test_what_is_not_described_is_refused(config: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_config(config)


def test_mixed_precision_is_refused() -> None:
    groups = {str(bits): {"weights": {"num_bits": bits}, "targets": ["Linear"]} for bits in (4, 8)}
    with pytest.raises(InputError, match="mixed precision"):
        parse({"quant_method": "compressed-tensors", "config_groups": groups})


def test_only_two_formats_quantise_while_loading() -> None:
    with pytest.raises(InputError, match="quantization: 'awq'"):
        llama().quantised("awq")
    assert llama(AWQ).quantised("fp8").quantisation == llama(AWQ).quantisation
    assert llama().quantised("bitsandbytes").quantisation == Quantisation("bitsandbytes", "nf4", 4)


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no readable config\.json"):
        describe(tmp_path / "nowhere")


def test_dtypes_go_by_vllms_names() -> None:
    assert [dtype_name(name) for name in ("half", "bfloat16", "float", "torch.float16")] == [
        "float16",
        "bfloat16",
        "float32",
        "float16",
    ]


def test_the_command_prints_a_model() -> None:
    directory = str(MODELS / "deepseek-v3")
    done = subprocess.run(
        [sys.executable, "-m", "varcas", "models", "show", directory, "--json"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    shown = json.loads(done.stdout)
    assert shown["parameters"] == GOLDEN["deepseek-v3"][0]
    assert shown["quantisation"] == "fp8"
    assert shown["attention"][0]["latent_dim"] == 576
    assert "a latent vector of 576" in model_text(described_model(MODELS / "deepseek-v3"))
