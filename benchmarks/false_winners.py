"""How often a whole study calls a winner where nothing is better, and finds one that is.

    python benchmarks/false_winners.py [--studies 1000] [--gain 0.0] [--sd 0.02] [--first-seed 0]

SIMULATED measurements; search, store, confirmation and verdict are varcas's own (`Sweeper`), with trials run in this
process in place of Ray. Every configuration is equally good, but for one value of one flag, which is `gain` better.
A start measures the truth times its own luck (log-normal, `sd`: 2 % and more were measured), times where the machine
has drifted to (`DRIFT` over a study, either way, and a slow wave on top), times a cold first load (up to `COLD`).

A false winner is a study that says `better` at gain 0. With a gain, a study has found it when it says `better` of a
configuration that has it, in at most `MOST_STARTS` starts. Bounds are one-sided 95 % ones (Clopper and Pearson 1934).
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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shares import lower_bound, upper_bound

from varcas.budget import Budget
from varcas.engine.node import Checked, NodeFacts
from varcas.experiment import Experiment, Server, parse_experiment
from varcas.pool import Finished, Slots
from varcas.records import HostFacts, LoadResult, Outcome, RequestRecord, StageTimes
from varcas.report import Recommendation
from varcas.starts import check
from varcas.store import Store
from varcas.sweeper import Sweeper
from varcas.trial import TrialTask

DRIFT, WAVE, COLD = 0.03, 0.01, 0.05
MOST_STARTS = 16
TRUE_RATE = 1000.0
FILE = """\
name: nothing-to-find
model: {model}
hardware: {{gpu: cpu}}
space:
  a: {{choices: [1, 2, 4, 8]}}
  b: {{choices: [x, y, z]}}
  c: {{choices: [true, false]}}
