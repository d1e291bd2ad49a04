"""What `truth_server.py` stamped, and how far a client's figures lie from it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VERSION = 1
ROLE_CHUNKS = 1
END_CHUNKS = 3
"""After the tokens of a chat answer: usage, `[DONE]`, the last HTTP chunk."""
NS_PER_MS = 1e6
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answered:
    """One request as the server saw it; times in ns on CLOCK_MONOTONIC.

    Attributes:
        index: that its prompt named; -1 without one.
        arrival_ns: the kernel's stamp of its last segment.
        first_due_ns: when its first token should have left.
        before_ns: just before each chunk was handed to the kernel: the role, the tokens, and three that end it.
        after_ns: just after.
    """

    index: int
    arrival_ns: int
    first_due_ns: int
    before_ns: Ints
    after_ns: Ints

    def tokens_ns(self, num_tokens: int) -> Ints:
        """When each token left; fewer than `num_tokens` if the answer was cut short."""
        return self.before_ns[ROLE_CHUNKS : ROLE_CHUNKS + num_tokens]

    def is_whole(self, num_tokens: int) -> bool:
        """All of it was sent."""
        return len(self.after_ns) == ROLE_CHUNKS + num_tokens + END_CHUNKS


@dataclass(frozen=True, slots=True)
class Truth:
    """All that a server saw, in order of arrival.

    Attributes:
        step_ns: between a stream's tokens.
        clock_moved_ns: change of CLOCK_REALTIME against CLOCK_MONOTONIC meanwhile: an error of the arrivals.
        answered: every request.
    """

    step_ns: int
    clock_moved_ns: int
    answered: tuple[Answered, ...]


def read(path: Path) -> Truth:
    """Reads what `truth_server.py` wrote.

    Raises:
        ValueError: it is of another version.
    """
    data = array("q")
    data.frombytes(path.read_bytes())
    values = np.array(data, dtype=np.int64)
    if values[0] != VERSION:
        raise ValueError(f"{path}: version {values[0]}, not {VERSION}")
    answered, at = [], 3
    while at < len(values):
        index, arrival_ns, first_due_ns, num = (int(value) for value in values[at : at + 4])
        stamps = values[at + 4 : at + 4 + num]
        num_sent = num // 2
        before, after = stamps[: 2 * num_sent : 2], stamps[1 : 2 * num_sent : 2]
        answered.append(Answered(index, arrival_ns, first_due_ns, before, after))
        at += 4 + num
    return Truth(int(values[1]), int(values[2]), tuple(answered))


@dataclass(frozen=True, slots=True)
class Claim:
    """What a client says of one request; seconds on CLOCK_MONOTONIC.

    Attributes:
        key: the prompt's index, or the place in the order of arrival: see `Claims.by_order`.
        due_s: when its own schedule wanted it sent.
        sent_s: when it says that it was.
        first_s: its first token.
        times_s: its tokens: all, or those whose times it tells, by their number.
        num_tokens: that it counted.
        ok: it calls the answer good.
    """

    key: int
    due_s: float | None
    sent_s: float
    first_s: float
    times_s: Mapping[int, float] | Sequence[float]
    num_tokens: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Claims:
    """What a client says of a run.

    Attributes:
        claims: one a request.
        by_order: `key` is the place in the server's order of arrival, else the index in the prompt.
        due_from_first_s: due moments against an unknown start, by key; the start is then taken to be the latest that
            has no request sent early, which flatters the client.
    """

    claims: tuple[Claim, ...]
    by_order: bool = False
    due_from_first_s: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """How exact a client was. Errors are absolute values, in ms.

    Attributes:
        requests: that were to be sent.
        ttft_error_p50_ms: of the client's first token less its send, against the server's stamps of both.
        ttft_error_p99_ms: the same.
        token_error_p99_ms: of the moments of the tokens, as far as the client tells them.
        send_lag_p50_ms: arrival at the server's kernel less the due moment of the client's own schedule.
        send_lag_p99_ms: the same.
        lost: requests that never came, or whose answer the client does not have whole.
        doubled: requests that came, or are told, more than once.
        wrong: answers called good that have another number of tokens, or times out of order.
        without_due: requests that the client's schedule gives no moment; they are in no send lag.
        server_late_p99_ms: token sends less their own schedule: the server's load.
        truth_unsure_p99_ms: how long a send took: the truth lies between its two stamps.
        clock_moved_us: of the kernel's stamps against CLOCK_MONOTONIC.
    """

    requests: int
    ttft_error_p50_ms: float
    ttft_error_p99_ms: float
    token_error_p99_ms: float
    send_lag_p50_ms: float
    send_lag_p99_ms: float
    lost: int
    doubled: int
    wrong: int
    without_due: int
    server_late_p99_ms: float
    truth_unsure_p99_ms: float
    clock_moved_us: float

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def percentile(values: Sequence[float] | Floats, percent: float) -> float:
    """By nearest rank; NaN of nothing."""
    if not len(values):
        return float("nan")
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent, method="inverted_cdf"))


def figures(truth: Truth, said: Claims, num_requests: int, num_tokens: int) -> Figures:
    """Lays a client's figures over the truth."""
    by_key: dict[int, Answered] = {}
    for place, seen in enumerate(truth.answered):
        by_key[place if said.by_order else seen.index] = seen
    pairs = [(claim, by_key[claim.key]) for claim in said.claims if claim.ok and claim.key in by_key]
    pairs = [(claim, seen) for claim, seen in pairs if seen.is_whole(num_tokens)]
    ttft = [_ttft_error_ms(claim, seen, num_tokens) for claim, seen in pairs]
    tokens = [_token_errors_ms(claim, seen, num_tokens) for claim, seen in pairs]
    lags = _send_lags_ms(said, by_key)
    late, unsure = _server_ms(truth, num_tokens)
    return Figures(
        requests=num_requests,
        ttft_error_p50_ms=percentile(ttft, 50),
        ttft_error_p99_ms=percentile(ttft, 99),
        token_error_p99_ms=percentile(np.concatenate(tokens) if tokens else [], 99),
        send_lag_p50_ms=percentile(lags, 50),
        send_lag_p99_ms=percentile(lags, 99),
        lost=num_requests - len({claim.key for claim, _ in pairs}),
        doubled=_num_doubled(truth, said),
        wrong=sum(not _is_right(claim, num_tokens) for claim in said.claims if claim.ok),
        without_due=num_requests - len(lags),
        server_late_p99_ms=percentile(late, 99),
        truth_unsure_p99_ms=percentile(unsure, 99),
        clock_moved_us=truth.clock_moved_ns / 1e3,
    )


