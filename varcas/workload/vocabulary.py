"""Words of one token each in a server's own tokens."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from varcas.errors import VarcasError
from varcas.workload.tokens import Connections, Counter

MIN_ATOMS = 8
ENOUGH_ATOMS = 256
WAVE = 128
MAX_BULKS = 64
COMMON_WORDS = (
    "the of and to in is you that it he was for on are with as his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil now find long down day did get come made may part over new sound "
    "take only little work know place year live me back give most very after thing our just name good sentence man "
    "think say great where help through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such because turn here why ask"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words of one token each, and what a message costs beyond them."""

    words: tuple[str, ...]
    template_tokens: int

    def draw(self, seed: int | str) -> Iterator[str]:
        """Endless words; the same for the same seed."""
        uniform = random.Random(seed).random
        while True:
            yield self.words[int(uniform() * len(self.words))]


def find_atoms(counter: Counter, connections: Connections) -> Vocabulary:
    """Finds words of one token each.

    Raises:
        VarcasError: there are too few of them.
    """
    vocabulary = _atoms_one_by_one(counter, connections) if counter.cheap else _atoms_in_bulk(counter)
    if len(vocabulary.words) < MIN_ATOMS:
        raise VarcasError("prompts cannot be fitted: the tokenizer has too few words of one token each")
    return vocabulary


def _atoms_one_by_one(counter: Counter, connections: Connections) -> Vocabulary:
    """Asks for each candidate what it costs twice: one token at the start and one after a space is an atom.

    The template is what the cheapest candidates leave; in a tokenizer without one-token words nothing can be fitted.
    """
    words_at: dict[int, list[str]] = {}
    for wave in _waves(_candidates()):
        costs = connections.map(lambda word: counter.prompt(f"{word} {word}"), wave)
        for word, cost in zip(wave, costs, strict=True):
            words_at.setdefault(cost, []).append(word)
        least = min((cost for cost, words in words_at.items() if len(words) >= MIN_ATOMS), default=0)
        if len(words_at.get(least, ())) >= ENOUGH_ATOMS:
            break
    return Vocabulary(tuple(words_at[least]) if least >= 2 else (), template_tokens=least - 2)


def _atoms_in_bulk(counter: Counter) -> Vocabulary:
    """Takes common words by halves: those that together cost one token each."""
    template_tokens = counter.prompt("the") - 1
    words: list[str] = []
    halves, num_asked = [COMMON_WORDS.split()], 0
    while halves and num_asked < MAX_BULKS:
        some, num_asked = halves.pop(), num_asked + 1
        if counter.prompt(" ".join(some)) - template_tokens == len(some):
            words += some
        elif len(some) > 1:
            halves += [some[: len(some) // 2], some[len(some) // 2 :]]
    return Vocabulary(tuple(words), template_tokens)


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
