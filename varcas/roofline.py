"""The static roofline: work and traffic of prefill and decode by operator class, and the bounds that follow.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009): a step
takes at least `max(FLOPs / peak, bytes / bandwidth)`. Pure functions; batch and context may be arrays that broadcast.
All work and traffic is of one GPU; times are lower bounds, rates are upper bounds.

Bytes are the least that must cross memory once: weights that are used, cached keys and values read and written, and
with `activations=True` also every operator's input and output, which a fused kernel could keep on chip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from varcas.gpus import GpuSpec
from varcas.memory import Floats, Number, Serve, layer_kv_bytes
from varcas.model import DTYPE_BYTES, ModelSpec, Weight, dtype_name

OpClass = Literal["attention_projections", "attention_scores", "mlp", "moe", "logits", "other"]
OP_CLASSES: tuple[OpClass, ...] = ("attention_projections", "attention_scores", "mlp", "moe", "logits", "other")
_CLASS: dict[str, OpClass] = {
    "attention": "attention_projections", "mlp": "mlp", "moe": "moe", "logits": "logits", "embed": "other",
    "norm": "other",
}  # fmt: skip
Routing = Literal["one_set", "uniform"]
UNITS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""Type that vLLM computes in to the units that do it."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step, on one GPU.

    Attributes:
        flops: a multiplication and an addition are two.
        bytes: that cross the GPU's memory.
        dtype: of the units that do it.
    """

    flops: Floats
    bytes: Floats
    dtype: str

    @property
    def intensity(self) -> Floats:
        """FLOP/byte."""
        return _floats(self.flops / self.bytes)

    def seconds(self, gpu: GpuSpec) -> Floats:
        """The least time it takes: its roofline."""
        return np.maximum(self.flops / gpu.peak_flops(self.dtype), self.bytes / gpu.memory_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Step:
    """One step by operator class.

    Attributes:
        classes: the classes that the model has.
        tokens: that go through the step.
        collective_bytes: the least that one GPU sends for tensor parallelism; 0 without.
    """

    classes: Mapping[OpClass, Work]
    tokens: Floats
    collective_bytes: Floats

    @property
    def flops(self) -> Floats:
        """Of all classes."""
        return _total([work.flops for work in self.classes.values()])

    @property
    def bytes(self) -> Floats:
        """Of all classes."""
        return _total([work.bytes for work in self.classes.values()])

    @property
    def units(self) -> str:
        """Type of the units that do most of the matrices' work."""
        matrices = [work for name, work in self.classes.items() if name != "attention_scores"]
        return max(matrices, key=lambda work: float(np.max(work.flops))).dtype

    @property
    def intensity(self) -> Floats:
        """FLOP/byte of the whole step."""
        return _floats(self.flops / self.bytes)

    def compute_seconds(self, gpu: GpuSpec) -> Floats:
        """All FLOPs, each class at the peak of its units."""
        return _total([work.flops / gpu.peak_flops(work.dtype) for work in self.classes.values()])

    def memory_seconds(self, gpu: GpuSpec) -> Floats:
        """All bytes at peak bandwidth."""
        return _floats(self.bytes / gpu.memory_bytes_per_s)

    def seconds(self, gpu: GpuSpec) -> Floats:
        """The least time of the step, whatever overlaps: the longest of compute, memory and the links between GPUs."""
        links = self.collective_bytes / (gpu.interconnect_bytes_per_s / 2)  # datasheets add both directions
        one = np.maximum(self.compute_seconds(gpu), self.memory_seconds(gpu))
        return _floats(np.maximum(one, links))

    def serial_seconds(self, gpu: GpuSpec) -> Floats:
        """The least time when classes run one after the other, as vLLM's kernels do. An estimate, not a bound.

        A ring sends 2 (n - 1) / n of the data, twice what reduction in the switch needs.
        """
        links = 2 * self.collective_bytes / (gpu.interconnect_bytes_per_s / 2)
        return _total([work.seconds(gpu) for work in self.classes.values()]) + links

    def compute_bound(self, gpu: GpuSpec) -> npt.NDArray[np.bool_]:
        """Compute takes longer than memory."""
        return self.compute_seconds(gpu) > self.memory_seconds(gpu)

    def utilisation(self, gpu: GpuSpec) -> Floats:
        """Share of peak FLOP/s that the roofline allows: intensity over ridge, at most 1."""
        compute, moving = self.compute_seconds(gpu), self.memory_seconds(gpu)
        return _floats(compute / np.maximum(compute, moving))


def decode(
    model: ModelSpec,
    serve: Serve,
    batch: Number,
    context: Number,
    *,
    new_tokens: Number = 1,
    activations: bool = False,
    routing: Routing = "one_set",
) -> Step:
    """One decode step: each of `batch` sequences of `context` cached tokens gives `new_tokens`.

    Args:
        model: the model.
        serve: its types and tensor parallelism.
        batch: sequences in the step.
        context: tokens that each has in the KV cache.
        new_tokens: 1; k + 1 when a step verifies k drafted tokens.
        activations: count operators' inputs and outputs too.
        routing: which experts are read: `one_set` is the least (all tokens choose alike), `uniform` the expectation
            when each token chooses at random.
    """
    batch, context, each = _floats(batch), _floats(context), _floats(new_tokens)
    pairs = each * context + each * (each + 1) / 2
    seen = _Seen(pairs, context, batch, each)
    return _step(model, serve, seen, logits=batch * each, activations=activations, routing=routing)


def prefill(
    model: ModelSpec,
    serve: Serve,
    batch: Number,
    prompt: Number,
    *,
    cached: Number = 0,
    activations: bool = False,
    routing: Routing = "one_set",
) -> Step:
    """One prefill step: `batch` prompts of `prompt` tokens each at once, `cached` tokens of each already there.

    Only the last token of a prompt gives logits (`compute_logits` over `logits_indices`, vLLM
    `v1/worker/gpu_model_runner.py`). Other arguments as `decode`.
    """
    batch, prompt, cached = _floats(batch), _floats(prompt), _floats(cached)
    pairs = prompt * cached + prompt * (prompt + 1) / 2
    seen = _Seen(pairs, cached, batch, prompt)
    return _step(model, serve, seen, logits=batch, activations=activations, routing=routing)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Query-key pairs of one sequence without a window, tokens it has cached, sequences, and new tokens of each."""

    pairs: Floats
    cached: Floats
    batch: Floats
    new: Floats

    @property
    def tokens(self) -> Floats:
        return self.batch * self.new

    def pairs_within(self, window: int | None) -> Floats:
        """Pairs that are left when a query sees `window` tokens, itself among them: the first queries see fewer."""
        if window is None:
            return self.pairs
        short = np.clip(window - self.cached, 0, self.new)  # queries that see all there is
        return short * self.cached + short * (short + 1) / 2 + (self.new - short) * window

    def read_within(self, window: int | None) -> Floats:
        """Cached tokens that one sequence must read."""
        return self.cached if window is None else np.minimum(self.cached, np.maximum(window - 1, 0))


def _step(model: ModelSpec, serve: Serve, seen: _Seen, *, logits: Floats, activations: bool, routing: Routing) -> Step:
    found: dict[OpClass, list[Work]] = {}
    for weight, plain, packed in model.held():
        rows = logits if weight.op == "logits" else seen.tokens
        flops, read = _linear(model, serve, weight, rows, activations)
        read = read + _weight_bytes(model, serve, weight, plain, packed) * _experts_read(weight, rows, routing)
        found.setdefault(_CLASS[weight.op], []).append(Work(flops, read, _units(model, serve, packed)))
    if model.tied:
        found["logits"] = [_tied_logits(model, serve, logits, activations)]
    found["attention_scores"] = [_scores(model, serve, seen)]
    classes = {name: _sum(found[name]) for name in OP_CLASSES if name in found}
    ranks, width = serve.tensor_parallel_size, DTYPE_BYTES[dtype_name(serve.dtype)]
    sent = 2 * model.num_layers * seen.tokens * model.hidden_size * width * (ranks - 1) / ranks  # two sums a layer
    return Step(classes, seen.tokens, sent)


def _linear(model: ModelSpec, serve: Serve, weight: Weight, rows: Floats, activations: bool) -> tuple[Floats, Floats]:
    """FLOPs, 2 x rows x inputs x outputs of every expert used, and the bytes of inputs and outputs if they count."""
    inputs, outputs = weight.shape_on_rank(serve.tensor_parallel_size)
    width, layers = DTYPE_BYTES[dtype_name(serve.dtype)], len(weight.layers)
    if weight.op == "embed":  # a row for a token is read and nothing computed
        return np.zeros_like(rows), rows * inputs * width
    flops = 2.0 * rows * inputs * outputs * layers * weight.used
    moved = rows * (inputs + outputs) * width * layers * weight.used if activations and inputs else np.zeros_like(rows)
    return flops, moved


def _weight_bytes(model: ModelSpec, serve: Serve, weight: Weight, plain: int, packed: int) -> float:
    """Of one expert in all its layers; none of the embedding, of which only rows are read."""
    if weight.op == "embed":
        return 0.0
    inputs, outputs = weight.shape_on_rank(serve.tensor_parallel_size)
    width = DTYPE_BYTES[dtype_name(serve.dtype)]
    total = plain * max(inputs, 1) * outputs * width + (len(weight.layers) * outputs * width if weight.bias else 0)
    if model.quantisation is not None and packed:
        total += packed * sum(model.quantisation.tensors(inputs, outputs, width))
    return float(total)


def _experts_read(weight: Weight, rows: Floats, routing: Routing) -> Floats:
    """Experts of a layer whose weights are read: 1 for a weight without experts.

    `uniform`: n (1 - (1 - k/n)^rows), the expected number of distinct ones over independent draws of k of n.
    """
    if weight.experts == 1:
        return np.ones_like(rows)
    if routing == "one_set":
        return np.full_like(rows, weight.used)
    missed = (1 - weight.used / weight.experts) ** rows
    return np.maximum(weight.experts * (1 - missed), weight.used)


def _tied_logits(model: ModelSpec, serve: Serve, rows: Floats, activations: bool) -> Work:
    embedding = next(weight for weight in model.weights if weight.op == "embed")
    inputs, outputs = embedding.shape_on_rank(serve.tensor_parallel_size)
    width = DTYPE_BYTES[dtype_name(serve.dtype)]
    read = inputs * outputs * width + (rows * (inputs + outputs) * width if activations else np.zeros_like(rows))
    return Work(2.0 * rows * inputs * outputs, read, UNITS[dtype_name(serve.dtype)])


def _scores(model: ModelSpec, serve: Serve, seen: _Seen) -> Work:
    """Queries times keys, and weights times values: 2 x (head_dim + value_dim) FLOPs a pair and head.

    Of MLA's two ways the one with fewer FLOPs counts: over the cached latent vectors themselves (absorbed), or over
    keys and values made out of all of them first (`MLAAttention.forward_mqa` and `forward_mha`, vLLM
    `layers/attention/mla_attention.py`).
    """
    flops, moved = np.zeros(()), np.zeros(())
    for kind in model.attention:
        heads, pairs = max(1, kind.heads // serve.tensor_parallel_size), seen.pairs_within(kind.window)
        each = pairs * (kind.head_dim + kind.value_dim)
        if kind.latent_dim:
            latent, position = kind.latent_dim - model.rotary_dim, model.rotary_dim
            unpacked = seen.cached * latent * (kind.head_dim - position + kind.value_dim)
            each = np.minimum(pairs * (kind.latent_dim + latent), each + unpacked)
        flops = flops + 2.0 * kind.layers * heads * seen.batch * each
        tokens = seen.read_within(kind.window) + seen.new  # read what is cached, write what is new
        moved = moved + kind.layers * layer_kv_bytes(kind, serve) * seen.batch * tokens
    return Work(_floats(flops), _floats(moved), UNITS[dtype_name(serve.dtype)])


def _units(model: ModelSpec, serve: Serve, packed: int) -> str:
    """Type of the units that multiply: 4-bit weights are widened to the activations' type before they are used."""
    narrow = model.quantisation.activations if model.quantisation is not None and packed else None
    return narrow or UNITS[dtype_name(serve.dtype)]


def _sum(works: list[Work]) -> Work:
    """The units of the first: a class's matrices are of one format but for small unquantised ones (a router)."""
    main = max(works, key=lambda work: float(np.max(work.flops)))
    return Work(_total([work.flops for work in works]), _total([work.bytes for work in works]), main.dtype)


def _total(parts: list[Floats]) -> Floats:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return _floats(total)


def _floats(number: Number) -> Floats:
    return np.asarray(number, dtype=np.float64)


# ---- what follows for a served model


@dataclass(frozen=True, slots=True)
class Bounds:
    """What no server of this model on this GPU beats.

    Attributes:
        ttft_s: least time to first token of a prompt that comes alone.
        tpot_s: least time a token, in the batch.
        decode_tokens_per_s: most tokens a second of all sequences together while decoding.
        tokens_per_s: most output tokens a second with the work of the prompts counted.
        usd_per_m_tokens: least price of a million output tokens at the catalogue's price; NaN without one.
        joules_per_token: energy an output token at that rate if the GPU drew its power limit; NaN without one. No
            bound: a memory-bound GPU draws less.
    """

    ttft_s: Floats
    tpot_s: Floats
    decode_tokens_per_s: Floats
    tokens_per_s: Floats
    usd_per_m_tokens: Floats
    joules_per_token: Floats


def bounds(
    model: ModelSpec,
    gpu: GpuSpec,
    serve: Serve,
    batch: Number,
    prompt: Number,
    output: Number,
    *,
    cached: Number = 0,
    drafted: int = 0,
) -> Bounds:
    """Bounds for sequences of `prompt` tokens that give `output` tokens, `batch` at a time.

    Prompts may share steps with decoding, so that one's compute hides the other's traffic: over a round of `batch`
    sequences, time is at least all compute, and at least all traffic of decoding. A context is no shorter than the
    prompt; what of it is shared with others (`cached`) need not be read again for each.

    Args:
        model: the model.
        gpu: whose peaks are taken at 100 %.
        serve: types and tensor parallelism.
        batch: sequences at once.
        prompt: tokens of a prompt.
        output: tokens of an answer.
        cached: tokens of a prompt that a prefix cache may already hold.
        drafted: tokens that speculative decoding drafts; all are accepted and cost nothing to draft.
    """
    batch, prompt, output, cached = _floats(batch), _floats(prompt), _floats(output), _floats(cached)
    fresh, each = np.maximum(prompt - cached, 1), drafted + 1
    filling = prefill(model, serve, 1, fresh, cached=cached)
    step = decode(model, serve, batch, np.maximum(prompt - cached, 0), new_tokens=each)
    tpot, steps = step.seconds(gpu) / each, np.maximum(output - 1, 0) / each
    compute = batch * filling.compute_seconds(gpu) + steps * step.compute_seconds(gpu)
    rate = batch * output / np.maximum(compute, steps * step.memory_seconds(gpu))
    gpus = serve.tensor_parallel_size
    usd_per_s = (np.nan if gpu.price is None else gpu.price.usd_per_h) * gpus / 3600
    return Bounds(
        ttft_s=filling.seconds(gpu),
        tpot_s=tpot,
        decode_tokens_per_s=batch / tpot,
        tokens_per_s=rate,
        usd_per_m_tokens=_floats(usd_per_s / rate * 1e6),
        joules_per_token=_floats((np.nan if gpu.power_w is None else gpu.power_w) * gpus / rate),
    )


def compute_bound_batch(model: ModelSpec, gpu: GpuSpec, serve: Serve, context: Number) -> Floats:
    """Smallest batch at which decode is compute-bound; infinite where the KV cache's traffic forbids it at any batch.

    Each sequence adds FLOPs F and bytes K to the W bytes of weights: compute-bound when b F / peak > (W + b K) /
    bandwidth, so from b = (W / bandwidth) / (F / peak - K / bandwidth) on, if that is positive. With experts the
    weights read do not grow with the batch here, so for them it is a lower bound.
    """
    one, two = decode(model, serve, 1, context), decode(model, serve, 2, context)
    compute = two.compute_seconds(gpu) - one.compute_seconds(gpu)
    traffic = two.memory_seconds(gpu) - one.memory_seconds(gpu)
    fixed = one.memory_seconds(gpu) - traffic
    gain = compute - traffic
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gain > 0, np.floor(fixed / gain) + 1, np.inf)


