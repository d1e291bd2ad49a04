"""What Optuna costs a driver: milliseconds of `propose` + `tell` a trial, through `varcas.study` and real storage.

Run: python benchmarks/study_overhead.py [--trials 1000] [--storage journal] [--sampler auto] [--json]

The space is the T4 experiment's flags plus two numbers, so that 1,000 trials do not exhaust it; one in ten
configurations fails, and an SLO is set. The store's own cost is not in these figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from varcas.experiment import Experiment, parse_experiment
from varcas.records import TrialRow
from varcas.space import Space
from varcas.study import Proposal, open_study

TARGET_P99_MS = 50.0
"""Of the whole driver, store and pool included, for a trial."""

FILE = """
name: overhead
model: model
serve: {{dtype: half}}
space:
  max_num_seqs: {{choices: [1, 2, 4, 8, 16, 32, 64, 128, 256]}}
  max_num_batched_tokens: {{choices: [512, 1024, 2048, 4096, 8192]}}
  enable_chunked_prefill: {{choices: [true, false]}}
  kv_cache_dtype: {{choices: [auto, fp8]}}
  block_count: {{low: 100, high: 10000, log: true}}
  gpu_memory_utilization: {{low: 0.5, high: 0.95}}
  speculative_config:
    choices: [null, {{method: ngram, num_speculative_tokens: {{choices: [3, 5]}}, prompt_lookup_max: 4}}]
workload: {{rate_rps: 20}}
slo: {{ttft_p95_ms: 500}}
study: {{trials: {trials}, sampler: {sampler}}}
"""


def measured(proposal: Proposal, number: int, rng: random.Random) -> TrialRow:
    """A row as a driver would store it."""
    flags = dict(proposal.config.flags)
    failed = rng.random() < 0.1
    seqs = flags.get("max_num_seqs")
    rate = float(seqs if isinstance(seqs, int) else 256) * rng.uniform(0.9, 1.1)
    return TrialRow(
        trial_id=f"trial-{number}",
        trial_key=proposal.config.hash,
        study="overhead",
        number=number,
        server_id=str(number),
        purpose=proposal.purpose,
        state="failed" if failed else "complete",
        failure_kind="out_of_memory" if failed else None,
        failure_detail="torch.OutOfMemoryError: CUDA out of memory." if failed else None,
        config_json=json.dumps(flags),
        config_hash=proposal.config.hash,
        command=proposal.config.command("python"),
        model="model",
        engine="vllm",
        workload_json="{}",
        profile="chat-medium",
        started_at=datetime.datetime.now(datetime.UTC),
        valid=None if failed else True,
        output_tokens_per_s=None if failed else rate,
        ttft_p95_ms=None if failed else 300.0,
        constraints={} if failed else {"ttft_p95_ms": rng.uniform(-0.9, 2.0)},
        log_path=f"/results/logs/{number}.log",
    )


def times_ms(experiment: Experiment, storage: str) -> list[float]:
    """Milliseconds of `propose` and `tell` together, trial by trial."""
    study, rng, spent = open_study(experiment, Space(experiment), storage, past=()), random.Random(0), list[float]()
    while True:
        began = time.perf_counter()
        proposal = study.propose()
        if proposal is None:
            return spent
        asked = time.perf_counter()
        row = measured(proposal, len(spent), rng)
        told = time.perf_counter()
        study.tell(proposal, row)
        spent.append((time.perf_counter() - told + asked - began) * 1e3)


def summary(spent: Sequence[float]) -> dict[str, float]:
    """Figures in milliseconds; `last_over_first` compares the means of the last and the first hundred."""
    first, last = statistics.fmean(spent[:100]), statistics.fmean(spent[-100:])
    return {
        "trials": len(spent),
        "mean_ms": statistics.fmean(spent),
        "p50_ms": statistics.median(spent),
        "p99_ms": statistics.quantiles(spent, n=100)[98],
        "max_ms": max(spent),
        "first_hundred_ms": first,
        "last_hundred_ms": last,
        "last_over_first": last / first,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; exit code 1 when the 99th percentile misses the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--storage", choices=["journal", "sqlite"], default="journal")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    experiment = parse_experiment(FILE.format(trials=asked.trials, sampler=asked.sampler))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "study"
        figures = summary(
            times_ms(experiment, f"journal:{path}" if asked.storage == "journal" else f"sqlite:///{path}")
        )
    if asked.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:>16} {value:8.2f}" for name, value in figures.items()))
    return 0 if figures["p99_ms"] <= TARGET_P99_MS else 1


if __name__ == "__main__":
    sys.exit(main())
