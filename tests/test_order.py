from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sweep_work import T4_FACTS
from tests.test_study import row_of
from varcas.experiment import Experiment, parse_experiment
from varcas.order import NUM_ORDERED, Order, first_proposals
from varcas.pruner import Pruner, gpu_at_best, site_of
from varcas.records import TrialRow
from varcas.rules import Site
from varcas.space import Space, distance
from varcas.study import NUM_STARTUP, Proposal, open_study

SEQS = "max_num_seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128, 256]}"
SPACE = f"""{{{SEQS}, max_num_batched_tokens: {{choices: [512, 1024, 2048, 4096, 8192]}},
  enable_prefix_caching: {{choices: [true, false]}}, kv_cache_dtype: {{choices: [auto, fp8]}},
  speculative_config: {{choices: [null, {{method: ngram, num_speculative_tokens: {{choices: [3, 5]}}}}]}}}}"""
SERVE = "{dtype: half, max_model_len: 2048, quantization: awq, enforce_eager: true}"


def experiment(space: str = SPACE, study: str = "{trials: 100}", rate_rps: float = 20, **keys: str) -> Experiment:
    extra = "\n".join(f"{key}: {text}" for key, text in ({"serve": SERVE} | keys).items())
    workload = f"{{profile: chat-medium, rate_rps: {rate_rps}, duration_s: 60}}"
    return parse_experiment(f"name: t\nmodel: m\nworkload: {workload}\nspace: {space}\nstudy: {study}\n{extra}\n")


def t4(made: Experiment) -> Site:
    return site_of(made, T4_FACTS, gpu_at_best("T4", T4_FACTS), gpus_per_node=1)


def order_of(made: Experiment, rows: list[TrialRow] | None = None, site: Site | None = None) -> Order | None:
    site, space = site or t4(made), Space(made)
    return first_proposals(made, space, site, Pruner(made, space, site), rows or [])


def chosen(made: Experiment, rows: list[TrialRow] | None = None) -> list[dict[str, Any]]:
    found = order_of(made, rows)
    assert found is not None
    return [dict(config.flags) for config in found.first]


# what comes first


def test_of_a_saturated_server_the_largest_throughput_comes_first() -> None:
    first = chosen(experiment())
    assert len(first) == NUM_ORDERED
    assert all(flags["max_num_seqs"] >= 16 for flags in first)
    assert "speculative_config" not in first[0]  # a full batch is compute-bound: drafts cost more than they give


def test_the_first_ones_are_no_near_copies() -> None:
    made = experiment()
    space = Space(made)
    params = [space.params_of(flags) or {} for flags in chosen(made)]
    assert min(distance(one, other) for one, other in itertools.combinations(params, 2)) > 1


def test_what_the_rules_rule_out_is_never_among_them() -> None:
    for seed in range(4):
        first = chosen(experiment(study=f"{{seed: {seed}}}"))
        assert all(flags["kv_cache_dtype"] == "auto" for flags in first)


def test_a_latency_is_best_where_nothing_waits_behind_it() -> None:
    serve = SERVE.replace("enforce_eager: true", "enforce_eager: false")
    made = experiment(f"{{{SEQS}}}", rate_rps=0.3, objective="{minimize: tpot_mean_ms}", serve=serve)
    slow = experiment(f"{{{SEQS}}}", rate_rps=20, objective="{minimize: ttft_p50_ms}", serve=serve)
    assert chosen(made)[0]["max_num_seqs"] > 1  # one that falls behind comes last, however short its steps
    assert chosen(slow)[0]["max_num_seqs"] >= 16  # none keeps up: by throughput


def test_a_limit_comes_before_the_objective() -> None:
    loose, tight = (chosen(experiment(slo=f"{{tpot_p95_ms: {limit}}}")) for limit in (2000, 40))
    assert tight[0]["max_num_seqs"] < loose[0]["max_num_seqs"]


def test_measured_rows_of_other_studies_correct_the_priors() -> None:
    made = experiment()
    found = order_of(made, [measured(made, number, study="before") for number in range(3)])
    assert found is not None
    assert found.basis.startswith("measured here: T4, awq-int4 float16 eager, vLLM 0.32.0")
    own = order_of(made, [measured(made, number, study="t") for number in range(3)])
    assert own == order_of(made)
    assert own is not None
    assert own.basis.startswith("priors: published T4 measurements")


def measured(made: Experiment, number: int, study: str) -> TrialRow:
    config = Space(made).config({"max_num_seqs": 2**number, "kv_cache_dtype": "auto"})
    columns: dict[str, Any] = {
        "study": study, "gpu_name": "Tesla T4", "engine_version": "0.32.0", "tpot_mean_ms": 60.0 + 10 * number,
        "output_tokens_per_s": 16.0 * 2**number, "prompt_tokens_per_s": 20.0 * 2**number,
        "request_rate_rps": 0.1 * 2**number, "saturated": False,
        "started_at": datetime.datetime(2026, 11, 24, number, tzinfo=datetime.UTC),
    }  # fmt: skip
    return row_of(Proposal(None, {}, {}, config, "search"), number=number, **columns)


