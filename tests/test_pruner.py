from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sweep_work import T4_FACTS
from tests.test_study import row_of
from varcas.engine.failures import HINTS
from varcas.errors import InputError
from varcas.experiment import Experiment, parse_experiment
from varcas.pruner import FAILURE_KINDS, Pruner, audit_draw, failure_kind, gpu_at_best, reason_columns, site_of
from varcas.records import TrialRow
from varcas.rules import RULES
from varcas.space import ServingConfig, Space
from varcas.study import MAX_FRUITLESS, Proposal, Study, open_study
from varcas.validate import Validated, validate, validated_text

FP8 = {"max_num_seqs": 2, "kv_cache_dtype": "fp8"}


def experiment(space: str, study: str = "{trials: 1000}", *, model: str = "m", **keys: str) -> Experiment:
    extra = "\n".join(f"{key}: {text}" for key, text in keys.items())
    workload = keys.get("workload") or "{profile: chat-short, rate_rps: 2, duration_s: 20}"
    extra = "\n".join(f"{key}: {text}" for key, text in keys.items() if key != "workload")
    return parse_experiment(f"name: t\nmodel: {model}\nworkload: {workload}\nspace: {space}\nstudy: {study}\n{extra}\n")


def pruner_of(made: Experiment, rows: list[TrialRow] | None = None) -> Pruner:
    site = site_of(made, T4_FACTS, gpu_at_best("T4", T4_FACTS), gpus_per_node=1)
    return Pruner(made, Space(made), site, rows or [])


class Desk:
    """A study with rules, its rows, and what stands for the server."""

    def __init__(self, made: Experiment, storage: str) -> None:
        self.experiment, self.storage = made, storage
        self.rows: list[TrialRow] = []
        self.open()

    def open(self) -> None:
        self.pruner = pruner_of(self.experiment, self.rows)
        self.study: Study = open_study(
            self.experiment, Space(self.experiment), self.storage, past=self.rows, pruner=self.pruner
        )

    def run(self) -> list[Proposal]:
        """Starts all that is not ruled out."""
        started = []
        while proposal := self.study.propose():
            refusal = self.pruner.verdict(proposal.config)
            if refusal is None:
                started.append(proposal)
            columns: dict[str, Any] = {} if refusal is None else {"state": "infeasible", **reason_columns(refusal)}
            row = row_of(proposal, number=len(self.rows), **columns)
            self.rows.append(row)
            self.pruner.heard(row)
            self.study.tell(proposal, row)
        return started


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'study.log'}"


# audits


@given(seed=st.integers(0, 2**63), text=st.text(), number=st.integers())
def test_what_is_audited_is_decided_by_seed_and_configuration_alone(seed: int, text: str, number: int) -> None:
    one = ServingConfig("m", None, {"kv_cache_dtype": text, "max_num_seqs": number})
    same = ServingConfig("other", "r", {"max_num_seqs": number, "kv_cache_dtype": text, "dtype": None})
    assert 0 <= audit_draw(seed, one.hash) == audit_draw(seed, same.hash) < 1
    assert audit_draw(seed, one.hash) != audit_draw(seed + 1, one.hash)


@pytest.mark.parametrize("frac", [0, 0.03, 0.5, 1])
def test_a_larger_share_holds_the_smaller_one(frac: float) -> None:
    configs = [ServingConfig("m", None, {"x": i}) for i in range(200)]
    small, large = (
        pruner_of(experiment("{x: {choices: [1]}}", f"{{seed: 7, audit_frac: {share}}}"))
        for share in (frac, min(1, frac + 0.1))
    )
    assert all(large.audited(config) for config in configs if small.audited(config))
    assert sum(small.audited(config) for config in configs) == {0: 0, 1: 200}.get(
        frac, pytest.approx(200 * frac, abs=20)
    )


HASHES = [ServingConfig("m", None, {"x": i}).hash for i in range(4000)]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**63))
def test_the_share_of_audits_is_as_asked(seed: int) -> None:
    for frac in (0.03, 0.5):
        found = sum(audit_draw(seed, key) < frac for key in HASHES)
        assert abs(found - len(HASHES) * frac) < 6 * math.sqrt(len(HASHES) * frac * (1 - frac))


@pytest.mark.parametrize(
    ("frac", "trials", "most"), [(0.03, 30, 1), (0.03, 100, 3), (0.07, 100, 7), (1, 9, 9), (0, 9, 0)]
)
def test_audits_cost_their_share_of_the_trials_at_most(frac: float, trials: int, most: int) -> None:
    pruner = pruner_of(experiment(ALL_SEQS, f"{{trials: {trials}, audit_frac: {frac}, seed: 3}}"))
    taken = []
    while found := pruner.next_audit():
        taken.append(found[0].hash)
    assert len(taken) == len(set(taken)) == most == pruner.max_audits


