"""A scheduler whose limits can change between two loads, for vLLM's engine core, and the file that tells it so.

The *server's* Python imports a copy of this file by name (`--scheduler-cls varcas_live_scheduler.make`), with nothing
of varcas beside it: standard library, and vLLM once the engine asks. Made for vLLM 0.24 and 0.32; `Limiter` looks for
what it needs and leaves any other version alone, saying so. `live_server.py` is the owner's side.

While a request runs or waits, limits stay as they are: vLLM 0.24 admits while `len(running) == max_num_running_reqs`
is false, so that a lower limit would then admit without any. They never rise above those of the start, for which the
engine sized its buffers and graphs.
"""

from __future__ import annotations

import importlib
import mmap
import os
import struct
from typing import Any

VARIABLE = "VARCAS_LIVE_FILE"
"""Names the file in the server's environment."""
SIZE = 512
_WANTED, _ECHO, _START, _STATE = 0, 64, 128, 192
"""Where each part begins: what is wanted, what was applied, the start's own limits, whether any of it works."""
_NUMBERS = struct.Struct("<Qqq")
_WORDS = struct.Struct("<II300s")
UNKNOWN, LIVE, REFUSED = range(3)
SCHEDULED = "max_num_scheduled_tokens"
ADMITTED = ("max_num_active_reqs", "max_num_running_reqs")
"""What limits admission: vLLM 0.32 has the first, beside the second, which there counts the runner's slots."""


class LiveFile:
    """The mapping, as both sides see it. A limit of 0 is the start's own.

    Nothing is locked: the owner writes while nothing is asked of the server, and then sends it a request.
    """

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)

    @staticmethod
    def make(path: str) -> LiveFile:
        """Makes the file, empty."""
        with open(path, "xb") as file:
            file.truncate(SIZE)
        return LiveFile(path)

    def ask(self, generation: int, seqs: int, tokens: int) -> None:
        """Owner: wants these limits from the next request that finds the server idle; generations count from 1."""
        _NUMBERS.pack_into(self._map, _WANTED, generation, seqs, tokens)

    def wanted(self) -> tuple[int, int, int]:
        """Server: generation, sequences, tokens."""
        return _NUMBERS.unpack_from(self._map, _WANTED)

    def echo(self, generation: int, seqs: int, tokens: int) -> None:
        """Server: these are in force now."""
        _NUMBERS.pack_into(self._map, _ECHO, generation, seqs, tokens)

    def applied(self) -> tuple[int, int, int]:
        """Owner: generation, sequences, tokens that are in force; generation 0 before any."""
        return _NUMBERS.unpack_from(self._map, _ECHO)

    def begin(self, seqs: int, tokens: int) -> None:
        """Server: it can change limits, and started with these."""
        _NUMBERS.pack_into(self._map, _START, 0, seqs, tokens)
        _WORDS.pack_into(self._map, _STATE, LIVE, 0, b"")

    def refuse(self, why: str) -> None:
        """Server: it cannot."""
        words = why.encode()[:300]
        _WORDS.pack_into(self._map, _STATE, REFUSED, len(words), words)

    def started(self) -> tuple[int, int]:
        """Owner: sequences and tokens that the server started with."""
        _, seqs, tokens = _NUMBERS.unpack_from(self._map, _START)
        return seqs, tokens

    def state(self) -> tuple[int, str]:
        """Owner: `UNKNOWN` until the scheduler was made, then `LIVE`, or `REFUSED` and why."""
        state, length, words = _WORDS.unpack_from(self._map, _STATE)
        return state, words[:length].decode(errors="replace")


class Limiter:
    """Lays the wanted limits on one scheduler.

    Args:
        scheduler: vLLM's.
        file: where they are asked for and echoed.
    """

    def __init__(self, scheduler: Any, file: LiveFile) -> None:
        self._scheduler, self._file, self._generation = scheduler, file, 0
        self._admitted = next((name for name in ADMITTED if hasattr(scheduler, name)), ADMITTED[-1])
        self._problem = self._lacks()
        if self._problem:
            file.refuse(self._problem)
            return
        self._start = (getattr(scheduler, self._admitted), getattr(scheduler, SCHEDULED))
        file.begin(*self._start)

    def apply(self) -> None:
        """To be called before a request is taken up: costs 1 us unless something new is wanted."""
        generation, *wanted = self._file.wanted()
        if generation == self._generation or self._problem or not self._is_idle():
            return
        limits = [min(want, most) if want else most for want, most in zip(wanted, self._start, strict=True)]
        for name, limit in zip((self._admitted, SCHEDULED), limits, strict=True):
            setattr(self._scheduler, name, limit)
        self._generation = generation
        self._file.echo(generation, getattr(self._scheduler, self._admitted), getattr(self._scheduler, SCHEDULED))

    def _is_idle(self) -> bool:
        return not self._scheduler.get_num_unfinished_requests() and not self._scheduler.running

    def _lacks(self) -> str:
        """What this version's scheduler has not, in words; empty when it has all."""
        scheduler = self._scheduler
        missing = [name for name in (self._admitted, SCHEDULED) if not isinstance(getattr(scheduler, name, None), int)]
        if not isinstance(getattr(scheduler, "running", None), list):
            missing.append("running")
        if not callable(getattr(scheduler, "get_num_unfinished_requests", None)):
            missing.append("get_num_unfinished_requests()")
        return f"its scheduler has no {', no '.join(missing)}" if missing else ""


def make(*args: Any, **kwargs: Any) -> Any:
    """The scheduler that vLLM would take by itself, which limits then follow the file; what `--scheduler-cls` names."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    kind = "async_scheduler.AsyncScheduler" if config.scheduler_config.async_scheduling else "scheduler.Scheduler"
    module, _, name = f"vllm.v1.core.sched.{kind}".rpartition(".")
    base: Any = getattr(importlib.import_module(module), name)
    return live_class(base)(*args, **kwargs)


def live_class(base: Any) -> Any:
    """A subclass of one of vLLM's schedulers that asks the file before it takes up a request."""

    class LiveScheduler(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._varcas_limiter = Limiter(self, LiveFile(os.environ[VARIABLE]))

        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            self._varcas_limiter.apply()
            return super().add_request(request, *args, **kwargs)

    return LiveScheduler
