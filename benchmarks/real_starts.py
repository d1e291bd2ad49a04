"""Starts of real servers for the roofline's evidence: models without files, one start until its log has said enough.

The server is `varcas.engine.vllm`'s, under its guardian; how it failed is `varcas.engine.failures`' word. Results are
lines of JSON, appended one by one, so that a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import re
import runpy
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vllm_forks import Forks

from varcas import hardware
from varcas.child import Child, free_port
from varcas.engine.failures import classify, doomed, read_log
from varcas.engine.probe import probe_python
from varcas.engine.vllm import DOOM_S, VllmServer, server_command, server_env
from varcas.errors import TrialError
from varcas.space import ServingConfig

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "varcas" / "configs"
"""`config.json` of published models."""
POLL_S = 0.1
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
"""No start asks the hub; the GPU host has no FlashInfer; a forked engine need not import vLLM again (CPU: spawned)."""
FREED_S = 60.0
YIELD_S = 0.3
"""After locks are let go: whoever waited for them comes first."""
FORK_FAILED = "Cannot re-initialize CUDA in forked subprocess"

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
TINY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("", {}),
    "tiny-awq": ("llama-2-7b", TINY | {"quantization_config": AWQ}),
    "tiny-gptq": ("llama-2-7b", TINY | {"quantization_config": GPTQ}),
    "tiny-fp8": ("llama-2-7b", TINY | {"quantization_config": FP8}),
    "tiny-vocabulary": ("llama-2-7b", TINY | {"vocab_size": 4096, "max_position_embeddings": 2048}),
    "tiny-6-heads": ("llama-2-7b", TINY | {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "tiny-6-heads-4-kv": ("llama-2-7b", TINY | {"hidden_size": 384, "num_attention_heads": 6}),
    "tiny-12-heads": ("llama-2-7b", TINY | {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 3}),
    "tiny-gemma2": ("gemma-2-2b", TINY | {"head_dim": 32}),
    "tiny-qwen2": ("qwen2.5-0.5b", TINY),
    "tiny-qwen2-6-heads": (
        "qwen2.5-0.5b",
        TINY | {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "tiny-gemma3": ("gemma-3-1b", TINY | {"head_dim": 32}),
    "tiny-deepseek": (
        "deepseek-v2-lite",
        {
            "num_hidden_layers": 2,
            "hidden_size": 256,
            "intermediate_size": 768,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "vocab_size": 2048,
        },
    ),
    "smollm2-135m": ("smollm2-135m", {}),
    "qwen2.5-0.5b": ("qwen2.5-0.5b", {}),
    "qwen2.5-7b": ("qwen2.5-7b", {}),
    "gemma-3-1b": ("gemma-3-1b", {}),
    "mistral-7b-4-layers": ("mistral-7b-v0.1", {"num_hidden_layers": 4}),
    "deepseek-v2-lite-2-layers": ("deepseek-v2-lite", {"num_hidden_layers": 2}),
    "llama-2-7b": ("llama-2-7b", {}),
    "llama-2-7b-awq": ("llama-2-7b", {"quantization_config": AWQ}),
    "llama-2-7b-4-layers": ("llama-2-7b", {"num_hidden_layers": 4}),
    "llama-2-7b-4-layers-awq": ("llama-2-7b", {"num_hidden_layers": 4, "quantization_config": AWQ}),
    "llama-2-7b-4-layers-gptq": ("llama-2-7b", {"num_hidden_layers": 4, "quantization_config": GPTQ}),
    "llama-2-7b-4-layers-fp8": ("llama-2-7b", {"num_hidden_layers": 4, "quantization_config": FP8}),
    "llama-2-70b": ("llama-2-70b", {}),
    "llama-2-13b": ("llama-2-13b", {}),
    "llama-2-13b-float": ("llama-2-13b", {"torch_dtype": "float32"}),
    "llama-3.1-70b": ("llama-3.1-70b", {}),
}
"""Name to a published shape and what is changed of it; tiny-llama is `experiments/make_model.py`'s own."""


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """Options of every tool that starts servers; `out` is where rows go by default."""
    parser.add_argument("--out", type=Path, default=out, help="rows are appended here")
    parser.add_argument("--done", type=Path, action="append", default=[], help="rows had before: not started again")
    parser.add_argument("--print", action="store_true", help="start nothing")
    parser.add_argument("--logs", type=Path, help="every server's log is appended here")
    parser.add_argument("--fork", action="store_true", help="fork servers from one process that has imported vLLM")
    parser.add_argument("--budget-s", type=float, help="no start that would end later")
    parser.add_argument("--lock", type=Path, action="append", default=[], help="held alone during each start")
    parser.add_argument("--shared-lock", type=Path, action="append", default=[], help="held with others")


