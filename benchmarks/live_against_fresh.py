r"""Is a value measured on a running server what a fresh server gives? Both, interleaved, on real vLLM.

Each round starts one server whose `max_num_seqs` changes while it runs and measures every value on it, then a fresh
server for each value, in another order each round; each server's first load is thrown away. Live and fresh are the
same configuration as far as this vLLM allows (`varcas/inner.py`). Prints the ratio of each value's means of tokens/s
and TPOT with the fresh starts' own 95 % interval; the target is 3 % and 5 %, or inside of that interval.

After a live server's values come cells of a landscape, `max_num_seqs` x requests/s, as many as the budget allows: each
round goes on where the last one ended. Everything is a row of JSON (`--out`) and of a store (`--results`) at once, so
that a run that was cut goes on; the order is such that what is there after each round can be used.

    PYTHONPATH=. python benchmarks/live_against_fresh.py --out live_cpu.jsonl --results live_cpu
    PYTHONPATH=.:/tmp/site python3 benchmarks/live_against_fresh.py --gpu --out $OUT/live.jsonl --results $OUT/store \
        --budget-s 560
    PYTHONPATH=. python benchmarks/live_against_fresh.py --print --done live.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from local_starts import LocalStarts
from real_starts import ENV, Clock, Locks, append_row, circumstances, model_dir, read_rows

from varcas.experiment import Experiment, parse_experiment
from varcas.inner import Limits, LiveStart, at_most, live_start
from varcas.intervals import student_half
from varcas.records import TrialRow
from varcas.space import ServingConfig
from varcas.starts import Event
from varcas.store import Store
from varcas.trial import Done, Listed, Step, cold_step

FLAG = "max_num_seqs"
TARGETS = {"output_tokens_per_s": 0.03, "tpot_mean_ms": 0.05}
STOP_S = 5.0
CPU = """
name: live-against-fresh
model: {model}
hardware: {{gpu: cpu}}
server: {{env: {{VLLM_CPU_KVCACHE_SPACE: "1"}}}}
serve: {{load_format: dummy, max_model_len: 1024, enforce_eager: true}}
workload: {{profile: chat-short, rate_rps: {rate}, duration_s: {duration}, warmup_s: 2, max_drain_s: 3, seed: 0}}
results: {results}
"""
GPU = """
name: live-against-fresh
model: {model}
hardware: {{gpu: {gpu}}}
server: {{env: {env}}}
serve: {{load_format: dummy, dtype: half, max_model_len: 2048, gpu_memory_utilization: 0.9,
         quantization: {quantization}, enforce_eager: {eager}}}
workload: {{profile: chat-medium, rate_rps: {rate}, duration_s: {duration}, warmup_s: 2, max_drain_s: 2, seed: 0}}
results: {results}
"""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is measured where no option says otherwise: values, their rate, a window, the landscape's axes."""

    values: tuple[int, ...]
    rate_rps: float
    duration_s: float
    cell_values: tuple[int, ...]
    cell_rates: tuple[float, ...]
    start_s: float


ON_CPU = Defaults((1, 4, 16), 12.0, 12.0, (1, 2, 4, 8, 16), (4.0, 8.0, 12.0, 16.0), 45.0)
ON_GPU = Defaults((8, 64, 256), 24.0, 10.0, (8, 16, 32, 64, 128, 256), (8.0, 16.0, 24.0, 32.0), 130.0)


@dataclass(frozen=True, slots=True)
class Unit:
    """One server start: a round's live one, or its fresh one of a value."""

    round: int
    value: int | None

    @property
    def sort(self) -> str:
        """Starts of a sort take about as long."""
        return "live" if self.value is None else "fresh"


def units(rounds: int, values: Sequence[int]) -> Iterator[Unit]:
    """Starts in order; fresh values in another one each round."""
    for number in range(rounds):
        yield Unit(number, None)
        yield from (Unit(number, values[(i + number) % len(values)]) for i in range(len(values)))


