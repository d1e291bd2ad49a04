"""The owner's side of the validator, against a stand-in that speaks its protocol, and against real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from varcas.engine.probe import MissingVllmError
from varcas.engine.validation import Checked, FlagInfo, Validator, refusal
from varcas.engine.vllm import server_env
from varcas.errors import VarcasError
from varcas.experiment import parse_experiment

VLLM = [sys.executable, "experiments/make_model.py", "tiny-llama"]


@pytest.fixture
def validator(fake_python: str, tmp_path: Path) -> Iterator[Validator]:
    """A stand-in's."""
    with Validator(fake_python, dict(os.environ), tmp_path / "cache") as made:
        yield made


def logs(tmp_path: Path) -> list[Path]:
    """One for each child that was started here."""
    return list((tmp_path / "cache" / "validator").glob("validator-*.log"))


def test_flags_are_known_by_name(validator: Validator) -> None:
    flags = validator.flags()
    assert flags["max_num_seqs"] == FlagInfo("max_num_seqs", ("--max-num-seqs",), "int", default=128)
    assert flags["enforce_eager"].boolean
    assert flags["kv_cache_dtype"].choices == ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
    assert flags["speculative_config"].type == "json"


def test_a_configuration_is_resolved(validator: Validator, model_dir: Path) -> None:
    checked = validator.check(["--model", str(model_dir), "--max-num-seqs", "8"])
    assert checked.ok
    assert checked.resolved["scheduler"]["max_num_seqs"] == 8
    assert checked.resolved["scheduler"]["max_num_batched_tokens"] == 2048
    assert checked.endpoint == "chat"
    assert validator.check(["--model", str(model_dir)], "completions").endpoint == "completions"


def test_a_refusal_names_the_flag(validator: Validator, model_dir: Path) -> None:
    checked = validator.check(["--model", str(model_dir), "--max-num-seqs", "0"])
    assert (checked.ok, checked.flag, checked.stage) == (False, "max_num_seqs", "config")
    assert checked.error == "max_num_seqs: Input should be greater than or equal to 1"


@pytest.mark.parametrize(
    ("flag", "over", "said"),
    [
        ("max_model_len", "baseline", 'x.yaml:4: serve.max_model_len: "lots": vLLM 1.0 refuses the baseline: no'),
        ("max_num_seqs", "space", "x.yaml:5: space.max_num_seqs: 0: vLLM 1.0 refuses it: no"),
        ("max_num_seqs", "baseline", "x.yaml:6: baseline.max_num_seqs: 0: vLLM 1.0 refuses the baseline: no"),
        (None, "space", "x.yaml:5: space: vLLM 1.0 refuses it: no"),
    ],
)
def test_a_refusal_in_words_has_its_place(flag: str | None, over: Literal["baseline", "space"], said: str) -> None:
    text = (
        "name: t\nmodel: m\nworkload: {rate_rps: 1}\nserve: {max_model_len: lots}\n"
        "space: {max_num_seqs: {choices: [0]}}\nbaseline: {max_num_seqs: 0}\n"
    )
    experiment = parse_experiment(text, "x.yaml")
    flags = {"max_model_len": "lots", "max_num_seqs": 0}
    checked = Checked(False, error="no.", flag=flag, stage="config")
    assert refusal(experiment, checked, "1.0", flags, over) == f"{said}. Give a value that it takes"


def test_an_unknown_flag_is_answered_with_the_nearest(validator: Validator, model_dir: Path) -> None:
    checked = validator.check(["--model", str(model_dir), "--max-num-sqs", "8"])
    assert checked.error == "vLLM 0.32.0 has no flag max_num_sqs. Did you mean max_num_seqs?"
    assert checked.flag == "max_num_sqs"


def test_answers_are_kept_until_what_they_depend_on_changes(fake_python: str, tmp_path: Path, model_dir: Path) -> None:
    argv = ["--model", str(model_dir), "--max-num-seqs", "4"]
    env = dict(os.environ)

    def asks_anew(gpu: str | None = None, **variables: str) -> bool:
        for log in logs(tmp_path):
            log.unlink()
        with Validator(fake_python, env | variables, tmp_path / "cache", gpu) as validator:
            assert validator.check(argv).ok
        return bool(logs(tmp_path))

    assert asks_anew()
    assert not asks_anew()
    assert not asks_anew(VLLM_API_KEY="another one each time", UNRELATED="1")
    assert asks_anew(VLLM_USE_V2="1")
    assert asks_anew("Tesla T4")
    assert not asks_anew("Tesla T4")
    (model_dir / "config.json").write_text("{}")
    assert asks_anew()


def test_kept_answers_come_in_milliseconds(validator: Validator, model_dir: Path) -> None:
    validator.check(["--model", str(model_dir)])
    began_s = time.perf_counter()
    for _ in range(20):
        validator.check(["--model", str(model_dir)])
    assert (time.perf_counter() - began_s) / 20 < 0.01


def test_a_python_without_vllm_is_told_before_anything_starts(without_vllm: str, tmp_path: Path) -> None:
    with Validator(without_vllm, dict(os.environ), tmp_path / "cache") as validator:
        with pytest.raises(MissingVllmError, match="has no vLLM"):
            validator.check(["--model", "x"])
        with pytest.raises(MissingVllmError):
            _ = validator.version
    assert not logs(tmp_path)


PROBED = """echo '{"python_version": "3.12.0", "distribution": "vllm", "vllm_version": "0.24.0"}'"""


