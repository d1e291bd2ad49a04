from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rows import confirm, experiment, failed, row
from varcas.experiment import Experiment
from varcas.export import write_scripts
from varcas.records import TrialRow
from varcas.report import (
    as_text,
    limit_text,
    limits_of,
    pareto_front,
    ranked,
    recommend,
    settings_text,
)

STEADY = [100.0, 101.0, 99.0]
BETTER = [120.0, 121.0, 119.0]


def verdict(rows: list[TrialRow], of: Experiment | None = None) -> str:
    return recommend(rows, of or experiment()).verdict


def test_a_clear_gain_from_fresh_starts_is_better() -> None:
    answer = recommend([row(None, 100), row(8, 130), *confirm(None, *STEADY), *confirm(8, *BETTER)], experiment())
    assert answer.verdict == "better"
    assert answer.changes == {"max_num_seqs": 8}
    assert answer.gain is not None
    assert answer.gain.ratio == pytest.approx(1.2, abs=0.01), "not the 1.3 of the search"
    assert answer.gain.lo is not None
    assert 1.1 < answer.gain.lo < 1.2
    assert "3 fresh starts" in answer.headline


@pytest.mark.parametrize(
    ("baseline", "winner", "why"),
    [
        ([100.0, 140.0, 80.0], [110.0, 150.0, 90.0], "interval"),
        (STEADY[:2], BETTER[:2], "3 an arm"),
        (STEADY, BETTER[:2], "3 an arm"),
    ],
)
def test_what_is_not_sure_is_inconclusive_and_keeps_the_baseline(
    baseline: list[float], winner: list[float], why: str
) -> None:
    answer = recommend([row(None, 100), row(8, 130), *confirm(None, *baseline), *confirm(8, *winner)], experiment())
    assert answer.verdict == "inconclusive"
    assert why in answer.headline
    assert answer.deploy == {"dtype": "half"}
    assert answer.changes == {}


def test_a_winner_that_is_worse_in_fresh_starts_leaves_the_baseline_standing() -> None:
    rows = [row(None, 100), row(8, 130), *confirm(None, *STEADY), *confirm(8, 90.0, 91.0, 89.0)]
    answer = recommend(rows, experiment())
    assert answer.verdict == "baseline_best"
    assert answer.deploy == {"dtype": "half"}
    assert "-10" in answer.headline


def test_the_rows_that_chose_the_winner_do_not_count_for_its_gain() -> None:
    answer = recommend([row(None, 100), row(8, 500)], experiment())
    assert answer.verdict == "unconfirmed"
    assert answer.gain is None
    assert answer.deploy == {"dtype": "half", "max_num_seqs": 8}


def test_a_winner_that_fails_a_fresh_start_gives_way_to_the_next() -> None:
    broken = failed(8, purpose="confirm", arm="candidate")
    answer = recommend([row(None, 100), row(4, 120), row(8, 130), broken], experiment())
    assert answer.winner is not None
    assert answer.winner.flags["max_num_seqs"] == 4


def test_a_lost_worker_in_a_fresh_start_is_nobodys_fault() -> None:
    lost = failed(8, "worker_lost", purpose="confirm", arm="candidate")
    rows = [row(None, 100), row(8, 130), lost, *confirm(None, *STEADY), *confirm(8, *BETTER)]
    assert verdict(rows) == "better"


def test_invalid_measurements_are_never_ranked() -> None:
    rows = [row(None, 100), row(8, 900, valid=False, invalid_reasons=["late"]), row(4, 110)]
    answer = recommend(rows, experiment())
    assert answer.winner is not None
    assert answer.winner.flags["max_num_seqs"] == 4
    assert any("not to be believed" in warning for warning in answer.warnings)


def test_the_slo_comes_before_the_objective() -> None:
    of = experiment(slo="{ttft_p95_ms: 500}")
    rows = [
        row(None, 100, slo_met=True, constraints={"ttft_p95_ms": -0.1}),
        row(8, 900, slo_met=False, constraints={"ttft_p95_ms": 2.0}),
        row(4, 110, slo_met=True, constraints={"ttft_p95_ms": -0.2}),
    ]
    answer = recommend(rows, of)
    assert answer.winner is not None
    assert answer.winner.flags["max_num_seqs"] == 4


def test_a_winner_that_misses_the_slo_in_a_fresh_start_is_not_better() -> None:
    of = experiment(slo="{ttft_p95_ms: 500}")
    met = {"slo_met": True, "constraints": {"ttft_p95_ms": -0.1}}
    missed = {"slo_met": False, "constraints": {"ttft_p95_ms": 0.1}}
    rows = [row(None, 100, **met), row(8, 130, **met), *confirm(None, *STEADY, **met)]
    assert verdict([*rows, *confirm(8, *BETTER, **met)], of) == "better"
    assert verdict([*rows, *confirm(8, *BETTER[:2], **met), *confirm(8, BETTER[2], **missed)], of) == "inconclusive"


