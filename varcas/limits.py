"""`varcas roofline`: what fits, what cannot run and why, and what no server of a model beats on each GPU.

Every figure is one of three kinds, and its description says which: *exact*, *bound* (at datasheet peaks; a GPU may run
at higher clocks, for which hard rules leave 20 %), or *estimate*. On a probed CPU the bounds are estimates too.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from packaging.version import InvalidVersion, Version
from pydantic import JsonValue

from varcas import gpus, hardware
from varcas.calibration import Calibration, Fit, Quantity, Traffic, calibrate, estimate
from varcas.engine.fetch import check_local_model
from varcas.engine.node import NodeFacts
from varcas.engine.probe import probe_python
from varcas.errors import InputError
from varcas.experiment import Experiment
from varcas.gpus import GpuSpec
from varcas.known import Found, find_model
from varcas.limits_answer import (
    Attained,
    Best,
    Bound,
    BoundsAt,
    BreakEven,
    Cell,
    CellVerdict,
    ClassShare,
    ComputeBound,
    Expected,
    GpuRoofline,
    Interval,
    Latency,
    MeasuredPoint,
    MemoryOf,
    MemoryStack,
    ModelFacts,
    Phase,
    Point,
    Pruned,
    Roofline,
    RuleCount,
    SloBound,
    Spread,
    Verdict,
    WorkloadFacts,
)
from varcas.memory import (
    Floats,
    Memory,
    Serve,
    ceiling_kv_tokens,
    kv_bytes_per_token,
    served_memory,
    settings,
    whole,
)
from varcas.model import ModelSpec
from varcas.pruner import Pruner, cached_tokens, server_decides, site_of
from varcas.roofline import (
    Step,
    break_even_acceptance,
    compute_bound_batch,
    decode,
    prefill,
)
from varcas.rules import RULES, Refusal, Room, Site, bound_ms, judge, judge_all, room
from varcas.space import Drawn, ServingConfig, Space
from varcas.steptime import PARAMETERS
from varcas.store import Store
from varcas.workload.schedule import schedule

Flags = Mapping[str, JsonValue]
Ints = npt.NDArray[np.int64]

MOST_CONFIGS = 100_000
"""Configurations of a space that are judged; of a larger or a continuous one so many are drawn."""
DRAWN_CONFIGS = 10_000
MOST_LENGTH = 131_072
"""Longest `max_model_len` in the feasible region, where the model's own is longer still."""


