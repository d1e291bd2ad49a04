"""Whether the hard rules are ever wrong: starts what they prune, for real. `python benchmarks/false_prunes.py`.

Draws configurations from a wide space, takes for each rule some that this rule alone prunes, and starts each past rules
and validator: every one must fail. Rules on an SLO are tried under load, with varcas's own measurement, at the largest
limit that they call impossible: each must be missed. Then the converse: of configurations drawn at random that no rule
prunes, how many vLLM refuses all the same; and of those where one flag turns a refusal off, whether all start.

`--gpu` does so on one GPU, else vLLM's CPU build is used. Rules that nothing here can try are listed as source-only.

    PYTHONPATH=. python benchmarks/false_prunes.py --out prunes_cpu.jsonl
    PYTHONPATH=.:/tmp/site python3 benchmarks/false_prunes.py --gpu --out $OUT/prunes_gpu.jsonl --budget-s 570
    PYTHONPATH=. python benchmarks/false_prunes.py --print --done prunes_cpu.jsonl
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from real_starts import (
    ENV,
    Clock,
    Locks,
    Started,
    add_options,
    append_row,
    circumstances,
    keep_log,
    model_dir,
    read_rows,
    start_until,
)
from shares import upper_bound
from vllm_forks import Forks

from varcas import endpoint, gpus, hardware
from varcas.engine.failures import RETRIED
from varcas.engine.probe import probe_python
from varcas.engine.vllm import MODEL_ID, VllmServer, server_env
from varcas.experiment import Workload
from varcas.gpus import GpuSpec
from varcas.model import describe
from varcas.pruner import failure_kind
from varcas.rules import RULES, Refusal, Rule, Site, judge
from varcas.space import ServingConfig
from varcas.workload.schedule import schedule

TIMEOUT_S, GPU_TIMEOUT_S = 300.0, 150.0
GPU_WORKERS = 4
HOLD_S = 20.0
NOT_ITS_FAULT = "Not enough allowed NUMA nodes"
"""In vLLM's words where this machine is too small for any such configuration."""
UNDECIDED = RETRIED | {"start_timeout", "missing_dependency", "model_download", "interrupted"}
"""A start that ends so says nothing of its configuration."""
CROWDED = {"gpu_busy", "out_of_memory", "kv_cache_too_small", None}
"""Of a start that had others beside it: tried again alone."""
ON_GPU = ("weights_", "sequence_does_not_fit", "given_cache", "blocks_too_few", "cpu_share", "slo_")
"""Beginnings of the names of rules whose configurations get as far as the GPU, and need it alone."""
IMPLIED = {
    "weights_beyond_memory": ("weights_do_not_fit", "sequence_does_not_fit"),
    "weights_do_not_fit": ("sequence_does_not_fit",),
}
MODELS = "MODELS/"
"""In a flag, stands for where this run keeps its models."""
DRAWS = 150_000
LONGEST_WORDS = 150
SEED = 0