ALL_SEQS = "{max_num_seqs: {low: 1, high: 256}, kv_cache_dtype: {choices: [auto, fp8]}}"


def test_a_lost_audit_is_made_again_and_a_finished_one_is_not() -> None:
    made = experiment(ALL_SEQS, "{trials: 30, audit_frac: 0.03, max_retries: 1}")
    pruner = pruner_of(made)
    config, params = pruner.next_audit() or pytest.fail("none")
    audit = Proposal(None, params, {}, config, "audit")
    rows = [row_of(audit, state="failed", failure_kind="worker_lost")]
    pruner.heard(rows[0])
    again = pruner.next_audit()
    assert again is not None
    assert again[0].hash == config.hash
    assert pruner_of(made, rows).next_audit() == again  # a resume picks the same
    rows.append(row_of(audit, state="failed", failure_kind="unsupported_by_gpu"))
    assert pruner_of(made, rows).next_audit() is None
    lost_twice = [rows[0], row_of(audit, state="failed", failure_kind="worker_lost")]
    other = pruner_of(made, lost_twice).next_audit()
    assert other is not None
    assert other[0].hash != config.hash


def test_in_a_space_too_large_to_list_what_was_proposed_is_audited(journal: str) -> None:
    space = "{gpu_memory_utilization: {low: 0.5, high: 0.9}, kv_cache_dtype: {choices: [auto, fp8]}}"
    desk = Desk(experiment(space, "{trials: 20, audit_frac: 1}"), journal)
    started = desk.run()
    assert len(started) == 20
    pruned = {row.config_hash for row in desk.rows if row.state == "infeasible"}
    assert pruned
    found = desk.pruner.next_audit()
    assert found is not None
    assert found[0].hash in pruned


# what is ruled out


def test_a_mostly_ruled_out_space_is_searched_to_its_end(journal: str) -> None:
    types = ", ".join(["auto", *(f"fp8{mark}" for mark in ("", "_e4m3", "_e5m2", "_per_token_head")), "bfloat16"])
    space = (
        f"{{max_num_seqs: {{low: 1, high: 1000}}, kv_cache_dtype: {{choices: [{types}]}}, "
        "max_num_batched_tokens: {choices: [2, 3]}}"
    )
    desk = Desk(experiment(space), journal)
    survey = desk.pruner.survey()
    assert survey is not None
    assert (survey.size, len(survey.left)) == (12_000, 5)
    started = desk.run()
    assert len(started) == 1 + 5
    assert desk.study.ended == "space exhausted"
    assert len(desk.rows) < MAX_FRUITLESS


def test_a_continuous_space_that_is_nearly_all_ruled_out_is_still_searched(journal: str) -> None:
    space = (
        "{max_num_batched_tokens: {low: 1, high: 1000000}, max_num_seqs: {low: 250000, high: 10000000}, "
        "x: {low: 0.0, high: 1.0}}"  # 1 of 35 has no fewer tokens than sequences
    )
    desk = Desk(experiment(space, "{trials: 30}"), journal)
    started = desk.run()
    assert (len(started), desk.study.ended) == (30, "budget spent")
    assert sum(row.state == "infeasible" for row in desk.rows) < MAX_FRUITLESS


@pytest.mark.parametrize(("space", "state"), [("{choices: [1, 2, 3]}", "FAIL"), ("{low: 0.0, high: 1.0}", "COMPLETE")])
def test_the_sampler_learns_what_is_ruled_out_only_where_it_is_not_known_before(
    journal: str, space: str, state: str
) -> None:
    asked = "{trials: 6, enqueue: [{x: 1, kv_cache_dtype: fp8}, {x: 0.5, kv_cache_dtype: fp8}]}"
    desk = Desk(experiment(f"{{x: {space}, kv_cache_dtype: {{choices: [auto, fp8]}}}}", asked), journal)
    desk.run()
    pruned = {row.number for row in desk.rows if row.state == "infeasible"}
    trials = [trial for trial in desk.study._optuna.trials if trial.user_attrs.get("trial") in pruned]
    assert {trial.state.name for trial in trials} == {state}
    assert all(bool(trial.constraints) is (state == "COMPLETE") for trial in trials)


