"""The driver on a real Ray and a real store, with trials that need no server."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import sweep_work
from tests.sweep_work import outcome
from varcas.budget import Budget
from varcas.errors import InputError, VarcasError
from varcas.experiment import Experiment, Hardware, parse_experiment
from varcas.inprocess import InProcessPool
from varcas.pool import Pool
from varcas.results import Results, trial_text
from varcas.starts import Event, outcome_columns
from varcas.sweeper import sweep

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One local Ray with two GPUs that are none, which every sweep here joins."""
    with Pool(Hardware(), num_gpus=2, num_cpus=4):
        yield


def experiment(tmp_path: Path, extra: str = "", study: str = "{trials: 9, repeats: 3}") -> Experiment:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    text = (
        f"name: t\nmodel: {model}\nworkload: {{profile: chat-short, rate_rps: 1, duration_s: 2}}\n"
        f"study: {study}\nresults: {tmp_path / 'results'}\n{extra}"
    )
    return parse_experiment(text)


SPACE = "space: {max_num_seqs: {choices: [2, 3, 4, 16]}}\n"
TWO_GPUS = "hardware: {count: 2}\n"


def run(of: Experiment, **options: Any) -> Any:
    """A sweep in this process, but for the tests that are of processes: they say `pool=None`, which is Ray."""
    fixed = {"run": sweep_work.by_seqs, "node": sweep_work.EasyNode, "pool": InProcessPool}
    return sweep(of, **fixed | options)


def test_two_gpus_confirm_side_by_side(tmp_path: Path) -> None:
    answer = run(experiment(tmp_path, SPACE + TWO_GPUS), pool=None)
    assert answer.verdict == "better"
    assert answer.deploy == {"max_num_seqs": 4}
    assert answer.winner.values == [140.0] * 3
    rows = Results(tmp_path / "results").trials()
    assert len({row.trial_id for row in rows}) == len(rows)
    assert {row.number for row in rows} == set(range(len(rows)))
    kinds = {
        row.params_json: (row.state, row.reason_rule or row.failure_kind) for row in rows if row.purpose == "search"
    }
    assert kinds['{"max_num_seqs": 3}'] == ("infeasible", "vllm_refuses")
    assert kinds['{"max_num_seqs": 16}'] == ("failed", "out_of_memory")
    for row in rows:
        if row.resolved_json:
            assert f'"--max-num-seqs", "{row.flags.get("max_num_seqs")}"' in row.resolved_json or not row.flags


def test_a_configuration_reserves_its_gpus_and_one_that_needs_more_is_told_so(tmp_path: Path) -> None:
    space = "space: {tensor_parallel_size: {choices: [1, 2, 4]}}\n"
    answer = run(experiment(tmp_path, space + TWO_GPUS, "{trials: 9, repeats: 0}"), pool=None)
    rows = {row.params_json: row for row in Results(tmp_path / "results").trials() if row.purpose == "search"}
    assert rows['{"tensor_parallel_size": 2}'].gpu_count == 2
    assert rows['{"tensor_parallel_size": 4}'].reason_rule == "too_few_gpus"
    assert answer.counts["infeasible"] == 1


def test_a_budget_ends_a_sweep_in_its_confirmation_too(tmp_path: Path) -> None:
    run(experiment(tmp_path, SPACE, "{trials: 9, repeats: 0}"))
    began_s = time.monotonic()
    answer = run(experiment(tmp_path, SPACE), budget=Budget(wall_s=1.0))
    assert time.monotonic() - began_s < 60
    assert answer.verdict == "unconfirmed"
    assert "budget" in answer.ended


def test_a_load_that_ended_before_its_window_is_a_row_without_metrics(tmp_path: Path) -> None:
    answer = run(experiment(tmp_path, SPACE, "{trials: 1, repeats: 0}"), run=sweep_work.ends_before_its_window)
    assert answer.verdict == "no_answer"
    row = Results(tmp_path / "results").trials()[0]
    assert (row.state, row.failure_kind, row.output_tokens_per_s) == ("failed", "crashed_under_load", None)


def test_a_baseline_that_no_flag_can_mend_ends_the_sweep_and_is_tried_again(tmp_path: Path) -> None:
    of = experiment(tmp_path, SPACE)
    with pytest.raises(
        VarcasError, match=r"trial 0 \(baseline\): bad_model_files: no weights found.*load_format: dummy"
    ):
        run(of, run=sweep_work.lacks_files)
    assert [row.failure_kind for row in Results(tmp_path / "results").trials()] == ["bad_model_files"]
    answer = run(of)
    assert answer.verdict == "better"
    assert answer.baseline.values == [110.0] * 3


def test_a_sampler_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"study\.sampler: 'tpee' is unknown\. Did you mean tpe\?"):
        run(experiment(tmp_path, SPACE, "{trials: 9, sampler: tpee}"))
    assert not (tmp_path / "results").exists()


