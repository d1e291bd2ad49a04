"""Which configurations a study tries first: those that the roofline's estimates put in front, unlike each other.

Estimates are for order alone: they rule nothing out, and Optuna is never told one. The surrogate (`surrogate.py`) takes
them for its mean. What they do not see (chunked
prefill, most of speculation) is left to chance by the study's seed.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import JsonValue

from varcas.calibration import Calibration, Estimate, Traffic, calibrate, efficiency_for, estimate
from varcas.errors import InputError
from varcas.experiment import Experiment
from varcas.gpus import GpuSpec
from varcas.memory import Serve, settings
from varcas.model import ModelSpec
from varcas.pruner import Pruner, cached_tokens
from varcas.records import LATENCY_METRICS, RATE_METRICS, TrialRow
from varcas.roofline import tokens_per_step
from varcas.rules import Site
from varcas.space import Drawn, Params, ServingConfig, Space, distance
from varcas.steptime import StepTimes, kernel_of
from varcas.workload.schedule import schedule

NUM_ORDERED = 3
"""First proposals that follow the estimates; the other start-up ones stay random, should the estimates be wrong."""
LISTED = 10_000
"""Larger and continuous spaces are sampled."""
SAMPLED = 2_000
"""Random draws of those."""
MAX_ESTIMATED = 600
"""Settings that are estimated, some 1.5 ms each; of more, as many at random."""
MAX_ROWS = 16
"""Latest rows that a fit looks at, without their requests: a fit with its errors takes some 20 ms a row."""
ACCEPTANCE = 0.4
"""Of a drafted token: assumed, for order alone."""
SLACK = 0.10
"""Estimates that differ by this share of the best are held for equal."""
MISS_AT_MOST = 10.0
"""Cap on the estimated excess over a limit, so that one that is hopeless does not hide the others."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to try first.

    Attributes:
        first: configurations, the best estimate first.
        basis: of the estimates, in words.
        expected: logarithm of the first objective's estimate, by content hash, of what was estimated.
    """

    first: tuple[ServingConfig, ...]
    basis: str
    expected: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that may be tried, and its parameters."""

    params: Params
    config: ServingConfig


@dataclass(frozen=True, slots=True, order=True)
class Score:
    """What an estimate says of an objective; the least is the best.

    Attributes:
        miss: by how much limits are exceeded, as shares of them.
        falls_behind: the rate is more than the server can take, where a latency is the objective.
        cost: minus tokens a second, or the latency in seconds.
    """

    miss: float
    falls_behind: bool
    cost: float


def first_proposals(
    experiment: Experiment, space: Space, site: Site, pruner: Pruner, rows: Iterable[TrialRow] = ()
) -> Order | None:
    """The configurations that a study had better try first; None where nothing orders them.

    Args:
        experiment: its objective, limits and workload.
        space: what may be proposed.
        site: model, GPU and version; without a described model or a GPU of the catalogue there is no order.
        pruner: what it rules out is left out.
        rows: of the store: what other studies measured of this model corrects the priors.
    """
    traffic = _traffic(experiment)
    if not experiment.study.order or experiment.study.sampler == "random" or traffic is None:
        return None
    if site.model is None or site.gpu is None or site.on_cpu or _kind_of(experiment) is None:
        return None
    rng = random.Random(experiment.study.seed)
    judge = _Judge(experiment, site.model, site.gpu, site.engine_version, _measured(experiment, site, rows), traffic)
    ranked = judge.ranked(candidates(space, pruner, rng), rng)
    chosen = unlike(ranked, NUM_ORDERED)
    if not chosen:
        return None
    expected = {one.config.hash: told for _, one in ranked if (told := judge.expected(one.config.flags)) is not None}
    return Order(tuple(one.config for one in chosen), judge.basis_of(chosen[0].config), expected)


def candidates(space: Space, pruner: Pruner, rng: random.Random) -> list[Candidate]:
    """What the rules leave of a space in random order; of a large or continuous one, of random draws."""
    size = space.size()
    points = space.points() if size is not None and size <= LISTED else _drawn(space, rng)
    some = [Candidate(params, space.config(flags)) for params, flags in points]
    allowed = pruner.allowed([one.config for one in some])
    left = [one for one, ok in zip(some, allowed, strict=True) if ok]
    rng.shuffle(left)
    return left


