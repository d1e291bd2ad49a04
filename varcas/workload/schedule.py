"""The schedule of a load: who asks what and when, from the workload's seed, before anything is sent.

Nothing here talks to a server: the same input gives the same schedule, on any machine (`draws.py` says how).

A pair of lengths of a built-in workload is a log-normal each, rounded up to whole tokens, and drawn again until prompt
plus output fit the limit: the smallest of the profile's own, `workload.max_tokens` and the server's. Where hardly any
pair fits (64 draws failed), the last one is cut: the output to half the limit, then the prompt to what is left. A
conversation ends before the turn with which it would pass the limit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from varcas.errors import InputError, nearest
from varcas.experiment import Workload
from varcas.records import ScheduledRequest
from varcas.workload.arrivals import ARRIVALS, US
from varcas.workload.conversation import (
    BLOCK_TOKENS,
    MAX_THINKS,
    MIN_OUTPUT_TOKENS,
    MIN_PROMPT_TOKENS,
    MIN_TOTAL_TOKENS,
    THINK_S,
    TURN_TEMPLATE_TOKENS,
    Conversation,
    Turn,
)
from varcas.workload.data import Data, open_data
from varcas.workload.data.files import Numbers
from varcas.workload.data.table import Table
from varcas.workload.draws import Uniform, exponential, geometric, streams
from varcas.workload.profiles import PROFILES
from varcas.workload.profiles.profile import Profile

MAX_REDRAWS = 64
CHARS_PER_TOKEN = 3
"""Fewer than nearly any text has: texts that would not fit by this are passed over before the server counts them."""
MIN_TRACE_FRAC = 0.8
"""Of the window; a trace that ends sooner is refused."""
USER_REQUESTS_PER_S = 2
MIN_USER_REQUESTS = 4
MAX_CLOSED_REQUESTS = 20_000
"""Of all users together; one who has asked all of his begins again."""


def check_workload(workload: Workload, serve_flags: Mapping[str, object]) -> None:
    """Checks what can be checked before a server starts: profiles, limits, and every record of a file.

    Raises:
        InputError: a profile is unknown, the file is not as its format says, a record does not fit the server's
            `max_model_len`, or no request does.
    """
    length = serve_flags.get("max_model_len")
    max_len = length if isinstance(length, int) else None
    if workload.data is None:
        for profile, _ in _mixture(workload):
            _limit(profile, workload.max_tokens, max_len)
        return
    data = open_data(workload.data)
    limit = None if max_len is None else max_len - (workload.shared_prefix_tokens or 0)
    data.check(limit if workload.max_tokens is None else None)
    if workload.arrives.kind == "trace":
        _require_length(data, workload)


def identity(workload: Workload) -> dict[str, Any]:
    """All that decides what is sent, as JSON: two loads with one identity are the same load.

    Raises:
        InputError: the file cannot be read.
    """
    told: dict[str, Any] = json.loads(workload.model_dump_json())
    if workload.data is None:
        return told
    try:
        with open(workload.data, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"workload.data: {workload.data}: cannot be read: {error.strerror}.") from error
    return told | {"data": content}  # wherever it lies


def schedule(
    workload: Workload, *, start_s: float, duration_s: float, max_len: int | None, stream: str
) -> tuple[ScheduledRequest, ...]:
    """The requests of one warm-up or one measurement; all `at_s` lie in `[start_s, start_s + duration_s)`, in order.

    A later turn stands right behind the one it waits for, a closed loop's requests user by user.

    Args:
        workload: what is asked, when, by whom, from which seed.
        start_s: of the window; 0 for a measurement that starts with its window.
        duration_s: of the window.
        max_len: the server's `max_model_len`; None when it is not known.
        stream: `warmup`, `measure`, ...: each name gets random numbers of its own.

    Raises:
        InputError: a profile is unknown, a file is not as it should be, or nothing fits `max_len`.
    """
    arrivals, lengths, words, mix, turns, thinks, prefixes = streams(workload.seed, stream, 7)
    arrives = workload.arrives
    start_us, end_us = math.ceil(start_s * US), math.ceil((start_s + duration_s) * US)
    built = _Builder(words, thinks, prefixes)
    draws = _Draws(mix, lengths, turns, prefixes)
    if arrives.kind == "trace":
        for at_us, conversation in _replayed(workload, max_len, draws, end_us - start_us):
            built.add(start_us + at_us, conversation)
    elif arrives.users is not None:
        _close(built, arrives.users, _conversations(workload, max_len, draws), start_us, end_us)
    else:
        due_us = ARRIVALS[arrives.kind](arrives, workload.rate_rps or 0.0, duration_s, arrivals)
        due = itertools.takewhile(lambda at_us: at_us < end_us, (start_us + offset_us for offset_us in due_us))
        for at_us, conversation in zip(due, _conversations(workload, max_len, draws), strict=False):
            built.add(at_us, conversation)
    return tuple(built.requests)


def num_passed_over(workload: Workload, requests: Sequence[ScheduledRequest], *, duration_s: float) -> int:
    """How many records of a trace came due and are not in its schedule, which has a lower rate than the trace then.

    They cannot fit by their characters, or nothing in them can be asked. Elsewhere the next record takes the place.
    """
    if workload.arrives.kind != "trace" or workload.data is None:
        return 0
    due_us = _due_us(open_data(workload.data), workload, math.ceil(duration_s * US))
    return len(due_us) - len({request.conversation for request in requests})


@dataclasses.dataclass(frozen=True, slots=True)
class _Draws:
    """Sources of random numbers, one for each thing that is drawn, so that none shifts another."""

    mix: Uniform
    lengths: Uniform
    turns: Uniform
    prefixes: Uniform


class _Builder:
    """Turns conversations into requests."""

    def __init__(self, words: Uniform, thinks: Uniform, prefixes: Uniform) -> None:
        self.requests: list[ScheduledRequest] = []
        self._words, self._thinks = words, thinks
        self._prefix_base = _seed(prefixes)
        self._num_conversations = 0

    def add(self, at_us: int, conversation: Conversation, after: int | None = None, gap_s: float = 0.0) -> None:
        """Appends its turns, each waiting for the one before; the first for `after`, if there is one."""
        prefix_seed = None if conversation.prefix is None else self._prefix_base + conversation.prefix
        base = self._prefix_base
        for number, turn in enumerate(conversation.turns):
            index = len(self.requests)
            if number:
                after, gap_s = index - 1, self.pause_s(conversation.think_s)
            self.requests.append(
                ScheduledRequest(
                    index=index,
                    at_s=at_us / US,
                    prompt_tokens=turn.prompt_tokens,
                    output_tokens=turn.output_tokens,
                    seed=_seed(self._words),
                    conversation=self._num_conversations,
                    turn=number,
                    after=after,
                    gap_s=gap_s,
                    prefix_seed=prefix_seed,
                    prefix_tokens=conversation.prefix_tokens,
                    prompt=turn.prompt,
                    system=conversation.system,
                    answer=turn.answer,
                    blocks=tuple(base + block for block in turn.blocks) if turn.blocks else (),
                )
            )
        self._num_conversations += 1

    def pause_s(self, mean_s: float) -> float:
        """Exponential, at most 10 times its mean, in whole microseconds."""
        if not mean_s:
            return 0.0
        return round(min(exponential(self._thinks), MAX_THINKS) * mean_s * US) / US


def _seed(uniform: Uniform) -> int:
    return int(uniform() * 2**53)


def _close(built: _Builder, num_users: int, conversations: Iterator[Conversation], start_us: int, end_us: int) -> None:
    """Gives each user of a closed loop a chain of conversations, long enough for the window; each begins with a pause.

    The pauses before the first request are those of the first conversations, in order.
    """
    wanted = math.ceil((end_us - start_us) / US * USER_REQUESTS_PER_S)
    wanted = min(max(wanted, MIN_USER_REQUESTS), max(MAX_CLOSED_REQUESTS // num_users, 1))
    first = list(itertools.islice(conversations, num_users))
    begins_us = sorted(start_us + round(built.pause_s(conversation.pause_s) * US) for conversation in first)
    for at_us, conversation in zip(begins_us, first, strict=True):
        if at_us >= end_us:
            return
        num_before, after, gap_s = len(built.requests), None, 0.0
        while True:
            built.add(at_us, conversation, after, gap_s)
            if len(built.requests) - num_before >= wanted:
                break
            after, gap_s = len(built.requests) - 1, built.pause_s(conversation.pause_s)
            conversation = next(conversations)


# --- built-in workloads -----------------------------------------------------------------------------------------------


def _conversations(workload: Workload, max_len: int | None, draws: _Draws) -> Iterator[Conversation]:
    return _drawn(workload, max_len, draws) if workload.data is None else _cycled(workload, max_len, draws)


def _drawn(workload: Workload, max_len: int | None, draws: _Draws) -> Iterator[Conversation]:
    """Conversations of the profile, or of one of several by their shares."""
    mixture = _mixture(workload)
    bounds = list(itertools.accumulate(share for _, share in mixture))
    makers = [_maker(profile, workload.max_tokens, max_len, draws) for profile, _ in mixture]
    while True:
        if len(makers) == 1:
            yield makers[0]()
        else:
            at = draws.mix() * bounds[-1]
            yield makers[next(number for number, bound in enumerate(bounds) if at < bound)]()


def _mixture(workload: Workload) -> list[tuple[Profile, float]]:
    """Profiles and their shares. Raises InputError: one is unknown, or nothing is shared though it was asked for."""
    shares = {workload.profile: 1.0} if isinstance(workload.profile, str) else workload.profile
    mixture = [(_profile(name, workload), share) for name, share in shares.items()]
    if workload.shared_prefixes is not None and not any(profile.prefix_tokens for profile, _ in mixture):
        raise InputError(
            f"workload.shared_prefixes: {workload.shared_prefixes}: of {workload.name} there are no system prompts: "
            "say how long they are, e.g. shared_prefix_tokens: 1024"
        )
    return mixture


def _profile(name: str, workload: Workload) -> Profile:
    """The profile of this name, as the workload's own settings change it. Raises InputError: there is none."""
    if name not in PROFILES:
        raise InputError(
            f"workload.profile: {name!r} is unknown.{nearest(name, PROFILES)} Known: {', '.join(sorted(PROFILES))}"
        )
    profile = PROFILES[name]
    changes: dict[str, Any] = {
        "turns": workload.turns,
        "think_s": workload.think_s,
        "prefix_tokens": workload.shared_prefix_tokens,
        "prefixes": workload.shared_prefixes,
    }
    changed = dataclasses.replace(profile, **{key: value for key, value in changes.items() if value is not None})
    silent = workload.think_s is None and changed.turns > 1 and not changed.think_s
    return dataclasses.replace(changed, think_s=THINK_S) if silent else changed


