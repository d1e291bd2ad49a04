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
        scratch: with `scratch=True`, the program's TMPDIR.
        shm_removed: after `stop`, the names in /dev/shm that they left behind.
    """

    def __init__(self, argv: Sequence[str], log: Path, pipes: bool) -> None:
        self.log = log
        self.pid = 0
        self.stdin: TextIO | None = None
        self.stdout: TextIO | None = None
        self.killed: tuple[int, ...] = ()
        self.shm_removed: tuple[str, ...] = ()
        self.scratch: Path | None = None
        self._argv = tuple(argv)
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
        scratch: bool = False,
        linger_s: float = LINGER_S,
    ) -> Child:
        """Starts a program, in a session of its own, with this environment and nothing of ours.

        Args:
            argv: the program and its arguments; without a slash it is searched for in `env`'s PATH.
            env: its whole environment. It travels through a pipe: no command line or log shows it.
            log: gets the command line, then the output; appended to.
            cwd: its working directory; ours if None.
            pipes: wire `stdin` and `stdout` for a line protocol.
            scratch: give it a TMPDIR of its own, which is removed when it and its descendants are gone.
            linger_s: how long descendants may go on after the program's own end, before they are killed.

        Raises:
            OSError: the program could not be executed, or the log not opened: the kernel's own reason.
            VarcasError: this is not Linux, or the guardian did not start.
        """
        if sys.platform != "linux":
            raise VarcasError(f"running servers needs Linux, this is {sys.platform}")
        child = cls(argv, log, pipes)
        try:
            spec = {"argv": list(argv), "env": dict(env), "cwd": cwd and str(cwd), "linger_s": linger_s}
            child._tell(spec | {"scratch": scratch})
            child._wait_for_start()
        except BaseException:
            child.close(grace_s=0)
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

    def close(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stops, if need be, and closes the pipes."""
        self.stop(grace_s)
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
        """Starts the guardian's two processes; returns the one that is our child, and where the status is read."""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            log = theirs.enter_context(self.log.open("ab", buffering=0))
            log.write(f"$ {shlex.join(self._argv)}\n".encode(errors="surrogateescape"))
            ends = [_pipe(theirs, ours)]
            if pipes:
                ends += [_pipe(ours, theirs)[::-1], _pipe(theirs, ours)]
            passed = [fd for _, fd in ends]
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), *map(str, passed)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=passed,
                start_new_session=True,
            )
            ours.pop_all()
        (status_fd, _), *wires = ends
        if wires:
            (stdin_fd, _), (stdout_fd, _) = wires
            self.stdin = open(stdin_fd, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
            self.stdout = open(stdout_fd, encoding="utf-8", errors="replace")  # noqa: SIM115
        return keeper, status_fd

    def _tell(self, command: dict[str, Any]) -> None:
        """Writes a line to the guardian, if there still is one."""
        lifeline = self._keeper.stdin
        assert lifeline is not None
        with self._lifeline_lock:
            if not lifeline.closed:
                with contextlib.suppress(BrokenPipeError):
                    lifeline.write(json.dumps(command).encode() + b"\n")
                    lifeline.flush()

    def _listen(self) -> None:
        """Takes the guardian's reports until it is gone, in a thread of its own, and reaps what is ours."""
        with open(self._status_fd, "rb") as reports:
            for line in reports:
                self._take(json.loads(line))
        self._keeper.wait()
        lifeline = self._keeper.stdin
        assert lifeline is not None
        with self._lifeline_lock, contextlib.suppress(BrokenPipeError):
            lifeline.close()
        if self._status is None:  # the guardian was killed, and the kernel killed the program with it
            self._status = -signal.SIGKILL
        for event in (self._exited, self._over, self._started):
            event.set()

    def _take(self, report: dict[str, Any]) -> None:
        """Notes one report; the events are listed in `guardian.py`."""
        match report["event"]:
            case "failed":
                self._failure = OSError(report["errno"], report["strerror"], report["path"])
            case "started":
                self.pid, self._guardian_pid = report["pid"], report["guardian"]
                self.scratch = Path(report["scratch"]) if report["scratch"] else None
                self._started.set()
            case "exited":
                self._status = report["status"]
                self._exited.set()
            case "gone":
                self.killed, self.shm_removed = tuple(report["killed"]), tuple(report["shm_removed"])

    def _wait_for_start(self) -> None:
        """Returns once the program is executed."""
        if not self._started.wait(START_TIMEOUT_S):
            raise VarcasError(f"{self._argv[0]} was not executed within {START_TIMEOUT_S:.0f} s; see {self.log}")
        if self._failure is not None:
            raise self._failure
        if not self.pid:
            raise VarcasError(f"the guardian of {self._argv[0]} ended before it executed it; see {self.log}")

    def _kill_without_guardian(self) -> None:
        """Does the guardian's work, whatever keeps it from doing it, then ends it too."""
        deadline_s = time.monotonic() + ANSWER_S
        while (left := self.descendants()) and time.monotonic() < deadline_s:
            guardian.kill(left)
            time.sleep(0.01)
        guardian.kill({self._guardian_pid} - {0})
        if not self._over.wait(1.0):  # the keeper follows its guardian, unless it hangs as well
            self._keeper.kill()
        if left or not self._over.wait(1.0):
            raise TrialError("hung", f"SIGKILL does not end process {sorted(left)} of {shlex.join(self._argv)}")


def _pipe(write_end: contextlib.ExitStack, read_end: contextlib.ExitStack) -> tuple[int, int]:
    """Returns a pipe's (read, write), each closed with the stack that owns that end."""
    read_fd, write_fd = os.pipe()
    read_end.callback(os.close, read_fd)
    write_end.callback(os.close, write_fd)
    return read_fd, write_fd


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 that nobody listens on now; somebody may a moment later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listener_is_ours(port: int, pids: Iterable[int]) -> bool:
    """Returns whether somebody listens on this TCP port, and every such socket is open in one of `pids`."""
    listening = _listening_inodes(port)
    return bool(listening) and listening <= {inode for pid in pids for inode in _socket_inodes(pid)}


def _listening_inodes(port: int) -> set[str]:
    """Reads the kernel's tables: field 1 is address:port in hexadecimal, 3 the state, 9 the socket's inode."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):  # no IPv6
            for row in Path(table).read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def _socket_inodes(pid: int) -> set[str]:
    """Returns the inodes of the sockets that a process has open."""
    found = set()
    with contextlib.suppress(OSError):  # it ended
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found
