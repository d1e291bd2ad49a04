"""A load in virtual time keeps the rules of a real one: who comes due when, what is unfinished, what is sampled."""

from __future__ import annotations

import pytest

from varcas.batching import Limits, Step
from varcas.errors import InputError
from varcas.experiment import Arrival, Workload
from varcas.records import ScheduledRequest
from varcas.virtual import Engine, VirtualLoad, block_key
from varcas.workload.schedule import schedule

LIMITS = Limits(max_num_seqs=32, max_num_batched_tokens=2048, max_model_len=8192, num_blocks=4000)


def engine(step_s: float = 0.01, **changes: object) -> Engine:
    fixed: dict[str, object] = {"limits": LIMITS, "seconds": lambda step: step_s}
    return Engine(**fixed | changes)  # type: ignore[arg-type]


def load_of(workload: Workload, served: Engine, drain_s: float = 60.0) -> VirtualLoad:
    drawn = schedule(workload, start_s=0.0, duration_s=workload.duration_s, max_len=8192, stream="measure")
    return VirtualLoad(drawn, served, duration_s=workload.duration_s, max_drain_s=drain_s)


def test_later_turns_come_after_the_one_before_and_find_it_in_the_cache() -> None:
    load = load_of(Workload(profile="multi-turn", rate_rps=1.0, duration_s=60.0, think_s=1.0), engine())
    records = load.result().records
    later = [record for record in records if record.turn]
    ends = {(record.conversation, record.turn): record for record in records}
    assert len(later) > 20
    for record in later:
        before = ends[record.conversation, record.turn - 1]
        assert before.end_s is not None
        assert record.scheduled_s > before.end_s
        assert (
            record.prompt_tokens == (before.prompt_tokens or 0) + before.output_tokens + record.scheduled_prompt_tokens
        )
        assert record.scheduled_s < 60.0
    assert load.batcher.hits > 0.5 * sum(ends[r.conversation, r.turn - 1].prompt_tokens or 0 for r in later)


def test_users_of_a_closed_loop_have_one_request_each() -> None:
    workload = Workload(profile="chat-short", arrival=Arrival(kind="closed", users=5), think_s=0.0, duration_s=20.0)
    load = load_of(workload, engine())
    records = sorted(load.result().records, key=lambda record: record.scheduled_s)
    assert max(sample.num_requests_running or 0 for sample in load.samples) <= 5
    for at_s in (5.0, 10.0, 15.0):
        assert sum(r.scheduled_s <= at_s < (r.end_s or 0) for r in records) == 5


def test_what_the_drain_does_not_see_is_unfinished_with_its_tokens_so_far() -> None:
    workload = Workload(profile="chat-short", rate_rps=5.0, duration_s=10.0)
    load = load_of(workload, engine(0.5), drain_s=2.0)
    result = load.result()
    left = [record for record in result.records if record.error == "unfinished"]
    assert left
    assert result.drain_s == 2.0
    assert len(result.records) == len({record.index for record in result.records})
    for record in left:
        assert not record.ok
        assert record.end_s == 12.0
        assert all(record.scheduled_s + offset <= 12.0 for offset in record.token_offsets_s)
        assert record.output_tokens == len(record.token_offsets_s) < record.scheduled_output_tokens
    assert any(record.token_offsets_s for record in left)


def test_a_load_that_is_answered_ends_with_its_last_token() -> None:
    load = load_of(Workload(profile="chat-short", rate_rps=1.0, duration_s=10.0), engine())
    result = load.result()
    last_s = max(record.end_s or 0.0 for record in result.records)
    assert result.drain_s == pytest.approx(max(0.0, last_s - 10.0))
    assert all(record.ok for record in result.records)


def test_samples_come_once_a_second_and_their_counters_end_at_the_whole() -> None:
    load = load_of(Workload(profile="chat-short", rate_rps=5.0, duration_s=30.0), engine())
    records = load.result().records
    assert [sample.t_s for sample in load.samples] == [float(at) for at in range(len(load.samples))]
    assert load.batcher.output_tokens == sum(record.output_tokens for record in records)
    assert load.batcher.prompt_tokens == sum(record.prompt_tokens or 0 for record in records)
    counts = [sample.output_tokens or 0.0 for sample in load.samples]
    assert counts == sorted(counts)


def test_what_a_request_takes_before_its_first_step() -> None:
    one = ScheduledRequest(0, 1.0, 10, 2, 0, 0)
    load = VirtualLoad([one], engine(1.0, request_s=0.25), duration_s=2.0, max_drain_s=9.0)
    (record,) = load.result().records
    assert record.token_offsets_s == (1.25, 2.25)


def test_texts_are_refused() -> None:
    one = ScheduledRequest(0, 1.0, 0, 2, 0, 0, prompt="how long is this?")
    with pytest.raises(InputError, match="no tokenizer"):
        VirtualLoad([one], engine(), duration_s=2.0, max_drain_s=9.0)


def test_keys_are_equal_where_texts_begin_alike() -> None:
    def key(at: int, **changes: object) -> object:
        fixed: dict[str, object] = {"index": 0, "at_s": 0.0, "prompt_tokens": 2000, "output_tokens": 9, "seed": 1}
        return block_key(ScheduledRequest(**{"conversation": 1, **fixed, **changes}), 16)(at)  # type: ignore[arg-type]

    shared = {"prefix_seed": 7, "prefix_tokens": 40}
    assert key(0, **shared) == key(0, conversation=2, **shared)
    assert key(2, **shared) != key(2, conversation=2, **shared)  # tokens 32 to 47: only 40 are shared
    assert key(0, **shared) != key(0, prefix_seed=8, prefix_tokens=40)
    assert key(5) == key(5, index=9)
    assert key(5) != key(5, conversation=3)
    assert key(31, blocks=(4, 5)) == key(31, conversation=3, blocks=(4, 6))
    assert key(32, blocks=(4, 5)) != key(32, conversation=3, blocks=(4, 6))


def test_steps_are_told_in_the_terms_of_the_law() -> None:
    seen: list[Step] = []

    def seconds(step: Step) -> float:
        seen.append(step)
        return 0.01

    one, other = ScheduledRequest(0, 0.0, 100, 5, 0, 0), ScheduledRequest(1, 0.0, 50, 5, 1, 1)
    VirtualLoad([one, other], Engine(LIMITS, seconds), duration_s=1.0, max_drain_s=9.0).result()
    assert (seen[0].batch, seen[0].prefill_tokens, seen[0].prompts, seen[0].cached) == (0, 150, 2, 0.0)
    assert [(step.batch, step.context) for step in seen[1:]] == [(2, 75.0), (2, 76.0), (2, 77.0), (2, 78.0)]
