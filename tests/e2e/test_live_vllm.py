"""Real vLLM on this CPU: its scheduler takes new limits while it runs, and is what the same flags give afresh."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from varcas.engine.failures import read_log
from varcas.experiment import parse_experiment
from varcas.inner import Limits, live_start
from varcas.metrics import summarise
from varcas.space import ServingConfig
from varcas.trial import Done, Listed, Step, TrialTask, cold_step, run_series

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
FLAGS = ("max_num_active_seqs", "max_num_scheduled_tokens", "scheduler_cls")


def test_a_running_server_obeys_new_limits(tmp_path: Path, model_dir: Path) -> None:
    experiment = parse_experiment(
        f"name: t\nmodel: {model_dir}\nhardware: {{gpu: cpu}}\n"
        'server: {env: {VLLM_CPU_KVCACHE_SPACE: "1", HF_HUB_OFFLINE: "1"}}\n'
        "workload: {profile: chat-short, rate_rps: 20, duration_s: 4, warmup_s: 0.5, max_drain_s: 0.5}\n"
    )
    serve = {"load_format": "dummy", "max_model_len": 1024, "enforce_eager": True}
    base = ServingConfig(str(model_dir), None, serve)
    start = live_start(base, {"max_num_seqs": [1, 6]}, FLAGS, {})

    def step(seqs: int) -> Step:
        return Step(start.at(Limits(seqs)), experiment.workload, Limits(seqs))

    task = TrialTask("0-live", experiment, start.config, None, {}, "chat", str(tmp_path), 0, live=True)
    plan = Listed((cold_step(start.config, experiment.workload, Limits()), step(1), step(6)))
    series = run_series(task, threading.Event(), plan=plan)
    assert series.not_live is None
    assert [one.outcome.state for one in series.done] == ["complete"] * 3
    _, one, six = series.done
    assert max_running(one) == 1
    assert 2 <= max_running(six) <= 6
    assert tokens_per_s(six) > 1.5 * tokens_per_s(one)
    assert one.outcome.facts.resolved["live"]["max_num_seqs"] == 1
    assert "Using custom scheduler class varcas_live_scheduler.make" in read_log(tmp_path / "0-live.log")


def max_running(done: Done) -> float:
    load = done.outcome.load
    assert load is not None
    inside = [s.num_requests_running for s in done.outcome.samples if 0 <= s.t_s <= load.duration_s]
    return max(running for running in inside if running is not None)


def tokens_per_s(done: Done) -> float:
    assert done.outcome.load is not None
    return float(summarise(done.outcome.load, {}, done.outcome.samples)["output_tokens_per_s"])