# ---- the question


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the workload's requests; what of a prompt is shared with others need not be read again.

    Attributes:
        prompt: tokens of each.
        output: tokens of each.
        shared: tokens of each prompt that a prefix cache may hold.
        server_decides: which of these requests come, and how often, depends on the server: only what holds for each
            of them bounds them all. Of a later turn the prompt is what is new, its context longer than said here.
    """

    prompt: Ints
    output: Ints
    shared: Ints
    server_decides: bool = False

    @property
    def fresh(self) -> Ints:
        """Tokens of each prompt that must be computed."""
        fresh: Ints = np.maximum(self.prompt - self.shared, 1)
        return fresh

    @property
    def steps(self) -> Ints:
        """Decode steps of each: the first token comes with the prompt."""
        steps: Ints = np.maximum(self.output - 1, 0)
        return steps

    @property
    def mean_context(self) -> float:
        """Unshared tokens in a sequence's cache, mean over all decode steps: of step i the prompt and i tokens.

        Where the server decides, that of the request with the least.
        """
        if self.server_decides:
            return float((self.fresh + self.output / 2).min())
        steps = float(self.steps.sum())
        return float((self.steps * (self.fresh + self.output / 2)).sum() / steps) if steps else float(self.fresh.mean())


@dataclass(frozen=True, slots=True)
class _Question:
    """What is the same for all GPUs."""

    experiment: Experiment
    space: Space | None
    configs: Sequence[ServingConfig]
    found: Found
    drafts: Mapping[str, ModelSpec]
    lengths: Lengths | None
    engine_version: str | None
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]

    @property
    def baseline(self) -> ServingConfig:
        e = self.experiment
        return ServingConfig(e.model, e.revision, {**e.serve, **e.baseline})


def roofline_report(
    experiment: Experiment,
    gpu_names: Sequence[str] = (),
    *,
    results: str | Path | None = None,
    engine_version: str | None = None,
    batches: Sequence[int] = (),
    contexts: Sequence[int] = (),
    prompts: Sequence[int] = (),
) -> Roofline:
    """What fits, what cannot run and why, and what no server beats, on each GPU. Starts nothing, needs no GPU.

    Args:
        experiment: with model, workload and space.
        gpu_names: GPUs of the catalogue, or `cpu` for this host's, probed; the experiment's when empty.
        results: a results directory whose measurements are laid over the roofline; None: the experiment's.
        engine_version: of the vLLM whose rules are asked; None: the one that the experiment's Python has.
        batches: sequences in a decode step to show; a choice of powers of two when empty.
        contexts: cached tokens to show; the workload's mean and the longest when empty.
        prompts: prompt lengths to show; the workload's median, its 95th percentile and the longest when empty.

    Raises:
        InputError: an unknown GPU, a model that is found nowhere or not described, a workload that cannot be drawn.
    """
    question, notes = _question(experiment, engine_version, batches, contexts, prompts)
    store = _store(experiment, results)
    chosen = _gpus(experiment, gpu_names, notes)
    answers = [_on_gpu(question, asked, gpu, store) for asked, gpu in chosen]
    return Roofline(
        experiment=experiment.name,
        model=_model_facts(question.found),
        workload=_workload_facts(question),
        engine_version=question.engine_version,
        notes=notes,
        gpus=answers,
    )


def _question(
    e: Experiment, version: str | None, batches: Sequence[int], contexts: Sequence[int], prompts: Sequence[int]
) -> tuple[_Question, list[str]]:
    check_local_model(e.model)
    found, notes = find_model(e.model, e.revision), []
    space = Space(e) if e.space or e.study.enqueue else None
    configs, drawn = _configs(space)
    if drawn:
        notes.append(f"the space is {'continuous' if space and space.size() is None else 'large'}: {drawn} drawn")
    longest = whole({**e.serve, **e.baseline}, "max_model_len") or found.model.max_position
    lengths = lengths_of(e, longest)
    if lengths is not None and lengths.server_decides:
        notes.append("which requests come depends on the server (users, later turns): bounds hold for each of them")
    if lengths is None:
        notes.append("the workload's texts are counted by the server alone: no bounds for it")
    version = _version(version) or probe_python(e.server.python).vllm_version
    if version is None:
        notes.append("no vLLM here: rules of its versions are off; name one with --vllm")
    if found.origin == "own copy":
        notes.append(f"{e.model}: {found.source}")
    mean = round(lengths.mean_context) if lengths else longest // 4
    typical = (round(float(np.quantile(lengths.prompt, q))) for q in (0.5, 0.95)) if lengths else (longest // 4,)
    question = _Question(
        e, space, configs, found, _drafts(e, configs), lengths, version,
        tuple(batches) or _powers(_most_seqs(e, configs)),
        tuple(contexts) or _distinct(min(mean, longest), longest),
        tuple(prompts) or _distinct(*typical, longest),
    )  # fmt: skip
    return question, notes


def _version(text: str | None) -> str | None:
    """Raises InputError for a version that is none."""
    try:
        return text if text is None else str(Version(text))
    except InvalidVersion as error:
        raise InputError(f"--vllm: {text!r}: is no version. Write one as vLLM has it, e.g. --vllm 0.32.0.") from error


def _distinct(*numbers: int) -> tuple[int, ...]:
    return tuple(sorted({max(number, 1) for number in numbers}))


def _powers(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to a number, and the number itself."""
    return _distinct(*(2**power for power in range(most.bit_length())), most)


def _most_seqs(e: Experiment, configs: Sequence[ServingConfig]) -> int:
    named = [flags.get("max_num_seqs") for flags in ({**e.serve, **e.baseline}, *(config.flags for config in configs))]
    return min(max((seqs for seqs in named if isinstance(seqs, int)), default=256), 1024)


def lengths_of(experiment: Experiment, longest: int) -> Lengths | None:
    """Lengths of the window's requests, as `workload.schedule` draws them; None where only a server can count them."""
    workload = experiment.workload
    drawn = schedule(workload, start_s=0, duration_s=workload.duration_s, max_len=longest, stream="measure")
    counted = [request for request in drawn if request.prompt_tokens > 0 and request.output_tokens > 0]
    if not counted:
        return None
    shared = [cached_tokens(request) for request in counted]
    prompt, output, cached = (
        np.array(numbers, dtype=np.int64)
        for numbers in ([r.prompt_tokens for r in counted], [r.output_tokens for r in counted], shared)
    )
    return Lengths(prompt, output, np.minimum(cached, prompt - 1), server_decides(workload, counted))


def _configs(space: Space | None) -> tuple[list[ServingConfig], int]:
    """The configurations to judge, and how many were drawn for want of listing them all."""
    if space is None:
        return [], 0
    size = space.size()
    if size is not None and size <= MOST_CONFIGS:
        return list(space.configs()), 0
    draw = Drawn(random.Random(0))  # the same in every run
    configs = (space.config(space.propose(draw)[1]) for _ in range(DRAWN_CONFIGS))
    drawn = {config.hash: config for config in configs}
    return list(drawn.values()), len(drawn)


def _drafts(e: Experiment, configs: Sequence[ServingConfig]) -> dict[str, ModelSpec]:
    """Draft models that the experiment names, as far as they are found and described."""
    named = {model for config in configs if isinstance(model := _speculation(config.flags).get("model"), str)}
    found: dict[str, ModelSpec] = {}
    for name in sorted(named):
        try:
            found[name] = find_model(name).model
        except InputError:  # rules on it then say nothing
            continue
    return found


