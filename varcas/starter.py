"""`varcas init`: a commented experiment file with a space worth searching for this GPU, model and vLLM version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from varcas import hardware
from varcas.engine.fetch import check_local_model, lacks_weights
from varcas.engine.node import Node
from varcas.errors import InputError, nearest
from varcas.experiment import Server, parse_experiment
from varcas.workload.profiles import PROFILES


@dataclass(frozen=True, slots=True)
class Candidate:
    """A flag worth searching: its choices as YAML, why, and on which hardware."""

    flag: str
    choices: str
    why: str
    least_sm: int = 0
    below_sm: int = 1000
    cpu: bool = True


# Compute capability times 10, from NVIDIA's table (developer.nvidia.com/cuda-gpus).
SM = {
    "V100": 70,
    "T4": 75,
    "A100": 80,
    "A10": 86,
    "A10G": 86,
    "L4": 89,
    "L40S": 89,
    "H100": 90,
    "H200": 90,
    "B200": 100,
}

DEFAULT_LEN = 4096
CANDIDATES = (
    Candidate("max_num_seqs", "[4, 8, 16, 32, 64, 128, 256]", "sequences decoded together: throughput against TPOT"),
    # vLLM's guide: 2048 for ITL, more for TTFT, above 8192 for throughput of small models on large GPUs
    Candidate(
        "max_num_batched_tokens", "[2048, 4096, 8192, 16384]", "tokens a step: TTFT against ITL", least_sm=80, cpu=False
    ),
    Candidate(
        "max_num_batched_tokens", "[1024, 2048, 4096, 8192]", "tokens a step: TTFT against ITL", below_sm=80, cpu=False
    ),
    Candidate("enable_prefix_caching", "[true, false]", "on by default; pays when prompts share a beginning"),
    Candidate("async_scheduling", "[true, false]", "overlaps scheduling with the GPU's work", cpu=False),
    # vLLM refuses an fp8 KV cache below sm_89
    Candidate("kv_cache_dtype", "[auto, fp8]", "half the KV cache a token", least_sm=89, cpu=False),
)
"""Why these, and why not others: docs/search.md, The space to search."""


def starter_file(
    model: str, *, rate_rps: float, slo: Mapping[str, float], gpu: str, profile: str, name: str | None
) -> str:
    """The text of an experiment file, checked before it is returned.

    Raises:
        InputError: an unknown GPU type, profile or SLO key, or a model directory that is not there.
    """
    check_local_model(model)
    if profile not in PROFILES:
        raise InputError(f"--profile: {profile!r} is unknown.{nearest(profile, PROFILES)} Known: {', '.join(PROFILES)}")
    kind = _gpu_kind(gpu)
    known, version = _installed_flags(model)
    text = "\n".join(_lines(model, rate_rps, slo, kind, profile, name, known, version)) + "\n"
    parse_experiment(text, "varcas init")
    return text


def _gpu_kind(gpu: str) -> str:
    if gpu != "auto":
        if gpu != "cpu" and gpu not in SM:
            raise InputError(f"--gpu: {gpu!r} is unknown.{nearest(gpu, SM)} Known: cpu, {', '.join(SM)}.")
        return gpu
    here = hardware.gpus()
    return here[0].kind if here else "cpu"


def _installed_flags(model: str) -> tuple[set[str] | None, str | None]:
    """Flags and version of the vLLM installed here; None without one."""
    node = Node(Server(), model, None)
    try:
        return (set(node.flag_names()), node.vllm_version()) if node.has_vllm() else (None, None)
    finally:
        node.close()


def _model_len(model: str) -> int:
    """What holds every chat of the short and medium profiles, or less where the model's own configuration says so."""
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text())
        return min(DEFAULT_LEN, int(config.get("max_position_embeddings") or DEFAULT_LEN))
    except (OSError, ValueError, TypeError):  # a hub id: the hub is not asked before a sweep
        return DEFAULT_LEN


def _lines(
    model: str,
    rate_rps: float,
    slo: Mapping[str, float],
    kind: str,
    profile: str,
    name: str | None,
    known: set[str] | None,
    version: str | None,
) -> Iterable[str]:
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name.lower()).strip("-") or "model"
    on_cpu, sm = kind == "cpu", SM.get(kind, 80)
    basis = f"vLLM {version}, installed here" if version else "no vLLM here: flags are checked on the first node"
    yield f"# Written by `varcas init` for {kind} ({basis}). Run: varcas sweep THIS_FILE"
    yield f"name: {name or f'{base}-{kind.lower()}'}"
    yield f"model: {json.dumps(model)}"
    yield f"hardware: {{gpu: {kind}, count: 1}}     # GPUs the study may use at once; `auto`: what Ray sees"
    if on_cpu:
        yield "server:"
        yield '  env: {VLLM_CPU_KVCACHE_SPACE: "4"}   # GiB of RAM for the KV cache'
    yield "serve:                               # fixed flags, spelled as vLLM spells them"
    yield f"  max_model_len: {_model_len(model)}                # longest prompt + output; shorter leaves more KV cache"
    if not on_cpu:
        yield "  gpu_memory_utilization: 0.90       # stated: its default changed between vLLM versions"
    if not on_cpu and sm < 80:
        yield "  dtype: half                        # this GPU has no bfloat16"
    if lacks_weights(model):
        yield "  load_format: dummy                 # no weights there: random ones. Timing is real, the text is not"
    if on_cpu:
        yield "  enforce_eager: true                # no torch.compile: faster starts"
    yield "baseline: {}                         # the configuration to beat: `serve` alone is vLLM's own default"
    yield "space:                               # flags to search; powers of two rather than fine ranges"
    for candidate in CANDIDATES:
        if known is not None and candidate.flag not in known:
            continue
        left_out = (on_cpu and not candidate.cpu) or not candidate.least_sm <= sm < candidate.below_sm
        if not left_out:
            yield f"  {candidate.flag}: {{choices: {candidate.choices}}}   # {candidate.why}"
    yield "  # speculative_config:              # for text that repeats its prompt"
    yield "  #   choices: [null, {method: ngram, num_speculative_tokens: {choices: [3, 5]}, prompt_lookup_max: 4}]"
    yield "workload:"
    yield f"  profile: {profile}               # or {', '.join(name for name in PROFILES if name != profile)}"
    yield f"  rate_rps: {rate_rps:g}                        # the traffic you expect, open loop"
    yield "  duration_s: 120                    # measured window; p95 needs 200 requests, p99 1,000"
    yield "  max_drain_s: 30"
    yield "  seed: 0"
    if slo:
        yield "slo: {" + ", ".join(f"{key}: {limit:g}" for key, limit in slo.items()) + "}"
        yield "objective: {maximize: goodput_rps}   # requests a second that met the SLO"
    else:
        yield "slo: {}                              # e.g. {ttft_p95_ms: 500, tpot_p95_ms: 50}"
        yield "objective: {maximize: output_tokens_per_s}"
    yield "study: {trials: 20, stop: auto, repeats: 3}   # starts of the search at most; confirmation starts an arm"
    yield "results: results/"
