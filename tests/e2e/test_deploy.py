"""What is exported starts what was measured: by vLLM's own word on each form, and by a real server from the script."""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.rows import row
from tests.test_export import of_compose, of_kubernetes, of_systemd
from varcas.child import free_port
from varcas.engine.validation import Validator
from varcas.engine.vllm import server_env
from varcas.experiment import parse_experiment
from varcas.export import Deployment, Options, export, file_name, trial_deployment, write_file

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
FLAGS: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "override_generation_config": {"temperature": 0.5, "top_p": 0.9},
}
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def made(model_dir: Path, flags: dict[str, Any]) -> Deployment:
    e = parse_experiment(
        f"name: d\nmodel: {model_dir}\nhardware: {{gpu: cpu}}\nserver: {{env: {json.dumps(ENV)}}}\n"
        "space: {max_num_seqs: {choices: [4]}}\nworkload: {rate_rps: 1}\n"
    )
    return trial_deployment(row(4, 1.0, model=str(model_dir), config_json=json.dumps(flags)), e)


def test_vllm_resolves_every_form_to_the_trials_own_settings(model_dir: Path, tmp_path: Path) -> None:
    deployment = made(model_dir, {**FLAGS, "speculative_config": SPECULATIVE})
    own = deployment.config.argv()
    written = tmp_path / "vllm.yaml"
    write_file(export(deployment, "vllm-yaml"), written, "vllm-yaml")
    forms = {
        "script and command": deployment.config.argv(placed=True),
        "compose": of_compose(export(deployment, "compose"))[0],
        "k8s": of_kubernetes(export(deployment, "k8s"))[0],
        "systemd": of_systemd(export(deployment, "systemd"))[0],
        "json": json.loads(export(deployment, "json"))["argv"],
        "vllm-yaml": ["--config", str(written)],
    }
    with Validator(None, server_env(ENV), tmp_path / "cache") as validator:
        wanted = validator.check(own)
        assert wanted.ok, wanted.error
        assert wanted.resolved["scheduler"]["max_num_seqs"] == 4
        assert wanted.resolved["cache"]["enable_prefix_caching"] is False
        assert wanted.resolved["speculative"]["num_speculative_tokens"] == 3
        for name, argv in forms.items():
            assert validator.check(argv).resolved == wanted.resolved, name


def test_the_script_starts_the_server_that_was_measured(model_dir: Path, tmp_path: Path) -> None:
    deployment, port = made(model_dir, FLAGS), free_port()
    script, log = tmp_path / file_name("sh", ""), tmp_path / "server.log"
    write_file(export(deployment, "sh", Options(port=port)), script, "sh")
    env = server_env({}) | {"VLLM_API_KEY": "a key", "PYTHON": sys.executable}
    with log.open("w") as out:
        server = subprocess.Popen([str(script)], env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        answer = asked(port, log, server)
        assert answer["usage"]["completion_tokens"] == 3
        told = re.search(r"non-default args: (\{.*\})", log.read_text())
        assert told is not None
        given = ast.literal_eval(told[1])
        assert given == {**FLAGS, "model": str(model_dir), "host": "127.0.0.1", "port": port}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def asked(port: int, log: Path, server: subprocess.Popen[bytes]) -> Any:
    """A real completion, once the server is up."""
    deadline_s = time.monotonic() + 200
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, log.read_text()[-3000:]
            time.sleep(0.3)
    body = json.dumps({"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer a key"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
