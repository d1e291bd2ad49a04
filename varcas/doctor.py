"""`varcas doctor`: what is here, what is missing, and the fix."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from varcas import __version__, hardware
from varcas.engine.fetch import check_local_model, weights_problem
from varcas.engine.node import Node
from varcas.engine.probe import probe_python
from varcas.errors import InputError
from varcas.experiment import Experiment, Server

LIBRARIES = ("ray", "optuna", "locust", "pyarrow", "pydantic", "duckdb")
LEAST_FREE_BYTES = 10 * 10**9
LEAST_OPEN_FILES = 4096
"""A load of 1,000 open requests needs as many sockets, the server as many again."""


class Check(BaseModel):
    """One thing looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    status: Literal["ok", "warning", "missing"]
    found: str
    fix: str | None = None


class Report(BaseModel):
    """Everything looked at; `ok` when nothing is missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ok: bool = Field(description="nothing is missing; warnings may stand")
    checks: list[Check]


def examine(experiment: Experiment | None = None) -> Report:
    """Looks at this machine, for an experiment's server and hardware when one is given."""
    server = experiment.server if experiment else Server()
    wanted = experiment.hardware.gpu if experiment else "auto"
    results = Path(experiment.results if experiment else "results")
    looks: list[Callable[[], Check]] = [
        _python,
        _libraries,
        lambda: _vllm(server),
        lambda: _gpus(wanted),
        _ray,
        _ports,
        lambda: _disk(results),
        _shared_memory,
        _open_files,
    ]
    if experiment:
        looks.append(lambda: _model(experiment))
    checks = [look() for look in looks]
    return Report(ok=all(check.status != "missing" for check in checks), checks=checks)


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}, varcas {__version__}, {platform.platform()}"
    if sys.platform != "linux":
        return Check(
            name="python", status="warning", found=found, fix="servers run on Linux: sweep there or on a cluster"
        )
    return Check(name="python", status="ok", found=found)


def _libraries() -> Check:
    found, missing = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(name="libraries", status="missing", found=f"no {', '.join(missing)}", fix="pip install varcas")
    return Check(name="libraries", status="ok", found=", ".join(found))


def _vllm(server: Server) -> Check:
    probed = probe_python(server.python)
    if probed.vllm_version is None:
        return Check(
            name="vllm",
            status="missing",
            found=f"{probed.python}: {probed.problem or 'has no vLLM'}",
            fix="GPU host: pip install 'varcas[vllm]'; or name the Python that has it in `server: {python: ...}`",
        )
    found = f"{probed.distribution} {probed.vllm_version} in {probed.python}"
    if probed.distribution != "vllm":
        fix = "a build by others than vLLM's authors: for a quickstart and tests, not for production figures"
        return Check(name="vllm", status="warning", found=found, fix=fix)
    return Check(name="vllm", status="ok", found=found)


def _gpus(wanted: str) -> Check:
    gpus = hardware.gpus()
    if gpus:
        found = ", ".join(
            f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB, driver {gpu.driver_version})" for gpu in gpus
        )
        if wanted in ("auto", "cpu") or any(gpu.kind == wanted for gpu in gpus):
            return Check(name="gpu", status="ok", found=found)
        return Check(
            name="gpu",
            status="missing",
            found=found,
            fix=f"the experiment wants {wanted}: join a cluster with --address",
        )
    if wanted == "cpu":
        return Check(name="gpu", status="ok", found="none, and none is asked for")
    status: Literal["warning", "missing"] = "warning" if wanted == "auto" else "missing"
    fix = "measure on this CPU with `hardware: {gpu: cpu}`, or join a cluster with --address"
    return Check(name="gpu", status=status, found="none that NVML sees", fix=fix)


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    where = "a local Ray is started for each sweep; --address joins a cluster"
    if address:
        fix = f"varcas sweep EXPERIMENT --address {address}"
        return Check(name="ray", status="warning", found=f"RAY_ADDRESS={address} is not used by itself", fix=fix)
    return Check(name="ray", status="ok", found=where)


def _ports() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Check(name="ports", status="ok", found=f"loopback listens (tried {server.getsockname()[1]})")
    except OSError as error:
        return Check(name="ports", status="missing", found=str(error), fix="allow this user to listen on 127.0.0.1")


def _disk(results: Path) -> Check:
    place = next(p for p in (results, *results.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.0f} GB free at {place}"
    if not os.access(place, os.W_OK):
        return Check(
            name="disk", status="missing", found=f"{place} is not writable", fix="give --results a writable path"
        )
    if free < LEAST_FREE_BYTES:
        return Check(
            name="disk", status="warning", found=found, fix="free some space: models and compile caches need it"
        )
    return Check(name="disk", status="ok", found=found)


def _shared_memory() -> Check:
    shm = Path("/dev/shm")
    if not shm.exists():
        return Check(
            name="shared memory", status="warning", found="no /dev/shm", fix="mount one: vLLM's processes use it"
        )
    free = shutil.disk_usage(shm).free
    found = f"{free / 1e9:.1f} GB free in /dev/shm"
    if free < 10**9:
        return Check(name="shared memory", status="warning", found=found, fix="give the container --shm-size=8g")
    return Check(name="shared memory", status="ok", found=found)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} (hard limit {hard})"
    if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
        return Check(name="open files", status="warning", found=found, fix="raise the hard limit: ulimit -Hn 65536")
    return Check(name="open files", status="ok", found=found)


def _model(experiment: Experiment) -> Check:
    try:
        check_local_model(experiment.model)
    except InputError as error:
        return Check(name="model", status="missing", found=str(error), fix="correct `model:` in the experiment")
    if problem := weights_problem(experiment.model, {**experiment.serve, **experiment.baseline}):
        found, _, fix = problem.partition(". ")
        return Check(name="model", status="missing", found=found, fix=fix)
    if Node(experiment.server, experiment.model, experiment.revision).model_is_local():
        return Check(name="model", status="ok", found=f"{experiment.model} is here")
    fix = "it is fetched before the first server starts; set HF_TOKEN for a gated model"
    return Check(name="model", status="warning", found=f"{experiment.model} is not a local directory", fix=fix)


def report_text(report: Report) -> str:
    """One line a check, and the fix under what is not well."""
    marks = {"ok": "ok", "warning": "WARNING", "missing": "MISSING"}
    lines = []
    for check in report.checks:
        lines.append(f"{marks[check.status]:8} {check.name}: {check.found}")
        if check.fix:
            lines.append(f"{'':8}   fix: {check.fix}")
    return "\n".join(lines)