def test_nothing_meets_the_slo() -> None:
    rows = [
        row(None, 100, slo_met=False, constraints={"ttft_p95_ms": 3.0}),
        row(8, 90, slo_met=False, constraints={"ttft_p95_ms": 0.25}, number=7),
    ]
    answer = recommend(rows, experiment(slo="{ttft_p95_ms: 500}"))
    assert answer.verdict == "no_answer"
    assert not answer.has_answer
    assert "trial 7, misses ttft_p95_ms by 25%" in answer.headline


def test_nothing_runs() -> None:
    answer = recommend([failed(None), failed(8, "kv_cache_too_small")], experiment())
    assert answer.verdict == "no_answer"
    assert [f.kind for f in answer.failures] == ["out_of_memory", "kv_cache_too_small"]


def test_a_baseline_that_does_not_run() -> None:
    answer = recommend([failed(None), row(8, 100)], experiment())
    assert answer.verdict == "no_baseline"
    assert answer.deploy == {"dtype": "half", "max_num_seqs": 8}


def test_the_baseline_may_be_the_best() -> None:
    answer = recommend([row(None, 100), row(8, 90)], experiment())
    assert answer.verdict == "baseline_best"
    assert answer.deploy == {"dtype": "half"}


def test_lower_is_better_when_it_is_minimised() -> None:
    of = experiment(objective="{minimize: tpot_mean_ms}")
    rows = [row(None, tpot_mean_ms=10.0), row(8, tpot_mean_ms=4.0), row(4, tpot_mean_ms=7.0)]
    rows += [c.model_copy(update={"tpot_mean_ms": v}) for c, v in zip(confirm(None, 1, 1, 1), STEADY, strict=True)]
    rows += [c.model_copy(update={"tpot_mean_ms": v}) for c, v in zip(confirm(8, 1, 1, 1), [50, 51, 49], strict=True)]
    answer = recommend(rows, of)
    assert answer.verdict == "better"
    assert answer.gain is not None
    assert answer.gain.ratio == pytest.approx(0.5, abs=0.02)


def test_latency_of_an_overrun_server_is_never_ranked() -> None:
    of = experiment(objective="{minimize: tpot_mean_ms}")
    rows = [row(None, tpot_mean_ms=10.0), row(8, tpot_mean_ms=1.0, saturated=True), row(4, tpot_mean_ms=7.0)]
    winner = recommend(rows, of).winner
    assert winner is not None
    assert winner.flags["max_num_seqs"] == 4


def test_pareto_front_holds_what_nothing_beats() -> None:
    of = experiment(objective="[{maximize: output_tokens_per_s}, {minimize: ttft_p95_ms}]")
    a, b, c = row(1, 100, ttft_p95_ms=10.0), row(2, 200, ttft_p95_ms=50.0), row(4, 90, ttft_p95_ms=20.0)
    assert {r.trial_id for r in pareto_front([a, b, c], of.objectives)} == {a.trial_id, b.trial_id}
    assert verdict([row(None, 50, ttft_p95_ms=60.0), a, b, c], of) == "pareto"


def test_one_row_a_configuration_is_ranked() -> None:
    rows = [row(8, 100), row(8, 120), row(4, 110)]
    assert [r.output_tokens_per_s for r in ranked(rows, experiment().objectives[0])] == [120, 110]


def test_simulated_is_said_everywhere(tmp_path: Path) -> None:
    rows = [row(None, 100, simulated=True), row(8, 130, simulated=True)]
    answer = recommend(rows, experiment())
    assert answer.simulated
    assert "SIMULATED" in as_text(answer)
    script = write_scripts(rows, experiment(), tmp_path)
    assert script is not None
    assert "SIMULATED" in Path(script).read_text()


def test_scripts_start_what_was_recommended(tmp_path: Path) -> None:
    rows = [row(None, 100), row(8, 130), *confirm(None, *STEADY), *confirm(8, *BETTER)]
    script = write_scripts(rows, experiment(), tmp_path)
    assert script == str(tmp_path / "start_vllm_optimized.sh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start_vllm.sh", "start_vllm_optimized.sh"]
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    said = subprocess.run([script], env=os.environ | {"PYTHON": str(echo)}, capture_output=True, text=True, check=True)
    assert "--max-num-seqs\n8\n" in said.stdout
    assert "better" in Path(script).read_text() or "+20" in Path(script).read_text()


def test_text_has_everything_a_person_needs() -> None:
    rows = [row(None, 100), row(8, 130), failed(4), *confirm(None, *STEADY), *confirm(8, *BETTER)]
    text = as_text(recommend(rows, experiment(), ended="space exhausted"))
    for words in ("better", "95 % interval", "max_num_seqs = 8", "out_of_memory: words", "space exhausted", "1 failed"):
        assert words in text, text


