from __future__ import annotations

import datetime
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
from optuna.trial import TrialState

from varcas.errors import InputError
from varcas.experiment import Experiment, parse_experiment
from varcas.records import TrialRow
from varcas.space import ServingConfig, Space
from varcas.store import Store
from varcas.study import (
    FAILED,
    MAX_FRUITLESS,
    SAMPLERS,
    Beside,
    Proposal,
    Study,
    constraints_of,
    dashboard_server,
    dashboard_view,
    open_study,
)

SPACE = "{max_num_seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128]}, kv_cache_dtype: {choices: [auto, fp8]}}"


def experiment(space: str = SPACE, *, study: str = "{trials: 1000}", **keys: str) -> Experiment:
    extra = "\n".join(f"{key}: {text}" for key, text in keys.items())
    return parse_experiment(
        f"name: t\nmodel: m\nserve: {{dtype: half}}\nworkload: {{rate_rps: 10}}\n"
        f"space: {space}\nstudy: {study}\n{extra}\n"
    )


numbers = itertools.count()


def row_of(proposal: Proposal, **columns: Any) -> TrialRow:
    number = columns.pop("number", next(numbers))
    flags = dict(proposal.config.flags)
    fixed: dict[str, Any] = {
        "trial_id": f"id{number}",
        "trial_key": proposal.config.hash,
        "study": "t",
        "number": number,
        "server_id": f"s{number}",
        "purpose": proposal.purpose,
        "state": "complete",
        "config_json": json.dumps(flags),
        "config_hash": proposal.config.hash,
        "flags": {name: json.dumps(value) for name, value in flags.items()},
        "command": proposal.config.command("python"),
        "log_path": f"/logs/{number}.log",
        "model": "m",
        "engine": "vllm",
        "workload_json": "{}",
        "profile": "chat-medium",
        "rate_rps": 10.0,
        "started_at": datetime.datetime(2026, 11, 24, tzinfo=datetime.UTC),
        "valid": True,
        "output_tokens_per_s": 100.0,
    }
    return TrialRow(**(fixed | columns))


class Desk:
    """A study, its store's rows, and what stands for the server."""

    def __init__(self, made: Experiment, storage: str) -> None:
        self.experiment, self.storage = made, storage
        self.space = Space(made)
        self.rows: list[TrialRow] = []
        self.study = self.open()

    def open(self) -> Study:
        if hasattr(self, "study"):
            self.study.close()
        self.study = open_study(self.experiment, self.space, self.storage, past=self.rows)
        return self.study

    def propose(self) -> Proposal:
        proposal = self.study.propose()
        assert proposal is not None, self.study.ended
        return proposal

    def record(self, proposal: Proposal, *, retry: bool = False, **columns: Any) -> TrialRow:
        row = row_of(proposal, number=len(self.rows), **columns)
        self.rows.append(row)
        self.study.tell(proposal, row, retry=retry)
        return row

    def run(self, measure: Callable[[Proposal], dict[str, Any]], at_most: int = 10**6) -> list[Proposal]:
        done: list[Proposal] = []
        while len(done) < at_most and (proposal := self.study.propose()):
            done.append(proposal)
            self.record(proposal, **measure(proposal))
        return done

    @property
    def optuna(self) -> optuna.Study:
        """As another program sees it; from a database, through the study's own connection."""
        storage = loaded(self.storage) if self.storage.startswith("journal:") else self.study._storage
        return optuna.load_study(study_name="t", storage=storage)

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.optuna.trials]


def loaded(url: str) -> optuna.storages.BaseStorage:
    path = url.removeprefix("journal:")
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))


def throughput(proposal: Proposal) -> dict[str, Any]:
    return {"output_tokens_per_s": float(proposal.config.flags.get("max_num_seqs", 0))}


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'study.log'}"


@pytest.fixture
def desk(journal: str) -> Desk:
    return Desk(experiment(), journal)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql")
    else:
        yield (
            f"journal:{tmp_path / 'new' / 's.log'}" if request.param == "journal" else f"sqlite:///{tmp_path}/new/s.db"
        )


# samplers and storages

MIXED = """{
  max_num_seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128]}, kv_cache_dtype: {choices: [auto, fp8, null]},
  x: {choices: [1, true, "1", 1.0]}, frac: {low: 0.5, high: 0.95}, blocks: {low: 16, high: 256, log: true},
  speculative_config: {choices: [null, {method: ngram, num_speculative_tokens: {choices: [3, 5]}}]},
  extra: {choices: [true, false], when: {kv_cache_dtype: fp8}}}"""


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_searches_resumes_and_rebuilds_on_every_storage(sampler: str, storage: str) -> None:
    continuous = "frac: {low: 0.5, high: 0.95}, blocks: {low: 16, high: 256, log: true},"
    space = MIXED.replace(continuous, "") if sampler == "grid" else MIXED
    desk = Desk(experiment(space, study=f"{{trials: 16, sampler: {sampler}}}", slo="{ttft_p95_ms: 100}"), storage)

    def measure(proposal: Proposal) -> dict[str, Any]:
        seqs = proposal.config.flags.get("max_num_seqs", 0)
        if seqs == 128:
            return {"state": "failed", "failure_kind": "out_of_memory", "valid": None}
        return {"output_tokens_per_s": float(seqs), "constraints": {"ttft_p95_ms": seqs / 32 - 1}}

    first = desk.run(measure, at_most=12)
    before = summary(desk)
    desk.open()
    assert summary(desk) == before
    rest = desk.run(measure)
    assert desk.study.ended == "budget spent"
    hashes = [proposal.config.hash for proposal in (*first, *rest)]
    assert len(set(hashes)) == len(hashes) == 16
    assert {p.number for p in (*first, *rest)[1:]} <= {trial.number for trial in desk.optuna.trials}
    optuna.delete_study(study_name="t", storage=desk.study._storage)
    desk.study.close()


