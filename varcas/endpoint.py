"""One measurement of an OpenAI-compatible endpoint that runs already, wherever it is: `varcas load URL`."""

from __future__ import annotations

import datetime
import hashlib
import http.client
import json
import os
import platform
import ssl
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import JsonValue

from varcas.engine.failures import HINTS
from varcas.engine.node import cache_dir
from varcas.errors import InputError, TrialError
from varcas.experiment import Workload
from varcas.measurement import Loaded, Measurement, Progress, cut_short
from varcas.metrics import constraints_of, summarise
from varcas.records import MEASUREMENT_VERSION, LoadResult, RequestRecord, TrialRow
from varcas.store import Store
from varcas.workload.driver import Load
from varcas.workload.schedule import check_workload, identity
from varcas.workload.wire import PATHS, Endpoint, Target, completion_body

ENGINE = "openai"
KEY_VARIABLES = ("VARCAS_API_KEY", "OPENAI_API_KEY")
ASK_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 60.0
MOVED = (301, 302, 303, 307, 308)
KEY_REFUSED = (401, 403)
BUSY = 429
STRICT = (400, 422)
"""What an endpoint answers to a parameter that it does not know."""
NO_SUCH_ENDPOINT = (400, 404, 405, 422, 501)
"""What it answers where it cannot chat, but may complete."""
UNCOUNTED_FRAC = 0.01
BY_ITSELF = (
    "the endpoint takes neither `ignore_eos` nor `cache_salt`: answers end when the model ends them, and prompts may "
    "sit in a prefix cache from an earlier load of the same seed"
)


class Said(NamedTuple):
    """An answer to one request; a body that is no JSON object is an empty one."""

    status: int
    answer: dict[str, Any]
    location: str | None


@dataclass(frozen=True, slots=True)
class Served:
    """An endpoint that answered.

    Attributes:
        target: where requests go, and whether it is strict.
        url: as given, without `/v1`.
        model: as the endpoint calls it.
        max_model_len: where it says so (vLLM does).
        version: of vLLM, where it says so.
        endpoint: that the load uses.
        metrics_url: of its `/metrics`; None where it has none, or a proxy before it may hide them.
    """

    target: Target
    url: str
    model: str
    max_model_len: int | None
    version: str | None
    endpoint: Endpoint
    metrics_url: str | None = None


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
    served = connect(url, model=model, endpoint=workload.endpoint, sampling=workload.sampling)
    workload = workload.model_copy(update={"endpoint": served.endpoint})
    study = name or f"load-{served.target.host}-{served.target.port}".replace(":", "-")
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


def connect(
    url: str, *, model: str | None, endpoint: str = "auto", sampling: Mapping[str, JsonValue] | None = None
) -> Served:
    """Finds out what runs at an address, and in which form it takes what the load will send.

    Raises:
        InputError: with what was asked, what came back, and what to do.
    """
    target = _target(url)
    models = _models(target, url, model)
    found = next((entry for entry in models if model in (None, entry["id"])), None)
    if found is None or (model is None and len(models) > 1):
        names = ", ".join(entry["id"] for entry in models) or "none"
        raise InputError(f"--model: {model!r}: {url} serves {names}. Give one of these.")
    target = replace(target, model=found["id"])
    version = _ask(target, "GET", "/version").answer.get("version")
    max_model_len = found.get("max_model_len")
    target, decided = _decide(target, endpoint, sampling or {}, url)
    known = url.rstrip("/").removesuffix("/v1")
    is_bare = not (target.tls or target.base)
    has_metrics = is_bare and _ask(target, "GET", "/metrics").status == http.client.OK
    return Served(
        target=target,
        url=known,
        model=found["id"],
        max_model_len=max_model_len if isinstance(max_model_len, int) else None,
        version=version if isinstance(version, str) else None,
        endpoint=decided,
        metrics_url=known if has_metrics else None,
    )


def _target(url: str) -> Target:
    if any(sign in url for sign in "@?#"):
        raise InputError(
            "URL: holds a user name, a query or a fragment, which would be stored with the results. Write "
            f"http://HOST:PORT or https://HOST/BASE, and put the key into {KEY_VARIABLES[0]}."
        )
    if not _is_visible(url):
        raise InputError("URL: holds a space or another character that no URL has. Write http://HOST:PORT.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"URL: {url!r}: write http://HOST:PORT or https://HOST, e.g. http://127.0.0.1:8000.")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InputError(f"URL: {url!r}: {error}. Write http://HOST:PORT.") from error
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port, "", _key(), tls=parts.scheme == "https", base=base)