def test_what_a_node_raises_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(VarcasError) as caught:
        run(experiment(tmp_path, SPACE + "server: {env: {BROKEN: '1'}}\n"))
    assert str(caught.value) == "model: model_download: no network. Fix: check it."


def test_a_profile_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    of = experiment(tmp_path, SPACE)
    of = of.model_copy(update={"workload": of.workload.model_copy(update={"profile": "chat-medum"})})
    with pytest.raises(InputError, match="Did you mean chat-medium"):
        run(of)
    assert not (tmp_path / "results").exists()


def test_stopping_keeps_what_is_measured_and_says_interrupted(tmp_path: Path) -> None:
    stopping, seen = threading.Event(), []

    def on_event(event: Event) -> None:
        if event.row:
            seen.append(event.row)
            stopping.set()

    with pytest.raises(KeyboardInterrupt):
        run(experiment(tmp_path, SPACE), on_event=on_event, stopping=stopping, pool=None)
    kept = Results(tmp_path / "results").trials()
    assert [row.trial_id for row in kept][: len(seen)] == [row.trial_id for row in seen]
    assert run(experiment(tmp_path, SPACE)).verdict == "better"
    assert {row.trial_id for row in kept} <= {row.trial_id for row in Results(tmp_path / "results").trials()}


def test_an_interrupted_load_is_not_to_be_believed(tmp_path: Path) -> None:
    cut = outcome(5, state="stopped", failure_kind="interrupted", failure_detail="asked to stop")
    assert cut.load is not None
    cut = replace(cut, load=replace(cut.load, duration_s=0.4))
    columns = outcome_columns(cut, experiment(tmp_path, SPACE))
    assert (columns["valid"], columns["invalid_reasons"]) == (False, ["interrupted after 0.4 of 2 s"])


def test_a_finished_study_has_nothing_left_to_run(tmp_path: Path) -> None:
    plans: list[Any] = []
    for _ in range(2):
        of = experiment(tmp_path, SPACE + "server: {env: {A: x y}}\n")
        run(of, on_event=lambda event: plans.append(event.plan) if event.plan else None)
    assert [(plan.search_left, plan.confirm_starts) for plan in plans] == [(5, 6), (0, 0)]
    results = Results(tmp_path / "results")
    assert results.recommend().ended == "space exhausted"
    command = results.trials()[0].command
    assert command is not None
    assert command.startswith(f"A='x y' {sys.executable} -m vllm")
    assert f"--model {tmp_path / 'model'}" in command


def test_a_name_conflict_says_only_what_differs(tmp_path: Path) -> None:
    of = experiment(tmp_path, SPACE, "{trials: 1, repeats: 0}")
    run(of)
    other = of.model_copy(update={"workload": of.workload.model_copy(update={"rate_rps": 5.0})})
    with pytest.raises(InputError, match=r"another workload \(rate_rps 1.0 -> 5.0\): their rows"):
        run(other)


FP8 = "space: {max_num_seqs: {choices: [2, 4]}, kv_cache_dtype: {choices: [auto, fp8]}}\n"
RULE = "cache_type_without_units"


def on_t4(of: Experiment, **options: Any) -> tuple[Any, list[Event]]:
    """A sweep on what the rules take for a T4, and what it said on the way."""
    events: list[Event] = []
    answer = run(of, node=sweep_work.T4Node, on_event=events.append, **options)
    return answer, events


def said(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if event.kind == "note")


def plan_of(events: list[Event]) -> Any:
    return next(event.plan for event in events if event.plan)


def test_what_the_rules_rule_out_is_a_row_and_never_started(tmp_path: Path) -> None:
    asked = "{trials: 9, repeats: 0, audit_frac: 0, enqueue: [{max_num_seqs: 2, kv_cache_dtype: fp8}]}"
    answer, events = on_t4(experiment(tmp_path, FP8, asked))
    assert (plan_of(events).ruled_out, plan_of(events).search_left, plan_of(events).audit_starts) == ({RULE: 2}, 3, 0)
    assert (answer.ended, answer.deploy) == ("space exhausted", {"kv_cache_dtype": "auto", "max_num_seqs": 4})
    rows = Results(tmp_path / "results").trials()
    pruned = [row for row in rows if row.state == "infeasible"]
    assert {row.reason_rule for row in pruned} == {RULE}
    assert {row.failure_kind for row in pruned} == {"unsupported_by_gpu"}
    assert all("7.5" in str(row.failure_detail) and row.resolved_json is None for row in pruned)
    started = [row for row in rows if row.state == "complete"]
    assert len(started) == 1 + 2
    assert not any(row.flags.get("kv_cache_dtype") == '"fp8"' for row in started)
    assert "study: {prune: false}" in trial_text(pruned[0])


