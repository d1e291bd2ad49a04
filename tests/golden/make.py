"""Writes the golden store of the current schema version: `python -m tests.golden.make`.

A golden store is a results directory as that version of varcas wrote it, with `expected.json` beside it; every later
version must read it whole, with pyarrow, DuckDB and polars. When a column is added: raise `SCHEMA_VERSION`, add the
column's value to a row below, run this, commit the new folder. A committed folder is never written again.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
from pathlib import Path

from varcas.records import RequestRecord, Sample, TrialRow
from varcas.store import SCHEMA_VERSION, Store

GOLDEN = Path(__file__).parent
STARTED = datetime.datetime(2025, 11, 24, 6, 30, 0, 123456, tzinfo=datetime.UTC)


def row(number: int, flags: dict[str, object], /, **columns: object) -> TrialRow:
    """A row with what every row has."""
    fixed: dict[str, object] = {
        "trial_id": f"{number:02x}" * 32,
        "trial_key": f"{number + 100:02x}" * 32,
        "study": "golden",
        "number": number,
        "server_id": f"{number:016x}",
        "purpose": "search",
        "state": "complete",
        "config_json": json.dumps(flags, sort_keys=True),
        "config_hash": f"{number:08x}",
        "flags": {name: json.dumps(value) for name, value in flags.items()},
        "model": "models/tiny",
        "engine": "vllm",
        "workload_json": '{"profile": "chat-short"}',
        "profile": "chat-short",
        "started_at": STARTED + datetime.timedelta(minutes=number),
    }
    return TrialRow(**(fixed | columns))  # type: ignore[arg-type]


def full_row(number: int) -> TrialRow:
    """A row in which every column has a value."""
    values: dict[str, object] = {
        "arm": "candidate",
        "purpose": "confirm",
        "state": "failed",
        "constraints": {"ttft_p95_ms": -0.25, "e2e_p99_9_ms": 100.0},
        "lo": {"ttft_mean_ms": 1.5},
        "hi": {"ttft_mean_ms": 2.5},
        "interval_unreliable": ["ttft_p99_ms"],
        "warnings": ["the GPU was throttled in 10% of samples"],
        "invalid_reasons": ["requests were sent late", "ünïcode → 日本"],
        "started_at": STARTED,
    }
    samples: dict[object, object] = {str: "text 'quoted' \"twice\"\n", int: 2**40, float: math.pi, bool: True}
    for name, field in TrialRow.model_fields.items():
        kind = next((kind for kind in (str, int, float, bool) if field.annotation == kind | None), None)
        if name not in values and kind is not None:
            values[name] = samples[kind]
    return row(number, {"max_num_seqs": 16, "speculative_config": {"method": "ngram"}}, **values)


def request(index: int, **fields: object) -> RequestRecord:
    """A good answer of three tokens in two events."""
    fixed: dict[str, object] = {
        "index": index,
        "scheduled_s": 0.5 * index,
        "sent_s": 0.5 * index + 0.001,
        "first_token_s": 0.5 * index + 0.051,
        "last_token_s": 0.5 * index + 0.071,
        "end_s": 0.5 * index + 0.0711,
        "scheduled_prompt_tokens": 12,
        "scheduled_output_tokens": 3,
        "prompt_tokens": 12,
        "output_tokens": 3,
        "token_offsets_s": (0.05, 0.07000000000000001),
        "token_counts": (1, 2),
        "finish_reason": "length",
        "error": None,
        "http_status": 200,
        "conversation": index,
        "turn": 0,
        "counting": "text",
    }
    return RequestRecord(**(fixed | fields))  # type: ignore[arg-type]


NEVER_SENT = {
    "sent_s": None,
    "first_token_s": None,
    "last_token_s": None,
    "end_s": None,
    "prompt_tokens": None,
    "output_tokens": 0,
    "token_offsets_s": (),
    "token_counts": (),
    "finish_reason": None,
    "error": "connection refused",
    "http_status": None,
    "counting": None,
}
SAMPLES = [
    Sample(t_s=-1.0),
    Sample(
        t_s=0.0,
        **{f.name: 0.5 for f in dataclasses.fields(Sample) if f.name not in ("t_s", "gpu_throttled")},
        gpu_throttled=False,
    ),
]
TRIALS: list[tuple[TrialRow, list[RequestRecord], list[Sample]]] = [
    (row(0, {"max_num_seqs": 8, "enforce_eager": True, "kv_cache_dtype": "auto"}), [request(0), request(1)], SAMPLES),
    (row(1, {"max_num_seqs": "auto", "gpu_memory_utilization": 0.9, "swap_space": 4}), [request(0, **NEVER_SENT)], []),
    (row(2, {"swap_space": 0.5, "kv_cache_dtype": None}, state="infeasible", reason_rule="memory"), [], []),
    (full_row(3), [request(0)], SAMPLES),
]


def main() -> None:
    """Writes the store of this schema version, once."""
    directory = GOLDEN / f"schema_v{SCHEMA_VERSION}"
    if directory.exists():
        sys.exit(f"{directory}: is there already. Raise SCHEMA_VERSION; a golden store is never written again.")
    with Store(directory / "results") as store:
        for trial in TRIALS[:2]:
            store.append(*trial)
        store.compact()
        for trial in TRIALS[2:]:
            store.append(*trial)
        store.save_study("golden", {"fingerprint": "f", "experiment": {"name": "golden"}})
    (directory / "results" / ".lock").unlink()
    expected = {
        "trials": [json.loads(found.model_dump_json()) for found, _, _ in TRIALS],
        "requests": {found.trial_id: list(map(dataclasses.asdict, requests)) for found, requests, _ in TRIALS},
        "samples": {found.trial_id: list(map(dataclasses.asdict, samples)) for found, _, samples in TRIALS},
    }
    (directory / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
