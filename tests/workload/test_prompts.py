from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
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
from varcas.workload.chat import schedule
from varcas.workload.prompts import fit_prompts
from varcas.workload.wire import Endpoint, Target

TEMPLATE_TOKENS = 5


def asked(*lengths: int, output_tokens: int = 8) -> list[ScheduledRequest]:
    return [ScheduledRequest(i, 0.0, length, output_tokens, 1000 + i, i) for i, length in enumerate(lengths)]


class Awkward(ThreadingHTTPServer):
    """A tokenizer as real ones can be: long words split, some only at the start, some pairs merge."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_asked = 0
        self.words_split_from = 3
        self.template_tokens = 11
        self.status = 200
        self.lock = threading.Lock()

    def count(self, text: str) -> int:
        words = text.split()
        long = sum(len(word) >= self.words_split_from for word in words)
        first = words[0][0] in "aeiou"
        merged = sum(a < "h" and b < "h" and a != b for a, b in itertools.pairwise(words))
        return self.template_tokens + len(words) + long + first - merged


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment
    server: Awkward

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.num_asked += 1
        count = self.server.count(body["messages"][0]["content"])
        answer: dict[str, Any] = {"count": count, "max_model_len": 2048, "tokens": list(range(count))}
        data = json.dumps(answer if self.server.status == 200 else {"error": "no such thing"}).encode()
        self.send_response(self.server.status)
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


def test_prompts_are_exact_whatever_the_tokenizer_does_to_running_text(awkward: Awkward) -> None:
    fitted = fit_prompts(target_of(awkward), asked(*range(12, 500, 7)), endpoint="chat", cache_dir=None)
    assert [awkward.count(prompt) for _, prompt in fitted] == list(range(12, 500, 7))
    assert [request.prompt_tokens for request, _ in fitted] == list(range(12, 500, 7))


def test_a_prompt_shorter_than_the_template_becomes_the_shortest_there_is(awkward: Awkward) -> None:
    requests = [*asked(4, 11, 12), replace(asked(4)[0], output_tokens=2044)]
    fitted = fit_prompts(target_of(awkward), requests, endpoint="chat", cache_dir=None)
    assert [request.prompt_tokens for request, _ in fitted] == [12, 12, 12, 12]
    assert [awkward.count(prompt) for _, prompt in fitted] == [12, 12, 12, 12]
    assert fitted[3][0].output_tokens == 2048 - 12


def test_a_tokenizer_without_one_token_words_is_a_clear_error(awkward: Awkward) -> None:
    awkward.words_split_from = 0
    awkward.template_tokens = -300
    with pytest.raises(VarcasError, match="one token each"):
        fit_prompts(target_of(awkward), asked(20), endpoint="chat", cache_dir=None)


def test_a_request_that_the_server_cannot_hold_is_refused_with_the_fix(awkward: Awkward) -> None:
    with pytest.raises(VarcasError, match=r"2041 \+ 8 tokens, the server takes 2048: lower `workload.max_tokens`"):
        fit_prompts(target_of(awkward), asked(2041), endpoint="chat", cache_dir=None)


def test_a_server_that_does_not_count_is_quoted(awkward: Awkward) -> None:
    awkward.status = 404
    with pytest.raises(VarcasError, match=r"/tokenize answered 404: .*no such thing"):
        fit_prompts(target_of(awkward), asked(20), endpoint="chat", cache_dir=None)


def test_a_server_that_is_not_there_is_an_error_in_words() -> None:
    with pytest.raises(VarcasError, match="/tokenize failed: ConnectionRefusedError"):
        fit_prompts(Target("127.0.0.1", free_port(), "m"), asked(20), endpoint="chat", cache_dir=None)


def test_the_cache_gives_what_fitting_gave_for_one_request(awkward: Awkward, tmp_path: Path) -> None:
    requests = asked(*range(20, 60))
    fresh = fit_prompts(target_of(awkward), requests, endpoint="chat", cache_dir=None)
    first = fit_prompts(target_of(awkward), requests, endpoint="chat", cache_dir=tmp_path / "new" / "cache")
    awkward.num_asked = 0
    again = fit_prompts(target_of(awkward), requests, endpoint="chat", cache_dir=tmp_path / "new" / "cache")
    assert fresh == first == again
    assert awkward.num_asked == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_template_or_schedule_is_fitted_anew(awkward: Awkward, tmp_path: Path) -> None:
    fit_prompts(target_of(awkward), asked(30), endpoint="chat", cache_dir=tmp_path)
    awkward.template_tokens += 1
    for requests in (asked(30), asked(31), [replace(asked(30)[0], seed=5)]):
        ((_, prompt),) = fit_prompts(target_of(awkward), requests, endpoint="chat", cache_dir=tmp_path)
        assert awkward.count(prompt) == requests[0].prompt_tokens


def test_a_broken_cache_file_is_made_anew(awkward: Awkward, tmp_path: Path) -> None:
    first = fit_prompts(target_of(awkward), asked(30), endpoint="chat", cache_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:20])
    assert fit_prompts(target_of(awkward), asked(30), endpoint="chat", cache_dir=tmp_path) == first


def test_two_at_once_share_a_cache(awkward: Awkward, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda _: fit_prompts(target_of(awkward), asked(*range(20, 40)), endpoint="chat", cache_dir=tmp_path),
                range(4),
            )
        )
    assert found.count(found[0]) == 4


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_no_two_prompts_begin_alike(start_server: StartServer, endpoint: Endpoint) -> None:
    server = start_server("--max-model-len", "2048")
    workload = Workload(rate_rps=20, duration_s=60)
    requests = schedule(workload, start_s=0, duration_s=60, max_len=2048, stream="measure")
    fitted = fit_prompts(server.target, requests, endpoint=endpoint, cache_dir=None)
    template_tokens = TEMPLATE_TOKENS if endpoint == "chat" else 0
    for request, prompt in fitted:
        assert request.prompt_tokens == template_tokens + len(prompt.split())
    heads = [tuple(prompt.split()[:2]) for _, prompt in fitted if len(prompt.split()) >= 2]
    assert len(set(heads)) == len(heads)
