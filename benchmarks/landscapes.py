"""Landscapes: what every configuration of a space measured, in a Parquet file that a search can be replayed on.

    python benchmarks/landscapes.py record benchmarks/landscapes/cpu_tiny_llama.yaml --repeats 2 [--lock FILE ...]
    python benchmarks/landscapes.py pack results/ STUDY EXPERIMENT.yaml OUT.parquet
    python benchmarks/landscapes.py show benchmarks/landscapes/cpu_tiny_llama.parquet

`record` starts a real server for each point of the space, shuffled by its seed, and all a second time after that, so
that drift is in the difference; it goes on where it was cut. With `--live` it starts one for each value of what no
running server takes, and measures the others on it in turn, after a load that is thrown away; where such a start fails,
all its points do. `pack` takes what a store holds of a study instead, say a sweep with `sampler: grid`.

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
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from varcas.engine.node import Node
from varcas.experiment import Experiment, load_experiment
from varcas.inner import Limits, live_start, split
from varcas.records import Outcome, TrialRow
from varcas.results import Results
from varcas.space import Flags, Params, ServingConfig, Space
from varcas.starts import outcome_columns
from varcas.trial import Listed, Step, TrialTask, cold_step, run_series, run_trial

METRICS = (
    "output_tokens_per_s", "request_rate_rps", "goodput_rps", "ttft_mean_ms", "ttft_p95_ms", "tpot_mean_ms",
    "tpot_p95_ms", "itl_p95_ms", "e2e_p95_ms",
)  # fmt: skip
FIRST_S = 160.0
"""Of a server with its loads, before one was timed: none is begun that the budget may not hold."""
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


Point = tuple[Params, Flags]


def record(
    experiment: Experiment, repeats: int, out: Path, locks: Sequence[Path], *, live: bool, budget_s: float = math.inf
) -> None:
    """Measures every point, `repeats` times over; appends a JSON line a start to `out`."""
    space = Space(experiment)
    points = list(space.points())
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    had = {(row["params_json"], row["repeat"]) for row in done}
    node = Node(experiment.server, experiment.model, experiment.revision)
    version = node.vllm_version()
    flag_names = node.flag_names() if live else []
    live_flags = split(experiment, flag_names).live if live else {}
    node.close()
    left = [
        (repeat, group)
        for repeat in range(repeats)
        for group in _groups(_shuffled(points, experiment.study.seed + repeat), live_flags)
        if any((_text(params), repeat) not in had for params, _ in group)
    ]
    began_s, longest_s = time.monotonic(), FIRST_S
    for number, (repeat, group) in enumerate(left):
        if time.monotonic() - began_s + longest_s > budget_s:
            print(f"{len(left) - number} servers are left: run it again", flush=True)
            return
        with _held(locks):
            started_s = time.monotonic()
            if live:
                rows = _measured_live(experiment, space, group, live_flags, flag_names)
            else:
                rows = _measured(experiment, space, *group[0])
            longest_s = time.monotonic() - started_s
        with out.open("a") as file:
            file.writelines(json.dumps({**r, "repeat": repeat, "engine_version": version}) + "\n" for r in rows)
        for row in rows:
            told = f"{row['params_json']}: {row['state']} {row.get('output_tokens_per_s')}"
            print(f"{number + 1}/{len(left)} {told}", flush=True)


def _shuffled(points: Sequence[tuple[Params, Flags]], seed: int) -> list[tuple[Params, Flags]]:
    return random.Random(seed).sample(points, len(points))


def _groups(points: Sequence[Point], live: Mapping[str, Sequence[int]]) -> list[list[Point]]:
    """Points that one server can be measured at; each alone where nothing is live."""
    found: dict[str, list[Point]] = {}
    for params, flags in points:
        fixed = {name: value for name, value in params.items() if name not in live} if live else params
        found.setdefault(_text(fixed), []).append((params, flags))
    return list(found.values())


def _measured(experiment: Experiment, space: Space, params: Params, flags: Flags) -> list[dict[str, Any]]:
    config = space.config(flags)
    with tempfile.TemporaryDirectory(prefix="varcas-landscape-") as logs:
        outcome = run_trial(_task(experiment, config, logs, live=False), threading.Event())
    return [_row(experiment, params, config, outcome, f"{outcome.started_at:%Y%m%dT%H%M%S.%f}", 0)]


def _measured_live(
    experiment: Experiment,
    space: Space,
    group: Sequence[Point],
    live: Mapping[str, Sequence[int]],
    flag_names: Sequence[str],
) -> list[dict[str, Any]]:
    """All points of a group on one server."""
    values = {flag: found for flag, found in live.items() if flag in group[0][0]}
    start = live_start(space.config(group[0][1]), values, flag_names, {})
    by_config = {}
    for params, _ in group:
        limits = Limits(**{flag: params[flag] for flag in values})  # type: ignore[arg-type]
        by_config[start.at(limits).hash] = (params, Step(start.at(limits), experiment.workload, limits))
    plan = Listed((cold_step(start.config, experiment.workload), *(step for _, step in by_config.values())))
    with tempfile.TemporaryDirectory(prefix="varcas-landscape-") as logs:
        series = run_series(_task(experiment, start.config, logs, live=True), threading.Event(), plan=plan)
    if series.not_live is not None:
        raise SystemExit(f"this server takes no new limits: {series.not_live}")
    server = f"{series.done[0].outcome.started_at:%Y%m%dT%H%M%S.%f}"
    if series.done[0].outcome.state == "failed":
        return [_row(experiment, params, start.config, series.done[0].outcome, server, 0) for params, _ in group]
    return [
        _row(experiment, by_config[done.step.config.hash][0], done.step.config, done.outcome, server, place)
        for place, done in enumerate(series.kept())
    ]


def _task(experiment: Experiment, config: ServingConfig, logs: str, *, live: bool) -> TrialTask:
    return TrialTask(
        label="point",
        experiment=experiment,
        config=config,
        revision=None,
        resolved={},
        endpoint=None,
        log_dir=logs,
        num_gpus=0 if experiment.hardware.gpu == "cpu" else config.num_gpus,
        live=live,
    )


def _row(
    experiment: Experiment, params: Params, config: ServingConfig, outcome: Outcome, server: str, place: int
) -> dict[str, Any]:
    columns = outcome_columns(outcome, experiment)
    return {
        "params_json": _text(params),
        "config_json": _text(dict(config.flags)),
        "server": server,
        "place": place,
        "live": outcome.live,
        "gpu": outcome.host.gpu_name,
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
    return Landscape(name, experiment, kept, rows[0]["engine_version"], rows[0]["gpu"], "measured")


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
    recording.add_argument("--budget-s", type=float, default=math.inf)
    recording.add_argument("--model", help="where the model lies on this host")
    recording.add_argument("--out", type=Path, help="JSON lines [default: beside the experiment]")
    recording.add_argument("--live", action="store_true")
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
        lines = asked.out or asked.experiment.with_suffix(".jsonl")
        out, model = lines.with_suffix(".parquet"), asked.model or experiment.model
        here = experiment.model_copy(update={"model": model})
        record(here, asked.repeats, lines, asked.lock, live=asked.live, budget_s=asked.budget_s)
        found = recorded(experiment, lines, asked.experiment.stem)
    found.write(out)
    print(show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
