"""What may be proposed: the search space as Optuna sees it, and `ServingConfig`, one way to start a server."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import JsonValue, ValidationError

from varcas.errors import InputError, nearest
from varcas.experiment import FLAG, OWN_FLAGS, Choices, Experiment, Range

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
SIMULATED_GUARD = (
    "",
    'if [ "${VARCAS_SIMULATED_OK:-}" != 1 ]; then',
    '  echo "$0: SIMULATED: no server was ever measured with these flags. Measure them, or set'
    ' VARCAS_SIMULATED_OK=1" >&2',
    "  exit 1",
    "fi",
)
"""Of a start script whose flags come from a simulated engine."""
PARALLEL_FLAGS = tuple(f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data"))
MAX_CONDITIONS = 10**6
"""Combinations of values that conditions (`when`) may depend on: they are counted one by one."""

Label = str | int | float | bool
Params = dict[str, JsonValue]
Flags = dict[str, JsonValue]

_ENTRY_KEYS = {"choices", "low", "high"}
_LONGEST_LABEL = 40


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """One way to start a server. A flag that is None is left out, as if it had not been named.

    Attributes:
        model: hub id or local directory.
        revision: of a hub model.
        flags: vLLM's flags with underscores, without model, revision, host, port and API key.
    """

    model: str
    revision: str | None
    flags: Mapping[str, JsonValue]

    def __post_init__(self) -> None:
        kept = {name: self.flags[name] for name in sorted(self.flags) if self.flags[name] is not None}
        object.__setattr__(self, "flags", kept)

    @property
    def hash(self) -> str:
        """Content hash of the flags. Key order does not matter; 1, 1.0 and true are three different values."""
        return hashlib.sha256(_text(dict(self.flags)).encode()).hexdigest()[:32]

    @property
    def num_gpus(self) -> int:
        """GPUs that a server of this configuration takes.

        Raises:
            InputError: a parallel size that is no positive integer.
        """
        return math.prod(_gpus_of(flag, self.flags.get(flag, 1)) for flag in PARALLEL_FLAGS)

    def argv(self, *, placed: bool = False) -> list[str]:
        """Arguments of the server, sorted by flag; without host, port and API key. `placed`: good in any directory."""
        model = self.placed_model() if placed else self.model
        return [word for words in self._arguments(model) for word in words]

    def placed_model(self) -> str:
        """A model directory as a path that holds in any directory; a hub id as it is."""
        path = Path(self.model).expanduser()
        return str(path.resolve()) if path.is_dir() else self.model

    def command(self, python: str, env: Mapping[str, str] | None = None) -> str:
        """The shell command that starts this server with `python` and `env`, from any directory."""
        return " ".join([*_assignments(env or {}), shlex.join([python, "-m", SERVER_MODULE, *self.argv(placed=True)])])

    def start_script(
        self,
        python: str = "python",
        vllm_version: str | None = None,
        port: int = 8000,
        comments: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        simulated: bool = False,
    ) -> str:
        """A bash script that starts this server. It holds no secret: vLLM reads VLLM_API_KEY from the environment.

        Args:
            python: the Python that has vLLM; PYTHON names another.
            vllm_version: that it has, for the message where there is no such Python.
            port: default of SERVE_PORT.
            comments: lines for its head.
            env: environment variables that the server was measured with.
            simulated: no server was measured: the script says so and starts nothing unless it is forced to.
        """
        notes = [f"# {line}".rstrip() for comment in comments for line in comment.splitlines() or [""]]
        exports = [f"export {assignment}" for assignment in _assignments(env or {})]
        arguments = [f"  {shlex.join(words)}" for words in self._arguments(self.placed_model())]
        wanted = f"vLLM {vllm_version}" if vllm_version else "vLLM"
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                *notes,
                "# From the environment: SERVE_HOST, SERVE_PORT, PYTHON, VLLM_API_KEY (clients must then send it).",
                "# Further arguments of this script go to the server.",
                "set -euo pipefail",
                *(SIMULATED_GUARD if simulated else ()),
                "",
                f"python={shlex.quote(python)}",
                'python="${PYTHON:-$python}"',
                'if ! command -v -- "$python" >/dev/null; then',
                f'  echo "$0: there is no $python here: set PYTHON to one with {wanted}" >&2',
                "  exit 1",
                "fi",
                *exports,
                "args=(",
                *arguments,
                ")",
                f'exec "$python" -m {SERVER_MODULE} "${{args[@]}}" \\',
                f'  --host "${{SERVE_HOST:-127.0.0.1}}" --port "${{SERVE_PORT:-{port}}}" "$@"',
                "",
            ]
        )

    def _arguments(self, model: str) -> list[list[str]]:
        """Words of the command line, a list for each flag."""
        named: list[tuple[str, JsonValue]] = [("model", model), ("revision", self.revision), *self.flags.items()]
        return [_words(name, value) for name, value in named if value is not None]


def server_python(experiment: Experiment) -> str:
    """Absolute path of the Python that starts the servers; not resolved: a virtual environment's is a link."""
    return os.path.abspath(os.path.expanduser(experiment.server.python or sys.executable))


