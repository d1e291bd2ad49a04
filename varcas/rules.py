"""Rules: which configurations cannot work, each with its numbers and its source, before a server is started.

A hard rule compares a lower bound of what is needed with an upper bound of what is there, or repeats what vLLM itself
refuses in the versions that were read. A soft rule is an estimate or a habit: it orders, and never prunes. A rule that
lacks a fact (the model, the GPU, the version) says nothing.

Hard rules must never be wrong. So they say nothing either when a flag is given that changes what they reckon with
(`LOOSE`), and a value that vLLM might read otherwise (`"2k"`, `-1`) counts as not given.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import JsonValue

from varcas.errors import InputError
from varcas.gpus import GIB, GpuSpec
from varcas.memory import Serve, layer_kv_bytes, memory, settings
from varcas.model import ModelSpec, dtype_name
from varcas.records import LATENCY_METRICS
from varcas.roofline import Step, decode, prefill

Kind = Literal["hard", "soft"]
Evidence = Literal["cpu", "gpu", "source-only"]
Flags = Mapping[str, JsonValue]
Floats = npt.NDArray[np.float64]
Found = TypeVar("Found")

READ = ("0.15.1", "0.24.0", "0.32.0", "0.33.0")
"""Versions of vLLM whose source was read for every rule that repeats it; those between two that agree are taken to
agree, and newer or older ones are not spoken about."""
SINCE_0_15, SINCE_0_24, SINCE_0_32 = ">=0.15.1,<0.34", ">=0.24,<0.34", ">=0.32,<0.34"


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """What all configurations of a study share. A field left at its default is unknown, and silences some rules.

    Attributes:
        model: None where the architecture is not described.
        config: the model's raw `config.json`.
        drafts: draft models that are described, by the name that `speculative_config.model` gives.
        gpu: None where the catalogue lacks it. Hard rules need upper bounds: take `gpus.ceiling`.
        on_cpu: servers run vLLM's CPU build; `gpu` is then ignored.
        host_memory_bytes: of the CPU host.
        gpus_per_node: GPUs that one server can have.
        engine_version: of the installed vLLM.
        env: the server's environment, inherited variables too.
        slo: limits in ms, e.g. `{"ttft_p95_ms": 500}`.
        prompt_tokens: of every request that the SLO is held against; where that depends on the server (users in a
            closed loop), of the shortest one alone.
        output_tokens: of the same requests; likewise.
        shared_tokens: the most of a prompt that a prefix cache may hold already: one number, or one for each request.
        drawn_for: `max_model_len` that the lengths were drawn for; None when they are the same for all.
    """

    model: ModelSpec | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    drafts: Mapping[str, ModelSpec] = field(default_factory=dict)
    gpu: GpuSpec | None = None
    on_cpu: bool = False
    host_memory_bytes: int | None = None
    gpus_per_node: int | None = None
    engine_version: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    slo: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: Sequence[int] | npt.NDArray[Any] = ()
    output_tokens: Sequence[int] | npt.NDArray[Any] = ()
    shared_tokens: int | Sequence[int] | npt.NDArray[Any] = 0
    drawn_for: int | None = None
    _known: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """What `make` gives, made once for a key."""
        if key not in self._known:
            self._known[key] = make()
        found: Found = self._known[key]
        return found

    @property
    def capability(self) -> int | None:
        """CUDA's compute capability times 10; None where there is none or it is unknown."""
        return None if self.on_cpu or self.gpu is None else self.gpu.compute_capability


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a configuration is not worth a start.

    Attributes:
        rule: its name.
        kind: hard or soft.
        message: with the numbers.
        source: file and symbol in vLLM, or a formula.
    """

    rule: str
    kind: Kind
    message: str
    source: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One reason why configurations cannot work.

    Attributes:
        name: of it, for `disabled` and for rows.
        kind: hard rules prune, soft ones order.
        versions: of vLLM that it holds for (PEP 440); "" for any, known or not.
        reads: flags that it looks at, and no others.
        source: file and symbol in vLLM (below `vllm/`), or a formula.
        evidence: where a real refusal was seen.
        check: the reason with its numbers, or None.
        speaks: whether it can say anything about a site at all.
    """

    name: str
    kind: Kind
    versions: str
    reads: tuple[str, ...]
    source: str
    evidence: Evidence
    check: Callable[[Site, Flags], str | None]
    speaks: Callable[[Site], bool] = lambda site: True

    def holds_for(self, version: Version | None) -> bool:
        """Whether it speaks about this vLLM."""
        if not self.versions:
            return True
        return version is not None and _specifiers(self.versions).contains(version, prereleases=True)


@functools.cache
def _specifiers(versions: str) -> SpecifierSet:
    return SpecifierSet(versions)


# ---- reading flags


def _integer(flags: Flags, name: str, default: int | None = None) -> int | None:
    """A positive integer; None for anything else that is given."""
    value = flags.get(name)
    if value is None:
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _number(flags: Flags, name: str) -> float | None:
    value = flags.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _word(flags: Flags, name: str) -> str:
    """A text in small letters; "" for anything else."""
    value = flags.get(name)
    return value.lower() if isinstance(value, str) else ""


# ---- what one GPU holds, and how long a step takes: found once for each combination of the flags that bear on it

TYPES = ("dtype", "kv_cache_dtype", "quantization")
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel")
LOOSE: dict[str, tuple[JsonValue, ...]] = {
    **dict.fromkeys(
        (
            "additional_config", "attention_config", "config_format", "convert", "cpu_offload_gb", "cpu_offload_params",
            "diffusion_config", "engram_config", "hf_config_path", "hf_overrides", "kernel_config",
            "kv_offloading_size", "kv_sharing_fast_prefill", "kv_transfer_config", "linear_backend",
            "model_class_overrides", "model_impl", "model_loader_extra_config", "moe_backend", "offload_backend",
            "offload_group_size", "offload_num_in_group", "offload_params", "offload_prefetch_step",
            "override_generation_config", "quantization_config", "rope_scaling", "rope_theta", "runner",
            "scheduler_cls", "swa_bounded_replay", "task", "worker_cls",
        ),
        ("auto",),
    ),
    "decode_context_parallel_size": (1,),
    "generation_config": ("auto", "vllm"),
    "prefill_context_parallel_size": (1,),
    "load_format": ("auto", "safetensors", "dummy", "pt", "hf"),
}  # fmt: skip
"""Flags under which a GPU may hold or do less than is reckoned here, and values that change nothing."""
LOOSE_ENV = ("VLLM_MARLIN_INPUT_DTYPE", "VLLM_PLUGINS")
SHAPE = (*TYPES, *PARALLEL, *LOOSE)

