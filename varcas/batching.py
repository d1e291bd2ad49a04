"""A model of vLLM's V1 scheduler: what goes into each step, in no time of its own.

After `Scheduler.schedule` and `AsyncScheduler`, vLLM 0.32 `v1/core/sched/scheduler.py` and `async_scheduler.py`:
running sequences first, then waiting ones while budget, sequences and blocks last; prompts in chunks; a sequence that
finds no block preempts the last one (or that of least priority), which is computed anew later; a prefix that lies in
the cache is not computed. With async scheduling a step is put together while the one before it still runs, so that
what ends in that one still holds its place (`virtual.py` calls `schedule` before `deliver` then).

Sequences that decode are kept as a group: all advance by one token, so a step costs what joins and leaves it, however
many there are. Simplifications, without effect under vLLM's defaults but for the last: sequences that decode come
before prompts that are under way, also where `long_prefill_token_threshold` lets a later one overtake; a prompt under
way that finds no block gives up its own; with speculation every step drafts in full, or as much less for each as the
budget asks for, and what is accepted is known at once. Without threshold and speculation `tests/test_batching.py` holds
each step to that of vLLM's own scheduler.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from varcas.blocks import BlockPool, Key

MAX_KEPT = 4096
"""Ends of steps that nobody needs any more are let go of in such portions."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step; spelled as vLLM's flags where there is one.

    Attributes:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens in a step; at least `max_num_seqs`.
        max_model_len: longest sequence; its blocks exist.
        num_blocks: of KV cache that sequences may use: without the one that vLLM keeps back.
        block_size: tokens in a block.
        enable_chunked_prefill: a prompt may take several steps.
        enable_prefix_caching: what is computed may be used again.
        long_prefill_token_threshold: most tokens of one prompt in a step while others are there; 0: no such limit.
        watermark_blocks: left free when a sequence is taken in beside others.
        priority: the scheduling policy is `priority`, not first come first served.
        drafted: tokens that speculation drafts for each sequence in a step.
        acceptance: probability that a drafted token is accepted, given that those before it were.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int = 16
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    watermark_blocks: int = 0
    priority: bool = False
    drafted: int = 0
    acceptance: float = 0.0


