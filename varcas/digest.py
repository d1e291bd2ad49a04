"""What a study has to tell, as sections of words, tables and figures, in the order in which people need them.

Pure: rows, requests, samples and a roofline in, data out. `page.py` writes it as HTML and Markdown, `plots.py` draws
its figures. Each figure comes with its numbers as a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import JsonValue

from varcas.columns import Measured, Requests, token_events
from varcas.effects import effects
from varcas.engine.failures import RETRIED
from varcas.experiment import OBJECTIVES, Experiment, Objective
from varcas.limits_answer import GpuRoofline, Roofline
from varcas.metrics import MIN_STARTS, latencies, percentile
from varcas.records import LATENCY_METRICS, RequestRecord, Sample, TrialRow
from varcas.report import (
    Recommendation,
    confirmations,
    difference,
    find,
    limit_text,
    overrun,
    percent,
    row_to_deploy,
    settings_text,
    usable,
    value,
)

Cell = str | int | float | bool | None
Row = dict[str, Any]

SEARCHED = ("baseline", "search", "audit")
"""Purposes of rows that the search made; others were chosen by what those had shown."""
MOST_AXES = 8
"""Flags on the parallel coordinates: those that matter most."""
MOST_POINTS = 240
"""Of one line in a figure."""
TABLE_POINTS = 40
LEAST_BATCHES = 3
MOSTLY = 0.8
"""A latency that so much of the rows have stands against the objective rather than one that all have."""
CDF_PERMILLE = (10, 50, 100, 250, 500, 750, 900, 950, 990, 1000)
SHOWN_LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end to end"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of numbers and words.

    Attributes:
        title: what it holds.
        columns: their names, with units.
        rows: a cell a column.
        note: what must be said of it.
        trial_column: index of the column that holds a trial's number, for links; None without one.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    trial_column: int | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture and its numbers.

    Attributes:
        kind: which chart of `plots.CHARTS`.
        title: of it.
        alt: what it shows, for those who do not see it.
        data: for the chart.
        table: the same numbers.
    """

    kind: str
    title: str
    alt: str
    data: Any
    table: Table


