"""One measurement of an OpenAI-compatible endpoint that runs already, wherever it is: `varcas load URL`."""

from __future__ import annotations

import datetime
import hashlib
import http.client
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from varcas.engine.failures import HINTS
from varcas.engine.node import cache_dir
from varcas.errors import InputError, TrialError
from varcas.experiment import Workload
from varcas.measurement import Loaded, Measurement, Progress
from varcas.metrics import constraints_of, summarise
from varcas.records import MEASUREMENT_VERSION, TrialRow
from varcas.store import Store
from varcas.workload.driver import Load
from varcas.workload.schedule import check_workload, identity
from varcas.workload.wire import PATHS, Endpoint, Target, completion_body

ENGINE = "openai"
KEY_VARIABLES = ("VARCAS_API_KEY", "OPENAI_API_KEY")
ASK_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """An endpoint that answered.

    Attributes:
        target: where requests go.
        url: as given, without `/v1`.
        model: as the endpoint calls it.
        max_model_len: where it says so (vLLM does).
        version: of vLLM, where it says so.
        endpoint: that the load uses.
    """

    target: Target
    url: str
    model: str
    max_model_len: int | None
    version: str | None
    endpoint: Endpoint


def measure(
    url: str,
    workload: Workload,
    *,
    model: str | None = None,
    name: str | None = None,
    slo: Mapping[str, float] | None = None,
    results: str | Path = "results",
    clients: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stopping: threading.Event | None = None,
) -> TrialRow:
    """Puts a workload on an endpoint, measures it, and stores the row with its requests and samples.

    Args:
        url: `http://host:port` or `https://host/base`, with or without `/v1`.
        workload: the traffic.
        model: as the endpoint calls it (default: its only one).
        name: of the study that the row belongs to (default: after the host).
        slo: metric to its limit in ms.
        results: the store.
        clients: load processes.
        on_progress: told how far the load is.
        stopping: set it to end early; what was measured so far is kept.

    Raises:
        InputError: nobody answers there, the key is refused, or the workload cannot be had.
        VarcasError: the load failed.
    """
    check_workload(workload, {})
    served = connect(url, model=model, endpoint=workload.endpoint)
    study = name or f"load-{urlsplit(served.url).netloc.replace(':', '-')}"
    with Store(str(results)) as store, tempfile.TemporaryDirectory(prefix="varcas-load-") as work:
        number = max((row.number for row in store.rows(study)), default=-1) + 1
        log = Path(results) / "logs" / study / f"{number:05d}-load.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began_at = datetime.datetime.now(datetime.UTC)
        with Load.start(log, Path(work), clients=clients) as load:
            measurement = Measurement(
                load,
                _loaded(served),
                workload,
                STALL_TIMEOUT_S,
                cache_dir() / "prompts",
                stopping or threading.Event(),
                on_progress,
            )
            failure = _run(measurement)
        row = _row(served, workload, study, number, began_at, measurement, failure, dict(slo or {}), str(log))
        store.append(row, measurement.load.records if measurement.load else (), measurement.samples)
    if failure and failure.kind == "interrupted":
        raise KeyboardInterrupt
    return row


def _run(measurement: Measurement) -> TrialError | None:
    """Runs it; a load that failed is a row too."""
    try:
        measurement.run()
    except TrialError as error:
        return error
    return None


def connect(url: str, *, model: str | None, endpoint: str = "auto") -> Served:
    """Finds out what runs at an address.

    Raises:
        InputError: with what was asked, what came back, and what to do.
    """
    target = _target(url)
    models = _models(target, url)
    found = next((entry for entry in models if model in (None, entry["id"])), None)
    if found is None or (model is None and len(models) > 1):
        names = ", ".join(entry["id"] for entry in models) or "none"
        raise InputError(f"--model: {model!r}: {url} serves {names}. Give one of these.")
    target = replace(target, model=found["id"])
    status, answer = _ask(target, "GET", "/version")
    return Served(
        target=target,
        url=url.rstrip("/").removesuffix("/v1"),
        model=found["id"],
        max_model_len=found.get("max_model_len"),
        version=answer.get("version") if status == http.client.OK else None,
        endpoint=_decide(target, endpoint, url),
    )


def _target(url: str) -> Target:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"URL: {url!r}: write http://HOST:PORT or https://HOST, e.g. http://127.0.0.1:8000.")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InputError(f"URL: {url!r}: {error}. Write http://HOST:PORT.") from error
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port, "", key, tls=parts.scheme == "https", base=base)


