"""The simulated engine: the same experiment, configurations, traffic and rows as a real server's, in virtual time.

What starts is decided by `rules` and `memory`, what a step takes by `calibration`'s fit to real measurements (without
any, by stated priors), what is in a step by `batching`. Each start has a speed of its own, drawn from its study and
label, so that confirmation by fresh starts means what it means on real servers. Nothing here ever starts, asks or loads
anything, and every row is marked by `engine: simulated`.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from statistics import median
from typing import Any, Literal

from packaging.version import Version
from pydantic import JsonValue

from varcas import gpus, hardware
from varcas.batching import Limits, Step
from varcas.calibration import Calibration, Traffic, calibrate, efficiency_for, estimate, fit_for
from varcas.engine.node import Checked, NodeFacts
from varcas.errors import InputError, TrialError
from varcas.experiment import Experiment, Server, Workload
from varcas.gpus import GpuSpec
from varcas.known import find_model
from varcas.memory import Serve, block_bytes, loaded_bytes, served_memory, settings, whole
from varcas.model import ModelSpec
from varcas.pruner import draft_names, failure_kind, gpu_at_best, server_decides, site_of
from varcas.records import HostFacts, Outcome, RequestRecord, ScheduledRequest, ServerFacts, StageTimes, TrialRow
from varcas.rules import Flags, Site, judge, speculation
from varcas.steptime import StepClock, StepTimes, kernel_of
from varcas.trial import TrialTask
from varcas.virtual import Engine, VirtualLoad
from varcas.workload.schedule import schedule

DEFAULT_VERSION = "0.32.0"
"""Of vLLM where none is installed: the one whose scheduler `batching` follows."""
MAX_FIRST = 6
"""Latest configurations whose TTFT tells what a request takes before its first step: a simulation each."""
MAX_ROWS = 64
"""Latest real measurements of the GPU that step times are fitted to, with their requests: some 30 ms each."""
SLO_RULES = frozenset(("slo_ttft", "slo_tpot", "slo_e2e", "slo_norm"))
"""Rules that say that a configuration is too slow, not that it does not start."""
DRAFT_METHODS = ("draft_model",)
LOOKUP_METHODS = ("ngram", "[ngram]", "ngram_gpu", "suffix")
SYNCHRONOUS_METHODS = ("ngram", "[ngram]", "suffix", "medusa")
"""Speculation that turns async scheduling off: `VllmConfig.__post_init__`, vLLM 0.32 `config/vllm.py`."""
MODELLED = frozenset((
    "async_scheduling", "block_size", "disable_hybrid_kv_cache_manager", "dtype", "enable_chunked_prefill",
    "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_dtype", "kv_cache_memory_bytes",
    "load_format", "long_prefill_token_threshold", "max_model_len", "max_num_active_seqs", "max_num_batched_tokens",
    "max_num_scheduled_tokens", "max_num_seqs", "num_gpu_blocks_override", "quantization", "scheduling_policy", "seed",
    "speculative_config", "tensor_parallel_size", "watermark",
))  # fmt: skip
"""Flags that do here what they do there; others are taken, change nothing, and are named in the row's warnings."""
REFUSED = ("data_parallel_size", "pipeline_parallel_size")
"""Flags that change too much to be passed over."""


