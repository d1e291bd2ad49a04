"""The stand-in is what tests of the load and of trials rest on: its wire, its clock and its failures are checked."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from varcas.child import Child, free_port, listener_is_ours

SCRIPT = Path(__file__).with_name("scripted_openai.py")
MESSAGES = {"messages": [{"role": "user", "content": "one two three"}]}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="children need Linux"),
    pytest.mark.timeout(30),
]
Serve = Callable[..., contextlib.AbstractContextManager[tuple[Child, int]]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    @contextlib.contextmanager
    def start(*options: str, **env: str) -> Iterator[tuple[Child, int]]:
        port = free_port()
        vllm_argv = ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching", "--dtype", "half"]
        argv = [sys.executable, str(SCRIPT), *vllm_argv, *options]
        with Child.start(argv, env=os.environ | env, log=tmp_path / "log") as child:
            while child.poll() is None and not listener_is_ours(port, child.descendants()):
                time.sleep(0.02)
            yield child, port

    return start


def ask(port: int, path: str, body: Any = None, key: str = "") -> tuple[int, bytes]:
    """Makes one request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        method = "GET" if body is None else "POST"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def http_chunks(port: int, path: str, body: dict[str, Any]) -> list[bytes]:
    """Returns the HTTP chunks of a streamed answer, as they are on the wire."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        wire.sendall(b"POST %s HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data))
        file = wire.makefile("rb")
        assert file.readline() == b"HTTP/1.1 200 OK\r\n"
        headers = list(iter(file.readline, b"\r\n"))
        assert b"transfer-encoding: chunked\r\n" in headers
        chunks = []
        while size := int(file.readline(), 16):
            chunks.append(file.read(size))
            assert file.readline() == b"\r\n"
        assert file.readline() == b"\r\n"
        return chunks


def events(chunks: list[bytes]) -> list[Any]:
    """Returns the events, one a chunk, without the closing `[DONE]`."""
    assert chunks[-1] == b"data: [DONE]\n\n"
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)
    return [json.loads(chunk[6:]) for chunk in chunks[:-1]]


def test_a_streamed_chat_is_vllms_on_the_wire(serve: Serve) -> None:
    body = MESSAGES | {"stream": True, "max_tokens": 3, "stream_options": {"include_usage": True}}
    with serve() as (_, port):
        role, *tokens, usage = events(http_chunks(port, "/v1/chat/completions", body))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [token["choices"][0]["delta"]["content"] for token in tokens] == ["w0", " w1", " w2"]
    assert [token["choices"][0]["finish_reason"] for token in tokens] == [None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11}


def test_a_streamed_completion_has_no_role_and_counts_each_token_if_asked(serve: Serve) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with serve() as (_, port):
        body = {"prompt": "a b", "stream": True, "max_tokens": 2, "stream_options": options}
        *tokens, _usage = events(http_chunks(port, "/v1/completions", body))
        assert len(events(http_chunks(port, "/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 2}))) == 2
    assert [token["choices"][0]["text"] for token in tokens] == ["w0", " w1"]
    assert [token["usage"]["completion_tokens"] for token in tokens] == [1, 2]


@pytest.mark.parametrize(
    ("limits", "tokens", "reason"),
    [
        ({"max_tokens": 50}, 4, "stop"),
        ({"max_tokens": 3}, 3, "length"),
        ({"max_tokens": 50, "min_tokens": 9}, 9, "stop"),
        ({"max_tokens": 50, "ignore_eos": True}, 50, "length"),
    ],
)
def test_the_limits_are_honoured(serve: Serve, limits: dict[str, Any], tokens: int, reason: str) -> None:
    with serve("--eos-after", "4", "--ttft-ms", "0", "--itl-ms", "0") as (_, port):
        status, data = ask(port, "/v1/chat/completions", MESSAGES | limits)
    answer = json.loads(data)
    assert status == 200
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (tokens, reason)


def test_tokens_come_when_the_script_says(serve: Serve, tmp_path: Path) -> None:
    stamps = tmp_path / "stamps"
    with serve("--ttft-ms", "100", "--itl-ms", "20", "--stamps", str(stamps)) as (_, port):
        ask(port, "/v1/completions", {"prompt": "a b", "max_tokens": 6, "stream": True, "cache_salt": "salt"})
    row = json.loads(stamps.read_text())
    sent_s = [at for kind, at in row["sends"] if kind == "token"]
    assert (row["cache_salt"], row["prompt_tokens"], len(sent_s)) == ("salt", 2, 6)
    assert sent_s[0] - row["received_s"] == pytest.approx(0.1, abs=0.05)
    assert sent_s[-1] - sent_s[0] == pytest.approx(0.1, abs=0.05)


def test_only_so_many_decode_at_once(serve: Serve) -> None:
    with serve("--max-num-seqs", "2", "--ttft-ms", "300") as (_, port):
        body = {"prompt": "a", "max_tokens": 1}
        began_s = time.monotonic()
        threads = [Thread(target=ask, args=(port, "/v1/completions", body)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        metrics = ask(port, "/metrics")[1].decode()
        for thread in threads:
            thread.join()
        took_s = time.monotonic() - began_s
    assert 'vllm:num_requests_running{engine="0",model_name="scripted"} 2.0' in metrics
    assert 'vllm:num_requests_waiting{engine="0",model_name="scripted"} 2.0' in metrics
    assert took_s == pytest.approx(0.6, abs=0.25)


def test_a_client_that_leaves_frees_its_slot(serve: Serve) -> None:
    with serve("--max-num-seqs", "1", "--itl-ms", "20") as (_, port):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body))
            assert connection.getresponse().readline()
        began_s = time.monotonic()
        assert ask(port, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
        assert time.monotonic() - began_s < 2


def test_the_cache_is_hit_by_the_same_prefix_and_salt_alone(serve: Serve) -> None:
    prompt = " ".join(map(str, range(40)))
    hits = []
    with serve("--ttft-ms", "0") as (_, port):
        for salt in ("a", "a", "b"):
            ask(port, "/v1/completions", {"prompt": prompt, "max_tokens": 1, "cache_salt": salt})
            metrics = ask(port, "/metrics")[1].decode().splitlines()
            hits += [float(line.split()[1]) for line in metrics if line.startswith("vllm:prefix_cache_hits_total")]
    assert hits == [0, 32, 32]


def test_the_key_guards_v1_alone(serve: Serve) -> None:
    with serve(VLLM_API_KEY="key") as (_, port):
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/v1/models", key="wrong")[0] == 401
        assert json.loads(ask(port, "/v1/models", key="key")[1])["data"][0]["id"] == "scripted"
        assert [ask(port, path)[0] for path in ("/health", "/version", "/metrics", "/nowhere")] == [200, 200, 200, 404]


def test_tokenize_counts_words_and_the_template(serve: Serve) -> None:
    with serve("--max-model-len", "77") as (_, port):
        prompt = json.loads(ask(port, "/tokenize", {"prompt": "one two three"})[1])
        chat = json.loads(ask(port, "/tokenize", MESSAGES | {"add_generation_prompt": True})[1])
    assert prompt == {"count": 3, "max_model_len": 77, "tokens": [0, 1, 2]}
    assert chat["count"] == 8


def test_what_vllm_refuses_is_refused(serve: Serve) -> None:
    with serve("--refuse-chat", "--max-model-len", "10") as (_, port):
        status, data = ask(port, "/v1/chat/completions", MESSAGES)
        assert (status, "chat template" in json.loads(data)["error"]["message"]) == (400, True)
        assert ask(port, "/v1/completions", {"prompt": "a " * 11})[0] == 400
        assert ask(port, "/v1/completions", {"prompt": "a", "model": "other"})[0] == 404
        assert ask(port, "/v1/completions", {"max_tokens": 1})[0] == 400


def test_failures_come_on_cue(serve: Serve) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    with serve("--fail-requests-frac", "0.5", "--die-after-requests", "4") as (child, port):
        assert [ask(port, "/v1/completions", body)[0] for _ in range(4)] == [200, 500, 200, 500]
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            ask(port, "/v1/completions", body)
        assert child.wait(5) == -signal.SIGKILL


def test_a_hang_accepts_and_never_answers(serve: Serve) -> None:
    with serve("--hang-after-requests", "0") as (_, port):
        assert ask(port, "/health")[0] == 200
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as wire:
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 14\r\n\r\n" + b'{"prompt":"a"}')
            with pytest.raises(TimeoutError):
                wire.recv(1)


def test_it_prints_and_exits_as_told(serve: Serve) -> None:
    with serve("--print", "CUDA out of memory", "--exit", "7") as (child, _):
        assert child.wait(10) == 7
        assert child.log.read_text().splitlines()[-1] == "CUDA out of memory"


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--ignore-sigterm",), -signal.SIGKILL)])
def test_nothing_of_the_engine_core_is_left(serve: Serve, options: tuple[str, ...], status: int) -> None:
    with serve("--grandchild", *options) as (child, _):
        assert len(child.descendants()) >= 2
        segment = next(line for line in child.log.read_text().splitlines() if "holds" in line).split()[-1]
        assert (Path("/dev/shm") / segment).exists()
        assert child.stop(grace_s=3 if not options else 0.3) == status
        assert not (Path("/dev/shm") / segment).exists()
