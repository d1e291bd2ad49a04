"""A load in virtual time: the schedule's requests against a model of the engine, to the records of a real load.

Nothing waits and nothing is sent: a load of two minutes takes well under a second. A request reaches the engine
`request_s` after it is due; a token arrives when the step that gives it ends; later turns and users of a closed loop
come due as in a real load (`workload/locustfile.py`), after the end of what they wait for and within the window.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from varcas.batching import Batcher, Limits, Step, Stream
from varcas.errors import InputError
from varcas.records import LoadResult, RequestRecord, Sample, ScheduledRequest

SAMPLE_PERIOD_S = 1.0
BLOCK_IDS_TOKENS = 512
"""Tokens that one of `ScheduledRequest.blocks` stands for."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What serves in virtual time.

    Attributes:
        limits: of its scheduler.
        seconds: the time of a step.
        request_s: of a request, before the engine has it.
        asynchronous: a step is put together while the one before it runs.
        seed: of what speculation accepts.
    """

    limits: Limits
    seconds: Callable[[Step], float]
    request_s: float = 0.0
    asynchronous: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Due:
    """A request that has come due: when, and the tokens of its prompt with the history before it."""

    request: ScheduledRequest
    at_s: float
    prompt_tokens: int


class VirtualLoad:
    """Runs once; `records` as they end, then `result` of the whole.

    Memory does not grow with the window but for the schedule and the samples: records are handed on.

    Args:
        requests: of the schedule (`workload.schedule.schedule`).
        engine: that serves them.
        duration_s: of the window.
        max_drain_s: after it, for what is under way.

    Raises:
        InputError: requests with words of their own, which only a tokenizer can count.

    Attributes:
        samples: once a second, as `/metrics` would have them.
        drain_s: spent after the window.
        batcher: the scheduler.
    """

    def __init__(
        self, requests: Sequence[ScheduledRequest], engine: Engine, *, duration_s: float, max_drain_s: float
    ) -> None:
        if any(request.prompt is not None or not request.output_tokens for request in requests):
            raise InputError(
                "workload.data: holds texts: a simulated engine has no tokenizer. Give lengths, or a profile."
            )
        self._engine, self._duration_s = engine, duration_s
        self._stop_s = duration_s + max_drain_s
        self._requests = requests
        self._followers = {request.after: request for request in requests if request.after is not None}
        self._numbers = itertools.count()
        self._arriving: list[tuple[float, int, _Due]] = []
        self._open: dict[int, _Due] = {}  # by the index of the request
        self.batcher = Batcher(engine.limits, engine.seed)
        self.samples: list[Sample] = []
        self.drain_s = 0.0
        for request in requests:
            if request.after is None:
                self._come(_Due(request, request.at_s, request.prompt_tokens))

    def result(self) -> LoadResult:
        """All records in the order of the schedule."""
        records = sorted(self.records(), key=lambda record: record.index)
        return LoadResult(tuple(records), 0.0, self._duration_s, self.drain_s, client_cpu_frac=0.0)

    def records(self) -> Iterator[RequestRecord]:
        """Each request's record when it has ended, those that did not last."""
        last_s = 0.0
        for stream, end_s in self._ended():
            last_s = end_s
            due = self._open.pop(stream.index)
            self._follow(due, stream, end_s)
            yield self._record(due, stream, end_s)
        self._look(math.inf if self._open else max(last_s, self._duration_s))
        self.drain_s = (self._stop_s if self._open else max(last_s, self._duration_s)) - self._duration_s
        streams = {stream.index: stream for stream in (*self.batcher.running, *self.batcher.waiting)}
        for index, due in self._open.items():
            yield self._unfinished(due, streams.get(index))

    # the clock

    def _ended(self) -> Iterator[tuple[Stream, float]]:
        """What ends, and when, until the drain is over: sets the clock forward step by step."""
        engine, batcher = self._engine, self.batcher
        now_s, step = 0.0, None
        while True:
            if step is None:
                self._arrive(now_s)
                step = batcher.schedule()
            if step is None:
                if not self._arriving:
                    return
                now_s = max(now_s, self._arriving[0][0])
                if now_s > self._stop_s:
                    return
                continue
            following = self._next(now_s) if engine.asynchronous else None
            now_s += engine.seconds(step)
            if now_s > self._stop_s:
                return
            self._look(now_s)
            for stream in batcher.deliver(step, now_s):
                yield stream, now_s
            step = following

    def _next(self, now_s: float) -> Step | None:
        self._arrive(now_s)
        return self.batcher.schedule()

    def _come(self, due: _Due) -> None:
        heapq.heappush(self._arriving, (due.at_s + self._engine.request_s, next(self._numbers), due))

    def _arrive(self, until_s: float) -> None:
        while self._arriving and self._arriving[0][0] <= until_s:
            at_s, _, due = heapq.heappop(self._arriving)
            request = due.request
            self._open[request.index] = due
            key = block_key(request, self._engine.limits.block_size)
            self.batcher.add(Stream(request.index, at_s, due.prompt_tokens, request.output_tokens, key))

    def _follow(self, due: _Due, stream: Stream, end_s: float) -> None:
        """What waits for this one comes due, unless the window is over by then."""
        follower = self._followers.get(due.request.index)
        if follower is None or end_s + follower.gap_s >= self._duration_s:
            return
        history = stream.prompt_tokens + stream.output_tokens if follower.turn else 0
        self._come(_Due(follower, end_s + follower.gap_s, history + follower.prompt_tokens))

    def _look(self, until_s: float) -> None:
        """Samples of the whole seconds that have passed."""
        batcher = self.batcher
        while (at_s := len(self.samples) * SAMPLE_PERIOD_S) <= min(until_s, self._stop_s):
            self.samples.append(
                Sample(
                    t_s=at_s,
                    num_requests_running=float(len(batcher.running)),
                    num_requests_waiting=float(len(batcher.waiting)),
                    kv_cache_usage_frac=batcher.pool.held / batcher.pool.num_blocks,
                    preemptions=float(batcher.preemptions),
                    prompt_tokens=float(batcher.prompt_tokens),
                    output_tokens=float(batcher.output_tokens),
                    prefix_cache_queries=float(batcher.queries),
                    prefix_cache_hits=float(batcher.hits),
                )
            )

    # records

    def _record(self, due: _Due, stream: Stream, end_s: float) -> RequestRecord:
        times_s, counts = self.batcher.times_s(stream)
        return _as_record(due, times_s, counts, end_s, "length", None)

    def _unfinished(self, due: _Due, stream: Stream | None) -> RequestRecord:
        """What the drain did not see the end of; those that ended in a step beyond it have their tokens before."""
        times_s, counts = self.batcher.times_s(stream) if stream is not None else ([], [])
        return _as_record(due, times_s, counts, self._stop_s, None, "unfinished")


