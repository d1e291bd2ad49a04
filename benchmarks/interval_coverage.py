"""How often intervals hold the truth, and detectors are right: `python benchmarks/interval_coverage.py [--runs N]`.

1. Coverage of the 95 % intervals on waits of an M/M/1 queue (Lindley's recursion, stationary from the first request on,
   so that the truth is known exactly), at loads 0.8 and 0.9.
2. How often a queue is called saturated: slots with answers of random length, Poisson arrivals, empty at first.
3. How often a warm-up is seen: in stationary M/M/1 waits, where there is none, and in waits whose beginning is slower.

The tables are those of docs/measurement.md. Seeds are this file's own: no bound was chosen by looking at them.
"""

from __future__ import annotations

import argparse
import heapq
import math

import numpy as np
import numpy.typing as npt

from varcas.columns import Floats, Measured, Requests
from varcas.intervals import Interval, mean_interval, quantile_interval
from varcas.metrics import warmup_figures
from varcas.records import Sample
from varcas.saturation import filling
from varcas.validity import still_warming

SEED = 20_251_126
LENGTHS = (300, 1_000, 3_000, 10_000, 30_000, 100_000)
STATISTICS = {"mean": None, "p50": 500, "p95": 950, "p99": 990}


def waits(rng: np.random.Generator, load: float, num: int) -> Floats:
    """Waits of a stationary M/M/1 queue, in units of the mean service time."""
    first = rng.exponential(1 / (1 - load)) if rng.random() < load else 0.0
    steps = rng.exponential(1.0, num) - rng.exponential(1 / load, num)
    backlog = np.concatenate([[0.0], np.cumsum(steps)[:-1]])
    return np.asarray(backlog - np.minimum(np.minimum.accumulate(backlog), -first), dtype=np.float64)


def truth(load: float, permille: int | None) -> float:
    """Of the stationary wait: P(W > x) = load * exp(-(1 - load) x)."""
    if permille is None:
        return load / (1 - load)
    return max(0.0, math.log(load / (1 - permille / 1000)) / (1 - load))


def of_statistic(values: Floats, ordered: Floats, permille: int | None) -> Interval:
    """Its interval."""
    found = mean_interval(values) if permille is None else quantile_interval(values, ordered, permille)
    assert found is not None
    return found


