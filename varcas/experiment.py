"""The experiment file: strict models, YAML with line numbers in every error, and the JSON Schema for editors."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from varcas.errors import InputError, nearest
from varcas.records import LATENCY_METRICS, RATE_METRICS, SLO_PRESETS

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
FLAG = re.compile(r"^[a-z][a-z0-9_]*$")
OWN_FLAGS = {
    "model": "set `model:` at the top of the file",
    "revision": "set `revision:` at the top of the file",
    "host": "varcas serves on loopback only",
    "port": "varcas chooses a free port for every server",
    "uds": "varcas talks to its servers over loopback",
    "api_key": "varcas makes a fresh key for every server",
    "served_model_name": "varcas names the model itself",
    "config": "write the flags under `serve:`, so that they are stored with the result",
}
"""Flags that varcas sets itself, and what to do instead."""

OBJECTIVES: dict[str, Literal["maximize", "minimize"]] = {
    **dict.fromkeys((*RATE_METRICS, "prompt_tokens_per_s"), "maximize"),
    **dict.fromkeys((*LATENCY_METRICS, "energy_j", "server_start_s"), "minimize"),
}
"""Metric to the direction in which it is better."""


ArrivalKind = Literal["poisson", "constant", "gamma", "ramp", "steps", "trace", "closed"]
ARRIVAL_SETTINGS = {"burstiness": "gamma", "to_rps": "ramp", "steps": "steps", "users": "closed"}
"""Setting to the kind of arrival that has it, and needs it."""


def _arrival_kind(entry: Any) -> str:
    return "name" if isinstance(entry, str) else "settings"


_LATENCY_FORM = "`ttft`, `tpot`, `itl` or `e2e` with `_mean`, `_p50`, `_p90`, `_p95`, `_p99` or `_p99_9` and `_ms`"


def _listed(direction: str) -> str:
    """The metrics that are better that way, without the latencies, which have a form."""
    return ", ".join(
        f"`{name}`" for name, way in OBJECTIVES.items() if way == direction and name not in LATENCY_METRICS
    )


class Hardware(BaseModel):
    """Which GPU, and how many the study may use; `auto` is what the Ray node has."""

    model_config = STRICT
    gpu: str = Field(default="auto", description="`auto`, `cpu`, or a GPU type such as T4, L4, A10G, A100, H100")
    count: int = Field(default=1, ge=1, description="GPUs the study may use at once")
    resource: str | None = Field(default=None, description="custom Ray resource that marks the nodes to use")


class Server(BaseModel):
    """The Python that has vLLM, its environment, and the deadline of each phase in seconds."""

    model_config = STRICT
    python: str | None = Field(default=None, description="path of the Python that has vLLM (default: this one)")
    env: dict[str, str] = Field(
        default_factory=dict, description="environment variables of the server; numbers are taken as text"
    )
    download_timeout_s: float = Field(default=3600, gt=0, description="to fetch the model, once a node")
    start_timeout_s: float = Field(default=1200, gt=0, description="spawn to the first real completion")
    stop_timeout_s: float = Field(default=15, gt=0, description="after SIGTERM, before SIGKILL")
    stall_timeout_s: float = Field(default=60, gt=0, description="no token for so long under load means hung")

    @field_validator("env", mode="before")
    @classmethod
    def _as_text(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            return env
        for name, value in env.items():
            if isinstance(value, bool):
                raise ValueError(f'{name}: {json.dumps(value)}: write the text that is meant, e.g. "{value:d}"')
        return {name: str(value) if isinstance(value, int | float) else value for name, value in env.items()}

    @field_validator("env")
    @classmethod
    def _no_secret(cls, env: dict[str, str]) -> dict[str, str]:
        if secret := [name for name in env if re.search(r"TOKEN|API_KEY|SECRET|PASSWORD", name.upper())]:
            raise ValueError(
                f"{secret[0]}: secrets are taken from the environment of the worker, never from the file, "
                "which is stored with every result"
            )
        return env


class Arrival(BaseModel):
    """When requests come. A bare name stands for a kind without settings: `arrival: constant`."""

    model_config = STRICT
    kind: ArrivalKind = Field(
        description="open loop: `poisson`, `constant`, `gamma` (bursts), `ramp`, `steps`, `trace` (times in `data`); "
        "closed loop: `closed`"
    )
    burstiness: float | None = Field(
        default=None, gt=0, description="of `gamma`: shape of the gaps; 1 is Poisson, less comes in bursts"
    )
    to_rps: float | None = Field(
        default=None, gt=0, description="of `ramp`: the rate at the window's end; linear from `rate_rps`"
    )
    steps: list[tuple[float, float]] | None = Field(
        default=None, min_length=1, description="of `steps`: pairs of a second in the window and the rate from then on"
    )
    users: int | None = Field(
        default=None, ge=1, description="of `closed`: how many; each waits for an answer, pauses, and asks again"
    )

    @model_validator(mode="after")
    def _own_settings(self) -> Self:
        for name, kind in ARRIVAL_SETTINGS.items():
            given = getattr(self, name) is not None
            if given and self.kind != kind:
                raise ValueError(f"{name}: is a setting of `{kind}`, not of `{self.kind}`")
            if not given and self.kind == kind:
                raise ValueError(f"{kind} needs `{name}`")
        if self.steps is not None:
            starts = [second for second, _ in self.steps]
            if starts[0] != 0 or starts != sorted(set(starts)) or any(rate < 0 for _, rate in self.steps):
                raise ValueError("steps: begin at second 0, in order, with rates of at least 0")
        return self


Arrivals = Annotated[
    Annotated[ArrivalKind, Tag("name")] | Annotated[Arrival, Tag("settings")], Discriminator(_arrival_kind)
]


class Workload(BaseModel):
    """The chat traffic: who asks, how often, for how long."""

    model_config = STRICT
    profile: str | dict[str, float] = Field(
        default="chat-medium",
        description="a built-in workload (docs/workloads.md): `chat-short`, `chat-medium`, `chat-long`, `multi-turn`, "
        "`shared-prefix`, `rag` or `code`; or several with their shares: `{chat-short: 3, rag: 1}`",
    )
    data: str | None = Field(
        default=None, description="your own requests in place of a profile: a CSV, JSONL, Parquet or JSON file"
    )
    rate_rps: float | None = Field(
        default=None, gt=0, description="mean arrivals per second (of conversations, where there are some); open loop"
    )
    duration_s: float = Field(default=120, gt=0, description="the measured window")
    warmup_s: float = Field(default=5, ge=0, description="load before the window, not measured")
    max_drain_s: float = Field(default=30, ge=0, description="after the window; what is left misses the SLO")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of arrivals, lengths and words")
    endpoint: Literal["auto", "chat", "completions"] = Field(
        default="auto",
        description="`auto` (chat when the model has a chat template, else completions), `chat` or `completions`",
    )
    arrival: Arrivals = Field(default="poisson", description="gaps between arrivals, or users in a closed loop")
    think_s: float | None = Field(
        default=None, ge=0, description="mean pause of a user before the next turn (default: the profile's)"
    )
    turns: float | None = Field(
        default=None, ge=1, description="mean number of a conversation's turns (default: the profile's)"
    )
    shared_prefix_tokens: int | None = Field(
        default=None, ge=0, description="tokens of a system prompt that requests share (default: the profile's)"
    )
    shared_prefixes: int | None = Field(
        default=None, ge=1, description="how many such system prompts there are (default: the profile's)"
    )
    max_tokens: int | None = Field(default=None, ge=2, description="longest prompt + output (default: what fits)")
    sampling: dict[str, JsonValue] = Field(
        default={"temperature": 0.0},
        description="sampling parameters sent with every request",
    )

    @property
    def arrives(self) -> Arrival:
        """When requests come, with its settings."""
        return Arrival(kind=self.arrival) if isinstance(self.arrival, str) else self.arrival

    @property
    def name(self) -> str:
        """Of the workload, for people: its profile, its mixture, or its file."""
        if self.data is not None:
            return Path(self.data).name
        return self.profile if isinstance(self.profile, str) else " + ".join(self.profile)

    @property
    def described(self) -> str:
        """Who asks how often, in words."""
        arrives = self.arrives
        if arrives.users is not None:
            return f"{self.name}, {arrives.users} users in a closed loop"
        pace = "at its own pace" if self.mean_rps is None else f"at {self.mean_rps:g} requests/s"
        return f"{self.name} {pace}" if arrives.kind in ("poisson", "trace") else f"{self.name} {pace} ({arrives.kind})"

    @property
    def mean_rps(self) -> float | None:
        """Mean arrivals per second over the window; None in a closed loop, and for a trace at its own pace."""
        arrives = self.arrives
        if arrives.to_rps is not None and self.rate_rps is not None:
            return (self.rate_rps + arrives.to_rps) / 2
        if arrives.steps is not None:
            starts = [min(second, self.duration_s) for second, _ in arrives.steps] + [self.duration_s]
            spans = [end - start for start, end in itertools.pairwise(starts)]
            return sum(span * rate for span, (_, rate) in zip(spans, arrives.steps, strict=True)) / self.duration_s
        return self.rate_rps

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        kind = self.arrives.kind
        if kind in ("steps", "closed") and self.rate_rps is not None:
            raise ValueError(f"rate_rps: `{kind}` sets the rate itself: take it out")
        if kind not in ("steps", "closed", "trace") and self.rate_rps is None:
            raise ValueError("rate_rps: missing: requests per second, e.g. rate_rps: 20")
        if kind == "trace" and self.data is None:
            raise ValueError("arrival: `trace` needs `data`: a file with times of arrival")
        if isinstance(self.profile, dict) and (not self.profile or min(self.profile.values()) <= 0):
            raise ValueError("profile: shares must be above 0, e.g. profile: {chat-short: 3, rag: 1}")
        if self.data is not None and self.turns is not None:
            raise ValueError("turns: the conversations in `data` have their own: take it out")
        if self.data is not None and self.shared_prefixes is not None and not self.shared_prefix_tokens:
            raise ValueError("shared_prefixes: say how long they are, e.g. shared_prefix_tokens: 1024")
        return self


class Objective(BaseModel):
    """Exactly one of `maximize` and `minimize`, with the metric's name."""

    model_config = STRICT
    maximize: str | None = Field(default=None, description=f"one of {_listed('maximize')}")
    minimize: str | None = Field(default=None, description=f"{_LATENCY_FORM}, or one of {_listed('minimize')}")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("give exactly one of `maximize` and `minimize`")
        direction = "maximize" if self.maximize else "minimize"
        if self.metric not in OBJECTIVES:
            raise ValueError(
                f"{self.metric!r} is no metric.{nearest(self.metric, OBJECTIVES)} Known: {', '.join(OBJECTIVES)}"
            )
        if OBJECTIVES[self.metric] != direction:
            raise ValueError(
                f"{self.metric} is better when {OBJECTIVES[self.metric]}d: write `{OBJECTIVES[self.metric]}:`"
            )
        return self

    @property
    def metric(self) -> str:
        """The column to optimise."""
        return self.maximize or self.minimize or ""

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """As Optuna spells it."""
        return "maximize" if self.maximize else "minimize"


