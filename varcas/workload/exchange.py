"""A planned load as the load's process sees it: chains of requests, each with what it sent and what came back.

Standard library only.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varcas.workload.clock import STAMP_BYTES, Offset, arrivals
from varcas.workload.wire import (
    PATHS,
    Answer,
    Asking,
    Endpoint,
    Response,
    Target,
    asked_options,
    body_bytes,
    parse,
    said,
)

UNFINISHED = "unfinished"
NOTHING, NO_STAMPS, NO_TIMES = Response(), bytearray(), array("d")
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a response raises that is odd in a way nobody thought of: the request's failure, not the load's."""

LAST_PARTS = 3
"""Of a response's pieces: `[DONE]` comes in one of them, before the last chunk's end and any trailers."""
FAILED_PAUSE_S = 1.0
"""A closed loop's user whose request failed asks something else no sooner than this, as far as that shows unread."""


class Writer:
    """Makes the bytes of one load's requests."""

    def __init__(
        self,
        target: Target,
        endpoint: Endpoint,
        *,
        cache_salt: str | None,
        sampling: Mapping[str, Any],
    ) -> None:
        self.endpoint = endpoint
        self._asking = Asking(target, PATHS[endpoint])
        self._target = target
        self._salt = cache_salt
        self._sampling = sampling

    def request(self, messages: Sequence[bytes], num_tokens: int, lap: int = 0) -> bytes:
        """The whole request; each further lap of a closed loop has a salt of its own."""
        salt = f"{self._salt}-{lap}" if lap and self._salt is not None else self._salt
        options = asked_options(self._target, num_tokens, cache_salt=salt, sampling=self._sampling)
        return self._asking.whole(body_bytes(self.endpoint, messages, json.dumps(options).encode()))


@dataclass(slots=True)
class Step:
    """One planned request: its row in the plan, with its words as they go into a body.

    Attributes:
        index: of the `ScheduledRequest`, as the fields below.
        at_s: of a chain's first one.
        prompt_tokens: as scheduled.
        output_tokens: as scheduled.
        conversation: as scheduled.
        turn: 0 begins a conversation.
        gap_s: pause before it.
        messages: what it adds to the conversation; let go of once its request is made and nothing follows.
    """

    index: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    conversation: int
    turn: int
    gap_s: float
    messages: tuple[bytes, ...]

    @classmethod
    def of_row(cls, row: Sequence[Any], endpoint: Endpoint) -> Step:
        """Reads what `driver` wrote."""
        index, at_s, prompt_tokens, output_tokens, conversation, turn, gap_s, text, system = row
        own = said(endpoint, "user", text)
        messages = (own,) if system is None else (said(endpoint, "system", system), own)
        return cls(index, at_s, prompt_tokens, output_tokens, conversation, turn, gap_s, messages)


@dataclass(frozen=True, slots=True)
class Chain:
    """Requests of which each waits for the one before; most have just one.

    Attributes:
        steps: in order.
        closed: one of a closed loop's users, who begins again after the last step.
        num_requests: more than any index of the schedule: what a lap adds to an index.
        num_conversations: likewise of conversations.
    """

    steps: tuple[Step, ...]
    closed: bool
    num_requests: int
    num_conversations: int

    def next(self, place: int, lap: int, ok: bool) -> tuple[int, int, float] | None:
        """Place, lap and pause of what follows; None when nothing does.

        A conversation that broke is over. A closed loop's user then begins the next one, after a pause.
        """
        if ok and place + 1 < len(self.steps):
            return place + 1, lap, self.steps[place + 1].gap_s
        if not self.closed:
            return None
        pause_s = 0.0 if ok else FAILED_PAUSE_S
        for later in range(place + 1, len(self.steps)):
            if self.steps[later].turn == 0:
                return later, lap, max(pause_s, self.steps[later].gap_s)
        gaps_s = [step.gap_s for step in self.steps[1:] if step.turn == 0]
        return 0, lap + 1, max([pause_s, *gaps_s[:1]])


