from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workload.conftest import API_KEY, Raw, Server, StartServer
from tests.workload.test_wire import DONE, HEAD, ROLE, response, token
from varcas.child import free_port
from varcas.errors import TrialError, VarcasError
from varcas.experiment import Workload
from varcas.records import Ended, LoadResult, Prompted, ScheduledRequest
from varcas.workload.driver import Load
from varcas.workload.prompts import fit_prompts
from varcas.workload.schedule import schedule
from varcas.workload.wire import Target

pytestmark = pytest.mark.timeout(60)

Requests = Sequence[Prompted]


def every(gap_s: float, num: int, output_tokens: int = 8, prompt: str = "one two three") -> Requests:
    prompt_tokens = 5 + len(prompt.split())
    return [asked(i, i * gap_s, prompt_tokens, output_tokens, prompt) for i in range(num)]


def asked(index: int, at_s: float, prompt_tokens: int, output_tokens: int, text: str = "one two three") -> Prompted:
    return Prompted(ScheduledRequest(index, at_s, prompt_tokens, output_tokens, index, index), text)


def run(load: Load, target: Target, requests: Requests, **more: Any) -> LoadResult:
    defaults: dict[str, Any] = {
        "duration_s": 0.5,
        "max_drain_s": 10.0,
        "cache_salt": "salt",
        "sampling": {},
        "endpoint": "chat",
        "stall_timeout_s": 10.0,
        "cancelled": lambda: False,
        "alive": lambda: True,
    }
    return load.run(target, requests, **(defaults | more))


def errors(result: LoadResult) -> set[str | None]:
    return {record.error for record in result.records}


