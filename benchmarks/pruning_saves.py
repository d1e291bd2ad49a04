"""Server starts until a study has found the winner: with the rules, and with TPE that is told failures as constraints.

    python benchmarks/pruning_saves.py [--seeds 50] [--trials 200] [--space plain]

SIMULATED: no server is started. A start's throughput follows from the roofline's work and traffic at shares of a T4's
peaks that users have published, with noise between starts; a start fails where a rule or the memory estimate says so.
So the figure tells what the rules save *if they are right*; whether they are is `false_prunes.py`'s question. Proposals
come from varcas's own `Study` (Optuna, TPE), so each failure is told to it as it is in a sweep.

Arms: `rules` prunes. `told` starts everything, and tells what failed. `told + vLLM` does so too, but what vLLM's
configuration alone refuses costs no start (varcas without the roofline: its validator is asked first).

Spaces: `plain` is experiments/llama2_7b_awq_t4.yaml as it stands. `rich` adds flags of the seed's journey that somebody
who does not know the T4 would try too (`RICH`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import JsonValue
from study_overhead import measured

from varcas.engine.node import NodeFacts
from varcas.experiment import Choices, Experiment, load_experiment
from varcas.gpus import gpu
from varcas.memory import memory, settings
from varcas.model import from_config
from varcas.pruner import Pruner, failure_kind, gpu_at_best, reason_columns, site_of
from varcas.records import TrialRow
from varcas.roofline import Step, decode, prefill, tokens_per_step
from varcas.rules import RULES, Refusal, judge_all
from varcas.space import Space
from varcas.study import Proposal, open_study
from varcas.workload.schedule import schedule

Arm = Literal["rules", "told", "told + vLLM"]
ARMS: tuple[Arm, ...] = ("rules", "told", "told + vLLM")
CONFIG = Path("varcas/configs/llama-2-7b-awq/config.json")
ENGINE = "0.32.0"
COMPUTE_FRAC, MEMORY_FRAC = 24 / 65, 0.75
"""Of a T4's peaks, sustained: 24 of 65 TFLOPS under its 70 W, 220-270 of 320 GB/s (published timings)."""
STEP_S, SEQUENCE_S = 0.008, 0.0002
"""Host's part of an eager step, and of each sequence in it: assumed."""
ACCEPTANCE = 0.3
"""Of an n-gram draft in chat: assumed."""
NOISE = 0.02
"""Standard deviation between starts of one configuration, as a share: assumed (1-4 % is seen)."""
EXPERIMENT = Path("experiments/llama2_7b_awq_t4.yaml")
RICH: dict[str, list[JsonValue]] = {
    "dtype": ["half", "bfloat16"],
    "kv_cache_dtype": ["auto", "fp8", "fp8_e5m2"],
    "max_model_len": [2048, 4096],
    "gpu_memory_utilization": [0.3, 0.6, 0.9],
}
"""Choices of the rich space that the plain one fixes, or has fewer of; the baseline stays."""
NEAR = (0.99, 0.95)
"""A configuration counts as the winner from these shares of the best throughput on."""


@dataclass(frozen=True, slots=True)
class World:
    """What a T4 would do with each configuration of the space.

    Attributes:
        experiment: its space and workload.
        facts: of the node, for the rules.
        tokens_per_s: by content hash, without noise; 0 for one that fails.
        failures: kind of failure by content hash.
        free: content hashes that vLLM's configuration refuses, without a start.
        by_rule: configurations that each rule rules out.
    """

    experiment: Experiment
    facts: NodeFacts
    tokens_per_s: Mapping[str, float]
    failures: Mapping[str, str]
    free: frozenset[str]
    by_rule: Mapping[str, int]

    @property
    def best(self) -> float:
        """Throughput of the winner."""
        return max(self.tokens_per_s.values())


def experiment_of(space: Literal["plain", "rich"], trials: int) -> Experiment:
    """The experiment, with more to search where that is asked for."""
    found = load_experiment(EXPERIMENT)
    study = found.study.model_copy(update={"trials": trials})
    if space == "plain":
        return found.model_copy(update={"study": study})
    fixed = {name: value for name, value in found.serve.items() if name in RICH}
    more = {name: Choices(choices=choices) for name, choices in RICH.items()}
    serve = {name: value for name, value in found.serve.items() if name not in RICH}
    changed = {"study": study, "serve": serve, "baseline": fixed, "space": {**found.space, **more}}
    return found.model_copy(update=changed)