def _assignments(env: Mapping[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(value)}" for name, value in sorted(env.items())]


def _words(flag: str, value: JsonValue) -> list[str]:
    name = flag.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(flag_word, value)]
    word = flag_word(value)
    return [f"--{name}={word}"] if word.startswith("-") else [f"--{name}", word]


def flag_word(value: JsonValue) -> str:
    """A flag's value as a word of a command line: text as it is, all else as JSON."""
    return value if isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    """JSON, the same for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _same(one: JsonValue, other: JsonValue) -> bool:
    """Equal as JSON: Python holds 1, 1.0 and True for equal."""
    return _text(one) == _text(other)


class Suggest(Protocol):
    """Chooses a value for each named parameter; Optuna's trial does, behind an adapter in `study.py`."""

    def categorical(self, name: str, labels: Sequence[Label]) -> Label:
        """One of `labels`."""

    def integer(self, name: str, low: int, high: int, step: int, log: bool) -> int:
        """A number from `low` to `high`, both included."""

    def number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        """A number from `low` to `high`, both included."""


class Given:
    """A `Suggest` that gives what is known.

    Raises:
        KeyError: it is asked for something else.
    """

    def __init__(self, params: Params) -> None:
        self._params = params

    def categorical(self, name: str, labels: Sequence[Label]) -> Label:
        """As known."""
        return cast(Label, self._params[name])

    def integer(self, name: str, low: int, high: int, step: int, log: bool) -> int:
        """As known."""
        return cast(int, self._params[name])

    def number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        """As known."""
        return cast(float, self._params[name])