@pytest.mark.parametrize(
    ("dies", "error", "words"),
    [
        (
            "ModuleNotFoundError: No module named torch",
            MissingVllmError,
            "does not import: ModuleNotFoundError: No module",
        ),
        ("RuntimeError: what is this", VarcasError, "validator died: RuntimeError: what is this"),
    ],
)
def test_a_child_that_dies_says_why(
    executable: Callable[[str], str], tmp_path: Path, dies: str, error: type[VarcasError], words: str
) -> None:
    python = executable(f'[ "$1" = -c ] && {PROBED} && exit; echo "{dies}" >&2; exit 1')
    with (
        Validator(python, dict(os.environ), tmp_path / "cache") as validator,
        pytest.raises(error, match=words),
    ):
        validator.check(["--model", "x"])


def test_a_child_that_hangs_is_given_up(executable: Callable[[str], str], tmp_path: Path) -> None:
    python = executable(f'[ "$1" = -c ] && {PROBED} && exit; exec sleep 60')
    began_s = time.monotonic()
    with (
        Validator(python, dict(os.environ), tmp_path / "cache") as validator,
        pytest.raises(VarcasError, match="no answer on its configuration within 0 s"),
    ):
        validator.check(["--model", "x"], timeout_s=0.3)
    assert time.monotonic() - began_s < 5


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a chat template."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    subprocess.run([*VLLM, str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Validator]:
    """Real vLLM's word; about 15 s for the first answer."""
    env = server_env({"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
    with Validator(None, env, tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.mark.vllm
def test_real_vllm_lists_its_flags(real: Validator) -> None:
    flags = real.flags()
    assert len(flags) > 200
    assert (flags["max_num_seqs"].type, flags["enforce_eager"].type) == ("int", "bool")
    assert flags["enable_prefix_caching"].negatable
    assert "fp8" in (flags["kv_cache_dtype"].choices or ())
    assert flags["speculative_config"].type == "json"
    assert flags["tensor_parallel_size"].options[:2] == ("--tensor-parallel-size", "-tp")
    assert flags["max_num_batched_tokens"].type == "int"
    assert "sequences" in (flags["max_num_seqs"].help or "")


@pytest.mark.vllm
def test_real_vllm_resolves_what_it_accepts(real: Validator, tiny_llama: Path) -> None:
    model = ["--model", str(tiny_llama), "--load-format", "dummy", "--max-model-len", "1024"]
    checked = real.check(model)
    assert checked.ok, checked.error
    resolved = checked.resolved
    assert resolved["scheduler"]["max_num_batched_tokens"] >= 1024
    assert resolved["model"]["dtype"] == "bfloat16"
    assert resolved["cache"]["enable_prefix_caching"] is True
    assert resolved["parallel"]["tensor_parallel_size"] == 1
    assert resolved["speculative"] is None
    assert "instance_id" not in json.dumps(resolved)
    assert checked.endpoint == "chat"
    began_s = time.perf_counter()
    ngram = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    spoken = real.check([*model, "--speculative-config", json.dumps(ngram)])
    assert spoken.resolved["speculative"]["num_speculative_tokens"] == 5
    assert time.perf_counter() - began_s < 2


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("argv", "flag", "stage", "words"),
    [
        (["--max-num-seqs", "0"], "max_num_seqs", "config", "max_num_seqs: Input should be greater than or equal to 1"),
        (["--max-num-seqs", "x"], "max_num_seqs", "arguments", "invalid int value: 'x'"),
        (["--max-num-sqs", "4"], "max_num_sqs", "arguments", "Did you mean max_num_seqs?"),
        (["--max-num-seq", "4"], "max_num_seq", "arguments", "Did you mean max_num_seqs?"),  # no abbreviations
        (
            ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "256"],
            "max_num_batched_tokens",
            "config",
            "max_num_batched_tokens (256) is smaller than max_model_len (1024)",
        ),
        (["--kv-cache-dtype", "fp9"], "kv_cache_dtype", "arguments", "invalid choice: 'fp9'"),
        (["--speculative-config", '{"method": "nope"}'], "speculative_config", "config", "method: Input should be"),
        (
            ["--compilation-config", '{"nope": 1}'],
            "compilation_config",
            "arguments",
            "nope: Unexpected keyword argument",
        ),
        (["--gpu-memory-utilization", "1.4"], "gpu_memory_utilization", "config", "less than or equal to 1"),
        (["--enable-auto-tool-choice"], "enable_auto_tool_choice", "arguments", "requires --tool-call-parser"),
        (["--quantization", "awq"], "quantization", "config", "Cannot find the config file for awq"),
    ],
)
def test_real_vllm_refuses_in_its_own_words(
    real: Validator, tiny_llama: Path, argv: list[str], flag: str, stage: str, words: str
) -> None:
    checked = real.check(["--model", str(tiny_llama), "--load-format", "dummy", "--max-model-len", "1024", *argv])
    assert (checked.ok, checked.flag, checked.stage) == (False, flag, stage)
    assert words in (checked.error or "")
    assert "pydantic" not in (checked.error or "")


@pytest.mark.vllm
def test_real_vllm_knows_whether_a_model_can_chat(real: Validator, tmp_path: Path) -> None:
    base = tmp_path / "base"
    subprocess.run([*VLLM, str(base), "--no-chat-template"], check=True, capture_output=True)
    model = ["--model", str(base), "--load-format", "dummy"]
    assert real.check(model).endpoint == "completions"
    refused = real.check(model, "chat")
    assert (refused.ok, refused.stage) == (False, "endpoint")
    assert real.check([*model, "--chat-template", "{{ messages }}"], "chat").endpoint == "chat"
