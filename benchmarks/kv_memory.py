"""Weights and KV tokens that real vLLM reports, beside what `varcas.memory` computes: `python benchmarks/kv_memory.py`.

Starts vLLM once a configuration, with dummy weights, reads its log, and ends it as soon as the size of its KV cache is
there. Prints a table with the errors; the target is 3 %. `--gpu` takes the configurations for one GPU, else those for
vLLM's CPU build, whose log does not tell the weights: there a plugin (`vllm.general_plugins`, vLLM's own mechanism)
prints their bytes once they are loaded, before they are packed for the CPU's kernels.

    PYTHONPATH=. python benchmarks/kv_memory.py --out kv_cpu.jsonl
    PYTHONPATH=.:/tmp/site python3 benchmarks/kv_memory.py --gpu --out $OUT/kv_gpu.jsonl --budget-s 570
    PYTHONPATH=. python benchmarks/kv_memory.py --gpu --print --done kv_gpu.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_starts import (
    ENV,
    Clock,
    Locks,
    add_options,
    append_row,
    circumstances,
    keep_log,
    model_dir,
    read_rows,
    said,
    start_until,
)
from vllm_forks import Forks

from varcas import gpus
from varcas.engine.vllm import kv_cache_tokens, server_env
from varcas.gpus import GIB, GpuSpec
from varcas.memory import Memory, cpu_memory, memory, settings
from varcas.model import describe
from varcas.space import ServingConfig

TARGET = 0.03
TIMEOUT_S = 400.0
EAGER = {"enforce_eager": True}
PLUGIN = """
def register():
    from vllm.model_executor.model_loader import base_loader
    if hasattr(base_loader, "varcas_pack"):
        return
    base_loader.varcas_pack = pack = base_loader.process_weights_after_loading
    def weigh_and_pack(model, *rest):
        tensors = [*model.parameters(), *model.buffers()]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        print(f"varcas: weights are {sum(found.values())} bytes", flush=True)
        pack(model, *rest)
    base_loader.process_weights_after_loading = weigh_and_pack
"""
REPORTED = (
    r"Model loading took", r"KV cache size", r"Available KV cache memory", r"Memory profiling takes", r"GiB for KV",
    r"[Gg]raph.* (memory|GiB)", r"Requested memory", r"Free memory", r"attention backend", r"varcas: weights",
    r"Using \w*(Machete|Marlin|Linear\w*Kernel)", r"for Mixed-Precision|quantization",
)  # fmt: skip
"""Lines of the log that a row keeps."""


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration; `flags` over those that all of its list share."""

    model: str
    flags: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Model and what is set."""
        told = {**self.env, **self.flags}
        return " ".join([self.model, *(f"{key}={value}" for key, value in told.items())])

    @property
    def sort(self) -> str:
        """Starts of a sort take about as long."""
        return "eager" if self.flags.get("enforce_eager") else "compiled"


SPACE_1 = {"VLLM_CPU_KVCACHE_SPACE": "1"}
SPACE_2 = {"VLLM_CPU_KVCACHE_SPACE": "2"}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""glibc then gives what is freed back to the kernel; else originals of packed weights stay resident in part."""
CPU = (
    Case("tiny-llama", {"max_num_seqs": 8, **EAGER}, SPACE_1),
    Case("smollm2-135m", {"dtype": "float32", "max_num_batched_tokens": 8192, **EAGER}, SPACE_1),
    Case("qwen2.5-0.5b", {"dtype": "half", "block_size": 32, **EAGER}, SPACE_1),
    Case("qwen2.5-0.5b", {"gpu_memory_utilization": 0.3, **EAGER}),
    Case("qwen2.5-0.5b", {"gpu_memory_utilization": 0.5, "max_num_seqs": 8}),
    Case("qwen2.5-0.5b", {"gpu_memory_utilization": 0.5, "max_num_batched_tokens": 8192, "max_num_seqs": 256, **EAGER}),
    Case("qwen2.5-0.5b", {"kv_cache_dtype": "fp8", **EAGER}, SPACE_1),
    Case("gemma-3-1b", {"kv_cache_memory_bytes": 2 * GIB, "max_model_len": 8192, **EAGER}),
    Case("gemma-3-1b", {"gpu_memory_utilization": 0.4, "disable_hybrid_kv_cache_manager": True, **EAGER}),
    Case("mistral-7b-4-layers", {"max_model_len": 16384, "dtype": "bfloat16", **EAGER}, SPACE_2),
    Case("deepseek-v2-lite-2-layers", {**EAGER}, SPACE_1),
    Case("llama-2-7b-4-layers-awq", {"dtype": "bfloat16", **EAGER}, SPACE_1),
    Case("llama-2-7b-4-layers-gptq", {"dtype": "half", "gpu_memory_utilization": 0.3, **EAGER}),
    Case("llama-2-7b-4-layers", {"dtype": "half", "gpu_memory_utilization": 0.4}),
    Case("tiny-llama", {"num_gpu_blocks_override": 100, **EAGER}, SPACE_1),
    Case("tiny-llama", {"gpu_memory_utilization": 0.2, **EAGER}),
    Case("qwen2.5-0.5b", {"gpu_memory_utilization": 0.35, **EAGER}),
    Case("gemma-3-1b", {"gpu_memory_utilization": 0.4, "max_num_seqs": 8, **EAGER}, RETURNED),
    Case("gemma-3-1b", {"gpu_memory_utilization": 0.4, "max_num_seqs": 8, **EAGER}),
)  # fmt: skip

