"""The time of one engine step as real kernels take it: the roofline's work and traffic over attained shares of peaks.

    host = overhead + sequences x each
    device = max(weight bytes / (f_w bandwidth), matrix FLOPs / (f_c peak))
           + max(cached bytes / (f_a bandwidth), attention FLOPs / (f_c peak)) + links
    t = host + device, or where the host runs ahead of the device, max(host, device)

Matrices and attention are kernels that run one after the other, so their times add; within a kernel, traffic hides
behind arithmetic or the other way round, but on a CPU, where the two add up. The host runs ahead when it launches a
GPU's kernels one by one (eager): the longer of the two sets the pace. The shares f and the overheads are `Efficiency`:
fitted by `calibration`, else a prior. An estimate, never for hard rules. Vectorised over batch, context and
prompt tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from packaging.version import InvalidVersion, Version

from varcas.gpus import GpuSpec
from varcas.memory import Floats, Number, Serve
from varcas.model import ModelSpec, dtype_name
from varcas.roofline import decode

PLAIN_AWQ_BEFORE = Version("0.24")
"""0.15.1 obeys `quantization: awq` with the plain kernel. 0.32 takes Marlin all the same, from capability 7.5 on
(`AutoAWQConfig.get_quant_method`, `layers/quantization/auto_awq.py`), and 0.24 was seen to take Machete on an H100.
Versions in between were not read."""

PLAIN_AWQ_TILE, PLAIN_AWQ_BELOW, PLAIN_AWQ_COST = 16, 256, 4.4
"""The plain AWQ kernel takes its rows 16 at a time, 37-39 ms of each on a T4 for Llama-2-7B (published timings): 4.4
times what a dense fp16 product at 24 TFLOPS would. From 256 rows on the weights are first written out in fp16."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What of the peaks is attained, and what else a step takes; all positive.

    Attributes:
        overhead_s: of a step, whatever is in it: scheduling, launching kernels.
        sequence_s: of each sequence in a step: sampling, detokenising, sending.
        weights_frac: share of peak bandwidth at which weights are read.
        attention_frac: share of peak bandwidth at which the KV cache is read and written.
        compute_frac: share of peak FLOP/s.
        request_s: of a request, before its first step: HTTP, tokenising, queueing.
        overlaps: the host's part of a step runs while the device works.
        adds: traffic does not hide behind arithmetic: a CPU's cores do one after the other.
    """

    overhead_s: float
    sequence_s: float
    weights_frac: float
    attention_frac: float
    compute_frac: float
    request_s: float
    overlaps: bool = field(default=False, kw_only=True)
    adds: bool = field(default=False, kw_only=True)


PARAMETERS = ("overhead_s", "sequence_s", "weights_frac", "attention_frac", "compute_frac", "request_s")
"""The fields of `Efficiency` that are fitted, in its order."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step would take at its peaks, by what the shares of `Efficiency` divide; arrays that broadcast.

    Attributes:
        weights_s: all weights and embedding rows at peak bandwidth.
        matrices_s: all matrix products at peak FLOP/s.
        cache_s: the KV cache at peak bandwidth.
        scores_s: attention scores at peak FLOP/s.
        links_s: between GPUs.
        sequences: in the step.
        requests: 1 where the time counts from a request's arrival, else 0.
    """

    weights_s: Floats
    matrices_s: Floats
    cache_s: Floats
    scores_s: Floats
    links_s: Floats
    sequences: Floats
    requests: Floats

    @classmethod
    def joined(cls, parts: list[Parts]) -> Parts:
        """Steps of a number each as arrays, in order."""
        return cls(*(np.array([float(getattr(one, name)) for one in parts]) for name in cls.__slots__))

    def take(self, mask: npt.NDArray[np.bool_]) -> Parts:
        """Those that the mask names."""
        return Parts(*(getattr(self, name)[mask] for name in self.__slots__))

    def seconds(self, efficiency: Efficiency) -> Floats:
        """The time of the step, or of a request's first token."""
        e = efficiency
        together = np.add if e.adds else np.maximum
        matrices = together(self.weights_s / e.weights_frac, self.matrices_s / e.compute_frac)
        attention = together(self.cache_s / e.attention_frac, self.scores_s / e.compute_frac)
        host, device = e.overhead_s + self.sequences * e.sequence_s, matrices + attention + self.links_s
        step = np.maximum(host, device) if e.overlaps else host + device
        return np.asarray(step + self.requests * e.request_s, dtype=np.float64)


def kernel_of(
    model: ModelSpec, serve: Serve, engine_version: str | None = None, quantization: str | None = None
) -> str:
    """Class of kernels that a server runs: what one efficiency may be shared by.

    Args:
        model: as it is loaded.
        serve: its types, graphs and tensor parallelism.
        engine_version: of vLLM; None is taken for a recent one.
        quantization: the flag, where it is given.
    """
    stored = model.quantisation
    words = ["none" if stored is None else f"{stored.method}-{stored.weights}"]
    if stored is not None and stored.method == "awq" and quantization == "awq" and _is_before_marlin(engine_version):
        words[0] = "awq-plain"
    words += [dtype_name(serve.dtype), "eager" if serve.enforce_eager else "graphs"]
    if serve.kv_cache_dtype not in ("auto", serve.dtype):
        words.append(f"kv-{serve.kv_cache_dtype}")
    if serve.tensor_parallel_size > 1:
        words.append(f"tp{serve.tensor_parallel_size}")
    return " ".join(words)