def print_coverage(runs: int) -> None:
    """Coverage of those called reliable, share of those that are not, and how many were wrong without a word."""
    print("| load | requests | statistic | unreliable | coverage of the rest | wrong and silent | coverage of all |")
    print("|--:|--:|---|--:|--:|--:|--:|")
    rng = np.random.default_rng(SEED)
    for load in (0.8, 0.9):
        for num in LENGTHS:
            drawn = [waits(rng, load, num) for _ in range(runs if num < 100_000 else runs // 2)]
            sorts = [np.sort(values) for values in drawn]
            told = num_held = 0
            for name, permille in STATISTICS.items():
                true = truth(load, permille)
                found = [of_statistic(v, s, permille) for v, s in zip(drawn, sorts, strict=True)]
                reliable = np.array([interval.reliable for interval in found])
                held = np.array([interval.lo <= true <= interval.hi for interval in found])
                told, num_held = told + int(reliable.sum()), num_held + int((reliable & held).sum())
                rest = f"{held[reliable].mean():.0%} of {reliable.sum()}" if reliable.any() else "-"
                print(
                    f"| {load} | {num:,} | {name} | {1 - reliable.mean():.0%} | {rest} | "
                    f"{(reliable & ~held).mean():.1%} | {held.mean():.0%} |",
                    flush=True,
                )
            pooled = f"{num_held / told:.1%} of {told}" if told else "-"
            print(f"| {load} | {num:,} | *together* | | {pooled} | | |", flush=True)


def measured(at_s: Floats, first_s: Floats, end_s: Floats, duration_s: float, tokens: int = 100) -> Measured:
    """A load of answers of one length, none of which failed; token events are left out."""
    zeros, false = np.zeros(len(at_s)), np.zeros(len(at_s), dtype=np.bool_)
    requests = Requests(
        scheduled_s=at_s, sent_s=at_s, first_token_s=first_s, last_token_s=end_s, end_s=end_s,
        prompt_tokens=zeros + 10, scheduled_prompt_tokens=zeros + 10, turns=zeros.astype(np.int64),
        output_tokens=zeros + tokens, scheduled_output_tokens=zeros + tokens,
        ok=~false, unfinished=false, offsets_s=np.empty(0), counts=np.empty(0, np.int32),
        splits=np.zeros(len(at_s) + 1, np.int64),
    )  # fmt: skip
    return Measured.of(requests, duration_s=duration_s, drain_s=0.0)


def served(
    rng: np.random.Generator, use: float, slots: int, service_s: float, duration_s: float
) -> tuple[Measured, list[Sample]]:
    """First come, first served, empty at first, answers of 0.5 to 1.5 times `service_s`; with a sample a second."""
    rate_rps = use * slots / service_s
    at_s = np.cumsum(rng.exponential(1 / rate_rps, int(rate_rps * duration_s * 2) + 50))
    at_s = at_s[at_s < duration_s]
    took_s = service_s * rng.uniform(0.5, 1.5, len(at_s))
    free_s, begin_s = [0.0] * slots, np.empty(len(at_s))
    for index, (due_s, long_s) in enumerate(zip(at_s.tolist(), took_s.tolist(), strict=True)):
        begin_s[index] = max(due_s, heapq.heappop(free_s))
        heapq.heappush(free_s, begin_s[index] + long_s)
    samples = [
        Sample(t_s=float(t), num_requests_waiting=float(np.count_nonzero((at_s <= t) & (begin_s > t))))
        for t in range(int(duration_s) + 1)
    ]
    return measured(at_s, begin_s + 0.1 * took_s, begin_s + took_s, duration_s), samples


def print_saturation(runs: int) -> None:
    """Share called saturated."""
    durations_s = (10, 20, 60, 120)
    print("\n| server | use | " + " | ".join(f"{duration} s" for duration in durations_s) + " |")
    print("|---|--:|" + "--:|" * len(durations_s))
    rng = np.random.default_rng(SEED)
    for slots, service_s in ((8, 1.0), (1, 0.1), (64, 4.0)):
        for use in (0.5, 0.8, 0.9, 1.1, 1.3, 2.0):
            shares = []
            for duration_s in durations_s:
                loads = (served(rng, use, slots, service_s, float(duration_s)) for _ in range(runs))
                shares.append(np.mean([filling(load, samples).saturated for load, samples in loads]))
            print(
                f"| {slots} slots of {service_s:g} s | {use:.0%} | " + " | ".join(f"{s:.0%}" for s in shares) + " |",
                flush=True,
            )


def slowed(waited: Floats, at_s: Floats, until_s: float, factor: float) -> npt.NDArray[np.float64]:
    """Times to first token whose beginning is `factor` times slower."""
    ttft_s = 0.05 + 0.02 * waited
    return np.where(at_s < until_s, factor, 1.0) * ttft_s


def print_warmup(runs: int) -> None:
    """Share in which a warm-up is seen."""
    cases = ((0.0, 1.0), (0.05, 2.0), (0.05, 5.0), (0.1, 1.5), (0.1, 2.0))
    heads = [f"{factor:g} times slower for {share:.0%}" for share, factor in cases[1:]]
    print("\n| " + " | ".join(["load", "requests", "none there", *heads]) + " |")
    print("|--:|--:|" + "--:|" * len(cases))
    rng = np.random.default_rng(SEED)
    for load in (0.5, 0.8, 0.9):
        for num in (300, 1_000, 3_000, 10_000):
            seen = np.zeros(len(cases))
            for _ in range(runs):
                waited, at_s = waits(rng, load, num), np.sort(rng.uniform(0, 100.0, num))
                for index, (share, factor) in enumerate(cases):
                    first_s = at_s + slowed(waited, at_s, 100 * share, factor)
                    drawn = measured(at_s, first_s, first_s + rng.gamma(5, 0.2, num), 100.0)
                    seen[index] += bool(still_warming(drawn, warmup_figures(drawn.window, is_cache_cold=False)))
            print(f"| {load} | {num:,} | " + " | ".join(f"{s / runs:.1%}" for s in seen) + " |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=400, help="simulated loads a line")
    parser.add_argument("--only", choices=["coverage", "saturation", "warmup"])
    arguments = parser.parse_args()
    tables = {"coverage": print_coverage, "saturation": print_saturation, "warmup": print_warmup}
    for name, table in tables.items():
        if arguments.only in (None, name):
            table(arguments.runs)


if __name__ == "__main__":
    main()