class Study(BaseModel):
    """How much to spend, how to search, and where Optuna keeps its study."""

    model_config = STRICT
    trials: int = Field(default=30, ge=1, description="server starts of the search; confirmation starts come on top")
    sampler: str = Field(default="auto", description="`auto`, `tpe`, `random`, `gp`")
    repeats: int = Field(default=3, ge=0, description="fresh starts of baseline and winner each; 0: no confirmation")
    storage: str | None = Field(
        default=None,
        description="`journal:PATH`, `sqlite:///PATH` or `postgresql://...` (default: journal in `results`)",
    )
    seed: int = Field(default=0, ge=0, description="of the sampler")
    max_retries: int = Field(default=2, ge=0, description="of what is not the configuration's fault, each")
    prune: bool = Field(
        default=True, description="the roofline's rules keep configurations that cannot work from being started"
    )
    audit_frac: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="share of the configurations ruled out that is started all the same, to test the rules; at most "
        "this share of `trials`, rounded up, on top of them",
    )
    order: bool = Field(
        default=True,
        description="up to 3 of the first proposals follow the roofline's estimates, where it has some",
    )
    enqueue: list[dict[str, JsonValue]] = Field(
        default_factory=list, description="configurations to try first: flags over `serve`"
    )


class Range(BaseModel):
    """Numbers from `low` to `high`: integers when both are, else floats."""

    model_config = STRICT
    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False
    when: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.step is not None and (self.step <= 0 or self.log):
            raise ValueError("`step` must be positive, and does not go with `log`")
        if self.log and self.low <= 0:
            raise ValueError("`log` needs a positive `low`")
        return self


