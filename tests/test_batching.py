"""Laws of the scheduler's model, and what it does in cases that were worked out by hand from vLLM's own code."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varcas.batching import Batcher, Limits, Step, Stream
from varcas.blocks import BlockPool
from varcas.records import RequestRecord, ScheduledRequest
from varcas.virtual import Engine, VirtualLoad

BLOCK = 16


def limits(**changes: object) -> Limits:
    fixed: dict[str, object] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "num_blocks": 40, "block_size": BLOCK,
    }  # fmt: skip
    return Limits(**fixed | changes)  # type: ignore[arg-type]


def request(index: int, at_s: float = 0.0, prompt: int = 20, output: int = 10, **changes: object) -> ScheduledRequest:
    fixed: dict[str, object] = {"seed": index, "conversation": index}
    return ScheduledRequest(index, at_s, prompt, output, **fixed | changes)  # type: ignore[arg-type]


LIMITS = st.builds(
    limits,
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.sampled_from([16, 40, 64, 512]),
    num_blocks=st.integers(33, 80),
    block_size=st.sampled_from([8, 16]).map(lambda size: size * 2),
    enable_prefix_caching=st.booleans(),
    long_prefill_token_threshold=st.sampled_from([0, 0, 24]),
    watermark_blocks=st.sampled_from([0, 2]),
    priority=st.booleans(),
    drafted=st.sampled_from([0, 0, 3]),
    acceptance=st.floats(0, 1),
)
REQUESTS = st.lists(
    st.tuples(st.floats(0, 3), st.integers(1, 200), st.integers(1, 120), st.booleans(), st.booleans()),
    min_size=1,
    max_size=14,
)
LENGTHS = REQUESTS.map(
    lambda some: [
        request(at, due, prompt, output, **({"prefix_seed": 1, "prefix_tokens": min(prompt, 64)} if shares else {}))
        for at, (due, prompt, output, shares, _) in enumerate(sorted(some))
    ]
)


class Watched:
    """An engine whose steps are looked at as they run."""

    def __init__(self, bounds: Limits, asynchronous: bool, scale: float = 1.0) -> None:
        self.steps: list[Step] = []
        self.bounds, self.scale, self.asynchronous = bounds, scale, asynchronous
        self.load: VirtualLoad | None = None

    def seconds(self, step: Step) -> float:
        self.steps.append(step)
        assert self.load is not None
        check_blocks(self.load.batcher)
        assert step.tokens <= self.bounds.max_num_batched_tokens
        assert len(self.load.batcher.running) <= self.bounds.max_num_seqs
        return self.scale * (2.0**-7 + 2.0**-14 * step.tokens)

    def run(self, requests: list[ScheduledRequest], drain_s: float = 1e4) -> tuple[RequestRecord, ...]:
        engine = Engine(self.bounds, self.seconds, asynchronous=self.asynchronous, seed=3)
        self.load = VirtualLoad(requests, engine, duration_s=4.0, max_drain_s=drain_s)
        return self.load.result().records


def check_blocks(batcher: Batcher) -> None:
    """What the running sequences hold is what the pool says is held: no block is lost, none is used twice."""
    named: set[Hashable] = set()
    blank = 0
    for stream in batcher.running:
        keys, count = batcher.blocks_of(stream)
        assert count >= 0
        named |= set(keys)
        blank += count
    assert len(named) + blank == batcher.pool.held
    assert 0 <= batcher.pool.free <= batcher.pool.num_blocks


@settings(deadline=None, max_examples=100)
@given(LIMITS, LENGTHS, st.booleans())
def test_laws(bounds: Limits, requests: list[ScheduledRequest], asynchronous: bool) -> None:
    """Budget, sequences and blocks hold in every step (`Watched.seconds`); each ends once, after its prompt."""
    watched = Watched(bounds, asynchronous)
    records = watched.run(requests)
    assert watched.load is not None
    batcher = watched.load.batcher
    assert [record.index for record in records] == list(range(len(requests)))
    assert batcher.pool.held == 0
    assert not batcher.running
    assert not batcher.waiting
    for record, asked in zip(records, requests, strict=True):
        assert record.ok
        assert sum(record.token_counts) == asked.output_tokens == record.output_tokens
        at_s = [asked.at_s + offset for offset in record.token_offsets_s]
        assert all(one < other for one, other in pairwise(at_s))
        assert record.first_token_s is not None
        assert record.first_token_s > asked.at_s
    least = sum(asked.output_tokens for asked in requests)
    assert sum(step.output_tokens for step in watched.steps) == least
    if not bounds.enable_prefix_caching and not batcher.preemptions and not bounds.drafted:
        assert sum(step.prefill_tokens for step in watched.steps) == sum(asked.prompt_tokens for asked in requests)


@settings(deadline=None, max_examples=60)
@given(LIMITS, LENGTHS, st.booleans())
def test_same_seed_same_result(bounds: Limits, requests: list[ScheduledRequest], asynchronous: bool) -> None:
    assert Watched(bounds, asynchronous).run(requests) == Watched(bounds, asynchronous).run(requests)


@settings(deadline=None, max_examples=60)
@given(LIMITS, LENGTHS, st.booleans(), st.sampled_from([0.25, 2.0, 64.0]))
def test_time_scales(bounds: Limits, requests: list[ScheduledRequest], asynchronous: bool, scale: float) -> None:
    """All arrivals at 0 and steps c times as long: every time is c times as late, exactly (c is a power of two)."""
    at_once = [request(one.index, 0.0, one.prompt_tokens, one.output_tokens) for one in requests]
    one, other = Watched(bounds, asynchronous).run(at_once), Watched(bounds, asynchronous, scale).run(at_once, 1e6)
    for before, after in zip(one, other, strict=True):
        assert after.token_offsets_s == tuple(scale * offset for offset in before.token_offsets_s)
        assert after.end_s == (before.end_s or 0.0) * scale


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 1))
def test_the_group_that_decodes_is_what_it_stands_for(requests: list[ScheduledRequest], drafts: int) -> None:
    """With drafts of which none is accepted every sequence is stepped by itself: the same tokens in the same steps."""
    roomy = {"num_blocks": 400, "max_num_batched_tokens": 4096, "enable_prefix_caching": bool(drafts)}
    group, single = Watched(limits(**roomy), False), Watched(limits(**roomy, drafted=1, acceptance=0.0), False)
    group.seconds = single.seconds = lambda step: 2.0**-7  # type: ignore[method-assign, assignment]
    one, other = group.run(requests), single.run(requests)
    assert [record.token_offsets_s for record in one] == [record.token_offsets_s for record in other]


def run_steps(bounds: Limits, streams: list[Stream], count: int = 100) -> list[Step]:
    batcher, steps = Batcher(bounds), []
    for stream in streams:
        batcher.add(stream)
    while len(steps) < count and (step := batcher.schedule()) is not None:
        steps.append(step)
        batcher.deliver(step, float(len(steps)))
    return steps


def stream(index: int, prompt: int, output: int) -> Stream:
    return Stream(index, 0.0, prompt, output, lambda at: (index, at))


def test_a_prompt_is_cut_to_the_budget_and_shares_steps_with_decoding() -> None:
    steps = run_steps(limits(), [stream(0, 20, 3), stream(1, 100, 2)])
    seen = [(step.batch, step.prefill_tokens, step.prompts, step.output_tokens) for step in steps]
    assert seen == [(0, 64, 2, 1), (1, 56, 1, 2), (2, 0, 0, 2)]


def test_without_chunks_a_prompt_waits_for_a_budget_of_its_own() -> None:
    steps = run_steps(limits(enable_chunked_prefill=False), [stream(0, 20, 3), stream(1, 60, 2)])
    assert [(step.batch, step.prefill_tokens) for step in steps] == [(0, 20), (1, 60), (2, 0)]


def test_no_more_sequences_than_allowed() -> None:
    steps = run_steps(limits(max_num_seqs=2), [stream(at, 4, 3) for at in range(4)])
    assert [step.batch + step.prompts for step in steps] == [2] * 6


def test_the_last_one_is_preempted_and_computed_anew_from_what_is_left_of_its_prefix() -> None:
    """5 blocks of 16: two of 32 tokens fit with one block to spare; the first takes it with its 33rd token."""
    batcher = Batcher(limits(num_blocks=5, max_model_len=80))
    first, second = stream(0, 32, 10), stream(1, 32, 20)
    batcher.add(first)
    batcher.add(second)
    seen = []
    for at in range(60):
        step = batcher.schedule()
        if step is None:
            break
        seen.append((step.batch, step.prefill_tokens))
        batcher.deliver(step, float(at))
    assert batcher.preemptions == second.preemptions == 1
    assert seen[0] == (0, 64)
    assert seen[1] == (1, 0)  # both need a block, one is left
    assert batcher.times_s(first)[0] == [float(at) for at in range(10)]
    assert len(batcher.times_s(second)[0]) == 20
    resumed = next(tokens for _, tokens in seen[1:] if tokens)
    assert resumed == 1  # 33 tokens, of which the first two blocks lie in the cache


def test_a_shared_prefix_is_computed_once() -> None:
    def key(index: int) -> object:
        return lambda at: ("shared", at) if at < 2 else (index, at)

    streams = [Stream(at, 0.0, 40, 2, key(at)) for at in range(3)]  # type: ignore[arg-type]
    steps = run_steps(limits(), streams)
    assert steps[0].prefill_tokens == 40 + 8 + 8


def test_the_whole_prompt_must_have_blocks_before_it_is_begun() -> None:
    """`scheduler_reserve_full_isl`: the second prompt's first chunk would fit, all of it does not."""
    steps = run_steps(limits(num_blocks=8), [stream(0, 40, 40), stream(1, 100, 2)])
    assert steps[0].prompts == 1
    assert next(step for step in steps if step.prefill_tokens and step.index).index == 40


