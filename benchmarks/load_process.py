"""Runs a client to its end on given cores, and notes the CPU time and memory of it and all its descendants."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KILL_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants used.

    Attributes:
        wall_s: from start to end.
        cpu_s: user and system, all of it.
        peak_rss_bytes: largest sum of resident sets at a time; pages that processes share count for each.
        moments_s: of looks, on CLOCK_MONOTONIC.
        cpu_at_s: CPU seconds used by each of those.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    moments_s: tuple[float, ...]
    cpu_at_s: tuple[float, ...]

    def cpu_between_s(self, begin_s: float, end_s: float) -> float:
        """CPU seconds used between two moments, linear between looks."""
        return self._at(end_s) - self._at(begin_s)

    def _at(self, moment_s: float) -> float:
        before = 0.0, 0.0
        for look in zip(self.moments_s, self.cpu_at_s, strict=True):
            if look[0] >= moment_s:
                span_s = look[0] - before[0]
                share = (moment_s - before[0]) / span_s if span_s > 0 and before[0] > 0 else 1.0
                return before[1] + share * (look[1] - before[1])
            before = look
        return before[1]


class _Watch(threading.Thread):
    """Looks at a process tree now and then; what has ended keeps what it was last seen to have used."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.looks: list[tuple[float, float]] = []
        self.peak_rss_bytes = 0
        self._pid = pid
        self._cpu_s: dict[int, float] = {}
        self._over = threading.Event()

    def run(self) -> None:
        """Looks until `stop`."""
        while True:
            self._look()
            if self._over.wait(SAMPLE_EVERY_S):
                return

    def stop(self) -> None:
        """Ends it, after a last look."""
        self._over.set()
        self.join()

    def _look(self) -> None:
        rss_bytes = 0
        for pid in tree(self._pid):
            if (found := _cpu_and_rss(pid)) is not None:
                self._cpu_s[pid] = found[0]
                rss_bytes += found[1]
        self.looks.append((time.monotonic(), sum(self._cpu_s.values())))
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found, at = [pid], 0
    while at < len(found):
        found += _children(found[at])
        at += 1
    return found


def _children(pid: int) -> Iterable[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for thread in threads for word in (thread / "children").read_text().split()]
    except OSError:  # it has just ended
        return []


def _cpu_and_rss(pid: int) -> tuple[float, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system, rss_pages = int(fields[11]), int(fields[12]), int(fields[21])
    return (user + system) / TICKS_PER_S, rss_pages * os.sysconf("SC_PAGE_SIZE")


def run_watched(
    argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log: Path, timeout_s: float
) -> Usage:
    """Runs a program.

    Raises:
        TimeoutError: it did not end in time; it was killed.
        ChildProcessError: it failed; says what it wrote last.
    """
    began_s = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    watch = _Watch(child.pid)
    watch.start()
    try:
        status, used_s = _wait(child, began_s + timeout_s)
    finally:
        watch.stop()
        if child.returncode is None:  # interrupted
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if status is None:
        raise TimeoutError(f"not done after {timeout_s:.0f} s; see {log}")
    if status:
        raise ChildProcessError(f"exit {status}: {_last_line(log)}")
    moments_s, cpu_at_s = zip(*watch.looks, strict=True)
    cpu_s = max(used_s, cpu_at_s[-1])
    return Usage(time.monotonic() - began_s, cpu_s, watch.peak_rss_bytes, moments_s, cpu_at_s)


def _wait(child: subprocess.Popen[bytes], deadline_s: float) -> tuple[int | None, float]:
    """Waits for a child.

    Returns its status, None if it had to be killed, and the CPU seconds of it and the descendants that were waited for.
    """
    killed = False
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return None if killed else child.returncode, used.ru_utime + used.ru_stime
        if time.monotonic() > deadline_s + (KILL_WAIT_S if killed else 0):
            os.killpg(child.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
