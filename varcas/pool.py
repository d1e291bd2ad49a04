"""Where trials run: one fresh Ray actor per server start, which reserves the GPUs of that proposal.

The only door to Ray. A local Ray is started unless an address is given or this process is a Ray job's driver.
An actor is never restarted (`max_restarts=0`): its server may have died for a reason, and a second start would hide it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from varcas.errors import InputError, VarcasError
from varcas.experiment import Hardware

# Set before Ray is imported, and inherited by the raylet and its workers.
RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # a load generator at niceness 15 is late
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs (validation) still sees which there are
}
LOCAL_ENV = {"RAY_AUTH_MODE": "token"}
"""For a Ray of our own, which reads it when it is imported; a cluster that is joined has its own way."""
OBJECT_STORE_BYTES = 256 * 2**20
STAND_BY_S = 3600
MARK = "VARCAS_RAY"
POLL_S = 0.25
CLOSE_TIMEOUT_S = 2.0
PRESTART_TIMEOUT_S = 2.0
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job (ray/_private/ray_constants.py, `RAY_JOB_CONFIG_JSON_ENV_VAR`)."""

Work = Callable[[Any, threading.Event], Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit of work that ended: with its result, or `lost` in words when its worker died."""

    key: str
    result: Any = None
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class Slots:
    """What the pool may use at once, and what each worker reserves beside its GPUs."""

    num_gpus: int
    gpus_per_node: int
    on_gpu: bool
    gpu: str
    cpus_per_gpu: float
    resources: Mapping[str, float]
    num_nodes: int = 1
    """That have them."""


class LostServiceError(VarcasError):
    """The worker of a service died, with its node or alone."""


class Workers(Protocol):
    """Where trials run, as a sweep uses it: `Pool` on Ray, `inprocess.InProcessPool` in the driver."""

    slots: Slots

    @property
    def busy(self) -> bool:
        """Something is running."""

    def has_room(self, num_gpus: int = 1) -> bool:
        """Whether work that needs `num_gpus` would start now."""

    def submit(self, key: str, work: Work, payload: Any, num_gpus: int = 1) -> None:
        """Starts `work(payload, cancelled)`."""

    def prepare(self) -> None:
        """Makes the next start quicker, where that can be."""

    def finished(self, timeout_s: float = 1.0) -> list[Finished]:
        """What ended; waits up to `timeout_s` for it."""

    def service(self, make: Callable[..., Any], *args: Any) -> Any:
        """An object on a worker node."""

    def call(
        self, service: Any, method: str, *args: Any, timeout_s: float, stopping: threading.Event | None = None
    ) -> Any:
        """Calls a method of a service."""

    def dismiss(self, service: Any) -> None:
        """Ends a service."""

    def cancel(self) -> None:
        """Asks all running work to end; it still comes back through `finished`."""


class _Worker:
    """Runs in a Ray worker of its own; `cancel` is answered by a second thread while `run` works."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def run(self, work: Work, payload: Any) -> Any:
        return work(payload, self._cancelled)

    def cancel(self) -> None:
        self._cancelled.set()


def in_ray_job() -> bool:
    """Whether this process is the driver of a `ray job submit`."""
    return JOB_ENV in os.environ


class Pool:
    """N pieces of work at a time on N GPUs.

    Args:
        hardware: what the experiment asks for.
        address: of a running cluster (`auto` finds one); None starts a local Ray, or joins the job's cluster.
        ray_options: further arguments of `ray.init`, say `num_gpus` for fake GPUs in tests.

    Raises:
        InputError: no such GPU here, or no cluster at the address.
    """

    def __init__(self, hardware: Hardware, address: str | None = None, **ray_options: Any) -> None:
        env = RAY_ENV if address or in_ray_job() else RAY_ENV | LOCAL_ENV
        os.environ.update({key: value for key, value in env.items() if key not in os.environ})
        import ray as untyped  # here, so that `varcas --help` does not wait for it

        ray: Any = untyped
        self._ray = ray
        self._owns_ray = not ray.is_initialized()
        self._is_local = self._owns_ray and not address and not in_ray_job()
        self._reaper = _start_reaper() if self._is_local else None
        self._prestart: tuple[Callable[[], Any], Any] | None = None
        if self._owns_ray:
            with _own_sigterm():
                _connect(ray, address, ray_options)
        try:
            self.slots = _slots(hardware, ray.cluster_resources(), ray.nodes())
        except InputError:
            self.close()
            raise
        self._running: dict[Any, tuple[str, Any, int]] = {}  # result ref → key, actor, GPUs
        self._remote_worker = ray.remote(_Worker)

    @property
    def busy(self) -> bool:
        """Something is running."""
        return bool(self._running)

    @property
    def running(self) -> list[str]:
        """Keys of what is running."""
        return [key for key, _, _ in self._running.values()]

    def has_room(self, num_gpus: int = 1) -> bool:
        """Whether work that needs `num_gpus` would start now (on CPUs: one piece of work a node)."""
        used = sum(gpus for _, _, gpus in self._running.values())
        return used + (num_gpus if self.slots.on_gpu else 1) <= self.slots.num_gpus

    def submit(self, key: str, work: Work, payload: Any, num_gpus: int = 1) -> None:
        """Starts `work(payload, cancelled)` in a fresh actor that reserves `num_gpus`."""
        actor = self._remote_worker.options(**self._reservation(num_gpus), max_restarts=0, max_concurrency=2).remote()
        self._running[actor.run.remote(work, payload)] = (key, actor, num_gpus if self.slots.on_gpu else 1)

    def prepare(self) -> None:
        """Has a worker process stand by, so that the next actor starts in 0.4 s rather than in 1 s.

        Ray's own call for it is not public: where it is refused, or missing in another version, nothing is lost but
        that time. Only in a Ray of our own: elsewhere such workers would lie about on nodes that do not need them.
        """
        if not self._is_local:
            return
        with suppress(Exception):
            if self._prestart is None:
                self._prestart = _prestarter(self._ray)
            self._prestart[0]()

    def finished(self, timeout_s: float = 1.0) -> list[Finished]:
        """Waits up to `timeout_s` for the next pieces of work to end."""
        self._require_ray()
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._collect(ref) for ref in done]

    def service(self, make: Callable[..., Any], *args: Any) -> Any:
        """Places an object on a node of the pool's kind without reserving its GPU; call it with `call`."""
        options = self._reservation(0) | {"num_cpus": 0}
        return self._ray.remote(_Service).options(**options, max_restarts=0).remote(make, args)

    def call(
        self, service: Any, method: str, *args: Any, timeout_s: float, stopping: threading.Event | None = None
    ) -> Any:
        """Calls a method of a service.

        Raises:
            VarcasError: no answer within `timeout_s`; else what the method raised.
            LostServiceError: its worker died.
            KeyboardInterrupt: `stopping` was set while it worked.
        """
        answer = service.call.remote(method, args)
        ends_s = time.monotonic() + timeout_s
        while not self._ray.wait([answer], timeout=POLL_S)[0]:
            self._require_ray()
            if stopping is not None and stopping.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > ends_s:
                raise VarcasError(f"{method}: no answer from the worker node within {timeout_s:.0f} s")
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # Ray's own message is a traceback
        except self._ray.exceptions.RayError as error:
            raise LostServiceError(f"{method}: the worker on the node died: {_first_line(error)}") from error

    def dismiss(self, service: Any) -> None:
        """Ends a service and what it started."""
        with suppress(Exception):
            self._ray.get(service.close.remote(), timeout=CLOSE_TIMEOUT_S)
        self._ray.kill(service)

    def cancel(self) -> None:
        """Asks all running work to end; it still comes back through `finished`."""
        for _, actor, _ in self._running.values():
            actor.cancel.remote()

    def close(self) -> None:
        """Kills what still runs (its guardians end the servers) and leaves Ray, which it stops if it started it."""
        for _, actor, _ in getattr(self, "_running", {}).values():
            self._ray.kill(actor)
        if self._prestart is not None:
            self._prestart[1].close()  # open, it would print a line when the raylet goes
        if self._owns_ray:
            self._ray.shutdown()
        if self._reaper is not None:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            self._reaper.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_ray(self) -> None:
        """Raises VarcasError when a Ray of our own has lost a process: it would let us wait for ever."""
        if not self._is_local:
            return
        from ray._private import worker

        node: Any = worker._global_node
        if node is not None and not node.remaining_processes_alive():
            raise VarcasError("the local Ray died: everything measured is kept; run the same command again")

    def _reservation(self, num_gpus: int) -> dict[str, Any]:
        if not self.slots.on_gpu:
            return {"num_cpus": self.slots.cpus_per_gpu, "resources": dict(self.slots.resources)}
        cpus = max(1.0, self.slots.cpus_per_gpu * num_gpus)
        return {"num_cpus": cpus, "num_gpus": num_gpus, "resources": dict(self.slots.resources)}

    def _collect(self, ref: Any) -> Finished:
        key, actor, _ = self._running.pop(ref)
        try:
            return Finished(key, result=self._ray.get(ref))
        except self._ray.exceptions.RayTaskError as error:  # our bug: never the configuration's fault
            return Finished(key, lost=str(error).strip())
        except self._ray.exceptions.RayError as error:  # the actor, its node, or the result on it is gone
            return Finished(key, lost=_first_line(error))
        finally:
            self._ray.kill(actor)


