"""How long the simulated engine takes, and what memory: `PYTHONPATH=. python benchmarks/simulated_speed.py`.

A 120 s trial of chat-medium at 20 requests/s, from the schedule to the metrics, that an H100 nearly keeps up with (the
most tokens) and that a T4 does not; a load that an H100 keeps up with, and one ten times as long, through
`VirtualLoad.records`, whose memory must not grow; and the journey of `experiments/t4_journey.yaml`.
"""

from __future__ import annotations

import tempfile
import threading
import time
import tracemalloc

from varcas.experiment import Experiment, Hardware, load_experiment
from varcas.journey import run_phases
from varcas.simulated import Simulator
from varcas.space import ServingConfig
from varcas.sweeper import Event, outcome_columns
from varcas.trial import TrialTask
from varcas.virtual import VirtualLoad
from varcas.workload.schedule import schedule

SECONDS = 120.0


def _on(gpu: str, results: str) -> Experiment:
    made = load_experiment("experiments/t4_journey.yaml")
    return made.model_copy(update={"engine": "simulated", "hardware": Hardware(gpu=gpu), "results": results})


def _trial(gpu: str) -> None:
    made = _on(gpu, "unused")
    simulator = Simulator.of(made)
    task = TrialTask("00000-search", made, ServingConfig(made.model, None, made.serve), None, {}, None, "", 1)
    took = []
    for _ in range(3):
        began_s = time.perf_counter()
        columns = outcome_columns(simulator.run(task, threading.Event()), made)
        took.append(time.perf_counter() - began_s)
    each = ", ".join(f"{one:.2f}" for one in took)
    print(
        f"{gpu}: {SECONDS:g} s of chat-medium at 20/s in {min(took):.2f} s (of {each}): {columns['num_requests']} "
        f"requests, {columns['output_tokens_per_s']:.0f} tokens/s"
    )


def _memory(duration_s: float) -> None:
    made = _on("H100", "unused")
    engine = Simulator.of(made).engine(made.serve)
    workload = made.workload.model_copy(update={"duration_s": duration_s, "rate_rps": 10.0})
    drawn = schedule(workload, start_s=0.0, duration_s=duration_s, max_len=2048, stream="measure")
    load = VirtualLoad(drawn, engine, duration_s=duration_s, max_drain_s=30.0)
    tracemalloc.start()
    tokens = sum(record.output_tokens for record in load.records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"H100, {duration_s:g} s at 10/s: {tokens} tokens, peak {peak / 2**20:.1f} MiB beside the schedule")


def _journey() -> None:
    with tempfile.TemporaryDirectory() as results:
        made = _on("T4", results)
        began_s, rows = time.perf_counter(), 0

        def count(event: Event) -> None:
            nonlocal rows
            rows += event.kind == "row"

        run_phases(made, on_event=count)
        print(f"the seed's journey: {rows} rows in {time.perf_counter() - began_s:.1f} s")


def main() -> None:
    """Prints a line each."""
    for gpu in ("H100", "T4"):
        _trial(gpu)
    for duration_s in (SECONDS, 10 * SECONDS):
        _memory(duration_s)
    _journey()


if __name__ == "__main__":
    main()
