"""The answer: which flags to deploy, how much better they are, how sure that is, and why the others lost or failed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.ablation import effects, minimal
from varcas.engine.failures import RETRIED
from varcas.experiment import Experiment, Objective
from varcas.intervals import t_quantile
from varcas.metrics import MIN_STARTS, Gain, compare
from varcas.pruner import OTHER_REASONS, refutations
from varcas.records import APART, LATENCY_METRICS, MAX_EXCESS, RATE_METRICS, TrialRow
from varcas.rules import speculation

SMALL_DRIFT = 0.05
"""Of the baseline, between search and confirmation: less is not worth a word."""
LARGE_RATIO = 2.0
"""From here on a gain is written as a ratio."""
Verdict = Literal["better", "inconclusive", "unconfirmed", "baseline_best", "no_baseline", "pareto", "no_answer"]


class Arm(BaseModel):
    """A configuration and what its confirmation starts measured, one value a start."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    config_hash: str
    flags: dict[str, JsonValue]
    command: str | None
    number: int = Field(description="of the search trial that proposed it")
    search_value: float | None = Field(
        description="the objective in the search: it chose the winner, so it flatters it"
    )
    values: list[float] = Field(description="the objective in each valid confirmation start")
    starts: int = Field(description="confirmation starts made")
    failed_starts: int = Field(description="of them, those that failed by the configuration's own fault")
    slo_met_starts: int | None = Field(description="of the valid ones, those that met the SLO; null without an SLO")
    saturated: bool | None = None


class GainOut(BaseModel):
    """The gain of the winner over the baseline from confirmation starts alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    direction: str
    ratio: float = Field(description="candidate / baseline")
    lo: float | None = Field(description="lower end of the 95 % interval of the ratio")
    hi: float | None = Field(description="upper end of it")
    baseline_mean: float
    candidate_mean: float
    reason: str | None = Field(description="why it is inconclusive")


class Limit(BaseModel):
    """One limit of the SLO, and what was measured of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    limit: float
    value: float | None = Field(description="null: over 100 times the limit, or it never came")
    met: bool


class Failure(BaseModel):
    """Why one configuration is not the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    number: int
    flags: dict[str, JsonValue] = Field(description="what it sets differently from the baseline")
    kind: str | None
    detail: str | None
    hint: str | None
    rule: str | None


class FlagOut(BaseModel):
    """What one flag of the winner brings, from starts without it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    flag: str
    value: JsonValue
    before: JsonValue = Field(description="the baseline's; null: left out")
    gain: float | None = Field(
        description="of the winner over the configuration without it; null: it does not run then"
    )
    lo: float | None = Field(description="lower end of the 95 % interval")
    hi: float | None
    starts: int
    kept: bool = Field(description="it brings something that can be measured, or is needed to run")


class Recommendation(BaseModel):
    """What a study leaves behind; `varcas recommend --json` prints it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    study: str
    verdict: Verdict
    headline: str
    model: str
    gpu: str | None
    engine_version: str | None
    simulated: bool
    objective: str
    slo: dict[str, float]
    limits: list[Limit] = Field(description="the SLO in the worst start of what is to be deployed, fresh ones if any")
    rate_rps: float | None = Field(description="requests per second asked for")
    delivered_rate_rps: float | None = Field(description="requests per second sent to what is to be deployed")
    deploy: dict[str, JsonValue] | None = Field(description="the flags to deploy; null when nothing can be")
    changes: dict[str, JsonValue] = Field(
        description="what these flags change against the baseline; null: flag left out"
    )
    command: str | None
    script: str | None = Field(description="path of the start script")
    baseline: Arm | None
    winner: Arm | None
    gain: GainOut | None
    ablation: list[FlagOut] = Field(
        default_factory=list, description="each flag of a confirmed winner put back alone; empty where none was"
    )
    dropped: list[str] = Field(
        default_factory=list,
        description="flags of the winner that bring nothing measurable and are not in `deploy`: it was started without",
    )
    front: list[Arm] = Field(default_factory=list, description="the Pareto front, when there are several objectives")
    counts: dict[str, int] = Field(description="trials by state, confirmation starts apart")
    failures: list[Failure]
    warnings: list[str]
    ended: str | None = Field(default=None, description="why the search ended")

    @property
    def has_answer(self) -> bool:
        """Some configuration runs and meets the SLO."""
        return self.verdict != "no_answer"


def value(row: TrialRow, objective: Objective) -> float | None:
    """The objective's column of a row."""
    found = getattr(row, objective.metric)
    return None if found is None else float(found)