Flags = dict[str, Any]
BASE: Flags = {"load_format": "dummy", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
_DRAFT, _NGRAM = {"model": f"{MODELS}tiny-llama", "num_speculative_tokens": 3}, {"method": "ngram"}
SPACE: dict[str, tuple[Any, ...]] = {
    "dtype": ("half", "float16", "bfloat16", "float32"),
    "kv_cache_dtype": (
        "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "int8_per_token_head", "fp8_per_token_head",
        "int4_per_token_head", "nvfp4",
    ),
    "quantization": ("awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors", "awq_marlin"),
    "max_model_len": (1, 64, 1024, 2048, 2049, 4096, 4097, 16384, 32769, 131072),
    "max_num_seqs": (1, 64, 256, 1024),
    "max_num_batched_tokens": (1, 7, 64, 511, 2048, 8192),
    "enable_chunked_prefill": (True, False),
    "enable_prefix_caching": (True, False),
    "block_size": (1, 8, 16, 24, 32, 48, 128, 256),
    "gpu_memory_utilization": (0.0002, 0.001, 0.02, 0.06, 0.1, 0.32, 0.4, 0.98, 1.0, 1.001, 1.2, 0.0, -0.5),
    "num_gpu_blocks_override": (1, 2, 4, 8, 64, 512),
    "kv_cache_memory_bytes": (1, 2**20, 2**26, 2**30, 2**37, 2**40),
    "tensor_parallel_size": (2, 3, 4, 5, 16),
    "pipeline_parallel_size": (2, 5),
    "data_parallel_size": (2,),
    "enable_expert_parallel": (True, False),
    "disable_hybrid_kv_cache_manager": (True, False),
    "async_scheduling": (True, False),
    "cpu_offload_gb": (1, 4),
    "long_prefill_token_threshold": (64, 513, 4096),
    "scheduling_policy": ("fcfs", "priority"),
    "enforce_eager": (True, False),
    "speculative_config": (
        {**_NGRAM, "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        {**_NGRAM, "num_speculative_tokens": 0, "prompt_lookup_max": 4},
        {**_NGRAM, "num_speculative_tokens": -1},
        {**_NGRAM, "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 4},
        {**_NGRAM, "num_speculative_tokens": 1, "prompt_lookup_max": 3, "prompt_lookup_min": 8},
        {**_NGRAM, "prompt_lookup_max": 4},
        {"num_speculative_tokens": 3},
        {"method": "draft_model", "num_speculative_tokens": 2},
        {"method": "eagle", "num_speculative_tokens": 2},
        _DRAFT,
        {**_DRAFT, "num_speculative_tokens": 1, "method": "draft_model"},
        {**_DRAFT, "model": f"{MODELS}tiny-vocabulary"},
        {**_DRAFT, "model": f"{MODELS}qwen2.5-0.5b"},
        {**_DRAFT, "max_model_len": 4096},
        {**_DRAFT, "max_model_len": 1536},
        {**_DRAFT, "draft_tensor_parallel_size": 2},
        {**_DRAFT, "draft_tensor_parallel_size": 3},
        {**_DRAFT, "tensor_parallel_size": 1},
        {**_NGRAM, "num_speculative_tokens": 2, "tensor_parallel_size": 2},
    ),
}  # fmt: skip
"""Flag to what it may be set to, the odd and the impossible included."""
CPU_MODELS = (
    "tiny-llama", "tiny-awq", "tiny-gptq", "tiny-fp8", "tiny-qwen2", "tiny-gemma3", "tiny-deepseek",
    "tiny-gemma2", "tiny-6-heads", "tiny-6-heads-4-kv", "tiny-12-heads", "llama-2-7b-4-layers",
)  # fmt: skip
IMPOSSIBLE = ("tiny-6-heads-4-kv",)
"""Runs on no number of ranks: says nothing but of the rule on heads."""
CPU_PLAIN = ("tiny-llama", "tiny-awq", "tiny-gptq", "tiny-12-heads", "tiny-deepseek", "qwen2.5-0.5b")
"""What is drawn for the converse; each is started plainly too."""
GPU_MODELS = ("qwen2.5-0.5b", "tiny-awq", "tiny-deepseek", "llama-2-7b-awq", "llama-2-70b", "llama-2-13b")
DRAFTS = ("tiny-llama", "tiny-vocabulary", "qwen2.5-0.5b")
SLO_CASES: tuple[tuple[str, Flags], ...] = (
    ("llama-2-13b", {"dtype": "half", "max_num_seqs": 8}),
    ("llama-2-7b", {"dtype": "bfloat16", "max_num_seqs": 16, "enforce_eager": False}),  # CUDA graphs: near the bound
    ("qwen2.5-7b", {"dtype": "bfloat16", "max_num_seqs": 64}),
)
SLO_KEYS = ("ttft_p95_ms", "tpot_p95_ms", "itl_mean_ms", "e2e_p95_ms", "norm_p95_ms")
SLO_WORKLOAD = Workload(rate_rps=2, duration_s=8, warmup_s=1, max_drain_s=10, endpoint="completions")
_SPACE = "VLLM_CPU_KVCACHE_SPACE"
CPU_ENVS = (*[{_SPACE: "1"}] * 6, *[dict[str, str]()] * 2, {_SPACE: "900"})
_TWO_NODES = {"VLLM_CPU_SIM_MULTI_NUMA": "1"}
"""vLLM's CPU build takes a NUMA node for each rank of tensor parallelism; so it makes one of each core."""
Edge = tuple[str, str, Flags, Mapping[str, str]]
CPU_EDGES: tuple[Edge, ...] = (
    ("blocks_too_few", "tiny-llama", {"max_model_len": 2048, "num_gpu_blocks_override": 15}, {_SPACE: "1"}),
    ("blocks_too_few", "tiny-awq", {"max_model_len": 1025, "num_gpu_blocks_override": 8}, {_SPACE: "1"}),
    ("given_cache_too_small", "tiny-llama", {"max_model_len": 2048, "kv_cache_memory_bytes": 2**22 - 1}, {}),
    ("given_cache_too_small", "llama-2-7b-4-layers", {"max_model_len": 4096, "kv_cache_memory_bytes": 2**28 - 1}, {}),
    ("given_cache_beyond_memory", "tiny-llama", {}, {_SPACE: "26"}),
    ("cpu_share_too_small", "llama-2-7b-4-layers", {"gpu_memory_utilization": 0.08}, {}),
    ("cpu_share_too_small", "qwen2.5-0.5b", {"gpu_memory_utilization": 0.038}, {}),
    ("kv_heads_do_not_divide", "tiny-6-heads", {"tensor_parallel_size": 2}, {_SPACE: "1", **_TWO_NODES}),
    ("kv_heads_do_not_divide", "tiny-12-heads", {"tensor_parallel_size": 2}, {_SPACE: "1", **_TWO_NODES}),
    ("kv_heads_do_not_divide", "tiny-qwen2-6-heads", {"tensor_parallel_size": 2}, {_SPACE: "1", **_TWO_NODES}),
)
GPU_EDGES: tuple[Edge, ...] = (
    ("weights_do_not_fit", "llama-2-13b", {"dtype": "half", "gpu_memory_utilization": 0.3}, {}),
    ("weights_beyond_memory", "llama-2-70b", {}, {}),
    ("weights_do_not_fit", "llama-2-7b-awq", {"gpu_memory_utilization": 0.044}, {}),
    ("sequence_does_not_fit", "llama-2-13b", {"max_model_len": 4096, "gpu_memory_utilization": 0.34}, {}),
    ("sequence_does_not_fit", "llama-2-7b-awq", {"max_model_len": 4096, "gpu_memory_utilization": 0.069}, {}),
    ("sequence_does_not_fit", "qwen2.5-7b", {"max_model_len": 32768, "gpu_memory_utilization": 0.19}, {}),
    ("given_cache_too_small", "llama-2-7b-awq", {"max_model_len": 2048, "kv_cache_memory_bytes": 2**30 - 1}, {}),
    ("given_cache_beyond_memory", "tiny-awq", {"kv_cache_memory_bytes": 80 * 2**30}, {}),
    ("blocks_too_few", "llama-2-7b-awq", {"max_model_len": 2048, "num_gpu_blocks_override": 127, "block_size": 16}, {}),
)
"""Rule, and a configuration just beyond its edge: were the rule too strict by a little, these would run."""


Opened = tuple[str, Flags, Mapping[str, str]]
GPU_OPENED: tuple[Opened, ...] = (
    ("llama-2-13b", {"dtype": "half", "gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 256}, {}),
    ("llama-2-13b", {"dtype": "half", "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2**30}, {}),
    ("llama-2-7b-awq", {"max_model_len": 4096, "gpu_memory_utilization": 0.06, "num_gpu_blocks_override": 300}, {}),
)
CPU_OPENED: tuple[Opened, ...] = (
    ("qwen2.5-0.5b", {"gpu_memory_utilization": 0.038, "kv_cache_memory_bytes": 2**28}, {}),
    ("llama-2-7b-4-layers", {"gpu_memory_utilization": 0.08}, {_SPACE: "1"}),
    ("tiny-llama", {"max_num_batched_tokens": 511, "enable_chunked_prefill": True}, {_SPACE: "1"}),
)
"""What a rule would refuse, but for one flag that turns the refusal off: these must start."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a rule says will happen: a failed start, or a missed limit."""

    rule: str
    message: str
    slo_key: str = ""
    limit_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration to start, and the rules' claims about it: none for one that no rule prunes."""

    sort: str
    model: str
    flags: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()

    @property
    def told(self) -> str:
        """Model and what is set beside BASE."""
        told = {key: value for key, value in {**self.env, **self.flags}.items() if BASE.get(key) != value}
        return " ".join([self.model, *(f"{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in told.items())])

    @property
    def name(self) -> str:
        """One start."""
        return f"{self.sort}: {self.told}"

    @property
    def alone(self) -> bool:
        """It may get as far as the GPU."""
        return not self.claims or any(claim.rule.startswith(ON_GPU) for claim in self.claims)


class Sites:
    """What is known of this machine, for each model."""

    def __init__(self, gpu: GpuSpec | None, version: str, models: Path) -> None:
        self._gpu, self._version, self._models = gpu, version, models
        self._known: dict[tuple[str, str], Site] = {}

    def of(self, model: str, env: Mapping[str, str]) -> Site:
        """The site of a model."""
        key = (model, json.dumps(dict(env), sort_keys=True))
        if key not in self._known:
            pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            directory = model_dir(model, self._models)
            self._known[key] = Site(
                model=describe(directory),
                config=json.loads((directory / "config.json").read_text()),
                drafts={MODELS + name: describe(model_dir(name, self._models)) for name in DRAFTS},
                gpu=self._gpu,
                on_cpu=self._gpu is None,
                host_memory_bytes=pages if self._gpu is None else None,
                gpus_per_node=1 if self._gpu else None,
                engine_version=self._version,
                env=dict(env),
            )
        return self._known[key]


def draw(rng: random.Random, models: Sequence[str], envs: Sequence[Mapping[str, str]]) -> Case:
    """A model, an environment, and flags of which one to four are set otherwise than in BASE."""
    flags = {flag: rng.choice(SPACE[flag]) for flag in rng.sample(sorted(SPACE), rng.randint(1, 4))}
    return _case(rng.choice(models), flags, rng.choice(envs))


def _case(model: str, changes: Flags, env: Mapping[str, str]) -> Case:
    """On a CPU vLLM would take most of the host's memory unless told otherwise."""
    spare = {} if env or model in GPU_MODELS else {"gpu_memory_utilization": 0.2}
    return Case("drawn", model, BASE | spare | changes, env)


def pruned(
    sites: Sites, models: Sequence[str], envs: Sequence[Mapping[str, str]], edges: Sequence[Edge],
    each: int, rules: Sequence[str],
) -> list[Case]:  # fmt: skip
    """For each rule some that it prunes and no other rule does: at its edge, then drawn; one of each rule in turn."""
    rng, found = random.Random(SEED), collections.defaultdict[str, dict[str, Case]](dict)
    for rule, model, changes, env in edges if each else ():
        case = _claimed(sites, rule, _case(model, changes, env))
        assert case is not None, (rule, model, changes)
        found[rule][case.told] = case
    for _ in range(DRAWS if each else 0):
        drawn = draw(rng, models, envs)
        if drawn.model in IMPOSSIBLE:
            continue
        refusal = judge(sites.of(drawn.model, drawn.env), drawn.flags)
        if refusal and len(found[refusal.rule]) < each and (case := _least(sites, refusal.rule, drawn)):
            found[refusal.rule].setdefault(case.told, case)
    chosen = [list(cases.values()) for rule, cases in found.items() if not rules or rule in rules]
    return [case for turn in itertools.zip_longest(*chosen) for case in turn if case is not None]


def opened(sites: Sites, cases: Sequence[Opened]) -> Iterator[Case]:
    """What must start: none is pruned, though a rule speaks of what it has in part."""
    for model, changes, env in cases:
        case = replace(_case(model, changes, env), sort="opened")
        assert judge(sites.of(model, env), case.flags) is None, case.told
        yield case


def unstripped(sites: Sites, models: Sequence[str], envs: Sequence[Mapping[str, str]], count: int) -> Iterator[Case]:
    """As drawn, with all flags that may interact, as many of each rule as there are."""
    rng, found = random.Random(SEED + 2), dict[str, Case]()
    turn: collections.Counter[str] = collections.Counter()
    rules = len([rule for rule in RULES if rule.kind == "hard"])
    for _ in range(DRAWS if count else 0):
        case = draw(rng, models, envs)
        refusal = judge(sites.of(case.model, case.env), case.flags)
        if refusal is None or case.model in IMPOSSIBLE or turn[refusal.rule] > count // rules:
            continue
        turn[refusal.rule] += 1
        found.setdefault(case.told, replace(case, sort="pruned", claims=(Claim(refusal.rule, refusal.message),)))
        if len(found) >= count:
            break
    yield from found.values()


def _claimed(sites: Sites, rule: str, case: Case) -> Case | None:
    """A case with the rule's claim, if this rule prunes it and no other does."""
    site = sites.of(case.model, case.env)
    refusal = judge(site, case.flags)
    if refusal is None or refusal.rule != rule or judge(site, case.flags, disabled={rule, *IMPLIED.get(rule, ())}):
        return None
    return replace(case, sort="pruned", claims=(Claim(rule, refusal.message),))


def _least(sites: Sites, rule: str, case: Case) -> Case | None:
    """With all taken back to BASE that the rule does not need: what then fails does so for no other oddity."""
    if _claimed(sites, rule, plain := _case(case.model, dict(case.flags), {_SPACE: "1"} if case.env else {})):
        case = plain
    for flag in [*case.flags, *case.flags]:  # twice: one may only go once another is gone
        plain = _case(case.model, {k: v for k, v in case.flags.items() if k != flag}, case.env)
        if _claimed(sites, rule, plain):
            case = plain
    return _claimed(sites, rule, case)


def unpruned(sites: Sites, models: Sequence[str], envs: Sequence[Mapping[str, str]], count: int) -> Iterator[Case]:
    """Each model plain, then configurations drawn at random that no rule prunes."""
    rng, found = random.Random(SEED + 1), dict[str, Case]()
    if count:
        yield from (replace(_case(model, {}, envs[0]), sort="plain") for model in models)
    while len(found) < count:
        case = draw(rng, models, envs)
        if _ranks(case) == 1 and judge(sites.of(case.model, case.env), case.flags) is None:
            found.setdefault(case.name, case)
    yield from found.values()


def _ranks(case: Case) -> int:
    """Nothing here can run more than one."""
    return math.prod(case.flags.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data"))


def slo_cases(sites: Sites, rules: Sequence[str]) -> list[Case]:
    """Servers under load, with the largest limits that a rule calls impossible on them."""
    requests = schedule(SLO_WORKLOAD, start_s=0, duration_s=SLO_WORKLOAD.duration_s, max_len=2048, stream="measure")
    prompts, outputs = [r.prompt_tokens for r in requests], [r.output_tokens for r in requests]
    cases = []
    for model, changes in SLO_CASES:
        flags = BASE | {"max_model_len": 2048, "enable_prefix_caching": False} | changes
        site = replace(sites.of(model, {}), prompt_tokens=prompts, output_tokens=outputs)
        claims = [claim for key in SLO_KEYS if (claim := _tightest(site, flags, key))]
        claims = [claim for claim in claims if not rules or claim.rule in rules]
        if claims:
            cases.append(Case("loaded", model, flags, {}, tuple(claims)))
    return cases


def _tightest(site: Site, flags: Flags, key: str) -> Claim | None:
    """The rule's word at the largest limit that it still calls impossible, to 1 in 1000."""

    def word(limit_ms: float) -> Refusal | None:
        return judge(replace(site, slo={key: limit_ms}), flags)

    low, high = 1e-6, 1e7
    if word(low) is None or word(high) is not None:
        return None
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if word(middle) is None else (middle, high)
    refusal = word(low)
    assert refusal is not None
    return Claim(refusal.rule, refusal.message, key, low)


# ---- starting


@dataclass(frozen=True, slots=True)
class Starter:
    """How this run starts servers, and where it keeps what.

    Attributes:
        work: a folder for models, logs and the load's own results.
        out: gets the rows.
        locks: held during each start.
        forks: who forks them; None starts each anew.
        logs: gets every server's log.
        timeout_s: of a start.
    """

    work: Path
    out: Path
    locks: Locks
    forks: Forks | None
    logs: Path | None
    timeout_s: float

    def run(self, case: Case, alone: bool = True) -> list[dict[str, Any]]:
        """Starts one, puts it under load where a limit is claimed, and returns a row for each claim."""
        placed = json.loads(json.dumps(dict(case.flags)).replace(MODELS, f"{self.work}/models/"))
        config = ServingConfig(str(model_dir(case.model, self.work / "models")), None, placed)
        measured: dict[str, float] = {}

        def load(server: VllmServer) -> None:
            measured.update(_excess(server, case, self.work / "results"))

        use: Callable[[VllmServer], None] = load if case.sort == "loaded" else lambda server: None
        with tempfile.TemporaryDirectory(prefix="log-", dir=self.work) as logs:
            started = start_until(
                config,
                log=Path(logs) / "server.log",
                env=case.env,
                timeout_s=self.timeout_s,
                use=use,
                alone=alone,
                forks=self.forks,
            )
        keep_log(self.logs, case.name, started.log)
        return [_row(case, claim, started, measured) for claim in case.claims or (Claim("", ""),)]

    def keep(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows."""
        for row in rows:
            append_row(self.out, row)
            words = [f"{row['wall_s']:6.1f} s", row["verdict"], row["rule"], row["told"], row["failure"], row["detail"]]
            print("  ".join(map(str, words)), file=sys.stderr, flush=True)


def _excess(server: VllmServer, case: Case, results: Path) -> dict[str, float]:
    """SLO key to value / limit - 1, as varcas measures this server."""
    os.environ[endpoint.KEY_VARIABLES[0]] = server.api_key
    slo = {claim.slo_key: claim.limit_ms for claim in case.claims}
    return dict(endpoint.measure(server.url, SLO_WORKLOAD, model=MODEL_ID, slo=slo, results=results).constraints)


def _row(case: Case, claim: Claim, started: Started, measured: Mapping[str, float]) -> dict[str, Any]:
    excess = measured.get(claim.slo_key)
    return {
        "case": f"{case.name} {claim.rule} {claim.slo_key}".strip(),
        "start": case.name,
        "sort": case.sort,
        "told": case.told,
        "model": case.model,
        "flags": dict(case.flags),
        "env": dict(case.env),
        "rule": claim.rule,
        "claim": claim.message,
        "limit_ms": claim.limit_ms,
        "measured_ms": None if excess is None else claim.limit_ms * (1 + excess),
        "failure": started.kind,
        "detail": started.detail,
        "verdict": _verdict(case, started, excess),
        "wall_s": round(started.wall_s, 1),
        **circumstances(),
    }


def _verdict(case: Case, started: Started, excess: float | None) -> str:
    if started.kind in UNDECIDED or NOT_ITS_FAULT in started.detail or (case.sort == "loaded" and excess is None):
        return "undecided"
    if case.sort == "pruned" and started.kind and not all(_as_said(c.rule, started) for c in case.claims):
        return "undecided"  # it failed, for another reason than the rule's
    if case.sort == "loaded":
        return "missed" if excess is not None and excess > 0 else "met"
    return "failed" if started.kind else "ran"


MEMORY_KINDS = {"out_of_memory", "kv_cache_too_small"}
"""Which of the two a start dies of depends on how far it comes."""
NOT_THE_DEVICES = {"unsupported_by_engine", "unsupported_by_gpu"}


WORDS = {"kv_heads_do_not_divide": "AssertionError", "too_few_gpus": "out of bounds"}
"""Of a crash for the rule's own reason: vLLM asserts it."""


def _as_said(rule: str, started: Started) -> bool:
    """Whether a start failed in the way that the rule foretells."""
    if rule in WORDS and WORDS[rule] in started.detail:
        return True
    foretold = failure_kind(rule)
    return any({foretold, started.kind} <= same for same in ({foretold}, MEMORY_KINDS, NOT_THE_DEVICES))


def rejudged(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an earlier run: a failure of another kind than the rule's is no proof."""
    started = Started(row["failure"], row["detail"], "", 0.0)
    if row["rule"] == "weights_do_not_fit" and "gpu_memory_utilization" not in row["flags"]:
        row = {**row, "rule": "weights_beyond_memory"}  # written before the rule was split
    proof = not row["rule"] or row["verdict"] != "failed" or _as_said(row["rule"], started)
    return {**row, "verdict": row["verdict"] if proof else "undecided"}


def run_all(cases: Sequence[Case], starter: Starter, clock: Clock, workers: int) -> None:
    """Starts all: under load first; then, beside those that need the GPU alone, those that never reach it."""
    for case in cases:
        model_dir(case.model, starter.work / "models")
    loaded = [case for case in cases if case.sort == "loaded"]
    crowd = [case for case in cases if workers and not case.alone]
    rest = sorted((case for case in cases if case not in loaded and case not in crowd), key=lambda case: case.alone)
    _in_turn(loaded, starter, clock)
    with ThreadPoolExecutor(max(workers, 1)) as threads:
        tried = [threads.submit(_in_crowd, case, starter, clock) for case in crowd]
        _in_turn(rest, starter, clock)
        again = [case for case, told in zip(crowd, tried, strict=True) if not told.result()]
    _in_turn(again, starter, clock)


def _in_turn(cases: Sequence[Case], starter: Starter, clock: Clock) -> None:
    """One by one; the locks are let go between them, but for starts that are refused within seconds."""
    left = collections.deque(cases)
    while left:
        with starter.locks.held():
            ends_s = time.monotonic() + HOLD_S
            while left and time.monotonic() < ends_s:
                case = left.popleft()
                if clock.fits(case.sort, 60.0):
                    rows = starter.run(case)
                    clock.took(case.sort, rows[0]["wall_s"])
                    starter.keep(rows)
                else:
                    print(f"no time left for {case.name}", file=sys.stderr, flush=True)


def _in_crowd(case: Case, starter: Starter, clock: Clock) -> bool:
    """Whether it was settled: not when others on the GPU may have made it fail."""
    if not clock.fits("crowd", 40.0):
        return False
    rows = starter.run(case, alone=False)
    clock.took("crowd", rows[0]["wall_s"])
    if rows[0]["failure"] in CROWDED:
        return False
    starter.keep(rows)
    return True


# ---- printing


def print_report(rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> None:
    """Prints what was pruned and what became of it, the bound, and what the rules missed."""
    hard = {rule.name for rule in rules if rule.kind == "hard"}
    claimed = [row for row in rows if row["rule"] in hard]
    print("| rule | configuration | the rule says | what happened | |")
    print("|---|---|---|---|---|")
    for row in sorted(claimed, key=lambda row: (row["rule"], row["told"])):
        happened = f"`{row['failure']}`: {_short(row['detail'])}" if row["failure"] else "it started and answered"
        if row["measured_ms"] is not None:
            happened = f"measured {row['measured_ms']:.3g} ms under load, limit {row['limit_ms']:.3g} ms"
        print(_cells(row["rule"], row["told"], row["claim"], happened, row["verdict"]))
    decided = [row for row in claimed if row["verdict"] != "undecided"]
    false = [row for row in decided if row["verdict"] in ("ran", "met")]
    print(f"\nHard-pruned and tried: {len(decided)}; false prunes: {len(false)}; "
          f"undecided: {len(claimed) - len(decided)}. At most {upper_bound(len(false), len(decided)):.1%} "
          "of such prunes are false (Clopper-Pearson, one-sided 95 %).\n")  # fmt: skip
    tried = collections.Counter(row["rule"] for row in decided)
    print("| rule | tried | false |\n|---|--:|--:|")
    for rule in (rule for rule in rules if rule.name in hard):
        wrong = sum(row["rule"] == rule.name for row in false)
        print(f"| {rule.name} | {tried[rule.name] or 'source-only'} | {wrong if tried[rule.name] else ''} |")
    plain = {row["model"]: row["verdict"] == "ran" for row in rows if row["sort"] == "plain"}
    words = [f"{model} {'runs' if ran else 'fails'}" for model, ran in plain.items()]
    print(f"\nStarted plainly: {', '.join(words) or 'none'}.")
    drawn = [row for row in rows if row["sort"] == "drawn" and row["verdict"] != "undecided"]
    print_missed([row for row in drawn if plain.get(row["model"], True)])
    print_opened([row for row in rows if row["sort"] == "opened"])


def print_missed(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what vLLM refused though no rule did."""
    refused = [row for row in rows if row["verdict"] == "failed"]
    print(f"\nDrawn at random, pruned by no rule, and started: {len(rows)}; refused by vLLM: {len(refused)}.\n")
    print("| configuration | kind | vLLM's words |\n|---|---|---|")
    for row in sorted(refused, key=lambda row: (row["failure"], row["detail"])):
        print(_cells(row["told"], row["failure"], _short(row["detail"])))


def print_opened(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what one flag keeps a rule from refusing."""
    ran = sum(row["verdict"] == "ran" for row in rows)
    print(f"\nNot pruned because of one flag, and started: {len(rows)}; ran: {ran}.\n")
    print("| configuration | what happened |\n|---|---|")
    for row in rows:
        words = f"`{row['failure']}`: {_short(row['detail'])}"
        print(_cells(row["told"], words if row["failure"] else "it started and answered"))


def _cells(*texts: str) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _short(detail: str) -> str:
    """What vLLM said, without the names of exceptions and its advice."""
    told = re.sub(r"^(.*validation error for \w+|[\w.]*Error:) (Value error, )?", "", detail)
    return told if len(told) <= LONGEST_WORDS else told[: LONGEST_WORDS - 1] + "…"


def planned(sites: Sites, args: argparse.Namespace) -> Iterator[Case]:
    """What is to be started."""
    models, envs, edges = (GPU_MODELS, ({},), GPU_EDGES) if args.gpu else (CPU_MODELS, CPU_ENVS, CPU_EDGES)
    yield from opened(sites, (GPU_OPENED if args.gpu else CPU_OPENED) if args.opened else ())
    if args.gpu and args.each:
        yield from slo_cases(sites, args.rules)
    yield from pruned(sites, models, envs, edges, args.each, args.rules)
    yield from unstripped(sites, models, envs, args.unstripped)
    yield from unpruned(sites, models if args.gpu else CPU_PLAIN, envs, args.drawn)


def main() -> None:
    """Starts what is not done, and prints the report of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on one GPU")
    parser.add_argument("--rules", nargs="*", default=[], help="names of rules to try (default: all)")
    parser.add_argument("--each", type=int, default=4, help="configurations a rule")
    parser.add_argument("--opened", action="store_true", help="what one flag keeps a rule from refusing: must start")
    parser.add_argument("--unstripped", type=int, default=0, help="pruned configurations with all that was drawn")
    parser.add_argument("--drawn", type=int, default=0, help="configurations that no rule prunes")
    add_options(parser, Path("false_prunes.jsonl"))
    parser.add_argument("--list", action="store_true", help="only list what would be started")
    parser.add_argument("--version", help="of vLLM, for --list")
    args = parser.parse_args()
    clock, locks = Clock(args.budget_s), Locks(tuple(args.shared_lock), tuple(args.lock))
    with tempfile.TemporaryDirectory(prefix="varcas-prunes-") as work, contextlib.ExitStack() as running:
        if not args.print:
            with locks.held():
                cases = plan(args, Path(work))
            if args.list:
                print("\n".join(f"{c.sort} {[claim.rule for claim in c.claims]} {c.told}" for c in cases))
                return
            with locks.held():
                forks = running.enter_context(Forks(server_env(ENV), Path(work) / "f.log")) if args.fork else None
            starter = Starter(Path(work), args.out, locks, forks, args.logs, GPU_TIMEOUT_S if args.gpu else TIMEOUT_S)
            run_all(cases, starter, clock, GPU_WORKERS if args.gpu else 0)
        print_report([rejudged(row) for row in read_rows([*args.done, args.out])], RULES)


def plan(args: argparse.Namespace, work: Path) -> list[Case]:
    """What is to be started and has not been."""
    version = args.version or probe_python().require().vllm_version
    told = (
        [("NVIDIA H100 80GB HBM3", 81559 * 2**20)] if args.list else [(g.name, g.memory_bytes) for g in hardware.gpus()]
    )
    gpu = gpus.installed(*told[0]) if args.gpu else None  # as the pruner does: what the driver shows bounds it
    sites = Sites(gpu, str(version), work / "models")
    done = {row["start"] for row in read_rows([*args.done, args.out])}
    return [case for case in planned(sites, args) if case.name not in done]


if __name__ == "__main__":
    main()