def test_what_is_recorded_is_what_the_server_did(load: Load, start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--max-num-seqs", "512", "--ttft-ms", "30", "--itl-ms", "10")
    workload = Workload(profile="chat-short", rate_rps=60, duration_s=1.5, max_tokens=160)
    requests = schedule(workload, start_s=0, duration_s=1.5, max_len=2048, stream="measure")
    fitted = fit_prompts(server.target, requests, endpoint="chat", cache_dir=tmp_path / "cache")
    result = run(load, server.target, fitted, duration_s=1.5)

    assert [record.index for record in result.records] == list(range(len(requests)))
    assert errors(result) == {None}
    for record, request in zip(result.records, [one.request for one in fitted], strict=True):
        assert record.prompt_tokens == record.scheduled_prompt_tokens == request.prompt_tokens
        assert record.output_tokens == record.scheduled_output_tokens == request.output_tokens
        assert sum(record.token_counts) == len(record.token_counts) == len(record.token_offsets_s)
        assert len(record.token_counts) == request.output_tokens
        assert record.scheduled_s == request.at_s
        assert record.sent_s is not None
        assert record.first_token_s == pytest.approx(record.sent_s + record.token_offsets_s[0])
        assert record.last_token_s == pytest.approx(record.sent_s + record.token_offsets_s[-1])
        assert record.end_s is not None
        assert record.last_token_s is not None
        assert record.end_s >= record.last_token_s
        assert (record.finish_reason, record.http_status, record.ok) == ("length", 200, True)
    assert result.duration_s == 1.5
    assert 0 < result.client_cpu_frac < 1
    assert 0 <= result.drain_s < 5

    lag_s = [record.sent_s - record.scheduled_s for record in result.records if record.sent_s is not None]
    assert min(lag_s) >= 0
    assert np.percentile(lag_s, 99) < 0.020
    first_error_s, token_error_s = stamp_errors(server, result)
    assert abs(np.median(first_error_s)) < 0.002
    assert abs(np.median(token_error_s)) < 0.002


def stamp_errors(server: Server, result: LoadResult) -> tuple[list[float], list[float]]:
    """Ours minus the server's own stamps, of first tokens and of all: requests are matched by their lengths."""
    rows: dict[tuple[int, int], list[list[float]]] = {}
    for row in server.stamps(len(result.records)):
        times = [at_s for kind, at_s in row["sends"] if kind == "token"]
        rows.setdefault((row["prompt_tokens"], row["max_tokens"]), []).append(times)
    for alike in rows.values():
        alike.sort()
    first, every_token = [], []
    for record in sorted(result.records, key=lambda record: record.sent_s or 0):
        times = rows[record.scheduled_prompt_tokens, record.scheduled_output_tokens].pop(0)
        sent_s = (record.sent_s or 0) + result.t0_monotonic_s
        found = [sent_s + offset_s - at_s for offset_s, at_s in zip(record.token_offsets_s, times, strict=True)]
        first.append(found[0])
        every_token += found
    return first, every_token


def test_an_open_loop_never_waits_for_its_answers(load: Load, start_server: StartServer) -> None:
    server = start_server("--max-num-seqs", "1", "--itl-ms", "5")
    result = run(load, server.target, every(0.005, 200, output_tokens=20), max_drain_s=1.0)
    lag_s = [record.sent_s - record.scheduled_s for record in result.records if record.sent_s is not None]
    assert len(lag_s) == 200
    assert np.percentile(lag_s[100:], 99) < 0.020
    assert sum(record.ok for record in result.records) < 40


def test_what_the_drain_leaves_is_unfinished_and_keeps_its_tokens(load: Load, start_server: StartServer) -> None:
    server = start_server("--itl-ms", "100")
    result = run(load, server.target, every(0.2, 5, output_tokens=50), max_drain_s=0.5)
    assert errors(result) == {"unfinished"}
    assert result.drain_s == pytest.approx(0.5, abs=0.3)
    for record in result.records:
        assert 0 < record.output_tokens == sum(record.token_counts) < 50
        assert record.finish_reason is None
        assert record.end_s == pytest.approx(1.0, abs=0.3)
    deadline_s = time.monotonic() + 5
    while len(server.stamps()) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert [row["aborted"] for row in server.stamps()] == [True] * 5


def test_failures_are_rows(load: Load, start_server: StartServer) -> None:
    server = start_server("--fail-requests-frac", "0.25")
    result = run(load, server.target, every(0.02, 40))
    failed = [record for record in result.records if not record.ok]
    assert len(result.records) == 40
    assert len(failed) == pytest.approx(10, abs=1)
    for record in failed:
        assert record.error == "http 500: EngineCore encountered an issue. (scripted)"
        assert (record.http_status, record.output_tokens, record.first_token_s) == (500, 0, None)
        assert record.end_s is not None


def test_a_model_without_a_template_refuses_each_chat_but_completes(load: Load, start_server: StartServer) -> None:
    server = start_server("--refuse-chat")
    result = run(load, server.target, every(0.1, 3))
    assert {record.http_status for record in result.records} == {400}
    requests = [asked(0, 0.0, 3, 8)]
    result = run(load, server.target, requests, endpoint="completions")
    assert (result.records[0].prompt_tokens, result.records[0].output_tokens) == (3, 8)


def test_nobody_there_is_a_row_each_and_never_sent(load: Load) -> None:
    result = run(load, Target("127.0.0.1", free_port(), "m"), every(0.1, 3))
    assert errors(result) == {"not connected: Connection refused"}
    assert {(record.sent_s, record.http_status) for record in result.records} == {(None, None)}


def test_a_server_that_dies_ends_the_load_with_what_is_there(load: Load, start_server: StartServer) -> None:
    server = start_server("--die-after-requests", "10", "--itl-ms", "20")
    begun_s = time.monotonic()
    result = run(load, server.target, every(0.05, 200, output_tokens=20), duration_s=10.0, alive=server.alive)
    assert time.monotonic() - begun_s < 5
    assert len(result.records) == 200
    assert result.duration_s < 3
    found = [record.error or "" for record in result.records]
    assert found[-1] == "not sent"
    assert any(error.startswith(("connection broke", "connection closed after")) for error in found)
    partial = [r for r in result.records if r.error and r.error.startswith("connection") and r.token_counts]
    assert partial


def test_a_server_that_falls_silent_hangs_and_the_child_goes_on(load: Load, start_server: StartServer) -> None:
    server = start_server("--hang-after-requests", "5")
    begun_s = time.monotonic()
    with pytest.raises(TrialError, match="no token for 1 s") as raised:
        run(load, server.target, every(0.1, 100), duration_s=10.0, stall_timeout_s=1.0)
    assert raised.value.kind == "hung"
    assert time.monotonic() - begun_s < 5
    other = start_server()
    assert errors(run(load, other.target, every(0.1, 3))) == {None}


def test_heads_without_tokens_are_no_sign_of_life(load: Load, raw: Raw) -> None:
    """A hung engine behind a living HTTP server: each new request still gets its head at once."""
    raw.scripts = [[HEAD + b"transfer-encoding: chunked\r\n\r\n"]]
    begun_s = time.monotonic()
    with pytest.raises(TrialError, match="hung"):
        run(load, raw.target, every(0.1, 100), duration_s=10.0, stall_timeout_s=0.5)
    assert time.monotonic() - begun_s < 5


def test_silence_without_a_request_in_flight_is_no_hang(load: Load, start_server: StartServer) -> None:
    server = start_server()
    result = run(load, server.target, every(1.2, 2), duration_s=1.5, stall_timeout_s=0.6)
    assert errors(result) == {None}


def test_cancelling_returns_at_once_with_what_is_there(load: Load, start_server: StartServer) -> None:
    server = start_server("--itl-ms", "20")
    cancelled = threading.Event()
    threading.Timer(1.2, cancelled.set).start()
    begun_s = time.monotonic()
    result = run(load, server.target, every(0.1, 300, output_tokens=20), duration_s=30.0, cancelled=cancelled)
    assert time.monotonic() - begun_s < 4
    assert {None, "unfinished", "not sent"} == errors(result)
    assert result.duration_s < 3


def test_one_child_serves_many_loads_alike(load: Load, start_server: StartServer) -> None:
    server = start_server()
    for salt in ("one", "two"):
        assert errors(run(load, server.target, every(0.02, 50), cache_salt=salt)) == {None}
    salts = [row["cache_salt"] for row in server.stamps(100)]
    assert salts == ["one"] * 50 + ["two"] * 50


def test_times_before_the_window_are_negative(load: Load, start_server: StartServer) -> None:
    server = start_server()
    requests = [asked(i, at_s, 8, 4) for i, at_s in enumerate((-1.0, -0.5, 0.5))]
    result = run(load, server.target, requests)
    assert errors(result) == {None}
    assert [record.sent_s for record in result.records] == pytest.approx([-1.0, -0.5, 0.5], abs=0.2)


def test_the_key_is_in_no_argument_log_or_file(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VARCAS_API_KEY", API_KEY)
    server = start_server()
    seen: list[bytes] = []

    def look() -> bool:
        seen.extend(path.read_bytes() for path in (tmp_path / "load").iterdir() if path.exists())
        seen.extend(Path(f"/proc/{load.pids[0]}/{name}").read_bytes() for name in ("cmdline", "environ"))
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "load").iterdir())
        return False

    with Load.start(tmp_path / "load.log", tmp_path / "load") as load:
        assert errors(run(load, server.target, every(0.1, 5), cancelled=look)) == {None}
    assert len(seen) > 10
    assert not [data for data in seen if API_KEY.encode() in data]
    assert list((tmp_path / "load").iterdir()) == []
    assert API_KEY not in (tmp_path / "load.log").read_text()