def usable(row: TrialRow, objective: Objective | None = None) -> bool:
    """Measured, to be believed, within the SLO, and not ranked by what is not a figure of its own.

    That is the latency of a server that was overrun, and anything that hangs on a made-up acceptance of drafts.
    """
    believed = row.is_believed and row.slo_met is not False
    return believed and not overrun(row, objective) and not has_unreal_acceptance(row)


ACCEPTANCE_NOT_REAL = "acceptance_not_real"
"""Begins the warning of a row whose speed hangs on how many drafts were accepted, where that is not real text's."""


def unreal_acceptance(flags: Mapping[str, JsonValue], *, simulated: bool, acceptance: float) -> str | None:
    """Why the acceptance of drafts in a measurement is not real; None where it is, or nothing is drafted.

    Args:
        flags: of the configuration.
        simulated: no server was measured.
        acceptance: that a simulated one assumes.
    """
    told = speculation(flags)
    if not told:
        return None
    if simulated:
        why = f"assumed to be {acceptance:g} a token"
    elif told.get("rejection_sample_method") == "synthetic":
        why = "set by rejection_sample_method: synthetic"
    elif has_random_weights(flags):
        why = "of random weights (load_format: dummy)"
    else:
        return None
    return f"{ACCEPTANCE_NOT_REAL}: {why}; never recommended"


def has_unreal_acceptance(row: TrialRow) -> bool:
    """The row says so (`unreal_acceptance`)."""
    return any(text.startswith(ACCEPTANCE_NOT_REAL) for text in row.warnings)


def overrun(row: TrialRow, objective: Objective | None) -> bool:
    """The objective is a latency, and the server was overrun: it says how long the test ran."""
    return bool(row.saturated) and objective is not None and objective.metric in LATENCY_METRICS


def ranked(rows: Iterable[TrialRow], objective: Objective) -> list[TrialRow]:
    """Search and baseline rows that could be deployed, best first, one a configuration."""
    sign = -1 if objective.direction == "maximize" else 1
    good = [
        (sign * v, row.number, row)
        for row in rows
        if usable(row, objective) and (v := value(row, objective)) is not None
    ]
    best: dict[str, TrialRow] = {}
    for _, _, row in sorted(good, key=lambda entry: entry[:2]):
        if row.purpose not in APART:
            best.setdefault(row.config_hash, row)
    return list(best.values())


