"""An experiment in phases: each is searched from the winner so far, and the answer says what each step brought.

A phase is a study of its own, `NAME.PHASE`, run by `sweeper.sweep`, so that it is confirmed, resumed and looked at like
any other. Its baseline is the winner so far with the phase's own `serve` over it; what beats that in fresh
starts is what the next phase starts from. What somebody said of a configuration before (`claims`) is tried in its phase
and judged by what is found there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.budget import Budget
from varcas.errors import InputError
from varcas.experiment import Claim, Experiment, Flags, Hardware, Objective, Phase
from varcas.intervals import pooled_deviation, t_quantile
from varcas.records import TrialRow
from varcas.report import (
    ACCEPTANCE_NOT_REAL,
    GainOut,
    Recommendation,
    difference,
    has_unreal_acceptance,
    percent,
    settings_text,
    value,
)
from varcas.space import ServingConfig
from varcas.starts import Event, check
from varcas.store import Store
from varcas.sweeper import sweep

Effect = Literal["helps", "no difference", "hurts", "fails", "not real", "not measured"]
START_SD_FRAC = 0.04
"""Starts of one configuration differ by 1-4 %, as measured; taken where a phase has no repeated starts."""
NEAR_FRAC = 0.2
"""Figures that differ by no more agree: another machine, another day."""
_FROZEN = ConfigDict(extra="forbid", frozen=True)


class Found(BaseModel):
    """What a phase found of one configuration, against the phase's base."""

    model_config = _FROZEN
    flags: dict[str, JsonValue] = Field(description="what it changes; null: left out; empty: the base itself")
    numbers: list[int] = Field(description="of its trials")
    effect: Effect
    value: float | None = Field(description="the objective, mean over its starts")
    ratio: float | None = Field(description="over the base's")
    cause: str | None = Field(description="why it fails, or is not to be recommended")
    hint: str | None
    figures: dict[str, float] = Field(default_factory=dict, description="metrics that a claim gives, as found here")


class Judged(BaseModel):
    """A claim, and what was found."""

    model_config = _FROZEN
    said: str
    found: Found
    agrees: bool | None = Field(description="null: what is found decides nothing")
    figures: dict[str, float] = Field(description="as claimed")
    note: str | None


class Stage(BaseModel):
    """What one phase brought."""

    model_config = _FROZEN
    name: str
    why: str | None
    study: str
    model: str
    gpu: str | None
    engine_version: str | None
    simulated: bool
    verdict: str
    headline: str
    base: dict[str, JsonValue] = Field(description="flags that the phase started from")
    changes: dict[str, JsonValue] = Field(description="what its answer changes of them")
    baseline_value: float | None
    winner_value: float | None
    gain: GainOut | None
    kept: bool = Field(description="its winner is what the next phase starts from")
    found: list[Found]
    claims: list[Judged]


class Journey(BaseModel):
    """What an experiment in phases leaves behind."""

    model_config = _FROZEN
    study: str
    simulated: bool
    objective: str
    stages: list[Stage]
    deploy: dict[str, JsonValue] | None = Field(description="the flags to deploy; null when nothing runs")
    model: str
    gpu: str
    command: str | None
    script: str | None
    first_value: float | None = Field(description="the objective of the first baseline")
    last_value: float | None = Field(description="of what is to be deployed, in its own phase's fresh starts")

    @property
    def has_answer(self) -> bool:
        """Some configuration runs and meets the SLO."""
        return self.deploy is not None


@dataclass(frozen=True, slots=True)
class Base:
    """The winner so far."""

    model: str
    revision: str | None
    hardware: Hardware
    flags: Flags

    @classmethod
    def first(cls, experiment: Experiment) -> Base:
        """The experiment's own baseline."""
        flags = {**experiment.serve, **experiment.baseline}
        return cls(experiment.model, experiment.revision, experiment.hardware, flags)


def study_of(experiment: Experiment, phase: Phase, base: Base) -> Experiment:
    """The phase as an experiment of its own."""
    flags = {name: value for name, value in {**base.flags, **phase.serve}.items() if value is not None}
    claimed = [claim.flags for claim in phase.claims if claim.flags]
    enqueue = [*phase.enqueue, *(named for named in claimed if named not in phase.enqueue)]
    told: dict[str, Any] = {
        "name": f"{experiment.name}.{phase.name}",
        "model": phase.model or base.model,
        "revision": phase.revision if phase.model else base.revision,
        "hardware": phase.hardware or base.hardware,
        "serve": {name: value for name, value in flags.items() if name not in phase.space},
        "baseline": {name: value for name, value in flags.items() if name in phase.space},
        "space": phase.space,
        "study": experiment.study.model_copy(
            update={"enqueue": enqueue, "trials": phase.trials or experiment.study.trials}
        ),
        "phases": [],
    }
    return experiment.model_copy(update=told)


