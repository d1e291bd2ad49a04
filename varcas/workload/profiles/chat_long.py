"""chat-long: chats with GPT-4 and their whole history, as one prompt."""

from __future__ import annotations

from varcas.workload.profiles.profile import Lengths, Profile

PROFILE = Profile(
    prompt=Lengths.of_quantiles(1730, 5696),
    output=Lengths.of_quantiles(415, 834),
    max_tokens=8192,
    source="openchat_sharegpt4 in Sarathi-Serve (Agrawal et al., OSDI 2024, arXiv:2403.02310, table 2), chats with "
    "GPT-4 and their whole history: p50 and p90 of 1730 and 5696 prompt tokens, 415 and 834 output tokens. Prompt + "
    "output at most 8192, as there.",
)
