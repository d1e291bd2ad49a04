from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.workload.conftest import StartServer
from varcas.child import free_port
from varcas.errors import VarcasError
from varcas.experiment import Workload
from varcas.records import ScheduledRequest
from varcas.workload.prompts import Fitted, fit_prompts
from varcas.workload.schedule import schedule
from varcas.workload.wire import Endpoint, Target

TEMPLATE_TOKENS = 5


def asked(*lengths: int, output_tokens: int = 8) -> list[ScheduledRequest]:
    return [ScheduledRequest(i, 0.0, length, output_tokens, 1000 + i, i) for i, length in enumerate(lengths)]


class Awkward(ThreadingHTTPServer):
    """A tokenizer as real ones can be: long words split, some only at the start, some pairs merge."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_asked = 0
        self.plain = False
        self.words_split_from = 3
        self.template_tokens = 11
        self.system_tokens: int | None = 7
        self.max_model_len = 2048
        self.status = 200
        self.tokenize_status = 200
        self.has_usage = True
        self.generated: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def count(self, text: str) -> int:
        words = text.split()
        if self.plain:
            return len(words)
        long = sum(len(word) >= self.words_split_from for word in words)
        first = words[0][0] in "aeiou"
        merged = sum(a < "h" and b < "h" and a != b for a, b in itertools.pairwise(words))
        return len(words) + long + first - merged

    def count_chat(self, text: str, system: str | None = None) -> int:
        if system is None:
            return self.template_tokens + self.count(text)
        assert self.system_tokens is not None
        return self.template_tokens + self.system_tokens + self.count(system) + self.count(text)

    def count_body(self, body: dict[str, Any]) -> int:
        if "prompt" in body:
            return self.count(body["prompt"]) + bool(body.get("add_special_tokens", True))
        *system, user = (message["content"] for message in body["messages"])
        return self.count_chat(user, *system)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment
    server: Awkward

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.num_asked += 1
        status = server.status
        if len(body.get("messages", [])) > 1 and server.system_tokens is None:
            self.send(400, {"error": "System role not supported"})
        elif self.path == "/tokenize":
            status = server.tokenize_status if status == 200 else status
            count = server.count_body(body)
            answer = {"count": count, "max_model_len": server.max_model_len, "tokens": list(range(count))}
            self.send(status, answer if status == 200 else {"error": "no such thing"})
        else:
            assert body["max_tokens"] == 1
            with server.lock:
                server.generated.append(body)
            usage = {"usage": {"prompt_tokens": server.count_body(body)}} if server.has_usage else {}
            self.send(status, {"choices": [], **usage} if status == 200 else {"error": "no such thing"})

    def send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def awkward() -> Iterator[Awkward]:
    with Awkward() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def target_of(server: Awkward) -> Target:
    return Target("127.0.0.1", server.server_address[1], "m", None)


def fit(server: Awkward, requests: Sequence[ScheduledRequest], endpoint: Endpoint = "chat", **more: Any) -> Fitted:
    return fit_prompts(target_of(server), requests, endpoint=endpoint, **{"cache_dir": None, **more})


def test_prompts_are_exact_whatever_the_tokenizer_does_to_running_text(awkward: Awkward) -> None:
    fitted = fit(awkward, asked(*range(12, 500, 7)))
    assert [awkward.count_chat(one.text) for one in fitted] == list(range(12, 500, 7))
    assert [one.request.prompt_tokens for one in fitted] == list(range(12, 500, 7))


def test_a_prompt_shorter_than_the_template_becomes_the_shortest_there_is(awkward: Awkward) -> None:
    requests = [*asked(4, 11, 12), replace(asked(4)[0], output_tokens=2044)]
    fitted = fit(awkward, requests)
    assert [one.request.prompt_tokens for one in fitted] == [12, 12, 12, 12]
    assert [awkward.count_chat(one.text) for one in fitted] == [12, 12, 12, 12]
    assert fitted[3].request.output_tokens == 2048 - 12


def test_a_tokenizer_without_one_token_words_is_a_clear_error(awkward: Awkward) -> None:
    awkward.words_split_from = 0
    awkward.template_tokens = -300
    with pytest.raises(VarcasError, match="one token each"):
        fit(awkward, asked(20))


def test_a_request_that_the_server_cannot_hold_is_refused_with_the_fix(awkward: Awkward) -> None:
    with pytest.raises(VarcasError, match=r"2041 \+ 8 tokens, the server takes 2048: lower `workload.max_tokens`"):
        fit(awkward, asked(2041))


def test_a_server_that_fails_to_count_is_quoted(awkward: Awkward) -> None:
    awkward.status = 500
    with pytest.raises(VarcasError, match=r"/tokenize answered 500: .*no such thing"):
        fit(awkward, asked(20))


def test_a_server_that_is_not_there_is_an_error_in_words() -> None:
    with pytest.raises(VarcasError, match="/tokenize failed: ConnectionRefusedError"):
        fit_prompts(Target("127.0.0.1", free_port(), "m"), asked(20), endpoint="chat", cache_dir=None)


def test_the_cache_gives_what_fitting_gave_for_one_request(awkward: Awkward, tmp_path: Path) -> None:
    requests = asked(*range(20, 60))
    fresh = fit(awkward, requests)
    first = fit(awkward, requests, cache_dir=tmp_path / "new" / "cache")
    awkward.num_asked = 0
    again = fit(awkward, requests, cache_dir=tmp_path / "new" / "cache")
    assert fresh == first == again
    assert awkward.num_asked == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_template_or_schedule_is_fitted_anew(awkward: Awkward, tmp_path: Path) -> None:
    fit(awkward, asked(30), cache_dir=tmp_path)
    awkward.template_tokens += 1
    for requests in (asked(30), asked(31), [replace(asked(30)[0], seed=5)]):
        (one,) = fit(awkward, requests, cache_dir=tmp_path)
        assert awkward.count_chat(one.text) == requests[0].prompt_tokens


def test_a_broken_cache_file_is_made_anew(awkward: Awkward, tmp_path: Path) -> None:
    first = fit(awkward, asked(30), cache_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:20])
    assert fit(awkward, asked(30), cache_dir=tmp_path) == first


def test_two_at_once_share_a_cache(awkward: Awkward, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fit(awkward, asked(*range(20, 40)), cache_dir=tmp_path), range(4)))
    assert found.count(found[0]) == 4


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_no_two_prompts_begin_alike(start_server: StartServer, endpoint: Endpoint) -> None:
    server = start_server("--max-model-len", "2048")
    workload = Workload(rate_rps=20, duration_s=60)
    requests = schedule(workload, start_s=0, duration_s=60, max_len=2048, stream="measure")
    fitted = fit_prompts(server.target, requests, endpoint=endpoint, cache_dir=None)
    template_tokens = TEMPLATE_TOKENS if endpoint == "chat" else 0
    for one in fitted:
        assert one.request.prompt_tokens == template_tokens + len(one.text.split())
    heads = [tuple(one.text.split()[:2]) for one in fitted if len(one.text.split()) >= 2]
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_shared_system_prompts_are_one_text_and_counted_into_the_whole(awkward: Awkward, endpoint: Endpoint) -> None:
    requests = [
        replace(request, prefix_seed=100 + request.index % 3, prefix_tokens=40) for request in asked(*range(80, 140))
    ]
    requests += [replace(requests[0], index=60, prefix_tokens=50)]
    fitted = fit(awkward, requests, endpoint)
    systems = [one.system for one in fitted]
    assert [systems[n] == systems[n % 3] for n in range(60)] == [True] * 60
    assert len(set(systems)) == 4
    for one in fitted:
        assert one.system is not None
        assert awkward.count(one.system) == one.request.prefix_tokens
        whole = awkward.count(f"{one.system} {one.text}") + 1
        assert one.request.prompt_tokens == (awkward.count_chat(one.text, one.system) if endpoint == "chat" else whole)


def test_a_template_without_a_system_message_is_refused_with_the_fix(awkward: Awkward) -> None:
    awkward.system_tokens = None
    with pytest.raises(VarcasError, match=r"System role not supported.*`endpoint: completions`"):
        fit(awkward, [replace(asked(80)[0], prefix_seed=1, prefix_tokens=40)])


def test_a_later_turn_is_exact_in_its_own_tokens(awkward: Awkward) -> None:
    first, second = asked(40, 9)
    shared = {"prefix_seed": 3, "prefix_tokens": 15}
    fitted = fit(
        awkward, [replace(first, **shared), replace(second, **shared, conversation=0, turn=1, after=0, gap_s=2.0)]
    )
    assert awkward.count_chat(fitted[0].text, fitted[0].system) == 40
    assert fitted[1].system is None  # it stands in the history
    assert awkward.count(fitted[1].text) == fitted[1].request.prompt_tokens == 9
    assert (fitted[1].request.after, fitted[1].request.gap_s) == (0, 2.0)


def test_blocks_make_prompts_begin_alike_as_far_as_their_ids_agree(awkward: Awkward) -> None:
    lengths = [1300, 1400, 1700, 600, 1300]
    blocks = [(5, 6, 7), (5, 8, 9), (5, 6, 10, 11), (12, 13), (5, 6, 7)]
    requests = [replace(r, blocks=ids) for r, ids in zip(asked(*lengths), blocks, strict=True)]
    fitted = fit(awkward, requests)
    assert [awkward.count_chat(one.text) for one in fitted] == lengths
    words = [one.text.split() for one in fitted]
    shared = {
        (a, b): next(n for n, pair in enumerate(zip(words[a], words[b], strict=False)) if pair[0] != pair[1])
        for a, b in ((0, 1), (0, 2), (0, 3), (1, 2))
    }
    assert {pair: num // 512 for pair, num in shared.items()} == {(0, 1): 1, (0, 2): 2, (0, 3): 0, (1, 2): 1}
    assert fitted[0].text == fitted[4].text
    assert all(one.request.blocks == () for one in fitted)


def own(
    prompt: str, answer: str | None = None, output_tokens: int = 0, index: int = 0, **more: Any
) -> ScheduledRequest:
    request = ScheduledRequest(index, 0.0, 0, output_tokens, index, index)
    return replace(request, prompt=prompt, answer=answer, **more)


def test_own_texts_are_sent_as_they_are_and_counted(awkward: Awkward) -> None:
    requests = [
        own("a bb ccc", "d eeee f", system="x yy", conversation=0),
        own("zz z", output_tokens=9, index=1, conversation=0, turn=1, after=0),
        own("one two", "three", index=2),
    ]
    first, second, third = fit(awkward, requests)
    assert (first.text, first.system, second.text, third.system) == ("a bb ccc", "x yy", "zz z", None)
    assert first.request.prompt_tokens == awkward.count_chat("a bb ccc", "x yy")
    assert first.request.output_tokens == awkward.count("d eeee f")
    assert (second.request.prompt_tokens, second.request.output_tokens) == (awkward.count("zz z"), 9)
    assert third.request.output_tokens == awkward.count("three")
    assert (first.request.prompt, first.request.answer, first.request.system) == (None, None, None)


def test_own_texts_that_do_not_fit_are_left_out_with_what_follows_them(awkward: Awkward) -> None:
    awkward.max_model_len = 60
    long = " ".join(["x"] * 70)
    requests = [
        own(long, output_tokens=5),  # too long: with its second turn
        own("x", output_tokens=5, index=1, conversation=0, turn=1, after=0),
        own("x", output_tokens=5, index=2, conversation=1, after=1, gap_s=1.0),  # a closed loop's next
        own("x x", output_tokens=500, index=3, conversation=2, after=2),  # its output is cut
        own("x", output_tokens=5, index=4, conversation=2, turn=1, after=3),  # and leaves no room for this
        own("x", output_tokens=5, index=5, conversation=3, after=4),
    ]
    fitted = fit(awkward, requests)
    assert [(one.text, one.request.index, one.request.conversation, one.request.after) for one in fitted] == [
        ("x", 0, 1, None),
        ("x x", 1, 2, 0),
        ("x", 2, 3, 1),
    ]
    assert fitted[1].request.output_tokens == 60 - awkward.count_chat("x x")
    with pytest.raises(VarcasError, match="none of the 1 requests fits the 60 tokens"):
        fit(awkward, requests[:1])


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("status", [404, 422])
def test_without_tokenize_prompts_are_made_through_usage(awkward: Awkward, endpoint: Endpoint, status: int) -> None:
    awkward.tokenize_status = status
    awkward.words_split_from = 7  # of the common words most are one token each
    fitted = fit(awkward, asked(*range(30, 330)), endpoint)
    sent = [awkward.count_chat(one.text) if endpoint == "chat" else awkward.count(one.text) + 1 for one in fitted]
    assert [one.request.prompt_tokens for one in fitted] == list(range(30, 330))
    assert sent == list(range(30, 330))  # pairs merge here: the sample shows it, and all are counted
    assert {body["max_tokens"] for body in awkward.generated} == {1}


def test_without_tokenize_a_plain_tokenizer_costs_few_requests(awkward: Awkward) -> None:
    awkward.tokenize_status, awkward.plain = 404, True
    requests = schedule(Workload(rate_rps=50), start_s=0, duration_s=60, max_len=2048, stream="measure")
    fitted = fit(awkward, requests)
    assert len(fitted) == len(requests) > 2000
    least = awkward.template_tokens + 1
    assert [awkward.count_chat(one.text) for one in fitted] == [max(r.prompt_tokens, least) for r in requests]
    assert len(awkward.generated) < 30


def test_without_tokenize_counts_are_capped(awkward: Awkward) -> None:
    awkward.tokenize_status = 404
    awkward.words_split_from = 7
    fitted = fit(awkward, asked(*[40 + n % 200 for n in range(1500)]))
    assert len(awkward.generated) < 2500
    off = [awkward.count_chat(one.text) - one.request.prompt_tokens for one in fitted]
    assert sum(error == 0 for error in off) >= 512


def test_without_tokenize_own_texts_are_counted_or_estimated(awkward: Awkward) -> None:
    awkward.tokenize_status = 404
    awkward.max_model_len = 10
    texts = [" ".join(["wordy", "a", "b"] * (1 + n % 7)) for n in range(900)]
    fitted = fit(awkward, [own(text, "one two three", index=n) for n, text in enumerate(texts)])
    assert [one.text for one in fitted] == texts
    counted = [one.request.prompt_tokens == awkward.count_chat(one.text) for one in fitted]
    assert sum(counted) >= 256
    assert len(awkward.generated) < 600
    for one in fitted:
        assert one.request.prompt_tokens == pytest.approx(awkward.count_chat(one.text), rel=0.1)


def test_a_server_that_counts_in_no_way_is_refused_with_the_fix(awkward: Awkward) -> None:
    awkward.tokenize_status = 404
    awkward.has_usage = False
    with pytest.raises(VarcasError, match=r"/tokenize answered 404.*gave no `usage`.*Have it"):
        fit(awkward, asked(20))
    awkward.status = 404
    with pytest.raises(VarcasError, match=r"/tokenize answered 404.*/v1/chat/completions answered 404: .*no such"):
        fit(awkward, asked(20))
