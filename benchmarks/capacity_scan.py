"""`varcas capacity` beside a fine linear scan of rates, on real vLLM: how far apart, and in what share of the time.

The scan loads one server with every rate of a grid, ascending, until `--misses` in a row do not hold, each for the same
window, nothing ended early: what one would do by hand. Its capacity is the highest rate of the grid that holds with
every one below it. Then another start of the same server runs the bisection; with `--repeats` their order alternates.

    PYTHONPATH=. python benchmarks/capacity_scan.py --out capacity.jsonl --results capacity_store
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_starts import LocalStarts
from real_starts import Locks, append_row, circumstances, model_dir, read_rows

from varcas.capacity import Bisection, bracket, estimate, judged
from varcas.experiment import Experiment, Workload, parse_experiment
from varcas.records import TrialRow
from varcas.space import ServingConfig
from varcas.store import Store
from varcas.trial import Done, Step, cold_step

TARGET, TIME_TARGET = 0.05, 0.25
CPU = """
name: capacity-scan
model: {model}
hardware: {{gpu: cpu}}
server: {{env: {{VLLM_CPU_KVCACHE_SPACE: "1"}}}}
serve: {{load_format: dummy, max_model_len: 1024, enforce_eager: true, max_num_seqs: {seqs}}}
workload: {{profile: chat-short, rate_rps: {first}, duration_s: {duration}, warmup_s: 2, max_drain_s: 5, seed: 0}}
slo: {{{slo}}}
results: {results}
"""


@dataclass(frozen=True, slots=True)
class Scan:
    """A `trial.Plan`: rates of a grid, ascending, until some in a row do not hold."""

    config: ServingConfig
    workload: Workload
    slo: dict[str, float]
    rates: tuple[float, ...]
    misses: int

    def next(self, done: Sequence[Done]) -> Step | None:
        """As `trial.Plan` has it."""
        if not done:
            return cold_step(self.config, self.workload)
        loads = [judged(one, self.slo) for one in done[1:]]
        over = len(loads) >= self.misses and not any(load.met for load in loads[-self.misses :])
        if over or len(loads) == len(self.rates):
            return None
        return Step(self.config, self.workload.model_copy(update={"rate_rps": self.rates[len(loads)]}))


def run(starts: LocalStarts, plan: Any, case: str, args: argparse.Namespace) -> None:
    """One start; a row of what it found."""
    seen: list[Done] = []

    def keep(row: TrialRow, done: Done) -> None:
        seen.append(done)
        one = judged(done, starts.experiment.slo)
        said = ("holds" if one.met else "missed", row.stopped_early or "", "saturated" if row.saturated else "")
        print(f"  {one.rate_rps:7.2f}/s  {' '.join(said)}  load {row.load_s:.1f} s", file=sys.stderr, flush=True)

    began_s = time.monotonic()
    starts.measure(plan.config, plan, purpose="capacity", live=False, on_row=keep)
    wall_s = time.monotonic() - began_s
    loads = [judged(done, starts.experiment.slo) for done in seen]
    found, bounds = estimate(loads), bracket(loads)
    start_s = sum(done.outcome.times.server_start_s + done.outcome.times.stop_s for done in seen)
    append_row(
        args.out,
        {
            "case": case, "wall_s": wall_s, "start_s": start_s, "loads": len(loads), "slo": starts.experiment.slo,
            "first_rps": starts.experiment.workload.rate_rps, "window_s": starts.experiment.workload.duration_s,
            "met_rps": bounds.met_rps, "missed_rps": bounds.missed_rps, "rps": found.rps, "lo": found.lo,
            "hi": found.hi, "limited_by": found.limited_by,
            "tried": [[load.rate_rps, load.met] for load in loads], **circumstances(),
        },
    )  # fmt: skip


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints each pair of a scan and a bisection as Markdown."""
    by_case = {row["case"]: row for row in rows}
    print(
        "| repeat | scan: holds up to | scan, s (loads) | capacity (95 %) | s (loads) | off | share of time | target |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|---|")
    for number in sorted({int(row["case"].split("/")[1]) for row in rows}):
        scan, found = by_case.get(f"scan/{number}"), by_case.get(f"capacity/{number}")
        if scan is None or found is None or not scan["met_rps"] or not found["rps"]:
            continue
        off, share = found["rps"] / scan["met_rps"] - 1, found["wall_s"] / scan["wall_s"]
        holds = abs(off) <= TARGET and share <= TIME_TARGET
        hi = "open" if found["hi"] is None else f"{found['hi']:.2f}"
        print(f"| {number} | {scan['met_rps']:g} | {scan['wall_s']:.0f} ({scan['loads']}) | {found['rps']:.2f} "
              f"({found['lo']:.2f} to {hi}) | {found['wall_s']:.0f} ({found['loads']}) | {off:+.1%} | {share:.2f} "
              f"| ± {TARGET:.0%}, {TIME_TARGET}: {'yes' if holds else 'NO'} |")  # fmt: skip