METHODS = {
    "awq": ("awq", "awq_marlin", "auto_awq"),
    "gptq": ("gptq", "gptq_marlin", "auto_gptq"),
    "fp8": ("fp8",),
    "compressed-tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes",),
}
"""Method of a checkpoint to what `--quantization` may call it without changing it."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A model as one GPU holds it.

    Attributes:
        model: with the format of its linear layers.
        serve: types and tensor parallelism.
        stages: of pipeline parallelism.
        replicas: of data parallelism, over which experts are spread or cut; 1 without experts.
        weight_bytes: packed, on the GPU that holds most: at least the mean over stages.
        kinds: bytes that a token takes in the layers of one kind, and the window of that kind.
        words: what is held, for messages.
    """

    model: ModelSpec
    serve: Serve
    stages: int
    replicas: int
    weight_bytes: float
    kinds: tuple[tuple[float, int | None], ...]
    words: str

    def sequence_bytes(self, length: int) -> float:
        """Keys and values of one sequence, without rounding to blocks; a window holds at least itself."""
        return sum(each * (length if window is None else min(length, window)) for each, window in self.kinds)


def _held(site: Site, flags: Flags) -> _Held | None:
    """None where something is unknown, or is given that is not described here."""
    if site.model is None or _is_loose(flags):
        return None
    ranks, stages = _integer(flags, "tensor_parallel_size", 1), _integer(flags, "pipeline_parallel_size", 1)
    replicas = _integer(flags, "data_parallel_size", 1) if site.model.is_moe else 1
    dtype, cache, method = flags.get("dtype"), flags.get("kv_cache_dtype"), flags.get("quantization")
    if ranks is None or stages is None or replicas is None:
        return None
    if not (_is_name(dtype) and _is_name(cache) and _is_name(method)):
        return None
    key = (dtype, cache, method, ranks, stages, replicas)
    return site.once(("held", *key), lambda: _hold(site, *key))


def _is_name(value: JsonValue) -> bool:
    return value is None or isinstance(value, str)


_LOOSE_NAMES = frozenset(LOOSE)


def _is_loose(flags: Flags) -> bool:
    if _LOOSE_NAMES.isdisjoint(flags):  # nearly always, and quick
        return False
    return any(flags[name] and flags[name] not in LOOSE[name] for name in _LOOSE_NAMES.intersection(flags))


def _hold(site: Site, dtype: Any, cache: Any, method: Any, ranks: int, stages: int, replicas: int) -> _Held | None:
    model = site.model
    if model is None or (model.quantisation is not None and method not in (None, *METHODS[model.quantisation.method])):
        return None
    try:
        model = model if method is None else model.quantised(method)
        serve = Serve(_computed_in(model, dtype), _cached_in(site, model, cache), tensor_parallel_size=ranks)
        weights = (model.weight_bytes(serve.dtype, ranks) - _copied_bytes(model, ranks)) / (stages * replicas)
        kinds = tuple((kind.layers * layer_kv_bytes(kind, serve) / stages, kind.window) for kind in model.attention)
    except InputError:  # a type or a format that is not described
        return None
    words = (
        f"{model.parameters / 1e9:.3g}e9 parameters, {model.quantisation.method if model.quantisation else serve.dtype}"
    )
    words += f", {ranks * stages} GPUs" if ranks * stages > 1 else ""
    return _Held(model, serve, stages, replicas, weights, kinds, words)


def _cached_in(site: Site, model: ModelSpec, cache: str | None) -> str:
    """`auto` is fp8 where the checkpoint says so (`kv_cache_scheme`), or may say so."""
    if cache not in (None, "auto"):
        return str(cache)
    told = site.config.get("quantization_config") or {}
    if any(key in str(told) for key in ("kv_cache_scheme", "kv_cache_quant_algo")):
        return "fp8"
    silent = bool(site.config) or model.quantisation is None or model.quantisation.method in ("awq", "gptq")
    return "auto" if silent else "fp8"


def _copied_bytes(model: ModelSpec, ranks: int) -> int:
    """Of MLA's widened copy of `kv_b_proj`, which `weight_bytes` counts: versions differ about it."""
    if model.quantisation is None:
        return 0
    up = [weight for weight in model.weights if weight.parts[0].name == "kv_b_proj"]
    return sum(math.prod(weight.shape_on_rank(ranks)) * 4 * len(weight.layers) for weight in up)


def _computed_in(model: ModelSpec, dtype: str | None) -> str:
    """`auto` narrows fp32 and may widen fp16 to fp32: what is narrow is the lower bound."""
    if dtype not in (None, "auto"):
        return dtype_name(str(dtype))
    return "bfloat16" if model.dtype == "float32" else model.dtype


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.3f} MiB"


# ---- weights and KV cache against memory


def _memory_bytes(site: Site) -> int | None:
    if site.on_cpu:
        return site.host_memory_bytes
    return None if site.gpu is None or site.gpu.measured else site.gpu.memory_bytes


