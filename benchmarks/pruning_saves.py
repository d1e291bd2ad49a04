"""Server starts until a study has found the winner: with the rules, with the order too, and with TPE told failures.

    python benchmarks/pruning_saves.py [--seeds 100] [--first-seed 0] [--trials 200] [--space plain] [--arms ...]

SIMULATED: no server is started. Each seed draws a T4 of its own (`Hidden`), whose shares of the peaks, overheads, room
for the KV cache, preemption, acceptance of drafts and noise the estimates do not know: they start from their priors
(`calibration.PRIORS`, `PUBLISHED`), from which this T4 differs by a factor of two either way, and in its form. A start
fails where a rule says so, or where this T4's own KV cache is too small. So the figure tells what rules and order save
*if the rules are right*; whether they are is `false_prunes.py`'s question. Proposals come from varcas's own `Study`,
so each failure is told to it as it is in a sweep.

| hidden | drawn | the estimates' prior |
|---|---|---|
| share of peak FLOP/s | 0.18-0.74, log | 0.37 |
| share of peak bandwidth | 0.38-0.95, log | 0.77 |
| overhead of a step | 5-45 ms, log | 15 ms |
| of a sequence in it | 0.0125-0.4 ms, log | 0.05 ms |
| of drafting for a sequence | 0.02-0.5 ms, log | none |
| host beside the device | 0 (before it) - 1 (all hidden) | 1 (eager) |
| compute and traffic | norm of order 1 (their sum) - 8 (the longer), log | the longer |
| KV cache, of the estimated | 0.75-1.1 | 1 |
| a preempted request's work, of its context | 0.5-4, log | none |
| drafted tokens accepted | 0.05-0.7 | 0.4 |
| chunked prefill, on the time of prompts | 0.85-1.10 | 1 |
| prefix caching, likewise | 0.97-1.04 | 1 |
| noise between starts | 1-5 %, log | |

Arms: `rules + order` and `rules` prune; the first also begins with what the estimates say. `told` starts everything,
and tells what failed. `told + vLLM` does so too, but what vLLM's configuration alone refuses costs no start (varcas
without the roofline: its validator is asked first). These four have `sampler: auto`; `TPE told` is `told` with
`sampler: tpe`. Savings are of mean starts, against `TPE told`, and against `told`: what the rules alone
save, whoever proposes. Intervals are 95 %, of a bootstrap over seeds; a study that never finds the winner counts with
all its trials. The order was designed on seeds 1000 to 1059, and the samplers were compared on them.

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
from varcas.memory import Serve, memory, settings
from varcas.model import from_config
from varcas.order import first_proposals
from varcas.pruner import Pruner, failure_kind, gpu_at_best, reason_columns, site_of
from varcas.records import TrialRow
from varcas.roofline import Step, decode, prefill, tokens_per_step
from varcas.rules import Refusal, Site, judge_all
from varcas.space import ServingConfig, Space
from varcas.study import Proposal, open_study
from varcas.workload.schedule import schedule

Arm = Literal["rules + order", "rules", "told", "told + vLLM", "TPE told"]
ARMS: tuple[Arm, ...] = ("rules + order", "rules", "told", "told + vLLM", "TPE told")
CONFIG = Path("varcas/configs/llama-2-7b-awq/config.json")
ENGINE = "0.32.0"
MODEL, CARD = from_config(json.loads(CONFIG.read_text())), gpu("T4")
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
class Hidden:
    """One T4, as the table above draws it."""

    compute_frac: float
    memory_frac: float
    step_s: float
    sequence_s: float
    draft_s: float
    hides: float
    norm: float
    kv_room: float
    preempted: float
    acceptance: float
    chunked: float
    cached: float
    noise: float

    @classmethod
    def of(cls, seed: int) -> Hidden:
        """The T4 of a seed, whatever else that seed decides."""
        rng = random.Random(f"T4 {seed}")

        def log(low: float, high: float) -> float:
            return math.exp(rng.uniform(math.log(low), math.log(high)))

        return cls(
            compute_frac=log(0.18, 0.74),
            memory_frac=log(0.38, 0.95),
            step_s=log(0.005, 0.045),
            sequence_s=log(0.0125e-3, 0.4e-3),
            draft_s=log(0.02e-3, 0.5e-3),
            hides=rng.uniform(0, 1),
            norm=log(1, 8),
            kv_room=rng.uniform(0.75, 1.1),
            preempted=log(0.5, 4),
            acceptance=rng.uniform(0.05, 0.7),
            chunked=rng.uniform(0.85, 1.10),
            cached=rng.uniform(0.97, 1.04),
            noise=log(0.01, 0.05),
        )

    def device_s(self, step: Step) -> float:
        """Of a step's kernels."""
        compute_s = float(step.compute_seconds(CARD)) / self.compute_frac
        memory_s = float(step.memory_seconds(CARD)) / self.memory_frac
        return float((compute_s**self.norm + memory_s**self.norm) ** (1 / self.norm))

    def beside(self, device_s: float, host_s: float) -> float:
        """A step of device and host, of which the shorter is hidden in part."""
        return max(device_s, host_s) + (1 - self.hides) * min(device_s, host_s)


