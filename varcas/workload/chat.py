"""Profiles (how long chats are), schedules (who asks when), and which endpoint a model is asked through.

Nothing here talks to a server: the same input gives the same schedule, on any machine and with any NumPy. Only raw
uniform doubles are drawn from the bit generator (NumPy promises that PCG64's stream stays); everything else follows
from them by inversion.

A pair of lengths is a log-normal each, rounded up to whole tokens, and drawn again until prompt plus output fit the
limit: the smallest of the profile's own, `workload.max_tokens` and the server's. Where hardly any pair fits (64 draws
failed), the last one is cut: the output to half the limit, then the prompt to what is left.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from pydantic import JsonValue

from varcas.errors import InputError, nearest
from varcas.experiment import Workload
from varcas.records import ScheduledRequest
from varcas.workload.wire import Endpoint

Uniform = Callable[[], float]

MIN_PROMPT_TOKENS = 4
MIN_OUTPUT_TOKENS = 2  # a TPOT needs two
MIN_TOTAL_TOKENS = 2 * (MIN_PROMPT_TOKENS + MIN_OUTPUT_TOKENS)
MAX_REDRAWS = 64
P90 = NormalDist().inv_cdf(0.9)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tekken.json")
"""Files that bring a chat template; Mistral's own tokenizer has its template built in."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal number of tokens.

    Attributes:
        median: in tokens.
        sigma: standard deviation of its natural logarithm.
    """

    median: float
    sigma: float

    @classmethod
    def of_quantiles(cls, median: float, p90: float) -> Lengths:
        """The log-normal with this median and 90th percentile: sigma = ln(p90 / median) / z(0.9)."""
        return cls(median, math.log(p90 / median) / P90)

    @classmethod
    def of_mean(cls, mean: float, sigma: float) -> Lengths:
        """The log-normal with this mean: median = mean / exp(sigma^2 / 2)."""
        return cls(mean / math.exp(sigma**2 / 2), sigma)

    @property
    def mean(self) -> float:
        """In tokens, before rounding and before what does not fit is drawn again."""
        return self.median * math.exp(self.sigma**2 / 2)

    def draw(self, uniform: Uniform) -> int:
        """One length, at least 1."""
        z = NormalDist().inv_cdf(uniform() + 2**-54)  # never 0
        return math.ceil(self.median * math.exp(self.sigma * z))


@dataclass(frozen=True, slots=True)
class Profile:
    """How long the chats are.

    Attributes:
        prompt: tokens that the server sees, chat template included.
        output: tokens that it generates.
        max_tokens: longest prompt + output.
        source: where the numbers come from, and how the parameters follow from them.
    """

    prompt: Lengths
    output: Lengths
    max_tokens: int
    source: str


# Agrawal et al., Vidur (MLSys 2024, arXiv:2405.05465), table 1, LMSYS-Chat-1M-4K: p50 and p90 of 417 and 1,678 prompt
# tokens, 139 and 484 output tokens. Its means are 686 and 197; these log-normals', cut at 4,096 tokens, 638 and 221.
CHAT_PROMPT = Lengths.of_quantiles(417, 1678)
CHAT_OUTPUT = Lengths.of_quantiles(139, 484)

PROFILES: dict[str, Profile] = {
    "chat-short": Profile(
        Lengths.of_mean(69.5, CHAT_PROMPT.sigma),
        Lengths.of_mean(214.5, CHAT_OUTPUT.sigma),
        1024,
        "LMSYS-Chat-1M (Zheng et al., ICLR 2024, arXiv:2309.11998, table 1): 69.5 tokens a prompt and 214.5 a response "
        "on average, Llama-2 tokenizer, a turn without its history. The spread is that of the same chats in Vidur's "
        "table 1 (arXiv:2405.05465): p90 / p50 = 1678 / 417 and 484 / 139. Prompt + output at most 1024, "
        "which leaves means of 66 and 187 tokens, medians of 39 and 130, p90 of 150 and 419.",
    ),
    "chat-medium": Profile(
        Lengths.of_mean(161.31, CHAT_PROMPT.sigma),
        Lengths.of_mean(337.99, CHAT_OUTPUT.sigma),
        2048,
        "ShareGPT as vLLM's authors serve it (Kwon et al., SOSP 2023, arXiv:2309.06180, figure 11): 161.31 prompt and "
        "337.99 output tokens on average. The paper has no percentiles: the spread is that of LMSYS-Chat-1M in Vidur's "
        "table 1 (arXiv:2405.05465), p90 / p50 = 1678 / 417 and 484 / 139. Prompt + output at most 2048, "
        "as there, which leaves means of 152 and 307 tokens, medians of 88 and 207, p90 of 351 and 685.",
    ),
    "chat-long": Profile(
        Lengths.of_quantiles(1730, 5696),
        Lengths.of_quantiles(415, 834),
        8192,
        "openchat_sharegpt4 in Sarathi-Serve (Agrawal et al., OSDI 2024, arXiv:2403.02310, table 2), chats with GPT-4 "
        "and their whole history: p50 and p90 of 1730 and 5696 prompt tokens, 415 and 834 output tokens, prompt + "
        "output at most 8192, as there, which leaves means of 2112 and 480 tokens, medians of 1626 and 414, p90 of "
        "4561 and 830.",
    ),
}


def profile_named(name: str) -> Profile:
    """Looks a profile up.

    Raises:
        InputError: there is none of that name.
    """
    if name not in PROFILES:
        raise InputError(
            f"workload.profile: {name!r} is unknown.{nearest(name, PROFILES)} Known: {', '.join(sorted(PROFILES))}"
        )
    return PROFILES[name]


def check_workload(workload: Workload, serve_flags: Mapping[str, object]) -> None:
    """Checks what can be checked before a server starts.

    Raises:
        InputError: the profile is unknown, or no request fits the server's `max_model_len`.
    """
    length = serve_flags.get("max_model_len")
    _limit(profile_named(workload.profile), workload.max_tokens, length if isinstance(length, int) else None)


def schedule(
    workload: Workload, *, start_s: float, duration_s: float, max_len: int | None, stream: str
) -> tuple[ScheduledRequest, ...]:
    """The arrivals of one warm-up or one measurement, in order; all lie in `[start_s, start_s + duration_s)`.

    Args:
        workload: profile, rate, kind of arrival, seed, `max_tokens`.
        start_s: of the window; 0 for a measurement that starts with its window.
        duration_s: of the window.
        max_len: the server's `max_model_len`; None when it is not known.
        stream: `warmup`, `measure`, ...: each name gets random numbers of its own.

    Raises:
        InputError: the profile is unknown, or nothing fits `max_len`.
    """
    profile = profile_named(workload.profile)
    limit = _limit(profile, workload.max_tokens, max_len)
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
    arrivals, lengths, words = (_uniform(child) for child in np.random.SeedSequence((workload.seed, name)).spawn(3))
    due_s = _poisson(workload.rate_rps, arrivals) if workload.arrival == "poisson" else _constant(workload.rate_rps)
    requests: list[ScheduledRequest] = []
    for offset_s in due_s:
        if start_s + offset_s >= start_s + duration_s:
            return tuple(requests)
        prompt_tokens, output_tokens = _draw(profile, limit, lengths)
        index, seed = len(requests), int(words() * 2**53)
        requests.append(ScheduledRequest(index, start_s + offset_s, prompt_tokens, output_tokens, seed, index))
    raise AssertionError("arrivals never end")


def decide_endpoint(
    endpoint: Literal["auto", "chat", "completions"], model_dir: Path | None, serve_flags: Mapping[str, JsonValue]
) -> Endpoint:
    """Decides before a server starts: `auto` is chat when there is a chat template, else completions.

    Args:
        endpoint: as the workload has it.
        model_dir: the local directory of the model; None when there is none to look into.
        serve_flags: of the server, with underscores; `chat_template` and `tokenizer_mode` count.
    """
    if endpoint != "auto":
        return endpoint
    has_template = (
        bool(serve_flags.get("chat_template"))
        or serve_flags.get("tokenizer_mode") == "mistral"
        or (model_dir is not None and _has_template(model_dir))
    )
    return "chat" if has_template else "completions"


def _has_template(model_dir: Path) -> bool:
    if any((model_dir / name).is_file() for name in TEMPLATE_FILES):
        return True
    try:
        config = json.loads((model_dir / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):  # vLLM will say what is wrong with it
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _limit(profile: Profile, *others: int | None) -> int:
    limit = min(profile.max_tokens, *(other for other in others if other is not None), profile.max_tokens)
    if limit < MIN_TOTAL_TOKENS:
        raise InputError(
            f"prompt and output must fit {limit} tokens, the least is {MIN_TOTAL_TOKENS}: "
            "raise `workload.max_tokens` or the server's `max_model_len`"
        )
    return limit


def _draw(profile: Profile, limit: int, uniform: Uniform) -> tuple[int, int]:
    """One pair of lengths that fits `limit`."""
    for _ in range(MAX_REDRAWS):
        prompt_tokens = max(profile.prompt.draw(uniform), MIN_PROMPT_TOKENS)
        output_tokens = max(profile.output.draw(uniform), MIN_OUTPUT_TOKENS)
        if prompt_tokens + output_tokens <= limit:
            return prompt_tokens, output_tokens
    output_tokens = min(output_tokens, limit // 2)
    return min(prompt_tokens, limit - output_tokens), output_tokens


def _uniform(seed: np.random.SeedSequence) -> Uniform:
    return np.random.Generator(np.random.PCG64(seed)).random


def _poisson(rate_rps: float, uniform: Uniform) -> Iterator[float]:
    """Arrivals of a Poisson process: exponential gaps."""
    at_s = 0.0
    while True:
        at_s -= math.log1p(-uniform()) / rate_rps
        yield at_s


def _constant(rate_rps: float) -> Iterator[float]:
    number = 0
    while True:
        yield number / rate_rps
        number += 1