def test_a_child_that_is_killed_is_an_error_in_words(own_load: Load, start_server: StartServer) -> None:
    server = start_server("--itl-ms", "50")

    def kill() -> bool:
        os.kill(own_load.pids[0], signal.SIGKILL)
        return False

    with pytest.raises(VarcasError, match=r"the load's process ended with -9; see .*load\.log"):
        run(own_load, server.target, every(0.1, 5, output_tokens=100), cancelled=kill)


@pytest.mark.parametrize("way", ["end of input", "SIGTERM"])
def test_a_child_that_is_told_to_end_hands_over_what_there_is(
    own_load: Load, start_server: StartServer, way: str
) -> None:
    server = start_server("--itl-ms", "50")
    told = [0]

    def end() -> bool:
        if told[-1] > 2:
            stdin = own_load._children[0].stdin
            assert stdin is not None
            stdin.close() if way == "end of input" else os.kill(own_load.pids[0], signal.SIGTERM)
        return False

    result = run(
        own_load,
        server.target,
        every(0.1, 300, output_tokens=10),
        duration_s=30.0,
        cancelled=end,
        on_progress=lambda sent, done: told.append(done),
    )
    assert errors(result) == {None, "unfinished", "not sent"}
    assert own_load._children[0].wait(5) == 0


WHOLE, _ = response([ROLE, token("a", [1]), token("bc", [2, 3]), token("d", [4], "length"), DONE])


def split(raw_bytes: bytes, size: int) -> list[bytes | None]:
    return [raw_bytes[at : at + size] for at in range(0, len(raw_bytes), size)]


