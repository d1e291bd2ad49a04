from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varcas.workload.wire import End, Target, completion_body, parse, request_bytes

HEAD = b"HTTP/1.1 200 OK\r\ndate: x\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
USAGE = {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}


@dataclass(frozen=True)
class Framing:
    """How a response's end is told."""

    header: bytes
    chunked: bool


FRAMINGS = {
    "chunked": Framing(b"transfer-encoding: chunked\r\n", True),
    "length": Framing(b"content-length: %d\r\n", False),
    "close": Framing(b"connection: close\r\n", False),
}


def event(choice: dict[str, Any] | None = None, **more: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, **choice}]
    return f"data: {json.dumps({'id': 'x', 'choices': choices, **more})}\n\n".encode()


ROLE = event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, prompt_token_ids=[1, 2])
DONE = b"data: [DONE]\n\n"


def token(text: str, ids: list[int], finish: str | None = None) -> bytes:
    return event({"delta": {"content": text}, "finish_reason": finish, "token_ids": ids})


def response(events: list[bytes], framing: str = "chunked", merge: int = 1) -> tuple[bytes, list[int]]:
    """The bytes of a response, `merge` events a chunk, and where each event's line ends in them."""
    body = b"".join(events)
    header = FRAMINGS[framing].header
    raw = HEAD + (header % len(body) if b"%d" in header else header) + b"\r\n"
    ends: list[int] = []
    for start in range(0, len(events), merge):
        part = events[start : start + merge]
        data = b"".join(part)
        if FRAMINGS[framing].chunked:
            raw += b"%x\r\n" % len(data)
        for one in part:
            raw += one
            ends.append(len(raw) - 1)
        if FRAMINGS[framing].chunked:
            raw += b"\r\n"
    return raw + (b"0\r\n\r\n" if FRAMINGS[framing].chunked else b""), ends


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted({at for at in cuts if 0 < at < len(raw)}), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(bounds)]


EVENTS = [
    ROLE,
    token("a", [5]),
    token("", [6]),  # a character is incomplete: no text, but a token
    token("bcd", [7, 8, 9]),
    token("e", [10], "length"),
    event(usage=USAGE),
    DONE,
]
COUNTS = [1, 1, 3, 1]


@given(
    cuts=st.lists(st.integers(1, 1200), max_size=60),
    merge=st.integers(1, 7),
    framing=st.sampled_from(sorted(FRAMINGS)),
)
@settings(max_examples=200)
def test_however_the_bytes_are_cut_each_event_gets_the_stamp_of_its_last_byte(
    cuts: list[int], merge: int, framing: str
) -> None:
    raw, ends = response(EVENTS, framing, merge)
    pieces = cut(raw, cuts)
    end = End()
    reached = [end.reached(piece) for piece in pieces]
    assert not any(reached[:-1])
    assert reached[-1] == (framing != "close")
    answer = parse(pieces, range(len(pieces)))
    totals = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    expected = [next(i for i, total in enumerate(totals) if total >= at) for at in ends[1:5]]
    assert list(answer.times) == expected
    assert list(answer.counts) == COUNTS
    assert (answer.status, answer.error, answer.finish_reason) == (200, None, "length")
    assert (answer.prompt_tokens, answer.output_tokens, answer.counting) == (11, 6, "token_ids")


@given(length=st.integers(0, 1200), merge=st.integers(1, 7), framing=st.sampled_from(sorted(FRAMINGS)))
@settings(max_examples=200)
def test_a_response_that_breaks_off_anywhere_keeps_what_came_and_says_so(length: int, merge: int, framing: str) -> None:
    raw, _ = response(EVENTS, framing, merge)
    answer = parse([raw[:length]] if length else [], [1.0])
    if length >= len(raw):
        assert answer.error is None
    elif framing != "close" or b"[DONE]" not in raw[:length]:
        assert answer.error is not None
        assert answer.error.startswith("connection closed")
    assert COUNTS[: len(answer.counts)] == list(answer.counts)