def _budget(site: Site, flags: Flags) -> float | None:
    """The most that weights and KV cache of a server may take of one GPU, or of the CPU's memory."""
    total = _memory_bytes(site)
    if total is None:
        return None
    share = _number(flags, "gpu_memory_utilization")
    sized = any(flags.get(name) is not None for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override"))
    if share is None or not 0 < share <= 1 or sized:  # what sizes the cache itself overrules the share
        share = 1.0
    return share * total


def _there(site: Site, flags: Flags, budget: float) -> str:
    where = "this host" if site.on_cpu or site.gpu is None else f"a {site.gpu.name}"
    return f"gpu_memory_utilization allows at most {_gib(budget)} on {where}"


def _weights_beyond_memory(site: Site, flags: Flags) -> str | None:
    held, total = _held(site, flags), _memory_bytes(site)
    if held is None or total is None or site.gpu is None or held.weight_bytes <= total:
        return None
    return (
        f"weights take at least {_gib(held.weight_bytes)} ({held.words}); a {site.gpu.name} has at most {_gib(total)}"
    )


def _weights_do_not_fit(site: Site, flags: Flags) -> str | None:
    held, budget = _held(site, flags), _budget(site, flags)
    if held is None or budget is None or held.weight_bytes <= budget:
        return None
    return f"weights take at least {_gib(held.weight_bytes)} ({held.words}); {_there(site, flags, budget)}"


def _sequence_does_not_fit(site: Site, flags: Flags) -> str | None:
    length = _integer(flags, "max_model_len")
    if length is None or flags.get("num_gpu_blocks_override") is not None:
        return None
    held, budget = _held(site, flags), _budget(site, flags)
    if held is None or budget is None:
        return None
    cache = held.sequence_bytes(length)
    if held.weight_bytes + cache <= budget:
        return None
    return (
        f"weights take at least {_gib(held.weight_bytes)} ({held.words}) and the KV cache of one sequence of "
        f"{length} tokens {_gib(cache)}; {_there(site, flags, budget)}"
    )


def _cpu_share_too_small(site: Site, flags: Flags) -> str | None:
    """Without a given size the CPU build takes its share of the memory less what the worker holds, weights included."""
    held, budget = _held(site, flags), _budget(site, flags)
    if held is None or budget is None or _given_cache(site, flags) is not None:
        return None
    if held.serve.tensor_parallel_size > 1 or flags.get("num_gpu_blocks_override") is not None:
        return None
    length = _integer(flags, "max_model_len")
    cache = 0.0 if length is None else held.sequence_bytes(length)
    if held.weight_bytes + cache <= budget:
        return None
    return (
        f"weights take at least {_gib(held.weight_bytes)} and the KV cache of one sequence {_gib(cache)}; "
        f"{_there(site, flags, budget)}"
    )


def _given_cache(site: Site, flags: Flags) -> tuple[int, str] | None:
    """Bytes of the KV cache where a setting fixes them, and its name."""
    if site.on_cpu and (space := site.env.get("VLLM_CPU_KVCACHE_SPACE")):
        return (int(space) * GIB, "VLLM_CPU_KVCACHE_SPACE") if space.isdecimal() else None
    given = _integer(flags, "kv_cache_memory_bytes")
    return None if given is None else (given, "kv_cache_memory_bytes")


def _given_cache_too_small(site: Site, flags: Flags) -> str | None:
    given, length = _given_cache(site, flags), _integer(flags, "max_model_len")
    if given is None or length is None or flags.get("num_gpu_blocks_override") is not None:
        return None
    held = _held(site, flags)
    if held is None:
        return None
    cache = held.sequence_bytes(length)
    if cache <= given[0]:
        return None
    return (
        f"the KV cache of one sequence of {length} tokens takes at least {_gib(cache)}; {given[1]} gives "
        f"{_gib(given[0])}"
    )


def _given_cache_beyond_memory(site: Site, flags: Flags) -> str | None:
    given, total = _given_cache(site, flags), _memory_bytes(site)
    if given is None or total is None or given[0] <= total or flags.get("num_gpu_blocks_override") is not None:
        return None
    return f"{given[1]} asks for {_gib(given[0])} of KV cache; there are {_gib(total)}"


CPU_BLOCK, LARGEST_BLOCK, LEAST_BLOCK = 128, 256, 16
"""Tokens in a block when `block_size` leaves it to vLLM: on a CPU (`platforms/cpu.py`), and the most on a GPU; fewer
than the last may be raised."""


def _blocks_too_few(site: Site, flags: Flags) -> str | None:
    blocks, length = _integer(flags, "num_gpu_blocks_override"), _integer(flags, "max_model_len")
    if blocks is None or length is None or site.model is None or _is_loose(flags):
        return None
    kinds = site.model.attention
    if len(kinds) > 1 or kinds[0].window is not None or kinds[0].latent_dim:
        return None
    block = _integer(flags, "block_size") or (CPU_BLOCK if site.on_cpu else LARGEST_BLOCK)
    tokens = blocks * max(block, LEAST_BLOCK)
    if length <= tokens:
        return None
    return f"num_gpu_blocks_override {blocks} makes at most {tokens} tokens of KV cache; max_model_len is {length}"


def _estimated_too_small(site: Site, flags: Flags) -> str | None:
    held = _held(site, flags)
    if held is None or site.gpu is None or site.on_cpu or site.gpu.measured or held.stages > 1 or held.replicas > 1:
        return None
    try:
        serve = settings({**flags, "dtype": held.serve.dtype}, held.model, site.gpu)
        found = memory(held.model, site.gpu, serve)
    except (InputError, TypeError, ValueError):  # a value that is not described
        return None
    if bool(found.fits):
        return None
    return (
        f"about {_gib(float(found.kv_cache))} would be left for the KV cache: {int(found.kv_tokens)} tokens, where one "
        f"sequence may have {serve.max_model_len}"
    )


# ---- what the scheduler and the cache refuse


def _tokens_below_length(site: Site, flags: Flags) -> str | None:
    tokens, length = _integer(flags, "max_num_batched_tokens"), _integer(flags, "max_model_len")
    if flags.get("enable_chunked_prefill") is not False or tokens is None or length is None or tokens >= length:
        return None
    if site.on_cpu and (site.model is None or any(kind.latent_dim for kind in site.model.attention)):
        return None  # platforms/cpu.py raises it for MLA
    return f"max_num_batched_tokens {tokens} is below max_model_len {length} while chunked prefill is off"


def _tokens_below_seqs(site: Site, flags: Flags) -> str | None:
    tokens, seqs = _integer(flags, "max_num_batched_tokens"), _integer(flags, "max_num_seqs")
    if tokens is None or seqs is None or tokens >= seqs:
        return None
    return f"max_num_batched_tokens {tokens} is below max_num_seqs {seqs}"


def _threshold_above_length(site: Site, flags: Flags) -> str | None:
    threshold, length = _integer(flags, "long_prefill_token_threshold"), _integer(flags, "max_model_len")
    if threshold is None or length is None or threshold <= length:
        return None
    return f"long_prefill_token_threshold {threshold} is above max_model_len {length}"


def _share_out_of_range(site: Site, flags: Flags) -> str | None:
    share = _number(flags, "gpu_memory_utilization")
    if share is None or 0 < share <= 1:
        return None
    return f"gpu_memory_utilization {share:g} is not above 0 and at most 1"


LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
    "max_seq_length", "seq_len", "max_target_positions", "max_source_positions",
)  # fmt: skip


def _length_above_model(site: Site, flags: Flags) -> str | None:
    length = _integer(flags, "max_model_len")
    if length is None or site.model is None or _is_loose(flags) or "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in site.env:
        return None
    longest = site.once(("longest",), lambda: _longest(site.config))
    if longest is None or length <= longest:
        return None
    return f"max_model_len {length} is above what the model's config.json allows, at most {longest:g}"


def _longest(config: Mapping[str, Any]) -> float | None:
    """Upper bound of the length that vLLM derives: the largest length in the file, times every scaling factor in it."""
    found = [config, *(part for part in config.values() if isinstance(part, dict))]
    lengths = [part[key] for part in found for key in LENGTH_KEYS if isinstance(part.get(key), int | float)]
    if not lengths or not any("max_position_embeddings" in part for part in found):
        return None
    return float(max(lengths)) * math.prod(_factors(config))