def test_under_priority_the_least_important_gives_way() -> None:
    batcher = Batcher(limits(priority=True, max_num_seqs=1))
    for at, priority in enumerate((5, 1, 3)):
        batcher.add(Stream(at, float(at), 10, 1, lambda block: block, priority))
    order = []
    while (step := batcher.schedule()) is not None:
        order += [ended.index for ended in batcher.deliver(step, 0.0)]
    assert order == [1, 2, 0]


def test_accepted_drafts_come_in_one_step() -> None:
    one = stream(0, 10, 13)
    steps = run_steps(limits(drafted=3, acceptance=1.0), [one])
    assert one.counts == [1, 4, 4, 4]
    assert [step.prefill_tokens for step in steps] == [10, 4, 4, 4]


def test_async_scheduling_holds_the_place_of_what_ends_for_one_more_step() -> None:
    requests = [request(at, prompt=10, output=output) for at, output in enumerate((9, 2, 1))]
    starts = {}
    for asynchronous in (False, True):
        engine = Engine(limits(max_num_seqs=2), lambda step: 1.0, asynchronous=asynchronous)
        load = VirtualLoad(requests, engine, duration_s=1.0, max_drain_s=100.0)
        starts[asynchronous] = load.result().records[2].first_token_s
    assert starts == {False: 3.0, True: 4.0}


