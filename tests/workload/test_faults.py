"""Every fault that a server can have, among good requests; and what keeps a request from being sent at all."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers.scripted_openai import FAULTS, WIRES
from tests.workload.conftest import Raw, Server, StartServer
from tests.workload.test_load import asked, errors, every, run
from tests.workload.test_wire import DONE, ROLE, error_kind, response, token
from varcas.records import Prompted
from varcas.workload.driver import Load
from varcas.workload.wire import Target

pytestmark = pytest.mark.timeout(60)

NUM_TOKENS = 6
KINDS = {
    "reset_before": "connection broke: Connection reset by peer",
    "close_before": "connection closed before the response",
    "close_in_head": "connection closed within the head",
    "reset_midway": "connection broke: Connection reset by peer",
    "close_midway": "connection closed after ",
    "garbage": "broken response: not HTTP: SSH-2.0-OpenSSH_9",
    "bad_chunk": "broken response: chunk size ",
    "truncated_json": "broken event: ",
    "stream_error": "stream: EngineDead",
    "odd_usage": "broken event: ",
    "odd_status": "broken response: not HTTP: ",
    "odd_length": "broken response: content-length 9999",
    "no_finish": "no finish_reason after 6 tokens",
    "stall": "unfinished",
    "hang": "unfinished",
    "http_400": "http 400: too much",
    "http_502": "http 502: <html>",
    "http_503": "http 503: ",
    "not_streamed": "broken response: application/json is no event stream",
}
STATUS = {"http_400": 400, "http_502": 502, "http_503": 503}
NO_HEAD = {"hang", "reset_before", "close_before", "close_in_head", "garbage", "odd_status"}
ALL_TOKENS = {"no_finish", "odd_usage", "truncated_json", "stream_error"}


def test_each_fault_has_its_error_and_touches_no_other_request(load: Load, start_server: StartServer) -> None:
    assert set(KINDS) == set(FAULTS)
    server = start_server("--faults", "--max-num-seqs", "512", "--itl-ms", "2")
    kinds = ["", *FAULTS, "", *WIRES] * 4
    requests = [
        asked(i, i * 0.008, 7, NUM_TOKENS, f"a fault:{kind}" if kind else "a b") for i, kind in enumerate(kinds)
    ]
    result = run(load, server.target, requests, max_drain_s=3.0)

    assert [record.index for record in result.records] == list(range(len(kinds)))
    for record, kind in zip(result.records, kinds, strict=True):
        if kind in FAULTS:
            assert record.error is not None
            assert record.error.startswith(KINDS[kind]), (kind, record.error)
            assert error_kind(record.error)
            assert "\n" not in record.error
            assert record.http_status == STATUS.get(kind, None if kind in NO_HEAD else 200)
            assert (
                len(record.token_counts) == NUM_TOKENS if kind in ALL_TOKENS else len(record.token_counts) < NUM_TOKENS
            )
        else:
            assert record.error is None, (kind, record.error)
            assert record.token_counts == (1,) * NUM_TOKENS, kind
            assert (record.output_tokens, record.prompt_tokens) == (NUM_TOKENS, 7)
            assert list(record.token_offsets_s) == sorted(record.token_offsets_s)
            assert record.finish_reason == "length"
        assert record.sent_s is not None
        assert record.end_s is not None
    due = collections.Counter(one.text for one in requests)
    times = prompts(server, due)  # each was sent once, and once only
    for prompt in due:
        if prompt.endswith("_before"):  # on a connection that was idle: sent again, once
            assert due[prompt] <= times[prompt] <= 2 * due[prompt]
        else:
            assert times[prompt] == due[prompt]
    assert result.kernel_stamped_frac == 1.0


def prompts(server: Server, due: collections.Counter[str]) -> collections.Counter[str]:
    """What the server was asked, once it has noticed that those who waited in vain are gone."""
    ends_s = time.monotonic() + 5
    while True:
        found = collections.Counter(" ".join(row["prompt"].split()[2:-3]) for row in server.stamps())
        if found >= due or time.monotonic() > ends_s:
            return found
        time.sleep(0.05)


def test_each_way_that_http_allows_is_read_alike_by_either_endpoint(load: Load, start_server: StartServer) -> None:
    server = start_server("--faults", "--itl-ms", "1")
    requests = [asked(i, i * 0.02, 2, NUM_TOKENS, f"a fault:{kind}") for i, kind in enumerate(sorted(WIRES))]
    result = run(load, server.target, requests, duration_s=0.3, endpoint="completions")
    assert errors(result) == {None}
    assert {record.token_counts for record in result.records} == {(1,) * NUM_TOKENS}


def test_a_name_that_does_not_resolve_is_a_row_each(load: Load) -> None:
    result = run(load, Target("no-such-host.invalid", 80, "m"), every(0.1, 3), max_drain_s=30.0)
    assert {error_kind(record.error or "") for record in result.records} == {"dns"}
    assert all(record.sent_s is None for record in result.records)


def test_a_request_larger_than_the_kernels_buffer_goes_out_whole(load: Load, start_server: StartServer) -> None:
    server = start_server("--max-model-len", "4000000")
    prompt = "word " * 1_500_000
    result = run(load, server.target, [asked(0, 0.0, 1_500_005, 4, prompt)], max_drain_s=30.0)
    record, *_ = result.records
    assert (record.error, record.prompt_tokens) == (None, 1_500_005)


def test_a_refusal_that_comes_before_the_request_was_read_ends_it(load: Load, raw: Raw) -> None:
    """A server that answers 413 and does not read on."""
    refusal = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno!"
    raw.scripts = [[refusal]]
    raw.max_read_bytes = 10_000
    result = run(load, raw.target, [asked(0, 0.0, 8, 4, "w" * 30_000_000), asked(1, 0.5, 8, 4)], max_drain_s=5.0)
    assert [record.error for record in result.records] == ["http 413: no!"] * 2


WHOLE, _ = response([ROLE, token("a", [1]), token("bc", [2, 3]), token("d", [4], "length"), DONE])


class Secure(Raw):
    """`Raw` over TLS."""

    def __init__(self, cert: Path, key: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(cert, key)
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        try:
            super().serve(self.context.wrap_socket(connection, server_side=True))
        except OSError:  # refused by the client
            return


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of its own for localhost, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*argv, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def secure(certificates: tuple[Path, Path]) -> Iterator[Secure]:
    server = Secure(*certificates)
    yield server
    server.socket.close()


def test_tls_is_read_alike_and_stamped_by_the_kernel_too(
    secure: Secure, certificates: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
    secure.scripts = [[WHOLE], [WHOLE[at : at + 50] for at in range(0, len(WHOLE), 50)]]
    target = Target("localhost", secure.target.port, "m", tls=True, base="/openai")
    with Load.start(tmp_path / "load.log", tmp_path / "load") as load:
        result = run(load, target, every(0.1, 5))
        assert errors(result) == {None}
        assert {record.token_counts for record in result.records} == {(1, 2, 1)}
        assert len(set(result.records[-1].token_offsets_s)) == 3
        assert result.kernel_stamped_frac == 1.0
        assert secure.heads[-1].startswith(b"POST /openai/v1/chat/completions HTTP/1.1\r\n")
        assert f"Host: localhost:{target.port}\r\n".encode() in secure.heads[-1]
        elsewhere = run(load, Target("127.0.0.1", target.port, "m", tls=True), every(0.1, 2), duration_s=0.3)
        for record in elsewhere.records:
            assert (record.error or "").startswith("tls: certificate verify failed: IP address mismatch")
            assert record.sent_s is None


class Closing(Secure):
    """Says goodbye in the segment that ends its answer, and waits for the client to close, as asyncio's TLS does."""

    def serve(self, connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.context.wrap_bio(incoming, outgoing, server_side=True)

        def heard(step: Callable[[], bytes | None]) -> bytes | None:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65536))

        with connection, contextlib.suppress(OSError):
            heard(tls.do_handshake)
            connection.sendall(outgoing.read())
            heard(lambda: tls.read(65536))
            self.num_requests += 1
            tls.write(WHOLE)
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
            connection.sendall(outgoing.read())
            while connection.recv(65536):
                pass


