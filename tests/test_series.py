"""Several measurements on one server start: a scripted server under the real guardian, with the real load."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.sweeps import FAKE_PYTHON
from varcas.early_stop import StopRules
from varcas.experiment import Experiment, Workload, parse_experiment
from varcas.inner import Limits
from varcas.metrics import summarise
from varcas.space import ServingConfig
from varcas.trial import Done, Listed, Plan, Series, Step, TrialTask, cold_step, run_series, run_trial

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARCAS_CACHE", str(tmp_path / "cache"))


def experiment(model_dir: Path, fake: str) -> Experiment:
    return parse_experiment(
        f"name: series\nmodel: {model_dir}\nhardware: {{gpu: cpu}}\n"
        f'server: {{python: {FAKE_PYTHON}, stop_timeout_s: 1.0, env: {{FAKE_VLLM: "{fake}"}}}}\n'
        "space: {max_num_seqs: {choices: [1, 8]}}\n"
        "workload: {profile: chat-short, rate_rps: 25, duration_s: 1.5, warmup_s: 0.2, max_drain_s: 0.3}\n"
    )


def task(of: Experiment, tmp_path: Path, *, live: bool = True, seqs: int = 8) -> TrialTask:
    config = ServingConfig(of.model, None, {"max_num_seqs": seqs})
    return TrialTask("0-x", of, config, None, {}, "chat", str(tmp_path / "logs"), 0, live=live)


def step(of: Experiment, seqs: int | None, **changes: Any) -> Step:
    config = ServingConfig(of.model, None, {"max_num_seqs": 8, "max_num_active_seqs": seqs})
    limits = None if seqs is None else Limits(seqs)
    return Step(config, of.workload.model_copy(update=changes), limits)


def tokens_per_s(done: Done) -> float:
    assert done.outcome.load is not None
    return float(summarise(done.outcome.load, {}, done.outcome.samples)["output_tokens_per_s"])


def test_each_step_is_measured_under_its_own_limits(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 4 --ttft-ms 4")
    told: list[Done] = []
    cold = cold_step(task(of, tmp_path).config, of.workload, Limits())
    plan = Listed((cold, step(of, 1), step(of, 8), step(of, 1)))
    series = run_series(task(of, tmp_path), threading.Event(), plan=plan, on_done=told.append)
    assert series.not_live is None
    assert [one.outcome.state for one in series.done] == ["complete"] * 4
    assert [one.step for one in told] == [one.step for one in series.done]
    in_force = [one.outcome.facts.resolved["live"]["max_num_seqs"] for one in series.done]
    assert in_force == [8, 1, 8, 1]
    one, eight, again = (tokens_per_s(done) for done in series.done[1:])
    assert eight > 3 * one
    assert again == pytest.approx(one, rel=0.15)
    assert all(done.outcome.live for done in series.done)
    times = [done.outcome.times for done in series.done]
    assert times[0].server_start_s > 0.1
    assert [t.server_start_s for t in times[1:]] == [0.0] * 3
    assert times[-1].stop_s > 0
    kept = series.kept()
    assert len(kept) == 3
    assert kept[0].outcome.times.server_start_s == times[0].server_start_s
    assert kept[0].outcome.times.warmup_s > times[0].load_s
    log = (tmp_path / "logs" / "0-x.log").read_text()
    assert "--scheduler-cls varcas_live_scheduler.make" in log.splitlines()[0]


def test_what_was_measured_before_the_server_died_is_kept(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 2 --die-after-requests 70")
    plan = Listed((step(of, 8), step(of, 4), step(of, 2)))
    series = run_series(task(of, tmp_path), threading.Event(), plan=plan)
    assert [one.outcome.state for one in series.done] == ["complete", "failed"]
    assert series.done[1].outcome.failure_kind == "out_of_memory"  # killed by SIGKILL
    assert series.done[1].step.limits == Limits(4)


def test_a_start_that_fails_is_the_first_steps_failure(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--exit 3")
    series = run_series(task(of, tmp_path), threading.Event(), plan=Listed((step(of, 8), step(of, 4))))
    assert [one.outcome.failure_kind for one in series.done] == ["crashed_at_start"]
    assert series.done[0].outcome.load is None
    assert series.done[0].outcome.times.server_start_s > 0


def test_a_server_that_takes_no_limits_measures_what_it_started_with(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 2 --lacks-limits")
    plan = Listed((step(of, None), step(of, 4)))
    series = run_series(task(of, tmp_path), threading.Event(), plan=plan)
    assert [one.outcome.state for one in series.done] == ["complete"]
    assert "max_num_scheduled_tokens" in (series.not_live or "")


def test_without_our_scheduler_nothing_is_live(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 2")
    series = run_series(task(of, tmp_path, live=False), threading.Event(), plan=Listed((step(of, 4),)))
    assert series.done == ()
    assert "not started with our scheduler" in (series.not_live or "")


@dataclass(frozen=True)
class Faster:
    """A plan that goes on from what it has seen."""

    of: Workload
    config: ServingConfig

    def next(self, done: Sequence[Done]) -> Step | None:
        if len(done) == 3:
            return None
        rate = 10.0 if not done else 2 * (done[-1].step.workload.rate_rps or 0)
        assert all(one.outcome.load is not None for one in done)
        return Step(self.config, self.of.model_copy(update={"rate_rps": rate}))


def test_a_plan_may_hang_on_what_was_measured(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 1 --ttft-ms 1")
    plan: Plan = pickle.loads(pickle.dumps(Faster(of.workload, task(of, tmp_path).config)))
    series: Series = run_series(task(of, tmp_path, live=False), threading.Event(), plan=plan)
    assert [one.step.workload.rate_rps for one in series.done] == [10, 20, 40]
    sent = [len(one.outcome.load.records) for one in series.done if one.outcome.load]
    assert sent[2] > 2.5 * sent[0]
    assert not any(one.outcome.live for one in series.done)


def test_a_load_that_is_lost_ends_early_and_the_series_goes_on(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 10 --ttft-ms 100")
    rules = StopRules({"ttft_p95_ms": 20.0})
    lost = Step(task(of, tmp_path).config, of.workload.model_copy(update={"duration_s": 30.0}), stop_rules=rules)
    series = run_series(task(of, tmp_path), threading.Event(), plan=Listed((lost, step(of, 8))))
    first, second = (one.outcome for one in series.done)
    assert (first.state, second.state) == ("stopped", "complete")
    assert first.early_stop is not None
    assert first.early_stop.kind == "slo"
    assert first.times.load_s < 15


def test_a_stop_from_outside_keeps_what_is_measured(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 2")
    stop = threading.Event()
    series = run_series(
        task(of, tmp_path), stop, plan=Listed((step(of, 8), step(of, 4))), on_done=lambda done: stop.set()
    )
    assert [one.outcome.state for one in series.done] == ["complete", "stopped"]
    assert series.done[1].outcome.failure_kind == "interrupted"


def test_one_trial_is_a_series_of_one(model_dir: Path, tmp_path: Path) -> None:
    of = experiment(model_dir, "--itl-ms 2")
    found = run_trial(task(of, tmp_path, live=False), threading.Event())
    assert found.state == "complete"
    assert found.load is not None
    assert not found.live
    assert found.times.server_start_s > 0
    assert found.times.stop_s > 0