def _is_before_marlin(engine_version: str | None) -> bool:
    try:
        return engine_version is not None and Version(engine_version) < PLAIN_AWQ_BEFORE
    except InvalidVersion:
        return False


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Work and traffic of every step of a model on a GPU, tabulated once: a look-up is some microseconds.

    Attributes:
        gpu: whose peaks are taken.
        rows_bytes: weights and embedding rows that a step of so many tokens reads.
        rows_flops: of all matrices but the logits', for so many tokens.
        rows_s: the same at peak.
        logits_flops: of one row.
        logits_s: the same at peak.
        cache_bytes: that one sequence of so many cached tokens reads and writes for one more.
        scores_flops: of its attention scores.
        scores_peak: FLOP/s of their units.
        links_s: between GPUs, for one token.
        cost: factor on matrix products of so many rows.
    """

    gpu: GpuSpec
    rows_bytes: Floats
    rows_flops: Floats
    rows_s: Floats
    logits_flops: float
    logits_s: float
    cache_bytes: Floats
    scores_flops: Floats
    scores_peak: float
    links_s: float
    cost: Callable[[Floats], Floats]

    @classmethod
    def of(cls, model: ModelSpec, gpu: GpuSpec, serve: Serve, kernel: str = "") -> StepTimes:
        """Tabulates up to `max_num_batched_tokens` rows and `max_model_len` tokens; beyond, lines go on.

        Args:
            model: as it is loaded.
            gpu: whose peaks are taken.
            serve: types, limits and tensor parallelism; numbers, not arrays.
            kernel: as `kernel_of` names it.
        """
        rows = np.arange(1, max(int(serve.max_num_batched_tokens), int(serve.max_num_seqs), 2) + 1, dtype=np.float64)
        step = decode(model, serve, rows, 0, routing="uniform")
        own = {name: work for name, work in step.classes.items() if name != "attention_scores"}
        logits, matrices = own["logits"], [work for name, work in own.items() if name != "logits"]
        scores = decode(model, serve, 1, np.arange(max(int(serve.max_model_len), 2))).classes["attention_scores"]
        ones, peak = np.ones_like(rows), gpu.peak_flops
        return cls(
            gpu=gpu,
            rows_bytes=_from_zero(sum((work.bytes * ones for work in own.values()), np.zeros_like(rows))),
            rows_flops=_from_zero(sum((work.flops * ones for work in matrices), np.zeros_like(rows))),
            rows_s=_from_zero(sum((work.flops * ones / peak(work.dtype) for work in matrices), np.zeros_like(rows))),
            logits_flops=float(logits.flops[0]),
            logits_s=float(logits.flops[0]) / peak(logits.dtype),
            cache_bytes=scores.bytes,
            scores_flops=_from_zero(np.cumsum(scores.flops)),
            scores_peak=peak(scores.dtype),
            links_s=float(np.ravel(step.collective_bytes)[0]) / (gpu.interconnect_bytes_per_s / 4),  # as serial_seconds
            cost=_plain_awq_cost if kernel.startswith("awq-plain") else np.ones_like,
        )

    def work(
        self, batch: Number, context: Number, prefill_tokens: Number = 0, cached: Number = 0, prompts: Number = 1
    ) -> tuple[Floats, Floats]:
        """FLOPs and bytes of a step; arguments as `parts`."""
        batch, tokens = _floats(batch), _floats(prefill_tokens)
        rows, logits = batch + tokens, batch + np.where(tokens > 0, prompts, 0)
        flops = _at(self.rows_flops, rows) + logits * self.logits_flops
        scores, cache = self._attention(batch, _floats(context), tokens, _floats(cached), _floats(prompts))
        return _floats(flops + scores), _floats(_at(self.rows_bytes, rows) + cache)

    def parts(
        self,
        batch: Number,
        context: Number,
        prefill_tokens: Number = 0,
        cached: Number = 0,
        prompts: Number = 1,
        *,
        requests: Number = 0,
    ) -> Parts:
        """A step at its peaks. Numbers or arrays that broadcast; means of many steps may be fractions.

        Args:
            batch: sequences that decode, a token each.
            context: tokens that each has cached, on average: exact where no layer has a window.
            prefill_tokens: of prompts or chunks of them in the same step, all together.
            cached: tokens that each of these prompts has in the cache already.
            prompts: how many these are; ignored without `prefill_tokens`.
            requests: 1 for the time from arrival to first token of a request that finds this step.
        """
        batch, tokens = _floats(batch), _floats(prefill_tokens)
        rows, filling = batch + tokens, np.where(tokens > 0, prompts, 0)
        scores, cache = self._attention(batch, _floats(context), tokens, _floats(cached), _floats(prompts))
        matrices = _at(self.rows_s, rows) * self.cost(rows) + (batch + filling) * self.logits_s
        bandwidth = self.gpu.memory_bytes_per_s
        columns = (
            _at(self.rows_bytes, rows) / bandwidth, matrices, cache / bandwidth, scores / self.scores_peak,
            rows * self.links_s, batch + filling, _floats(requests),
        )  # fmt: skip
        return Parts(*map(_floats, columns))

    def _attention(
        self, batch: Floats, context: Floats, tokens: Floats, cached: Floats, prompts: Floats
    ) -> tuple[Floats, Floats]:
        """FLOPs and bytes: those of a chunk are the sum over its tokens, but what is cached is read once."""
        each = tokens / np.maximum(prompts, 1)
        first, last = _at(self.scores_flops, cached), _at(self.scores_flops, cached + each)
        one = _at(self.scores_flops, context + 1) - _at(self.scores_flops, context)
        flops = batch * one + prompts * (last - first)
        read = _at(self.cache_bytes, cached) + (each - 1) * self.cache_bytes[0]
        moved = batch * _at(self.cache_bytes, context) + np.where(tokens > 0, prompts * read, 0)
        return _floats(flops), _floats(moved)

    def seconds(
        self,
        efficiency: Efficiency,
        batch: Number,
        context: Number,
        prefill_tokens: Number = 0,
        cached: Number = 0,
        prompts: Number = 1,
    ) -> Floats:
        """The time of a step; arguments as `parts`."""
        return self.parts(batch, context, prefill_tokens, cached, prompts).seconds(efficiency)


class StepClock:
    """`StepTimes.seconds` of one efficiency for whole numbers of tokens, some hundred times as fast: the same tables.

    For the simulator, which asks step after step. No more tokens than were tabulated: `max_num_batched_tokens`, or
    `max_num_seqs` where that is more. `tests/test_steptime.py` holds the two equal.

    Args:
        times: work and traffic of the steps.
        efficiency: what of the peaks is attained.
    """

    def __init__(self, times: StepTimes, efficiency: Efficiency) -> None:
        e, bandwidth = efficiency, times.gpu.memory_bytes_per_s
        rows = np.arange(len(times.rows_s), dtype=np.float64)
        self._weights_s: list[float] = (times.rows_bytes / bandwidth / e.weights_frac).tolist()
        self._matrices_s: list[float] = (times.rows_s * times.cost(rows) / e.compute_frac).tolist()
        self._cache_s: list[float] = (times.cache_bytes / bandwidth / e.attention_frac).tolist()
        self._scores_s: list[float] = (times.scores_flops / times.scores_peak / e.compute_frac).tolist()
        self._logits_s, self._links_s = times.logits_s / e.compute_frac, times.links_s
        self._overhead_s, self._sequence_s, self._overlaps = e.overhead_s, e.sequence_s, e.overlaps
        self._adds = e.adds

    def seconds(
        self, batch: int, context: float, prefill_tokens: int = 0, cached: float = 0.0, prompts: int = 1
    ) -> float:
        """The time of a step; arguments as `StepTimes.parts`."""
        rows, sequences = batch + prefill_tokens, batch + (prompts if prefill_tokens else 0)
        weights, products = self._weights_s[rows], self._matrices_s[rows] + sequences * self._logits_s
        cache = batch * _look(self._cache_s, context)
        scores = batch * (_look(self._scores_s, context + 1) - _look(self._scores_s, context))
        if prefill_tokens:
            each = prefill_tokens / max(prompts, 1)
            cache += prompts * (_look(self._cache_s, cached) + (each - 1) * self._cache_s[0])
            scores += prompts * (_look(self._scores_s, cached + each) - _look(self._scores_s, cached))
        host, device = self._overhead_s + sequences * self._sequence_s, rows * self._links_s
        device += weights + products + cache + scores if self._adds else max(weights, products) + max(cache, scores)
        return max(host, device) if self._overlaps else host + device


def _look(table: list[float], index: float) -> float:
    """`_at` of one number."""
    low = min(int(index), len(table) - 2)
    return table[low] + (index - low) * (table[low + 1] - table[low])


def _plain_awq_cost(rows: Floats) -> Floats:
    padded = np.ceil(rows / PLAIN_AWQ_TILE) * PLAIN_AWQ_TILE / np.maximum(rows, 1e-9)
    return np.where(rows < PLAIN_AWQ_BELOW, padded * PLAIN_AWQ_COST, 1.0)


def _from_zero(table: Floats) -> Floats:
    return np.concatenate([[0.0], table])


def _at(table: Floats, index: Floats) -> Floats:
    """A table at fractions of an index; beyond its end, its last slope goes on."""
    low = np.minimum(np.maximum(index, 0), len(table) - 2).astype(np.int64)
    return _floats(table[low] + (index - low) * (table[low + 1] - table[low]))


def _floats(number: Number | Floats) -> Floats:
    return np.asarray(number, dtype=np.float64)