class Runner:
    """Makes the starts that are not done yet, as long as the budget lasts."""

    def __init__(self, args: argparse.Namespace, starts: LocalStarts, defaults: Defaults, clock: Clock) -> None:
        self._args, self._starts, self._clock, self._defaults = args, starts, clock, defaults
        self._values: tuple[int, ...] = args.values
        self._done = {row["case"] for row in read_rows([*args.done, args.out]) if row["state"] == "complete"}
        self._experiment = starts.experiment
        self._live = self._live_start()

    def _live_start(self) -> LiveStart:
        base = ServingConfig(self._experiment.model, None, dict(self._experiment.serve))
        wanted = {FLAG: (*self._values, *(self._defaults.cell_values if self._args.cells else ()))}
        resolved = self._starts.checked(at_most(base, wanted)).resolved
        return live_start(base, wanted, self._starts.flag_names, resolved)

    def run(self) -> None:
        """All of it."""
        for unit in units(self._args.rounds, self._values):
            steps = dict(self._steps(unit))
            if not steps:
                continue
            need_s = sum(map(_step_s, (*steps.values(), self._cold(unit)))) + self._defaults.start_s
            if not self._clock.fits(unit.sort, need_s):
                print(f"no time left for {unit}", file=sys.stderr, flush=True)
                return
            began_s = time.monotonic()
            with self._args.locks.held():
                self._run(unit, steps)
            self._clock.took(unit.sort, time.monotonic() - began_s)

    def _steps(self, unit: Unit) -> Iterator[tuple[str, Step]]:
        """What is not done of a unit, by case; of a live one, some cells of the landscape too."""
        values = self._values if unit.value is None else (unit.value,)
        turned = [values[(i + unit.round) % len(values)] for i in range(len(values))]
        own_rps = self._experiment.workload.rate_rps or 0.0
        named = [(f"r{unit.round}/{unit.sort}/{value}", value, own_rps) for value in turned]
        compared = [self._step(unit, *one) for one in named if one[0] not in self._done]
        yield from compared
        if unit.value is None and compared:  # no start for cells alone
            cells = [(f"cell/{v}/{r:g}", v, r) for r in self._defaults.cell_rates for v in self._defaults.cell_values]
            left = [cell for cell in cells if cell[0] not in self._done]
            yield from (self._step(unit, *cell) for cell in left[: self._args.cells])

    def _step(self, unit: Unit, case: str, value: int, rate_rps: float) -> tuple[str, Step]:
        limits = Limits(max_num_seqs=value)
        workload = self._experiment.workload.model_copy(update={"rate_rps": rate_rps})
        return case, Step(self._live.at(limits), workload, limits if unit.value is None else None)

    def _cold(self, unit: Unit) -> Step:
        config = self._live.config if unit.value is None else self._live.at(Limits(max_num_seqs=unit.value))
        workload = self._experiment.workload.model_copy(update={"duration_s": self._args.cold_s, "warmup_s": 1.0})
        return cold_step(config, workload, Limits() if unit.value is None else None)

    def _run(self, unit: Unit, steps: Mapping[str, Step]) -> None:
        cold, cases = self._cold(unit), iter(steps)
        series = self._starts.measure(
            cold.config,
            Listed((cold, *steps.values())),
            purpose="batch_size",
            live=unit.value is None,
            on_row=lambda row, done: self._append(next(cases), unit, done, row),
        )
        if series.not_live:
            print(f"{unit}: {series.not_live}", file=sys.stderr, flush=True)

    def _append(self, case: str, unit: Unit, done: Done, row: TrialRow) -> None:
        kept = {name: getattr(row, name) for name in KEPT}
        in_force = json.loads(row.resolved_json or "{}").get("live")
        append_row(
            self._args.out,
            {"case": case, "sort": unit.sort, "round": unit.round, "value": _value(done), **kept,
             "deploy": dict(row.flags), "in_force": in_force, **circumstances()},
        )  # fmt: skip
        if row.state == "complete":
            self._done.add(case)
        figures = f"{row.output_tokens_per_s or 0:8.1f} tok/s  TPOT {row.tpot_mean_ms or 0:6.2f} ms"
        more = f"start {row.server_start_s or 0:.0f} s  {row.failure_detail or ''}"
        print(f"{case:>16}  {row.state}  {figures}  {more}", file=sys.stderr, flush=True)


KEPT = (
    "number", "server_id", "state", "valid", "invalid_reasons", "saturated", "measured_live", "rate_rps",
    "output_tokens_per_s", "output_tokens_per_s_lo", "output_tokens_per_s_hi", "request_rate_rps", "tpot_mean_ms",
    "tpot_p50_ms", "tpot_p95_ms", "ttft_mean_ms", "ttft_p50_ms", "ttft_p95_ms", "num_completed", "num_unfinished",
    "kv_cache_tokens", "preemptions", "server_start_s", "compile_s", "compile_cache_hit", "warmup_s", "load_s",
    "sm_clock_mhz", "temperature_c", "engine_version", "failure_kind", "failure_detail",
)  # fmt: skip


def _value(done: Done) -> int:
    """The value that a step measures."""
    flags = done.step.config.flags
    found = flags.get("max_num_active_seqs", flags[FLAG])
    assert isinstance(found, int)
    return found