def _models(target: Target, url: str) -> list[dict[str, Any]]:
    status, answer = _ask(target, "GET", "/v1/models")
    if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        raise InputError(f"URL: {url}: refuses the key ({status}). Set {' or '.join(KEY_VARIABLES)}.")
    entries = answer.get("data")
    if status != http.client.OK or not isinstance(entries, list):
        raise InputError(f"URL: {url}: /v1/models answered {status}: this is no OpenAI-compatible endpoint.")
    return [entry for entry in entries if isinstance(entry, dict) and "id" in entry]


def _decide(target: Target, asked: str, url: str) -> Endpoint:
    """Chat when the endpoint can chat and that was not ruled out."""
    said = ""
    for endpoint in PATHS:
        if asked not in ("auto", endpoint):
            continue
        body = completion_body(endpoint, target.model, "Hello", 1, cache_salt=None, sampling={})
        status, answer = _ask(target, "POST", PATHS[endpoint], body | {"stream": False, "stream_options": None})
        if status == http.client.OK:
            return endpoint
        said = f"{PATHS[endpoint]} answered {status}: {json.dumps(answer)[:200]}"
    raise InputError(f"URL: {url}: takes no request for {target.model!r}: {said}. Try another --model or --endpoint.")


def _ask(target: Target, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """One request on a connection of its own; an answer that is no JSON object is an empty one.

    Raises:
        InputError: nobody answers.
    """
    connection = (
        http.client.HTTPSConnection(target.host, target.port, timeout=ASK_TIMEOUT_S)
        if target.tls
        else http.client.HTTPConnection(target.host, target.port, timeout=ASK_TIMEOUT_S)
    )
    try:
        data = None if body is None else json.dumps({k: v for k, v in body.items() if v is not None}).encode()
        connection.request(method, f"{target.base}{path}", data, target.headers)
        response = connection.getresponse()
        answer = json.loads(response.read() or b"{}")
        return response.status, answer if isinstance(answer, dict) else {}
    except ValueError:
        return response.status, {}
    except (OSError, http.client.HTTPException) as error:
        scheme = "https" if target.tls else "http"
        raise InputError(
            f"URL: {scheme}://{target.host}:{target.port}: nobody answers ({error}). Is it up, and the port right?"
        ) from error
    finally:
        connection.close()


def _loaded(served: Served) -> Loaded:
    return Loaded(
        target=served.target,
        url=None if served.target.tls or served.target.base else served.url,  # a proxy hides `/metrics`
        endpoint=served.endpoint,
        gpus=(),
        max_model_len=served.max_model_len,
        alive=lambda: True,  # its requests will tell
        failure=lambda: TrialError("crashed_under_load", "the endpoint is gone"),
    )


def _row(
    served: Served,
    workload: Workload,
    study: str,
    number: int,
    began_at: datetime.datetime,
    measurement: Measurement,
    failure: TrialError | None,
    slo: dict[str, float],
    log: str,
) -> TrialRow:
    """The same columns as a trial's; what only the owner of a server knows is null."""
    key = _hash(served.url, served.model, served.version, identity(workload), MEASUREMENT_VERSION)
    load = measurement.load
    measured: dict[str, Any] = summarise(load, slo, measurement.samples, arrival=workload.arrives.kind) if load else {}
    if load and not failure:
        measured |= constraints_of(load, slo)
    named: dict[str, Any] = {
        "trial_id": _hash(key, study, number),
        "trial_key": key,
        "study": study,
        "number": number,
        "server_id": _hash(served.url, served.version)[:16],
        "purpose": "load",
        "state": "complete" if failure is None else "stopped" if failure.kind == "interrupted" else "failed",
        "failure_kind": failure.kind if failure else None,
        "failure_detail": failure.detail if failure else None,
        "failure_hint": HINTS[failure.kind] if failure else None,
        "config_json": "{}",
        "config_hash": _hash({}),
        "model": served.model,
        "engine": ENGINE,
        "engine_version": served.version,
        "endpoint_url": served.url,
        "host": platform.node(),
        "workload_json": workload.model_dump_json(),
        "profile": workload.name,
        "rate_rps": workload.mean_rps,
        "duration_s": float(workload.duration_s),
        "seed": workload.seed,
        "started_at": began_at,
        "warmup_s": measurement.warmup_s,
        "load_s": measurement.load_s,
        "drain_s": measurement.drain_s,
        "log_path": log,
    }
    return TrialRow(**(named | measured))


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