def _speculation(flags: Flags) -> Mapping[str, JsonValue]:
    given = flags.get("speculative_config")
    return given if isinstance(given, dict) else {}


def _gpus(e: Experiment, names: Sequence[str], notes: list[str]) -> list[tuple[str, GpuSpec]]:
    """Names and figures of the GPUs to answer for; adds what must be said of them."""
    if names:
        wanted = list(dict.fromkeys(names))
    elif e.hardware.gpu != "auto":
        wanted = [e.hardware.gpu]
    else:
        return [_here(notes)]
    return [(name, gpus.this_cpu() if name == "cpu" else gpus.gpu(name)) for name in wanted]


def _here(notes: list[str]) -> tuple[str, GpuSpec]:
    """This host's GPU as it is; without one its CPU, probed."""
    there = hardware.gpus()
    if not there:
        notes.append("hardware.gpu is `auto` and no GPU is here: this CPU was probed; name others with --gpu")
        return "cpu", gpus.this_cpu()
    found = gpus.installed(there[0].name, there[0].memory_bytes)
    if found is None:
        known = ", ".join(gpus.catalogue())
        raise InputError(f"--gpu: this host's {there[0].name} is not in the catalogue. Name one: {known}.")
    return found.name, found


def _model_facts(found: Found) -> ModelFacts:
    model = found.model
    return ModelFacts(
        name=model.name,
        source=found.source,
        own_copy=found.origin == "own copy",
        parameters=model.parameters,
        active_parameters=model.active_parameters,
        quantisation=model.quantisation and model.quantisation.method,
    )


def _workload_facts(question: _Question) -> WorkloadFacts:
    workload, lengths = question.experiment.workload, question.lengths
    rate = workload.mean_rps
    return WorkloadFacts(
        described=workload.described,
        requests=len(lengths.prompt) if lengths else 0,
        prompt_tokens=_spread(lengths.prompt) if lengths else None,
        output_tokens=_spread(lengths.output) if lengths else None,
        shared_tokens=int(lengths.shared.max()) if lengths else 0,
        decode_context=round(lengths.mean_context) if lengths else None,
        asked_tokens_per_s=rate * float(lengths.output.mean()) if lengths and rate else None,
    )


def _spread(numbers: Ints) -> Spread:
    p50, p95 = (float(np.quantile(numbers, q)) for q in (0.5, 0.95))
    return Spread(mean=float(numbers.mean()), p50=p50, p95=p95, max=float(numbers.max()))


# ---- one GPU


@dataclass(frozen=True, slots=True)
class _Case:
    """One GPU and the baseline on it."""

    question: _Question
    gpu: GpuSpec
    site: Site
    model: ModelSpec
    serve: Serve

    units: str


def _on_gpu(question: _Question, asked: str, gpu: GpuSpec, store: Store | None) -> GpuRoofline:
    flags = question.baseline.flags
    model = as_loaded(question.found.model, flags)
    serve = settings(flags, model, gpu)
    units = decode(model, serve, 1, 1).units
    case = _Case(question, gpu, _site(question, asked, gpu), model, serve, units)
    pruned, left = _pruned(case)
    open_still = left if question.configs else [question.baseline]
    plans = {config.hash: room(case.site, config.flags) for config in open_still}
    untold = 0 if gpu.measured else sum(plan is None for plan in plans.values())
    drafts = max((_plan(case, config.flags).drafted for config in open_still), default=0)
    best = (
        _best(case, question.lengths, [c for c in open_still if gpu.measured or plans[c.hash]])
        if question.lengths
        else {}
    )
    calibrations = [_calibration(case, store, simulated) for simulated in (False, True)]
    return GpuRoofline(
        gpu=gpu.name,
        asked=asked,
        measured=gpu.measured,
        gpus_per_server=_gpus_of(case.serve, _plan(case, flags)),
        units=units,
        peak_flops=gpu.peak_flops(units),
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        ridge=gpu.ridge(units),
        usd_per_h=gpu.price and gpu.price.usd_per_h,
        unverified=list(gpu.unverified),
        memory=_memory_stack(case, flags, case.serve),
        memory_of=list(_memory_of(case)),
        decode=[_decode_point(case, b, c) for c in question.contexts for b in question.batches],
        prefill=[_prefill_point(case, prompt) for prompt in question.prompts],
        prefill_unfused=[_prefill_point(case, prompt, unfused=True) for prompt in question.prompts],
        classes=list(_classes(case)),
        compute_bound=[_compute_bound(case, context) for context in question.contexts],
        latency=_latency(case, question.lengths, 0) if question.lengths else None,
        latency_drafted=_latency(case, question.lengths, drafts) if question.lengths and drafts else None,
        slo=[
            SloBound(key=key, limit_ms=limit, least_ms=bound_ms(case.site, flags, key))
            for key, limit in question.experiment.slo.items()
        ],
        bounds=_bounds(case, question.lengths) if question.lengths else [],
        best=best.get(False),
        best_drafted=best.get(True),
        untold=untold,
        speculation=list(_break_even(case)),
        pruned=pruned,
        region=list(_region(case)),
        measurements=_measurements(case, calibrations),
        left_out=_left_out(calibrations[0]),
        attained=_attained(calibrations),
        expected=_expected(case, calibrations[0], question.lengths) if question.lengths else None,
    )


