"""Prompts with exact lengths in the server's own tokens, counted with the chat template in place.

First a vocabulary of atoms: short words, each of which the server counts as one token, at the start of a message and
after a space. A prompt is then as many atoms, drawn from the request's seed, as its length leaves after the template.
Every prompt is counted by the server, and mended by an atom more or fewer until the count is exact.

The template is what a message costs beyond its words, so the shortest prompt is template + 1: a request that asks for
less gets that (a chat template of 40 tokens cannot be sent in 20), with its output cut to what then fits.

A shared system prompt is made once, exact in its own tokens, and is the same text for all who share it; system, user's
text and template together are the prompt's length. A later turn's text is exact in its own tokens: its history holds
what the server will really answer. Texts of one's own are sent as they are, and counted; those that do not fit the
server are left out, with the turns that follow them.

No two prompts of a schedule begin with the same two atoms: only the template and what is shared on purpose (system
prompts, a trace's blocks) can be found in a prefix cache.

Where a server has no `/tokenize`, a count costs it a request for one token (`tokens.UsageCounter`). Then atoms are
common words, confirmed in bulk; of the prompts a sample is counted, and where that is not exact as it stands, more of
them, up to 512. The others are as long as their words say. What they really cost stands in every record:
`prompt_tokens` is the server's `usage`, `scheduled_prompt_tokens` is ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import operator
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from varcas.errors import VarcasError
from varcas.records import Prompted, ScheduledRequest
from varcas.workload.conversation import BLOCK_TOKENS, MIN_OUTPUT_TOKENS, TURN_TEMPLATE_TOKENS
from varcas.workload.tokens import Connections, Counter, digest, find_counter
from varcas.workload.vocabulary import Vocabulary, find_atoms
from varcas.workload.wire import Endpoint, Target

FITTING_VERSION = 2
"""Part of the cache's keys: raised when the same schedule gives other texts."""

Fitted = tuple[Prompted, ...]
SystemKey = tuple[int | None, int, str | None]

MAX_MENDS = 16
SAMPLE = 16
"""Prompts that are counted in any case where counting costs the server a request each."""
MAX_COUNTED = 512
MATTERS = operator.attrgetter(
    *(field.name for field in dataclasses.fields(ScheduledRequest) if field.name not in ("at_s", "gap_s"))
)
"""What of a request its words depend on."""


def fit_prompts(
    target: Target, requests: Sequence[ScheduledRequest], *, endpoint: Endpoint, cache_dir: Path | None
) -> Fitted:
    """Gives each request its prompt, exact to the token where the server counts.

    Args:
        target: a server that answers.
        requests: the schedule.
        endpoint: decides whether a chat template is in place.
        cache_dir: where fitted prompts are kept for the next server with the same tokenizer; made if need be.

    Returns:
        The requests in order, each with its prompt; `prompt_tokens` is raised to the shortest that the template allows.
        Texts of one's own that do not fit are left out, and the others numbered anew.

    Raises:
        VarcasError: the server does not count, or not so that a length can be met, or a request does not fit it.
    """
    with Connections(target) as connections:
        counter = find_counter(connections, target, endpoint)
        key = digest(FITTING_VERSION, counter.fingerprint)

        def make() -> dict[str, Any]:
            if all(request.prompt is not None and request.prefix_seed is None for request in requests):
                vocabulary = Vocabulary((), 0)  # all words are there
            else:
                atoms = _cached(
                    cache_dir, digest("atoms", key), lambda: dataclasses.asdict(find_atoms(counter, connections))
                )
                vocabulary = Vocabulary(tuple(atoms["words"]), atoms["template_tokens"])
            return {"made": _Fitting(counter, connections, vocabulary).run(requests)}

        made = _cached(cache_dir, digest("prompts", key, list(map(MATTERS, requests))), make)["made"]
    return _linked(requests, made)


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """A text to be: its length, what of that is not its own words, its first words, and where the rest comes from."""

    what: str
    wanted: int
    base_tokens: int
    words: list[str]
    rest: Iterator[str]
    count: Callable[[str], int]


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """A text, and how long it is.

    Attributes:
        text: its words.
        num_tokens: as the server counts it, or, where that was spared, as its words say.
        as_drafted: the first count was the one wanted.
    """

    text: str
    num_tokens: int
    as_drafted: bool = True


