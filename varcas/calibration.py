"""The dynamic roofline: what measured trials attain of a GPU's peaks, and estimates from that.

Trials' steps are told apart by the arrival of tokens (`points`), and an `Efficiency` is fitted to them for each GPU,
class of kernels and version of vLLM (`calibrate`). Estimates are for order and display, NEVER for hard rules.

The fit is a maximum a posteriori one in logarithms: squared relative errors over sigma, plus squared distances from a
stated prior over its width, so that few rows shrink to the prior and what they cannot tell apart (with one model, the
reading of weights and a fixed overhead) stays as uncertain as the prior was. The server start is the unit: all points
of one weigh together as much as one. Intervals are Student's t; one start has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from varcas import gpus
from varcas.columns import Requests
from varcas.errors import InputError
from varcas.gpus import GpuSpec
from varcas.intervals import t_quantile
from varcas.memory import Floats, Serve, memory, settings
from varcas.model import ModelSpec
from varcas.records import MEASUREMENT_VERSION, RequestRecord, TrialRow
from varcas.steptime import PARAMETERS, Efficiency, Parts, StepTimes, kernel_of

Kind = Literal["decode", "mixed", "prefill", "mean"]
Basis = Literal["measured", "prior"]

MIN_GAPS = 30
"""Gaps between tokens in a bin: fewer are left out."""
MIN_ALONE = 3
"""Requests that met an empty server in a bin."""
BINS = {"decode": 4, "mixed": 2, "prefill": 3}
SIGMA, SIGMA_STARTS = 0.10, 4.0
"""Prior of the relative error of a point, and how many starts it counts for."""
PRIOR_SIGMA = 0.30
"""Relative error that an estimate from priors alone is given on top of theirs."""
POINT_ERROR = 0.05
"""A point whose mean is known no better than this counts half."""
EDGE = 1.25
"""How far, by a factor, an estimate may leave the measured range without being told an extrapolation."""


# ---- priors


@dataclass(frozen=True, slots=True)
class Prior:
    """Log-normal: the median of each of `PARAMETERS`, and the factor that one standard deviation is.

    Attributes:
        median: of each.
        factor: of each; the 95 % range is median / factor^1.96 to median x factor^1.96.
        source: where it is from.
    """

    median: Efficiency
    factor: Efficiency
    source: str


ASSUMED = "assumed, no source: the authors' judgement of what vLLM attains on datacentre GPUs"
_FACTOR = Efficiency(3, 4, 1.35, 1.65, 1.5, 3)
PRIORS: dict[str, Prior] = {
    "graphs": Prior(Efficiency(3e-3, 5e-5, 0.70, 0.50, 0.50, 1e-2), _FACTOR, ASSUMED),
    "eager": Prior(Efficiency(1.5e-2, 5e-5, 0.70, 0.50, 0.50, 1e-2, overlaps=True), _FACTOR, ASSUMED),
    "cpu": Prior(
        Efficiency(1e-2, 2e-4, 0.70, 0.30, 0.50, 1e-2, adds=True),
        replace(_FACTOR, weights_frac=1.65, attention_frac=2.2, compute_frac=2.2),
        "assumed, no source; the probe's peaks are no ceilings, so shares may pass 1",
    ),
}
"""Where nothing is published of a GPU."""


@dataclass(frozen=True, slots=True)
class Published:
    """Shares of a GPU's peaks that are known better, with the factor of a standard deviation."""

    weights_frac: float
    weights_factor: float
    compute_frac: float
    compute_factor: float
    source: str


PUBLISHED = {
    "T4": Published(
        245 / 320, 1.11, 24 / 65, 1.3,
        "published T4 measurements: 220-270 of 320 GB/s, about 24 of 65 TFLOPS under its 70 W cap; the rest assumed",
    ),
}  # fmt: skip


def prior(gpu: GpuSpec, kernel: str) -> Prior:
    """The stated prior for a GPU and a class of kernels."""
    if gpu.measured:
        return PRIORS["cpu"]
    assumed = PRIORS["eager" if "eager" in kernel.split() else "graphs"]
    if gpu.name not in PUBLISHED:
        return assumed
    known = PUBLISHED[gpu.name]
    return Prior(
        replace(assumed.median, weights_frac=known.weights_frac, compute_frac=known.compute_frac),
        replace(assumed.factor, weights_frac=known.weights_factor, compute_frac=known.compute_factor),
        known.source,
    )


# ---- points


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What shares an efficiency."""

    gpu: str
    kernel: str
    engine_version: str

    def __str__(self) -> str:
        return f"{self.gpu}, {self.kernel}, vLLM {self.engine_version}"


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps that resemble each other.

    Attributes:
        kind: `decode` steps alone, `mixed` ones with prompts in them, `prefill`: a request alone from its send to its
            first token, `mean`: a whole trial, from its row alone.
        batch: mean sequences that decode.
        context: mean tokens that each has cached.
        prefill_tokens: mean of prompts' tokens in the step.
        prompts: mean prompts in the step.
        seconds: mean time of the step.
        error_frac: standard error of that mean.
    """

    kind: Kind
    batch: float
    context: float
    prefill_tokens: float
    prompts: float
    seconds: float
    error_frac: float