_8K, _16K, _2K = ({"max_num_batched_tokens": tokens} for tokens in (8192, 16384, 2048))
GPU = (
    Case("llama-2-7b-awq", {"dtype": "half", "gpu_memory_utilization": 0.9, "max_num_seqs": 256, **_2K, **EAGER}),
    Case("llama-2-7b", {"dtype": "half", "gpu_memory_utilization": 0.5, "max_num_seqs": 8, **_8K, **EAGER}),
    Case("llama-2-7b", {"dtype": "bfloat16", "gpu_memory_utilization": 0.92, "max_num_seqs": 1024, **_16K, **EAGER}),
    Case("llama-2-7b-awq", {"dtype": "half", "gpu_memory_utilization": 0.92, "max_num_seqs": 8, **_2K}),
    Case("llama-2-7b", {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.9,
                        "max_num_seqs": 256, **_8K, **EAGER}),
    Case("llama-2-7b-awq", {"dtype": "half", "gpu_memory_utilization": 0.5, "max_num_seqs": 1024, **_16K, **EAGER}),
    Case("qwen2.5-7b", {"dtype": "bfloat16", "gpu_memory_utilization": 0.9, "max_num_seqs": 1024, **_8K, **EAGER}),
    Case("llama-2-7b", {"dtype": "half", "gpu_memory_utilization": 0.9, "max_num_seqs": 256, **_8K}),
    Case("llama-2-7b-awq", {"dtype": "bfloat16", "gpu_memory_utilization": 0.9, "max_num_seqs": 256, **_8K, **EAGER}),
    Case("gemma-3-1b", {"dtype": "bfloat16", "gpu_memory_utilization": 0.5, "max_num_seqs": 256, **_8K, **EAGER}),
    Case("llama-2-7b", {"dtype": "bfloat16", "gpu_memory_utilization": 0.5, "max_num_seqs": 1024, **_16K}),
)  # fmt: skip
"""In order of what they tell, as the budget may end before all are started."""


def start(case: Case, work: Path, env: Mapping[str, str], forks: Forks | None, logs: Path | None) -> dict[str, Any]:
    """Starts one and returns its row."""
    flags = {"load_format": "dummy", "max_model_len": 2048, **case.flags}
    config = ServingConfig(str(model_dir(case.model, work / "models")), None, flags)
    total = gpus.node_bytes()
    started = start_until(
        config,
        log=work / "server.log",
        enough=lambda log: kv_cache_tokens(log) is not None,
        env={**case.env, **env},
        timeout_s=TIMEOUT_S,
        forks=forks,
    )
    keep_log(logs, case.name, started.log)
    weights = re.search(r"Model loading took ([\d.]+) GiB|varcas: weights are (\d+) bytes", started.log)
    return {
        "case": case.name,
        "model": case.model,
        "flags": flags,
        "env": dict(case.env),
        **circumstances(),
        "host_bytes": total,
        "wall_s": round(started.wall_s, 1),
        "failure": started.kind,
        "detail": started.detail,
        "kv_tokens": kv_cache_tokens(started.log),
        "weights_bytes": weights and (float(weights[1]) * GIB if weights[1] else int(weights[2])),
        "weights_rounded": bool(weights and weights[1]),
        "said": said(started.log, *REPORTED),
    }


