"""The server's `/metrics` and the GPU's state, once a second, and what they say before a start.

vLLM's names are those of its V1 engine (0.24 and 0.32, `vllm/v1/metrics/loggers.py`); a counter ends in `_total`, a
histogram has `_sum` and `_count`.
"""

from __future__ import annotations

import contextlib
import http.client
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from varcas import hardware
from varcas.errors import TrialError
from varcas.hardware import Gpu, GpuState
from varcas.records import HostFacts, Sample

PERIOD_S = 1.0
SCRAPE_TIMEOUT_S = 2.0
FOREIGN_BYTES = 2**30
"""Memory in use before a start above which somebody else holds the GPU: an idle one shows under 0.7 GiB."""
GAUGES: Mapping[str, str] = {
    "vllm:num_requests_running": "num_requests_running",
    "vllm:num_requests_waiting": "num_requests_waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage_frac",  # 1 means full, in spite of its name
}
COUNTERS: Mapping[str, str] = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "output_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
}
HISTOGRAMS: Mapping[str, str] = {
    "vllm:time_to_first_token_seconds": "server_ttft",
    "vllm:inter_token_latency_seconds": "server_itl",
    "vllm:e2e_request_latency_seconds": "server_e2e",
}
FIELDS = {
    **GAUGES,
    **COUNTERS,
    **{f"{name}_sum": f"{field}_sum_s" for name, field in HISTOGRAMS.items()},
    **{f"{name}_count": f"{field}_count" for name, field in HISTOGRAMS.items()},
}
COOL_C = 70.0
"""A GPU below this has its full clocks; T4 and H100 begin to slow down at 80 to 90 °C."""
COOL_DOWN_LIMIT_S = 60.0
_LINE = re.compile(r"^(vllm:\w+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


def scrape(url: str, timeout_s: float = SCRAPE_TIMEOUT_S) -> dict[str, float]:
    """Reads a server's `/metrics`.

    Args:
        url: of the server, say `http://127.0.0.1:8000`.
        timeout_s: for the answer.

    Returns:
        Fields of `Sample` to their values: sums over the server's engines, of the cache's use the largest.

    Raises:
        OSError: no answer, one that is not 200, or no text of Prometheus.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise OSError(f"{url}/metrics: status {response.status}")
        return parse_metrics(response.read().decode())
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url}/metrics: {error!r}") from error
    finally:
        connection.close()


def parse_metrics(text: str) -> dict[str, float]:
    """Reads the Prometheus text of `/metrics`; returns as `scrape`."""
    found: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        if field := FIELDS.get(name):
            merged = max if field == "kv_cache_usage_frac" else float.__add__
            found[field] = merged(found[field], float(value)) if field in found else float(value)
    return found


class Sampler:
    """Takes samples in a thread of its own until it is stopped.

    Args:
        url: of the server; None samples the GPU alone.
        gpus: to look at; by default those that are visible here.
        period_s: between two samples, on an absolute schedule.
    """

    def __init__(self, url: str | None, gpus: Sequence[Gpu] | None = None, period_s: float = PERIOD_S) -> None:
        self._url = url
        self._gpus = hardware.gpus() if gpus is None else tuple(gpus)
        self._period_s = period_s
        self._taken: list[tuple[float, dict[str, Any]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def samples(self, t0_monotonic_s: float) -> tuple[Sample, ...]:
        """Returns what was taken so far, its times counted from a moment of CLOCK_MONOTONIC."""
        return tuple(Sample(t_s=at_s - t0_monotonic_s, **values) for at_s, values in list(self._taken))

    def stop(self) -> None:
        """Ends the thread; it takes one last sample first."""
        self._stopped.set()
        self._thread.join(SCRAPE_TIMEOUT_S + 1)

    def __enter__(self) -> Sampler:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops."""
        self.stop()

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            seen = self._look()
            self._taken.append((time.monotonic(), seen))  # stamped after: a scrape may take `SCRAPE_TIMEOUT_S`
            if self._stopped.is_set():
                return
            due_s = max(due_s + self._period_s, time.monotonic())
            self._stopped.wait(due_s - time.monotonic())

    def _look(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self._url is not None:
            with contextlib.suppress(OSError):  # it died, or is too busy: the sample has no fields of the server
                values |= scrape(self._url)
        return values | _of_gpus([hardware.state_of(gpu) for gpu in self._gpus])


def _of_gpus(states: Sequence[GpuState]) -> dict[str, Any]:
    """Several GPUs as one: sums of power and memory, of the rest the worst."""

    def merged(merge: Callable[[Iterable[Any]], Any], values: Iterable[Any]) -> Any:
        known = [value for value in values if value is not None]
        return merge(known) if known else None

    return {
        "gpu_power_w": merged(sum, (state.power_w for state in states)),
        "gpu_memory_used_bytes": merged(sum, (state.memory_used_bytes for state in states)),
        "gpu_sm_clock_mhz": merged(min, (state.sm_clock_mhz for state in states)),
        "gpu_temperature_c": merged(max, (state.temperature_c for state in states)),
        "gpu_util_frac": merged(min, (state.util_frac for state in states)),
        "gpu_throttled": merged(any, (state.throttled for state in states)),
    }


def gpu_facts(gpus: Sequence[Gpu] | None = None) -> HostFacts:
    """Returns what this host is, as far as GPUs go."""
    found = hardware.gpus() if gpus is None else tuple(gpus)
    return HostFacts(
        host=platform.node(),
        gpu_name=found[0].name if found else None,
        gpu_count=len(found),
        driver_version=found[0].driver_version if found else None,
    )


def cool_down(
    cancelled: threading.Event, gpus: Sequence[Gpu] | None = None, limit_s: float = COOL_DOWN_LIMIT_S
) -> float:
    """Waits, before a server starts, until its GPUs are below `COOL_C` and not throttled: no trial inherits heat.

    Args:
        cancelled: ends the wait when set.
        gpus: to look at; by default those that are visible here.
        limit_s: of the wait.

    Returns:
        Seconds waited.
    """
    found = hardware.gpus() if gpus is None else tuple(gpus)
    began_s = time.monotonic()
    while any(is_hot(hardware.state_of(gpu)) for gpu in found):
        left_s = began_s + limit_s - time.monotonic()
        if left_s <= 0 or cancelled.wait(min(PERIOD_S, left_s)):
            break
    return time.monotonic() - began_s


def is_hot(state: GpuState) -> bool:
    """Too warm, or throttled; what a GPU does not report is no reason to wait."""
    return bool(state.throttled) or (state.temperature_c is not None and state.temperature_c >= COOL_C)


def require_idle(gpus: Sequence[Gpu] | None = None) -> None:
    """Makes sure, before a server starts, that nobody holds its GPUs.

    Raises:
        TrialError: `gpu_busy`: more than 1 GiB of a GPU's memory is in use.
    """
    for gpu in hardware.gpus() if gpus is None else gpus:
        used = hardware.memory_used_bytes((gpu,))
        if used > FOREIGN_BYTES:
            holders = ", ".join(f"process {pid}" for pid in hardware.processes_on(gpu)) or "processes that NVML hides"
            detail = f"{used / 2**30:.1f} GiB of GPU {gpu.index} ({gpu.name}) are in use before the start, by {holders}"
            raise TrialError("gpu_busy", detail)