class Choices(BaseModel):
    """Any JSON values. A mapping among them may hold `{choices: [...]}` values itself: they are searched too."""

    model_config = STRICT
    choices: list[JsonValue] = Field(min_length=1)
    when: dict[str, JsonValue] | None = Field(
        default=None, description="searched only while these flags have these values (a list: any of them)"
    )

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: list[JsonValue]) -> list[JsonValue]:
        texts = [json.dumps(choice, sort_keys=True) for choice in choices]
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"{', '.join(twice)} stands twice")
        return choices


def _entry_kind(entry: Any) -> str | None:
    """Which of the two an entry is, so that an error speaks of that one alone."""
    if isinstance(entry, Choices | Range):
        return type(entry).__name__
    if not isinstance(entry, Mapping):
        return None
    return "Range" if {"low", "high"} & set(entry) else "Choices"


def _objective_kind(entry: Any) -> str:
    return "several" if isinstance(entry, list | tuple) else "one"


Flags = dict[str, JsonValue]
Place = tuple[str | int, ...]
SpaceEntry = Annotated[
    Annotated[Choices, Tag("Choices")] | Annotated[Range, Tag("Range")],
    Discriminator(
        _entry_kind,
        custom_error_type="space_entry",
        custom_error_message="an entry is `{choices: [...]}` or `{low: 1, high: 8}`",
    ),
]
Objectives = Annotated[
    Annotated[Objective, Tag("one")] | Annotated[list[Objective], Field(min_length=1), Tag("several")],
    Discriminator(_objective_kind),
]


