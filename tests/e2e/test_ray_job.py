"""`ray job submit` on a real local `ray start --head` with token authentication."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.sweeps import EXPERIMENT, end, left_after, marked, shared_memory, write_experiment
from tests.e2e.sweeps import Run as Marked
from varcas.child import free_port
from varcas.results import Results

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]
RAY = str(Path(sys.executable).with_name("ray"))
WORKLOAD = {"profile": "chat-short", "rate_rps": 10, "duration_s": 2.0, "warmup_s": 0.2, "max_drain_s": 1.0}


class Cluster:
    """A Ray cluster of this one machine; `cli` runs a `ray` command against it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.mark = free_port(), f"varcas-test-{secrets.token_hex(8)}"
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(directory),
            "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
            "VARCAS_TEST_MARK": self.mark,
        }
        gcs_port = free_port()
        self._started = subprocess.run(
            [RAY, "start", "--head", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs_port}",
             f"--dashboard-port={self.port}", "--num-cpus=2", "--disable-usage-stats"],
            env=self.env, capture_output=True, text=True, timeout=90, check=True,
        )  # fmt: skip

    def wait_ready(self, cwd: Path) -> None:
        """The head answers `ray job` some seconds after `ray start` has returned."""
        deadline_s = time.monotonic() + 60
        while (said := self.cli("list", cwd=cwd)).returncode:
            assert time.monotonic() < deadline_s, said.stdout + said.stderr
            time.sleep(0.5)

    def cli(self, *arguments: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        argv = [RAY, "job", arguments[0], "--address", f"http://127.0.0.1:{self.port}", *arguments[1:]]
        return subprocess.run(
            argv, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def submit(self, cwd: Path, *command: str, wait: bool = True) -> tuple[str, str]:
        """Returns the job's id and what it printed."""
        env = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}'
        options = ["--working-dir", ".", "--runtime-env-json", env, *([] if wait else ["--no-wait"])]
        done = self.cli("submit", *options, "--", "python", "-m", "varcas", *command, cwd=cwd)
        found = re.search(r"raysubmit_\w+", done.stdout + done.stderr)
        assert found, done.stdout + done.stderr
        return found[0], done.stdout + done.stderr


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("r")
    started = Cluster(directory)
    started.wait_ready(directory)
    yield started
    for pid in marked(started.mark, str(started.directory)):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def completed(results: Path) -> dict[int, str]:
    """Number and id of the finished trials."""
    if not (results / "trials").is_dir() or "scripted" not in Results(results).studies():
        return {}
    return {row.number: row.trial_id for row in Results(results).trials("scripted") if row.state == "complete"}


def test_submit_stop_edit_submit_again(cluster: Cluster, tmp_path: Path, model_dir: Path) -> None:
    work, results = tmp_path / "work", tmp_path / "kept" / "results"
    work.mkdir()
    before = shared_memory()
    study = EXPERIMENT["study"] | {"live": False}  # each value a start of its own: time to stop between two
    write_experiment(
        work, model_dir, "--itl-ms 2 --ttft-ms 5 --grandchild", workload=WORKLOAD, results="results/", study=study
    )

    _, output = cluster.submit(work, "sweep", "experiment.yaml")
    assert "results: 'results/'" in output
    assert "absolute path" in output
    assert "Traceback" not in output

    sweep = ["sweep", "experiment.yaml", "--results", str(results)]
    job, _ = cluster.submit(work, *sweep, wait=False)
    deadline_s = time.monotonic() + 90
    while len(completed(results)) < 2:
        assert time.monotonic() < deadline_s, cluster.cli("logs", job, cwd=work).stdout
        time.sleep(0.2)
    cluster.cli("stop", job, cwd=work)
    logs = cluster.cli("logs", job, cwd=work).stdout
    assert "Resume with" in logs, logs
    first = completed(results)

    (work / "note.txt").write_text("an edit gives the working directory another name\n")
    _, output = cluster.submit(work, *sweep)
    assert "succeeded" in output, output
    again = completed(results)
    assert {number: again.get(number) for number in first} == first, "what was finished stands"
    assert len(set(again.values())) == len(again), "nothing was measured twice"
    assert len(again) == 4

    jobs = Marked(subprocess.Popen(["true"], text=True), cluster.mark)
    jobs.process.wait()
    for pid, line in jobs.marked("ray").items():  # the cluster itself stays; only servers and loads must be gone
        assert "guardian" not in line, (pid, line)
    leftovers = {pid: line for pid, line in jobs.marked().items() if "scripted_openai" in line or "locustfile" in line}
    assert leftovers == {}
    end(jobs)
    assert left_after(jobs, before)[1] == set()
