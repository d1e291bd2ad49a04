"""`varcas validate`: an experiment checked without starting a server, by vLLM itself where it is installed."""

from __future__ import annotations

import itertools

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas.engine.fetch import check_local_model
from varcas.engine.node import Node
from varcas.experiment import Experiment
from varcas.space import Space
from varcas.workload.schedule import check_workload

CHECKED_AT_MOST = 200
"""Configurations of the space that are put to vLLM; a further one costs 3 ms, but a large space has millions."""


class Refused(BaseModel):
    """A configuration that vLLM refuses, in its own words."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    flags: dict[str, JsonValue]
    error: str


class Validated(BaseModel):
    """What is known of an experiment before anything starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    experiment: str
    engine_version: str | None = Field(description="of the vLLM that was asked; null when none is installed here")
    space_size: int | None = Field(description="configurations in the space; null when it is continuous")
    checked: int = Field(description="configurations put to vLLM")
    refused: list[Refused]
    baseline_ok: bool
    baseline_error: str | None


def validate(experiment: Experiment) -> Validated:
    """Checks names, values and combinations.

    Raises:
        InputError: an unknown flag, an empty space, a model directory that is not there.
    """
    space = Space(experiment)
    check_local_model(experiment.model)
    check_workload(experiment.workload, experiment.serve)
    node = Node(experiment.server, experiment.model, experiment.revision)
    try:
        return _asked(experiment, space, node)
    finally:
        node.close()


def _asked(experiment: Experiment, space: Space, node: Node) -> Validated:
    if not node.has_vllm():
        return Validated(
            experiment=experiment.name,
            engine_version=None,
            space_size=space.size(),
            checked=0,
            refused=[],
            baseline_ok=True,
            baseline_error=None,
        )
    facts = node.facts()
    known = node.flag_names()
    space.check_names(known)
    baseline = node.check(space.config(experiment.baseline).argv(), experiment.workload.endpoint)
    configs = list(itertools.islice(space.configs(), CHECKED_AT_MOST)) if space.size() is not None else []
    answers = [(config, node.check(config.argv(), experiment.workload.endpoint)) for config in configs]
    return Validated(
        experiment=experiment.name,
        engine_version=facts.engine_version,
        space_size=space.size(),
        checked=len(answers) + 1,
        refused=[Refused(flags=dict(c.flags), error=str(a.error)) for c, a in answers if not a.ok],
        baseline_ok=baseline.ok,
        baseline_error=baseline.error,
    )


def validated_text(answer: Validated) -> str:
    """The outcome in words."""
    size = "continuous" if answer.space_size is None else f"{answer.space_size} configurations"
    if answer.engine_version is None:
        return f"{answer.experiment}: well formed, space: {size}. No vLLM here: flags are checked on the first node."
    lines = [f"{answer.experiment}: space: {size}; vLLM {answer.engine_version} was asked about {answer.checked}."]
    if not answer.baseline_ok:
        lines.append(f"baseline: refused: {answer.baseline_error}")
    lines += [f"refused: {refused.flags}: {refused.error}" for refused in answer.refused]
    return "\n".join(lines if len(lines) > 1 else [*lines, "None was refused."])
