"""Models, fetched once a node before any server starts: a hub id becomes a directory, a directory is checked."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from varcas.child import Child
from varcas.engine.failures import classify, read_log
from varcas.errors import InputError, TrialError

POLL_S = 0.1
STOP_GRACE_S = 1.0
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$", re.ASCII)
LARGE_BYTES = 64 * 2**20
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
FROM_FILES = ("auto", "hf", "safetensors", "pt", "npcache", "mistral", "gguf")
"""`load_format`s that read `WEIGHTS` (vllm/config/load.py); `dummy` needs none, others have files of their own."""
SCRIPT = """
import json, os, sys
from huggingface_hub import HfApi, snapshot_download

model, revision = json.loads(sys.argv[2])
token = os.environ.get("HF_TOKEN") or False  # False: nor one that lies in a file of somebody's
ignored = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite"]
ignored += ["onnx/*", "original/*", "coreml/*", "openvino/*"]
try:
    names = [f.rfilename for f in HfApi(token=token).model_info(model, revision=revision).siblings]
    if any(n.endswith(".safetensors") for n in names):  # vLLM takes these, and the others only without them
        ignored += ["*.bin", "*.pt", "*.pth"]
    if "params.json" not in names and any(n.startswith("model") and n.endswith(".safetensors") for n in names):
        ignored += ["consolidated*"]
    path = snapshot_download(model, revision=revision, token=token, ignore_patterns=ignored)
except Exception as error:
    try:
        path = snapshot_download(model, revision=revision, local_files_only=True)
    except Exception:
        raise error
