"""A pool without Ray and without processes: work runs in the driver, one piece at a time, when its result is asked for.

For work that takes no machine of its own: the simulated engine, and benchmarks that drive the real search and
confirmation with measurements made up on purpose. With several GPUs as many pieces are under way at once, as on Ray, so
that proposals are made without knowing each other's results; they end in the order in which they began.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from varcas.experiment import Hardware
from varcas.pool import Finished, Slots, Work


class InProcessPool:
    """N pieces of work under way on N GPUs that nobody has.

    Args:
        hardware: what the experiment asks for; `auto` is taken for a GPU of that name.
    """

    def __init__(self, hardware: Hardware) -> None:
        on_gpu = hardware.gpu != "cpu"
        self.slots = Slots(hardware.count, hardware.count if on_gpu else 1, on_gpu, hardware.gpu, 1.0, {})
        self._queue: deque[tuple[str, Work, Any, int]] = deque()
        self._cancelled = threading.Event()

    @property
    def busy(self) -> bool:
        """Something is under way."""
        return bool(self._queue)

    @property
    def running(self) -> list[str]:
        """Keys of what is under way."""
        return [key for key, *_ in self._queue]

    def has_room(self, num_gpus: int = 1) -> bool:
        """Whether work that needs `num_gpus` would start now."""
        used = sum(gpus for *_, gpus in self._queue)
        return used + (num_gpus if self.slots.on_gpu else 1) <= self.slots.num_gpus

    def submit(self, key: str, work: Work, payload: Any, num_gpus: int = 1) -> None:
        """Puts `work(payload, cancelled)` in line; it runs within `finished`."""
        self._queue.append((key, work, payload, num_gpus if self.slots.on_gpu else 1))

    def prepare(self) -> None:
        """Nothing is to be prepared."""

    def finished(self, timeout_s: float = 1.0) -> list[Finished]:
        """Runs the oldest piece of work; what it raises is raised, a bug being a bug."""
        if not self._queue:
            return []
        key, work, payload, _ = self._queue.popleft()
        return [Finished(key, result=work(payload, self._cancelled))]

    def service(self, make: Callable[..., Any], *args: Any) -> Any:
        """The object itself."""
        return make(*args)

    def call(
        self, service: Any, method: str, *args: Any, timeout_s: float, stopping: threading.Event | None = None
    ) -> Any:
        """Calls a method of a service.

        Raises:
            KeyboardInterrupt: `stopping` was set.
        """
        if stopping is not None and stopping.is_set():
            raise KeyboardInterrupt
        return getattr(service, method)(*args)

    def dismiss(self, service: Any) -> None:
        """Ends a service and what it started."""
        service.close()

    def cancel(self) -> None:
        """Asks all work to end; it still comes back through `finished`."""
        self._cancelled.set()

    def close(self) -> None:
        """Nothing outlives the driver."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
