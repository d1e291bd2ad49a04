"""Work for the pool's tests: top-level functions, so that Ray pickles them by reference."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any


def where(payload: Any, cancelled: threading.Event) -> tuple[Any, str, int]:
    time.sleep(0.05)
    return payload, os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getpid()


def die(payload: Any, cancelled: threading.Event) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until_cancelled(payload: Any, cancelled: threading.Event) -> str:
    return "cancelled" if cancelled.wait(20) else "ran out"


def fail(payload: Any, cancelled: threading.Event) -> None:
    raise ValueError("a bug of ours")


class Counter:
    """A service."""

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, n: int) -> int:
        self.value += n
        return self.value

    def hang(self) -> None:
        time.sleep(60)

    def close(self) -> None:
        pass
