from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
import time
from math import inf

import pytest

from tests.workload.conftest import StartServer
from tests.workload.test_load import asked, run, stamp_errors
from varcas.workload.clock import ANCILLARY_BYTES, NO_STAMP, STEP_NS, Alarm, Offset, arrivals, ask_for_stamps
from varcas.workload.driver import Load

pytestmark = pytest.mark.timeout(60)


def test_a_stamp_is_when_it_came_not_when_it_was_read() -> None:
    """The reader is late by far: between what was known before and after the send lies the stamp."""
    receiver, sender = connected()
    with receiver, sender:
        ask_for_stamps(receiver)
        sender.send(b"first")  # the kernel begins to stamp a moment after it is asked
        time.sleep(0.05)
        receiver.recv(5)
        offset = Offset()
        before_s = time.monotonic()
        sender.send(b"second")
        after_s = time.monotonic()
        time.sleep(0.1)
        _, ancillary, _, _ = receiver.recvmsg(100, ANCILLARY_BYTES)
        read_s = time.monotonic()
        (found_s,) = arrivals(ancillary[0][2], [read_s], offset.ns)
    assert before_s - 1e-5 <= found_s <= after_s + 1e-5


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        return server.accept()[0], sender


def test_without_a_stamp_or_a_clock_that_holds_the_reader_s_time_stands_in() -> None:
    stamps = struct.pack("qq", 100, 500_000_000) + NO_STAMP + struct.pack("qq", 101, 0)
    assert arrivals(stamps, [1.0, 2.0, 3.0], 99_000_000_000) == [1.5, 2.0, 2.0]
    assert arrivals(stamps, [1.0, 2.0, 3.0], None) == [1.0, 2.0, 3.0]


def test_a_clock_that_is_set_is_noticed_and_one_that_runs_is_not() -> None:
    offset = Offset()
    for _ in range(200):
        offset.check()
    assert offset.steps == 0
    offset.ns += 10 * STEP_NS  # as it was before somebody set the clock
    offset.check()
    assert offset.steps == 1
    offset.check()
    assert offset.steps == 1


def test_an_alarm_rings_once_at_its_moment_and_can_be_moved() -> None:
    alarm = Alarm()
    try:
        began_s = time.monotonic()
        alarm.set(began_s + 10)
        alarm.set(began_s + 0.05)
        assert select.select([alarm.fd], [], [], 5)[0]
        assert time.monotonic() >= began_s + 0.05
        alarm.hear()
        assert not select.select([alarm.fd], [], [], 0.05)[0]
        alarm.set(began_s)  # passed: at once
        assert select.select([alarm.fd], [], [], 5)[0]
        alarm.set(inf)
        assert not select.select([alarm.fd], [], [], 0.05)[0]
        alarm.hear()
    finally:
        alarm.close()


def test_a_client_that_sleeps_through_a_step_still_knows_when_it_was(own_load: Load, start_server: StartServer) -> None:
    """Thirty first tokens come while the client is stopped: only the kernel can tell when."""
    server = start_server("--max-num-seqs", "64", "--ttft-ms", "500", "--itl-ms", "900")
    pid = own_load.pids[0]

    def sleep_through(sent: int, done: int) -> None:
        if sent == 30 and not stopped.is_set():
            stopped.set()
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(0.7, os.kill, [pid, signal.SIGCONT]).start()

    stopped = threading.Event()
    requests = [asked(i, 0.0, 8, 2 + i) for i in range(30)]
    requests = [asked(i, 0.0, 8 + i, 2, " ".join("w" * (3 + i))) for i in range(30)]
    result = run(own_load, server.target, requests, on_progress=sleep_through)
    assert stopped.is_set()
    assert result.kernel_stamped_frac == 1.0
    first_error_s, _ = stamp_errors(server, result)
    assert max(map(abs, first_error_s)) < 0.15
