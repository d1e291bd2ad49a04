"""Trials that need no server, for tests of the sweeper on a real Ray; top-level, so that Ray pickles them."""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import replace
from pathlib import Path

from varcas.engine.node import Checked, NodeFacts
from varcas.errors import TrialError, VarcasError
from varcas.experiment import Server
from varcas.records import HostFacts, LoadResult, Outcome, RequestRecord, StageTimes
from varcas.trial import Done, Plan, Series, TrialTask


class EasyNode:
    """A node whose vLLM takes everything but `max_num_seqs: 3`."""

    def __init__(self, server: Server, model: str, revision: str | None) -> None:
        self.server = server

    def facts(self) -> NodeFacts:
        if self.server.env.get("BROKEN"):
            raise VarcasError("model: model_download: no network. Fix: check it.")
        return NodeFacts("1.0", "", "r", None, None)

    def flag_names(self) -> list[str]:
        return ["max_num_seqs", "tensor_parallel_size"]

    def check(self, argv: list[str], endpoint: str) -> Checked:
        if argv[-2:] == ["--max-num-seqs", "3"]:
            return Checked(ok=False, error="3 is odd", flag="max_num_seqs", stage="config")
        return Checked(ok=True, resolved={"argv": argv}, endpoint="chat")

    def close(self) -> None:
        pass


CONFIG = Path(__file__).parents[1] / "varcas" / "configs" / "llama-2-7b-awq" / "config.json"
T4_FACTS = NodeFacts(
    "0.32.0", "", "r", "Tesla T4", "550.54", gpu_memory_bytes=15 * 2**30, model_config=CONFIG.read_text()
)


class T4Node(EasyNode):
    """The same on a T4 with Llama-2-7B-AWQ, as far as the rules can know."""

    def facts(self) -> NodeFacts:
        return T4_FACTS

    def flag_names(self) -> list[str]:
        return ["max_num_seqs", "kv_cache_dtype"]


def outcome(tokens_per_s: int, **columns: object) -> Outcome:
    count, num = max(tokens_per_s // 10, 1), 20
    offsets = tuple(0.001 + 1.8 * i / count for i in range(count))
    records = tuple(
        RequestRecord(n, 0.004 * n, 0.004 * n, 0.004 * n + offsets[0], 0.004 * n + offsets[-1], 0.004 * n + offsets[-1],
                      5, count, 5, count, offsets, (1,) * count, "length", None, 200, n, 0)
        for n in range(num)
    )  # fmt: skip
    load = LoadResult(records, 0.0, 2.0, 0.0, 0.1)
    fixed: dict[str, object] = {"state": "complete", "load": load}
    return Outcome(
        started_at=datetime.datetime.now(datetime.UTC), host=HostFacts("h"), times=StageTimes(), **fixed | columns
    )  # type: ignore[arg-type]


def by_seqs(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """Throughput grows with `max_num_seqs`; 16 does not start."""
    time.sleep(0.2)
    seqs = int(str(task.config.flags.get("max_num_seqs", 1)))
    if seqs == 16:
        return outcome(1, state="failed", load=None, failure_kind="out_of_memory", failure_detail="CUDA out of memory")
    return outcome(100 + 10 * seqs)


def no_fp8(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """As a T4 really does: an fp8 KV cache is refused at the start."""
    if task.config.flags.get("kv_cache_dtype") == "fp8":
        words = "FP8 KV cache is not supported on Tesla T4"
        return outcome(1, state="failed", load=None, failure_kind="unsupported_by_gpu", failure_detail=words)
    return by_seqs(task, cancelled)


def lacks_files(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """No configuration starts."""
    return outcome(1, state="failed", load=None, failure_kind="bad_model_files", failure_detail="no weights found")


def ends_before_its_window(task: TrialTask, cancelled: threading.Event) -> Outcome:
    """A server that dies between warm-up and window."""
    empty = LoadResult((), 0.0, 0.0, 0.0, 0.0)
    error = TrialError("crashed_under_load", "gone")
    return outcome(1, state="failed", load=empty, failure_kind=error.kind, failure_detail=error.detail)


def by_capacity(task: TrialTask, cancelled: threading.Event, *, plan: Plan) -> Series:
    """A server that holds 10 requests/s for each of its `max_num_seqs`, and beyond is a second late."""
    holds_rps = 10.0 * int(str(task.config.flags.get("max_num_seqs", 1)))
    done: list[Done] = []
    while step := plan.next(tuple(done)):
        found = outcome(100)
        assert found.load is not None
        if (step.workload.rate_rps or 0) > holds_rps:
            late = tuple(replace(r, first_token_s=(r.first_token_s or 0) + 1) for r in found.load.records)
            found = replace(found, load=replace(found.load, records=late))
        done.append(Done(step, found))
    return Series(tuple(done))
