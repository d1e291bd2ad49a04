"""Prompts with exact lengths in the server's own tokens, fitted through its `/tokenize` with the template in place.

First a vocabulary of atoms: short words, each of which the server counts as one token, at the start of a message and
after a space. A prompt is then as many atoms, drawn from the request's seed, as its length leaves after the template.
Every prompt is counted by the server, and mended by an atom more or fewer until the count is exact.

The template is what a message costs beyond its words, so the shortest prompt is template + 1: a request that asks for
less gets that (a chat template of 40 tokens cannot be sent in 20), with its output cut to what then fits.

No two prompts of a schedule begin with the same two atoms: only the template can be shared in a prefix cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import json
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from varcas.errors import VarcasError
from varcas.records import ScheduledRequest
from varcas.workload.chat import MIN_OUTPUT_TOKENS
from varcas.workload.wire import Endpoint, Target

FITTING_VERSION = 1
"""Part of the cache's keys: raised when the same schedule gives other texts."""

A = TypeVar("A")
B = TypeVar("B")
Fitted = tuple[tuple[ScheduledRequest, str], ...]

NUM_CONNECTIONS = 8
TIMEOUT_S = 30.0
MIN_ATOMS = 8
ENOUGH_ATOMS = 256
WAVE = 128
MAX_MENDS = 16
PROBE = "The quick brown fox, 1234567890 times; jumps\nüber den Zaun: 你好 🙂 {}[]<|>"
COMMON_WORDS = (
    "the of and to in is you that it he was for on are with as his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil now find long down day did get come made may part over new sound "
    "take only little work know place year live me back give most very after thing our just name good sentence man "
    "think say great where help through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such because turn here why ask"
)


def fit_prompts(
    target: Target, requests: Sequence[ScheduledRequest], *, endpoint: Endpoint, cache_dir: Path | None
) -> Fitted:
    """Gives each request its prompt, exact to the token.

    Args:
        target: a server that answers.
        requests: the schedule.
        endpoint: decides whether a chat template is in place.
        cache_dir: where fitted prompts are kept for the next server with the same tokenizer; made if need be.

    Returns:
        The requests in order, each with its prompt; `prompt_tokens` is raised to the shortest that the template allows.

    Raises:
        VarcasError: the server does not count, or not so that a length can be met, or a request does not fit it.
    """
    with _Tokenizer(target, endpoint) as tokenizer:
        key = tokenizer.fingerprint()
        atoms = _cached(cache_dir, _hash("atoms", key), lambda: dataclasses.asdict(_find_atoms(tokenizer)))
        vocabulary = Vocabulary(tuple(atoms["words"]), atoms["template_tokens"])
        requests = [_fitting(request, vocabulary, tokenizer.max_model_len) for request in requests]
        lengths = [(request.prompt_tokens, request.seed) for request in requests]
        prompts = _cached(
            cache_dir,
            _hash("prompts", key, lengths),
            lambda: {"prompts": list(tokenizer.map(_Fit(tokenizer, vocabulary), _drafts(requests, vocabulary)))},
        )
        return tuple(zip(requests, prompts["prompts"], strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words of one token each, and what a message costs beyond them."""

    words: tuple[str, ...]
    template_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """A prompt to be: its first words, drawn so that no two prompts share them, and where the rest comes from."""

    request: ScheduledRequest
    words: list[str]
    rest: Iterator[str]


class _Tokenizer:
    """Counts tokens through the server's `/tokenize`, over a few connections that stay open."""

    def __init__(self, target: Target, endpoint: Endpoint) -> None:
        self._target = target
        self._endpoint = endpoint
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="tokenize")
        self.max_model_len: int | None = None

    def __enter__(self) -> _Tokenizer:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """As `map`, over all connections at once."""
        return self._pool.map(function, items)

    def fingerprint(self) -> str:
        """Tells tokenizers, templates and models apart, by what the server makes of a probe text."""
        answer = self._ask(PROBE)
        self.max_model_len = answer.get("max_model_len")
        return _hash(FITTING_VERSION, self._target.model, self._endpoint, answer["count"], answer.get("tokens"))

    def count(self, text: str) -> int:
        """Tokens of a whole prompt: of a chat with this one message, or of this completion prompt."""
        return int(self._ask(text)["count"])

    def _ask(self, text: str) -> dict[str, Any]:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": text}]}
            if self._endpoint == "chat"
            else {"prompt": text, "add_special_tokens": True}
        )
        status, data = self._post(json.dumps({"model": self._target.model, **asked}).encode())
        if status != 200:
            raise VarcasError(f"POST /tokenize answered {status}: {data.decode(errors='replace')[:300]}")
        answer = json.loads(data)
        if not isinstance(answer, dict) or not isinstance(answer.get("count"), int):
            raise VarcasError(f"POST /tokenize gave no `count`: {data.decode(errors='replace')[:300]}")
        return answer

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Posts; a connection that the server closed meanwhile is opened again, once."""
        for last in (False, True):
            try:
                connection = self._connection()
                connection.request("POST", "/tokenize", body, self._target.headers)
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException) as error:
                self._local.connection.close()
                if last:
                    raise VarcasError(f"POST /tokenize failed: {error!r}") from error
        raise AssertionError

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(self._target.host, self._target.port, timeout=TIMEOUT_S)
            self._connections.append(self._local.connection)
        connection: http.client.HTTPConnection = self._local.connection
        return connection


def _find_atoms(tokenizer: _Tokenizer) -> Vocabulary:
    """Asks for each candidate what it costs twice: one token at the start and one after a space is an atom.

    The template is what the cheapest candidates leave; in a tokenizer without one-token words nothing can be fitted.
    """
    words_at: dict[int, list[str]] = {}
    for wave in _waves(_candidates()):
        costs = tokenizer.map(lambda word: tokenizer.count(f"{word} {word}"), wave)
        for word, cost in zip(wave, costs, strict=True):
            words_at.setdefault(cost, []).append(word)
        least = min((cost for cost, words in words_at.items() if len(words) >= MIN_ATOMS), default=0)
        if len(words_at.get(least, ())) >= ENOUGH_ATOMS:
            break
    if least < 2:
        raise VarcasError("prompts cannot be fitted: the tokenizer has too few words of one token each")
    return Vocabulary(tuple(words_at[least]), template_tokens=least - 2)


def _candidates() -> Iterator[str]:
    """Common words, syllables, letters, pairs of letters, each once: what a byte-pair vocabulary tends to hold."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    groups = (
        COMMON_WORDS.split(),
        ("".join(pair) for pair in itertools.product("bcdfghjklmnprstvwz", "aeiou")),
        letters,
        ("".join(pair) for pair in itertools.product(letters, letters)),
    )
    yield from dict.fromkeys(itertools.chain.from_iterable(groups))


