"""`varcas load URL`: the same measurement of a server that is not ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.sweeps import Run, varcas
from tests.workload.conftest import API_KEY, Server, StartServer, start_server  # noqa: F401
from tests.workload.test_faults import certificates  # noqa: F401
from varcas.endpoint import connect
from varcas.errors import InputError
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
    assert "making prompts" in err
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
    arguments = ["--rate", "30", *SHORT, "--slo", "ttft_p50_ms=0.5", "--results", tmp_path]
    assert load(url(server), *arguments).finish(90)[0] == 3


def test_ctrl_c_keeps_what_was_measured(server: Server, tmp_path: Path) -> None:
    run = load(url(server), "--rate", "20", *SHORT, "--duration", "60s", "--results", tmp_path)
    run.wait_for(lambda: len(server.stamps()) > 30)
    os.killpg(run.process.pid, signal.SIGINT)
    code, _, err = run.finish(30)
    assert code == 130, err
    (row,) = Results(tmp_path).trials()
    assert (row.state, row.valid) == ("stopped", False)
    assert row.invalid_reasons[0].startswith("interrupted after ")
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


def test_a_key_that_no_header_can_hold_is_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["http://127.0.0.1:1", "--rate", "1", "--results", tmp_path]
    code, out, err = load(*arguments, key="sk-hidden\r").finish(60)
    assert (code, "VARCAS_API_KEY" in err) == (2, True), err
    assert "hidden" not in out + err
    for key in ("sk-hidden ", "sk-hidden-é"):
        monkeypatch.setenv("VARCAS_API_KEY", key)
        with pytest.raises(InputError, match="VARCAS_API_KEY: holds"):
            connect("http://127.0.0.1:1", model=None)


@pytest.mark.parametrize("rest", ["/v1?key=hidden", "/v1#hidden", "/hidden\r\n", "/hidden é"])
def test_a_url_that_may_hold_a_secret_is_refused_unseen(rest: str) -> None:
    for address in ("http://me:hidden@127.0.0.1:1", "me:hidden@127.0.0.1:1", "http://127.0.0.1:1" + rest):
        with pytest.raises(InputError) as raised:
            connect(address, model=None)
        assert "hidden" not in str(raised.value)


def test_a_strict_endpoint_is_measured_with_a_warning(start_server: StartServer, tmp_path: Path) -> None:  # noqa: F811
    """One that refuses unknown parameters, and has no `/metrics`, `/version`, `/tokenize` or `/v1/models` either."""
    server = start_server("--strict", "--itl-ms", "1", "--ttft-ms", "5", "--eos-after", "6")
    arguments = [url(server), "--model", "scripted", "--rate", "40", *SHORT, "--results", tmp_path, "--json"]
    code, out, err = load(*arguments).finish(90)
    assert code == 0, err
    row = json.loads(out)
    assert (row["state"], row["valid"], row["num_completed"]) == ("complete", True, row["num_requests"])
    assert any("answers end when the model ends them" in warning for warning in row["warnings"])
    assert json.loads(row["workload_json"])["endpoint"] == "chat"
    assert (row["engine_version"], row["preemptions"]) == (None, None)
    assert Results(tmp_path).sql("select distinct counting from requests").to_pylist() == [{"counting": "text"}]
    assert all(one["cache_salt"] is None for one in server.stamps())


def test_a_warm_up_that_fails_altogether_ends_the_measurement(
    start_server: StartServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    server = start_server("--die-after-requests", "1")
    arguments = ["--rate", "20", *SHORT, "--duration", "300s", "--results", tmp_path, "--json"]
    code, out, err = load(url(server), *arguments).finish(60)
    assert code == 1, err
    row = json.loads(out)
    assert (row["state"], row["failure_kind"], row["num_requests"]) == ("failed", "all_requests_failed", None)
    assert row["failure_detail"].startswith("warm-up: ")


def test_a_measurement_that_is_not_to_be_believed_exits_1_and_is_kept(server: Server, tmp_path: Path) -> None:
    code, _, err = load(url(server), "--rate", "2", *SHORT, "--results", tmp_path).finish(60)
    assert code == 1, err
    assert "not to be believed: " in err
    assert [row.valid for row in Results(tmp_path).trials()] == [False]


Answers = Mapping[str, tuple[int, Any]]
Answering = Callable[[Answers], str]
CHAT, PLAIN, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
ONE_MODEL = (200, {"data": [{"id": "m", "max_model_len": "many"}]})


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Servers that have one answer for each path, 404 for others; a text is where the path has moved to."""
    with contextlib.ExitStack() as running:
        yield lambda answers: running.enter_context(_serving(answers))


@contextlib.contextmanager
def _serving(answers: Answers, context: ssl.SSLContext | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, said = answers.get(self.path, (404, {"detail": "Not Found"}))
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            if isinstance(said, str):
                self.send_header("location", said)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http{'s' if context else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


NO_TEMPLATE = (400, {"error": "no template"})


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({CHAT: (401, {}), PLAIN: (200, {})}, ["/v1/chat/completions refuses the key (401)", "VARCAS_API_KEY"]),
        ({CHAT: (403, {}), PLAIN: (200, {})}, ["refuses the key (403)"]),
        ({CHAT: (429, {}), PLAIN: (200, {})}, ["429", "busy", "Try later"]),
        ({CHAT: NO_TEMPLATE}, ["/v1/chat/completions answered 400", "no template", "/v1/completions answered 404"]),
        ({CHAT: (500, {"error": "out of order"}), PLAIN: (200, {})}, ["answered 500", "out of order"]),
        ({CHAT: NO_TEMPLATE, PLAIN: (401, {})}, ["/v1/completions refuses the key (401)"]),
        ({MODELS: (301, "https://elsewhere.example/v1")}, ["301", "https://elsewhere.example/v1"]),
        ({MODELS: (404, {})}, ["/v1/models answered 404", "--model"]),
        ({MODELS: (401, {})}, ["refuses the key (401)"]),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_said(answering: Answering, answers: Answers, said: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        connect(answering({MODELS: ONE_MODEL, **answers}), model=None)
    assert all(words in str(raised.value) for words in said), str(raised.value)


def test_an_endpoint_without_a_list_of_models_is_taken_at_its_users_word(answering: Answering) -> None:
    address = answering({PLAIN: (200, {}), "/metrics": (200, "")})
    assert connect(address, model="mine").metrics_url == address
    served = connect(answering({PLAIN: (200, {})}) + "/v1/", model="mine")
    assert served.metrics_url is None  # else each measurement would wait for it to say that it is idle
    assert (served.model, served.endpoint, served.max_model_len, served.target.strict) == (
        "mine", "completions", None, False,
    )  # fmt: skip


def test_a_certificate_that_does_not_hold_is_said_to_be_that(certificates: tuple[Path, Path]) -> None:  # noqa: F811
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    said = "certificate does not hold .*SSL_CERT_FILE"
    with _serving({}, context) as address, pytest.raises(InputError, match=said):
        connect(address, model=None)


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