def as_loaded(model: ModelSpec, flags: Flags) -> ModelSpec:
    """The model as `quantization` makes vLLM load it; as it is stored where that is not known here."""
    method = flags.get("quantization")
    try:
        return model.quantised(str(method)) if isinstance(method, str) else model
    except InputError:  # a rule or vLLM itself will say so
        return model


def _site(question: _Question, asked: str, gpu: GpuSpec) -> Site:
    """What the rules know: as a sweep's pruner has it, with the model as it was found."""
    e, found, here = question.experiment, question.found, gpu.measured
    facts = NodeFacts(
        engine_version=question.engine_version or "",
        model_path=e.model,
        model_revision="",
        gpu_name=None,
        driver_version=None,
        model_config=json.dumps(found.config),
        host_memory_bytes=gpu.memory_bytes if here else None,
        engine_env={name: text for name, text in os.environ.items() if here and name.startswith("VLLM_")},
    )
    best = None if here else gpus.ceiling(asked)
    site = site_of(e, facts, best, on_cpu=here, gpus_per_node=None if here else e.hardware.count)
    return replace(site, drafts={**site.drafts, **question.drafts})


MEMORY_FLAGS = (
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_dtype", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "tensor_parallel_size", "pipeline_parallel_size",
)  # fmt: skip
"""Flags that change where memory goes."""


def _memory_of(case: _Case) -> Iterator[MemoryOf]:
    """The baseline, then each flag of the space at its least and its greatest value."""
    flags = case.question.baseline.flags
    yield MemoryOf(label="baseline", refused=_rule(case, flags), memory=_memory_stack(case, flags, case.serve))
    for name in MEMORY_FLAGS:
        values = {json.dumps(config.flags.get(name)): config.flags.get(name) for config in case.question.configs}
        values.pop(json.dumps(flags.get(name)), None)
        ordered = sorted(values.values(), key=_order)
        for value in ordered if len(ordered) < 3 else (ordered[0], ordered[-1]):
            changed = {**flags, name: value}
            serve = settings(changed, case.model, case.gpu)
            if serve != case.serve:  # the default, spelled out
                said = value if isinstance(value, str) else json.dumps(value)
                stack = _memory_stack(case, changed, serve)
                yield MemoryOf(label=f"{name}={said}", refused=_rule(case, changed), memory=stack)


def _order(value: JsonValue) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))


def _rule(case: _Case, flags: Flags) -> str | None:
    refusal = judge(case.site, flags)
    return None if refusal is None else refusal.rule


def _memory_stack(case: _Case, flags: Flags, serve: Serve) -> MemoryStack:
    there = _memory(case, serve)
    left = max(0.0, float(there.kv_cache))
    known = room(case.site, flags)
    return MemoryStack(
        verdict=_verdict(case, known, there),
        total=case.gpu.cuda_bytes,
        budget=int(there.budget),
        weights=int(there.weights),
        activations=int(there.activations),
        logits=int(there.logits),
        graphs=int(there.graphs),
        overhead=int(there.overhead),
        kv_cache=int(there.kv_cache),
        rest=max(0, case.gpu.cuda_bytes - int(there.weights + there.peak + there.graphs + there.overhead + left)),
        kv_tokens=int(there.kv_tokens),
        kv_tokens_at_most=None if case.gpu.measured else _tokens_at_most(case.model, serve, known),
        kv_bytes_per_token=kv_bytes_per_token(case.model, serve),
        full_sequences=round(float(there.blocks / there.blocks_each), 2),
        flags={
            name: getattr(serve, name)
            for name in ("dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
                         "gpu_memory_utilization", "enforce_eager", "tensor_parallel_size", "pipeline_parallel_size")
        },
    )  # fmt: skip


def _verdict(case: _Case, known: Room | None, there: Memory) -> Verdict:
    """`not told` where something is set that the estimates leave out, and nothing that was bounded speaks either."""
    if not case.gpu.measured:
        if known is None or (known.sharing > 1 and known.need_bytes <= known.budget_bytes):
            return "not told"
        if known.need_bytes > known.budget_bytes:
            return "cannot fit"
    return "fits" if bool(there.fits) else "too small"


def _tokens_at_most(model: ModelSpec, serve: Serve, known: Room | None) -> int | None:
    """The most KV tokens of one engine; None where the rules know no bound."""
    if known is None or (serve.pipeline_parallel_size > 1 and len(model.attention) > 1):
        return None
    types = replace(serve, dtype=known.serve.dtype, kv_cache_dtype=known.serve.kv_cache_dtype)
    return int(ceiling_kv_tokens(model, known.cache_bytes, types))


def _memory(case: _Case, serve: Serve) -> Memory:
    return served_memory(case.model, case.gpu, serve, case.site.env)


