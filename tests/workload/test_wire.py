from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varcas.workload.wire import (
    ERROR_KINDS,
    PAUSE_EVERY,
    VLLM_ALONE,
    Answer,
    Asking,
    Response,
    Target,
    asked_options,
    body_bytes,
    completion_body,
    parse,
    said,
    scale_unfinished,
)

HEAD = b"HTTP/1.1 200 OK\r\ndate: x\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
USAGE = {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}


@dataclass(frozen=True)
class Framing:
    """How a response's end is told."""

    header: bytes
    chunked: bool = False
    extension: bytes = b""
    trailers: bytes = b""
    before: bytes = b""


FRAMINGS = {
    "chunked": Framing(b"transfer-encoding: chunked\r\n", True),
    "extensions": Framing(b"Transfer-Encoding: Chunked\r\n", True, b' ; name="0"'),
    "trailers": Framing(b"transfer-encoding: chunked\r\n", True, trailers=b"x-sum: 0\r\nx-more: 1\r\n"),
    "interim": Framing(b"transfer-encoding: chunked\r\n", True, before=b"HTTP/1.1 103 Hints\r\nlink: 0\r\n\r\n" * 2),
    "length": Framing(b"content-length: %d\r\n"),
    "close": Framing(b"connection: close\r\n"),
}


def event(choice: dict[str, Any] | None = None, **more: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, **choice}]
    return f"data: {json.dumps({'id': 'x', 'choices': choices, **more}, ensure_ascii=False)}\n\n".encode()


ROLE = event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, prompt_token_ids=[1, 2])
DONE = b"data: [DONE]\n\n"


def token(text: str, ids: list[int], finish: str | None = None) -> bytes:
    return event({"delta": {"content": text}, "finish_reason": finish, "token_ids": ids})


def response(events: Sequence[bytes], framing: str = "chunked", merge: int = 1) -> tuple[bytes, list[int]]:
    """The bytes of a response, `merge` events a chunk, and how many of them bring each event's line."""
    how = FRAMINGS[framing]
    body = b"".join(events)
    raw = how.before + HEAD + (how.header % len(body) if b"%d" in how.header else how.header) + b"\r\n"
    ends: list[int] = []
    for start in range(0, len(events), merge):
        part = events[start : start + merge]
        if how.chunked:
            raw += b"%x%b\r\n" % (sum(map(len, part)), how.extension)
        for one in part:
            ends.append(len(raw) + len(one) - len(b"\r\n" if one.endswith(b"\r\n") else b"\n"))
            raw += one
        if how.chunked:
            raw += b"\r\n"
    return raw + (b"0\r\n" + how.trailers + b"\r\n" if how.chunked else b""), ends


def cut(raw: bytes, cuts: Sequence[int]) -> list[bytes]:
    bounds = [0, *sorted({at for at in cuts if 0 < at < len(raw)}), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(bounds)]


def error_kind(error: str) -> str:
    """Which of `ERROR_KINDS` an error is."""
    return next(kind for kind in ERROR_KINDS if error.startswith(kind))


def fed(pieces: Sequence[bytes], closed: bool = True) -> Response:
    """A response that got these pieces, of which none may come after its end, and then the connection's end."""
    found = Response()
    for piece in pieces:
        assert not found.over
        found.feed(piece)
    if closed and not found.over:
        found.closed()
    return found


def read(pieces: Sequence[bytes], **more: Any) -> Answer:
    return parse(fed(pieces), range(len(pieces)), **more)


def with_ends(line_end: bytes) -> list[bytes]:
    return [one.replace(b"\n", line_end) for one in EVENTS]


EVENTS = [
    ROLE,
    token("a", [5]),
    b": a comment\n\n",
    token("", [6]),  # a character is incomplete: no text, but a token
    b"event: message\n" + token("bcü你🙂", [7, 8, 9]),
    b"id: 7\n" + token("e", [10], "length").replace(b"data: ", b"data:"),
    event(usage=USAGE),
    DONE,
]
TOKENS = [1, 3, 4, 5]
COUNTS = [1, 1, 3, 1]
LINE_ENDS = {"\n": EVENTS, "\r\n": with_ends(b"\r\n"), "\r": with_ends(b"\r")}