def test_role_and_usage_chunks_are_no_tokens_in_any_way_of_counting() -> None:
    text = [
        event({"delta": {"role": "assistant", "content": ""}}),
        event({"delta": {"reasoning_content": "hm"}}),
        event({"delta": {"content": "a"}}),
        event({"delta": {"content": ""}, "finish_reason": "stop"}),
        event(usage=USAGE),
        DONE,
    ]
    answer = parse([response(text)[0]], [1.0])
    assert (list(answer.counts), answer.counting, answer.output_tokens) == ([1, 1], "text", 6)
    running = [
        event({"delta": {"role": "assistant", "content": ""}}, usage={"prompt_tokens": 11, "completion_tokens": 0}),
        event({"delta": {"content": ""}}, usage={"prompt_tokens": 11, "completion_tokens": 1}),
        event({"delta": {"content": "abc"}}, usage={"prompt_tokens": 11, "completion_tokens": 5}),
        event({"delta": {"content": "d"}, "finish_reason": "length"}, usage=USAGE),
        event(usage=USAGE),
        DONE,
    ]
    answer = parse([response(running)[0]], [1.0])
    assert (list(answer.counts), answer.counting) == ([1, 4, 1], "usage")
    completions = [event({"text": "a"}), event({"text": "b", "finish_reason": "length"}), DONE]
    assert list(parse([response(completions)[0]], [1.0]).counts) == [1, 1]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "connection closed before the response"),
        (b"HTTP/1.1 200", "connection closed within the head"),
        (
            b'HTTP/1.1 400 Bad\r\ncontent-length: 42\r\n\r\n{"error": {"message": "too long\\nby far"}}',
            "http 400: too long",
        ),
        (b'HTTP/1.1 401 No\r\ncontent-length: 24\r\n\r\n{"error":"Unauthorized"}', "http 401: Unauthorized"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 9\r\n\r\nBang!\nand", "http 500: Bang!"),
        (b"SSH-2.0-x\r\n\r\n", "http 0: "),
        (response([token("a", [1]), b"data: {broken\n\n", DONE])[0], "broken event: "),
        (response([token("a", [1]), b'data: {"error": {"message": "EngineDead"}}\n\n', DONE])[0], "stream: EngineDead"),
        (response([token("a", [1]), DONE])[0], "no finish_reason after 1 tokens"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "connection closed after 0 tokens"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(raw: bytes, error: str) -> None:
    found = parse([raw], [1.0]).error
    assert found is not None
    assert found.startswith(error)
    assert "\n" not in found


def test_long_parsing_lets_others_run() -> None:
    pauses: list[int] = []
    raw, _ = response([token("a", [1])] * 100 + [token("a", [1], "length"), DONE])
    assert sum(parse([raw], [1.0], lambda: pauses.append(1)).counts) == 101
    assert len(pauses) == 3


def test_a_request_says_everything_explicitly_and_hides_its_key_from_repr() -> None:
    target = Target("127.0.0.1", 8000, "m", "sk-secret")
    assert "secret" not in repr(target)
    body = completion_body("chat", "m", "hi", 7, cache_salt="s", sampling={"top_p": 0.5}, counting="token_ids")
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["max_tokens"], body["ignore_eos"], body["cache_salt"], body["top_p"]) == (7, True, "s", 0.5)
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} < set(body)
    head, _, data = request_bytes(target, "/v1/chat/completions", body).partition(b"\r\n\r\n")
    assert json.loads(data) == body
    assert b"Authorization: Bearer sk-secret" in head
    assert f"Content-Length: {len(data)}".encode() in head
    plain = completion_body("completions", "m", "hi", 7, cache_salt=None, sampling={}, counting="text")
    assert plain["prompt"] == "hi"
    assert "cache_salt" not in plain