def _bound_of(step: Step, gpu: GpuSpec) -> Bound:
    compute, moving = float(step.compute_seconds(gpu)), float(step.memory_seconds(gpu))
    if float(step.seconds(gpu)) > max(compute, moving):
        return "links"
    return "compute" if compute > moving else "memory"


def _point(case: _Case, phase: Phase, batch: int, tokens: int, step: Step) -> Point:
    return Point(
        phase=phase,
        batch=batch,
        tokens=tokens,
        flops=float(step.flops),
        bytes=float(step.bytes),
        intensity=float(step.intensity),
        utilisation=float(step.utilisation(case.gpu)),
        seconds=float(step.seconds(case.gpu)),
        bound=_bound_of(step, case.gpu),
    )


def _decode_point(case: _Case, batch: int, context: int) -> Point:
    return _point(case, "decode", batch, context, decode(case.model, case.serve, batch, context))


def _prefill_point(case: _Case, prompt: int, unfused: bool = False) -> Point:
    model = case.model.stored_as(None) if unfused else case.model
    return _point(case, "prefill", 1, prompt, prefill(model, case.serve, 1, prompt, activations=unfused))


def _classes(case: _Case) -> Iterator[ClassShare]:
    """Operator classes of one sequence's and of the largest batch's decode, and of the longest prompt's prefill."""
    q = case.question
    context = q.contexts[-1]
    steps: list[tuple[Phase, int, int, Step]] = [
        ("decode", batch, context, decode(case.model, case.serve, batch, context))
        for batch in _distinct(q.batches[0], q.batches[-1])
    ]
    steps.append(("prefill", 1, q.prompts[-1], prefill(case.model, case.serve, 1, q.prompts[-1])))
    for phase, batch, tokens, step in steps:
        for operators, work in step.classes.items():
            yield ClassShare(
                phase=phase,
                batch=batch,
                tokens=tokens,
                operators=operators,
                flops=float(work.flops),
                bytes=float(work.bytes),
                intensity=float(work.intensity),
                bound="compute" if float(work.intensity) > case.gpu.ridge(work.dtype) else "memory",
            )


def _compute_bound(case: _Case, context: int) -> ComputeBound:
    batch = float(compute_bound_batch(case.model, case.gpu, case.serve, context))
    return ComputeBound(context=context, batch=int(batch) if np.isfinite(batch) else None)


# ---- bounds of the workload


@dataclass(frozen=True, slots=True)
class Plan:
    """How a configuration spreads work over time and GPUs, for bounds.

    Attributes:
        engines: of data parallelism.
        sharing: engines over which experts are spread; 1 without experts.
        stages: of pipeline parallelism; each works on another step.
        drafted: tokens that a step drafts for a sequence, all taken as accepted and free to draft.
    """

    engines: int = 1
    sharing: int = 1
    stages: int = 1
    drafted: int = 0


ONE = Plan()


def _plan(case: _Case, flags: Flags) -> Plan:
    known = room(case.site, flags)
    return ONE if known is None else Plan(known.engines, known.sharing, known.stages, known.drafted)


def _gpus_of(serve: Serve, plan: Plan) -> int:
    return serve.tensor_parallel_size * plan.engines * plan.stages


def _latency(case: _Case, lengths: Lengths, drafted: int) -> Latency:
    """Of each request alone; where the server decides which come, of the fastest."""
    plan, each = _plan(case, case.question.baseline.flags), np.arange(1.0, drafted + 2)[:, np.newaxis]
    filling = prefill(case.model, case.serve, 1, lengths.fresh, cached=lengths.shared).seconds(case.gpu)
    steps = decode(case.model, case.serve, 1, lengths.fresh, new_tokens=each).seconds(case.gpu) / each
    first, step = 1e3 * filling / (plan.stages * plan.sharing), 1e3 * steps.min(axis=0) / plan.sharing
    quantiles = [0.0, 0.0] if lengths.server_decides else [0.5, 0.95]
    ttft, tpot = (np.quantile(times, quantiles) for times in (first, step))
    return Latency(ttft_p50_ms=ttft[0], ttft_p95_ms=ttft[1], tpot_p50_ms=tpot[0], tpot_p95_ms=tpot[1])


def _bounds(case: _Case, lengths: Lengths) -> list[BoundsAt]:
    """Without speculation, by batch."""
    flags, largest = case.question.baseline.flags, case.question.batches[-1]
    plan = replace(_plan(case, flags), drafted=0)
    most = _batch_at_most(case, case.model, flags, replace(case.serve, max_num_seqs=largest), lengths)
    return [
        _bounds_at(case.model, case.gpu, case.serve, lengths, batch, plan, batch <= most)
        for batch in case.question.batches
    ]