class Drawn:
    """A `Suggest` that draws at random, evenly in the logarithm where the range is one."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def categorical(self, name: str, labels: Sequence[Label]) -> Label:
        """One of `labels`."""
        return self._rng.choice(labels)

    def integer(self, name: str, low: int, high: int, step: int, log: bool) -> int:
        """A number from `low` to `high`, both included."""
        return self._rng.randrange(low, high + 1, step)

    def number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        """A number from `low` to `high`, both included."""
        if log:
            return min(max(math.exp(self._rng.uniform(math.log(low), math.log(high))), low), high)
        return self._rng.uniform(low, high)


# A value of the space is a tree: fixed values, numbers, picks among options, and mappings of these. Each node can
# draw a value, match a given one (the inverse), list its alternatives, and count them.


@dataclass(frozen=True, slots=True)
class _Fixed:
    value: JsonValue

    def draw(self, suggest: Suggest, params: Params) -> JsonValue:
        return self.value

    def match(self, value: JsonValue) -> Params | None:
        return {} if _same(value, self.value) else None

    def alternatives(self) -> Iterator[tuple[Params, JsonValue]]:
        yield {}, self.value

    def size(self) -> int | None:
        return 1


@dataclass(frozen=True, slots=True)
class _Integer:
    name: str
    low: int
    high: int
    step: int
    log: bool

    def draw(self, suggest: Suggest, params: Params) -> JsonValue:
        params[self.name] = value = suggest.integer(self.name, self.low, self.high, self.step, self.log)
        return value

    def match(self, value: JsonValue) -> Params | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return {self.name: value} if value in range(self.low, self.high + 1, self.step) else None

    def alternatives(self) -> Iterator[tuple[Params, JsonValue]]:
        for value in range(self.low, self.high + 1, self.step):
            yield {self.name: value}, value

    def size(self) -> int | None:
        return (self.high - self.low) // self.step + 1


@dataclass(frozen=True, slots=True)
class _Real:
    name: str
    low: float
    high: float
    step: float | None
    log: bool

    def draw(self, suggest: Suggest, params: Params) -> JsonValue:
        drawn = suggest.number(self.name, self.low, self.high, self.step, self.log)
        params[self.name] = value = self._tidy(drawn)
        return value

    def match(self, value: JsonValue) -> Params | None:
        if not isinstance(value, float) or not self.low <= value <= self.high:
            return None
        return {self.name: value} if self._tidy(value) == value else None

    def alternatives(self) -> Iterator[tuple[Params, JsonValue]]:
        for index in range(self.size() or 0):
            value = self._at(index)
            yield {self.name: value}, value

    def size(self) -> int | None:
        if self.low == self.high:
            return 1
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def _tidy(self, drawn: float) -> float:
        """On the grid where there is one, else to 6 digits: 0.85, not 0.8500000000000001."""
        if self.low == self.high:
            return self.low
        if self.step is not None:
            return self._at(round((drawn - self.low) / self.step))
        return min(max(float(f"{drawn:.6g}"), self.low), self.high)

    def _at(self, index: int) -> float:
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step or 0)))


@dataclass(frozen=True, slots=True)
class _Pick:
    name: str
    labels: tuple[Label, ...]
    options: tuple[_Node, ...]

    def draw(self, suggest: Suggest, params: Params) -> JsonValue:
        label = suggest.categorical(self.name, self.labels)
        index = next(i for i, known in enumerate(self.labels) if _same(known, label))
        params[self.name] = self.labels[index]
        return self.options[index].draw(suggest, params)

    def match(self, value: JsonValue) -> Params | None:
        for label, option in zip(self.labels, self.options, strict=True):
            if (inner := option.match(value)) is not None:
                return {self.name: label, **inner}
        return None

    def alternatives(self) -> Iterator[tuple[Params, JsonValue]]:
        for label, option in zip(self.labels, self.options, strict=True):
            for inner, value in option.alternatives():
                yield {self.name: label, **inner}, value

    def size(self) -> int | None:
        sizes = [option.size() for option in self.options]
        return None if None in sizes else sum(size or 0 for size in sizes)


@dataclass(frozen=True, slots=True)
class _Mapping:
    items: tuple[tuple[str, _Node], ...]

    def draw(self, suggest: Suggest, params: Params) -> JsonValue:
        return {key: node.draw(suggest, params) for key, node in self.items}

    def match(self, value: JsonValue) -> Params | None:
        if not isinstance(value, dict) or set(value) != {key for key, _ in self.items}:
            return None
        params: Params = {}
        for key, node in self.items:
            inner = node.match(value[key])
            if inner is None:
                return None
            params |= inner
        return params

    def alternatives(self) -> Iterator[tuple[Params, JsonValue]]:
        yield from _combined(self.items)

    def size(self) -> int | None:
        sizes = [node.size() for _, node in self.items]
        return None if None in sizes else math.prod(size or 0 for size in sizes)


_Node = _Fixed | _Integer | _Real | _Pick | _Mapping


def _combined(items: Sequence[tuple[str, _Node]]) -> Iterator[tuple[Params, dict[str, JsonValue]]]:
    """Every combination of the alternatives of `items`, one at a time."""
    if not items:
        yield {}, {}
        return
    *first, (key, node) = items
    for params, value in _combined(first):
        for inner, chosen in node.alternatives():
            yield {**params, **inner}, {**value, key: chosen}


@dataclass(frozen=True, slots=True)
class _Dimension:
    """A flag of the space: its values, and the values of other flags under which it is searched."""

    flag: str
    node: _Node
    when: dict[str, tuple[JsonValue, ...]]


class Space:
    """What the search may propose for an experiment.

    Args:
        experiment: whose space it is.
        may_be_empty: nothing is to be searched.

    Raises:
        InputError: a space that cannot be searched, with field, value and fix.
    """

    def __init__(self, experiment: Experiment, *, may_be_empty: bool = False) -> None:
        self.experiment = experiment
        _check_enqueued(experiment)
        _check_parallel_sizes(experiment)
        if not experiment.space and not experiment.study.enqueue and not may_be_empty:
            raise InputError("space: is empty: add flags to search, e.g. max_num_seqs: {choices: [8, 64, 256]}.")
        dimensions = {flag: _dimension(flag, entry) for flag, entry in experiment.space.items()}
        self._dimensions = _ordered(dimensions, experiment.serve)
        self._check_conditions()
        self._size = self._count()

    def propose(self, suggest: Suggest) -> tuple[Params, Flags]:
        """Draws a configuration: what was chosen by parameter name, and the flags over `serve` that this means."""
        params: Params = {}
        flags: Flags = {}
        for dimension in self._dimensions:
            if self._active(dimension, flags):
                flags[dimension.flag] = dimension.node.draw(suggest, params)
        return params, flags

    def flags_of(self, params: Params) -> Flags:
        """The flags over `serve` that `params` mean; `propose` made both."""
        return self.propose(Given(params))[1]

    def config(self, flags: Mapping[str, JsonValue]) -> ServingConfig:
        """`serve` with `flags` over it."""
        e = self.experiment
        return ServingConfig(e.model, e.revision, {**e.serve, **flags})

    def over_serve(self, config: ServingConfig) -> Flags:
        """The inverse of `config`: flags that differ from `serve`; None for one that is left out."""
        serve, flags = self.config({}).flags, config.flags
        return {key: flags.get(key) for key in sorted({*serve, *flags}) if not _same(serve.get(key), flags.get(key))}

    def params_of(self, flags: Mapping[str, JsonValue]) -> Params | None:
        """The inverse of `propose` for all flags of a configuration; None when it lies outside of the space."""
        params: Params = {}
        found: Flags = {}
        for dimension in self._dimensions:
            if self._active(dimension, found):
                value = flags.get(dimension.flag)
                inner = dimension.node.match(value)
                if inner is None:
                    return None
                params |= inner
                found[dimension.flag] = value
        whole = ServingConfig(self.experiment.model, self.experiment.revision, flags)
        return params if self.config(found).hash == whole.hash else None

    def size(self) -> int | None:
        """Configurations in the space; None when it is continuous, 0 when only enqueued ones are to be tried."""
        return self._size

    def points(self) -> Iterator[tuple[Params, Flags]]:
        """Every configuration of a finite space, once: parameters, and flags over `serve`.

        Raises:
            ValueError: the space is continuous.
        """
        if self._size is None:
            raise ValueError("a continuous space cannot be listed")
        if self._dimensions:
            yield from self._points(self._dimensions)

    def configs(self) -> Iterator[ServingConfig]:
        """As `points`, as configurations."""
        return (self.config(flags) for _, flags in self.points())

    def check_names(self, known: Iterable[str]) -> None:
        """Checks every flag that the experiment names against those that the installed vLLM has.

        Raises:
            InputError: unknown flags, each with file, line and the nearest right spelling.
        """
        e, known = self.experiment, list(known)
        enqueued = [(("study", "enqueue", i), list(flags)) for i, flags in enumerate(e.study.enqueue)]
        named = [(("serve",), list(e.serve)), (("baseline",), list(e.baseline)), (("space",), list(e.space)), *enqueued]
        wrong = []
        for path, flags in named:
            for flag in flags:
                try:
                    check_flags([flag], known, python=server_python(e))
                except InputError as error:
                    wrong.append(f"{e.place(*path, flag)}: {str(error).removeprefix(f'{flag}: ')}")
        if wrong:
            raise InputError("\n".join(wrong))

    def _active(self, dimension: _Dimension, flags: Mapping[str, JsonValue]) -> bool:
        if not dimension.when:
            return True
        values = {**self.experiment.serve, **flags}
        return all(
            any(_holds(values.get(flag), wanted) for wanted in allowed) for flag, allowed in dimension.when.items()
        )

    def _points(self, dimensions: Sequence[_Dimension]) -> Iterator[tuple[Params, Flags]]:
        """Every assignment to `dimensions`, whose conditions name only flags that stand before them."""
        if not dimensions:
            yield {}, {}
            return
        *first, last = dimensions
        for params, flags in self._points(first):
            if not self._active(last, flags):
                yield params, flags
                continue
            for inner, value in last.node.alternatives():
                yield {**params, **inner}, {**flags, last.flag: value}

    def _controllers(self, dimensions: Iterable[_Dimension]) -> list[_Dimension]:
        """The flags that the conditions of `dimensions` hang on, directly or through others, in order."""
        known = {dimension.flag: dimension for dimension in self._dimensions}
        wanted: set[str] = set()
        todo = [flag for dimension in dimensions for flag in dimension.when]
        while todo:
            flag = todo.pop()
            if flag in known and flag not in wanted:
                wanted.add(flag)
                todo += known[flag].when
        return [dimension for dimension in self._dimensions if dimension.flag in wanted]

    def _check_conditions(self) -> None:
        controllers = self._controllers(self._dimensions)
        for dimension in controllers:
            if dimension.node.size() is None:
                raise InputError(
                    f"space.{dimension.flag}: is continuous, and a `when` hangs on it: give it choices or a step."
                )
        combinations = math.prod(dimension.node.size() or 1 for dimension in controllers)
        if combinations > MAX_CONDITIONS:
            raise InputError(
                f"space: `when` hangs on {combinations} combinations of {', '.join(d.flag for d in controllers)}, "
                f"at most {MAX_CONDITIONS} are allowed: give these flags fewer choices."
            )
        for dimension in self._dimensions:
            self._check_values(dimension)
        for dimension in self._dimensions:
            before = self._controllers([dimension])
            if not any(self._active(dimension, flags) for _, flags in self._points(before)):
                raise InputError(
                    f"space.{dimension.flag}.when: {_text(dimension.when)}: these never hold together, so "
                    f"{dimension.flag} would never be searched. Change its `when`, or take it out."
                )

    def _check_values(self, dimension: _Dimension) -> None:
        """Each value in a condition must be able to occur."""
        known = {other.flag: other for other in self._dimensions}
        for flag, allowed in dimension.when.items():
            if flag in known:
                values = [value for _, value in known[flag].node.alternatives()]
                values += [None] if known[flag].when else []
            else:
                values = [self.experiment.serve[flag]]
            for wanted in allowed:
                if not any(_holds(value, wanted) for value in values):
                    there = ", ".join(_text(value) for value in values[:20])
                    raise InputError(
                        f"space.{dimension.flag}.when.{flag}: {_text(wanted)}: never occurs. {flag} has: {there}."
                    )

    def _count(self) -> int | None:
        if not self._dimensions:
            return 0
        if any(dimension.node.size() is None for dimension in self._dimensions):
            return None
        controllers = self._controllers(self._dimensions)
        rest = [dimension for dimension in self._dimensions if dimension not in controllers]
        return sum(
            math.prod(dimension.node.size() or 0 for dimension in rest if self._active(dimension, flags))
            for _, flags in self._points(controllers)
        )


def distance(one: Mapping[str, JsonValue], other: Mapping[str, JsonValue]) -> float:
    """How far two proposals lie apart: 1 for each parameter that differs, less for numbers that are close."""
    return sum(_apart(one.get(name), other.get(name)) for name in {*one, *other})


def _apart(one: JsonValue, other: JsonValue) -> float:
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int | float):
        return 0.0 if _same(one, other) else 1.0
    if not isinstance(other, int | float) or one <= 0 or other <= 0:
        return 0.0 if one == other else 1.0
    doublings = abs(math.log2(one / other))
    return doublings / (1 + doublings)


def check_flags(flags: Iterable[str], known: Iterable[str], *, python: str = "python") -> None:
    """Checks names against those that the vLLM of `python` has.

    Raises:
        InputError: unknown flags, each with the nearest right spelling.
    """
    names = {_plain(name) for name in known}
    wrong = [_unknown(flag, names, python) for flag in flags if flag not in names]
    if wrong:
        raise InputError("\n".join(wrong))


def _plain(flag: str) -> str:
    return flag.strip().lstrip("-").replace("-", "_").lower()


def _unknown(flag: str, names: set[str], python: str) -> str:
    plain = _plain(flag)
    head = f"{flag}: the installed vLLM has no such flag."
    if plain in OWN_FLAGS:
        return f"{flag}: {OWN_FLAGS[plain]}."
    if plain in names:
        return f"{head} Write {plain}."
    for wrong, right in (("no_", ""), ("disable_", "enable_"), ("no_enable_", "enable_")):
        positive = right + plain.removeprefix(wrong)
        if plain.startswith(wrong) and positive in names:
            return f"{head} Write {positive}: false."
    if plain.startswith("enable_") and (negative := "disable_" + plain.removeprefix("enable_")) in names:
        return f"{head} It has {negative}, which means the opposite."
    return f"{head}{nearest(plain, names)} `{shlex.quote(python)} -m {SERVER_MODULE} --help=all` lists them."


def _holds(value: JsonValue, wanted: JsonValue) -> bool:
    """Whether a flag's value is the one that a condition asks for; a mapping is named by its method or some keys."""
    if isinstance(value, dict) and isinstance(wanted, str):
        return value.get("method") == wanted
    if isinstance(value, dict) and isinstance(wanted, dict):
        return all(key in value and _holds(value[key], inner) for key, inner in wanted.items())
    return _same(value, wanted)


