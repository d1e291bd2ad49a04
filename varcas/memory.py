"""What a server holds on each GPU: weights, KV cache, the peak of a step, graphs, overhead; the KV tokens it reports.

Follows vLLM 0.32. What is exact there is exact here (weights, blocks, tokens of a given KV cache); what vLLM measures
at start (peak of a step, graphs, overhead) is estimated, and says so. Numbers of a configuration may be arrays: a
whole space is one call. All bytes are of one GPU.

For hard rules take `floor_bytes` against `GpuSpec.memory_bytes`: a lower bound against an upper bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from varcas.errors import InputError, nearest
from varcas.gpus import GIB, GpuSpec
from varcas.model import DTYPE_BYTES, Attention, ModelSpec, dtype_name

Floats = npt.NDArray[np.float64]
Number = int | float | npt.NDArray[Any]

KV_BITS: dict[str, float] = {
    "float32": 32, "float16": 16, "bfloat16": 16,
    "fp8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8, "fp8_inc": 8,
    "int8_per_token_head": 8, "fp8_per_token_head": 8, "int4_per_token_head": 4,
}  # fmt: skip
"""`kv_cache_dtype` to bits a cached number (`CacheDType` in vLLM's `config/cache.py`; `auto` is the model's type)."""
PER_TOKEN_HEAD_SCALE_BYTES = 8
"""fp32 for a key and a value: `TritonAttentionBackend.customize_spec`, vLLM `v1/attention/backends/triton_attn.py`."""
FP8_DS_MLA_BYTES = 656
"""A token and layer of MLA: `MLAAttention.get_kv_cache_spec`, vLLM `layers/attention/mla_attention.py`."""

OVERHEAD_BYTES = 300 * 2**20
"""Estimate: libraries' workspaces and what else is not weights, activations or graphs, after the context is made.

Left over on one H100 with vLLM 0.24.0 (docs/roofline.md); the CUDA context itself is made before vLLM's first look.
"""
COLLECTIVES_BYTES = 700 * 2**20
"""Estimate: NCCL and the custom all-reduce's buffers, with more than one GPU."""
GRAPH_BYTES_A_LAYER = 0.26 * 2**20
"""Estimate: of a captured size, a layer. Logs of vLLM show about 0.55 GiB for 32 layers and 67 sizes."""
CPU_RUNTIME_BYTES = 640 * 2**20
"""Estimate: of the CPU build's worker, resident beside weights: Python, torch and vLLM."""
CPU_LEFTOVER_BYTES = 480 * 2**20
"""Estimate: the most that glibc keeps of what was freed when weights were packed; half of small models' weights.

Both fitted to six servers (docs/roofline_evidence.md), where one with many matrices below 32 MiB kept 650 MiB more.
"""
LOGIT_BYTES = 14
"""Estimate of the sampler's peak a logit: the model's type, an fp32 copy, probabilities, one more copy."""


