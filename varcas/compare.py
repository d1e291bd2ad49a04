"""Two studies beside each other: what changed from one to the other, per metric, with intervals over starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.errors import InputError
from varcas.experiment import OBJECTIVES
from varcas.intervals import student_half, welch_half
from varcas.metrics import MIN_STARTS, verdict_of
from varcas.records import MEASUREMENT_VERSION, TrialRow

METRICS = (
    "output_tokens_per_s", "request_rate_rps", "goodput_rps", "capacity_rps", "ttft_mean_ms", "ttft_p95_ms",
    "tpot_mean_ms", "tpot_p95_ms", "e2e_p95_ms", "server_start_s",
)  # fmt: skip
CONDITIONS = (
    "model",
    "model_revision",
    "gpu_name",
    "engine_version",
    "env_json",
    "workload_json",
    "measurement_version",
)
MIN_PAIRS = 3
Verdict = Literal["better", "worse", "inconclusive"]


class Difference(BaseModel):
    """One metric, from the first study to the second."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    a: float = Field(description="geometric mean of the first study's starts")
    b: float = Field(description="of the second's")
    ratio: float = Field(description="b / a")
    lo: float | None = Field(description="lower end of the interval of the ratio, simultaneous over the metrics")
    hi: float | None
    n: tuple[int, int] = Field(description="starts; `paired`: configurations in both studies, twice")
    verdict: Verdict


class Compared(BaseModel):
    """One configuration in both studies."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(description="`baseline`, `winner`, or which of the configurations they share")
    flags: dict[str, JsonValue]
    differences: list[Difference]


class Comparison(BaseModel):
    """What `varcas compare --json` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    a: str
    b: str
    simulated: bool
    changed: dict[str, list[JsonValue]] = Field(description="conditions that differ: those of a and of b")
    configurations: list[Compared] = Field(description="started at least three times in both")
    paired: list[Difference] = Field(description="over all configurations that both measured, each a pair")
    regressed: bool = Field(description="some metric is worse, with the whole of its interval")
    warnings: list[str]


def compare_studies(a: Sequence[TrialRow], b: Sequence[TrialRow]) -> Comparison:
    """Compares what two studies measured of the same configurations.

    Configurations that were started `MIN_STARTS` times in both are compared start by start (Welch's interval on the
    logarithms); all that both measured once at least are compared in pairs, whose differences hold what moves all of
    them alike, say another version. Intervals are simultaneous over the metrics (Bonferroni): with ten metrics at 95 %
    each, two in five comparisons of equals would find something.

    Args:
        a: rows of the first study.
        b: rows of the second.

    Raises:
        InputError: they have no configuration in common.
    """
    mine, theirs = _starts(a), _starts(b)
    shared = [key for key in mine if key in theirs]
    names = {rows[0].study for rows in (*mine.values(), *theirs.values())}
    if not shared:
        raise InputError(
            f"STUDY: {' and '.join(sorted(names)) or 'these studies'} measured no configuration in common: "
            "run the second from an experiment whose baseline or `study.enqueue` names one of the first's."
        )
    changed = _changed(a, b)
    several = [key for key in shared if min(len(mine[key]), len(theirs[key])) >= MIN_STARTS]
    configurations = [_compared(key, mine[key], theirs[key]) for key in several]
    paired = _paired([(mine[key], theirs[key]) for key in shared])
    differences = [*paired, *(one for config in configurations for one in config.differences)]
    return Comparison(
        a=a[0].study,
        b=b[0].study,
        simulated=any(row.simulated for row in (*a, *b)),
        changed=changed,
        configurations=configurations,
        paired=paired,
        regressed=any(one.verdict == "worse" for one in differences),
        warnings=_warnings(a, b, changed, several, shared),
    )


def _starts(rows: Sequence[TrialRow]) -> dict[str, list[TrialRow]]:
    """Measurements to be believed, by configuration."""
    found: dict[str, list[TrialRow]] = {}
    for row in rows:
        if row.is_believed and row.warm_from is None:
            found.setdefault(row.config_hash, []).append(row)
    return found


def _changed(a: Sequence[TrialRow], b: Sequence[TrialRow]) -> dict[str, list[JsonValue]]:
    told: dict[str, list[JsonValue]] = {}
    for name in CONDITIONS:
        one, other = _seen(a, name), _seen(b, name)
        if one != other:
            told[name] = [_one(one), _one(other)]
    return told


def _seen(rows: Sequence[TrialRow], name: str) -> list[str]:
    return sorted({str(getattr(row, name)) for row in rows if row.state == "complete"})


def _one(values: list[str]) -> JsonValue:
    return values[0] if len(values) == 1 else list(values)