def _flag_names(flags: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError: a name that is none, or is varcas's own."""
    for flag in flags:
        if flag in OWN_FLAGS:
            raise ValueError(f"{flag}: {OWN_FLAGS[flag]}")
        if not FLAG.match(flag):
            fixed = flag.strip("-").replace("-", "_").lower()
            raise ValueError(f"{flag}: no flag name: write {fixed} (underscores, no dashes)")
    return flags


class Simulation(BaseModel):
    """What a simulated engine cannot know by itself."""

    model_config = STRICT
    engine_version: str | None = Field(
        default=None, description="of vLLM to simulate (default: the one installed here, else 0.32.0)"
    )
    acceptance: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="probability that a drafted token is accepted: an assumption, no measurement",
    )
    start_sd_frac: float = Field(
        default=0.02, ge=0, description="standard deviation of a server start's own speed, as measured ones differ"
    )
    calibrate_from: list[str] = Field(
        default_factory=list, description="results directories whose measurements tell step times, beside `results`"
    )


class Claim(BaseModel):
    """What somebody said of a configuration, to be held against what is found."""

    model_config = STRICT
    said: str = Field(min_length=1, description="in the words of who said it")
    flags: Flags = Field(default_factory=dict, description="what it sets over the phase's base; none: the base itself")
    helps: bool | None = Field(default=None, description="whether it was said to help; null: it was said not to run")
    figures: dict[str, float] = Field(default_factory=dict, description="column of `trials` to the figure given")
    note: str | None = Field(default=None, description="what is known of it beside this study, with its source")