def world_of(experiment: Experiment) -> World:
    """Judges and estimates the whole space, and the baseline."""
    facts = NodeFacts(ENGINE, "", "r", "Tesla T4", None, 15 * 2**30, CONFIG.read_text())
    space = Space(experiment)
    configs = [space.config(experiment.baseline), *space.configs()]
    site = site_of(experiment, facts, gpu_at_best("T4", facts), gpus_per_node=1)
    refusals = judge_all(site, [config.flags for config in configs])
    tokens: dict[str, float] = {}
    failures: dict[str, str] = {}
    lengths = _lengths(experiment)
    for config, refusal in zip(configs, refusals, strict=True):
        tokens[config.hash] = 0.0 if refusal else _tokens_per_s(config.flags, *lengths)
        if refusal or not tokens[config.hash]:
            failures[config.hash] = failure_kind(refusal.rule) if refusal else "kv_cache_too_small"
    free = {c.hash for c, refusal in zip(configs, refusals, strict=True) if refusal and _in_config(refusal)}
    by_rule = Counter(refusal.rule for refusal in refusals[1:] if refusal)
    return World(experiment, facts, tokens, failures, frozenset(free), dict(by_rule))


def _in_config(refusal: Refusal) -> bool:
    """Whether vLLM refuses it while it makes its configuration, before a GPU is touched."""
    source = next(rule.source for rule in RULES if rule.name == refusal.rule)
    return source.startswith("config/")


def _lengths(experiment: Experiment) -> tuple[float, float]:
    """Mean tokens of prompts and answers."""
    w = experiment.workload
    drawn = schedule(w, start_s=0, duration_s=w.duration_s, max_len=2048, stream="measure")
    return statistics.fmean(r.prompt_tokens for r in drawn), statistics.fmean(r.output_tokens for r in drawn)


def _tokens_per_s(flags: Mapping[str, Any], prompt: float, output: float) -> float:
    """Sustained by a server that is never idle; 0 when its KV cache is estimated too small to start.

    A server that is let have more sequences than its KV cache holds takes them in by their prompts, and then preempts
    as answers grow: the share of requests above what fits is filled once more (vLLM recomputes them).
    """
    model, card = from_config(json.loads(CONFIG.read_text())), gpu("T4")
    serve = settings(flags, model, card)
    found = memory(model, card, serve)
    if not bool(found.fits):
        return 0.0
    context = prompt + output / 2
    room, seqs = float(found.kv_tokens), float(serve.max_num_seqs)
    batch = max(1.0, min(seqs, room / context))
    preempted_frac = 1 - batch / min(seqs, room / prompt)
    drafted = int((flags.get("speculative_config") or {}).get("num_speculative_tokens", 0))
    step_s = _seconds(decode(model, serve, batch, context, new_tokens=drafted + 1)) + STEP_S + SEQUENCE_S * batch
    steps = output / float(tokens_per_step(ACCEPTANCE, drafted))
    budget = float(serve.max_num_batched_tokens)
    filled = prompt + preempted_frac * context
    fills = max(1.0, batch * filled / budget)  # steps that a round's prompts take
    chunked = flags.get("enable_chunked_prefill") is not False
    fill_s = batch * _seconds(prefill(model, serve, 1, filled)) * (0.97 if chunked else 1.0) + fills * STEP_S
    if flags.get("enable_prefix_caching") is not False:  # hashing, and nothing shared in this chat
        fill_s *= 1.01
    return batch * output / (steps * step_s + fill_s)


def _seconds(step: Step) -> float:
    card = gpu("T4")
    return float(np.maximum(step.compute_seconds(card) / COMPUTE_FRAC, step.memory_seconds(card) / MEMORY_FRAC))