def test_a_saturated_start_is_never_compared_by_its_latency() -> None:
    made = experiment(objective="{minimize: ttft_p50_ms}", study="{repeats: 3}")
    slow = {"ttft_p50_ms": 9000.0, "saturated": True}
    rows = [
        row(None, 50.0, ttft_p50_ms=200.0), row(4, 60.0, ttft_p50_ms=100.0),
        *confirm(None, *[50.0] * 3, **slow), *confirm(4, *[60.0] * 3, ttft_p50_ms=100.0),
    ]  # fmt: skip
    answer = recommend(rows, made)
    assert answer.winner is not None
    assert answer.baseline is not None
    assert (answer.winner.values, answer.baseline.values) == ([100.0] * 3, [])
    assert answer.gain is None


def test_a_large_gain_is_a_ratio() -> None:
    answer = recommend([row(None, 100), row(8, 750), *confirm(None, *STEADY), *confirm(8, 750, 760, 740)], experiment())
    assert answer.headline.startswith("7.5x (95 % interval 7.")
    assert "the baseline's output_tokens_per_s" in answer.headline


def test_a_winner_that_kept_up_has_a_gain_that_is_a_floor() -> None:
    held: dict[str, Any] = {"saturated": False, "delivered_rate_rps": 9.8}
    rows = [row(None, 100), row(8, 130, **held), *confirm(None, *STEADY), *confirm(8, *BETTER, **held)]
    warning = "kept up with all 10 requests/s (9.8 delivered): raise rate_rps to find its limit; the gain is at least"
    assert warning in as_text(recommend(rows, experiment()))
    rows = [*rows[:2], *confirm(None, *STEADY), *confirm(8, *BETTER[:2], **held), *confirm(8, 121, saturated=True)]
    assert "kept up" not in as_text(recommend(rows, experiment()))


def test_each_limit_of_the_slo_is_told_with_its_figure_from_the_worst_fresh_start() -> None:
    of = experiment(slo="{ttft_p95_ms: 500}")
    met = [{"slo_met": True, "constraints": {"ttft_p95_ms": excess}} for excess in (-0.9, -0.5, -0.486)]
    rows = [row(None, 100, **met[0]), row(8, 130, **met[0]), *confirm(None, *STEADY, **met[0])]
    rows += [c for value, columns in zip(BETTER, met, strict=True) for c in confirm(8, value, **columns)]
    text = as_text(recommend(rows, of))
    assert "SLO at 10 requests/s, in the worst start:\n  ttft_p95_ms 257 of 500 ms: met\n" in text
    assert limit_text(limits_of({"ttft_p95_ms": 100.0}, of.slo)[0]) == "ttft_p95_ms never came, 500 ms: missed"


def test_saturation_is_no_matter_where_goodput_under_a_met_slo_ranks() -> None:
    met: dict[str, Any] = {"slo_met": True, "constraints": {"ttft_p95_ms": -0.1}, "goodput_rps": 5.0}
    rows = [row(None, 100, **met), row(8, 130, **met | {"saturated": True, "goodput_rps": 6.0})]
    by_goodput = experiment(slo="{ttft_p95_ms: 500}", objective="{maximize: goodput_rps}")
    assert "beyond what the server can take" not in as_text(recommend(rows, by_goodput))
    assert "beyond what the server can take" in as_text(recommend(rows, experiment()))


def test_random_weights_are_warned_of(tmp_path: Path) -> None:
    dummy = json.dumps({"load_format": "dummy"})
    rows = [row(None, 100, config_json=dummy)]
    assert "random weights" in as_text(recommend(rows, experiment()))
    script = write_scripts(rows, experiment(), tmp_path)
    assert script is not None
    assert "# load_format: dummy" in Path(script).read_text()


def test_an_unconfirmed_winner_is_said_to_be_so_with_the_command_that_confirms_it() -> None:
    text = as_text(recommend([row(None, 100), row(8, 130)], experiment()), "varcas sweep e.yaml --repeats 3")
    assert "Deploy (unconfirmed):" in text
    assert "To confirm it:\n  varcas sweep e.yaml --repeats 3" in text


def test_a_script_holds_the_python_that_measured(tmp_path: Path) -> None:
    script = write_scripts([row(None, 100)], experiment(), tmp_path)
    assert script is not None
    assert f"python={sys.executable}\n" in Path(script).read_text()
    script = write_scripts([row(None, 100)], experiment(server="{python: /nowhere/python}"), tmp_path)
    assert script is not None
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no /nowhere/python here: set PYTHON to one with vLLM 0.32.0" in done.stderr


def test_settings_are_told_as_they_are_given() -> None:
    assert settings_text({"a": 1, "b": "none", "c": {"d": 2}}, {"a": 1, "c": {"d": 2}}) == 'a=1 b left out c={"d":2}'
    assert settings_text({"kv": "none"}, {"kv": "none"}) == "kv=none"
