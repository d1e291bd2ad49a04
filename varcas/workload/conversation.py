"""What a user says, before it is known when: a conversation of one turn or more."""

from __future__ import annotations

from dataclasses import dataclass

MIN_PROMPT_TOKENS = 4
MIN_OUTPUT_TOKENS = 2
"""A TPOT needs two."""
MIN_TOTAL_TOKENS = 2 * (MIN_PROMPT_TOKENS + MIN_OUTPUT_TOKENS)
BLOCK_TOKENS = 512
"""Of a Mooncake trace's `hash_ids`."""
TURN_TEMPLATE_TOKENS = 16
"""Kept free for what a chat template puts around each later turn (some 5 to 12 tokens in the common ones)."""
THINK_S = 7.0
"""Mean pause between turns, where nobody says otherwise: TPC-W's (TPC Benchmark W 1.8, clause 5.3.1.1)."""
MAX_THINKS = 10
"""A pause is at most so many times its mean, as in TPC-W."""


@dataclass(slots=True)
class Turn:
    """One question and the answer's length.

    Attributes:
        prompt_tokens: of the question, in the first turn with chat template and system prompt; 0: to be counted.
        output_tokens: of the answer; 0: those of `answer`, to be counted.
        prompt: the question's own words; None: words are drawn.
        answer: words of the answer that was once given, for their number.
        blocks: ids of the prompt's blocks: requests whose first ids agree begin alike.
    """

    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None
    answer: str | None = None
    blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class Conversation:
    """Turns in order.

    Attributes:
        turns: at least one.
        think_s: mean pause of the user before each later turn.
        pause_s: mean pause of a closed loop's user after the last.
        prefix: which of the shared system prompts it has; None without one.
        prefix_tokens: length of that.
        system: a system prompt's own words; None without any.
    """

    turns: list[Turn]
    think_s: float = THINK_S
    pause_s: float = 0.0
    prefix: int | None = None
    prefix_tokens: int = 0
    system: str | None = None
