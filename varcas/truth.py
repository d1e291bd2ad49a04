"""The simulated engine against real measurements that it was not told of: `varcas simulate --validate STORE`.

The store's configurations are dealt into parts. The starts of each part are predicted by a simulator that is calibrated
with those of the others alone; a configuration is never predicted from starts of its own. Of each metric the error is
(simulated - measured) / measured, measured being the mean over a configuration's starts.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas import gpus
from varcas.calibration import Calibration, Traffic
from varcas.errors import InputError, TrialError
from varcas.experiment import Experiment, Hardware, Simulation
from varcas.intervals import pooled_deviation, t_quantile
from varcas.known import find_model
from varcas.metrics import summarise
from varcas.records import MEASUREMENT_VERSION, RequestRecord, TrialRow
from varcas.report import has_unreal_acceptance, settings_text
from varcas.simulated import Simulator, asked
from varcas.store import Store
from varcas.virtual import VirtualLoad

FOLDS = 2
MIN_CONFIGURATIONS = 4
STEADY_ONLY = ("ttft_p50_ms", "ttft_mean_ms", "e2e_mean_ms")
"""Of a server that fell behind they say how long the load lasted."""
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "output_tokens_per_s": (0.05, 0.10),
    "request_rate_rps": (None, None),
    "tpot_mean_ms": (0.07, None),
    "ttft_p50_ms": (0.10, None),
    "ttft_mean_ms": (None, None),
    "e2e_mean_ms": (None, None),
}
"""Metric to the median and the worst error that are aimed at, where there is an aim."""
LEAST_TAU = 0.9

_FROZEN = ConfigDict(extra="forbid", frozen=True)


class Compared(BaseModel):
    """One metric of one configuration."""

    model_config = _FROZEN
    measured: float = Field(description="mean over its starts")
    simulated: float
    error_frac: float


class Prediction(BaseModel):
    """One configuration under one load."""

    model_config = _FROZEN
    study: str
    numbers: list[int] = Field(description="of its rows")
    model: str
    gpu: str | None
    engine_version: str | None
    load: str
    flags: dict[str, JsonValue]
    starts: int
    live: bool = Field(description="measured on a running server whose limits were changed")
    saturated: bool
    beyond: list[str] = Field(description="in what it leaves the measurements that it was predicted from")
    failed: str | None = Field(description="why the simulated engine would not have started, though the real one did")
    metrics: dict[str, Compared]


class MetricErrors(BaseModel):
    """Of one metric over all configurations."""

    model_config = _FROZEN
    metric: str
    configurations: int
    median: float
    worst: float
    aim_median: float | None
    aim_worst: float | None

    @property
    def met(self) -> bool | None:
        """Both aims are; null without one."""
        aims = ((self.aim_median, self.median), (self.aim_worst, self.worst))
        met = [value <= aim for aim, value in aims if aim is not None]
        return all(met) if met else None


class Order(BaseModel):
    """Whether configurations come out in the right order of throughput."""

    model_config = _FROZEN
    tau: float | None = Field(description="Kendall's, over the pairs whose measured gap exceeds its 95 % interval")
    pairs: int = Field(description="such pairs")
    of: int = Field(description="all pairs of configurations under the same load")


class Validation(BaseModel):
    """What `varcas simulate --validate` answers."""

    model_config = _FROZEN
    store: str
    folds: int
    starts: int
    predictions: list[Prediction]
    errors: list[MetricErrors]
    start_spread_frac: float | None = Field(description="standard deviation between starts of one configuration")
    error_in_spreads: float | None = Field(description="median error of tokens/s over that")
    order: Order
    fits: list[str] = Field(description="of each part: what step times were taken from")
    left_out: dict[str, int] = Field(description="rows that were not taken, by reason")


@dataclass(frozen=True, slots=True)
class _Case:
    """Starts of one configuration under one load, and the experiment that they belong to."""

    rows: tuple[TrialRow, ...]
    experiment: Experiment

    def mean(self, metric: str) -> float | None:
        values = [value for row in self.rows if (value := getattr(row, metric)) is not None]
        return fmean(values) if len(values) == len(self.rows) else None

    @property
    def load(self) -> tuple[str, ...]:
        """What two configurations must share to be held against each other."""
        row = self.rows[0]
        return row.model, row.gpu_name or "", row.engine_version or "", row.env_json, row.workload_json


def validate(path: str | Path, *, folds: int = FOLDS, seed: int = 0) -> Validation:
    """Predicts a store's real measurements from each other.

    Args:
        path: a results directory.
        folds: parts into which the configurations are dealt; each is predicted from the others.
        seed: of the deal.

    Raises:
        InputError: no results there, or too few configurations.
    """
    if not (Path(path) / "trials").is_dir():
        raise InputError(f"--validate: {str(path)!r}: holds no results. Give the directory that `varcas sweep` wrote.")
    if folds < 2:
        raise InputError(f"--folds: {folds}: at least 2: one part is predicted from the others.")
    store = Store(path, readonly=True)
    cases, left_out = _cases(store)
    if len(cases) < max(folds, MIN_CONFIGURATIONS):
        why = f" ({', '.join(f'{count} {reason}' for reason, count in left_out.items())} left out)" if left_out else ""
        raise InputError(
            f"--validate: {str(path)!r}: {len(cases)} configurations were measured{why}, at least "
            f"{max(folds, MIN_CONFIGURATIONS)} are needed: sweep more of them."
        )
    random.Random(seed).shuffle(cases)
    parts = [cases[at::folds] for at in range(folds)]
    predictions: list[tuple[_Case, Prediction]] = []
    fits: list[str] = []
    for at, part in enumerate(parts):
        others = [row for other, some in enumerate(parts) if other != at for case in some for row in case.rows]
        made = _Predictor(others, store)
        predictions += [(case, made.predict(case)) for case in part]
        fits += [f"part {at + 1}: {line}" for line in made.described()]
    return _validation(str(path), folds, predictions, fits, left_out)


def _cases(store: Store) -> tuple[list[_Case], dict[str, int]]:
    """Real measurements by configuration and load, and why others are not among them."""
    groups: dict[str, list[TrialRow]] = {}
    left_out: dict[str, int] = {}
    for row in store.rows():
        reason = _unfit(row) or _undescribed(row.model)
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        groups.setdefault(row.trial_key, []).append(row)
    saved = {study: store.study(study) for study in {rows[0].study for rows in groups.values()}}
    cases = []
    for key in sorted(groups):
        rows = groups[key]
        found = saved[rows[0].study]
        if found is None:
            left_out["its experiment is not stored"] = left_out.get("its experiment is not stored", 0) + len(rows)
            continue
        cases.append(_Case(tuple(rows), Experiment.model_validate_json(json.dumps(found["experiment"]))))
    return cases, left_out


def _unfit(row: TrialRow) -> str | None:
    reasons = {
        "simulated": row.simulated,
        row.state: row.state != "complete",
        "not valid": row.valid is not True,
        "of an endpoint": row.engine != "vllm",
        f"of measurement version {row.measurement_version}": row.measurement_version != MEASUREMENT_VERSION,
        "with an acceptance that is not real": has_unreal_acceptance(row) or "speculative_config" in row.flags,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def _undescribed(model: str) -> str | None:
    try:
        find_model(model)
    except InputError:
        return f"of {model}, whose config.json is not found here"
    return None


class _Predictor:
    """Simulators that are calibrated with some rows; one for each model, GPU and version."""

    def __init__(self, rows: Sequence[TrialRow], store: Store) -> None:
        self._rows, self._store = rows, store
        self._made: dict[tuple[str, ...], Simulator] = {}

    def predict(self, case: _Case) -> Prediction:
        row = case.rows[0]
        simulator = self._simulator(case)
        flags: dict[str, JsonValue] = row.config_flags
        columns, failed, beyond = _simulated(simulator, flags, case, self._store.requests(row.trial_id))
        return Prediction(
            study=row.study,
            numbers=[one.number for one in case.rows],
            model=row.model,
            gpu=row.gpu_name,
            engine_version=row.engine_version,
            load=case.experiment.workload.described,
            flags=flags,
            starts=len({one.server_id for one in case.rows}),
            live=row.measured_live,
            saturated=any(one.saturated for one in case.rows),
            beyond=beyond,
            failed=failed,
            metrics=_compared(case, columns),
        )

    def _simulator(self, case: _Case) -> Simulator:
        row, e = case.rows[0], case.experiment
        found = next(iter(gpus.variants(row.gpu_name)), None) if row.gpu_name else None
        gpu = found.name if found is not None else "cpu"
        key = (row.study, gpu, row.engine_version or "")
        if key not in self._made:
            told: dict[str, Any] = {
                "hardware": Hardware(gpu=gpu, count=e.hardware.count),
                "simulation": Simulation(engine_version=row.engine_version),
            }
            self._made[key] = Simulator.of(e.model_copy(update=told), self._rows, self._store.requests)
        return self._made[key]

    def described(self) -> list[str]:
        """The fits, once each."""
        calibrations: Iterable[Calibration] = (made.calibration for made in self._made.values())
        return sorted({text for made in calibrations for text in (fit.describe() for fit in made.fits.values())})


def _simulated(
    simulator: Simulator, flags: Mapping[str, JsonValue], case: _Case, records: Sequence[RequestRecord]
) -> tuple[dict[str, Any], str | None, list[str]]:
    """Columns of a simulated measurement, why there are none, and in what it extrapolates."""
    workload = case.experiment.workload
    try:
        engine = simulator.engine(flags)
    except TrialError as error:
        return {}, f"{error.kind}: {error.detail}", []
    length = engine.limits.max_model_len
    drawn = asked(workload, length, records)
    load = VirtualLoad(drawn, engine, duration_s=workload.duration_s, max_drain_s=workload.max_drain_s)
    result = load.result()
    traffic = Traffic(
        fmean(request.prompt_tokens for request in drawn), fmean(request.output_tokens for request in drawn),
        workload.mean_rps,
    )  # fmt: skip
    columns = summarise(result, case.experiment.slo, load.samples, arrival=workload.arrives.kind)
    return columns, None, list(simulator.beyond(flags, traffic))


def _compared(case: _Case, columns: Mapping[str, Any]) -> dict[str, Compared]:
    saturated = any(row.saturated for row in case.rows)
    found = {}
    for metric in BOUNDS:
        measured, simulated = case.mean(metric), columns.get(metric)
        if measured and simulated is not None and not (saturated and metric in STEADY_ONLY):
            found[metric] = Compared(measured=measured, simulated=simulated, error_frac=simulated / measured - 1)
    return found


def _validation(
    path: str, folds: int, predicted: Sequence[tuple[_Case, Prediction]], fits: list[str], left_out: dict[str, int]
) -> Validation:
    ordered = sorted(predicted, key=lambda pair: (pair[1].study, pair[1].numbers))
    predictions = [prediction for _, prediction in ordered]
    errors = [found for metric in BOUNDS if (found := _errors(metric, predictions)) is not None]
    spread = _spread(case for case, _ in ordered)
    of_tokens = next((one.median for one in errors if one.metric == "output_tokens_per_s"), None)
    return Validation(
        store=path,
        folds=folds,
        starts=sum(prediction.starts for prediction in predictions),
        predictions=predictions,
        errors=errors,
        start_spread_frac=None if spread is None else spread[0],
        error_in_spreads=of_tokens / spread[0] if spread and spread[0] and of_tokens is not None else None,
        order=_order(ordered, spread),
        fits=fits,
        left_out=left_out,
    )


def _errors(metric: str, predictions: Sequence[Prediction]) -> MetricErrors | None:
    each = [abs(one.metrics[metric].error_frac) for one in predictions if metric in one.metrics]
    if not each:
        return None
    aim_median, aim_worst = BOUNDS[metric]
    return MetricErrors(
        metric=metric, configurations=len(each), median=median(each), worst=max(each), aim_median=aim_median,
        aim_worst=aim_worst,
    )  # fmt: skip


def _spread(cases: Iterable[_Case]) -> tuple[float, int] | None:
    """Relative standard deviation of tokens/s between starts of one configuration, pooled, and its freedom."""
    relative = ([row.output_tokens_per_s or 0.0 for row in case.rows] for case in cases)
    shares = ([value / (fmean(values) or 1.0) for value in values] for values in relative)
    deviation, freedom = pooled_deviation(shares, min_freedom=1)
    return None if deviation is None else (deviation, freedom)


def _order(predicted: Sequence[tuple[_Case, Prediction]], spread: tuple[float, int] | None) -> Order:
    """Kendall's tau of throughput over pairs under the same load that are told apart by their starts."""
    metric, agree, told, of = "output_tokens_per_s", 0, 0, 0
    usable = [(case, found) for case, found in predicted if metric in found.metrics]
    for at, (case, one) in enumerate(usable):
        for other_case, other in usable[:at]:
            if case.load != other_case.load:
                continue
            of += 1
            a, b = one.metrics[metric], other.metrics[metric]
            if abs(a.measured - b.measured) > _half_interval(case, other_case, a.measured, b.measured, spread):
                told += 1
                agree += 1 if (a.measured - b.measured) * (a.simulated - b.simulated) > 0 else -1
    return Order(tau=agree / told if told else None, pairs=told, of=of)


