"""Server starts and wall time until a search has found a configuration within 3 % of the best.

    python benchmarks/search.py [--seeds 50] [--arms auto random ...] [--landscapes FILE ...] [--synthetic 4]

Landscapes are `benchmarks/landscapes/*.parquet` (measured; `landscapes.py` says how) and simulated T4s of
`pruning_saves.py` (labelled so). Proposals come from varcas's own `Study`: ask, tell, order, pruner, surrogate.

What a start measures of a point: one of the recorded measurements of it at random, or where there is but one, that one
with the recorded spread between starts of a point on it (at least `LEAST_NOISE`). On top: a drift of the machine over
the study (`DRIFT`, either way) and a cold first load of each server (up to `COLD`). The truth is the geometric mean of
a point's recorded measurements. Where a landscape holds live measurements, every arm measures as many of them on each
server as fit in the time of its start (`inner`), random among them.

A search has found it with the first start after which its best measured configuration is truly within 3 % of the best;
one that never does counts with all its starts. Baseline and failures are starts. `halving` is successive halving over
random configurations, with a quarter, half and the whole load: each rung is a start.

Priors: the roofline's, which know no landscape. No arm sees another landscape's rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from landscapes import Landscape
from pruning_saves import Ground, Hidden, World, experiment_of
from pydantic import JsonValue

from varcas.costs import StartCosts
from varcas.engine.node import NodeFacts
from varcas.experiment import Experiment
from varcas.order import first_proposals
from varcas.pruner import Pruner, gpu_at_best, reason_columns, site_of
from varcas.records import TrialRow
from varcas.rules import Site
from varcas.space import Params, ServingConfig, Space
from varcas.study import Proposal, Study, open_study

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "varcas" / "configs"
ARMS = ("auto", "gp", "tpe", "random", "grid", "halving")
NEAR = 0.97
LEAST_NOISE = 0.02
WITHIN = 0.007
"""Deviation between measurements on one server (research/orchestration.md)."""
DRIFT, COLD = 0.03, 0.05
LIVE_FLAGS = ("max_num_seqs", "max_num_batched_tokens")
MOST_INNER = 9
SHORT = (0.25, 0.5, 1.0)
"""Of the load, in each rung of successive halving; a quarter of it is twice as noisy."""
FIRST_RUNG = 8


@dataclass(frozen=True)
class Terrain:
    """A landscape as a search meets it.

    Attributes:
        name: of it.
        simulated: no server was measured.
        experiment: its space and objective.
        values: recorded figures of each point by the space's content hash; none for one that fails.
        failures: kind of failure by content hash.
        start_s: of each point, by content hash.
        load_s: of a measurement.
        constraints: of each point, by content hash.
        live: flags that a running server takes, with their values.
        noise: log-deviation between starts of a point.
        facts: of the node, where the rules and estimates may know it.
    """

    name: str
    simulated: bool
    experiment: Experiment
    values: Mapping[str, tuple[float, ...]]
    failures: Mapping[str, str]
    start_s: Mapping[str, float]
    load_s: float
    constraints: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    live: Mapping[str, tuple[JsonValue, ...]] = field(default_factory=dict)
    noise: float = LEAST_NOISE
    facts: NodeFacts | None = None

    @cached_property
    def truth(self) -> dict[str, float]:
        """By content hash; 0 for what fails or misses a limit."""
        found = {key: math.exp(statistics.fmean(map(math.log, values))) for key, values in self.values.items()}
        return {key: 0.0 if self.misses(key) else value for key, value in found.items()}

    def misses(self, key: str) -> bool:
        """A limit of the SLO."""
        return max(self.constraints.get(key, {}).values(), default=0.0) > 0

    @cached_property
    def best(self) -> float:
        """Of all that meets the SLO."""
        return max(self.truth.values())

    def site(self, experiment: Experiment) -> Site | None:
        """What rules and estimates know; None where they know nothing."""
        if self.facts is None or self.facts.gpu_name is None:
            return None
        return site_of(experiment, self.facts, gpu_at_best(experiment.hardware.gpu, self.facts), gpus_per_node=1)


def of_landscape(landscape: Landscape) -> Terrain:
    """What was recorded."""
    experiment, space = landscape.experiment, Space(landscape.experiment)
    metric = experiment.objectives[0].metric
    values: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    starts: dict[str, list[float]] = {}
    constraints: dict[str, dict[str, float]] = {}
    loads, live = [], False
    for row in landscape.rows:
        params: Params = json.loads(row["params_json"])
        key = space.config(space.flags_of(params)).hash
        starts.setdefault(key, []).append(row["start_s"])
        if row["state"] != "complete" or row["valid"] is False:
            failures[key] = row["failure_kind"] or "crashed_at_start"
            continue
        values.setdefault(key, []).append(row[metric])
        constraints[key] = json.loads(row["constraints_json"])
        loads.append(row["load_s"])
        live = live or row["live"]
    spreads = [np.var(np.log(v), ddof=1) for v in values.values() if len(v) > 1]
    whole_s = {key: max(found) for key, found in starts.items()}
    usual_s = statistics.median(s for s in whole_s.values() if s)
    return Terrain(
        name=landscape.name,
        simulated=landscape.source == "simulated",
        experiment=experiment,
        values={key: tuple(found) for key, found in values.items()},
        failures={key: kind for key, kind in failures.items() if key not in values},
        start_s={key: found or usual_s for key, found in whole_s.items()},
        load_s=statistics.median(loads),
        constraints=constraints,
        live=_live_values(experiment) if live else {},
        noise=max(LEAST_NOISE, math.sqrt(float(np.mean(spreads))) if spreads else 0.0),
        facts=_facts(landscape),
    )


def _live_values(experiment: Experiment) -> dict[str, tuple[JsonValue, ...]]:
    found: dict[str, tuple[JsonValue, ...]] = {}
    for flag in LIVE_FLAGS:
        entry = experiment.space.get(flag)
        if entry is not None and hasattr(entry, "choices"):
            found[flag] = tuple(entry.choices)
    return found


def _facts(landscape: Landscape) -> NodeFacts | None:
    copy = CONFIGS / Path(landscape.experiment.model).name.lower() / "config.json"
    if landscape.gpu is None or not copy.exists():
        return None
    return NodeFacts(landscape.engine_version, "", "r", landscape.gpu, None, model_config=copy.read_text())


def of_t4(seed: int) -> Terrain:
    """A simulated T4 of `pruning_saves.py`; its first starts compile nothing (eager)."""
    ground = Ground.of(experiment_of("plain", 200))
    world = World.of(ground, Hidden.of(seed))
    keys = list(ground.configs)
    return Terrain(
        name=f"T4 {seed} (simulated)",
        simulated=True,
        experiment=ground.experiment,
        values={key: (world.tokens_per_s[key],) for key in keys if world.tokens_per_s[key] > 0},
        failures={key: "kv_cache_too_small" for key in keys if world.tokens_per_s[key] <= 0},
        start_s=dict.fromkeys(keys, 60.0),
        load_s=150.0,
        noise=max(LEAST_NOISE, world.hidden.noise),
        facts=ground.facts,
    )


# one search


@dataclass(slots=True)
class Machine:
    """Where a study runs: what its starts measure, and what they have cost."""

    terrain: Terrain
    space: Space
    rng: random.Random
    planned: int
    starts: int = 0
    wall_s: float = 0.0
    number: int = 0
    best: tuple[float, str] | None = None
    found: tuple[int, float] | None = None
    failed: list[str] = field(default_factory=list)
    _drift: float = 0.0
    _of_server: float = 0.0

    def __post_init__(self) -> None:
        self._drift = self.rng.uniform(-DRIFT, DRIFT)

    def start(self, key: str) -> None:
        """A server starts."""
        self.starts += 1
        self.wall_s += self.terrain.start_s.get(key, 60.0)
        self._of_server = self.rng.gauss(0, self.terrain.noise)

    def measure(self, key: str, *, first: bool, share: float = 1.0) -> float | None:
        """One measurement on the server that runs; None when the point fails."""
        if key in self.terrain.failures:
            self.failed.append(key)
            return None
        recorded = self.terrain.values.get(key) or (min(min(v) for v in self.terrain.values.values()),)  # the baseline
        self.wall_s += self.terrain.load_s * share
        cold = 1 - self.rng.uniform(0, COLD) if first else 1.0
        drifted = 1 + self._drift * self.starts / self.planned
        shaken = self.rng.gauss(0, WITHIN / math.sqrt(share)) + (self._of_server if len(recorded) < 3 else 0.0)
        return self.rng.choice(recorded) * cold * drifted * math.exp(shaken)

    def note(self, key: str, value: float) -> None:
        """Takes a measurement in; the first start at which the best measured is truly near the best counts."""
        if self.terrain.misses(key) or key not in self.terrain.values:
            return
        if self.best is None or value > self.best[0]:
            self.best = (value, key)
        if self.found is None and self.terrain.truth[self.best[1]] >= NEAR * self.terrain.best:
            self.found = (self.starts, self.wall_s)


def search(terrain: Terrain, arm: str, seed: int, directory: Path, inner: bool, most: int) -> Machine:
    """One study to its end, or until it has found what it seeks."""
    made = _experiment(terrain, arm, seed, most)
    machine = Machine(terrain, Space(made), random.Random(f"{terrain.name} {arm} {seed}"), most)
    site = terrain.site(made)
    pruner = Pruner(made, machine.space, site) if site is not None else None
    if arm == "halving":
        _halve(machine, most, pruner)
        return machine
    order = first_proposals(made, machine.space, site, pruner) if site is not None and pruner is not None else None
    first = order.first if order is not None and arm == "auto" else ()
    path = directory / f"{arm}-{seed}.log"
    expected = order.expected if order is not None and arm == "auto" else {}
    desk = open_study(made, machine.space, f"journal:{path}", past=(), pruner=pruner, first=first, expected=expected)
    rows: list[TrialRow] = []
    while machine.found is None and (proposal := desk.propose()):
        rows += _tried(machine, desk, proposal, pruner, inner, made)
        desk.costs = StartCosts.of(rows, start_s=60.0, load_s=terrain.load_s)
    desk.close()
    path.unlink()
    return machine


def _experiment(terrain: Terrain, arm: str, seed: int, most: int) -> Experiment:
    sampler = "auto" if arm == "halving" else arm
    changes = {"trials": most, "sampler": sampler, "seed": seed, "stop": "trials", "order": arm == "auto"}
    study = terrain.experiment.study.model_copy(update={**changes, "prune": terrain.facts is not None, "enqueue": []})
    return terrain.experiment.model_copy(update={"study": study})


def _tried(
    machine: Machine, desk: Study, proposal: Proposal, pruner: Pruner | None, inner: bool, made: Experiment
) -> list[TrialRow]:
    """A proposal's row, and those of what was measured on its server."""
    refusal = pruner.verdict(proposal.config) if pruner is not None else None
    if refusal is not None:
        row = _row(machine, proposal, made, None, **reason_columns(refusal), state="infeasible")
        desk.tell(proposal, row)
        return [row]
    key = proposal.config.hash
    machine.start(key)
    value = machine.measure(key, first=True)
    rows = [_row(machine, proposal, made, value)]
    desk.tell(proposal, rows[0])
    if value is None:
        return rows
    machine.note(key, value)
    for ride in desk.alongside(proposal, machine.terrain.live, _num_inner(machine) if inner else 0):
        value = machine.measure(ride.config.hash, first=False)
        rows.append(_row(machine, ride, made, value))
        desk.tell(ride, rows[-1])
        if value is not None:
            machine.note(ride.config.hash, value)
    return rows


