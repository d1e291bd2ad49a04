"""The load benchmark's own arithmetic, and that its scripted server stamps what it sends."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import agreement  # noqa: E402
import load_client  # noqa: E402
import load_clients  # noqa: E402
import load_process  # noqa: E402
import load_truth  # noqa: E402
from load_truth import Answered, Claim, Claims, Truth  # noqa: E402

TOKENS = 4
STEP_NS = 20_000_000


def answered(index: int) -> Answered:
    """Came at `index` seconds; tokens 20 ms apart from 30 ms later on; each send takes 5 us."""
    arrival_ns = index * 1_000_000_000
    first_ns = arrival_ns + 30_000_000
    tokens = [first_ns + number * STEP_NS for number in range(TOKENS)]
    before = np.array([first_ns, *tokens, *[tokens[-1]] * load_truth.END_CHUNKS])
    return Answered(index, arrival_ns, first_ns, before, before + 5_000)


def claim(index: int, late_s: float = 0.0) -> Claim:
    """The truth, `late_s` later from the first token on."""
    times = [index + 0.03 + number * 0.02 + late_s for number in range(TOKENS)]
    return Claim(index, index - 0.001, float(index), times[0], times, TOKENS, ok=True)


TRUTH = Truth(STEP_NS, 0, tuple(answered(index) for index in range(3)))
EXACT = [claim(0), claim(1), claim(2)]


def figures(claims: list[Claim], truth: Truth = TRUTH) -> load_truth.Figures:
    return load_truth.figures(truth, Claims(tuple(claims)), 3, TOKENS)


def test_the_truth_has_no_error() -> None:
    found = figures(EXACT)
    assert found.ttft_error_p99_ms == pytest.approx(0, abs=1e-6)
    assert found.token_error_p99_ms == pytest.approx(0, abs=1e-6)
    assert found.send_lag_p99_ms == pytest.approx(1.0)
    assert (found.lost, found.doubled, found.wrong, found.without_due) == (0, 0, 0, 0)
    assert found.truth_unsure_p99_ms == pytest.approx(0.005)
    assert found.server_late_p99_ms == 0


def test_a_late_figure_is_an_error_of_as_much() -> None:
    found = figures([claim(0), claim(1), claim(2, late_s=0.004)])
    assert found.ttft_error_p50_ms == pytest.approx(0, abs=1e-6)
    assert found.ttft_error_p99_ms == pytest.approx(4)
    assert found.token_error_p99_ms == pytest.approx(4)


def test_ttft_is_judged_by_the_clients_own_send() -> None:
    early = replace(claim(0), sent_s=-0.002)  # it took its time before the bytes left
    found = figures([early, claim(1), claim(2)])
    assert found.ttft_error_p99_ms == pytest.approx(2)
    assert found.token_error_p99_ms == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("claims", "counts"),
    [
        (EXACT[:2], (1, 0, 0)),
        ([*EXACT[:2], replace(claim(2), ok=False)], (1, 0, 0)),
        ([*EXACT, claim(2)], (0, 1, 0)),
        ([*EXACT[:2], replace(claim(2), num_tokens=3)], (0, 0, 1)),
        ([*EXACT[:2], replace(claim(2), times_s=claim(2).times_s[:3])], (0, 0, 1)),
        ([*EXACT[:2], replace(claim(2), times_s=claim(2).times_s[::-1])], (0, 0, 1)),
    ],
)
def test_what_is_lost_doubled_or_wrong_is_counted(claims: list[Claim], counts: tuple[int, int, int]) -> None:
    found = figures(claims)
    assert (found.lost, found.doubled, found.wrong) == counts


def test_a_request_that_came_twice_or_was_cut_short_is_counted() -> None:
    assert figures(EXACT, replace(TRUTH, answered=(*TRUTH.answered, answered(2)))).doubled == 1
    short = replace(answered(2), before_ns=answered(2).before_ns[:3], after_ns=answered(2).after_ns[:3])
    assert figures(EXACT, replace(TRUTH, answered=(*TRUTH.answered[:2], short))).lost == 1


def test_with_an_unknown_start_the_least_late_request_is_on_time() -> None:
    late = {0: 10.0, 1: 11.0, 2: 11.5}  # the last one half a second earlier than it came
    found = load_truth.figures(TRUTH, Claims(tuple(EXACT), due_from_first_s=late), 3, TOKENS)
    assert (found.send_lag_p50_ms, found.send_lag_p99_ms) == (0, 500)


def test_cpu_between_moments_is_linear_between_looks() -> None:
    usage = load_process.Usage(4, 9, 0, (1.0, 2.0, 4.0), (0.0, 1.0, 9.0))
    assert usage.cpu_between_s(1.5, 3.0) == pytest.approx(4.5)
    assert usage.cpu_between_s(0.0, 99.0) == 9


def test_the_plan_is_the_same_everywhere_and_keeps_its_rate() -> None:
    plan = load_clients.poisson_plan(50, 2)
    assert len(plan.at_s) == 100
    assert plan.at_s[-1] == 2.0
    assert list(plan.at_s) == sorted(plan.at_s)
    assert plan.at_s[:3] == (0.005035, 0.046073, 0.050718)


def row(rate_rps: float, lag_ms: float, late_ms: float = 1.0) -> load_client.Row:
    seen = replace(figures(EXACT), send_lag_p99_ms=lag_ms, server_late_p99_ms=late_ms)
    return load_client.Row(load_client.Cell("varcas", "step", rate_rps, 1), 1, seen, 10, 20, 0.5, 100, 1)


def test_probes_close_in_on_the_knee() -> None:
    rows = [row(200, 0.1)]
    while (rate := load_client.next_probe("varcas", rows)) is not None:
        rows.append(row(rate, 99 if rate > 500 else 0.1))
    found = load_client.knee("varcas", rows)
    assert found.kept_rps <= 500 < found.left_rps <= 1.6 * found.kept_rps
    assert found.why == "send lag p99 99.0 ms"
    full = load_client.knee("varcas", [row(200, 0.1, late_ms=25)])
    assert math.isnan(full.left_rps)
    assert "server" in full.why
    assert load_client.next_probe("varcas", [row(200, 0.1, late_ms=25)]) is None


def test_a_bound_without_a_measurement_is_neither_met_nor_missed() -> None:
    met = {one.name.split(",")[0]: one.met for one in load_client.bounds([row(200, 0.5)])}
    assert met["send lag p99"] is True
    assert met["CPU under load"] is None
    assert next(iter(load_client.bounds([replace(row(200, 0.5), figures=None)]))).met is False


def test_the_ratios_interval_is_welchs() -> None:
    ours, theirs = [1.0, 1.1, 1.3], [2.0, 2.1, 1.9]
    found = agreement.compare("x", ours, theirs)
    known = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((math.exp(known.low), math.exp(known.high)))
    assert found.verdict == "differs"


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([10.0, 10.05, 9.95, 10.0], "agrees"),
        ([10.6, 10.65, 10.55, 10.6], "differs"),
        ([10.0, 14.0, 7.0, 10.0], "not told"),  # such repeats show nothing
        ([10.0], "not told"),
    ],
)
def test_agreement_has_to_be_shown(ours: list[float], verdict: str) -> None:
    assert agreement.compare("x", ours, [10.0, 10.02, 9.98, 10.0]).verdict == verdict


def test_our_figures_of_an_agreement_are_those_of_the_metrics() -> None:
    plan = load_clients.Plan(0.5, tuple(range(30)), ("prompt",) * 30, TOKENS)
    moved = [replace(one, due_s=float(one.key), sent_s=one.sent_s + 0.01) for one in map(claim, range(30))]
    ours, theirs = (run(Claims(tuple(moved)), plan) for run in (agreement.our_figures, agreement.their_figures))
    assert (ours.num_ok, ours.send_lag_mean_ms) == (30, pytest.approx(10.0))
    wanted = dict(zip(agreement.COMPARED, (20.0, 20.0, 20.0, 80.0, 120 / 29.09, 120 / 60), strict=True))
    assert ours.figures == pytest.approx(wanted)
    assert theirs.figures == pytest.approx(wanted)


def test_a_full_run_fails_where_a_bound_was_not_measured() -> None:
    unmeasured = load_client.bounds([row(200, 0.5)])
    assert load_client.exit_code(unmeasured, is_partial=False) == 1
    assert load_client.exit_code(unmeasured, is_partial=True) == 0
    assert load_client.exit_code(load_client.bounds([row(200, 5.0)]), is_partial=True) == 1


@pytest.mark.parametrize("mode", ["step", "free"])
def test_the_server_stamps_what_it_sends(mode: str, tmp_path: Path) -> None:
    argv = [sys.executable, str(BENCHMARKS / "truth_server.py"), "--mode", mode, "--tokens", str(TOKENS)]
    argv += ["--stamps", str(tmp_path / "stamps"), "--state", str(tmp_path / "state")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            raw = [ask(port, index) for index in (7, 8)]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
    truth = load_truth.read(tmp_path / "stamps")
    assert [one.index for one in truth.answered] == [7, 8]
    for one, data in zip(truth.answered, raw, strict=True):
        events = events_of(data)
        assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["", "w0", " w1", " w2", " w3"]
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert events[-1]["usage"]["completion_tokens"] == TOKENS
        assert one.is_whole(TOKENS)
        assert one.arrival_ns < one.before_ns[0] <= one.after_ns[0] <= one.before_ns[1]
        assert (np.diff(one.tokens_ns(TOKENS)) > 0).all()
        assert one.first_due_ns <= one.tokens_ns(TOKENS)[0]


def ask(port: int, index: int) -> bytes:
    """Asks once over a connection of its own, head and body apart; returns all that comes."""
    body = json.dumps({"messages": [{"role": "user", "content": f"bench-{index:06d} x"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    data = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(head.encode())
        sock.sendall(body)
        while not data.endswith(b"\r\n0\r\n\r\n"):
            piece = sock.recv(65536)
            assert piece
            data += piece
    return data


def events_of(data: bytes) -> list[dict[str, object]]:
    """The events of a chunked answer but the last, which must be `[DONE]`."""
    body, rest = b"", data.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        assert rest[int(size, 16) :][:2] == b"\r\n"
        rest = rest[int(size, 16) + 2 :]
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    return [json.loads(event) for event in events[:-1]]
