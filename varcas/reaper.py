"""Ends what is left of a local Ray whose driver was killed: Ray's agents can outlive it by half a minute.

Run as a script by `pool.py`: waits for the end of its input, which is its owner's end, then kills the processes of that
Ray. They are known by an environment variable that the owner set before it started them; those that have written their
title over their environment (agents, workers) by an open log of the session, which Ray names by the owner's pid.
Guardians are left alone: the death of their worker makes them end their servers. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

ROUNDS = 90
PAUSE_S = 0.1
QUIET_ROUNDS = 20
"""A process that is just being started shows up late."""


def main() -> None:
    """Takes the mark, `NAME=value`, and the owner's pid as its arguments."""
    mark, owner = sys.argv[1].encode(), int(sys.argv[2])
    began_ticks = start_ticks(Path("/proc/self"))
    sys.stdin.buffer.read()
    quiet = 0
    for _ in range(ROUNDS):
        left = of_this_ray(mark, owner, began_ticks)
        quiet = 0 if left else quiet + 1
        if quiet >= QUIET_ROUNDS:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)


def of_this_ray(mark: bytes, owner: int, began_ticks: int) -> list[int]:
    """Processes of the Ray that `owner` has started since then."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                is_ray = command.startswith(b"ray::") or b"/ray/" in command
                if is_ray and start_ticks(entry) >= began_ticks and is_marked(entry, mark, owner):
                    found.append(int(entry.name))
    return found


def is_marked(entry: Path, mark: bytes, owner: int) -> bool:
    """Whether a process has the mark in its environment, or a log of the owner's session open."""
    if mark in (entry / "environ").read_bytes():
        return True
    return any(f"_{owner}/logs/" in os.readlink(fd) for fd in (entry / "fd").iterdir())


def start_ticks(entry: Path) -> int:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22)."""
    return int((entry / "stat").read_bytes().rpartition(b")")[2].split()[19])


if __name__ == "__main__":
    main()