print(json.dumps({"path": path, "revision": os.path.basename(path)}), flush=True)
"""
"""Runs in the server's Python, whose huggingface_hub fills the cache that its vLLM reads. Falls back on that cache."""


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model on this node.

    Attributes:
        path: a directory that vLLM can serve.
        revision: commit of the snapshot, or `sha256:...` of a local directory (`local_revision`).
    """

    path: str
    revision: str


def is_local(model: str) -> bool:
    """Whether a model is meant as a directory here, rather than as a hub id."""
    return Path(model).expanduser().is_dir() or model.startswith(("/", "./", "../", "~")) or not HUB_ID.match(model)


def check_local_model(model: str) -> None:
    """Checks a directory; a hub id passes, since only the hub knows it.

    Raises:
        InputError: no such directory, or no `config.json` in it.
    """
    if problem := _problem(model):
        raise InputError(f"model: {model}: {problem}")


def lacks_weights(model: str) -> bool:
    """Whether a model is a directory here that holds neither weights nor an index of them."""
    path = Path(model).expanduser()
    return path.is_dir() and not any(
        entry.name.endswith((*WEIGHTS, ".index.json")) for entry in path.iterdir() if entry.is_file()
    )


def weights_problem(model: str, flags: Mapping[str, object]) -> str | None:
    """Why a server with these flags cannot load a local model; None when nothing is known against it."""
    if flags.get("load_format", "auto") not in FROM_FILES or not lacks_weights(model):
        return None
    return (
        f"{Path(model).expanduser().absolute()} holds no weights ({', '.join('*' + end for end in WEIGHTS)}): "
        "no server can start. Add them, or write `load_format: dummy` under `serve:` "
        "(random weights: timing is real, text is not)"
    )


def _problem(model: str) -> str | None:
    path = Path(model).expanduser()
    if not is_local(model):
        first = path.parts[0]
        if len(path.parts) == 2 and Path(first).is_dir():
            return (
                f"no such directory (tried {path.absolute()}; {first}/ is there). Give an existing one, as seen from "
                "the working directory, or a hub id that is not a path here"
            )
        return None
    if not path.is_dir():
        return (
            f"no such directory (tried {path.absolute()}). Give a directory with config.json, as seen from the working "
            "directory, or a hub id such as org/name"
        )
    if not (path / "config.json").is_file() and not (path / "params.json").is_file():
        return (
            f"has no config.json: {path.absolute()} is no model directory. "
            "Give the one that holds the weights and config.json"
        )
    return None


def local_revision(directory: Path) -> str:
    """A hash over the small files' content and the large ones' names and sizes: it changes when the model does."""
    files = [(path, path.stat()) for path in sorted(directory.iterdir()) if path.is_file()]
    return _hash_of(tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files))


@functools.lru_cache(maxsize=16)
def _hash_of(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in files:
        path = Path(name)
        large = path.suffix in WEIGHTS or size > LARGE_BYTES
        digest.update(f"{path.name}\0{size}\0".encode())
        digest.update(b"" if large else path.read_bytes())
    return f"sha256:{digest.hexdigest()[:32]}"


def fetch_model(
    model: str,
    revision: str | None,
    *,
    python: str,
    env: Mapping[str, str],
    cache_dir: Path,
    log: Path,
    deadline_s: float,
    cancelled: threading.Event | None = None,
) -> FetchedModel:
    """Makes sure that a model is on this node, and returns where; another process that fetches it is waited for.

    Args:
        model: hub id or directory.
        revision: commit, branch or tag of a hub model.
        python: the server's Python; it needs huggingface_hub, which vLLM brings.
        env: of the download; HF_TOKEN and HF_HOME are read there.
        cache_dir: for the marker that makes later calls cheap, and the lock. Of this node, not shared between nodes.
        log: gets the download's output.
        deadline_s: seconds from now.
        cancelled: when set, the download is stopped.

    Raises:
        TrialError: `model_download`, or `bad_model_files` for a directory that is none.
    """
    if is_local(model):
        if problem := _problem(model):
            raise TrialError("bad_model_files", f"{model}: {problem}")
        path = Path(model).expanduser().absolute()
        return FetchedModel(str(path), local_revision(path))
    home = env.get("HF_HUB_CACHE") or env.get("HF_HOME") or ""
    key = hashlib.sha256(json.dumps([model, revision, home]).encode()).hexdigest()[:24]
    marker = cache_dir / "models" / f"{key}.json"
    if known := _marked(marker):
        return known
    marker.parent.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + deadline_s
    try:
        with FileLock(f"{marker}.lock", timeout=deadline_s):
            return _marked(marker) or _fetch(model, revision, python, env, log, ends_s, cancelled, marker)
    except Timeout:
        raise TrialError(
            "model_download", f"{model}: another process did not finish it in {deadline_s:.0f} s"
        ) from None


def _marked(marker: Path) -> FetchedModel | None:
    try:
        known = FetchedModel(**json.loads(marker.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return known if Path(known.path).is_dir() else None


def _fetch(
    model: str,
    revision: str | None,
    python: str,
    env: Mapping[str, str],
    log: Path,
    ends_s: float,
    cancelled: threading.Event | None,
    marker: Path,
) -> FetchedModel:
    argv = [python, "-c", SCRIPT, "fetch", json.dumps([model, revision])]
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    with Child.start(argv, env={**env, **quiet}, log=log, pipes=True) as child:
        while (status := child.wait(POLL_S)) is None:
            stopped = cancelled is not None and cancelled.is_set()
            if stopped or time.monotonic() > ends_s:
                child.stop(grace_s=STOP_GRACE_S)  # what was downloaded stays, and the next one goes on from there
                late = TrialError("model_download", f"{model}: not fetched before the deadline; see {log}")
                raise TrialError("interrupted", f"{model}: asked to stop while it was fetched") if stopped else late
        assert child.stdout is not None
        answer = child.stdout.read() if status == 0 else ""
    if not answer:
        kind, line = classify(read_log(log), status, "download")
        if kind == "missing_dependency":
            raise TrialError(kind, f"{model}: {line}")
        tried = Path(model).absolute()
        raise TrialError("model_download", f"{model} (taken as a hub id: no directory {tried}): {line}")
    fetched = FetchedModel(**json.loads(answer.splitlines()[-1]))
    if problem := _problem(fetched.path):
        raise TrialError("bad_model_files", f"{model}: {problem}")
    write_json(marker, asdict(fetched))
    return fetched


def write_json(path: Path, content: object) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(content, file)
    os.replace(file.name, path)