def summary(desk: Desk) -> list[tuple[str, Any, Any, Any]]:
    return [(trial.state.name, trial.params, trial.values, {**trial.constraints}) for trial in desk.optuna.get_trials()]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_documented(name: str) -> None:
    assert (SAMPLERS[name].__doc__ or "").strip()


def test_an_unknown_sampler_is_answered_with_the_nearest(journal: str) -> None:
    with pytest.raises(InputError, match=r"study.sampler: 'tpf' is unknown. Did you mean tpe\?.*auto"):
        Desk(experiment(study="{sampler: tpf}"), journal)


def test_parallel_proposals_differ(desk: Desk) -> None:
    for proposal in [desk.propose() for _ in range(12)]:
        desk.record(proposal, **throughput(proposal))
    together = [desk.propose() for _ in range(4)]
    assert len({proposal.config.hash for proposal in together}) == 4
    for proposal in reversed(together):
        desk.record(proposal, **throughput(proposal))
    assert "RUNNING" not in desk.states()


# order, duplicates, ends


def test_baseline_comes_first_then_what_was_enqueued_then_the_sampler(journal: str) -> None:
    desk = Desk(
        experiment(
            study="{trials: 6, enqueue: "
            "[{max_num_seqs: 64, kv_cache_dtype: fp8}, {max_num_seqs: 7}, {max_num_seqs: 8}]}",
            baseline="{max_num_seqs: 8}",
        ),
        journal,
    )
    proposals = desk.run(throughput)
    assert [p.purpose for p in proposals] == ["baseline", *["search"] * 5]
    assert [p.flags for p in proposals[:3]] == [
        {"max_num_seqs": 8},
        {"max_num_seqs": 64, "kv_cache_dtype": "fp8"},
        {"max_num_seqs": 7},
    ]
    assert [p.number is None for p in proposals] == [True, False, True, False, False, False]
    assert desk.optuna.user_attrs["baseline"]["output_tokens_per_s"] == 8
    assert desk.study.spent == 6
    assert desk.study.ended == "budget spent"


def test_a_list_of_configurations_is_run_and_nothing_else(journal: str) -> None:
    desk = Desk(experiment("{}", study="{enqueue: [{x: 2}, {x: 3}]}", baseline="{x: 1}"), journal)
    assert [proposal.flags for proposal in desk.run(throughput)] == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert desk.study.ended == "space exhausted"


def test_a_baseline_in_the_space_is_told_to_optuna(journal: str) -> None:
    desk = Desk(experiment(baseline="{max_num_seqs: 8, kv_cache_dtype: auto}"), journal)
    proposal = desk.propose()
    desk.record(proposal, output_tokens_per_s=5.0)
    assert desk.optuna.trials[0].params == {"max_num_seqs": 8, "kv_cache_dtype": "auto"} == proposal.params
    assert desk.optuna.trials[0].value == 5


def test_a_small_space_is_exhausted_without_waste(journal: str) -> None:
    desk = Desk(experiment(), journal)
    proposals = desk.run(throughput)
    assert len({p.config.hash for p in proposals}) == len(proposals) == 1 + 16
    assert desk.study.ended == "space exhausted"
    assert len(desk.optuna.trials) < 100


def test_a_duplicate_is_answered_from_its_row(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 30, sampler: tpe}"), journal)
    proposals = desk.run(throughput)
    values: dict[str, set[float]] = {}
    for trial in desk.optuna.trials:
        assert trial.state == TrialState.COMPLETE
        values.setdefault(str(trial.params), set()).add(trial.value)
    assert len(desk.optuna.trials) > len(proposals)
    assert all(len(seen) == 1 for seen in values.values())
    answer = desk.study.answered(proposals[3].config.hash)
    assert answer is not None
    assert answer.number == 3
    assert desk.study.answered("unknown") is None


def test_what_runs_is_not_started_again(journal: str) -> None:
    desk = Desk(experiment("{x: {choices: [1, 2, 3]}}"), journal)
    running = [desk.propose() for _ in range(4)]
    assert desk.study.propose() is None
    assert desk.study.ended == "space exhausted"
    assert len({p.config.hash for p in running}) == 4


def test_two_hundred_fruitless_proposals_end_the_search(journal: str) -> None:
    desk = Desk(experiment("{x: {low: 0.0, high: 1.0}}", study="{trials: 5, sampler: random}"), journal)

    def pruned(proposal: Proposal) -> dict[str, Any]:
        return (
            {"valid": True}
            if proposal.purpose == "baseline"
            else {"state": "infeasible", "reason_rule": "r", "valid": None}
        )

    assert len(desk.run(pruned)) == 1 + MAX_FRUITLESS
    assert desk.study.ended == "200 proposals in a row were duplicates or pruned"
    assert desk.study.spent == 1


def test_one_start_in_between_begins_the_count_anew(journal: str) -> None:
    desk = Desk(experiment("{x: {low: 0.0, high: 1.0}}", study="{trials: 3, sampler: random}"), journal)
    desk.record(desk.propose())
    for _ in range(MAX_FRUITLESS - 1):
        desk.record(desk.propose(), state="infeasible")
    started = desk.propose()
    for _ in range(MAX_FRUITLESS):
        desk.record(desk.propose(), state="infeasible")
    assert desk.study.propose() is None
    desk.record(started)


