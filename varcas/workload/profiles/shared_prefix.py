"""shared-prefix: short chats behind a few long system prompts."""

from __future__ import annotations

from varcas.workload.profiles.chat_short import PROFILE as CHAT_SHORT
from varcas.workload.profiles.profile import Profile

PROFILE = Profile(
    prompt=CHAT_SHORT.prompt,
    output=CHAT_SHORT.output,
    max_tokens=CHAT_SHORT.max_tokens,
    source="chat-short (LMSYS-Chat-1M, arXiv:2309.11998) behind one of 10 system prompts of 1024 tokens. Number and "
    "length are ours, between the defaults of two benchmarks: vLLM's prefix_repetition has 10 of 256 tokens, SGLang's "
    "generated-shared-prefix 64 of 2048. Yours: `shared_prefixes` and `shared_prefix_tokens`.",
    prefix_tokens=1024,
    prefixes=10,
)
