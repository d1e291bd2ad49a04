"""No process, port or shared memory of ours is left, however a sweep ends. The server has a grandchild, as vLLM has."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.sweeps import Run, end, left_after, shared_memory, varcas, write_experiment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
SERVER = "--itl-ms 2 --ttft-ms 5 --grandchild"
STUBBORN = f"{SERVER} --ignore-sigterm"
LONG = {"profile": "chat-short", "rate_rps": 5, "duration_s": 60, "warmup_s": 0.2, "max_drain_s": 5}

SHORT = {"profile": "chat-short", "rate_rps": 40, "duration_s": 1, "warmup_s": 0.2, "max_drain_s": 2}


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def driver(run: Run) -> int:
    return run.process.pid


def actor(run: Run) -> int:
    return next(pid for pid, line in run.marked("ray::").items() if "_Worker" in line)


def raylet(run: Run) -> int:
    return next(pid for pid, line in run.marked("raylet/raylet").items() if "raylet_socket_name" in line)


@pytest.fixture
def start(tmp_path: Path, model_dir: Path) -> Iterator[Callable[..., tuple[Run, set[str], int]]]:
    runs: list[Run] = []

    def started(fake: str) -> tuple[Run, set[str], int]:
        before = shared_memory()
        run = varcas("sweep", write_experiment(tmp_path, model_dir, fake, workload=LONG))
        runs.append(run)
        run.wait_for(lambda: any("locustfile" in line for line in run.marked().values()))
        command = run.wait_for(lambda: [line for line in run.marked("scripted_openai").values() if "--port" in line])[0]
        port = int(command.split("--port ")[1].split()[0])
        run.wait_for(lambda: shared_memory() - before)
        run.wait_for(lambda: listening(port))
        return run, before, port

    yield started
    for run in runs:
        end(run)
        run.process.wait(10)
        for pipe in (run.process.stdout, run.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize("victim", [driver, raylet], ids=lambda v: v.__name__)
def test_kill_9(start: Callable[..., tuple[Run, set[str], int]], victim: Callable[[Run], int]) -> None:
    run, before, port = start(STUBBORN)
    os.kill(victim(run), signal.SIGKILL)
    assert left_after(run, before) == ({}, set())
    assert not listening(port)
    run.process.wait(5)


def test_kill_9_of_the_actor_is_a_lost_worker_and_the_sweep_goes_on(
    start: Callable[..., tuple[Run, set[str], int]],
) -> None:
    run, before, port = start(STUBBORN)
    servers = set(run.marked("scripted_openai"))
    os.kill(actor(run), signal.SIGKILL)
    run.wait_for(lambda: not servers & set(run.marked("scripted_openai")) and not listening(port), timeout_s=10)
    run.wait_for(lambda: set(run.marked("scripted_openai")) - servers)  # the retry
    os.killpg(run.process.pid, signal.SIGINT)
    code, _, err = run.finish(30)
    assert code == 130, err
    assert "worker_lost" in err
    assert left_after(run, before) == ({}, set())


@pytest.mark.parametrize(
    ("number", "fake"),
    [(signal.SIGINT, SERVER), (signal.SIGINT, STUBBORN), (signal.SIGTERM, STUBBORN)],
    ids=["ctrl-c-kind", "ctrl-c-stubborn", "sigterm-stubborn"],
)
def test_asked_to_stop(start: Callable[..., tuple[Run, set[str], int]], number: signal.Signals, fake: str) -> None:
    run, before, port = start(fake)
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)  # what a terminal does
    else:
        os.kill(run.process.pid, number)
    code, _, err = run.finish(30)
    assert code == 130, err
    assert "Resume with" in err
    assert "Traceback" not in err
    assert left_after(run, before) == ({}, set())
    assert not listening(port)


def test_a_normal_end_leaves_nothing(tmp_path: Path, model_dir: Path) -> None:
    before = shared_memory()
    space = {"max_num_seqs": {"choices": [1, 2]}}
    run = varcas("sweep", write_experiment(tmp_path, model_dir, SERVER, space=space, workload=SHORT), "--json")
    code, out, err = run.finish(120)
    assert code == 0, err
    assert '"verdict"' in out
    assert left_after(run, before) == ({}, set())
