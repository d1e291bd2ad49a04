"""`varcas validate`: an experiment checked without starting a server, by vLLM itself where it is installed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from varcas import hardware
from varcas.engine.fetch import weights_problem
from varcas.engine.node import Node, NodeFacts
from varcas.engine.probe import probe_python
from varcas.engine.validation import Checked, refusal
from varcas.errors import InputError, nearest
from varcas.experiment import Experiment
from varcas.known import find_model
from varcas.pruner import Pruner, gpu_at_best, site_of
from varcas.rules import Site
from varcas.space import ServingConfig, Space
from varcas.starts import check, located

CHECKED_AT_MOST = 200
"""Configurations of the space that are put to vLLM; a further one costs 3 ms, but a large space has millions."""


class Refused(BaseModel):
    """A configuration that vLLM refuses."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    flags: dict[str, JsonValue]
    over_serve: dict[str, JsonValue] = Field(description="what of them differs from `serve`; null: left out")
    error: str = Field(description="in vLLM's own words")
    message: str = Field(description="with file, line, flag and value")


class RuledOut(BaseModel):
    """What one rule of the roofline keeps from being started."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rule: str
    configurations: int
    message: str = Field(description="of the first, with the numbers")
    source: str = Field(description="file and symbol in vLLM, or a formula")


class Validated(BaseModel):
    """What is known of an experiment before anything starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    experiment: str
    engine_version: str | None = Field(description="of the vLLM that was asked; null when none is installed here")
    space_size: int | None = Field(description="configurations in the space; null when it is continuous")
    checked: int = Field(description="configurations put to vLLM")
    refused: list[Refused]
    baseline_ok: bool
    baseline_error: str | None = Field(description="in vLLM's own words")
    baseline_message: str | None = Field(description="with file, line, flag and value, as `varcas sweep` says it")
    ruled_out: list[RuledOut] = Field(description="by the roofline's rules, of a space of at most 100,000")
    nothing_left: str | None = Field(description="why a sweep would start nothing; null when something may work")
    notes: list[str] = Field(description="what is not wrong in itself: a GPU or a Python that is not here, no weights")


def validate(experiment: Experiment, on_note: Callable[[str], None] = lambda text: None) -> Validated:
    """Checks names, values and combinations.

    Args:
        experiment: what `varcas sweep` would run.
        on_note: told before vLLM is asked, which takes a while.

    Raises:
        InputError: an unknown flag, an empty space, a model directory that is not there.
    """
    space = check(experiment)
    node = Node(experiment.server, experiment.model, experiment.revision)
    try:
        with located(experiment):
            return _asked(experiment, space, node, on_note)
    finally:
        node.close()


def _asked(experiment: Experiment, space: Space, node: Node, on_note: Callable[[str], None]) -> Validated:
    has_vllm = node.has_vllm()
    facts = node.facts() if has_vllm else None
    pruner = Pruner(experiment, space, _site(experiment, facts))
    notes = [*_notes(experiment), *_baseline_note(experiment, space, pruner)]
    ruled_out, nothing_left = _ruled_out(pruner), pruner.nothing_left()
    if facts is None:
        return Validated(
            experiment=experiment.name,
            engine_version=None,
            space_size=space.size(),
            checked=0,
            refused=[],
            baseline_ok=True,
            baseline_error=None,
            baseline_message=None,
            ruled_out=ruled_out,
            nothing_left=nothing_left,
            notes=notes,
        )
    on_note("asking vLLM (about 15 s the first time)")
    version = facts.engine_version
    space.check_names(node.flag_names())

    def ask(config: ServingConfig) -> tuple[ServingConfig, Checked]:
        return config, node.check(config.argv(), experiment.workload.endpoint)

    baseline, checked = ask(space.config(experiment.baseline))
    configs = itertools.islice(space.configs(), CHECKED_AT_MOST) if space.size() is not None else ()
    answers = [ask(config) for config in configs]
    return Validated(
        experiment=experiment.name,
        engine_version=version,
        space_size=space.size(),
        checked=len(answers) + 1,
        refused=[
            Refused(
                flags=dict(config.flags),
                over_serve=space.over_serve(config),
                error=str(answer.error),
                message=f"{refusal(experiment, answer, version, config.flags, 'space')}.",
            )
            for config, answer in answers
            if not answer.ok
        ],
        baseline_ok=checked.ok,
        baseline_error=checked.error,
        baseline_message=None
        if checked.ok
        else f"{refusal(experiment, checked, version, baseline.flags, 'baseline')}.",
        ruled_out=ruled_out,
        nothing_left=nothing_left,
        notes=notes,
    )