def _factors(value: Any) -> list[float]:
    """Every number named `factor` and the like, at any depth, that is above 1."""
    if not isinstance(value, dict):
        return []
    own = [float(v) for k, v in value.items() if "factor" in k and isinstance(v, int | float) and v > 1]
    return own + [factor for part in value.values() for factor in _factors(part)]


# ---- types, formats and the units of a GPU


def _bfloat16_without_units(site: Site, flags: Flags) -> str | None:
    capability = site.capability
    if capability is None or capability >= 80 or _word(flags, "dtype") != "bfloat16":
        return None
    return f"dtype bfloat16 needs compute capability 8.0; this GPU has {capability / 10}"


FLOAT16_REFUSED = ("gemma2", "gemma3", "gemma3_text", "glm4")


def _float16_refused(site: Site, flags: Flags) -> str | None:
    if _word(flags, "dtype") not in ("half", "float16") or _is_loose(flags):
        return None
    kind = site.config.get("model_type") or (None if site.model is None else site.model.family)
    return f"a {kind} model is not served in float16" if kind in FLOAT16_REFUSED else None


ACTIVATIONS = {"awq": ("float16", "bfloat16"), "gptq": ("float16", "bfloat16"), "fp8": ("float16", "bfloat16")}
"""Types that a format computes in (`get_supported_act_dtypes`); bitsandbytes and compressed-tensors take all."""


def _format_without_type(site: Site, flags: Flags) -> str | None:
    method, dtype = _method(site, flags), _word(flags, "dtype")
    if method not in ACTIVATIONS or dtype not in ("float", "float32"):
        return None
    return f"{method} weights are not computed with in float32, only in {' or '.join(ACTIVATIONS[method])}"


def _method(site: Site, flags: Flags) -> str | None:
    """Format of the weights as they will be loaded; None for none or one that is not told for certain."""
    asked = flags.get("quantization")
    if site.model is None or _is_loose(flags) or not (asked is None or isinstance(asked, str)):
        return None
    stored = site.model.quantisation
    if stored is None:
        return "fp8" if asked == "fp8" else None
    return stored.method if asked in (None, *METHODS[stored.method]) else None


LEAST_CAPABILITY = {"awq": 75, "gptq": 60, "fp8": 75, "compressed-tensors": 70}
"""`get_min_capability`, the least over the versions that were read."""


def _format_without_units(site: Site, flags: Flags) -> str | None:
    method, capability = _method(site, flags), site.capability
    if method is None or capability is None or capability >= LEAST_CAPABILITY.get(method, 0):
        return None
    needed = LEAST_CAPABILITY[method] / 10
    return f"{method} weights need compute capability {needed}; this GPU has {capability / 10}"


def _format_mismatch(site: Site, flags: Flags) -> str | None:
    asked = _word(flags, "quantization")
    if site.model is None or site.model.quantisation is None or _is_loose(flags):
        return None
    stored = site.model.quantisation.method
    others = {name for method, names in METHODS.items() if method != stored for name in names}
    if asked not in others:
        return None
    return f"quantization {asked} is asked for, but the checkpoint is quantised with {stored}"


CACHE_NEEDS_80 = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "nvfp4", "bfloat16")


CACHE_READS = ("kv_cache_dtype", "attention_backend", "kv_cache_dtype_skip_layers", *LOOSE)


def _cache_type_without_units(site: Site, flags: Flags) -> str | None:
    """Below 8.0 only Triton's attention is left (FlashAttention and FlashInfer ask for 8.0), and it refuses these."""
    capability, cache = site.capability, _word(flags, "kv_cache_dtype")
    if capability is None or capability >= 80 or cache not in CACHE_NEEDS_80 or site.model is None:
        return None
    if any(kind.latent_dim for kind in site.model.attention) or _is_loose(flags):
        return None
    if flags.get("attention_backend") or flags.get("kv_cache_dtype_skip_layers"):
        return None
    return f"kv_cache_dtype {cache} needs more than this GPU's compute capability {capability / 10}"


# ---- parallelism


def _heads_do_not_divide(site: Site, flags: Flags) -> str | None:
    ranks = _integer(flags, "tensor_parallel_size")
    if site.model is None or ranks is None or _is_loose(flags):
        return None
    wrong = [kind.heads for kind in site.model.attention if kind.heads % ranks]
    return f"{wrong[0]} attention heads cannot be cut into tensor_parallel_size {ranks}" if wrong else None


def _kv_heads_do_not_divide(site: Site, flags: Flags) -> str | None:
    ranks = _integer(flags, "tensor_parallel_size")
    if site.model is None or ranks is None or _is_loose(flags):
        return None
    wrong = [kind.kv_heads for kind in site.model.attention if not kind.cuts_into(ranks) and kind.heads % ranks == 0]
    if not wrong:
        return None
    return f"{wrong[0]} key-value heads can be neither cut into nor copied over tensor_parallel_size {ranks}"


OTHER_NODES = (
    "nnodes", "distributed_executor_backend", "data_parallel_size_local", "data_parallel_address",
    "data_parallel_backend", "data_parallel_rank", "data_parallel_external_lb", "data_parallel_hybrid_lb",
)  # fmt: skip
"""Flags with which a server may use GPUs of other nodes."""


def _too_few_gpus(site: Site, flags: Flags) -> str | None:
    if site.on_cpu or site.gpus_per_node is None or any(flags.get(name) for name in OTHER_NODES):
        return None
    sizes = [_integer(flags, name, 1) for name in PARALLEL[:3]]
    needed = math.prod(size or 0 for size in sizes)
    if needed <= site.gpus_per_node:
        return None
    return f"{needed} GPUs are asked for (tensor x pipeline x data parallel); one server can have {site.gpus_per_node}"


def _experts_in_dense(site: Site, flags: Flags) -> str | None:
    if flags.get("enable_expert_parallel") is not True or site.model is None or _is_loose(flags):
        return None
    return None if site.model.is_moe else f"enable_expert_parallel: a {site.model.family} model has no experts"


# ---- speculative decoding

SPECULATION = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
_SPECULATION_NAMES = frozenset(SPECULATION)
WITHOUT_MODEL = ("ngram", "[ngram]", "ngram_gpu", "suffix", "extract_hidden_states")
NEEDS_MODEL = ("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash")


def speculation(flags: Flags) -> Mapping[str, JsonValue] | None:
    """What speculative decoding is told; empty without it, None when it is not understood."""
    if _SPECULATION_NAMES.isdisjoint(flags):
        return {}
    given = flags.get("speculative_config")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        return None
    short = zip(SPECULATION[1:], ("method", "model", "num_speculative_tokens"), strict=True)
    return {**given, **{key: flags[flag] for flag, key in short if flags.get(flag) is not None}}