def computed(row: Mapping[str, Any], work: Path) -> tuple[Memory, float]:
    """What varcas says of a row's configuration, and the bytes of its weights as that server reports them."""
    model = describe(model_dir(row["model"], work / "models"))
    if row["gpu"]:
        found = gpus.installed(row["gpu"], row["gpu_bytes"])
        assert found is not None, row["gpu"]
        told = memory(model, found, settings(row["flags"], model, found))
        return told, float(told.weights)
    space = row["env"].get("VLLM_CPU_KVCACHE_SPACE")
    flags = row["flags"] | ({"kv_cache_memory_bytes": int(space) * GIB} if space else {})
    told = cpu_memory(model, settings(flags, model, a_cpu(row["host_bytes"])), row["host_bytes"])
    return told, float(told.weights)


def a_cpu(total_bytes: int) -> GpuSpec:
    """A host without a GPU, of which only the memory counts here."""
    return GpuSpec("cpu", "cpu", (), None, total_bytes, total_bytes, 1.0, {"fp32": 1.0}, None, "", 1.0, None, "", "",
                   measured=True)  # fmt: skip


def print_table(rows: Sequence[Mapping[str, Any]], work: Path) -> None:
    """Prints reported and computed figures as Markdown."""
    print("| model | what is set | weights, MiB | computed | error | KV tokens | computed | error |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    worst = 0.0
    for row in rows:
        model, _, flags = row["case"].partition(" ")
        if row["failure"]:
            print(f"| {model} | {flags} | | | | {row['failure']}: {row['detail']} | | |")
            continue
        told, weights = computed(row, work)
        errors = [weights / (row["weights_bytes"] or weights) - 1, float(told.kv_tokens) / row["kv_tokens"] - 1]
        worst = max(worst, *map(abs, errors))
        reported = f"{row['weights_bytes'] / 2**20:,.0f}" if row["weights_bytes"] else "-"
        print(f"| {model} | {flags} | {reported} | {weights / 2**20:,.0f} | {errors[0]:+.1%} "
              f"| {row['kv_tokens']:,} | {float(told.kv_tokens):,.0f} | {errors[1]:+.1%} |")  # fmt: skip
    done = [row for row in rows if not row["failure"]]
    print(f"\n{len(done)} servers that reported, {len(rows) - len(done)} that did not start; "
          f"worst error {worst:.1%}, target {TARGET:.0%}.")  # fmt: skip


def plugin_dir(root: Path) -> Path:
    """Writes the plugin that says what the weights are, as an installed package would look."""
    info = root / "plugin" / "varcas_weighs-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: varcas-weighs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nvarcas_weighs = varcas_weighs:register\n")
    (info.parent / "varcas_weighs.py").write_text(PLUGIN)
    return info.parent


def main() -> None:
    """Starts what is not done, and prints the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the configurations for one GPU")
    add_options(parser, Path("kv_memory.jsonl"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    clock, locks = Clock(args.budget_s), Locks(tuple(args.shared_lock), tuple(args.lock))
    files = [*args.done, args.out]
    cases = [case for case in (GPU if args.gpu else CPU) if args.only in case.name]
    with tempfile.TemporaryDirectory(prefix="varcas-kv-") as work, contextlib.ExitStack() as running:
        path = os.pathsep.join(filter(None, [str(plugin_dir(Path(work))), os.environ.get("PYTHONPATH", "")]))
        env = {"VLLM_LOGGING_LEVEL": "DEBUG"} if args.gpu else {"PYTHONPATH": path}
        log = Path(work) / "forks.log"
        fork = args.fork and not args.print
        with locks.held():
            forks = running.enter_context(Forks(server_env({**ENV, **env}), log)) if fork else None
        for case in cases if not args.print else ():
            if case.name in {row["case"] for row in read_rows(files) if not row["failure"]}:
                continue
            if not clock.fits(case.sort, 55.0 if case.sort == "eager" else 110.0):
                print(f"no time left for {case.name}", file=sys.stderr, flush=True)
                continue
            with locks.held():
                row = start(case, Path(work), env, forks, args.logs)
            clock.took(case.sort, row["wall_s"])
            append_row(args.out, row)
            print(
                f"{row['wall_s']:6.1f} s  {row['failure'] or row['kv_tokens']}  {case.name}",
                file=sys.stderr,
                flush=True,
            )
        wanted = {case.name for case in cases}
        print_table([row for row in read_rows(files) if row["case"] in wanted], Path(work))


if __name__ == "__main__":
    main()