def _num_inner(machine: Machine) -> int:
    """As many loads as take the time of a start."""
    start_s = statistics.median(machine.terrain.start_s.values())
    return min(MOST_INNER, max(1, round(start_s / machine.terrain.load_s)))


def _row(machine: Machine, proposal: Proposal, made: Experiment, value: float | None, **columns: Any) -> TrialRow:
    flags, key = dict(proposal.config.flags), proposal.config.hash
    machine.number += 1
    if value is None and not columns:
        columns = {"state": "failed", "failure_kind": machine.terrain.failures.get(key, "crashed_at_start")}
    metric = made.objectives[0].metric
    fixed: dict[str, Any] = {
        "trial_id": f"{machine.number}",
        "trial_key": key,
        "study": made.name,
        "number": machine.number,
        "server_id": f"server {machine.starts}",
        "purpose": proposal.purpose,
        "state": "complete",
        "config_json": json.dumps(flags),
        "config_hash": key,
        "params_json": json.dumps(proposal.params),
        "model": made.model,
        "engine": "vllm",
        "workload_json": "{}",
        "profile": made.workload.name,
        "rate_rps": made.workload.mean_rps,
        "started_at": datetime.datetime(2026, 11, 24, tzinfo=datetime.UTC),
        "valid": None if value is None else True,
        "server_start_s": machine.terrain.start_s.get(key),
        "constraints": {} if value is None else dict(machine.terrain.constraints.get(key, {})),
        metric: value,
        "simulated": machine.terrain.simulated,
    }
    return TrialRow(**fixed | columns)


