"""Runs in a process of its own: what vLLM's own scheduler puts into each step, which `batching` is held against.

    python tests/scheduler_work.py MODEL_DIRECTORY CASES.json

A case has `limits` (fields of `batching.Limits`), `asynchronous`, and `requests`: the step before which each arrives,
its prompt's tokens, how many of these all requests share, and its answer's. Prints, for each case, steps of
`[tokens, sequences, [those that ended], blocks in use]`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager


def scheduler(config: Any, limits: dict[str, Any], *, asynchronous: bool) -> Any:
    told, block = config.scheduler_config, limits["block_size"]
    told.max_num_seqs, told.max_num_active_seqs = limits["max_num_seqs"], None
    told.max_num_batched_tokens, told.max_num_scheduled_tokens = limits["max_num_batched_tokens"], None
    told.enable_chunked_prefill = limits["enable_chunked_prefill"]
    told.long_prefill_token_threshold = limits["long_prefill_token_threshold"]
    told.async_scheduling = asynchronous
    config.cache_config.enable_prefix_caching = limits["enable_prefix_caching"]
    config.cache_config.num_gpu_blocks = limits["num_blocks"] + 1
    config.cache_config.block_size = block
    spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(limits["num_blocks"] + 1, [], [KVCacheGroupSpec(["layer"], spec)])
    kind = AsyncScheduler if asynchronous else Scheduler
    return kind(config, cache, StructuredOutputManager(config), block_size=block)


def request(index: int, prompt: int, shared: int, output: int, hasher: Any) -> Request:
    tokens = [*range(7, 7 + shared), *(1_000_000 * (index + 1) + at for at in range(prompt - shared))]
    sampling = SamplingParams(max_tokens=output, ignore_eos=True)
    return Request(str(index), tokens, sampling, None, arrival_time=float(index), block_hasher=hasher)


def answered(engine: Any, output: Any) -> ModelRunnerOutput:
    """A token for each sequence whose prompt is computed with this step."""
    ids = list(output.num_scheduled_tokens)
    given = []
    for name in ids:
        owner = engine.requests[name]
        given.append(
            [] if name in PARTIAL[id(output)] else [500_000_000 + int(name) * 10_000 + owner.num_output_tokens]
        )
    return ModelRunnerOutput(ids, {name: at for at, name in enumerate(ids)}, given)


PARTIAL: dict[int, set[str]] = {}
"""Of each step, those whose prompt it leaves unfinished: known when it is put together."""


def steps(config: Any, case: dict[str, Any]) -> list[Any]:
    limits, waiting = case["limits"], list(enumerate(case["requests"]))
    engine = scheduler(config, limits, asynchronous=case["asynchronous"])
    hasher = get_request_block_hasher(limits["block_size"], sha256)
    seen: list[Any] = []
    flying: list[Any] = []

    def put_together() -> Any:
        while waiting and waiting[0][1][0] <= len(seen) + len(flying):
            index, (_, *lengths) = waiting.pop(0)
            engine.add_request(request(index, *lengths, hasher))
        output = engine.schedule()
        if output.total_num_scheduled_tokens:
            names = output.num_scheduled_tokens
            PARTIAL[id(output)] = {name for name in names if engine.requests[name].is_prefill_chunk}
            return output
        return None

    def end(output: Any) -> None:
        before = set(engine.requests)
        engine.update_from_output(output, answered(engine, output))
        ended = sorted(int(name) for name in before - set(engine.requests))
        used = limits["num_blocks"] - engine.kv_cache_manager.block_pool.get_num_free_blocks()
        seen.append([output.total_num_scheduled_tokens, len(output.num_scheduled_tokens), ended, used])

    while len(seen) < 3000:
        if not flying:
            if (output := put_together()) is not None:
                flying.append(output)
            elif waiting:
                seen.append(None)  # an idle moment, so that the next one arrives
                continue
            else:
                break
        following = put_together() if case["asynchronous"] else None
        end(flying.pop(0))
        if following is not None:
            flying.append(following)
    return [step for step in seen if step is not None]


if __name__ == "__main__":
    init_none_hash(sha256)
    made = EngineArgs(model=sys.argv[1], load_format="dummy", max_model_len=512).create_engine_config()
    with open(sys.argv[2]) as file:
        print("ANSWER", json.dumps([steps(made, case) for case in json.load(file)]))
