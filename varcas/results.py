"""What a store holds, for people and scripts: `varcas.Results("results")`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcas.errors import InputError, nearest
from varcas.experiment import Experiment
from varcas.records import TrialRow
from varcas.report import Recommendation, recommend
from varcas.store import Store

if TYPE_CHECKING:
    import pyarrow as pa


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
        scripts = self.path / "studies" / name
        answer = recommend(self._store.rows(name), self.experiment(name))
        file = "start_vllm_optimized.sh" if answer.changes else "start_vllm.sh"
        found = str(scripts / file) if (scripts / file).exists() and answer.deploy is not None else None
        return answer.model_copy(update={"script": found})

    def sql(self, query: str) -> pa.Table:
        """Runs DuckDB SQL over the views `trials`, `requests` and `samples`.

        Raises:
            InputError: in DuckDB's words.
        """
        return self._store.sql(query)

    def storage(self, study: str | None = None) -> str:
        """Where Optuna keeps the study, as `study.storage` has it."""
        experiment = self.experiment(study)
        return experiment.study.storage or f"journal:{self.path / 'study.log'}"

    def _named(self, study: str | None) -> str:
        names = self.studies()
        if study is not None:
            if study not in names:
                there = ", ".join(names) or "none"
                raise InputError(f"study {study!r}: not in {self.path}.{nearest(study, names)} There: {there}.")
            return study
        if len(names) == 1:
            return names[0]
        if not names:
            raise InputError(f"{self.path}: holds no study yet. Run `varcas sweep EXPERIMENT`.")
        raise InputError(f"STUDY: {self.path} holds several: {', '.join(names)}. Name one.")


def trial_text(row: TrialRow) -> str:
    """One trial in words: what it is, what it measured or why it failed, how to reproduce it."""
    head = f"trial {row.number} of {row.study} ({row.purpose}{' ' + row.arm if row.arm else ''}): {row.state}"
    lines = [head + (" - SIMULATED" if row.simulated else "")]
    if row.failure_kind or row.reason_rule:
        lines += [
            f"  {row.reason_rule or row.failure_kind}: {row.failure_detail}",
            f"  what to do: {row.failure_hint}" if row.failure_hint else "",
        ]
    if row.invalid_reasons:
        lines.append(f"  not to be believed: {'; '.join(row.invalid_reasons)}")
    lines += [f"  warning: {warning}" for warning in row.warnings]
    lines += ["", "flags:", *(f"  {name}: {text}" for name, text in sorted(row.flags.items()))]
    lines += ["", *_numbers(row)]
    if row.command:
        lines += ["", "reproduce:", f"  {row.command}"]
    if row.log_path:
        lines += ["", f"server log: {row.log_path}"]
    return "\n".join(line for line in lines if line is not None)


def _numbers(row: TrialRow) -> list[str]:
    skipped = {"number", "attempt", "seed", "measurement_version"}
    shown: list[tuple[str, Any]] = [
        (name, getattr(row, name))
        for name, field in TrialRow.model_fields.items()
        if name not in skipped and field.annotation in (float | None, int | None, bool | None)
    ]
    lines = [f"  {name}: {_number(found)}" for name, found in shown if found is not None]
    return ["measured:", *lines] if lines else []


def _number(found: float | int | bool) -> str:
    if isinstance(found, bool):
        return "yes" if found else "no"
    return str(found) if isinstance(found, int) else f"{found:.4g}" if abs(found) < 1e4 else f"{found:.0f}"
