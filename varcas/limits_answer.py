"""What `varcas roofline` answers, as JSON: each figure exact, a bound or an estimate, as its description says."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.roofline import OpClass

ANSWER = ConfigDict(extra="forbid", frozen=True)
Bound = Literal["memory", "compute", "links"]
Phase = Literal["prefill", "decode"]
Verdict = Literal["fits", "too small", "cannot fit", "not told"]
CellVerdict = Literal["not told", "refused", "too small", "waits", "holds"]


class Spread(BaseModel):
    """Of a number over the workload's requests."""

    model_config = ANSWER
    mean: float
    p50: float
    p95: float
    max: float


class ModelFacts(BaseModel):
    """The model, exactly as its `config.json` says."""

    model_config = ANSWER
    name: str
    source: str = Field(description="where its config.json was found")
    own_copy: bool = Field(description="varcas's own dated copy was used: neither a directory nor the hub's own")
    parameters: int
    active_parameters: int
    quantisation: str | None


class WorkloadFacts(BaseModel):
    """The workload's lengths; null where only the server can count them."""

    model_config = ANSWER
    described: str
    requests: int
    prompt_tokens: Spread | None
    output_tokens: Spread | None
    shared_tokens: int = Field(description="the longest system prompt that requests share")
    decode_context: int | None = Field(
        description="tokens in a sequence's cache, mean over all decode steps; the least where the server decides"
    )
    asked_tokens_per_s: float | None = Field(description="output tokens a second of the rate asked for")


class MemoryStack(BaseModel):
    """Where one GPU's memory goes with the baseline, in bytes."""

    model_config = ANSWER
    verdict: Verdict = Field(
        description="`fits`, `too small`: estimates; `cannot fit`: a bound: weights and one sequence exceed the "
        "memory; `not told`: a flag is set that the estimates leave out (offloading, for one)"
    )
    total: int = Field(description="what CUDA calls total (within 0.5 %)")
    budget: int = Field(description="gpu_memory_utilization of it")
    weights: int = Field(description="exact, as vLLM logs them; of pipeline stages the mean")
    activations: int = Field(description="estimate: peak of a step")
    logits: int = Field(description="estimate: peak of sampling; never at once with activations")
    graphs: int = Field(description="estimate: CUDA graphs; 0 when eager")
    overhead: int = Field(description="estimate: libraries, collectives")
    kv_cache: int = Field(description="estimate: what is left; negative when nothing is")
    rest: int = Field(description="asked for by nobody: beyond the utilisation; 0 when nothing is left")
    kv_tokens: int = Field(description="estimate: `GPU KV cache size` that vLLM will report")
    kv_tokens_at_most: int | None = Field(
        description="bound: with all memory but packed weights, or the cache that is asked for; null: not known"
    )
    kv_bytes_per_token: float = Field(description="exact")
    full_sequences: float = Field(description="estimate: sequences of max_model_len that the KV cache holds")
    flags: dict[str, JsonValue] = Field(description="max_model_len, max_num_seqs, ... as vLLM resolves them")


class MemoryOf(BaseModel):
    """The memory of the baseline with one flag changed."""

    model_config = ANSWER
    label: str = Field(description="`baseline`, or what is changed of it")
    refused: str | None = Field(description="the hard rule that refuses it; null: none")
    memory: MemoryStack


class Point(BaseModel):
    """One step on the static roofline."""

    model_config = ANSWER
    phase: Phase
    batch: int
    tokens: int = Field(description="cached by each sequence; of a prefill: of the prompt")
    flops: float
    bytes: float
    intensity: float = Field(description="FLOP/byte")
    utilisation: float = Field(description="bound: share of peak FLOP/s")
    seconds: float = Field(description="bound: at least")
    bound: Bound


class ClassShare(BaseModel):
    """One operator class in one step."""

    model_config = ANSWER
    phase: Phase
    batch: int
    tokens: int
    operators: OpClass
    flops: float
    bytes: float
    intensity: float
    bound: Bound


