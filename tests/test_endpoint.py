"""`varcas load URL`: the same measurement of a server that is not ours."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.sweeps import Run, varcas
from tests.workload.conftest import API_KEY, Server, StartServer, start_server  # noqa: F401
from varcas.experiment import Workload
from varcas.results import Results
from varcas.workload.schedule import identity

SHORT = ["--profile", "chat-short", "--duration", "2s", "--warmup", "0.3s", "--drain", "5s", "--seed", "3"]


@pytest.fixture
def server(start_server: StartServer) -> Iterator[Server]:  # noqa: F811
    return start_server("--itl-ms", "1", "--ttft-ms", "5")


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.target.port}"


def load(*arguments: str | Path, key: str = API_KEY) -> Run:
    return varcas("load", *arguments, env={"VARCAS_API_KEY": key, "OPENAI_API_KEY": ""})


def test_an_endpoint_is_measured_and_its_row_is_kept(server: Server, tmp_path: Path) -> None:
    arguments = [url(server) + "/v1", "--rate", "20", *SHORT, "--slo", "ttft_p95_ms=2000", "--results", tmp_path]
    code, out, err = load(*arguments, "--json").finish(90)
    assert code == 0, err
    row = json.loads(out)
    assert (row["state"], row["purpose"], row["model"], row["slo_met"]) == ("complete", "load", "scripted", True)
    assert row["num_completed"] == row["num_requests"] > 0
    store = Results(tmp_path)
    assert [kept.trial_id for kept in store.trials()] == [row["trial_id"]]
    requests = store.sql("select * from requests").to_pylist()
    assert len(requests) == row["num_requests"]
    assert all(request["prompt_tokens"] == request["scheduled_prompt_tokens"] for request in requests)
    assert API_KEY not in out + err + "".join(p.read_text() for p in (tmp_path / "logs").rglob("*.log"))

    code, out, err = load(*arguments, "--clients", "2").finish(90)
    assert code == 0, err
    assert "TTFT" in out
    assert [kept.number for kept in Results(tmp_path).trials()] == [0, 1]


def test_a_closed_loop_keeps_its_users_busy(server: Server, tmp_path: Path) -> None:
    code, out, err = load(url(server), "--users", "3", *SHORT, "--results", tmp_path, "--json").finish(90)
    assert code == 0, err
    assert json.loads(out)["num_completed"] > 3


def test_a_missed_slo_exits_3(server: Server, tmp_path: Path) -> None:
    arguments = ["--rate", "10", *SHORT, "--slo", "ttft_p50_ms=0.5", "--results", tmp_path]
    assert load(url(server), *arguments).finish(90)[0] == 3


def test_ctrl_c_keeps_what_was_measured(server: Server, tmp_path: Path) -> None:
    run = load(url(server), "--rate", "20", *SHORT, "--duration", "60s", "--results", tmp_path)
    run.wait_for(lambda: len(server.stamps()) > 10)
    os.killpg(run.process.pid, signal.SIGINT)
    code, _, err = run.finish(30)
    assert code == 130, err
    (row,) = Results(tmp_path).trials()
    assert row.state == "stopped"
    assert not run.marked()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:1", "--rate", "1"], "nobody answers"),
        (["127.0.0.1:8000", "--rate", "1"], "write http://HOST:PORT"),
        (["http://127.0.0.1:1"], "--rate: missing"),
        (["http://127.0.0.1:1", "--rate", "1", "--profile", "chat-medum"], "Did you mean chat-medium"),
        (["http://127.0.0.1:1", "--rate", "1", "--duration", "soon"], "--duration: 'soon'"),
        (["http://127.0.0.1:1", "--rate", "1", "--warmup", "5"], "--warmup: '5': has no unit"),
        (["http://127.0.0.1:1", "--rate", "1", "--arrival", "poison"], "workload.arrival"),
    ],
)
def test_bad_input_is_one_error(arguments: list[str], said: str, tmp_path: Path) -> None:
    code, _, err = load(*arguments, "--results", tmp_path / "results").finish(60)
    assert code == 2, err
    assert said in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_a_wrong_key_or_model_says_what_to_set(server: Server, tmp_path: Path) -> None:
    code, _, err = load(url(server), "--rate", "1", key="wrong").finish(60)
    assert (code, "VARCAS_API_KEY" in err) == (2, True), err
    code, _, err = load(url(server), "--rate", "1", "--model", "other").finish(60)
    assert (code, "serves scripted" in err) == (2, True), err


def test_two_files_of_one_name_are_two_workloads(tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    workload = Workload(data=str(data), rate_rps=1)
    data.write_text("prompt_tokens,output_tokens\n10,20\n")
    first = identity(workload)
    data.write_text("prompt_tokens,output_tokens\n10,30\n")
    assert identity(workload) != first
    moved = data.rename(tmp_path / "yours.csv")
    assert identity(Workload(data=str(moved), rate_rps=1)) == identity(Workload(data=str(moved), rate_rps=1.0))
