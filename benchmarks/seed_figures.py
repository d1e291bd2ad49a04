"""The seed's six measured numbers beside what the simulated engine makes of them, under several lengths of the test.

    PYTHONPATH=. python benchmarks/seed_figures.py

vLLM 0.15.1 on a T4 (its plain AWQ kernel), Llama-2-7B-AWQ, chat-medium at 20 requests/s. Step times are the published
T4 priors of `calibration`; no constant is fitted to the seed's numbers. Nothing here was measured.
"""

from __future__ import annotations

from varcas.experiment import Experiment, load_experiment
from varcas.metrics import summarise
from varcas.simulated import Simulator
from varcas.virtual import VirtualLoad
from varcas.workload.schedule import schedule

SEED = {
    "original": ({}, (168.8, 231.7, 26_013)),
    "--max-num-seqs 8": ({"max_num_seqs": 8}, (206.8, 34.5, 16_981)),
}
TESTS = ((30.0, 0.0), (40.0, 0.0), (60.0, 0.0), (120.0, 30.0), (300.0, 30.0))
"""Window and drain; what has not ended is left out of TPOT and latency, as the seed's load did by all it says."""
METRICS = ("output_tokens_per_s", "tpot_mean_ms", "e2e_mean_ms")


def simulated(made: Experiment, flags: dict[str, object], duration_s: float, drain_s: float) -> dict[str, float | None]:
    simulator = Simulator.of(made)
    engine = simulator.engine({**made.serve, **flags})  # type: ignore[dict-item]
    workload = made.workload.model_copy(update={"duration_s": duration_s, "max_drain_s": drain_s})
    drawn = schedule(workload, start_s=0.0, duration_s=duration_s, max_len=2048, stream="measure")
    load = VirtualLoad(drawn, engine, duration_s=duration_s, max_drain_s=drain_s)
    columns = summarise(load.result(), {}, load.samples)
    running = [sample.num_requests_running or 0.0 for sample in load.samples if sample.t_s > duration_s / 2]
    shown = {metric: columns[metric] for metric in (*METRICS, "preemptions", "output_tokens_per_s_drained")}
    return shown | {"running": sum(running) / max(len(running), 1), "completed": columns["num_completed"]}


def main() -> None:
    made = load_experiment("experiments/t4_journey.yaml")
    version = made.simulation.model_copy(update={"engine_version": "0.15.1", "start_sd_frac": 0.0})
    made = made.model_copy(update={"engine": "simulated", "simulation": version})
    print("SIMULATED beside the seed's: tokens/s, TPOT ms, latency ms; sequences running; requests completed\n")
    print("| window + drain s | configuration | tokens/s | TPOT ms | latency ms | running | completed |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name, (_, (tokens, tpot, latency)) in SEED.items():
        print(f"| the seed's | {name} | {tokens} | {tpot} | {latency} | | |")
    for duration_s, drain_s in TESTS:
        for name, (flags, _) in SEED.items():
            found = simulated(made, dict(flags), duration_s, drain_s)
            cells = [f"{found[metric]:.1f}" if found[metric] is not None else "-" for metric in METRICS]
            tail = f"{found['running']:.0f} | {found['completed']:.0f}"
            print(f"| {duration_s:g} + {drain_s:g} | {name} | {' | '.join(cells)} | {tail} |")


if __name__ == "__main__":
    main()
