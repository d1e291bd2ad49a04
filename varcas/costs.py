"""What one more server start costs: what starts share, they pay once. Pure.

| shared | by starts with the same | paid again by |
|---|---|---|
| the model's files on a node | model and revision | the first start of a node: no proposal changes it |
| vLLM's compile cache | flags that shape the compiled graphs | the first start of each `compile_key` |
| a running server | everything but live limits and the load | nothing: it is there |

Which flags do not shape the graphs was read from vLLM's `compute_hash` methods (0.24 and 0.32: config/*.py) and seen on
an H100 (docs of research: 23-36 s of compilation for each new `max_num_seqs`, `max_num_batched_tokens` or data type; a
hit with prefix caching or chunked prefill switched). A flag that is not named here is held to shape them: a start that
is thought dearer than it is costs nothing but order.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from varcas.records import TrialRow

NOT_COMPILED = frozenset(
    {
        "api_server_count", "async_scheduling", "disable_log_stats", "enable_chunked_prefill",
        "enable_prefix_caching", "generation_config", "gpu_memory_utilization", "kv_cache_memory_bytes",
        "long_prefill_token_threshold", "max_num_active_seqs", "max_num_partial_prefills",
        "max_num_scheduled_tokens", "num_gpu_blocks_override", "scheduling_policy", "seed", "swap_space",
    }
)  # fmt: skip
COMPILE_S = 30.0
"""Of a compilation, while none was seen (research/orchestration.md: 23-36 s on an H100)."""


def compile_key(flags: Mapping[str, JsonValue]) -> str | None:
    """The same for configurations that share compiled graphs; None where nothing is compiled."""
    if flags.get("enforce_eager") is True:
        return None
    shaping = {name: value for name, value in flags.items() if name not in NOT_COMPILED and value is not None}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class StartCosts:
    """Seconds from a proposal to its measurement.

    Attributes:
        start_s: of a start that compiles nothing.
        compile_s: on top, where it does.
        load_s: of a measurement.
        compiled: keys whose graphs lie in the cache.
    """

    start_s: float
    compile_s: float
    load_s: float
    compiled: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[TrialRow], *, start_s: float, load_s: float) -> StartCosts:
        """From what a store has seen of this machine.

        Args:
            rows: measured here with this version.
            start_s: while there is none.
            load_s: of one measurement, as planned.
        """
        done = [row for row in rows if row.state == "complete" and row.server_start_s]
        keys = {key for row in done if (key := compile_key(row.config_flags)) is not None}
        compiling = [row.compile_s for row in done if row.compile_s and row.compile_cache_hit is False]
        whole = [(row.server_start_s or 0.0) - _compiled_s(row) for row in done]
        return cls(
            statistics.median(whole) if whole else start_s,
            statistics.median(compiling) if compiling else COMPILE_S,
            load_s,
            frozenset(keys),
        )

    def fresh_s(self, flags: Mapping[str, JsonValue]) -> float:
        """Of a server of its own: start, compilation where its graphs are not there, measurement."""
        key = compile_key(flags)
        return self.start_s + self.load_s + (0.0 if key is None or key in self.compiled else self.compile_s)


def _compiled_s(row: TrialRow) -> float:
    return row.compile_s or 0.0 if row.compile_cache_hit is False else 0.0