def test_the_budget_counts_starts_that_ran_and_those_under_way(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 3}"), journal)
    first, second, third = (desk.propose() for _ in range(3))
    assert desk.study.propose() is None
    desk.record(first)
    assert desk.study.propose() is None
    desk.record(second, state="infeasible")
    fourth = desk.propose()
    desk.record(third, state="failed", failure_kind="out_of_memory")
    desk.record(fourth)
    assert desk.study.propose() is None
    assert (desk.study.spent, desk.study.ended) == (3, "budget spent")


# what Optuna is told


def test_a_measured_row_is_told_with_values_and_normalised_constraints(journal: str) -> None:
    desk = Desk(experiment(slo="{ttft_p95_ms: 100, tpot_p95_ms: 50}"), journal)
    desk.record(desk.propose())
    row = desk.record(
        desk.propose(),
        output_tokens_per_s=7.0,
        constraints={"ttft_p95_ms": 0.25, "tpot_p95_ms": -0.5},
        ttft_p95_ms=125.0,
        tpot_p95_ms=25.0,
        slo_met=False,
    )
    trial = desk.optuna.trials[-1]
    assert trial.constraints == {"ttft_p95_ms": 0.25, "tpot_p95_ms": -0.5, "runs": -1.0}
    assert trial.value == 7
    shown = trial.user_attrs
    assert (shown["trial"], shown["feasible"], shown["slo_violation"], shown["log"]) == (1, False, 0.25, "/logs/1.log")
    assert (shown["ttft_p95_ms"], shown["command"]) == (125.0, row.command)
    assert "max_num_seqs=" in shown["config"]
    assert desk.optuna.metric_names == ["output_tokens_per_s"]
    assert desk.optuna.user_attrs["slo"] == "ttft_p95_ms <= 100, tpot_p95_ms <= 50"


@pytest.mark.parametrize(
    ("objective", "worst"), [("{maximize: output_tokens_per_s}", 3.0), ("{minimize: energy_j}", 9.0)]
)
def test_a_failure_gets_the_worst_feasible_objective_and_a_thousandfold_violation(
    journal: str, objective: str, worst: float
) -> None:
    desk = Desk(experiment(slo="{ttft_p95_ms: 100}", objective=objective), journal)
    for value, miss in ((3.0, -0.5), (9.0, -0.1), (1.0, 0.7), (50.0, 0.7)):
        desk.record(desk.propose(), output_tokens_per_s=value, energy_j=value, constraints={"ttft_p95_ms": miss})
    desk.record(desk.propose(), state="failed", failure_kind="out_of_memory", failure_detail="CUDA out of memory")
    trial = desk.optuna.trials[-1]
    assert trial.state == TrialState.COMPLETE
    assert trial.value == worst
    assert trial.constraints == {"ttft_p95_ms": FAILED, "runs": FAILED}
    assert trial.user_attrs["failure_kind"] == trial.user_attrs["outcome"] == "out_of_memory"
    assert trial.user_attrs["failure_detail"] == "CUDA out of memory"


def test_a_failure_before_anything_ran_is_told_without_inventing_a_value(desk: Desk) -> None:
    desk.record(desk.propose(), state="failed", failure_kind="out_of_memory")
    desk.record(desk.propose(), state="failed", failure_kind="out_of_memory")
    assert desk.optuna.trials[-1].state == TrialState.PRUNED
    assert desk.optuna.trials[-1].constraints == {"runs": FAILED}


def test_the_worst_miss_still_ranks_before_a_failure(journal: str) -> None:
    made = experiment(slo="{ttft_p95_ms: 100, tpot_p95_ms: 50}")
    proposal = Desk(made, journal).propose()
    missed = constraints_of(row_of(proposal, constraints={"ttft_p95_ms": 1e9, "tpot_p95_ms": float("inf")}), made)
    assert sum(missed.values()) < FAILED
    unmeasured = constraints_of(row_of(proposal, constraints={}), made)
    assert 0 < sum(value for value in unmeasured.values() if value > 0) < sum(missed.values())


def test_latency_of_a_saturated_server_never_wins_a_latency_objective(journal: str) -> None:
    made = experiment(objective="{minimize: ttft_p95_ms}")
    proposal = Desk(made, journal).propose()
    held = constraints_of(row_of(proposal, ttft_p95_ms=900.0, saturated=False), made)
    near = constraints_of(row_of(proposal, ttft_p95_ms=500.0, saturated=True, request_rate_rps=8.0), made)
    far = constraints_of(row_of(proposal, ttft_p95_ms=300.0, saturated=True, request_rate_rps=2.0), made)
    assert held["holds_rate"] < 0 < near["holds_rate"] < far["holds_rate"]


def test_a_lost_worker_is_no_mark_against_the_configuration(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 4, max_retries: 2}"), journal)
    desk.record(desk.propose())
    proposal = desk.propose()
    for _ in range(2):
        desk.record(proposal, retry=True, state="failed", failure_kind="worker_lost")
        again = desk.propose()
        assert again.config == proposal.config
        proposal = again
    desk.record(proposal, output_tokens_per_s=9.0)
    states = [(trial.state.name, dict(trial.constraints)) for trial in desk.optuna.trials]
    assert states == [("FAIL", {}), ("FAIL", {}), ("COMPLETE", {"runs": -1.0})]
    assert desk.study.spent == 2


def test_a_configuration_that_is_lost_too_often_is_given_up(journal: str) -> None:
    desk = Desk(experiment("{x: {choices: [1]}}", study="{trials: 9, max_retries: 1}"), journal)
    desk.record(desk.propose())
    for _ in range(2):
        desk.record(desk.propose(), retry=True, state="failed", failure_kind="gpu_busy")
    assert desk.study.propose() is None
    assert desk.study.ended == "space exhausted"
    assert desk.states() == ["FAIL", "FAIL"]
    assert desk.study.spent == 2


