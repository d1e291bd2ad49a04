"""Rows of an imagined study, for tests of what is made of rows."""

from __future__ import annotations

import datetime
import itertools
import json
from typing import Any

from varcas.experiment import Experiment, parse_experiment
from varcas.records import TrialRow
from varcas.space import ServingConfig

numbers = itertools.count(1000)


def experiment(**keys: str) -> Experiment:
    extra = "\n".join(f"{key}: {text}" for key, text in keys.items())
    return parse_experiment(
        "name: t\nmodel: m\nserve: {dtype: half}\nworkload: {rate_rps: 10}\n"
        f"space: {{max_num_seqs: {{choices: [1, 2, 4, 8]}}}}\n{extra}\n"
    )


def row(seqs: int | None, tokens_per_s: float | None = 100.0, **columns: Any) -> TrialRow:
    """A row of `max_num_seqs`; None is the baseline."""
    flags: dict[str, Any] = {"dtype": "half"} | ({} if seqs is None else {"max_num_seqs": seqs})
    config = ServingConfig("m", None, flags)
    number = columns.pop("number", next(numbers))
    fixed: dict[str, Any] = {
        "trial_id": f"id{number}",
        "trial_key": config.hash,
        "study": "t",
        "number": number,
        "server_id": f"s{number}",
        "purpose": "baseline" if seqs is None else "search",
        "state": "complete",
        "config_json": json.dumps(flags),
        "config_hash": config.hash,
        "params_json": json.dumps({} if seqs is None else {"max_num_seqs": seqs}),
        "flags": {name: json.dumps(value) for name, value in flags.items()},
        "command": config.command("python3"),
        "model": "m",
        "engine": "vllm",
        "engine_version": "0.32.0",
        "workload_json": "{}",
        "profile": "chat-medium",
        "rate_rps": 10.0,
        "started_at": datetime.datetime(2026, 11, 24, tzinfo=datetime.UTC),
        "valid": True,
        "output_tokens_per_s": tokens_per_s,
    }
    return TrialRow(**fixed | columns)


def failed(seqs: int | None, kind: str = "out_of_memory", **columns: Any) -> TrialRow:
    fixed: dict[str, Any] = {"state": "failed", "failure_kind": kind, "failure_detail": "words", "valid": None}
    return row(seqs, None, **fixed | columns)


def confirm(seqs: int | None, *values: float, **columns: Any) -> list[TrialRow]:
    arm = "baseline" if seqs is None else "candidate"
    return [row(seqs, value, purpose="confirm", arm=arm, **columns) for value in values]