def _drafted(flags: Flags) -> int | None:
    """The most tokens that a step drafts for a sequence; 0 without speculation, None when unknown."""
    told = speculation(flags)
    return told if told is None else (_integer(told, "num_speculative_tokens") if told else 0)


def _speculation_without_model(site: Site, flags: Flags) -> str | None:
    told = speculation(flags)
    if not told or told.get("model") is not None or _integer(told, "num_speculative_tokens") is None:
        return None
    method = told.get("method")
    if method is not None and method not in NEEDS_MODEL:
        return None
    return f"speculative_config: method {method or 'draft_model (the default)'} names no model to draft with"


def _speculation_without_count(site: Site, flags: Flags) -> str | None:
    told = speculation(flags)
    if not told or told.get("method") not in ("ngram", "[ngram]", "ngram_gpu"):
        return None
    count = told.get("num_speculative_tokens")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count > 0):
        return None
    said = "is missing" if count is None else f"{count} is not above 0"
    return f"speculative_config: num_speculative_tokens {said}, and {told['method']} does not set it itself"


def _lookup_reversed(site: Site, flags: Flags) -> str | None:
    told = speculation(flags) or {}
    least, most = _integer(told, "prompt_lookup_min"), _integer(told, "prompt_lookup_max")
    if told.get("method") not in ("ngram", "[ngram]", "ngram_gpu") or least is None or most is None or least <= most:
        return None
    return f"speculative_config: prompt_lookup_min {least} is above prompt_lookup_max {most}"


def _with_model(flags: Flags, methods: tuple[str, ...]) -> Mapping[str, JsonValue]:
    """What is told of speculation by another model with one of these methods; empty for anything else."""
    told = speculation(flags) or {}
    name = told.get("model")
    if not isinstance(name, str) or name in WITHOUT_MODEL or told.get("method") not in (None, *methods):
        return {}
    return told


def _draft_vocabulary(site: Site, flags: Flags) -> str | None:
    told = _with_model(flags, ("draft_model",))
    name = str(told.get("model"))
    draft = site.drafts.get(name)
    if draft is None or site.model is None or (told.get("method") is None and "eagle" in name.lower()):
        return None
    if told.get("use_heterogeneous_vocab") or draft.vocab_size == site.model.vocab_size or _is_loose(flags):
        return None
    return (
        f"the draft {draft.name} has a vocabulary of {draft.vocab_size}, the model one of {site.model.vocab_size}: "
        "they must be the same"
    )


def _draft_longer(site: Site, flags: Flags) -> str | None:
    told = _with_model(flags, NEEDS_MODEL)
    draft, length = _integer(told, "max_model_len"), _integer(flags, "max_model_len")
    if draft is None or length is None or draft <= length:
        return None
    return f"speculative_config: max_model_len {draft} is above the server's {length}"


def _draft_ranks(site: Site, flags: Flags) -> str | None:
    told = _with_model(flags, ("draft_model", "eagle", "eagle3"))
    ranks, own = _integer(flags, "tensor_parallel_size", 1), _integer(told, "draft_tensor_parallel_size")
    if own is None or ranks is None or own in (1, ranks):
        return None
    return f"speculative_config: draft_tensor_parallel_size {own} is neither 1 nor the server's {ranks}"


def _draft_named_ranks(site: Site, flags: Flags) -> str | None:
    told = speculation(flags) or {}
    if told.get("tensor_parallel_size") is None:
        return None
    return "speculative_config: tensor_parallel_size: it is called draft_tensor_parallel_size there"


def _async_with_lookup(site: Site, flags: Flags) -> str | None:
    told = speculation(flags) or {}
    if flags.get("async_scheduling") is not True or told.get("method") not in ("ngram", "[ngram]", "suffix", "medusa"):
        return None
    return f"async_scheduling: true does not go with speculative method {told['method']}"


# ---- SLO against the physical bound

