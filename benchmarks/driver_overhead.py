"""varcas's own cost per trial: 1,000 trials of a trivial engine through the real driver, Ray pool and store.

    python benchmarks/driver_overhead.py [--trials 1000]

Driver time is what the driver spends on a trial itself: propose, check, submit, record (Parquet with fsync), tell: what
its thread computes and waits for the disk or an answer. The wait for workers is not in it, nor the time in which it was
ready and had no core: each trial starts two Python processes, which fill 2 cores (`wall_ms` has it too). Target: 50 ms
at p99, the last hundred at most 3 times the first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import varcas.sweeper as sweeper
from varcas.engine.node import Checked, NodeFacts
from varcas.experiment import Server, parse_experiment
from varcas.records import HostFacts, LoadResult, Outcome, RequestRecord, StageTimes
from varcas.trial import TrialTask

EXPERIMENT = """\
name: overhead
model: {model}
hardware: {{gpu: cpu, count: 1}}
space:
  max_num_seqs: {{low: 1, high: 1000000}}
  max_num_batched_tokens: {{choices: [512, 1024, 2048, 4096, 8192]}}
workload: {{profile: chat-short, rate_rps: 4, duration_s: 10}}
study: {{trials: {trials}, repeats: 0}}
results: {results}
"""


class TrivialNode:
    """Stands for a node whose vLLM takes everything."""

    def __init__(self, server: Server, model: str, revision: str | None) -> None:
        pass

    def facts(self) -> NodeFacts:
        return NodeFacts(
            engine_version="trivial", model_path="", model_revision="0", gpu_name=None, driver_version=None
        )

    def flag_names(self) -> list[str]:
        return ["max_num_seqs", "max_num_batched_tokens"]

    def check(self, argv: list[str], endpoint: str) -> Checked:
        return Checked(ok=True, resolved={"max_num_seqs": argv[-1]})

    def close(self) -> None:
        pass


def trivial_trial(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """A measurement of forty requests that takes no time."""
    rate = float(str(task.config.flags.get("max_num_seqs") or 1)) % 97
    offsets = (0.1, 0.2, 0.3, 0.4, 0.5 + rate / 1e4)
    records = tuple(
        RequestRecord(i, t, t, t + 0.1, t + 0.5, t + 0.5, 10, 5, 10, 5, offsets, (1,) * 5, "length", None, 200, i, 0)
        for i, t in enumerate(np.arange(40) / 4.0)
    )
    load = LoadResult(records, t0_monotonic_s=0.0, duration_s=10.0, drain_s=0.0, client_cpu_frac=0.1)
    return Outcome(
        "complete", datetime.datetime.now(datetime.UTC), HostFacts(socket.gethostname()), StageTimes(), load=load
    )


def without_core_s() -> float:
    """Seconds in which this thread was ready and had no core (Linux, Documentation/scheduler/sched-stats.rst)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Timed(sweeper.Sweeper):
    """A sweeper that notes the seconds spent in each of its steps, by trial."""

    spent_s: list[float]
    wall_s: list[float]
    current_s = current_wall_s = 0.0

    def timed(self, step: Callable[..., Any], *args: Any) -> Any:
        began, waited_s = time.perf_counter(), without_core_s()
        try:
            return step(*args)
        finally:
            took_s = time.perf_counter() - began
            Timed.current_wall_s += took_s
            Timed.current_s += max(0.0, took_s - (without_core_s() - waited_s))

    def _next_job(self) -> Any:
        return self.timed(super()._next_job)

    def _start(self, job: Any) -> None:
        self.timed(super()._start, job)

    def _record(self, *args: Any) -> None:
        self.timed(super()._record, *args)
        Timed.spent_s.append(Timed.current_s)
        Timed.wall_s.append(Timed.current_wall_s)
        Timed.current_s = Timed.current_wall_s = 0.0


def main() -> None:
    """Runs it and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    Timed.spent_s, Timed.wall_s = [], []
    sweeper.Sweeper = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        text = EXPERIMENT.format(model=model, trials=args.trials, results=f"{directory}/results")
        began = time.monotonic()
        sweeper.sweep(parse_experiment(text), run=trivial_trial, node=TrivialNode)
        wall_s = time.monotonic() - began
    ms, wall_ms = np.array(Timed.spent_s) * 1e3, np.array(Timed.wall_s) * 1e3
    tenth = max(1, len(ms) // 10)
    print(
        json.dumps(
            {
                "trials": len(ms),
                "wall_s": round(wall_s, 1),
                "driver_ms_p50": round(float(np.median(ms)), 2),
                "driver_ms_p99": round(float(np.percentile(ms, 99)), 2),
                "driver_ms_max": round(float(ms.max()), 2),
                "wall_ms_p50": round(float(np.median(wall_ms)), 2),
                "wall_ms_p99": round(float(np.percentile(wall_ms, 99)), 2),
                "first_tenth_mean_ms": round(float(ms[:tenth].mean()), 2),
                "last_tenth_mean_ms": round(float(ms[-tenth:].mean()), 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