def _half_interval(one: _Case, other: _Case, a: float, b: float, spread: tuple[float, int] | None) -> float:
    """Half the 95 % interval of the gap: by the pooled spread between starts, else each start's own interval."""
    if spread is not None:
        variance = spread[0] ** 2 * (a * a / len(one.rows) + b * b / len(other.rows))
        return t_quantile(0.975, spread[1]) * math.sqrt(variance)
    halves = [
        (row.output_tokens_per_s_hi - row.output_tokens_per_s_lo) / 2
        for row in (one.rows[0], other.rows[0])
        if row.output_tokens_per_s_hi is not None and row.output_tokens_per_s_lo is not None
    ]
    return math.hypot(*halves) if halves else 0.0


def validation_text(found: Validation) -> str:
    """The answer for a terminal; Markdown reads the same."""
    lines = [
        f"# Simulated against measured: {found.store}",
        "",
        f"{len(found.predictions)} configurations, {found.starts} starts, in {found.folds} parts: each part is "
        "predicted from the others' measurements alone.",
        "",
        "| configuration | load | starts | tokens/s | error | TPOT ms | error | TTFT p50 ms | error | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
        *(_prediction_line(one, _common(found.predictions)) for one in found.predictions),
        "",
        "| metric | configurations | median error | worst | aim |",
        "|---|--:|--:|--:|---|",
        *(_error_line(one) for one in found.errors),
        "",
        *_order_lines(found),
        "",
        *found.fits,
    ]
    if found.left_out:
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
        lines += ["", f"Rows left out: {left}."]
    return "\n".join(lines)


