"""Keeps what cannot work from being started, and starts a small share of it all the same, to test the rules.

The rules are `rules.py`'s hard ones. The baseline is never ruled out. A row that works though a rule says it cannot
switches that rule off for its study; since rows are judged again when a study is opened, that survives a resume.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from varcas.engine.failures import HINTS, RETRIED
from varcas.engine.node import NodeFacts, config_text, other_models
from varcas.errors import InputError
from varcas.experiment import Choices, Experiment, Range, Workload
from varcas.gpus import GIB, GpuSpec, ceiling, installed, variants
from varcas.model import ModelSpec, from_config
from varcas.records import ScheduledRequest, TrialRow
from varcas.rules import Feasible, Refusal, Site, bound_ms, judge, judge_all, nearest_feasible
from varcas.space import Flags, Params, ServingConfig, Space
from varcas.workload.schedule import schedule

VLLM_REFUSES, NEEDS_MORE_GPUS = "vllm_refuses", "needs_more_gpus"
OTHER_REASONS = frozenset({VLLM_REFUSES, NEEDS_MORE_GPUS})
"""`reason_rule` of rows that no rule of `rules.py` ruled out."""
JUDGED_AT_MOST = 100_000
"""Larger spaces are judged proposal by proposal: listing and judging so many takes some 3 s."""
SLO = "slo_out_of_reach"
BY_SHARE = frozenset(("weights_do_not_fit", "sequence_does_not_fit"))
"""Rules that a larger `gpu_memory_utilization` satisfies."""
FAILURE_KINDS = {
    **dict.fromkeys(("slo_ttft", "slo_tpot", "slo_e2e", "slo_norm"), SLO),
    **dict.fromkeys(("weights_beyond_memory", "weights_do_not_fit", "given_cache_beyond_memory"), "out_of_memory"),
    **dict.fromkeys(
        ("sequence_does_not_fit", "given_cache_too_small", "blocks_too_few", "cpu_share_too_small"),
        "kv_cache_too_small",
    ),
    **dict.fromkeys(
        ("bfloat16_without_units", "format_without_units", "cache_type_without_units", "too_few_gpus"),
        "unsupported_by_gpu",
    ),
}
"""Rule to the kind of failure that the start would have had; the others repeat what vLLM says of flags."""


def failure_kind(rule: str) -> str:
    """The kind of failure that a start against this rule has."""
    return FAILURE_KINDS.get(rule, "unsupported_by_engine")


def reason_columns(refusal: Refusal) -> dict[str, str]:
    """What a row says of a configuration that was ruled out."""
    kind = failure_kind(refusal.rule)
    return {
        "failure_kind": kind,
        "failure_detail": f"{refusal.message} [{refusal.source}]",
        "failure_hint": HINTS[kind],
        "reason_rule": refusal.rule,
    }


def is_pruned(row: TrialRow) -> bool:
    """Whether a rule of `rules.py` kept it from being started."""
    return row.state == "infeasible" and row.reason_rule is not None and row.reason_rule not in OTHER_REASONS


def audit_draw(seed: int, config_hash: str) -> float:
    """A number from 0 to 1 that a configuration has in a study, on every machine and in every run."""
    digest = hashlib.sha256(f"audit:{seed}:{config_hash}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


@dataclass(frozen=True, slots=True)
class Survey:
    """A finite space, judged whole.

    Attributes:
        size: configurations in it.
        left: parameters of those that may work, by content hash; the baseline among them.
        by_rule: how many each rule rules out, most first.
        first: the first refusal of each rule.
        examples: the first configuration that each rule rules out, by its parameters.
        whole: every one is ruled out, and the baseline too, wherever it lies.
        audits: those to be started all the same, in order.
    """

    size: int
    left: Mapping[str, Params]
    by_rule: Mapping[str, int]
    first: Mapping[str, Refusal]
    whole: bool
    audits: tuple[Audit, ...]
    examples: Mapping[str, Params]


@dataclass(frozen=True, slots=True, order=True)
class Audit:
    """A configuration that is ruled out, and may be started all the same; sorts by its draw."""

    draw: float
    config_hash: str
    params_json: str
    config_json: str
    rule: str


class Pruner:
    """A study's rules, what they rule out, and which of them were found wrong.

    Args:
        experiment: `study.prune`, `study.audit_frac`, `study.seed`, `study.trials` are its.
        space: what may be proposed.
        site: what the rules know.
        rows: of the study so far.

    Attributes:
        disabled: rules that are off for this study, with what proved them wrong.
    """

    def __init__(self, experiment: Experiment, space: Space, site: Site, rows: Iterable[TrialRow] = ()) -> None:
        self._experiment, self._space, self._site = experiment, space, site
        self._study = experiment.study
        self._baseline = space.config(experiment.baseline).hash
        self.disabled: dict[str, str] = {}
        self._survey: Survey | None = None
        self._proposed: list[Audit] = []
        self._tried: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._running: set[str] = set()
        self._num_audits = 0
        for row in rows:
            self.heard(row)

    def says(self, config: ServingConfig) -> Refusal | None:
        """What the rules say of any configuration, the baseline too."""
        return judge(self._site, config.flags, disabled=self.disabled) if self._study.prune else None

    def verdict(self, config: ServingConfig) -> Refusal | None:
        """Why a configuration is not to be started; None for one that may work, and for the baseline."""
        refusal = self.says(config)
        return None if refusal is not None and config.hash == self._baseline else refusal

    def allowed(self, configs: Sequence[ServingConfig]) -> list[bool]:
        """`verdict` is None, of many."""
        return [
            refusal is None or config.hash == self._baseline
            for refusal, config in zip(self._judged([config.flags for config in configs]), configs, strict=True)
        ]

    def _judged(self, flags: Sequence[Mapping[str, JsonValue]]) -> list[Refusal | None]:
        if not self._study.prune or not flags:
            return [None] * len(flags)
        return judge_all(self._site, flags, disabled=self.disabled)

    def stands(self, row: TrialRow) -> bool:
        """False for a row that was pruned by a rule which no longer says so: its configuration is open again."""
        return not is_pruned(row) or self.verdict(self._config(row)) is not None

    def _config(self, row: TrialRow) -> ServingConfig:
        return ServingConfig(self._experiment.model, self._experiment.revision, row.config_flags)

    # the space

    def survey(self) -> Survey | None:
        """The space judged whole; None when it has more than 100,000 configurations, or nothing is pruned."""
        size = self._space.size()
        if size is None or size > JUDGED_AT_MOST or not self._study.prune:
            return None
        if self._survey is None:
            self._survey = self._surveyed(size)
        return self._survey

    def _surveyed(self, size: int) -> Survey:
        points = [(params, self._space.config(flags)) for params, flags in self._space.points()]
        refusals = self._judged([config.flags for _, config in points])
        left: dict[str, Params] = {}
        count: Counter[str] = Counter()
        first: dict[str, Refusal] = {}
        examples: dict[str, Params] = {}
        audits: list[Audit] = []
        for (params, config), refusal in zip(points, refusals, strict=True):
            key = config.hash
            if refusal is None or key == self._baseline:
                left[key] = params
                continue
            count[refusal.rule] += 1
            first.setdefault(refusal.rule, refusal)
            examples.setdefault(refusal.rule, params)
            if (draw := audit_draw(self._study.seed, key)) < self._study.audit_frac:
                audits.append(_audit(draw, config, params, refusal.rule))
        against = self.says(self._space.config(self._experiment.baseline))
        whole = bool(points) and against is not None and all(refusal is not None for refusal in refusals)
        return Survey(size, left, dict(count.most_common()), first, whole, tuple(_spread(audits)), examples)

    def nothing_left(self) -> str | None:
        """Why no configuration can work, by rule and with what comes nearest; None while one may."""
        survey = self.survey()
        named = [self._space.config(flags) for flags in self._study.enqueue]
        if survey is None or not survey.whole or any(self.says(config) is None for config in named):
            return None
        why = "; ".join(
            f"{count} by {rule}, for one: {survey.first[rule].message}" for rule, count in survey.by_rule.items()
        )
        configs = [config.flags for config in (*self._space.configs(), *named)]  # the baseline is as bad
        return f"the rules rule out all {survey.size} configurations of the space: {why}.{self.nearest(configs)}"

    def nearest(self, configs: Sequence[Mapping[str, JsonValue]]) -> str:
        """What would have to change, as far as physics goes."""
        feasible = nearest_feasible(self._site, configs)
        found = self._nearest_load(feasible)
        there = self._site.gpu.memory_bytes if self._site.gpu is not None else None
        if feasible.gpu_memory_bytes is not None and there is not None and feasible.gpu_memory_bytes > there:
            found.append(f"a GPU with {_rounded_up(feasible.gpu_memory_bytes / GIB)} GiB (now {there / GIB:.4g})")
        elif feasible.share is not None and BY_SHARE & self._rules_of(configs):
            longest = f", or max_model_len {feasible.max_model_len}" if feasible.max_model_len else ""
            found.append(f"gpu_memory_utilization {_rounded_up(feasible.share)}{longest}")
        nearest = f" The nearest that physics allows: {' and '.join(found)}." if found else ""
        return f"{nearest} To start them all the same: `study: {{prune: false}}`."

    def _nearest_load(self, feasible: Feasible) -> list[str]:
        """The least limits, and where these are out of reach at this rate alone, the largest rate in their place."""
        slo = self._site.slo
        missed = [(key, least) for key, least in feasible.slo_ms.items() if least > slo[key]]
        told = " and ".join(f"{key} of {_rounded_up(least)} (now {slo[key]:g})" for key, least in missed)
        if missed and feasible.rate_rps is not None:
            asked = self._experiment.workload.mean_rps or 0.0
            told += f", or a rate of {_rounded_down(feasible.rate_rps)} requests/s (now {asked:g})"
        return [told] if told else []

    def _rules_of(self, configs: Sequence[Mapping[str, JsonValue]]) -> set[str]:
        return {refusal.rule for refusal in self._judged(configs) if refusal is not None}

    # audits

    @property
    def max_audits(self) -> int:
        """Starts of what is ruled out: at most `audit_frac` of the search's, rounded up."""
        return math.ceil(round(self._study.audit_frac * self._study.trials, 9)) if self._study.prune else 0

    @property
    def audits_left(self) -> int:
        """Starts of what is ruled out that may still come; of a space that is not judged whole, an upper bound."""
        open_still = self.max_audits - self._num_audits
        if self.survey() is None or open_still <= 0:
            return max(0, open_still)
        return min(open_still, sum(1 for _ in self._open_audits()))

    def audited(self, config: ServingConfig) -> bool:
        """Whether it belongs to the share that may be started though it is ruled out."""
        return audit_draw(self._study.seed, config.hash) < self._study.audit_frac

    def next_audit(self) -> tuple[ServingConfig, Params] | None:
        """A configuration that is ruled out, to be started all the same; None when enough were, or none is left."""
        if self._num_audits + len(self._running) >= self.max_audits:
            return None
        audit = next(self._open_audits(), None)
        if audit is None:
            return None
        self._running.add(audit.config_hash)
        flags: Flags = json.loads(audit.config_json)
        params: Params = json.loads(audit.params_json)
        return ServingConfig(self._experiment.model, self._experiment.revision, flags), params

    def _open_audits(self) -> Iterator[Audit]:
        survey = self.survey()
        for audit in _spread(self._proposed) if survey is None else survey.audits:
            if audit.config_hash not in self._tried and audit.config_hash not in self._running:
                yield audit

    # what rows prove

    def heard(self, row: TrialRow) -> list[str]:
        """Takes a row in; returns what it proves wrong, a sentence for each rule, which is off from now on."""
        if not self._study.prune:
            return []
        if row.purpose == "audit":
            self._running.discard(row.config_hash)
        if is_pruned(row):
            self._note_proposed(row)
        elif _is_lost(row):
            self._lost[row.config_hash] += row.purpose == "audit"
            if self._lost[row.config_hash] > self._study.max_retries:
                self._tried.add(row.config_hash)
        else:
            self._num_audits += row.purpose == "audit" and row.state != "infeasible"  # the validator refused: no start
            self._tried.add(row.config_hash)
        return self._refuted(row) if row.state == "complete" else []

    def _note_proposed(self, row: TrialRow) -> None:
        if self.survey() is None and self.audited(config := self._config(row)):
            draw, refusal = audit_draw(self._study.seed, row.config_hash), self.verdict(config)
            if refusal is None:
                return
            audit = _audit(draw, config, json.loads(row.params_json), refusal.rule)
            if audit not in self._proposed:
                self._proposed.append(audit)

    def _refuted(self, row: TrialRow) -> list[str]:
        found = []
        while (refusal := self.says(self._config(row))) is not None and self._works(row, refusal):
            text = (
                f"rule {refusal.rule} is wrong, and off for this study: trial {row.number} works, though it says: "
                f"{refusal.message} [{refusal.source}]. Please report it as a bug of varcas"
            )
            self.disabled[refusal.rule] = text
            self._survey = None
            self._proposed = [audit for audit in self._proposed if self._still_out(audit)]
            found.append(text)
        return found

    def _still_out(self, audit: Audit) -> bool:
        flags = json.loads(audit.config_json)
        return self.verdict(ServingConfig(self._experiment.model, self._experiment.revision, flags)) is not None

    def _works(self, row: TrialRow, refusal: Refusal) -> bool:
        """Whether a complete row contradicts a refusal: of an SLO, by meeting the limit that it was said to miss."""
        if failure_kind(refusal.rule) != SLO:
            return True
        flags = self._config(row).flags
        missed = [
            key
            for key, limit in self._site.slo.items()
            if key.startswith(refusal.rule.removeprefix("slo_") + "_")
            and (bound_ms(self._site, flags, key) or 0.0) > limit
        ]
        return row.valid is not False and any(row.constraints.get(key, 1.0) <= 0 for key in missed)


