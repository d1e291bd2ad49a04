"""What a running server takes and what needs a fresh one, and what a live measurement is called once deployed. Pure.

vLLM's scheduler reads two limits at each step: how many sequences it admits, and how many tokens a step may hold. Both
can change on an idle server (`engine/live_scheduler.py`). A row must name a configuration that a fresh server can be
started with and that then behaves as measured:

- vLLM with `--max-num-active-seqs` and `--max-num-scheduled-tokens` (0.32) takes the very same limits at its start,
  beside the larger `--max-num-seqs` and `--max-num-batched-tokens` that buffers, memory and graphs are made for.
- Without them (0.24), `--max-num-seqs N` also decides the largest CUDA graph, min(2 N, 512) tokens
  (`vllm/config/vllm.py`): live and fresh are given the one of the largest N, explicitly. The KV cache, which is what
  memory is left after a profiling run with N sequences, still differs by what their activations take.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from varcas.experiment import Choices, Experiment, Range
from varcas.space import ServingConfig

LIVE_FLAGS = ("max_num_seqs", "max_num_batched_tokens")
LIMIT_OF = {"max_num_seqs": "max_num_active_seqs", "max_num_batched_tokens": "max_num_scheduled_tokens"}
"""Flag to the one that limits the same without a say in what is compiled, captured or reserved (vLLM 0.32)."""
CAPTURE = "max_cudagraph_capture_size"
CAPTURE_FLAGS = (CAPTURE, "cudagraph_capture_sizes", "compilation_config", "cuda_graph_sizes")
MAX_VALUES = 64
"""Of a range that is swept on a running server."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a running server is told; None: as it started."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None

    def __str__(self) -> str:
        named = [f"{name} {limit}" for name in LIVE_FLAGS if (limit := getattr(self, name)) is not None]
        return ", ".join(named) or "the start's own limits"


@dataclass(frozen=True, slots=True)
class Split:
    """A space, divided.

    Attributes:
        server: flags whose every value needs a server of its own.
        live: flag to its values, ascending, that one server can be measured with in turn.
        why_not: one of `LIVE_FLAGS` that is in the space and not live, to the reason.
    """

    server: tuple[str, ...]
    live: Mapping[str, tuple[int, ...]]
    why_not: Mapping[str, str]


def split(experiment: Experiment, flag_names: Collection[str]) -> Split:
    """Divides an experiment's space.

    Args:
        experiment: its space and fixed flags.
        flag_names: flags that the server's vLLM has.
    """
    live: dict[str, tuple[int, ...]] = {}
    why_not: dict[str, str] = {}
    for flag in LIVE_FLAGS:
        if flag not in experiment.space:
            continue
        problem = _entry_problem(experiment, flag, flag_names) or live_problem(experiment.serve, flag_names, (flag,))
        if problem:
            why_not[flag] = problem
        else:
            live[flag] = _values(experiment.space[flag])
    return Split(tuple(flag for flag in experiment.space if flag not in live), live, why_not)


def _entry_problem(experiment: Experiment, flag: str, flag_names: Collection[str]) -> str | None:
    """Why the values of a flag cannot be swept on one server, as far as the space tells."""
    entry = experiment.space[flag]
    if entry.when:
        return "its `when` ties it to other flags"
    bound = next((name for name, other in experiment.space.items() if flag in (other.when or {})), None)
    if bound is not None:
        return f"{bound} hangs on it (`when`)"
    if not (values := _values(entry)):
        return "its values are not a list of positive integers"
    if len(values) > MAX_VALUES:
        return f"it has {len(values)} values, more than {MAX_VALUES}"
    searched = [name for name in experiment.space if name in _PROBLEMS]
    if LIMIT_OF[flag] not in flag_names and searched:
        return f"{searched[0]} is searched too, with which this vLLM has no flag for the limit alone"
    return None