class ComputeBound(BaseModel):
    """Where decode turns compute-bound."""

    model_config = ANSWER
    context: int
    batch: int | None = Field(description="least batch; null: at no batch, the KV cache's traffic forbids it")


class BoundsAt(BaseModel):
    """What no server beats with so many sequences in a step."""

    model_config = ANSWER
    batch: float = Field(description="of one engine; the bound of a space needs not be whole")
    possible: bool = Field(description="bound: the KV cache can hold the mean context of so many at once")
    tpot_ms: float = Field(description="bound: median over requests, at least")
    tokens_per_s: float = Field(description="bound: output tokens, prompts' work counted, at most")
    usd_per_m_tokens: float | None = Field(description="bound: at the list price, at least")
    joules_per_token: float | None = Field(description="estimate: at the power limit and that rate; no bound")


class Best(BoundsAt):
    """The best such bound over all configurations of the space that no hard rule refuses."""

    drafted: int = Field(description="tokens that a step drafts, every one accepted and free; 0: without speculation")

    flags: dict[str, JsonValue] = Field(description="that the bound is of, as far as they bear on it")
    max_rate_rps: float = Field(description="bound: requests a second of this workload, at most")


class Latency(BaseModel):
    """Least times of the workload's requests, each alone on the GPU, in ms.

    Where the server decides which requests come, every quantile is the least of all.
    """

    model_config = ANSWER
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float
    tpot_p95_ms: float


class SloBound(BaseModel):
    """An SLO against the least value that it can have with the baseline (`rules.bound_ms`)."""

    model_config = ANSWER
    key: str
    limit_ms: float
    least_ms: float | None = Field(description="bound, at the highest clocks; null: not known")


class BreakEven(BaseModel):
    """Share of drafted tokens that must be accepted for speculative decoding to pay, both at their roofline."""

    model_config = ANSWER
    method: str
    num_speculative_tokens: int
    batch: int
    context: int
    acceptance: float | None = Field(description="null: it cannot pay")


class RuleCount(BaseModel):
    """Configurations that one rule is the first to object to."""

    model_config = ANSWER
    rule: str
    count: int
    share: float
    message: str = Field(description="of one of them")
    flags: dict[str, JsonValue] = Field(description="of that one, over `serve`")
    source: str
    evidence: str = Field(description="where a real refusal was seen: cpu, gpu, source-only")


class Pruned(BaseModel):
    """What of the space the rules refuse (hard) and warn of (soft)."""

    model_config = ANSWER
    space_size: int | None = Field(description="null: continuous")
    judged: int = Field(description="all of it, or so many drawn")
    refused: int
    asked_for: int = Field(description="configurations of `study.enqueue` that no hard rule refuses")
    hard: list[RuleCount]
    soft: list[RuleCount] = Field(description="among those that no hard rule refuses")
    baseline: str | None = Field(description="what the rules say against the baseline, which is never pruned")
    nearest: str | None = Field(description="when all is refused, the baseline too: what comes nearest to working")


class Cell(BaseModel):
    """One point of the feasible region, the baseline's other flags kept."""

    model_config = ANSWER
    max_num_seqs: int
    max_model_len: int
    verdict: CellVerdict = Field(
        description="`refused`: a hard rule; `too small`: estimate, does not start; `waits`: estimate, starts, and "
        "sequences of full length wait for KV cache; `holds`: estimate, all have room"
    )
    sequences: float = Field(description="estimate: sequences of full length that the KV cache holds")


class MeasuredPoint(BaseModel):
    """Steps of one trial of the store that resemble each other, over the static roofline (`calibration.points`)."""

    model_config = ANSWER
    study: str
    number: int
    kind: str = Field(description="`decode`; `mixed` with prompts; `prefill`: a request alone; `mean` of a whole trial")
    batch: float
    context: float
    prefill_tokens: float
    intensity: float = Field(description="FLOP/byte, by the static roofline")
    flops_per_s: float = Field(description="measured")
    efficiency: float = Field(description="measured: share of the bound that was reached")
    kernel: str
    engine_version: str
    simulated: bool


