"""The smallest answer: each flag of a confirmed winner is put back alone, and what brings nothing is dropped.

Pure: says what is still to be started, and what the starts mean. The winner's and the ablated configurations' starts
are all fresh ones; their spread is pooled over all of them, since two starts alone tell no spread.

A flag is dropped when the interval of what is lost without it holds zero *and* the loss itself is at most `SMALL_LOSS`:
the first alone would drop whatever a single start cannot tell from noise. What is left when all of these are dropped
together is the minimal configuration. It is started `study.repeats` times, and replaces the winner only when it beats
the baseline by itself and is at most `SMALL_LOSS` behind the winner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from varcas.engine.failures import RETRIED
from varcas.experiment import Experiment
from varcas.intervals import pooled_deviation, t_quantile
from varcas.metrics import compare
from varcas.records import TrialRow
from varcas.space import ServingConfig

SMALL_LOSS = 0.02
MINIMAL = "minimal"
"""`arm` of the starts of what is left; of the others it is the flag that was put back."""


@dataclass(frozen=True, slots=True)
class FlagEffect:
    """What one flag of the winner brings.

    Attributes:
        flag: that was put back to the baseline's.
        value: the winner's; None: left out.
        before: the baseline's; None: left out.
        gain: what the winner has over the configuration without it, as a share; None while it was not measured.
        lo: lower end of its 95 % interval; None where the starts give none.
        hi: upper end.
        starts: of the configuration without it.
        failed: of them, those that failed: it is needed to run.
        kept: it stays in the answer.
    """

    flag: str
    value: JsonValue
    before: JsonValue
    gain: float | None
    lo: float | None
    hi: float | None
    starts: int
    failed: int
    kept: bool


def without(winner: TrialRow, baseline: TrialRow) -> dict[str, ServingConfig]:
    """For each flag that the winner has otherwise than the baseline: the winner with the baseline's."""
    won, before = winner.config_flags, baseline.config_flags
    changed = [flag for flag in sorted({*won, *before}) if won.get(flag) != before.get(flag)]
    if len(changed) < 2:  # one flag: its confirmation was the ablation
        return {}
    return {flag: _config(winner, {**won, flag: before.get(flag)}) for flag in changed}


def missing(
    rows: Sequence[TrialRow], winner: TrialRow, baseline: TrialRow, experiment: Experiment
) -> list[tuple[str, ServingConfig]]:
    """Starts still to make, each an arm and its configuration; flags in turn, so that drift hits all alike."""
    wanted = without(winner, baseline)
    counts = {flag: len(_starts(rows, flag, config)) for flag, config in wanted.items()}
    todo = [(flag, wanted[flag]) for turn in range(experiment.study.ablate) for flag in wanted if counts[flag] <= turn]
    if todo or not experiment.study.ablate:
        return todo
    least = _minimal_config(rows, winner, baseline, experiment)
    if least is None:
        return []
    return [(MINIMAL, least)] * max(0, experiment.study.repeats - len(_starts(rows, MINIMAL, least)))


def effects(rows: Sequence[TrialRow], winner: TrialRow, baseline: TrialRow, experiment: Experiment) -> list[FlagEffect]:
    """What each flag brings, as far as it was put back."""
    won, before = winner.config_flags, baseline.config_flags
    wanted = without(winner, baseline)
    found = {flag: _starts(rows, flag, config) for flag, config in wanted.items()}
    whole = _logs(_confirmed(rows, winner), experiment)
    arms = [whole, _logs(_confirmed(rows, baseline), experiment)]
    arms += [_logs(starts, experiment) for starts in found.values()]
    spread, freedom = pooled_deviation(arms)
    return [
        _effect(flag, won.get(flag), before.get(flag), starts, whole, spread, freedom, experiment)
        for flag, starts in found.items()
        if starts
    ]


