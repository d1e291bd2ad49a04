"""What each flag does to the objective, over all that a study measured: main effects and the strongest interactions.

A linear model of the objective's logarithm with a term for each value of each parameter, shrunk a little (ridge) since
a search measures more near the best than elsewhere. An effect is a factor against the mean configuration, with the 95 %
interval of the residuals' Student's t. A parameter's share is that of the variance of the logarithms which its terms
explain, over what was measured (functional ANOVA of Hutter et al. 2014, for this model); an interaction's share is what
a term for each pair of values explains of the residuals.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from varcas.columns import Floats
from varcas.experiment import Experiment
from varcas.intervals import t_quantile
from varcas.records import TrialRow

RIDGE = 0.3
"""Measurements' worth of shrinking of each term."""
LEAST_ROWS = 4
LEAST_IN_CELL = 2
MAX_INTERACTIONS = 5


class ValueEffect(BaseModel):
    """What one value of a parameter does."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: str = Field(description="as JSON; `null`: the flag is left out")
    measurements: int
    ratio: float = Field(description="of the objective, to the mean configuration's")
    lo: float | None = Field(description="lower end of its 95 % interval")
    hi: float | None


class ParamEffect(BaseModel):
    """What a parameter does."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    param: str
    share: float = Field(description="of the variance of what was measured")
    values: list[ValueEffect]


class Interaction(BaseModel):
    """What two parameters do together beyond what each does alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    params: tuple[str, str]
    share: float = Field(description="of the variance of what was measured")


class Effects(BaseModel):
    """Of a study; `varcas results --effects --json` prints it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    study: str
    metric: str
    direction: str
    measurements: int
    simulated: bool
    params: list[ParamEffect] = Field(description="the largest share first")
    interactions: list[Interaction] = Field(description="the strongest ones")
    noise: float | None = Field(description="log-deviation that no main effect explains")


def effects(rows: Iterable[TrialRow], experiment: Experiment) -> Effects:
    """Of the configurations of the space that were measured and are to be believed."""
    objective = experiment.objectives[0]
    kept = [row for row in rows if _is_measured(row, objective.metric)]
    points = [json.loads(row.params_json) for row in kept]
    names = sorted({name for params in points for name in params})
    logs = np.array([math.log(getattr(row, objective.metric)) for row in kept])
    terms = [(name, value) for name in names for value in _values(points, name)]
    told = _fit(points, terms, logs) if len(kept) >= LEAST_ROWS else None
    return Effects(
        study=experiment.name,
        metric=objective.metric,
        direction=objective.direction,
        measurements=len(kept),
        simulated=any(row.simulated for row in kept),
        params=[] if told is None else told.params(names),
        interactions=[] if told is None else told.interactions(points, names),
        noise=None if told is None else told.noise,
    )


def _is_measured(row: TrialRow, metric: str) -> bool:
    value = getattr(row, metric)
    apart = row.purpose in ("confirm", "ablate", "load")
    return row.is_believed and not apart and bool(value) and row.params_json != "{}"


def _values(points: Sequence[dict[str, object]], name: str) -> list[str]:
    """Values of a parameter as JSON: numbers in their order."""
    found = {_text(params, name): params.get(name) for params in points}
    numeric = all(isinstance(value, int | float) for value in found.values())
    return sorted(found, key=(lambda text: float(text)) if numeric and not _has_bool(found.values()) else None)


def _has_bool(values: Iterable[object]) -> bool:
    return any(isinstance(value, bool) for value in values)


def _text(params: dict[str, object], name: str) -> str:
    return json.dumps(params.get(name), sort_keys=True)


class _Fit:
    """The linear model, fitted."""

    def __init__(self, design: Floats, terms: Sequence[tuple[str, str]], logs: Floats) -> None:
        self._design, self._terms = design, terms
        self._centred = logs - logs.mean()
        gram = design.T @ design + RIDGE * np.eye(len(terms))
        self._inverse: Floats = np.asarray(np.linalg.inv(gram), dtype=np.float64)
        self._weights: Floats = np.asarray(self._inverse @ design.T @ self._centred, dtype=np.float64)
        self._residuals: Floats = np.asarray(self._centred - design @ self._weights, dtype=np.float64)
        used = float(np.trace(design @ self._inverse @ design.T)) + 1
        self._freedom = len(logs) - used
        self.noise = math.sqrt(float(self._residuals @ self._residuals) / self._freedom) if self._freedom >= 1 else None
        self._variance = max(float(self._centred @ self._centred), 1e-12)

    def params(self, names: Sequence[str]) -> list[ParamEffect]:
        found = []
        for name in names:
            columns = [i for i, (owner, _) in enumerate(self._terms) if owner == name]
            if len(columns) > 1:
                part = self._design[:, columns] @ self._weights[columns]
                share = float(((part - part.mean()) ** 2).sum()) / self._variance
                shift = float(part.mean())
                found.append(ParamEffect(param=name, share=share, values=[self._value(i, shift) for i in columns]))
        return sorted(found, key=lambda effect: -effect.share)

    def _value(self, column: int, shift: float) -> ValueEffect:
        middle = float(self._weights[column]) - shift
        half = None
        if self.noise is not None:
            half = t_quantile(0.975, max(1.0, self._freedom)) * self.noise * math.sqrt(self._inverse[column, column])
        return ValueEffect(
            value=self._terms[column][1],
            measurements=int(self._design[:, column].sum()),
            ratio=math.exp(middle),
            lo=None if half is None else math.exp(middle - half),
            hi=None if half is None else math.exp(middle + half),
        )

    def interactions(self, points: Sequence[dict[str, object]], names: Sequence[str]) -> list[Interaction]:
        found = []
        for pair in itertools.combinations(names, 2):
            cells: dict[tuple[str, ...], list[float]] = defaultdict(list)
            for params, residual in zip(points, self._residuals, strict=True):
                cells[tuple(_text(params, name) for name in pair)].append(float(residual))
            means = [
                (len(cell), sum(cell) / (len(cell) + RIDGE)) for cell in cells.values() if len(cell) >= LEAST_IN_CELL
            ]
            share = sum(count * mean**2 for count, mean in means) / self._variance
            if share > 0:
                found.append(Interaction(params=pair, share=share))
        return sorted(found, key=lambda one: -one.share)[:MAX_INTERACTIONS]


def _fit(points: Sequence[dict[str, object]], terms: Sequence[tuple[str, str]], logs: Floats) -> _Fit:
    design = np.array([[float(_text(params, name) == value) for name, value in terms] for params in points])
    return _Fit(design, terms, logs)


def effects_text(found: Effects) -> str:
    """A table in plain lines."""
    head = f"{found.study}: what each flag does to {found.metric}, over {found.measurements} measurements"
    lines = [head + (" - SIMULATED" if found.simulated else "")]
    if not found.params:
        return f"{head}: too few to tell"
    for param in found.params:
        lines.append(f"{param.param}: {param.share:.0%} of the variance")
        for value in param.values:
            span = "" if value.lo is None or value.hi is None else f" (95 % {value.lo - 1:+.1%} to {value.hi - 1:+.1%})"
            lines.append(f"  {value.value:>12}  {value.ratio - 1:+.1%}{span}, {value.measurements} measured")
    lines += ["interactions:"] if found.interactions else []
    lines += [f"  {' and '.join(one.params)}: {one.share:.1%} of the variance" for one in found.interactions]
    return "\n".join(lines)
