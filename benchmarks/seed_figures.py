"""The seed's measured numbers beside what the simulated engine makes of them, under several lengths of the test.

    PYTHONPATH=. python benchmarks/seed_figures.py

A T4, Llama-2-7B-AWQ, chat-medium at 20 requests/s; vLLM 0.15.1, which the seed names and which runs the plain AWQ
kernel, and 0.32.0, which runs Marlin. Step times are the published T4 priors of `calibration`: no T4 was measured and
no constant is fitted to the seed's. `of answers alone`: tokens of requests that ended within the window.
"""

from __future__ import annotations

from statistics import fmean

from varcas.experiment import Experiment, load_experiment
from varcas.metrics import summarise
from varcas.simulated import Simulator
from varcas.virtual import VirtualLoad
from varcas.workload.schedule import schedule

SEED = {"original": (168.8, 231.7, 26_013), "--max-num-seqs 8": (206.8, 34.5, 16_981), "chunked": (197.9, 37.4, 18_308)}
FLAGS: dict[str, dict[str, int]] = {"original": {}, "--max-num-seqs 8": {"max_num_seqs": 8}}
TESTS = ((30.0, 0.0), (40.0, 0.0), (60.0, 0.0), (120.0, 30.0), (300.0, 30.0))
"""Window and drain; what has not ended is left out of TPOT and latency, as it seems to be in the seed's load."""
VERSIONS = ("0.15.1", "0.32.0")


def _line(simulator: Simulator, made: Experiment, name: str, duration_s: float, drain_s: float) -> str:
    engine = simulator.engine({**made.serve, **FLAGS[name]})
    workload = made.workload.model_copy(update={"duration_s": duration_s, "max_drain_s": drain_s})
    drawn = schedule(workload, start_s=0.0, duration_s=duration_s, max_len=2048, stream="measure")
    load = VirtualLoad(drawn, engine, duration_s=duration_s, max_drain_s=drain_s)
    result = load.result()
    columns = summarise(result, {}, load.samples)
    running = fmean(sample.num_requests_running or 0.0 for sample in load.samples if sample.t_s > duration_s / 2)
    ended = [record for record in result.records if record.ok and (record.end_s or 0.0) <= duration_s]
    cells = [
        f"{columns['output_tokens_per_s']:.0f}",
        f"{sum(record.output_tokens for record in ended) / duration_s:.0f}",
        f"{columns['tpot_mean_ms']:.1f}",
        f"{columns['e2e_mean_ms']:.0f}",
        f"{running:.0f}",
        f"{columns['num_completed']}",
    ]
    return f"| {simulator.version} | {duration_s:g} + {drain_s:g} | {name} | {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    made = load_experiment("experiments/t4_journey.yaml")
    print("SIMULATED, beside what the seed measured\n")
    print(
        "| vLLM | window + drain s | configuration | tokens/s | of answers alone | TPOT ms | latency ms | running | "
        "answered |\n|---|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for name, (tokens, tpot, latency) in SEED.items():
        print(f"| 0.15.1 | **the seed's** | {name} | {tokens} | | {tpot} | {latency} | | |")
    for version in VERSIONS:
        told = made.simulation.model_copy(update={"engine_version": version, "start_sd_frac": 0.0})
        simulator = Simulator.of(made.model_copy(update={"engine": "simulated", "simulation": told}))
        for duration_s, drain_s in TESTS:
            for name in FLAGS:
                print(_line(simulator, made, name, duration_s, drain_s))


if __name__ == "__main__":
    main()