def opening(experiment: Experiment) -> Experiment:
    """The experiment itself, or its first phase: for what looks at one study."""
    return study_of(experiment, experiment.phases[0], Base.first(experiment)) if experiment.phases else experiment


def run_phases(
    experiment: Experiment,
    *,
    budget: Budget | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **options: Any,
) -> Journey:
    """Runs the phases one after the other, and says what each brought; resumes where it was stopped.

    Args:
        experiment: with `phases`.
        budget: to spend at most: wall time of all phases together, GPU hours and money of each.
        on_event: as `sweeper.sweep`; each phase is announced by a note.
        options: further arguments of `sweeper.sweep`.

    Raises:
        InputError: a phase cannot be run as asked; nothing was started. So `sweeper.sweep`.
    """
    if not experiment.phases:
        raise InputError("phases: there are none: run it as one study")
    base = Base.first(experiment)
    for phase in experiment.phases:
        check(study_of(experiment, phase, base))
    limits = budget or Budget()
    ends_s = None if limits.wall_s is None else time.monotonic() + limits.wall_s
    stages: list[Stage] = []
    deployed: Recommendation | None = None
    best: float | None = None  # the objective of the winner so far, in its own phase
    for phase in experiment.phases:
        study = study_of(experiment, phase, base)
        on_event(Event("note", text=f"phase {phase.name}" + (f": {phase.why}" if phase.why else "")))
        left_s = None if ends_s is None else max(0.0, ends_s - time.monotonic())
        try:
            answer = sweep(study, budget=replace(limits, wall_s=left_s), on_event=on_event, **options)
        except InputError as error:
            if phase.hardware is None:
                raise
            stages.append(_not_run(phase, study, str(error)))  # a GPU that is not here: the others are
            on_event(Event("note", text=f"phase {phase.name} is passed over: {error}"))
            continue
        kept = phase.keep and answer.verdict in ("better", "no_baseline") and answer.deploy is not None
        rows = Store(study.results, readonly=True).rows(study.name)
        before = best if phase.hardware or phase.model else None
        stages.append(_stage(phase, study, answer, rows, kept, before))
        best = stages[-1].winner_value if kept or best is None else best
        if kept and answer.deploy is not None:
            base = Base(study.model, study.revision, study.hardware, answer.deploy)
        if kept or (deployed is None and answer.has_answer):
            deployed = answer
    return _journey(experiment, base, stages, deployed)


def _journey(experiment: Experiment, base: Base, stages: Sequence[Stage], answer: Recommendation | None) -> Journey:
    last = next((stage for stage in reversed(stages) if stage.kept), stages[0])
    return Journey(
        study=experiment.name,
        simulated=any(stage.simulated for stage in stages),
        objective=experiment.objectives[0].metric,
        stages=list(stages),
        deploy=None if answer is None else answer.deploy,
        model=base.model,
        gpu=base.hardware.gpu,
        command=None if answer is None else answer.command,
        script=None if answer is None else answer.script,
        first_value=stages[0].baseline_value,
        last_value=last.winner_value if last.kept else last.baseline_value,
    )


def _not_run(phase: Phase, study: Experiment, why: str) -> Stage:
    return Stage(
        name=phase.name,
        why=phase.why,
        study=study.name,
        model=study.model,
        gpu=study.hardware.gpu,
        engine_version=None,
        simulated=study.engine == "simulated",
        verdict="not run",
        headline=why.rstrip("."),
        base={**study.serve, **study.baseline},
        changes={},
        baseline_value=None,
        winner_value=None,
        gain=None,
        kept=False,
        found=[],
        claims=[],
    )