@dataclass(frozen=True, slots=True)
class Serve:
    """What of a configuration decides memory, spelled as vLLM's flags; arrays of one shape describe many.

    Attributes:
        dtype: that vLLM computes in.
        kv_cache_dtype: `auto` is `dtype`.
        max_model_len: longest sequence.
        max_num_seqs: sequences in a step.
        max_num_batched_tokens: tokens in a step.
        gpu_memory_utilization: share of the GPU's memory that vLLM asks for; 0.92 by default in 0.32, 0.90 before.
        block_size: tokens in a block.
        enforce_eager: no CUDA graphs.
        tensor_parallel_size: GPUs that share the weights.
        pipeline_parallel_size: stages that share the layers; a stage is reckoned as their mean.
        num_gpu_blocks_override: blocks, whatever the memory.
        kv_cache_memory_bytes: of the KV cache, whatever the utilisation.
        disable_hybrid_kv_cache_manager: windows save no memory.
        concurrent_batches: steps in flight: 2 with async scheduling, which is the default on GPUs.
    """

    dtype: str = "float16"
    kv_cache_dtype: str = "auto"
    max_model_len: Number = 2048
    max_num_seqs: Number = 256
    max_num_batched_tokens: Number = 2048
    gpu_memory_utilization: Number = 0.92
    block_size: int = 16
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    disable_hybrid_kv_cache_manager: bool = False
    concurrent_batches: int = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Where one GPU's memory goes, in bytes.

    Attributes:
        budget: what vLLM asks for: utilisation times what CUDA calls total.
        weights: with the allocator's rounding: what vLLM logs as `Model loading took`.
        activations: peak of a step of `max_num_batched_tokens` (estimate).
        logits: peak of sampling for `max_num_seqs` (estimate; reached when activations are gone).
        graphs: CUDA graphs (estimate; 0 when eager).
        overhead: libraries and collectives (estimate).
        block: of all layers' caches for one block.
        blocks_each: blocks that one sequence of `max_model_len` takes.
        kv_cache: left for the KV cache.
        blocks: in it.
        kv_tokens: that vLLM reports as `GPU KV cache size`.
    """

    budget: Floats
    weights: Floats
    activations: Floats
    logits: Floats
    graphs: Floats
    overhead: Floats
    block: Floats
    blocks_each: Floats
    kv_cache: Floats
    blocks: Floats
    kv_tokens: Floats

    @property
    def peak(self) -> Floats:
        """Activations or logits: never both at once (`profile_run` frees the one before the other)."""
        return np.maximum(self.activations, self.logits)

    @property
    def fits(self) -> npt.NDArray[np.bool_]:
        """One sequence of `max_model_len` has its blocks, with the block that vLLM keeps back.

        Source: `get_kv_cache_configs`, `_check_enough_kv_cache_memory`, vLLM `v1/core/kv_cache_utils.py`.
        """
        return self.blocks - 1 >= self.blocks_each


def memory(model: ModelSpec, gpu: GpuSpec, serve: Serve) -> Memory:
    """Estimates where one GPU's memory goes, as vLLM's own start-up does.

    Source: `Worker.determine_available_memory`, vLLM `v1/worker/gpu_worker.py`: KV cache = utilisation x total
    - (weights + overhead + peak) - graphs.

    Raises:
        InputError: a `kv_cache_dtype` that is not described here.
    """
    budget = _floats(serve.gpu_memory_utilization) * gpu.cuda_bytes
    weights = _floats(loaded_bytes(model, serve, gpu) / serve.pipeline_parallel_size)
    peak_forward, peak_logits = activation_bytes(model, serve), logit_bytes(model, serve)
    graphs = graph_bytes(model, serve)
    several = serve.tensor_parallel_size * serve.pipeline_parallel_size > 1
    extra = _floats(OVERHEAD_BYTES + (COLLECTIVES_BYTES if several else 0))
    left = budget - weights - extra - graphs - np.maximum(peak_forward, peak_logits)
    if serve.kv_cache_memory_bytes is not None:
        left = np.full_like(left, serve.kv_cache_memory_bytes)
    return _filled(model, serve, budget, weights, peak_forward, peak_logits, graphs, extra, left)


def cpu_memory(model: ModelSpec, serve: Serve, total_bytes: int, runtime_bytes: int = CPU_RUNTIME_BYTES) -> Memory:
    """The same for vLLM's CPU build: `VLLM_CPU_KVCACHE_SPACE` GiB exactly, else utilisation x memory - what it uses.

    Source: `CPUWorker.determine_available_memory`, vLLM `v1/worker/cpu_worker.py`; the environment variable becomes
    `kv_cache_memory_bytes` (`CpuPlatform.check_and_update_config`, `platforms/cpu.py`), and blocks are of 128 tokens.

    Args:
        model: the model.
        serve: with `kv_cache_memory_bytes` when the space is given.
        total_bytes: of the NUMA node the worker is bound to: `gpus.node_bytes`.
        runtime_bytes: resident beside weights (estimate).
    """
    budget = np.ceil(_floats(serve.gpu_memory_utilization) * total_bytes)
    weights = _floats(model.weight_bytes(serve.dtype, serve.tensor_parallel_size) + rotary_bytes(model, serve))
    zero, kept = np.zeros_like(budget), np.minimum(weights / 2, CPU_LEFTOVER_BYTES)
    extra = _floats(runtime_bytes + packed_output_bytes(model, serve) + kept)
    left = budget - weights - extra
    if serve.kv_cache_memory_bytes is not None:
        left = np.full_like(left, serve.kv_cache_memory_bytes)
    return _filled(model, serve, budget, weights, zero, zero, zero, extra, left)


def served_memory(model: ModelSpec, gpu: GpuSpec, serve: Serve, env: Mapping[str, str]) -> Memory:
    """`memory` on a GPU; on a CPU `cpu_memory`, with the cache that the environment gives before what the flag does.

    Raises:
        InputError: a `kv_cache_dtype` that is not described here, or a cache of the environment that vLLM refuses.
    """
    if not gpu.measured:
        return memory(model, gpu, serve)
    if (space := cpu_cache_bytes(env)) is not None:
        serve = replace(serve, kv_cache_memory_bytes=space)
    return cpu_memory(model, serve, gpu.cuda_bytes)


def packed_output_bytes(model: ModelSpec, serve: Serve) -> int:
    """The CPU build packs each matrix for its kernels, and keeps the original of the output projection alone.

    Source: `dispatch_cpu_unquantized_gemm(layer, remove_weight=False)`, vLLM `layers/vocab_parallel_embedding.py`.
    """
    ends = [weight for weight in model.weights if weight.op in ("embed", "logits")]
    inputs, outputs = ends[-1].shape_on_rank(serve.tensor_parallel_size)
    return inputs * outputs * DTYPE_BYTES[dtype_name(serve.dtype)]


def floor_bytes(model: ModelSpec, serve: Serve) -> Floats:
    """The least that a server with one sequence of `max_model_len` needs on each GPU: packed weights and its blocks.

    A lower bound: no peak, no graphs, no overhead, no rounding but the blocks'.
    """
    weights = model.weight_bytes(serve.dtype, serve.tensor_parallel_size) / serve.pipeline_parallel_size
    return weights + block_bytes(model, serve) * blocks_each(model, serve)


def ceiling_kv_tokens(model: ModelSpec, cache_bytes: Number, serve: Serve) -> Floats:
    """The most KV tokens that `cache_bytes` on each GPU hold. An upper bound where these are (`rules.room`).

    Of pipeline stages the one with least room decides, so no more than their mean.
    """
    blocks = np.floor(np.maximum(_floats(cache_bytes), 0) / block_bytes(model, serve))
    return _tokens(blocks, blocks_each(model, serve), serve)


def loaded_bytes(model: ModelSpec, serve: Serve, gpu: GpuSpec | None = None) -> int:
    """Weights on one GPU as vLLM logs them: torch's allocator rounds each tensor, and a rotary table comes on top.

    Source: `DeviceMemoryProfiler` in vLLM `utils/mem_utils.py` reads `max_memory_allocated`, which counts blocks.
    """
    hopper = gpu is not None and gpu.compute_capability == 90
    wide_zeros = hopper and model.quantisation is not None and model.quantisation.bits in (4, 8)
    sizes = model.tensors(serve.dtype, serve.tensor_parallel_size, wide_zeros)
    return sum(allocated_bytes(size) * count for size, count in sizes.items()) + rotary_bytes(model, serve)


def rotary_bytes(model: ModelSpec, serve: Serve) -> int:
    """Of `RotaryEmbedding.cos_sin_cache`, which layers share: vLLM `layers/rotary_embedding/base.py`.

    Gemma 3 turns by other angles where a window is: a table for each kind (`models/gemma3.py`: `rope_local_base_freq`).
    """
    tables = len(model.attention) if model.family in ("gemma3", "gemma3_text") else 1
    return tables * model.max_position * model.rotary_dim * DTYPE_BYTES[dtype_name(serve.dtype)]


def allocated_bytes(size: int) -> int:
    """Bytes that torch's CUDA allocator counts for a tensor.

    Source: torch `c10/cuda/CUDACachingAllocator.cpp`: `round_size` (512), `get_allocation_size` (above 10 MiB in steps
    of 2 MiB), `should_split` (a rest of at most 1 MiB stays with the block).
    """
    rounded = -(-size // 512) * 512
    if rounded < 10 * 2**20:
        return rounded
    segment = -(-rounded // (2 * 2**20)) * 2 * 2**20
    return segment if segment - rounded <= 2**20 else rounded


def kv_bytes_per_token(model: ModelSpec, serve: Serve) -> float:
    """Bytes that one GPU caches for one token in all layers, windows not considered.

    Source: `AttentionSpec.state_content_size_bytes`, vLLM `v1/kv_cache_interface.py`; key-value heads are cut by tensor
    parallelism and copied when there are fewer than GPUs (`ModelConfig.get_num_kv_heads`, `config/model.py`).
    """
    return sum(kind.layers * layer_kv_bytes(kind, serve) for kind in model.attention)


def layer_kv_bytes(kind: Attention, serve: Serve) -> float:
    """Bytes that one GPU caches for one token in one layer.

    Raises:
        InputError: a `kv_cache_dtype` that is not described here.
    """
    if serve.kv_cache_dtype == "fp8_ds_mla" and kind.latent_dim:
        return FP8_DS_MLA_BYTES
    name = serve.dtype if serve.kv_cache_dtype == "auto" else serve.kv_cache_dtype
    name = name if name in KV_BITS else _kv_name(name)
    if kind.latent_dim:
        return kind.latent_dim * KV_BITS[name] / 8
    heads = max(1, kind.kv_heads // serve.tensor_parallel_size)
    scales = PER_TOKEN_HEAD_SCALE_BYTES if name.endswith("per_token_head") else 0
    return heads * ((kind.head_dim + kind.value_dim) * KV_BITS[name] / 8 + scales)


def _kv_name(name: str) -> str:
    if name in ("half", "float", "fp16", "bf16", "fp32"):
        return dtype_name(name)
    raise InputError(
        f"kv_cache_dtype: {name!r} is not described here.{nearest(name, KV_BITS)} Known: auto, {', '.join(KV_BITS)}."
    )


def _groups(model: ModelSpec, serve: Serve) -> tuple[int, list[tuple[Attention, int]]]:
    """Layers in a group, and how many groups each kind of attention makes.

    Source: `_get_kv_cache_groups_uniform_page_size`, vLLM `v1/core/kv_cache_utils.py`: groups as large as the smaller
    kind, or as the larger one when it is less than 1.5 times that; the last is padded.
    """
    kinds = model.attention
    if len(kinds) == 1 or serve.disable_hybrid_kv_cache_manager:
        return sum(kind.layers for kind in kinds), [(_widest(kinds), 1)]
    counts = [kind.layers for kind in kinds]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return size, [(kind, math.ceil(kind.layers / size)) for kind in kinds]


def _widest(kinds: tuple[Attention, ...]) -> Attention:
    """A kind that sees everything when any does."""
    return min(kinds, key=lambda kind: kind.window is not None)


def block_bytes(model: ModelSpec, serve: Serve) -> float:
    """Bytes of one block in all layers of a group: `_get_kv_cache_bytes_per_block`, `v1/core/kv_cache_utils.py`."""
    size, groups = _groups(model, serve)
    width = max(layer_kv_bytes(kind, serve) for kind, _ in groups)
    return size * serve.block_size * width / serve.pipeline_parallel_size


def blocks_each(model: ModelSpec, serve: Serve) -> Floats:
    """Blocks that one sequence of `max_model_len` takes, over all groups.

    Source: `FullAttentionSpec.max_memory_usage_bytes` and `SlidingWindowSpec.max_admission_blocks_per_request`, vLLM
    `v1/kv_cache_interface.py`: a window holds itself less one and the tokens in flight, and one block more.
    """
    length, total = _floats(serve.max_model_len), np.zeros(())
    for kind, count in _groups(model, serve)[1]:
        held = length
        blocks = np.ceil(held / serve.block_size)
        if kind.window is not None:
            in_flight = serve.concurrent_batches * _floats(serve.max_num_batched_tokens)
            blocks = np.ceil(np.minimum(kind.window - 1 + in_flight, length) / serve.block_size) + 1
        total = total + count * blocks
    return _floats(total)


def activation_bytes(model: ModelSpec, serve: Serve) -> Floats:
    """Estimate of a step's peak: residual, a layer's input, its widest output and what comes of that.

    `GPUModelRunner.profile_run` runs `max_num_batched_tokens` at once, without attention over a cache. In the MLP the
    gated output (half as wide) is made while `gate_up` still lives; with experts both exist for each expert used.
    """
    tokens, ranks = _floats(serve.max_num_batched_tokens), serve.tensor_parallel_size
    widths = [
        weight.shape_on_rank(ranks)[1] * 1.5 * weight.used
        for weight in model.weights
        if weight.inputs and weight.op in ("attention", "mlp", "moe")
    ]
    return tokens * (max(widths) + 2 * model.hidden_size) * DTYPE_BYTES[dtype_name(serve.dtype)]


def logit_bytes(model: ModelSpec, serve: Serve) -> Floats:
    """Estimate of sampling's peak: `_dummy_sampler_run` samples for `max_num_seqs` sequences at once."""
    width = DTYPE_BYTES[dtype_name(serve.dtype)]
    sequences = np.minimum(_floats(serve.max_num_seqs), _floats(serve.max_num_batched_tokens))
    kept = _floats(serve.max_num_batched_tokens) * model.hidden_size * width
    return sequences * model.vocab_size * LOGIT_BYTES + kept