def test_what_arrives_while_a_step_runs_waits_for_the_next_but_one() -> None:
    requests = [request(0, prompt=10, output=9), request(1, 0.5, prompt=10, output=1)]
    first = {}
    for asynchronous in (False, True):
        engine = Engine(limits(), lambda step: 1.0, asynchronous=asynchronous)
        load = VirtualLoad(requests, engine, duration_s=1.0, max_drain_s=100.0)
        first[asynchronous] = load.result().records[1].first_token_s
    assert first == {False: 2.0, True: 3.0}


def test_memory_does_not_grow_with_what_has_ended() -> None:
    """Ends of steps are let go of; a stream that lives keeps its own."""
    batcher = Batcher(limits(num_blocks=4000, max_model_len=60_000))
    long = stream(0, 10, 30_000)
    batcher.add(long)
    for at in range(1, 200):
        batcher.add(stream(at, 5, 150))
    while not long.ending and (step := batcher.schedule()) is not None:
        batcher.deliver(step, float(step.index))
    assert len(batcher.times_s(long)[0]) == 30_000  # all of them, as long as it lives
    later = stream(500, 5, 10_000)
    batcher.add(later)
    while (step := batcher.schedule()) is not None:
        batcher.deliver(step, 0.0)
    assert len(batcher.ends_s) <= 3 * 4096 + 10_000
    assert batcher.first_kept > 25_000


# ---- blocks


