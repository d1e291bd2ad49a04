"""What is live, and what a live measurement is called once deployed."""

from __future__ import annotations

from typing import Any

import pytest

from varcas.experiment import parse_experiment
from varcas.inner import Limits, at_most, live_problem, live_start, split
from varcas.space import ServingConfig

OLD = ("scheduler_cls", "max_num_seqs", "max_num_batched_tokens", "max_cudagraph_capture_size")
NEW = (*OLD, "max_num_active_seqs", "max_num_scheduled_tokens")


def experiment(space: str, serve: str = "{}") -> Any:
    return parse_experiment(
        f"name: t\nmodel: m\nserve: {serve}\nspace: {space}\nworkload: {{profile: chat-short, rate_rps: 1}}\n"
    )


def config(**flags: Any) -> ServingConfig:
    return ServingConfig("m", None, flags)


def test_limits_are_live_and_the_rest_is_the_servers() -> None:
    found = split(
        experiment(
            "{max_num_seqs: {choices: [8, 2]}, dtype: {choices: [half]}, max_num_batched_tokens: {low: 512, "
            "high: 2048, step: 512}}"
        ),
        NEW,
    )
    assert found.server == ("dtype",)
    assert found.live == {"max_num_seqs": (2, 8), "max_num_batched_tokens": (512, 1024, 1536, 2048)}
    assert found.why_not == {}


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (
            "{max_num_seqs: {choices: [1, 16]}, block_size: {choices: [16], when: {max_num_seqs: 16}}}",
            "block_size hangs",
        ),
        ("{max_num_seqs: {choices: [1, 16], when: {dtype: half}}, dtype: {choices: [half, float]}}", "`when` ties it"),
        ("{max_num_seqs: {choices: [1, null]}}", "not a list of positive integers"),
        ("{max_num_seqs: {low: 1, high: 256}}", "256 values"),
    ],
)
def test_what_other_flags_hang_on_is_not_live(space: str, words: str) -> None:
    found = split(experiment(space), NEW)
    assert found.live == {}
    assert "max_num_seqs" in found.server
    assert words in found.why_not["max_num_seqs"]


@pytest.mark.parametrize(
    ("flags", "names", "words"),
    [
        ({}, ("max_num_seqs",), "takes no `--scheduler-cls`"),
        ({"scheduler_cls": "x.Y"}, NEW, "of its own"),
        ({"data_parallel_size": 2}, NEW, "data-parallel"),
        ({"speculative_config": {"method": "ngram"}}, OLD, "speculative"),
        ({"speculative_config": {"method": "ngram"}}, NEW, None),
        ({}, OLD, None),
    ],
)
def test_some_servers_take_no_new_limits(flags: dict[str, Any], names: tuple[str, ...], words: str | None) -> None:
    found = live_problem(flags, names)
    assert found is None if words is None else words in (found or "")


def test_a_vllm_with_flags_for_the_limits_is_deployed_with_them() -> None:
    start = live_start(config(dtype="half"), {"max_num_seqs": [4, 64, 1]}, NEW, {})
    assert start.config.flags == {"dtype": "half", "max_num_seqs": 64}
    assert start.at(Limits(4)).flags == {"dtype": "half", "max_num_seqs": 64, "max_num_active_seqs": 4}
    assert start.at(Limits(64)) == start.at(Limits()) == start.config
    both = live_start(config(), {"max_num_seqs": [4, 8], "max_num_batched_tokens": [512, 1024]}, NEW, {})
    assert both.at(Limits(8, 512)).flags == {
        "max_num_seqs": 8, "max_num_batched_tokens": 1024, "max_num_scheduled_tokens": 512,
    }  # fmt: skip


def test_an_older_vllm_gets_the_same_graphs_live_and_fresh() -> None:
    resolved = {"compilation": {"max_cudagraph_capture_size": 512}}
    start = live_start(config(), {"max_num_seqs": [8, 256]}, OLD, resolved)
    assert start.config.flags == {"max_num_seqs": 256, "max_cudagraph_capture_size": 512}
    assert start.at(Limits(8)).flags == {"max_num_seqs": 8, "max_cudagraph_capture_size": 512}


@pytest.mark.parametrize(
    ("flags", "resolved"),
    [
        ({"enforce_eager": True}, {"compilation": {"max_cudagraph_capture_size": 512}}),
        ({"max_cudagraph_capture_size": 64}, {"compilation": {"max_cudagraph_capture_size": 64}}),
        ({"compilation_config": {"mode": 0}}, {"compilation": {"max_cudagraph_capture_size": 512}}),
        ({}, {"compilation": {"max_cudagraph_capture_size": 0}}),
        ({}, {}),
    ],
)
def test_graphs_that_are_set_or_not_there_stay_as_they_are(flags: dict[str, Any], resolved: dict[str, Any]) -> None:
    start = live_start(config(**flags), {"max_num_seqs": [8, 256]}, OLD, resolved)
    assert start.config.flags == {**flags, "max_num_seqs": 256}
    assert start.at(Limits(8)).flags == {**flags, "max_num_seqs": 8}


def test_what_limits_once_more_gives_way() -> None:
    most = at_most(config(max_num_seqs=4, max_num_active_seqs=2), {"max_num_seqs": [16]})
    assert most.flags == {"max_num_seqs": 16}