def _check_parallel_sizes(experiment: Experiment) -> None:
    """Raises InputError for a size that is no number of GPUs, before any is counted on."""
    e = experiment
    named = [e.serve, e.baseline, *e.study.enqueue]
    for flag in PARALLEL_FLAGS:
        entry = e.space.get(flag)
        sizes = [flags[flag] for flags in named if flags.get(flag) is not None]
        sizes += [choice for choice in entry.choices if choice is not None] if isinstance(entry, Choices) else []
        for size in sizes:
            _gpus_of(flag, size)


def _gpus_of(flag: str, size: JsonValue) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"{flag}: {_text(size)}: must be an integer from 1, the number of GPUs it spreads over.")
    return size


def _check_enqueued(experiment: Experiment) -> None:
    for index, flags in enumerate(experiment.study.enqueue):
        for flag in flags:
            if flag in OWN_FLAGS:
                raise InputError(f"study.enqueue.{index}: {flag}: {OWN_FLAGS[flag]}.")
            if not FLAG.match(flag):
                raise InputError(f"study.enqueue.{index}: {flag!r} is no flag name: write {_plain(flag)}.")


def _ordered(dimensions: Mapping[str, _Dimension], serve: Mapping[str, JsonValue]) -> list[_Dimension]:
    """Dimensions in the order of the file, but each after those that its `when` names."""
    for dimension in dimensions.values():
        for flag in dimension.when:
            if flag not in dimensions and flag not in serve:
                there = [name for name in (*dimensions, *serve) if name != dimension.flag]
                raise InputError(
                    f"space.{dimension.flag}.when: {flag!r}: is in neither `space` nor `serve`.{nearest(flag, there)} "
                    f"There: {', '.join(there) or 'no other flag'}."
                )
    waiting, done = dict(dimensions), list[_Dimension]()
    while waiting:
        free = next((d for d in waiting.values() if not any(flag in waiting for flag in d.when)), None)
        if free is None:
            circle = " and ".join(waiting)
            raise InputError(f"space: `when` of {circle} hang on each other in a circle: take one of these `when` out.")
        done.append(waiting.pop(free.flag))
    return done