def _stage(
    phase: Phase, study: Experiment, answer: Recommendation, rows: Sequence[TrialRow], kept: bool, before: float | None
) -> Stage:
    looked = _Looked(study, rows, before)
    configs = {row.config_hash: row.config_flags for row in rows}
    found = [looked.found(flags) for flags in configs.values()]
    return Stage(
        name=phase.name,
        why=phase.why,
        study=study.name,
        model=study.model,
        gpu=answer.gpu or study.hardware.gpu,
        engine_version=answer.engine_version,
        simulated=answer.simulated,
        verdict=answer.verdict,
        headline=answer.headline,
        base=looked.base,
        changes=answer.changes,
        baseline_value=looked.value_of(looked.base),
        winner_value=looked.value_of(answer.deploy) if answer.deploy is not None else None,
        gain=answer.gain,
        kept=kept,
        found=[one for one in found if one.flags],
        claims=[_judged(claim, looked) for claim in phase.claims],
    )


def _judged(claim: Claim, looked: _Looked) -> Judged:
    found = looked.found({**looked.base, **claim.flags}, tuple(claim.figures))
    agrees: bool | None = None
    if found.effect == "fails":
        agrees = claim.helps is None
    elif found.effect in ("helps", "no difference", "hurts"):
        agrees = (found.effect == "helps") == claim.helps if claim.helps is not None else _is_near(claim, found)
    return Judged(said=claim.said, found=found, agrees=agrees, figures=claim.figures, note=claim.note)


def _is_near(claim: Claim, found: Found) -> bool | None:
    """Whether the figures of something that was said to run, or not to, are as they were given; None without any."""
    if found.flags:
        return False  # it was said not to run
    pairs = [(said, found.figures.get(name)) for name, said in claim.figures.items()]
    return all(seen is not None and abs(seen / said - 1) <= NEAR_FRAC for said, seen in pairs) if pairs else None


class _Looked:
    """The rows of one phase, configuration by configuration.

    Args:
        study: the phase as an experiment.
        rows: its.
        before: the objective of the winner so far, which the base is held against where it runs on something else.
    """

    def __init__(self, study: Experiment, rows: Sequence[TrialRow], before: float | None = None) -> None:
        self._before = before
        self._study, self._objective = study, study.objectives[0]
        self.base: dict[str, JsonValue] = {**study.serve, **study.baseline}
        self._rows: dict[str, list[TrialRow]] = {}
        for row in rows:
            self._rows.setdefault(row.config_hash, []).append(row)
        self._half = _half_interval(list(self._rows.values()), self._objective)

    def _of(self, flags: dict[str, JsonValue]) -> list[TrialRow]:
        config = ServingConfig(self._study.model, self._study.revision, flags)
        return self._rows.get(config.hash, [])

    def value_of(self, flags: dict[str, JsonValue]) -> float | None:
        """The objective, mean over all starts to be believed."""
        values = _values(self._of(flags), self._objective)
        return fmean(values) if values else None

    def found(self, flags: dict[str, JsonValue], figures: Sequence[str] = ()) -> Found:
        """Of one configuration."""
        rows = self._of(flags)
        config = ServingConfig(self._study.model, self._study.revision, flags)
        changes = difference(dict(ServingConfig("", None, self.base).flags), dict(config.flags))
        mine, other = self.value_of(flags), self.value_of(self.base) if changes else self._before
        ratio = mine / other if mine is not None and other else None
        effect, cause, hint = self._effect(rows, ratio)
        if effect == "no difference" and changes and other is None:  # it runs, and the base does not
            effect = "helps"
        measured = {name: [getattr(row, name) for row in _good(rows)] for name in figures}
        return Found(
            flags=changes,
            numbers=sorted({row.number for row in rows}),
            effect=effect,
            value=mine,
            ratio=ratio,
            cause=cause,
            hint=hint,
            figures={name: fmean(seen) for name, seen in measured.items() if seen and None not in seen},
        )

    def _effect(self, rows: Sequence[TrialRow], ratio: float | None) -> tuple[Effect, str | None, str | None]:
        if not rows:
            return "not measured", "it was not tried: the phase's trials were spent before", None
        if not _good(rows):
            row = rows[-1]
            kind = row.reason_rule or row.failure_kind or "; ".join(row.invalid_reasons) or row.state
            said = f"{kind}: {row.failure_detail}" if row.failure_detail else kind
            return ("fails" if row.state in ("failed", "infeasible") else "not measured"), said, row.failure_hint
        if any(has_unreal_acceptance(row) for row in rows):
            texts = [text for row in rows for text in row.warnings if text.startswith(ACCEPTANCE_NOT_REAL)]
            return "not real", texts[0], None
        if ratio is None or ratio <= 0 or abs(math.log(ratio)) <= self._half:
            return "no difference", None, None
        return ("helps" if (ratio > 1) == (self._objective.direction == "maximize") else "hurts"), None, None


