"""FAILURES: what can go wrong with a server, told from its own words and its exit status, and what to do about it.

The words are those of vLLM 0.24 and 0.32, torch 2, huggingface_hub 1 and the kernel; each pattern has a case in
`tests/engine/test_failures.py`. A new kind is a row here and a case there.
"""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["download", "start", "load"]
GIB = 2**30
IDLE_GPU_BYTES = GIB
"""What an idle GPU's own context and driver may hold: more than this is somebody else's."""
LONGEST_DETAIL = 600
LONGEST_LOG_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Failure:
    """One kind of failure.

    Attributes:
        kind: its name in results.
        hint: what to do about it.
        retry: it is not the configuration's fault, so the same configuration is tried again.
        patterns: regular expressions, searched in the lines of the log that tell of an error.
    """

    kind: str
    hint: str
    retry: bool = False
    patterns: tuple[str, ...] = ()


FAILURES = (
    Failure(
        "port_in_use",
        "another process took the port first; varcas tries another one",
        retry=True,
        patterns=(r"[Aa]ddress already in use", r"\[Errno 98\]"),
    ),
    Failure(
        "gpu_busy",
        "another process holds GPU memory: see `nvidia-smi`, end it, or give varcas a GPU of its own",
        retry=True,
        patterns=(
            r"Free memory on device .* on startup is less than",
            r"Externally held weights on device .* exceed",
            r"Error in memory profiling\. Initial free memory",
            r"CUDA-capable device\(s\) is/are busy or unavailable",
        ),
    ),
    Failure(
        "kv_cache_too_small",
        "lower `max_model_len`, raise `gpu_memory_utilization`, or take a smaller `kv_cache_dtype` or model",
        patterns=(
            r"No available memory for the cache blocks",
            r"To serve at least one request with the models?'s max seq len",
            r"max seq len \(\d+\) is larger than the maximum number of tokens that can be stored in KV cache",
            r"Cannot auto-fit max_model_len",
        ),
    ),
    Failure(
        "out_of_memory",
        "lower `gpu_memory_utilization`, `max_num_seqs` or `max_num_batched_tokens`; take a smaller or quantised model",
        patterns=(
            r"OutOfMemoryError",
            r"(CUDA|HIP) out of memory",
            r"CUDA error: out of memory",
            r"CUBLAS_STATUS_ALLOC_FAILED",
            r"can't allocate memory",
            r"Cannot allocate memory",
            r"std::bad_alloc",
            r"^MemoryError",
            r"Available memory on node .* is less than (desired CPU memory|requested memory for kv)",
        ),
    ),
    Failure(
        "unsupported_by_gpu",
        "this GPU cannot do it: leave the setting out, or take a newer GPU (`hardware.gpu`)",
        patterns=(
            r"Bfloat16 is only supported on GPUs",
            r"is not supported for the current GPU",
            r"is not supported by the Triton attention backend on",
            r"KV cache is not supported on .* \(compute capability",
            r"No valid attention backend found for",
            r"[Rr]equires? (GPU |CUDA )?(compute capability|SM ?\d\d)",
            r"no kernel image is available for execution",
            r"type fp8e4nv not supported in this architecture",
            r"Feature '.*' requires \.target sm_",
            r"No CUDA GPUs are available",
            r"Found no NVIDIA driver on your system",
            r"CUDA driver version is insufficient",
            r"World size \(\d+\) is larger than the number of available GPUs",
        ),
    ),
    Failure(
        "bad_model_files",
        "a file of the model is missing, damaged or in a format that vLLM cannot read: fetch it anew, or take another",
        patterns=(
            r"SafetensorError",
            r"could not determine the shape of object type 'torch\.storage\.UntypedStorage'",
            r"Cannot find any model weights with|No model weights found in",
            r"Following weights were not initialized from checkpoint",
            r"There is no module or parameter named",
            r"Attempted to load weight .* into parameter",
            r"size mismatch for|The size of tensor a .* must match|loaded_weight\.(size|shape)",
            r"PytorchStreamReader failed|UnpicklingError|Weights only load failed|invalid load key",
            r"^KeyError: '(model|lm_head|transformer|layers)\.",
            r"does not appear to have a file named",
            r"is not a valid JSON file",
            r"No supported config format found|Invalid repository ID or local directory specified",
            r"Unrecognized model in ",
            r"Can't load (the )?(tokenizer|config|image processor)|[Cc]ouldn't instantiate the backend tokenizer",
        ),
    ),
    Failure(
        "model_download",
        "check the model's name and revision and the network; a gated model needs HF_TOKEN in the worker's environment",
        patterns=(
            r"(LocalEntryNotFound|OfflineModeIsEnabled|GatedRepo|RepositoryNotFound|RevisionNotFound|HfHubHTTP)\w*",
            r"We couldn't connect to 'https://huggingface\.co'|Cannot find an appropriate cached snapshot",
            r"Repo id must be in the form|Repository Not Found|Cannot access gated repo",
            r"huggingface\.co.*(Max retries|Name or service|timed out)|(Max retries|Name or service).*huggingface\.co",
            r"^(OSError: .*)?No space left on device",
        ),
    ),
    Failure(
        "missing_dependency",
        "install what the line names into the server's Python, or name another one in `server: {python: ...}`",
        patterns=(
            r"^(ModuleNotFoundError|ImportError|.*PackageNotFoundError)\b",
            r"cannot open shared object file|undefined symbol",
            r"Failed to infer device type",
            r"No such file or directory: '(ninja|nvcc|gcc|cc|g\+\+)'|Could not find nvcc|Failed to find C compiler",
            r"[Pp]lease install .*(pip install|vllm\[)",
            r"GLIBC(XX)?_[\d.]+' not found",
        ),
    ),
    Failure(
        "unsupported_by_engine",
        "this vLLM refuses these flags, together or alone, for this model: the line says which",
        patterns=(
            r"error: (unrecognized arguments|argument |ambiguous option|the following arguments)",
            r"ValidationError",
            r"^NotImplementedError",
            r"FP8 input, output must have dtype",
            r"(is|are) not (yet |currently )?(supported|compatible|allowed)|not support(ed)? |incompatible with",
            r"[Uu]nsupported",
            r"(is|are) not supported for now|does not recognize this architecture|Unknown quantization method",
            r"must be (divisible by|greater|less|at least|at most|larger|smaller|set|one of|a multiple)",
            r"is greater than the derived max_model_len|is smaller than max_(model_len|num_seqs)",
            r"Selected backend .* is not valid",
            r"Cannot find the config file for \w+",
            r"^(ValueError|TypeError): .*--[a-z][a-z-]+ (requires|cannot|must)",
        ),
    ),
    Failure("start_timeout", "raise `server: {start_timeout_s: ...}`; a first start compiles, a later one is faster"),
    Failure("crashed_at_start", "the log shows where; run the command of `varcas show` by hand to see it again"),
    Failure("crashed_under_load", "the log shows where; fewer sequences or tokens at once often avoid it"),
    Failure("hung", "the server lived but gave no token; the log's last lines show what it was doing"),
    Failure("all_requests_failed", "the server refused every request: the first error says why"),
    Failure("slo_out_of_reach", "physics allows no server to meet this limit here: loosen `slo`, or take a faster GPU"),
    Failure("worker_lost", "the Ray worker or its node died; the trial is run again", retry=True),
    Failure("interrupted", "it was stopped on request; the same command goes on"),
)
HINTS = {failure.kind: failure.hint for failure in FAILURES}
RETRIED = frozenset(failure.kind for failure in FAILURES if failure.retry)
"""Kinds that are not the configuration's fault."""

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX = re.compile(
    r"^(?:\([\w.\- ]+ pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
_RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt|NotFound|Refused)\b(?::|$)")
_USAGE = re.compile(r"^\S*: error: |^Fatal Python error|^Segmentation fault|^terminate called|^  what\(\): ")
_CONSEQUENCE = re.compile(
    r"See root cause above|See stack trace|initialization failed|failed to start|encountered a fatal error|"
    r"died unexpectedly|EngineDeadError|Process .* terminated|^KeyboardInterrupt|^asyncio\.exceptions\.CancelledError|"
    r"^(zmq|anyio)\.|^SystemExit"
)
_DOOMED = re.compile(
    r"EngineCore failed to start|Engine core initialization failed|EngineCore encountered a fatal error|"
    r"WorkerProc failed to start|Worker proc \S+ died unexpectedly|Process EngineCore\S* died|DP Coordinator .* died"
)
_KILLED = re.compile(r"(?:Failed core proc\(s\): \{[^}]*: -9|exit code: -9)\b")
_FREE_MEMORY = re.compile(r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\)")
_CONFIGURING = re.compile(
    r", in (create_engine_config|validate_parsed_serve_args|create_speculative_config)$", re.MULTILINE
)
_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_[redacted]"),
    (re.compile(r"\b(sk|ghp|github_pat|glpat|xox[abp])[-_][A-Za-z0-9_-]{12,}"), r"\1-[redacted]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 [redacted]"),
    (
        re.compile(
            r"(?i)([\w-]*(?:api[_-]?key|hf[_-]token|access[_-]?token|secret|password)['\"]?\s*[=:]\s*)(\[?['\"]?)[^\s,'\"\])}]{4,}"
        ),
        r"\1\2[redacted]",
    ),
    (re.compile(r"(\w+://)[^\s/:@]+:[^\s/@]+@"), r"\1[redacted]@"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Blots out what looks like a secret, and the given ones wherever they stand."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[redacted]")
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def read_log(path: Path) -> str:
    """Returns a log's text: of a very long one its first and last 4 MiB."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, 2)
            log.seek(0)
            if size <= LONGEST_LOG_BYTES:
                return log.read().decode(errors="replace")
            first = log.read(LONGEST_LOG_BYTES // 2)
            log.seek(-(LONGEST_LOG_BYTES // 2), 2)
            return (first + b"\n...\n" + log.read()).decode(errors="replace")
    except FileNotFoundError:
        return ""


def doomed(log_text: str) -> bool:
    """Whether the log says that the engine is dead, though the process may linger."""
    return _DOOMED.search(log_text) is not None


def classify(log_text: str, exit_status: int | None, phase: Phase = "start") -> tuple[str, str]:
    """Tells a failure's kind, and the line of the log that says so.

    The first exception that is raised counts: what follows it ("Engine core initialization failed") is its consequence.

    Args:
        log_text: what the server printed.
        exit_status: its return code (negative: the signal), None while it lives.
        phase: what it was doing; decides what an unknown failure is called.

    Returns:
        The kind, and a line without vLLM's prefix, colours and secrets, at most 600 characters long.
    """
    lines = [_ANSI.sub("", line).rstrip() for line in log_text.splitlines()]
    if phase == "load":
        lines = lines[next((i for i, line in enumerate(lines) if "encountered a fatal error" in line), 0) :]
    found = list(_errors(lines))
    for line in found:
        if kind := _kind_of(line):
            return kind, _shown(line)
    if exit_status == -signal.SIGKILL or _KILLED.search(log_text):
        said = f" The log ends: {_shown(found[0])}" if found else ""
        return "out_of_memory", f"killed by SIGKILL, as the kernel does when the host has no memory left.{said}"
    if phase == "start" and found and _CONFIGURING.search("\n".join(lines)):
        return "unsupported_by_engine", _shown(found[0])
    if exit_status in (-signal.SIGTERM, -signal.SIGINT):
        return "interrupted", f"ended by {signal.Signals(-exit_status).name}, which varcas did not send"
    unknown = {"download": "model_download", "start": "crashed_at_start", "load": "crashed_under_load"}[phase]
    return unknown, _shown(found[0]) if found else _last_words(lines, exit_status)


def _errors(lines: list[str]) -> Iterator[str]:
    """Yields the messages of errors in order: what was raised, and what was logged as an error."""
    for number, line in enumerate(lines):
        prefix = _PREFIX.match(line)
        level, text = (prefix["level"], line[prefix.end() :]) if prefix else (None, line)
        if level in ("DEBUG", "INFO", "WARNING") or text.startswith((" ", "Traceback")) or _CONSEQUENCE.search(text):
            continue
        if _RAISED.match(text) or _USAGE.match(text):
            yield _joined(text, lines[number + 1 : number + 4])
        elif level in ("ERROR", "CRITICAL") and _kind_of(text):  # words that are logged count when they are known
            yield text


def _joined(text: str, following: list[str]) -> str:
    """An exception's line, with the next ones when pydantic spread it over several."""
    if "ValidationError" not in text:
        return text
    rest = [line[prefix.end() :] for line in following if (prefix := _PREFIX.match(line))]
    mine = itertools.takewhile(lambda line: not _RAISED.match(line) and not line.startswith("Traceback"), rest)
    said = [line.strip() for line in mine if line.strip() and "For further information" not in line]
    return re.sub(r" \[type=\w+, .*", "", " ".join([text, *said]))