def _is_lost(row: TrialRow) -> bool:
    """It says nothing of its configuration, through no fault of that."""
    interrupted = row.failure_kind == "interrupted" or (row.state == "stopped" and row.stopped_early is None)
    return interrupted or row.failure_kind in RETRIED


def refutations(rows: Iterable[TrialRow]) -> list[str]:
    """What the rows of a study say of rules that were found wrong."""
    return [text for row in rows for text in row.warnings if text.startswith("rule ")]


def _audit(draw: float, config: ServingConfig, params: Params, rule: str) -> Audit:
    flags = json.dumps(dict(config.flags), sort_keys=True)
    return Audit(draw, config.hash, json.dumps(params, sort_keys=True), flags, rule)


def _spread(audits: Iterable[Audit]) -> list[Audit]:
    """By their draws, but one of each rule in turn."""
    turn: Counter[str] = Counter()
    order = []
    for audit in sorted(audits):
        order.append((turn[audit.rule], audit))
        turn[audit.rule] += 1
    return [audit for _, audit in sorted(order)]


def _rounded_up(number: float) -> str:
    """To three digits, never down."""
    scale = _three_digits(number)
    return f"{math.ceil(number * scale) / scale:g}"


def _rounded_down(number: float) -> str:
    """To three digits, never up."""
    scale = _three_digits(number)
    return f"{math.floor(number * scale) / scale:g}"