def _step_s(step: Step) -> float:
    """Seconds of a step, with what lies between two."""
    workload = step.workload
    return workload.warmup_s + 2.5 + workload.duration_s + workload.max_drain_s + 1.0


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints live against fresh as Markdown, then the landscape."""
    print("| value | figure | live, by start | fresh, by start | live / fresh | fresh's own 95 % | target | holds |")
    print("|--:|---|---|---|--:|---|--:|---|")
    compared = [row for row in rows if not row["case"].startswith("cell/") and row["state"] == "complete"]
    for value in sorted({row["value"] for row in compared}):
        for figure, target in TARGETS.items():
            print(_line(value, figure, target, compared))
    cells = [row for row in rows if row["case"].startswith("cell/") and row["state"] == "complete"]
    if cells:
        _print_cells(cells)


def _line(value: int, figure: str, target: float, rows: Sequence[Mapping[str, Any]]) -> str:
    found = {
        sort: [row[figure] for row in rows if row["value"] == value and row["sort"] == sort and row[figure]]
        for sort in ("live", "fresh")
    }
    told = {sort: ", ".join(f"{x:.1f}" for x in values) or "-" for sort, values in found.items()}
    if not found["live"] or not found["fresh"]:
        return f"| {value} | {figure} | {told['live']} | {told['fresh']} | | | {target:.0%} | |"
    ratio = float(np.mean(found["live"]) / np.mean(found["fresh"]))
    half = _half(found["fresh"])
    holds = abs(ratio - 1) <= target or (half is not None and abs(ratio - 1) <= half)
    own = "-" if half is None else f"± {half:.1%}"
    said = "yes" if holds else "NO"
    return f"| {value} | {figure} | {told['live']} | {told['fresh']} | {ratio:.3f} | {own} | {target:.0%} | {said} |"


def _half(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of a mean over starts, as a share of it."""
    if len(values) < 2:
        return None
    return student_half(values) / float(np.mean(values))


def _print_cells(cells: Sequence[Mapping[str, Any]]) -> None:
    rates = sorted({row["rate_rps"] for row in cells})
    print(f"\n| {FLAG} | " + " | ".join(f"{rate:g}/s: tok/s, TPOT ms" for rate in rates) + " |")
    print("|--:|" + "---|" * len(rates))
    for value in sorted({row["value"] for row in cells}):
        by_rate = {row["rate_rps"]: row for row in cells if row["value"] == value}
        shown = [_cell(by_rate.get(rate)) for rate in rates]
        print(f"| {value} | " + " | ".join(shown) + " |")


def _cell(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['output_tokens_per_s']:.0f}, {row['tpot_mean_ms'] or 0:.1f}"


def experiment_of(args: argparse.Namespace, model: Path, defaults: Defaults) -> Experiment:
    """What is measured."""
    env = {name: ENV[name] for name in ("HF_HUB_OFFLINE", "VLLM_USE_FLASHINFER_SAMPLER")}
    text = (GPU if args.gpu else CPU).format(
        model=model,
        rate=args.rate or defaults.rate_rps,
        duration=args.duration_s or defaults.duration_s,
        results=args.results,
        env=env,
        eager="true" if args.eager else "false",
        quantization=args.quantization or "null",
        gpu=args.gpu_type,
    )
    return parse_experiment(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="Llama-2-7B's shape in AWQ on one GPU")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs (the CPU has none)")
    parser.add_argument("--gpu-type", default="H100", help="as `varcas gpus` has it")
    parser.add_argument("--quantization", help="awq for the plain kernel; by itself vLLM takes Marlin where it can")
    parser.add_argument("--values", type=lambda text: tuple(map(int, text.split(","))), help="of max_num_seqs")
    parser.add_argument("--rate", type=float, help="requests/s of the comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration-s", type=float, help="of a window")
    parser.add_argument("--cold-s", type=float, default=6.0, help="of each server's first load, thrown away")
    parser.add_argument("--cells", type=int, default=8, help="of the landscape, a live start")
    parser.add_argument("--out", type=Path, default=Path("live_against_fresh.jsonl"), help="rows are appended here")
    parser.add_argument("--results", type=Path, default=Path("live_against_fresh"), help="the store")
    parser.add_argument("--done", type=Path, action="append", default=[], help="rows had before: not measured again")
    parser.add_argument("--model-dir", type=Path, default=Path("models"), help="models are made here")
    parser.add_argument("--budget-s", type=float, help="no start that would end later")
    parser.add_argument("--lock", type=Path, action="append", default=[], help="held alone during each start")
    parser.add_argument("--shared-lock", type=Path, action="append", default=[], help="held with others")
    parser.add_argument("--print", action="store_true", help="start nothing")
    args = parser.parse_args()
    args.locks = Locks(tuple(args.shared_lock), tuple(args.lock))
    return args


def main() -> None:
    """Measures what is not done, and prints the table of all."""
    args = arguments()
    defaults = ON_GPU if args.gpu else ON_CPU
    args.values = args.values or defaults.values
    clock = Clock(args.budget_s)
    if not args.print:
        model = model_dir("llama-2-7b-awq" if args.gpu else "tiny-llama", args.model_dir).resolve()

        def tell(event: Event) -> None:
            print(event.text, file=sys.stderr, flush=True)

        with ExitStack() as running:
            experiment = experiment_of(args, model, defaults)
            store = running.enter_context(Store(str(args.results)))
            starts = running.enter_context(LocalStarts(experiment, store, tell))
            Runner(args, starts, defaults, clock).run()
    print_table(read_rows([*args.done, args.out]))


if __name__ == "__main__":
    main()