@dataclass(frozen=True, slots=True)
class Ground:
    """What all T4s have in common.

    Attributes:
        experiment: its space and workload.
        facts: of the node, for the rules.
        configs: the baseline and the whole space, by content hash.
        refusals: of the rules.
        prompt_tokens: mean of a request.
        output_tokens: likewise.
    """

    experiment: Experiment
    facts: NodeFacts
    configs: Mapping[str, ServingConfig]
    refusals: Mapping[str, Refusal]
    prompt_tokens: float
    output_tokens: float

    @property
    def free(self) -> frozenset[str]:
        """Content hashes that vLLM's configuration refuses before a GPU is touched."""
        return frozenset(key for key, refusal in self.refusals.items() if refusal.source.startswith("config/"))

    @classmethod
    def of(cls, experiment: Experiment) -> Ground:
        """Judges the whole space."""
        facts = NodeFacts(ENGINE, "", "r", "Tesla T4", None, 15 * 2**30, CONFIG.read_text())
        space, w = Space(experiment), experiment.workload
        configs = {c.hash: c for c in (space.config(experiment.baseline), *space.configs())}
        judged = judge_all(_site(experiment, facts), [config.flags for config in configs.values()])
        refusals = {key: refusal for key, refusal in zip(configs, judged, strict=True) if refusal is not None}
        drawn = schedule(w, start_s=0, duration_s=w.duration_s, max_len=2048, stream="measure")
        prompt = statistics.fmean(request.prompt_tokens for request in drawn)
        output = statistics.fmean(request.output_tokens for request in drawn)
        return cls(experiment, facts, configs, refusals, prompt, output)


def _site(experiment: Experiment, facts: NodeFacts) -> Site:
    return site_of(experiment, facts, gpu_at_best("T4", facts), gpus_per_node=1)


@dataclass(frozen=True, slots=True)
class World:
    """What one T4 does with each configuration.

    Attributes:
        ground: the question.
        hidden: the T4.
        tokens_per_s: by content hash, without noise; 0 for one that fails.
    """

    ground: Ground
    hidden: Hidden
    tokens_per_s: Mapping[str, float]

    @property
    def best(self) -> float:
        """Throughput of the winner."""
        return max(self.tokens_per_s.values())

    @classmethod
    def of(cls, ground: Ground, hidden: Hidden) -> World:
        """Measures the whole space once, without noise."""
        server = _Server(ground, hidden)
        tokens = {
            key: 0.0 if key in ground.refusals else server.tokens_per_s(config.flags)
            for key, config in ground.configs.items()
        }
        return cls(ground, hidden, tokens)


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


class _Server:
    """Throughput of a server that is never idle.

    One that is let have more sequences than its KV cache holds takes them in by their prompts, and then preempts as
    answers grow: the share of requests above what fits is filled once more (vLLM recomputes them).
    """

    def __init__(self, ground: Ground, hidden: Hidden) -> None:
        self._ground, self._hidden = ground, hidden
        self._parts: dict[tuple[Serve, int], tuple[float, float, float, float] | None] = {}

    def tokens_per_s(self, flags: Mapping[str, Any]) -> float:
        """Output tokens a second; 0 where the KV cache is too small to start."""
        drafted = int((flags.get("speculative_config") or {}).get("num_speculative_tokens", 0))
        serve = settings(flags, MODEL, CARD)
        if (serve, drafted) not in self._parts:
            self._parts[serve, drafted] = self._round(serve, drafted)
        found = self._parts[serve, drafted]
        if found is None:
            return 0.0
        tokens, decode_s, prompts_s, fills_s = found
        prompts_s *= self._hidden.chunked if flags.get("enable_chunked_prefill") is not False else 1.0
        prompts_s *= self._hidden.cached if flags.get("enable_prefix_caching") is not False else 1.0
        return tokens / (decode_s + prompts_s + fills_s)

    def _round(self, serve: Serve, drafted: int) -> tuple[float, float, float, float] | None:
        """A batch from its prompts to its last tokens: what it gives, and the seconds of its parts."""
        h, prompt, output = self._hidden, self._ground.prompt_tokens, self._ground.output_tokens
        context = prompt + output / 2
        room, seqs = float(memory(MODEL, CARD, serve).kv_tokens) * h.kv_room, float(serve.max_num_seqs)
        if room < float(serve.max_model_len) + 16:
            return None
        batch = max(1.0, min(seqs, room / context))
        preempted_frac = max(0.0, 1 - batch / min(seqs, max(room / prompt, 1.0)))
        device_s = h.device_s(decode(MODEL, serve, batch, context, new_tokens=drafted + 1))
        host_s = h.step_s + batch * (h.sequence_s + (h.draft_s if drafted else 0.0))
        steps = output / float(tokens_per_step(h.acceptance, drafted))
        filled = prompt + preempted_frac * context * h.preempted
        fills = max(1.0, batch * filled / float(serve.max_num_batched_tokens))  # steps that a round's prompts take
        prompts_s = batch * h.device_s(prefill(MODEL, serve, 1, filled))
        return batch * output, steps * h.beside(device_s, host_s), prompts_s, fills * h.step_s