def _ttft_error_ms(claim: Claim, seen: Answered, num_tokens: int) -> float:
    true_ns = int(seen.tokens_ns(num_tokens)[0]) - seen.arrival_ns
    return abs((claim.first_s - claim.sent_s) * 1e3 - true_ns / NS_PER_MS)


def _token_errors_ms(claim: Claim, seen: Answered, num_tokens: int) -> Floats:
    told = claim.times_s if isinstance(claim.times_s, Mapping) else dict(enumerate(claim.times_s))
    true_ns = seen.tokens_ns(num_tokens)
    numbers = [number for number in told if number < len(true_ns)]
    base_ns = int(true_ns[0])
    told_ms = np.array([told[number] - base_ns / 1e9 for number in numbers]) * 1e3
    return np.abs(told_ms - (true_ns[numbers] - base_ns) / NS_PER_MS)


def _send_lags_ms(said: Claims, by_key: Mapping[int, Answered]) -> list[float]:
    if said.due_from_first_s is not None:
        since = [by_key[key].arrival_ns / 1e9 - due_s for key, due_s in said.due_from_first_s.items() if key in by_key]
        return [(one - min(since)) * 1e3 for one in since]
    came = [(claim, by_key[claim.key]) for claim in said.claims if claim.key in by_key]
    return [(seen.arrival_ns / 1e9 - claim.due_s) * 1e3 for claim, seen in came if claim.due_s is not None]


def _num_doubled(truth: Truth, said: Claims) -> int:
    came = Counter(seen.index for seen in truth.answered if seen.index >= 0)
    told = Counter(claim.key for claim in said.claims)
    return sum(num - 1 for num in came.values()) + sum(num - 1 for num in told.values())


def _is_right(claim: Claim, num_tokens: int) -> bool:
    if isinstance(claim.times_s, Mapping):
        times_s = [claim.times_s[number] for number in sorted(claim.times_s)]
    else:
        times_s = list(claim.times_s)
        if len(times_s) != num_tokens:
            return False
    return claim.num_tokens == num_tokens and times_s == sorted(times_s)


def _server_ms(truth: Truth, num_tokens: int) -> tuple[Floats, Floats]:
    """How late each token left, and how long each send took."""
    whole = [seen for seen in truth.answered if seen.is_whole(num_tokens)]
    if not whole:
        return np.array([]), np.array([])
    due_ns = np.arange(num_tokens) * truth.step_ns
    late = np.concatenate([seen.tokens_ns(num_tokens) - seen.first_due_ns - due_ns for seen in whole])
    unsure = np.concatenate([seen.after_ns - seen.before_ns for seen in whole])
    return late / NS_PER_MS, unsure / NS_PER_MS
