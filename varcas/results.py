"""What a store holds, for people and scripts: `varcas.Results("results")`."""

from __future__ import annotations

import dataclasses
import datetime
import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from varcas.effects import Effects, effects
from varcas.errors import InputError, nearest
from varcas.experiment import Experiment
from varcas.export import Deployment, recommended, trial_deployment
from varcas.pruner import is_pruned
from varcas.records import ASIDE, LATENCIES, LATENCY_METRICS, STATISTICS, RequestRecord, Sample, TrialRow
from varcas.report import DASH_NOTE, Recommendation, as_text, find, limit_text, limits_of, recommend
from varcas.store import Store

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    import pyarrow as pa


KEPT = ("better", "no_baseline")
"""Verdicts after which a phase's winner is what the next phase begins from."""
ANYWAY = "ruled out before any start; to start it all the same: `study: {prune: false}`, or the command below"
UNSORTABLE = (list[str], dict[str, str], dict[str, float])


class Results:
    """Reads a results directory; never writes, needs no lock, works while a sweep runs.

    Args:
        path: the directory that `varcas sweep` wrote.

    Raises:
        InputError: nothing is there.
    """

    def __init__(self, path: str | Path = "results") -> None:
        self.path = Path(path)
        if not (self.path / "trials").is_dir():
            raise InputError(
                f"--results: {str(self.path)!r}: holds no results. Give the directory that `varcas sweep` wrote, "
                "or the experiment file."
            )
        self._store = Store(self.path, readonly=True)

    def studies(self) -> list[str]:
        """Names of the studies in this store."""
        return self._store.study_names()

    def trials(self, study: str | None = None, *, sort: str | None = None) -> list[TrialRow]:
        """Rows of one study in order of their number, or sorted by a column (`-column`: largest first).

        Raises:
            InputError: no such study or column.
        """
        rows = self._store.rows(self._named(study))
        if sort is None:
            return sorted(rows, key=lambda row: row.number)
        column = sort.removeprefix("-")
        if column not in TrialRow.model_fields or TrialRow.model_fields[column].annotation in UNSORTABLE:
            raise InputError(f"--sort: {column!r}: no such column.{nearest(column, TrialRow.model_fields)}")
        present = [row for row in rows if getattr(row, column) is not None]
        absent = [row for row in rows if getattr(row, column) is None]
        return sorted(present, key=lambda row: getattr(row, column), reverse=sort.startswith("-")) + absent

    def trial(self, number: int, study: str | None = None) -> TrialRow:
        """The latest row of one trial.

        Raises:
            InputError: no such trial.
        """
        rows = self.trials(study)
        for row in reversed(rows):
            if row.number == number:
                return row
        numbers = f"0 to {rows[-1].number}" if rows else "none yet"
        raise InputError(f"N: {number}: no such trial in {self._named(study)!r}. There: {numbers}.")

    def experiment(self, study: str | None = None) -> Experiment:
        """The experiment as it was last run."""
        saved = self._store.study(self._named(study))
        if saved is None:
            raise InputError(f"study {self._named(study)!r}: its experiment is not in {self.path}/studies.")
        return Experiment.model_validate_json(json.dumps(saved["experiment"]))

    def recommend(self, study: str | None = None) -> Recommendation:
        """What to deploy, from the rows in the store."""
        name = self._named(study)
        scripts = self.directory_of(name)
        saved = self._store.study(name) or {}
        told = {key: saved[key] for key in ("ended", "ruled_out", "rules_off") if key in saved}
        answer = recommend(self._searched(name), self.experiment(name), **told)
        file = "start_vllm_optimized.sh" if answer.changes else "start_vllm.sh"
        found = str(scripts / file) if (scripts / file).exists() and answer.deploy is not None else None
        return answer.model_copy(update={"script": found})

    def effects(self, study: str | None = None) -> Effects:
        """What each flag does to the objective, over all that a study measured."""
        name = self._named(study)
        return effects(self._store.rows(name), self.experiment(name))

    def requests(self, row: TrialRow) -> list[RequestRecord]:
        """Every request of a trial, as recorded."""
        return self._store.requests(row.trial_id)

    def samples(self, row: TrialRow) -> list[Sample]:
        """Every look at the server and the GPU of a trial."""
        return self._store.samples(row.trial_id)

    def directory_of(self, study: str) -> Path:
        """Where a study's scripts and reports are."""
        return self.path / "studies" / study

    def deployment(self, study: str | None = None, trial: int | None = None) -> Deployment | None:
        """What to deploy, or one trial's configuration; None when nothing can be deployed.

        Raises:
            InputError: no such study or trial.
        """
        name = self._named(study)
        if trial is not None:
            return trial_deployment(self.trial(trial, name), self.experiment(name))
        return recommended(self._store.rows(name), self.experiment(name))

    def phases(self, name: str) -> list[str]:
        """Studies of an experiment's phases (`NAME.PHASE`), in the order in which they began; empty without any."""
        if name in self.studies():
            return []
        begun: dict[str, datetime.datetime] = {}
        for row in self._store.rows():
            if row.study.startswith(f"{name}."):
                begun[row.study] = min(begun.get(row.study, row.started_at), row.started_at)
        return sorted(begun, key=begun.__getitem__)

    def phase_deployments(self, name: str) -> list[Deployment]:
        """What each phase has to deploy, named by it; the first baseline before, the whole experiment's answer last."""
        phases = self.phases(name)
        if not phases:
            return []
        first = self.experiment(phases[0])
        baseline = find(self._store.rows(phases[0]), first).baseline
        made: dict[str, Deployment | None] = {"": trial_deployment(baseline, first) if baseline else None}
        made |= {phase.removeprefix(f"{name}."): self.deployment(phase) for phase in phases}
        made["optimized"] = self.deployment(self._deciding(phases))
        return [dataclasses.replace(found, role=role) for role, found in made.items() if found is not None]

    def _deciding(self, phases: list[str]) -> str:
        """The phase whose answer is that of the whole: the last that beat what it began from, else the first.

        A phase of another model or GPU compares, and decides nothing.
        """
        sites = {phase: (e.model, e.hardware.gpu) for phase in phases for e in (self.experiment(phase),)}
        own = [phase for phase in phases if sites[phase] == sites[phases[0]]]
        kept = [phase for phase in own if self.recommend(phase).verdict in KEPT]
        return kept[-1] if kept else phases[0]

    def sql(self, query: str) -> pa.Table:
        """Runs DuckDB SQL over the views `trials`, `requests` and `samples`.

        Raises:
            InputError: in DuckDB's words.
        """
        return self._store.sql(query)

    def dashboard(self, study: str | None = None, *, port: int = 8080) -> WSGIServer:
        """A server of optuna-dashboard over this store, loopback only; it shows rows that arrive while it runs.

        Raises:
            InputError: optuna-dashboard is not installed.
        """
        from varcas.study import Beside, dashboard_server

        name = self._named(study)

        def beside() -> Beside:
            found = sorted(self.directory_of(name).rglob("*"))
            return Beside(
                html.escape(as_text(self.recommend(name)), quote=False), tuple(path for path in found if path.is_file())
            )

        return dashboard_server(self.experiment(name), lambda: self._searched(name), port, beside)

    def _searched(self, name: str) -> list[TrialRow]:
        """Rows of the search, without those of `varcas batch-size` and `capacity`."""
        return [row for row in self._store.rows(name) if row.purpose not in ASIDE]

    def _named(self, study: str | None) -> str:
        names = self.studies()
        if study is not None:
            if study not in names and (phases := self.phases(study)):
                return self._deciding(phases)
            if study not in names:
                there = ", ".join(names) or "none"
                raise InputError(f"study {study!r}: not in {self.path}.{nearest(study, names)} There: {there}.")
            return study
        if len(names) == 1:
            return names[0]
        if not names:
            raise InputError(f"{self.path}: holds no study yet. Run `varcas sweep EXPERIMENT`.")
        raise InputError(f"STUDY: {self.path} holds several: {', '.join(names)}. Name one.")