@given(
    cuts=st.lists(st.integers(1, 1600), max_size=60),
    merge=st.integers(1, 8),
    framing=st.sampled_from(sorted(FRAMINGS)),
    line_end=st.sampled_from(sorted(LINE_ENDS)),
)
@settings(max_examples=300, deadline=None)
def test_however_the_bytes_are_cut_each_event_gets_the_stamp_of_its_last_byte(
    cuts: list[int], merge: int, framing: str, line_end: str
) -> None:
    raw, ends = response(LINE_ENDS[line_end], framing, merge)
    pieces = cut(raw, cuts)
    found = fed(pieces, closed=False)
    assert found.over == (framing != "close")
    found.closed()
    assert (found.whole, found.broken) == (True, None)
    answer = parse(found, range(len(pieces)), keep_text=True)
    totals = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    expected = [next(i for i, total in enumerate(totals) if total >= ends[at]) for at in TOKENS]
    assert list(answer.times) == expected
    assert list(answer.counts) == COUNTS
    assert "".join(answer.texts) == "abcü你🙂e"
    assert (answer.status, answer.error, answer.finish_reason) == (200, None, "length")
    assert (answer.prompt_tokens, answer.output_tokens, answer.counting) == (11, 6, "token_ids")


@pytest.mark.parametrize("framing", sorted(FRAMINGS))
def test_one_byte_at_a_time_is_the_same_answer(framing: str) -> None:
    raw, _ = response(EVENTS, framing)
    whole, bytewise = read([raw]), read([raw[i : i + 1] for i in range(len(raw))])
    assert list(bytewise.counts) == list(whole.counts) == COUNTS
    assert (bytewise.error, bytewise.output_tokens) == (None, 6)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    cuts=st.lists(st.integers(1, 2500), max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_chunk_bounds_may_lie_anywhere(sizes: list[int], cuts: list[int]) -> None:
    body = b"".join(EVENTS)
    bounds = [0, *itertools.takewhile(lambda at: at < len(body), itertools.accumulate(sizes)), len(body)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (b - a, body[a:b]) for a, b in itertools.pairwise(bounds))
    raw = HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    found = fed(cut(raw, cuts), closed=False)
    assert (found.over, found.whole, found.reusable) == (True, True, True)
    answer = parse(found, [0.0] * len(found.parts))
    assert (list(answer.counts), answer.error) == (COUNTS, None)


@given(length=st.integers(0, 1600), merge=st.integers(1, 8), framing=st.sampled_from(["chunked", "length", "close"]))
@settings(max_examples=200, deadline=None)
def test_a_response_that_breaks_off_anywhere_keeps_what_came_and_says_so(length: int, merge: int, framing: str) -> None:
    raw, _ = response(EVENTS, framing, merge)
    answer = read([raw[:length]] if length else [])
    if length >= len(raw) or (framing == "close" and b"[DONE]" in raw[:length]):
        assert answer.error is None
    else:
        assert answer.error is not None
        assert answer.error.startswith(("connection closed", "broken event" if framing == "close" else "connection"))
    assert COUNTS[: len(answer.counts)] == list(answer.counts)


def test_data_that_look_like_the_end_are_not_the_end() -> None:
    trap = b"data: \r\n0\r\n\r\n"
    raw = HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n" % (len(trap), trap)
    found = Response()
    assert not found.feed(raw)
    assert not any(found.feed(bytes([byte])) for byte in b"%x\r\n%b\r\n" % (len(trap), trap))
    assert found.feed(b"0\r\n\r\n")
    assert b"".join(found.parts) == 2 * trap


@pytest.mark.parametrize(
    ("raw", "reusable"),
    [
        (response(EVENTS)[0], True),
        (response(EVENTS, "length")[0], True),
        (response(EVENTS)[0] + b"more", False),
        (response(EVENTS, "length")[0] + b"more", False),
        (response(EVENTS)[0].replace(b"date: x", b"Connection: Close"), False),
        (response(EVENTS)[0].replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (response(EVENTS)[0].replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"date: x", b"connection: keep-alive"), True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", True),
    ],
)
def test_a_connection_is_used_again_only_when_that_is_safe(raw: bytes, reusable: bool) -> None:
    found = fed([raw], closed=False)
    assert (found.over, found.whole, found.reusable) == (True, True, reusable)


def test_role_and_usage_chunks_are_no_tokens_in_any_way_of_counting() -> None:
    text = [
        event({"delta": {"role": "assistant", "content": ""}}),
        event({"delta": {"reasoning_content": "hm"}}),
        event({"delta": {"reasoning": "hm"}}),
        event({"delta": {"content": "a"}}),
        event({"delta": {"content": ""}, "finish_reason": "stop"}),
        event(usage=USAGE | {"completion_tokens": 3}),
        DONE,
    ]
    answer = read([response(text)[0]])
    assert (list(answer.counts), answer.counting, answer.output_tokens) == ([1, 1, 1], "text", 3)
    running = [
        event({"delta": {"role": "assistant", "content": ""}}, usage={"prompt_tokens": 11, "completion_tokens": 0}),
        event({"delta": {"content": ""}}, usage={"prompt_tokens": 11, "completion_tokens": 1}),
        event({"delta": {"content": "abc"}}, usage={"prompt_tokens": 11, "completion_tokens": 5}),
        event({"delta": {"content": "d"}, "finish_reason": "length"}, usage=USAGE),
        event(usage=USAGE),
        DONE,
    ]
    answer = read([response(running)[0]])
    assert (list(answer.counts), answer.counting) == ([1, 4, 1], "usage")
    completions = [event({"text": "a"}), event({"text": "b", "finish_reason": "length"}), DONE]
    assert list(read([response(completions)[0]]).counts) == [1, 1]


@given(num_events=st.integers(1, 40), total=st.integers(1, 200))
def test_texts_add_up_to_the_usage_that_comes_last(num_events: int, total: int) -> None:
    texts = [event({"delta": {"content": "a"}}) for _ in range(num_events)]
    end = [event({"delta": {}, "finish_reason": "stop"}), event(usage=USAGE | {"completion_tokens": total}), DONE]
    answer = read([response([ROLE, *texts, *end])[0]])
    assert sum(answer.counts) == answer.output_tokens == total
    assert len(answer.counts) == len(answer.times) == num_events
    assert answer.counts[0] >= 1
    assert max(answer.counts) - min(answer.counts) <= 1


def test_as_many_events_as_tokens_are_one_each_even_without_text() -> None:
    """As vLLM sends them: a token whose character is incomplete has no text, the end of the text has none either."""
    texts = ["a", "", "ü", ""]
    events = [event({"delta": {"content": text}, "finish_reason": None}) for text in texts]
    events[-1] = event({"delta": {"content": ""}, "finish_reason": "stop"})
    for usage, counts, times in ((4, [1, 1, 1, 1], [1, 2, 3, 4]), (2, [1, 1], [1, 3]), (5, [3, 2], [1, 3])):
        parts = [ROLE, *events, event(usage=USAGE | {"completion_tokens": usage}), DONE]
        answer = read(cut(*response(parts)))
        assert (list(answer.counts), list(answer.times)) == (counts, times)
        assert (answer.counting, answer.output_tokens) == ("text", usage)
    broken = read(cut(*response([ROLE, *events[:3]], "close")))
    assert (list(broken.counts), broken.error) == ([1, 1], "connection closed after 2 tokens")


def test_usage_on_the_last_choice_alone_is_no_running_one() -> None:
    events = [event({"text": "a"}), event({"text": "b"}), event({"text": "c", "finish_reason": "stop"}, usage=USAGE)]
    answer = read([response([*events, DONE])[0]])
    assert (list(answer.counts), answer.counting) == ([2, 2, 2], "text")


def test_tokens_that_have_no_text_at_all_came_with_the_end() -> None:
    events = [ROLE, event({"delta": {"content": ""}, "finish_reason": "length"}), event(usage=USAGE), DONE]
    answer = read([response(events)[0]])
    assert (list(answer.counts), len(answer.times), answer.error) == ([6], 1, None)


def test_how_tokens_were_counted_is_told_also_where_they_were_not() -> None:
    ended = [event({"text": "a"}), event({"text": "b", "finish_reason": "length"})]
    assert read([response([*ended, DONE])[0]]).counting == "events"
    assert read([response([*ended, event(usage=USAGE), DONE])[0]]).counting == "text"


def test_answers_that_broke_off_have_as_many_tokens_an_event_as_whole_ones() -> None:
    """As with speculative decoding: three tokens an event, here."""
    texts = [event({"text": "abc"}) for _ in range(4)]
    end = [event({"text": "", "finish_reason": "length"}), event(usage=USAGE | {"completion_tokens": 12}), DONE]
    whole, broken = read([response([*texts, *end])[0]]), read([response(texts[:3], "close")[0]])
    uncounted, plain = read([response([*texts, end[0], DONE])[0]]), read([response(texts[:1], "close")[0]])
    scale_unfinished([plain])
    assert list(plain.counts) == [1]  # nobody knows
    scale_unfinished([whole, broken, uncounted])
    assert [list(one.counts) for one in (whole, broken, uncounted)] == [[3] * 4, [3] * 3, [1] * 4]


NAMES = (
    "error", "message", "usage", "prompt_tokens", "completion_tokens", "choices", "delta", "finish_reason", "content",
    "text", "token_ids", "role",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)


@given(odd=JSON, name=st.sampled_from(NAMES), keep_text=st.booleans())
@settings(max_examples=500, deadline=None)
def test_whatever_json_an_event_is_it_costs_no_more_than_its_own_request(odd: Any, name: str, keep_text: bool) -> None:
    events = [{"choices": [{"delta": {name: odd}, name: odd}]}, {name: odd}, {"usage": {name: odd}}, odd]
    raw, _ = response([token("a", [1]), *(f"data: {json.dumps(one)}\n\n".encode() for one in events), DONE])
    answer = read([raw], keep_text=keep_text)
    said("chat", "assistant", "".join(answer.texts))
    f"{answer.error} {answer.finish_reason}".encode()
    for count in (answer.prompt_tokens, answer.output_tokens):
        assert count is None or (type(count) is int and count >= 0)


@pytest.mark.parametrize("count", [2.0, "5", -1, True, [], 2**40])
def test_a_usage_that_is_no_count_is_a_broken_event(count: object) -> None:
    usage = event(usage=USAGE | {"completion_tokens": count})
    answer = read([response([event({"text": "a", "finish_reason": "length"}), usage, DONE])[0]])
    assert (answer.error or "").startswith("broken event: ")
    assert list(answer.counts) == [1]


def test_an_event_may_have_several_lines_of_data() -> None:
    several = token("a", [1], "length").replace(b', "choices"', b',\ndata: "choices"')
    assert several.count(b"data:") == 2
    answer = read([response([several, b"data:\n\n", DONE])[0]])
    assert (list(answer.counts), answer.error) == ([1], None)


def test_a_piece_of_nothing_begins_no_response() -> None:
    """As TLS gives when it closes, or hands out a ticket."""
    assert read([b""]).error == "connection closed before the response"
    assert not fed([b""]).begun
    assert fed([b"", b"HTTP"]).begun


def test_a_byte_order_mark_may_come_first() -> None:
    events = [token("a", [1]), token("b", [2], "length"), DONE]
    raw, ends = response([b"\xef\xbb\xbf" + events[0], *events[1:]])
    answer = read(cut(raw, [ends[0] + 1, ends[1] + 1]))
    assert (list(answer.counts), list(answer.times), answer.error) == ([1, 1], [0.0, 1.0], None)


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "connection closed before the response"),
        (b"HTTP/1.1 200", "connection closed within the head"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "connection closed within the head"),
        (
            b'HTTP/1.1 400 Bad\r\ncontent-length: 42\r\n\r\n{"error": {"message": "too long\\nby far"}}',
            "http 400: too long",
        ),
        (b'HTTP/1.1 401 No\r\ncontent-length: 24\r\n\r\n{"error":"Unauthorized"}', "http 401: Unauthorized"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 9\r\n\r\nBang!\nand", "http 500: Bang!"),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 99\r\n\r\n<html>\n<h1>Bad", "http 502: <html>"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "http 204"),
        (b"SSH-2.0-x\r\n\r\n", "broken response: not HTTP: SSH-2.0-x"),
        (b"HTTP/1.1 abc\r\n\r\n", "broken response: not HTTP: HTTP/1.1 abc"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, "broken response: not HTTP"),
        (b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n", "broken response: not HTTP: HTTP/1.1 "),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 90000\r\n\r\n" + b"[" * 90_000, "http 500: [[["),
        (HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n", "broken response: content-length 999"),
        (HEAD + b"content-length: 3, 3\r\n\r\n", "broken response: content-length 3, 3"),
        (HEAD + b"transfer-encoding: gzip\r\n\r\n", "broken response: transfer-encoding gzip"),
        (HEAD + b"content-encoding: br\r\n\r\n", "broken response: content-encoding br"),
        (CHUNKED + b"zz\r\n", "broken response: chunk size 'zz'"),
        (CHUNKED + b"-1\r\n", "broken response: chunk size '-1'"),
        (CHUNKED + b"3\r\nabcd\r\n", "broken response: a chunk is longer than it says"),
        (CHUNKED + b"5;" + b"x" * 70_000, "broken response: a chunk's head does not end"),
        (JSON_HEAD % (b"application/json", 2) + b"{}", "broken response: application/json is no event stream"),
        (JSON_HEAD % (b"text/html", 6) + b"<html>", "broken response: text/html is no event stream"),
        (response([token("a", [1]), b"data: {broken\n\n", DONE])[0], "broken event: {broken"),
        (response([token("a", [1]), b"data: [1, 2]\n\n", DONE])[0], "broken event: [1, 2]"),
        (response([token("a", [1]), b'data: {"choices": 3}\n\n', DONE])[0], "broken event: "),
        (response([token("a", [1]), b"data: {} {}\n\n", DONE])[0], "broken event: {} {}"),
        (response([token("a", [1]), b'data: "\xff\n\n', DONE])[0], "broken event: "),
        (response([token("a", [1]), b"data: " + b"[" * 100_000 + b"\n\n", DONE])[0], "broken event: "),
        (response([token("a", [1]), b'data: {"choi'], "length")[0], 'broken event: {"choi'),
        (response([token("a", [1]), b'data: {"error": {"message": "EngineDead"}}\n\n', DONE])[0], "stream: EngineDead"),
        (
            response([token("a", [1]), b'data: {"object": "error", "message": "EngineDead", "code": 500}\n\n', DONE])[
                0
            ],
            "stream: EngineDead",
        ),
        (response([token("a", [1], "abort"), event(usage=USAGE), DONE])[0], "stream: finish_reason abort"),
        (response([token("a", [1], "error"), DONE])[0], "stream: finish_reason error"),
        (response([token("a", [1]), DONE])[0], "no finish_reason after 1 tokens"),
        (response([ROLE, event({"delta": {}, "finish_reason": "stop"}), DONE])[0], "no tokens"),
        (CHUNKED, "connection closed after 0 tokens"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(raw: bytes, error: str) -> None:
    found = read([raw] if raw else []).error
    assert found is not None
    assert found.startswith(error)
    assert "\n" not in found
    assert len(found) < 400
    assert error_kind(found)
    bytewise, size = Response(), 1 + len(raw) // 1000
    for at in range(0, len(raw), size):
        if bytewise.feed(raw[at : at + size]):
            break
    else:
        bytewise.closed()
    assert error_kind(parse(bytewise, [0.0] * len(bytewise.parts)).error or "") == error_kind(found)


def test_nothing_is_left_for_the_garbage_collector() -> None:
    """It is off while a load runs."""
    raw, _ = response(EVENTS)
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            read([raw])
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_error_kinds_are_told_apart_by_their_first_words() -> None:
    for one, other in itertools.permutations(ERROR_KINDS, 2):
        assert not one.startswith(other)


def test_long_parsing_lets_others_run() -> None:
    pauses: list[int] = []
    raw, _ = response([token("a", [1])] * 100 + [token("a", [1], "length"), DONE])
    assert sum(parse(fed([raw]), [1.0], lambda: pauses.append(1)).counts) == 101
    assert len(pauses) == 102 // PAUSE_EVERY


def test_a_request_says_everything_explicitly_and_hides_its_key_from_repr() -> None:
    target = Target("127.0.0.1", 8000, "m", "sk-secret")
    assert "secret" not in repr(target)
    body = completion_body("chat", target, "hi", 7, cache_salt="s", sampling={"top_p": 0.5})
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["max_tokens"], body["ignore_eos"], body["cache_salt"], body["top_p"]) == (7, True, "s", 0.5)
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} < set(body)
    head, _, data = Asking(target, "/v1/chat/completions").whole(json.dumps(body).encode()).partition(b"\r\n\r\n")
    assert json.loads(data) == body
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer sk-secret" in head
    assert b"Host: 127.0.0.1:8000\r\n" in head
    assert f"Content-Length: {len(data)}".encode() in head
    plain = completion_body("completions", target, "hi", 7, cache_salt=None, sampling={})
    assert plain["prompt"] == "hi"
    assert "cache_salt" not in plain


def test_a_strict_endpoint_is_asked_for_nothing_that_is_vllms_own_unless_the_workload_names_it() -> None:
    target = Target("h", 1, "m", strict=True)
    asked = asked_options(target, 7, cache_salt="s", sampling={"top_k": 5})
    assert set(asked) & VLLM_ALONE == {"top_k"}
    whole = asked_options(replace(target, strict=False), 7, cache_salt="s", sampling={"top_k": 5})
    assert {name: value for name, value in whole.items() if name in asked} == asked
    assert (asked["max_tokens"], asked["stream"], asked["stream_options"]) == (7, True, {"include_usage": True})


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (Target("api.example", 443, "m", tls=True, base="/openai"), "/openai/v1/completions", "api.example"),
        (Target("api.example", 80, "m"), "/v1/completions", "api.example"),
        (Target("api.example", 443, "m"), "/v1/completions", "api.example:443"),
        (Target("::1", 8000, "m"), "/v1/completions", "[::1]:8000"),
    ],
)
def test_a_request_names_its_host_and_its_path_under_the_base(target: Target, path: str, host: str) -> None:
    lines = Asking(target, "/v1/completions").whole(b"{}").decode().split("\r\n")
    assert lines[0] == f"POST {path} HTTP/1.1"
    assert f"Host: {host}" in lines


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_a_body_of_messages_encoded_once_is_what_json_would_make_of_it(texts: list[str]) -> None:
    options = asked_options(Target("h", 1, "m"), 7, cache_salt="s", sampling={})
    tail = json.dumps(options).encode()
    chat = json.loads(body_bytes("chat", [said("chat", "user", text) for text in texts], tail))
    assert chat == {"messages": [{"role": "user", "content": text} for text in texts], **options}
    plain = json.loads(body_bytes("completions", [said("completions", "user", text) for text in texts], tail))
    assert plain == {"prompt": " ".join(texts), **options}