def _site(experiment: Experiment, facts: NodeFacts | None) -> Site:
    """What the rules know here, where the GPU that is asked for may not be."""
    wanted, here = experiment.hardware.gpu, hardware.gpus()
    on_cpu = wanted == "cpu" or (wanted == "auto" and not here)
    there = wanted == "auto" or wanted in {gpu.kind for gpu in here}
    gpu = None if on_cpu else gpu_at_best(here[0].kind if wanted == "auto" else wanted, facts if there else None)
    config = _known_config(experiment) if facts is None else None
    most = None if on_cpu else experiment.hardware.count
    return site_of(experiment, facts, gpu, on_cpu=on_cpu, gpus_per_node=most, model_config=config)


def _known_config(experiment: Experiment) -> str | None:
    """Of a hub id too, where vLLM is not there to fetch it."""
    try:
        return json.dumps(find_model(experiment.model, experiment.revision).config)
    except InputError:  # not described, or found nowhere
        return None


def _ruled_out(pruner: Pruner) -> list[RuledOut]:
    survey = pruner.survey()
    if survey is None:
        return []
    return [
        RuledOut(rule=rule, configurations=count, message=survey.first[rule].message, source=survey.first[rule].source)
        for rule, count in survey.by_rule.items()
    ]


def _baseline_note(experiment: Experiment, space: Space, pruner: Pruner) -> Iterator[str]:
    if (refusal := pruner.says(space.config(experiment.baseline))) is not None:
        yield f"{experiment.place('baseline')}: rule {refusal.rule} says that it cannot work: {refusal.message}."


def _notes(experiment: Experiment) -> Iterator[str]:
    """What may be right elsewhere, or is known to go wrong only once a server starts."""
    e = experiment
    if problem := weights_problem(e.model, {**e.serve, **e.baseline}):
        yield f"{e.place('model')}: {problem}."
    elif "dummy" in (e.serve.get("load_format"), e.baseline.get("load_format")):
        yield f"{e.place('serve', 'load_format')}: dummy: random weights: timing is real, text is not."
    probed = probe_python(e.server.python)
    if e.server.python and probed.problem:
        yield f"{e.place('server', 'python')}: {probed.python}: not on this machine ({probed.problem})."
    elif probed.vllm_version is None:
        yield f"{e.place('server', 'python')}: {probed.python}: has no vLLM."
    if e.hardware.gpu not in ("auto", "cpu"):
        yield _gpu_note(e.hardware.gpu, e.place("hardware", "gpu"))


def _gpu_note(wanted: str, place: str) -> str:
    here = sorted({gpu.kind for gpu in hardware.gpus()})
    if wanted in here:
        return f"{place}: {wanted}: on this machine."
    there = f"it has {', '.join(here)}" if here else "it has no GPU"
    note = f"{place}: {wanted}: not on this machine ({there}): checked when the sweep starts."
    known = list(hardware.KINDS.values())
    if wanted in known:
        return note
    return f"{note} No GPU type that varcas knows.{nearest(wanted, ['cpu', *known])} Known: cpu, {', '.join(known)}."


def validated_text(answer: Validated) -> str:
    """The outcome in words: equal refusals once."""
    size = "continuous" if answer.space_size is None else f"{answer.space_size} configurations"
    if answer.engine_version is None:
        head = f"{answer.experiment}: well formed, space: {size}. No vLLM here: flags are checked on the first node."
        return "\n".join([head, *_rule_lines(answer), *_note_lines(answer)])
    lines = [f"{answer.experiment}: space: {size}; vLLM {answer.engine_version} was asked about {answer.checked}."]
    groups: dict[str, list[Refused]] = {}
    for refused in answer.refused:
        groups.setdefault(refused.error, []).append(refused)
    if answer.baseline_message is not None:
        same = len(groups.pop(answer.baseline_error or "", []))
        lines.append(answer.baseline_message + (f" {same} configurations of the space fail alike." if same else ""))
    lines += [f"{same[0].message} Refused: {_described(same)}." for same in groups.values()]
    if len(lines) == 1:
        lines.append("None was refused.")
    return "\n".join([*lines, *_rule_lines(answer), *_note_lines(answer)])


def _rule_lines(answer: Validated) -> list[str]:
    if answer.nothing_left is not None:
        return [f"Nothing would be started: {answer.nothing_left}"]
    return [
        f"Ruled out before any start: {out.configurations} by {out.rule}, for one: {out.message} [{out.source}]."
        for out in answer.ruled_out
    ]


def _note_lines(answer: Validated) -> list[str]:
    return [f"note: {note}" for note in answer.notes]


def _described(refused: list[Refused]) -> str:
    flags = " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in refused[0].over_serve.items())
    return flags if len(refused) == 1 else f"{len(refused)} configurations, the first {flags}"