def graph_bytes(model: ModelSpec, serve: Serve) -> Floats:
    """Estimate of CUDA graphs; 0 when eager. vLLM takes them from the KV cache since 0.21.

    Sizes as `VllmConfig._set_cudagraph_sizes` (`config/vllm.py`): 1, 2, 4, then 8 to 256 by 8, then by 16, up to
    `min(2 x max_num_seqs, 512)`.
    """
    top = np.minimum(np.minimum(2 * _floats(serve.max_num_seqs), 512), _floats(serve.max_num_batched_tokens))
    small = np.minimum(3, 1 + np.floor(np.log2(np.maximum(top, 1))))
    sizes = small + np.floor(np.minimum(top, 255) / 8) + np.maximum(0, np.floor((top - 256) / 16) + 1)
    return (
        np.zeros_like(sizes)
        if serve.enforce_eager
        else sizes * model.num_layers / serve.pipeline_parallel_size * GRAPH_BYTES_A_LAYER
    )


def _filled(
    model: ModelSpec,
    serve: Serve,
    budget: Floats,
    weights: Floats,
    activations: Floats,
    logits: Floats,
    graphs: Floats,
    overhead: Floats,
    left: Floats,
) -> Memory:
    block, each = _floats(block_bytes(model, serve)), blocks_each(model, serve)
    blocks = np.floor(np.maximum(left, 0) / block)
    if serve.num_gpu_blocks_override is not None:
        blocks = np.full_like(blocks, serve.num_gpu_blocks_override)
    tokens = _tokens(blocks, each, serve)
    return Memory(budget, weights, activations, logits, graphs, overhead, block, each, left, blocks, tokens)


