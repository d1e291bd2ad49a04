"""The `gp` and `auto` samplers: a study's rows as a surrogate sees them, and what it says of what is left."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from varcas.costs import StartCosts
from varcas.experiment import Experiment
from varcas.records import LATENCY_METRICS, MAX_EXCESS, TrialRow
from varcas.space import Params, ServingConfig, Space
from varcas.surrogate import Advice, Observed, Suspects, advise

LARGEST_MISS = 500.0
"""Cap on a measured constraint."""
UNMEASURED = 1.0
"""Constraint value of an SLO key that a run could not measure: as if twice its limit."""
FLOOR = 0.02
"""A figure below this share of the best counts as this share: logarithms have no zero."""
LEAST_EXCESS = 0.02
"""A limit that is met fifty times over is as good as met: of value / limit."""
NUM_LEARNT = 60
"""Measured configurations that the surrogate sees: the latest half, and the best of the others."""
SMALL = 0.5
"""Share of the noise between starts below which an expected improvement is small."""
SMALL_IN_A_ROW = 2
MIN_LEARNT = 2
"""Measured configurations of the space before the surrogate says anything."""
LEAST_STARTS = 6
"""Starts before a search may end by itself."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A configuration of the space, and the row that answers it.

    Attributes:
        params: what was proposed.
        row: of it.
        ran: it was measured, in full or as much as decided.
    """

    params: Params
    row: TrialRow
    ran: bool


class Advisor:
    """Proposes among candidates; remembers whether they still promise anything.

    Args:
        experiment: its objectives, limits and seed.
        space: of the proposals.
        expected: logarithm of the first objective's estimate, by content hash (`order.Order.expected`).
    """

    def __init__(self, experiment: Experiment, space: Space, expected: Mapping[str, float] | None = None) -> None:
        self._experiment, self._space = experiment, space
        self._expected = expected or {}
        self._configs: dict[str, ServingConfig] = {}
        self._small = self._asked = 0
        self._last: Advice | None = None

    def next(
        self,
        tried: Sequence[Tried],
        candidates: Sequence[Params],
        running: Sequence[Params],
        costs: StartCosts | None = None,
    ) -> Params | None:
        """One of the candidates: the first of those least suspected of failing, until `MIN_LEARNT` were measured.

        Args:
            tried: what this study knows of its space.
            candidates: what may be proposed, in random order.
            running: what is being measured.
            costs: of a start; None: all cost the same.
        """
        self._asked += 1
        if sum(one.ran for one in tried) < MIN_LEARNT:
            suspects = Suspects([(one.params, one.ran) for one in tried])
            return max(candidates, key=lambda params: suspects.chance(params), default=None)
        learnt = observed(_those_that_matter(tried, self._experiment), self._experiment)
        cost_s = None if costs is None else [costs.fresh_s(self._config(params).flags) for params in candidates]
        seed = (self._experiment.study.seed * 1_000_003 + len(tried) * 101 + self._asked) % 2**32
        advice = advise(learnt, candidates, running=running, cost_s=cost_s, estimate=self._estimate, seed=seed)
        if advice is None:
            return None
        self._note(advice, len(tried))
        return candidates[advice.place]

    def ended(self) -> str | None:
        """Why more starts would not pay; None while they may.

        The rule: at least `LEAST_STARTS` configurations were tried, and for `SMALL_IN_A_ROW` proposals in a row the
        best candidate's expected improvement was below `SMALL` of the noise between starts, which no confirmation of a
        few starts could tell from nothing.
        """
        if self._small < SMALL_IN_A_ROW or self._last is None:
            return None
        gain, noise = math.expm1(self._last.improvement), self._last.noise
        return f"the expected improvement ({gain:.1%}) is below {SMALL:g} of the noise between starts ({noise:.1%})"

    def _note(self, advice: Advice, num_tried: int) -> None:
        small = num_tried >= LEAST_STARTS and advice.improvement < SMALL * advice.noise
        self._small = self._small + 1 if small else 0
        self._last = advice

    def _estimate(self, params: Params | Mapping[str, JsonValue]) -> float | None:
        """Larger is better."""
        told = self._expected.get(self._config(params).hash) if self._expected else None
        up = self._experiment.objectives[0].direction == "maximize"
        return None if told is None else told if up else -told

    def _config(self, params: Params | Mapping[str, JsonValue]) -> ServingConfig:
        key = json.dumps(params, sort_keys=True)
        if key not in self._configs:
            self._configs[key] = self._space.config(self._space.flags_of(dict(params)))
        return self._configs[key]


def objectives_of(row: TrialRow, experiment: Experiment) -> list[float] | None:
    """The objectives' columns of a row; None when one of them was not measured."""
    values = [getattr(row, objective.metric) for objective in experiment.objectives]
    return None if any(v is None or not math.isfinite(v) for v in values) else [float(v) for v in values]


