from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pool_work
from varcas import guardian
from varcas.errors import InputError, VarcasError
from varcas.experiment import Hardware
from varcas.pool import Finished, Pool

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    hardware = Hardware(gpu="auto", count=3)
    with Pool(hardware, num_gpus=4, num_cpus=4, resources={"my-t4s": 1}) as pool:
        yield pool


def collect(pool: Pool, count: int) -> dict[str, Finished]:
    found: dict[str, Finished] = {}
    deadline_s = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline_s:
        found |= {finished.key: finished for finished in pool.finished(0.5)}
    assert len(found) == count
    return found


def test_reserves_the_gpus_of_each_proposal(pool: Pool) -> None:
    pool.submit("one", pool_work.where, 1, num_gpus=1)
    pool.submit("two", pool_work.where, 2, num_gpus=2)
    assert not pool.has_room(1), "3 of the 3 GPUs that the experiment may use are taken"
    found = collect(pool, 2)
    gpus = {key: set(finished.result[1].split(",")) for key, finished in found.items()}
    assert len(gpus["one"]) == 1
    assert len(gpus["two"]) == 2
    assert not gpus["one"] & gpus["two"], "no GPU is shared"
    assert pool.has_room(3)
    assert not pool.has_room(4)


def test_every_start_has_a_fresh_process(pool: Pool) -> None:
    pids = set()
    for i in range(3):
        pool.submit(str(i), pool_work.where, i)
        pids.add(collect(pool, 1)[str(i)].result[2])
    assert len(pids) == 3


def test_a_prepared_worker_is_the_one_that_is_used(pool: Pool) -> None:
    def standing_by() -> set[int]:
        ours = guardian.descendants([os.getpid()])  # other tests' Rays have idle workers as well
        return {pid for pid in ours if b"ray::IDLE" in _command(Path(f"/proc/{pid}"))}

    while pool.prepare() or not (ready := standing_by()):
        time.sleep(0.5)
    pool.submit("x", pool_work.where, None)
    assert collect(pool, 1)["x"].result[2] in ready


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_dead_worker_is_lost_not_failed(pool: Pool) -> None:
    pool.submit("x", pool_work.die, None)
    lost = collect(pool, 1)["x"]
    assert lost.result is None
    assert lost.lost
    pool.submit("y", pool_work.where, "again")
    assert collect(pool, 1)["y"].result[0] == "again", "its GPU is free again"


def test_an_exception_of_ours_comes_back_with_its_traceback(pool: Pool) -> None:
    pool.submit("x", pool_work.fail, None)
    assert "a bug of ours" in str(collect(pool, 1)["x"].lost)


def test_cancel_reaches_running_work(pool: Pool) -> None:
    pool.submit("x", pool_work.until_cancelled, None)
    time.sleep(0.5)
    pool.cancel()
    assert collect(pool, 1)["x"].result == "cancelled"


def test_a_service_answers_and_hangs_are_bounded(pool: Pool) -> None:
    service = pool.service(pool_work.Counter, 5)
    assert pool.call(service, "add", 2, timeout_s=30) == 7
    assert pool.call(service, "add", 2, timeout_s=30) == 9
    with pytest.raises(VarcasError, match="no answer"):
        pool.call(service, "hang", timeout_s=0.5)


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        (Hardware(gpu="T4"), ["hardware.gpu", "'T4'", "4 GPU", "auto"]),
        (Hardware(gpu="T4", resource="nowhere"), ["hardware.resource", "'nowhere'", "my-t4s"]),
    ],
)
def test_hardware_that_is_not_here_is_bad_input(pool: Pool, hardware: Hardware, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Pool(hardware)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_custom_resource_stands_for_the_gpu_type(pool: Pool) -> None:
    marked = Pool(Hardware(gpu="T4", count=8, resource="my-t4s"))
    assert marked.slots.num_gpus == 4
    assert marked.slots.resources == {"my-t4s": 0.001}
    marked.submit("x", pool_work.where, None, num_gpus=2)
    assert len(collect(marked, 1)["x"].result[1].split(",")) == 2