def tokens_per_step(acceptance: Number, drafted: int) -> Floats:
    """Expected tokens of a step that verifies `drafted` tokens, each accepted with probability `acceptance`.

    (1 - a^(k+1)) / (1 - a): Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative
    decoding", ICML 2023, eq. 1.
    """
    rate = _floats(acceptance)
    return _total([rate**power for power in range(drafted + 1)])


def break_even_acceptance(
    model: ModelSpec,
    gpu: GpuSpec,
    serve: Serve,
    batch: Number,
    context: Number,
    drafted: int,
    draft_s: Callable[[Floats, Floats], Floats] | float = 0.0,
) -> Floats:
    """Acceptance at which speculative decoding breaks even; above 1 it cannot.

    A step with k drafts gives `tokens_per_step(a, k)` tokens and takes the verification of k + 1 tokens a sequence and
    k drafts; without, a token takes a step. Both at their roofline.

    Args:
        model: the target.
        gpu: both run on.
        serve: types and tensor parallelism.
        batch: sequences at once.
        context: tokens each has cached.
        drafted: k.
        draft_s: seconds of one draft for the batch: 0 for n-gram, else a number or a function of batch and context.
    """
    batch, context = _floats(batch), _floats(context)
    plain = decode(model, serve, batch, context).seconds(gpu)
    verify = decode(model, serve, batch, context, new_tokens=drafted + 1).seconds(gpu)
    draft = draft_s(batch, context) if callable(draft_s) else _floats(draft_s)
    needed = (verify + drafted * draft) / plain
    low, high = np.zeros_like(needed), np.ones_like(needed)
    for _ in range(50):
        middle = (low + high) / 2
        enough = tokens_per_step(middle, drafted) >= needed
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(needed > drafted + 1, np.inf, np.where(needed <= 1, 0.0, high))