def main() -> None:
    """Runs what is not done, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slo", type=json.loads, default={"ttft_p95_ms": 300}, help="as JSON")
    parser.add_argument("--seqs", type=int, default=8, help="max_num_seqs of the server")
    parser.add_argument("--first", type=float, default=8.0, help="requests/s that both begin with")
    parser.add_argument("--step", type=float, default=0.02, help="of the grid, as a share")
    parser.add_argument("--low", type=float, help="first rate of the grid [default: half of --first]")
    parser.add_argument("--high", type=float, help="last rate of it [default: four times --first]")
    parser.add_argument("--misses", type=int, default=3, help="in a row end the scan")
    parser.add_argument("--duration-s", type=float, default=15.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("capacity_scan.jsonl"))
    parser.add_argument("--results", type=Path, default=Path("capacity_scan"))
    parser.add_argument("--model-dir", type=Path, default=Path("models"))
    parser.add_argument("--lock", type=Path, action="append", default=[])
    parser.add_argument("--shared-lock", type=Path, action="append", default=[])
    args = parser.parse_args()
    locks = Locks(tuple(args.shared_lock), tuple(args.lock))
    with Store(str(args.results)) as store:
        starts = LocalStarts(experiment_of(args), store, lambda event: print(event.text, file=sys.stderr, flush=True))
        with starts:
            for case, plan in cases(starts.experiment, args):
                if case not in {row["case"] for row in read_rows([args.out])}:
                    print(case, file=sys.stderr, flush=True)
                    with locks.held():
                        run(starts, plan, case, args)
    print_table(read_rows([args.out]))


def experiment_of(args: argparse.Namespace) -> Experiment:
    """What is measured."""
    slo = ", ".join(f"{key}: {limit}" for key, limit in args.slo.items())
    model = model_dir("tiny-llama", args.model_dir).resolve()
    return parse_experiment(
        CPU.format(
            model=model, seqs=args.seqs, first=args.first, duration=args.duration_s, slo=slo, results=args.results
        )
    )


def cases(experiment: Experiment, args: argparse.Namespace) -> list[tuple[str, Scan | Bisection]]:
    """Scan and bisection in turn."""
    config = ServingConfig(experiment.model, None, dict(experiment.serve))
    low, high = args.low or args.first / 2, args.high or 4 * args.first
    rates = [low]
    while rates[-1] * (1 + args.step) <= high:
        rates.append(round(rates[-1] * (1 + args.step), 4))
    slo = dict(experiment.slo)
    found: list[tuple[str, Scan | Bisection]] = []
    for number in range(args.repeats):
        pair: list[tuple[str, Scan | Bisection]] = [
            (f"scan/{number}", Scan(config, experiment.workload, slo, tuple(rates), args.misses)),
            (f"capacity/{number}", Bisection(config, experiment.workload, slo)),
        ]
        found += pair if number % 2 == 0 else pair[::-1]
    return found


if __name__ == "__main__":
    main()
