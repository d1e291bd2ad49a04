"""Requests that wait for others (turns of a conversation, users who ask all the time), and several load processes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workload.conftest import Raw, StartServer
from tests.workload.test_load import asked, errors, every, run
from tests.workload.test_wire import DONE, event, response
from varcas.errors import TrialError, VarcasError
from varcas.experiment import Arrival, Workload
from varcas.records import LoadResult, Prompted, RequestRecord, ScheduledRequest
from varcas.workload.clock import NO_STAMP, Offset
from varcas.workload.driver import Load
from varcas.workload.exchange import Chain, Exchange, Step, Writer
from varcas.workload.prompts import fit_prompts
from varcas.workload.schedule import schedule
from varcas.workload.wire import Answer, Endpoint, Target

pytestmark = pytest.mark.timeout(60)

ANSWER = "w0 w1 w2 w3"  # what the scripted server says in 4 tokens


def turns(first: int, conversation: int, num: int, at_s: float = 0.0, gap_s: float = 0.05) -> list[Prompted]:
    """One conversation, its turns numbered from `first`."""
    return [
        Prompted(
            ScheduledRequest(
                index=first + turn,
                at_s=at_s,
                prompt_tokens=6,
                output_tokens=4,
                seed=0,
                conversation=conversation,
                turn=turn,
                after=first + turn - 1 if turn else None,
                gap_s=gap_s,
            ),
            f"c{conversation}t{turn}",
            "be brief" if turn == 0 and conversation % 2 else None,
        )
        for turn in range(num)
    ]


def by_index(result: LoadResult) -> dict[int, RequestRecord]:
    return {record.index: record for record in result.records}


def test_a_turn_waits_for_the_one_before_and_repeats_what_was_said(load: Load, start_server: StartServer) -> None:
    server = start_server("--max-num-seqs", "64")
    requests = [one for c in range(6) for one in turns(3 * c, c, 3, at_s=0.1 * c)]
    result = run(load, server.target, requests, duration_s=2.0)
    assert errors(result) == {None}
    found = by_index(result)
    assert sorted(found) == list(range(18))
    for index, record in found.items():
        assert (record.conversation, record.turn) == divmod(index, 3)
        if record.turn:
            before = found[index - 1]
            assert before.end_s is not None
            assert record.scheduled_s == pytest.approx(before.end_s + 0.05, abs=1e-6)
            assert record.sent_s is not None
            assert 0 <= record.sent_s - record.scheduled_s < 0.1
            assert record.prompt_tokens is not None
            assert before.prompt_tokens is not None
            assert record.prompt_tokens == before.prompt_tokens + before.output_tokens + 1
        assert record.scheduled_prompt_tokens == 6
    asked_for = {row["prompt"] for row in server.stamps(18)}
    for c in range(6):
        system = "be brief " if c % 2 else ""
        said = f"<bos> <chat> {system}c{c}t0 {ANSWER} c{c}t1 {ANSWER} c{c}t2 <eot> <assistant> <nl>"
        assert said in asked_for


def test_completions_repeat_it_as_one_text(load: Load, start_server: StartServer) -> None:
    server = start_server()
    result = run(load, server.target, turns(0, 1, 3), endpoint="completions")
    assert errors(result) == {None}
    prompts = [row["prompt"] for row in server.stamps(3)]
    assert prompts[-1] == f"be brief c1t0 {ANSWER} c1t1 {ANSWER} c1t2"


def test_an_answer_of_any_characters_comes_back_as_it_was(load: Load, raw: Raw) -> None:
    said = 'ü "quoted" \\ 🙂 \u2028 你'
    events = [event({"delta": {"content": part}, "token_ids": [1]}) for part in said]
    raw.scripts = [[response([*events, event({"delta": {}, "finish_reason": "stop"}), DONE])[0]]]
    result = run(load, raw.target, turns(0, 0, 2))
    assert errors(result) == {None}
    assert raw.bodies[-1]["messages"] == [
        {"role": "user", "content": "c0t0"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "c0t1"},
    ]


def test_a_conversation_that_breaks_is_over_and_the_others_go_on(load: Load, start_server: StartServer) -> None:
    server = start_server("--faults")
    broken = turns(0, 0, 4)
    broken[1] = Prompted(broken[1].request, "fault:http_400")
    result = run(load, server.target, [*broken, *turns(4, 1, 4)])
    found = by_index(result)
    assert sorted(found) == [0, 1, 4, 5, 6, 7]
    assert [index for index, record in found.items() if record.error] == [1]


def test_a_turn_due_after_the_window_is_neither_sent_nor_recorded(load: Load, start_server: StartServer) -> None:
    server = start_server()
    result = run(load, server.target, turns(0, 0, 9, gap_s=0.3), duration_s=0.8)
    assert 2 <= len(result.records) <= 3
    assert errors(result) == {None}
    assert all(record.scheduled_s < 0.8 for record in result.records)
    assert result.drain_s < 2


def closed_loop(users: int, each: int, gap_s: float = 0.0) -> list[Prompted]:
    """Single turns, as many a user."""
    return [
        Prompted(
            ScheduledRequest(i, 0.0, 6, 4, i, i, after=i - 1 if i % each else None, gap_s=gap_s if i % each else 0.0),
            f"p{i}",
        )
        for i in range(users * each)
    ]


def test_users_of_a_closed_loop_never_stop_asking_and_never_ask_twice_at_once(
    load: Load, start_server: StartServer
) -> None:
    server = start_server("--ttft-ms", "20", "--itl-ms", "5")
    result = run(load, server.target, closed_loop(users=5, each=4), duration_s=1.5, cache_salt="s")
    assert errors(result) == {None}
    indices = [record.index for record in result.records]
    assert indices == sorted(set(indices))
    laps = collections.Counter(index // 20 for index in indices)
    assert laps[0] == 20
    assert laps[1] > 0
    for user in range(5):
        mine = [record for record in result.records if record.index % 20 // 4 == user]
        mine.sort(key=lambda record: record.scheduled_s)
        for before, after in itertools.pairwise(mine):
            assert before.end_s is not None
            assert after.scheduled_s == pytest.approx(before.end_s, abs=1e-6)
        assert mine[-1].end_s is not None
        assert mine[-1].end_s >= 1.5  # it asked until the end
    assert len({record.conversation for record in result.records}) == len(indices)
    salts = collections.Counter(row["cache_salt"] for row in server.stamps(len(indices)))
    assert salts["s"] == 20
    assert salts["s-1"] == laps[1]


def test_users_think_before_they_ask_again(load: Load, start_server: StartServer) -> None:
    server = start_server("--ttft-ms", "5", "--itl-ms", "1")
    result = run(load, server.target, closed_loop(users=2, each=3, gap_s=0.2), duration_s=1.5)
    found = by_index(result)
    for index, record in found.items():
        if index % 3:
            end_s = found[index - 1].end_s
            assert end_s is not None
            assert record.scheduled_s == pytest.approx(end_s + 0.2, abs=1e-6)
    assert {index // 6 for index in found} >= {0, 1}
    again, before = found[6], found[2].end_s
    assert before is not None
    assert again.scheduled_s == pytest.approx(before + 0.2, abs=1e-6)


def test_a_user_whose_request_failed_asks_something_else_after_a_pause(load: Load, start_server: StartServer) -> None:
    server = start_server("--faults")
    requests = [*turns(0, 0, 3), *turns(3, 1, 2)]
    requests[1] = Prompted(requests[1].request, "fault:http_502")
    first = requests[3].request
    requests[3] = Prompted(ScheduledRequest(3, 0.0, 6, 4, 0, 1, turn=0, after=2, gap_s=0.1), "c1t0")
    assert first.after is None
    found = by_index(run(load, server.target, requests, duration_s=2.0))
    assert 2 not in found
    failed_s = found[1].end_s
    assert failed_s is not None
    assert found[3].scheduled_s == pytest.approx(failed_s + 1.0, abs=1e-6)
    assert found[3].error is None
    assert found[4].error is None


def test_two_followers_of_one_request_are_refused(load: Load, start_server: StartServer) -> None:
    server = start_server()
    requests = turns(0, 0, 3)
    twice = Prompted(ScheduledRequest(2, 0.0, 6, 4, 0, 0, turn=1, after=0), "again")
    with pytest.raises(VarcasError, match="request 2 waits for 0, which is not there or has a follower"):
        run(load, server.target, [*requests[:2], twice])


def test_a_follower_is_built_in_little_time() -> None:
    """A long history costs its copy, not its encoding."""
    writer = Writer(Target("h", 1, "m"), "chat", cache_salt="s", sampling={})
    steps = [Step.of_row([i, 0.0, 9, 9, 0, i, 0.0, "word " * 200, None], "chat") for i in range(50)]
    exchange = Exchange(Chain(tuple(steps), False, 50, 1), 0, 0, 0.0, writer)
    answer = Answer(finish_reason="stop", texts=["word "] * 200)
    spent_s = []
    for _ in range(49):
        exchange.end_s = 1.0
        began_s = time.perf_counter()
        following = exchange.follower(writer, answer, 0.0)
        spent_s.append(time.perf_counter() - began_s)
        assert following is not None
        exchange = following
    assert len(exchange.data) > 90_000
    assert sorted(spent_s)[24] < 0.002  # 0.015 ms as measured, for 45 kB of history


WHOLE, _ = response([event({"text": "a"}), event({"text": "b", "finish_reason": "length"}), DONE])


@pytest.mark.parametrize(
    ("turn", "pieces", "failure", "needs_reading"),
    [
        (0, [WHOLE], None, False),
        (0, [WHOLE[:90], WHOLE[90:]], None, False),
        (0, [WHOLE[:-5], WHOLE[-5:]], None, False),  # the last chunk comes alone
        (1, [WHOLE], None, True),  # it is repeated
        (0, [WHOLE], "connection broke: Reset", True),
        (0, [WHOLE[:-5]], None, True),
        (0, [WHOLE.replace(b"200 OK", b"500 No")], None, True),
        (0, [response([event(error={"message": "x"}), DONE])[0]], None, True),
        (0, [response([event({"text": "a"})])[0]], None, True),
        (0, [], None, True),
    ],
)
def test_an_answer_is_read_before_the_next_request_only_where_that_depends_on_it(
    turn: int, pieces: list[bytes], failure: str | None, needs_reading: bool
) -> None:
    writer = Writer(Target("h", 1, "m"), "chat", cache_salt="s", sampling={})
    steps = [Step.of_row([i, 0.0, 9, 9, i, i * turn, 0.5, "word", None], "chat") for i in range(2)]
    exchange = Exchange(Chain(tuple(steps), True, 2, 2), 0, 0, 0.0, writer)
    offset = Offset()
    exchange.begin(offset.steps)
    for piece in pieces:
        exchange.stamps += NO_STAMP
        exchange.seen_s.append(time.monotonic())
        exchange.response.feed(piece)
    exchange.failure = failure
    assert exchange.needs_reading == needs_reading
    if not needs_reading:
        exchange.date_end(offset)
        dated_s, unread = exchange.end_s, exchange.follower(writer, None, 0.0)
        read = exchange.follower(writer, exchange.read(offset), 0.0)
        assert exchange.end_s == dated_s
        assert unread is not None
        assert read is not None
        assert (unread.data, unread.due_s, unread.place) == (read.data, read.due_s, 1)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    directory = tmp_path_factory.mktemp("three")
    with Load.start(directory / "load.log", directory / "load", clients=3) as started:
        yield started


def test_several_processes_give_one_load_on_one_clock(three: Load, start_server: StartServer) -> None:
    server = start_server("--max-num-seqs", "512")
    requests = [*every(0.01, 60), *(one for c in range(5) for one in turns(60 + 3 * c, 60 + c, 3))]
    told: list[tuple[int, int]] = []
    result = run(three, server.target, requests, on_progress=lambda sent, done: told.append((sent, done)))
    assert errors(result) == {None}
    assert [record.index for record in result.records] == list(range(75))
    assert result.clients == len(set(three.pids)) == 3
    assert len(server.stamps(75)) == 75
    assert told[-1] == (75, 75)
    assert 0 < result.client_cpu_frac < 1
    received_s = {row["prompt"]: row["received_s"] for row in server.stamps() if "c6" in row["prompt"]}
    for record in result.records:
        assert record.sent_s is not None
        assert -0.001 < record.sent_s - record.scheduled_s < 0.2
        if record.index >= 60 and record.turn == 0:
            text = next(prompt for prompt in received_s if prompt.split()[-4] == f"c{record.conversation}t0")
            assert received_s[text] - result.t0_monotonic_s == pytest.approx(record.sent_s, abs=0.1)


@pytest.mark.parametrize("num", [0, 1])
def test_a_process_may_have_nothing_to_send(three: Load, start_server: StartServer, num: int) -> None:
    server = start_server()
    result = run(three, server.target, every(0.1, num), duration_s=0.2)
    assert [record.error for record in result.records] == [None] * num
    assert result.duration_s == 0.2
    assert result.drain_s < 2


def test_several_processes_stop_together(three: Load, start_server: StartServer) -> None:
    server = start_server("--itl-ms", "50")
    began_s = time.monotonic()
    result = run(
        three,
        server.target,
        every(0.02, 600, output_tokens=20),
        duration_s=30.0,
        cancelled=lambda: time.monotonic() > began_s + 1.5,
    )
    assert time.monotonic() - began_s < 6
    assert len(result.records) == 600
    assert errors(result) <= {None, "unfinished", "not sent"}
    assert result.duration_s < 5


def test_a_silent_server_hangs_all_of_several_processes(three: Load, start_server: StartServer) -> None:
    server = start_server("--hang-after-requests", "9")
    with pytest.raises(TrialError, match="no token for 1 s"):
        run(three, server.target, every(0.05, 200), duration_s=10.0, stall_timeout_s=1.0)


def test_one_process_without_an_answer_is_no_hang_while_another_has_some(
    three: Load, start_server: StartServer
) -> None:
    """Every third request, all of them the first process's, waits in vain; the two others' are answered."""
    server = start_server("--ttft-ms", "0", "--itl-ms", "0", "--faults", "--max-num-seqs", "512")
    requests = [asked(i, i * 0.01, 6, 4, "fault:hang" if i % 3 == 0 else "quick") for i in range(200)]
    result = run(three, server.target, requests, duration_s=2.2, max_drain_s=0.1, stall_timeout_s=1.0)
    assert collections.Counter(record.error for record in result.records) == {None: 133, "unfinished": 67}


def test_the_death_of_one_of_several_processes_ends_the_load_in_words(
    tmp_path: Path, start_server: StartServer
) -> None:
    server = start_server("--itl-ms", "50")
    with Load.start(tmp_path / "load.log", tmp_path / "load", clients=2) as load:

        def kill(sent: int, done: int) -> None:
            if sent > 3:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(load.pids[1], signal.SIGKILL)

        with pytest.raises(VarcasError, match=r"the load's process ended with -9; see .*load\.log"):
            run(load, server.target, every(0.1, 40, output_tokens=100), duration_s=9.0, on_progress=kill)
        assert list((tmp_path / "load").iterdir()) == []


@pytest.mark.parametrize(("arrival", "endpoint"), [("poisson", "chat"), ("closed", "completions")])
def test_a_built_in_workload_of_conversations_is_counted_by_the_server_as_it_was_planned(
    load: Load, start_server: StartServer, arrival: str, endpoint: Endpoint
) -> None:
    server = start_server("--max-num-seqs", "64", "--max-model-len", "100000", "--ttft-ms", "2", "--itl-ms", "0.2")
    arrives: dict[str, Any] = {"arrival": Arrival(kind="closed", users=4)} if arrival == "closed" else {"rate_rps": 8.0}
    workload = Workload(profile="multi-turn", think_s=0.02, shared_prefix_tokens=40, max_tokens=400, **arrives)
    requests = schedule(workload, start_s=0, duration_s=1.0, max_len=400, stream="measure")
    fitted = fit_prompts(server.target, requests, endpoint=endpoint, cache_dir=None)
    result = run(load, server.target, fitted, duration_s=1.0, max_drain_s=20.0, endpoint=endpoint)
    assert errors(result) == {None}
    assert {record.turn for record in result.records} >= {0, 1}
    assert len({record.index for record in result.records}) == len(result.records)
    for record in result.records:
        assert record.prompt_tokens is not None
        if record.turn == 0:
            assert record.prompt_tokens == record.scheduled_prompt_tokens
        else:
            assert record.prompt_tokens > record.scheduled_prompt_tokens
        assert record.output_tokens == record.scheduled_output_tokens == sum(record.token_counts)
