from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.workload.conftest import API_KEY, wait_until_up
from varcas.child import Child, free_port
from varcas.experiment import Workload
from varcas.records import LoadResult
from varcas.workload.chat import decide_endpoint, schedule
from varcas.workload.driver import Load
from varcas.workload.prompts import Fitted, fit_prompts
from varcas.workload.wire import Endpoint, Target

ROOT = Path(__file__).parents[2]
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_API_KEY": API_KEY,
    "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", ""),
}


@contextmanager
def vllm(model: Path, log: Path) -> Iterator[Target]:
    port = free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--load-format", "dummy", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    argv += ["--max-num-seqs", "8", "--enforce-eager", "--block-size", "32"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {name: value for name, value in ENV.items() if value} | {"PATH": path}
    with Child.start(argv, env=env, log=log) as child:
        wait_until_up(child, f"http://127.0.0.1:{port}/health", 150)
        yield Target("127.0.0.1", port, str(model), API_KEY)


def cache_counters(target: Target) -> tuple[float, float]:
    """Tokens looked up in the prefix cache since the start, and those found."""
    with urllib.request.urlopen(f"http://{target.host}:{target.port}/metrics") as response:
        lines = response.read().decode().splitlines()
    queries, hits = (
        sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}_total"))
        for name in ("queries", "hits")
    )
    return queries, hits


@pytest.mark.vllm
@pytest.mark.timeout(240)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_lengths_are_exact_and_no_cache_carries_over(tmp_path: Path, endpoint: Endpoint) -> None:
    model = tmp_path / "model"
    options = [] if endpoint == "chat" else ["--no-chat-template"]
    script = str(ROOT / "experiments" / "make_model.py")
    subprocess.run([sys.executable, script, "tiny-llama", str(model), *options], check=True)
    assert decide_endpoint("auto", model, {}) == endpoint
    workload = Workload(profile="chat-short", rate_rps=8, duration_s=5, max_tokens=256)
    requests = schedule(workload, start_s=0, duration_s=5, max_len=1024, stream="measure")

    with (
        Load.start(tmp_path / "load.log", tmp_path / "load") as load,
        vllm(model, tmp_path / "vllm.log") as target,
    ):
        fitted = fit_prompts(target, requests, endpoint=endpoint, cache_dir=tmp_path / "cache")
        hit_frac = {name: measure(load, target, fitted, endpoint, salt) for name, salt in SALTS.items()}
        again = fit_prompts(target, requests, endpoint=endpoint, cache_dir=tmp_path / "cache")
    assert again == fitted
    assert hit_frac["same seed, fresh salt"] == pytest.approx(hit_frac["fresh server"], abs=0.01)
    assert hit_frac["same seed, same salt"] > hit_frac["fresh server"] + 0.3  # the salt is what keeps them apart
    assert API_KEY not in (tmp_path / "vllm.log").read_text() + (tmp_path / "load.log").read_text()


SALTS = {"fresh server": "one", "same seed, fresh salt": "two", "same seed, same salt": "two"}


def measure(load: Load, target: Target, fitted: Fitted, endpoint: Endpoint, salt: str) -> float:
    """Runs one load, checks every record, and returns the share of prompt tokens found in the prefix cache."""
    before = cache_counters(target)
    result = load.run(
        target,
        fitted,
        duration_s=5.0,
        max_drain_s=60.0,
        cache_salt=salt,
        sampling={},
        endpoint=endpoint,
        stall_timeout_s=60.0,
        cancelled=lambda: False,
        alive=lambda: True,
    )
    check(result, fitted)
    queries, hits = (now - then for now, then in zip(cache_counters(target), before, strict=True))
    return hits / queries


def check(result: LoadResult, fitted: Fitted) -> None:
    for record, (request, _) in zip(result.records, fitted, strict=True):
        assert record.error is None
        assert record.prompt_tokens == record.scheduled_prompt_tokens == request.prompt_tokens
        assert record.output_tokens == sum(record.token_counts) == request.output_tokens
        assert record.finish_reason == "length"
