"""What a worker node says before any server starts there: its model, its vLLM, its GPU, and vLLM's word on flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from varcas import hardware
from varcas.engine.failures import HINTS
from varcas.engine.fetch import FetchedModel, fetch_model, is_local
from varcas.engine.probe import probe_python
from varcas.engine.validation import Checked, Validator
from varcas.engine.vllm import server_env, without
from varcas.errors import TrialError, VarcasError
from varcas.experiment import Server

__all__ = ["Checked", "Node", "NodeFacts", "cache_dir", "config_text", "other_models"]


def cache_dir() -> Path:
    """Where a node keeps what a later run can use: vLLM's answers, fitted prompts, where models lie.

    `VARCAS_CACHE` names another place; each node needs one of its own.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VARCAS_CACHE") or Path(home) / "varcas")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node is, as far as it decides whether two measurements may be compared, and what cannot work there.

    Attributes:
        engine_version: of its vLLM.
        model_path: where the model lies on it.
        model_revision: commit of the snapshot, or content hash of the directory's configuration.
        gpu_name: as NVML names its first GPU.
        driver_version: of that.
        gpu_memory_bytes: all of that GPU's memory; None where the node's GPUs differ in it.
        model_config: text of the model's `config.json`; None where there is none.
        host_memory_bytes: all of the host's memory.
        engine_env: vLLM's variables in its server's environment.
    """

    engine_version: str
    model_path: str
    model_revision: str
    gpu_name: str | None
    driver_version: str | None
    gpu_memory_bytes: int | None = None
    model_config: str | None = None
    host_memory_bytes: int | None = None
    engine_env: Mapping[str, str] = field(default_factory=dict)


def config_text(directory: str) -> str | None:
    """Text of a model directory's `config.json`; None without one that can be read."""
    try:
        return (Path(directory) / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def other_models(flags: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Model and revision of the draft model and the tokenizer that a configuration names (vllm/config/speculative.py).

    `ngram` as a draft "model" is a method's name.
    """
    found = [(flags.get("tokenizer"), flags.get("tokenizer_revision"))]
    speculative = flags.get("speculative_config")
    if isinstance(speculative, Mapping):
        found.append((speculative.get("model"), speculative.get("revision")))
    return [(model, revision) for model, revision in found if isinstance(model, str) and "ngram" not in model]


class Node:
    """Answers for the node it is made on; `Pool.service` places it on a worker.

    Args:
        server: the experiment's: which Python, which environment.
        model: hub id or directory.
        revision: of a hub model.
    """

    def __init__(self, server: Server, model: str, revision: str | None) -> None:
        self._server, self._model, self._revision = server, model, revision
        self._python = probe_python(server.python)
        self._env = server_env(server.env, python=self._python.python)
        self._gpus = hardware.gpus()
        self._fetched: FetchedModel | None = None
        self._validator = Validator(server.python, self._env, cache_dir(), self._gpu_name)

    @property
    def _gpu_name(self) -> str | None:
        return self._gpus[0].name if self._gpus else None

    def has_vllm(self) -> bool:
        """Whether the server's Python has vLLM."""
        return self._python.vllm_version is not None

    def vllm_version(self) -> str | None:
        """Of the server's Python; None without one."""
        return self._python.vllm_version

    def model_is_local(self) -> bool:
        """The model is a directory here."""
        return is_local(self._model) and Path(self._model).expanduser().is_dir()

    def facts(self) -> NodeFacts:
        """Fetches the model, if need be, and says what is here.

        Raises:
            MissingVllmError: the server's Python has no vLLM.
            VarcasError: the model cannot be had: the failure kind, the line that says so, and what to do.
        """
        version = self._python.require().vllm_version
        assert version is not None
        try:
            fetched = self.fetch()
        except TrialError as error:
            raise VarcasError(f"model: {error.kind}: {error.detail}. Fix: {HINTS[error.kind]}.") from None
        gpu = self._gpus[0] if self._gpus else None
        return NodeFacts(
            engine_version=version,
            model_path=fetched.path,
            model_revision=fetched.revision,
            gpu_name=self._gpu_name,
            driver_version=gpu.driver_version if gpu else None,
            gpu_memory_bytes=gpu.memory_bytes if gpu and len({g.memory_bytes for g in self._gpus}) == 1 else None,
            model_config=config_text(fetched.path),
            host_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            engine_env={k: v for k, v in self._env.items() if k.startswith("VLLM_") and k != "VLLM_API_KEY"},
        )

    def fetch(self) -> FetchedModel:
        """The model on this node, fetched once.

        Raises:
            TrialError: `model_download`, `bad_model_files`, `missing_dependency`.
        """
        if self._fetched is None:
            self._fetched = self._fetch(self._model, self._revision)
        return self._fetched

    def fetch_others(self, flags: Mapping[str, Any]) -> None:
        """Fetches what else a configuration names by hub id: no server start waits for it. Raises as `fetch`."""
        for model, revision in other_models(flags):
            if model != self._model:
                self._fetch(model, revision)

    def _fetch(self, model: str, revision: str | None) -> FetchedModel:
        cache = cache_dir()
        cache.mkdir(parents=True, exist_ok=True)
        return fetch_model(
            model,
            revision,
            python=self._python.python,
            env=self._env,
            cache_dir=cache,
            log=cache / "fetch.log",
            deadline_s=self._server.download_timeout_s,
        )

    def flag_names(self) -> list[str]:
        """Flags of `vllm serve` of the version here."""
        return list(self._validator.flags())

    def check(self, argv: Sequence[str], endpoint: Literal["auto", "chat", "completions"] = "auto") -> Checked:
        """Asks for vLLM's word on a configuration (`ServingConfig.argv()`), with the model as it lies on this node."""
        here = ["--model", self.fetch().path, *without(argv, "--model", "--revision")]
        return self._validator.check(here, endpoint)

    def close(self) -> None:
        """Ends the child that asks vLLM."""
        self._validator.close()