def _tokens(blocks: Floats, each: Floats, serve: Serve) -> Floats:
    """Source: `get_kv_cache_capacity`, vLLM `v1/core/kv_cache_utils.py`: sequences that fit, times `max_model_len`."""
    return np.floor(blocks / each * _floats(serve.max_model_len))


def settings(flags: Mapping[str, Any], model: ModelSpec, gpu: GpuSpec) -> Serve:
    """What vLLM 0.32 makes of flags on a GPU, defaults filled in as its server does.

    Source: `EngineArgs.get_batch_defaults` and `_set_default_max_num_seqs_and_batched_tokens_args`, vLLM
    `engine/arg_utils.py`; blocks of 16, on a CPU 128 (`platforms/cpu.py`).

    Args:
        flags: of a configuration, as vLLM spells them; those that do not bear on memory are ignored.
        model: whose `dtype` and length are the defaults.
        gpu: `measured` for a CPU.

    Raises:
        InputError: a number that vLLM does not read, or one that it finds at start alone (`max_model_len: auto`).
    """
    ranks = whole(flags, "tensor_parallel_size") or 1
    tokens, seqs = _batch_defaults(gpu, ranks)
    length = whole(flags, "max_model_len") or model.max_position
    seqs_given, tokens_given = whole(flags, "max_num_seqs"), whole(flags, "max_num_batched_tokens")
    seqs = seqs_given or seqs
    if tokens_given:
        tokens = tokens_given
    else:
        tokens = max(tokens, length) if flags.get("enable_chunked_prefill") is False else tokens
        tokens = min(seqs * length, tokens)
    return Serve(
        dtype=_dtype(str(flags.get("dtype") or "auto"), model, gpu),
        kv_cache_dtype=str(flags.get("kv_cache_dtype") or "auto"),
        max_model_len=length,
        max_num_seqs=seqs if seqs_given else min(seqs, tokens),
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=_share(flags),
        block_size=whole(flags, "block_size") or _block_size(model, gpu),
        enforce_eager=bool(flags.get("enforce_eager", False)),
        tensor_parallel_size=ranks,
        pipeline_parallel_size=whole(flags, "pipeline_parallel_size") or 1,
        num_gpu_blocks_override=whole(flags, "num_gpu_blocks_override"),
        kv_cache_memory_bytes=whole(flags, "kv_cache_memory_bytes"),
        disable_hybrid_kv_cache_manager=bool(flags.get("disable_hybrid_kv_cache_manager")),
        concurrent_batches=1 if gpu.measured or flags.get("async_scheduling") is False else 2,
    )


MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SUFFIXED = ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes")
"""Flags that vLLM's command line takes with such a suffix."""


def whole(flags: Mapping[str, Any], name: str) -> int | None:
    """A positive integer as vLLM's command line reads it: `2k` is 2000, `2K` 2048; None where none is given.

    Source: `human_readable_int`, vLLM `utils/argparse_utils.py`.

    Raises:
        InputError: it is none, or -1 or `auto`, which vLLM finds at start.
    """
    value = flags.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", value.strip())):
        number, suffix = match.groups()
        if (suffix.islower() or "." not in number) and (not suffix or name in SUFFIXED):
            found = int(float(number) * MULTIPLES[suffix]) if "." in number else int(number) * MULTIPLES.get(suffix, 1)
            if found > 0:
                return found
    if str(value).strip().lower() in ("-1", "auto"):
        raise InputError(f"{name}: {value!r}: vLLM finds it at start alone. Give a number, e.g. {name}: 2048.")
    allowed = " or a text like 2k (2000) or 2K (2048)" if name in SUFFIXED else ""
    raise InputError(f"{name}: {value!r}: is no positive integer. Write one{allowed}, e.g. {name}: 2048.")


def cpu_cache_bytes(env: Mapping[str, str]) -> int | None:
    """Bytes that `VLLM_CPU_KVCACHE_SPACE` gives the CPU build's KV cache; None without it, or where it is empty.

    Source: `CpuPlatform.check_and_update_config`, vLLM `platforms/cpu.py`: an integer of GiB.

    Raises:
        InputError: it is no integer.
    """
    space = env.get("VLLM_CPU_KVCACHE_SPACE", "").strip()
    if space and not space.isdecimal():
        raise InputError(f"VLLM_CPU_KVCACHE_SPACE: {space!r}: is no integer of GiB, and vLLM refuses it. Write e.g. 4.")
    return int(space) * GIB if space else None


