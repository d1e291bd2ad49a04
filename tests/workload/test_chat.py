from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varcas.errors import InputError
from varcas.experiment import Workload
from varcas.workload.chat import (
    MIN_OUTPUT_TOKENS,
    MIN_PROMPT_TOKENS,
    MIN_TOTAL_TOKENS,
    PROFILES,
    Lengths,
    decide_endpoint,
    schedule,
)

workloads = st.builds(
    Workload,
    profile=st.sampled_from(sorted(PROFILES)),
    rate_rps=st.floats(0.1, 200),
    seed=st.integers(0, 2**32 - 1),
    arrival=st.sampled_from(["poisson", "constant"]),
    max_tokens=st.none() | st.integers(MIN_TOTAL_TOKENS, 10_000),
)


@given(
    workload=workloads,
    start_s=st.floats(-60, 60),
    duration_s=st.floats(0.01, 20),
    max_len=st.none() | st.integers(MIN_TOTAL_TOKENS, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_every_schedule_keeps_its_window_its_order_and_its_limits(
    workload: Workload, start_s: float, duration_s: float, max_len: int | None
) -> None:
    asked = schedule(workload, start_s=start_s, duration_s=duration_s, max_len=max_len, stream="measure")
    limits = (PROFILES[workload.profile].max_tokens, workload.max_tokens, max_len)
    limit = min(value for value in limits if value is not None)
    assert [request.index for request in asked] == list(range(len(asked)))
    assert all(start_s <= request.at_s < start_s + duration_s for request in asked)
    assert [request.at_s for request in asked] == sorted(request.at_s for request in asked)
    for request in asked:
        assert request.prompt_tokens >= MIN_PROMPT_TOKENS
        assert request.output_tokens >= MIN_OUTPUT_TOKENS
        assert request.prompt_tokens + request.output_tokens <= limit
        assert (request.conversation, request.turn) == (request.index, 0)


@given(workload=workloads, duration_s=st.floats(1, 20))
@settings(max_examples=60, deadline=None)
def test_the_rate_is_the_one_asked_for(workload: Workload, duration_s: float) -> None:
    num = len(schedule(workload, start_s=0, duration_s=duration_s, max_len=None, stream="measure"))
    expected = workload.rate_rps * duration_s
    spread = 5 * math.sqrt(expected) + 1 if workload.arrival == "poisson" else 1
    assert abs(num - expected) <= spread


@given(workload=workloads, duration_s=st.floats(1, 10))
@settings(max_examples=30, deadline=None)
def test_a_longer_window_only_adds_and_lengths_do_not_depend_on_the_rate(workload: Workload, duration_s: float) -> None:
    short = schedule(workload, start_s=0, duration_s=duration_s, max_len=None, stream="measure")
    long = schedule(workload, start_s=0, duration_s=2 * duration_s, max_len=None, stream="measure")
    assert long[: len(short)] == short
    faster = workload.model_copy(update={"rate_rps": workload.rate_rps * 2})
    fast = schedule(faster, start_s=0, duration_s=duration_s, max_len=None, stream="measure")
    assert [dataclasses.replace(r, at_s=0) for r in fast[: len(short)]] == [
        dataclasses.replace(r, at_s=0) for r in short[: len(fast)]
    ]


def digest(workload: Workload, stream: str) -> str:
    asked = schedule(workload, start_s=0, duration_s=30, max_len=2048, stream=stream)
    return hashlib.sha256(json.dumps([dataclasses.astuple(request) for request in asked]).encode()).hexdigest()[:16]


def test_a_schedule_is_the_same_to_the_byte_on_every_machine_and_day() -> None:
    """The digest is committed: when it changes, old rows compare no more, and MEASUREMENT_VERSION must rise."""
    workload = Workload(rate_rps=20, seed=7)
    assert digest(workload, "measure") == digest(workload, "measure") == "7ea8d25bc04abe61"
    assert digest(workload.model_copy(update={"seed": 8}), "measure") != digest(workload, "measure")


def test_warm_up_and_measurement_share_nothing() -> None:
    workload = Workload(rate_rps=20)
    streams = [schedule(workload, start_s=0, duration_s=30, max_len=None, stream=s) for s in ("warmup", "measure")]
    times, seeds = ([{getattr(r, name) for r in asked} for asked in streams] for name in ("at_s", "seed"))
    assert not times[0] & times[1]
    assert not seeds[0] & seeds[1]


def test_poisson_gaps_are_exponential() -> None:
    asked = schedule(Workload(rate_rps=100, seed=3), start_s=0, duration_s=100, max_len=None, stream="measure")
    gaps = sorted(b.at_s - a.at_s for a, b in itertools.pairwise(asked))
    # Kolmogorov-Smirnov, alpha = 0.001: 1.95 / sqrt(n)
    distance = max(abs((i + 0.5) / len(gaps) - (1 - math.exp(-100 * gap))) for i, gap in enumerate(gaps))
    assert distance < 1.95 / math.sqrt(len(gaps))


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_profile_names_its_source_and_draws_what_it_says(name: str) -> None:
    profile = PROFILES[name]
    assert "arXiv:" in profile.source
    asked = schedule(
        Workload(profile=name, rate_rps=200, seed=1), start_s=0, duration_s=100, max_len=None, stream="measure"
    )
    for lengths, values in (
        (profile.prompt, sorted(request.prompt_tokens for request in asked)),
        (profile.output, sorted(request.output_tokens for request in asked)),
    ):
        # what does not fit is drawn again, which shortens a little
        assert values[len(values) // 2] == pytest.approx(lengths.median, rel=0.08)


def test_chat_medium_fits_a_context_of_2048_with_hardly_a_draw_repeated() -> None:
    profile, workload = PROFILES["chat-medium"], Workload(profile="chat-medium", rate_rps=200, seed=1)
    asked = schedule(workload, start_s=0, duration_s=100, max_len=2048, stream="measure")
    assert sum(r.prompt_tokens for r in asked) / len(asked) == pytest.approx(profile.prompt.mean, rel=0.1)
    assert sum(r.output_tokens for r in asked) / len(asked) == pytest.approx(profile.output.mean, rel=0.1)


@given(median=st.floats(2, 1000), factor=st.floats(1.1, 5))
def test_lengths_follow_from_what_the_sources_give(median: float, factor: float) -> None:
    lengths = Lengths.of_quantiles(median, median * factor)
    assert lengths.draw(lambda: 0.9 - 2**-54) == pytest.approx(median * factor, abs=1)
    assert Lengths.of_mean(lengths.mean, lengths.sigma).median == pytest.approx(median)


def test_an_unknown_profile_names_the_nearest_and_all() -> None:
    with pytest.raises(
        InputError, match=r"'chat-medum' is unknown. Did you mean chat-medium\? Known: chat-long, chat-"
    ):
        schedule(Workload(profile="chat-medum", rate_rps=1), start_s=0, duration_s=1, max_len=None, stream="measure")


def test_a_context_too_short_for_any_chat_is_refused() -> None:
    with pytest.raises(InputError, match="max_model_len"):
        schedule(Workload(rate_rps=1), start_s=0, duration_s=1, max_len=8, stream="measure")


@pytest.mark.parametrize(
    ("asked", "files", "flags", "expected"),
    [
        ("completions", {"chat_template.jinja": "x"}, {}, "completions"),
        ("chat", {}, {}, "chat"),
        ("auto", {}, {}, "completions"),
        ("auto", {"tokenizer_config.json": "{}"}, {}, "completions"),
        ("auto", {"tokenizer_config.json": "not json"}, {}, "completions"),
        ("auto", {"tokenizer_config.json": '{"chat_template": null}'}, {}, "completions"),
        ("auto", {"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, {}, "chat"),
        ("auto", {"chat_template.jinja": "x"}, {}, "chat"),
        ("auto", {"chat_template.json": "{}"}, {}, "chat"),
        ("auto", {"tekken.json": "{}"}, {}, "chat"),
        ("auto", {}, {"chat_template": "my.jinja"}, "chat"),
        ("auto", {}, {"chat_template": None}, "completions"),
        ("auto", {}, {"tokenizer_mode": "mistral"}, "chat"),
    ],
)
def test_the_endpoint_is_decided_from_files_and_flags(
    tmp_path: Path,
    asked: Literal["auto", "chat", "completions"],
    files: dict[str, str],
    flags: dict[str, str | None],
    expected: str,
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert decide_endpoint(asked, tmp_path, flags) == expected


def test_without_a_directory_only_flags_decide() -> None:
    assert decide_endpoint("auto", None, {}) == "completions"
    assert decide_endpoint("auto", None, {"chat_template": "x"}) == "chat"