class Phase(BaseModel):
    """One step of a study: a space of its own, searched from the winner of the steps before."""

    model_config = STRICT
    name: str = Field(pattern=NAME, max_length=40, description="its study is NAME.PHASE")
    why: str | None = Field(default=None, description="in a sentence")
    model: str | None = Field(default=None, min_length=1, description="another one than the experiment's")
    revision: str | None = Field(default=None, description="of that")
    hardware: Hardware | None = Field(default=None, description="other than the experiment's")
    serve: Flags = Field(default_factory=dict, description="flags laid over the winner so far; null: left out")
    space: dict[str, SpaceEntry] = Field(default_factory=dict, description="flags to search")
    enqueue: list[Flags] = Field(default_factory=list, description="configurations to try first: flags over the base")
    trials: int | None = Field(default=None, ge=1, description="in place of `study.trials`")
    keep: bool = Field(default=True, description="its winner becomes the base of the next phases")
    claims: list[Claim] = Field(default_factory=list, description="what was said before, to be judged")
    _flag_names = field_validator("serve", "space")(_flag_names)

    @model_validator(mode="after")
    def _searches(self) -> Self:
        if not self.space and not self.enqueue:
            raise ValueError("space: is empty: a phase needs flags to search, or configurations in `enqueue`")
        return self


class Experiment(BaseModel):
    """An experiment file. `varcas schema` prints its JSON Schema."""

    model_config = STRICT
    name: str = Field(pattern=NAME, max_length=80, description="of the study: its rows and logs go by it")
    model: str = Field(
        min_length=1,
        description="hub id, or a local directory with `config.json`; a relative one is seen from the working "
        "directory, not from this file",
    )
    revision: str | None = Field(default=None, description="commit, branch or tag of a hub model")
    hardware: Hardware = Field(default_factory=Hardware, description="which GPUs")
    engine: Literal["vllm", "simulated"] = Field(
        default="vllm", description="what serves: real servers, or a model of them in virtual time (docs/simulated.md)"
    )
    server: Server = Field(default_factory=Server, description="how a server is started")
    serve: Flags = Field(default_factory=dict, description="fixed flags, spelled as vLLM spells them")
    baseline: Flags = Field(default_factory=dict, description="flags over `serve` of the configuration to beat")
    space: dict[str, SpaceEntry] = Field(default_factory=dict, description="flags to search")
    workload: Workload = Field(description="the traffic")
    slo: dict[str, float] = Field(
        default_factory=dict,
        description=f"upper limits, e.g. `ttft_p95_ms: 2000`: {_LATENCY_FORM}; or a preset: "
        + ", ".join(f"`{n}`" for n in SLO_PRESETS),
    )
    objective: Objectives = Field(
        default_factory=lambda: Objective(maximize="output_tokens_per_s"), description="a list means Pareto"
    )
    study: Study = Field(default_factory=Study, description="how much to spend, and how to search")
    phases: list[Phase] = Field(
        default_factory=list,
        description="in place of `space`: searched one after the other, each from the winner so far",
    )
    simulation: Simulation = Field(default_factory=Simulation, description="of `engine: simulated` alone")
    results: str = Field(default="results/", description="a local or shared path")
    _origin: str = PrivateAttr(default="")
    _lines: dict[Place, int] = PrivateAttr(default_factory=dict)

    _flag_names = field_validator("serve", "baseline", "space")(_flag_names)

    @field_validator("slo", mode="before", json_schema_input_type=dict[str, float] | str)
    @classmethod
    def _slo_preset(cls, slo: Any) -> Any:
        if not isinstance(slo, str):
            return slo
        if slo not in SLO_PRESETS:
            raise ValueError(f"no preset.{nearest(slo, SLO_PRESETS)} Known: {', '.join(SLO_PRESETS)}")
        return dict(SLO_PRESETS[slo])

    @field_validator("slo")
    @classmethod
    def _slo_keys(cls, slo: dict[str, float]) -> dict[str, float]:
        for key, limit in slo.items():
            if key not in LATENCY_METRICS:
                raise ValueError(
                    f"{key}: no latency limit.{nearest(key, LATENCY_METRICS)} "
                    "Allowed: ttft, tpot, itl, e2e, norm with _mean, _p50, _p90, _p95, _p99 or _p99_9 and _ms"
                )
            if not limit > 0:
                raise ValueError(f"{key}: {limit:g} must be above 0")
        return slo

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.phases and (self.space or self.study.enqueue):
            raise ValueError("phases: stand in place of `space` and `study.enqueue`: move those into the first phase")
        if twice := [p.name for at, p in enumerate(self.phases) if p.name in {q.name for q in self.phases[:at]}]:
            raise ValueError(f"phases: {twice[0]!r} stands twice: give each phase a name of its own")
        if both := sorted(set(self.serve) & set(self.space)):
            raise ValueError(f"{both[0]} stands both in `serve` and in `space`: take it out of one")
        if any(o.metric == "goodput_rps" for o in self.objectives) and not self.slo:
            raise ValueError("objective goodput_rps needs an `slo`: without one every request is good")
        return self

    def located(self, message: str) -> str:
        """A message that begins with the path of a key (`space.max_num_seqs.when: ...`), with file and line."""
        key, colon, _ = message.partition(": ")
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        known = colon and self._origin and path[0] in type(self).model_fields
        return f"{self._origin}:{line_of(path, self._lines)}: {message}" if known else message

    def place(self, *path: str | int) -> str:
        """`file.yaml:12: serve.max_num_seqs` for messages; without the file when it was made in Python."""
        field = ".".join(map(str, path))
        return f"{self._origin}:{line_of(path, self._lines)}: {field}" if self._origin else field

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """One, or several for a Pareto front."""
        return tuple(self.objective) if isinstance(self.objective, list) else (self.objective,)


