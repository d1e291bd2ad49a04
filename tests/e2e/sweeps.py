"""Sweeps as a person runs them: the command line in a process of its own, over a scripted server in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAKE_PYTHON = Path(__file__).parents[1] / "servers" / "fake_vllm_python"
ROOT = Path(__file__).parents[2]

EXPERIMENT: dict[str, Any] = {
    "name": "scripted",
    "model": "",
    "hardware": {"gpu": "cpu"},
    "server": {"python": str(FAKE_PYTHON), "env": {}, "stop_timeout_s": 1.0, "start_timeout_s": 60.0},
    "serve": {},
    "baseline": {"max_num_seqs": 1},
    "space": {"max_num_seqs": {"choices": [1, 2, 4, 8]}},
    "workload": {
        "profile": "chat-short",
        "rate_rps": 15,
        "duration_s": 3.0,
        "warmup_s": 0.5,
        "max_drain_s": 1.0,
    },
    "study": {"trials": 4, "sampler": "random", "repeats": 0},
    "results": "",
}


def write_experiment(directory: Path, model_dir: Path, fake: str = "--itl-ms 2 --ttft-ms 5", **changes: Any) -> Path:
    """An experiment over the scripted server; `fake` are its options. JSON is YAML."""
    data = EXPERIMENT | {"model": str(model_dir), "results": str(directory / "results")} | changes
    data["server"] = EXPERIMENT["server"] | changes.get("server", {})
    data["server"]["env"] = {"FAKE_VLLM": fake} | data["server"]["env"]
    path = directory / "experiment.yaml"
    path.write_text(json.dumps(data, indent=1))
    return path


@dataclass
class Run:
    """A `varcas` process, and the mark by which everything it started is found again."""

    process: subprocess.Popen[str]
    mark: str
    output: list[str] = field(default_factory=list)

    def finish(self, timeout_s: float = 120) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def marked(self, name: str = "") -> dict[int, str]:
        """Living processes of this run whose command line holds `name`, the driver included."""
        return {pid: line for pid, line in marked(self.mark, f"_{self.process.pid}/logs/").items() if name in line}

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if found := condition():
                return found
            assert self.process.poll() is None, f"ended early: {self.process.communicate()}"
            time.sleep(0.02)
        raise AssertionError(f"not within {timeout_s} s; running: {self.marked()}")


def varcas(*arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Run:
    mark = f"varcas-test-{uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-m", "varcas", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"VARCAS_TEST_MARK": mark, "PYTHONPATH": str(ROOT)} | dict(env or {}),
        start_new_session=True,  # so that a test can send Ctrl-C to its process group, as a terminal does
    )
    return Run(process, mark)


def marked(mark: str, ray_logs: str) -> dict[int, str]:
    """Processes with the mark in their environment, or of Ray with a log open whose path holds `ray_logs`.

    Ray's agents and workers write their titles over their environment; their session is named by the driver's pid.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes() or logs_to(entry, ray_logs):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def logs_to(entry: Path, ray_logs: str) -> bool:
    """Whether a process of Ray has a log open whose path holds `ray_logs`."""
    if b"ray" not in (entry / "cmdline").read_bytes():
        return False
    return any(ray_logs in os.readlink(fd) for fd in (entry / "fd").iterdir())


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def left_after(run: Run, before: set[str], timeout_s: float = 10) -> tuple[dict[int, str], set[str]]:
    """Processes and shared-memory segments of a run that are still there once `timeout_s` have passed."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        processes, segments = run.marked(), shared_memory() - before
        if (not processes and not segments) or time.monotonic() > deadline_s:
            return processes, segments
        time.sleep(0.1)


def end(run: Run) -> None:
    """Ends whatever a failed test left, by pid."""
    for pid in run.marked():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
