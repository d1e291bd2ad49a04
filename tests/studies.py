"""A store of an imagined study, written by the store's real encoding, for tests of what is made of a whole store."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.rows import row
from varcas.experiment import Experiment, parse_experiment
from varcas.metrics import constraints_of, summarise
from varcas.records import LoadResult, RequestRecord, Sample, TrialRow
from varcas.space import ServingConfig
from varcas.store import Store

TEXT = """
name: big
model: TheBloke/Llama-2-7B-AWQ
hardware: {gpu: T4}
serve: {dtype: half, max_model_len: 2048, quantization: awq}
baseline: {}
space:
  max_num_seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128]}
  max_num_batched_tokens: {choices: [512, 1024, 2048, 4096, 8192]}
  enable_chunked_prefill: {choices: [true, false]}
  enable_prefix_caching: {choices: [true, false]}
  kv_cache_dtype: {choices: [auto, fp8]}
  speculative_config: {choices: [null, {method: ngram, num_speculative_tokens: 5, prompt_lookup_max: 4}]}
workload: {profile: chat-medium, rate_rps: 4, duration_s: 60}
slo: {ttft_p95_ms: 4000}
objective: {maximize: output_tokens_per_s}
study: {trials: 1000, repeats: 3}
"""
RESOLVED = {"scheduler": {"max_num_seqs": 256, "policy": "fcfs"}, "cache": {"block_size": 16, "cache_dtype": "auto"}}


def experiment(**changes: Any) -> Experiment:
    text = TEXT
    for key, value in changes.items():
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key}:")) + f"\n{key}: {value}\n"
    return parse_experiment(text)


def load_of(draw: random.Random, tokens_per_s: float, num: int = 240) -> LoadResult:
    """Requests of a window of 60 s at 4 a second, at a pace."""
    records = []
    for index in range(num):
        due, tokens = 60 * index / num, draw.randint(20, 200)
        first = draw.uniform(0.2, 1.2)
        gaps = tuple(first + i * 20 / tokens_per_s for i in range(tokens))
        records.append(
            RequestRecord(
                index=index, scheduled_s=due, sent_s=due + 0.001, first_token_s=due + 0.001 + gaps[0],
                last_token_s=due + 0.001 + gaps[-1], end_s=due + 0.002 + gaps[-1], scheduled_prompt_tokens=128,
                scheduled_output_tokens=tokens, prompt_tokens=128, output_tokens=tokens, token_offsets_s=gaps,
                token_counts=(1,) * tokens, finish_reason="length", error=None, http_status=200,
                conversation=index, turn=0,
            )
        )  # fmt: skip
    return LoadResult(tuple(records), 0.0, 60.0, 30.0, 0.2)


def samples_of(draw: random.Random) -> list[Sample]:
    return [
        Sample(t_s=t / 2, num_requests_running=float(draw.randint(2, 8)),
               num_requests_waiting=float(draw.randint(0, 3)),
               kv_cache_usage_frac=draw.random(), gpu_power_w=draw.uniform(50, 70), gpu_sm_clock_mhz=1500.0,
               gpu_temperature_c=60.0)
        for t in range(-10, 180)
    ]  # fmt: skip


def write_study(directory: Path, num_trials: int, of: Experiment | None = None, **columns: Any) -> Path:
    """A store of `num_trials` search rows, a baseline, failures, pruned rows and three confirmation starts an arm."""
    e, draw = of or experiment(), random.Random(0)
    space = {name: entry.choices for name, entry in e.space.items()}  # type: ignore[union-attr]
    proposals = itertools.islice(itertools.cycle(itertools.product(*space.values())), num_trials)
    with pytest.MonkeyPatch.context() as patch, Store(directory / "results") as store:
        patch.setattr("varcas.store.os.fsync", lambda descriptor: None)  # nobody pulls the plug on a test
        numbers = itertools.count()
        _measured(store, e, next(numbers), {}, 120.0, draw, purpose="baseline", **columns)
        for values in proposals:
            flags, number = dict(zip(space, values, strict=True)), next(numbers)
            store.append(_searched(e, number, flags, draw, **columns))
        best = {"max_num_seqs": 128, "max_num_batched_tokens": 8192, "enable_chunked_prefill": True,
                "enable_prefix_caching": False, "kv_cache_dtype": "auto", "speculative_config": None}  # fmt: skip
        _measured(store, e, next(numbers), best, 990.0, draw, purpose="search", with_records=False, **columns)
        for arm, flags, pace in [("baseline", {}, 120.0), ("candidate", best, 950.0)] * 3:
            _measured(store, e, next(numbers), flags, pace, draw, purpose="confirm", arm=arm, **columns)
        store.save_study(
            e.name, {"fingerprint": {}, "experiment": json.loads(e.model_dump_json()), "ended": "trials spent"}
        )
    return directory / "results"


def _row(e: Experiment, number: int, flags: dict[str, Any], tokens_per_s: float | None, **columns: Any) -> TrialRow:
    config = ServingConfig(e.model, None, {**e.serve, **flags})
    fixed: dict[str, Any] = {
        "number": number, "study": e.name, "model": e.model, "config_json": json.dumps(dict(config.flags)),
        "config_hash": config.hash, "params_json": json.dumps(flags), "command": config.command("/opt/vllm/bin/python"),
        "flags": {name: json.dumps(value) for name, value in config.flags.items()}, "gpu_name": "Tesla T4",
        "gpu_count": 1,
        "host": "t4-1", "resolved_json": json.dumps(RESOLVED | {"flags": dict(config.flags)}), "rate_rps": 4.0,
        "duration_s": 60.0, "seed": 0, "server_start_s": 41.5,
    }  # fmt: skip
    return row(1, tokens_per_s, **fixed | columns)


def _searched(e: Experiment, number: int, flags: dict[str, Any], draw: random.Random, **columns: Any) -> TrialRow:
    if flags["kv_cache_dtype"] == "fp8":
        why = {"failure_kind": "unsupported_by_gpu", "reason_rule": "cache_type_without_units"}
        detail = "no fp8 units on sm_75 [docs]"
        return _row(e, number, flags, None, state="infeasible", valid=None, failure_detail=detail, **why, **columns)
    if flags["speculative_config"] is not None and flags["max_num_seqs"] == 128:
        why = {"failure_kind": "out_of_memory", "failure_detail": "torch.OutOfMemoryError: CUDA out of memory."}
        why |= {"failure_hint": "take less", "log_path": "/logs/x.log"}
        return _row(e, number, flags, None, state="failed", valid=None, **why, **columns)
    pace = 100 * flags["max_num_seqs"] ** 0.45 * draw.uniform(0.95, 1.05)
    ttft = 200 + 4 * flags["max_num_seqs"] ** 1.4 * draw.uniform(0.9, 1.1)
    met = ttft <= 4000
    return _row(
        e, number, flags, pace, purpose="search", ttft_p50_ms=ttft / 2, ttft_p95_ms=ttft, tpot_mean_ms=30.0,
        slo_met=met,
        e2e_mean_ms=9e4 / pace, constraints={"ttft_p95_ms": ttft / 4000 - 1}, saturated=flags["max_num_seqs"] < 4,
        request_rate_rps=pace / 80, goodput_rps=pace / 90, **columns,
    )  # fmt: skip


def _measured(store: Store, e: Experiment, number: int, flags: dict[str, Any], pace: float, draw: random.Random,
              *, with_records: bool = True, **columns: Any) -> None:  # fmt: skip
    load, samples = load_of(draw, pace), samples_of(draw)
    figures = summarise(load, e.slo, samples) | constraints_of(load, e.slo)
    figures |= {"output_tokens_per_s": pace * draw.uniform(0.99, 1.01), "valid": True, "invalid_reasons": []}
    made = _row(e, number, flags, None, **figures | columns)
    store.append(made, load.records if with_records else (), samples if with_records else ())