def _halve(machine: Machine, most: int, pruner: Pruner | None) -> None:
    """Successive halving (Jamieson and Talwalkar 2016) over random configurations, again and again."""
    space, rng = machine.space, machine.rng
    every = [space.config(flags) for _, flags in space.points()]
    allowed = [True] * len(every) if pruner is None else pruner.allowed(every)
    configs = [config for config, ok in zip(every, allowed, strict=True) if ok]
    _measure_once(machine, space.config(machine.terrain.experiment.baseline), 1.0)
    while machine.starts < most and machine.found is None:
        rung: list[ServingConfig] = rng.sample(configs, min(FIRST_RUNG, len(configs)))
        for share in SHORT:
            scored = []
            for config in rung:
                if machine.starts >= most or machine.found is not None:
                    return
                scored.append((_measure_once(machine, config, share) or -math.inf, config))
            rung = [config for _, config in sorted(scored, key=lambda pair: -pair[0])[: max(1, len(rung) // 2)]]


def _measure_once(machine: Machine, config: ServingConfig, share: float) -> float | None:
    machine.start(config.hash)
    value = machine.measure(config.hash, first=True, share=share)
    if value is not None:
        machine.note(config.hash, value)
    return value


# figures


def figures(found: Sequence[Machine], most: int) -> dict[str, Any]:
    """Of one arm on one landscape over seeds."""
    starts = [machine.found[0] if machine.found else most for machine in found]
    wall_s = [machine.found[1] if machine.found else machine.wall_s for machine in found]
    lo, hi = _median_interval(starts)
    return {
        "median": statistics.median(starts),
        "median_lo": lo,
        "median_hi": hi,
        "p90": float(np.percentile(starts, 90)),
        "mean": round(statistics.fmean(starts), 1),
        "wall_min_median": round(statistics.median(wall_s) / 60, 1),
        "not_found": sum(machine.found is None for machine in found),
        "failed_mean": round(statistics.fmean(len(machine.failed) for machine in found), 2),
        "failed_max": max(len(machine.failed) for machine in found),
    }


def _median_interval(starts: Sequence[int]) -> tuple[float, float]:
    """95 % of a bootstrap over seeds."""
    draws = np.random.default_rng(0).integers(0, len(starts), (4000, len(starts)))
    medians = np.median(np.array(starts)[draws], axis=1)
    return float(np.percentile(medians, 2.5)), float(np.percentile(medians, 97.5))


def table(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """As Markdown."""
    lines = [
        "| landscape | arm | starts, median (95 %) | p90 | mean | wall min, median | failed starts, mean (most) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arms in report.items():
        for arm, told in arms.items():
            interval = f"{told['median']:g} ({told['median_lo']:g}-{told['median_hi']:g})"
            failed = f"{told['failed_mean']:g} ({told['failed_max']})"
            lines.append(
                f"| {name} | {arm} | {interval} | {told['p90']:g} | {told['mean']:g} | {told['wall_min_median']:g} "
                f"| {failed} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or JSON; exit code 1 when `auto` misses the aim on a measured landscape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--landscapes", nargs="*", type=Path, default=sorted((HERE / "landscapes").glob("*.parquet")))
    parser.add_argument("--synthetic", type=int, default=4, help="simulated T4s")
    parser.add_argument(
        "--no-inner", action="store_true", help="one configuration a server, whatever was measured live"
    )
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    terrains = [of_landscape(Landscape.read(path)) for path in asked.landscapes]
    terrains += [of_t4(seed) for seed in range(asked.synthetic)]
    report: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for terrain in terrains:
            most = min(60, len(terrain.values) + len(terrain.failures) + 1)
            for arm in asked.arms:
                runs = [
                    search(terrain, arm, seed, Path(directory), not asked.no_inner, most) for seed in range(asked.seeds)
                ]
                report.setdefault(terrain.name, {})[arm] = figures(runs, most)
                print(f"{terrain.name}: {arm}: {report[terrain.name][arm]}", file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2) if asked.json else table(report))
    aimed = [
        report[t.name]["auto"]["median"] <= 10 and report[t.name]["auto"]["p90"] <= 15
        for t in terrains
        if not t.simulated and "auto" in report[t.name]
    ]
    return 0 if all(aimed) else 1


if __name__ == "__main__":
    sys.exit(main())
