"""What a built-in workload is: how long its prompts and answers are, how many turns, what is shared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from varcas.workload.draws import NORMAL, Uniform, normal

P90 = NORMAL.inv_cdf(0.9)


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

    @classmethod
    def of_median_and_mean(cls, median: float, mean: float) -> Lengths:
        """The log-normal with both: sigma = sqrt(2 ln(mean / median))."""
        return cls(median, math.sqrt(2 * math.log(mean / median)))

    @property
    def mean(self) -> float:
        """In tokens, before rounding and before what does not fit is drawn again."""
        return self.median * math.exp(self.sigma**2 / 2)

    def draw(self, uniform: Uniform) -> int:
        """One length, at least 1."""
        return math.ceil(self.median * math.exp(self.sigma * normal(uniform)))


@dataclass(frozen=True, slots=True)
class Profile:
    """A built-in workload.

    Attributes:
        prompt: tokens of a turn, without its history and the shared system prompt; in the first turn with the chat
            template.
        output: tokens of an answer.
        max_tokens: longest prompt + output, of all turns together; a shared system prompt comes on top.
        source: where the numbers come from, and how the parameters follow from them.
        turns: mean number of turns.
        think_s: mean pause of the user before the next turn.
        prefix_tokens: length of a system prompt that requests share.
        prefixes: how many such system prompts there are, each as likely as any.
    """

    prompt: Lengths
    output: Lengths
    max_tokens: int
    source: str
    turns: float = 1.0
    think_s: float = 0.0
    prefix_tokens: int = 0
    prefixes: int = 1


# Agrawal et al., Vidur (MLSys 2024, arXiv:2405.05465), table 1, LMSYS-Chat-1M-4K: p50 and p90 of 417 and 1,678 prompt
# tokens, 139 and 484 output tokens. Its means are 686 and 197; these log-normals', cut at 4,096 tokens, 638 and 221.
CHAT_PROMPT = Lengths.of_quantiles(417, 1678)
CHAT_OUTPUT = Lengths.of_quantiles(139, 484)
