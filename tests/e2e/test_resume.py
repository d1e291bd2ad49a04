"""kill -9 of the driver at many instants: at most the trials in flight are lost, and nothing that finished repeats."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.sweeps import end, left_after, shared_memory, varcas, write_experiment
from varcas.records import TrialRow
from varcas.results import Results

pytestmark = [pytest.mark.ray, pytest.mark.timeout(290)]
WORKLOAD = {"profile": "chat-short", "rate_rps": 40, "duration_s": 1, "warmup_s": 0, "max_drain_s": 2}
QUICK = "--itl-ms 0.2 --ttft-ms 2"
KILLS = 5


def rows(results: Path) -> list[TrialRow]:
    return (
        Results(results).trials("scripted") if (results / "trials").is_dir() and any(results.glob("trials/*")) else []
    )


def test_killed_at_many_instants(tmp_path: Path, model_dir: Path) -> None:
    before, rng = shared_memory(), random.Random(int(time.time()))
    space = {"max_num_seqs": {"choices": [1, 2, 4, 8, 16, 32]}}
    study = {"trials": 6, "sampler": "random", "repeats": 3}
    path = write_experiment(tmp_path, model_dir, QUICK, space=space, workload=WORKLOAD, study=study)
    results, kept = tmp_path / "results", dict[str, TrialRow]()
    for _ in range(KILLS):
        run = varcas("sweep", path)
        time.sleep(rng.uniform(4, 11))  # anywhere: while Ray starts, a server starts, a load runs, a row is written
        if run.process.poll() is None:
            os.kill(run.process.pid, signal.SIGKILL)
        run.finish(20)
        assert left_after(run, before) == ({}, set())
        now = {row.trial_id: row for row in rows(results)}
        assert kept.items() <= now.items(), "a row that was on disk is gone, or changed"
        kept = now
    run = varcas("sweep", path)
    code, _, err = run.finish(200)
    assert code == 0, err
    final = rows(results)
    assert kept.items() <= {row.trial_id: row for row in final}.items()
    searched = [row.config_hash for row in final if row.purpose != "confirm" and row.state == "complete" and row.valid]
    assert len(searched) == len(set(searched)) == 6, "each configuration was measured once"
    good = [row for row in final if row.purpose == "confirm" and row.valid]
    assert len({row.trial_id for row in final}) == len(final)
    assert len(good) in (0, 6), "confirmation was resumed, not begun anew"
    assert left_after(run, before) == ({}, set())

    run = varcas("sweep", path)
    code, _, err = run.finish(100)
    assert code == 0, err
    assert rows(results) == final, "a study that has ended is answered from its store"


def test_a_second_driver_is_refused_while_the_first_runs(tmp_path: Path, model_dir: Path) -> None:
    path = write_experiment(tmp_path, model_dir, workload=WORKLOAD | {"duration_s": 30})
    first = varcas("sweep", path)
    try:
        first.wait_for(lambda: list((tmp_path / "results").glob("logs/scripted/*.log")))
        code, _, err = varcas("sweep", path).finish(60)
        assert code == 2, err
        assert str(first.process.pid) in err
    finally:
        first.process.send_signal(signal.SIGINT)
        first.finish(30)
        end(first)