@dataclass(frozen=True, slots=True)
class Point(Steps):
    """Steps of one trial, to lay over the roofline.

    Attributes:
        trial_id: whose they are; so `study`, `number`, `server_id`, `model`.
        key: what they share an efficiency with.
        flops: of such a step, on one GPU, by the static roofline.
        bytes: likewise.
        parts: what it would take at its peaks.
    """

    trial_id: str
    study: str
    number: int
    server_id: str
    model: str
    key: Key
    flops: float
    bytes: float
    parts: Parts = field(repr=False)

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes

    @property
    def flops_per_s(self) -> float:
        """Achieved on one GPU; of `prefill` with what the request took besides."""
        return self.flops / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Achieved on one GPU: the least traffic there can be, over the time it took."""
        return self.bytes / self.seconds


@dataclass(frozen=True, slots=True)
class _Trial:
    row: TrialRow
    key: Key
    serve: Serve
    times: StepTimes


def points(
    rows: Iterable[TrialRow],
    models: Mapping[str, ModelSpec],
    *,
    requests: Callable[[str], Sequence[RequestRecord]] | None = None,
    cpu: GpuSpec | None = None,
    simulated: bool = False,
    saturated: bool = False,
) -> tuple[list[Point], list[tuple[str, str]]]:
    """Measured points, and each row that gave none with the reason.

    Args:
        rows: of the store.
        models: by the name that rows have.
        requests: a trial's records by its id (`Store.requests`); without, or where a trial has none, one point of the
            row's means.
        cpu: this host's, for rows without a GPU (`gpus.this_cpu`); None leaves those out.
        simulated: take simulated rows, and no others.
        saturated: take rows of servers that fell behind too, where their requests tell steps apart.
    """
    found: list[Point] = []
    left: list[tuple[str, str]] = []
    for row in rows:
        trial = _excluded(row, simulated, saturated) or _trial(row, models, cpu)
        if isinstance(trial, str):
            left.append((row.trial_id, trial))
            continue
        bins = _bins_of(row, requests(row.trial_id) if requests else (), trial.serve)
        if isinstance(bins, str):
            left.append((row.trial_id, bins))
            continue
        found += [_point(trial, one) for one in bins]
    return found, left


UNREADABLE_FLAGS = ("speculative_config", "data_parallel_size", "pipeline_parallel_size")
"""Flags under which a token's gap is not a step of the whole model."""