def _dimension(flag: str, entry: Choices | Range) -> _Dimension:
    when = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in (entry.when or {}).items()}
    return _Dimension(flag, _entry_node(flag, f"space.{flag}", entry), when)


def _entry_node(name: str, path: str, entry: Choices | Range) -> _Node:
    """The node of `{choices: ...}` or `{low: ..., high: ...}`; `name` is its parameter's, `path` is for errors."""
    if isinstance(entry, Range):
        return _range_node(name, entry)
    labels = _labels(entry.choices)
    options = tuple(
        _node(f"{name}.{_step_name(label, index)}", f"{path}.choices.{index}", choice)
        for index, (label, choice) in enumerate(zip(labels, entry.choices, strict=True))
    )
    node = _Pick(name, labels, options)
    _check_overlap(path, node)
    return node


def _check_overlap(path: str, node: _Pick) -> None:
    """Two choices must not lead to one value, or a configuration would be counted and proposed twice."""
    size = node.size()
    if size is None or size > MAX_CONDITIONS or all(isinstance(option, _Fixed) for option in node.options):
        return
    seen: set[str] = set()
    for _, value in node.alternatives():
        text = _text(value)
        if text in seen:
            raise InputError(f"{path}.choices: {text}: two choices lead to this value; take it out of one.")
        seen.add(text)