def load_experiment(path: str | Path) -> Experiment:
    """Reads and checks an experiment file; relative paths in it stay relative to the working directory.

    Raises:
        InputError: with file, line, field, value, what is allowed and the nearest right spelling.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}. Give the path of an experiment file (YAML).") from error
    return parse_experiment(text, str(path))


def parse_experiment(text: str, origin: str = "<experiment>") -> Experiment:
    """Checks the text of an experiment file; `origin` names it in errors. Raises as `load_experiment`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(node, ())) if node else {}
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{origin}:{line}: not valid YAML: {error.problem}") from error
    except _DuplicateKeyError as error:
        raise InputError(f"{origin}:{error.line}: {error.key}: stands twice; keep one.") from error
    if not isinstance(data, dict):
        raise InputError(
            f"{origin}:1: an experiment is a mapping with `name`, `model`, `workload`, ...; see `varcas init`"
        )
    try:
        experiment = Experiment.model_validate_json(json.dumps(data))
        experiment._origin, experiment._lines = origin, lines
        return experiment
    except TypeError as error:
        raise InputError(
            f"{origin}: {error}: quote the value; only text, numbers, true, false and null are allowed"
        ) from error
    except ValidationError as error:
        details = [detail for detail in error.errors() if not _is_misspelling(detail, error.errors())]
        messages = dict.fromkeys(_message(detail, lines, origin) for detail in details)
        raise InputError("\n".join(messages)) from error


def workload_of(data: Mapping[str, Any], origin: str) -> Workload:
    """Checks a workload that is not from a file; `origin` names it in errors. Raises InputError."""
    try:
        return Workload.model_validate_json(json.dumps(data))
    except ValidationError as error:
        inner = [{**detail, "loc": ("workload", *detail["loc"])} for detail in error.errors()]
        raise InputError("\n".join(_message(detail, {}, origin) for detail in inner)) from error  # type: ignore[arg-type]


def parse_value(text: str) -> Any:
    """A value as the file has it, given on the command line. Raises InputError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r}: not valid YAML: {error}") from error


class _DuplicateKeyError(Exception):
    def __init__(self, line: int, key: str) -> None:
        super().__init__(key)
        self.line, self.key = line, key


def _lines(node: yaml.Node, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Yields (path, line from 1) of every key and list item."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise _DuplicateKeyError(key.start_mark.line + 1, ".".join(map(str, (*path, key.value))))
            seen.add(key.value)
            yield from _lines(value, (*path, key.value))
            yield (*path, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*path, index))


def line_of(path: tuple[str | int, ...], lines: Mapping[Place, int]) -> int:
    """The line of the longest known prefix of `path`."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