def _limit(profile: Profile, *others: int | None) -> int:
    """The longest prompt + output of a conversation, its shared system prompt left out."""
    limit = min([profile.max_tokens, *(other - profile.prefix_tokens for other in others if other is not None)])
    if limit < MIN_TOTAL_TOKENS:
        behind = f" behind a system prompt of {profile.prefix_tokens}" if profile.prefix_tokens else ""
        raise InputError(
            f"prompt and output must fit {limit} tokens{behind}, the least is {MIN_TOTAL_TOKENS}: "
            "raise `workload.max_tokens` or the server's `max_model_len`"
        )
    return limit


def _maker(profile: Profile, max_tokens: int | None, max_len: int | None, draws: _Draws) -> Callable[[], Conversation]:
    """Draws conversations of one profile."""
    limit = _limit(profile, max_tokens, max_len)

    def make() -> Conversation:
        prompt_tokens, output_tokens = _pair(profile, limit, draws.lengths)
        turns = [Turn(prompt_tokens + profile.prefix_tokens, output_tokens)]
        room = limit - prompt_tokens - output_tokens
        for _ in range(geometric(draws.turns, profile.turns) - 1 if profile.turns > 1 else 0):
            prompt_tokens, output_tokens = _pair(profile, limit, draws.lengths)
            room -= prompt_tokens + output_tokens + TURN_TEMPLATE_TOKENS
            if room < 0:
                break
            turns.append(Turn(prompt_tokens, output_tokens))
        prefix = int(draws.prefixes() * profile.prefixes) if profile.prefix_tokens else None
        return Conversation(turns, profile.think_s, profile.think_s, prefix, profile.prefix_tokens)

    return make