def _key() -> str | None:
    name = next((name for name in KEY_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return None
    if not _is_visible(os.environ[name]):
        raise InputError(f"{name}: holds a space, a line break or another character that no key has. Set it again.")
    return os.environ[name]


def _is_visible(text: str) -> bool:
    return all("!" <= letter <= "~" for letter in text)


def _models(target: Target, url: str, model: str | None) -> list[dict[str, Any]]:
    """What `/v1/models` lists; the model that was named where there is no such list."""
    said = _ask(target, "GET", "/v1/models")
    _check_usable(said, "/v1/models", url)
    entries = said.answer.get("data")
    if said.status == http.client.OK and isinstance(entries, list):
        return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if said.status == http.client.NOT_FOUND and model is not None:
        return [{"id": model}]
    raise InputError(
        f"URL: {url}: /v1/models answered {said.status}: this is no OpenAI-compatible endpoint, or its URL is another, "
        "or it lists no models: then give --model."
    )


def _decide(target: Target, asked: str, sampling: Mapping[str, JsonValue], url: str) -> tuple[Target, Endpoint]:
    """Chat when the endpoint can chat and that was not ruled out; strict when it takes nothing that is vLLM's own."""
    found = []
    for endpoint in PATHS:
        if asked not in ("auto", endpoint):
            continue
        for strict in (False, True):
            taker = replace(target, strict=strict)
            body = completion_body(endpoint, taker, "Hello", 1, cache_salt=uuid.uuid4().hex, sampling=sampling)
            said = _ask(taker, "POST", PATHS[endpoint], body)
            if said.status == http.client.OK:
                return taker, endpoint
            if said.status not in STRICT:
                break
        _check_usable(said, PATHS[endpoint], url)
        found.append(f"{PATHS[endpoint]} answered {said.status}: {json.dumps(said.answer)[:200]}")
        if said.status not in NO_SUCH_ENDPOINT:
            break
    raise InputError(
        f"URL: {url}: takes no request for {target.model!r}: {'; '.join(found)}. Try another --model or --endpoint."
    )


def _check_usable(said: Said, path: str, url: str) -> None:
    """Says what to do about an answer that every request would get.

    Raises:
        InputError: it is one.
    """
    if said.status in KEY_REFUSED:
        raise InputError(f"URL: {url}: {path} refuses the key ({said.status}). Set {' or '.join(KEY_VARIABLES)}.")
    if said.status == BUSY:
        raise InputError(f"URL: {url}: {path} answered 429: it is busy, or your quota is spent. Try later.")
    if said.status in MOVED:
        raise InputError(f"URL: {url}: {path} answered {said.status}: it is at {said.location} now. Give that address.")


def _ask(target: Target, method: str, path: str, body: Mapping[str, Any] | None = None) -> Said:
    """One request on a connection of its own.

    Raises:
        InputError: nobody answers.
    """
    where = f"URL: {'https' if target.tls else 'http'}://{target.host}:{target.port}"
    connection = (
        http.client.HTTPSConnection(target.host, target.port, timeout=ASK_TIMEOUT_S)
        if target.tls
        else http.client.HTTPConnection(target.host, target.port, timeout=ASK_TIMEOUT_S)
    )
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, f"{target.base}{path}", data, target.headers)
        response = connection.getresponse()
        return Said(response.status, _object(response.read()), response.headers.get("location"))
    except ssl.SSLCertVerificationError as error:
        raise InputError(
            f"{where}: its certificate does not hold ({error.verify_message}). SSL_CERT_FILE names the authorities "
            "that are trusted."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{where}: nobody answers ({error}). Is it up, and are port and http(s):// right?") from error
    finally:
        connection.close()


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _loaded(served: Served) -> Loaded:
    return Loaded(
        target=served.target,
        url=served.metrics_url,
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
    strict = served.target.strict
    key = _hash(served.url, served.model, served.version, identity(workload), strict, MEASUREMENT_VERSION)
    load = measurement.load
    measured: dict[str, Any] = {}
    if load:
        exact_lengths = served.version is not None and not strict  # vLLM takes `ignore_eos`; others need not
        measured = summarise(load, slo, measurement.samples, arrival=workload.arrives.kind, exact_lengths=exact_lengths)
    if load and not failure:
        measured |= constraints_of(load, slo)
    if load and failure and failure.kind == "interrupted":
        measured |= {"valid": False, "invalid_reasons": [cut_short(load, workload.duration_s)]}
    measured["warnings"] = [*measured.get("warnings", ()), *_warnings(served, load)]
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


def _warnings(served: Served, load: LoadResult | None) -> list[str]:
    """What is odd about a measurement of an endpoint, beyond what is odd about any."""
    found = [BY_ITSELF if served.target.strict else None, _uncounted(load.records if load else ())]
    return [text for text in found if text]


def _uncounted(records: Sequence[RequestRecord]) -> str | None:
    completed = [record for record in records if record.ok]
    uncounted = sum(record.counting == "events" for record in completed)
    if uncounted <= UNCOUNTED_FRAC * len(completed):
        return None
    return (
        f"{uncounted} of {len(completed)} answers came without a `usage`: their tokens are held to be one an event, "
        "which undercounts where an event bears several"
    )


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
