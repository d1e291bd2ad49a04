"""The owner's side of `validator.py`: vLLM's own word on flags and configurations, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from varcas.child import Child
from varcas.engine.failures import classify, read_log
from varcas.engine.fetch import local_revision, write_json
from varcas.engine.probe import MissingVllmError, probe_python
from varcas.errors import VarcasError, nearest
from varcas.experiment import Experiment

SCRIPT = Path(__file__).with_name("validator.py")
FIRST_ANSWER_S = 180.0
"""Imports in a cold page cache, then a process that inspects the model: 5-30 s here, more on a network disk."""
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class FlagInfo:
    """A flag of `vllm serve`.

    Attributes:
        name: as experiment files spell it.
        options: as the command line does: `--max-num-seqs`, `-tp`, `--no-...`.
        type: `int`, `float`, `bool`, `str` or `json`.
        choices: the only values it takes; None when it takes any.
        default: as the parser has it; None often means that the model decides.
        help: vLLM's words.
        boolean: it takes no value.
        negatable: it has a `--no-` form.
        several: it takes several values, one after the other.
        deprecated: vLLM says so.
    """

    name: str
    options: tuple[str, ...]
    type: str
    choices: tuple[Any, ...] | None = None
    default: Any = None
    help: str | None = None
    boolean: bool = False
    negatable: bool = False
    several: bool = False
    deprecated: bool = False


@dataclass(frozen=True, slots=True)
class Checked:
    """What vLLM makes of a configuration.

    Attributes:
        ok: it would start with it, as far as can be told without the GPU's memory.
        resolved: the engine's settings, a mapping a section (`model`, `cache`, `scheduler`, ...); empty unless `ok`.
        endpoint: `chat` when the model can chat and that was not ruled out, else `completions`; None unless `ok`.
        error: the refusal in vLLM's words.
        flag: the flag it speaks of, where that could be told.
        stage: `arguments`, `config` or `endpoint`: where it was refused.
    """

    ok: bool
    resolved: Mapping[str, Any] = field(default_factory=dict)
    endpoint: Literal["chat", "completions"] | None = None
    error: str | None = None
    flag: str | None = None
    stage: str | None = None


def refusal(
    experiment: Experiment, checked: Checked, version: str, flags: Mapping[str, Any], over: Literal["baseline", "space"]
) -> str:
    """A refusal in words for people: the flag's place in the file, its value, what vLLM says.

    Args:
        experiment: whose configuration it is.
        checked: vLLM's answer, which is not `ok`.
        version: vLLM's.
        flags: of the configuration, `serve` included.
        over: the section of the file that the configuration lays over `serve`.
    """
    e, flag = experiment, checked.flag
    said = (checked.error or "").rstrip(".")
    if checked.stage == "endpoint":
        place = e.place("workload", "endpoint")
        return f"{place}: {e.workload.endpoint}: {said}. Write `auto`, or give `serve` a `chat_template`"
    section = "serve" if flag in e.serve and flag not in getattr(e, over) else over
    given = flags.get(flag or "")
    value = f" {json.dumps(given)}:" if given is not None else ""
    what = "the baseline" if over == "baseline" else "it"
    place = e.place(section, *([flag] if flag and flag in flags else []))
    return f"{place}:{value} vLLM {version} refuses {what}: {said}. Give a value that it takes"


class Validator:
    """Asks the vLLM of one Python; the child starts at the first question that the disk cannot answer.

    Args:
        python: the server's Python; None is this one.
        env: the server's whole environment: vLLM's variables change its answers.
        cache_dir: keeps answers and the child's log.
        gpu_name: as NVML names it: the answers depend on it.
    """

    def __init__(
        self, python: str | None, env: Mapping[str, str], cache_dir: Path, gpu_name: str | None = None
    ) -> None:
        self._python = python
        self._env = dict(env)
        self._kept = cache_dir / "validator"
        self._gpu_name = gpu_name
        self._child: Child | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """The version of vLLM, from its package: nothing is imported.

        Raises:
            MissingVllmError: that Python has no vLLM.
        """
        version = probe_python(self._python).require().vllm_version
        assert version is not None
        return version

    def flags(self) -> dict[str, FlagInfo]:
        """Returns every flag of `vllm serve`, by name. Raises as `check`."""
        listed = self._asked({"command": "flags"}, FIRST_ANSWER_S)["flags"]
        infos = [
            FlagInfo(**entry | {"options": tuple(entry["options"]), "choices": _tuple(entry["choices"])})
            for entry in listed
        ]
        return {info.name: info for info in infos}

    def check(
        self,
        argv: Sequence[str],
        endpoint: Literal["auto", "chat", "completions"] = "auto",
        timeout_s: float = FIRST_ANSWER_S,
    ) -> Checked:
        """Asks what vLLM makes of `vllm serve ARGV`.

        Args:
            argv: with `--model`.
            endpoint: what the load will use; `chat` is refused for a model that cannot.
            timeout_s: for the first answer; later ones get 60 s.

        Raises:
            MissingVllmError: that Python has no vLLM.
            VarcasError: the child died, or gave no answer in time.
        """
        answer = self._asked({"command": "check", "argv": list(argv), "endpoint": endpoint}, timeout_s)
        checked = Checked(**answer)
        if checked.error and checked.flag and checked.error.startswith("unrecognized arguments"):
            error = f"vLLM {self.version} has no flag {checked.flag}.{nearest(checked.flag, self.flags())}"
            return Checked(False, error=error, flag=checked.flag, stage=checked.stage)
        return checked

    def close(self) -> None:
        """Ends the child, if it runs."""
        with self._lock:
            self._end()

    def __enter__(self) -> Validator:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def _asked(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        place = self._kept / f"{self._key(request)}.json"
        try:
            kept: dict[str, Any] = json.loads(place.read_text())
        except (OSError, ValueError):
            with self._lock:
                kept = self._ask(request, timeout_s)
            write_json(place, kept)
        return kept

    def _key(self, request: dict[str, Any]) -> str:
        """All that an answer depends on: the child's own text too, and the vLLM's files."""
        facts = probe_python(self._python).require()
        depends = {
            k: v for k, v in self._env.items() if k.startswith(("VLLM_", "HF_HUB_OFFLINE")) and k != "VLLM_API_KEY"
        }
        argv = request.get("argv", [])
        models = [Path(argv[i + 1]) for i, item in enumerate(argv[:-1]) if item in ("--model", "--tokenizer")]
        content = [local_revision(model) for model in models if model.is_dir()]
        key = [SCRIPT.read_text(), asdict(facts), self._gpu_name, depends, request, content]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        child = self._child
        if child is None:
            child = self._child = self._start()
        else:
            timeout_s = min(timeout_s, ANSWER_S)
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            line = self._answers.get(timeout=timeout_s)
        except BrokenPipeError:
            line = None
        except queue.Empty:
            self._end()
            raise VarcasError(
                f"vLLM gave no answer on its configuration within {timeout_s:.0f} s; see {child.log}"
            ) from None
        if line is None:
            self._end()
            raise self._died(child)
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"] or request["command"] != "flags":
            return answer
        return {"flags": answer["flags"]}

    def _start(self) -> Child:
        facts = probe_python(self._python).require()
        self._kept.mkdir(parents=True, exist_ok=True)
        quiet = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "PYTHONUNBUFFERED": "1",
        }
        log = self._kept / f"validator-{os.getpid()}.log"
        log.unlink(missing_ok=True)
        child = Child.start([facts.python, str(SCRIPT)], env={**self._env, **quiet}, log=log, pipes=True)
        answers = self._answers = queue.SimpleQueue()
        self._listener = threading.Thread(target=_listen, args=(child, answers), name="validator", daemon=True)
        self._listener.start()
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._listener is not None:
            child.stop(grace_s=0)  # it holds nothing: no reason to wait
            self._listener.join()
            child.close()

    def _died(self, child: Child) -> VarcasError:
        kind, line = classify(read_log(child.log), child.poll())
        if kind == "missing_dependency":
            return MissingVllmError(f"server.python: {probe_python(self._python).python}: vLLM does not import: {line}")
        return VarcasError(f"vLLM's validator died: {line}; see {child.log}")


def _listen(child: Child, answers: queue.SimpleQueue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        answers.put(line)
    answers.put(None)


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