def test_a_lost_start_makes_room_after_the_budget_seemed_spent(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 1}"), journal)
    baseline = desk.propose()
    assert desk.study.propose() is None
    desk.record(baseline, retry=True, state="failed", failure_kind="worker_lost")
    again = desk.propose()
    assert (again.purpose, again.config, desk.study.ended) == ("baseline", baseline.config, None)


def test_a_measurement_not_to_be_believed_is_repeated_once_and_never_wins(journal: str) -> None:
    desk = Desk(experiment(), journal)
    desk.record(desk.propose())
    proposal = desk.propose()
    desk.record(proposal, valid=False, invalid_reasons=["client too slow"], output_tokens_per_s=1e6)
    again = desk.propose()
    assert again.config == proposal.config
    desk.record(again, valid=False, invalid_reasons=["client too slow"], output_tokens_per_s=1e6)
    assert desk.propose().config != proposal.config
    first, second, _ = desk.optuna.trials
    assert first.state == TrialState.FAIL
    assert (second.value, second.constraints["runs"]) == (100.0, FAILED)
    assert second.user_attrs["not_believed"] == "client too slow"


def test_two_objectives_make_a_front(journal: str) -> None:
    desk = Desk(experiment(objective="[{maximize: output_tokens_per_s}, {minimize: energy_j}]"), journal)

    def measure(proposal: Proposal) -> dict[str, Any]:
        seqs = float(proposal.config.flags.get("max_num_seqs", 1))
        if seqs == 128:
            return {"state": "failed", "failure_kind": "out_of_memory"}
        fp8 = proposal.config.flags.get("kv_cache_dtype") == "fp8"
        return {"output_tokens_per_s": seqs, "energy_j": seqs**1.5 + 10 * fp8}

    desk.run(measure)
    study = desk.optuna
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["output_tokens_per_s", "energy_j"]
    assert {(t.params["max_num_seqs"], t.params["kv_cache_dtype"]) for t in study.best_trials} == {
        (seqs, "auto") for seqs in (1, 2, 4, 8, 16, 32, 64)
    }
    failed = [t for t in study.trials if t.params["max_num_seqs"] == 128 and t.state == TrialState.COMPLETE]
    assert all(t.values[0] <= 64 for t in failed)


HALF_FAILS = """{
  broken: {choices: [true, false]}, max_num_seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128, 256]},
  max_num_batched_tokens: {choices: [512, 1024, 2048, 4096, 8192]}, frac: {low: 0.5, high: 0.95}}"""


def share_of_failing_half(seed: int, storage: str) -> float:
    """Of asks 11 to 40, where half of the space does not start and all of the rest misses the SLO by 2 to 70 times."""
    made = experiment(HALF_FAILS, study=f"{{trials: 40, seed: {seed}}}", slo="{ttft_p95_ms: 100}")
    desk, rng = Desk(made, storage), random.Random(seed)

    def measure(proposal: Proposal) -> dict[str, Any]:
        flags = proposal.config.flags
        if flags.get("broken"):
            return {"state": "failed", "failure_kind": "out_of_memory", "valid": None}
        seqs = float(flags.get("max_num_seqs", 256))
        miss = 130 / (1 + seqs) ** 0.5 * rng.uniform(0.9, 1.1)
        return {"output_tokens_per_s": seqs * rng.uniform(0.9, 1.1), "constraints": {"ttft_p95_ms": miss}}

    proposals = desk.run(measure)
    assert len(proposals) == 40
    return sum(proposal.flags.get("broken") is True for proposal in proposals[10:]) / 30


def test_the_failing_half_is_left_alone_where_everything_misses_the_slo(journal: str) -> None:
    shares = [share_of_failing_half(seed, f"{journal}{seed}") for seed in range(8)]
    print("share of asks 11-40 in the failing half:", shares, "mean", sum(shares) / len(shares))
    assert max(shares) <= 0.5


# resume


def journal_path(desk: Desk) -> Path:
    return Path(desk.storage.removeprefix("journal:"))


def told(desk: Desk) -> list[tuple[Any, ...]]:
    """What Optuna knows of the rows, in the order of the rows."""
    trials = [trial for trial in desk.optuna.trials if "trial_id" in trial.user_attrs]
    facts = {
        (t.user_attrs["trial"], t.state.name, str(sorted(t.params.items())), str(t.values), str(dict(t.constraints)))
        for t in trials
    }
    return sorted(facts)


def varied(proposal: Proposal) -> dict[str, Any]:
    seqs = proposal.config.flags.get("max_num_seqs", 0)
    if seqs in (64, 128):
        return {"state": "failed", "failure_kind": "out_of_memory"}
    if seqs == 2:
        return {"valid": False}
    if seqs == 4:
        return {"state": "infeasible", "reason_rule": "r"}
    return {"output_tokens_per_s": float(seqs)}


def test_a_deleted_journal_is_rebuilt_from_the_store(desk: Desk) -> None:
    desk.run(varied, at_most=12)
    before = told(desk)
    journal_path(desk).unlink()
    desk.open()
    assert told(desk) == before
    assert desk.study.spent == sum(row.state != "infeasible" for row in desk.rows) - sum(
        row.valid is False and row is next(r for r in desk.rows if r.config_hash == row.config_hash)
        for row in desk.rows
    )
    known = {row.config_hash for row in desk.rows if row.valid is not False}
    assert all(proposal.config.hash not in known for proposal in desk.run(varied))


def test_rows_that_optuna_lacks_are_added(desk: Desk) -> None:
    desk.run(varied, at_most=5)
    copy = journal_path(desk).read_bytes()
    desk.run(varied, at_most=4)
    before = told(desk)
    journal_path(desk).write_bytes(copy)
    desk.open()
    assert told(desk) == before