@dataclass(frozen=True, slots=True)
class Simulator:
    """Simulated servers of one experiment's model on one GPU.

    Attributes:
        experiment: as loaded.
        model: as its `config.json` has it.
        revision: of the copy of that.
        gpu: whose figures are taken.
        site: what the rules know.
        calibration: of real measurements.
        version: of the vLLM that is simulated.
        request_s: what a request takes before its first step, where measurements tell it; None: the fit's.
    """

    experiment: Experiment
    model: ModelSpec
    revision: str
    gpu: GpuSpec
    site: Site
    calibration: Calibration
    version: str
    request_s: float | None = None

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        rows: Iterable[TrialRow] = (),
        requests: Callable[[str], Sequence[RequestRecord]] | None = None,
    ) -> Simulator:
        """For an experiment.

        Args:
            experiment: whose `hardware.gpu` names a GPU of the catalogue, or `cpu`.
            rows: real measurements, of any model; simulated ones are left out.
            requests: of a row, by its id.

        Raises:
            InputError: a model or a GPU that is not described, or a flag that cannot be simulated.
        """
        found, gpu = find_model(experiment.model, experiment.revision), _gpu(experiment)
        text = json.dumps(found.config, sort_keys=True)
        revision = hashlib.sha256(text.encode()).hexdigest()[:16]
        version = _version(experiment, gpu)
        facts = _facts(experiment, gpu, version, revision, text)
        best = None if gpu.measured else gpu_at_best(gpu.ray, facts)
        most = None if gpu.measured else experiment.hardware.count
        site = site_of(experiment, facts, best, on_cpu=gpu.measured, gpus_per_node=most)
        site = replace(site, drafts={**site.drafts, **_drafts(experiment)})
        known = list(rows)
        calibration = calibrated(gpu, experiment.model, known, requests)
        made = cls(experiment, found.model, revision, gpu, site, calibration, version)
        return made if requests is None else replace(made, request_s=made._first_waits_s(known, requests))

    def node(self, server: Server, model: str, revision: str | None) -> SimulatedNode:
        """What answers for a node that has this GPU; arguments as `engine.node.Node`."""
        return SimulatedNode(self)

    def facts(self) -> NodeFacts:
        """Of that node."""
        text = json.dumps(dict(self.site.config), sort_keys=True)
        return _facts(self.experiment, self.gpu, self.version, self.revision, text)

    def basis(self, flags: Flags) -> str:
        """What the step times of a configuration rest on, in words."""
        try:
            model, serve = self._as_served(flags)
        except InputError as error:
            return f"none: {error}"
        kernel = self._kernel(model, serve, flags)
        found, beyond = fit_for(self.calibration, self.gpu, kernel, self.version)
        if found is None:
            return f"priors, not measurements ({'; '.join(beyond)})"
        models = ", ".join(sorted(found.models))
        said = f"; it extrapolates: {'; '.join(beyond)}" if beyond else ""
        return f"{len(found.points)} points of {found.starts} measured starts of {models} ({found.key}){said}"

    def beyond(self, flags: Flags, traffic: Traffic) -> tuple[str, ...]:
        """In what a configuration under a load leaves what was measured, as `calibration.Estimate` has it."""
        model, serve = self._as_served(flags)
        method = flags.get("quantization")
        found = estimate(
            self.calibration, model, self.gpu, serve, traffic,
            engine_version=self.version, quantization=method if isinstance(method, str) else None,
        )  # fmt: skip
        return found.beyond

    # a trial

    def run(self, task: TrialTask, cancelled: threading.Event) -> Outcome:
        """Simulates one start, its load and its drain; arguments and result as `trial.run_trial`."""
        started_at = datetime.datetime.now(datetime.UTC)
        host = HostFacts(platform.node(), None if self.gpu.measured else self.gpu.names[0], task.num_gpus)
        if cancelled.is_set():
            return Outcome("stopped", started_at, host, StageTimes(), failure_kind="interrupted", failure_detail="")
        try:
            load, facts = self._load(task)
        except TrialError as error:
            return Outcome(
                "failed", started_at, host, StageTimes(), failure_kind=error.kind, failure_detail=error.detail
            )
        result = load.result()
        times = StageTimes(load_s=result.duration_s, drain_s=result.drain_s)
        return Outcome("complete", started_at, host, times, facts, result, tuple(load.samples))

    def _load(self, task: TrialTask) -> tuple[VirtualLoad, ServerFacts]:
        """Raises TrialError: it would not start, or no request fits it."""
        flags, workload = task.config.flags, task.experiment.workload
        engine = self.engine(flags, f"{task.experiment.name}/{task.label}")
        length = engine.limits.max_model_len
        try:
            drawn = schedule(workload, start_s=0.0, duration_s=workload.duration_s, max_len=length, stream="measure")
        except InputError as error:  # as a real start does
            raise TrialError("unsupported_by_engine", str(error)) from error
        if not drawn:
            raise TrialError("all_requests_failed", f"no request came due in {workload.duration_s:g} s: lengthen it")
        load = VirtualLoad(drawn, engine, duration_s=workload.duration_s, max_drain_s=workload.max_drain_s)
        facts = ServerFacts(
            engine_version=self.version,
            resolved=dict(task.resolved),
            kv_cache_tokens=engine.limits.num_blocks * engine.limits.block_size,
            model_revision=self.revision,
        )
        return load, facts

    def engine(self, flags: Flags, start: str = "") -> Engine:
        """A started server.

        Args:
            flags: of its configuration.
            start: which start, in words that no other has: they decide its speed.

        Raises:
            TrialError: it would not start.
            InputError: it cannot be simulated.
        """
        model, serve = self._as_served(flags)
        self._require_start(flags, serve)
        draft, drafted = self._draft(flags)
        limits = self._limits(model, serve, flags, draft, drafted)
        seed = int.from_bytes(hashlib.sha256(start.encode()).digest()[:8], "big")
        own = math.exp(random.Random(seed).gauss(0.0, self.experiment.simulation.start_sd_frac)) if start else 1.0
        kernel = self._kernel(model, serve, flags)
        attained = efficiency_for(self.calibration, self.gpu, kernel, self.version)
        clock = StepClock(StepTimes.of(model, self.gpu, serve, kernel), attained)
        drafting = self._draft_clock(model, draft, serve) if draft is not None else None

        def seconds(step: Step) -> float:
            taken = clock.seconds(step.batch, step.context, step.prefill_tokens, step.cached, step.prompts)
            if drafting is not None and step.drafting:
                taken += drafted * drafting.seconds(step.drafting, step.cached)
            return own * taken

        return Engine(
            limits,
            seconds,
            own * (attained.request_s if self.request_s is None else self.request_s),
            self._is_async(flags),
            seed,
        )

    def _first_waits_s(
        self, rows: Iterable[TrialRow], requests: Callable[[str], Sequence[RequestRecord]]
    ) -> float | None:
        """What is left of measured starts' median TTFT when a simulated one's, without such a wait, is taken off."""
        told = [row for row in rows if self._tells_first_waits(row)]
        latest = {row.trial_key: row for row in sorted(told, key=lambda row: row.started_at)}
        left = [self._first_wait_s(row, requests(row.trial_id)) for row in list(latest.values())[-MAX_FIRST:]]
        return max(0.0, median(left)) if left else None

    def _tells_first_waits(self, row: TrialRow) -> bool:
        whole = row.state == "complete" and row.valid is True and row.saturated is False and not row.simulated
        same = row.model == self.experiment.model and _is_on(row, self.gpu) and row.engine_version == self.version
        return whole and same and row.ttft_sent_p50_ms is not None and "speculative_config" not in row.flags

    def _first_wait_s(self, row: TrialRow, records: Sequence[RequestRecord]) -> float:
        workload = Workload.model_validate_json(row.workload_json)
        engine = replace(self.engine(row.config_flags), request_s=0.0)
        drawn = asked(workload, engine.limits.max_model_len, records)
        load = VirtualLoad(drawn, engine, duration_s=workload.duration_s, max_drain_s=workload.max_drain_s)
        simulated = median(record.token_offsets_s[0] for record in load.records() if record.token_offsets_s)
        return (row.ttft_sent_p50_ms or 0.0) / 1e3 - simulated

    def _as_served(self, flags: Flags) -> tuple[ModelSpec, Serve]:
        """The model as it is loaded, and the server's settings. Raises InputError: they cannot be read."""
        method = flags.get("quantization")
        model = self.model.quantised(method) if isinstance(method, str) else self.model
        return model, settings(flags, model, self.gpu)

    def _kernel(self, model: ModelSpec, serve: Serve, flags: Flags) -> str:
        method = flags.get("quantization")
        return kernel_of(model, serve, self.version, method if isinstance(method, str) else None)

    def _require_start(self, flags: Flags, serve: Serve) -> None:
        """Raises TrialError: what a hard rule says, or what was seen to fail on such a GPU."""
        refusal = judge(self.site, flags, disabled=SLO_RULES)
        if refusal is not None:
            raise TrialError(failure_kind(refusal.rule), f"{refusal.message} [{refusal.source}]")
        if self.gpu.compute_capability == 90 and serve.kv_cache_dtype.startswith("fp8") and serve.dtype == "float16":
            raise TrialError(
                "unsupported_by_engine",
                "For FP16/BF16 input, output must have the same dtype as inputs. For FP8 input, output must have dtype "
                "BF16 [seen on an H100 with vLLM 0.24.0: docs/h100.md, trial 4; not known of other versions]",
            )

    def _limits(self, model: ModelSpec, serve: Serve, flags: Flags, draft: ModelSpec | None, drafted: int) -> Limits:
        """Raises TrialError: the memory does not hold one sequence of `max_model_len`."""
        there = served_memory(model, self.gpu, serve, self.site.env)
        room, block, blocks = float(there.kv_cache), float(there.block), int(there.blocks)
        if draft is not None:
            room -= loaded_bytes(draft, serve, self.gpu)
            block += block_bytes(draft, serve)
            blocks = blocks if serve.num_gpu_blocks_override is not None else max(0, int(room // block))
        if blocks - 1 < float(there.blocks_each):
            raise _too_small(room, block, int(there.blocks_each), self.gpu)
        active, tokens = whole(flags, "max_num_active_seqs"), whole(flags, "max_num_scheduled_tokens")
        watermark = flags.get("watermark")
        return Limits(
            max_num_seqs=min(int(serve.max_num_seqs), active or int(serve.max_num_seqs)),
            max_num_batched_tokens=min(int(serve.max_num_batched_tokens), tokens or int(serve.max_num_batched_tokens)),
            max_model_len=int(serve.max_model_len),
            num_blocks=blocks - 1,
            block_size=serve.block_size,
            enable_chunked_prefill=flags.get("enable_chunked_prefill") is not False,
            enable_prefix_caching=flags.get("enable_prefix_caching") is not False,
            long_prefill_token_threshold=whole(flags, "long_prefill_token_threshold") or 0,
            watermark_blocks=int(watermark * blocks) if isinstance(watermark, float) else 0,
            priority=flags.get("scheduling_policy") == "priority",
            drafted=drafted,
            acceptance=self.experiment.simulation.acceptance,
        )

    def _is_async(self, flags: Flags) -> bool:
        """`VllmConfig.__post_init__`: on unless the executor or the kind of speculation forbids it."""
        told = speculation(flags) or {}
        if self.gpu.measured or told.get("method") in SYNCHRONOUS_METHODS:
            return False
        return flags.get("async_scheduling") is not False

    def _draft(self, flags: Flags) -> tuple[ModelSpec | None, int]:
        """The draft model, if there is one, and how many tokens a step drafts. Raises InputError: not simulated."""
        told = speculation(flags)
        if not told:
            return None, 0
        method, count, name = told.get("method"), told.get("num_speculative_tokens"), told.get("model")
        if method in LOOKUP_METHODS and isinstance(count, int):
            return None, count
        draft = self.site.drafts.get(str(name))
        if method in (None, *DRAFT_METHODS) and draft is not None and isinstance(count, int):
            return draft, count
        raise InputError(
            f"speculative_config: {json.dumps(told)}: the simulated engine knows {', '.join(LOOKUP_METHODS)}, and "
            "draft models whose config.json can be found. Take it out, or run it on a real server."
        )

    def _draft_clock(self, model: ModelSpec, draft: ModelSpec, serve: Serve) -> StepClock:
        """A draft's own steps; what the host does grows with layers, and nothing is sent for it."""
        kernel = kernel_of(draft, serve, self.version)
        attained = efficiency_for(self.calibration, self.gpu, kernel, self.version)
        share = draft.num_layers / model.num_layers
        attained = replace(attained, overhead_s=attained.overhead_s * share, sequence_s=attained.sequence_s * share)
        return StepClock(StepTimes.of(draft, self.gpu, serve, kernel), attained)


def _too_small(room_bytes: float, block: float, blocks_each: int, gpu: GpuSpec) -> TrialError:
    if room_bytes <= 0:
        return TrialError(
            "out_of_memory",
            f"weights, one step and graphs take {-room_bytes / gpus.GIB:.2f} GiB more than a {gpu.name} gives "
            "[estimate: memory.memory]",
        )
    return TrialError(
        "kv_cache_too_small",
        f"about {room_bytes / gpus.GIB:.2f} GiB are left for the KV cache, one sequence of max_model_len takes "
        f"{block * blocks_each / gpus.GIB:.2f} GiB [estimate: memory.memory]",
    )


class SimulatedNode:
    """Answers for a node that is not there, as `engine.node.Node` does for one that is."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    def facts(self) -> NodeFacts:
        """Of the GPU that is simulated."""
        return self._simulator.facts()

    def flag_names(self) -> list[str]:
        """Flags of `vllm serve` 0.32."""
        return flag_names()

    def check(self, argv: Sequence[str], endpoint: Literal["auto", "chat", "completions"] = "auto") -> Checked:
        """Settings as `memory.settings` has them; what cannot be read is refused. vLLM itself is not asked.

        Raises:
            InputError: a flag that cannot be simulated.
        """
        simulator, flags = self._simulator, flags_of(argv)
        for name in REFUSED:
            if flags.get(name) not in (None, 1):
                raise InputError(f"{name}: {flags[name]}: cannot be simulated. Take it out, or run it on real servers.")
        simulator._draft(flags)
        chosen: Literal["chat", "completions"] = "chat" if endpoint == "chat" else "completions"
        try:
            _, serve = simulator._as_served(flags)
        except InputError as error:
            return Checked(ok=False, error=str(error), flag=str(error).partition(":")[0], stage="config")
        return Checked(ok=True, resolved=_resolved(serve, flags, simulator._is_async(flags)), endpoint=chosen)

    def close(self) -> None:
        """Nothing was started."""


def flag_names() -> list[str]:
    """Flags of `vllm serve` 0.32, as experiment files spell them."""
    text = resources.files("varcas").joinpath("flag_names.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def unmodelled(flags: Iterable[str]) -> list[str]:
    """Flags that change nothing in a simulated engine."""
    return sorted(set(flags) - MODELLED)


def flags_of(argv: Sequence[str]) -> dict[str, JsonValue]:
    """The inverse of `ServingConfig.argv`, but for text that reads as JSON."""
    flags: dict[str, JsonValue] = {}
    words = list(argv)
    while words:
        name, equals, value = words.pop(0).partition("=")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        flag = name.removeprefix("--").replace("-", "_")
        if values:
            flags[flag] = _value(values[0]) if len(values) == 1 else [_value(one) for one in values]
        else:
            flags[flag.removeprefix("no_")] = not flag.startswith("no_")
    return {flag: value for flag, value in flags.items() if flag not in ("model", "revision")}


def _value(text: str) -> JsonValue:
    try:
        found: JsonValue = json.loads(text)
    except ValueError:
        return text
    return found


def _resolved(serve: Serve, flags: Flags, is_async: bool) -> dict[str, Any]:
    """As the validator groups what vLLM resolves, as far as it is simulated."""
    return {
        "model": {"max_model_len": int(serve.max_model_len), "dtype": serve.dtype},
        "cache": {
            "block_size": serve.block_size,
            "cache_dtype": serve.kv_cache_dtype,
            "enable_prefix_caching": flags.get("enable_prefix_caching") is not False,
            "gpu_memory_utilization": float(serve.gpu_memory_utilization),
        },
        "scheduler": {
            "max_num_seqs": int(serve.max_num_seqs),
            "max_num_batched_tokens": int(serve.max_num_batched_tokens),
            "enable_chunked_prefill": flags.get("enable_chunked_prefill") is not False,
            "async_scheduling": is_async,
        },
    }


# ---- what an experiment is simulated with


def asked(workload: Workload, length: int, records: Sequence[RequestRecord]) -> Sequence[ScheduledRequest]:
    """What a measurement really asked, where an earlier varcas drew others from the same seed; else the schedule.

    Args:
        workload: of the measurement.
        length: `max_model_len`.
        records: its requests.
    """
    drawn = schedule(workload, start_s=0.0, duration_s=workload.duration_s, max_len=length, stream="measure")
    came = [(record.scheduled_prompt_tokens, record.scheduled_output_tokens) for record in records]
    if server_decides(workload, drawn) or came == [(one.prompt_tokens, one.output_tokens) for one in drawn]:
        return drawn
    return [
        ScheduledRequest(at, record.scheduled_s, prompt, output, seed=at, conversation=at)
        for at, (record, (prompt, output)) in enumerate(zip(records, came, strict=True))
    ]


def calibrated(
    gpu: GpuSpec,
    model: str,
    rows: Iterable[TrialRow],
    requests: Callable[[str], Sequence[RequestRecord]] | None = None,
) -> Calibration:
    """Fits to the latest real measurements on a GPU: of this model, or of whatever is described where it has none.

    What the host does in a step grows with a model's layers, which the law does not know: its own starts tell it.
    """
    here = [row for row in rows if not row.simulated and row.state == "complete" and _is_on(row, gpu)]
    here = [row for row in here if row.model == model] or here
    latest = sorted(here, key=lambda row: row.started_at)[-MAX_ROWS:]
    models: dict[str, ModelSpec] = {}
    for name in {row.model for row in latest}:
        try:
            models[name] = find_model(name).model
        except InputError:  # `calibrate` says so of its rows
            continue
    cpu = gpu if gpu.measured else None
    return calibrate(latest, models, requests=requests, cpu=cpu, saturated=True)


def _is_on(row: TrialRow, gpu: GpuSpec) -> bool:
    if gpu.measured or row.gpu_name is None:
        return gpu.measured and row.gpu_name is None
    return gpu.name in {found.name for found in gpus.variants(row.gpu_name)}


def _gpu(experiment: Experiment) -> GpuSpec:
    """Raises InputError: none is named, or one that the catalogue lacks."""
    name = experiment.hardware.gpu
    if name == "auto":
        name = next((found.name for found in hardware.gpus() if gpus.variants(found.name)), name)
    if name == "auto":
        raise InputError(
            "hardware.gpu: auto: this host has none that is known, and a simulated engine needs one: a GPU of the "
            "catalogue (`varcas gpus`), or `cpu` for this host's."
        )
    try:
        return gpus.this_cpu() if name == "cpu" else gpus.gpu(name)
    except InputError as error:
        raise InputError(f"hardware.{error}") from error


def _version(experiment: Experiment, gpu: GpuSpec) -> str:
    if (named := experiment.simulation.engine_version) is not None:
        return named
    try:
        installed = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return DEFAULT_VERSION
    return installed if gpu.measured else Version(installed).base_version


def _facts(experiment: Experiment, gpu: GpuSpec, version: str, revision: str, config: str) -> NodeFacts:
    environment: Mapping[str, str] = os.environ if gpu.measured else {}
    return NodeFacts(
        engine_version=version,
        model_path=experiment.model,
        model_revision=revision,
        gpu_name=None if gpu.measured else gpu.names[0],
        driver_version=None,
        gpu_memory_bytes=None if gpu.measured else gpu.memory_bytes,
        model_config=config,
        host_memory_bytes=gpu.memory_bytes if gpu.measured else None,
        engine_env={k: v for k, v in environment.items() if k.startswith("VLLM_") and k != "VLLM_API_KEY"},
    )


def _drafts(experiment: Experiment) -> dict[str, ModelSpec]:
    """Draft models that some configuration names, as far as they are found and described."""
    found: dict[str, ModelSpec] = {}
    for name in sorted(draft_names(experiment)):
        try:
            found[name] = find_model(name).model
        except InputError:  # rules on it then say nothing, and `check` refuses it
            continue
    return found
