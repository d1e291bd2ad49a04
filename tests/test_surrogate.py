from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varcas.space import Params
from varcas.surrogate import Seen, Surrogate, _improvement

SEQS, TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256], [512, 1024, 2048, 4096]
POINTS: dict[str, Params] = {
    f"{seqs}-{tokens}-{mode}-{chunked}": {
        "max_num_seqs": seqs, "max_num_batched_tokens": tokens, "mode": mode, "enable_chunked_prefill": chunked,
    }
    for seqs, tokens, mode, chunked in itertools.product(SEQS, TOKENS, ("none", "ngram", "eagle"), (True, False))
}  # fmt: skip
Truth = Callable[[Params], float]


def hill(params: Params) -> float:
    """Best at 32 sequences, 2048 tokens, without drafts, unchunked."""
    away = 0.2 * abs(math.log2(params["max_num_seqs"] / 32)) + 0.05 * abs(math.log2(params["max_num_batched_tokens"] / 2048))  # type: ignore[operator]  # fmt: skip  # noqa: E501
    return 400 * math.exp(-away - {"none": 0, "ngram": 0.15, "eagle": 0.3}[str(params["mode"])]
                          - 0.04 * bool(params["enable_chunked_prefill"]))  # fmt: skip


def search(
    truth: Truth,
    *,
    expected: dict[str, float] | None = None,
    noise: float = 0.02,
    seed: int = 0,
    most: int = 60,
    maximize: bool = True,
    judge: Callable[[str, float], Seen] | None = None,
) -> list[str]:
    """Keys in the order in which they were tried, three at random first, until the best."""
    rng = random.Random(seed)
    made = Surrogate(POINTS, expected or {}, maximize=maximize, seed=seed)
    tried = rng.sample(list(POINTS), 3)
    pick = max if maximize else min
    best = pick(POINTS, key=lambda key: truth(POINTS[key]))
    seen: list[Seen] = []
    for number in range(most):
        if number >= len(tried):
            wanted = made.next(seen, [], [key for key in POINTS if key not in tried])
            assert wanted is not None
            tried.append(wanted.key)
        value = truth(POINTS[tried[number]]) * math.exp(rng.gauss(0, noise))
        seen.append(judge(tried[number], value) if judge else Seen(tried[number], value))
        if tried[number] == best:
            break
    return tried


def test_the_best_of_a_smooth_space_is_found_in_a_tenth_of_it() -> None:
    counts = [len(search(hill, seed=seed)) for seed in range(4)]
    assert np.mean(counts) < 22  # of 216; at random 108


def test_the_least_latency_is_found_likewise() -> None:
    counts = [len(search(lambda params: 1 / hill(params), seed=seed, maximize=False)) for seed in range(3)]
    assert np.mean(counts) < 22


def test_a_good_estimate_saves_starts_and_a_wrong_one_costs_few() -> None:
    good = {key: math.log(hill(params)) for key, params in POINTS.items()}
    wrong = {key: -told for key, told in good.items()}
    counts = [np.mean([len(search(hill, expected=told, seed=seed)) for seed in range(3)]) for told in (good, {}, wrong)]
    assert counts[0] < counts[1]
    assert counts[0] < 10
    assert counts[2] < 40


def test_what_misses_a_limit_or_fails_is_left_alone() -> None:
    def judge(key: str, value: float) -> Seen:
        params = POINTS[key]
        if params["mode"] == "eagle":
            return Seen(key, None, runs=False)
        return Seen(key, value, {"ttft_p95_ms": math.log(float(params["max_num_seqs"]) / 16)})  # type: ignore[arg-type]

    tried = search(hill, judge=judge, most=24)[8:]
    failing = [key for key in tried if judge(key, 1.0).runs is False]
    missing = [key for key in tried if judge(key, 1.0).excess.get("ttft_p95_ms", 0) > 0]
    assert len(failing) <= 2  # of 16; a third of the space
    assert len(missing) <= 5  # 4 of 9 values miss, and the best one of all is among them


def test_nothing_is_said_before_anything_was_measured_or_when_nothing_is_left() -> None:
    made = Surrogate(POINTS, {}, maximize=True, seed=0)
    first, second, *_ = POINTS
    assert made.next([], [], list(POINTS)) is None
    assert made.next([Seen(first, None, runs=False)], [], list(POINTS)) is None
    assert made.next([Seen("outside", 1.0)], [], list(POINTS)) is None
    assert made.next([Seen(first, 1.0)], [], []) is None
    assert made.next([Seen(first, 1.0)], [second], [second]) is not None


def test_the_same_question_has_the_same_answer_and_what_runs_changes_it() -> None:
    seen = [Seen(key, hill(POINTS[key])) for key in random.Random(1).sample(list(POINTS), 6)]
    left = [key for key in POINTS if key not in {one.key for one in seen}]
    answers = [Surrogate(POINTS, {}, maximize=True, seed=0).next(seen, [], left) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0] is not None
    beside = Surrogate(POINTS, {}, maximize=True, seed=0).next(
        seen, [answers[0].key], [key for key in left if key != answers[0].key]
    )
    assert beside is not None
    assert beside.key != answers[0].key


def test_the_gain_falls_as_the_best_is_found() -> None:
    made = Surrogate(POINTS, {}, maximize=True, seed=0)
    few, many = (sorted(POINTS)[::step] for step in (60, 3))

    def gain(keys: Sequence[str]) -> float:
        wanted = made.next([Seen(key, hill(POINTS[key])) for key in keys], [], [k for k in POINTS if k not in keys])
        assert wanted is not None
        assert wanted.gain is not None
        return wanted.gain

    assert gain(few) > 3 * gain(many)


@given(st.floats(-3, 3), st.floats(0.01, 3))
def test_expected_improvement_is_the_mean_of_what_lies_above(above: float, deviation: float) -> None:
    grid = np.linspace(-8, 8, 20_001)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    slow = float(np.sum(np.maximum(above + deviation * grid, 0) * density) * (grid[1] - grid[0]))
    assert _improvement(np.array([above]), np.array([deviation]))[0] == pytest.approx(slow, abs=1e-3)
