"""Which flags matter: how much of the spread between measured configurations each explains alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from varcas.experiment import Objective
from varcas.records import TrialRow
from varcas.report import overrun, value

LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class Level:
    """One value of a flag, over the configurations that have it.

    Attributes:
        label: the value, as JSON; `left out` where the flag is not given.
        num: configurations.
        mean: geometric mean of the objective.
        best: of them.
    """

    label: str
    num: int
    mean: float
    best: float


@dataclass(frozen=True, slots=True)
class Effect:
    """A flag's main effect.

    Attributes:
        flag: its name.
        share: of the variance of the objective's logarithm that the flag alone explains, corrected for the number of
            its values (epsilon squared, Kelley 1935); None where every configuration has a value of its own.
        levels: in order of the values.
    """

    flag: str
    share: float | None
    levels: tuple[Level, ...]


def label_of(value: JsonValue) -> str:
    """A flag's value in a word."""
    if value is None:
        return LEFT_OUT
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))


def level_order(value: JsonValue) -> tuple[int, float, str]:
    """Sorts numbers by size, before texts; a flag that is left out comes first."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 1, float(value), ""
    return 2, 0.0, label_of(value)


def measured(rows: Sequence[TrialRow], objective: Objective) -> list[TrialRow]:
    """Rows of the search whose objective is to be believed, the last of each configuration."""
    kept: dict[str, TrialRow] = {}
    for row in rows:
        found = value(row, objective)
        good = row.state == "complete" and row.valid is not False and not overrun(row, objective)
        if good and found is not None and found > 0 and row.purpose != "confirm":
            kept[row.config_hash] = row
    return list(kept.values())


def varied_flags(rows: Sequence[TrialRow]) -> dict[str, list[JsonValue]]:
    """Flags that differ between rows, each with its value in every row; None where it is left out."""
    configs: list[dict[str, JsonValue]] = [json.loads(row.config_json) for row in rows]
    names = sorted({name for config in configs for name in config})
    columns = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in columns.items() if len({label_of(v) for v in values}) > 1}


def main_effects(rows: Sequence[TrialRow], objective: Objective) -> list[Effect]:
    """Flags by the share of the spread that each explains alone, the largest first."""
    seen = measured(rows, objective)
    logs = np.array([math.log(value(row, objective) or 1.0) for row in seen])
    found = [_effect(flag, values, logs, objective) for flag, values in varied_flags(seen).items()]
    return sorted(found, key=lambda effect: (-(effect.share or 0.0), effect.flag))


def _effect(flag: str, values: list[JsonValue], logs: np.ndarray, objective: Objective) -> Effect:
    labels = np.array([label_of(value) for value in values])
    order = {label_of(value): level_order(value) for value in values}
    groups = {label: logs[labels == label] for label in sorted(order, key=order.__getitem__)}
    best = np.max if objective.direction == "maximize" else np.min
    levels = tuple(
        Level(label, len(group), math.exp(float(group.mean())), math.exp(float(best(group))))
        for label, group in groups.items()
    )
    return Effect(flag, _share(list(groups.values()), logs), levels)


def _share(groups: list[np.ndarray], logs: np.ndarray) -> float | None:
    total = float(((logs - logs.mean()) ** 2).sum())
    freedom = len(logs) - len(groups)
    if freedom < 1 or total == 0:
        return None
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return max(0.0, 1 - (within / freedom) / (total / (len(logs) - 1)))
