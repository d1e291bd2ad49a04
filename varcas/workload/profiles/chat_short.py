"""chat-short: questions without their history."""

from __future__ import annotations

from varcas.workload.profiles.profile import CHAT_OUTPUT, CHAT_PROMPT, Lengths, Profile

PROFILE = Profile(
    prompt=Lengths.of_mean(69.5, CHAT_PROMPT.sigma),
    output=Lengths.of_mean(214.5, CHAT_OUTPUT.sigma),
    max_tokens=1024,
    source="LMSYS-Chat-1M (Zheng et al., ICLR 2024, arXiv:2309.11998, table 1): 69.5 tokens a prompt and 214.5 a "
    "response on average, Llama-2 tokenizer, a turn without its history. The spread is that of the same chats in "
    "Vidur's table 1 (arXiv:2405.05465): p90 / p50 = 1678 / 417 and 484 / 139. Prompt + output at most 1024.",
)
