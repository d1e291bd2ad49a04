"""One real vLLM on this CPU: started, proved to be ours, loaded with exact lengths, and ended without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from varcas import guardian, telemetry
from varcas.engine.failures import read_log
from varcas.engine.vllm import HOST, VllmServer
from varcas.experiment import Workload
from varcas.records import LoadResult
from varcas.workload.driver import Load
from varcas.workload.prompts import Fitted, fit_prompts
from varcas.workload.schedule import schedule
from varcas.workload.wire import Endpoint, Target

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
ARGV = ["--model", "ignored", "--load-format", "dummy", "--max-model-len", "1024", "--max-num-seqs", "8"]
ARGV += ["--enforce-eager", "--block-size", "32"]
WORKLOAD = Workload(profile="chat-short", rate_rps=8, duration_s=5, max_tokens=256)
SALTS = {"fresh": "one", "same seed, fresh salt": "two", "same seed, same salt": "two"}


def test_a_real_server_is_proved_loaded_and_ended(tmp_path: Path, model_dir: Path) -> None:
    log = tmp_path / "server.log"
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    requests = schedule(WORKLOAD, start_s=0, duration_s=5, max_len=1024, stream="measure")
    with (
        VllmServer.start(ARGV, env=env, model_path=str(model_dir), log=log) as server,
        Load.start(tmp_path / "load.log", tmp_path / "load") as load,
    ):
        server.wait_ready(250)
        target = Target(HOST, server.port, server.model_id, server.api_key)
        for endpoint in ("chat", "completions"):
            prepared = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
            fitted = fit_prompts(target, requests, **prepared)  # type: ignore[arg-type]
            hit_frac = {name: measured(load, server, target, fitted, endpoint, salt) for name, salt in SALTS.items()}  # type: ignore[arg-type]
            assert fit_prompts(target, requests, **prepared) == fitted  # type: ignore[arg-type]
            # A fresh salt gives the hits of a fresh server; the salt, and nothing else, keeps the loads apart.
            assert hit_frac["same seed, fresh salt"] == pytest.approx(hit_frac["fresh"], abs=0.01)
            assert hit_frac["same seed, same salt"] > hit_frac["fresh"] + 0.3
        family = server._child.descendants()
        facts = server.facts({}, "r")
        server.stop(15)
        assert server.wait_freed(10) is None
    assert not [pid for pid in family if (p := guardian.processes().get(pid)) and not p.dead]
    assert facts.engine_version is not None
    assert read_log(log).count(facts.engine_version) >= 1
    assert facts.kv_cache_tokens == 524_288  # 1 GiB: 4 layers, 4 heads of 64, keys and values, 2 bytes
    assert facts.resolved["cache"]["enable_prefix_caching"] is True
    assert server.api_key not in read_log(log) + (tmp_path / "load.log").read_text()


def measured(load: Load, server: VllmServer, target: Target, fitted: Fitted, endpoint: Endpoint, salt: str) -> float:
    """Runs one load, checks every record, and returns the share of prompt tokens found in the prefix cache."""
    before = telemetry.scrape(server.url)
    result = load.run(
        target,
        fitted,
        duration_s=5.0,
        max_drain_s=60.0,
        cache_salt=f"{endpoint}-{salt}",
        sampling={},
        endpoint=endpoint,
        stall_timeout_s=60.0,
        cancelled=lambda: False,
        alive=server.alive,
    )
    check(result, fitted)
    after = telemetry.scrape(server.url)
    queries, hits = (after[name] - before[name] for name in ("prefix_cache_queries", "prefix_cache_hits"))
    return hits / queries


def check(result: LoadResult, fitted: Fitted) -> None:
    for record, one in zip(result.records, fitted, strict=True):
        request = one.request
        assert record.error is None
        assert record.prompt_tokens == record.scheduled_prompt_tokens == request.prompt_tokens
        assert record.output_tokens == sum(record.token_counts) == request.output_tokens
        assert record.finish_reason == "length"