def test_an_audit_that_fails_as_foretold_leaves_the_rule_alone(tmp_path: Path) -> None:
    of = experiment(tmp_path, FP8, "{trials: 9, repeats: 0, audit_frac: 1}")
    answer, events = on_t4(of, run=sweep_work.no_fp8)
    assert plan_of(events).audit_starts == 2
    rows = Results(tmp_path / "results").trials()
    audits = [row for row in rows if row.purpose == "audit"]
    assert [(row.state, row.audited_rule) for row in audits] == [("failed", RULE)] * 2
    assert min(row.number for row in audits) > max(row.number for row in rows if row.state == "complete")
    assert answer.ended == "space exhausted"
    assert not any(RULE in warning for warning in answer.warnings)
    _, events = on_t4(of, run=sweep_work.no_fp8)
    assert (plan_of(events).search_left, plan_of(events).audit_starts) == (0, 0)
    assert len(Results(tmp_path / "results").trials()) == len(rows)


def test_an_audit_that_works_switches_its_rule_off_for_good(tmp_path: Path) -> None:
    of = experiment(tmp_path, FP8, "{trials: 4, repeats: 0, audit_frac: 0.25}")
    answer, events = on_t4(of)
    assert (plan_of(events).search_left, plan_of(events).audit_starts) == (3, 1)
    assert f"rule {RULE} is wrong, and off for this study" in said(events)
    assert any(RULE in warning for warning in answer.warnings)
    rows = Results(tmp_path / "results").trials()
    (audit,) = [row for row in rows if row.purpose == "audit"]
    assert (audit.state, audit.audited_rule) == ("complete", RULE)
    assert f"warning: rule {RULE} is wrong" in trial_text(audit)
    searched = [row.flags for row in rows if row.purpose == "search" and row.state == "complete"]
    assert sum(flags["kv_cache_dtype"] == '"fp8"' for flags in searched) == 1  # what it ruled out is open again
    assert answer.counts["complete"] == 5
    _, events = on_t4(of)
    assert f"rule {RULE} is wrong" in said(events)
    assert (plan_of(events).ruled_out, plan_of(events).search_left, plan_of(events).audit_starts) == ({}, 0, 0)
    assert any(RULE in warning for warning in Results(tmp_path / "results").recommend().warnings)


def test_a_space_ruled_out_whole_starts_nothing_and_names_what_is_near(tmp_path: Path) -> None:
    space = SPACE.replace("3, 4", "4") + "serve: {kv_cache_dtype: auto}\n"
    of = experiment(tmp_path, space + "slo: {tpot_p50_ms: 2}\n")
    answer, events = on_t4(of)
    assert (answer.has_answer, answer.verdict, answer.counts) == (False, "no_answer", {})
    assert not [event for event in events if event.kind in ("plan", "start", "row")]
    assert "rule out all 3 configurations of the space: 3 by slo_tpot" in answer.headline
    limit = float(re.search(r"tpot_p50_ms of ([\d.]+) \(now 2\)", answer.headline)[1])  # type: ignore[index]
    assert Results(tmp_path / "results").recommend().headline == answer.headline
    looser, _ = on_t4(of.model_copy(update={"slo": {"tpot_p50_ms": limit}}))
    assert looser.counts["complete"] > 0


def test_the_baseline_is_started_whatever_the_rules_say(tmp_path: Path) -> None:
    text = "space: {max_num_seqs: {choices: [2, 4]}}\nbaseline: {kv_cache_dtype: fp8}\n"
    study = "{trials: 9, repeats: 0, audit_frac: 0}"
    answer, events = on_t4(experiment(tmp_path, text, study), run=sweep_work.no_fp8)
    assert f"rule {RULE} says that the baseline cannot work" in said(events)
    assert f"rule {RULE} is wrong" not in said(events)
    baseline = Results(tmp_path / "results").trial(0)
    assert (baseline.purpose, baseline.state, baseline.audited_rule) == ("baseline", "failed", RULE)
    assert answer.verdict == "no_baseline"
    other = tmp_path / "other"
    other.mkdir()
    answer, events = on_t4(experiment(other, text, study))
    assert f"rule {RULE} is wrong" in said(events)
    assert any(RULE in warning for warning in answer.warnings)


MORE = "space: {max_num_seqs: {choices: [2, 4]}, tensor_parallel_size: {choices: [1, 2]}}\n"


