"""Landscapes: what every configuration of a space measured, in a Parquet file that a search can be replayed on.

    python benchmarks/landscapes.py record benchmarks/landscapes/cpu_tiny_llama.yaml --repeats 2 [--lock FILE ...]
    python benchmarks/landscapes.py pack results/ STUDY EXPERIMENT.yaml OUT.parquet
    python benchmarks/landscapes.py show benchmarks/landscapes/cpu_tiny_llama.parquet

`record` starts a real server for each point of the experiment's space, in an order shuffled by its seed, a second time
after all had their first (so that drift is in the difference), through `varcas.trial.run_trial`; it goes on where it
was cut. `pack` takes what a store holds of a study instead (a sweep with `sampler: grid`, `varcas batch-size`).

A row a measurement: `params_json` (of the space), `config_json`, `server` (which start: its rows were measured one by
one), `place` (0: its first load), `live` (limits were changed while it ran), `state`, `failure_kind`,
`start_s` (0 but for a server's first row), `load_s` (warm-up, window and drain), `started_at`, and the metrics in
`METRICS`. The file's metadata hold the experiment as JSON (`experiment`), `engine_version`, `gpu`, and `source`:
`measured` or `simulated`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import random
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from varcas.engine.node import Node
from varcas.experiment import Experiment, load_experiment
from varcas.records import TrialRow
from varcas.results import Results
from varcas.space import Flags, Params, Space
from varcas.starts import outcome_columns
from varcas.trial import TrialTask, run_trial

METRICS = (
    "output_tokens_per_s", "request_rate_rps", "goodput_rps", "ttft_mean_ms", "ttft_p95_ms", "tpot_mean_ms",
    "tpot_p95_ms", "itl_p95_ms", "e2e_p95_ms",
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("params_json", pa.string()),
        ("config_json", pa.string()),
        ("server", pa.string()),
        ("place", pa.int64()),
        ("live", pa.bool_()),
        ("state", pa.string()),
        ("failure_kind", pa.string()),
        ("start_s", pa.float64()),
        ("load_s", pa.float64()),
        ("started_at", pa.string()),
        ("saturated", pa.bool_()),
        ("valid", pa.bool_()),
        ("constraints_json", pa.string()),
        *((name, pa.float64()) for name in METRICS),
    ]
)


@dataclass(frozen=True, slots=True)
class Landscape:
    """A space and what was measured of it.

    Attributes:
        name: of its file.
        experiment: its space, objective, SLO and workload.
        rows: as `SCHEMA` has them.
        engine_version: that was measured.
        gpu: its name; None on a CPU.
        source: `measured` or `simulated`.
    """

    name: str
    experiment: Experiment
    rows: tuple[Mapping[str, Any], ...]
    engine_version: str
    gpu: str | None
    source: str

    @classmethod
    def read(cls, path: Path) -> Landscape:
        """From its file."""
        table = pq.read_table(path)
        told = {key.decode(): text.decode() for key, text in (table.schema.metadata or {}).items()}
        experiment = Experiment.model_validate_json(told["experiment"])
        rows = tuple(table.to_pylist())
        return cls(path.stem, experiment, rows, told["engine_version"], told["gpu"] or None, told["source"])

    def write(self, path: Path) -> None:
        """To its file, the smallest that Parquet makes of it."""
        told = {
            "experiment": self.experiment.model_dump_json(),
            "engine_version": self.engine_version,
            "gpu": self.gpu or "",
            "source": self.source,
        }
        table = pa.Table.from_pylist([dict(row) for row in self.rows], schema=SCHEMA.with_metadata(told))
        pq.write_table(table, path, compression="zstd")


# record


def record(experiment: Experiment, repeats: int, out: Path, locks: Sequence[Path], at_most: int | None) -> None:
    """Measures every point, `repeats` times over; appends a JSON line a start to `out`."""
    space = Space(experiment)
    points = list(space.points())
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    had = {(row["params_json"], row["repeat"]) for row in done}
    node = Node(experiment.server, experiment.model, experiment.revision)
    version = node.vllm_version()
    node.close()
    left = [
        (repeat, params, flags)
        for repeat in range(repeats)
        for params, flags in _shuffled(points, experiment.study.seed + repeat)
        if (_text(params), repeat) not in had
    ]
    for number, (repeat, params, flags) in enumerate(left[:at_most]):
        with _held(locks):
            row = _measured(experiment, space, params, flags)
        row |= {"repeat": repeat, "engine_version": version}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number + 1}/{len(left)} {_text(params)}: {row['state']} {row.get('output_tokens_per_s')}", flush=True)


def _shuffled(points: Sequence[tuple[Params, Flags]], seed: int) -> list[tuple[Params, Flags]]:
    return random.Random(seed).sample(points, len(points))


def _measured(experiment: Experiment, space: Space, params: Params, flags: Flags) -> dict[str, Any]:
    config = space.config(flags)
    with tempfile.TemporaryDirectory(prefix="varcas-landscape-") as logs:
        task = TrialTask(
            label="point",
            experiment=experiment,
            config=config,
            revision=None,
            resolved={},
            endpoint=None,
            log_dir=logs,
            num_gpus=0 if experiment.hardware.gpu == "cpu" else config.num_gpus,
        )
        outcome = run_trial(task, threading.Event())
    columns = outcome_columns(outcome, experiment)
    return {
        "params_json": _text(params),
        "config_json": _text(dict(config.flags)),
        "server": f"{outcome.started_at:%Y%m%dT%H%M%S.%f}",
        "place": 0,
        "live": False,
        "state": outcome.state,
        "failure_kind": outcome.failure_kind,
        "start_s": columns["server_start_s"] + columns["stop_s"],
        "load_s": columns["warmup_s"] + columns["load_s"] + columns["drain_s"],
        "started_at": outcome.started_at.isoformat(),
        "saturated": columns.get("saturated"),
        "valid": columns.get("valid"),
        "constraints_json": json.dumps(columns.get("constraints", {})),
        **{name: columns.get(name) for name in METRICS},
    }


@contextlib.contextmanager
def _held(locks: Sequence[Path]) -> Iterator[None]:
    """The first shared, the others alone: as `flock -s FIRST flock -x SECOND` would."""
    with contextlib.ExitStack() as files:
        for number, path in enumerate(locks):
            file = files.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX if number else fcntl.LOCK_SH)
        yield


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def recorded(experiment: Experiment, out: Path, name: str) -> Landscape:
    """What `record` measured so far."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kept = tuple({key: row.get(key) for key in SCHEMA.names} for row in rows)
    return Landscape(name, experiment, kept, rows[0]["engine_version"], None, "measured")