CACHE_MIB = {70: 6, 75: 6, 80: 40, 86: 6, 89: 96, 90: 60}
"""At least the L2 cache of any GPU of that compute capability: what it holds need not be read from memory."""
OTHER_CACHE_MIB = 256
BANDWIDTH_HEADROOM = 1.15
"""Memory runs above its datasheet too: GeForce owners overclock it by some 10 %, a V100-SXM3 has 980 for 900 GB/s."""
PERMILLE = {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99_9": 999}
SLO_READS = (*SHAPE, *SPECULATION, "enable_prefix_caching", "max_model_len")


@dataclass(frozen=True, slots=True)
class _Waits:
    """The least that each request waits for, in ms.

    Attributes:
        ttft: to its first token.
        step: a decode step that gives one token.
        token: of decoding, with every draft accepted.
        output: tokens of its answer.
        drafted: tokens that a step drafts.
    """

    ttft: Floats
    step: Floats
    token: Floats
    output: Floats
    drafted: int

    def of(self, name: str) -> Floats:
        """Of a latency; of those without a lower bound none."""
        later = np.maximum(self.output - 1, 0)
        if name == "ttft":
            return self.ttft
        if name == "tpot":  # the first event may bring the tokens of one more step
            some = later > 0
            counted = np.maximum(later - (self.drafted + 1), 0) / np.maximum(later, 1)
            spread: Floats = self.token * counted
            return spread[some]
        if name == "itl":  # events that are delivered together make gaps of 0: soft
            return np.full(1, self.step.min()) if len(self.step) else self.step
        whole = self.ttft + later * self.token
        return whole if name == "e2e" else whole / np.maximum(self.output, 1)


def _waits(site: Site, flags: Flags) -> _Waits | None:
    held, drafted = _held(site, flags), _drafted(flags)
    if held is None or drafted is None or site.on_cpu or site.gpu is None or site.gpu.measured:
        return None
    if not len(site.prompt_tokens) or len(site.prompt_tokens) != len(site.output_tokens):
        return None
    if site.drawn_for is not None and flags.get("max_model_len") != site.drawn_for:
        return None
    if any(name in site.env for name in LOOSE_ENV):
        return None
    shares = flags.get("enable_prefix_caching") is not False
    key = ("waits", id(held), drafted, shares)
    gpu = site.gpu
    return site.once(key, lambda: _wait(site, gpu, held, drafted, shares))


def _wait(site: Site, gpu: GpuSpec, held: _Held, drafted: int, shares: bool) -> _Waits:
    prompt, output = (np.asarray(tokens, dtype=np.float64) for tokens in (site.prompt_tokens, site.output_tokens))
    cached = np.minimum(np.asarray(site.shared_tokens, dtype=np.float64), prompt - 1) if shares else np.zeros(1)
    model, serve, fresh = held.model, held.serve, prompt - cached
    first = _seconds(prefill(model, serve, 1, fresh, cached=cached), gpu, held) / (held.stages * held.replicas)
    each = np.arange(1.0, drafted + 2)[:, np.newaxis]
    steps = _seconds(decode(model, serve, 1, prompt, new_tokens=each), gpu, held) / held.replicas
    token: Floats = (steps / each).min(axis=0)
    return _Waits(1e3 * np.broadcast_to(first, prompt.shape), 1e3 * steps[0], 1e3 * token, output, drafted)


def _seconds(step: Step, gpu: GpuSpec, held: _Held) -> Floats:
    """The least time: links between GPUs are not counted, caches hold what they can, fp8 attention counts as such."""
    compute: Floats = np.zeros(())
    for name, work in step.classes.items():
        peak = gpu.ceiling_flops(work.dtype)
        peak = max(peak, gpu.ceiling_flops("fp8")) if name == "attention_scores" else peak
        compute = compute + work.flops / peak
    cache = CACHE_MIB.get(gpu.compute_capability or 0, OTHER_CACHE_MIB) * 2**20 * held.stages
    moved = np.maximum(step.bytes - cache, 0) / (BANDWIDTH_HEADROOM * gpu.memory_bytes_per_s)
    slowest: Floats = np.maximum(compute, moved)
    return slowest


def _statistic(values: Floats, name: str) -> float:
    """Nearest rank, as `metrics.percentile`; of nothing 0."""
    if not len(values):
        return 0.0
    if name == "mean":
        return float(values.mean())
    rank = max(1, -(-len(values) * PERMILLE[name] // 1000))
    return float(np.partition(values, rank - 1)[rank - 1])


def bound_ms(site: Site, flags: Flags, key: str) -> float | None:
    """The least value that an SLO key can have on the fastest such GPU; None where that is not known.

    For every request of the workload the least time is taken, and of these the key's statistic: a measured one is no
    smaller, since a request that fails counts as infinitely late.

    Args:
        site: with the lengths of the workload.
        flags: of the configuration.
        key: e.g. `ttft_p95_ms`.
    """
    waits = _waits(site, flags)
    if waits is None or key not in LATENCY_METRICS:
        return None
    name, _, statistic = key.removesuffix("_ms").partition("_")
    return site.once(("bound", id(waits), key), lambda: _statistic(waits.of(name), statistic))


STATISTICS = ("mean", *PERMILLE)


def _slo_rule(latency: str, statistics: tuple[str, ...], kind: Kind = "hard") -> Rule:
    keys = [f"{latency}_{statistic}_ms" for statistic in statistics]

    def check(site: Site, flags: Flags) -> str | None:
        for key in keys:
            limit = site.slo.get(key)
            least = None if limit is None else bound_ms(site, flags, key)
            if limit is not None and least is not None and least > limit:
                gpu = "" if site.gpu is None else site.gpu.name
                return f"{key} is at least {least:.4g} on a {gpu}, above the limit of {limit:g}"
        return None

    return Rule(
        f"slo_{latency}", kind, "", SLO_READS, "formula: docs/roofline.md, Rules", "gpu", check,
        lambda site: _is_gpu(site) and any(key in site.slo for key in keys),
    )  # fmt: skip


def _is_gpu(site: Site) -> bool:
    return site.gpu is not None and not site.on_cpu and not site.gpu.measured


def _is_cpu(site: Site) -> bool:
    return site.on_cpu


# ---- the list

RULES: tuple[Rule, ...] = (
    Rule("tokens_below_seqs", "hard", SINCE_0_15, ("max_num_batched_tokens", "max_num_seqs"),
         "config/scheduler.py: SchedulerConfig.verify_max_model_len", "cpu", _tokens_below_seqs),
    Rule("tokens_below_length", "hard", SINCE_0_15,
         ("max_num_batched_tokens", "max_model_len", "enable_chunked_prefill"),
         "config/scheduler.py: SchedulerConfig.verify_max_model_len", "cpu", _tokens_below_length),
    Rule("threshold_above_length", "hard", SINCE_0_32, ("long_prefill_token_threshold", "max_model_len"),
         "config/scheduler.py: SchedulerConfig.verify_max_model_len", "cpu", _threshold_above_length),
    Rule("share_out_of_range", "hard", SINCE_0_15, ("gpu_memory_utilization",),
         "config/cache.py: CacheConfig.gpu_memory_utilization", "cpu", _share_out_of_range),
    Rule("length_above_model", "hard", SINCE_0_15, ("max_model_len", *LOOSE),
         "config/model.py: _get_and_verify_max_len", "cpu", _length_above_model),
    Rule("bfloat16_without_units", "hard", SINCE_0_15, ("dtype",),
         "platforms/cuda.py: CudaPlatformBase.check_if_supports_dtype", "source-only", _bfloat16_without_units),
    Rule("float16_refused", "hard", SINCE_0_15, ("dtype", *LOOSE),
         "config/model.py: _FLOAT16_NOT_SUPPORTED_MODELS", "cpu", _float16_refused),
    Rule("format_mismatch", "hard", SINCE_0_15, ("quantization", *LOOSE),
         "config/model.py: ModelConfig._verify_quantization", "cpu", _format_mismatch),
    Rule("format_without_type", "hard", SINCE_0_15, ("dtype", "quantization", *LOOSE),
         "config/vllm.py: VllmConfig._get_quantization_config", "cpu", _format_without_type),
    Rule("format_without_units", "hard", SINCE_0_15, ("quantization", *LOOSE),
         "config/vllm.py: VllmConfig._get_quantization_config", "source-only", _format_without_units),
    Rule("cache_type_without_units", "hard", ">=0.24,<=0.33.0", CACHE_READS,
         "v1/attention/backends/triton_attn.py: TritonAttentionImpl.__init__; platforms/cuda.py: get_attn_backend_cls",
         "source-only", _cache_type_without_units),
    Rule("cache_type_doubtful", "soft", ">=0.15.1,<0.24", CACHE_READS,
         "v1/attention/backends/flashinfer.py: supports_compute_capability: 7.5 is enough there", "source-only",
         _cache_type_without_units),
    Rule("too_few_gpus", "hard", "", (*PARALLEL, *OTHER_NODES),
         "formula: tensor x pipeline x data parallel > GPUs of a node; config/parallel.py: ParallelConfig",
         "gpu", _too_few_gpus),
    Rule("heads_do_not_divide", "hard", SINCE_0_15, ("tensor_parallel_size", *LOOSE),
         "config/model.py: ModelConfig.verify_with_parallel_config", "cpu", _heads_do_not_divide),
    Rule("kv_heads_do_not_divide", "hard", SINCE_0_15, ("tensor_parallel_size", *LOOSE),
         "model_executor/models/llama.py: LlamaAttention.__init__", "cpu", _kv_heads_do_not_divide),
    Rule("experts_in_dense", "hard", SINCE_0_15, ("enable_expert_parallel", *LOOSE),
         "config/model.py: ModelConfig._verify_with_expert_parallelism", "cpu", _experts_in_dense),
    Rule("speculation_without_model", "hard", SINCE_0_15, SPECULATION,
         "config/speculative.py: SpeculativeConfig.__post_init__", "cpu", _speculation_without_model),
    Rule("speculation_without_count", "hard", SINCE_0_15, SPECULATION,
         "config/speculative.py: SpeculativeConfig._verify_args", "cpu", _speculation_without_count),
    Rule("lookup_reversed", "hard", SINCE_0_15, SPECULATION,
         "config/speculative.py: SpeculativeConfig.__post_init__", "cpu", _lookup_reversed),
    Rule("draft_vocabulary", "hard", SINCE_0_15, (*SPECULATION, *LOOSE),
         "config/speculative.py: SpeculativeConfig._verify_args", "cpu", _draft_vocabulary),
    Rule("draft_longer", "hard", SINCE_0_15, (*SPECULATION, "max_model_len"),
         "config/speculative.py: SpeculativeConfig._maybe_override_draft_max_model_len", "cpu", _draft_longer),
    Rule("draft_ranks", "hard", SINCE_0_15, (*SPECULATION, "tensor_parallel_size"),
         "config/speculative.py: SpeculativeConfig._verify_and_get_draft_tp", "cpu", _draft_ranks),
    Rule("draft_named_ranks", "hard", SINCE_0_15, SPECULATION,
         "config/speculative.py: SpeculativeConfig._verify_args", "cpu", _draft_named_ranks),
    Rule("async_with_lookup", "hard", ">=0.15.1,<0.33", (*SPECULATION, "async_scheduling"),
         "config/vllm.py: VllmConfig.__post_init__", "cpu", _async_with_lookup),
    Rule("weights_beyond_memory", "hard", "", SHAPE,
         "formula: packed weights > the memory soldered on", "gpu", _weights_beyond_memory, _is_gpu),
    Rule("weights_do_not_fit", "hard", SINCE_0_15,
         (*SHAPE, "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override"),
         "formula: packed weights > share of the memory soldered on; "
         "v1/core/kv_cache_utils.py: _check_enough_kv_cache_memory", "gpu", _weights_do_not_fit, _is_gpu),
    Rule("sequence_does_not_fit", "hard", SINCE_0_15,
         (*SHAPE, "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_model_len"),
         "formula: packed weights + keys and values of one sequence > share of the memory soldered on; "
         "v1/core/kv_cache_utils.py: _check_enough_kv_cache_memory", "gpu", _sequence_does_not_fit, _is_gpu),
    Rule("given_cache_too_small", "hard", SINCE_0_24,
         (*SHAPE, "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_model_len"),
         "v1/core/kv_cache_utils.py: _check_enough_kv_cache_memory (0.33: v1/core/kv_cache_planning.py)", "cpu",
         _given_cache_too_small),
    Rule("given_cache_beyond_memory", "hard", SINCE_0_24, ("kv_cache_memory_bytes", "num_gpu_blocks_override"),
         "v1/worker/cpu_worker.py: CPUWorker.determine_available_memory", "cpu", _given_cache_beyond_memory),
    Rule("blocks_too_few", "hard", SINCE_0_24,
         ("num_gpu_blocks_override", "max_model_len", "block_size", *LOOSE),
         "v1/core/kv_cache_utils.py: get_kv_cache_configs", "cpu", _blocks_too_few),
    Rule("cpu_share_too_small", "hard", SINCE_0_24,
         (*SHAPE, "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_model_len"),
         "v1/worker/cpu_worker.py: CPUWorker.determine_available_memory", "cpu", _cpu_share_too_small, _is_cpu),
    *(_slo_rule(latency, STATISTICS) for latency in ("ttft", "tpot", "e2e", "norm")),
    _slo_rule("itl", STATISTICS, "soft"),
    Rule("estimated_too_small", "soft", "",
         (*SHAPE, "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_model_len",
          "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "block_size", "enable_chunked_prefill",
          "disable_hybrid_kv_cache_manager", "async_scheduling"),
         "estimate: memory.memory", "source-only", _estimated_too_small, _is_gpu),
)  # fmt: skip
"""In the order in which they are asked: the cheap ones first, and what vLLM says before what follows from it."""


# ---- judging


def judge(
    site: Site, flags: Flags, *, disabled: Iterable[str] = frozenset(), kinds: Iterable[Kind] = ("hard",)
) -> Refusal | None:
    """The first rule that refuses a configuration; None when none does.

    Args:
        site: what all configurations share.
        flags: of the configuration, as vLLM spells them.
        disabled: names of rules to leave out.
        kinds: of rules to ask.
    """
    for rule in _asked(site, disabled, kinds):
        if (message := rule.check(site, flags)) is not None:
            return Refusal(rule.name, rule.kind, message, rule.source)
    return None


def judge_all(
    site: Site,
    configs: Sequence[Flags],
    *,
    disabled: Iterable[str] = frozenset(),
    kinds: Iterable[Kind] = ("hard",),
) -> list[Refusal | None]:
    """`judge` of each, at the cost of the distinct combinations of what each rule reads."""
    found = np.full(len(configs), None, dtype=object)
    open_still = np.ones(len(configs), dtype=np.bool_)
    columns = _Columns(configs)
    for rule in _asked(site, disabled, kinds):
        if not open_still.any():
            break
        first, which = columns.distinct(rule.reads)
        wanted = np.zeros(len(first), dtype=np.bool_)
        wanted[which[open_still]] = True
        refusals = np.full(len(first), None, dtype=object)
        for code in np.flatnonzero(wanted).tolist():
            if (message := rule.check(site, configs[first[code]])) is not None:
                refusals[code] = Refusal(rule.name, rule.kind, message, rule.source)
        refused = np.array([refusal is not None for refusal in refusals], dtype=np.bool_)
        hit = open_still & refused[which]
        found[hit] = refusals[which[hit]]
        open_still &= ~hit
    verdicts: list[Refusal | None] = found.tolist()
    return verdicts


def _asked(site: Site, disabled: Iterable[str], kinds: Iterable[Kind]) -> tuple[Rule, ...]:
    off, wanted = frozenset(disabled), frozenset(kinds)
    return site.once(("asked", off, wanted), lambda: _select(site, off, wanted))


def _select(site: Site, disabled: frozenset[str], kinds: frozenset[Kind]) -> tuple[Rule, ...]:
    version = _version(site.engine_version)
    wanted = [rule for rule in RULES if rule.kind in kinds and rule.name not in disabled and rule.holds_for(version)]
    return tuple(_narrowed(site, rule) for rule in wanted if rule.speaks(site))


def _narrowed(site: Site, rule: Rule) -> Rule:
    """A bound depends on `max_model_len` only through the lengths that were drawn for it."""
    if rule.reads != SLO_READS or site.drawn_for is not None:
        return rule
    return replace(rule, reads=tuple(name for name in SLO_READS if name != "max_model_len"))


def _version(text: str | None) -> Version | None:
    try:
        return None if text is None else Version(text)
    except InvalidVersion:
        return None


class _Columns:
    """Configurations as columns of codes, so that a rule sees each combination of values once."""

    def __init__(self, configs: Sequence[Flags]) -> None:
        self._configs = configs
        self._present = frozenset().union(*configs)
        self._codes: dict[str, npt.NDArray[np.int64]] = {}
        self._combined: dict[tuple[str, ...], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}

    def distinct(self, names: Iterable[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """An example of each combination of these flags' values, and which combination each configuration has."""
        there = tuple(sorted(self._present.intersection(names)))
        if there not in self._combined:
            self._combined[there] = self._combine(there)
        return self._combined[there]

    def _combine(self, names: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        codes = np.zeros(len(self._configs), dtype=np.int64)
        for name in names:
            column = self._column(name)
            codes = codes * (int(column.max(initial=0)) + 1) + column
            _, codes = np.unique(codes, return_inverse=True)
        _, first, which = np.unique(codes, return_index=True, return_inverse=True)
        return first.astype(np.int64), which.astype(np.int64)

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        if name not in self._codes:
            known: dict[Hashable, int] = {}
            keys = _keys([config.get(name) for config in self._configs])
            self._codes[name] = np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)
        return self._codes[name]


def _keys(values: Sequence[JsonValue]) -> Sequence[Hashable]:
    """Equal only for equal JSON: 1, 1.0 and true differ, which Python holds for equal. The order of keys counts."""
    types = set(map(type, values))
    if types <= {str, type(None)} or (len(types - {type(None)}) == 1 and not types & {dict, list}):
        return values  # type: ignore[return-value]
    return [_key(value) for value in values]


def _key(value: JsonValue) -> Hashable:
    return (type(value), repr(value) if isinstance(value, dict | list) else value)


# ---- what to say when a space is pruned whole


@dataclass(frozen=True, slots=True)
class Feasible:
    """What comes nearest to working.

    Attributes:
        slo_ms: for each SLO key the smallest limit that some configuration's physical bound allows.
        gpu_memory_bytes: the least memory on a GPU that weights and one sequence of some configuration need.
        share: the least `gpu_memory_utilization` of this GPU that holds that; None when all of it is too little.
        max_model_len: the longest that some configuration has room for as it is; None when none has.
    """

    slo_ms: Mapping[str, float]
    gpu_memory_bytes: float | None
    share: float | None = None
    max_model_len: int | None = None


def nearest_feasible(site: Site, configs: Sequence[Flags]) -> Feasible:
    """The nearest limits and memory that some of these configurations could work with; not that they would."""
    columns = _Columns(configs)
    first, _ = columns.distinct((*SLO_READS, *SIZING))
    some = [configs[index] for index in first.tolist()]
    limits = {key: [b for flags in some if (b := bound_ms(site, flags, key)) is not None] for key in site.slo}
    needs = [need for flags in some if (need := _memory_need(site, flags)) is not None]
    need, total = min(needs, default=None), _memory_bytes(site)
    share = None if need is None or total is None or need > total else need / total
    lengths = [length for flags in some if (length := _longest_with_room(site, flags))]
    return Feasible(
        {key: min(found) for key, found in limits.items() if found}, need, share, max(lengths, default=None)
    )


SIZING = ("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_model_len")


def _memory_need(site: Site, flags: Flags) -> float | None:
    """At a share of 1."""
    held = _held(site, flags)
    return None if held is None else held.weight_bytes + held.sequence_bytes(_integer(flags, "max_model_len") or 0)


def _longest_with_room(site: Site, flags: Flags) -> int | None:
    """Of the lengths up to the configuration's own, the longest whose keys and values have room."""
    held, budget, asked = _held(site, flags), _budget(site, flags), _integer(flags, "max_model_len")
    given = _given_cache(site, flags)
    if held is None or budget is None or asked is None or flags.get("num_gpu_blocks_override") is not None:
        return None
    room_bytes = budget - held.weight_bytes if given is None else float(given[0])
    low, high = 0, asked + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held.sequence_bytes(middle) <= room_bytes else (low, middle)
    return low or None


# ---- what there is room for


@dataclass(frozen=True, slots=True)
class Room:
    """Upper bounds of what one configuration has, of one GPU.

    Attributes:
        serve: types as they are reckoned here, and tensor parallelism.
        need_bytes: the least: weights, and one sequence of `max_model_len` where that is told.
        budget_bytes: the most that weights and KV cache may take.
        cache_bytes: the most that the KV cache can have.
        engines: of data parallelism.
        sharing: engines over which one model's experts are spread; 1 without experts.
        stages: of pipeline parallelism.
        drafted: the most tokens that a step drafts for a sequence.
    """

    serve: Serve
    need_bytes: float
    budget_bytes: float
    cache_bytes: float
    engines: int
    sharing: int
    stages: int
    drafted: int


def room(site: Site, flags: Flags) -> Room | None:
    """None where a rule would be silent: something is unknown, or changes what is reckoned with here."""
    held, budget, drafted = _held(site, flags), _budget(site, flags), _drafted(flags)
    total, engines = _memory_bytes(site), _integer(flags, "data_parallel_size", 1)
    if held is None or budget is None or total is None or drafted is None or engines is None:
        return None
    given, length = _given_cache(site, flags), _integer(flags, "max_model_len") or 0
    budget = total if flags.get("num_gpu_blocks_override") is not None else budget
    cache = budget - held.weight_bytes if given is None else given[0]
    need = held.weight_bytes + held.sequence_bytes(length)
    return Room(held.serve, need, budget, cache, engines, held.replicas, held.stages, drafted)
