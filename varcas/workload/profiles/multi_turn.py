"""multi-turn: conversations that grow, with pauses in which the user reads and thinks."""

from __future__ import annotations

from varcas.workload.conversation import THINK_S
from varcas.workload.profiles.profile import CHAT_OUTPUT, CHAT_PROMPT, Lengths, Profile

PROFILE = Profile(
    prompt=Lengths.of_mean(94.46, CHAT_PROMPT.sigma),
    output=Lengths.of_mean(348.45, CHAT_OUTPUT.sigma),
    max_tokens=8192,
    source="ShareGPT as WildChat's authors count it (Zhao et al., ICLR 2024, arXiv:2405.01470, table 1): 3.51 turns a "
    "conversation, 94.46 tokens a question and 348.45 an answer on average. Turns are geometric: 72 % of the "
    "conversations then have more than one, 73 % of ShareGPT's have (CachedAttention, USENIX ATC 2024, "
    "arXiv:2403.19708). The spread of lengths is that of LMSYS-Chat-1M in Vidur's table 1 (arXiv:2405.05465). No "
    "public chat data has the pauses alone: they are TPC-W's, exponential of mean 7 s, at most 70 s. Real ones are "
    "longer (in a chat service 80 % of the cache's reuses come within 10 minutes, arXiv:2506.02634), which a short "
    "window would hardly see: set `think_s`. All turns together at most 8192.",
    turns=3.51,
    think_s=THINK_S,
)
