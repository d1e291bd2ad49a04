"""What flows between the stages: a scheduled request, its record, a sample, a measurement, a trial's outcome, a row.

All times are seconds on CLOCK_MONOTONIC of the host that ran the load, counted from the start of the measurement's
window (`t0`): a warm-up has negative times, a drained request ends after `duration_s`.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

MEASUREMENT_VERSION = 2
"""Raised when a number is computed differently (CHANGELOG, *Measurement*); rows of two versions are never compared."""

State = Literal["complete", "failed", "infeasible", "stopped"]
Purpose = Literal["baseline", "search", "audit", "confirm", "ablate", "load", "batch_size", "capacity"]
APART = frozenset({"confirm", "ablate"})
"""Purposes of starts that come after the search, of what it found: they choose no winner."""
ASIDE = frozenset({"batch_size", "capacity", "load"})
"""Purposes of rows that answer a question of their own: no search counts or recommends them."""
LATENCIES = ("ttft", "tpot", "itl", "e2e", "norm")
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "p99_9")
LATENCY_METRICS = tuple(f"{name}_{statistic}_ms" for name in LATENCIES for statistic in STATISTICS)
RATE_METRICS = ("output_tokens_per_s", "request_rate_rps", "goodput_rps", "goodput_tokens_per_s")
SENT_STATISTICS = ("mean", "p50", "p95", "p99")
PERMILLE = {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99_9": 999}
"""Statistic to its rank in thousandths: integers, so that no rank depends on a rounding error."""

MAX_EXCESS = 100.0
"""Largest value of a constraint: an infinite latency is 101 times its limit, and Optuna's sums stay finite."""

SLO_PRESETS: dict[str, dict[str, float]] = {
    "mlperf-llama2-70b": {"ttft_p99_ms": 2000.0, "tpot_p99_ms": 200.0},
    "mlperf-llama2-70b-interactive": {"ttft_p99_ms": 450.0, "tpot_p99_ms": 40.0},
    "mlperf-llama3.1-8b": {"ttft_p99_ms": 2000.0, "tpot_p99_ms": 100.0},
    "mlperf-llama3.1-8b-interactive": {"ttft_p99_ms": 500.0, "tpot_p99_ms": 30.0},
}
"""MLPerf Inference's limits for its server and interactive scenarios, by the name that `slo:` may give instead."""