RATES = (
    "output_tokens_per_s",
    "output_tokens_per_s_lo",
    "output_tokens_per_s_hi",
    "prompt_tokens_per_s",
    "request_rate_rps",
    "goodput_rps",
    "capacity_rps",
    "rate_rps",
    "delivered_rate_rps",
    "duration_s",
    "saturated",
)
REQUESTS = ("num_requests", "num_completed", "num_failed", "num_unfinished")
TIMING = (
    "fetch_s",
    "server_start_s",
    "compile_s",
    "compile_cache_hit",
    "warmup_s",
    "load_s",
    "drain_s",
    "stop_s",
    "overhead_s",
)
NO_FIGURES = {"number", "attempt", "seed", "measurement_version", "simulated", "measured_live", "valid", "slo_met"}


def trial_text(row: TrialRow, slo: Mapping[str, float] | None = None) -> str:
    """One trial in words: what it is, what it measured or why it failed, how to reproduce it.

    Args:
        row: the trial's.
        slo: the study's limits.
    """
    head = f"trial {row.number} of {row.study} ({row.purpose}{' ' + row.arm if row.arm else ''}): {row.state}"
    lines = [head + (" - SIMULATED" if row.simulated else "")]
    if row.failure_kind or row.reason_rule:
        lines.append(f"  {row.reason_rule or row.failure_kind}: {row.failure_detail}")
        lines += [f"  what to do: {row.failure_hint}"] if row.failure_hint else []
        lines += [f"  {ANYWAY}"] if is_pruned(row) else []
    if row.audited_rule:
        lines.append(f"  started although rule {row.audited_rule} says it cannot work, to test that rule")
    if row.stopped_early:
        lines.append(f"  {row.stopped_early}")
    elif row.invalid_reasons:
        lines.append(f"  not to be believed: {'; '.join(row.invalid_reasons)}")
    lines += [f"  warning: {warning}" for warning in row.warnings]
    lines += ["", "flags:", *(f"  {name}: {text}" for name, text in sorted(row.flags.items()))]
    lines += _measured(row, slo or {})
    if row.command:
        lines += ["", "reproduce:", f"  {row.command}"]
    if row.log_path:
        lines += ["", f"server log: {row.log_path}"]
    return "\n".join(lines)