def test_without_pruning_nothing_is_ruled_out_and_pruned_rows_are_open_again(journal: str) -> None:
    made = experiment("{max_num_seqs: {choices: [2]}, kv_cache_dtype: {choices: [auto, fp8]}}")
    desk = Desk(made.model_copy(update={"study": made.study.model_copy(update={"enqueue": [FP8]})}), journal)
    assert len(desk.run()) == 2
    assert [row.state for row in desk.rows].count("infeasible") == 1
    desk.study.close()
    off = desk.experiment.study.model_copy(update={"prune": False})
    desk.experiment = desk.experiment.model_copy(update={"study": off})
    desk.open()
    assert [proposal.flags for proposal in desk.run()] == [{"kv_cache_dtype": "fp8", "max_num_seqs": 2}]
    assert (desk.pruner.max_audits, desk.pruner.disabled) == (0, {})


def test_a_row_of_another_version_that_works_counts_too() -> None:
    """Not only an audit proves a rule wrong."""
    made = experiment("{max_num_seqs: {choices: [2]}, kv_cache_dtype: {choices: [auto, fp8]}}")
    proposal = Proposal(0, {}, {}, ServingConfig("m", None, FP8), "search")
    assert pruner_of(made, [row_of(proposal)]).disabled.keys() == {"cache_type_without_units"}
    assert not pruner_of(made, [row_of(proposal, state="failed", failure_kind="hung")]).disabled


@pytest.mark.parametrize(("excess", "wrong"), [(-0.1, True), (0.0, True), (3.0, False)])
def test_an_slo_rule_is_wrong_when_the_limit_is_met_and_not_when_the_server_only_runs(
    excess: float, wrong: bool
) -> None:
    made = experiment("{max_num_seqs: {choices: [2, 4]}}", slo="{tpot_p50_ms: 1, ttft_p50_ms: 1000000}")
    config = Space(made).config({"max_num_seqs": 2})
    refusal = pruner_of(made).verdict(config)
    assert refusal is not None
    assert (refusal.rule, failure_kind(refusal.rule)) == ("slo_tpot", "slo_out_of_reach")
    row = row_of(Proposal(0, {}, {}, config, "audit"), constraints={"tpot_p50_ms": excess, "ttft_p50_ms": -1.0})
    assert bool(pruner_of(made, [row]).disabled) is wrong
    assert not pruner_of(made, [row.model_copy(update={"valid": False})]).disabled


def test_every_rule_has_a_kind_of_failure_with_a_hint() -> None:
    hard = {rule.name for rule in RULES if rule.kind == "hard"}
    assert set(FAILURE_KINDS) <= hard
    assert {failure_kind(name) for name in hard} <= set(HINTS)
    assert {name for name in hard if name.startswith("slo_")} == {
        name for name, kind in FAILURE_KINDS.items() if kind == "slo_out_of_reach"
    }


def test_a_space_ruled_out_whole_names_the_memory_that_would_do() -> None:
    big = T4_FACTS.model_config.replace('"num_hidden_layers": 32', '"num_hidden_layers": 320')  # type: ignore[union-attr]
    made = experiment("{max_num_seqs: {choices: [2, 4]}}", serve="{max_model_len: 2048}")
    facts = T4_FACTS.__class__(**{name: getattr(T4_FACTS, name) for name in T4_FACTS.__slots__} | {"model_config": big})
    pruner = Pruner(made, Space(made), site_of(made, facts, gpu_at_best("T4", facts)))
    text = pruner.nothing_left()
    assert text is not None
    assert text.startswith("the rules rule out all 2 configurations of the space: 2 by weights_beyond_memory, for")
    needed = float(text.split("a GPU with ")[1].split(" GiB")[0])
    assert 30 < needed < 60


def test_a_space_that_the_rate_alone_rules_out_names_the_rate_that_would_do() -> None:
    def made(rate_rps: float) -> Experiment:
        workload = f"{{profile: chat-medium, rate_rps: {rate_rps}, duration_s: 60}}"
        return experiment("{max_num_seqs: {choices: [2, 4]}}", slo="{ttft_p95_ms: 1500}", workload=workload)

    text = pruner_of(made(60)).nothing_left()
    assert text is not None
    assert " on a T4 with " in text
    rate = float(text.split("or a rate of ")[1].split(" requests/s (now 60)")[0])
    assert 5 < rate < 60
    assert pruner_of(made(0.9 * rate)).nothing_left() is None
    assert pruner_of(made(1.1 * rate)).nothing_left() is not None


def test_what_the_validator_refuses_costs_no_audit_and_rules_take_turns() -> None:
    types = "kv_cache_dtype: {choices: [auto, fp8]}, dtype: {choices: [auto, bfloat16]}"
    space = f"{{max_num_seqs: {{low: 1, high: 64}}, {types}}}"
    pruner = pruner_of(experiment(space, "{trials: 2, audit_frac: 1}"))
    survey = pruner.survey()
    assert survey is not None
    assert {audit.rule for audit in survey.audits[:2]} == set(survey.by_rule)
    config, params = pruner.next_audit() or pytest.fail("none")
    left = pruner.audits_left
    pruner.heard(row_of(Proposal(None, params, {}, config, "audit"), state="infeasible", reason_rule="vllm_refuses"))
    assert pruner.audits_left == left