def test_a_running_trial_is_told_from_its_row_or_proposed_again(desk: Desk) -> None:
    desk.record(desk.propose())
    stored, lost = desk.propose(), desk.propose()
    desk.rows.append(row_of(stored, number=1, output_tokens_per_s=42.0))  # killed between store and tell
    desk.open()
    by_number = {trial.number: trial for trial in desk.optuna.trials}
    assert stored.number is not None
    assert lost.number is not None
    assert by_number[stored.number].value == 42
    assert by_number[stored.number].user_attrs["trial_id"] == "id1"
    assert by_number[lost.number].state == TrialState.FAIL
    assert desk.propose().config == lost.config
    assert desk.propose().config not in (lost.config, stored.config)


def test_a_trial_that_was_killed_while_it_was_asked_is_given_up(desk: Desk) -> None:
    desk.record(desk.propose())
    trial = desk.optuna.ask()
    trial.suggest_categorical("max_num_seqs", [1, 2, 4, 8, 16, 32, 64, 128])
    other = desk.optuna
    other.enqueue_trial({"max_num_seqs": 16, "kv_cache_dtype": "fp8"})
    desk.open()
    assert desk.states() == ["FAIL", "FAIL"]
    assert desk.propose().flags == {"max_num_seqs": 16, "kv_cache_dtype": "fp8"}


def test_an_interrupted_start_is_made_again_and_costs_no_retry(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 9, max_retries: 0}"), journal)
    desk.record(desk.propose())
    proposal = desk.propose()
    for _ in range(3):
        desk.record(proposal, state="stopped", failure_kind="interrupted")
        desk.open()
        again = desk.propose()
        assert again.config == proposal.config
        proposal = again
    assert desk.study.spent == 1


def test_a_lost_start_is_made_again_after_a_resume(desk: Desk) -> None:
    desk.record(desk.propose())
    proposal = desk.propose()
    desk.record(proposal, retry=True, state="failed", failure_kind="worker_lost")
    desk.open()
    assert desk.propose().config == proposal.config


def test_confirmation_starts_are_not_told(desk: Desk) -> None:
    proposals = desk.run(throughput, at_most=3)
    desk.rows.append(row_of(proposals[1], number=3, purpose="confirm", output_tokens_per_s=1e6))
    before, spent = summary(desk), desk.study.spent
    desk.open()
    assert summary(desk) == before
    assert desk.study.spent == spent


def test_another_space_under_the_same_name_is_rebuilt(desk: Desk) -> None:
    desk.run(throughput, at_most=6)
    desk.experiment = experiment(
        "{max_num_seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128, 256]}, kv_cache_dtype: {choices: [auto, fp8]}}"
    )
    desk.space = Space(desk.experiment)
    desk.open()
    assert len(desk.optuna.trials) == 5
    assert len(desk.run(throughput)) == 18 - 5


def test_results_that_the_store_does_not_know_are_forgotten(desk: Desk) -> None:
    desk.run(throughput, at_most=6)
    del desk.rows[3:]
    desk.open()
    assert {trial.user_attrs["trial"] for trial in desk.optuna.trials} <= {0, 1, 2}


def test_raising_trials_goes_on(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 3}"), journal)
    assert len(desk.run(throughput)) == 3
    desk.experiment = experiment(study="{trials: 5}")
    desk.open()
    assert len(desk.run(throughput)) == 2


def test_a_resumed_random_search_does_not_ask_the_same_again(journal: str) -> None:
    desk = Desk(experiment("{x: {low: 0.0, high: 1.0}}", study="{trials: 9, sampler: random}"), journal)
    desk.run(throughput, at_most=4)
    desk.open()
    desk.run(throughput)
    assert len(desk.rows) == 9
    assert len(desk.optuna.trials) == 8  # the baseline lies outside


# storage


def test_a_torn_last_line_is_cut(desk: Desk) -> None:
    desk.run(throughput, at_most=4)
    before = summary(desk)
    with journal_path(desk).open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","stu')
    desk.open()
    assert summary(desk) == before
    desk.run(throughput, at_most=1)
    assert len(desk.open()._frozen(TrialState.COMPLETE)) >= 4


@pytest.mark.parametrize(
    "garbage", [b"\0" * 50 + b"\n{}\n", b"not a journal\nat all\n", b"[1]\n", b'{"op_code": 99}\n']
)
def test_a_journal_that_cannot_be_read_is_set_aside_and_rebuilt(desk: Desk, garbage: bytes) -> None:
    desk.run(throughput, at_most=4)
    before = told(desk)
    with journal_path(desk).open("ab") as file:
        file.write(garbage)
    desk.open()
    assert told(desk) == before
    assert len(list(journal_path(desk).parent.glob("*.unreadable-*"))) == 1


def test_the_lock_of_a_killed_process_does_not_stop_a_resume(desk: Desk) -> None:
    desk.run(throughput, at_most=2)
    lock = journal_path(desk).with_name("study.log.lock")
    lock.symlink_to("study.log")
    os.utime(lock, (0, time.time() - 60), follow_symlinks=False)
    began = time.monotonic()
    desk.open()
    desk.run(throughput, at_most=1)
    assert time.monotonic() - began < 3


KILLED = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_study import Desk, experiment, throughput
from varcas.records import TrialRow
storage, store = sys.argv[2], Path(sys.argv[3])
made = experiment()
desk = Desk.__new__(Desk)
desk.experiment, desk.storage = made, storage
from varcas.space import Space
desk.space = Space(made)
desk.rows = [TrialRow.model_validate_json(line) for line in store.read_text().splitlines()] if store.exists() else []
desk.open()
print("open", flush=True)
from tests.test_study import row_of
while proposal := desk.study.propose():
    row = row_of(proposal, number=len(desk.rows), **throughput(proposal))
    desk.rows.append(row)
    with store.open("a") as file:
        file.write(row.model_dump_json() + "\\n")
    desk.study.tell(proposal, row)