def _three_digits(number: float) -> float:
    return float(10.0 ** (2 - math.floor(math.log10(number))))


# ---- what the rules know


def site_of(
    experiment: Experiment,
    facts: NodeFacts | None,
    gpu: GpuSpec | None,
    *,
    on_cpu: bool = False,
    gpus_per_node: int | None = None,
    model_config: str | None = None,
) -> Site:
    """What all configurations of an experiment share.

    Args:
        experiment: model, environment, SLO and workload are its.
        facts: of the node; None where no vLLM is: then the model is known if it is a directory here.
        gpu: upper bounds of what there is (`gpu_at_best`); None when unknown.
        on_cpu: servers run on the CPU.
        gpus_per_node: that one server can have.
        model_config: text of the model's `config.json` where there are no facts.
    """
    here = model_config or config_text(str(Path(experiment.model).expanduser()))
    text = facts.model_config if facts is not None else here
    config = _json_mapping(text)
    model = _described(config, experiment.model)
    lengths = _lengths(experiment, model) if experiment.slo else _Lengths()
    return Site(
        model=model,
        config=config,
        drafts={name: found for name in draft_names(experiment) if (found := _local_model(name)) is not None},
        gpu=gpu,
        on_cpu=on_cpu,
        host_memory_bytes=facts.host_memory_bytes if facts is not None else None,
        gpus_per_node=gpus_per_node,
        engine_version=facts.engine_version if facts is not None else None,
        env={**(facts.engine_env if facts is not None else {}), **experiment.server.env},
        slo=experiment.slo,
        prompt_tokens=lengths.prompts,
        output_tokens=lengths.outputs,
        shared_tokens=lengths.shared,
        drawn_for=lengths.drawn_for,
        window_s=lengths.window_s,
    )