workload: {{profile: chat-short, rate_rps: 4, duration_s: 10, warmup_s: 0, max_drain_s: 0}}
study: {{trials: {trials}, repeats: 3, ablate: 0, seed: {seed}}}
results: {results}
"""


class EasyNode:
    """A node whose vLLM takes everything."""

    def __init__(self, server: Server, model: str, revision: str | None) -> None:
        pass

    def facts(self) -> NodeFacts:
        return NodeFacts("simulated", "", "0", None, None)

    def flag_names(self) -> list[str]:
        return ["a", "b", "c"]

    def check(self, argv: list[str], endpoint: str) -> Checked:
        return Checked(ok=True)

    def close(self) -> None:
        pass


class HerePool:
    """Runs a piece of work when it is submitted, in this process; what `varcas.pool.Pool` promises."""

    def __init__(self) -> None:
        self.slots = Slots(1, 1, False, "cpu", 1.0, {}, 1)
        self._done: list[Finished] = []

    @property
    def busy(self) -> bool:
        return bool(self._done)

    def has_room(self, num_gpus: int = 1) -> bool:
        return not self._done

    def submit(self, key: str, work: Callable[..., Any], payload: Any, num_gpus: int = 1) -> None:
        self._done.append(Finished(key, result=work(payload, threading.Event())))

    def finished(self, timeout_s: float = 1.0) -> list[Finished]:
        done, self._done = self._done, []
        return done

    def service(self, make: Callable[..., Any], *args: Any) -> Any:
        return make(*args)

    def call(self, service: Any, method: str, *args: Any, timeout_s: float, stopping: threading.Event) -> Any:
        return getattr(service, method)(*args)

    def dismiss(self, service: Any) -> None:
        pass

    def prepare(self) -> None:
        pass

    def cancel(self) -> None:
        pass


@dataclass(slots=True)
class Machine:
    """What starts measure, one after the other."""

    gain: float
    sd: float
    rng: random.Random
    planned: int = MOST_STARTS
    starts: int = 0
    drift: float = field(init=False)
    phase: float = field(init=False)

    def __post_init__(self) -> None:
        self.drift, self.phase = self.rng.uniform(-DRIFT, DRIFT), self.rng.uniform(0, 2 * math.pi)

    def run(self, task: TrialTask, cancelled: threading.Event) -> Outcome:
        """Stands for `trial.run_trial`."""
        self.starts += 1
        passed = self.starts / self.planned
        wave = WAVE * math.sin(self.phase + 2 * math.pi * passed)
        luck = math.exp(self.rng.gauss(0, self.sd))
        cold = 1 - self.rng.uniform(0, COLD)
        true = TRUE_RATE * (1 + self.gain * has_gain(task.config.flags))
        return _outcome(true * luck * cold * (1 + self.drift * passed + wave))


def has_gain(flags: Any) -> bool:
    """The one value that is better."""
    return bool(flags.get("a") == 8)


def _outcome(tokens_per_s: float) -> Outcome:
    """Forty requests over ten seconds that come to this rate."""
    tokens = [round(tokens_per_s * 10 * (i + 1) / 40) - round(tokens_per_s * 10 * i / 40) for i in range(40)]
    records = tuple(
        RequestRecord(
            i, t, t, t + 0.01, t + 0.2, t + 0.2, 10, n, 10, n, (0.01, 0.2), (1, n - 1), "length", None, 200, i, 0
        )
        for i, (t, n) in enumerate(zip((0.24 * k for k in range(40)), tokens, strict=True))
    )
    load = LoadResult(records, 0.0, 10.0, 0.0, 0.1)
    return Outcome("complete", datetime.datetime.now(datetime.UTC), HostFacts("here"), StageTimes(), load=load)


@dataclass(frozen=True, slots=True)
class Told:
    """What one study said, and what it took."""

    answer: Recommendation
    starts: int

    @property
    def has_winner(self) -> bool:
        return self.answer.verdict == "better"

    @property
    def has_found(self) -> bool:
        """The winner has the gain, within the starts that it may take."""
        deployed = self.answer.deploy or {}
        return self.has_winner and has_gain(deployed) and self.starts <= MOST_STARTS


def study(seed: int, gain: float, sd: float, trials: int, directory: Path) -> Told:
    """One study, from its first start to its answer."""
    machine = Machine(gain, sd, random.Random(f"{seed} {gain} {sd}"))
    made = _experiment(seed, trials, directory)
    with Store(made.results) as store:
        sweeper = Sweeper(
            made,
            check(made),
            store,
            HerePool(),  # type: ignore[arg-type]
            Budget(),
            lambda event: None,
            threading.Event(),
            machine.run,
            EasyNode,
        )
        with sweeper:
            sweeper.search()
            sweeper.confirm()
            return Told(sweeper.answer(), machine.starts)


def _experiment(seed: int, trials: int, directory: Path) -> Experiment:
    model = directory / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    return parse_experiment(FILE.format(model=model, trials=trials, seed=seed, results=directory / f"results-{seed}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints JSON; exit code 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--gain", type=float, default=0.0)
    parser.add_argument("--sd", type=float, default=0.02)
    parser.add_argument("--trials", type=int, default=8, help="server starts of the search; confirmation comes on top")
    asked = parser.parse_args(argv)
    found = []
    for seed in range(asked.first_seed, asked.first_seed + asked.studies):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            found.append(study(seed, asked.gain, asked.sd, asked.trials, Path(directory)))
    hits = sum(told.has_found if asked.gain else told.has_winner for told in found)
    bound = lower_bound(hits, len(found)) if asked.gain else upper_bound(hits, len(found))
    verdicts = [told.answer.verdict for told in found]
    report = {
        "simulated": True,
        "studies": len(found),
        "gain": asked.gain,
        "sd": asked.sd,
        "share": hits / len(found),
        "lower_bound" if asked.gain else "upper_bound": round(bound, 4),
        "starts_median": statistics.median(told.starts for told in found),
        "starts_most": max(told.starts for told in found),
        "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
    }
    print(json.dumps(report, indent=2))
    return 0 if (bound >= 0.88 if asked.gain else bound <= 0.065) else 1


if __name__ == "__main__":
    sys.exit(main())