@pytest.mark.parametrize(
    ("script", "counts", "error"),
    [
        ([WHOLE], (1, 2, 1), None),
        (split(WHOLE, 37), (1, 2, 1), None),
        ([WHOLE[:-3], WHOLE[-3:]], (1, 2, 1), None),
        (split(response([ROLE, token("a", [1]), token("b", [2], "length"), DONE], "length")[0], 50), (1, 1), None),
        ([response([token("a", [1], "length"), DONE], "close")[0], b""], (1,), None),
        ([response([token("a", [1]), token("b", [2])])[0][:-5], None], (1, 1), "connection"),
        ([None], (), "connection"),
        ([b"HTTP/1.1 200 OK\r\ncont", b""], (), "connection closed within the head"),
        ([b""], (), "connection closed before the response"),
        (
            [response([token("a", [1]), b'data: {"choi\n\n', token("c", [3], "length"), DONE])[0]],
            (1, 1),
            "broken event",
        ),
        ([HEAD + b"content-length: 0\r\n\r\n"], (), "no finish_reason"),
        ([b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nBusy"], (), "http 503: Busy"),
    ],
)
def test_whatever_comes_over_the_wire_is_one_row(
    load: Load, raw: Raw, script: list[bytes | None], counts: tuple[int, ...], error: str | None
) -> None:
    raw.scripts = [script]
    result = run(load, raw.target, every(0.1, 2), duration_s=0.3)
    for record in result.records:
        assert record.token_counts == counts
        assert (record.error or "").startswith(error or "")
        assert record.ok == (error is None)
        if len(script) > 3:
            assert len(set(record.token_offsets_s)) > 1


def test_a_connection_closed_while_idle_is_not_the_servers_failure(load: Load, raw: Raw) -> None:
    """Both ways: seen before the next request, and only once that is on its way."""
    raw.scripts = [[WHOLE, None], [WHOLE, b""], [WHOLE], [b""], [WHOLE], [None], [WHOLE]]
    result = run(load, raw.target, every(0.6, 5), duration_s=2.5)
    assert errors(result) == {None}
    assert raw.num_requests == 5 + 2
    assert all(r.sent_s is not None and r.sent_s - r.scheduled_s < 0.1 for r in result.records)


def test_a_connection_that_breaks_under_load_is_the_servers_failure(load: Load, raw: Raw) -> None:
    raw.scripts = [[WHOLE], [b""], [WHOLE], [None], [WHOLE]]
    result = run(load, raw.target, every(0.1, 5))
    assert [(r.error or "").partition(":")[0] for r in result.records] == [
        "",
        "connection closed before the response",
        "",
        "connection broke",
        "",
    ]
    assert raw.num_requests == 5


def test_the_retry_is_the_only_one(load: Load, raw: Raw) -> None:
    raw.scripts = [[WHOLE], [b""], [b""], [WHOLE]]
    result = run(load, raw.target, every(0.7, 3), duration_s=2.0)
    assert [r.error for r in result.records] == [None, "connection closed before the response", None]
    assert raw.num_requests == 3 + 1


def test_connections_are_reused_while_they_are_young(load: Load, raw: Raw) -> None:
    raw.scripts = [[WHOLE]]
    assert errors(run(load, raw.target, every(0.1, 10))) == {None}
    assert (raw.num_used, raw.num_requests) == (1, 10)  # and nothing was asked but that


def test_a_server_that_is_slow_to_accept_is_waited_for(load: Load, raw: Raw) -> None:
    """Its kernel takes the connection and the request; the wait is the server's own."""
    raw.scripts = [[WHOLE]]
    run(load, raw.target, every(0.1, 1))
    raw.accepting.clear()
    threading.Timer(1.5, raw.accepting.set).start()
    record, *_ = run(load, raw.target, every(0.0, 1)).records
    assert record.error is None
    assert record.sent_s is not None
    assert record.sent_s < 0.3
    assert record.token_offsets_s[0] > 0.3


def test_a_big_load_is_handed_over_quickly(load: Load, start_server: StartServer) -> None:
    """2,400 requests of 256 tokens cross the pipe and the files in well under a second each way."""
    server = start_server()
    run(load, server.target, every(0.1, 1), duration_s=0.1)
    requests = [asked(i, 0.0, 300, 256, "w " * 295) for i in range(2400)]
    cancelled = threading.Event()
    cancelled.set()
    begun_s = time.monotonic()
    result = run(load, server.target, requests, cancelled=cancelled)
    assert time.monotonic() - begun_s < 2
    assert len(result.records) == 2400


def test_a_load_ends_once_its_answer_is_known(load: Load, start_server: StartServer) -> None:
    server = start_server("--max-num-seqs", "1", "--ttft-ms", "200", "--itl-ms", "50")
    told: list[tuple[float, list[int], list[Ended]]] = []

    def seen(now_s: float, began: Sequence[int], ended: Sequence[Ended]) -> bool:
        told.append((now_s, list(began), list(ended)))
        return sum(len(one) for _, _, one in told) >= 2

    result = run(load, server.target, every(0.05, 100), duration_s=8.0, seen=seen)
    ended = {one.index: one for _, _, found in told for one in found}
    assert result.duration_s < 4.0
    assert {index for _, began, _ in told for index in began} >= set(ended)
    by_index = {record.index: record for record in result.records}
    for index, one in ended.items():
        record = by_index[index]
        assert (one.first_token_s, one.last_token_s) == (record.first_token_s, record.last_token_s)
        assert (one.scheduled_s, one.output_tokens, one.ok) == (record.scheduled_s, record.output_tokens, record.ok)
    assert {record.error for record in result.records} <= {None, "unfinished", "not sent"}
