"""Time to the microsecond: the kernel's receive stamps on CLOCK_MONOTONIC, and an alarm that rings when it is due.

A single-threaded client is a queue: when all streams of a step arrive together, the last one read waits for the others.
The kernel stamps a segment as it comes in (SO_TIMESTAMPNS), before that queue, so that the queue is in no figure.

Stamps are CLOCK_REALTIME. NTP slews it and CLOCK_MONOTONIC alike, so their offset only changes when somebody *sets* the
clock. `Offset` is measured again for each response: what was under way when it changed keeps the user-space stamps.
Linux only. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from array import array
from collections.abc import Sequence
from time import monotonic_ns, time_ns

SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>; Python does not name it
STAMP_BYTES = 16  # struct timespec
ANCILLARY_BYTES = socket.CMSG_SPACE(STAMP_BYTES)
NO_STAMP = bytes(STAMP_BYTES)

STEP_NS = 20_000
QUIET_NS = 10_000
MAX_LOOKS = 64
TFD_TIMER_ABSTIME = 1
CLOCK_MONOTONIC = 1


class Offset:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, and how often it was seen to change.

    Attributes:
        ns: the offset.
        steps: changes seen so far.
    """

    def __init__(self) -> None:
        self.ns = _offset_ns()
        self.steps = 0

    def check(self) -> None:
        """Looks again; what moved by more than two looks can differ is a step."""
        now_ns = _offset_ns()
        if abs(now_ns - self.ns) > STEP_NS:
            self.steps += 1
            self.ns = now_ns


def _offset_ns() -> int:
    """Reads one clock between two looks at the other, until they lie close together, or takes the closest."""
    best: tuple[int, int] | None = None
    for _ in range(MAX_LOOKS):
        before_ns, real_ns, after_ns = monotonic_ns(), time_ns(), monotonic_ns()
        look = after_ns - before_ns, real_ns - (before_ns + after_ns) // 2
        best = look if best is None else min(best, look)
        if best[0] < QUIET_NS:
            break
    assert best is not None
    return best[1]


def ask_for_stamps(sock: socket.socket) -> None:
    """Has the kernel stamp what this socket receives, where it can."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def keep_stamping() -> socket.socket:
    """Returns a socket that keeps the kernel stamping: it takes a moment to begin when the first socket asks for it."""
    keeper = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ask_for_stamps(keeper)
    return keeper


def arrivals(stamps: bytes | bytearray, seen_s: Sequence[float], offset_ns: int | None) -> list[float]:
    """When each receive's last byte came in, in seconds on CLOCK_MONOTONIC.

    Args:
        stamps: a `struct timespec` each, or `NO_STAMP`.
        seen_s: when each receive returned; it stands in where there is no stamp.
        offset_ns: of the clocks; None: it is not known, and no stamp is used.
    """
    if offset_ns is None:
        return list(seen_s)
    parts = array("q", bytes(stamps))
    return [
        (seconds * 1_000_000_000 + ns - offset_ns) / 1e9 if seconds else at_s
        for seconds, ns, at_s in zip(parts[::2], parts[1::2], seen_s, strict=True)
    ]


class Alarm:
    """A timerfd: readable at a moment of CLOCK_MONOTONIC, within some 50 us; epoll alone waits whole milliseconds.

    Attributes:
        fd: to be watched.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = (ctypes.c_long * 4)()  # interval, then moment: seconds and nanoseconds each

    def set(self, at_s: float) -> None:
        """Rings once at that moment, at once if it has passed; never for infinity. Replaces the moment before."""
        at_ns = 0 if at_s == float("inf") else max(1, int(at_s * 1e9))
        self._spec[2], self._spec[3] = divmod(at_ns, 1_000_000_000)
        self._libc.timerfd_settime(self.fd, TFD_TIMER_ABSTIME, self._spec, None)

    def hear(self) -> None:
        """Lets it be silent again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        """Ends it."""
        os.close(self.fd)