def _kind_of(line: str) -> str | None:
    for failure in FAILURES:
        if any(re.search(pattern, line) for pattern in failure.patterns):
            return "out_of_memory" if failure.kind == "gpu_busy" and _asks_too_much(line) else failure.kind
    return None


def _asks_too_much(line: str) -> bool:
    """The GPU is as free as it gets, and the configuration wants more: nobody else is to blame."""
    memory = _FREE_MEMORY.search(line)
    return memory is not None and (float(memory[2]) - float(memory[1])) * GIB <= IDLE_GPU_BYTES


def _shown(line: str) -> str:
    text = redact(" ".join(line.split()))
    return text if len(text) <= LONGEST_DETAIL else text[: LONGEST_DETAIL - 1] + "…"


def _last_words(lines: list[str], exit_status: int | None) -> str:
    ended = "it still runs" if exit_status is None else f"exit status {exit_status}"
    if exit_status is not None and exit_status < 0:
        ended = f"ended by {signal.Signals(-exit_status).name}"
    texts = [line[prefix.end() :] if (prefix := _PREFIX.match(line)) else line for line in lines]
    last = next((text for text in reversed(texts) if text.strip() and not text.startswith("$ ")), None)
    return _shown(f"{ended}; last line: {last}") if last else f"{ended}; it printed nothing"