def _compared(key: str, a: Sequence[TrialRow], b: Sequence[TrialRow]) -> Compared:
    named = {row.purpose for row in (*a, *b)}
    arms = {row.arm for row in (*a, *b)}
    name = "baseline" if "baseline" in named | arms else "winner" if "candidate" in arms else key[:8]
    measured = [(metric, _logs(a, metric), _logs(b, metric)) for metric in METRICS]
    usable = [(metric, x, y) for metric, x, y in measured if min(len(x), len(y)) >= MIN_STARTS]
    differences = [_welch(metric, x, y, len(usable)) for metric, x, y in usable]
    return Compared(name=name, flags=json.loads(a[0].config_json), differences=differences)


def _paired(pairs: Sequence[tuple[Sequence[TrialRow], Sequence[TrialRow]]]) -> list[Difference]:
    found = []
    for metric in METRICS:
        logs = [(_logs(x, metric), _logs(y, metric)) for x, y in pairs]
        means = [(float(np.mean(x)), float(np.mean(y))) for x, y in logs if x and y]
        if len(means) >= MIN_PAIRS:
            found.append((metric, np.array(means)))
    return [_pair_difference(metric, means, len(found)) for metric, means in found]


def _pair_difference(metric: str, means: np.ndarray[tuple[int, int], np.dtype[np.float64]], tests: int) -> Difference:
    gaps, n = means[:, 1] - means[:, 0], len(means)
    half = student_half(gaps, 1 - 0.025 / tests)
    a, b = (math.exp(float(means[:, column].mean())) for column in (0, 1))
    return _difference(metric, a, b, float(gaps.mean()), half, (n, n))


def _welch(metric: str, x: Sequence[float], y: Sequence[float], tests: int) -> Difference:
    half = welch_half(x, y, 1 - 0.025 / tests)
    a, b = float(np.mean(x)), float(np.mean(y))
    return _difference(metric, math.exp(a), math.exp(b), b - a, half, (len(x), len(y)))


def _difference(metric: str, a: float, b: float, gap: float, half: float, n: tuple[int, int]) -> Difference:
    lo, hi = math.exp(gap - half), math.exp(gap + half)
    verdict: Verdict = verdict_of(lo, hi, OBJECTIVES.get(metric, "maximize"))
    return Difference(metric=metric, a=a, b=b, ratio=math.exp(gap), lo=lo, hi=hi, n=n, verdict=verdict)


def _logs(rows: Sequence[TrialRow], metric: str) -> list[float]:
    """Of a saturated server no latency: it says how long the test ran."""
    latency = metric.endswith("_ms")
    values = [getattr(row, metric) for row in rows if not (latency and row.saturated)]
    return [math.log(value) for value in values if value is not None and value > 0]


def _warnings(
    a: Sequence[TrialRow], b: Sequence[TrialRow], changed: Mapping[str, object], several: Sequence[str],
    shared: Sequence[str],
) -> list[str]:  # fmt: skip
    simulated = {row.simulated for row in (*a, *b)}
    checks = [
        (len(simulated) == 2, "one study is SIMULATED and the other measured: they say nothing of each other"),
        (simulated == {True}, "these numbers are SIMULATED: no server was measured"),
        (
            "measurement_version" in changed,
            f"the numbers are computed differently (measurement version, now {MEASUREMENT_VERSION})",
        ),
        ("workload_json" in changed, "the workloads differ: differences are theirs too"),
        ("gpu_name" in changed, "the GPUs differ: differences are theirs too"),
        (
            not several and len(shared) < MIN_PAIRS,
            f"no configuration was started {MIN_STARTS} times in both, and {len(shared)} were measured in both: "
            f"nothing can be told. Start the baseline {MIN_STARTS} times in each (`--repeats {MIN_STARTS}`)",
        ),
    ]
    return [text for applies, text in checks if applies]


def comparison_text(found: Comparison) -> str:
    """In plain lines."""
    lines = [f"{found.a} -> {found.b}" + (" - SIMULATED" if found.simulated else "")]
    lines += [f"  {name}: {one} -> {other}" for name, (one, other) in found.changed.items() if name != "workload_json"]
    for config in found.configurations:
        lines += ["", f"{config.name} {json.dumps(config.flags)}, start by start:"]
        lines += [_line(one) for one in config.differences]
    if found.paired:
        lines += ["", f"all {found.paired[0].n[0]} configurations that both measured, in pairs:"]
        lines += [_line(one) for one in found.paired]
    lines += [f"Warning: {text}." for text in found.warnings]
    verdict = "some metric is worse" if found.regressed else "no metric is worse beyond the noise"
    return "\n".join([*lines, "", verdict[:1].upper() + verdict[1:] + "."])


def _line(one: Difference) -> str:
    span = "" if one.lo is None or one.hi is None else f" ({one.lo - 1:+.1%} to {one.hi - 1:+.1%})"
    starts = f"{one.n[0]} and {one.n[1]}"
    return f"  {one.metric:<22} {one.a:10.4g} -> {one.b:10.4g}  {one.ratio - 1:+.1%}{span}  {one.verdict}, n = {starts}"