def _bounds_at(
    model: ModelSpec, gpu: GpuSpec, serve: Serve, lengths: Lengths, batch: float, plan: Plan, possible: bool = True
) -> BoundsAt:
    rate = tokens_per_s(model, gpu, serve, lengths, batch, plan)
    each = np.arange(1.0, plan.drafted + 2)[:, np.newaxis]
    step = (decode(model, serve, batch, lengths.fresh, new_tokens=each).seconds(gpu) / each).min(axis=0) / plan.sharing
    several = _gpus_of(serve, plan)
    usd_per_s = None if gpu.price is None else gpu.price.usd_per_h * several / 3600
    return BoundsAt(
        batch=batch,
        possible=possible,
        tpot_ms=1e3 * float(step.min() if lengths.server_decides else np.median(step)),
        tokens_per_s=rate,
        usd_per_m_tokens=None if usd_per_s is None else usd_per_s / rate * 1e6,
        joules_per_token=None if gpu.power_w is None else gpu.power_w * several / rate,
    )


def tokens_per_s(
    model: ModelSpec, gpu: GpuSpec, serve: Serve, lengths: Lengths, batch: float, plan: Plan = ONE
) -> float:
    """The most output tokens a second that these requests allow with at most `batch` sequences in an engine's step.

    Whatever overlaps, all requests take at least all their compute, and at least all traffic of their decode steps:
    each token moves its sequence's cache, and at best a `batch`-th of the weights. A context is no shorter than the
    unshared part of the prompt. With k accepted drafts a step gives k + 1 tokens: compute is that of single tokens,
    which is less, and traffic that of the step. Engines and stages work at once, experts are read for all engines.

    Args:
        model: the model.
        gpu: whose peaks are taken at 100 %.
        serve: types and tensor parallelism.
        lengths: of the requests.
        batch: sequences in a step of one engine.
        plan: engines, stages and drafts.
    """
    each = plan.drafted + 1
    filling = prefill(model, serve, 1, lengths.fresh, cached=lengths.shared)
    single, step = (decode(model, serve, batch, lengths.fresh, new_tokens=new) for new in (1, each))
    compute = filling.compute_seconds(gpu) + lengths.steps * single.compute_seconds(gpu) / batch
    moving = lengths.steps * step.memory_seconds(gpu) / (batch * each * plan.sharing)
    if lengths.server_decides:  # of any mix
        least = max((compute / lengths.output).min(), (moving / lengths.output).min())
    else:
        least = max(compute.sum(), moving.sum()) / lengths.output.sum()
    return float(plan.engines * plan.stages / least)


def batch_at_most(model: ModelSpec, serve: Serve, lengths: Lengths, kv_tokens: float | None) -> float:
    """The mean number of sequences in a step is no larger: `max_num_seqs`, and what all memory holds of their caches.

    Over all decode steps the KV tokens held are at least the sum of the contexts; so the mean batch is at most the KV
    tokens there can be over the mean context. With a sliding window only `max_num_seqs` counts.

    Args:
        model: the model.
        serve: with `max_num_seqs`.
        lengths: of the requests.
        kv_tokens: at most; None where no bound is known.
    """
    most = float(serve.max_num_seqs)
    if kv_tokens is None or any(kind.window is not None for kind in model.attention):
        return most
    return max(1.0, min(most, kv_tokens / lengths.mean_context))


def _batch_at_most(case: _Case, model: ModelSpec, flags: Flags, serve: Serve, lengths: Lengths) -> float:
    held = None if case.gpu.measured else _tokens_at_most(model, serve, room(case.site, flags))
    return batch_at_most(model, serve, lengths, held)


KINDS = (
    "dtype", "kv_cache_dtype", "quantization", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "speculative_config",
)  # fmt: skip
SIZES = ("max_num_seqs", "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size")
"""Flags that a bound depends on: types, parallelism and drafts; and what decides the batch."""


def _best(case: _Case, lengths: Lengths, left: Sequence[ServingConfig]) -> dict[bool, Best]:
    """The best bound over what is left of the space: by False without speculation, by True with every draft accepted.

    The bounds depend on batch and kind alone, and a larger batch is never worse: of each kind the largest counts.
    """
    largest: dict[str, tuple[float, Flags]] = {}
    distinct = {json.dumps([config.flags.get(name) for name in (*KINDS, *SIZES)]): config.flags for config in left}
    for flags in distinct.values():
        model = as_loaded(case.question.found.model, flags)
        batch = _batch_at_most(case, model, flags, settings(flags, model, case.gpu), lengths)
        kind = json.dumps([flags.get(name) for name in KINDS])
        if kind not in largest or batch > largest[kind][0]:
            largest[kind] = batch, flags
    found: dict[bool, Best] = {}
    for batch, flags in largest.values():
        plan = _plan(case, flags)
        for spec in {False, plan.drafted > 0}:
            best = _best_of(case, lengths, batch, flags, plan if spec else replace(plan, drafted=0))
            if spec not in found or best.tokens_per_s > found[spec].tokens_per_s:
                found[spec] = best
    return found