class Exchange:
    """One request, and what came back as it came.

    Attributes:
        chain: that it belongs to; `place` and `lap` say where in it.
        step: what was planned.
        due_s: seconds from the window's start.
        data: the request's bytes.
        messages: of the conversation up to here, its own included.
        sent_s: when the first byte was about to be handed to the kernel, on CLOCK_MONOTONIC, as all that follow.
        end_s: when the response ended, or the attempt was given up.
        response: what came.
        stamps: the kernel's, of each receive.
        seen_s: when each receive returned.
        failure: what went wrong beneath HTTP.
        has_begun: something of its answer has come.
        num_receives: how many there were, once it is read.
        num_unstamped: those of them without a kernel's stamp that holds.
    """

    __slots__ = (
        "_answer", "_clock_steps", "chain", "data", "due_s", "end_s", "failure", "has_begun", "lap", "messages",
        "num_receives", "num_unstamped", "place", "response", "seen_s", "sent_s", "stamps", "step",
    )  # fmt: skip

    def __init__(
        self,
        chain: Chain,
        place: int,
        lap: int,
        due_s: float,
        writer: Writer,
        history: Sequence[bytes] = (),
    ) -> None:
        self.chain, self.place, self.lap = chain, place, lap
        self.step = chain.steps[place]
        self.due_s = due_s
        self.messages = (*history, *self.step.messages)
        self.data = writer.request(self.messages, self.step.output_tokens, lap)
        if not self.is_followed:
            self.messages = self.step.messages = ()
        self.sent_s: float | None = None
        self.end_s: float | None = None
        self.failure: str | None = None
        self.has_begun = False
        self.num_receives = self.num_unstamped = 0
        self._answer: Answer | None = None
        self._forget()

    def begin(self, clock_steps: int) -> None:
        """Forgets an earlier attempt."""
        self.response = Response()
        self.stamps = bytearray()
        self.seen_s = array("d")
        self.failure = None
        self._clock_steps = clock_steps

    def _forget(self) -> None:
        self.response, self.stamps, self.seen_s, self._clock_steps = NOTHING, NO_STAMPS, NO_TIMES, 0

    @property
    def is_first(self) -> bool:
        """Nothing goes before it: when it is due is known beforehand."""
        return not (self.place or self.lap)

    @property
    def index(self) -> int:
        """Of its record."""
        return self.step.index + self.lap * self.chain.num_requests

    @property
    def is_followed(self) -> bool:
        """Something may wait for its end."""
        return self.chain.closed or self.place + 1 < len(self.chain.steps)

    def read(self, offset: Offset, pause: Callable[[], None] = lambda: None) -> Answer:
        """Parses what came, and lets go of the bytes."""
        if self._answer is None:
            offset_ns = self._offset_ns(offset)
            arrived_s = arrivals(self.stamps, self.seen_s, offset_ns)
            self.num_receives = len(arrived_s)
            self.num_unstamped = len(arrived_s) if offset_ns is None else array("q", bytes(self.stamps))[::2].count(0)
            answer = self._parsed(arrived_s, pause)
            if self.failure is None and self.end_s is not None and arrived_s:
                self.end_s = arrived_s[-1]
            if self.failure is not None and answer.status in (None, 200):  # else the server had said what is wrong
                answer.error = self.failure
            self._answer, self.data = answer, b""
            self._forget()
        return self._answer

    def _offset_ns(self, offset: Offset) -> int | None:
        """Of the clocks; None when somebody set one since the request was sent."""
        offset.check()
        return offset.ns if offset.steps == self._clock_steps else None

    @property
    def needs_reading(self) -> bool:
        """What follows depends on what the answer says: it repeats it, or this one may have failed.

        Reading takes some 4 us an event. Where all users' answers end in one step, the last one's next request would
        wait for all of them to be read.
        """
        seen = self.response
        is_sound = self.failure is None and seen.whole and seen.status == 200 and bool(self.seen_s)
        is_done = is_sound and b"[DONE]" in b"".join(seen.parts[-LAST_PARTS:])
        return not is_done or self._is_repeated() or any(b'"error"' in part for part in seen.parts)

    def date_end(self, offset: Offset) -> None:
        """Dates the end as `read` does, before that."""
        self.end_s, *_ = arrivals(self.stamps[-STAMP_BYTES:], self.seen_s[-1:], self._offset_ns(offset))

    def _parsed(self, arrived_s: Sequence[float], pause: Callable[[], None]) -> Answer:
        try:
            return parse(self.response, arrived_s, pause, keep_text=self._is_repeated())
        except UNREADABLE as error:
            return Answer(status=self.response.status, error=f"broken response: not understood: {error!r:.200}")

    def follower(self, writer: Writer, answer: Answer | None, t0_s: float) -> Exchange | None:
        """What comes due because this one ended; ready to be sent.

        Args:
            writer: of its bytes.
            answer: None where it was not read, and need not be.
            t0_s: the window's start.
        """
        ok = (answer is None or answer.error is None) and self.end_s is not None
        found = self.chain.next(self.place, self.lap, ok)
        if found is None or self.end_s is None:
            return None
        place, lap, gap_s = found
        goes_on = lap == self.lap and self.chain.steps[place].turn > 0
        history: tuple[bytes, ...] = ()
        if goes_on and answer is not None:
            history = (*self.messages, said(writer.endpoint, "assistant", "".join(answer.texts)))
        return Exchange(self.chain, place, lap, self.end_s - t0_s + gap_s, writer, history)

    def record(self, answer: Answer, t0_s: float) -> list[Any]:
        """A row in the order of `driver.RECORD_FIELDS`, and the number of its token events."""
        error = "not sent" if self.end_s is None else answer.error

        def since_t0(moment_s: float | None) -> float | None:
            return None if moment_s is None else moment_s - t0_s

        step, chain = self.step, self.chain
        return [
            self.index,
            self.due_s,
            since_t0(self.sent_s),
            since_t0(answer.times[0] if answer.times else None),
            since_t0(answer.times[-1] if answer.times else None),
            since_t0(self.end_s),
            step.prompt_tokens,
            step.output_tokens,
            answer.prompt_tokens,
            sum(answer.counts) if answer.output_tokens is None else answer.output_tokens,
            None if error == UNFINISHED else answer.finish_reason,
            error,
            answer.status,
            step.conversation + self.lap * chain.num_conversations,
            step.turn,
            answer.counting if answer.counts else None,
            len(answer.counts),
        ]

    def told(self, answer: Answer, t0_s: float) -> list[Any]:
        """What `records.Ended` holds of it, in its order."""
        ok = answer.error is None and self.end_s is not None
        times = (answer.times[0] - t0_s, answer.times[-1] - t0_s) if answer.times else (None, None)
        num_tokens = sum(answer.counts) if answer.output_tokens is None else answer.output_tokens
        return [self.index, self.due_s, *times, num_tokens, ok]

    def _is_repeated(self) -> bool:
        """The next turn repeats its answer."""
        following = self.place + 1
        return following < len(self.chain.steps) and self.chain.steps[following].turn > 0
