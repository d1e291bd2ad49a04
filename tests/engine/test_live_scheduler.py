"""Limits that change on a running server: only when idle, never above the start's, echoed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from varcas.engine.live_scheduler import LIVE, REFUSED, UNKNOWN, VARIABLE, Limiter, LiveFile, live_class
from varcas.engine.live_server import LiveServer, NotLiveError
from varcas.inner import Limits


@dataclass
class Old:
    """vLLM 0.24's scheduler, as far as limits go."""

    max_num_running_reqs: int = 8
    max_num_scheduled_tokens: int = 2048
    running: list[int] = field(default_factory=list)
    waiting: int = 0

    def get_num_unfinished_requests(self) -> int:
        return len(self.running) + self.waiting


@dataclass
class New(Old):
    """vLLM 0.32's: slots of the runner and admitted requests are two numbers."""

    max_num_active_reqs: int = 8


def files(tmp_path: Path) -> tuple[LiveFile, LiveFile]:
    """Owner's and server's view of one file."""
    path = str(tmp_path / "limits")
    return LiveFile.make(path), LiveFile(path)


@pytest.mark.parametrize(("scheduler", "name"), [(Old(), "max_num_running_reqs"), (New(), "max_num_active_reqs")])
def test_limits_are_applied_and_echoed(tmp_path: Path, scheduler: Any, name: str) -> None:
    owner, server = files(tmp_path)
    assert owner.state()[0] == UNKNOWN
    limiter = Limiter(scheduler, server)
    assert owner.state() == (LIVE, "")
    assert owner.started() == (8, 2048)
    owner.ask(1, 2, 512)
    assert owner.applied()[0] == 0  # not before a request comes
    limiter.apply()
    assert owner.applied() == (1, 2, 512)
    assert (getattr(scheduler, name), scheduler.max_num_scheduled_tokens) == (2, 512)
    if name == "max_num_active_reqs":
        assert scheduler.max_num_running_reqs == 8  # slots of the runner stay
    owner.ask(2, 0, 0)
    limiter.apply()
    assert owner.applied() == (2, 8, 2048)  # 0: the start's own


@pytest.mark.parametrize("busy", [{"running": [1]}, {"waiting": 1}])
def test_nothing_changes_while_a_request_runs_or_waits(tmp_path: Path, busy: dict[str, Any]) -> None:
    owner, server = files(tmp_path)
    scheduler = New(**busy)
    limiter = Limiter(scheduler, server)
    owner.ask(1, 2, 0)
    limiter.apply()
    assert owner.applied()[0] == 0
    assert scheduler.max_num_active_reqs == 8
    scheduler.running, scheduler.waiting = [], 0
    limiter.apply()
    assert owner.applied() == (1, 2, 2048)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5000), st.booleans()), max_size=12))
def test_limits_never_pass_those_of_the_start(tmp_path: Path, asked: list[tuple[int, int, bool]]) -> None:
    path = tmp_path / "limits"
    path.unlink(missing_ok=True)
    owner = LiveFile.make(str(path))
    scheduler = New()
    limiter = Limiter(scheduler, LiveFile(str(path)))
    in_force = (8, 2048)
    for generation, (seqs, tokens, idle) in enumerate(asked, 1):
        owner.ask(generation, seqs, tokens)
        scheduler.running = [] if idle else [1]
        limiter.apply()
        in_force = (min(seqs or 8, 8), min(tokens or 2048, 2048)) if idle else in_force
        assert (scheduler.max_num_active_reqs, scheduler.max_num_scheduled_tokens) == in_force


@pytest.mark.parametrize("missing", ["max_num_scheduled_tokens", "running", "get_num_unfinished_requests"])
def test_a_scheduler_of_another_version_is_left_alone(tmp_path: Path, missing: str) -> None:
    owner, server = files(tmp_path)
    scheduler = New()
    setattr(scheduler, missing, None)
    limiter = Limiter(scheduler, server)
    state, why = owner.state()
    assert state == REFUSED
    assert missing in why
    owner.ask(1, 2, 512)
    limiter.apply()
    assert owner.applied()[0] == 0
    assert scheduler.max_num_active_reqs == 8


def test_the_class_asks_before_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Base(New):
        taken = 0

        def add_request(self, request: int) -> str:
            self.taken = self.max_num_active_reqs
            return f"took {request}"

    owner = LiveFile.make(str(tmp_path / "limits"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "limits"))
    scheduler = live_class(Base)()
    owner.ask(1, 3, 0)
    assert scheduler.add_request(7) == "took 7"
    assert scheduler.taken == 3


def test_no_echo_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varcas.engine.live_server.ECHO_S", 0.3)
    server = LiveServer(tmp_path)
    env = server.env({"PYTHONPATH": "/site"})
    assert env["PYTHONPATH"].split(":") == [str(tmp_path / "live"), "/site"]
    with pytest.raises(NotLiveError, match="not asked for"):
        server.apply(Limits(2), lambda: True, threading.Event())
    scheduler = New(running=[1])
    limiter = Limiter(scheduler, LiveFile(env[VARIABLE]))

    def poke() -> bool:
        limiter.apply()
        return True

    with pytest.raises(NotLiveError, match="no echo of max_num_seqs 2"):
        server.apply(Limits(2), poke, threading.Event())
    scheduler.running = []
    assert server.apply(Limits(2), poke, threading.Event()) == {"max_num_seqs": 2, "max_num_batched_tokens": 2048}
    with pytest.raises(NotLiveError, match="16 was asked for, and 8 sequences"):
        server.apply(Limits(16), poke, threading.Event())