def _share(flags: Mapping[str, Any]) -> float:
    share = flags.get("gpu_memory_utilization")
    if share is None:
        return 0.92
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise InputError(f"gpu_memory_utilization: {share!r}: is no number. Write one above 0 and at most 1, e.g. 0.9.")
    return float(share)


def _batch_defaults(gpu: GpuSpec, ranks: int) -> tuple[int, int]:
    """`max_num_batched_tokens` and `max_num_seqs` of a server without flags."""
    if gpu.measured:
        return 2048 * ranks, 128 * ranks
    if gpu.cuda_bytes >= 160 * GIB:
        return 16384, 1024
    if gpu.cuda_bytes >= 70 * GIB and "A100" not in gpu.name:
        return 8192, 1024
    return 2048, 256


def _block_size(model: ModelSpec, gpu: GpuSpec) -> int:
    return 128 if gpu.measured and not model.attention[0].latent_dim else 16


def _dtype(name: str, model: ModelSpec, gpu: GpuSpec) -> str:
    """`auto`: the checkpoint's, fp32 narrowed; without bf16 units fp16 (`_get_and_verify_dtype`, `config/model.py`)."""
    if name != "auto":
        return dtype_name(name)
    narrow = "bfloat16" if model.dtype == "float32" else model.dtype
    old = gpu.compute_capability is not None and gpu.compute_capability < 80
    return "float16" if narrow == "bfloat16" and old else narrow


def _floats(number: Number) -> Floats:
    return np.asarray(number, dtype=np.float64)