def _excluded(row: TrialRow, simulated: bool, saturated: bool) -> str | None:
    """Why a row tells nothing about steps."""
    flags = row.config_flags
    other = next((name for name in UNREADABLE_FLAGS if flags.get(name) not in (None, 1)), None)
    reasons = {
        "simulated" if row.simulated else "measured, not simulated": row.simulated != simulated,
        f"{row.state}": row.state != "complete",
        f"measurement version {row.measurement_version}": row.measurement_version != MEASUREMENT_VERSION,
        "invalid": row.valid is not True,
        "saturated": row.saturated is True and not saturated,
        f"engine {row.engine}: its configuration is not known": row.engine not in ("vllm", "simulated"),
        "no engine version": row.engine_version is None,
        "preempted: work was done twice": bool(row.preemptions),
        f"{other}: steps are not told apart": other is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _trial(row: TrialRow, models: Mapping[str, ModelSpec], cpu: GpuSpec | None) -> _Trial | str:
    gpu = cpu if row.gpu_name is None else next(iter(gpus.variants(row.gpu_name)), None)
    if gpu is None:
        return f"GPU {row.gpu_name}: not in gpus.toml" if row.gpu_name else "measured on a CPU that was not probed"
    if row.model not in models:
        return f"model {row.model}: not described"
    flags, version = row.config_flags, row.engine_version or ""
    quantization: Any = flags.get("quantization")
    try:
        model = models[row.model]
        model = model.quantised(quantization) if quantization and model.quantisation is None else model
        serve = settings(flags, model, gpu)
        kernel = kernel_of(model, serve, version, quantization)
        return _Trial(row, Key(gpu.name, kernel, version), serve, StepTimes.of(model, gpu, serve, kernel))
    except InputError as error:
        return str(error)


def _point(trial: _Trial, one: Steps) -> Point:
    row, step = trial.row, (one.batch, one.context, one.prefill_tokens, 0, one.prompts)
    flops, moved = trial.times.work(*step)
    return Point(
        **{name: getattr(one, name) for name in Steps.__slots__},
        trial_id=row.trial_id,
        study=row.study,
        number=row.number,
        server_id=row.server_id,
        model=row.model,
        key=trial.key,
        flops=float(flops),
        bytes=float(moved),
        parts=trial.times.parts(*step, requests=1 if one.kind == "prefill" else 0),
    )


def _bins_of(row: TrialRow, records: Sequence[RequestRecord], serve: Serve) -> list[Steps] | str:
    if not records and row.saturated:
        return "saturated, and without requests"
    if not records:
        mean = _mean_bin(row)
        return [mean] if mean else "no requests, and a row without TPOT or rates"
    requests = Requests.of([record for record in records if record.first_token_s is not None])
    if not len(requests) or requests.prompt_tokens.max() > int(serve.max_num_batched_tokens):
        return "prompts longer than a step's budget: steps are not told apart"
    fresh = 1 - (row.prefix_cache_hit_frac or 0.0)
    bins = _step_bins(requests, row.duration_s or math.inf, fresh) + _alone_bins(requests, fresh)
    return bins or "too few tokens"


def _mean_bin(row: TrialRow) -> Steps | None:
    """By Little's law: sequences that decode are the token rate times TPOT."""
    rates = (row.tpot_mean_ms, row.output_tokens_per_s, row.prompt_tokens_per_s, row.request_rate_rps)
    tpot_ms, tokens, prompts, rate = rates
    if not tpot_ms or not tokens or not rate or prompts is None:
        return None
    each_s = tpot_ms / 1e3
    fresh = prompts * (1 - (row.prefix_cache_hit_frac or 0.0))
    context = prompts / rate + tokens / rate / 2
    return Steps("mean", max(1.0, tokens * each_s), context, fresh * each_s, rate * each_s, each_s, POINT_ERROR)


@dataclass(frozen=True, slots=True)
class _Gaps:
    """From one token of a sequence to its next: a step, seen once by each sequence in it."""

    seconds: Floats
    batch: Floats
    context: Floats
    prompts: Floats
    prefill_tokens: Floats


def _gaps(requests: Requests, duration_s: float, fresh: float) -> _Gaps:
    """Steps as sequences see them.

    A prompt belongs to the step at whose end its first token comes: between the middle of this gap and half a gap after
    its end, since tokens of one step do not arrive at one instant.
    """
    owners = np.repeat(np.arange(len(requests)), requests.num_events)
    at_s = requests.offsets_s + requests.sent_s[owners]
    done = np.cumsum(requests.counts) - np.repeat(_before(requests), requests.num_events)
    left, right, inner = at_s[:-1], at_s[1:], owners[1:] == owners[:-1]
    inner &= (left >= 0) & (left <= duration_s) & (right > left)
    left, right, owner = left[inner], right[inner], owners[:-1][inner]
    took, middle = right - left, (left + right) / 2
    begun, ended = np.sort(requests.first_token_s), np.sort(requests.last_token_s[~np.isnan(requests.last_token_s)])
    order = np.argsort(requests.first_token_s, kind="stable")
    filled = np.concatenate([[0.0], np.cumsum(requests.prompt_tokens[order])]) * fresh
    half = np.minimum(took, np.median(took)) / 2 if len(took) else took
    first, last = np.searchsorted(begun, middle, "right"), np.searchsorted(begun, right + half, "right")
    return _Gaps(
        seconds=took / np.maximum(requests.counts[1:][inner], 1),
        batch=(first - np.searchsorted(ended, middle, "left")).astype(np.float64),
        context=requests.prompt_tokens[owner] + done[:-1][inner],
        prompts=(last - first).astype(np.float64),
        prefill_tokens=filled[last] - filled[first],
    )


def _before(requests: Requests) -> npt.NDArray[np.int64]:
    """Tokens of all earlier requests together."""
    seen = np.concatenate([[0], np.cumsum(requests.counts)])
    return np.asarray(seen[requests.splits[:-1]], dtype=np.int64)


def _step_bins(requests: Requests, duration_s: float, fresh: float) -> list[Steps]:
    gaps = _gaps(requests, duration_s, fresh)
    decode, mixed = np.flatnonzero(gaps.prompts == 0), np.flatnonzero(gaps.prompts > 0)
    split = [("decode", part) for part in _quantile_bins(gaps.batch[decode], decode, BINS["decode"], MIN_GAPS)]
    split += [("mixed", part) for part in _quantile_bins(gaps.prefill_tokens[mixed], mixed, BINS["mixed"], MIN_GAPS)]
    bins = []
    for kind, part in split:
        batch, seconds = float(gaps.batch[part].mean()), gaps.seconds[part]
        steps = max(len(part) / batch, 2.0)  # each is seen by all of its sequences
        bins.append(
            Steps(
                "decode" if kind == "decode" else "mixed",
                batch,
                float(gaps.context[part].mean()),
                float(gaps.prefill_tokens[part].mean()),
                float(gaps.prompts[part].mean()),
                float(seconds.mean()),
                float(seconds.std() / seconds.mean() / math.sqrt(steps)),
            )
        )
    return bins


def _alone_bins(requests: Requests, fresh: float) -> list[Steps]:
    """Requests that found an empty server and had it to themselves until their first token."""
    sent, first = requests.sent_s, requests.first_token_s
    ended = np.sort(requests.last_token_s[~np.isnan(requests.last_token_s)])
    begun = np.sort(sent)
    inside = np.searchsorted(begun, sent, "left") - np.searchsorted(ended, sent, "left")
    joined = np.searchsorted(begun, first, "left") - np.searchsorted(begun, sent, "right")
    alone = np.flatnonzero((inside == 0) & (joined == 0) & (sent >= 0))
    bins = []
    for part in _quantile_bins(requests.prompt_tokens[alone], alone, BINS["prefill"], MIN_ALONE):
        seconds, tokens = (first - sent)[part], float(requests.prompt_tokens[part].mean()) * fresh
        error = float(seconds.std() / seconds.mean() / math.sqrt(len(part)))
        bins.append(Steps("prefill", 0.0, 0.0, tokens, 1.0, float(seconds.mean()), error))
    return bins


def _quantile_bins(values: Floats, index: npt.NDArray[np.int64], bins: int, least: int) -> list[npt.NDArray[np.int64]]:
    """Index split by quantiles of its values into at most `bins` parts of at least `least`."""
    count = min(bins, len(index) // least)
    if count == 0:
        return []
    parts = np.searchsorted(np.quantile(values, np.arange(1, count) / count), values, "left")
    return [index[parts == part] for part in range(count) if np.count_nonzero(parts == part) >= least]


# ---- fit


@dataclass(frozen=True, slots=True)
class Quantity:
    """A figure with its 95 % interval; without one, `lo` and `hi` are None."""

    value: float
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of predicted times, the mean over each start's points: over starts, the median and the worst."""

    median: float
    worst: float
    starts: int


@dataclass(frozen=True, slots=True)
class Fit:
    """What one key attains.

    Attributes:
        key: GPU, class of kernels, version.
        efficiency: fitted.
        prior: what it shrinks to.
        covariance: of the logarithms of `PARAMETERS`.
        sigma: relative error of a start's points beyond what the model explains.
        freedom: of Student's t.
        starts: server starts behind it; with one there is no interval.
        points: behind it.
        told: share of each parameter's prior variance that the points took away: 0 is the prior, 1 is all measured.
        in_sample: errors of the fit itself.
        left_out: errors where each start was predicted by a fit without it; None below two starts.
        models: that were measured.
        batch: smallest and largest of the points that decode; so `context`. NaN where there are none.
        prefill_tokens: smallest and largest of points with prompts.
    """

    key: Key
    efficiency: Efficiency
    prior: Prior
    covariance: Floats
    sigma: float
    freedom: float
    starts: int
    points: tuple[Point, ...]
    told: Mapping[str, float]
    in_sample: Errors
    left_out: Errors | None
    models: frozenset[str]
    batch: tuple[float, float]
    context: tuple[float, float]
    prefill_tokens: tuple[float, float]

    def figure(self, name: str) -> Quantity:
        """One of `PARAMETERS` with its interval."""
        value = float(getattr(self.efficiency, name))
        if self.starts < 2:
            return Quantity(value)
        at = PARAMETERS.index(name)
        half = t_quantile(0.975, self.freedom) * math.sqrt(self.covariance[at, at])
        half = min(half, 1.96 * math.log(getattr(self.prior.factor, name)))  # few starts know no less than the prior
        return Quantity(value, value * math.exp(-half), value * math.exp(half))

    def describe(self) -> str:
        """In words, with errors."""
        form = "max(host, device)" if self.efficiency.overlaps else "host + device"
        form += ", device = traffic + arithmetic" if self.efficiency.adds else ""
        lines = [f"{self.key}: {len(self.points)} points of {_counted(self.starts)}, step = {form}"]
        for name in PARAMETERS:
            found, told = self.figure(name), self.told[name]
            span = "one trial, no interval" if found.lo is None else f"{found.lo:.3g} to {found.hi:.3g}"
            lines.append(f"  {name:15} {found.value:9.3g}  ({span}; {told:.0%} measured, the rest prior)")
        lines.append(f"  error in sample: median {self.in_sample.median:.1%}, worst {self.in_sample.worst:.1%}")
        if self.left_out:
            lines.append(f"  error left out:  median {self.left_out.median:.1%}, worst {self.left_out.worst:.1%}")
        else:
            lines.append("  error left out:  not known, one start")
        return "\n".join(lines)


def _counted(starts: int) -> str:
    return "1 start" if starts == 1 else f"{starts} starts"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fits by key.

    Attributes:
        fits: what was measured.
        excluded: trial ids that gave no point, with the reason.
        simulated: made of simulated rows alone.
    """

    fits: Mapping[Key, Fit] = field(default_factory=dict)
    excluded: tuple[tuple[str, str], ...] = ()
    simulated: bool = False

    def describe(self) -> str:
        """In words."""
        told = [fit.describe() for _, fit in sorted(self.fits.items())] or ["nothing measured: priors alone"]
        return "\n".join(["SIMULATED"] * self.simulated + told)


def calibrate(
    rows: Iterable[TrialRow],
    models: Mapping[str, ModelSpec],
    *,
    requests: Callable[[str], Sequence[RequestRecord]] | None = None,
    cpu: GpuSpec | None = None,
    simulated: bool = False,
    saturated: bool = False,
) -> Calibration:
    """Fits efficiencies to a store's rows. Arguments as `points`; simulated and real rows never meet in one fit."""
    found, left = points(rows, models, requests=requests, cpu=cpu, simulated=simulated, saturated=saturated)
    specs = {gpu.name: gpu for gpu in (*gpus.catalogue().values(), *([cpu] if cpu else []))}
    by_key: dict[Key, list[Point]] = {}
    for point in found:
        by_key.setdefault(point.key, []).append(point)
    fits = {key: fit(some, prior(specs[key.gpu], key.kernel)) for key, some in by_key.items()}
    return Calibration(fits, tuple(left), simulated)


def fit(some: Sequence[Point], known: Prior) -> Fit:
    """Fits one key's points, with the host's part beside the device's and before it; the likelier of the two is kept.

    A CPU's steps have no device that the host could run ahead of: there it is traffic and arithmetic that may add up.

    Args:
        some: at least one, of one key.
        known: what few of them shrink to.
    """
    first = known.median
    other = (
        replace(first, adds=not first.adds) if some[0].key.gpu == "cpu" else replace(first, overlaps=not first.overlaps)
    )
    tried = [_Data.of(some, form) for form in (first, other)]
    solutions = [_solve(one, known) for one in tried]
    data, solved = min(zip(tried, solutions, strict=True), key=lambda pair: pair[1].cost)
    starts = len(data.names)
    decoding = [point for point in some if point.batch > 0]
    filling = [point.prefill_tokens for point in some if point.prefill_tokens > 0]
    return Fit(
        key=some[0].key,
        efficiency=_efficiency(solved.theta, data.form),
        prior=known,
        covariance=solved.covariance,
        sigma=solved.sigma,
        freedom=solved.freedom,
        starts=starts,
        points=tuple(some),
        told=dict(zip(PARAMETERS, solved.told.tolist(), strict=True)),
        in_sample=_errors([_error(data, solved.theta, data.group == at) for at in range(starts)]),
        left_out=_leave_one_out(data, known, solved.theta) if starts > 1 else None,
        models=frozenset(point.model for point in some),
        batch=_range([point.batch for point in decoding]),
        context=_range([point.context for point in decoding]),
        prefill_tokens=_range(filling),
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class _Data:
    """Points as arrays; `group` is the start of each, `weight` sums to about 1 over a start's."""

    parts: Parts
    log_s: Floats
    weight: Floats
    group: npt.NDArray[np.int64]
    names: tuple[str, ...]
    form: Efficiency

    @classmethod
    def of(cls, some: Sequence[Point], form: Efficiency) -> _Data:
        names, group = np.unique([point.server_id for point in some], return_inverse=True)
        error = np.array([point.error_frac for point in some])
        weight = 1 / np.bincount(group)[group] / (1 + (error / POINT_ERROR) ** 2)
        log_s = np.log([point.seconds for point in some])
        return cls(Parts.joined([point.parts for point in some]), log_s, weight, group, tuple(names.tolist()), form)

    def take(self, mask: npt.NDArray[np.bool_]) -> _Data:
        parts, log_s = self.parts.take(mask), self.log_s[mask]
        return _Data(parts, log_s, self.weight[mask], self.group[mask], self.names, self.form)

    def residual(self, theta: Floats) -> Floats:
        return np.asarray(self.log_s - np.log(self.parts.seconds(_efficiency(theta, self.form))), dtype=np.float64)

    def slopes(self, theta: Floats, step: float = 1e-4) -> Floats:
        """Of the residuals with each logarithm: a row a point."""
        base = self.residual(theta)
        moved = [self.residual(theta + step * np.eye(len(theta))[at]) for at in range(len(theta))]
        return np.stack([(one - base) / step for one in moved], axis=1)

    def told_slopes(self, theta: Floats, step: float = 0.1) -> Floats:
        """The lesser of the slopes up and down: where a maximum turns, one side alone tells nothing of the other."""
        up, down = self.slopes(theta, step), self.slopes(theta, -step)
        return np.where(np.abs(up) < np.abs(down), up, down)


@dataclass(frozen=True, slots=True)
class _Solved:
    theta: Floats
    covariance: Floats
    sigma: float
    freedom: float
    told: Floats
    cost: float


def _efficiency(theta: Floats, form: Efficiency) -> Efficiency:
    """These parameters, in a law of that form."""
    values: list[float] = np.exp(theta).tolist()
    return Efficiency(*values, overlaps=form.overlaps, adds=form.adds)


def _logs(values: Efficiency) -> Floats:
    return np.log([getattr(values, name) for name in PARAMETERS])


def _solve(data: _Data, known: Prior, begin: Floats | None = None) -> _Solved:
    """Alternates between the parameters at a sigma and the sigma of the residuals that leaves."""
    centre, precision = _logs(known.median), np.diag(_logs(known.factor) ** -2)
    theta, sigma, starts = centre if begin is None else begin, SIGMA, len(np.unique(data.group))
    for _ in range(4):
        theta = _descend(data, theta, centre, precision, sigma)
        slopes = data.told_slopes(theta)
        seen = slopes.T @ (slopes * data.weight[:, None]) / sigma**2
        covariance = np.linalg.inv(seen + precision)
        spent = float(np.trace(covariance @ seen))
        freedom = SIGMA_STARTS + max(starts - spent, 0.0)
        squares = float(data.weight @ data.residual(theta) ** 2)
        sigma = max(math.sqrt((SIGMA_STARTS * SIGMA**2 + squares) / freedom), 0.01)
    covariance = np.linalg.inv(slopes.T @ (slopes * data.weight[:, None]) / sigma**2 + precision)
    told = np.clip(1 - np.diag(covariance) * np.diag(precision), 0, 1)
    away = theta - centre
    cost = float(data.weight @ data.residual(theta) ** 2 / SIGMA**2 + away @ precision @ away)
    return _Solved(theta, np.asarray(covariance, dtype=np.float64), sigma, freedom, told, cost)


def _descend(data: _Data, theta: Floats, centre: Floats, precision: Floats, sigma: float) -> Floats:
    """Levenberg's damped Gauss-Newton steps down the posterior."""

    def cost(at: Floats) -> float:
        away = at - centre
        return float(data.weight @ data.residual(at) ** 2 / sigma**2 + away @ precision @ away)

    damping, now = 1e-3, cost(theta)
    for _ in range(60):
        slopes, weighted = data.slopes(theta), data.weight / sigma**2
        downhill = -slopes.T @ (weighted * data.residual(theta)) - precision @ (theta - centre)
        curved = slopes.T @ (slopes * weighted[:, None]) + precision
        tried = theta + np.linalg.solve(curved + damping * np.diag(np.diag(curved)), downhill)
        if (then := cost(tried)) < now:
            theta, damping = tried, damping / 3
            if now - then < 1e-6 * (1 + now):
                return theta
            now = then
        elif (damping := damping * 4) > 1e8:
            return theta
    return theta


def _error(data: _Data, theta: Floats, mask: npt.NDArray[np.bool_]) -> float:
    """Mean relative error of the predicted times."""
    return float(np.abs(np.exp(-data.residual(theta)[mask]) - 1).mean())


def _leave_one_out(data: _Data, known: Prior, begin: Floats) -> Errors:
    """Each start predicted by the others."""
    masks = [data.group == at for at in range(len(data.names))]
    return _errors([_error(data, _solve(data.take(~mask), known, begin).theta, mask) for mask in masks])


def _errors(each: Sequence[float]) -> Errors:
    return Errors(float(np.median(each)), max(each), len(each))


# ---- estimate


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a server is asked, on average.

    Attributes:
        prompt_tokens: of a request.
        output_tokens: of an answer.
        rate_rps: requests a second; None: always as many as it takes at once.
        cached_tokens: of a prompt that a prefix cache holds already.
    """

    prompt_tokens: float
    output_tokens: float
    rate_rps: float | None = None
    cached_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """For order and display, never for hard rules.

    Attributes:
        tpot_s: mean time of an output token after the first.
        ttft_s: mean time to first token; infinite when saturated: it grows as long as the load lasts.
        tokens_per_s: output tokens of all requests together.
        batch: sequences that decode at once, as a token sees them.
        saturated: the rate is more than the server can take.
        basis: `measured`, or `prior` where nothing like it was.
        source: the fit's key, or the prior's source.
        simulated: from simulated rows.
        beyond: in what it leaves what was measured.
    """

    tpot_s: Quantity
    ttft_s: Quantity
    tokens_per_s: Quantity
    batch: float
    saturated: bool
    basis: Basis
    source: str
    simulated: bool
    beyond: tuple[str, ...]

    @property
    def extrapolates(self) -> bool:
        """It says more than the measurements do."""
        return bool(self.beyond)


def estimate(
    calibration: Calibration,
    model: ModelSpec,
    gpu: GpuSpec,
    serve: Serve,
    traffic: Traffic,
    *,
    engine_version: str | None = None,
    quantization: str | None = None,
    kv_tokens: float | None = None,
) -> Estimate:
    """What a configuration would give.

    Steps are taken to be alike: a batch that stays, in which each step but some carries no prompt. Of n requests that
    decode at once each sees itself and the others, so that the mean batch it sees is one more than rate x time.

    Args:
        calibration: of the store; an empty one gives priors.
        model: as it is loaded; its name is held against those measured.
        gpu: it runs on.
        serve: the configuration; numbers, not arrays.
        traffic: what is asked of it.
        engine_version: of vLLM; None: of the fit with most starts.
        quantization: the flag, where it is given.
        kv_tokens: of the cache, where known; else `memory` estimates it on a GPU, and a CPU has enough.
    """
    kernel = kernel_of(model, serve, engine_version, quantization)
    found, beyond = fit_for(calibration, gpu, kernel, engine_version)
    load = _Load.of(model, gpu, serve, traffic, kernel, kv_tokens)
    belief = _Belief.of(found, prior(gpu, kernel))
    settled = load.settle(_efficiency(belief.centre, belief.form))
    tpot, ttft, capacity = _with_intervals(load, belief)
    rate = math.inf if traffic.rate_rps is None else traffic.rate_rps
    return Estimate(
        tpot_s=tpot,
        ttft_s=ttft,
        tokens_per_s=_capped(capacity, rate * traffic.output_tokens),
        batch=settled.batch,
        saturated=settled.saturated,
        basis="measured" if found else "prior",
        source=belief.source,
        simulated=calibration.simulated and found is not None,
        beyond=(*beyond, *(_left(found, model, settled.batch, load) if found else ())),
    )


def efficiency_for(
    calibration: Calibration, gpu: GpuSpec, kernel: str, engine_version: str | None = None
) -> Efficiency:
    """What `estimate` takes for a class of kernels: fitted where it was measured, else the prior's median."""
    found, _ = fit_for(calibration, gpu, kernel, engine_version)
    return found.efficiency if found else prior(gpu, kernel).median


def fit_for(calibration: Calibration, gpu: GpuSpec, kernel: str, version: str | None) -> tuple[Fit | None, list[str]]:
    """The fit of this GPU and these kernels, of this version or another."""
    same = {key: fit for key, fit in calibration.fits.items() if (key.gpu, key.kernel) == (gpu.name, kernel)}
    if not same:
        on_gpu = any(key.gpu == gpu.name for key in calibration.fits)
        return None, [f"kernels: {kernel} was not measured" if on_gpu else f"GPU: {gpu.name} was not measured"]
    exact = [fit for key, fit in same.items() if version is None or key.engine_version == version]
    chosen = max(exact or same.values(), key=lambda fit: (fit.starts, fit.key))
    other = [] if exact else [f"version: vLLM {version} was not measured, {chosen.key.engine_version} was"]
    return chosen, other


def _left(found: Fit, model: ModelSpec, batch: float, load: _Load) -> list[str]:
    """In what an estimate leaves a fit's points."""
    said = [] if any(_same_model(model.name, name) for name in found.models) else [f"model: {model.name}"]
    ranges = (
        ("batch", batch, found.batch),
        ("context", load.context, found.context),
        ("prompt", load.fresh, found.prefill_tokens),
    )
    for name, value, (lo, hi) in ranges:
        if not lo / EDGE <= value <= hi * EDGE:
            span = "nothing" if math.isnan(lo) else f"{lo:.0f} to {hi:.0f}"
            said.append(f"{name}: {value:.0f}, measured {span}")
    return said


def _same_model(name: str, row_name: str) -> bool:
    return row_name.rstrip("/").rsplit("/", 1)[-1] == name.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class _Settled:
    batch: float
    tpot_s: float
    ttft_s: float
    capacity_tokens_per_s: float
    saturated: bool


@dataclass(frozen=True, slots=True)
class _Load:
    """Traffic against the steps of one configuration, at each batch it may have.

    Attributes:
        batches: from 1 to the most there can be.
        plain: steps without a prompt.
        filling: steps with the prompts that come with such a batch.
        first: a request's first step, among what runs already.
        share: of steps with a prompt in them.
    """

    traffic: Traffic
    batches: Floats
    plain: Parts
    filling: Parts
    first: Parts
    share: Floats
    context: float
    fresh: float

    @classmethod
    def of(
        cls, model: ModelSpec, gpu: GpuSpec, serve: Serve, traffic: Traffic, kernel: str, kv_tokens: float | None
    ) -> _Load:
        times = StepTimes.of(model, gpu, serve, kernel)
        context = traffic.prompt_tokens + traffic.output_tokens / 2
        fresh = max(traffic.prompt_tokens - traffic.cached_tokens, 1.0)
        if kv_tokens is None:
            kv_tokens = math.inf if gpu.measured else float(memory(model, gpu, serve).kv_tokens)
        most = max(1.0, min(float(serve.max_num_seqs), kv_tokens / context))
        batches = np.unique(np.concatenate([np.geomspace(1, most, 48), [most]]))
        arriving = batches / max(traffic.output_tokens - 1, 1)  # prompts a step: what comes is what leaves
        share = 1 - np.exp(-arriving)
        prompts = arriving / share
        cached = traffic.cached_tokens
        return cls(
            traffic=traffic,
            batches=batches,
            plain=times.parts(batches, context),
            filling=times.parts(batches, context, fresh * prompts, cached, prompts),
            first=times.parts(np.maximum(batches - 1, 0), context, fresh, cached, requests=1),
            share=share,
            context=context,
            fresh=fresh,
        )

    def settle(self, efficiency: Efficiency) -> _Settled:
        """The batch at which as much leaves as comes."""
        steps = np.maximum(self.traffic.output_tokens - 1, 1)
        tpot = (1 - self.share) * self.plain.seconds(efficiency) + self.share * self.filling.seconds(efficiency)
        held = np.maximum.accumulate((self.batches - 1) / (steps * tpot))  # the rate at which a token sees this batch
        capacity = float(self.batches[-1] / (steps * tpot[-1]))
        rate = self.traffic.rate_rps
        saturated = rate is not None and rate >= capacity
        full = rate is None or rate >= held[-1]
        batch = float(self.batches[-1]) if full else float(np.interp(rate or 0.0, held, self.batches))
        tpot_s = float(np.interp(batch, self.batches, tpot))
        first_s = float(np.interp(batch, self.batches, self.first.seconds(efficiency)))
        waits_s = min(batch - 1, 1.0) * tpot_s / 2  # for the end of the step that runs
        ttft_s = math.inf if saturated else first_s + waits_s
        return _Settled(batch, tpot_s, ttft_s, capacity * self.traffic.output_tokens, saturated)


@dataclass(frozen=True, slots=True)
class _Belief:
    """What is known of the steps' efficiencies.

    Attributes:
        centre: logarithms of `PARAMETERS`.
        form: of the law.
        spread: their covariance, times the square of the quantile; None: no interval is known.
        noise: half the interval of a start's own error.
        source: a fit's key, or where the prior is from.
    """

    centre: Floats
    form: Efficiency
    spread: Floats | None
    noise: float
    source: str

    @classmethod
    def of(cls, found: Fit | None, known: Prior) -> _Belief:
        if found is None:
            assumed = np.diag(_logs(known.factor) ** 2) * 1.96**2
            return cls(_logs(known.median), known.median, assumed, 1.96 * PRIOR_SIGMA, known.source)
        quantile = t_quantile(0.975, found.freedom)
        spread = found.covariance * quantile**2 if found.starts > 1 else None
        fitted = found.efficiency
        return cls(_logs(fitted), fitted, spread, quantile * found.sigma, str(found.key))


def _with_intervals(load: _Load, belief: _Belief) -> tuple[Quantity, Quantity, Quantity]:
    """TPOT, TTFT and capacity: the delta method on logarithms."""
    centre, spread = belief.centre, belief.spread

    def at(theta: Floats) -> Floats:
        settled = load.settle(_efficiency(theta, belief.form))
        return np.array([settled.tpot_s, settled.ttft_s, settled.capacity_tokens_per_s])

    values = at(centre)
    if spread is None:
        return Quantity(float(values[0])), Quantity(float(values[1])), Quantity(float(values[2]))
    step = 1e-3
    with np.errstate(invalid="ignore"):
        slopes = np.stack([np.log(at(centre + step * row) / values) / step for row in np.eye(len(centre))])
        half = np.sqrt(np.einsum("pq,pr,rq->q", slopes, spread, slopes) + belief.noise**2)
    tpot, ttft, capacity = (_spanned(float(v), float(h)) for v, h in zip(values, half, strict=True))
    return tpot, ttft, capacity


def _spanned(value: float, half: float) -> Quantity:
    if not math.isfinite(value) or not math.isfinite(half):
        return Quantity(value)
    return Quantity(value, value * math.exp(-half), value * math.exp(half))


def _capped(capacity: Quantity, asked: float) -> Quantity:
    """What comes out is what is asked, up to what can be done."""
    lo, hi = capacity.lo, capacity.hi
    return Quantity(
        min(capacity.value, asked), None if lo is None else min(lo, asked), None if hi is None else min(hi, asked)
    )