def _drawn(space: Space, rng: random.Random) -> list[tuple[Params, dict[str, JsonValue]]]:
    draws = [space.propose(Drawn(rng)) for _ in range(SAMPLED)]
    distinct = {json.dumps(params, sort_keys=True): (params, flags) for params, flags in draws}
    return list(distinct.values())


def _measured(experiment: Experiment, site: Site, rows: Iterable[TrialRow]) -> Calibration:
    """Fits to the latest rows of other studies: this one's own would change the order under a resume."""
    known = [
        row
        for row in rows
        if row.study != experiment.name and row.model == experiment.model and row.gpu_name and row.valid
    ]
    latest = sorted(known, key=lambda row: row.started_at)[-MAX_ROWS:]
    return calibrate(latest, {experiment.model: site.model}) if site.model is not None else Calibration()


def _traffic(experiment: Experiment) -> Traffic | None:
    """Mean request of the window; None where only the server can count its tokens."""
    workload, length = experiment.workload, experiment.serve.get("max_model_len")
    longest = length if isinstance(length, int) else None
    try:
        drawn = schedule(workload, start_s=0.0, duration_s=workload.duration_s, max_len=longest, stream="measure")
    except InputError:  # nothing fits that length: the start will say so
        return None
    counted = [request for request in drawn if request.prompt_tokens > 0 and request.output_tokens > 0]
    if not counted:
        return None
    return Traffic(
        prompt_tokens=statistics.fmean(request.prompt_tokens for request in counted),
        output_tokens=statistics.fmean(request.output_tokens for request in counted),
        rate_rps=workload.mean_rps,
        cached_tokens=statistics.fmean(cached_tokens(request) for request in counted),
    )


def _kind_of(experiment: Experiment) -> str | None:
    """`rate`, or the latency of the first objective; None where no estimate bears on it."""
    metric = experiment.objectives[0].metric
    if metric in RATE_METRICS:
        return "rate"
    return metric.partition("_")[0] if metric in LATENCY_METRICS else None


# ---- unlike each other


def unlike(ranked: Sequence[tuple[Score, Candidate]], count: int) -> list[Candidate]:
    """The best, and then each time what is least like those chosen, of all that may be as good by the estimates."""
    if not ranked:
        return []
    best, first = ranked[0]
    alike = [one for score, one in ranked[1:] if _is_as_good(score, best)]
    pool = alike if len(alike) >= count - 1 else [one for _, one in ranked[1:count]]
    chosen = [first]
    while len(chosen) < min(count, 1 + len(pool)):
        left = [one for one in pool if one not in chosen]
        chosen.append(max(left, key=lambda one: min(distance(one.params, other.params) for other in chosen)))
    return chosen


def _is_as_good(score: Score, best: Score) -> bool:
    same = (score.miss, score.falls_behind) == (best.miss, best.falls_behind)
    return same and score.cost <= best.cost + SLACK * abs(best.cost)


# ---- scores


_Key = tuple[Serve, str, int, bool]


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """An estimate, with what speculation does to it.

    Attributes:
        tokens_per_s: of all requests, at most what is asked for.
        latency_s: means of a request by name.
        saturated: the rate is more than the server can take.
    """

    tokens_per_s: float
    latency_s: Mapping[str, float]
    saturated: bool