def minimal(rows: Sequence[TrialRow], winner: TrialRow, baseline: TrialRow, experiment: Experiment) -> TrialRow | None:
    """A start of the minimal configuration, where that replaces the winner; None where the winner stands."""
    least = _minimal_config(rows, winner, baseline, experiment)
    starts = [] if least is None else _starts(rows, MINIMAL, least)
    if len(starts) < max(1, experiment.study.repeats) or any(row.state == "failed" for row in starts):
        return None
    if any(row.slo_met is False for row in starts):
        return None
    objective = experiment.objectives[0]
    mine, whole = _values(starts, experiment), _values(_confirmed(rows, winner), experiment)
    base = _values(_confirmed(rows, baseline), experiment)
    if not mine or not whole or not base:
        return None
    against = compare(base, mine, direction=objective.direction)
    loss = _signed(np.log(whole).mean() - np.log(mine).mean(), experiment)
    good = against.verdict == "better" or (baseline.slo_met is False and all(row.slo_met for row in starts))
    return starts[-1] if good and math.expm1(loss) <= SMALL_LOSS else None


def _minimal_config(
    rows: Sequence[TrialRow], winner: TrialRow, baseline: TrialRow, experiment: Experiment
) -> ServingConfig | None:
    """The winner without all that brings nothing; None where all is kept, or nothing would be left."""
    found = effects(rows, winner, baseline, experiment)
    dropped = [effect for effect in found if not effect.kept]
    if not dropped or len(dropped) == len(found) or len(found) < len(without(winner, baseline)):
        return None
    return _config(winner, {**winner.config_flags, **{effect.flag: effect.before for effect in dropped}})


def _effect(
    flag: str, value: JsonValue, before: JsonValue, starts: Sequence[TrialRow], whole: Sequence[float],
    spread: float | None, freedom: int, experiment: Experiment,
) -> FlagEffect:  # fmt: skip
    logs = _logs(starts, experiment)
    failed = sum(row.state == "failed" or row.slo_met is False for row in starts)
    if failed or not logs or not whole:
        return FlagEffect(flag, value, before, None, None, None, len(starts), failed, kept=True)
    gain = _signed(float(np.mean(whole) - np.mean(logs)), experiment)
    if spread is None:
        return FlagEffect(flag, value, before, math.expm1(gain), None, None, len(starts), 0, kept=True)
    half = t_quantile(0.975, freedom) * spread * math.sqrt(1 / len(whole) + 1 / len(logs))
    kept = gain - half > 0 or math.expm1(gain) > SMALL_LOSS
    lo, hi = math.expm1(gain - half), math.expm1(gain + half)
    return FlagEffect(flag, value, before, math.expm1(gain), lo, hi, len(starts), 0, kept)


def _signed(log_ratio: float, experiment: Experiment) -> float:
    """Larger is better, whatever the objective's direction."""
    return log_ratio if experiment.objectives[0].direction == "maximize" else -log_ratio


def _starts(rows: Sequence[TrialRow], arm: str, config: ServingConfig) -> list[TrialRow]:
    """Starts of one arm that came to something."""
    return [
        row
        for row in rows
        if row.purpose == "ablate" and row.arm == arm and row.config_hash == config.hash
        and row.state in ("complete", "failed") and row.failure_kind not in RETRIED and row.valid is not False
    ]  # fmt: skip


def _confirmed(rows: Sequence[TrialRow], of: TrialRow) -> list[TrialRow]:
    return [
        row
        for row in rows
        if row.purpose == "confirm" and row.config_hash == of.config_hash
        and row.is_believed
    ]  # fmt: skip


def _values(rows: Sequence[TrialRow], experiment: Experiment) -> list[float]:
    found = [getattr(row, experiment.objectives[0].metric) for row in rows if row.state == "complete"]
    return [value for value in found if value is not None and value > 0]


def _logs(rows: Sequence[TrialRow], experiment: Experiment) -> list[float]:
    return [math.log(value) for value in _values(rows, experiment)]


def _config(row: TrialRow, flags: Mapping[str, JsonValue]) -> ServingConfig:
    return ServingConfig(row.model, None, flags)
