"""Real vLLM servers forked from one process that has imported vLLM: saves the import of each start.

What runs in a fork is the server's own main, `python -m vllm.entrypoints.openai.api_server`, with its arguments and
its environment. The forking process runs under a guardian, so that nothing of it all outlives the tool. As a script,
this is that process; it reads orders from stdin, a line of JSON each, and answers each with a line.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER = "vllm.entrypoints.openai.api_server"
POLL_S = 0.02


class Forks:
    """The process that forks. `with Forks(...) as forks:` ends all its servers.

    Args:
        env: of that process: what vLLM reads while it is imported, PYTHONPATH and the level of its log.
        log: of that process.
    """

    def __init__(self, env: Mapping[str, str], log: Path) -> None:
        from varcas.child import Child

        argv = [sys.executable, __file__]
        self._child = Child.start(argv, env=env, log=log, pipes=True, scratch=True)
        self._lock = threading.Lock()
        self.ask({})

    def ask(self, order: Mapping[str, Any]) -> Any:
        """Sends an order and returns the answer."""
        with self._lock:
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            self._child.stdin.write(json.dumps(order) + "\n")
            answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks servers is dead: see {self._child.log}")
        return json.loads(answer)

    def start(self, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> ForkedChild:
        """Forks a server."""
        with log.open("a") as file:
            file.write(f"$ (forked) {SERVER} {' '.join(argv)}\n")
        pid = self.ask({"argv": list(argv), "env": dict(env), "log": str(log)})
        return ForkedChild(self, pid, log)

    def descendants(self) -> set[int]:
        """Every living process of every server, and the one that forks."""
        return self._child.descendants()

    def __enter__(self) -> Forks:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends everything."""
        self._child.close(grace_s=0)


class ForkedChild:
    """One forked server, with what `VllmServer` asks of a `varcas.child.Child`. Its processes share its session."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.log = log
        self.pid = pid
        self._forks = forks
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return code (negative: the signal); None while it runs."""
        if self._status is None:
            self._status = self._forks.ask({"poll": self.pid})
        return self._status

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits for its own end."""
        ends_s = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while self.poll() is None and time.monotonic() < ends_s:
            time.sleep(POLL_S)
        return self._status

    def descendants(self) -> set[int]:
        """Living processes of its session."""
        return {pid for pid in self._forks.descendants() if _session(pid) == self.pid}

    def stop(self, grace_s: float) -> int:
        """SIGTERM to its main process, and after `grace_s` SIGKILL to all of its session."""
        if grace_s and self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
            self.wait(grace_s)
        while left := self.descendants():
            for pid in left:
                _kill(pid)
            self.poll()
            time.sleep(POLL_S)
        status = self.wait()
        assert status is not None
        return status


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


# ---- the process that forks


def main() -> None:
    """Imports vLLM, then obeys. `{}` waits for that, `argv` forks, `poll` tells a return code."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints while it is imported is no answer
    runpy.run_module(SERVER, run_name="imported")
    for line in sys.stdin:
        order = json.loads(line)
        answer = None
        if "argv" in order:
            answer = os.fork()
            if not answer:
                answers.close()
                _serve(order)
        elif "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")


def _serve(order: Mapping[str, Any]) -> None:
    """Becomes the server; never returns."""
    os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.argv = [SERVER, *order["argv"]]
    status = 1
    try:
        runpy.run_module(SERVER, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # as the interpreter does with what nobody catches
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
