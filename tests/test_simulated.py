"""The simulated engine behind a whole sweep: the same rows, marked everywhere, and never mistaken for real ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sweep_work import T4Node, by_seqs
from varcas.cli import app, run
from varcas.errors import InputError, TrialError
from varcas.experiment import Experiment, parse_experiment
from varcas.inprocess import InProcessPool
from varcas.live import verdict_text
from varcas.metrics import summarise
from varcas.records import TrialRow
from varcas.report import ACCEPTANCE_NOT_REAL, as_text
from varcas.results import Results, trial_text
from varcas.simulated import Simulator, flag_names, flags_of, unmodelled
from varcas.space import ServingConfig
from varcas.store import Store
from varcas.sweeper import sweep
from varcas.trial import TrialTask

T4 = """\
name: sim
model: TheBloke/Llama-2-7B-AWQ
hardware: {{gpu: {gpu}}}
engine: {engine}
serve: {{dtype: half, max_model_len: 2048, gpu_memory_utilization: 0.90, quantization: awq, enforce_eager: true}}
baseline: {{max_num_seqs: 8}}
space:
  max_num_seqs: {{choices: [8, 64]}}
  kv_cache_dtype: {{choices: [auto, fp8]}}
workload: {{profile: chat-medium, rate_rps: 20, duration_s: 60, max_drain_s: 10}}
study: {{trials: 6, repeats: 3, audit_frac: 0, enqueue: [{{max_num_seqs: 64, kv_cache_dtype: fp8}}]}}
simulation: {{engine_version: 0.32.0}}
results: {results}
"""


class AnyFlag(T4Node):
    """A real node, as far as a sweep can tell."""

    def flag_names(self) -> list[str]:
        return flag_names()


def experiment(results: Path, engine: str = "simulated", gpu: str = "T4", **changes: Any) -> Experiment:
    found = parse_experiment(T4.format(results=results, engine=engine, gpu=gpu))
    return found.model_copy(update=changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    made = experiment(tmp_path_factory.mktemp("simulated"))
    sweep(made)
    return made


def rows_of(made: Experiment) -> list[TrialRow]:
    return Store(made.results, readonly=True).rows(made.name)


def task(made: Experiment, label: str = "00000-search", **flags: Any) -> TrialTask:
    config = ServingConfig(made.model, None, {**made.serve, **flags})
    return TrialTask(label, made, config, None, {}, None, "", 1)


def test_every_row_and_every_word_says_that_it_is_simulated(swept: Experiment) -> None:
    rows = rows_of(swept)
    assert len(rows) >= 4 + 6
    assert all(row.simulated and row.engine == "simulated" for row in rows)
    assert {row.state for row in rows} == {"complete", "infeasible"}
    answer = Results(swept.results).recommend(swept.name)
    assert answer.simulated
    assert "SIMULATED" in as_text(answer).splitlines()[0]
    assert all("SIMULATED" in trial_text(row) and "SIMULATED" in verdict_text(row) for row in rows)


def test_a_start_script_starts_nothing_unless_it_is_forced(swept: Experiment, tmp_path: Path) -> None:
    answer = Results(swept.results).recommend(swept.name)
    assert answer.script is not None
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho started "$@"\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python)}
    refused = subprocess.run([answer.script], env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "SIMULATED" in refused.stderr
    assert refused.stdout == ""
    forced = subprocess.run(
        [answer.script], env=env | {"VARCAS_SIMULATED_OK": "1"}, capture_output=True, text=True, check=True
    )
    assert forced.stdout.startswith("started")
    assert "SIMULATED" in Path(answer.script).read_text().splitlines()[1]


def test_rows_are_those_of_a_real_sweep(swept: Experiment) -> None:
    done = [row for row in rows_of(swept) if row.state == "complete"]
    for row in done:
        assert row.gpu_name == "Tesla T4"
        assert row.output_tokens_per_s
        assert row.ttft_mean_ms
        assert row.valid
        assert row.saturated
        assert json.loads(row.resolved_json or "{}")["model"]["max_model_len"] == 2048
        assert row.kv_cache_tokens
    requests = Store(swept.results, readonly=True).requests(done[0].trial_id)
    assert len(requests) == done[0].num_requests
    refused = next(row for row in rows_of(swept) if row.state == "infeasible")
    assert (refused.reason_rule, refused.failure_kind) == ("cache_type_without_units", "unsupported_by_gpu")


def test_starts_differ_as_real_ones_do_and_the_same_start_does_not(swept: Experiment) -> None:
    confirmed = [row.output_tokens_per_s for row in rows_of(swept) if row.arm == "baseline"]
    assert len(set(confirmed)) == len(confirmed) == 3
    simulator = Simulator.of(swept)
    one, again, other = (
        simulator.run(task(swept, label), threading.Event()).load
        for label in ("00001-search", "00001-search", "00002-x")
    )
    assert one == again
    assert one != other


def test_a_study_of_real_rows_takes_no_simulated_ones(swept: Experiment) -> None:
    real = swept.model_copy(update={"engine": "vllm"})
    with pytest.raises(InputError, match="another engine"):
        sweep(real, run=by_seqs, node=AnyFlag, pool=InProcessPool)


def test_simulated_rows_calibrate_nothing(swept: Experiment) -> None:
    store = Store(swept.results, readonly=True)
    assert Simulator.of(swept, store.rows(), store.requests).calibration.fits == {}


@pytest.mark.parametrize(
    ("gpu", "flags", "kind", "said"),
    [
        (
            "T4",
            {"quantization": None, "model": "fp16"},
            "kv_cache_too_small",
            "one sequence of max_model_len takes 1.00 GiB",
        ),
        ("T4", {"kv_cache_dtype": "fp8"}, "unsupported_by_gpu", "compute capability 7.5"),
        ("T4", {"num_gpu_blocks_override": 64}, "kv_cache_too_small", ""),
        ("H100", {"kv_cache_dtype": "fp8"}, "unsupported_by_engine", "docs/h100.md"),
        ("T4", {"max_num_batched_tokens": 512, "enable_chunked_prefill": False}, "unsupported_by_engine", "512"),
    ],
)
def test_what_would_not_start_fails_with_its_kind(
    tmp_path: Path, gpu: str, flags: dict[str, Any], kind: str, said: str
) -> None:
    made = experiment(tmp_path, gpu=gpu)
    if flags.pop("model", None):
        made = made.model_copy(update={"model": "NousResearch/Llama-2-7b-hf"})
    outcome = Simulator.of(made).run(task(made, **flags), threading.Event())
    assert (outcome.state, outcome.failure_kind) == ("failed", kind)
    assert said in (outcome.failure_detail or "")


def test_an_l4_takes_the_fp8_cache_and_holds_twice_the_tokens(tmp_path: Path) -> None:
    made = experiment(tmp_path, gpu="L4")
    simulator = Simulator.of(made)
    sizes = [simulator.engine({**made.serve, "kv_cache_dtype": kind}).limits.num_blocks for kind in ("auto", "fp8")]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)


def test_drafts_take_memory_and_their_acceptance_is_never_real(tmp_path: Path) -> None:
    drafted = {"method": "draft_model", "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "num_speculative_tokens": 5}
    made = experiment(tmp_path, space={}, baseline={})
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    tried = [{"speculative_config": drafted, "max_num_seqs": 8}, {"speculative_config": lookup, "max_num_seqs": 8}]
    study = made.study.model_copy(update={"enqueue": tried, "repeats": 0})
    simulation = made.simulation.model_copy(update={"acceptance": 1.0})
    made = made.model_copy(update={"study": study, "simulation": simulation})
    answer = sweep(made)
    rows = {row.number: row for row in rows_of(made) if row.state == "complete"}
    speculative = [row for row in rows.values() if "speculative_config" in row.flags]
    assert len(speculative) == 2
    assert all(any(text.startswith(ACCEPTANCE_NOT_REAL) for text in row.warnings) for row in speculative)
    assert "speculative_config" not in (answer.deploy or {})
    plain, with_draft = (Simulator.of(made).engine({**made.serve, **flags}).limits for flags in ({}, tried[0]))
    assert with_draft.num_blocks < 0.9 * plain.num_blocks
    assert with_draft.drafted == 5


def test_what_cannot_be_simulated_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for flags in ({"speculative_config": {"method": "eagle3", "model": "x/y", "num_speculative_tokens": 2}},
                  {"data_parallel_size": 2}):  # fmt: skip
        made = experiment(tmp_path, baseline=flags)
        with pytest.raises(InputError, match="real server"):
            sweep(made)
    with pytest.raises(InputError, match="a simulated engine needs one"):
        sweep(experiment(tmp_path, gpu="auto"))
    with pytest.raises(InputError, match="no such flag"):
        sweep(experiment(tmp_path, baseline={"max_num_seq": 8}))


def test_memory_bounds_what_runs_at_once_and_preempts(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    outcome = Simulator.of(made).run(task(made, num_gpu_blocks_override=200), threading.Event())
    assert outcome.load is not None
    columns = summarise(outcome.load, {}, outcome.samples)
    assert columns["preemptions"] > 0
    assert max(sample.kv_cache_usage_frac or 0 for sample in outcome.samples) > 0.95


def test_a_cancelled_start_is_stopped(tmp_path: Path) -> None:
    made, cancelled = experiment(tmp_path), threading.Event()
    cancelled.set()
    assert Simulator.of(made).run(task(made), cancelled).state == "stopped"


VALUES = st.one_of(
    st.booleans(), st.integers(-5, 10**6), st.floats(0.1, 1.0), st.sampled_from(["auto", "fp8", "half"]),
    st.dictionaries(st.sampled_from(["method", "model"]), st.sampled_from(["ngram", "x/y"]), min_size=1),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["max_num_seqs", "dtype", "enforce_eager", "swap"]), VALUES))
def test_flags_are_read_back_from_the_command_line(flags: dict[str, Any]) -> None:
    assert flags_of(ServingConfig("some/model", "main", flags).argv()) == flags


def test_names_of_flags_and_those_without_effect() -> None:
    assert {"max_num_seqs", "speculative_config", "kv_cache_dtype"} <= set(flag_names())
    assert unmodelled(["max_num_seqs", "attention_backend"]) == ["attention_backend"]


def test_the_basis_is_told(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    assert Simulator.of(made).basis(made.serve) == "priors, not measurements (GPU: T4 was not measured)"


def test_the_command_line_simulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sim.yaml"
    path.write_text(T4.format(results=tmp_path / "r", engine="vllm", gpu="T4"))

    def called(*words: str) -> int:
        return run(lambda: app(list(words), prog_name="varcas", standalone_mode=False))

    assert called("simulate", str(path), "--json", "--repeats", "0") in (0, None)
    told = capsys.readouterr()
    assert json.loads(told.out)["simulated"] is True
    assert "SIMULATED: no server is started" in told.err
    assert called("simulate") == 2
    assert "give one of them" in capsys.readouterr().err


def test_simulated_speed_scales_with_the_calibration(tmp_path: Path) -> None:
    """Half the bandwidth and FLOP/s, and twice the overhead: half the throughput of a server that is overrun."""
    made = experiment(tmp_path)
    made = made.model_copy(update={"simulation": made.simulation.model_copy(update={"start_sd_frac": 0.0})})
    fast = Simulator.of(made)
    gpu = dataclasses.replace(
        fast.gpu, memory_bytes_per_s=fast.gpu.memory_bytes_per_s / 2,
        peaks={name: peak / 2 for name, peak in fast.gpu.peaks.items()},
    )  # fmt: skip
    slow = dataclasses.replace(fast, gpu=gpu)
    rates = []
    for simulator in (fast, slow):
        load = simulator.run(task(made, max_num_seqs=8), threading.Event()).load
        assert load is not None
        rates.append(summarise(load, {})["output_tokens_per_s"])
    assert rates[1] / rates[0] == pytest.approx(0.5, abs=0.05)


def test_an_unknown_draft_raises_no_trial_error(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    told = {"method": "draft_model", "model": "nobody/knows", "num_speculative_tokens": 5}
    with pytest.raises(InputError, match=r"config\.json"):
        Simulator.of(made).engine({**made.serve, "speculative_config": told})
    with pytest.raises(TrialError):
        Simulator.of(made).engine({**made.serve, "kv_cache_dtype": "fp8"})