# where nothing orders


UNKNOWN: dict[str, Callable[[Site], Site]] = {
    "model": lambda site: replace(site, model=None),
    "GPU": lambda site: replace(site, gpu=None),
    "CPU": lambda site: replace(site, on_cpu=True),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_unknown_leaves_all_to_chance(what: str) -> None:
    made = experiment()
    assert order_of(made, site=UNKNOWN[what](t4(made))) is None


@pytest.mark.parametrize(
    "made",
    [
        experiment(study="{order: false}"),
        experiment(study="{sampler: random}"),
        experiment(objective="{minimize: energy_j}"),
        experiment("{}", study="{enqueue: [{max_num_seqs: 4}]}"),
    ],
    ids=["asked for none", "random", "energy", "no space"],
)
def test_an_experiment_without_order(made: Experiment) -> None:
    assert order_of(made) is None


# in a study


def proposals(
    made: Experiment, storage: str, count: int, rows: list[TrialRow], order: Order | None, sign: int = 1
) -> list[Proposal]:
    """The next ones of a study that is opened anew, each measured."""
    space, site = Space(made), t4(made)
    pruner = Pruner(made, space, site, rows)
    first = order.first if order is not None else ()
    study = open_study(made, space, storage, past=rows, pruner=pruner, first=first)
    done: list[Proposal] = []
    while len(done) < count and (proposal := study.propose()):
        rows.append(row_of(proposal, number=len(rows), output_tokens_per_s=float(100 + sign * len(rows))))
        study.tell(proposal, rows[-1])
        done.append(proposal)
    study.close()
    return done


def hashes(some: list[Proposal]) -> list[str]:
    return [proposal.config.hash for proposal in some]


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 's.log'}"


def test_two_of_the_start_up_stay_random(tmp_path: Path) -> None:
    made = experiment(study="{trials: 100, seed: 3, sampler: tpe}")
    order = order_of(made)
    up, down = (
        hashes(proposals(made, f"journal:{tmp_path / name}", 30, [], order, sign))
        for name, sign in (("a", 1), ("b", -1))
    )
    assert order is not None
    assert up[1 : 1 + NUM_ORDERED] == [config.hash for config in order.first]
    before = next(at for at, (one, other) in enumerate(zip(up, down, strict=True)) if one != other)
    assert before >= 1 + NUM_STARTUP >= 1 + NUM_ORDERED + 2  # until then nothing hangs on what was measured


@pytest.mark.parametrize(("named", "ordered"), [(0, 3), (1, 2), (2, 1), (5, 0)])
def test_what_the_file_names_takes_the_place_of_estimates(named: int, ordered: int, journal: str) -> None:
    enqueue = [{"max_num_seqs": 2**i, "kv_cache_dtype": "auto"} for i in range(named)]
    made = experiment(f"{{{SEQS}, kv_cache_dtype: {{choices: [auto, fp8]}}}}", f"{{enqueue: {json.dumps(enqueue)}}}")
    order = order_of(made)
    assert order is not None
    done = hashes(proposals(made, journal, 1 + named + 3, [], order))[1 + named :]
    first = [config.hash for config in order.first if config.flags["max_num_seqs"] not in [2**i for i in range(named)]]
    assert [key for key in done if key in first][:ordered] == first[:ordered]


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4, 6])
def test_a_resume_goes_on_where_it_was_and_repeats_none(before: int, tmp_path: Path) -> None:
    made, rows = experiment(), list[TrialRow]()
    order = order_of(made)
    assert order is not None
    storage = f"journal:{tmp_path / 's.log'}"
    done = proposals(made, storage, before, rows, order) + proposals(made, storage, 8 - before, rows, order_of(made))
    assert hashes(done)[1 : 1 + NUM_ORDERED] == [config.hash for config in order.first]
    assert len(set(hashes(done))) == 8


def test_the_seed_decides() -> None:
    assert order_of(experiment()) == order_of(experiment())
    assert len({str(chosen(experiment(study=f"{{seed: {seed}}}"))) for seed in range(5)}) > 2


# cost


TOKENS = "max_num_batched_tokens: {low: 512, high: 8192, step: 64}"
LENGTHS = "max_model_len: {low: 1024, high: 4096, step: 512}"
LARGE = {
    "of 7,623": f"{{{SEQS}, {TOKENS}, {LENGTHS}}}",
    "of 60,984": f"{{{SEQS}, {TOKENS}, {LENGTHS}, block_size: {{choices: [16, 32]}}, x: {{choices: [1, 2, 3, 4]}}}}",
    "continuous": f"{{{SEQS}, {TOKENS}, gpu_memory_utilization: {{low: 0.5, high: 0.95}}}}",
}


@pytest.mark.parametrize("space", LARGE.values(), ids=list(LARGE))
def test_it_takes_two_seconds_at_most(space: str) -> None:
    made = experiment(space, serve=SERVE.replace("max_model_len: 2048, ", ""))
    began_s = time.process_time()
    assert order_of(made) is not None
    assert time.process_time() - began_s < 2.0
