"""Runs in a process of its own: KV cache blocks and tokens of models in varcas/configs, by vLLM's own functions.

Reads `[[directory, max_model_len, bytes], ...]` from its argument, prints `[[blocks, tokens], ...]`.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from varcas.model import Attention, describe

IN_FLIGHT = 2 * 2048


def spec(kind: Attention) -> Any:
    common: dict[str, Any] = {"block_size": 16, "num_kv_heads": kind.kv_heads, "dtype": torch.bfloat16}
    if kind.latent_dim:
        return MLAAttentionSpec(**common, head_size=kind.latent_dim)
    if kind.window is not None:
        return SlidingWindowSpec(**common, head_size=kind.head_dim, sliding_window=kind.window)
    return FullAttentionSpec(**common, head_size=kind.head_dim)


def config(length: int) -> Any:
    layout = next(layout for layout in KVCacheLayout if not layout.is_block_outermost)
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
    )
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        model_config=SimpleNamespace(max_model_len=length, original_max_model_len=length),
        cache_config=cache,
        attention_config=SimpleNamespace(hisparse_config=None),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        speculative_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=IN_FLIGHT,
    )


def capacity(directory: str, length: int, size_bytes: int) -> tuple[int, int]:
    kinds = [kind for kind in describe(directory).attention for _ in range(kind.layers)]
    layers = {f"layers.{index}": spec(kind) for index, kind in enumerate(kinds)}
    vllm_config = config(length)
    found = kv_cache_utils.get_kv_cache_configs(vllm_config, [layers], [size_bytes])[0]
    return found.num_blocks, kv_cache_utils.get_kv_cache_capacity(vllm_config, found)[0]


if __name__ == "__main__":
    print("ANSWER", json.dumps([capacity(*case) for case in json.loads(sys.argv[1])]))