def _pair(profile: Profile, limit: int, uniform: Uniform) -> tuple[int, int]:
    """One pair of lengths that fits `limit`."""
    for _ in range(MAX_REDRAWS):
        prompt_tokens = max(profile.prompt.draw(uniform), MIN_PROMPT_TOKENS)
        output_tokens = max(profile.output.draw(uniform), MIN_OUTPUT_TOKENS)
        if prompt_tokens + output_tokens <= limit:
            return prompt_tokens, output_tokens
    output_tokens = min(output_tokens, limit // 2)
    return min(prompt_tokens, limit - output_tokens), output_tokens


# --- files ------------------------------------------------------------------------------------------------------------


def _cycled(workload: Workload, max_len: int | None, draws: _Draws) -> Iterator[Conversation]:
    """The records in order, from a drawn one, and from the first again after the last."""
    assert workload.data is not None
    data = open_data(workload.data)
    first = int(draws.mix() * len(data))
    while True:
        num_found = 0
        for _, conversation in _fitting(
            data, itertools.chain(range(first, len(data)), range(first)), workload, max_len, draws
        ):
            num_found += 1
            yield conversation
        if not num_found:
            raise InputError(
                f"{workload.data}: no record can be asked: none has a question with an answer that fits the server: "
                "raise `max_model_len` or `workload.max_tokens`"
            )


def _replayed(
    workload: Workload, max_len: int | None, draws: _Draws, duration_us: int
) -> Iterator[tuple[int, Conversation]]:
    """The records at their own times, from the first one on, as many as the window holds."""
    assert workload.data is not None
    data = open_data(workload.data)
    times_us = _due_us(data, workload, duration_us)
    for row, conversation in _fitting(data, range(len(times_us)), workload, max_len, draws):
        yield int(times_us[row]), conversation


def _due_us(data: Data, workload: Workload, duration_us: int) -> Numbers:
    """Times of the trace's records that come due in the window."""
    times_us: Numbers = np.rint(data.times_us * _scale(data.times_us, workload)).astype(np.int64)
    return times_us[: int(np.searchsorted(times_us, duration_us))]


def _scale(times_us: Numbers, workload: Workload) -> float:
    """What the trace's times are multiplied by to get the rate asked for. Raises InputError: it cannot be had."""
    span_s = float(times_us[-1]) / US
    if workload.rate_rps is not None and (span_s <= 0 or len(times_us) < 2):
        raise InputError(f"{workload.data}: all its times are the same: without `rate_rps` they can be kept so.")
    return 1.0 if workload.rate_rps is None else (len(times_us) - 1) / span_s / workload.rate_rps


def _require_length(data: Data, workload: Workload) -> None:
    """Raises InputError: the trace ends long before the window does."""
    span_s = float(data.times_us[-1]) / US * _scale(data.times_us, workload)
    if span_s < MIN_TRACE_FRAC * workload.duration_s:
        raise InputError(
            f"workload.duration_s: {workload.duration_s:g}: {workload.data} ends after {span_s:.4g} s, and the rest of "
            "the window would be empty: shorten it, or lower `rate_rps`"
        )


def _fitting(
    data: Data, rows: Iterable[int], workload: Workload, max_len: int | None, draws: _Draws
) -> Iterator[tuple[int, Conversation]]:
    """Those of the records that fit, as the workload's own settings change them."""
    prefix_tokens = workload.shared_prefix_tokens or 0
    limits = [limit - prefix_tokens for limit in (workload.max_tokens, max_len) if limit is not None]
    limit = min(limits, default=None)
    for row in rows:
        conversation = data.conversation(row)
        if conversation is None:
            continue
        if isinstance(data, Table):
            _fit_lengths(data, row, conversation.turns[0], limit, cut=workload.max_tokens is not None)
            conversation.turns[0].prompt_tokens += prefix_tokens
        elif limit is not None and not _fit_texts(conversation, limit):
            continue
        if workload.think_s is not None:
            conversation.think_s = conversation.pause_s = workload.think_s
        if prefix_tokens:
            conversation.prefix = int(draws.prefixes() * (workload.shared_prefixes or 1))
            conversation.prefix_tokens = prefix_tokens
        yield row, conversation


def _fit_lengths(data: Table, row: int, turn: Turn, limit: int | None, *, cut: bool) -> None:
    """Cuts what is too long, if that was asked for. Raises InputError: it was not."""
    if limit is None or turn.prompt_tokens + turn.output_tokens <= limit:
        return
    if not cut:
        raise data.too_long(row, limit)
    turn.output_tokens = max(min(turn.output_tokens, limit // 2), 1)
    turn.prompt_tokens = min(turn.prompt_tokens, limit - turn.output_tokens)
    turn.blocks = turn.blocks[: math.ceil(turn.prompt_tokens / BLOCK_TOKENS)]


def _fit_texts(conversation: Conversation, limit: int) -> bool:
    """Leaves out the turns that cannot fit by their number of characters; False when not even the first does."""
    num_tokens = len(conversation.system or "") / CHARS_PER_TOKEN
    for number, turn in enumerate(conversation.turns):
        num_tokens += len(turn.prompt or "") / CHARS_PER_TOKEN
        num_tokens += turn.output_tokens or len(turn.answer or "") / CHARS_PER_TOKEN
        if num_tokens > limit:
            del conversation.turns[number:]
            break
    return bool(conversation.turns)
