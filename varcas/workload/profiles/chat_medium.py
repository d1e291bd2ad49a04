"""chat-medium: ShareGPT as vLLM's authors serve it."""

from __future__ import annotations

from varcas.workload.profiles.profile import CHAT_OUTPUT, CHAT_PROMPT, Lengths, Profile

PROFILE = Profile(
    prompt=Lengths.of_mean(161.31, CHAT_PROMPT.sigma),
    output=Lengths.of_mean(337.99, CHAT_OUTPUT.sigma),
    max_tokens=2048,
    source="ShareGPT as vLLM's authors serve it (Kwon et al., SOSP 2023, arXiv:2309.06180, figure 11): 161.31 prompt "
    "and 337.99 output tokens on average. The paper has no percentiles: the spread is that of LMSYS-Chat-1M in "
    "Vidur's table 1 (arXiv:2405.05465), p90 / p50 = 1678 / 417 and 484 / 139. Prompt + output at most 2048, as there.",
)