def _as_record(
    due: _Due, times_s: list[float], counts: list[int], end_s: float, reason: str | None, error: str | None
) -> RequestRecord:
    request, sent_s = due.request, due.at_s
    return RequestRecord(
        index=request.index,
        scheduled_s=sent_s,
        sent_s=sent_s,
        first_token_s=times_s[0] if times_s else None,
        last_token_s=times_s[-1] if times_s else None,
        end_s=end_s,
        scheduled_prompt_tokens=request.prompt_tokens,
        scheduled_output_tokens=request.output_tokens,
        prompt_tokens=due.prompt_tokens if times_s else None,
        output_tokens=sum(counts),
        token_offsets_s=tuple([at_s - sent_s for at_s in times_s]),
        token_counts=tuple(counts),
        finish_reason=reason,
        error=error,
        http_status=200 if times_s else None,
        conversation=request.conversation,
        turn=request.turn,
    )


def block_key(request: ScheduledRequest, block_size: int) -> Callable[[int], Hashable]:
    """Key of each block of a request's tokens: equal where texts begin alike as far as that block.

    Those wholly within a shared system prompt are its own; of a trace with ids, those of the ids up to the block; any
    other is the conversation's, whose text only grows.
    """
    shared, prefix_seed = request.prefix_tokens // block_size, request.prefix_seed
    conversation, ids = request.conversation, request.blocks

    def key(at: int) -> Hashable:
        if prefix_seed is not None and at < shared:
            return ("prefix", prefix_seed, at)
        place = at * block_size // BLOCK_IDS_TOKENS
        if ids and place < len(ids) and (at + 1) * block_size <= request.prompt_tokens:
            return ("ids", ids[: place + 1], at)
        return (conversation, at)

    return key