def model_dir(name: str, root: Path) -> Path:
    """Returns a directory that vLLM serves with dummy weights: the shape's config and a small tokenizer of ours."""
    directory = root / name
    if (directory / "generation_config.json").exists():
        return directory
    runpy.run_path(str(ROOT / "experiments" / "make_model.py"))["make_model"]("tiny-llama", directory)
    shape, changes = MODELS[name]
    if shape:
        config = json.loads((SHAPES / shape / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


@dataclass(frozen=True, slots=True)
class Locks:
    """Files locked around each start, on a machine where others measure: shared with starts, or for one at a time."""

    shared: tuple[Path, ...] = ()
    exclusive: tuple[Path, ...] = ()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Waits for all of them."""
        with contextlib.ExitStack() as files:
            for path, how in [(p, fcntl.LOCK_EX) for p in self.exclusive] + [(p, fcntl.LOCK_SH) for p in self.shared]:
                fcntl.flock(files.enter_context(path.open("a")), how)
            yield
        time.sleep(YIELD_S)


@dataclass(frozen=True, slots=True)
class Started:
    """What became of one start.

    Attributes:
        kind: of the failure; None when it got as far as asked.
        detail: vLLM's own words for it.
        log: all it printed.
        wall_s: from the command to the end of the last process.
    """

    kind: str | None
    detail: str
    log: str
    wall_s: float


def start_until(
    config: ServingConfig,
    *,
    log: Path,
    enough: Callable[[str], bool] | None = None,
    env: Mapping[str, str],
    timeout_s: float,
    use: Callable[[VllmServer], None] = lambda server: None,
    alone: bool = True,
    forks: Forks | None = None,
) -> Started:
    """Starts a configuration, past rules and validator, and ends it as soon as its log is `enough` or it fails.

    Args:
        config: what to start; its model is a directory.
        log: of the server; an old one is removed.
        enough: told the log so far; None waits for a whole start with its first completion.
        env: over this process's own.
        timeout_s: of the start.
        use: called with a server that is ready; what it raises counts as the start's failure.
        alone: no other server runs here: wait until its GPU memory is back.
        forks: who forks the server; None starts a process that imports vLLM itself.
    """
    log.unlink(missing_ok=True)
    began_s, kind, detail = time.monotonic(), None, ""
    watched, env = hardware.gpus() if alone else (), {**ENV, **env}
    if forks is None:
        server = VllmServer.start(config.argv(), env=env, model_path=config.model, log=log, gpus=watched)
    else:
        server = _forked(config, env, log, watched, forks)
    try:
        if enough is None:
            server.wait_ready(timeout_s, endpoint="completions")
        else:
            _wait_log(server, enough, timeout_s)
        use(server)
    except TrialError as error:
        kind, detail = error.kind, error.detail
    finally:
        server.stop(0.0)
        server.wait_freed(FREED_S)
    if forks is not None and FORK_FAILED in read_log(log):
        return start_until(config, log=log, enough=enough, env=env, timeout_s=timeout_s, use=use, alone=alone)
    return Started(kind, detail, read_log(log), time.monotonic() - began_s)


def _forked(
    config: ServingConfig, env: Mapping[str, str], log: Path, watched: tuple[hardware.Gpu, ...], forks: Forks
) -> VllmServer:
    """As `VllmServer.start`, with a fork for its child."""
    port, key = free_port(), secrets.token_urlsafe(32)
    command = server_command(config.argv(), python="", has_command=False, port=port, model_path=config.model)
    before = hardware.memory_used_bytes(watched)
    child = forks.start(command[3:], env=server_env(env) | {"VLLM_API_KEY": key}, log=log)
    return VllmServer(cast(Child, child), port, key, watched, before)


def _wait_log(server: VllmServer, enough: Callable[[str], bool], timeout_s: float) -> None:
    ends_s, dooms_s = time.monotonic() + timeout_s, float("inf")
    while not enough(text := read_log(server.log)):
        if doomed(text):
            dooms_s = min(dooms_s, time.monotonic() + DOOM_S)
        if not server.alive() or time.monotonic() > dooms_s:
            raise server.failure("start")
        if time.monotonic() > ends_s:
            raise TrialError("start_timeout", f"{timeout_s:g} s; {classify(text, None)[1]}")
        time.sleep(POLL_S)


def said(log: str, *patterns: str) -> list[str]:
    """Lines of a log that match, without vLLM's prefix, each once."""
    lines = (line for line in log.splitlines() if any(re.search(pattern, line) for pattern in patterns))
    return list(dict.fromkeys(re.sub(r"^(\(.*?\) )?[A-Z]+ \S+ \S+ \[.*?\] ", "", line)[:400] for line in lines))


def circumstances() -> dict[str, Any]:
    """What a row says of where and when it was had."""
    gpus = hardware.gpus()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "vllm": probe_python().vllm_version,
        "gpu": gpus[0].name if gpus else None,
        "gpu_bytes": gpus[0].memory_bytes if gpus else None,
    }


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of JSON lines files, of which some may not be there; of a case started twice the last."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines]
    return list({row["case"]: row for row in rows}.values())


def keep_log(path: Path | None, name: str, log: str) -> None:
    """Appends a server's log to a file, under a heading."""
    if path is not None:
        with path.open("a") as file:
            file.write(f"==== {name}\n{log}\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Writes one row at a file's end, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


class Clock:
    """Says whether another start fits into what is left of a budget."""

    def __init__(self, budget_s: float | None) -> None:
        self._ends_s = time.monotonic() + (float("inf") if budget_s is None else budget_s)
        self._longest_s: dict[str, float] = {}

    def fits(self, sort: str, guess_s: float) -> bool:
        """Whether a start of a sort fits, at the longest seen so far or a guess."""
        return time.monotonic() + self._longest_s.get(sort, guess_s) < self._ends_s

    def took(self, sort: str, wall_s: float) -> None:
        """Remembers how long one took."""
        self._longest_s[sort] = max(wall_s, self._longest_s.get(sort, 0.0))