def _values(entry: Choices | Range) -> tuple[int, ...]:
    """Its values in order; none when one of them is no positive integer."""
    if isinstance(entry, Choices):
        values = entry.choices
    elif isinstance(entry.low, int) and isinstance(entry.high, int) and isinstance(entry.step or 1, int):
        values = list(range(entry.low, entry.high + 1, int(entry.step or 1)))
    else:
        return ()
    good = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0]
    return tuple(sorted(good)) if len(good) == len(values) else ()


_PROBLEMS = ("speculative_config", "data_parallel_size", "scheduler_cls")


def live_problem(
    flags: Mapping[str, JsonValue], flag_names: Collection[str], swept: Collection[str] = LIVE_FLAGS
) -> str | None:
    """Why a server of these flags cannot be measured with several limits in turn, in words; None when it can.

    Args:
        flags: of the configuration.
        flag_names: flags that its vLLM has.
        swept: those of `LIVE_FLAGS` that would change.
    """
    if "scheduler_cls" not in flag_names:
        return "this vLLM takes no `--scheduler-cls`"
    if flags.get("scheduler_cls") is not None:
        return "it has a scheduler class of its own"
    if flags.get("data_parallel_size") not in (None, 1):
        return "each of its data-parallel engines has a scheduler of its own"
    if flags.get("speculative_config") is not None and any(LIMIT_OF[flag] not in flag_names for flag in swept):
        return "with speculative decoding this vLLM derives other limits from these at its start"
    return None


@dataclass(frozen=True, slots=True)
class LiveStart:
    """One server start whose limits change.

    Attributes:
        config: what it is started with: the largest values.
        exact: the flags of vLLM that limit the same and nothing else.
    """

    config: ServingConfig
    exact: Mapping[str, str]

    def at(self, limits: Limits) -> ServingConfig:
        """The configuration that a fresh server takes to behave as this one does under `limits`."""
        named = {flag: limit for flag in LIVE_FLAGS if (limit := getattr(limits, flag)) is not None}
        changed = {self.exact.get(flag, flag): limit for flag, limit in named.items() if limit != self._own(flag)}
        return ServingConfig(self.config.model, self.config.revision, {**self.config.flags, **changed})

    def _own(self, flag: str) -> JsonValue:
        return self.config.flags.get(flag)


def live_start(
    config: ServingConfig,
    values: Mapping[str, Sequence[int]],
    flag_names: Collection[str],
    resolved: Mapping[str, Any],
) -> LiveStart:
    """The server on which values of `LIVE_FLAGS` are measured in turn.

    Args:
        config: the configuration without them.
        values: flag to its values.
        flag_names: flags that its vLLM has.
        resolved: what vLLM makes of `at_most(config, values)`.
    """
    exact = {flag: LIMIT_OF[flag] for flag in values if LIMIT_OF[flag] in flag_names}
    most = at_most(config, values)
    flags = {**most.flags, **_captured(most.flags, values, exact, resolved)}
    return LiveStart(ServingConfig(config.model, config.revision, flags), exact)


def at_most(config: ServingConfig, values: Mapping[str, Sequence[int]]) -> ServingConfig:
    """The configuration with the largest of each flag's values, and without what would limit them once more."""
    none = {LIMIT_OF[flag]: None for flag in values}
    flags = {**config.flags, **none, **{flag: max(found) for flag, found in values.items()}}
    return ServingConfig(config.model, config.revision, flags)


def _captured(
    flags: Mapping[str, JsonValue], values: Collection[str], exact: Collection[str], resolved: Mapping[str, Any]
) -> dict[str, JsonValue]:
    """The largest CUDA graph, where `max_num_seqs` would decide it otherwise."""
    if "max_num_seqs" not in values or "max_num_seqs" in exact or any(flag in flags for flag in CAPTURE_FLAGS):
        return {}
    size = (resolved.get("compilation") or {}).get(CAPTURE)
    return {CAPTURE: size} if isinstance(size, int) and size > 0 and not flags.get("enforce_eager") else {}