def starts_to_winner(world: World, arm: Arm, seed: int, directory: Path) -> dict[str, int | None]:
    """Server starts, the baseline's among them, until the first that is as good as the winner, by share of NEAR."""
    ground = world.ground
    asked = {"seed": seed, "prune": arm.startswith("rules"), "sampler": "tpe" if arm == "TPE told" else "auto"}
    study = ground.experiment.study.model_copy(update=asked)
    made = ground.experiment.model_copy(update={"study": study})
    space, rng = Space(made), random.Random(seed)
    site = _site(made, ground.facts)
    pruner = Pruner(made, space, site)
    order = first_proposals(made, space, site, pruner) if arm == "rules + order" else None
    first = order.first if order is not None else ()
    desk = open_study(made, space, f"journal:{directory / f'{arm}-{seed}.log'}", past=(), pruner=pruner, first=first)
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
    key, ground = proposal.config.hash, world.ground
    row = measured(proposal, number, rng).model_copy(update={"constraints": {}, "ttft_p95_ms": None, "study": "s"})
    columns: dict[str, Any] = {"state": "complete", "failure_kind": None, "failure_detail": None, "valid": True}
    columns["output_tokens_per_s"] = world.tokens_per_s[key] * math.exp(rng.gauss(0, world.hidden.noise))
    if refusal is not None:
        columns = {"state": "infeasible", **reason_columns(refusal)}
    elif arm == "told + vLLM" and key in ground.free:
        columns = {"state": "infeasible", "failure_kind": "unsupported_by_engine", "reason_rule": "vllm_refuses"}
    elif not world.tokens_per_s[key]:
        kind = failure_kind(ground.refusals[key].rule) if key in ground.refusals else "kv_cache_too_small"
        columns = {"state": "failed", "failure_kind": kind, "failure_detail": "simulated"}
    if columns["state"] != "complete":
        columns |= {"output_tokens_per_s": None, "valid": None}
    return row.model_copy(update={**columns, "simulated": True})


def summary(found: Sequence[int]) -> dict[str, float]:
    """Of the starts over seeds."""
    return {
        "mean": round(statistics.fmean(found), 2),
        "median": statistics.median(found),
        "p90": round(float(np.percentile(found, 90)), 1),
    }


def saved(found: Sequence[int], told: Sequence[int]) -> dict[str, Any]:
    """Share of the mean starts that one arm saves against another, with its 95 % interval over seeds."""
    ours, theirs = np.array(found), np.array(told)
    draws = np.random.default_rng(0).integers(0, len(ours), (10_000, len(ours)))
    lo, hi = np.percentile(1 - ours[draws].mean(1) / theirs[draws].mean(1), (2.5, 97.5))
    return {
        "value": round(1 - ours.mean() / theirs.mean(), 3),
        "interval": [round(float(lo), 3), round(float(hi), 3)],
        "of_medians": round(1 - float(np.median(ours) / np.median(theirs)), 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints JSON; exit code 1 when rules and order save less than 40 % of TPE's starts to within 1 % of the winner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--space", choices=["plain", "rich"], default="plain")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    asked = parser.parse_args(argv)
    ground = Ground.of(experiment_of(asked.space, asked.trials))
    starts: dict[str, dict[Arm, list[int | None]]] = {f"{near:g}": {arm: [] for arm in asked.arms} for near in NEAR}
    as_good: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
            world = World.of(ground, Hidden.of(seed))
            as_good.append(sum(tokens >= NEAR[0] * world.best for tokens in world.tokens_per_s.values()))
            for arm in asked.arms:
                for near, count in starts_to_winner(world, arm, seed, Path(directory)).items():
                    starts[near][arm].append(count)
    report: dict[str, Any] = {
        "simulated": True,
        "seeds": [asked.first_seed, asked.first_seed + asked.seeds - 1],
        "space": asked.space,
        "configurations": len(ground.configs) - 1,
        "ruled_out": dict(Counter(refusal.rule for refusal in ground.refusals.values()).most_common()),
        "within_1%_of_the_winner": {"median": statistics.median(as_good), "least": min(as_good), "most": max(as_good)},
    }
    for near, arms in starts.items():
        counted = {arm: [asked.trials if s is None else s for s in found] for arm, found in arms.items()}
        told = {
            f"saved_by_{arm}_against_{other}": saved(counted[arm], counted[other])
            for other in ("told", "TPE told")
            for arm in asked.arms
            if other in counted and arm != other
        }
        never = {arm: {**summary(counted[arm]), "never": sum(s is None for s in found)} for arm, found in arms.items()}
        report[f"within_{1 - float(near):.0%}"] = {**never, **told}
    print(json.dumps(report, indent=2))
    return 0 if report["within_1%"].get("saved_by_rules + order_against_TPE told", {"value": 0})["value"] >= 0.4 else 1


if __name__ == "__main__":
    sys.exit(main())
