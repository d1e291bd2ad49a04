"""The exception tree, and the exit code of each branch.

`VarcasError` (1) ← `InputError` (2); an interrupt is 130. "Nothing meets the SLO" (3) is a result, not an exception.
`TrialError` is caught once, in `trial.py`, and becomes a row: it never reaches the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NO_ANSWER = 3
EXIT_INTERRUPTED = 130
CLOSE = 0.6
"""Share of letters in common from which a word may be meant; difflib's own default."""


class VarcasError(Exception):
    """The work failed, and the message says why in words for the person who typed the command."""

    exit_code = EXIT_FAILED


class InputError(VarcasError):
    """What was asked cannot be done as asked: the message names field, value, what is allowed and the fix."""

    exit_code = EXIT_BAD_INPUT


class TrialError(Exception):
    """A trial's failure, told apart by kind.

    Attributes:
        kind: a key of `engine.failures.FAILURES`, say `out_of_memory`.
        detail: the line of the server's log (or of ours) that says so.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[type[TrialError], tuple[str, str]]:
        """Survives the pickle between a Ray worker and the driver."""
        return type(self), (self.kind, self.detail)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean X?` for the known word that is closest to `word`, or an empty string."""
    words = list(known) if isinstance(known, Sequence | Mapping) else sorted(known)  # of equals the first
    best = max(words, key=lambda other: _likeness(word, other), default=None)
    return f" Did you mean {best}?" if best is not None and _likeness(word, best) >= CLOSE else ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()
