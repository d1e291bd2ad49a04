"""The owner's side of `live_scheduler.py`: a running server is asked for limits, and believed once it echoes them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from varcas.engine import live_scheduler
from varcas.engine.live_scheduler import LIVE, VARIABLE, LiveFile
from varcas.inner import Limits

MODULE = "varcas_live_scheduler"
"""What the copy is called; beside the file itself lies a `vllm.py`, which would hide vLLM."""
ARGV = ("--scheduler-cls", f"{MODULE}.make")
ECHO_S = 20.0
POLL_S = 0.1


class NotLiveError(Exception):
    """The running server did not take new limits; what was meant to be measured with them is not."""


class LiveServer:
    """What one server start needs to change its limits, in a directory of its own.

    Args:
        directory: of the start's, there as long as the server.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "live"
        self._directory.mkdir()
        shutil.copy(live_scheduler.__file__, self._directory / f"{MODULE}.py")
        self._path = self._directory / "limits"
        self._file = LiveFile.make(str(self._path))
        self._generation = 0

    def env(self, server_env: Mapping[str, str]) -> dict[str, str]:
        """What the server's environment needs beside `server_env`, its whole one without this."""
        path = os.pathsep.join(filter(None, [str(self._directory), server_env.get("PYTHONPATH", "")]))
        return {VARIABLE: str(self._path), "PYTHONPATH": path}

    def apply(self, limits: Limits, poke: Callable[[], bool], cancelled: threading.Event) -> dict[str, int]:
        """Has the server take limits, and returns those that are in force then.

        Args:
            limits: None in them is the start's own.
            poke: sends the server a request; whether it was answered. Limits are taken up with a request that finds
                the server idle.
            cancelled: ends the wait.

        Raises:
            NotLiveError: it cannot, or did not within `ECHO_S`.
        """
        state, why = self._file.state()
        if state != LIVE:
            raise NotLiveError(why or "our scheduler was not asked for by this vLLM")
        self._generation += 1
        seqs, tokens = limits.max_num_seqs or 0, limits.max_num_batched_tokens or 0
        self._file.ask(self._generation, seqs, tokens)
        ends_s = time.monotonic() + ECHO_S
        while not (poke() and self._file.applied()[0] == self._generation):
            if cancelled.wait(POLL_S) or time.monotonic() > ends_s:
                raise NotLiveError(f"no echo of {limits} within {ECHO_S:g} s")
        _, *found = self._file.applied()
        if any(want not in (0, have) for want, have in zip((seqs, tokens), found, strict=True)):
            raise NotLiveError(f"{limits} was asked for, and {found[0]} sequences and {found[1]} tokens are in force")
        return {"max_num_seqs": found[0], "max_num_batched_tokens": found[1]}