class _Judge:
    """Scores configurations, each distinct setting once."""

    def __init__(
        self,
        experiment: Experiment,
        model: ModelSpec,
        gpu: GpuSpec,
        version: str | None,
        calibration: Calibration,
        traffic: Traffic,
    ) -> None:
        self._model, self._gpu, self._version = model, gpu, version
        self._calibration, self._traffic = calibration, traffic
        self._kind, self._slo = _kind_of(experiment), experiment.slo
        self._users = experiment.workload.arrives.users
        self._foreseen: dict[_Key, _Foreseen] = {}

    def ranked(self, some: Sequence[Candidate], rng: random.Random) -> list[tuple[Score, Candidate]]:
        """Those that can be estimated, the best first; equals stay in the order given."""
        keyed = [(key, one) for one in some if (key := self._key(one.config.flags)) is not None]
        keys = list(dict.fromkeys(key for key, _ in keyed))
        for key in keys if len(keys) <= MAX_ESTIMATED else rng.sample(keys, MAX_ESTIMATED):
            self._foreseen[key] = self._foresee(*key)
        scored = [(self._score(self._foreseen[key]), one) for key, one in keyed if key in self._foreseen]
        return sorted(scored, key=lambda pair: pair[0])

    def expected(self, flags: Mapping[str, JsonValue]) -> float | None:
        """Logarithm of the objective of what was ranked; None of a latency that grows as long as the load lasts."""
        found = self._foreseen[self._keyed(flags)]
        if self._kind == "rate":
            return math.log(found.tokens_per_s)
        return None if found.saturated else math.log(found.latency_s[str(self._kind)])

    def basis_of(self, config: ServingConfig) -> str:
        """What the estimate of a configuration rests on."""
        key = self._keyed(config.flags)
        found = self._estimate(key[0], key[1], self._traffic_with(key[3]))
        return f"{'measured here' if found.basis == 'measured' else 'priors'}: {found.source}"

    def _key(self, flags: Mapping[str, JsonValue]) -> _Key | None:
        """What of a configuration the estimates see; None where they cannot say anything."""
        quantization = flags.get("quantization")
        try:
            serve = settings(flags, self._model, self._gpu)
            kernel_of(self._model, serve, self._version)
        except InputError:
            return None
        if self._users is not None:
            serve = replace(serve, max_num_seqs=min(int(serve.max_num_seqs), self._users))
        named = quantization if isinstance(quantization, str) else ""
        return serve, named, _drafted(flags), flags.get("enable_prefix_caching") is not False

    def _keyed(self, flags: Mapping[str, JsonValue]) -> _Key:
        key = self._key(flags)
        assert key is not None
        return key

    def _traffic_with(self, cached: bool) -> Traffic:
        return self._traffic if cached else replace(self._traffic, cached_tokens=0.0)

    def _estimate(self, serve: Serve, quantization: str, traffic: Traffic) -> Estimate:
        return estimate(
            self._calibration, self._model, self._gpu, serve, traffic,
            engine_version=self._version, quantization=quantization or None,
        )  # fmt: skip

    def _foresee(self, serve: Serve, quantization: str, drafted: int, cached: bool) -> _Foreseen:
        traffic = self._traffic_with(cached)
        found = self._estimate(serve, quantization, traffic)
        gain = self._gain(serve, quantization, drafted, found.batch) if drafted else 1.0
        asked = math.inf if traffic.rate_rps is None else traffic.rate_rps * traffic.output_tokens
        tokens_per_s = min(found.tokens_per_s.value * gain, asked)
        latency_s = _latencies_s(found.ttft_s.value, found.tpot_s.value / gain, traffic.output_tokens)
        return _Foreseen(tokens_per_s, latency_s, found.saturated)

    def _score(self, found: _Foreseen) -> Score:
        over = (found.latency_s[key.partition("_")[0]] * 1e3 / limit - 1 for key, limit in self._slo.items())
        miss = sum(min(max(share, 0.0), MISS_AT_MOST) for share in over)
        if self._kind == "rate" or found.saturated:
            return Score(_rounded(miss), self._kind != "rate", _rounded(-found.tokens_per_s))
        return Score(_rounded(miss), False, _rounded(found.latency_s[str(self._kind)]))

    def _gain(self, serve: Serve, quantization: str, drafted: int, batch: float) -> float:
        """Of speculation, drafts for nothing: a step then is a chunk of k + 1 tokens for each sequence."""
        kernel = kernel_of(self._model, serve, self._version, quantization or None)
        times = StepTimes.of(self._model, self._gpu, serve, kernel)
        attained = efficiency_for(self._calibration, self._gpu, kernel, self._version)
        context = self._traffic.prompt_tokens + self._traffic.output_tokens / 2
        plain = times.seconds(attained, batch, context)
        verified = times.seconds(attained, 0, 0, batch * (drafted + 1), context, batch)
        return float(tokens_per_step(ACCEPTANCE, drafted) * plain / verified)


def _rounded(number: float) -> float:
    """To two digits: what differs by less is equal to an estimate, and left to chance."""
    return float(f"{number:.2g}")


def _latencies_s(ttft_s: float, tpot_s: float, output_tokens: float) -> dict[str, float]:
    """Means of a request, which stand for every statistic."""
    whole = ttft_s + (output_tokens - 1) * tpot_s
    return {"ttft": ttft_s, "tpot": tpot_s, "itl": tpot_s, "e2e": whole, "norm": whole / output_tokens}


def _drafted(flags: Mapping[str, JsonValue]) -> int:
    """Tokens that speculation drafts a step; 0 without."""
    given = flags.get("speculative_config")
    count = given.get("num_speculative_tokens", 0) if isinstance(given, dict) else 0
    return count if isinstance(count, int) else 0
