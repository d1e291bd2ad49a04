"""A program that is hard to get rid of: a child and a grandchild in sessions of their own, each with shared memory.

    python stubborn.py --report FILE [--ignore-sigterm] [--then wait | exit:N | signal:N]

The program, its child and its orphaned grandchild each make a segment in /dev/shm and write a line
`{"role", "pid", "shm"}` to FILE; when all three have, the program does what `--then` says.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path


def settle(role: str, report: Path, ignore_sigterm: bool) -> shared_memory.SharedMemory:
    """Makes a segment that nobody but a guardian would remove, and reports it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore_sigterm else signal.SIG_DFL)
    segment = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(segment._name, "shared_memory")  # type: ignore[attr-defined]
    with report.open("a") as file:
        file.write(json.dumps({"role": role, "pid": os.getpid(), "shm": segment.name}) + "\n")
    return segment


def descend(roles: list[str], report: Path, ignore_sigterm: bool) -> None:
    """Forks a process per role, each the child of the one before; a middleman's exit orphans the last."""
    role, *rest = roles
    if os.fork():
        return
    os.setsid()
    if rest:
        descend(rest, report, ignore_sigterm)
    elif os.fork():
        os._exit(0)
    segment = settle(role, report, ignore_sigterm)
    while segment.buf:
        time.sleep(60)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--then", default="wait")
    options = parser.parse_args()
    descend(["child", "grandchild"], options.report, options.ignore_sigterm)
    segment = settle("program", options.report, options.ignore_sigterm)
    while len(options.report.read_text().splitlines()) < 3:
        time.sleep(0.01)
    what, _, number = options.then.partition(":")
    if what == "exit":
        os._exit(int(number))
    if what == "signal":
        os.kill(os.getpid(), int(number))
    print("ready", segment.name, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