def _waves(items: Iterator[str]) -> Iterator[list[str]]:
    while wave := list(itertools.islice(items, WAVE)):
        yield wave


def _fitting(request: ScheduledRequest, vocabulary: Vocabulary, max_model_len: int | None) -> ScheduledRequest:
    """The request with a prompt that can be made, and an output that fits beside it."""
    prompt_tokens = max(request.prompt_tokens, vocabulary.template_tokens + 1)
    output_tokens = request.output_tokens
    if prompt_tokens > request.prompt_tokens and max_model_len is not None:
        output_tokens = max(min(output_tokens, max_model_len - prompt_tokens), MIN_OUTPUT_TOKENS)
    if max_model_len is not None and prompt_tokens + output_tokens > max_model_len:
        raise VarcasError(
            f"request {request.index} needs {prompt_tokens} + {output_tokens} tokens, the server takes "
            f"{max_model_len}: lower `workload.max_tokens` or raise `max_model_len`"
        )
    return dataclasses.replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _drafts(requests: Sequence[ScheduledRequest], vocabulary: Vocabulary) -> Iterator[_Draft]:
    """Begins each prompt with two atoms (one, if it is that short) that none before it begins with, while there are."""
    taken: set[tuple[str, ...]] = set()
    for request in requests:
        rest = _words(vocabulary, request.seed)
        num_words = min(request.prompt_tokens - vocabulary.template_tokens, 2)
        words = [next(rest) for _ in range(num_words)]
        for _ in range(len(vocabulary.words)):
            if tuple(words) not in taken:
                break
            words = [*words[1:], next(rest)]
        taken.add(tuple(words))
        yield _Draft(request, words, rest)


def _words(vocabulary: Vocabulary, seed: int) -> Iterator[str]:
    uniform = random.Random(seed).random
    while True:
        yield vocabulary.words[int(uniform() * len(vocabulary.words))]


class _Fit:
    """Turns a draft into a prompt that the server counts right."""

    def __init__(self, tokenizer: _Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._template_tokens = vocabulary.template_tokens

    def __call__(self, draft: _Draft) -> str:
        wanted = draft.request.prompt_tokens
        words = draft.words
        missing = wanted - self._template_tokens - len(words)
        for _ in range(MAX_MENDS):
            words = [*words, *itertools.islice(draft.rest, missing)] if missing >= 0 else words[:missing]
            text = " ".join(words)
            missing = wanted - self._tokenizer.count(text)
            if not missing:
                return text
            if -missing >= len(words):  # it would leave none
                words, missing = list(itertools.islice(draft.rest, len(words))), 0
        raise VarcasError(
            f"request {draft.request.index}: no prompt of {wanted} tokens was found in {MAX_MENDS} attempts; "
            f"the last one is off by {-missing}"
        )


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


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
        with temporary.open("x") as file:
            json.dump(made, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return made
