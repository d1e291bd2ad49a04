"""A child process that cannot outlive its owner: the owner's side of `guardian.py`. Linux only."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from varcas import guardian
from varcas.errors import TrialError, VarcasError

START_TIMEOUT_S = 30.0
STOP_GRACE_S = 10.0
LINGER_S = 0.5
ANSWER_S = 5.0
LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp, <net/tcp_states.h>


class Child:
    """One program under a guardian. `with Child.start(...) as child:` leaves nothing of it behind.

    However this process ends, the guardian then kills the program with all its descendants and removes the shared
    memory they made. Methods may be called from any thread.

    Attributes:
        pid: the program's own process id.
        log: where its output goes, after its command line.
        stdin: with `pipes=True`, what the program reads, flushed at each line; else None.
        stdout: with `pipes=True`, what it prints (stderr stays in the log); else None.
        killed: after `stop`, the processes that had to be killed.
        shm_removed: after `stop`, the names in /dev/shm that they left behind.
    """

    def __init__(self, argv: Sequence[str], log: Path, linger_s: float, pipes: bool) -> None:
        self.log = log
        self.pid = 0
        self.stdin: TextIO | None = None
        self.stdout: TextIO | None = None
        self.killed: tuple[int, ...] = ()
        self.shm_removed: tuple[str, ...] = ()
        self._argv = tuple(argv)
        self._linger_s = linger_s
        self._status: int | None = None
        self._failure: OSError | None = None
        self._guardian_pid = 0
        self._started = threading.Event()
        self._exited = threading.Event()
        self._over = threading.Event()
        self._lifeline_lock = threading.Lock()
        self._keeper, self._status_fd = self._start_keeper(pipes)
        threading.Thread(target=self._listen, name=f"child {argv[0]}", daemon=True).start()

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        pipes: bool = False,
        linger_s: float = LINGER_S,
    ) -> Child:
        """Starts a program, in a session of its own, with this environment and nothing of ours.

        Args:
            argv: the program and its arguments; without a slash it is searched for in `env`'s PATH.
            env: its whole environment. It travels through a pipe: no command line or log shows it.
            log: gets the command line, then the output; appended to.
            cwd: its working directory; ours if None.
            pipes: wire `stdin` and `stdout` for a line protocol.
            linger_s: how long descendants may go on after the program's own end, before they are killed.

        Raises:
            OSError: the program could not be executed, or the log not opened: the kernel's own reason.
            VarcasError: this is not Linux, or the guardian did not start.
        """
        if sys.platform != "linux":
            raise VarcasError(f"running servers needs Linux, this is {sys.platform}")
        child = cls(argv, log, linger_s, pipes)
        child._tell({"argv": list(argv), "env": dict(env), "cwd": cwd and str(cwd), "linger_s": linger_s})
        try:
            child._wait_for_start()
        except BaseException:
            child.close()
            raise
        return child

    def poll(self) -> int | None:
        """Returns the program's return code (negative: killed by that signal), None while it runs."""
        return self._status

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits for the program's own end; returns what `poll` does."""
        self._exited.wait(timeout_s)
        return self._status

    def descendants(self) -> set[int]:
        """Returns the living processes: the program, and whatever it started, in whichever session."""
        if self._over.is_set():
            return set()
        roots = {self._keeper.pid, self._guardian_pid} - {0}
        return {pid for pid, process in guardian.descendants(roots).items() if not process.dead}

    def stop(self, grace_s: float = STOP_GRACE_S) -> int:
        """Ends the program and waits until nothing of it is left; returns its return code.

        Its main process gets SIGTERM, and after `grace_s` everything that lives gets SIGKILL (with 0, at once).
        Takes at most `grace_s` and some seconds, even if the guardian hangs. A further call returns the same.
        The pipes stay open, so that what was printed can still be read; `close` closes them.

        Raises:
            TrialError: `hung`: a process did not die of SIGKILL; the kernel holds it.
        """
        self._tell({"stop": grace_s})
        if not self._over.wait(grace_s + ANSWER_S):
            self._kill_without_guardian()
        assert self._status is not None
        return self._status

    def close(self) -> None:
        """Stops, if need be, and closes the pipes."""
        self.stop(STOP_GRACE_S)
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Child:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves nothing behind."""
        self.close()

    def _start_keeper(self, pipes: bool) -> tuple[subprocess.Popen[bytes], int]:
        """Starts the guardian's two processes; returns the one that is ours, and where the status is read."""
        with contextlib.ExitStack() as passed:
            log = passed.enter_context(self.log.open("ab"))
            log.write(f"$ {shlex.join(self._argv)}\n".encode(errors="surrogateescape"))
            log.flush()
            status_fd, *fds = _pipe(passed)
            if pipes:
                self.stdin, self.stdout = _wire(passed, fds)
            # -P: not even the script's own folder is searched for modules (-I implies it)
            command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), *map(str, fds)]
            keeper = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                pass_fds=fds,
                start_new_session=True,
            )
        return keeper, status_fd
