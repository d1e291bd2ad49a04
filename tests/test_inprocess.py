"""The pool in the driver: as the sweeper uses Ray's."""

from __future__ import annotations

import threading

import pytest

from varcas.experiment import Hardware
from varcas.inprocess import InProcessPool


def work(payload: int, cancelled: threading.Event) -> tuple[int, bool]:
    if payload < 0:
        raise ValueError("negative")
    return payload, cancelled.is_set()


class Thing:
    closed = False

    def twice(self, number: int) -> int:
        return 2 * number

    def close(self) -> None:
        Thing.closed = True


def test_work_runs_in_order_as_many_as_there_are_gpus() -> None:
    pool = InProcessPool(Hardware(gpu="T4", count=2))
    assert (pool.slots.num_gpus, pool.slots.on_gpu, pool.slots.gpu) == (2, True, "T4")
    pool.submit("a", work, 1)
    assert pool.has_room()
    assert not pool.has_room(2)
    pool.submit("b", work, 2)
    assert not pool.has_room()
    assert pool.running == ["a", "b"]
    assert [pool.finished()[0].result for _ in range(2)] == [(1, False), (2, False)]
    assert pool.finished() == []
    assert not pool.busy


def test_a_cpu_runs_one_piece_whatever_it_asks_for() -> None:
    pool = InProcessPool(Hardware(gpu="cpu"))
    assert not pool.slots.on_gpu
    pool.submit("a", work, 1, num_gpus=4)
    assert not pool.has_room()


def test_a_bug_is_loud_and_cancelling_is_seen() -> None:
    with InProcessPool(Hardware(gpu="T4")) as pool:
        pool.submit("a", work, -1)
        with pytest.raises(ValueError, match="negative"):
            pool.finished()
        pool.submit("b", work, 1)
        pool.cancel()
        assert pool.finished()[0].result == (1, True)


def test_services_answer_here() -> None:
    pool, stopping = InProcessPool(Hardware(gpu="T4")), threading.Event()
    thing = pool.service(Thing)
    assert pool.call(thing, "twice", 3, timeout_s=1.0) == 6
    stopping.set()
    with pytest.raises(KeyboardInterrupt):
        pool.call(thing, "twice", 3, timeout_s=1.0, stopping=stopping)
    pool.dismiss(thing)
    assert Thing.closed