class _Service:
    def __init__(self, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._object = make(*args)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._object, method)(*args)

    def close(self) -> None:
        self._object.close()


def _prestarter(ray: Any) -> tuple[Callable[[], Any], Any]:
    """Returns what asks the raylet of a local Ray for one more worker without waiting for its answer, and its channel.

    src/ray/protobuf/node_manager.proto, `PrestartWorkers`; Ray 2.60.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    messages: Any = node_manager_pb2
    services: Any = node_manager_pb2_grpc
    asked = messages.PrestartWorkersRequest(
        language=0,  # Python
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=STAND_BY_S,
        num_workers=1,
    )
    (node,) = ray.nodes()
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    call = services.NodeManagerServiceStub(channel).PrestartWorkers
    return lambda: call.future(asked, timeout=PRESTART_TIMEOUT_S), channel


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:500] or type(error).__name__


def _start_reaper() -> subprocess.Popen[bytes]:
    """Starts what ends a local Ray if this process is killed, and marks the environment that Ray will inherit."""
    os.environ[MARK] = uuid.uuid4().hex
    script = Path(__file__).with_name("reaper.py")
    argv = [sys.executable, "-I", "-S", str(script), f"{MARK}={os.environ[MARK]}", str(os.getpid())]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps who handles SIGTERM: `ray.init` puts a handler in its place that exits at once, mid-trial."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(ray: Any, address: str | None, options: Mapping[str, Any]) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address or in_ray_job():
        try:
            ray.init(address=address or "auto", **quiet, **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            raise InputError(
                f"--address: {address or 'auto'}: no Ray cluster answers there ({_first_line(error)}). "
                "Start one with `ray start --head` or `ray up cluster.yaml`, or leave --address out for a local Ray."
            ) from error
        return
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address="local", **quiet, **(local | dict(options)))


def _slots(hardware: Hardware, cluster: Mapping[str, float], nodes: list[Any]) -> Slots:
    """What of the cluster the experiment may use.

    Raises:
        InputError: with what is there and what to write instead.
    """
    types = sorted(name.partition(":")[2] for name in cluster if name.startswith("accelerator_type:"))
    resources: dict[str, float] = {hardware.resource: 0.001} if hardware.resource else {}
    if hardware.resource and hardware.resource not in cluster:
        raise InputError(
            f"hardware.resource: {hardware.resource!r}: no node of this cluster has it. There: "
            f"{', '.join(sorted(name for name in cluster if ':' not in name))}. Start the nodes with "
            f"`ray start --resources '{{\"{hardware.resource}\": 1}}'`."
        )
    total = int(cluster.get("GPU", 0))
    if hardware.gpu == "cpu" or (hardware.gpu == "auto" and not total):
        usable = _nodes_with(nodes, resources)
        node_cpus = max(node.get("CPU", 1.0) for node in usable)
        return Slots(min(hardware.count, len(usable)), 1, False, "cpu", node_cpus, resources)
    if hardware.gpu == "auto" and len(types) > 1:
        raise InputError(f"hardware.gpu: auto: this cluster has several: {', '.join(types)}. Name one of them.")
    gpu = types[0] if hardware.gpu == "auto" and types else hardware.gpu
    if f"accelerator_type:{gpu}" in cluster:
        resources[f"accelerator_type:{gpu}"] = 0.001
    elif not hardware.resource and hardware.gpu != "auto":
        here = "`hardware: {gpu: auto}` for what is here" if total else "`hardware: {gpu: cpu}` to measure on the CPU"
        there = f"{total} GPU(s) of type {', '.join(types) or 'unknown'}" if total else "no GPU"
        raise InputError(
            f"hardware.gpu: {gpu!r}: not here: Ray sees {there}. Write {here}, "
            "join a cluster that has it with --address, or mark its nodes with a custom resource and name that in "
            "`hardware.resource`."
        )
    usable = [node for node in _nodes_with(nodes, resources) if node.get("GPU")]
    if not usable:
        raise InputError(f"hardware.gpu: {gpu!r}: the nodes with {', '.join(resources)} have no GPU as Ray sees them.")
    gpus = [int(node["GPU"]) for node in usable]
    cpus = min(node.get("CPU", 1.0) / node["GPU"] for node in usable)
    return Slots(min(hardware.count, sum(gpus)), max(gpus), True, gpu, float(max(1, int(cpus))), resources, len(usable))


def _nodes_with(nodes: list[Any], resources: Mapping[str, float]) -> list[dict[str, float]]:
    """Resources of the living nodes that have all of these."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [node for node in alive if all(name in node for name in resources)]
