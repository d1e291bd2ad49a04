"""What other studies in the store are worth to this one: copies that count at once, and configurations to try first."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from varcas.engine.failures import RETRIED
from varcas.experiment import Experiment
from varcas.metrics import constraints_of, summarise
from varcas.records import LoadResult, RequestRecord, Sample, TrialRow
from varcas.space import ServingConfig, Space

NUM_SEEDED = 2
"""Of the first proposals, from what was best under other conditions; the others are the estimates' and chance's."""
LEAST_COMPARED = 3
"""Configurations of a study that must have been measured for the best of them to mean something."""

Key = Callable[[ServingConfig], str]
Told = Callable[[str], Mapping[str, float] | None]
"""The SLO of a study, by its name; None where it is not known."""
Requests = Callable[[str], tuple[Sequence[RequestRecord], Sequence[Sample]]]


def same_conditions(
    rows: Iterable[TrialRow], experiment: Experiment, space: Space, key: Key, *, answered: Iterable[str] = ()
) -> list[tuple[TrialRow, dict[str, object]]]:
    """Rows of other studies that measured a configuration of this one's space under the same conditions.

    Conditions are what `trial_key` hashes: model and revision, GPU, engine and version, environment, workload and its
    seed, version of the measurement. Of several rows of a configuration the latest good one counts. The baseline is
    always measured anew: what it comes to now says whether the machine is what it was.

    Args:
        rows: of the store.
        experiment: this one.
        space: of it.
        key: `trial_key` of a configuration, as this study would have it.
        answered: content hashes that this study has rows of.

    Returns:
        Rows with the parameters that they have in this space.
    """
    done = {*answered, space.config(experiment.baseline).hash}
    found: dict[str, tuple[TrialRow, dict[str, object]]] = {}
    for row in sorted(rows, key=lambda row: row.started_at):
        if row.study == experiment.name or row.config_hash in done or not _tells(row):
            continue
        flags = row.config_flags
        params = space.params_of(flags)
        if params is None or key(ServingConfig(experiment.model, experiment.revision, flags)) != row.trial_key:
            continue
        if row.state == "complete" or row.config_hash not in found:
            found[row.config_hash] = (row, dict(params))
    return list(found.values())


def _tells(row: TrialRow) -> bool:
    """It says something of its configuration for good, and is no copy itself."""
    good = row.is_believed
    failed = row.state == "failed" and row.failure_kind not in RETRIED
    aside = row.simulated or row.measured_live or row.warm_from is not None or row.purpose == "load"
    return (good or failed) and not aside


def copied(
    row: TrialRow, params: Mapping[str, object], experiment: Experiment, number: int, slo: Told, requests: Requests
) -> TrialRow | None:
    """A row as one of this study, which says where it came from; None where its SLO cannot be judged.

    Under another SLO, limits and goodput are computed anew from the requests that the store holds.
    """
    columns: dict[str, object] = {
        "study": experiment.name,
        "number": number,
        "trial_id": hashlib.sha256(f"warm:{experiment.name}:{row.trial_id}".encode()).hexdigest(),
        "purpose": "search",
        "arm": None,
        "attempt": 0,
        "params_json": json.dumps(params, sort_keys=True),
        "audited_rule": None,
        "warm_from": f"{row.study}/{row.number}",
    }
    if row.state == "complete" and dict(slo(row.study) or {"unknown": 0.0}) != experiment.slo:
        records, samples = requests(row.trial_id)
        if not records:
            return None
        columns |= _judged(row, records, samples, experiment)
    return TrialRow(**{**row.model_dump(), **columns})


def _judged(
    row: TrialRow, records: Sequence[RequestRecord], samples: Sequence[Sample], experiment: Experiment
) -> dict[str, object]:
    load = LoadResult(tuple(records), 0.0, row.duration_s or 0.0, row.drain_s or 0.0, row.client_cpu_frac or 0.0)
    kind = experiment.workload.arrives.kind
    goodput = {
        name: value
        for name, value in summarise(load, experiment.slo, samples, arrival=kind).items()
        if name in ("goodput_rps", "goodput_tokens_per_s")
    }
    return {**goodput, **constraints_of(load, experiment.slo)}


def best_elsewhere(rows: Iterable[TrialRow], experiment: Experiment, space: Space) -> list[ServingConfig]:
    """Configurations of this space that were best for the same model under other conditions, the best first.

    Each study, GPU, version and workload is a context; a configuration's worth is the mean, over contexts, of its
    share of the context's best. Only the order of proposals follows: another machine's figures say nothing of this one.
    """
    objective = experiment.objectives[0]
    contexts: dict[tuple[object, ...], dict[str, tuple[float, TrialRow]]] = defaultdict(dict)
    for row in rows:
        value = getattr(row, objective.metric)
        other = row.study == experiment.name or row.model != experiment.model or row.simulated
        if other or row.state != "complete" or row.valid is False or row.slo_met is False or not value:
            continue
        context = (row.study, row.gpu_name, row.engine_version, row.workload_json)
        contexts[context][row.config_hash] = (value, row)
    worth: dict[str, list[float]] = defaultdict(list)
    flags: dict[str, ServingConfig] = {}
    for measured in contexts.values():
        if len(measured) < LEAST_COMPARED:
            continue
        values = [value for value, _ in measured.values()]
        best = max(values) if objective.direction == "maximize" else min(values)
        for key, (value, row) in measured.items():
            config = ServingConfig(experiment.model, experiment.revision, row.config_flags)
            if space.params_of(config.flags) is not None:
                worth[key].append(value / best if objective.direction == "maximize" else best / value)
                flags[key] = config
    ranked = sorted(worth, key=lambda key: (-statistics.fmean(worth[key]), key))
    return [flags[key] for key in ranked[:NUM_SEEDED]]