def _best_of(case: _Case, lengths: Lengths, batch: float, flags: Flags, plan: Plan) -> Best:
    model = as_loaded(case.question.found.model, flags)
    at = _bounds_at(model, case.gpu, settings(flags, model, case.gpu), lengths, batch, plan)
    unnamed = () if plan.drafted else ("speculative_config",)
    named = {name: flags[name] for name in (*KINDS, *SIZES) if flags.get(name) is not None and name not in unnamed}
    output = lengths.output.min() if lengths.server_decides else lengths.output.mean()
    return Best(**at.model_dump(), flags=named, drafted=plan.drafted, max_rate_rps=at.tokens_per_s / float(output))


def _break_even(case: _Case) -> Iterator[BreakEven]:
    """Of every kind of speculation in the space or the baseline, for one sequence, 8 and the largest batch."""
    q = case.question
    kinds = {
        (str(given.get("method", "draft_model")), drafted, str(given.get("model", "")))
        for config in (q.baseline, *q.configs)
        if isinstance(drafted := (given := _speculation(config.flags)).get("num_speculative_tokens"), int)
    }
    for method, drafted, name in sorted(kinds):
        if name and name not in q.drafts and method not in ("ngram", "[ngram]"):
            continue
        draft = _draft_seconds(case, q.drafts[name]) if name in q.drafts else 0.0
        for batch in _distinct(1, 8, q.batches[-1]):
            least = float(break_even_acceptance(case.model, case.gpu, case.serve, batch, q.contexts[0], drafted, draft))
            yield BreakEven(
                method=f"{method} {name}".strip(),
                num_speculative_tokens=drafted,
                batch=batch,
                context=q.contexts[0],
                acceptance=least if np.isfinite(least) and least <= 1 else None,
            )


def _draft_seconds(case: _Case, draft: ModelSpec) -> Callable[[Floats, Floats], Floats]:
    return lambda batch, context: decode(draft, case.serve, batch, context).seconds(case.gpu)


# ---- rules


def _pruned(case: _Case) -> tuple[Pruned, list[ServingConfig]]:
    """What the rules say of the space, and what they leave of it."""
    q = case.question
    flags = [config.flags for config in q.configs]
    hard = judge_all(case.site, flags)
    left = [config for config, refusal in zip(q.configs, hard, strict=True) if refusal is None]
    soft = judge_all(case.site, [config.flags for config in left], kinds=("soft",))
    against = judge(case.site, q.baseline.flags)
    refused = len(flags) - len(left)
    answer = Pruned(
        space_size=q.space.size() if q.space else 0,
        judged=len(flags),
        refused=refused,
        hard=_counts(q, q.configs, hard),
        soft=_counts(q, left, soft),
        baseline=against and f"{against.rule}: {against.message}",
        asked_for=sum(judge(case.site, config.flags) is None for config in _enqueued(q)),
        nearest=_nearest(case, q.space) if flags and not left else None,
    )
    return answer, left


def _counts(q: _Question, configs: Sequence[ServingConfig], said: Sequence[Refusal | None]) -> list[RuleCount]:
    """By rule, the one that refuses most first."""
    examples: dict[str, tuple[ServingConfig, Refusal]] = {}
    counts: Counter[str] = Counter()
    for config, refusal in zip(configs, said, strict=True):
        if refusal is not None:
            counts[refusal.rule] += 1
            examples.setdefault(refusal.rule, (config, refusal))
    evidence = {rule.name: rule.evidence for rule in RULES}
    return [
        RuleCount(
            rule=name,
            count=count,
            share=count / len(q.configs),
            message=examples[name][1].message,
            flags=q.space.over_serve(examples[name][0]) if q.space else {},
            source=examples[name][1].source,
            evidence=evidence[name],
        )
        for name, count in counts.most_common()
    ]


def _nearest(case: _Case, space: Space | None) -> str | None:
    """What the pruner says when nothing is left, with what comes nearest to working; of a drawn space that alone."""
    q, e = case.question, case.question.experiment
    if space is None:
        return None
    pruner = Pruner(e.model_copy(update={"study": e.study.model_copy(update={"prune": True})}), space, case.site)
    if pruner.survey() is not None:
        return pruner.nothing_left()
    drawn = [config.flags for config in (*q.configs, *_enqueued(q))]
    return f"the rules rule out all {len(q.configs)} configurations that were drawn.{pruner.nearest(drawn)}"


def _enqueued(q: _Question) -> list[ServingConfig]:
    """What `study.enqueue` asks for, in the space or not."""
    return [] if q.space is None else [q.space.config(flags) for flags in q.experiment.study.enqueue]


# ---- what was measured


def _store(e: Experiment, results: str | Path | None) -> Store | None:
    """The results directory; None when the experiment's has nothing yet."""
    path = Path(e.results if results is None else results)
    if (path / "trials").is_dir():
        return Store(path, readonly=True)
    if results is not None:
        raise InputError(f"--results: {str(path)!r}: holds no results. Give the directory that `varcas sweep` wrote.")
    return None