@dataclass(frozen=True, slots=True)
class Code:
    """Text to copy: a command, a script, a file."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page; what is empty is not shown."""

    key: str
    title: str
    words: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    codes: tuple[Code, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One phase of an experiment that has some.

    Attributes:
        name: of the phase.
        answer: its study's own.
        row: of what its answer deploys, as the search saw it; None when nothing can be.
    """

    name: str
    answer: Recommendation
    row: TrialRow | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a report is made of.

    Attributes:
        experiment: as it was run.
        rows: of the study.
        answer: what `recommend` made of them.
        requests: of the trials that `wanted` names, by `trial_id`.
        samples: of the same.
        roofline: None where there is none.
        no_roofline: why not.
        codes: commands and files that reproduce it.
        steps: the phases, where the study is one of several.
    """

    experiment: Experiment
    rows: Sequence[TrialRow]
    answer: Recommendation
    requests: Mapping[str, Sequence[RequestRecord]] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    roofline: Roofline | None = None
    no_roofline: str = ""
    codes: tuple[Code, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def objective(self) -> Objective:
        """The first one."""
        return self.experiment.objectives[0]

    @property
    def baseline(self) -> TrialRow | None:
        """The baseline's row."""
        return find(self.rows, self.experiment).baseline

    @property
    def deployed(self) -> TrialRow | None:
        """The row whose flags are to be deployed."""
        return row_to_deploy(self.answer, self.rows)

    @property
    def arms(self) -> dict[str, TrialRow]:
        """The configurations that a reader compares, by name, as far as they were measured."""
        named = {"baseline": self.baseline, "recommended": self.deployed, "winner": self.winner}
        seen: dict[str, TrialRow] = {}
        for name, row in named.items():
            if (
                row is not None
                and row.state == "complete"
                and row.config_hash not in {r.config_hash for r in seen.values()}
            ):
                seen[name] = row
        return seen

    @property
    def winner(self) -> TrialRow | None:
        """The best of the search."""
        return find(self.rows, self.experiment).winner


def wanted(rows: Sequence[TrialRow], experiment: Experiment, answer: Recommendation) -> list[TrialRow]:
    """Rows whose requests and samples a report shows: each arm's fresh starts, else its search row."""
    evidence = Evidence(experiment, rows, answer)
    return [start for row in evidence.arms.values() for start in starts_of(row, rows)]


def starts_of(row: TrialRow, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """A configuration's measured confirmation starts, or the row itself where there are none."""
    both = [start for arm in ("baseline", "candidate") for start in confirmations(rows, arm, row.config_hash)]
    return [start for start in both if start.is_believed] or [row]


def digest(evidence: Evidence) -> list[Section]:
    """Every section that has something to say, in order."""
    sections = [section for make in SECTIONS if (section := make(evidence)) is not None]
    return [s for s in sections if s.words or s.figures or s.tables or s.folded or s.codes]


# ---- what to do


def confidence(answer: Recommendation) -> str:
    """How sure the answer is, in one sentence."""
    gain = answer.gain
    if answer.verdict == "better" and gain is not None and gain.lo is not None:
        starts = f"{len(answer.baseline.values) if answer.baseline else 0} and {_num_values(answer)} fresh starts"
        return f"Confirmed: the 95 % interval of the ratio, from {starts}, interleaved, excludes no change."
    words = {
        "better": "Confirmed: every fresh start met the SLO, which the baseline misses.",
        "inconclusive": "Not established: the fresh starts do not tell the two apart.",
        "unconfirmed": "Not confirmed: one measurement in the search chose it, so its figure flatters it.",
        "baseline_best": "No configuration that was tried is better than the baseline.",
        "no_baseline": "No comparison: the baseline does not run.",
        "pareto": "One measurement each: a front of several objectives is not confirmed by fresh starts.",
        "no_answer": "Nothing can be deployed from what was measured.",
    }
    return words[answer.verdict]


def _num_values(answer: Recommendation) -> int:
    return len(answer.winner.values) if answer.winner else 0


def advice(answer: Recommendation) -> str:
    """What to do now."""
    words = {
        "better": "Deploy these flags.",
        "inconclusive": "Keep the baseline, or give both more fresh starts (--repeats).",
        "unconfirmed": f"Confirm it with fresh starts (--repeats {MIN_STARTS}) before you deploy it.",
        "baseline_best": "Keep the baseline's flags; search other flags, or another rate, for more.",
        "no_baseline": "Deploy these flags; mend the baseline if you need a comparison.",
        "pareto": "Choose the point of the front that suits you, then deploy that trial's flags.",
        "no_answer": "See below why configurations failed; loosen the SLO, lower the rate, or widen the space.",
    }
    return words[answer.verdict]


def facts(answer: Recommendation) -> Table:
    """What is recommended, in a table of few rows."""
    rows: list[tuple[Cell, ...]] = [("objective", answer.objective)]
    if answer.gain:
        rows += [("baseline, mean of fresh starts", answer.gain.baseline_mean)]
        rows += [("winner, mean of fresh starts", answer.gain.candidate_mean)]
        rows += [("ratio", percent(answer.gain))]
    rows += [("SLO in the worst start", limit_text(limit)) for limit in answer.limits]
    rows += [("requests/s asked for", answer.rate_rps)] if answer.rate_rps is not None else []
    rows += [("requests/s delivered", answer.delivered_rate_rps)] if answer.delivered_rate_rps is not None else []
    rows += [(f"trials: {state}", count) for state, count in sorted(answer.counts.items())]
    return Table("In numbers", ("what", "value"), tuple(rows))


def changes(answer: Recommendation) -> list[str]:
    """What to set differently from the baseline, a line a flag."""
    return [_change(flag, new) for flag, new in answer.changes.items()]


def _change(name: str, new: JsonValue) -> str:
    return f"{name} left out" if new is None else f"{name} = {label_of(new)}"


# ---- confirmation


def _confirmation(e: Evidence) -> Section | None:
    metric, answer = e.objective.metric, e.answer
    data: list[Row] = []
    for name, arm in (("baseline", answer.baseline), ("winner", answer.winner)):
        data += (
            [{"arm": name, "value": v, "start": i + 1, "trial": arm.number} for i, v in enumerate(arm.values)]
            if arm
            else []
        )
    if not data:
        return None
    table = Table(
        "Fresh starts", ("arm", "start", metric), tuple((row["arm"], row["start"], row["value"]) for row in data)
    )
    figure = Figure("starts", f"{metric} in each fresh start", _starts_alt(answer, metric), (data, metric), table)
    words = (
        "Servers were started anew for this comparison, baseline and winner in turn, so that drift meets both alike. "
        "The gain comes from these starts alone, never from the measurements that chose the winner.",
    )
    return Section("confirmation", "Was it luck?", words, (figure,))


def _starts_alt(answer: Recommendation, metric: str) -> str:
    parts = [
        f"{name} {min(arm.values):.4g} to {max(arm.values):.4g} in {len(arm.values)} starts"
        for name, arm in (("baseline", answer.baseline), ("winner", answer.winner))
        if arm and arm.values
    ]
    return f"{metric} in fresh starts: {'; '.join(parts)}."


# ---- phases


def _phases(e: Evidence) -> Section | None:
    if len(e.steps) < 2:
        return None
    named = list(
        dict.fromkeys((e.objective.metric, "output_tokens_per_s", "ttft_p50_ms", "tpot_mean_ms", "e2e_mean_ms"))
    )
    rows = tuple(
        (
            step.name,
            step.answer.gpu or "CPU",
            ", ".join(changes(step.answer)) or "nothing",
            *(None if step.row is None else getattr(step.row, name) for name in named),
            percent(step.answer.gain) if step.answer.gain else None,
            step.answer.verdict.replace("_", " "),
            _failed_in(step.answer),
        )
        for step in e.steps
    )
    columns = (
        "phase",
        "on",
        "its answer changes",
        *named,
        "gain over its base, fresh starts",
        "verdict",
        "what does not work",
    )
    words = (
        f"Each phase begins from the winner of those before. The rest of this page is of {e.experiment.name}.",
        "Metrics are of one measurement in the search; the gain is of the fresh starts.",
    )
    return Section("phases", "The journey", words, (), (Table("Phases", columns, rows),))


def _step_columns(e: Evidence) -> list[str]:
    return list(
        dict.fromkeys((e.objective.metric, "output_tokens_per_s", "ttft_p50_ms", "tpot_mean_ms", "e2e_mean_ms"))
    )


def _failed_in(answer: Recommendation) -> str:
    """Causes of a phase's failures, each with what it was that failed."""
    return "; ".join(
        f"{settings_text(failure.flags, failure.flags) or 'the baseline'}: {failure.rule or failure.kind}: "
        f"{last_line(failure.detail)}"
        for failure in answer.failures
    )


# ---- progression


def _progression(e: Evidence) -> Section | None:
    steps = progression(e)
    if len(steps) < 1:
        return None
    first = value(steps[0][1], e.objective)
    named = _step_columns(e)
    columns = ("step", "trial", "sets", *named, "against the first", "status")
    rows = tuple(
        (
            name,
            row.number,
            _sets(row),
            *(getattr(row, column) for column in named),
            _relative(value(row, e.objective), first),
            status,
        )
        for name, row, status in steps
    )
    note = "One measurement a step, as the search saw it; the gain to believe is that of the fresh starts."
    table = Table("Progression", columns, rows, note, trial_column=1)
    return Section("progression", "What each step brought", (), (_history(e),) if len(e.rows) > 1 else (), (table,))


def progression(e: Evidence) -> list[tuple[str, TrialRow, str]]:
    """The baseline and each trial that beat all before it: name of the step, row, what became of it."""
    best: TrialRow | None = None
    steps: list[tuple[str, TrialRow]] = []
    for row in _searched(e):
        if row.purpose == "baseline" and not steps:
            steps.append(("baseline", row))
            best = row if usable(row, e.objective) else best
        elif usable(row, e.objective) and _beats(row, best, e.objective):
            steps.append((f"improvement {len(steps)}", row))
            best = row
    chosen = e.deployed
    return [(name, row, _status(row, chosen)) for name, row in steps]


def _beats(row: TrialRow, best: TrialRow | None, objective: Objective) -> bool:
    mine, theirs = value(row, objective), None if best is None else value(best, objective)
    if mine is None:
        return False
    return theirs is None or (mine > theirs if objective.direction == "maximize" else mine < theirs)


def _status(row: TrialRow, chosen: TrialRow | None) -> str:
    if chosen is not None and row.config_hash == chosen.config_hash:
        return "DEPLOY"
    if row.state != "complete":
        return row.failure_kind or row.state
    return "baseline" if row.purpose == "baseline" else "surpassed"


def _sets(row: TrialRow) -> str:
    flags = row.config_flags
    return settings_text(json.loads(row.params_json), flags) or settings_text(flags, flags)


def _relative(now: float | None, first: float | None) -> str | None:
    return None if not now or not first else f"{now / first - 1:+.1%}" if now < 2 * first else f"{now / first:.2f}x"


def _history(e: Evidence) -> Figure:
    metric, data = e.objective.metric, _best_so_far(e)
    table = Table(
        "Trials in order",
        ("trial", metric, "best so far", "outcome"),
        tuple((d["trial"], d["value"], d["best"], d["outcome"]) for d in data),
        trial_column=0,
    )
    best = data[-1]["best"] if data else None
    alt = f"{metric} of each trial in order, and the best so far: {'none' if best is None else f'{best:.4g}'}."
    return Figure("history", f"{metric} by trial, and the best so far", alt, (data, metric), table)


def _best_so_far(e: Evidence) -> list[Row]:
    best: TrialRow | None = None
    data: list[Row] = []
    for row in _searched(e):
        if usable(row, e.objective) and _beats(row, best, e.objective):
            best = row
        data.append(
            {
                "trial": row.number,
                "value": _shown_value(row, e.objective),
                "best": None if best is None else value(best, e.objective),
                "outcome": outcome(row),
                "label": trial_label(row, e.objective),
            }
        )
    return data


def _searched(e: Evidence) -> list[TrialRow]:
    """Rows of the search, in order."""
    return sorted((row for row in e.rows if row.purpose in SEARCHED), key=lambda row: row.number)


def _shown_value(row: TrialRow, objective: Objective) -> float | None:
    return value(row, objective) if row.is_believed else None


def outcome(row: TrialRow) -> str:
    """One of a few words: `ok`, `misses the SLO`, `saturated`, `not valid`, `failed`, `ruled out`, `stopped`."""
    if row.state == "complete":
        if row.valid is False:
            return "not valid"
        return "misses the SLO" if row.slo_met is False else "saturated" if row.saturated else "ok"
    return {"infeasible": "ruled out"}.get(row.state, row.state)


def trial_label(row: TrialRow, objective: Objective) -> str:
    """What a mark of a figure says when it is asked."""
    found = _shown_value(row, objective)
    figure = f"{objective.metric} {found:.4g}" if found is not None else row.failure_kind or row.reason_rule or ""
    return f"trial {row.number}: {_sets(row)}: {figure}, {outcome(row)}"


# ---- trade-off


def axes_of(e: Evidence) -> tuple[str, str]:
    """The two metrics to lay against each other: the objectives, or the objective and a latency."""
    named = [objective.metric for objective in e.experiment.objectives]
    if len(named) > 1:
        return named[1], named[0]
    if named[0] in LATENCY_METRICS:
        return named[0], "output_tokens_per_s"
    others = [*e.experiment.slo, "ttft_p50_ms", "tpot_mean_ms", "e2e_mean_ms"]
    counts = {name: sum(getattr(row, name) is not None for row in e.rows) for name in others}
    most = max(counts.values())
    return next(name for name in others if counts[name] >= MOSTLY * most), named[0]


def front_of(rows: Sequence[TrialRow], x: str, y: str) -> set[str]:
    """`trial_id`s of those that no other beats on both axes; what an overrun server's latency says does not count."""
    latency = x in LATENCY_METRICS or y in LATENCY_METRICS
    able = [row for row in rows if usable(row) and not (latency and row.saturated)]
    points = {
        row.trial_id: tuple(getattr(row, name) * (1 if OBJECTIVES[name] == "maximize" else -1) for name in (x, y))
        for row in able
        if getattr(row, x) is not None and getattr(row, y) is not None
    }
    front, best = set(), -math.inf
    for trial_id, (_, second) in sorted(points.items(), key=lambda item: item[1], reverse=True):
        if second > best:
            front.add(trial_id)
            best = second
    return front


def _trade_off(e: Evidence) -> Section | None:
    x, y = axes_of(e)
    rows = [row for row in e.rows if row.purpose in SEARCHED and row.is_believed]
    both = [row for row in rows if getattr(row, x) is not None and getattr(row, y) is not None]
    if len(both) < 2 or x == y:
        return None
    front, role = front_of(both, x, y), _roles(e)
    data = [
        {
            "trial": row.number, "x": getattr(row, x), "y": getattr(row, y), "front": row.trial_id in front,
            "saturated": bool(row.saturated), "role": role.get(row.config_hash, ""),
            "label": trial_label(row, e.objective),
        }
        for row in both
    ]  # fmt: skip
    shown = [d for d in sorted(data, key=lambda d: d["x"]) if d["front"] or d["role"]]
    table = Table(
        "The front, the baseline and the recommendation",
        ("trial", x, y, "on the front", "saturated", "role"),
        tuple((d["trial"], d["x"], d["y"], d["front"], d["saturated"], d["role"]) for d in shown),
        note="Every other trial is in the table of all trials.",
        trial_column=0,
    )
    words = [f"Each mark is a configuration: {y} against {x}. Nothing beats those on the front in both."]
    if len(rows) > len(both):
        words.append(f"{len(rows) - len(both)} more have no {x}: too few requests lie beyond it, or it never came.")
    if any(d["saturated"] for d in data) and x in LATENCY_METRICS:
        words.append("Hollow marks are of servers that fell behind: their latency says how long the test ran.")
    alt = f"{len(data)} configurations, {y} against {x}; {len(front)} on the front."
    return Section(
        "trade-off",
        "Throughput against latency",
        tuple(words),
        (Figure("front", f"{y} against {x}", alt, (data, x, y), table),),
    )


def _roles(e: Evidence) -> dict[str, str]:
    return {row.config_hash: name for name, row in reversed(e.arms.items())}


# ---- parallel coordinates, all trials


LEFT_OUT = "left out"


def label_of(found: JsonValue) -> str:
    """A flag's value in a word."""
    if found is None:
        return LEFT_OUT
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True, separators=(",", ":"))


def level_order(found: JsonValue) -> tuple[int, float, str]:
    """Sorts numbers by size, before texts; a flag that is left out comes first."""
    if found is None:
        return 0, 0.0, ""
    if isinstance(found, int | float) and not isinstance(found, bool):
        return 1, float(found), ""
    return 2, 0.0, label_of(found)


def measured(rows: Sequence[TrialRow], objective: Objective) -> list[TrialRow]:
    """Rows of the search whose objective is to be believed, the last of each configuration."""
    kept: dict[str, TrialRow] = {}
    for row in rows:
        good = row.is_believed and not overrun(row, objective)
        if good and value(row, objective) is not None and row.purpose in SEARCHED:
            kept[row.config_hash] = row
    return list(kept.values())


def varied_flags(rows: Sequence[TrialRow]) -> dict[str, list[JsonValue]]:
    """Flags that differ between rows, each with its value in every row; None where it is left out."""
    configs: list[dict[str, JsonValue]] = [row.config_flags for row in rows]
    names = sorted({name for config in configs for name in config})
    columns = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in columns.items() if len({label_of(v) for v in values}) > 1}


def _by_share(e: Evidence, flags: Iterable[str]) -> list[str]:
    """Flags by what they matter, those of which nothing is known last."""
    shares = {effect.param: effect.share for effect in effects(e.rows, e.experiment).params}
    return sorted(flags, key=lambda flag: (-shares.get(flag, 0.0), flag))


def _parallel(e: Evidence) -> Section | None:
    rows = measured(e.rows, e.objective)
    flags = varied_flags(rows)
    ranked = _by_share(e, flags)[:MOST_AXES]
    figures: tuple[Figure, ...] = ()
    if len(rows) >= 2 and ranked:
        axes = [(flag, _positions(flags[flag])) for flag in ranked]
        alt = f"{len(rows)} measured configurations as lines over {', '.join(ranked)} and {e.objective.metric}."
        ticks = [*_axis_ticks(axes, flags), *_objective_ticks(e, rows)]
        data = (_lines(e, rows, axes), ticks, [*ranked, e.objective.metric])
        levels = Table("Axes", ("axis", "values from bottom to top"), tuple(_axis_rows(flags, ranked)),
                       note="Each line's numbers are a row of the table of all trials.")  # fmt: skip
        figures = (Figure("parallel", "Configurations as lines, the best at the top right", alt, data, levels),)
    return Section("trials", "Every trial", (), figures, (), (all_trials(e),))


def _positions(values: list[JsonValue]) -> list[float]:
    """Each row's place on an axis, from 0 to 1: evenly by rank, in order."""
    order = {label_of(v): level_order(v) for v in values}
    ranks = {label: rank for rank, label in enumerate(sorted(order, key=order.__getitem__))}
    top = max(len(ranks) - 1, 1)
    return [ranks[label_of(v)] / top for v in values]


def _span(e: Evidence, rows: Sequence[TrialRow]) -> tuple[float, float]:
    seen = [v for row in rows if (v := value(row, e.objective)) is not None]
    return min(seen), max(seen)


def _lines(e: Evidence, rows: list[TrialRow], axes: list[tuple[str, list[float]]]) -> list[Row]:
    low, high = _span(e, rows)
    role, points = _roles(e), []
    for index, row in enumerate(rows):
        best = ((value(row, e.objective) or low) - low) / (high - low or 1)
        if e.objective.direction == "minimize":
            best = 1 - best
        places = [*((flag, where[index]) for flag, where in axes), (e.objective.metric, best)]
        label = trial_label(row, e.objective)
        points += [
            {"trial": row.number, "axis": axis, "at": round(at, 4), "role": role.get(row.config_hash, ""), "best": best,
             "label": label if number == 0 else ""}
            for number, (axis, at) in enumerate(places)
        ]  # fmt: skip
    return points


def _axis_ticks(axes: list[tuple[str, list[float]]], flags: Mapping[str, list[JsonValue]]) -> list[Row]:
    ticks: dict[tuple[str, str], Row] = {}
    for flag, where in axes:
        for found, at in zip(flags[flag], where, strict=True):
            ticks[flag, label_of(found)] = {"axis": flag, "at": at, "text": label_of(found)}
    return list(ticks.values())


def _objective_ticks(e: Evidence, rows: Sequence[TrialRow]) -> list[Row]:
    """Both ends of the objective: the best stands at the top, whichever way is better."""
    low, high = _span(e, rows)
    ends = (low, high) if e.objective.direction == "maximize" else (high, low)
    return [{"axis": e.objective.metric, "at": at, "text": f"{end:.4g}"} for at, end in enumerate(ends)]


def _axis_rows(flags: Mapping[str, list[JsonValue]], names: Iterable[str]) -> list[tuple[Cell, ...]]:
    def levels(name: str) -> str:
        distinct = {label_of(v): level_order(v) for v in flags[name]}
        return ", ".join(sorted(distinct, key=distinct.__getitem__))

    return [(name, levels(name)) for name in names]


SHOWN_COLUMNS = (
    "output_tokens_per_s", "request_rate_rps", "goodput_rps", "ttft_p50_ms", "ttft_p95_ms", "tpot_mean_ms",
    "e2e_mean_ms", "server_start_s",
)  # fmt: skip


def all_trials(e: Evidence) -> Table:
    """Every row, as people compare them."""
    named = list(dict.fromkeys((*(o.metric for o in e.experiment.objectives), *e.experiment.slo, *SHOWN_COLUMNS)))
    named = [name for name in named if any(getattr(row, name) is not None for row in e.rows)]
    simulated = any(row.simulated for row in e.rows)
    rows = tuple(
        (
            row.number,
            f"{row.purpose} {row.arm or ''}".strip(),
            _sets(row),
            *(getattr(row, name) if row.state == "complete" else None for name in named),
            _why(row),
            *((row.simulated,) if simulated else ()),
        )
        for row in sorted(e.rows, key=lambda row: (row.number, row.attempt))
    )
    columns = ("trial", "purpose", "sets", *named, "outcome", *(("simulated",) if simulated else ()))
    return Table("All trials", columns, rows, trial_column=0)


def _why(row: TrialRow) -> str:
    """The outcome with its reason in few words."""
    reason = row.reason_rule or row.failure_kind or "; ".join(row.invalid_reasons)
    return f"{outcome(row)}: {reason}" if reason else outcome(row)


# ---- which flags matter


def _importance(e: Evidence) -> Section | None:
    found = effects(e.rows, e.experiment)
    if not found.params:
        return None
    data = [{"flag": effect.param, "share": effect.share} for effect in found.params]
    levels = tuple(
        (effect.param, effect.share, _level(level.value), level.measurements, level.ratio - 1, level.lo, level.hi)
        for effect in found.params
        for level in effect.values
    )
    metric = found.metric
    columns = ("flag", "share of the variance", "value", "measurements", f"its effect on {metric}", "ratio from", "to")
    note = "An effect is against the mean configuration; its 95 % interval is that of the ratio."
    tables = [Table("Main effects", columns, tuple((*row[:4], f"{row[4]:+.1%}", *row[5:]) for row in levels), note)]
    if found.interactions:
        pairs = tuple((" and ".join(pair.params), pair.share) for pair in found.interactions)
        tables.append(Table("What two flags do together", ("flags", "share of the variance"), pairs))
    words = (
        f"Share of the variance of log {metric} that each flag explains, of {found.measurements} measurements by a "
        "linear model of all flags. The search measures more near the best than elsewhere, and so does this.",
    )
    alt = "; ".join(f"{row['flag']} {row['share']:.0%}" for row in data[:5])
    figure = Figure("importance", "Share of the variance explained by each flag", alt, data, tables[0])
    return Section("importance", "Which flags matter", words, (figure,), tuple(tables[1:]))


def _level(text: str) -> str:
    """A value as `effects` has it, in a word."""
    return label_of(json.loads(text))


# ---- batch size


def batch_rows(e: Evidence) -> list[TrialRow]:
    """Measured rows that differ in `max_num_seqs` alone, of the largest such group; the winner's on a draw."""
    groups: dict[str, dict[int, TrialRow]] = {}
    for row in e.rows:
        flags = row.config_flags
        seqs = flags.pop("max_num_seqs", None)
        if isinstance(seqs, int) and row.is_believed and row.purpose != "load":
            groups.setdefault(json.dumps(flags, sort_keys=True), {}).setdefault(seqs, row)
    chosen = e.deployed

    def worth(group: dict[int, TrialRow]) -> tuple[int, bool]:
        return len(group), any(chosen is not None and row.config_hash == chosen.config_hash for row in group.values())

    best = max(groups.values(), key=worth, default={})
    return [best[seqs] for seqs in sorted(best)] if len(best) >= LEAST_BATCHES else []


def _seqs(row: TrialRow) -> int:
    found = row.config_flags["max_num_seqs"]
    assert isinstance(found, int)
    return found


def _batch(e: Evidence) -> Section | None:
    rows = batch_rows(e)
    if not rows:
        return None
    shown = ("output_tokens_per_s", "ttft_p50_ms", "tpot_mean_ms", "goodput_rps")
    columns = tuple(c for c in shown if sum(getattr(row, c) is not None for row in rows) >= LEAST_BATCHES)
    data = [
        {"max_num_seqs": _seqs(row), "trial": row.number, "metric": name, "value": found,
         "label": trial_label(row, e.objective)}
        for row in rows for name in columns if (found := getattr(row, name)) is not None
    ]  # fmt: skip
    table = Table(
        "Batch size",
        ("max_num_seqs", "trial", *columns, "outcome"),
        tuple((_seqs(r), r.number, *(getattr(r, c) for c in columns), outcome(r)) for r in rows),
        trial_column=1,
    )
    rest = {k: v for k, v in json.loads(rows[0].config_json).items() if k != "max_num_seqs"}
    words = (f"Configurations that differ in max_num_seqs alone, with {settings_text(rest, rest) or 'no other flag'}.",)
    alt = f"{', '.join(columns)} over max_num_seqs from {table.rows[0][0]} to {table.rows[-1][0]}."
    return Section("batch-size", "How large a batch", words, (Figure("batch", "Over max_num_seqs", alt, data, table),))


# ---- latency


def _latency(e: Evidence) -> Section | None:
    curves: dict[tuple[str, str], np.ndarray] = {}
    for name, row in e.arms.items():
        starts = [start for start in starts_of(row, e.rows) if e.requests.get(start.trial_id)]
        found = [latencies(_window(e.requests[start.trial_id], start)) for start in starts]
        for latency in SHOWN_LATENCIES if found else ():
            curves[name, latency] = np.sort(np.concatenate([some[latency].values for some in found]))
    curves = {key: values for key, values in curves.items() if np.isfinite(values).any()}
    if not curves:
        return None
    data = [point for (arm, latency), values in curves.items() for point in _cdf(arm, latency, values)]
    table = Table(
        "Latency percentiles in ms",
        ("arm", "latency", "requests", *(f"p{p / 10:g}" for p in CDF_PERMILLE), "never came"),
        tuple(_percentiles(arm, latency, values) for (arm, latency), values in curves.items()),
        note="The plain empirical percentile of all requests that came due in the window, p100 the largest that came.",
    )
    arms = " and ".join(dict.fromkeys(arm for arm, _ in curves))
    saturated = any(row.saturated for row in e.arms.values())
    words = [
        "From the scheduled arrival, so that a client that waits hides nothing. A curve that stops short of 100 %: the "
        "rest never came."
    ]
    words += ["A server fell behind: its latency says how long the test ran."] if saturated else []
    alt = f"Share of requests with at most so much latency, {arms}."
    return Section(
        "latency",
        "How long people wait",
        tuple(words),
        (Figure("cdf", "Latency, share of requests", alt, data, table),),
    )


def _window(records: Sequence[RequestRecord], row: TrialRow) -> Requests:
    duration_s = row.duration_s or max((r.scheduled_s for r in records), default=0.0) + 1e-6
    return Measured.of(Requests.of(records), duration_s=duration_s, drain_s=row.drain_s or 0.0).window


def _cdf(arm: str, latency: str, values: np.ndarray) -> list[Row]:
    came = values[np.isfinite(values)]
    ranks = np.unique(np.linspace(0, len(came) - 1, min(len(came), MOST_POINTS)).round().astype(int))
    return [
        {
            "arm": arm,
            "latency": SHOWN_LATENCIES[latency],
            "ms": max(float(came[rank]), 1e-3),
            "share": (int(rank) + 1) / len(values),
        }
        for rank in ranks
    ]


def _percentiles(arm: str, latency: str, values: np.ndarray) -> tuple[Cell, ...]:
    figures = [percentile(values, permille) for permille in CDF_PERMILLE[:-1]]
    came = values[np.isfinite(values)]
    shown = [f if math.isfinite(f) else None for f in [*figures, float(came.max())]]
    return (arm, SHOWN_LATENCIES[latency], len(values), *shown, len(values) - len(came))


# ---- time series


SERIES = {
    "num_requests_running": ("requests", "running", 1.0),
    "num_requests_waiting": ("requests", "waiting", 1.0),
    "kv_cache_usage_frac": ("KV cache used, %", "KV cache", 100.0),
    "gpu_power_w": ("GPU power, W", "power", 1.0),
    "gpu_sm_clock_mhz": ("SM clock, MHz", "clock", 1.0),
    "gpu_temperature_c": ("GPU temperature, °C", "temperature", 1.0),
}
"""Column of a sample to the panel it stands in, its name there, and a factor."""


def _over_time(e: Evidence) -> Section | None:
    row = e.deployed or e.baseline
    start = next((s for s in starts_of(row, e.rows) if e.samples.get(s.trial_id)), None) if row else None
    if start is None:
        return None
    samples = sorted(e.samples[start.trial_id], key=lambda sample: sample.t_s)
    data = [point for column in SERIES for point in _series(samples, column)]
    data += _tokens_over_time(e.requests.get(start.trial_id, ()), samples)
    if not data:
        return None
    table = _over_time_table(data)
    end_s = start.duration_s
    words = (
        f"Trial {start.number}, second 0 the start of the measured window"
        + (f", its end {end_s:g} s." if end_s else "."),
    )
    alt = f"Trial {start.number} over time: {', '.join(dict.fromkeys(d['panel'] for d in data))}."
    return Section(
        "time",
        "One trial over time",
        words,
        (Figure("time", f"Trial {start.number} over time", alt, (data, end_s), table),),
    )


def _series(samples: Sequence[Sample], column: str) -> list[Row]:
    panel, name, factor = SERIES[column]
    seen = [(sample.t_s, float(found) * factor) for sample in samples if (found := getattr(sample, column)) is not None]
    step = max(1, math.ceil(len(seen) / MOST_POINTS))
    return [{"t_s": t, "value": v, "panel": panel, "series": name} for t, v in seen[::step]]


def _tokens_over_time(records: Sequence[RequestRecord], samples: Sequence[Sample]) -> list[Row]:
    """Output tokens a second, in bins."""
    if not records or len(samples) < 2:
        return []
    at_s, tokens = token_events(Requests.of(records))
    low, high = samples[0].t_s, samples[-1].t_s
    edges = np.linspace(low, high, max(2, min(120, int(high - low) + 1)))
    sums, _ = np.histogram(at_s, edges, weights=tokens)
    rates, middles = sums / np.diff(edges), (edges[:-1] + edges[1:]) / 2
    return [
        {"t_s": float(t), "value": float(v), "panel": "output tokens/s", "series": "tokens"}
        for t, v in zip(middles, rates, strict=True)
    ]


def _over_time_table(data: list[Row]) -> Table:
    """Means over some tens of stretches of time."""
    names = list(dict.fromkeys((row["panel"], row["series"]) for row in data))
    times = np.array([row["t_s"] for row in data])
    edges = np.linspace(times.min(), times.max() + 1e-9, TABLE_POINTS + 1)
    cells: dict[int, dict[tuple[str, str], list[float]]] = {}
    for row, place in zip(data, np.digitize(times, edges) - 1, strict=True):
        cells.setdefault(int(place), {}).setdefault((row["panel"], row["series"]), []).append(row["value"])
    rows = tuple(
        (round(float(edges[place]), 1), *(float(np.mean(found[name])) if name in found else None for name in names))
        for place, found in sorted(cells.items())
    )
    titles = [
        panel if series in panel or panel.startswith("output") else f"{panel} {series}" for panel, series in names
    ]
    return Table("Over time, means of stretches", ("from second", *titles), rows)


# ---- roofline


def _roofline(e: Evidence) -> Section | None:
    if e.roofline is None:
        return Section("roofline", "How far from what the hardware allows", (e.no_roofline,)) if e.no_roofline else None
    figures = tuple(_roofline_figure(e.roofline, gpu) for gpu in e.roofline.gpus)
    words = [_bound_words(gpu, e) for gpu in e.roofline.gpus] + list(e.roofline.notes)
    return Section("roofline", "How far from what the hardware allows", tuple(w for w in words if w), figures)


def _roofline_figure(answer: Roofline, gpu: GpuRoofline) -> Figure:
    points: list[tuple[Cell, ...]] = [
        ("bound", p.phase, p.batch, p.tokens, p.intensity, p.flops / p.seconds, None)
        for p in (*gpu.decode, *gpu.prefill)
    ]
    points += [
        ("estimate", p.phase, p.batch, p.tokens, p.intensity, p.flops / p.seconds, None) for p in gpu.prefill_unfused
    ]
    points += [
        (
            "measured (SIMULATED)" if p.simulated else "measured",
            p.kind,
            p.batch,
            round(p.context),
            p.intensity,
            p.flops_per_s,
            p.efficiency,
        )
        for p in gpu.measurements
    ]
    columns = ("kind", "step", "batch", "tokens", "FLOP/byte", "FLOP/s", "share of the bound")
    table = Table(f"Roofline of {gpu.gpu}", columns, tuple(points))
    near = max((p.efficiency for p in gpu.measurements), default=None)
    reached = (
        f"; measured points reach up to {near:.0%} of their bound"
        if near is not None
        else "; nothing was measured on it"
    )
    alt = f"Roofline of {answer.model.name} on {gpu.gpu}: ridge at {gpu.ridge:.3g} FLOP/byte{reached}."
    return Figure("roofline", f"Roofline: {answer.model.name} on {gpu.gpu}", alt, (answer, gpu), table)


def _bound_words(gpu: GpuRoofline, e: Evidence) -> str:
    best, row = gpu.best, e.deployed
    if best is None:
        return ""
    kind = "rough estimate" if gpu.measured else "bound"
    words = f"No configuration of the space makes over {best.tokens_per_s:.4g} output tokens/s on {gpu.gpu}, a {kind}"
    if row is None or not row.output_tokens_per_s:
        return f"{words}."
    share = row.output_tokens_per_s / best.tokens_per_s
    return f"{words}; the recommended configuration made {row.output_tokens_per_s:.4g} ({share:.0%})."


# ---- failures, pruned


def _failures(e: Evidence) -> Section | None:
    groups: dict[str, list[TrialRow]] = {}
    for row in e.rows:
        if row.state == "failed":
            groups.setdefault(row.failure_kind or "unknown", []).append(row)
    base = e.baseline.config_flags if e.baseline else dict(e.experiment.serve)
    rows = tuple(
        (
            kind,
            len(some),
            _numbers(some),
            _differs(base, some[0]),
            last_line(some[0].failure_detail),
            some[0].failure_hint,
            "no: tried again" if kind in RETRIED else "yes",
        )
        for kind, some in sorted(groups.items(), key=lambda item: -len(item[1]))
    )
    columns = ("cause", "starts", "trials", "what the first sets", "the log's line", "what to do", "held against it")
    if not rows:
        return None
    return Section("failures", "What failed, and why", (), (), (Table("Failures by cause", columns, rows),))


def _numbers(rows: Sequence[TrialRow]) -> str:
    shown = ", ".join(str(row.number) for row in rows[:10])
    return f"{shown} and {len(rows) - 10} more" if len(rows) > 10 else shown


def _differs(base: dict[str, JsonValue], row: TrialRow) -> str:
    flags = row.config_flags
    changed = difference(base, flags)
    return settings_text(changed, flags) or "the baseline"


def last_line(detail: str | None) -> str:
    """The end of a traceback is what it says."""
    lines = [line.strip() for line in (detail or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _pruned(e: Evidence) -> Section | None:
    groups: dict[str, list[TrialRow]] = {}
    for row in e.rows:
        if row.state == "infeasible":
            groups.setdefault(row.reason_rule or "unknown", []).append(row)
    base = e.baseline.config_flags if e.baseline else dict(e.experiment.serve)
    rows = tuple(
        (rule, len(some), _numbers(some), _differs(base, some[0]), some[0].failure_detail or "")
        for rule, some in sorted(groups.items(), key=lambda item: -len(item[1]))
    )
    tested = [row for row in e.rows if row.audited_rule]
    audits = tuple((row.number, row.audited_rule, _why(row), _sets(row)) for row in tested)
    if not rows and not audits:
        return None
    columns = ("rule", "configurations", "trials", "what the first sets", "why, with numbers and source")
    words = ("Ruled out before any start, at no GPU time.",) if rows else ()
    tables = [Table("Ruled out, by rule", columns, rows)] if rows else []
    if audits:
        tables.append(
            Table(
                "Started all the same, to test a rule", ("trial", "rule", "came of it", "sets"), audits, trial_column=0
            )
        )
    return Section("pruned", "What was never started", words, (), tuple(tables))


# ---- how it was measured


def _measured_how(e: Evidence) -> Section:
    tables = [Table("The measurement", ("what", "value"), tuple(_method(e))), _validity(e)]
    invalid = [row for row in e.rows if row.valid is False]
    if invalid:
        bad = tuple((row.number, row.purpose, "; ".join(row.invalid_reasons), _sets(row)) for row in invalid)
        tables.append(
            Table("Not to be believed, and not ranked", ("trial", "purpose", "why", "sets"), bad, trial_column=0)
        )
    warned = [(row.number, text) for row in e.rows for text in row.warnings]
    folded = [Table("Warnings of single trials", ("trial", "warning"), tuple(warned), trial_column=0)] if warned else []
    return Section("method", "How it was measured", (), (), tuple(tables), (*folded, *_resolved(e)))


def _method(e: Evidence) -> list[tuple[Cell, ...]]:
    x, rows, w = e.experiment, e.rows, e.experiment.workload
    begun = sorted(row.started_at for row in rows)
    pairs: list[tuple[str, Cell]] = [
        ("model", x.model),
        ("model revision", _distinct(row.model_revision for row in rows)),
        ("engine", _distinct(f"{row.engine} {row.engine_version or '?'}" for row in rows)),
        ("GPU", _distinct(f"{row.gpu_count or 1} x {row.gpu_name}" for row in rows if row.gpu_name) or "none (CPU)"),
        ("driver", _distinct(row.driver_version for row in rows)),
        ("hosts", _distinct(row.host for row in rows)),
        ("workload", w.described),
        ("window, warm-up, drain", f"{w.duration_s:g} s, {w.warmup_s:g} s, at most {w.max_drain_s:g} s"),
        ("workload seed", w.seed),
        ("objective", ", ".join(f"{o.direction} {o.metric}" for o in x.objectives)),
        ("SLO", ", ".join(f"{key} <= {limit:g} ms" for key, limit in x.slo.items()) or "none"),
        ("fixed flags", settings_text(x.serve, x.serve) or "none"),
        ("server environment", ", ".join(f"{k}={v}" for k, v in sorted(x.server.env.items())) or "none"),
        ("sampler, its seed", f"{x.study.sampler}, {x.study.seed}"),
        ("server starts", sum(row.state != "infeasible" for row in rows)),
        ("of them to confirm", sum(row.purpose == "confirm" for row in rows)),
        ("measurement version", _distinct(str(row.measurement_version) for row in rows)),
        ("simulated rows", sum(row.simulated for row in rows)),
        ("from, to (UTC)", f"{begun[0]:%Y-%m-%d %H:%M}, {begun[-1]:%Y-%m-%d %H:%M}" if begun else None),
        ("search ended", e.answer.ended),
    ]  # fmt: skip
    return [pair for pair in pairs if pair[1] not in (None, "")]


def _distinct(values: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(v for v in values if v))


def _validity(e: Evidence) -> Table:
    done = [row for row in e.rows if row.state == "complete"]
    lags = [row.send_lag_p99_ms for row in done if row.send_lag_p99_ms is not None]
    cpu = [row.client_cpu_frac for row in done if row.client_cpu_frac is not None]
    short = [row.delivered_rate_rps / row.rate_rps for row in done if row.delivered_rate_rps and row.rate_rps]
    rows: list[tuple[Cell, ...]] = [
        ("measurements", len(done)),
        ("to be believed", sum(row.valid is not False for row in done)),
        ("saturated: the server fell behind", sum(bool(row.saturated) for row in done)),
        ("with warnings", sum(bool(row.warnings) for row in done)),
        ("sends late at p99, the worst, ms", max(lags, default=None)),
        ("load process, the busiest, share of a core", max(cpu, default=None)),
        ("delivered of the rate asked for, least", min(short, default=None)),
        ("requests failed", sum(row.num_failed or 0 for row in done)),
        ("requests unfinished", sum(row.num_unfinished or 0 for row in done)),
    ]
    return Table("Validity", ("check", "value"), tuple(row for row in rows if row[1] is not None))


def _resolved(e: Evidence) -> list[Table]:
    """Settings as the engine resolved them, the baseline's beside the recommended ones'."""
    arms = {name: _flat(json.loads(row.resolved_json)) for name, row in e.arms.items() if row.resolved_json}
    if not arms:
        return []
    names = sorted({name for found in arms.values() for name in found})
    rows = tuple((name, *(found.get(name) for found in arms.values())) for name in names)
    differ = tuple(row for row in rows if len(set(row[1:])) > 1)
    columns = ("setting", *arms)
    tables = [Table("Resolved settings that differ", columns, differ)] if differ else []
    return [*tables, Table("All settings as the engine resolved them", columns, rows)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, found in settings.items():
        if isinstance(found, dict) and found:
            flat |= _flat(found, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = label_of(found)
    return flat


def _reproduce(e: Evidence) -> Section:
    return Section("reproduce", "Do it again", (), codes=e.codes)


SECTIONS: tuple[Callable[[Evidence], Section | None], ...] = (
    _confirmation, _phases, _progression, _trade_off, _parallel, _importance, _batch, _latency, _over_time, _roofline,
    _failures, _pruned, _measured_how, _reproduce,
)  # fmt: skip
"""In the order of the page."""
