"""Ends what is left of a local Ray whose driver was killed: Ray's agents can outlive it by half a minute.

Run as a script by `pool.py`: waits for the end of its input, which is its owner's end, then kills the processes of that
Ray. They are known by an environment variable that the owner set before it started them. Guardians are left alone: the
death of their worker makes them end their servers. Standard library only.
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


def of_ray(mark: bytes) -> list[int]:
    """Processes of Ray with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                is_ray = command.startswith(b"ray::") or b"/ray/" in command
                if is_ray and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def main() -> None:
    """Takes the mark as its argument: `NAME=value`."""
    mark = sys.argv[1].encode()
    sys.stdin.buffer.read()
    quiet = 0
    for _ in range(ROUNDS):
        left = of_ray(mark)
        quiet = 0 if left else quiet + 1
        if quiet >= QUIET_ROUNDS:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