def test_a_connection_whose_tls_has_ended_is_not_used_again(
    certificates: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
    server = Closing(*certificates)
    target = Target("localhost", server.target.port, "m", tls=True)
    with server.socket, Load.start(tmp_path / "load.log", tmp_path / "load") as load:
        result = run(load, target, every(0.1, 5), max_drain_s=1.0)
    assert errors(result) == {None}
    assert server.num_requests == 5


class Distant(Secure):
    """A server to which a connection takes long, and which takes long to answer."""

    def serve(self, connection: socket.socket) -> None:
        time.sleep(0.2)
        super().serve(connection)

    def read(self, connection: socket.socket) -> bool:
        found = super().read(connection)
        time.sleep(0.6)
        return found


def test_requests_go_out_on_time_to_a_server_that_is_far_away(
    certificates: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each needs a connection of its own, and all of these are open before the window."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
    server = Distant(*certificates)
    server.scripts = [[WHOLE]]
    target = Target("localhost", server.target.port, "m", tls=True)
    with server.socket, Load.start(tmp_path / "load.log", tmp_path / "load") as load:
        for requests, duration_s in ((every(0.01, 48), 0.5), (users(300), 0.3)):
            result = run(load, target, requests, duration_s=duration_s)
            assert errors(result) == {None}
            assert len(result.records) == sum(one.request.after is None for one in requests)
            assert max((record.sent_s or 9.0) - record.scheduled_s for record in result.records) < 0.15


def users(num: int) -> Sequence[Prompted]:
    """Of a closed loop, who ask twice, the second time after the window."""
    first = [asked(i, 0.0, 8, 4) for i in range(num)]
    second = [dataclasses.replace(one.request, index=num + i, after=i, gap_s=9.0) for i, one in enumerate(first)]
    return [*first, *(Prompted(request, "again") for request in second)]


def test_a_certificate_that_nobody_vouches_for_is_refused(load: Load, secure: Secure) -> None:
    secure.scripts = [[WHOLE]]
    target = Target("localhost", secure.target.port, "m", tls=True)
    result = run(load, target, every(0.1, 3), duration_s=0.4)
    assert errors(result) == {"tls: certificate verify failed: self-signed certificate"}
    assert secure.num_requests == 0


def test_a_server_without_tls_is_told_from_one_with_a_bad_certificate(load: Load) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        threading.Thread(target=refuse_all, args=[plain], daemon=True).start()
        target = Target("localhost", plain.getsockname()[1], "m", tls=True)
        result = run(load, target, every(0.1, 2), duration_s=0.3)
    assert {error_kind(record.error or "") for record in result.records} == {"tls"}


def refuse_all(plain: socket.socket) -> None:
    """As uvicorn does with what is not HTTP."""
    while True:
        try:
            connection, _ = plain.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


def test_a_load_that_may_need_more_files_than_there_are_is_refused(tmp_path: Path) -> None:
    """In a process of its own, whose limit is low."""
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from pathlib import Path
from tests.workload.test_load import every, run
from varcas.errors import VarcasError
from varcas.workload.driver import Load
from varcas.workload.wire import Target
with Load.start(Path({str(tmp_path)!r}) / "log", Path({str(tmp_path)!r}) / "load") as load:
    for gap_s, num in ((0.0, 100), (0.1, 1000), (0.0, 1000)):
        try:
            requests, target = every(gap_s, num), Target("127.0.0.1", 9, "m")
            print(len(run(load, target, requests, duration_s=0.1, max_drain_s=0.1).records))
        except VarcasError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "100",
        "1000",
        "the load may need 1128 open files in one process, and 300 are allowed: raise the hard limit "
        "(`ulimit -Hn 1128` as root), or spread it over more load processes",
    ]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1000


def test_many_at_once_are_all_sent_and_all_answered(load: Load, start_server: StartServer) -> None:
    """More than there are users, connections or files in the beginning."""
    server = start_server("--max-num-seqs", "2000", "--ttft-ms", "500")
    requests: list[Prompted] = [asked(i, 0.0, 8, 2) for i in range(1100)]
    finished = threading.Event()
    result = run(load, server.target, requests, max_drain_s=20.0, cancelled=finished)
    assert errors(result) == {None}
    assert len(server.stamps(1100)) == 1100