def split_key(key: str) -> tuple[str, str]:
    """`ttft_p99_9_ms` is (`ttft`, `p99_9`)."""
    name, _, rest = key.removesuffix("_ms").partition("_")
    return name, rest


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One arrival, known before the load starts.

    Attributes:
        index: position in the schedule, from 0.
        at_s: when it is due, in seconds from the start of the window, a whole number of microseconds. With `after` it
            is due `gap_s` after that one's end, and `at_s` is that one's own.
        prompt_tokens: length of the prompt in the server's own tokens, chat template included.
        output_tokens: tokens to generate; `ignore_eos` makes the server give exactly these.
        seed: of the prompt's words: the same seed and length give the same text.
        conversation: which conversation it belongs to (a single-turn request is its own).
        turn: its place in that conversation, from 0. A later turn's prompt is what is new in it; the history, with the
            answers that the server really gave, goes before it.
        after: index of the request whose end it waits for (the turn before, or a closed loop's user's last one); None:
            `at_s` rules.
        gap_s: pause after that end.
        prefix_seed: of the words of a system prompt that requests share; None without one.
        prefix_tokens: length of that system prompt, which is part of `prompt_tokens`.
        prompt: a prompt of one's own, to be sent as it is; `prompt_tokens` is then what the server counts.
        system: a system prompt of one's own, in the same way.
        answer: the answer that was once given: `output_tokens` is then what the server counts in it.
        blocks: ids of the prompt's blocks of 512 tokens: prompts whose first ids agree begin alike.
    """

    index: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    seed: int
    conversation: int
    turn: int = 0
    after: int | None = None
    gap_s: float = 0.0
    prefix_seed: int | None = None
    prefix_tokens: int = 0
    prompt: str | None = None
    system: str | None = None
    answer: str | None = None
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompted:
    """A scheduled request with its words.

    Attributes:
        request: lengths as the server counts them; what its words were made from is left out.
        text: what the user says; through the completions endpoint `system` and a space go before it.
        system: the system prompt; None without one, and in a later turn, in whose history it stands.
    """

    request: ScheduledRequest
    text: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One row per request that came due: those that failed, were never sent and never finished too.

    A later turn of a conversation that broke never comes due, and has none.

    Attributes:
        index: of its `ScheduledRequest`.
        scheduled_s: when it was due.
        sent_s: when its first byte was handed to the kernel; None when it was never sent.
        first_token_s: when the first token arrived (a role-only chunk is not a token).
        last_token_s: when the last token arrived.
        end_s: when the response ended, or the attempt was given up.
        scheduled_prompt_tokens: as the schedule has it.
        scheduled_output_tokens: as the schedule has it.
        prompt_tokens: as the server's `usage` counts them; None without an answer.
        output_tokens: as the server's `usage` counts them, else those that were seen arriving.
        token_offsets_s: arrival of each token-bearing event after `sent_s`, in order.
        token_counts: tokens in each of those events (1, but for speculative decoding and merged outputs).
        finish_reason: `length`, `stop`, ...; None when unfinished.
        error: what went wrong in one line; None when the request is good; `unfinished` when the drain ran out.
        http_status: of the response; None when there was none.
        conversation: as scheduled.
        turn: as scheduled.
        counting: what told the tokens of each event, as `wire.Answer` has it; `events` when the server counted none.
    """

    index: int
    scheduled_s: float
    sent_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    end_s: float | None
    scheduled_prompt_tokens: int
    scheduled_output_tokens: int
    prompt_tokens: int | None
    output_tokens: int
    token_offsets_s: tuple[float, ...]
    token_counts: tuple[int, ...]
    finish_reason: str | None
    error: str | None
    http_status: int | None
    conversation: int
    turn: int
    counting: str | None = None

    @property
    def ok(self) -> bool:
        """The response came whole and without an error."""
        return self.error is None and self.end_s is not None


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended while its load still runs; the fields are those of its `RequestRecord`."""

    index: int
    scheduled_s: float
    first_token_s: float | None
    last_token_s: float | None
    output_tokens: int
    ok: bool


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """Why a load ended before its window did.

    Attributes:
        kind: an SLO is lost for certain, or the incumbent is out of reach.
        text: in words, with figures.
        at_s: when, from the start of the window.
        bounds: `slo`: each limit's least excess (value / limit - 1); `beaten`: the metric's upper bound.
    """

    kind: Literal["slo", "beaten"]
    text: str
    at_s: float
    bounds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the server's `/metrics` and at the GPU (of several GPUs: sums for memory and power, worst else)."""

    t_s: float
    num_requests_running: float | None = None
    num_requests_waiting: float | None = None
    kv_cache_usage_frac: float | None = None
    preemptions: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_cache_queries: float | None = None
    prefix_cache_hits: float | None = None
    server_ttft_sum_s: float | None = None
    server_ttft_count: float | None = None
    server_itl_sum_s: float | None = None
    server_itl_count: float | None = None
    server_e2e_sum_s: float | None = None
    server_e2e_count: float | None = None
    gpu_power_w: float | None = None
    gpu_memory_used_bytes: float | None = None
    gpu_sm_clock_mhz: float | None = None
    gpu_temperature_c: float | None = None
    gpu_util_frac: float | None = None
    gpu_throttled: bool | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one load gave.

    Attributes:
        records: one per scheduled request, in schedule order.
        t0_monotonic_s: the window's start on CLOCK_MONOTONIC, to lay samples over records.
        duration_s: the window.
        drain_s: time spent after the window until the last response or `max_drain_s`.
        client_cpu_frac: CPU seconds of the busiest load process over the window, per second (1.0 is one core full).
        clients: load processes.
        kernel_stamped_frac: share of receives whose time is the kernel's stamp; the others' is the client's own.
        num_left_out: requests that were never sent: the server's context does not hold them, or, in a trace, they ask
            nothing.
    """

    records: tuple[RequestRecord, ...]
    t0_monotonic_s: float
    duration_s: float
    drain_s: float
    client_cpu_frac: float
    clients: int = 1
    kernel_stamped_frac: float = 1.0
    num_left_out: int = 0


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Wall seconds of a trial's stages; `overhead_s` is what none of the others holds."""

    fetch_s: float = 0.0
    cooldown_s: float = 0.0
    server_start_s: float = 0.0
    warmup_s: float = 0.0
    load_s: float = 0.0
    drain_s: float = 0.0
    stop_s: float = 0.0
    overhead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a started server is, in its own words."""

    engine_version: str | None = None
    resolved: dict[str, Any] = field(default_factory=dict)
    kv_cache_tokens: int | None = None
    compile_s: float | None = None
    compile_cache_hit: bool | None = None
    model_revision: str | None = None


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Where a trial ran."""

    host: str
    gpu_name: str | None = None
    gpu_count: int = 0
    driver_version: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker hands back for one measurement of a server start; a failure is an outcome too.

    `started_at` is UTC. `load` is None when the load never ran; a load cut short keeps what it measured. `live`: the
    server's limits could change while it ran.
    """

    state: State
    started_at: datetime.datetime
    host: HostFacts
    times: StageTimes
    facts: ServerFacts = field(default_factory=ServerFacts)
    load: LoadResult | None = None
    samples: tuple[Sample, ...] = ()
    failure_kind: str | None = None
    failure_detail: str | None = None
    log_path: str | None = None
    early_stop: EarlyStop | None = None
    live: bool = False


def _doc(text: str) -> Any:
    return Field(default=None, description=text)


class TrialRow(BaseModel):
    """One measurement: a row of `results/trials`. Columns are only ever added."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    trial_id: str = Field(description="hash of `trial_key`, purpose and attempt: the same measurement, the same id")
    trial_key: str = Field(
        description="hash of model and revision, hardware, engine and version, environment, configuration, workload, "
        "seed, live or fresh, measurement version: rows with one key measured the same thing"
    )
    study: str = Field(description="the experiment's `name`")
    number: int = Field(description="running number within the study, from 0, in the order of proposal")
    server_id: str = Field(description="which server start; the unit of replication")
    purpose: Purpose = Field(
        description="why it was run: `baseline`, `search`, `audit` (the rules rule it out: run to test them), "
        "`confirm`, `ablate` (a flag of the winner put back, named by `arm`), `load` of an endpoint that ran already, "
        "`batch_size` or `capacity` (a point of such a curve)"
    )
    arm: str | None = _doc("of a confirmation start: `baseline` or `candidate`")
    attempt: int = Field(default=0, description="0 for the first start of this configuration, then 1, 2, ...")
    state: State = Field(description="`complete`, `failed`, `infeasible` (pruned before a start) or `stopped`")
    failure_kind: str | None = _doc("one of the failure kinds; null when complete")
    failure_detail: str | None = _doc("the log line that says so, or the reason in words")
    failure_hint: str | None = _doc("what to do about it")
    reason_rule: str | None = _doc("name of the rule that pruned it; null when it was started")
    audited_rule: str | None = _doc("name of the rule that rules it out, though it was started: an audit, the baseline")

    config_json: str = Field(description="every flag of the configuration, as JSON")
    config_hash: str = Field(description="content hash of the flags")
    params_json: str = Field(default="{}", description="what the search proposed, as JSON")
    flags: dict[str, str] = Field(default_factory=dict, description="flag name to its value as JSON text")
    command: str | None = _doc("the command that starts this server, shell-quoted")
    resolved_json: str | None = _doc("the engine's settings as vLLM resolved them, as JSON")
    env_json: str = Field(default="{}", description="the server's environment as the experiment sets it, as JSON")

    model: str = Field(description="as the experiment names it")
    model_revision: str | None = _doc("commit of the snapshot, or content hash of the directory's configuration")
    engine: str = Field(description="`vllm`; `openai`: an endpoint that ran already")
    endpoint_url: str | None = _doc("of an endpoint that ran already (`varcas load`)")
    engine_version: str | None = _doc("version the server reports")
    simulated: bool = Field(default=False, description="true when no real server was measured")
    measured_live: bool = Field(default=False, description="true when a setting was changed on a running server")
    measurement_version: int = Field(default=MEASUREMENT_VERSION, description="of the definitions behind the numbers")
    host: str | None = _doc("where it ran")
    gpu_name: str | None = _doc("as NVML names it; null on a CPU")
    gpu_count: int | None = _doc("GPUs the server had")
    driver_version: str | None = _doc("of the GPU")

    workload_json: str = Field(description="the workload, as JSON")
    profile: str = Field(description="the workload's profile")
    rate_rps: float | None = _doc("requests per second asked for")
    duration_s: float | None = _doc("length of the measured window")
    seed: int | None = _doc("of the workload")
    started_at: datetime.datetime = Field(description="UTC, when the worker took the trial up")

    valid: bool | None = _doc("false when the measurement is not to be believed; null when nothing was measured")
    invalid_reasons: list[str] = Field(default_factory=list, description="why not")
    warnings: list[str] = Field(default_factory=list, description="what is odd about it, without making it invalid")
    saturated: bool | None = _doc("the server could not hold the rate: ranked by throughput, never by latency")
    warm_from: str | None = _doc("study and number of the row that this is a copy of: measured there, and counted here")
    stopped_early: str | None = _doc(
        "why its load was ended before the window was over: an SLO was lost for certain (`constraints` then holds the "
        "least excess of each limit), or the best configuration so far was out of reach"
    )
    fetch_s: float | None = _doc("getting the model onto this node; 0 once it is there")
    cooldown_s: float | None = _doc("waiting for the GPU to cool before the start; no overhead")
    server_start_s: float | None = _doc("spawn to the first real completion")
    compile_s: float | None = _doc("torch.compile and graph capture, as the server's log says")
    compile_cache_hit: bool | None = _doc("the compiled graphs came from the cache")
    warmup_s: float | None = _doc("fitting prompts and warming up")
    load_s: float | None = _doc("the measured window")
    drain_s: float | None = _doc("after the window, until the last response or `max_drain_s`")
    stop_s: float | None = _doc("stopping the server until its memory and port were free")
    overhead_s: float | None = _doc("wall time of the trial that none of the stages holds")

    num_requests: int | None = _doc("scheduled in the window")
    num_completed: int | None = _doc("answered whole, drain included")
    num_failed: int | None = _doc("refused, broken or timed out")
    num_unfinished: int | None = _doc("still running when the drain ended")
    output_tokens_per_s: float | None = _doc("output tokens that arrived in the window, per second of it")
    output_tokens_per_s_lo: float | None = _doc("lower end of the 95 % interval within this start")
    output_tokens_per_s_hi: float | None = _doc("upper end of it")
    output_tokens_per_s_drained: float | None = _doc("all output tokens, per second of window and drain")
    output_tokens_per_s_steady: float | None = _doc("the same as `output_tokens_per_s`, from `ramp_s` on")
    ramp_s: float | None = _doc(
        "how long the empty server took to fill: p90 of the first 10 answers' time; null beyond half the window"
    )
    prompt_tokens_per_s: float | None = _doc(
        "prompt tokens of requests whose first token arrived in the window, per second"
    )
    request_rate_rps: float | None = _doc("requests completed in the window, per second")
    request_rate_rps_drained: float | None = _doc("requests of the window answered, per second of window and drain")
    sustainable_rps: float | None = _doc(
        "requests completed per second after the ramp-up, when saturated: what the server can take; null otherwise"
    )
    goodput_rps: float | None = _doc("requests of the window that met every per-request SLO limit, per second")
    goodput_tokens_per_s: float | None = _doc("output tokens of these requests, per second")
    capacity_rps: float | None = _doc("highest rate that meets the SLO")
    delivered_rate_rps: float | None = _doc("requests sent per second of the window")
    send_lag_p99_ms: float | None = _doc("sent minus scheduled, 99th percentile")
    client_cpu_frac: float | None = _doc("CPU of the load's process, 1.0 is one core")
    ttft_mean_ms: float | None = _doc("time to first token from the scheduled arrival")
    ttft_p50_ms: float | None = None
    ttft_p90_ms: float | None = None
    ttft_p95_ms: float | None = None
    ttft_p99_ms: float | None = None
    ttft_p99_9_ms: float | None = None
    ttft_sent_mean_ms: float | None = _doc("time to first token from the send")
    ttft_sent_p50_ms: float | None = None
    ttft_sent_p95_ms: float | None = None
    ttft_sent_p99_ms: float | None = None
    tpot_mean_ms: float | None = _doc("(last token - first token) / (output tokens - 1), per request")
    tpot_p50_ms: float | None = None
    tpot_p90_ms: float | None = None
    tpot_p95_ms: float | None = None
    tpot_p99_ms: float | None = None
    tpot_p99_9_ms: float | None = None
    itl_mean_ms: float | None = _doc("time between successive token events")
    itl_p50_ms: float | None = None
    itl_p90_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    itl_p99_9_ms: float | None = None
    e2e_mean_ms: float | None = _doc("scheduled arrival to last token")
    e2e_p50_ms: float | None = None
    e2e_p90_ms: float | None = None
    e2e_p95_ms: float | None = None
    e2e_p99_ms: float | None = None
    e2e_p99_9_ms: float | None = None
    e2e_sent_mean_ms: float | None = _doc("send to last token")
    e2e_sent_p50_ms: float | None = None
    e2e_sent_p95_ms: float | None = None
    e2e_sent_p99_ms: float | None = None
    norm_mean_ms: float | None = _doc("normalised latency: end-to-end / output tokens, per request")
    norm_p50_ms: float | None = None
    norm_p90_ms: float | None = None
    norm_p95_ms: float | None = None
    norm_p99_ms: float | None = None
    norm_p99_9_ms: float | None = None
    lo: dict[str, float] = Field(
        default_factory=dict, description="column to the lower end of its 95 % interval within this start"
    )
    hi: dict[str, float] = Field(
        default_factory=dict, description="column to the upper end of it; left out where nothing bounds it"
    )
    interval_unreliable: list[str] = Field(
        default_factory=list, description="columns whose interval rests on too few independent stretches, or is missing"
    )
    server_ttft_mean_ms: float | None = _doc("by the server's own histogram, over window and drain")
    server_itl_mean_ms: float | None = _doc("the same of time between tokens")
    server_e2e_mean_ms: float | None = _doc("the same of end-to-end latency")

    constraints: dict[str, float] = Field(
        default_factory=dict, description="SLO key to value / limit - 1; feasible when all are at most 0"
    )
    slo_met: bool | None = _doc("every constraint holds; null without an SLO or a measurement")
    kv_cache_tokens: int | None = _doc("tokens the KV cache holds, as the server says")
    preemptions: int | None = _doc("within the window and its drain")
    prefix_cache_hit_frac: float | None = _doc("hit tokens over queried tokens in the window and its drain")
    energy_j: float | None = _doc("GPU energy over the window")
    usd_per_m_output_tokens: float | None = _doc("from the GPU's price, where the catalogue has one")
    power_w: float | None = _doc("mean over the window")
    gpu_memory_used_bytes: int | None = _doc("largest seen")
    sm_clock_mhz: float | None = _doc("median over the window")
    temperature_c: float | None = _doc("largest seen")
    throttle_frac: float | None = _doc("share of samples with a throttle reason other than idle")
    log_path: str | None = _doc("the server's log")

    @property
    def is_believed(self) -> bool:
        """Measured whole, and to be believed."""
        return self.state == "complete" and self.valid is not False

    @property
    def config_flags(self) -> dict[str, JsonValue]:
        """`config_json`: the flags it was started with, with their values."""
        flags: dict[str, JsonValue] = json.loads(self.config_json)
        return flags