class Stream:
    """A request as the scheduler has it.

    Args:
        index: of its `ScheduledRequest`.
        arrival_s: when the engine got it.
        prompt_tokens: in its prompt.
        output_tokens: that it gives.
        key: of a block of its tokens, by the block's place: equal for blocks that begin alike.
        priority: smaller goes first.

    Attributes:
        spans: steps that gave it tokens: the first one of each stretch, and how many.
        counts: tokens that each of these steps gave; empty when each gave one.
        preemptions: how often it was.
    """

    __slots__ = (
        "arrival_s", "computed", "counts", "ending", "index", "key", "last_step", "named", "offset", "output_tokens",
        "preemptions", "priority", "produced", "prompt_tokens", "slots", "span_start", "spans", "target",
    )  # fmt: skip

    def __init__(
        self, index: int, arrival_s: float, prompt_tokens: int, output_tokens: int, key: Callable[[int], Key],
        priority: int = 0,
    ) -> None:  # fmt: skip
        self.index, self.arrival_s, self.priority = index, arrival_s, priority
        self.prompt_tokens, self.output_tokens, self.key = prompt_tokens, output_tokens, key
        self.spans: list[tuple[int, int]] = []
        self.counts: list[int] = []
        self.preemptions = 0
        self.produced = 0  # tokens that it has given, that of a step under way included
        self.computed = 0  # tokens in the cache; of one that decodes `offset` + step
        self.target = prompt_tokens  # tokens to compute before it gives the next
        self.slots = 0  # tokens for which it holds blocks
        self.named: list[Key] = []  # its blocks that have a key
        self.offset = self.last_step = self.span_start = 0
        self.ending = False

    @property
    def rank(self) -> tuple[int, float, int]:
        """Order under the policy `priority`."""
        return self.priority, self.arrival_s, self.index


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine, in the terms of `steptime.StepTimes.seconds`.

    Attributes:
        index: running number of those that were not empty.
        batch: sequences that decode a token each.
        context: tokens that each of them has cached, on average.
        prefill_tokens: of prompts, and of sequences that verify drafts.
        cached: tokens that each of these had cached already, on average.
        prompts: how many these are.
        drafting: sequences that draft and verify; among `prompts`.
        ending: what gives its last token in it.
        output_tokens: that come out of it.
        prompt_tokens: of prompts that are computed whole for the first time with it.
    """

    index: int
    batch: int
    context: float
    prefill_tokens: int
    cached: float
    prompts: int
    drafting: int
    ending: tuple[Stream, ...]
    output_tokens: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """That go through the model."""
        return self.batch + self.prefill_tokens


class _Decoding:
    """Sequences that decode, a token in each step: sums, and who leaves when."""

    def __init__(self, block_size: int) -> None:
        self._new_block = [0] * block_size  # how many need one in the steps of each remainder
        self._offsets = 0
        self._leaving: dict[int, list[Stream]] = {}
        self.count = 0

    @property
    def rows(self) -> int:
        return self.count

    def mean_context(self, step: int) -> float:
        return step + self._offsets / self.count if self.count else 0.0

    def needed(self, step: int) -> int:
        return self._new_block[step % len(self._new_block)]

    def join(self, stream: Stream, step: int) -> None:
        stream.offset = stream.computed - step
        stream.last_step = step + stream.output_tokens - stream.produced - 1
        self._leaving.setdefault(stream.last_step, []).append(stream)
        self._count(stream, 1)

    def _count(self, stream: Stream, by: int) -> None:
        self._new_block[-stream.offset % len(self._new_block)] += by
        self._offsets += by * stream.offset
        self.count += by

    def leave(self, stream: Stream, step: int) -> None:
        """Before it takes part in this step."""
        stream.produced = stream.output_tokens - (stream.last_step - step + 1)
        stream.computed = stream.slots = stream.offset + step
        self._leaving[stream.last_step].remove(stream)
        self._count(stream, -1)

    def blocks_tokens(self, stream: Stream, step: int) -> int:
        return stream.offset + step

    def advance(self, step: int) -> tuple[list[Stream], int]:
        """Those that give their last token in this step, and the tokens that all give."""
        count, ending = self.count, self._leaving.pop(step, [])
        for stream in ending:
            stream.produced = stream.output_tokens
            stream.computed = stream.slots = stream.offset + step + 1
            self._count(stream, -1)
        return ending, count


class _Drafting:
    """Sequences that verify drafts: a number of tokens each, by chance."""

    def __init__(self, limits: Limits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._streams: dict[Stream, None] = {}

    @property
    def count(self) -> int:
        return len(self._streams)

    @property
    def rows(self) -> int:
        return self.count * (1 + self._drafts)

    @property
    def _drafts(self) -> int:
        """Of each: fewer where the budget does not hold all."""
        return min(self._limits.drafted, self._limits.max_num_batched_tokens // max(self.count, 1) - 1)

    def mean_context(self, step: int) -> float:
        return sum(stream.computed for stream in self._streams) / max(self.count, 1)

    def needed(self, step: int) -> int:
        size = self._limits.block_size
        return sum(max(0, _blocks(self._reach(s), size) - _blocks(s.slots, size)) for s in self._streams)

    def _reach(self, stream: Stream) -> int:
        return min(stream.computed + 1 + self._drafts, self._limits.max_model_len)

    def join(self, stream: Stream, step: int) -> None:
        self._streams[stream] = None

    def leave(self, stream: Stream, step: int) -> None:
        del self._streams[stream]

    def blocks_tokens(self, stream: Stream, step: int) -> int:
        return stream.slots

    def advance(self, step: int) -> tuple[list[Stream], int]:
        ending, given, drafts = [], 0, self._drafts
        for stream in self._streams:
            stream.slots = max(stream.slots, self._reach(stream))
            tokens = min(1 + self._accepted(drafts), stream.output_tokens - stream.produced)
            stream.produced += tokens
            stream.computed += tokens
            stream.counts.append(tokens)
            given += tokens
            if stream.produced == stream.output_tokens:
                ending.append(stream)
        for stream in ending:
            del self._streams[stream]
        return ending, given

    def _accepted(self, drafts: int) -> int:
        count = 0
        while count < drafts and self._rng.random() < self._limits.acceptance:
            count += 1
        return count


class Batcher:
    """The scheduler of one engine.

    Args:
        limits: of its configuration.
        seed: of what speculation accepts.

    Attributes:
        running: in the order in which they were taken in.
        waiting: likewise.
        pool: its blocks.
        ends_s: when each step ended, from step `first_kept` on.
        preemptions: so far; likewise `prompt_tokens` and `output_tokens` that were computed, and tokens that were
            looked up in the prefix cache (`queries`) and found (`hits`).
    """

    def __init__(self, limits: Limits, seed: int = 0) -> None:
        self.limits, self.pool = limits, BlockPool(limits.num_blocks)
        self.running: dict[Stream, None] = {}
        self.waiting: deque[Stream] = deque()
        self.ends_s: list[float] = []
        self.first_kept = 0
        self.preemptions = self.prompt_tokens = self.output_tokens = self.queries = self.hits = 0
        self._partial: list[Stream] = []
        drafts = limits.drafted > 0
        self._decoding = _Drafting(limits, random.Random(seed)) if drafts else _Decoding(limits.block_size)
        self._next = 0

    def add(self, stream: Stream) -> None:
        """Takes in a request; one that comes later must not be added before."""
        self.waiting.append(stream)
        if self.limits.priority:
            self.waiting = deque(sorted(self.waiting, key=lambda one: one.rank))

    # a step

    def schedule(self) -> Step | None:
        """Puts the next step together; None when there is nothing to do."""
        index, before = self._next, self.preemptions
        self._make_room()
        decoding = self._decoding
        count, rows, context = decoding.count, decoding.rows, decoding.mean_context(index)
        self.pool.take(decoding.needed(index))
        ending, given = decoding.advance(index)
        for stream in ending:
            stream.ending = True
            stream.spans.append((stream.span_start, index - stream.span_start + 1))
        budget = self.limits.max_num_batched_tokens - rows
        chunks = self._continued(budget)
        budget -= sum(taken for _, _, taken in chunks)
        if self.preemptions == before:
            chunks += self._admitted(budget)
        if not count and not chunks:
            return None
        self._next += 1
        whole = [stream for stream, _, _ in chunks if stream.computed == stream.target]
        prompts = sum(stream.prompt_tokens for stream in whole if not stream.produced)
        ending += [stream for stream in whole if self._begin(stream, index)]
        return self._step(index, (count, rows, context), chunks, ending, (given + len(whole), prompts))

    def _step(
        self, index: int, decoding: tuple[int, int, float], chunks: list[tuple[Stream, int, int]],
        ending: list[Stream], given: tuple[int, int],
    ) -> Step:  # fmt: skip
        count, rows, context = decoding
        tokens, held = sum(taken for _, _, taken in chunks), sum(cached for _, cached, _ in chunks)
        drafting = count if self.limits.drafted else 0
        if drafting:
            tokens, count = tokens + rows, 0
        prompts = len(chunks) + drafting
        cached = (held + context * drafting) / prompts if prompts else 0.0
        return Step(index, count, context if count else 0.0, tokens, cached, prompts, drafting, tuple(ending), *given)

    def _make_room(self) -> None:
        """Preempts until those that decode find their blocks."""
        while self._decoding.needed(self._next) > self.pool.free:
            self._preempt(self._victim())

    def _victim(self) -> Stream:
        return (
            max(self.running, key=lambda stream: stream.rank) if self.limits.priority else next(reversed(self.running))
        )

    def _preempt(self, stream: Stream) -> None:
        flying = self._next - self.first_kept - len(self.ends_s)  # steps whose tokens are not known yet
        if stream in self._partial:
            self._partial.remove(stream)
            flying = 0
        elif not stream.ending:
            self._decoding.leave(stream, self._next)
            stream.spans.append((stream.span_start, self._next - stream.span_start))
        del self.running[stream]
        self._free(stream, max(stream.target, stream.computed - flying) if flying else stream.computed)
        self.preemptions += 1
        if stream.ending:  # its last token is on its way all the same
            return
        stream.target, stream.preemptions = stream.prompt_tokens + stream.produced, stream.preemptions + 1
        self.waiting.appendleft(stream)
        if self.limits.priority:
            self.waiting = deque(sorted(self.waiting, key=lambda one: one.rank))

    def _free(self, stream: Stream, known: int) -> None:
        """Gives its blocks back, the full ones of its known tokens with their keys."""
        size = self.limits.block_size
        self._name_blocks(stream, min(known, stream.prompt_tokens + stream.produced))
        self.pool.give_back(stream.named, _blocks(stream.slots, size) - len(stream.named))
        stream.named, stream.slots, stream.computed = [], 0, 0

    def _name_blocks(self, stream: Stream, tokens: int) -> None:
        """Its full blocks up to `tokens` get their keys, if nobody else's have them."""
        if not self.limits.enable_prefix_caching:
            return
        held = set(stream.named)
        for at in range(tokens // self.limits.block_size):
            key = stream.key(at)
            if key not in held and self.pool.name(key):
                stream.named.append(key)

    def _continued(self, budget: int) -> list[tuple[Stream, int, int]]:
        """Further chunks of prompts that are under way: stream, tokens that it had, tokens that it takes."""
        chunks = []
        for stream in list(self._partial):
            taken = min(self._capped(stream.target - stream.computed), budget)
            if taken <= 0:
                break
            if not self._compute(stream, taken):
                self._preempt(stream)
                break
            chunks.append((stream, stream.computed - taken, taken))
            budget -= taken
        self._partial = [stream for stream in self._partial if stream.computed < stream.target]
        return chunks

    def _capped(self, tokens: int) -> int:
        threshold = self.limits.long_prefill_token_threshold
        alone = len(self.running) + len(self.waiting) <= 1
        return min(tokens, threshold) if threshold and not alone else tokens

    def _compute(self, stream: Stream, tokens: int) -> bool:
        """Takes the blocks of so many more tokens; False when there are not enough."""
        size = self.limits.block_size
        needed = _blocks(stream.computed + tokens, size) - _blocks(stream.slots, size)
        if needed > self.pool.free:
            return False
        self.pool.take(needed)
        stream.computed += tokens
        stream.slots = stream.computed
        self._name_blocks(stream, stream.computed)
        return True

    def _admitted(self, budget: int) -> list[tuple[Stream, int, int]]:
        """First chunks of waiting ones, as many as find room; as `_continued`."""
        chunks = []
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            stream = self.waiting[0]
            keys = self._cached(stream)
            cached = len(keys) * self.limits.block_size
            taken = self._capped(stream.target - cached)
            if not self.limits.enable_chunked_prefill and taken > budget:
                break
            taken = min(taken, budget)
            if not self._has_room(stream, keys):
                break
            self.waiting.popleft()
            self._admit(stream, keys, taken)
            chunks.append((stream, cached, taken))
            budget -= taken
        return chunks

    def _cached(self, stream: Stream) -> list[Key]:
        """Keys of its first blocks that are in the cache; at least one token is left to compute."""
        if not self.limits.enable_prefix_caching:
            return []
        keys = []
        for at in range((stream.target - 1) // self.limits.block_size):
            key = stream.key(at)
            if not self.pool.holds(key):
                break
            keys.append(key)
        return keys

    def _has_room(self, stream: Stream, keys: list[Key]) -> bool:
        """The whole of it has blocks (`scheduler_reserve_full_isl`), beside what is to be kept free."""
        needed = _blocks(stream.target, self.limits.block_size) - len(keys) + self.pool.unused_among(keys)
        return needed + (self.limits.watermark_blocks if self.running else 0) <= self.pool.free

    def _admit(self, stream: Stream, keys: list[Key], tokens: int) -> None:
        self.pool.share(keys)
        stream.named = list(keys)
        stream.computed = stream.slots = len(keys) * self.limits.block_size
        if not stream.preemptions:
            self.queries += stream.target if self.limits.enable_prefix_caching else 0
            self.hits += stream.computed
        self.running[stream] = None
        taken = self._compute(stream, tokens)
        assert taken, "there was room for the whole of it"
        if stream.computed < stream.target:
            self._partial.append(stream)

    def _begin(self, stream: Stream, index: int) -> bool:
        """Its prompt is computed: this step gives a token; True when that is its last."""
        stream.produced += 1
        stream.span_start = index
        if self.limits.drafted:
            stream.counts.append(1)
        if stream.produced == stream.output_tokens:
            stream.ending = True
            stream.spans.append((index, 1))
            return True
        self._decoding.join(stream, index + 1)
        return False

    # its end

    def deliver(self, step: Step, end_s: float) -> tuple[Stream, ...]:
        """The step has ended: what ended with it lets go of its blocks, and is returned.

        `times_s` tells of that until the next step ends.
        """
        if len(self.ends_s) > 2 * MAX_KEPT:
            self._forget()
        self.ends_s.append(end_s)
        self.output_tokens += step.output_tokens
        self.prompt_tokens += step.prompt_tokens
        for stream in step.ending:
            if stream in self.running:
                del self.running[stream]
                self._free(stream, stream.computed)
        return step.ending

    def _forget(self) -> None:
        """Lets go of the ends of steps that gave tokens to nobody who is still here."""
        alive = [*self.running, *(stream for stream in self.waiting if stream.spans)]
        needed = [stream.spans[0][0] if stream.spans else stream.span_start for stream in alive if stream.produced]
        keep = min([*needed, self.first_kept + len(self.ends_s) - MAX_KEPT])
        if keep > self.first_kept:
            del self.ends_s[: keep - self.first_kept]
            self.first_kept = keep

    # what came of a stream

    def times_s(self, stream: Stream) -> tuple[list[float], list[int]]:
        """When its tokens came, step by step, and how many with each; of one that is under way, those so far."""
        over = self.first_kept + len(self.ends_s)
        spans = list(stream.spans)
        if stream in self.running and not stream.ending and stream.produced and stream not in self._partial:
            spans.append((stream.span_start, over - stream.span_start))
        at = [self.ends_s[s - self.first_kept : min(s + n, over) - self.first_kept] for s, n in spans]
        times = [end_s for part in at for end_s in part]
        return times, stream.counts[: len(times)] if stream.counts else [1] * len(times)

    def blocks_of(self, stream: Stream) -> tuple[list[Key], int]:
        """Of one that runs: its blocks that have a key, and how many have none."""
        decodes = not stream.ending and stream.computed >= stream.target and stream not in self._partial
        tokens = self._decoding.blocks_tokens(stream, self._next) if decodes else stream.slots
        return stream.named, _blocks(tokens, self.limits.block_size) - len(stream.named)


def _blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)