def pareto_front(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> list[TrialRow]:
    """Rows that no other beats in every objective."""
    signs = [1 if o.direction == "maximize" else -1 for o in objectives]

    def score(row: TrialRow) -> tuple[float, ...]:
        return tuple(s * (value(row, o) or 0.0) for s, o in zip(signs, objectives, strict=True))

    candidates = [row for row in ranked(rows, objectives[0]) if all(value(row, o) is not None for o in objectives)]
    scores = {row.trial_id: score(row) for row in candidates}

    def beaten(row: TrialRow) -> bool:
        mine = scores[row.trial_id]
        return any(all(a >= b for a, b in zip(s, mine, strict=True)) and s != mine for s in scores.values())

    return [row for row in candidates if not beaten(row)]


DASH_NOTE = "-: fewer than 10 observations lie beyond this percentile, or it falls among those that never came"
RANDOM_WEIGHTS = "load_format: dummy gives the model random weights: for tests only"


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows sorted out: who is the baseline, who the winner."""

    baseline: TrialRow | None
    winner: TrialRow | None
    front: list[TrialRow]


def confirm_failures(rows: Iterable[TrialRow]) -> set[str]:
    """Configurations that failed in a confirmation start by their own fault: not to be deployed."""
    return {
        row.config_hash
        for row in rows
        if row.purpose == "confirm" and row.arm == "candidate" and row.state == "failed"
        and row.failure_kind not in RETRIED
    }  # fmt: skip


def find(rows: Sequence[TrialRow], experiment: Experiment) -> Finding:
    """Picks the winner by the search's own rows; configurations that failed a confirmation start are out."""
    objectives, out = experiment.objectives, confirm_failures(rows)
    baseline = _baseline([row for row in rows if row.purpose == "baseline"])
    order = [row for row in ranked(rows, objectives[0]) if row.config_hash not in out]
    front = pareto_front([r for r in rows if r.config_hash not in out], objectives) if len(objectives) > 1 else []
    return Finding(baseline, order[0] if order else None, front)


def _baseline(rows: Sequence[TrialRow]) -> TrialRow | None:
    """The baseline's row: the first that measured something to be believed, else the last that was its own fault."""
    good = [row for row in rows if row.is_believed]
    own = [row for row in rows if row.state != "stopped" and row.failure_kind not in RETRIED]
    return good[0] if good else own[-1] if own else None


def recommend(
    rows: Sequence[TrialRow],
    experiment: Experiment,
    *,
    script: str | None = None,
    ended: str | None = None,
    ruled_out: str | None = None,
    rules_off: Sequence[str] = (),
) -> Recommendation:
    """Turns a study's rows into its answer. Pure: writes nothing.

    Args:
        rows: the study's.
        experiment: as it was run.
        script: path of the start script.
        ended: why the search ended.
        ruled_out: why nothing was started at all.
        rules_off: rules that are off for this study, with what proved them wrong; what rows say of it is not repeated.
    """
    finding = find(rows, experiment)
    objective = experiment.objectives[0]
    said = refutations(rows)
    unsaid = [text for text in rules_off if not any(warning.startswith(text) for warning in said)]
    baseline = _arm(finding.baseline, rows, "baseline", objective)
    winner = _arm(finding.winner, rows, "candidate", objective)
    gain = _gain(baseline, winner, objective)
    verdict = _verdict(finding, gain, winner, experiment)
    tested, least = _ablated(verdict, finding, rows, experiment)
    deployed = least or _deployed(verdict, finding)
    base_flags = finding.baseline.config_flags if finding.baseline else {**experiment.serve, **experiment.baseline}
    return Recommendation(
        study=experiment.name,
        verdict=verdict,
        headline=(ruled_out or "").rstrip(".") or _headline(verdict, gain, winner, experiment, rows),
        model=experiment.model,
        gpu=next((row.gpu_name for row in rows if row.gpu_name), None),
        engine_version=next((row.engine_version for row in rows if row.engine_version), None),
        simulated=any(row.simulated for row in rows),
        objective=objective.metric,
        slo=dict(experiment.slo),
        limits=_limits(deployed, rows, experiment.slo) if deployed else [],
        rate_rps=deployed.rate_rps if deployed else None,
        delivered_rate_rps=deployed.delivered_rate_rps if deployed else None,
        deploy=deployed.config_flags if deployed else None,
        changes=difference(base_flags, deployed.config_flags) if deployed else {},
        command=deployed.command if deployed else None,
        script=script,
        baseline=baseline,
        winner=winner,
        gain=gain,
        ablation=tested,
        dropped=_dropped(finding, least),
        front=[arm for row in finding.front if (arm := _arm(row, rows, "candidate", objective))],
        counts=dict(Counter(row.state for row in rows if row.purpose not in APART)),
        failures=_failures(rows, base_flags),
        warnings=[*unsaid, *said, *_warnings(rows, finding, gain, deployed, experiment)],
        ended=ended,
    )


def _ablated(
    verdict: Verdict, finding: Finding, rows: Sequence[TrialRow], experiment: Experiment
) -> tuple[list[FlagOut], TrialRow | None]:
    """What each flag of a confirmed winner brings, and a start of what is left of them where that replaces it."""
    winner, baseline = finding.winner, finding.baseline
    if verdict != "better" or winner is None or baseline is None:
        return [], None
    found = [
        FlagOut(**{name: getattr(effect, name) for name in FlagOut.model_fields})
        for effect in effects(rows, winner, baseline, experiment)
    ]
    return found, minimal(rows, winner, baseline, experiment)


def _dropped(finding: Finding, least: TrialRow | None) -> list[str]:
    if least is None or finding.winner is None:
        return []
    return list(difference(finding.winner.config_flags, least.config_flags))


def described(purpose: str, arm: str | None, params: Mapping[str, JsonValue], flags: Mapping[str, JsonValue]) -> str:
    """What a trial sets, in one line: the search's parameters, or every flag."""
    text = settings_text(params or flags, flags)
    role = f"{purpose} {arm}" if purpose in APART else purpose if purpose in ("baseline", "audit") else ""
    return ": ".join(part for part in (role, text) if part)


def settings_text(settings: Mapping[str, JsonValue], flags: Mapping[str, JsonValue]) -> str:
    """`max_num_seqs=16 dtype left out`: settings, of which `flags` holds those that are given to the server."""
    return " ".join(
        f"{name} left out" if value in (None, "none") and flags.get(name) is None else f"{name}={_short(value)}"
        for name, value in settings.items()
    )


def _short(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def limits_of(constraints: Mapping[str, float], slo: Mapping[str, float]) -> list[Limit]:
    """Each limit with its figure, from a row's constraints (value / limit - 1)."""
    return [
        Limit(
            metric=key,
            limit=limit,
            value=limit * (1 + constraints[key]) if constraints[key] < MAX_EXCESS else None,
            met=constraints[key] <= 0,
        )
        for key, limit in slo.items()
        if key in constraints
    ]


def limit_text(limit: Limit) -> str:
    """`ttft_p95_ms 257 of 500 ms: met`."""
    seen = "never came," if limit.value is None else f"{limit.value:.4g} of"
    return f"{limit.metric} {seen} {limit.limit:g} ms: {'met' if limit.met else 'missed'}"


def _limits(row: TrialRow, rows: Iterable[TrialRow], slo: Mapping[str, float]) -> list[Limit]:
    fresh = [
        other.constraints
        for other in rows
        if other.purpose == "confirm" and other.config_hash == row.config_hash
        and other.is_believed
    ]  # fmt: skip
    seen = fresh or [row.constraints]
    worst = {key: max(found[key] for found in seen if key in found) for key in slo if any(key in f for f in seen)}
    return limits_of(worst, slo)


def difference(base: dict[str, JsonValue], flags: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Flags that differ from `base`; None for one that is left out."""
    return {key: flags.get(key) for key in sorted({*base, *flags}) if base.get(key) != flags.get(key)}


def confirmations(rows: Iterable[TrialRow], arm: str, config_hash: str) -> list[TrialRow]:
    """Confirmation starts of one arm whose server was really started; lost workers and interrupts do not count."""
    return [
        row
        for row in rows
        if row.purpose == "confirm" and row.arm == arm and row.config_hash == config_hash
        and row.state in ("complete", "failed") and row.failure_kind not in RETRIED
    ]  # fmt: skip


def _arm(row: TrialRow | None, rows: Sequence[TrialRow], arm: str, objective: Objective) -> Arm | None:
    if row is None:
        return None
    starts = confirmations(rows, arm, row.config_hash)
    valid = [s for s in starts if s.is_believed and not overrun(s, objective)]
    good = [start for start in valid if value(start, objective) is not None]
    return Arm(
        config_hash=row.config_hash,
        flags=row.config_flags,
        command=row.command,
        number=row.number,
        search_value=value(row, objective),
        values=[v for s in good if (v := value(s, objective)) is not None],
        starts=len(starts),
        failed_starts=sum(start.state == "failed" for start in starts),
        slo_met_starts=sum(s.slo_met is True for s in good) if any(s.slo_met is not None for s in good) else None,
        saturated=row.saturated,
    )


def _gain(baseline: Arm | None, winner: Arm | None, objective: Objective) -> GainOut | None:
    if not (baseline and winner and baseline.values and winner.values) or baseline.config_hash == winner.config_hash:
        return None
    gain: Gain = compare(baseline.values, winner.values, direction=objective.direction)
    return GainOut(
        metric=objective.metric,
        direction=objective.direction,
        ratio=gain.ratio,
        lo=gain.lo,
        hi=gain.hi,
        baseline_mean=gain.baseline_mean,
        candidate_mean=gain.candidate_mean,
        reason=gain.reason if gain.verdict != "better" else None,
    )


def _verdict(finding: Finding, gain: GainOut | None, winner: Arm | None, experiment: Experiment) -> Verdict:
    if finding.winner is None or winner is None:
        return "no_answer"
    if finding.front:
        return "pareto"
    if finding.baseline is None or finding.baseline.state != "complete":
        return "no_baseline"
    if finding.winner.config_hash == finding.baseline.config_hash:
        return "baseline_best"
    if finding.baseline.slo_met is False and winner.slo_met_starts and winner.slo_met_starts == len(winner.values) >= 3:
        return "better"  # it meets an SLO that the baseline misses, in every fresh start
    if gain is None:
        return "unconfirmed"
    if _one_side(gain, better=False):
        return "baseline_best"
    missed = winner.slo_met_starts is not None and winner.slo_met_starts < len(winner.values)
    return "better" if _one_side(gain, better=True) and not missed and not winner.failed_starts else "inconclusive"


def _one_side(gain: GainOut, *, better: bool) -> bool:
    """The whole interval lies on the better (or the worse) side of 1."""
    if gain.lo is None or gain.hi is None:
        return False
    return gain.lo > 1 if better == (gain.direction == "maximize") else gain.hi < 1


def _deployed(verdict: Verdict, finding: Finding) -> TrialRow | None:
    """What to deploy: a winner that fresh starts do not confirm does not displace a baseline that works."""
    keeps_baseline = finding.baseline is not None and usable(finding.baseline)
    if verdict in ("inconclusive", "baseline_best") and keeps_baseline:
        return finding.baseline
    return finding.winner


def _headline(
    verdict: Verdict, gain: GainOut | None, winner: Arm | None, experiment: Experiment, rows: Sequence[TrialRow]
) -> str:
    metric = experiment.objectives[0].metric
    if verdict == "better" and gain and winner:
        what = f"the baseline's {metric}" if gain.ratio > LARGE_RATIO else f"{metric} over the baseline"
        return f"{percent(gain)} {what}, from {_starts(winner)} fresh starts an arm"
    if verdict == "better":
        return "meets the SLO, which the baseline does not, in every fresh start"
    if verdict == "inconclusive" and gain and winner:
        why = gain.reason or _why_unproven(winner)
        return f"inconclusive: {percent(gain)} {metric}, {why}; keep the baseline or give it more starts (--repeats)"
    worse = f": the search's winner made {percent(gain)} {metric} of it in fresh starts" if gain else ""
    words: dict[Verdict, str] = {
        "unconfirmed": "best in the search, not confirmed: its figure flatters it (run again with --repeats 3)",
        "baseline_best": f"the baseline was not beaten{worse}",
        "no_baseline": "the baseline does not run; this is the best configuration that does",
        "pareto": "several objectives: choose from the Pareto front",
        "no_answer": _no_answer(rows),
    }
    return words.get(verdict, "inconclusive: no confirmation start of both arms to compare")


def _why_unproven(winner: Arm) -> str:
    if winner.failed_starts:
        return f"but {winner.failed_starts} of {winner.starts} fresh starts failed"
    return f"but the SLO was met in {winner.slo_met_starts} of {len(winner.values)} fresh starts"


def _no_answer(rows: Sequence[TrialRow]) -> str:
    missed = [row for row in rows if _ran(row) and row.slo_met is False and row.constraints]
    if not missed:
        invalid = [row for row in rows if row.state == "complete" and row.valid is False]
        return "no measurement is to be believed" if invalid else "no configuration runs: see why below"
    nearest = min(missed, key=lambda row: max(row.constraints.values()))
    key, worst = max(nearest.constraints.items(), key=lambda item: item[1])
    least = "at least " if nearest.stopped_early else ""
    return f"no configuration meets the SLO: the nearest, trial {nearest.number}, misses {key} by {least}{worst:.0%}"


def _ran(row: TrialRow) -> bool:
    """It was measured, or as much of it as decided."""
    return row.state == "complete" or row.stopped_early is not None


def _starts(arm: Arm) -> int:
    return len(arm.values)


def percent(gain: GainOut) -> str:
    """`+22 % (95 % interval +19 to +25 %)`; above +100 % a ratio, `7.5x (95 % interval 6.3x to 9.0x)`."""
    large = gain.ratio > LARGE_RATIO

    def text(ratio: float) -> str:
        return f"{ratio:.1f}x" if large else f"{ratio - 1:+.1%}"

    if gain.lo is None or gain.hi is None:
        return text(gain.ratio)
    return f"{text(gain.ratio)} (95 % interval {text(gain.lo)} to {text(gain.hi)})"


def _failures(rows: Sequence[TrialRow], base: dict[str, JsonValue]) -> list[Failure]:
    """Why configurations are not the answer; what was lost and then measured is no failure of theirs."""
    measured = {row.config_hash for row in rows if row.state == "complete"}
    return [
        Failure(
            number=row.number,
            flags=difference(base, row.config_flags),
            kind=row.failure_kind,
            detail=row.failure_detail,
            hint=row.failure_hint,
            rule=row.reason_rule,
        )
        for row in rows
        if row.state in ("failed", "infeasible") and not (row.failure_kind in RETRIED and row.config_hash in measured)
    ]


def _warnings(
    rows: Sequence[TrialRow], finding: Finding, gain: GainOut | None, deployed: TrialRow | None, experiment: Experiment
) -> list[str]:
    not_believed = sum(row.valid is False and row.state != "stopped" for row in rows)
    objective = experiment.objectives[0]
    drift = _drift(rows, finding, objective)
    checks: list[tuple[bool, str]] = [
        (any(row.simulated for row in rows), "these numbers are SIMULATED: no server was measured"),
        (
            not_believed > 0,
            f"{not_believed} measurement(s) are not to be believed and were not ranked (`varcas results --invalid`)",
        ),
        (deployed is not None and has_random_weights(deployed.config_flags), RANDOM_WEIGHTS),
        (_kept_up(rows, finding, experiment), _kept_up_text(finding, gain)),
        (drift is not None, _drift_text(drift or 0.0, objective)),
        (
            _overrun(finding, experiment),
            "the load is beyond what the server can take: configurations are ranked by sustained throughput, "
            "and latency says only how long the test ran",
        ),
        (
            len({row.engine_version for row in rows if row.engine_version}) > 1,
            "rows come from several engine versions: compare with care",
        ),
    ]
    return [text for applies, text in checks if applies]


def _drift(rows: Sequence[TrialRow], finding: Finding, objective: Objective) -> float | None:
    """By how much the baseline measures otherwise in confirmation than it did at first; None where that is noise."""
    first = value(finding.baseline, objective) if finding.baseline is not None else None
    if finding.baseline is None or not first:
        return None
    arm = _arm(finding.baseline, rows, "baseline", objective)
    later = arm.values if arm is not None else []
    if len(later) < MIN_STARTS or min(*later, first) <= 0:
        return None
    logs = [math.log(one / first) for one in later]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((one - mean) ** 2 for one in logs) / (len(logs) - 1))
    noise = t_quantile(0.975, len(logs) - 1) * spread * math.sqrt(1 + 1 / len(logs))
    return math.expm1(mean) if abs(mean) > max(noise, SMALL_DRIFT) else None


def _drift_text(drift: float, objective: Objective) -> str:
    return (
        f"the machine has drifted: the baseline's {objective.metric} is {drift:+.1%} in confirmation of what it was at "
        "first; the gain compares interleaved starts and stands, the search's own figures are less comparable"
    )


def _overrun(finding: Finding, experiment: Experiment) -> bool:
    """The winner was saturated, and what ranks it is no goodput under an SLO that it met."""
    winner = finding.winner
    by_goodput = experiment.objectives[0].metric == "goodput_rps" and bool(experiment.slo)
    return winner is not None and bool(winner.saturated) and not (by_goodput and winner.slo_met)


def _kept_up(rows: Sequence[TrialRow], finding: Finding, experiment: Experiment) -> bool:
    """The winner served all that was asked of it, so that its rate is the load's and no limit of its own."""
    winner, baseline = finding.winner, finding.baseline
    if winner is None or finding.front or (baseline and baseline.config_hash == winner.config_hash):
        return False
    starts = [row for row in rows if row.config_hash == winner.config_hash and row.state == "complete"]
    return experiment.objectives[0].metric in RATE_METRICS and all(row.saturated is False for row in starts)


def _kept_up_text(finding: Finding, gain: GainOut | None) -> str:
    row = finding.winner
    if row is None or row.rate_rps is None:
        return ""
    sent = f" ({row.delivered_rate_rps:.4g} delivered)" if row.delivered_rate_rps is not None else ""
    least = "; the gain is at least this" if gain else ""
    return f"the winner kept up with all {row.rate_rps:g} requests/s{sent}: raise rate_rps to find its limit{least}"


def row_to_deploy(answer: Recommendation, rows: Iterable[TrialRow]) -> TrialRow | None:
    """The row of the flags to deploy, of the search rather than of a confirmation start; None when nothing can be."""
    if answer.deploy is None:
        return None
    wanted = json.dumps(answer.deploy, sort_keys=True)
    found = [row for row in rows if json.dumps(row.config_flags, sort_keys=True) == wanted and row.state == "complete"]
    return min(found, key=lambda row: (row.valid is False, row.purpose == "confirm", row.number), default=None)


def has_random_weights(flags: Mapping[str, JsonValue]) -> bool:
    """The model's weights are made up by vLLM."""
    return flags.get("load_format") == "dummy"


def as_text(answer: Recommendation, again: str | None = None) -> str:
    """The answer for a terminal, plain lines; Markdown reads the same.

    Args:
        answer: what `recommend` made of the rows.
        again: the command that confirms a winner that is unconfirmed.
    """
    lines = [
        f"# {answer.study}: {answer.verdict.replace('_', ' ')}" + (" (SIMULATED)" if answer.simulated else ""),
        "",
        answer.headline[:1].upper() + answer.headline[1:] + ".",
        "",
        f"{answer.model}, vLLM {answer.engine_version or '?'}, {answer.gpu or 'CPU'}"
        + (" - SIMULATED" if answer.simulated else ""),
    ]
    lines += _slo_lines(answer)
    for name, arm in (("baseline", answer.baseline), ("winner", answer.winner)):
        if arm and not (name == "winner" and answer.verdict == "baseline_best"):
            lines.append(_arm_line(name, arm, answer.objective))
    if answer.changes:
        lines += ["", "Change against the baseline:"]
        lines += [
            f"  {flag} left out" if v is None else f"  {flag} = {json.dumps(v)}" for flag, v in answer.changes.items()
        ]
    lines += _ablation_lines(answer)
    if answer.command:
        unsure = answer.verdict == "unconfirmed"
        marks = [*(["SIMULATED: never measured"] if answer.simulated else []), *(["unconfirmed"] if unsure else [])]
        head = f"Deploy ({', '.join(marks)}):" if marks else "Deploy:"
        lines += ["", head, f"  {answer.script or answer.command}"]
        lines += ["", "To confirm it:", f"  {again}"] if unsure and again else []
    if answer.front:
        lines += ["", "Pareto front:"]
        lines += [
            _arm_line(f"trial {arm.number} {json.dumps(arm.flags)}", arm, answer.objective) for arm in answer.front
        ]
    if answer.failures:
        lines += ["", "Failed or refused:"]
        lines += _failure_lines(answer.failures)
    lines += [f"Warning: {warning}." for warning in answer.warnings]
    total = ", ".join(f"{count} {state}" for state, count in sorted(answer.counts.items()))
    lines += ["", f"Trials: {total}" + (f"; search ended: {answer.ended}" if answer.ended else "") + "."]
    return "\n".join(lines)


def _slo_lines(answer: Recommendation) -> list[str]:
    if not answer.limits:
        return ["SLO: " + ", ".join(f"{key} <= {limit:g}" for key, limit in answer.slo.items())] if answer.slo else []
    rate = f" at {answer.rate_rps:g} requests/s" if answer.rate_rps is not None else ""
    sent = f" ({answer.delivered_rate_rps:.4g} delivered)" if answer.delivered_rate_rps is not None else ""
    return [f"SLO{rate}{sent}, in the worst start:", *(f"  {limit_text(limit)}" for limit in answer.limits)]


def _arm_line(name: str, arm: Arm, metric: str) -> str:
    if arm.values:
        seen = ", ".join(f"{v:.4g}" for v in arm.values)
        text = f"{name}: {metric} {seen} in {len(arm.values)} fresh start(s)"
    else:
        text = f"{name}: {metric} {arm.search_value:.4g} in the search" if arm.search_value else f"{name}: not measured"
    if arm.slo_met_starts is not None:
        text += f", SLO met in {arm.slo_met_starts} of {len(arm.values)}"
    return text + f" (trial {arm.number})"


def _ablation_lines(answer: Recommendation) -> list[str]:
    """What each flag brings, and what was dropped."""
    if not answer.ablation:
        return []
    lines = ["", "Each flag put back alone:", *(f"  {_flag_line(one)}" for one in answer.ablation)]
    if answer.dropped:
        lines.append(f"  dropped, and confirmed without: {', '.join(answer.dropped)}")
    return lines


def _flag_line(one: FlagOut) -> str:
    name = settings_text({one.flag: one.value}, {one.flag: one.value})
    if one.gain is None:
        return f"{name}: without it, it does not run or misses the SLO"
    span = "" if one.lo is None or one.hi is None else f" (95 % {one.lo:+.1%} to {one.hi:+.1%})"
    return f"{name}: brings {one.gain:+.1%}{span}" + ("" if one.kept else ": nothing measurable")


def _last_line(detail: str | None) -> str:
    """The end of a traceback is what it says."""
    lines = [line.strip() for line in (detail or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _failure_lines(failures: Iterable[Failure]) -> list[str]:
    """One each; what a rule of the roofline ruled out once a rule, with its first configuration."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        same = failure.rule if failure.rule and failure.rule not in OTHER_REASONS else str(failure.number)
        groups.setdefault(same, []).append(failure)
    return [_failure_line(group[0], len(group) - 1) for group in groups.values()]


def _failure_line(failure: Failure, others: int) -> str:
    what = settings_text(failure.flags, failure.flags) or "the baseline"
    more = f" (and {others} more by this rule)" if others else ""
    text = f"  trial {failure.number}, {what}{more}: {failure.rule or failure.kind}: {_last_line(failure.detail)}"
    return text + (f"\n    {failure.hint}" if failure.hint else "")
