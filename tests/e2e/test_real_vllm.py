"""The quickstart's path on real vLLM, as short as it can be: one good trial, one that fails for a real reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.sweeps import left_after, shared_memory, varcas
from varcas.results import Results

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(400)]


def test_a_sweep_of_real_vllm(tmp_path: Path, model_dir: Path) -> None:
    before = shared_memory()
    experiment = {
        "name": "real",
        "model": str(model_dir),
        "hardware": {"gpu": "cpu"},
        "server": {"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        "serve": {"load_format": "dummy", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 8},
        "space": {"num_gpu_blocks_override": {"choices": [None, 4]}},
        "workload": {"profile": "chat-short", "rate_rps": 3, "duration_s": 8, "warmup_s": 1, "max_drain_s": 10},
        "study": {"trials": 2, "repeats": 0, "prune": False},  # the roofline knows that 4 blocks are too few
        "results": str(tmp_path / "results"),
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(experiment))
    run = varcas("sweep", path, "--json", env={"HF_HUB_OFFLINE": "1"})
    code, out, err = run.finish(380)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["deploy"]["max_num_seqs"] == 8
    assert [failure["kind"] for failure in answer["failures"]] == ["kv_cache_too_small"]
    assert left_after(run, before) == ({}, set())

    results = Results(tmp_path / "results")
    row = next(row for row in results.trials() if row.state == "complete")
    requests = results.sql("select * from requests where trial_id = '" + row.trial_id + "'").to_pylist()
    assert requests
    for request in requests:
        assert request["error"] is None
        assert request["prompt_tokens"] == request["scheduled_prompt_tokens"]
        assert request["output_tokens"] == request["scheduled_output_tokens"]
    assert row.kv_cache_tokens
    assert row.resolved_json is not None
    assert json.loads(row.resolved_json)["scheduler"]["max_num_seqs"] == 8
    assert row.engine_version == "0.32.0"
    logs = "".join(log.read_text() for log in (tmp_path / "results" / "logs").rglob("*.log"))
    assert "--max-num-seqs 8" in logs
    assert not re.search(r"VLLM_API_KEY\s*=\s*\S|Bearer \S", logs)
