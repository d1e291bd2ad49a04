"""What it costs to put a measurement on disk: `python benchmarks/store_append.py [--trials 1000] [--directory DIR]`.

Prints the time of `Store.append` for trials without a load (p50, p99, the first and last hundred) and for one with
2,400 requests of 200 tokens and 150 samples, the size on disk, and the time to open, compact and query.
"""

from __future__ import annotations

import argparse
import datetime
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from varcas.records import RequestRecord, Sample, TrialRow
from varcas.store import DATASETS, Store


def trial(number: int) -> TrialRow:
    """A row as full as a real one's."""
    return TrialRow(
        trial_id=f"{number:064x}",
        trial_key="k" * 64,
        study="bench",
        number=number,
        server_id=f"{number:016x}",
        purpose="search",
        state="complete",
        config_json='{"max_num_seqs": 8}',
        config_hash="h",
        flags={"max_num_seqs": "8", "dtype": '"half"'},
        command="vllm serve " + "--flag value " * 20,
        resolved_json='{"x": "' + "y" * 4000 + '"}',
        model="m",
        engine="vllm",
        workload_json="{}",
        profile="chat-medium",
        started_at=datetime.datetime.now(datetime.UTC),
        output_tokens_per_s=123.4 + number,
        constraints={"ttft_p95_ms": -0.5},
    )


def records(num_requests: int, num_tokens: int) -> list[RequestRecord]:
    """Requests whose tokens come every 20 ms, give or take."""
    rng = random.Random(0)
    return [_record(index, num_tokens, rng) for index in range(num_requests)]


def _record(index: int, num_tokens: int, rng: random.Random) -> RequestRecord:
    at_s, offset_s = index / 20, rng.uniform(0.03, 0.2)
    offsets: list[float] = []
    for _ in range(num_tokens):
        offsets.append(offset_s)
        offset_s += rng.gauss(0.02, 0.002)
    return RequestRecord(
        index=index,
        scheduled_s=at_s,
        sent_s=at_s,
        first_token_s=at_s + offsets[0],
        last_token_s=at_s + offsets[-1],
        end_s=at_s + offsets[-1],
        scheduled_prompt_tokens=384,
        scheduled_output_tokens=num_tokens,
        prompt_tokens=384,
        output_tokens=num_tokens,
        token_offsets_s=tuple(offsets),
        token_counts=(1,) * num_tokens,
        finish_reason="length",
        error=None,
        http_status=200,
        conversation=index,
        turn=0,
    )


def timed_ms(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--directory", help="where to write (default: the system's temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        _bench(Path(directory), arguments.trials)


def _bench(directory: Path, trials: int) -> None:
    store = Store(directory)
    rows = [trial(number) for number in range(trials)]
    took = [timed_ms(lambda row=row: store.append(row)) for row in rows]  # type: ignore[misc]
    p99 = statistics.quantiles(took, n=100)[98]
    print(f"{trials} empty trials: p50 {statistics.median(took):.1f} ms, p99 {p99:.1f} ms, worst {max(took):.1f} ms")
    ends = statistics.median(took[:100]), statistics.median(took[-100:])
    print(f"  first 100: {ends[0]:.1f} ms, last 100: {ends[1]:.1f} ms, ratio {ends[1] / ends[0]:.2f}")
    load, looks = records(2400, 200), [Sample(t_s=float(t), gpu_power_w=70.0) for t in range(150)]
    full = [timed_ms(lambda n=n: store.append(trial(trials + n), load, looks)) for n in range(5)]  # type: ignore[misc]
    sizes = {name: sum(file.stat().st_size for file in (directory / name).iterdir()) for name in DATASETS}
    print(f"2,400 requests x 200 tokens + 150 samples: p50 {statistics.median(full):.0f} ms, worst {max(full):.0f} ms")
    print(f"  a row {sizes['trials'] / (trials + 5) / 1e3:.1f} kB, requests {sizes['requests'] / 5e6:.2f} MB a trial")
    store.close(compact=False)
    print(f"open for writing, {trials + 5} files: {timed_ms(lambda: Store(directory).close(compact=False)):.0f} ms")
    _read(directory)


def _read(directory: Path) -> None:
    query = "select count(*), avg(output_tokens_per_s) from trials where flag_max_num_seqs = 8"
    reader = Store(directory, readonly=True)
    print(f"sql, a file a trial: {timed_ms(lambda: reader.sql(query)):.0f} ms")
    with Store(directory) as store:
        print(f"compact: {timed_ms(store.compact):.0f} ms")
    print(f"sql, compacted: {timed_ms(lambda: reader.sql(query)):.0f} ms")
    print(f"one trial's requests, compacted: {timed_ms(lambda: reader.requests(trial_id(reader))):.0f} ms")


def trial_id(store: Store) -> str:
    """Of the last trial, which has requests."""
    return store.rows()[-1].trial_id


if __name__ == "__main__":
    main()