def test_another_study_of_the_same_conditions_counts_at_once(tmp_path: Path) -> None:
    first = experiment(tmp_path, SPACE, "{trials: 9, repeats: 0}")
    run(first)
    second = first.model_copy(update={"name": "u"})
    notes: list[str] = []
    run(second, on_event=lambda event: notes.append(event.text))
    rows = Results(tmp_path / "results").trials("u")
    copies = {row.params_json: row for row in rows if row.warm_from}
    assert set(copies) == {'{"max_num_seqs": 2}', '{"max_num_seqs": 4}', '{"max_num_seqs": 16}'}
    assert copies['{"max_num_seqs": 16}'].failure_kind == "out_of_memory"
    started = [row for row in rows if not row.warm_from and row.state != "infeasible"]
    assert [row.purpose for row in started] == ["baseline"]
    assert any("measured under the same conditions" in note for note in notes)
    cold = second.model_copy(update={"name": "v", "study": second.study.model_copy(update={"warm_start": False})})
    run(cold)
    assert not any(row.warm_from for row in Results(tmp_path / "results").trials("v"))


def test_a_winner_of_two_flags_is_ablated(tmp_path: Path) -> None:
    answer = run(experiment(tmp_path, MORE + TWO_GPUS, "{trials: 9, repeats: 3, sampler: grid}"))
    assert answer.verdict == "better"
    rows = Results(tmp_path / "results").trials()
    if len(answer.changes) + len(answer.dropped) > 1:
        assert {row.arm for row in rows if row.purpose == "ablate"} >= {"max_num_seqs", "tensor_parallel_size"}
    assert answer.deploy["max_num_seqs"] == 4
    assert answer.deploy.get("tensor_parallel_size") is None


def test_a_sweep_may_end_by_itself(tmp_path: Path) -> None:
    space = "space: {max_num_seqs: {choices: [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21]}}\n"
    answer = run(experiment(tmp_path, space, "{trials: 30, repeats: 0, stop: auto}"))
    assert "expected improvement" in answer.ended


def test_a_sweep_may_look_for_the_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varcas.sweeper.run_series", sweep_work.by_capacity)
    slo = "slo: {ttft_p95_ms: 500}\nobjective: {maximize: capacity_rps}\n"
    answer = run(
        experiment(tmp_path, f"space: {{max_num_seqs: {{choices: [2, 4]}}}}\n{slo}", "{trials: 3, repeats: 1}")
    )
    rows = Results(tmp_path / "results").trials()
    own, aside = ([row for row in rows if (row.purpose == "capacity") == is_aside] for is_aside in (False, True))
    assert answer.winner.values == [pytest.approx(40, rel=0.05)]
    found = {row.params_json: row.capacity_rps for row in own if row.purpose == "search"}
    assert found == {
        '{"max_num_seqs": 2}': pytest.approx(20, rel=0.05),
        '{"max_num_seqs": 4}': pytest.approx(40, rel=0.05),
    }
    assert all(row.slo_met and row.rate_rps <= row.capacity_rps for row in own)
    assert {row.server_id for row in aside} == {row.server_id for row in own}
    assert all(row.capacity_rps is None for row in aside)
    assert len({row.trial_id for row in rows}) == len({row.number for row in rows}) == len(rows)
    assert answer.counts == {"complete": 3}


def test_a_capacity_needs_a_rate_that_can_be_raised(tmp_path: Path) -> None:
    extra = "slo: {ttft_p95_ms: 500}\nobjective: {maximize: capacity_rps}\n"
    closed = "workload: {profile: chat-short, arrival: {kind: closed, users: 2}}"
    text = experiment(tmp_path, SPACE + extra).model_copy(
        update={"workload": parse_experiment(f"name: t\nmodel: m\n{closed}\n").workload}
    )
    with pytest.raises(InputError, match="closed: has no single rate"):
        run(text)


def test_several_limits_are_measured_on_one_server_and_a_start_that_fails_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varcas.sweeper.run_series", sweep_work.live_series)
    space = "space: {max_num_seqs: {choices: [2, 4, 8, 12]}, kind: {choices: [a, b]}}\nbaseline: {max_num_seqs: 1}\n"
    answer = run(experiment(tmp_path, space, "{trials: 6, repeats: 3}"), node=sweep_work.LiveNode)
    rows = Results(tmp_path / "results").trials()
    live = [row for row in rows if row.measured_live and row.purpose == "search"]
    assert len({row.server_id for row in live}) < len(live)
    by_params = {row.params_json: row for row in live}
    assert len(by_params) == len(live)
    for row in live:
        seqs = json.loads(row.params_json)["max_num_seqs"]
        assert row.output_tokens_per_s == pytest.approx(100 + 10 * seqs, rel=0.06)
    failed = [row for row in rows if row.state == "failed"]
    assert 1 <= len(failed) <= 3  # the third when nothing else is left
    assert all(json.loads(row.params_json).get("kind", "b") == "b" for row in failed)
    assert answer.verdict == "better"
    assert answer.winner.values == [pytest.approx(220.0)] * 3
    assert len({row.trial_id for row in rows}) == len({row.number for row in rows}) == len(rows)
