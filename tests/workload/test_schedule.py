"""Schedules keep their window, their limits and their seed, whatever is asked."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
import tracemalloc
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workload.goldens import DATA, GOLDENS, KINDS, digests
from varcas.errors import InputError
from varcas.experiment import Arrival, Workload
from varcas.records import ScheduledRequest
from varcas.workload import draws
from varcas.workload.conversation import MIN_OUTPUT_TOKENS, MIN_PROMPT_TOKENS, MIN_TOTAL_TOKENS, THINK_S
from varcas.workload.profiles import PROFILES
from varcas.workload.profiles import profile as lengths_of
from varcas.workload.profiles.profile import Lengths
from varcas.workload.schedule import MAX_CLOSED_REQUESTS, check_workload, num_passed_over, schedule

arrivals: st.SearchStrategy[Any] = st.sampled_from(
    ["poisson", "constant", Arrival(kind="gamma", burstiness=0.4), Arrival(kind="ramp", to_rps=20)]
)
profiles: st.SearchStrategy[Any] = st.sampled_from(sorted(PROFILES)) | st.dictionaries(
    st.sampled_from(sorted(PROFILES)), st.floats(0.1, 9), min_size=1, max_size=3
)
workloads = st.builds(
    Workload,
    profile=profiles,
    rate_rps=st.floats(0.1, 50),
    seed=st.integers(0, 2**32 - 1),
    arrival=arrivals,
    max_tokens=st.none() | st.integers(2048, 10_000),
    turns=st.none() | st.floats(1, 6),
    think_s=st.none() | st.floats(0, 10),
    shared_prefix_tokens=st.none() | st.integers(0, 1500),
)


def measured(workload: Workload, duration_s: float = 30, max_len: int | None = None) -> tuple[ScheduledRequest, ...]:
    return schedule(workload, start_s=0, duration_s=duration_s, max_len=max_len, stream="measure")


@given(
    workload=workloads,
    start_s=st.floats(-60, 60),
    duration_s=st.floats(0.01, 20),
    max_len=st.none() | st.integers(2048, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_every_schedule_keeps_its_window_its_order_and_its_limits(
    workload: Workload, start_s: float, duration_s: float, max_len: int | None
) -> None:
    asked = schedule(workload, start_s=start_s, duration_s=duration_s, max_len=max_len, stream="measure")
    limits = [limit for limit in (workload.max_tokens, max_len) if limit is not None]
    assert [request.index for request in asked] == list(range(len(asked)))
    assert all(start_s <= request.at_s < start_s + duration_s for request in asked)
    assert [request.at_s for request in asked] == sorted(request.at_s for request in asked)
    for number, (_, turns) in enumerate(itertools.groupby(asked, key=lambda request: request.conversation)):
        conversation = list(turns)
        first = conversation[0]
        assert [request.turn for request in conversation] == list(range(len(conversation)))
        assert {request.conversation for request in conversation} == {number}
        assert {(request.at_s, request.prefix_seed) for request in conversation} == {(first.at_s, first.prefix_seed)}
        assert (first.after, first.gap_s) == (None, 0)
        for before, request in itertools.pairwise(conversation):
            assert request.after == before.index
            assert request.gap_s >= 0
            assert request.gap_s * 1e6 == pytest.approx(round(request.gap_s * 1e6), abs=1e-3)
        assert first.prompt_tokens >= MIN_PROMPT_TOKENS + first.prefix_tokens
        assert all(request.output_tokens >= MIN_OUTPUT_TOKENS for request in conversation)
        total = sum(request.prompt_tokens + request.output_tokens for request in conversation)
        assert all(total <= limit for limit in limits)


@given(workload=workloads, duration_s=st.floats(1, 20))
@settings(max_examples=30, deadline=None)
def test_a_longer_window_only_adds(workload: Workload, duration_s: float) -> None:
    if workload.arrives.kind != "ramp":  # whose rate depends on the window
        short = measured(workload, duration_s)
        assert measured(workload, 2 * duration_s)[: len(short)] == short


@given(workload=workloads, duration_s=st.floats(1, 10))
@settings(max_examples=30, deadline=None)
def test_what_is_asked_does_not_depend_on_the_rate(workload: Workload, duration_s: float) -> None:
    slow = measured(workload, duration_s)
    fast = measured(workload.model_copy(update={"rate_rps": 2 * (workload.rate_rps or 0)}), duration_s)
    assert [dataclasses.replace(r, at_s=0) for r in fast[: len(slow)]] == [
        dataclasses.replace(r, at_s=0) for r in slow[: len(fast)]
    ]


def test_requests_and_prompts_are_the_same_to_the_byte_on_every_machine_and_day() -> None:
    """The digests are committed: when one changes, old rows compare no more, and MEASUREMENT_VERSION must rise."""
    assert digests(KINDS) == GOLDENS


@pytest.mark.parametrize("towards", [-math.inf, math.inf])
def test_a_c_library_whose_functions_differ_in_the_last_bit_changes_nothing(
    towards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {name: workload for name, workload in KINDS.items() if workload.data is None}
    before = {name: measured(workload, max_len=16384) for name, workload in kinds.items()}

    class OtherMath:
        def __getattr__(self, name: str) -> Any:
            found = getattr(math, name)
            return (lambda *args: math.nextafter(found(*args), towards)) if name in ("log", "log1p", "exp") else found

    monkeypatch.setattr(draws, "math", OtherMath())
    monkeypatch.setattr(lengths_of, "math", OtherMath())
    assert {name: measured(workload, max_len=16384) for name, workload in kinds.items()} == before


def test_another_seed_and_another_stream_share_nothing() -> None:
    workload = Workload(rate_rps=20)
    others = [
        schedule(workload, start_s=0, duration_s=30, max_len=None, stream="warmup"),
        measured(workload.model_copy(update={"seed": 8})),
    ]
    for other in others:
        for name in ("at_s", "seed"):
            assert not {getattr(r, name) for r in measured(workload)} & {getattr(r, name) for r in other}


def test_a_hundred_thousand_requests_take_less_than_three_seconds() -> None:
    took_s = []
    for _ in range(2):
        began_s = time.process_time()
        asked = measured(Workload(profile={"chat-medium": 1, "shared-prefix": 1}, rate_rps=1000), 100)
        took_s.append(time.process_time() - began_s)
    assert len(asked) == pytest.approx(100_000, rel=0.02)
    assert min(took_s) < 3


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_profile_names_its_source_and_draws_what_it_says(name: str) -> None:
    profile = PROFILES[name]
    assert "arXiv:" in profile.source
    asked = measured(Workload(profile=name, rate_rps=100, seed=1), 100)
    first = [request for request in asked if not request.turn]
    # what does not fit is drawn again, which shortens a little
    assert median(r.prompt_tokens - r.prefix_tokens for r in first) == pytest.approx(profile.prompt.median, rel=0.08)
    assert median(request.output_tokens for request in first) == pytest.approx(profile.output.median, rel=0.08)


def test_chat_medium_fits_a_context_of_2048_with_hardly_a_draw_repeated() -> None:
    profile = PROFILES["chat-medium"]
    asked = measured(Workload(profile="chat-medium", rate_rps=200, seed=1), 100, 2048)
    assert fmean(r.prompt_tokens for r in asked) == pytest.approx(profile.prompt.mean, rel=0.1)
    assert fmean(r.output_tokens for r in asked) == pytest.approx(profile.output.mean, rel=0.1)


@given(median=st.floats(2, 1000), factor=st.floats(1.1, 5))
def test_lengths_follow_from_what_the_sources_give(median: float, factor: float) -> None:
    lengths = Lengths.of_quantiles(median, median * factor)
    assert lengths.draw(lambda: 0.9) == pytest.approx(median * factor, abs=1)
    assert Lengths.of_mean(lengths.mean, lengths.sigma).median == pytest.approx(median)
    assert Lengths.of_median_and_mean(median, lengths.mean).sigma == pytest.approx(lengths.sigma)


def test_a_mixture_has_its_shares() -> None:
    asked = measured(Workload(profile={"code": 3, "shared-prefix": 1}, rate_rps=100), 100)
    assert sum(request.prefix_tokens > 0 for request in asked) / len(asked) == pytest.approx(0.25, abs=0.03)


def test_conversations_have_their_turns_and_pauses() -> None:
    asked = measured(Workload(profile="multi-turn", rate_rps=100), 60)
    num_turns = collections.Counter(request.conversation for request in asked)
    assert fmean(num_turns.values()) == pytest.approx(PROFILES["multi-turn"].turns, rel=0.05)
    assert sum(turns > 1 for turns in num_turns.values()) / len(num_turns) == pytest.approx(0.715, abs=0.03)
    pauses_s = [request.gap_s for request in asked if request.turn]
    assert fmean(pauses_s) == pytest.approx(THINK_S, rel=0.05)
    assert max(pauses_s) <= 10 * THINK_S
    changed = measured(Workload(profile="multi-turn", rate_rps=100, turns=2, think_s=0), 60)
    assert fmean(collections.Counter(r.conversation for r in changed).values()) == pytest.approx(2, rel=0.05)
    assert {request.gap_s for request in changed} == {0}


def test_a_conversation_ends_before_it_passes_the_context() -> None:
    asked = measured(Workload(profile="multi-turn", rate_rps=50, turns=30), 30, 2048)
    totals = collections.Counter[int]()
    for request in asked:
        totals[request.conversation] += request.prompt_tokens + request.output_tokens
    assert 1500 < median(totals.values()) <= max(totals.values()) <= 2048


def test_system_prompts_are_shared_as_often_as_asked() -> None:
    asked = measured(Workload(profile="chat-short", rate_rps=50, shared_prefix_tokens=300, shared_prefixes=7), 60, 1324)
    uses = collections.Counter(request.prefix_seed for request in asked)
    assert len(uses) == 7
    assert max(uses.values()) < 1.5 * min(uses.values())
    assert {request.prefix_tokens for request in asked} == {300}
    plain = measured(Workload(profile="chat-short", rate_rps=50), 60, 1024)
    assert [r.prompt_tokens - 300 for r in asked] == [r.prompt_tokens for r in plain]


@pytest.mark.parametrize(("profile", "think_s"), [("chat-short", None), ("chat-short", 3.0), ("multi-turn", 1.0)])
def test_a_closed_loop_is_a_chain_for_each_user(profile: str, think_s: float | None) -> None:
    workload = Workload(profile=profile, think_s=think_s, arrival=Arrival(kind="closed", users=20))
    asked = measured(workload, 30)
    chains = collections.defaultdict(list)
    root: dict[int, int] = {}
    for request in asked:
        root[request.index] = request.index if request.after is None else root[request.after]
        chains[root[request.index]].append(request)
    assert len(chains) == 20
    for chain in chains.values():
        assert len(chain) >= 60
        assert all(b.after == a.index for a, b in itertools.pairwise(chain))
        assert len({request.at_s for request in chain}) == 1
    gaps_s = [request.gap_s for request in asked if request.after is not None]
    assert fmean(gaps_s) == pytest.approx(think_s or 0, rel=0.1)
    assert all(0 <= request.at_s < 30 for request in asked)
    assert ({request.at_s for request in asked} == {0}) == (think_s is None)


def test_a_closed_loop_of_very_many_users_stays_small() -> None:
    asked = measured(Workload(profile="code", arrival=Arrival(kind="closed", users=15_000)), 3600)
    assert len({request.index for request in asked if request.after is None}) == 15_000
    assert len(asked) <= MAX_CLOSED_REQUESTS


def test_what_cannot_be_had_is_refused_with_the_fix() -> None:
    with pytest.raises(
        InputError, match=r"'chat-medum' is unknown. Did you mean chat-medium\? Known: chat-long, chat-"
    ):
        measured(Workload(profile="chat-medum", rate_rps=1))
    with pytest.raises(InputError, match=r"'ragg' is unknown. Did you mean rag"):
        check_workload(Workload(profile={"ragg": 1, "code": 1}, rate_rps=1), {})
    with pytest.raises(InputError, match="max_model_len"):
        measured(Workload(rate_rps=1), max_len=MIN_TOTAL_TOKENS - 1)
    with pytest.raises(InputError, match="behind a system prompt of 1024"):
        check_workload(Workload(profile="shared-prefix", rate_rps=1), {"max_model_len": 1030})
    with pytest.raises(InputError, match=r"shared_prefixes: 3: .*shared_prefix_tokens: 1024"):
        check_workload(Workload(profile="rag", rate_rps=1, shared_prefixes=3), {})


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_trace_comes_at_its_own_times() -> None:
    asked = measured(Workload(data=str(DATA / "plain.csv"), arrival="trace"), 3)
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in asked] == [
        (0, 100, 10 * 2),
        (0.5, 250, 10),
        (0.75, 40, 60),
        (2.25, 800, 5),
    ]
    scaled = measured(Workload(data=str(DATA / "plain.csv"), arrival="trace", rate_rps=4 / 6), 60)
    assert [r.at_s for r in scaled] == [0, 1, 1.5, 4.5, 6]  # 4 gaps in 3 s become 4 gaps in 6 s


def test_rows_are_drawn_in_order_from_a_drawn_one_and_again_from_the_first() -> None:
    own = [100, 250, 40, 800, 120]
    starts = set()
    for seed in range(20):
        asked = measured(Workload(data=str(DATA / "plain.csv"), rate_rps=2, seed=seed), 10)
        found = [r.prompt_tokens for r in asked]
        start = own.index(found[0])
        assert found == list(itertools.islice(itertools.cycle(own[start:] + own[:start]), len(found)))
        starts.add(start)
    assert starts == {0, 1, 2, 3, 4}


def test_blocks_of_a_trace_stay_shared_and_differ_between_seeds() -> None:
    workload = Workload(data=str(DATA / "mooncake.jsonl"), arrival="trace", duration_s=15)
    asked = measured(workload, 16)
    ids = [[0, 1, 2], [0, 3, 4], [0, 1, 5, 6], [7, 8], [0, 3, 9, 10, 11], [0, 1, 2]]
    base = asked[0].blocks[0]
    assert [[block - base for block in request.blocks] for request in asked] == ids
    assert measured(workload.model_copy(update={"seed": 1}), 16)[0].blocks[0] != base


def test_rows_that_do_not_fit_are_an_error_until_cutting_them_is_asked_for() -> None:
    data = str(DATA / "mooncake.jsonl")
    long = r"mooncake.jsonl: row 3: 1700 \+ 25 tokens do not fit the 1500.*`workload.max_tokens: 1500`"
    with pytest.raises(InputError, match=long):
        check_workload(Workload(data=data, rate_rps=1), {"max_model_len": 1500})
    with pytest.raises(InputError, match="do not fit the 1500"):
        measured(Workload(data=data, rate_rps=1), 20, 1500)
    cut = Workload(data=data, rate_rps=1, max_tokens=1500)
    check_workload(cut, {"max_model_len": 1500})
    asked = measured(cut, 20, 1500)
    assert {(r.prompt_tokens, r.output_tokens, len(r.blocks)) for r in asked} >= {(1475, 25, 3), (1460, 40, 3)}
    assert all(len(r.blocks) == math.ceil(r.prompt_tokens / 512) for r in asked)


def test_texts_that_cannot_fit_are_passed_over() -> None:
    data = str(DATA / "sharegpt.json")
    asked = measured(Workload(data=data, rate_rps=2), 20, 30)
    assert {request.prompt for request in asked} == {"Name three fruits.", "Zwei Zeilen über Äpfel 🍎, bitte."}
    with pytest.raises(InputError, match="no record can be asked"):
        measured(Workload(data=data, rate_rps=2), 20, 11)


def test_records_that_a_trace_passes_over_are_counted_as_they_lower_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    texts = ["short", "long " * 50, "short", "long " * 50, "short"]
    path.write_text(
        "".join(f'{{"prompt": "{text}", "output_tokens": 4, "timestamp": {i}}}\n' for i, text in enumerate(texts))
    )
    for arrives, passed_over in (({"arrival": "trace", "duration_s": 3.5}, 2), ({"rate_rps": 1, "duration_s": 3.5}, 0)):
        workload = Workload(data=str(path), **arrives)
        asked = measured(workload, 3.5, 30)
        assert {request.prompt for request in asked} == {"short"}
        assert num_passed_over(workload, asked, duration_s=3.5) == passed_over
        assert num_passed_over(workload, measured(workload, 3.5, 300), duration_s=3.5) == 0


def test_a_trace_that_ends_long_before_the_window_is_refused() -> None:
    with pytest.raises(InputError, match=r"duration_s: 60: .*plain.csv ends after 3 s"):
        check_workload(Workload(data=str(DATA / "plain.csv"), arrival="trace", duration_s=60), {})
    check_workload(Workload(data=str(DATA / "plain.csv"), arrival="trace", duration_s=60, rate_rps=0.06), {})


def test_a_shared_prefix_goes_before_rows_and_texts() -> None:
    for name in ("plain.csv", "own.jsonl"):
        shared = {"shared_prefix_tokens": 64, "shared_prefixes": 2}
        plain = measured(Workload(data=str(DATA / name), rate_rps=4), 20)
        asked = measured(Workload(data=str(DATA / name), rate_rps=4, **shared), 20)
        assert len({request.prefix_seed for request in asked}) == 2
        grown = 64 if name == "plain.csv" else 0  # texts are counted with it
        assert [r.prompt_tokens for r in asked] == [r.prompt_tokens + grown for r in plain]


def test_a_trace_of_many_rows_stays_in_columns(tmp_path: Path) -> None:
    num_rows = 500_000
    path = tmp_path / "large.csv"
    body = "".join(f"{number / 100:.2f},{100 + number % 900},20\n" for number in range(num_rows))
    path.write_text(f"timestamp,prompt_tokens,output_tokens\n{body}")
    del body
    tracemalloc.start()
    try:
        asked = measured(Workload(data=str(path), arrival="trace"), 10)
        largest_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(asked) == 1000
    assert largest_bytes < 100 * num_rows  # a few columns of 8 bytes; a row as Python objects has over 200
