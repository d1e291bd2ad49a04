"""Server starts without Ray: what `varcas.starts.Starts` needs of a pool, in this process, for benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

from varcas.engine.node import Node
from varcas.experiment import Experiment
from varcas.pool import Finished, Pool, Slots
from varcas.records import Purpose, TrialRow
from varcas.space import ServingConfig
from varcas.starts import Event, Job, Starts, check
from varcas.store import Store
from varcas.study import Proposal
from varcas.trial import Done, Plan, Series, run_series


class LocalPool:
    """One worker, which is this process: `pool.Pool` as far as `Starts` uses it."""

    def __init__(self, experiment: Experiment) -> None:
        on_gpu = experiment.hardware.gpu != "cpu"
        self.slots = Slots(1, 1, on_gpu, experiment.hardware.gpu, 1.0, {})
        self.busy = False

    def service(self, make: Callable[..., Any], *args: Any) -> Any:
        """The object itself."""
        return make(*args)

    def call(self, service: Any, method: str, *args: Any, timeout_s: float, stopping: Any = None) -> Any:
        """Its answer."""
        return getattr(service, method)(*args)

    def dismiss(self, service: Any) -> None:
        """Ends what it started."""
        service.close()

    def cancel(self) -> None:
        """Nothing runs beside this process."""

    def finished(self, timeout_s: float = 1.0) -> list[Finished]:
        """Nothing runs beside this process."""
        return []


class LocalStarts(Starts):
    """Starts servers here, one at a time, and stores a row of each measurement as it ends."""

    def __init__(self, experiment: Experiment, store: Store, on_event: Callable[[Event], None]) -> None:
        pool = cast(Pool, LocalPool(experiment))
        stop = threading.Event()
        super().__init__(experiment, check(experiment, searched=False), store, pool, on_event, stop, Node)

    def checked(self, config: ServingConfig) -> Any:
        """VLLM's word on a configuration."""
        return self._check(config)

    def measure(
        self, config: ServingConfig, plan: Plan, *, purpose: Purpose, live: bool,
        on_row: Callable[[TrialRow, Done], None],
    ) -> Series:  # fmt: skip
        """Runs a plan on one server; `on_row` is told of each row when it is on disk."""
        proposal = Proposal(None, {}, dict(config.flags), config, purpose)
        job = Job(proposal, self._number(), purpose, self._check(config), live=live)
        earlier: list[Done] = []
        numbers: list[int] = []

        def keep(done: Done) -> None:
            earlier.append(done)
            if done.step.discarded and done.outcome.state == "complete":
                return
            self._store_row(job, earlier, numbers, on_row)
            earlier.clear()

        return run_series(self._task(job, live=live), self._stopping, plan=plan, on_done=keep)

    def _store_row(
        self, job: Job, done: Sequence[Done], numbers: list[int], on_row: Callable[[TrialRow, Done], None]
    ) -> None:
        """The row of the last of these; those before it are discarded loads, whose time it bears."""
        server_id = self._server_id(job)
        for row, one in self._series_rows(job, Series(tuple(done)), 0.0):
            number = self._number() if numbers else row.number
            numbers.append(number)
            row = row.model_copy(update={"number": number, "server_id": server_id})
            load = one.outcome.load
            self.store.append(row, load.records if load else (), one.outcome.samples)
            self._rows.append(row)
            on_row(row, one)