def test_blocks_without_a_prefix_go_first_and_then_the_longest_unused() -> None:
    pool = BlockPool(4)
    pool.take(3)
    assert all(pool.name(key) for key in "abc")
    pool.give_back(["a", "b"], 0)
    pool.give_back(["c"], 0)
    assert (pool.free, pool.held) == (4, 0)
    pool.take(2)  # the blank one, and "b": of a sequence's blocks the last goes first
    assert [key for key in "abc" if pool.holds(key)] == ["a", "c"]
    pool.share(["a"])
    pool.take(1)
    assert [key for key in "abc" if pool.holds(key)] == ["a"]
    assert (pool.free, pool.held) == (0, 4)


def test_a_second_copy_of_a_prefix_has_no_key() -> None:
    pool = BlockPool(2)
    pool.take(2)
    assert pool.name("a")
    assert not pool.name("a")


@pytest.mark.parametrize("count", [0, 3])
def test_a_shared_block_is_free_when_nobody_uses_it(count: int) -> None:
    pool = BlockPool(1)
    pool.take(1)
    pool.name("a")
    for _ in range(count):
        pool.share(["a"])
    for _ in range(count):
        pool.give_back(["a"], 0)
        assert pool.free == 0
    pool.give_back(["a"], 0)
    assert pool.free == 1


# ---- vLLM's own scheduler


def drawn_cases(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Loads that crowd a small cache, synchronous and asynchronous in turn."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        bounds = {
            "max_num_seqs": rng.choice([1, 2, 4, 8]),
            "max_num_batched_tokens": rng.choice([16, 40, 64, 512]),
            "max_model_len": 512,
            "num_blocks": rng.choice([33, 36, 40, 60]),
            "block_size": rng.choice([16, 16, 32]),
            "enable_chunked_prefill": True,
            "enable_prefix_caching": rng.random() < 0.7,
            "long_prefill_token_threshold": 0,
        }
        requests, step = [], 0
        for _ in range(rng.randint(1, 20)):
            step += rng.choice([0, 0, 1, 3, 20])
            prompt = rng.randint(2, 200)
            requests.append([step, prompt, min(prompt - 1, rng.choice([0, 0, 48, 64])), rng.randint(1, 120)])
        cases.append({"limits": bounds, "asynchronous": bool(number % 2), "requests": requests})
    return cases


def steps_of(case: dict[str, Any]) -> tuple[list[Any], int]:
    """As `scheduler_work.steps`, of the model; and how often it preempted."""
    bounds = Limits(**case["limits"])
    batcher, waiting, size = Batcher(bounds), list(enumerate(case["requests"])), bounds.block_size
    seen: list[Any] = []
    flying: list[Step] = []

    def put_together() -> Step | None:
        while waiting and waiting[0][1][0] <= len(seen) + len(flying):
            index, (_, prompt, shared, output) = waiting.pop(0)
            key = functools.partial(lambda at, own, common: ("p", at) if (at + 1) * size <= common else (own, at),
                                    own=index, common=shared)  # fmt: skip
            batcher.add(Stream(index, float(index), prompt, output, key))
        return batcher.schedule()

    while flying or waiting or batcher.running or batcher.waiting:
        if not flying:
            if (step := put_together()) is None:
                seen.append(None)
                continue
            flying.append(step)
        following = put_together() if case["asynchronous"] else None
        step = flying.pop(0)
        ended = sorted(stream.index for stream in batcher.deliver(step, float(len(seen))))
        seen.append([step.tokens, step.batch + step.prompts, ended, batcher.pool.held])
        flying += [following] if following is not None else []
    return [step for step in seen if step is not None], batcher.preemptions


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_each_step_is_that_of_vllms_own_scheduler(model_dir: Path, tmp_path: Path) -> None:
    """Tokens, sequences, what ends and blocks in use of every step, with preemption and shared prefixes."""
    cases = drawn_cases(60)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, str(Path(__file__).with_name("scheduler_work.py")), str(model_dir)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run(
        [*words, str(tmp_path / "cases.json")], env=env, capture_output=True, text=True, check=True, timeout=300
    )
    answer = next(line for line in run.stdout.splitlines() if line.startswith("ANSWER"))
    preemptions = 0
    for case, theirs in zip(cases, json.loads(answer.removeprefix("ANSWER ")), strict=True):
        ours, count = steps_of(case)
        assert ours == theirs
        preemptions += count
    assert preemptions > 10