def constraints_of(row: TrialRow, experiment: Experiment) -> dict[str, float]:
    """Constraints of a measured row, feasible when all are at most 0.

    `holds_rate` stands beside them where a latency is the objective: a saturated server's latency says how long the
    test ran, so such rows are infeasible and ranked by how far their throughput falls short of the rate asked for.
    """
    constraints = {key: min(row.constraints.get(key, UNMEASURED), LARGEST_MISS) for key in sorted(experiment.slo)}
    if any(objective.metric in LATENCY_METRICS for objective in experiment.objectives):
        constraints["holds_rate"] = _shortfall(row) if row.saturated else -1.0
    return {**constraints, "runs": -1.0}


def _shortfall(row: TrialRow) -> float:
    """Rate asked for over rate served, minus 1."""
    if not row.rate_rps or not row.request_rate_rps:
        return LARGEST_MISS
    return min(max(row.rate_rps / row.request_rate_rps - 1, 0.01), LARGEST_MISS)


def observed(tried: Sequence[Tried], experiment: Experiment) -> list[Observed]:
    """Rows as logarithms: objectives, larger is better, and how far each limit is exceeded."""
    found = [objectives_of(one.row, experiment) if one.ran else None for one in tried]
    columns = zip(*(values for values in found if values is not None), strict=True)
    directions = [objective.direction for objective in experiment.objectives]
    best = [_best(column, way) for column, way in zip(columns, directions, strict=False)]  # none while nothing ran
    return [
        Observed(one.params, None if values is None else _logs(values, best, experiment), _excess(one.row, experiment))
        for one, values in zip(tried, found, strict=True)
    ]


def _best(column: Sequence[float], direction: str) -> float:
    positive = [value for value in column if value > 0] or [1.0]
    return max(positive) if direction == "maximize" else min(positive)


def _logs(values: Sequence[float], best: Sequence[float], experiment: Experiment) -> tuple[float, ...]:
    shares = [
        value / top if objective.direction == "maximize" else top / max(value, 1e-12)
        for value, top, objective in zip(values, best, experiment.objectives, strict=True)
    ]
    return tuple(math.log(min(max(share, FLOOR), 1 / FLOOR)) for share in shares)


def _excess(row: TrialRow, experiment: Experiment) -> tuple[float, ...]:
    limits = {name: value for name, value in constraints_of(row, experiment).items() if name != "runs"}
    return tuple(math.log(min(max(1 + value, LEAST_EXCESS), 1 + MAX_EXCESS)) for value in limits.values())


def _those_that_matter(tried: Sequence[Tried], experiment: Experiment) -> list[Tried]:
    """All that failed, and of what ran the latest half of `NUM_LEARNT` and the best of the others."""
    failed, ran = [one for one in tried if not one.ran], [one for one in tried if one.ran]
    if len(ran) <= NUM_LEARNT:
        return [*failed, *ran]
    older, latest = ran[: -NUM_LEARNT // 2], ran[-NUM_LEARNT // 2 :]
    seen = zip(observed(older, experiment), range(len(older)), strict=True)
    ranked = sorted(seen, key=lambda pair: _rank(pair[0]))
    return [*failed, *(older[place] for _, place in ranked[: NUM_LEARNT // 2]), *latest]


def _rank(one: Observed) -> tuple[float, float]:
    return sum(max(value, 0.0) for value in one.excess), -sum(one.values or (-math.inf,))