def test_a_baseline_that_may_work_is_started_though_its_space_is_ruled_out() -> None:
    made = experiment("{kv_cache_dtype: {choices: [fp8]}}", baseline="{kv_cache_dtype: auto}")
    assert pruner_of(made).nothing_left() is None


# what the rules know


@pytest.mark.parametrize(
    ("space", "serve", "drawn_for"),
    [
        ("{max_num_seqs: {choices: [1]}}", "{max_model_len: 2048}", None),  # no conversation is cut
        ("{max_num_seqs: {choices: [1]}}", "{max_model_len: 64}", None),  # all are cut alike
        ("{max_model_len: {choices: [64, 2048]}}", "{}", 0),  # no configuration has 0: the SLO rules are silent
        ("{max_model_len: {choices: [1024, 2048]}}", "{}", None),
    ],
)
def test_lengths_are_the_windows_own_where_all_servers_get_the_same(
    space: str, serve: str, drawn_for: int | None
) -> None:
    site = site_of(experiment(space, slo="{ttft_p50_ms: 1}", serve=serve), T4_FACTS, None)
    assert site.drawn_for == drawn_for
    assert len(site.prompt_tokens) == len(site.output_tokens) > 10
    longest = max(p + o for p, o in zip(site.prompt_tokens, site.output_tokens, strict=True))
    assert (longest <= 64) is ("64}" in serve)


@pytest.mark.parametrize(
    "workload",
    [
        "{profile: chat-short, arrival: {kind: closed, users: 3}, duration_s: 20}",
        "{profile: multi-turn, rate_rps: 2, duration_s: 20}",
    ],
)
def test_where_the_server_decides_who_asks_the_shortest_bounds_them_all(workload: str) -> None:
    site = site_of(experiment("{x: {choices: [1]}}", slo="{ttft_p50_ms: 1}", workload=workload), T4_FACTS, None)
    assert (len(site.prompt_tokens), len(site.output_tokens), site.shared_tokens) == (1, 1, 0)


def test_what_is_not_described_silences_the_rules_that_need_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    made = experiment("{x: {choices: [1]}}", model=str(tmp_path))
    site = site_of(made, None, gpu_at_best("auto", None))
    assert (site.model, site.gpu, site.engine_version) == (None, None, None)
    assert Pruner(made, Space(made), site).nothing_left() is None
    best = gpu_at_best("A100", None)
    assert best is not None
    assert best.memory_bytes == 80 * 2**30


@pytest.mark.parametrize("text", ["{audit_frac: 1.5}", "{audit_frac: -0.1}"])
def test_a_share_beyond_all_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"study\.audit_frac: .*must be at (most 1|least 0)"):
        experiment("{x: {choices: [1]}}", text)


# validate


WITHOUT_VLLM = "{python: /usr/bin/env}"


def checked(tmp_path: Path, space: str, **keys: str) -> Validated:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(str(T4_FACTS.model_config))
    made = experiment(space, model=str(model), hardware="{gpu: T4}", server=WITHOUT_VLLM, **keys)
    return validate(made)


def test_validate_names_what_a_sweep_would_not_start(tmp_path: Path) -> None:
    serve = "{max_model_len: 2048, gpu_memory_utilization: 0.9}"
    answer = checked(tmp_path, "{max_num_seqs: {choices: [2, 4]}, tensor_parallel_size: {choices: [1]}}", serve=serve)
    assert (answer.ruled_out, answer.nothing_left) == ([], None)
    answer = checked(tmp_path, "{tensor_parallel_size: {choices: [1, 2]}}", serve="{max_model_len: 2048}")
    assert [(out.rule, out.configurations) for out in answer.ruled_out] == [("too_few_gpus", 1)]
    assert "Ruled out before any start: 1 by too_few_gpus, for one: 2 GPUs" in validated_text(answer)


def test_validate_says_when_a_sweep_would_start_nothing(tmp_path: Path) -> None:
    answer = checked(tmp_path, "{max_num_seqs: {choices: [2, 4]}}", slo="{ttft_p50_ms: 0.01}")
    assert answer.nothing_left is not None
    assert "Nothing would be started: the rules rule out all 2 configurations" in validated_text(answer)
    assert "ttft_p50_ms of " in answer.nothing_left
    assert any("says that it cannot work" in note for note in answer.notes)
