"""A million requests written and summed up: `python benchmarks/metrics_million.py [--requests N] [--records]`.

Simulated: Poisson arrivals at 80 % load of a queue with one server (Lindley's recursion), 5 to 10 tokens an answer.
Stored by `Store.append` in the schema, encoding and compression of `results/requests`, read back from Parquet, and
summed up: every percentile, every rate, an SLO with two limits, and an interval for each figure. Intervals are
analytic (autocorrelation time and batch means, `varcas/intervals.py`), which stands for any number of resamples.

Prints seconds of each stage and the largest resident memory. `--records` goes through a `RequestRecord` each, as a
real load does.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from varcas.columns import Measured, Requests
from varcas.metrics import constraints_of, summarise
from varcas.records import RequestRecord, TrialRow
from varcas.store import SCHEMAS, Store

T = TypeVar("T")
SLO = {"ttft_p99_ms": 450.0, "tpot_p99_ms": 40.0}
RATE_RPS = 1000.0


def simulated(num: int) -> pa.Table:
    """Requests of one load, in the columns of `results/requests`."""
    rng = np.random.default_rng(0)
    at_s = np.cumsum(rng.exponential(1 / RATE_RPS, num))
    steps_s = rng.exponential(0.8 / RATE_RPS, num)[:-1] - np.diff(at_s)
    backlog_s = np.concatenate([[0.0], np.cumsum(steps_s)])
    wait_s = backlog_s - np.minimum.accumulate(backlog_s)
    sent_s = at_s + rng.exponential(1e-4, num)
    sizes = rng.integers(5, 11, num)
    splits = np.concatenate([[0], np.cumsum(sizes)])
    gaps_s = rng.normal(0.02, 0.002, splits[-1])
    gaps_s[splits[:-1]] = wait_s + 0.03
    total_s = np.cumsum(gaps_s)
    offsets_s = total_s - np.repeat(total_s[splits[:-1]] - gaps_s[splits[:-1]], sizes)
    first_s, last_s = sent_s + offsets_s[splits[:-1]], sent_s + offsets_s[splits[1:] - 1]
    flat = splits.astype(np.int32)
    columns = {
        "trial_id": pa.array(["t" * 64] * num),
        "study": pa.array(["bench"] * num),
        "number": np.zeros(num, np.int64),
        "index": np.arange(num),
        "scheduled_s": at_s,
        "sent_s": sent_s,
        "first_token_s": first_s,
        "last_token_s": last_s,
        "end_s": last_s,
        "scheduled_prompt_tokens": np.full(num, 384),
        "scheduled_output_tokens": sizes,
        "prompt_tokens": np.full(num, 384),
        "output_tokens": sizes,
        "token_offsets_s": pa.ListArray.from_arrays(flat, offsets_s),
        "token_counts": pa.ListArray.from_arrays(flat, np.ones(len(offsets_s), np.int32)),
        "finish_reason": pa.array(["length"] * num),
        "error": pa.nulls(num, pa.string()),
        "http_status": np.full(num, 200),
        "conversation": np.arange(num),
        "turn": np.zeros(num, np.int64),
        "counting": pa.array(["usage"] * num),
    }
    schema = SCHEMAS["requests"]
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in schema], schema=schema)


def row() -> TrialRow:
    """The row that the requests belong to."""
    return TrialRow(
        trial_id="t" * 64, trial_key="k", study="bench", number=0, server_id="s", purpose="search", state="complete",
        config_json="{}", config_hash="h", model="m", engine="vllm", workload_json="{}", profile="p",
        started_at=datetime.datetime.now(datetime.UTC),
    )  # fmt: skip


def records(table: pa.Table) -> list[RequestRecord]:
    """The same as objects."""
    make: Callable[..., RequestRecord] = RequestRecord
    names = [name for name in table.column_names if name not in ("trial_id", "study", "number")]
    return [
        make(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
        for batch in table.select(names).to_batches(max_chunksize=10_000)
        for values in batch.to_pylist()
    ]


def timed(name: str, work: Callable[[], T]) -> tuple[T, float]:
    """Runs it, and prints how long it took and the peak of memory so far."""
    begin_s = time.perf_counter()
    result = work()
    took_s = time.perf_counter() - begin_s
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{name:<44}{took_s:7.2f} s   peak {peak_gb:.2f} GB", flush=True)
    return result, took_s


def _write(store: Store, num: int, as_records: bool) -> float:
    """Simulates and stores; nothing of it stays in memory. Returns the seconds that storing took."""
    table, _ = timed(f"simulate {num:,} requests (not counted)", lambda: simulated(num))
    print(f"{len(table['token_offsets_s'].combine_chunks().values):,} token events")
    if not as_records:
        return timed("write Parquet", lambda: store.append(row(), table))[1]
    held, _ = timed("make records (not counted)", lambda: records(table))
    return timed("write Parquet", lambda: store.append(row(), held))[1]


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--records", action="store_true", help="store RequestRecord objects, not columns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Store(directory) as store:
        wrote_s = _write(store, arguments.requests, arguments.records)
        (path,) = (Path(directory) / "requests").glob("*.parquet")
        print(f"{path.stat().st_size / 1e6:.0f} MB on disk")
        requests, read_s = timed("read Parquet", lambda: Requests.from_arrow(pq.read_table(path)))
    duration_s = arguments.requests / RATE_RPS
    measured, ordered_s = timed("order", lambda: Measured.of(requests, duration_s=duration_s, drain_s=1.0))
    columns, summed_s = timed("summarise", lambda: summarise(measured, SLO))
    constraints, met_s = timed("constraints", lambda: constraints_of(measured, SLO))
    total_s = wrote_s + read_s + ordered_s + summed_s + met_s
    print(f"{'in all':<44}{total_s:7.2f} s")
    print(f"{len(columns['lo'])} figures with intervals, {len(columns['interval_unreliable'])} of all unreliable")
    for name in ("ttft_mean_ms", "ttft_p99_9_ms", "itl_p99_ms", "goodput_rps"):
        print(f"  {name}: {columns[name]:.3f} ({columns['lo'].get(name)} to {columns['hi'].get(name)})")
    print(f"  {constraints}")


if __name__ == "__main__":
    main()