def starts_to_winner(world: World, arm: Arm, seed: int, directory: Path) -> dict[str, int | None]:
    """Server starts, the baseline's among them, until the first that is as good as the winner, by share of NEAR."""
    study = world.experiment.study.model_copy(update={"seed": seed, "prune": arm == "rules"})
    made = world.experiment.model_copy(update={"study": study})
    space, rng = Space(made), random.Random(seed)
    pruner = Pruner(made, space, site_of(made, world.facts, gpu_at_best("T4", world.facts), gpus_per_node=1))
    desk = open_study(made, space, f"journal:{directory / f'{arm}-{seed}.log'}", past=(), pruner=pruner)
    found: dict[str, int | None] = {f"{near:g}": None for near in NEAR}
    starts = number = 0
    while (proposal := desk.propose()) and None in found.values():
        refusal = pruner.verdict(proposal.config)
        row = _row(world, proposal, refusal, arm, number, rng)
        starts, number = starts + (row.state != "infeasible"), number + 1
        for near in NEAR:
            good = world.tokens_per_s[proposal.config.hash] >= near * world.best
            if found[f"{near:g}"] is None and good and row.state == "complete":
                found[f"{near:g}"] = starts
        desk.tell(proposal, row)
    desk.close()
    return found


def _row(
    world: World, proposal: Proposal, refusal: Refusal | None, arm: Arm, number: int, rng: random.Random
) -> TrialRow:
    key = proposal.config.hash
    row = measured(proposal, number, rng).model_copy(update={"constraints": {}, "ttft_p95_ms": None, "study": "s"})
    columns: dict[str, Any] = {"state": "complete", "failure_kind": None, "failure_detail": None, "valid": True}
    columns["output_tokens_per_s"] = world.tokens_per_s[key] * math.exp(rng.gauss(0, NOISE))
    if refusal is not None:
        columns = {"state": "infeasible", **reason_columns(refusal)}
    elif arm == "told + vLLM" and key in world.free:
        columns = {"state": "infeasible", "failure_kind": "unsupported_by_engine", "reason_rule": "vllm_refuses"}
    elif key in world.failures:
        columns = {"state": "failed", "failure_kind": world.failures[key], "failure_detail": "simulated"}
    if columns["state"] != "complete":
        columns |= {"output_tokens_per_s": None, "valid": None}
    return row.model_copy(update={**columns, "simulated": True})


def summary(found: Sequence[int | None], most: int) -> dict[str, float]:
    """Of the starts over seeds; where the winner was not found, `most` stands for it."""
    counted = [most if starts is None else starts for starts in found]
    return {
        "mean": round(statistics.fmean(counted), 2),
        "median": statistics.median(counted),
        "p90": round(float(np.percentile(counted, 90)), 1),
        "never": sum(starts is None for starts in found),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints JSON; exit code 1 when the rules save less than 40 % of the starts to within 1 % of the winner."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--space", choices=["plain", "rich"], default="plain")
    asked = parser.parse_args(argv)
    loaded = experiment_of(asked.space, asked.trials)
    world = world_of(loaded)
    starts: dict[str, dict[str, list[int | None]]] = {f"{near:g}": {arm: [] for arm in ARMS} for near in NEAR}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(asked.seeds):
            for arm in ARMS:
                for near, count in starts_to_winner(world, arm, seed, Path(directory)).items():
                    starts[near][arm].append(count)
    report: dict[str, Any] = {
        "simulated": True,
        "seeds": asked.seeds,
        "space": asked.space,
        "configurations": Space(loaded).size(),
        "ruled_out": world.by_rule,
        "fails_unforetold": len(world.failures) - sum(world.by_rule.values()),
        "best_tokens_per_s": round(world.best, 1),
        "as_good": {n: sum(t >= float(n) * world.best for t in world.tokens_per_s.values()) for n in starts},
    }
    for near, arms in starts.items():
        found = {arm: summary(counts, asked.trials) for arm, counts in arms.items()}
        saved = {f"saved_against_{arm}": round(1 - found["rules"]["mean"] / found[arm]["mean"], 3) for arm in ARMS[1:]}
        report[f"within_{1 - float(near):.0%}"] = {**found, **saved}
    print(json.dumps(report, indent=2))
    return 0 if report["within_1%"]["saved_against_told"] >= 0.4 else 1


if __name__ == "__main__":
    sys.exit(main())