# pack


def packed(results: Path, study: str, experiment: Experiment, name: str) -> Landscape:
    """What a store holds of a study."""
    space, seen = Space(experiment), dict[str, int]()
    rows = sorted(Results(results).trials(study), key=lambda row: row.started_at)
    kept = []
    for row in rows:
        if row.state == "infeasible" or (params := _params_of(row, space)) is None:
            continue
        place = seen[row.server_id] = seen.get(row.server_id, -1) + 1
        kept.append(_of_row(row, params, place))
    named = next((row.gpu_name for row in rows if row.gpu_name), None)
    version = next((row.engine_version for row in rows if row.engine_version), None) or "unknown"
    return Landscape(name, experiment, tuple(kept), version, named, "simulated" if rows[0].simulated else "measured")


def _params_of(row: TrialRow, space: Space) -> Params | None:
    if row.measured_live:
        found: Params = json.loads(row.params_json)
        return found
    return space.params_of(json.loads(row.config_json))


def _of_row(row: TrialRow, params: Params, place: int) -> dict[str, Any]:
    return {
        "params_json": _text(params),
        "config_json": row.config_json,
        "server": row.server_id,
        "place": place,
        "live": row.measured_live,
        "state": row.state,
        "failure_kind": row.failure_kind,
        "start_s": (row.server_start_s or 0.0) + (row.stop_s or 0.0),
        "load_s": (row.warmup_s or 0.0) + (row.load_s or 0.0) + (row.drain_s or 0.0),
        "started_at": row.started_at.isoformat(),
        "saturated": row.saturated,
        "valid": row.valid,
        "constraints_json": json.dumps(row.constraints),
        **{name: getattr(row, name) for name in METRICS},
    }


def show(landscape: Landscape) -> str:
    """How many points, how far apart, and how much starts of one point differ."""
    metric = landscape.experiment.objectives[0].metric
    by_point: dict[str, list[float]] = {}
    for row in landscape.rows:
        if row["state"] == "complete" and row[metric]:
            by_point.setdefault(row["params_json"], []).append(row[metric])
    failed = {row["params_json"] for row in landscape.rows if row["state"] == "failed"}
    means = sorted(((sum(v) / len(v), key) for key, v in by_point.items()), reverse=True)
    pairs = [abs(a / b - 1) for v in by_point.values() for a, b in itertools.combinations(v, 2)]
    lines = [
        f"{landscape.name}: {landscape.source}, vLLM {landscape.engine_version}, {landscape.gpu or 'CPU'}: "
        f"{len(landscape.rows)} measurements of {len(by_point)} points on "
        f"{len({row['server'] for row in landscape.rows})} servers; {len(failed)} points fail",
        f"two measurements of a point differ by {sum(pairs) / len(pairs):.1%} in the mean" if pairs else "",
        *(f"  {value:10.2f}  {key}" for value, key in means[:5]),
        *(f"  {value:10.2f}  {key}" for value, key in means[-2:]),
    ]
    return "\n".join(line for line in lines if line)


def main(argv: Sequence[str] | None = None) -> int:
    """Records, packs or shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    recording = what.add_parser("record")
    recording.add_argument("experiment", type=Path)
    recording.add_argument("--repeats", type=int, default=2)
    recording.add_argument("--lock", type=Path, action="append", default=[])
    recording.add_argument("--at-most", type=int)
    packing = what.add_parser("pack")
    packing.add_argument("results", type=Path)
    packing.add_argument("study")
    packing.add_argument("experiment", type=Path)
    packing.add_argument("out", type=Path)
    showing = what.add_parser("show")
    showing.add_argument("landscape", type=Path)
    asked = parser.parse_args(argv)
    if asked.what == "show":
        print(show(Landscape.read(asked.landscape)))
        return 0
    experiment = load_experiment(asked.experiment)
    if asked.what == "pack":
        found, out = packed(asked.results, asked.study, experiment, asked.out.stem), asked.out
    else:
        lines, out = asked.experiment.with_suffix(".jsonl"), asked.experiment.with_suffix(".parquet")
        record(experiment, asked.repeats, lines, asked.lock, asked.at_most)
        found = recorded(experiment, lines, asked.experiment.stem)
    found.write(out)
    print(show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