def _common(predictions: Sequence[Prediction]) -> dict[str, JsonValue]:
    """Flags that all configurations have."""
    first = predictions[0].flags
    return {k: v for k, v in first.items() if all(k in one.flags and one.flags[k] == v for one in predictions)}


def _prediction_line(one: Prediction, common: Mapping[str, JsonValue]) -> str:
    own = {name: value for name, value in one.flags.items() if name not in common}
    cells = [settings_text(own, own) or "as all", one.load, str(one.starts)]
    for metric in ("output_tokens_per_s", "tpot_mean_ms", "ttft_p50_ms"):
        found = one.metrics.get(metric)
        cells += ["-", "-"] if found is None else [_arrow(found), f"{found.error_frac:+.1%}"]
    marks = (
        ["live"] * one.live
        + ["saturated"] * one.saturated
        + [f"extrapolates: {'; '.join(one.beyond)}"] * bool(one.beyond)
    )
    marks += [f"would not start: {one.failed}"] if one.failed else []
    return f"| {' | '.join([*cells, ', '.join(marks)])} |"


def _arrow(found: Compared) -> str:
    return f"{found.measured:.4g} → {found.simulated:.4g}"


def _error_line(one: MetricErrors) -> str:
    aims = [f"median ≤ {one.aim_median:.0%}"] if one.aim_median is not None else []
    aims += [f"worst ≤ {one.aim_worst:.0%}"] if one.aim_worst is not None else []
    verdict = f"{', '.join(aims)}: {'met' if one.met else 'missed'}" if aims else ""
    return f"| {one.metric} | {one.configurations} | {one.median:.1%} | {one.worst:.1%} | {verdict} |"


def _order_lines(found: Validation) -> list[str]:
    lines = []
    if found.start_spread_frac is not None and found.error_in_spreads is not None:
        lines.append(
            f"Starts of one configuration differ by {found.start_spread_frac:.1%} (standard deviation): the median "
            f"error of tokens/s is {found.error_in_spreads:.1f} times that."
        )
    order = found.order
    if order.tau is None:
        return [*lines, f"Order: none of {order.of} pairs is told apart by its measurements."]
    met = "met" if order.tau >= LEAST_TAU else "missed"
    return [
        *lines,
        f"Order: Kendall's tau {order.tau:.2f} over the {order.pairs} of {order.of} pairs whose measured gap exceeds "
        f"its interval; aim ≥ {LEAST_TAU}: {met}.",
    ]