WORDS = {
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} letters",
    "string_pattern_mismatch": "must be letters, digits, `.`, `_` and `-`, and begin with a letter or a digit",
    "model_type": "must be a mapping: `key: value`, one a line, indented",
    "dict_type": "must be a mapping: `key: value`, one a line, indented",
    "list_type": "must be a list: `[..., ...]`",
    "string_type": "must be text: write it in quotes",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt}",
}
"""Pydantic's error types in our words; `_message` adds file, line and value."""

TAG_AT: dict[Place, int] = {("space",): 2, ("objective",): 1, ("workload", "arrival"): 2}
"""Where pydantic puts the tag of a union into the location of an error below that key."""
MODELS: dict[Place, type[BaseModel]] = {
    (): Experiment,
    ("hardware",): Hardware,
    ("server",): Server,
    ("workload",): Workload,
    ("workload", "arrival"): Arrival,
    ("objective",): Objective,
    ("study",): Study,
    ("simulation",): Simulation,
    ("phases",): Phase,
    ("phases", "hardware"): Hardware,
    ("phases", "claims"): Claim,
}


def _place(detail: ErrorDetails) -> tuple[str | int, ...]:
    """The error's location in the file."""
    loc = detail["loc"]
    if _is_number_of_a_union(detail):
        loc = loc[:-1]
    at = next((at for below, at in TAG_AT.items() if loc[: len(below)] == below), len(loc))
    return (*loc[:at], *loc[at + 1 :])


def _is_number_of_a_union(detail: ErrorDetails) -> bool:
    """`int | float` gives an error for each of the two, with the type's name at the end of its location."""
    return detail["type"] in ("int_type", "float_type") and detail["loc"][-1] in ("int", "float")


def _is_misspelling(missing: ErrorDetails, others: Sequence[ErrorDetails]) -> bool:
    """A key that is missing because it stands there misspelt: the other error says so already."""
    return missing["type"] == "missing" and any(
        other["type"] == "extra_forbidden"
        and other["loc"][:-1] == missing["loc"][:-1]
        and nearest(str(other["loc"][-1]), [str(missing["loc"][-1])])
        for other in others
    )


def _message(detail: ErrorDetails, lines: Mapping[Place, int], origin: str) -> str:
    loc, text = _place(detail), detail["msg"].removeprefix("Value error, ")
    key, colon, rest = text.partition(": ")
    key = key.strip("'")
    if colon and ((*loc, key) in lines or key in _known_keys(loc)):  # a validator of ours that names the key at fault
        loc, text = (*loc, key), rest
    field, at = ".".join(map(str, loc)) or "experiment", f"{origin}:{line_of(loc, lines)}" if lines else origin
    if detail["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        return f"{at}: {field}: unknown key.{nearest(str(loc[-1]), known)} Known here: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{at}: {field}: missing. Add it; `varcas schema` describes it, `varcas init` writes a whole file."
    given = detail["input"]
    if detail["type"] == "space_entry":
        text += f", e.g. {loc[-1]}: {{choices: {json.dumps(given if isinstance(given, list) else [given])}}}"
    value = "" if isinstance(given, dict | list) else f"{json.dumps(given, default=str)}: "
    kind = "float_type" if _is_number_of_a_union(detail) else detail["type"]
    said = WORDS[kind].format(**detail.get("ctx", {})) if kind in WORDS else text
    return f"{at}: {field}: {value}{said.replace('Input should', 'should')}"


def _known_keys(loc: Place) -> list[str]:
    if loc and loc[0] == "space":
        return ["choices", "low", "high", "step", "log", "when"]
    names = tuple(part for part in loc if isinstance(part, str))
    return list(MODELS[names].model_fields) if names in MODELS else []