print("ended", flush=True)
"""


def test_killed_at_any_instant_nothing_that_finished_is_repeated(tmp_path: Path) -> None:
    store, rng = tmp_path / "rows.jsonl", random.Random(0)
    argv = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), f"journal:{tmp_path / 's.log'}", str(store)]
    ended = False
    for _ in range(12):
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(rng.uniform(0.0, 0.06))
        child.send_signal(signal.SIGKILL)
        ended = child.communicate()[0] == "ended\n"
        if ended:
            break
    if not ended:
        assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "open\nended\n"
    hashes = [json.loads(line)["config_hash"] for line in store.read_text().splitlines()]
    assert len(hashes) == len(set(hashes)) == 17


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://me:geheim@host/db", "is no storage. Write journal:PATH"),
        ("study.log", "is no storage"),
        ("journal:", "is no storage"),
        ("journal:/proc/no/study.log", "cannot be used"),
        ("sqlite:////proc/no.db", "cannot be used"),
        ("postgresql://me:geheim@127.0.0.1:1/db", "cannot be used: .*Connection refused"),
        ("postgres://me@127.0.0.1:1/db?password=geheim", "cannot be used"),
        ("postgresql://me:geheim@127.0.0.1:port/db", "is no storage"),
        ("postgresql+nodriver://me:geheim@127.0.0.1/db", "cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Desk(experiment(), url)
    assert str(caught.value).startswith("study.storage: ")
    assert "geheim" not in str(caught.value)


# dashboard


def viewed(desk: Desk, name: str = "t") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=dashboard_view(desk.experiment, desk.rows))


@pytest.fixture
def shown_desk(journal: str) -> Desk:
    """One row of each kind: 0 baseline, 1 measured, 2 misses the SLO, 3 failed, 4 pruned, 5 not believed, 6 stopped."""
    desk = Desk(experiment(slo="{ttft_p95_ms: 100}"), journal)
    desk.record(desk.propose(), output_tokens_per_s=5.0, constraints={"ttft_p95_ms": -0.5}, ttft_p95_ms=50.0)
    desk.record(desk.propose(), output_tokens_per_s=7.0, constraints={"ttft_p95_ms": -0.5}, saturated=False)
    missed = {"constraints": {"ttft_p95_ms": 0.25}, "ttft_p95_ms": 125.0, "slo_met": False}
    desk.record(desk.propose(), output_tokens_per_s=9.0, **missed)
    cause = {"failure_kind": "out_of_memory", "failure_detail": "CUDA out of memory", "failure_hint": "take less"}
    desk.record(desk.propose(), state="failed", **cause, **NOTHING, server_start_s=4.0)
    desk.record(desk.propose(), state="infeasible", reason_rule="vllm_refuses", failure_detail="no fp8", **NOTHING)
    desk.record(desk.propose(), output_tokens_per_s=99.0, valid=False, invalid_reasons=["client too slow"])
    desk.record(desk.propose(), state="stopped", failure_kind="interrupted", **NOTHING)
    return desk


NOTHING = {"output_tokens_per_s": None, "valid": None}


def test_the_dashboard_has_a_value_only_for_what_was_measured(shown_desk: Desk) -> None:
    study = viewed(shown_desk)
    assert [(trial.number, trial.state.name, trial.value) for trial in study.trials] == [
        (0, "COMPLETE", 5), (1, "COMPLETE", 7), (2, "COMPLETE", 9), (3, "FAIL", None), (4, "PRUNED", None),
        (5, "FAIL", None), (6, "FAIL", None),
    ]  # fmt: skip
    outcomes = [trial.user_attrs["outcome"] for trial in study.trials]
    assert outcomes[2:] == ["misses the SLO", "out_of_memory", "vllm_refuses", "not to be believed", "interrupted"]
    marks = [max(trial.system_attrs["constraints"], default=0.0) > 0 for trial in study.trials]
    assert marks == [False, False, True, False, False, False, False]
    assert study._storage.get_best_trial(study._study_id).number == 1
    assert study.metric_names == ["output_tokens_per_s"]
    assert study.user_attrs["slo"] == "ttft_p95_ms <= 100"


def test_the_dashboard_has_what_a_row_says_in_readable_order(shown_desk: Desk) -> None:
    trials = viewed(shown_desk).trials
    assert list(trials[3].user_attrs) == [
        "outcome", "failure_detail", "hint", "server_start_s", "log", "command", "config"
    ]  # fmt: skip
    assert list(trials[0].user_attrs)[:3] == ["outcome", "output_tokens_per_s", "ttft_p95_ms"]
    assert trials[1].user_attrs["saturated"] is False
    assert trials[3].duration == datetime.timedelta(seconds=4)
    assert [trial.params["max_num_seqs"] for trial in trials[1:]] == [
        json.loads(row.flags["max_num_seqs"]) for row in shown_desk.rows[1:]
    ]


def test_the_dashboard_notes_why_and_what_to_do(shown_desk: Desk) -> None:
    study = viewed(shown_desk)
    notes = [optuna_dashboard.get_note(optuna.trial.Trial(study, trial._trial_id)) for trial in study.trials]
    for said in (
        "out_of_memory",
        "CUDA out of memory",
        "take less",
        "[/logs/3.log](/log/3)",
        shown_desk.rows[3].command,
    ):
        assert str(said) in notes[3]
    assert "ttft_p95_ms is 125, the limit 100" in notes[2]
    assert "client too slow" in notes[5]


def test_numbers_on_the_dashboard_are_those_of_the_rows(desk: Desk) -> None:
    proposals = desk.run(throughput, at_most=3)
    desk.rows.append(row_of(proposals[1], number=3, purpose="confirm", arm="candidate", output_tokens_per_s=8.0))
    desk.rows.append(row_of(proposals[0], number=4, purpose="confirm", arm="baseline", output_tokens_per_s=6.0))
    desk.rows.append(row_of(proposals[2], number=6, output_tokens_per_s=4.0))  # the same configuration again
    trials = viewed(desk).trials
    assert [trial.state.name for trial in trials] == [*["COMPLETE"] * 3, "PRUNED", "PRUNED", "WAITING", "COMPLETE"]
    assert trials[6].params == trials[2].params
    assert (trials[6].value, trials[2].value) == (4, desk.rows[2].output_tokens_per_s)
    confirmed = viewed(desk, "t (confirmation)").trials
    assert [(t.user_attrs["trial"], t.params["arm"], t.value) for t in confirmed] == [
        (3, "candidate", 8), (4, "baseline", 6)
    ]  # fmt: skip


def test_a_baseline_outside_of_the_space_has_parameters_on_the_dashboard(desk: Desk) -> None:
    desk.run(throughput, at_most=3)
    trials = viewed(desk).trials
    assert desk.rows[0].flags.keys() == {"dtype"}
    assert trials[0].params == {"max_num_seqs": "none", "kv_cache_dtype": "none"}
    assert all(trial.distributions == trials[0].distributions for trial in trials)


def test_the_dashboard_of_an_empty_study_and_of_a_mixed_space(journal: str) -> None:
    desk = Desk(experiment(MIXED), journal)
    assert viewed(desk).trials == []
    desk.run(throughput, at_most=12)
    assert [trial.value for trial in viewed(desk).trials] == [row.output_tokens_per_s for row in desk.rows]


def test_the_dashboard_serves_rows_that_arrive_and_logs(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("varcas.study.REFRESH_S", 0.0)
    desk.record(desk.propose())
    with dashboard_server(desk.experiment, lambda: list(desk.rows), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert len(fetched(f"{url}/api/studies/0")["trials"]) == 1
        (tmp_path / "1.log").write_text("what the server said")
        desk.record(desk.propose(), log_path=str(tmp_path / "1.log"))
        shown = fetched(f"{url}/api/studies/0")
        assert shown["objective_names"] == ["output_tokens_per_s"]
        assert [trial["number"] for trial in shown["trials"]] == [0, 1]
        with urllib.request.urlopen(f"{url}/log/1", timeout=5) as response:
            assert response.read() == b"what the server said"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/log/0", timeout=5)
        server.shutdown()
    assert capfd.readouterr() == ("", "")


def test_the_dashboard_has_logs_reports_and_scripts_as_artifacts(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "0.log").write_text("what the server said")
    (tmp_path / "report.html").write_text("<h1>the report</h1>")
    (tmp_path / "start_vllm.sh").write_text("#!/bin/sh")
    desk.record(desk.propose(), log_path=str(tmp_path / "0.log"))
    desk.record(desk.propose(), log_path=str(tmp_path / "gone.log"))
    beside = Beside("**better**", (tmp_path / "report.html", tmp_path / "start_vllm.sh", tmp_path / "gone"))
    with dashboard_server(desk.experiment, lambda: list(desk.rows), 0, lambda: beside) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        study = fetched(f"{url}/api/studies/0")
        assert study["note"]["body"] == "**better**"
        held = {meta["filename"]: meta for meta in study["artifacts"]}
        assert set(held) == {"report.html", "start_vllm.sh"}
        assert held["report.html"]["mimetype"] == "text/html"
        with urllib.request.urlopen(f"{url}/artifacts/0/{held['report.html']['artifact_id']}", timeout=5) as response:
            assert response.read() == b"<h1>the report</h1>"
        logs = [trial["artifacts"] for trial in study["trials"]]
        assert [[meta["filename"] for meta in some] for some in logs] == [["0.log"], []]
        with urllib.request.urlopen(f"{url}/artifacts/0/0/{logs[0][0]['artifact_id']}", timeout=5) as response:
            assert response.read() == b"what the server said"
            assert response.headers["Content-Type"].startswith("text/plain")
        server.shutdown()
    assert (tmp_path / "0.log").read_text() == "what the server said"


def test_a_note_has_the_metrics_and_holds_strangers_text(desk: Desk) -> None:
    evil = "```\n<img src=x onerror=alert(1)>\n````"
    desk.record(desk.propose(), output_tokens_per_s=5.25, ttft_p50_ms=40.0)
    failed = {"state": "failed", "failure_kind": "out_of_memory", "failure_detail": evil, "failure_hint": "<b>less</b>"}
    desk.record(desk.propose(), **failed, **NOTHING)
    study = viewed(desk)
    notes = [optuna_dashboard.get_note(optuna.trial.Trial(study, trial._trial_id)) for trial in study.trials]
    assert "| output_tokens_per_s | 5.25 |" in notes[0]
    assert "| ttft_p50_ms | 40.0 |" in notes[0]
    assert f"`````\n{evil}\n`````" in notes[1]
    assert "&lt;b&gt;less&lt;/b&gt;" in notes[1]


def test_ctrl_c_ends_the_dashboard_without_a_word(shown_desk: Desk, tmp_path: Path) -> None:
    with Store(tmp_path / "results") as store:
        for row in shown_desk.rows:
            store.append(row)
        store.save_study("t", {"fingerprint": {}, "experiment": json.loads(shown_desk.experiment.model_dump_json())})
    port = free_port()
    argv = [sys.executable, "-m", "varcas", "dashboard", "--results", str(tmp_path / "results"), "--port", str(port)]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline().startswith("report: ")
    said = child.stderr.readline()
    assert said == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    assert len(fetched(f"http://127.0.0.1:{port}/api/studies/0")["trials"]) == 7
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=20)[1] == ""
    assert child.returncode == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as response:
        return json.load(response)


def test_config_of_a_row_is_that_of_its_proposal(desk: Desk) -> None:
    proposal = desk.propose()
    row = desk.record(proposal)
    assert ServingConfig("m", None, json.loads(row.config_json)).hash == row.config_hash


# surrogate, grid, live, warm


def test_grid_goes_through_the_space_in_order(journal: str) -> None:
    space = "{a: {choices: [1, 2]}, b: {choices: [x, y, z]}}"
    desk = Desk(experiment(space, study="{trials: 20, sampler: grid}"), journal)
    order = [dict(proposal.params) for proposal in desk.run(lambda p: {"output_tokens_per_s": 1.0})]
    assert order[1:] == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y", "z")]
    assert desk.study.ended == "space exhausted"


def test_a_grid_of_a_continuous_space_is_refused(journal: str) -> None:
    with pytest.raises(InputError, match="'grid': the space is continuous"):
        Desk(experiment("{x: {low: 0.0, high: 1.0}}", study="{sampler: grid}"), journal)


BATCHES = "{seqs: {choices: [1, 2, 4, 8, 16, 32, 64, 128]}, kv: {choices: [a, b, c]}, x: {choices: [1, 2]}}"


def batches(proposal: Proposal) -> dict[str, Any]:
    if proposal.config.flags.get("kv") == "b":
        return {"state": "failed", "failure_kind": "out_of_memory", "valid": None}
    seqs = float(proposal.config.flags.get("seqs", 1))
    return {"output_tokens_per_s": 1000 / (1 + 8 / seqs) * {64: 0.93, 128: 0.85}.get(int(seqs), 1.0)}


@pytest.mark.parametrize("sampler", ["auto", "gp"])
def test_the_surrogate_finds_the_best_batch_and_leaves_a_failing_region(sampler: str, journal: str) -> None:
    desk = Desk(experiment(BATCHES, study=f"{{trials: 14, sampler: {sampler}}}"), journal)
    done = desk.run(batches)
    rates = [batches(proposal).get("output_tokens_per_s", 0.0) for proposal in done]
    assert max(rates) >= 0.97 * 1000 / 1.125 * 0.93
    assert sum(rate == 0.0 for rate in rates) <= 3


def test_a_search_may_end_by_itself(journal: str) -> None:
    desk = Desk(experiment(BATCHES, study="{trials: 40, sampler: gp, stop: auto}"), journal)
    done = desk.run(batches)
    assert len(done) < 40
    assert desk.study.ended is not None
    assert "below 0.5 of the noise between starts" in desk.study.ended


def test_what_rides_along_costs_no_start_and_what_is_given_up_comes_again(journal: str) -> None:
    desk = Desk(experiment(BATCHES, study="{trials: 6, sampler: gp}"), journal)
    desk.record(desk.propose())
    first = desk.propose()
    rides = desk.study.alongside(first, {"seqs": (1, 2, 4, 8, 16, 32, 64, 128)}, 3)
    assert len({ride.config.hash for ride in (first, *rides)}) == 4
    assert {ride.params["kv"] for ride in rides} == {first.params["kv"]}
    for ride in (first, *rides[:2]):
        desk.record(ride, server_id="one", measured_live=ride is not first, params_json=json.dumps(ride.params),
                    config_json=json.dumps({"other": ride.params["seqs"]}) if ride is not first else "{}")  # fmt: skip
    desk.study.give_up(rides[2])
    assert desk.study.spent == 2
    assert desk.study.answered(rides[0].config.hash) is not None
    assert desk.study.answered(rides[2].config.hash) is None
    before = desk.study.spent
    desk.open()
    assert desk.study.spent == before
    assert desk.study.answered(rides[0].config.hash) is not None


def test_a_copy_from_another_study_answers_and_costs_nothing(journal: str) -> None:
    desk = Desk(experiment(BATCHES, study="{trials: 2, sampler: gp}"), journal)
    params = {"seqs": 8, "kv": "a", "x": 1}
    config = desk.space.config(params)
    proposal = Proposal(None, params, dict(params), config, "search")
    desk.rows.append(row_of(proposal, number=0, warm_from="other/3"))
    desk.open()
    assert desk.study.spent == 0
    assert desk.study.answered(config.hash) is not None
    assert config.hash not in {proposal.config.hash for proposal in desk.run(batches)}


def test_a_load_that_was_ended_early_is_an_answer(journal: str) -> None:
    desk = Desk(experiment(study="{trials: 6}", slo="{ttft_p95_ms: 100}"), journal)
    baseline = desk.propose()
    desk.record(baseline, constraints={"ttft_p95_ms": -0.5})
    lost = desk.propose()
    desk.record(lost, state="stopped", valid=False, stopped_early="lost", slo_met=False,
                constraints={"ttft_p95_ms": 0.04}, output_tokens_per_s=5.0)  # fmt: skip
    assert desk.study.answered(lost.config.hash) is not None
    assert desk.study.spent == 2
    trial = next(t for t in desk.optuna.trials if t.number == lost.number)
    assert (trial.state.name, trial.constraints["ttft_p95_ms"]) == ("COMPLETE", 0.04)
    assert lost.config.hash not in {proposal.config.hash for proposal in desk.run(throughput)}