def _calibration(case: _Case, store: Store | None, simulated: bool) -> Calibration:
    """Of the store's rows of this model on this GPU."""
    model, cpu = case.question.found.model, case.gpu if case.gpu.measured else None
    if store is None:
        return Calibration(simulated=simulated)
    name = case.question.experiment.model
    rows = [row for row in store.rows() if row.model == name and (row.gpu_name is None) == case.gpu.measured]
    made = calibrate(rows, {name: model}, requests=store.requests, cpu=cpu, simulated=simulated)
    return replace(made, fits={key: fit for key, fit in made.fits.items() if key.gpu == case.gpu.name})


def _fits(calibrations: Sequence[Calibration]) -> Iterator[tuple[Fit, bool]]:
    """Fits, and whether they are of simulated rows."""
    for made in calibrations:
        yield from ((fit, made.simulated) for _, fit in sorted(made.fits.items()))


def _left_out(made: Calibration) -> dict[str, int]:
    return dict(Counter(reason for _, reason in made.excluded).most_common())


def _measurements(case: _Case, calibrations: Sequence[Calibration]) -> list[MeasuredPoint]:
    peak, bandwidth = case.gpu.peak_flops(case.units), case.gpu.memory_bytes_per_s
    return [
        MeasuredPoint(
            study=point.study,
            number=point.number,
            kind=point.kind,
            batch=point.batch,
            context=point.context,
            prefill_tokens=point.prefill_tokens,
            intensity=point.intensity,
            flops_per_s=point.flops_per_s,
            efficiency=max(point.flops / peak, point.bytes / bandwidth) / point.seconds,
            kernel=point.key.kernel,
            engine_version=point.key.engine_version,
            simulated=simulated,
        )
        for fit, simulated in _fits(calibrations)
        for point in fit.points
    ]


def _attained(calibrations: Sequence[Calibration]) -> list[Attained]:
    return [
        Attained(
            kernel=fit.key.kernel,
            engine_version=fit.key.engine_version,
            starts=fit.starts,
            points=len(fit.points),
            figures={name: _interval(fit.figure(name)) for name in PARAMETERS},
            error_median=fit.left_out.median if fit.left_out else None,
            simulated=simulated,
            words=fit.describe(),
        )
        for fit, simulated in _fits(calibrations)
    ]


def _interval(quantity: Quantity, factor: float = 1.0) -> Interval:
    value, lo, hi = (
        None if number is None or not np.isfinite(number) else number * factor
        for number in (quantity.value, quantity.lo, quantity.hi)
    )
    return Interval(value=value, lo=lo, hi=hi)


def _expected(case: _Case, made: Calibration, lengths: Lengths) -> Expected:
    q = case.question
    traffic = Traffic(
        prompt_tokens=float(lengths.prompt.mean()),
        output_tokens=float(lengths.output.mean()),
        rate_rps=q.experiment.workload.mean_rps,
        cached_tokens=float(lengths.shared.mean()),
    )
    quantization = q.baseline.flags.get("quantization")
    found = estimate(
        made,
        case.model,
        case.gpu,
        case.serve,
        traffic,
        engine_version=q.engine_version,
        quantization=quantization if isinstance(quantization, str) else None,
        kv_tokens=float(_memory(case, case.serve).kv_tokens),
    )
    return Expected(
        basis=found.basis,
        source=found.source,
        tpot_ms=_interval(found.tpot_s, 1e3),
        ttft_ms=_interval(found.ttft_s, 1e3),
        tokens_per_s=_interval(found.tokens_per_s),
        saturated=found.saturated,
        beyond=list(found.beyond),
    )


# ---- the feasible region


def _region(case: _Case) -> Iterator[Cell]:
    """`max_num_seqs` x `max_model_len` with the baseline's other flags."""
    flags = case.question.baseline.flags
    seqs_here = _distinct(*case.question.batches, int(case.serve.max_num_seqs))
    for length in region_lengths(case.question.found.model, case.serve):
        for seqs in seqs_here:
            yield _cell(case, {**flags, "max_num_seqs": seqs, "max_model_len": length})


def region_lengths(model: ModelSpec, serve: Serve) -> list[int]:
    """Powers of two from 512 to the model's longest context, and the baseline's own."""
    longest = min(model.max_position, MOST_LENGTH)
    powers = {2**power for power in range(9, 18) if 2**power <= longest}
    return sorted({*powers, longest, int(serve.max_model_len)})


def _cell(case: _Case, flags: Flags) -> Cell:
    serve = settings(flags, case.model, case.gpu)
    there = _memory(case, serve)
    held = max(0.0, float((there.blocks - 1) / there.blocks_each))
    verdict: CellVerdict = "holds" if held >= float(serve.max_num_seqs) else "waits"
    stack = _verdict(case, room(case.site, flags), there)
    verdict = verdict if stack == "fits" else "not told" if stack == "not told" else "too small"
    return Cell(
        max_num_seqs=int(serve.max_num_seqs),
        max_model_len=int(serve.max_model_len),
        verdict="refused" if _rule(case, flags) is not None else verdict,
        sequences=round(held, 2),
    )