class Interval(BaseModel):
    """An estimate with its 95 % interval; null where one start alone was measured."""

    model_config = ANSWER
    value: float | None = Field(description="null: grows as long as the load lasts")
    lo: float | None
    hi: float | None


class Attained(BaseModel):
    """Fitted shares of the peaks and overheads of one GPU, class of kernels and version (`calibration.Fit`)."""

    model_config = ANSWER
    kernel: str
    engine_version: str
    starts: int
    points: int
    figures: dict[str, Interval] = Field(description="of `steptime.Efficiency`")
    error_median: float | None = Field(description="each start predicted by the others; null with one start")
    simulated: bool
    words: str


class Expected(BaseModel):
    """Estimates for the baseline under the workload: never a bound, never a reason to refuse."""

    model_config = ANSWER
    basis: Literal["measured", "prior"] = Field(
        description="`prior`: nothing like it was measured; a guess with a range"
    )
    source: str
    tpot_ms: Interval
    ttft_ms: Interval
    tokens_per_s: Interval
    saturated: bool = Field(description="the rate is more than the server can take")
    beyond: list[str] = Field(description="in what it leaves what was measured")


class GpuRoofline(BaseModel):
    """One GPU."""

    model_config = ANSWER
    gpu: str
    asked: str = Field(description="the name it was asked for by; `ceiling` is the best of that name's variants")
    measured: bool = Field(description="a probed CPU: all bounds are estimates")
    gpus_per_server: int = Field(
        description="of the baseline: tensor x pipeline x data parallel; figures of memory are of one GPU"
    )
    units: str = Field(description="type of the units that do most of the baseline's matrices")
    peak_flops: float
    memory_bytes_per_s: float
    ridge: float = Field(description="FLOP/byte above which compute is the limit")
    usd_per_h: float | None
    unverified: list[str] = Field(description="figures of the catalogue that no second source confirmed")
    memory: MemoryStack
    memory_of: list[MemoryOf] = Field(description="the baseline, and what each flag of the space changes of it")
    decode: list[Point]
    prefill: list[Point] = Field(description="weights as stored, read once, nothing else counted: bounds")
    prefill_unfused: list[Point] = Field(
        description="estimate: 16-bit weights, and every matrix's input and output counted, as kernels that widen "
        "weights first and fuse nothing"
    )
    classes: list[ClassShare]
    compute_bound: list[ComputeBound]
    latency: Latency | None = Field(description="bound: without speculation")
    latency_drafted: Latency | None = Field(
        description="bound: the same with every draft accepted, of the most that the space drafts; null: it drafts none"
    )
    slo: list[SloBound]
    bounds: list[BoundsAt]
    best: Best | None = Field(description="bound: without speculation; null: nothing is left")
    best_drafted: Best | None = Field(description="bound: with every draft accepted; null: nothing left drafts")
    untold: int = Field(description="configurations left that no bound covers: a flag is set that is not described")
    speculation: list[BreakEven]
    pruned: Pruned
    region: list[Cell]
    measurements: list[MeasuredPoint]
    left_out: dict[str, int] = Field(description="rows of this model that tell nothing about steps, by reason")
    attained: list[Attained]
    expected: Expected | None


class Roofline(BaseModel):
    """What `varcas roofline` answers."""

    model_config = ANSWER
    experiment: str
    model: ModelFacts
    workload: WorkloadFacts
    engine_version: str | None = Field(description="whose rules were asked; null: those of no version")
    notes: list[str]
    gpus: list[GpuRoofline]

    @property
    def has_answer(self) -> bool:
        """On some GPU some configuration of the space, or one that `study.enqueue` asks for, is left."""
        said = [gpu.pruned for gpu in self.gpus]
        return any(some.refused < some.judged or some.asked_for or not some.judged for some in said)