def _measured(row: TrialRow, slo: Mapping[str, float]) -> list[str]:
    """Every figure of a row, in groups; of a row that is not complete, what it came to: no zeros."""
    grouped = {*RATES, *REQUESTS, *TIMING, *LATENCY_METRICS, "ttft_sent_mean_ms"}
    rest = [
        name
        for name, field in TrialRow.model_fields.items()
        if name not in grouped | NO_FIGURES and field.annotation in (float | None, int | None, bool | None)
    ]
    loaded = row.num_requests is not None
    lines = [f"  {limit_text(limit)}" for limit in limits_of(row.constraints, slo)]
    lines = ["", "SLO:", *lines] if lines else []
    lines += _group("rates", row, RATES) + _latency(row) + _group("requests", row, REQUESTS) if loaded else []
    lines += _group("timing", row, TIMING) + _group("server and GPU", row, rest)
    until = {"failed": "until it failed:", "stopped": "until it was stopped:"}.get(row.state)
    return ["", until, *lines] if lines and until else lines


def _group(title: str, row: TrialRow, names: Iterable[str]) -> list[str]:
    whole = row.state == "complete"
    shown = [(name, found) for name in names if (found := getattr(row, name)) is not None and (whole or found)]
    return ["", f"{title}:", *(f"  {name}: {_number(found)}" for name, found in shown)] if shown else []


def _latency(row: TrialRow) -> list[str]:
    """A line a latency, a column a statistic."""
    lines = ["", "latency in ms:", "  " + " " * 4 + "".join(f"{stat:>9}" for stat in STATISTICS)]
    cells = {name: [getattr(row, f"{name}_{stat}_ms") for stat in STATISTICS] for name in LATENCIES}
    for name, found in cells.items():
        lines.append(f"  {name:4}" + "".join(f"{'-' if cell is None else _number(cell):>9}" for cell in found))
    if row.ttft_sent_mean_ms is not None:
        lines.append(f"  ttft from the send, mean: {_number(row.ttft_sent_mean_ms)}")
    return lines + ([f"  {DASH_NOTE}"] if any(None in found for found in cells.values()) else [])


def _number(found: float | int | bool) -> str:
    if isinstance(found, bool):
        return "yes" if found else "no"
    return str(found) if isinstance(found, int) else f"{found:.4g}" if abs(found) < 1e4 else f"{found:.0f}"