def _range_node(name: str, entry: Range) -> _Node:
    low, high, step = entry.low, entry.high, entry.step
    if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
        stride = step or 1
        return _Integer(name, low, low + (high - low) // stride * stride, stride, entry.log)
    if step is None:
        return _Real(name, float(low), float(high), None, entry.log)
    steps = (Decimal(str(high)) - Decimal(str(low))) // Decimal(str(step))
    return _Real(name, float(low), float(Decimal(str(low)) + steps * Decimal(str(step))), float(step), entry.log)


def _node(name: str, path: str, value: JsonValue) -> _Node:
    """The node of any JSON value, in which mappings with `choices` or `low` and `high` are searched."""
    if isinstance(value, list):
        _check_unsearched(path, value)
        return _Fixed(value)
    if not isinstance(value, dict):
        return _Fixed(value)
    if _ENTRY_KEYS & set(value):
        return _entry_node(name, path, _parsed_entry(path, value))
    items = tuple((key, _node(f"{name}.{key}", f"{path}.{key}", inner)) for key, inner in value.items())
    return _Fixed(value) if all(isinstance(node, _Fixed) for _, node in items) else _Mapping(items)


def _parsed_entry(path: str, value: dict[str, JsonValue]) -> Choices | Range:
    kind = Range if {"low", "high"} & set(value) else Choices
    try:
        entry: Choices | Range = kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join([path, *map(str, detail["loc"])])
        raise InputError(f"{where}: {_text(value)}: {detail['msg'].removeprefix('Value error, ')}") from error
    if entry.when is not None:
        raise InputError(f"{path}.when: is for flags; what stands inside of a choice is searched while that is chosen.")
    return entry


def _check_unsearched(path: str, value: JsonValue) -> None:
    if isinstance(value, dict) and _ENTRY_KEYS & set(value):
        raise InputError(f"{path}: {_text(value)}: nothing is searched inside of a list: give whole lists as choices.")
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    for item in inner:
        _check_unsearched(path, item)


def _labels(choices: Sequence[JsonValue]) -> tuple[Label, ...]:
    """Names of the choices as people read them; no two are equal, in Python's eyes either (1 == True)."""
    short = [_label(choice) for choice in choices]
    if len(set(short)) == len(short):
        return tuple(short)
    return tuple(_text(choice) for choice in choices)


def _label(choice: JsonValue) -> Label:
    if choice is None:
        return "none"
    if isinstance(choice, str | int | float):
        return choice
    if isinstance(choice, dict) and isinstance(method := choice.get("method"), str):
        return method
    return _text(choice)


def _step_name(label: Label, index: int) -> str:
    """A choice's part in the name of a parameter inside of it."""
    text = str(label)
    return text if len(text) <= _LONGEST_LABEL and not set(text) & set('{}[]",') else f"choice{index + 1}"