def gpu_at_best(kind: str, facts: NodeFacts | None) -> GpuSpec | None:
    """Upper bounds of a GPU: the one that the node has, else the best of those that go by `kind`; None if unknown."""
    if facts is not None and facts.gpu_name is not None and facts.gpu_memory_bytes is not None:
        return installed(facts.gpu_name, facts.gpu_memory_bytes)
    return ceiling(kind) if variants(kind) else None


def _json_mapping(text: str | None) -> dict[str, object]:
    try:
        found = json.loads(text or "{}")
    except ValueError:  # vLLM will say so
        return {}
    return found if isinstance(found, dict) else {}


def _described(config: Mapping[str, object], name: str) -> ModelSpec | None:
    try:
        return from_config(config, name) if config else None
    except InputError:  # an architecture that model.py does not describe
        return None


def _local_model(directory: str) -> ModelSpec | None:
    return _described(_json_mapping(config_text(str(Path(directory).expanduser()))), directory)


def draft_names(experiment: Experiment) -> set[str]:
    """Draft models and tokenizers that some configuration names."""
    entry = experiment.space.get("speculative_config")
    choices = entry.choices if isinstance(entry, Choices) else []
    given = [experiment.serve, experiment.baseline, *experiment.study.enqueue]
    flags = [*given, *({"speculative_config": choice} for choice in choices)]
    return {name for some in flags for name, _ in other_models(some)}


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Tokens of requests, as `Site` has them."""

    prompts: Sequence[int] = ()
    outputs: Sequence[int] = ()
    shared: Sequence[int] | int = 0
    drawn_for: int | None = None
    window_s: float | None = None


def _lengths(experiment: Experiment, model: ModelSpec | None) -> _Lengths:
    """Tokens of the requests that the SLO is held against, what of them may be cached, and the length they are for.

    Where the server's speed decides which requests come (users, turns), only the shortest bounds them all.
    """
    workload, longest = experiment.workload, model.max_position if model is not None else None
    given = experiment.serve.get("max_model_len")
    possible = set(_possible_lengths(experiment, longest))
    drawn = _drawn(experiment, given if isinstance(given, int) else None)
    same = all(isinstance(length, int) and _drawn(experiment, length) == drawn for length in possible)
    drawn_for = None if same else given if isinstance(given, int) else 0
    if not drawn or any(request.prompt is not None for request in drawn):  # the server counts the tokens of texts
        return _Lengths(drawn_for=drawn_for)
    shared = [cached_tokens(request) for request in drawn]
    if server_decides(workload, drawn):
        fresh = min(request.prompt_tokens - cached for request, cached in zip(drawn, shared, strict=True))
        return _Lengths((fresh,), (min(request.output_tokens for request in drawn),), 0, drawn_for)
    prompts, outputs = [r.prompt_tokens for r in drawn], [r.output_tokens for r in drawn]
    return _Lengths(prompts, outputs, shared, drawn_for, workload.duration_s)


def _drawn(experiment: Experiment, max_len: int | None) -> tuple[ScheduledRequest, ...]:
    """The window's requests; none where nothing fits that length."""
    workload = experiment.workload
    try:
        return schedule(workload, start_s=0.0, duration_s=workload.duration_s, max_len=max_len, stream="measure")
    except InputError:
        return ()


def server_decides(workload: Workload, drawn: Iterable[ScheduledRequest]) -> bool:
    """Whether the server's speed decides which requests come: with users in a closed loop, and with later turns."""
    return workload.arrives.users is not None or any(request.turn for request in drawn)


def cached_tokens(request: ScheduledRequest) -> int:
    """The most of a prompt that other requests may have left in the prefix cache: its last token is always computed."""
    shared = request.prompt_tokens if request.blocks else request.prefix_tokens
    return min(shared, max(request.prompt_tokens - 1, 0))


def _possible_lengths(experiment: Experiment, longest: int | None) -> Iterator[object]:
    """Every `max_model_len` that a configuration can have; None where that cannot be told."""
    entry = experiment.space.get("max_model_len")
    named = [experiment.serve.get("max_model_len")]
    named += [f["max_model_len"] for f in (experiment.baseline, *experiment.study.enqueue) if "max_model_len" in f]
    if isinstance(entry, Range):
        named += [entry.low, entry.high]
    elif entry is not None:
        named += entry.choices
    yield from (longest if length is None else length for length in named)