def _good(rows: Sequence[TrialRow]) -> list[TrialRow]:
    return [row for row in rows if row.is_believed]


def _values(rows: Sequence[TrialRow], objective: Objective) -> list[float]:
    return [found for row in _good(rows) if (found := value(row, objective)) is not None]


def _half_interval(groups: Sequence[Sequence[TrialRow]], objective: Objective) -> float:
    """Half the 95 % interval of the logarithm of a ratio of two single starts, from the starts that were repeated."""
    logs = ([math.log(one) for one in _values(rows, objective) if one > 0] for rows in groups)
    deviation, freedom = pooled_deviation(logs)
    if deviation is None:
        return 1.96 * math.sqrt(2) * START_SD_FRAC
    return t_quantile(0.975, freedom) * math.sqrt(2) * deviation


# ---- in words


def journey_text(found: Journey) -> str:
    """The answer for a terminal; Markdown reads the same."""
    mark = " (SIMULATED)" if found.simulated else ""
    lines = [
        f"# {found.study}: {len(found.stages)} phases{mark}",
        "",
        f"| phase | on | base: {found.objective} | winner | gain in fresh starts | from the first | what it changes |",
        "|---|---|--:|--:|---|--:|---|",
        *(_progress_line(stage, found.first_value) for stage in found.stages),
    ]
    for stage in found.stages:
        lines += ["", f"## {stage.name}" + (f": {stage.why}" if stage.why else ""), *_stage_lines(stage)]
    claims = [(stage, claim) for stage in found.stages for claim in stage.claims]
    if claims:
        lines += ["", f"## What was said, and what is found{mark}"]
        lines += [line for stage, claim in claims for line in _claim_lines(stage, claim)]
    lines += ["", *_deploy_lines(found)]
    return "\n".join(lines)


def _progress_line(stage: Stage, first: float | None) -> str:
    overall = f"{stage.winner_value / first:.2f}x" if stage.winner_value and first else "-"
    gain = percent(stage.gain) if stage.gain else "-"
    changes = settings_text(stage.changes, stage.changes) if stage.changes else "nothing"
    kept = "" if stage.kept or not stage.changes else ", not kept"
    cells = [
        stage.name, stage.gpu or "CPU", _figure(stage.baseline_value), _figure(stage.winner_value), gain, overall,
        f"{changes}{kept}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _figure(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _stage_lines(stage: Stage) -> list[str]:
    where = f"{stage.model} on {stage.gpu or 'CPU'}, vLLM {stage.engine_version or '?'}, study {stage.study}"
    lines = [where + (" - SIMULATED" if stage.simulated else ""), f"{stage.headline[:1].upper()}{stage.headline[1:]}."]
    return lines + [f"- {_found_text(one)}" for one in stage.found]


def _found_text(one: Found) -> str:
    what = settings_text(one.flags, one.flags) if one.flags else "the base"
    over = "" if one.flags else " over the winner so far"
    change = f", {one.ratio - 1:+.1%}{over} ({_figure(one.value)})" if one.ratio is not None else ""
    text = f"{what}: {one.effect}{change}" if change or one.value is None else f"{what}: {_figure(one.value)}"
    text += f": {one.cause}" if one.cause else ""
    return text + (f". {one.hint}" if one.hint else "")


def _agreement(claim: Judged) -> str:
    return "open" if claim.agrees is None else "agrees" if claim.agrees else "differs"


def _claim_lines(stage: Stage, claim: Judged) -> list[str]:
    lines = [f'- {stage.name}: "{claim.said}": {_agreement(claim)}: {_found_text(claim.found)}']
    if claim.figures:
        beside = ", ".join(
            f"{name} {said:g}, here {_figure(claim.found.figures.get(name))}" for name, said in claim.figures.items()
        )
        lines.append(f"  said and found: {beside}")
    return lines + ([f"  {claim.note}"] if claim.note else [])


def _deploy_lines(found: Journey) -> list[str]:
    if found.deploy is None:
        return ["No configuration runs and meets the SLO."]
    head = "Deploy (SIMULATED: no server was measured):" if found.simulated else "Deploy:"
    whole = found.last_value / found.first_value if found.first_value and found.last_value else None
    share = f", {whole:.2f} times the first baseline" if whole is not None else ""
    return [f"{found.model} on {found.gpu}{share}.", head, f"  {found.script or found.command}"]