class _Fitting:
    """Makes the prompts of one schedule for one server."""

    def __init__(self, counter: Counter, connections: Connections, vocabulary: Vocabulary) -> None:
        self._counter, self._connections, self._vocabulary = counter, connections, vocabulary
        self._systems: dict[SystemKey, str | None] = {}
        self._base_tokens: dict[str | None, int] = {None: vocabulary.template_tokens}
        self._blocks: dict[int, list[str]] = {}

    def run(self, requests: Sequence[ScheduledRequest]) -> list[tuple[int, int, int, str, str | None]]:
        """Returns position, prompt tokens, output tokens, text and system prompt of each request that fits."""
        self._make_systems(requests)
        drawn = [position for position, request in enumerate(requests) if request.prompt is None]
        drafts = dict(zip(drawn, self._drafts(requests), strict=True))
        texts = dict(zip(drafts, self._fit(list(drafts.values())), strict=True))
        own = [position for position, request in enumerate(requests) if request.prompt is not None]
        counts = dict(zip(own, self._count([requests[position] for position in own]), strict=True))
        room = _Room(self._counter.max_model_len)
        made = []
        for position, request in enumerate(requests):
            if position in texts:
                text, prompt_tokens = texts[position].text, texts[position].num_tokens
                output_tokens: int | None = room.left_by(request, prompt_tokens, request.output_tokens)
            else:
                text, (prompt_tokens, answer_tokens) = request.prompt or "", counts[position]
                output_tokens = room.left_by(request, prompt_tokens, answer_tokens)
            if output_tokens is not None:
                system = None if request.turn else self._systems[_system_key(request)]  # it stands in the history
                made.append((position, prompt_tokens, output_tokens, text, system))
        if requests and not made:
            raise VarcasError(
                f"none of the {len(requests)} requests fits the {self._counter.max_model_len} tokens that the server "
                "takes: raise `max_model_len`, or give shorter texts"
            )
        return made

    def _make_systems(self, requests: Iterable[ScheduledRequest]) -> None:
        """Makes each shared system prompt once, and asks what a message behind it costs beyond its words."""
        keys = dict.fromkeys(map(_system_key, requests))
        drafts = {
            (seed, num_tokens): _Draft(
                "a system prompt", num_tokens, 0, [], self._vocabulary.draw(f"prefix {seed} {num_tokens}"),
                self._counter.text,
            )
            for seed, num_tokens, _ in keys
            if seed is not None
        }  # fmt: skip
        shared = dict(zip(drafts, self._fit(list(drafts.values())), strict=True))
        for seed, num_tokens, own in keys:
            parts = [shared[seed, num_tokens].text] if seed is not None else []
            parts += [own] if own is not None else []
            self._systems[seed, num_tokens, own] = "\n\n".join(parts) or None
        new = [system for system in dict.fromkeys(self._systems.values()) if system is not None]
        if self._vocabulary.words:
            costs = self._connections.map(self._cost_behind, new)
            self._base_tokens.update(zip(new, costs, strict=True))

    def _cost_behind(self, system: str) -> int:
        try:
            return self._counter.prompt(self._vocabulary.words[0], system) - 1
        except VarcasError as error:
            raise VarcasError(
                f"{error}; if the model's chat template takes no system message, use `endpoint: completions`, or no "
                "`shared_prefix_tokens`"
            ) from error

    def _drafts(self, requests: Sequence[ScheduledRequest]) -> Iterator[_Draft]:
        """Begins each prompt with two atoms (one, if that short) that none before it begins with, while there are any.

        Later turns and the blocks of a trace begin as they begin.
        """
        taken: set[tuple[str, ...]] = set()
        for request in requests:
            if request.prompt is not None:
                continue
            system = self._systems[_system_key(request)]
            if request.turn:
                count, base_tokens, wanted = self._counter.text, 0, request.prompt_tokens
            else:
                count = _Behind(self._counter, system)
                base_tokens = self._base_tokens[system]
                wanted = max(request.prompt_tokens, base_tokens + 1)
                self._require_room(request, wanted)
            rest, words = self._words(request), list[str]()
            if not request.turn and not request.blocks:
                words = self._opening(rest, min(wanted - base_tokens, 2), taken)
            yield _Draft(f"request {request.index}", wanted, base_tokens, words, rest, count)

    def _opening(self, rest: Iterator[str], num_words: int, taken: set[tuple[str, ...]]) -> list[str]:
        words = [next(rest) for _ in range(num_words)]
        for _ in range(len(self._vocabulary.words)):
            if tuple(words) not in taken:
                break
            words = [*words[1:], next(rest)]
        taken.add(tuple(words))
        return words

    def _require_room(self, request: ScheduledRequest, prompt_tokens: int) -> None:
        longest = self._counter.max_model_len
        output_tokens = request.output_tokens if prompt_tokens == request.prompt_tokens else MIN_OUTPUT_TOKENS
        if longest is not None and prompt_tokens + output_tokens > longest:
            raise VarcasError(
                f"request {request.index} needs {prompt_tokens} + {output_tokens} tokens, the server takes "
                f"{longest}: lower `workload.max_tokens` or raise `max_model_len`"
            )

    def _words(self, request: ScheduledRequest) -> Iterator[str]:
        """Words of the request's blocks, then, where they are too few, words of its own; alike for the same blocks."""
        for block in request.blocks:
            if block not in self._blocks:
                self._blocks[block] = list(itertools.islice(self._vocabulary.draw(f"block {block}"), BLOCK_TOKENS))
            yield from self._blocks[block]
        yield from self._vocabulary.draw(f"behind {request.blocks[-1]}" if request.blocks else request.seed)

    def _fit(self, drafts: list[_Draft]) -> list[_Text]:
        """Makes the texts; where a count costs the server a request, a sample decides whether more are counted."""
        if self._counter.cheap:
            return list(self._connections.map(_fitted, drafts))
        sample = _spread(len(drafts), SAMPLE, key=lambda at: drafts[at].wanted)
        texts = dict(zip(sample, self._connections.map(_fitted, [drafts[at] for at in sample]), strict=True))
        if not all(text.as_drafted for text in texts.values()):
            more = [at for at in _spread(len(drafts), MAX_COUNTED, key=lambda at: drafts[at].wanted) if at not in texts]
            texts |= dict(zip(more, self._connections.map(_fitted, [drafts[at] for at in more]), strict=True))
        return [texts[at] if at in texts else _drafted(draft) for at, draft in enumerate(drafts)]

    def _count(self, requests: list[ScheduledRequest]) -> list[tuple[int, int]]:
        """Tokens of prompts and answers of one's own; where a count costs a request, the rest by their characters."""
        most = len(requests) if self._counter.cheap else MAX_COUNTED // 2
        some = _spread(len(requests), most, key=lambda at: len(requests[at].prompt or ""))
        counted = dict(zip(some, self._connections.map(lambda at: self._counted(requests[at]), some), strict=True))
        estimated = _by_length(requests, counted)
        return [counted.get(at) or estimated(request) for at, request in enumerate(requests)]

    def _counted(self, request: ScheduledRequest) -> tuple[int, int]:
        assert request.prompt is not None
        system = self._systems[_system_key(request)]
        tokens = self._counter.text(request.prompt) if request.turn else self._counter.prompt(request.prompt, system)
        return tokens, request.output_tokens or max(self._counter.text(request.answer or ""), 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Behind:
    """Counts a user's text behind a system prompt."""

    counter: Counter
    system: str | None

    def __call__(self, text: str) -> int:
        return self.counter.prompt(text, self.system)


class _Room:
    """What each conversation leaves of the longest prompt + output that the server takes."""

    def __init__(self, longest: int | None) -> None:
        self._longest = longest
        self._used: dict[int, int | None] = {}  # conversation to its tokens so far; None: it has ended early

    def left_by(self, request: ScheduledRequest, prompt_tokens: int, output_tokens: int) -> int | None:
        """The output that fits; None when the turn does not, or one before it did not."""
        if self._longest is None:
            return output_tokens
        before = self._used.get(request.conversation, 0) if request.turn else 0
        if before is None:
            return None
        used = before + prompt_tokens + (TURN_TEMPLATE_TOKENS if request.turn else 0)
        room = self._longest - used
        if room < min(MIN_OUTPUT_TOKENS, output_tokens) or (request.turn and room < output_tokens):
            self._used[request.conversation] = None
            return None
        output_tokens = min(output_tokens, room)
        self._used[request.conversation] = used + output_tokens
        return output_tokens


def _system_key(request: ScheduledRequest) -> SystemKey:
    return request.prefix_seed, request.prefix_tokens, request.system


def _fitted(draft: _Draft) -> _Text:
    """Turns a draft into a text that the server counts right.

    Raises:
        VarcasError: no such text was found.
    """
    words = draft.words
    missing = draft.wanted - draft.base_tokens - len(words)
    for attempt in range(MAX_MENDS):
        words = [*words, *itertools.islice(draft.rest, missing)] if missing >= 0 else words[:missing]
        text = " ".join(words)
        missing = draft.wanted - draft.count(text)
        if not missing:
            return _Text(text, draft.wanted, as_drafted=attempt == 0)
        if -missing >= len(words):  # it would leave none
            words, missing = list(itertools.islice(draft.rest, len(words))), 0
    raise VarcasError(
        f"{draft.what}: no prompt of {draft.wanted} tokens was found in {MAX_MENDS} attempts; "
        f"the last one is off by {-missing}"
    )


def _drafted(draft: _Draft) -> _Text:
    """A text that nobody counts."""
    missing = draft.wanted - draft.base_tokens - len(draft.words)
    return _Text(" ".join([*draft.words, *itertools.islice(draft.rest, missing)]), draft.wanted)


def _by_length(
    requests: Sequence[ScheduledRequest], counted: Mapping[int, tuple[int, int]]
) -> Callable[[ScheduledRequest], tuple[int, int]]:
    """Guesses tokens of prompts and answers from their characters, as those that were counted have them."""
    chars = [len(requests[at].prompt or "") for at in counted]
    tokens = [prompt_tokens for prompt_tokens, _ in counted.values()]
    slope, intercept = linear_regression(chars, tokens) if len(set(chars)) > 1 else (0.0, tokens[0] if tokens else 0.0)

    def estimated(request: ScheduledRequest) -> tuple[int, int]:
        prompt_tokens = round(slope * len(request.prompt or "") + (0.0 if request.turn else intercept))
        return max(prompt_tokens, 1), request.output_tokens or max(round(slope * len(request.answer or "")), 1)

    return estimated


def _spread(num: int, most: int, *, key: Callable[[int], int]) -> list[int]:
    """At most so many positions, spread evenly over what `key` orders; all, in order, when there are no more."""
    if num <= most:
        return list(range(num))
    ordered = sorted(range(num), key=key)
    return [ordered[round(step * (num - 1) / (most - 1))] for step in range(most)]


def _linked(requests: Sequence[ScheduledRequest], made: list[list[Any]]) -> Fitted:
    """Numbers the requests anew where some were left out; who waits for one left out waits for whom that waited for."""
    after_of = {request.index: request.after for request in requests}
    new_index: dict[int | None, int | None] = {None: None}
    fitted = []
    for number, (position, prompt_tokens, output_tokens, text, system) in enumerate(made):
        request = requests[position]
        new_index[request.index] = number
        after = request.after
        while after not in new_index:
            assert after is not None
            after = after_of[after]
        request = dataclasses.replace(
            request,
            index=number,
            after=new_index[after],
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            prompt=None,
            system=None,
            answer=None,
            blocks=(),
        )
        fitted.append(Prompted(request, text, system))
    return tuple(fitted)


def _cached(cache_dir: Path | None, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns what an earlier call with this name made, else makes it and keeps it."""
    if cache_dir is None:
        return make()
    path = cache_dir / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):  # not there; or not ours, and then overwritten
        found: Mapping[str, Any] = json.loads(path.read_bytes())
        return found
    made = make()
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # it may be private
            json.dump(made, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return made
